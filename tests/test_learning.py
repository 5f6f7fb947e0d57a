"""Real learning on real pixels: minutes, not seconds, so marked slow; CI runs them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from agents.dreamer import computes_bf16
from runners.config import presets
from runners.replay import Replay
from runners.train import main
from worldmodels.interface import Batch
from worldmodels.lewm import build_world_model

pytestmark = pytest.mark.usefixtures("unchecked")


def random_rows(path: Path, env_steps: int, seed: int) -> Replay:
    """The replay of random actions on cartpole swing-up."""
    once = str(env_steps)
    words = ["--task", "dmc/cartpole-swingup", "--agent", "random", "--env-steps", once, "--seed", str(seed)]
    words += ["--run-dir", str(path), "--loop.eval-every", once, "--loop.eval-episodes", "1", "--threads", "1"]
    words += ["--num-envs", "1"]  # in this process: each of four would take seconds to start
    assert main(words) == 0
    return Replay.open(path / "replay")


@pytest.mark.slow
def test_the_world_model_learns_from_pixels_what_actions_cause(tmp_path: Path) -> None:
    """Judged on episodes it was not trained on, by how far it sees and by whether it listens to the actions."""
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    train, held_out = random_rows(tmp_path / "train", 20_000, 1), random_rows(tmp_path / "held_out", 6_000, 2)
    model = build_world_model((3, 64, 64), 1, presets()["cpu"].model)
    model.fit_normaliser(train.sample(16, 16, generator).obs.flatten(0, 1))
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(300):
        with torch.autocast("cpu", torch.bfloat16, enabled=computes_bf16(torch.device("cpu"))):
            loss, _, _ = model.loss(train.sample(16, 16, generator))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()
    batch: Batch = held_out.sample(64, 16, generator)
    seen = model.monitors(batch)
    deaf = model.monitors(batch._replace(action=-batch.action))
    assert seen["open_loop_error_6"] < 0.6 * seen["copy_last_error_6"]
    assert seen["open_loop_error_6"] < 0.9 * deaf["open_loop_error_6"]
    assert seen["effective_rank"] > 5
    with torch.no_grad():
        states, _ = model.states(batch, model.encode(batch.obs.flatten(0, 1)).view(64, 16, -1))
        settled = model.settled(states)
        error = model.reward(model.feat(states))[settled] - batch.reward.flatten()[settled]
    explained = 1 - error.square().mean() / batch.reward.flatten()[settled].var()
    assert explained > 0.6
