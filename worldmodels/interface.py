"""What a batch is, what a world model answers, and the one timeline that everything obeys.

Row ``t`` of a stream holds what ARRIVED at time ``t`` (obs, reward, flags) and the action that LEFT at time ``t``::

    t            0            1            2            3 (last)     0'
    obs          o0           o1           o2           o3           o0'
    reward       0            r1           r2           r3           0          r_t came with o_t, caused by a_{t-1}
    is_first     1            0            0            0            1
    is_last      0            0            0            1            0
    is_terminal  0            0            0            1 iff terminated, 0 if truncated
    action       a0           a1           a2           0            a0'        a_t is chosen from o_t

Gymnasium's NEXT_STEP autoreset yields exactly these rows. A model's memory never reaches across ``is_first``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn


class Batch(NamedTuple):
    """Replayed sequences, on the device that learns. B sequences of T rows each, aligned as the timeline says."""

    obs: Shaped[Tensor, "B T *obs"]
    """Pixels (B,T,C,H,W) uint8, or state (B,T,S) float32."""
    action: Float[Tensor, "B T A"]
    """In [-1, 1]; zeros on an is_last row."""
    reward: Float[Tensor, "B T"]
    """Summed over the action repeat, as the environment gave it."""
    is_first: Bool[Tensor, "B T"]
    is_last: Bool[Tensor, "B T"]
    is_terminal: Bool[Tensor, "B T"]


Metrics = dict[str, Float[Tensor, ""]]

State = Any
"""A world model's memory at one moment, a NamedTuple of (B, …) tensors. Opaque to agents."""


class Predicted(NamedTuple):
    """Open-loop predictions of a batch's rows, from earlier rows and the recorded actions; R in all."""

    feat: Float[Tensor, "N F"]
    """What the critic reads: of the B*T rows themselves, row-major over B then T, then of the R predictions."""
    row: Int[Tensor, " R"]
    """Which of the rows each predicts."""
    alive: Float[Tensor, " R"]
    """1 where that row still belongs to the episode that the prediction started in, else 0."""


@runtime_checkable
class Predictor(Protocol):
    """Predicts the next latent from the last K latents and actions. K is ``history``."""

    history: int
    hidden_dim: int

    def __call__(
        self, z: Float[Tensor, "B K D"], action: Float[Tensor, "B K A"], valid: Bool[Tensor, "B K"]
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B F"]]:
        """The next latent and the hidden features it was read from.

        ``action[:, -1]`` is taken in the newest latent ``z[:, -1]``. ``valid`` is False where a slot lies before the
        episode's start (always a prefix; the newest slot is always valid), and what such a slot holds has no effect.
        """
        ...

    def sequence(
        self, z: Float[Tensor, "B T D"], action: Float[Tensor, "B T A"], is_first: Bool[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B T F"]]:
        """The same for the window ending at each row; none reaches across ``is_first`` or before row 0."""
        ...


@runtime_checkable
class CachingPredictor(Predictor, Protocol):
    """A predictor that can keep, between the imagined steps of many futures, what it would compute again."""

    cheap: bool
    """Whether ``recall`` costs nothing and ``step`` is all there is, in train mode too: then it is every imagined step,
    of one future of each stream (R = B). Otherwise it is only those of many futures of one memory, in eval mode."""

    def recall(self, z: Float[Tensor, "B K D"], action: Float[Tensor, "B K1 A"], valid: Bool[Tensor, "B K"]) -> Any:
        """A cache of what was observed. ``action`` is what left between the K latents."""
        ...

    def step(
        self, cache: Any, z: Float[Tensor, "R D"], moved: Float[Tensor, "R M"], action: Float[Tensor, "R A"]
    ) -> tuple[Float[Tensor, "R D"], Float[Tensor, "R F"], Any]:
        """What calling it with whole windows answers, as the change from the newest latent ``z``, and the next cache;
        for R/B futures of each stream, row-major. ``moved`` is how z came to move: the window's differences, oldest
        first."""
        ...


class WorldModel(nn.Module):
    """What an agent needs of a world model. ``feat_dim`` is the size F of ``feat``."""

    feat_dim: int
    futures_wait = False
    """Whether ``futures`` makes the host wait for a GPU. Observing, imagining and what reads a state never do."""

    def initial(self, batch: int) -> State:
        """An empty memory for ``batch`` streams."""
        raise NotImplementedError

    def observe(
        self,
        state: State,
        prev_action: Float[Tensor, "B A"],
        obs: Shaped[Tensor, "B *obs"],
        is_first: Bool[Tensor, " B"],
    ) -> State:
        """One real step: ``prev_action`` left, ``obs`` arrived. Where ``is_first``, the memory before it is dropped."""
        raise NotImplementedError

    def imagine(self, state: State, action: Float[Tensor, "B A"]) -> State:
        """One imagined step."""
        raise NotImplementedError

    def futures(self, state: State) -> Callable[[int], State]:
        """Many futures of one memory: called with n, the answer is every stream's memory n times over, row-major, to
        imagine from. What they have in common is worked out once, here. ``state`` has been observed, not imagined."""
        return lambda n: type(state)(*(x.repeat_interleave(n, 0) for x in state))

    def feat(self, state: State) -> Float[Tensor, "B F"]:
        """What the heads, the policy and the critic read."""
        raise NotImplementedError

    def latent(self, state: State) -> Float[Tensor, "B D"]:
        """The newest latent alone: what the last observation became, or was imagined to become."""
        raise NotImplementedError

    def reward(self, feat: Float[Tensor, "*N F"]) -> Float[Tensor, "*N"]:
        """Expected reward that arrives with this state."""
        raise NotImplementedError

    def cont(self, feat: Float[Tensor, "*N F"]) -> Float[Tensor, "*N"]:
        """1 − P(terminal), in [0, 1]."""
        raise NotImplementedError

    def outcome(self, feat: Float[Tensor, "*N F"]) -> tuple[Float[Tensor, "*N"], Float[Tensor, "*N"]]:
        """``reward`` and ``cont``, for a model that can share work between them."""
        return self.reward(feat), self.cont(feat)

    def settled(self, state: State) -> Bool[Tensor, " B"]:
        """Whether the memory is as full as it gets: imagination starts from such states only."""
        raise NotImplementedError

    def fit_normaliser(self, obs: Shaped[Tensor, "N *obs"]) -> None:
        """Fit whatever normalises the input, once, before the first gradient step."""
        raise NotImplementedError

    def monitors(self, batch: Batch) -> dict[str, float]:
        """Signs of collapse and of open-loop drift, for the logs."""
        raise NotImplementedError

    def embed(self, batch: Batch, *, cut: bool = False) -> tuple[State, Any]:
        """The states of every row (leading dimension B*T, row-major over B then T), and what else ``losses`` needs.

        With ``cut``, backward passes end at the embedding until ``backward_encoder`` takes them on into the encoder.
        """
        raise NotImplementedError

    def backward_encoder(self, embedded: tuple[State, Any]) -> None:
        """The encoder's gradients, from all that has reached the embedding so far. Once, after ``embed`` with cut."""
        raise NotImplementedError

    def losses(self, batch: Batch, embedded: tuple[State, Any]) -> tuple[Float[Tensor, ""], Metrics, Predicted]:
        """The loss of what ``embed`` made of the batch, metrics, and the predictions it was learned from."""
        raise NotImplementedError

    def loss(self, batch: Batch) -> tuple[Float[Tensor, ""], State, Metrics]:
        """``embed`` and ``losses`` in one: the loss, the states, and metrics."""
        embedded = self.embed(batch)
        loss, metrics, _ = self.losses(batch, embedded)
        return loss, embedded[0], metrics
