"""What Gymnasium has no wrapper for: pictures of a model or a rendering, divergence, and seeded, resumable episodes."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium.envs.registration import EnvSpec
from PIL import Image as PillowImage


class EnvironmentFault(RuntimeError):
    """A simulation gave NaN or inf, or diverged. The message says the task, the episode's seed, the step, and what."""


class UnsupportedSetting(ValueError):
    """This task cannot be seen or stepped as the config says, and the message says why."""


def episode_seed(seed: int, episode: int) -> int:
    """The seed of one episode, a function of the environment's seed and the episode's index only. Below 2**32."""
    return int(np.random.SeedSequence([seed, episode]).generate_state(1)[0])


class Episodes(gym.Wrapper):
    """Gives each episode its own seed, counts simulator steps, and stops at anything that is not finite.

    Outermost. ``reset(seed=s)`` starts the sequence of episodes of ``s`` at episode 0, or at ``options["episode"]``;
    ``reset()`` goes to the next episode. So an environment can be put back anywhere by resetting to an episode and
    repeating its actions. ``info["env_steps"]`` is the number of simulator control steps that a step took.

    Args:
        env: has a ``RecordEpisodeStatistics`` inside its action repeat.
        task: named in errors.
        seed: of the first sequence of episodes.
    """

    def __init__(self, env: gym.Env, task: str, seed: int) -> None:
        super().__init__(env)
        self._task = task
        self.seed_sequence = seed
        self.episode = -1
        self._step = 0

    @property
    def spec(self) -> EnvSpec | None:  # type: ignore[override]
        """The spec that makes this whole stack, not the inner environment with wrappers to add."""
        return self.unwrapped.spec

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """See the class. Raises EnvironmentFault."""
        options = dict(options or {})
        episode = options.pop("episode", 0)
        if seed is not None:
            self.seed_sequence, self.episode = seed, episode
        else:
            self.episode += 1
        self._step = 0
        try:
            obs, info = self.env.reset(seed=episode_seed(self.seed_sequence, self.episode), options=options)
        except EnvironmentFault as fault:
            raise self._fault(str(fault)) from fault
        self._check(obs, 0.0)
        return obs, {**info, "env_steps": 0}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One agent step. Raises EnvironmentFault."""
        self._step += 1
        before = self._env_steps()
        try:
            obs, reward, terminated, truncated, info = self.env.step(action)
        except EnvironmentFault as fault:
            raise self._fault(str(fault)) from fault
        self._check(obs, float(reward))
        info = {**info, "env_steps": self._env_steps() - before}
        return obs, float(reward), bool(terminated), bool(truncated), info

    def _env_steps(self) -> int:
        return int(self.env.get_wrapper_attr("episode_lengths"))

    def _check(self, obs: Any, reward: float) -> None:
        if not np.isfinite(reward):
            raise self._fault(f"the reward is {reward}")
        for name, part in obs.items() if isinstance(obs, dict) else [("observation", obs)]:
            if part.dtype != np.uint8 and not np.isfinite(part).all():
                where = np.flatnonzero(~np.isfinite(part))
                raise self._fault(f"{name} has NaN or inf at {len(where)} places, the first at index {where[0]}")

    def _fault(self, what: str) -> EnvironmentFault:
        seed = episode_seed(self.seed_sequence, self.episode)
        return EnvironmentFault(
            f"{self._task}: {what}, at agent step {self._step} of episode {self.episode} (episode seed {seed})"
        )


class Divergence(gym.Wrapper):
    """Turns MuJoCo's silent restart of a diverged simulation into an EnvironmentFault, for Gymnasium's own tasks."""

    _BAD = (mujoco.mjtWarning.mjWARN_BADQPOS, mujoco.mjtWarning.mjWARN_BADQVEL, mujoco.mjtWarning.mjWARN_BADQACC)

    def step(self, action: np.ndarray) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Raises EnvironmentFault when this step diverged."""
        row = self.env.step(action)
        warnings = self.env.unwrapped.data.warning  # type: ignore[attr-defined]
        if any(warnings[kind].number for kind in self._BAD):
            raise EnvironmentFault("the physics diverged and MuJoCo restarted it")
        return row


class Pictures(gym.Wrapper):
    """Replaces ``render`` by a camera's picture, or by the environment's own, resized to ``size`` by area.

    Args:
        env: its ``render_mode`` is ``rgb_array`` when there is no camera.
        size: image height and width.
        camera: draws the picture, and is closed with the environment.
    """

    render_mode = "rgb_array"

    def __init__(self, env: gym.Env, size: int, camera: Any | None = None) -> None:
        super().__init__(env)
        self.metadata = {**env.metadata, "render_modes": ["rgb_array"]}
        self._size = size
        self._camera = camera

    def render(self) -> np.ndarray:
        """(size, size, 3) uint8."""
        if self._camera is not None:
            return self._camera.render()
        frame = np.asarray(self.env.render(), dtype=np.uint8)
        if frame.shape[:2] == (self._size, self._size):
            return frame.copy()
        resized = PillowImage.fromarray(frame).resize((self._size, self._size), PillowImage.Resampling.BOX)
        return np.array(resized)

    def close(self) -> None:
        """Closes the camera too."""
        if self._camera is not None:
            self._camera.close()
        super().close()
