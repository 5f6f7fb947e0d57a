"""Real steps: collecting rows into the replay, and evaluating an agent on environments of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import UInt8

from agents.interface import Agent
from runners.replay import Replay
from worldmodels import ranks


class ResumableVectorEnv(Protocol):
    """What collection needs beyond Gymnasium's vector interface: being put back in the middle of an episode."""

    num_envs: int

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]: ...

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]: ...

    def step_async(self, actions: Any) -> None: ...

    def step_wait(self) -> tuple[Any, Any, Any, Any, dict[str, Any]]: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> Any: ...


class Collector:
    """Writes one row a step and environment into the replay, aligned as ``worldmodels.interface`` says.

    ``env_steps`` counts simulator steps over all environments; ``returns`` holds the episodes' returns that ended since
    the list was last emptied by its reader. Of several ranks (:mod:`worldmodels.ranks`) each steps its own environments
    and keeps their rows, and all three numbers are those of all: each must call ``step`` and ``wait`` as the others do.
    """

    def __init__(self, envs: ResumableVectorEnv, replay: Replay, action_dim: int, *, overlap: bool = True) -> None:
        self.envs = envs
        self.overlap = overlap
        self.replay = replay
        self.action_dim = action_dim
        self.num_envs = n = envs.num_envs
        self.env_steps = 0
        self.agent_steps = 0
        self.returns: list[float] = []
        self._carry: Any = None
        self._pending = False
        self._obs, _ = envs.reset()
        self._row = {
            "reward": np.zeros(n, np.float32),
            "is_first": np.ones(n, bool),
            "is_last": np.zeros(n, bool),
            "is_terminal": np.zeros(n, bool),
        }
        self._running_return = np.zeros(n)

    def step(self, agent: Agent) -> None:
        """One agent step in every environment. With ``overlap`` it is only asked for here: environments in processes
        step while the caller learns, and the next call takes in what they answered."""
        self.wait()
        if self._carry is None:
            self._carry = agent.initial(self.num_envs)
        row = self._row
        action, self._carry = agent.act(self._obs, row["is_first"], self._carry, explore=True)
        # What is answered on an is_last row is ignored: NEXT_STEP autoreset resets there.
        action = np.where(row["is_last"][:, None], 0.0, action).astype(np.float32)
        self.replay.add(obs=self._obs, action=action, **row)
        self.agent_steps += ranks.total(int((~row["is_last"]).sum()))
        self.envs.step_async(action)
        self._pending = True
        if not self.overlap:
            self.wait()

    def wait(self) -> None:
        """Take in the rows that the last step asked for."""
        if not self._pending:
            return
        obs, reward, terminated, truncated, info = self.envs.step_wait()
        self._pending = False
        self._running_return += reward
        is_last = terminated | truncated
        self._row = {
            "reward": reward.astype(np.float32),
            "is_first": self._row["is_last"],
            "is_last": is_last,
            "is_terminal": terminated,
        }
        self._obs = obs
        arrived = np.stack([info["env_steps"], is_last, self._running_return], 1)
        for steps, ended, return_ in ranks.all_rows(torch.from_numpy(arrived)).tolist():
            self.env_steps += int(steps)
            if ended:
                self.returns.append(return_)
        self._running_return[is_last] = 0.0

    def forget(self) -> None:
        """Drop the agent's memory: another agent acts from now on."""
        self._carry = None

    def state_dict(self) -> dict[str, Any]:
        """All that :meth:`step` depends on, the environments' state included."""
        self.wait()
        return {
            "envs": self.envs.get_state(),
            "row": {name: torch.as_tensor(value) for name, value in self._row.items()},
            "running_return": torch.as_tensor(self._running_return),
            # Of several ranks the first one writes all of them: on the CPU they travel without opening its GPU to all.
            "carry": None if self._carry is None else [part.cpu() for part in flatten(self._carry)],
            "env_steps": self.env_steps,
            "agent_steps": self.agent_steps,
        }

    def load_state_dict(self, state: dict[str, Any], agent: Agent) -> None:
        """Put environments, counters and ``agent``'s memory back."""
        self._obs = self.envs.set_state(state["envs"])
        self._row = {name: value.numpy().copy() for name, value in state["row"].items()}
        self._running_return = state["running_return"].numpy().copy()
        self._carry = state["carry"]
        if self._carry:  # what acts in the prefill remembers nothing
            like = agent.initial(self.num_envs)
            self._carry = unflatten(like, iter(state["carry"]))
        self.env_steps, self.agent_steps = state["env_steps"], state["agent_steps"]


def flatten(carry: Any) -> list[torch.Tensor]:
    """The tensors of nested tuples, in order."""
    if isinstance(carry, torch.Tensor):
        return [carry]
    return [tensor for part in carry for tensor in flatten(part)]


def unflatten(like: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """The inverse: ``tensors`` in nested tuples like these, on their device."""
    if isinstance(like, torch.Tensor):
        return next(tensors).to(like.device)
    parts = [unflatten(part, tensors) for part in like]
    return type(like)(*parts) if hasattr(like, "_fields") else type(like)(parts)


@dataclass(frozen=True)
class Evaluation:
    """Complete episodes of one policy. ``frames`` (T,C,H,W) uint8: the first episode, where it was seen."""

    returns: list[float]
    lengths: list[int]
    """In env_steps."""
    frames: np.ndarray | None

    @property
    def mean(self) -> float:
        return float(np.mean(self.returns))


def evaluate(
    agent: Agent,
    envs: ResumableVectorEnv,
    episodes: int,
    *,
    seed: int,
    explore: bool = False,
    picture: Callable[[], UInt8[np.ndarray, "H W 3"]] | None = None,
) -> Evaluation:
    """Run ``episodes`` complete episodes, by default with the deterministic policy. ``picture`` draws environment 0 as
    it stands; None: the frames are what it observes, if that is pixels.

    Environment i plays episodes i, i + E, … of ``seed``, so that the same seed gives the same starts, and a short
    episode is not counted more often than a long one.
    """
    if episodes < 1:
        raise ValueError(f"an evaluation needs at least 1 episode, got {episodes}")
    n = envs.num_envs
    obs, _ = envs.reset(seed=[seed + i for i in range(n)])
    quota = np.array([len(range(i, episodes, n)) for i in range(n)])
    finished: list[list[tuple[float, int]]] = [[] for _ in range(n)]
    returns, lengths = np.zeros(n), np.zeros(n, int)
    is_first, is_last = np.ones(n, bool), np.zeros(n, bool)
    carry, frames = agent.initial(n), []
    while any(len(done) < q for done, q in zip(finished, quota, strict=True)):
        if not finished[0]:
            frames.append(np.array(obs[0]) if picture is None else picture().transpose(2, 0, 1))
        action, carry = agent.act(obs, is_first, carry, explore=explore)
        obs, reward, terminated, truncated, info = envs.step(action)
        returns[:] += reward
        lengths[:] += info["env_steps"]
        # A reset row follows a last row; NEXT_STEP ignores the action given there.
        is_first, is_last = is_last, terminated | truncated
        for i in np.flatnonzero(is_last):
            finished[i].append((float(returns[i]), int(lengths[i])))
            returns[i], lengths[i] = 0.0, 0
    done = [finished[k % n][k // n] for k in range(episodes)]
    pixels = np.stack(frames) if frames[0].ndim == 3 else None
    return Evaluation([r for r, _ in done], [steps for _, steps in done], pixels)
