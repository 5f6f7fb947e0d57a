"""Recorded episodes to learn from: opened, split by whole episodes, sampled as sequences, put back into a simulator."""

from __future__ import annotations

from pathlib import Path

import gymnasium as gym
import numpy as np
from jaxtyping import Float64, Int64

from envs.physics import put_back
from runners.dataset_folder import About, DatasetError
from runners.replay import Replay
from worldmodels.interface import Batch

_PHYSICS = "physics.npy"


class Dataset:
    """The complete episodes of a dataset or of any replay, read-only.

    ``spans`` (N,3) says where each one lies: its stream, its first row, how many rows it has. Of a dataset that
    ``runners.collect`` wrote, the stream is 0 and ``physics[row]`` belongs to the same row of the replay.

    Raises:
        ReplayError: no replay, or a damaged one.
        DatasetError: no complete episode; physical states or dataset.json that do not fit.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise DatasetError(f"there is no dataset in {path}; record one with python -m runners.collect --out {path}")
        self.about = About.read(self.path)
        self.replay = Replay.open(self.path)
        self.spans = self.replay.spans()
        if not len(self.spans):
            raise DatasetError(f"{path} holds no complete episode; record some with python -m runners.collect")
        self.physics = self._read_physics()

    def _read_physics(self) -> Float64[np.ndarray, "R S"] | None:
        names = None if self.about is None else self.about.physics
        if names is None:
            return None
        expected = (len(self.replay), len(names))
        try:
            array = np.load(self.path / _PHYSICS, mmap_mode="r", allow_pickle=False)
        except (OSError, EOFError, ValueError, TypeError, SyntaxError) as error:
            raise DatasetError(f"{self.path} is damaged: {_PHYSICS} cannot be read ({error})") from error
        if array.shape != expected or array.dtype != np.float64:
            raise DatasetError(f"{self.path} is damaged: {_PHYSICS} is {array.dtype} {array.shape}, not {expected}")
        return array

    def __len__(self) -> int:
        """Episodes."""
        return len(self.spans)

    def spaces(self) -> tuple[gym.spaces.Box, gym.spaces.Box]:
        """Those of the environment that the episodes would come from."""
        batch = self.replay.take(self.spans[:1, 0], self.spans[:1, 1], 1)
        shape, pixels = tuple(batch.obs.shape[2:]), not batch.obs.dtype.is_floating_point
        obs = gym.spaces.Box(0, 255, shape, np.uint8) if pixels else gym.spaces.Box(-np.inf, np.inf, shape, np.float32)
        return obs, gym.spaces.Box(-1, 1, tuple(batch.action.shape[2:]), np.float32)

    def split(self, validation: float, seed: int) -> tuple[Int64[np.ndarray, " N"], Int64[np.ndarray, " M"]]:
        """Indices of episodes to train on and to validate with, both at least one.

        Raises:
            DatasetError: there is only one episode.
        """
        if len(self) < 2:
            raise DatasetError(f"{self.path} holds one episode; it takes two, one to train on and one to validate with")
        order = np.random.default_rng(seed).permutation(len(self))
        held_out = min(max(1, round(validation * len(self))), len(self) - 1)
        return np.sort(order[held_out:]), np.sort(order[:held_out])

    def restore(self, env: gym.Env, row: int) -> None:
        """Put ``env`` where the recorded episode stood at ``row``: its drawn target, positions and velocities.

        ``env.render()`` then shows it. ``env`` is one that ``make_env`` built with this dataset's task and settings.

        Raises:
            DatasetError: no physical states or starts were recorded.
            IndexError: no such row.
        """
        if self.physics is None or self.about is None or self.about.starts is None:
            raise DatasetError(f"{self.path} has no physical states; record it with runners.collect on a MuJoCo task")
        if not 0 <= row < len(self.physics):
            raise IndexError(f"{self.path} has rows 0 to {len(self.physics) - 1}, not {row}")
        seed, number = self.about.starts[int(np.searchsorted(self.spans[:, 1], row, side="right")) - 1]
        put_back(env, seed, number, self.physics[row])


class Windows:
    """All runs of ``length`` consecutive rows within the given episodes, to be sampled uniformly.

    Raises:
        DatasetError: every episode is shorter.
    """

    def __init__(self, data: Dataset, episodes: Int64[np.ndarray, " N"], length: int) -> None:
        self._replay, self._spans, self.length = data.replay, data.spans[episodes], length
        self._counts = np.maximum(self._spans[:, 2] - length + 1, 0)
        self._ends = self._counts.cumsum()
        if not self._counts.any():
            raise DatasetError(
                f"the longest of {len(episodes)} episodes of {data.path} has {self._spans[:, 2].max()} rows, too few "
                f"for a sequence of {length}; lower --length"
            )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def sample(self, batch: int, generator: np.random.Generator) -> Batch:
        """``batch`` of them; the same generator state gives the same."""
        chosen = generator.integers(0, len(self), size=batch)
        episode = np.searchsorted(self._ends, chosen, side="right")
        offset = chosen - (self._ends - self._counts)[episode]
        return self._replay.take(self._spans[episode, 0], self._spans[episode, 1] + offset, self.length)
