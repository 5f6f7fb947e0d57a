"""A Dreamer-like agent: policy and critic learn inside the world model's imagination, from replayed states."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from agents.actor_critic import (
    Critic,
    CriticConfig,
    Estimator,
    Imagined,
    Policy,
    PolicyConfig,
    ReturnScale,
    follow,
)
from agents.beside import SHARED, one_after_the_other, side_by_side
from agents.captured import Captured, Watch, send
from agents.optimiser import Adam
from agents.returns import lambda_return
from worldmodels import ranks
from worldmodels.interface import Batch, Predicted, State, WorldModel


@dataclass(frozen=True)
class DreamerConfig:
    """The imagination agent."""

    policy: PolicyConfig = field(default_factory=PolicyConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    random_actions: float = 0.0
    """While collecting, each episode takes a uniformly random action with a probability drawn between 0 and this:
    actions that follow from the state alone would teach the model nothing of what they cause."""
    horizon: int = 6
    """Imagined decisions, H; keep it within the world model's rollout."""
    starts: int = 96
    """Replayed states that imagination starts from, an update."""
    discount: float = 0.97
    """γ, for one decision (not for one simulator step)."""
    lam: float = 0.95
    """λ of the λ-returns in imagination, where actions are the current policy's."""
    replay_lam: float = 0.95
    """λ along replayed rows, whose actions are older policies': the higher, the more of those the value keeps."""
    entropy: float = 1e-2
    """Weight of the entropy bonus, against returns of scale 1."""
    replay_value_weight: float = 0.3
    """Weight of the critic's loss on replayed rows, whose gradient reaches the encoder."""
    rollout_value_weight: float = 0.3
    """Weight of the critic's loss on open-loop predictions of replayed rows, 1 to --model.rollout steps ahead: its
    gradient makes the model predict what the value depends on, as in MuZero (arXiv 1911.08265)."""
    behaviour_every: int = 1
    """Updates of the world model for each one of policy and critic, which are quicker learners."""
    policy_average: float = 0.0
    """The deterministic policy is an exponential average over its updates; this is how much of it stays at each. 0 is
    the policy as it is: an average lags behind features that still move (0.99 cost 100 of 840 on cartpole swing-up)."""
    model_lr: float = 1e-3
    """Adam's learning rate for the world model."""
    behaviour_lr: float = 5e-4
    """Adam's learning rate for policy and critic."""
    final_lr: float = 0.1
    """Both learning rates fall linearly over the run to this fraction of themselves. 1: they stay."""
    clip: float = 10.0
    """Largest gradient norm, for the model, the policy and the critic each."""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """bf16 runs the networks in bfloat16 autocast; losses, returns and the optimiser stay in float32. auto takes it
    where the hardware computes in it: a processor that has to emulate it takes half as long again as in float32."""


Compilation = Literal["auto", "true", "graph", "false"]
"""How an update is run. false: operator by operator. graph: on a GPU, replayed as one CUDA graph of the same kernels.
true: fused by torch.compile, and on a GPU replayed as a graph. auto: graph, which on a processor is false."""

COMPILER = "inductor"
"""torch.compile's backend."""


class DreamerCarry(NamedTuple):
    """A model state, the action that left it, and this episode's probability of a random one."""

    state: State
    action: Float[Tensor, "E A"]
    random: Float[Tensor, " E"]


class Behaviour(NamedTuple):
    """What imagination taught."""

    gradients: Mapping[str, tuple[Tensor | None, ...]]
    """Of each group's parameters, in their order; None where a loss does not depend on one."""
    metrics: dict[str, Tensor]


class DreamerAgent:
    """Implements :class:`agents.interface.Agent`."""

    def __init__(
        self,
        model: WorldModel,
        action_dim: int,
        estimator: Estimator,
        config: DreamerConfig,
        compilation: Compilation = "auto",
    ) -> None:
        _refuse_batch_statistics(model)
        self.model = model
        self.config = config
        self.estimator = estimator
        self.device = next(model.parameters()).device
        self.action_dim = action_dim
        self.bf16 = config.precision == "bf16" or (config.precision == "auto" and computes_bf16(self.device))
        self.policy = Policy(model.feat_dim, action_dim, config.policy).to(self.device)
        self.average_policy = copy.deepcopy(self.policy).requires_grad_(False)
        self.critic = Critic(model.feat_dim, config.critic).to(self.device)
        self.scale = ReturnScale().to(self.device)
        self.groups: dict[str, list[nn.Parameter]] = {
            "model": list(model.parameters()),
            "policy": list(self.policy.parameters()),
            "critic": list(self.critic.members.parameters()),
        }
        # Of several ranks, both halves meet the other ranks' halves: from two threads they would do so in any order.
        alone = self.device.type == "cpu" and not _has_modes(model) and ranks.size() == 1
        largest = 2 * config.starts * max(p.numel() for group in self.groups.values() for p in group)
        self.beside = side_by_side if alone and largest < SHARED else one_after_the_other
        self.rates = {"model": config.model_lr, "policy": config.behaviour_lr, "critic": config.behaviour_lr}
        self.optimisers = {
            name: Adam(params, **self._adam_settings(self.rates[name])) for name, params in self.groups.items()
        }
        self.updates = 0
        self._names: dict[bool, tuple[str, ...]] = {}
        self._watch = Watch(self.device)
        self._accelerate(compilation)

    def _accelerate(self, compilation: Compilation) -> None:
        """See :data:`Compilation`."""
        on_gpu = self.device.type == "cuda"
        if compilation == "true":
            self.beside = one_after_the_other  # two threads would compile at the same time
            # PyTorch's own random numbers, so that compiled and uncompiled updates are the same update.
            from torch._inductor import config  # which takes seconds to import

            config.fallback_random = True
            compiled = partial(torch.compile, dynamic=False, backend=COMPILER)
            self._model_losses = compiled(self._model_losses)  # type: ignore[method-assign]
            self._behaviour_losses = compiled(self._behaviour_losses)  # type: ignore[method-assign]
        # Ranks meet in the middle of an update, on the host.
        recorded = on_gpu and compilation != "false" and ranks.size() == 1
        self._learn_on_device = Captured(self._learn, enabled=recorded)
        self._act_on_device = Captured(self._act, enabled=recorded)

    def _adam_settings(self, rate: float) -> dict[str, Any]:
        """A GPU's graph reads the learning rate where it lies, so there it is a tensor."""
        if self.device.type != "cuda":
            return {"lr": rate, "fused": True}
        return {"lr": torch.tensor(rate, device=self.device), "fused": True, "capturable": True}

    # -- acting --------------------------------------------------------------------------------------------------------

    def initial(self, envs: int) -> DreamerCarry:
        action = torch.zeros(envs, self.action_dim, device=self.device)
        return DreamerCarry(self.model.initial(envs), action, action.new_zeros(envs))

    def act(
        self, obs: Shaped[np.ndarray, "E *obs"], is_first: Bool[np.ndarray, " E"], carry: DreamerCarry, *, explore: bool
    ) -> tuple[Float[np.ndarray, "E A"], DreamerCarry]:
        return self._decide(obs, is_first, carry, explore)

    def _decide(
        self, obs: Shaped[np.ndarray, "E *obs"], is_first: Bool[np.ndarray, " E"], carry: Any, explore: bool
    ) -> tuple[Float[np.ndarray, "E A"], Any]:
        """``act`` with whatever carry ``_act`` takes and answers."""
        carry = self._act_on_device(send(obs, self.device), send(is_first, self.device), carry, explore)
        return carry.action.cpu().numpy(), carry

    @torch.no_grad()
    def _act(
        self, obs: Shaped[Tensor, "E *obs"], is_first: Bool[Tensor, " E"], carry: DreamerCarry, explore: bool
    ) -> DreamerCarry:
        """``act`` on the device alone."""
        self.model.eval()
        with self._autocast():
            state = self.model.observe(carry.state, carry.action, obs, is_first)
            feat = self.model.feat(state)
            action = self.policy.sample(feat).action if explore else self.average_policy.mode(feat)
        random = carry.random
        if explore:
            random = torch.where(is_first, self.config.random_actions * torch.rand_like(random), random)
            chosen = torch.rand_like(random) < random
            action = torch.where(chosen[:, None], 2 * torch.rand_like(action) - 1, action)
        return DreamerCarry(state, action, random)

    def _autocast(self) -> torch.autocast:
        # PyTorch keeps one store of cast weights for all threads, and whichever leaves autocast empties it: on a
        # processor, where halves of an update run side by side, how gradients add up would depend on who is faster.
        kept = self.device.type == "cuda"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=kept)

    # -- learning ------------------------------------------------------------------------------------------------------

    def start(self, obs: Shaped[Tensor, "N *obs"]) -> None:
        self.model.fit_normaliser(ranks.all_rows(obs))

    def anneal(self, progress: float) -> None:
        factor = 1 - (1 - self.config.final_lr) * min(max(progress, 0.0), 1.0)
        for name, optimiser in self.optimisers.items():
            self._set_rate(optimiser, self.rates[name] * factor)

    @staticmethod
    def _set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
        for group in optimiser.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def update(self, batch: Batch) -> dict[str, Tensor]:
        behaviour = self.updates % self.config.behaviour_every == 0
        values = self._learn_on_device(batch, behaviour)
        names = self._names[behaviour]
        self._watch.look(names, values)
        self.updates += 1
        return dict(zip(names, values.unbind(), strict=True))

    def _learn(self, batch: Batch, behaviour: bool) -> Float[Tensor, " M"]:
        """One update on the device alone, of policy and critic too where ``behaviour``: nothing in it makes the host
        wait, and where a figure is not finite, no weight changes. Answers the metrics; their names are in ``_names``.
        """
        learning = ["model", "policy", "critic"] if behaviour else ["model"]
        self.model.train()
        for optimiser in self.optimisers.values():
            optimiser.zero_grad(set_to_none=True)
        with self._autocast():
            embedded = self.model.embed(batch, cut=True)
        if behaviour:
            # Both start from the embedded batch, and neither changes what the other reads.
            metrics, taught = self.beside(
                lambda: self._learn_model(batch, embedded),
                lambda: self._learn_behaviour(embedded[0], batch.is_terminal.flatten()),
            )
            self._add_gradients(taught.gradients)
            metrics |= taught.metrics
        else:
            metrics = self._learn_model(batch, embedded)
        self.model.backward_encoder(embedded)
        metrics = self._add_up(metrics, learning)
        for name in learning:
            metrics[f"{name}_grad_norm"] = nn.utils.clip_grad_norm_(self.groups[name], self.config.clip)
        values = torch.stack(list(metrics.values()))
        self._names[behaviour] = tuple(metrics)
        self._step(learning, values.sum().isfinite())  # a NaN anywhere makes the sum NaN
        return values

    def _step(self, learning: list[str], finite: Bool[Tensor, ""]) -> None:
        """What the gradients are for, unless something is not finite: the device itself leaves the weights alone then,
        as under a gradient scaler."""
        for name in learning:
            self.optimisers[name].found_inf = 1.0 - finite.float()  # type: ignore[attr-defined]
            self.optimisers[name].step()
        if "policy" in learning:
            self.critic.follow(finite.float())
            follow(self.average_policy, self.policy, (1 - self.config.policy_average) * finite.float())

    def _learn_model(self, batch: Batch, embedded: tuple[State, Any]) -> dict[str, Tensor]:
        """Gradients of the world model, and of the critic from replayed rows, into the parameters' ``grad``."""
        loss, metrics = self._model_losses(batch, embedded)
        loss.backward()
        return metrics

    def _model_losses(self, batch: Batch, embedded: tuple[State, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """What learning from the replayed rows themselves minimises, and metrics."""
        cfg = self.config
        with self._autocast():
            model_loss, metrics, predicted = self.model.losses(batch, embedded)
            replay_loss, rollout_loss = self._value_losses(batch, self.model.settled(embedded[0]), predicted)
        loss = model_loss + cfg.replay_value_weight * replay_loss + cfg.rollout_value_weight * rollout_loss
        terms = {"model_loss": model_loss, "replay_value_loss": replay_loss, "rollout_value_loss": rollout_loss}
        return loss, metrics | {name: term.detach() for name, term in terms.items()}

    def _learn_behaviour(self, states: State, ended: Bool[Tensor, " R"]) -> Behaviour:
        """Gradients of policy and critic from imagination. Touches no parameter's ``grad``."""
        self.model.eval()  # imagining sees the normalisation that acting sees
        policy_loss, critic_loss, metrics = self._behaviour_losses(self._choose_starts(states, ended))
        # Neither loss depends on the other's parameters, so that their sum has the gradients of both.
        policy, critic = self.groups["policy"], self.groups["critic"]
        gradients = torch.autograd.grad(policy_loss + critic_loss, [*policy, *critic], allow_unused=True)
        return Behaviour({"policy": gradients[: len(policy)], "critic": gradients[len(policy) :]}, metrics)

    def _add_gradients(self, gradients: Mapping[str, tuple[Tensor | None, ...]]) -> None:
        """The critic's meet those from the replayed rows."""
        met: list[tuple[Tensor, Tensor]] = []
        for name, of_group in gradients.items():
            for parameter, gradient in zip(self.groups[name], of_group, strict=True):
                if parameter.grad is None:
                    parameter.grad = gradient
                elif gradient is not None:
                    met.append((parameter.grad, gradient))
        if met:
            torch._foreach_add_(*zip(*met, strict=True))

    def _add_up(self, metrics: dict[str, Tensor], learning: list[str]) -> dict[str, Tensor]:
        """Every rank's gradients, and its shares of the metrics, become the sums over all: a NaN of one, too."""
        if ranks.size() == 1:
            return metrics
        gradients = [p.grad for name in learning for p in self.groups[name] if p.grad is not None]
        values = torch.stack(list(metrics.values()))
        ranks.sum_in_place([*gradients, values])
        return dict(zip(metrics, values.unbind(), strict=True))

    def _value_losses(self, batch: Batch, settled: Bool[Tensor, " N"], predicted: Predicted) -> tuple[Tensor, Tensor]:
        """The critic's λ-return losses along the replayed rows: of the rows themselves, and of what was predicted of
        them."""
        b, t = batch.reward.shape
        with torch.no_grad():
            value = self.critic.value(predicted.feat.detach()[: b * t]).view(b, t)
            discount = self.config.discount * (~batch.is_terminal[:, 1:]).float()
            target = lambda_return(
                batch.reward[:, 1:], discount, value[:, 1:], self.config.replay_lam, cut=batch.is_last[:, 1:]
            )
        # An is_last row leads nowhere, a sample's last row nowhere known; rows early in the sample lack the memory that
        # acting would have had.
        counted = (~batch.is_last & settled.view(b, t))[:, :-1].float()
        target, counted = (F.pad(x, (0, 1)).flatten() for x in (target, counted))
        alive = counted[predicted.row] * predicted.alive
        of_rows, of_alive = ranks.sum_over_ranks(torch.stack([counted.sum(), alive.sum()])).clamp(min=1)
        loss = self.critic.loss(predicted.feat, torch.cat([target, target[predicted.row]]))
        return (loss[: b * t] * counted).sum() / of_rows, (loss[b * t :] * alive).sum() / of_alive

    def _choose_starts(self, states: State, ended: Bool[Tensor, " R"]) -> State:
        """Random settled states that did not end an episode by themselves, detached."""
        wanted, starts = (self.model.settled(states) & ~ended).float(), ranks.part(self.config.starts)
        # All rows stay possible with a vanishing weight, so that the draw works when no row is wanted.
        index = draw(wanted + 1e-6, starts)
        return type(states)(*(x.detach()[index] for x in states))

    def _behaviour_losses(self, state: State) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Imagine with the current policy; the policy's and the critic's loss."""
        with self._autocast():
            return self._imagined_losses(*self._imagine(state))

    def _imagined_losses(
        self, feats: Float[Tensor, "H1 N F"], log_probs: Float[Tensor, "N H"], entropies: Float[Tensor, "N H"]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Of what was imagined: the policy's loss, the critic's, and metrics."""
        cfg = self.config
        shape = feats.shape[:2]
        value = self.critic.value(feats.flatten(0, 1)).view(shape).t()
        reward, cont = (x.view(-1, shape[1]).t() for x in self.model.outcome(feats[1:].flatten(0, 1)))
        discount = cfg.discount * cont
        returns = lambda_return(reward, discount, value[:, 1:], cfg.lam)
        weight = torch.cumprod(torch.cat([torch.ones_like(discount[:, :1]), discount[:, :-1]], 1), 1).detach()
        scale = self.scale(returns)
        loss = self.estimator(Imagined(returns, value[:, :-1].detach(), log_probs, scale))
        policy_loss = (weight * (loss - cfg.entropy * entropies)).mean()
        critic_loss = (weight.t() * self.critic.imagined_loss(feats[:-1].detach(), returns.detach().t())).mean()
        means = {
            "policy_loss": policy_loss.detach(),
            "critic_loss": critic_loss.detach(),
            "imagined_reward": reward.detach().mean(),
            "imagined_return": returns.detach().mean(),
            "return_scale": scale,
            "policy_entropy": entropies.detach().mean(),
        }
        shares = {name: ranks.share(mean) for name, mean in means.items()}
        return ranks.share(policy_loss), ranks.share(critic_loss), shares

    def _imagine(self, state: State) -> tuple[Tensor, Tensor, Tensor]:
        """H decisions from N states: features (H+1,N,F), log probabilities and entropies (N,H)."""
        feats, decisions = [self.model.feat(state)], []
        for _ in range(self.config.horizon):
            mean, std = self.policy(feats[-1].detach())
            noise = torch.randn_like(std)
            decisions.append(torch.stack([mean, std, noise]))
            with torch.set_grad_enabled(self.estimator.through_dynamics):
                state = self.model.imagine(state, self.policy.action(mean, std, noise))
                feats.append(self.model.feat(state))
        entropies, log_probs = self.policy.densities(*torch.stack(decisions, 2).unbind(0))
        return torch.stack(feats), log_probs, entropies

    def monitors(self, batch: Batch) -> dict[str, float]:
        self.model.eval()
        with self._autocast():
            return self.model.monitors(batch)

    # -- saving --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        self._watch.settle()
        return {
            "model": self.model.state_dict(),
            "policy": self.policy.state_dict(),
            "average_policy": self.average_policy.state_dict(),
            "critic": self.critic.state_dict(),
            "scale": self.scale.state_dict(),
            "optimisers": {name: optimiser.state_dict() for name, optimiser in self.optimisers.items()},
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.policy.load_state_dict(state["policy"])
        self.average_policy.load_state_dict(state["average_policy"])
        self.critic.load_state_dict(state["critic"])
        self.scale.load_state_dict(state["scale"])
        for name, optimiser in self.optimisers.items():
            optimiser.load_state_dict(copy.deepcopy(state["optimisers"][name]))
            for group in optimiser.param_groups:
                group |= self._adam_settings(float(group["lr"]))
        self.updates = state["updates"]
        self._learn_on_device.forget()


def computes_bf16(device: torch.device) -> bool:
    """Whether the hardware has instructions for bfloat16 products: AMX or AVX512-BF16 on a processor."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _has_modes(model: nn.Module) -> bool:
    """Whether training and imagining are different computations, which cannot run at the same time on one model."""
    return any(isinstance(m, (nn.Dropout, nn.modules.batchnorm._BatchNorm)) for m in model.modules())


def _refuse_batch_statistics(model: nn.Module) -> None:
    if ranks.size() > 1 and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        raise ranks.RanksError(
            "this world model has a BatchNorm, whose statistics several processes do not share: learn it in one "
            "process, or without --model.conv.projector, --model.encoder vit and --model.predictor transformer"
        )


def draw(weight: Float[Tensor, " R"], count: int) -> Int[Tensor, " count"]:
    """``count`` random rows in proportion to their weights, without replacement if there are as many: what
    torch.multinomial does, which makes the host wait for a GPU."""
    if count <= len(weight):
        return (weight / torch.empty_like(weight).exponential_()).topk(count).indices
    reached = weight.cumsum(0)
    at = torch.rand(count, device=weight.device) * reached[-1]
    return torch.searchsorted(reached, at).clamp(max=len(weight) - 1)
