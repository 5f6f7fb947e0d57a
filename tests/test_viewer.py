"""The decoder and the strip: what it shows, that it really is open loop, and that training does not notice it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from envs import EnvConfig, make_env
from runners.checkpoint import load_checkpoint, save_checkpoint
from runners.replay import Replay
from runners.viewer import EXAMPLES, GAP_COLOUR, LINE, MARKER_COLOUR, SEAM, Viewer
from worldmodels.decoder import Decoder
from worldmodels.encoder import ConvConfig
from worldmodels.interface import Batch
from worldmodels.lewm import LeWMConfig, LeWorldModel, build_world_model

SIZE, DIM, CONTEXT, HORIZON = 16, 8, 3, 6
LENGTH = CONTEXT + HORIZON
SIDE = 128 + SEAM  # of a frame in the strip: 16 pixels, enlarged eightfold
REAL, DECODED, DIFFERENCE = range(3)
CPU = torch.device("cpu")


@pytest.fixture
def model() -> LeWorldModel:
    """Untrained, small, and with BatchNorm: its running statistics would take note of a viewer."""
    conv = ConvConfig(channels=(4, 8, 8), hidden=16, projector=True)
    config = LeWMConfig(latent_dim=DIM, encoder="conv", conv=conv, head_units=8)
    model = build_world_model((3, SIZE, SIZE), 1, config)
    noise = torch.randint(0, 256, (64, 3, SIZE, SIZE), dtype=torch.uint8)
    model.fit_normaliser(noise)
    for _ in range(50):
        model.encode(noise)  # statistics under which frames have latents far apart
    return model


@pytest.fixture
def viewer() -> Viewer:
    viewer = Viewer(DIM, (3, SIZE, SIZE), CPU, seed=1)
    with torch.no_grad():
        viewer.decoder.convolutions[-2].weight.mul_(100)  # every change of a latent can be seen
    return viewer


def random_batch(sequences: int = EXAMPLES, length: int = LENGTH) -> Batch:
    """Noise from the middle of one episode."""
    none = torch.zeros(sequences, length, dtype=torch.bool)
    return Batch(
        obs=torch.randint(0, 256, (sequences, length, 3, SIZE, SIZE), dtype=torch.uint8),
        action=torch.rand(sequences, length, 1) * 2 - 1,
        reward=torch.zeros(sequences, length),
        is_first=none,
        is_last=none,
        is_terminal=none,
    )


def random_replay(path: Path, rows: int = 100) -> Replay:
    """Noise, one episode, one environment."""
    rng = np.random.default_rng(3)
    replay = Replay.create(path, capacity=rows, num_envs=1, obs_shape=(3, SIZE, SIZE), obs_dtype=np.uint8, action_dim=1)
    for i in range(rows):
        add_row(replay, rng.integers(0, 256, (3, SIZE, SIZE), np.uint8), rng.uniform(-1, 1, 1), is_first=i == 0)
    return replay


def add_row(replay: Replay, obs: np.ndarray, action: np.ndarray, *, is_first: bool) -> None:
    no = np.zeros(1, bool)
    replay.add(
        obs=obs[None],
        action=action[None],
        reward=np.zeros(1, np.float32),
        is_first=np.array([is_first]),
        is_last=no,
        is_terminal=no,
    )


def frames_of(strip: np.ndarray, example: int, row: int) -> np.ndarray:
    """One row of one example, (T,3,H,W), at its original size."""
    top = example * (3 * SIDE + LINE) + row * SIDE
    left = CONTEXT * SIDE
    band = np.concatenate([strip[top : top + SIDE, :left], strip[top : top + SIDE, left + LINE :]], axis=1)
    frames = band.reshape(SIDE, -1, SIDE, 3).transpose(1, 3, 0, 2)
    return frames[:, :, : 8 * SIZE : 8, : 8 * SIZE : 8]


def decoded_rows(strip: np.ndarray) -> np.ndarray:
    """What is decoded, (N,T,3,H,W)."""
    return np.stack([frames_of(strip, i, DECODED) for i in range(EXAMPLES)])


def changed_columns(one: np.ndarray, other: np.ndarray) -> list[int]:
    """Columns in which any example differs, by more than a last bit of the latents can tip."""
    return np.flatnonzero((np.abs(one.astype(int) - other) > 1).any(axis=(0, 2, 3, 4))).tolist()


# -- the decoder -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (64, 64), (224, 224), (48, 80), (50, 101), (3, 5)])
def test_pictures_of_any_size(size: tuple[int, int]) -> None:
    pictures = Decoder(DIM, (3, *size))(100 * torch.randn(2, DIM))
    assert pictures.shape == (2, 3, *size)
    assert bool(((pictures >= 0) & (pictures <= 1)).all())


def test_where_nothing_is_drawn_there_is_the_mean_picture() -> None:
    decoder = Decoder(DIM, (3, SIZE, SIZE))
    pictures = 0.1 + 0.8 * torch.rand(5, 3, SIZE, SIZE)
    decoder.start(pictures)
    with torch.no_grad():
        decoder.convolutions[-2].weight.zero_()
        decoder.convolutions[-2].bias.zero_()
    torch.testing.assert_close(decoder(torch.randn(1, DIM))[0], pictures.mean(0))


def test_loss_is_least_at_the_picture() -> None:
    """The cross entropy's gradient is (decoded − picture) / elements, so it vanishes exactly there."""
    decoder = Decoder(DIM, (3, SIZE, SIZE))
    z, pictures = torch.randn(4, DIM), torch.rand(4, 3, SIZE, SIZE)
    decoder.loss(z, pictures).backward()
    error = decoder(z) - pictures
    assert decoder.background.grad is not None
    torch.testing.assert_close(decoder.background.grad, (error / error.numel()).sum(0))


def test_learns_real_frames(tmp_path: Path) -> None:
    """Real cartpole pixels, from the latents of an untrained encoder, far below the error of the mean picture."""
    env = make_env("dmc/cartpole-swingup", EnvConfig(), seed=1)
    replay = Replay.create(
        tmp_path / "replay", capacity=12, num_envs=1, obs_shape=(3, 64, 64), obs_dtype=np.uint8, action_dim=1
    )
    obs, _ = env.reset()
    seen = []
    for i in range(12):
        action = np.array([1.0 if i % 4 < 2 else -1.0], np.float32)
        add_row(replay, obs, action, is_first=i == 0)
        seen.append(obs)
        obs = env.step(action)[0]
    env.close()
    model = build_world_model((3, 64, 64), 1, LeWMConfig())
    model.fit_normaliser(torch.from_numpy(np.stack(seen)))
    error = Viewer(model.config.latent_dim, (3, 64, 64), CPU, seed=1).fit(model, replay, steps=200, batch=16)
    pictures = np.stack(seen) / 255
    assert error < 0.2 * np.square(pictures - pictures.mean(0)).mean()


# -- the strip ---------------------------------------------------------------------------------------------------------


def test_layout(model: LeWorldModel, viewer: Viewer) -> None:
    strip = viewer.strip(model, random_batch(), CONTEXT, HORIZON)
    assert strip.dtype == np.uint8
    assert strip.shape == (EXAMPLES * (3 * SIDE + LINE) - LINE, LENGTH * SIDE + LINE, 3)
    gap = np.zeros(len(strip), bool)
    for example in range(1, EXAMPLES):
        gap[example * (3 * SIDE + LINE) - LINE : example * (3 * SIDE + LINE)] = True
    assert (strip[gap] == GAP_COLOUR).all()
    is_marker = (strip[~gap] == MARKER_COLOUR).all(-1).all(0)
    assert np.flatnonzero(is_marker).tolist() == list(range(CONTEXT * SIDE, CONTEXT * SIDE + LINE))


def test_rows_are_the_real_frames_what_is_decoded_and_their_difference(model: LeWorldModel, viewer: Viewer) -> None:
    batch = random_batch()
    strip = viewer.strip(model, batch, CONTEXT, HORIZON)
    for example in range(EXAMPLES):
        real, decoded, difference = (frames_of(strip, example, row) for row in range(3))
        np.testing.assert_array_equal(real, batch.obs[example].numpy())
        off = np.abs(np.abs(real.astype(int) - decoded.astype(int)) - difference.astype(int))
        assert off.max() <= 1  # of rounding


def test_context_shows_the_latents_of_the_frames(model: LeWorldModel, viewer: Viewer) -> None:
    batch = random_batch()
    decoded = decoded_rows(viewer.strip(model, batch, CONTEXT, HORIZON))
    model.eval()
    with torch.no_grad():
        known = viewer.decoder(model.encode(batch.obs[:, :CONTEXT].flatten(0, 1))).view(
            EXAMPLES, CONTEXT, 3, SIZE, SIZE
        )
    assert np.abs(decoded[:, :CONTEXT] - 255 * known.numpy()).max() < 1


def test_imagination_sees_no_frame_after_the_context(model: LeWorldModel, viewer: Viewer) -> None:
    batch = random_batch()
    changed = batch.obs.clone()
    changed[:, CONTEXT:] = 255 - changed[:, CONTEXT:]
    before = viewer.strip(model, batch, CONTEXT, HORIZON)
    after = viewer.strip(model, batch._replace(obs=changed), CONTEXT, HORIZON)
    assert changed_columns(decoded_rows(before), decoded_rows(after)) == []
    for row in (REAL, DIFFERENCE):
        one, other = (np.stack([frames_of(strip, i, row) for i in range(EXAMPLES)]) for strip in (before, after))
        assert changed_columns(one, other) == list(range(CONTEXT, LENGTH))


def test_imagination_sees_the_last_frame_of_the_context(model: LeWorldModel, viewer: Viewer) -> None:
    batch = random_batch()
    changed = batch.obs.clone()
    changed[:, CONTEXT - 1] = 255 - changed[:, CONTEXT - 1]
    before = decoded_rows(viewer.strip(model, batch, CONTEXT, HORIZON))
    after = decoded_rows(viewer.strip(model, batch._replace(obs=changed), CONTEXT, HORIZON))
    assert changed_columns(before, after) == list(range(CONTEXT - 1, LENGTH))


@pytest.mark.parametrize("row", [CONTEXT - 1, CONTEXT, LENGTH - 2, LENGTH - 1])
def test_an_action_changes_what_is_imagined_after_it(model: LeWorldModel, viewer: Viewer, row: int) -> None:
    """The action that left at row t is first felt at t + 1. The last one leads out of the strip."""
    batch = random_batch()
    changed = batch.action.clone()
    changed[:, row] = -torch.sign(changed[:, row])
    before = decoded_rows(viewer.strip(model, batch, CONTEXT, HORIZON))
    after = decoded_rows(viewer.strip(model, batch._replace(action=changed), CONTEXT, HORIZON))
    assert changed_columns(before, after) == list(range(row + 1, LENGTH))


def test_sequences_inside_one_episode_come_first(model: LeWorldModel, viewer: Viewer) -> None:
    """What lies beyond an episode's end is blank. A sequence may begin with an episode."""
    batch = random_batch(sequences=5)
    is_first = batch.is_first.clone()
    is_first[0, 2], is_first[1, 7], is_first[2, 0], is_first[3, 5] = True, True, True, True
    strip = viewer.strip(model, batch._replace(is_first=is_first), CONTEXT, HORIZON)
    for example, sequence in enumerate((2, 4)):
        np.testing.assert_array_equal(frames_of(strip, example, REAL), batch.obs[sequence].numpy())
    np.testing.assert_array_equal(frames_of(strip, 2, REAL)[:7], batch.obs[1, :7].numpy())
    for row in range(3):
        assert (frames_of(strip, 2, row)[7:] == 128).all()


def test_short_batches_make_short_strips(model: LeWorldModel, viewer: Viewer) -> None:
    strip = viewer.strip(model, random_batch(sequences=2, length=CONTEXT + 1), CONTEXT, HORIZON)
    assert strip.shape == (2 * (3 * SIDE + LINE) - LINE, (CONTEXT + 1) * SIDE + LINE, 3)


def test_what_cannot_be_shown_is_refused(model: LeWorldModel, viewer: Viewer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"RGB pictures \(3,H,W\), not observations of shape \(5,\)"):
        Viewer(DIM, (5,), CPU, seed=1)
    with pytest.raises(ValueError, match=f"sequences of {CONTEXT}"):
        viewer.strip(model, random_batch(length=CONTEXT), CONTEXT, HORIZON)
    with random_replay(tmp_path / "replay") as replay, pytest.raises(ValueError, match="at least 1 step"):
        viewer.fit(model, replay, steps=0)


# -- beside a training -------------------------------------------------------------------------------------------------


def train_a_little(path: Path, *, watched: bool) -> tuple[dict[str, Tensor], Tensor, Any]:
    """Weights, PyTorch's random state and the sampler's after a few updates, with and without a viewer looking on."""
    torch.manual_seed(5)
    generator = np.random.default_rng(5)
    conv = ConvConfig(channels=(4, 8, 8), hidden=16, projector=True)
    config = LeWMConfig(latent_dim=DIM, encoder="conv", conv=conv, head_units=8)
    model = build_world_model((3, SIZE, SIZE), 1, config)
    viewer = Viewer(DIM, (3, SIZE, SIZE), CPU, seed=1) if watched else None
    optimiser = torch.optim.Adam(model.parameters())
    with random_replay(path) as replay:
        model.fit_normaliser(replay.sample(32, 1, generator).obs.flatten(0, 1))
        for _ in range(3):
            model.loss(replay.sample(4, 8, generator))[0].backward()
            if viewer is not None:  # at the worst moment: gradients stand, and the model is in training mode
                viewer.fit(model, replay, steps=2)
                viewer.strip(model, replay.sample(4, LENGTH, viewer.generator), CONTEXT, HORIZON)
            optimiser.step()
            optimiser.zero_grad()
    assert model.training
    return model.state_dict(), torch.get_rng_state(), generator.bit_generator.state


def test_training_does_not_notice_the_viewer(tmp_path: Path) -> None:
    alone, alone_random, alone_sampler = train_a_little(tmp_path / "alone", watched=False)
    watched, watched_random, watched_sampler = train_a_little(tmp_path / "watched", watched=True)
    assert all(torch.equal(alone[name], watched[name]) for name in alone)
    assert torch.equal(alone_random, watched_random)
    assert alone_sampler == watched_sampler


def test_goes_on_from_a_checkpoint(model: LeWorldModel, viewer: Viewer, tmp_path: Path) -> None:
    with random_replay(tmp_path / "replay") as replay:
        viewer.fit(model, replay, steps=3)
        save_checkpoint(tmp_path / "checkpoint", {"viewer": viewer.state_dict()}, {})
        other = Viewer(DIM, (3, SIZE, SIZE), CPU, seed=2)
        other.load_state_dict(load_checkpoint(tmp_path / "checkpoint")[0]["viewer"])
        assert viewer.fit(model, replay, steps=3) == other.fit(model, replay, steps=3)
    for one, two in zip(viewer.decoder.parameters(), other.decoder.parameters(), strict=True):
        assert torch.equal(one, two)
