"""Stable-Baselines3's vector environments: their steps as rows of the timeline, and ours as one of theirs."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Shaped
from stable_baselines3.common.vec_env import VecEnv

from agents.interface import Agent
from envs.vector import VectorEnv
from runners.config import ConfigError
from runners.replay import Replay
from runners.spaces import boxes, readable, to_space

Row = dict[str, Any]
"""What ``Replay.add`` takes, of every stream (E, …) or of one."""


class Heard(NamedTuple):
    """What a step of a VecEnv answered, over its E environments."""

    new_obs: Any
    rewards: Float[np.ndarray, " E"]
    dones: Bool[np.ndarray, " E"]
    infos: list[dict[str, Any]]


class VecEnvCollector:
    """Writes a VecEnv's steps into the replay, aligned as ``worldmodels.interface`` says; see ``rollout.Collector``.

    A VecEnv answers the step that ends an episode with the first observation of the next, and puts the last one into
    ``infos``: one step, but two rows. Where all episodes end at once, the last rows and the first ones are two steps
    here, as with Gymnasium's NEXT_STEP autoreset. Where only some end, these streams are a row ahead of the others,
    and as a replay takes a row of every stream at a time, rows wait in a queue for the others': nothing is left out.

    ``env_steps`` counts ``infos["env_steps"]`` where the environments give it, and their steps where not.
    """

    def __init__(self, envs: VecEnv, replay: Replay) -> None:
        self.envs, self.replay = envs, replay
        self.env_steps = self.agent_steps = 0
        self.returns: list[float] = []
        self._actions = boxes(envs.observation_space, envs.action_space)[1]
        self._queues: list[deque[Row]] = [deque() for _ in range(envs.num_envs)]
        self._row: Row | None = None
        self._next: Any = None
        self._carry: Any = None
        self._pending = False

    @property
    def ended(self) -> bool:
        """Whether every environment's newest row is the last of its episode, and not yet in the replay."""
        return self._row is not None and bool(self._row["is_last"].all()) and not self._pending

    def begin(self, obs: Shaped[np.ndarray, "E ..."]) -> None:
        """The environments were reset, and this is what they showed."""
        if self._row is not None and self.ended:
            self._store(self._row)
        self._running_return = np.zeros(self.envs.num_envs)
        self._row, self._next, self._pending = self._first_rows(obs), None, False

    def step(self, agent: Agent) -> None:
        """One agent step in every environment. It is only asked for here; :meth:`wait` takes in what was answered."""
        self.wait()
        row = self._row
        assert row is not None, "begin comes first"
        if self._carry is None:
            self._carry = agent.initial(self.envs.num_envs)
        action, self._carry = agent.act(row["obs"], row["is_first"], self._carry, explore=True)
        row["action"] = np.where(row["is_last"][:, None], 0.0, action).astype(np.float32)
        self._store(row)
        if self._next is None:
            self.agent_steps += self.envs.num_envs
            self.envs.step_async(to_space(row["action"], self._actions))
        self._pending = True

    def wait(self) -> Heard | None:
        """Take in the rows that the last step asked for; what the VecEnv answered, if it had to take a step for it."""
        if not self._pending:
            return None
        self._pending = False
        if self._next is not None:  # all episodes have ended: the next ones begin
            self._row, self._next = self._first_rows(self._next), None
            return None
        heard = Heard(*self.envs.step_wait())
        self.env_steps += sum(int(info.get("env_steps", 1)) for info in heard.infos)
        self._running_return += heard.rewards
        self.returns += self._running_return[heard.dones].tolist()
        self._running_return[heard.dones] = 0.0
        last = {i: self._last_row(heard, i) for i, done in enumerate(heard.dones) if done}
        if len(last) == self.envs.num_envs:
            self._next = np.array(heard.new_obs)
            self._row = stack_rows(list(last.values()))
            return heard
        for i, row in last.items():
            self._queues[i].append(row)
        reward = np.where(heard.dones, 0, heard.rewards)
        self._row = self._first_rows(heard.new_obs) | {"reward": reward, "is_first": np.array(heard.dones, bool)}
        return heard

    def forget(self) -> None:
        """Drop the agent's memory: another agent acts from now on."""
        self._carry = None

    def _first_rows(self, obs: Shaped[np.ndarray, "E ..."]) -> Row:
        """Of every stream, but for the action."""
        n = self.envs.num_envs
        never = np.zeros(n, bool)
        return {"obs": readable(obs), "reward": np.zeros(n), "is_first": ~never, "is_last": never, "is_terminal": never}

    def _last_row(self, heard: Heard, i: int) -> Row:
        """Of the stream ``i``, whose episode has just ended."""
        info = heard.infos[i]
        if "terminal_observation" not in info:
            raise ConfigError("the VecEnv ended an episode without its infos' terminal_observation, its last row")
        return {
            "obs": readable(np.asarray(info["terminal_observation"])[None])[0],
            "reward": heard.rewards[i],
            "is_first": False,
            "is_last": True,
            "is_terminal": not info.get("TimeLimit.truncated", False),
            "action": np.zeros(self._actions.shape, np.float32),
        }

    def _store(self, row: Row) -> None:
        """Queue a row of every stream, and add to the replay whatever is complete."""
        for i, queue in enumerate(self._queues):
            queue.append({name: value[i] for name, value in row.items()})
        add_complete(self.replay, self._queues)


def stack_rows(rows: list[Row]) -> Row:
    """The rows of single streams as one of all."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def add_complete(replay: Replay, queues: list[deque[Row]]) -> None:
    """Moves what waits in the queues, one for each stream, to the replay, as far as every stream has a row."""
    while all(queues):
        replay.add(**stack_rows([queue.popleft() for queue in queues]))


class TaskVecEnv(VecEnv):
    """A :class:`envs.vector.VectorEnv` as Stable-Baselines3 wants it: an environment whose episode has ended begins the
    next one at once, and its last observation is in the infos.

    ``env_steps`` counts simulator steps over all environments; ``returns`` holds the episodes' returns that ended since
    the list was last emptied by its reader.
    """

    def __init__(self, envs: VectorEnv) -> None:
        self.envs = envs
        self.env_steps = 0
        self.returns: list[float] = []
        self.running_return = np.zeros(envs.num_envs)
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)

    def reset(self) -> Any:
        """(E, …), the first observations of new episodes."""
        return self.envs.reset()[0]

    def step_async(self, actions: Float[np.ndarray, "E A"]) -> None:
        self.envs.step_async(actions)

    def step_wait(self) -> tuple[Any, Any, Any, list[dict[str, Any]]]:
        obs, reward, terminated, truncated, info = self.envs.step_wait()
        done = terminated | truncated
        self.env_steps += int(info["env_steps"].sum())
        self.running_return += reward
        infos: list[dict[str, Any]] = [
            {"env_steps": int(steps), "TimeLimit.truncated": bool(cut)}
            for steps, cut in zip(info["env_steps"], truncated & ~terminated, strict=True)
        ]
        if done.any():
            for i in np.flatnonzero(done):
                infos[i]["terminal_observation"] = obs[i]
                self.returns.append(float(self.running_return[i]))
            self.running_return[done] = 0.0
            obs, _ = self.envs.reset(options={"reset_mask": done})
        return obs, reward.astype(np.float32), done, infos

    def close(self) -> None:
        self.envs.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        if attr_name != "render_mode":  # which the constructor asks for
            raise AttributeError(f"the environments, which may be processes, do not show {attr_name}")
        return [None for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise AttributeError(f"{attr_name} cannot be set in environments that may be processes")

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        raise AttributeError(f"{method_name} cannot be called in environments that may be processes")

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False for _ in self._get_indices(indices)]
