"""A film of attempts at goals: start, goal, and what happened, side by side."""

from __future__ import annotations

from pathlib import Path

import gymnasium as gym
import numpy as np
from jaxtyping import UInt8

from runners.config import ConfigError
from runners.dataset import Dataset
from runners.disk import clear_disk_full
from runners.goals import Pairs
from runners.logger import write_video

_GOALS = 6
"""Goals that are shown, one after another."""
_HELD = 5
"""Frames for which the last one stands still."""
_SEAM = 2
"""Width in pixels of the white line between pictures."""


class Film:
    """Takes pictures while goals are attempted."""

    def __init__(self, data: Dataset, pairs: Pairs) -> None:
        self._data, self._pairs = data, pairs
        self._goals: dict[int, UInt8[np.ndarray, "H W 3"]] = {}
        self._frames: dict[int, list[UInt8[np.ndarray, "H W 3"]]] = {}

    def watch(self, goal: int, env: gym.Env) -> None:
        """Called at the start of an attempt, when ``env`` has just been put there, and after each decision."""
        if goal >= _GOALS:
            return
        if goal not in self._frames:
            self._data.restore(env, int(self._pairs.goal[goal]))
            self._goals[goal] = env.render()  # type: ignore[assignment]
            self._data.restore(env, int(self._pairs.start[goal]))
            self._frames[goal] = []
        self._frames[goal].append(env.render())  # type: ignore[arg-type]

    def frames(self) -> UInt8[np.ndarray, "T H W 3"]:
        """All that was filmed."""
        shown = []
        for goal, frames in sorted(self._frames.items()):
            for frame in [*frames, *[frames[-1]] * _HELD]:
                seam = np.full((frame.shape[0], _SEAM, 3), 255, np.uint8)
                shown.append(np.concatenate([frames[0], seam, self._goals[goal], seam, frame], 1))
        return np.stack(shown)

    def write(self, path: Path, fps: float) -> None:
        """As mp4, ``fps`` decisions a second.

        Raises:
            ConfigError: ``path`` cannot be written.
            DiskFull: there is no room for it.
        """
        with clear_disk_full(path):
            try:
                write_video(path, self.frames(), fps)
            except (FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError, ValueError) as error:
                raise ConfigError(f"--video {path} cannot be written: {error}") from error
