"""LeWorldModel: the timeline, proven with exact toy worlds; memory; gradients; collapse and how SIGReg prevents it."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from worldmodels.encoder import ConvConfig, ConvEncoder, KeypointConfig, KeypointEncoder, Normaliser, StateEncoder
from worldmodels.interface import Batch
from worldmodels.lewm import PAPER, LeWMConfig, LeWMState, LeWorldModel, build_world_model
from worldmodels.predictor import WindowConfig, WindowPredictor
from worldmodels.sigreg import expected_sigreg, random_directions, sigreg
from worldmodels.transformer import TransformerConfig, TransformerPredictor
from worldmodels.vit import ViTConfig, ViTEncoder
from worldmodels.windows import unfold_windows

SMALL = LeWMConfig(
    cut_windows=True,
    latent_dim=6,
    encoder="conv",
    keypoint=KeypointConfig(stem=4, keypoints=6, hidden=16),
    conv=ConvConfig(channels=(4, 6, 8), hidden=16),
    window=WindowConfig(history=3, hidden=(16, 10)),
    vit=ViTConfig(patch=4, width=24, depth=1, heads=3, mlp=32, projector=40),
    transformer=TransformerConfig(history=3, depth=1, heads=2, head_dim=8, mlp=32, dropout=0.0, projector=40),
    sigreg_weight=0.05,
    sigreg_sample="batch",
    sigreg_directions=16,
    rollout=4,
    rollout_weight=1.0,
    reward_weight=1.0,
    cont_weight=1.0,
    head_gradient=True,
    head_units=8,
    reward_limit=4.0,
    shift_pixels=0,
)


# -- exact worlds ------------------------------------------------------------------------------------------------------


class Momentum(nn.Module):
    """x_{t+1} = x_t + (x_t − x_{t−1}) + a_t + a_{t−1} / 2, nothing from before the start; hidden is the newest action.

    A latent or an action from the wrong row, or from another episode, makes it wrong. ``drift`` is added to each
    prediction on purpose.
    """

    history, hidden_dim = 2, 1

    def __init__(self, drift: float = 0.0) -> None:
        super().__init__()
        self.drift = drift

    def forward(self, z: Tensor, action: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        past = torch.where(valid[:, :1], z[:, 1] - z[:, 0] + action[:, 0] / 2, 0.0)
        return z[:, 1] + past + action[:, 1] + self.drift, action[:, 1]

    def sequence(self, z: Tensor, action: Tensor, is_first: Tensor) -> tuple[Tensor, Tensor]:
        predicted, hidden = self(*unfold_windows(z, action, is_first, 2))
        return predicted.view_as(z), hidden.view_as(z)


class Copy(Momentum):
    """x_{t+1} = x_t + a_t."""

    def forward(self, z: Tensor, action: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        return z[:, 1] + action[:, 1] + self.drift, action[:, 1]


class LastAction(nn.Module):
    """Knows that the reward is the action that led here, which is the last of the features."""

    def loss(self, feat: Tensor, target: Tensor) -> Tensor:
        return (feat[..., -1] - target).square()


def even(x: Tensor) -> Tensor:
    """Whether x is an even number of sixteenths: as good as a coin, and known from x."""
    return (16 * x) % 2 == 0


class EndsWhereEven(nn.Module):
    """Knows that a state is terminal where x is even."""

    def loss(self, feat: Tensor, target: Tensor) -> Tensor:
        return ((~even(feat[..., 0])).float() - target).square()


def exact_world(predictor: Momentum, rows: int, starts: tuple[int, ...], batch: int = 3) -> Batch:
    """Episodes that follow ``predictor``'s rule, in sixteenths, so that float arithmetic is exact.

    The reward is the action before, and a state is terminal where x is even, so that both are known on every row.
    """
    action = torch.randint(-8, 9, (batch, rows, 1)) / 8
    is_first = torch.zeros(batch, rows, dtype=torch.bool)
    is_first[:, list(starts)] = True
    is_last = torch.cat([is_first[:, 1:], torch.zeros(batch, 1, dtype=torch.bool)], 1)
    action[is_last] = 0
    x, age = torch.zeros(batch, rows, 1), 0
    for t in range(rows):
        age = 0 if t == 0 or t in starts else age + 1
        if age == 0:
            x[:, t] = torch.randint(-80, 81, (batch, 1)) / 8
        else:
            two = torch.tensor([t - 2 if age > 1 else t - 1, t - 1])
            valid = torch.tensor([[age > 1, True]]).expand(batch, 2)
            x[:, t] = predictor(x[:, two], action[:, two], valid)[0]
    reward = torch.cat([torch.full((batch, 1), 7.0), action[:, :-1, 0]], 1)
    return Batch(x, action, torch.where(is_first, 7.0, reward), is_first, is_last, even(x[..., 0]))


def toy(predictor: Momentum, **changes: object) -> LeWorldModel:
    """A world model whose latent is the observation."""
    config = replace(SMALL, latent_dim=1, **changes)
    model = LeWorldModel(nn.Identity(), predictor, Normaliser((1,), per_feature=True), action_dim=1, config=config)
    model.head_trunk = nn.Identity()  # type: ignore[assignment]
    model.reward_head = LastAction()  # type: ignore[assignment]
    model.cont_head = EndsWhereEven()  # type: ignore[assignment]
    return model


TERMS = ("pred_loss", "rollout_loss", "reward_loss", "cont_loss")


@pytest.mark.parametrize(("rollout", "every"), [(2, 1), (4, 1), (20, 1), (4, 2), (5, 3)])
@pytest.mark.parametrize("starts", [(), (0,), (1,), (0, 6), (3, 4, 9), (11,)])
def test_an_exact_model_of_an_exact_world_has_no_loss(starts: tuple[int, ...], rollout: int, every: int) -> None:
    """Every latent, action, reward and flag meets the row it belongs to, and no episode predicts the next."""
    batch = exact_world(Momentum(), 12, starts)
    _, _, terms = toy(Momentum(), rollout=rollout, rollout_every=every).loss(batch)
    assert {name: float(terms[name]) for name in TERMS} == dict.fromkeys(TERMS, 0.0)


@pytest.mark.parametrize(
    ("field", "broken"),
    [
        ("action", ("pred_loss", "rollout_loss", "reward_loss")),
        ("reward", ("reward_loss",)),
        ("is_terminal", ("cont_loss",)),
        ("is_first", ("pred_loss", "rollout_loss", "reward_loss")),
        ("obs", ("pred_loss", "rollout_loss", "cont_loss")),
    ],
)
@pytest.mark.parametrize("by", [-1, 1])
def test_a_row_s_slip_in_any_field_is_seen(field: str, broken: tuple[str, ...], by: int) -> None:
    batch = exact_world(Momentum(), 12, (0, 6))
    slipped = batch._replace(**{field: getattr(batch, field).roll(by, dims=1)})
    _, _, terms = toy(Momentum()).loss(slipped)
    for name in broken:
        assert float(terms[name]) > 0.01, name


def test_rolled_out_states_meet_their_rewards_too() -> None:
    """With T = 2 + 5 rows and one start for long rollouts, the last reward counts in each of the 6 steps: once as the
    real row's, and on one of the 6 one-step and 5 longer predictions."""
    batch = exact_world(Copy(), 7, (), batch=1)
    reward = batch.reward.clone()
    reward[0, -1] += 2
    _, _, terms = toy(Copy(), rollout=6).loss(batch._replace(reward=reward))
    assert float(terms["reward_loss"]) == pytest.approx(4 / 6 + 2 * 4 / 11)


@pytest.mark.parametrize(
    ("changes", "total", "kept"),
    [
        # Of 11 one step ahead and 8 each 2, 3 and 4 ahead, as many as do not cross into the second episode.
        ({}, 11 + 3 * 8, 10 + 6 + 5 + 4),
        # From rows 0, 2, 4 and 6: 4 crosses after two steps, 2 after four.
        ({"rollout_every": 2}, 11 + 3 * 4, 10 + 3 + 3 + 2),
        # None from row 0, before which the sample has no row.
        ({"cut_windows": False}, 10 + 3 * 7, 9 + 5 + 4 + 3),
        ({"cut_windows": False, "rollout_every": 3}, 10 + 3 * 3, 9 + 2 + 2 + 2),
    ],
)
def test_predictions_name_the_rows_that_they_are_of(changes: dict[str, Any], total: int, kept: int) -> None:
    """Those of an exact model are their rows' latents, as long as they stay in the episode that they began in."""
    batch, model = exact_world(Momentum(), 12, (0, 6)), toy(Momentum(), rollout=4, **changes)
    _, _, predicted = model.losses(batch, model.embed(batch))
    latent, alive = predicted.feat[batch.reward.numel() :, 0], predicted.alive == 1
    row = batch.obs.flatten()[predicted.row]
    assert torch.equal(latent[alive], row[alive])
    assert not (latent[~alive] == row[~alive]).all()
    assert (len(alive), int(alive.sum())) == (3 * total, 3 * kept)


def test_errors_of_a_drifting_model_grow_as_computed_by_hand() -> None:
    """A drift of 1/4 a step: (1/4)² after one, (k/4)² after k steps, for every start that has them behind it."""
    batch = exact_world(Copy(), 12, (0, 7))
    model = toy(Copy(0.25), rollout=4)
    _, _, terms = model.loss(batch)
    assert float(terms["pred_loss"]) == pytest.approx(1 / 16)
    assert float(terms["rollout_loss"]) == pytest.approx((4 + 9 + 16) / 16 / 3)
    drawn = torch.get_rng_state()
    monitors = model.monitors(batch)
    assert torch.equal(torch.get_rng_state(), drawn)
    variance = float(batch.obs.flatten(0, 1).var(0).mean())
    assert monitors["latent_variance_mean"] == pytest.approx(variance, rel=1e-5)
    assert monitors["open_loop_error_1"] == pytest.approx(1 / 16 / variance, rel=1e-5)
    assert monitors["open_loop_error_4"] == pytest.approx(1 / variance, rel=1e-5)
    # Rows 0…7 start four steps ahead; of these only 0, 1, 2 and 7 stay within their episode.
    moved = (batch.obs[:, [4, 5, 6, 11]] - batch.obs[:, [0, 1, 2, 7]]).square().mean()
    assert monitors["copy_last_error_4"] == pytest.approx(float(moved) / variance, rel=1e-5)


def test_the_loss_is_the_weighted_sum_of_its_terms() -> None:
    weights = {"sigreg": 0.5, "rollout": 0.25, "inverse": 4.0, "reward": 3.0, "cont": 2.0}
    model = build_world_model((5,), 2, replace(SMALL, **{f"{name}_weight": w for name, w in weights.items()}))
    loss, _, terms = model.loss(random_batch((5,), 8))
    expected = terms["pred_loss"] + sum(weight * terms[f"{name}_loss"] for name, weight in weights.items())
    torch.testing.assert_close(loss, expected)
    assert not any(term.requires_grad for term in terms.values())


def test_a_weight_of_zero_removes_a_term() -> None:
    bare = replace(SMALL, rollout_weight=0.0, reward_weight=0.0, cont_weight=0.0)
    _, _, terms = build_world_model((5,), 2, bare).loss(random_batch((5,), 8))
    assert set(terms) == {"pred_loss", "sigreg_loss"}
    _, _, terms = build_world_model((5,), 2, replace(SMALL, rollout=1)).loss(random_batch((5,), 8))
    assert "rollout_loss" not in terms


class Acceleration(nn.Module):
    """What an inverse model of a ``Momentum`` world tells from the newest latent and its last two changes: the newest
    action, and half of the one before, which it cannot tell apart."""

    def forward(self, read: Tensor) -> Tensor:
        return read[..., 2:3] - read[..., 1:2]


@pytest.mark.parametrize(
    ("starts", "spans"), [((), range(10)), ((0, 6), [0, 1, 2, 3, 6, 7, 8, 9]), ((4,), [0, 1, 4, 5, 6, 7, 8, 9])]
)
def test_an_inverse_model_is_asked_for_the_last_action_between_latents_of_one_episode(
    starts: tuple[int, ...], spans: Sequence[int]
) -> None:
    """Of the three rows from t on it is wrong by half of the action at t, and by nothing else."""
    batch = exact_world(Momentum(), 12, starts)
    model = toy(Momentum(), inverse_weight=1.0)
    model.inverse_head = Acceleration()  # type: ignore[assignment]
    wrong = (batch.action[:, list(spans)] / 2).square().mean()
    assert float(model.loss(batch)[2]["inverse_loss"]) == pytest.approx(float(wrong), rel=1e-6)


def test_an_inverse_model_shapes_the_latents() -> None:
    model = build_world_model((5,), 2, replace(SMALL, inverse_weight=1.0))
    batch = random_batch((5,), 8)
    _, embedded = model.embed(batch)
    model._inverse_loss(batch, embedded.z).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.encoder.parameters())
    with pytest.raises(ValueError, match="more than 3 rows, got 3"):
        model.loss(random_batch((5,), 3))


@pytest.mark.parametrize("rollout", [1, 6])
def test_two_rows_are_enough(rollout: int) -> None:
    loss, states, _ = build_world_model((5,), 2, replace(SMALL, rollout=rollout)).loss(random_batch((5,), 2))
    assert bool(loss.isfinite())
    assert states.z.shape == (8, 3, 6)


def test_one_row_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 rows, got 1"):
        build_world_model((5,), 2, SMALL).loss(random_batch((5,), 1))


# -- memory ------------------------------------------------------------------------------------------------------------


def random_batch(obs_shape: tuple[int, ...], rows: int, starts: tuple[int, ...] = (), batch: int = 4) -> Batch:
    obs = torch.randn(batch, rows, *obs_shape)
    if len(obs_shape) == 3:
        obs = (100 + 50 * obs).clamp(0, 255).byte()
    is_first = torch.zeros(batch, rows, dtype=torch.bool)
    is_first[:, list(starts)] = True
    is_last = torch.cat([is_first[:, 1:], torch.zeros(batch, 1, dtype=torch.bool)], 1)
    action = torch.where(is_last[..., None], 0.0, torch.rand(batch, rows, 2) * 2 - 1)
    return Batch(obs, action, torch.randn(batch, rows), is_first, is_last, torch.zeros_like(is_last))


VARIANTS = {
    "conv, window": ((3, 16, 16), SMALL),
    "conv with BatchNorm, window": ((3, 16, 16), replace(SMALL, conv=replace(SMALL.conv, projector=True))),
    "keypoint, window": ((3, 16, 16), replace(SMALL, encoder="keypoint")),
    "vit, transformer": ((3, 16, 16), replace(SMALL, encoder="vit", predictor="transformer")),
    "state, window of 1": ((5,), replace(SMALL, window=WindowConfig(history=1, hidden=(16, 10)))),
    "state, window of 2": ((5,), replace(SMALL, window=WindowConfig(history=2, hidden=(16, 10)))),
    "state, transformer": ((5,), replace(SMALL, predictor="transformer")),
}


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> tuple[LeWorldModel, tuple[int, ...]]:
    """A model in eval mode whose every path is open, and its observations' shape."""
    shape, config = VARIANTS[request.param]
    model = build_world_model(shape, 2, config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if len(shape) == 3:
        model.fit_normaliser(random_batch(shape, 8).obs.flatten(0, 1))
    return model.eval(), shape


def latents(model: LeWorldModel, batch: Batch) -> Tensor:
    return model.encode(batch.obs.flatten(0, 1)).view(*batch.reward.shape, -1)


@torch.no_grad()
def test_observing_step_by_step_equals_the_states_of_the_batch(
    variant: tuple[LeWorldModel, tuple[int, ...]],
) -> None:
    """Acting and learning see the same state: in the whole batch at once, and row by row from an empty memory."""
    model, shape = variant
    batch = random_batch(shape, 11, (5, 6))
    batch.is_first[:2, 0] = True  # The others begin with an empty memory too, within an episode.
    now, _ = model.states(batch, latents(model, batch))
    expected, settled = model.feat(now).view(4, 11, -1), model.settled(now).view(4, 11)
    state, action = model.initial(4), torch.zeros(4, 2)
    for t in range(11):
        state = model.observe(state, action, batch.obs[:, t], batch.is_first[:, t])
        action = batch.action[:, t]
        torch.testing.assert_close(model.feat(state), expected[:, t], rtol=1e-4, atol=1e-5)
        assert torch.equal(model.settled(state), settled[:, t])
        # What is imagined from it is the same too, so the memory behind feat is.
        row = LeWMState(*(x.view(4, 11, *x.shape[1:])[:, t] for x in now))
        imagined = [model.feat(model.imagine(s, batch.action[:, t])) for s in (state, row)]
        torch.testing.assert_close(imagined[0], imagined[1], rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.05


@torch.no_grad()
def test_a_sample_that_begins_within_an_episode_agrees_once_its_memory_is_full(
    variant: tuple[LeWorldModel, tuple[int, ...]],
) -> None:
    model, shape = variant
    batch = random_batch(shape, 11)
    whole, _ = model.states(batch, latents(model, batch))
    part = Batch(*(x[:, 3:] for x in batch))
    cut, _ = model.states(part, latents(model, part))
    torch.testing.assert_close(
        model.feat(cut).view(4, 8, -1)[:, model.history :],
        model.feat(whole).view(4, 11, -1)[:, 3 + model.history :],
        rtol=1e-4,
        atol=1e-5,
    )


@torch.no_grad()
def test_nothing_reaches_across_is_first(variant: tuple[LeWorldModel, tuple[int, ...]]) -> None:
    model, shape = variant
    batch = random_batch(shape, 9, (5,))
    other = random_batch(shape, 9, (5,))
    mixed = Batch(*(torch.cat([b[:, :5], a[:, 5:]], 1) for a, b in zip(batch, other, strict=True)))
    results = []
    for sample in (batch, mixed):
        now, after = model.states(sample, latents(model, sample))
        further = model.imagine(after, torch.ones(32, 2))
        results.append([model.feat(state).view(4, -1, model.feat_dim) for state in (now, after, further)])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one[:, 5:], two[:, 5:], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(one[:, :5], two[:, :5])


@torch.no_grad()
def test_is_first_empties_an_observing_memory_of_its_own_stream_alone(
    variant: tuple[LeWorldModel, tuple[int, ...]],
) -> None:
    model, shape = variant
    batch = random_batch(shape, 6)
    state = model.initial(4)
    for t in range(5):
        state = model.observe(state, batch.action[:, t], batch.obs[:, t], torch.zeros(4, dtype=torch.bool))
    is_first = torch.tensor([True, False, True, False])
    reset = model.observe(state, batch.action[:, 5], batch.obs[:, 5], is_first)
    fresh = model.observe(model.initial(4), torch.zeros(4, 2), batch.obs[:, 5], torch.ones(4, dtype=torch.bool))
    going = model.observe(state, batch.action[:, 5], batch.obs[:, 5], torch.zeros(4, dtype=torch.bool))
    for known, rows in ((fresh, is_first), (going, ~is_first)):
        torch.testing.assert_close(model.feat(reset)[rows], model.feat(known)[rows])
        nexts = [model.feat(model.imagine(s, batch.action[:, 0]))[rows] for s in (reset, known)]
        torch.testing.assert_close(nexts[0], nexts[1])
    if model.history > 1:
        assert model.settled(reset).tolist() == [False, True, False, True]
    assert not torch.allclose(model.feat(fresh), model.feat(going))


def test_settled_once_the_window_is_full() -> None:
    model = build_world_model((5,), 2, SMALL)
    batch = random_batch((5,), 8, (0, 4))
    now, after = model.states(batch, latents(model, batch))
    assert model.settled(now).view(4, 8)[0].tolist() == [False, False, True, True, False, False, True, True]
    assert model.settled(after).view(4, 7)[0].tolist() == [False, True, True, True, False, True, True]
    assert not model.settled(model.initial(2)).any()


@torch.no_grad()
def test_imagination_is_the_rollout_of_the_loss(variant: tuple[LeWorldModel, tuple[int, ...]]) -> None:
    """The losses, worked out again with observe's states and imagine alone."""
    model, shape = variant
    batch = random_batch(shape, 9, (6,))
    z, steps = latents(model, batch), model.config.rollout
    _, _, terms = model.loss(batch)
    errors: list[list[Tensor]] = [[] for _ in range(steps)]
    state, action = model.initial(4), torch.zeros(4, 2)
    for t in range(8):
        state = model.observe(state, action, batch.obs[:, t], batch.is_first[:, t])
        action, ahead = batch.action[:, t], state
        for k in range(min(steps, 8 - t)):
            if batch.is_first[0, t + k + 1]:
                break
            ahead = model.imagine(ahead, batch.action[:, t + k])
            if k == 0 or t < 9 - steps:
                errors[k].append((model.latent(ahead) - z[:, t + k + 1]).square().mean())
    means = [torch.stack(e).mean() for e in errors]
    torch.testing.assert_close(terms["pred_loss"], means[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms["rollout_loss"], torch.stack(means[1:]).mean(), rtol=1e-4, atol=1e-5)


# -- gradients ---------------------------------------------------------------------------------------------------------


class Scale(nn.Module):
    """z = w·x."""

    def __init__(self, w: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w))

    def forward(self, x: Tensor) -> Tensor:
        return self.w * x


def test_gradients_pass_through_both_sides_of_the_prediction_loss() -> None:
    """z = w·x, ẑ' = z + a: d/dw (w·x + a − w·x')² = 2 (w·x + a − w·x') (x − x'); a stopped target would leave x."""
    model = toy(Copy(), sigreg_weight=0.0, rollout=1, reward_weight=0.0, cont_weight=0.0)
    model.encoder = Scale(0.5)
    batch = exact_world(Copy(), 9, ())
    model.loss(batch)[0].backward()
    x, following, a = batch.obs[:, :-1], batch.obs[:, 1:], batch.action[:, :-1]
    expected = (2 * (0.5 * x + a - 0.5 * following) * (x - following)).mean()
    torch.testing.assert_close(model.encoder.w.grad, expected, rtol=1e-5, atol=1e-6)


def gradients(model: LeWorldModel, batch: Batch, part: str) -> list[Tensor]:
    """Of the loss, in one part of the model, always with the same random directions."""
    torch.manual_seed(3)
    model.zero_grad()
    model.loss(batch)[0].backward()
    return [p.grad for p in getattr(model, part).parameters()]


@pytest.mark.parametrize("head_gradient", [False, True])
def test_head_gradient_decides_whether_the_heads_shape_the_latents(head_gradient: bool) -> None:
    batch = random_batch((5,), 8)
    torch.manual_seed(1)
    model = build_world_model((5,), 2, replace(SMALL, head_gradient=head_gradient))
    torch.manual_seed(1)
    headless = build_world_model((5,), 2, replace(SMALL, reward_weight=0.0, cont_weight=0.0))
    with torch.no_grad():
        for head in (model.reward_head, model.cont_head):
            head.net[-1].weight.normal_()  # it starts at 0, which would let no gradient through
    for part in ("encoder", "predictor"):
        pairs = zip(gradients(model, batch, part), gradients(headless, batch, part), strict=True)
        assert all(torch.allclose(a, b, atol=1e-7) for a, b in pairs) != head_gradient, part
    for part in ("head_trunk", "reward_head", "cont_head"):
        assert all(bool(g.any()) for g in gradients(model, batch, part)), part


@pytest.mark.parametrize("sample", ["batch", "step"])
def test_sigreg_sees_the_sample_it_is_told(sample: str) -> None:
    model = build_world_model((5,), 2, replace(SMALL, sigreg_sample=sample))
    batch = random_batch((5,), 8)
    z = latents(model, batch)
    torch.manual_seed(3)
    _, _, terms = model.loss(batch)
    torch.manual_seed(3)
    directions = random_directions(6, 16, device="cpu")
    known = {"batch": sigreg(z.view(32, 6), directions), "step": sum(sigreg(z[:, t], directions) for t in range(8)) / 8}
    torch.testing.assert_close(terms["sigreg_loss"], known[sample].detach())
    assert not torch.allclose(known["batch"], known["step"])


def test_the_paper_s_model_learns_from_two_terms_alone() -> None:
    assert (PAPER.latent_dim, PAPER.sigreg_weight, PAPER.sigreg_directions) == (192, 0.09, 1024)
    model = build_world_model(
        (3, 16, 16),
        2,
        replace(PAPER, latent_dim=6, vit=SMALL.vit, transformer=SMALL.transformer, sigreg_directions=16, head_units=8),
    )
    assert isinstance(model.encoder, ViTEncoder)
    assert isinstance(model.predictor, TransformerPredictor)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    batch = random_batch((3, 16, 16), 4, (2,), batch=16)
    parts = ("encoder", "predictor")
    got = [g for part in parts for g in gradients(model, batch, part)]

    torch.manual_seed(3)
    model.zero_grad()
    z = latents(model, batch)
    predicted, _ = model.predictor.sequence(z[:, :-1], batch.action[:, :-1], batch.is_first[:, :-1])
    # Row 1's successor begins another episode.
    pred_loss = (predicted - z[:, 1:])[:, [0, 2]].square().mean()
    directions = random_directions(6, 16, device="cpu")
    (pred_loss + 0.09 * sum(sigreg(z[:, t], directions) for t in range(4)) / 4).backward()
    known = [p.grad for part in parts for p in getattr(model, part).parameters()]
    for a, b in zip(got, known, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_autocast_keeps_losses_and_states_in_float32() -> None:
    model, batch = build_world_model((3, 16, 16), 2, SMALL), random_batch((3, 16, 16), 8)
    model.fit_normaliser(batch.obs.flatten(0, 1))
    torch.manual_seed(3)
    exact, _, _ = model.loss(batch)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        loss, states, terms = model.loss(batch)
        state = model.observe(model.initial(4), batch.action[:, 0], batch.obs[:, 0], batch.is_first[:, 0])
    assert {x.dtype for x in (loss, states.z, state.z, *terms.values())} == {torch.float32}
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0.02)


# -- parts -------------------------------------------------------------------------------------------------------------


class Spy(nn.Module):
    """A conv encoder that keeps what it was given."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.seen = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return self.encoder(x)


def test_images_are_shifted_in_the_loss_and_nowhere_else() -> None:
    batch = random_batch((3, 16, 16), 4)
    plain = batch.obs.flatten(0, 1).float()
    for pixels in (0, 2):
        model = build_world_model((3, 16, 16), 2, replace(SMALL, shift_pixels=pixels))
        model.encoder = Spy(model.encoder)
        model.loss(batch)
        assert torch.equal(model.encoder.seen, plain) == (pixels == 0)
        model.monitors(batch)
        assert torch.equal(model.encoder.seen, plain)
        model.observe(model.initial(4), batch.action[:, 0], batch.obs[:, 0], batch.is_first[:, 0])
        assert torch.equal(model.encoder.seen, batch.obs[:, 0].float())


def test_a_sequence_is_shifted_as_a_whole() -> None:
    """What stood still still stands still, and sequences are shifted apart from each other."""
    batch = random_batch((3, 16, 16), 4)
    still = batch._replace(obs=batch.obs[:1, :1].expand_as(batch.obs).contiguous())
    model = build_world_model((3, 16, 16), 2, replace(SMALL, shift_pixels=2))
    model.encoder = Spy(model.encoder)
    model.loss(still)
    seen = model.encoder.seen.view(*still.obs.shape)
    assert torch.equal(seen, seen[:, :1].expand_as(seen))
    assert any(not torch.equal(seen[0], other) for other in seen[1:])


@pytest.mark.parametrize("shape", [(5,), (3, 16, 16)])
def test_no_call_changes_the_batch(shape: tuple[int, ...]) -> None:
    batch = random_batch(shape, 6, (3,))
    before = Batch(*(x.clone() for x in batch))
    model = build_world_model(shape, 2, SMALL)
    model.fit_normaliser(batch.obs.flatten(0, 1))
    model.loss(batch)
    model.monitors(batch)
    model.observe(model.initial(4), batch.action[:, 0], batch.obs[:, 0], batch.is_first[:, 0])
    for name, old, new in zip(Batch._fields, before, batch, strict=True):
        assert torch.equal(old, new), name


def test_the_configuration_chooses_the_parts() -> None:
    kinds = {
        "conv": build_world_model((3, 16, 16), 2, SMALL),
        "vit": build_world_model((3, 16, 16), 2, replace(SMALL, encoder="vit", predictor="transformer")),
        "keypoint": build_world_model((3, 16, 16), 2, replace(SMALL, encoder="keypoint")),
        "state": build_world_model((5,), 2, replace(SMALL, encoder="vit")),
    }
    assert [type(model.encoder) for model in kinds.values()] == [
        ConvEncoder,
        ViTEncoder,
        KeypointEncoder,
        StateEncoder,
    ]
    assert [type(model.predictor) for model in kinds.values()] == [
        WindowPredictor,
        TransformerPredictor,
        WindowPredictor,
        WindowPredictor,
    ]
    assert [model.normaliser.per_feature for model in kinds.values()] == [False, False, False, True]
    for model in kinds.values():
        assert model.feat(model.initial(3)).shape == (3, model.feat_dim)


def test_an_empty_window_is_refused() -> None:
    with pytest.raises(ValueError, match="history must be at least 1 frame"):
        build_world_model((5,), 2, replace(SMALL, window=WindowConfig(history=0, hidden=(8,))))


def test_what_an_invalid_slot_of_the_window_holds_has_no_effect() -> None:
    predictor = WindowPredictor(6, 2, WindowConfig(history=4, hidden=(16, 10)))
    z, action = torch.randn(4, 4, 6), torch.randn(4, 4, 2)
    valid = torch.ones(4, 4, dtype=torch.bool).triu()
    before = predictor(z, action, valid)
    # Row i of the triangle has its first i slots empty; the newest never is.
    filled = [torch.where(valid[..., None], x, float("nan")) for x in (z, action)]
    after = predictor(*filled, valid)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


# -- collapse ----------------------------------------------------------------------------------------------------------


def test_monitors_tell_a_collapsed_latent_from_a_healthy_one() -> None:
    predictor = WindowPredictor(6, 2, SMALL.window)
    normaliser = Normaliser((6,), per_feature=True)
    model = LeWorldModel(nn.Identity(), predictor, normaliser, action_dim=2, config=SMALL)
    batch = random_batch((6,), 32, batch=16)
    line = batch.obs[..., :1] @ torch.randn(1, 6)
    healthy, flat, point = (
        model.monitors(batch._replace(obs=obs.clone())) for obs in (batch.obs, line, 1e-3 * batch.obs + 5)
    )
    for monitors in (healthy, flat, point):
        assert all(math.isfinite(value) for value in monitors.values()), monitors
        assert {f"{kind}_error_{k}" for kind in ("open_loop", "copy_last") for k in (1, 4)} <= set(monitors)
    assert healthy["effective_rank"] == pytest.approx(6, rel=0.02)
    assert healthy["latent_variance_min"] == pytest.approx(1, rel=0.2)
    assert healthy["latent_variance_min"] <= healthy["latent_variance_mean"] == pytest.approx(1, rel=0.1)
    assert healthy["sigreg"] < 2 * expected_sigreg()
    assert healthy["copy_last_error_4"] == pytest.approx(2, rel=0.1), "independent rows"
    assert flat["effective_rank"] == pytest.approx(1, abs=0.01)
    assert point["latent_variance_mean"] == pytest.approx(1e-6, rel=0.1)
    assert min(flat["sigreg"], point["sigreg"]) > 10 * expected_sigreg()


@torch.no_grad()
def test_monitors_of_an_encoder_that_sees_nothing_are_finite() -> None:
    """JSON has no NaN and no infinity."""
    model = build_world_model((5,), 2, SMALL).eval()
    for parameter in model.encoder.parameters():
        parameter.zero_()
    monitors = model.monitors(random_batch((5,), 8))
    assert monitors["effective_rank"] == 1
    assert all(math.isfinite(value) for value in monitors.values()), monitors


def point_world(batch: int, rows: int) -> Batch:
    """A point in the plane pushed by the action, seen through a fixed mixing of its coordinates and their squares."""
    action = torch.rand(batch, rows, 2) * 2 - 1
    x = torch.empty(batch, rows, 2)
    x[:, 0] = torch.rand(batch, 2) * 2 - 1
    for t in range(1, rows):
        x[:, t] = (x[:, t - 1] + 0.5 * action[:, t - 1]).clamp(-1, 1)
    mixing = torch.randn(4, 6, generator=torch.Generator().manual_seed(7))
    no = torch.zeros(batch, rows, dtype=torch.bool)
    return Batch(torch.cat([x, x.square()], -1) @ mixing, action, torch.zeros(batch, rows), no, no, no)


def learn(*, sigreg_weight: float, updates: int) -> tuple[dict[str, float], dict[str, float]]:
    """Monitors before and after learning the point's world with the paper's two terms."""
    torch.manual_seed(0)
    model = build_world_model(
        (6,),
        2,
        replace(
            SMALL,
            latent_dim=8,
            window=WindowConfig(history=3, hidden=(32, 32)),
            sigreg_weight=sigreg_weight,
            sigreg_directions=32,
            rollout=1,
            reward_weight=0.0,
            cont_weight=0.0,
        ),
    )
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    held_out = point_world(16, 16)
    before = model.monitors(held_out)
    for _ in range(updates):
        optimiser.zero_grad()
        model.loss(point_world(16, 8))[0].backward()
        optimiser.step()
    return before, model.monitors(held_out)


def test_with_sigreg_it_learns_to_predict_and_the_latent_stays_open() -> None:
    before, after = learn(sigreg_weight=0.05, updates=150)
    assert before["open_loop_error_1"] > 0.4
    assert after["open_loop_error_1"] < 0.25
    assert after["open_loop_error_1"] < 0.5 * after["copy_last_error_1"]
    assert after["effective_rank"] > 3.5
    assert after["latent_variance_min"] > 0.2


def test_without_sigreg_the_latent_collapses() -> None:
    before, after = learn(sigreg_weight=0.0, updates=150)
    assert after["latent_variance_mean"] < 0.02 * before["latent_variance_mean"]


def test_windows_cut_by_the_sample_s_start_teach_nothing_unless_asked() -> None:
    """What only a cut window could see changes no loss; an episode's own start counts."""
    torch.manual_seed(0)
    model = build_world_model((5,), 2, replace(SMALL, cut_windows=False, sigreg_weight=0.0))
    is_first = torch.zeros(3, 8, dtype=torch.bool)
    is_first[2, 5] = True
    remembered = model._remembered(is_first)
    history = model.history
    assert remembered[:2].tolist() == [[t >= history - 1 for t in range(8)]] * 2
    assert remembered[2].tolist() == [t >= min(history - 1, 5) for t in range(8)]
    assert bool(build_world_model((5,), 2, SMALL)._remembered(is_first).all())
