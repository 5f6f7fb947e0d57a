"""LeWorldModel (arXiv 2603.19312): a JEPA trained to predict its next embedding, kept from collapse by SIGReg.

    encoder    o_t → z_t
    predictor  (z_{t-K+1..t}, a_{t-K+1..t}) → ẑ_{t+1}, h_{t+1}
    loss       ‖ẑ_{t+1} − z_{t+1}‖² + λ · SIGReg(z), gradients through both sides, no stop-gradient, EMA or decoder

For online control it adds a rollout loss (predictions fed back for several steps, as in V-JEPA 2-AC, arXiv 2506.09985)
and reward and continue heads on real and on rolled-out states; on request an inverse model, too. A weight of 0 removes
a term.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from worldmodels import ranks
from worldmodels.encoder import (
    ConvConfig,
    ConvEncoder,
    KeypointConfig,
    KeypointEncoder,
    Normaliser,
    StateEncoder,
    random_shift,
)
from worldmodels.heads import ContinueHead, ScalarHead, mlp, mlp_trunk
from worldmodels.interface import Batch, CachingPredictor, Metrics, Predicted, Predictor, State, WorldModel
from worldmodels.predictor import WindowConfig, WindowPredictor
from worldmodels.sigreg import effective_rank, random_directions, sigreg
from worldmodels.transformer import TransformerConfig, TransformerPredictor
from worldmodels.vit import ViTConfig, ViTEncoder
from worldmodels.windows import differences, joined, rows_since_start, unfold_windows


@dataclass(frozen=True)
class LeWMConfig:
    """The world model."""

    latent_dim: int = 64
    """Size of the latent z, D."""
    encoder: Literal["keypoint", "conv", "vit"] = "keypoint"
    """keypoint and conv are for 64×64 pixels; vit is the paper's, for 224×224. State is always read by an MLP."""
    keypoint: KeypointConfig = field(default_factory=KeypointConfig)
    conv: ConvConfig = field(default_factory=ConvConfig)
    vit: ViTConfig = field(default_factory=ViTConfig)
    predictor: Literal["window", "transformer"] = "window"
    """window is a fast MLP; transformer is the paper's."""
    window: WindowConfig = field(default_factory=WindowConfig)
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    sigreg_weight: float = 0.05
    """λ, the weight of SIGReg. The statistic grows with the number of rows in a sample: changing batch or length
    changes λ."""
    sigreg_sample: Literal["batch", "step"] = "batch"
    """What one sample of SIGReg is: all rows of the batch, or the rows of each time step, averaged (the paper's)."""
    sigreg_directions: int = 128
    """Random directions a step, M."""
    rollout: int = 6
    """Steps that predictions are fed back for in the rollout loss; keep the imagination horizon within it. 1: none."""
    rollout_every: int = 1
    """Rows from one start of the rollout loss to the next; 2 makes it half as dear. One step is predicted from every
    row."""
    rollout_weight: float = 1.0
    """Weight of the rollout loss: the mean squared error of the predictions fed back for 2 to ``rollout`` steps."""
    cut_windows: bool = False
    """Whether to learn also from windows that the start of a sample cuts short, as the paper does. They look like an
    episode's start but move, and what cannot be predicted teaches the encoder to hide it."""
    reward_weight: float = 1.0
    """Weight of the reward head's loss, whose gradient reaches the encoder."""
    cont_weight: float = 1.0
    """Weight of the continue head's loss, whose gradient reaches the encoder."""
    head_gradient: bool = True
    """Whether reward and continue losses shape the latents; False leaves the paper's two terms alone to do so."""
    head_units: int = 128
    """Units of the hidden layer that the reward and continue heads read."""
    reward_limit: float = 4.0
    """The reward head's bins span ±symexp(limit), in reward summed over the action repeat."""
    inverse_weight: float = 0.0
    """Weight of an inverse model's squared error, whose gradient reaches the encoder: it tells each action from the
    latents around it (PLDM, arXiv 2502.14819), so that what actions move has to be in them. 0: no inverse model."""
    shift_pixels: int = 0
    """Random shift of the training images (DrQ), in pixels. 0: none."""


PAPER = LeWMConfig(
    latent_dim=192,
    encoder="vit",
    predictor="transformer",
    sigreg_weight=0.09,
    sigreg_sample="step",
    sigreg_directions=1024,
    rollout=1,
    cut_windows=True,
    head_gradient=False,
)
"""LeWorldModel as published (arXiv 2603.19312): two loss terms, for 224×224 pixels, batches of 128 × 4 rows."""


class LeWMState(NamedTuple):
    """The last K latents, the actions between them, which of them exist, and the newest prediction's features h."""

    z: Float[Tensor, "B K D"]
    action: Float[Tensor, "B K1 A"]
    valid: Bool[Tensor, "B K"]
    hidden: Float[Tensor, "B F"]


class LeWMFuture(NamedTuple):
    """A memory that is only imagined on: the newest latent, how it came to move, and what the predictor keeps."""

    z: Float[Tensor, "B D"]
    moved: Float[Tensor, "B M"]
    """Differences of successive latents, oldest first."""
    hidden: Float[Tensor, "B F"]
    valid: Bool[Tensor, "B K"]
    """Of the memory that it began with."""
    steps: int
    """Imagined since."""
    cache: Any


class LeWMEmbedded(NamedTuple):
    """What the losses need of a batch beside its states."""

    encoded: Float[Tensor, "B T D"]
    """The latents as they come out of the encoder."""
    z: Float[Tensor, "B T D"]
    """The same as everything else sees them: where gradients end if the graph was cut there."""
    after: LeWMState
    """The state predicted to follow each row but the last (B*(T−1),…)."""
    directions: Float[Tensor, "D M"]
    """SIGReg's, drawn here so that all that is random in learning the model is drawn before anything else."""


class Rollout(NamedTuple):
    """Open-loop predictions of 1, 2, … steps, one number of steps after the other; R rows in all."""

    steps: int
    """The most."""
    near: int
    """How many of one step there are; of each other number of steps there are as many as of every other."""
    row: Int[Tensor, " R"]
    """Which of the batch's rows each predicts, row-major over B then T."""
    ahead: Int[Tensor, " R"]
    """In how many steps."""
    feat: Float[Tensor, "R F"]
    """Of the predicted states."""
    error: Float[Tensor, " R"]
    """Squared error of each one's latent against its row's."""
    alive: Float[Tensor, " R"]
    """1 where that row still belongs to the episode that the prediction started in."""

    def sums(self, x: Float[Tensor, " R"]) -> Float[Tensor, " steps"]:
        """Of what belongs to the predictions, the sum over those of each number of steps."""
        near, far = x.split([self.near, len(x) - self.near])
        return torch.cat([near.sum().view(1), far.view(self.steps - 1, -1).sum(1)]) if len(far) else near.sum().view(1)

    def means(self, x: Float[Tensor, " R"], alive: Float[Tensor, " steps"]) -> Float[Tensor, " steps"]:
        """The same as means over those ``alive``, of which there are so many of each number of steps."""
        return self.sums(x * self.alive) / alive.clamp(min=1)


class LeWorldModel(WorldModel):
    """See the module's docstring. ``feat`` is [z, z − z₋₁, z₋₁ − z₋₂, …, h]: the newest latent, how it came to
    move, and the features it was (or would be) predicted from."""

    def __init__(
        self,
        encoder: nn.Module,
        predictor: Predictor,
        normaliser: Normaliser,
        *,
        action_dim: int,
        config: LeWMConfig,
    ) -> None:
        super().__init__()
        self.config = config
        self.action_dim = action_dim
        self.normaliser = normaliser
        self.encoder = encoder
        self.predictor: Predictor = predictor
        self.history = predictor.history
        self._caches = isinstance(predictor, CachingPredictor)
        self.futures_wait = self._caches and not self._caching.cheap
        self.feat_dim = config.latent_dim * self.history + predictor.hidden_dim
        self.head_trunk = mlp_trunk([self.feat_dim, config.head_units])
        self.reward_head = ScalarHead(config.head_units, layers=0, limit=config.reward_limit)
        self.cont_head = ContinueHead(config.head_units, layers=0)
        if config.inverse_weight:
            self.inverse_head = mlp([config.latent_dim * (self.history + 1), config.head_units, action_dim])

    # -- acting and imagining ------------------------------------------------------------------------------------------

    def initial(self, batch: int) -> LeWMState:
        like = self.normaliser.mean
        return LeWMState(
            z=like.new_zeros(batch, self.history, self.config.latent_dim),
            action=like.new_zeros(batch, self.history - 1, self.action_dim),
            valid=torch.zeros(batch, self.history, dtype=torch.bool, device=like.device),
            hidden=like.new_zeros(batch, self.predictor.hidden_dim),
        )

    def observe(
        self,
        state: LeWMState,
        prev_action: Float[Tensor, "B A"],
        obs: Shaped[Tensor, "B *obs"],
        is_first: Bool[Tensor, " B"],
    ) -> LeWMState:
        z = self.encode(obs)
        predicted = self._advance(state, prev_action, z)
        keep = ~is_first[:, None]
        return LeWMState(
            z=predicted.z,
            action=predicted.action,
            # The newest slot is valid always; older ones only if no episode has started since.
            valid=torch.cat([predicted.valid[:, :-1] & keep, torch.ones_like(keep)], 1),
            hidden=predicted.hidden.float().masked_fill(~(keep & state.valid[:, -1:]), 0.0),
        )

    def imagine(self, state: LeWMState | LeWMFuture, action: Float[Tensor, "B A"]) -> State:
        if isinstance(state, LeWMState):
            if not (self._caches and self._caching.cheap):
                return self._advance(state, action, None)
            state = self._future(state, self._recall(state))
        change, hidden, cache = self._caching.step(state.cache, state.z, state.moved, action)
        moved = state.moved
        if self.history > 1:
            moved = joined([moved[:, self.config.latent_dim :], change], change.dtype)
        return LeWMFuture(state.z + change, moved, hidden, state.valid, state.steps + 1, cache)

    def futures(self, state: LeWMState) -> Callable[[int], State]:
        copies = super().futures(state)
        # In train mode dropout draws anew for each window, which a cache cannot.
        if self.training or not self._caches or self._caching.cheap:
            return copies
        cache = self._recall(state)
        return lambda n: self._future(copies(n), cache)

    @property
    def _caching(self) -> CachingPredictor:
        return cast(CachingPredictor, self.predictor)

    def _recall(self, state: LeWMState) -> Any:
        return self._caching.recall(state.z, state.action, state.valid)

    @staticmethod
    def _future(state: LeWMState, cache: Any) -> LeWMFuture:
        return LeWMFuture(state.z[:, -1], differences(state.z, state.valid), state.hidden, state.valid, 0, cache)

    def _advance(self, state: LeWMState, action: Tensor, z: Tensor | None) -> LeWMState:
        """Push ``action`` and the next latent (the predicted one where ``z`` is None) into the window."""
        actions = torch.cat([state.action, action[:, None]], 1)
        predicted, hidden = self.predictor(state.z, actions, state.valid)
        newest = predicted if z is None else z
        return LeWMState(
            z=torch.cat([state.z[:, 1:], newest[:, None]], 1),
            action=actions[:, 1:],
            valid=torch.cat([state.valid[:, 1:], torch.ones_like(state.valid[:, :1])], 1),
            hidden=hidden,
        )

    def feat(self, state: LeWMState | LeWMFuture) -> Float[Tensor, "B F"]:
        if isinstance(state, LeWMState):
            state = self._future(state, None)
        return joined([state.z, state.moved, state.hidden], state.hidden.dtype)

    def latent(self, state: LeWMState | LeWMFuture) -> Float[Tensor, "B D"]:
        return (state.z[:, -1] if isinstance(state, LeWMState) else state.z).float()

    def reward(self, feat: Float[Tensor, "*N F"]) -> Float[Tensor, "*N"]:
        return self.reward_head(self.head_trunk(feat))

    def cont(self, feat: Float[Tensor, "*N F"]) -> Float[Tensor, "*N"]:
        return self.cont_head(self.head_trunk(feat))

    def outcome(self, feat: Float[Tensor, "*N F"]) -> tuple[Float[Tensor, "*N"], Float[Tensor, "*N"]]:
        read = self.head_trunk(feat)
        return self.reward_head(read), self.cont_head(read)

    def settled(self, state: LeWMState | LeWMFuture) -> Bool[Tensor, " B"]:
        if isinstance(state, LeWMState):
            return state.valid.all(1)
        return state.valid.sum(1) + state.steps >= self.history

    def encode(self, obs: Shaped[Tensor, "N *obs"]) -> Float[Tensor, "N D"]:
        """Latents of single observations."""
        return self.encoder(self.normaliser(obs))

    # -- learning ------------------------------------------------------------------------------------------------------

    def fit_normaliser(self, obs: Shaped[Tensor, "N *obs"]) -> None:
        """Fit the input normaliser; once, before the first gradient step."""
        self.normaliser.fit(obs)

    def states(self, batch: Batch, z: Float[Tensor, "B T D"]) -> tuple[LeWMState, LeWMState]:
        """The state of every row (B*T,…), and the state predicted to follow each row but the last (B*(T−1),…)."""
        b, t, _ = z.shape
        windows, actions, valid = unfold_windows(z, batch.action, batch.is_first, self.history)
        predicted, hidden = self.predictor.sequence(z[:, :-1], batch.action[:, :-1], batch.is_first[:, :-1])
        arrived = hidden.masked_fill(batch.is_first[:, 1:, None], 0.0)
        arrived = F.pad(arrived, (0, 0, 1, 0))
        now = LeWMState(z=windows, action=actions[:, :-1], valid=valid, hidden=arrived.flatten(0, 1))
        before = [x.view(b, t, *x.shape[1:])[:, :-1].flatten(0, 1) for x in (windows, actions, valid)]
        after = LeWMState(
            z=torch.cat([before[0][:, 1:], predicted.flatten(0, 1)[:, None]], 1),
            action=before[1][:, 1:],
            valid=torch.cat([before[2][:, 1:], torch.ones_like(before[2][:, :1])], 1),
            hidden=hidden.flatten(0, 1),
        )
        return now, after

    def embed(self, batch: Batch, *, cut: bool = False) -> tuple[LeWMState, LeWMEmbedded]:
        b, t = batch.reward.shape
        if t < 2:
            raise ValueError(f"the world model needs sequences of at least 2 rows, got {t}")
        x = self.normaliser(batch.obs.flatten(0, 1))
        if self.config.shift_pixels:
            # One shift for a whole sequence: shifts between its frames would look like motion.
            x = random_shift(x.reshape(b, -1, *x.shape[2:]), self.config.shift_pixels).reshape(x.shape)
        encoded = self.encoder(x).float().view(b, t, -1)
        z = encoded.detach().requires_grad_() if cut else encoded
        states, after = self.states(batch, z)
        directions = ranks.of_first(random_directions(z.shape[-1], self.config.sigreg_directions, device=z.device))
        return states, LeWMEmbedded(encoded, z, after, directions)

    def backward_encoder(self, embedded: tuple[LeWMState, LeWMEmbedded]) -> None:
        encoded, z = embedded[1][:2]
        encoded.backward(z.grad)

    def losses(
        self, batch: Batch, embedded: tuple[LeWMState, LeWMEmbedded]
    ) -> tuple[Float[Tensor, ""], Metrics, Predicted]:
        """Mean losses over rows; see the module's docstring. Rows that follow an episode's end are never predicted.

        Of several ranks each gets its share (:mod:`worldmodels.ranks`), as if their batches were one.
        """
        cfg = self.config
        states, (_, z, after, directions) = embedded
        rolled = self._rollout(batch, z, after)
        known = self._known(batch)
        counts = torch.cat([known.sum().view(1), rolled.sums(rolled.alive)])
        of_known, of_alive = ranks.sum_over_ranks(counts).split([1, rolled.steps])
        errors = rolled.means(rolled.error, of_alive)
        terms = {"pred_loss": errors[0], "sigreg_loss": self._sigreg(z, directions)}
        # One tensor for all that read it: each would otherwise make it, and its gradient, anew.
        feat = torch.cat([self.feat(states), rolled.feat])
        loss = terms["pred_loss"] + cfg.sigreg_weight * terms["sigreg_loss"]
        if rolled.steps > 1 and cfg.rollout_weight:
            terms["rollout_loss"] = errors[1:].mean()
            loss = loss + cfg.rollout_weight * terms["rollout_loss"]
        if cfg.inverse_weight:
            terms["inverse_loss"] = self._inverse_loss(batch, z)
            loss = loss + cfg.inverse_weight * terms["inverse_loss"]
        if cfg.reward_weight or cfg.cont_weight:
            weight = torch.cat([known / of_known.clamp(min=1), rolled.alive / of_alive.sum().clamp(min=1)])
            head_terms = self._head_losses(batch, feat, rolled.row, weight)
            terms |= head_terms
            loss = loss + cfg.reward_weight * head_terms["reward_loss"] + cfg.cont_weight * head_terms["cont_loss"]
        predicted = Predicted(feat, rolled.row, rolled.alive)
        return loss, {name: value.detach() for name, value in terms.items()}, predicted

    def _remembered(self, is_first: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
        """Rows whose window is all that acting would have had: full, or cut by an episode's start, not a sample's."""
        if self.config.cut_windows:
            return torch.ones_like(is_first)
        row = torch.arange(is_first.shape[1], device=is_first.device)
        return (row >= self.history - 1) | is_first.cummax(1).values

    def _sigreg(self, z: Float[Tensor, "B T D"], directions: Float[Tensor, "D M"]) -> Float[Tensor, ""]:
        sample = z.flatten(0, 1) if self.config.sigreg_sample == "batch" else z.transpose(0, 1)
        return sigreg(sample, directions, over_ranks=True)

    def _rollout(self, batch: Batch, z: Float[Tensor, "B T D"], after: LeWMState) -> Rollout:
        """Open-loop predictions: one step from every row, 2 to ``rollout`` steps from every ``rollout_every``-th row
        that has as many behind it. Where cut windows teach nothing, not from the first rows, which have none before."""
        cfg, t = self.config, z.shape[1]
        steps = min(cfg.rollout, t - 1)
        first = 0 if cfg.cut_windows else min(self.history - 1, t - 1 - steps)
        near, far = slice(first, t - 1), slice(first, t - steps, cfg.rollout_every)
        begun, state = (
            LeWMState(*(x.unflatten(0, (-1, t - 1))[:, rows].flatten(0, 1) for x in after)) for rows in (near, far)
        )
        states: list[LeWMState | LeWMFuture] = [begun]
        for k in range(1, steps):
            later = slice(far.start + k, far.stop + k, far.step)
            state = self.imagine(state, batch.action[:, later].flatten(0, 1))
            states.append(state)
        row, ahead = _reached(z.shape[:2], near, far, steps, z.device)
        error = (torch.cat([self.latent(x) for x in states]) - z.flatten(0, 1).index_select(0, row)).square().mean(-1)
        # No episode starts after the row that the prediction started in.
        alive = rows_since_start(batch.is_first).flatten()[row] >= ahead
        alive &= self._remembered(batch.is_first).flatten()[row - ahead]
        feat = torch.cat([self.feat(x) for x in states])
        return Rollout(steps, len(begun.z), row, ahead, feat, error, alive.float())

    def _known(self, batch: Batch) -> Float[Tensor, " N"]:
        """1 for each row whose reward follows from what is remembered: no action led to an is_first row."""
        row = torch.arange(batch.reward.shape[1], device=batch.reward.device)
        return (~batch.is_first & self._remembered(batch.is_first) & (row > 0)).flatten().float()

    def _inverse_loss(self, batch: Batch, z: Float[Tensor, "B T D"]) -> Float[Tensor, ""]:
        """Mean squared error of the last action in each window of K + 1 rows within one episode, told from its latents:
        the newest, and how they came to move."""
        if z.shape[1] <= self.history:
            raise ValueError(f"the inverse model needs sequences of more than {self.history} rows, got {z.shape[1]}")
        windows, actions, valid = unfold_windows(z, batch.action, batch.is_first, self.history + 1)
        told = self.inverse_head(torch.cat([windows[:, -1], differences(windows, valid)], -1))
        error = (told - actions[:, -2]).square().mean(-1)
        within = valid.all(1).float()
        return (error * within).sum() / ranks.sum_over_ranks(within.sum()).clamp(min=1)

    def _head_losses(
        self, batch: Batch, feat: Float[Tensor, "M F"], predicted: Int[Tensor, " R"], weight: Float[Tensor, " M"]
    ) -> dict[str, Tensor]:
        """Reward and continue losses on real states and on those of rows ``predicted``, weighted."""
        read = self.head_trunk(feat if self.config.head_gradient else feat.detach())
        reward, going = batch.reward.flatten(), 1.0 - batch.is_terminal.flatten().float()
        reward_loss = self.reward_head.loss(read, torch.cat([reward, reward[predicted]]))
        cont_loss = self.cont_head.loss(read, torch.cat([going, going[predicted]]))
        return {"reward_loss": (weight * reward_loss).sum(), "cont_loss": (weight * cont_loss).sum()}

    @torch.no_grad()
    def monitors(self, batch: Batch) -> dict[str, float]:
        """Collapse monitors on one batch: effective rank and variance of z, the SIGReg statistic (along the same
        directions every time), and the k-step open-loop error relative to the latent's variance, beside the copy-last
        baseline."""
        b, t = batch.reward.shape
        z = self.encode(batch.obs.flatten(0, 1)).float()
        _, after = self.states(batch, z.view(b, t, -1))
        rolled = self._rollout(batch, z.view(b, t, -1), after)
        variance = z.var(0)
        generator = torch.Generator(z.device).manual_seed(0)  # looking must not change what training draws next
        out = {
            "effective_rank": effective_rank(z),
            "latent_variance_mean": variance.mean(),
            "latent_variance_min": variance.min(),
            "sigreg": sigreg(z, random_directions(z.shape[1], 256, device=z.device, generator=generator)),
        }
        alive, scale = rolled.sums(rolled.alive), variance.mean().clamp(min=1e-8)
        copied = (z[rolled.row] - z[rolled.row - rolled.ahead]).square().mean(-1)
        for name, errors in (("open_loop", rolled.error), ("copy_last", copied)):
            means = rolled.means(errors, alive) / scale
            out |= {f"{name}_error_{k}": means[k - 1] for k in sorted({1, rolled.steps})}
        return {name: float(value) for name, value in out.items()}


def _reached(
    shape: torch.Size, near: slice, far: slice, steps: int, device: torch.device
) -> tuple[Int[Tensor, " R"], Int[Tensor, " R"]]:
    """Which rows are predicted from rows ``near`` in one step and from rows ``far`` in 2 to ``steps``, and in how many,
    as in :class:`Rollout`."""
    rows = torch.arange(shape.numel(), device=device).view(shape)
    once, further = rows[:, near].flatten(), rows[:, far].flatten()
    steps_of_far = torch.arange(2, steps + 1, device=device)[:, None].expand(-1, len(further)).flatten()
    ahead = torch.cat([torch.ones_like(once), steps_of_far])
    return torch.cat([once, further.repeat(steps - 1)]) + ahead, ahead


def build_world_model(obs_shape: tuple[int, ...], action_dim: int, config: LeWMConfig) -> LeWorldModel:
    """A LeWorldModel for pixels (C,H,W) or state (S,). Variants are chosen here and only here."""
    image, dim = len(obs_shape) == 3, config.latent_dim
    encoder: nn.Module
    if not image:
        encoder = StateEncoder(obs_shape[0], dim, config.conv.hidden)
    elif config.encoder == "keypoint":
        encoder = KeypointEncoder(obs_shape, dim, config.keypoint)  # type: ignore[arg-type]
    elif config.encoder == "vit":
        encoder = ViTEncoder(obs_shape, dim, config.vit)  # type: ignore[arg-type]
    else:
        encoder = ConvEncoder(obs_shape, dim, config.conv)  # type: ignore[arg-type]
    predictor: Predictor
    if config.predictor == "transformer":
        predictor = TransformerPredictor(dim, action_dim, config.transformer)
    else:
        predictor = WindowPredictor(dim, action_dim, config.window)
    return LeWorldModel(
        encoder,
        predictor,
        Normaliser(obs_shape, per_feature=not image),
        action_dim=action_dim,
        config=config,
    )
