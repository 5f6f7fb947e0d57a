"""The run's replay as the buffer that an off-policy model of Stable-Baselines3 learns from."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from stable_baselines3.common.buffers import BaseBuffer
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch import Tensor

from runners.replay import Replay
from runners.vecenv import Row, add_complete
from worldmodels.encoder import shift_images
from worldmodels.interface import Batch


class RowBuffer(BaseBuffer):
    """Transitions in the rows of a :class:`Replay`, on disk from the start: nothing is lost, and a picture is stored
    once, not ``2 · frames`` times.

    What a transition of E environments becomes is drawn in ``worldmodels.interface``. An environment whose episode ends
    is a row ahead of the others, and rows wait for theirs, as in ``runners.vecenv``.

    Args:
        frames: pictures stacked into an observation; None: states.
        shift: pixels by which sampled pictures are shifted at random, at most.
    """

    def __init__(
        self,
        replay: Replay,
        observations: gym.spaces.Box,
        actions: gym.spaces.Box,
        *,
        frames: int | None,
        shift: int,
        seed: int,
        device: torch.device,
    ) -> None:
        super().__init__(replay.streams, observations, actions, device, n_envs=replay.streams)
        self.replay, self.frames, self.shift = replay, frames, shift
        self.generator = np.random.default_rng(seed)
        self._queues: list[deque[Row]] = [deque() for _ in range(replay.streams)]
        self._reward = np.zeros(replay.streams, np.float32)
        self._is_first = np.ones(replay.streams, bool)

    def size(self) -> int:
        return len(self.replay)

    def add(
        self,
        obs: Shaped[np.ndarray, "E *obs"],
        next_obs: Shaped[np.ndarray, "E *obs"],
        action: Float[np.ndarray, "E A"],
        reward: Float[np.ndarray, " E"],
        done: Bool[np.ndarray, " E"],
        infos: Sequence[dict[str, Any]],
    ) -> None:
        """One step of every environment; ``next_obs`` is the last observation of an episode where it is ``done``."""
        for i, queue in enumerate(self._queues):
            row = {"obs": self._newest(obs[i]), "action": action[i], "reward": self._reward[i]}
            queue.append(row | {"is_first": self._is_first[i], "is_last": False, "is_terminal": False})
            if done[i]:
                row = {"obs": self._newest(next_obs[i]), "action": np.zeros_like(action[i]), "reward": reward[i]}
                terminal = not infos[i]["TimeLimit.truncated"]
                queue.append(row | {"is_first": False, "is_last": True, "is_terminal": terminal})
        self._reward, self._is_first = np.where(done, 0, reward).astype(np.float32), np.array(done, bool)
        add_complete(self.replay, self._queues)

    def _newest(self, obs: Shaped[np.ndarray, "*obs"]) -> Shaped[np.ndarray, "*one"]:
        """The last picture of a stack, or the state."""
        return obs if self.frames is None else obs[-(len(obs) // self.frames) :]

    def sample(self, batch_size: int, env: Any = None) -> ReplayBufferSamples:
        """Transitions, uniform over all that the replay holds, pictures stacked within their episode and shifted."""
        length = (self.frames or 1) + 1
        windows: list[Batch] = []
        missing = batch_size
        while missing:
            stream = self.generator.integers(self.replay.streams, size=missing)
            start = self.generator.integers(self.replay.rows_per_stream - length + 1, size=missing)
            window = self.replay.take(stream, start, length)
            goes_on = ~window.is_last[:, -2]  # no transition leads from an episode's last row to the next one's first
            windows.append(Batch(*(part[goes_on] for part in window)))
            missing -= int(goes_on.sum())
        rows = Batch(*(torch.cat(parts) for parts in zip(*windows, strict=True)))
        return ReplayBufferSamples(
            self._observation(rows.obs[:, :-1], rows.is_first[:, :-1]),
            rows.action[:, -2],
            self._observation(rows.obs[:, 1:], rows.is_first[:, 1:]),
            rows.is_terminal[:, -1:].float(),
            rows.reward[:, -1:],
        )

    def _observation(self, obs: Shaped[Tensor, "B K *one"], is_first: Bool[Tensor, "B K"]) -> Shaped[Tensor, "B *obs"]:
        """What the model saw at the last of K rows."""
        if self.frames is None:
            return obs[:, -1]
        later = is_first.flip(1).cumsum(1).flip(1) - is_first.int()  # episodes that begin after the row
        stacked = (obs * (later == 0)[:, :, None, None, None]).flatten(1, 2)
        if not self.shift:
            return stacked
        down, across = self.generator.integers(-self.shift, self.shift + 1, size=(len(stacked), 2)).T
        return shift_images(stacked, *(torch.from_numpy(way).to(stacked.device) for way in (down, across)))

    def _get_samples(self, batch_inds: np.ndarray, env: Any = None) -> ReplayBufferSamples:
        raise NotImplementedError("rows are sampled by sample")

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`add` and :meth:`sample` depend on, beside the replay's rows."""
        waiting = [[{k: torch.as_tensor(v) for k, v in row.items()} for row in queue] for queue in self._queues]
        return {
            "waiting": waiting,
            "reward": torch.as_tensor(self._reward),
            "is_first": torch.as_tensor(self._is_first),
            "generator": self.generator.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._queues = [deque({k: v.numpy() for k, v in row.items()} for row in queue) for queue in state["waiting"]]
        self._reward, self._is_first = state["reward"].numpy(), state["is_first"].numpy()
        self.generator.bit_generator.state = state["generator"]
