"""Other packages' work at the sizes of ours, to be timed beside it in one run. They come with ``.[peers]``."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium.spaces import Box

from agents.planner import SamplingConfig
from worldmodels.lewm import LeWMConfig

STABLE_WORLDMODEL = "stable-worldmodel"


class PeerUnavailable(Exception):
    """A package that cannot be used here, and why."""


class Peer(NamedTuple):
    """Another package's way of doing what ours does."""

    name: str
    """With its version."""
    work: Callable[[], None]
    parameters: int
    """Those that it learns."""


def unavailable(package: str, error: Exception) -> PeerUnavailable:
    """What became of importing or building a peer, in one line."""
    why = str(error).strip().partition("\n")[0]
    hint = "pip install -e '.[peers]'"
    if "torchvision" in why:
        hint = "it needs a torchvision built for the torch that is installed"
    return PeerUnavailable(f"{package} cannot be used here: {type(error).__name__}: {why} ({hint})")


def stable_worldmodel_decision(
    model: LeWMConfig, cem: SamplingConfig, *, horizon: int, block: int, actions: int, device: torch.device
) -> Peer:
    """One decision by stable-worldmodel's own LeWM and CEM solver: encode a frame and a goal of 224×224 pixels, then
    search plans of ``horizon`` blocks of ``block`` actions. Random weights.

    Raises:
        PeerUnavailable: it is not installed, or cannot be imported.
    """
    name, lewm = _stable_worldmodel(model, block * actions, device)
    from stable_worldmodel import PlanConfig
    from stable_worldmodel.solver import CEMSolver

    lewm.eval()
    solver = CEMSolver(lewm, num_samples=cem.samples, n_steps=cem.iterations, topk=cem.elites, device=device)
    solver.configure(
        action_space=Box(-1, 1, (1, actions), np.float32),
        n_envs=1,
        config=PlanConfig(horizon=horizon, receding_horizon=horizon, action_block=block),
    )
    frames = torch.rand(2, 1, 1, 3, 224, 224)
    seen = {"pixels": frames[0], "goal": frames[1], "action": torch.zeros(1, 1, block * actions)}

    @torch.no_grad()
    def decide() -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its time
            solver.solve(dict(seen))

    return Peer(name, decide, _count(lewm))


def stable_worldmodel_update(
    model: LeWMConfig, *, batch: int, length: int, actions: int, bf16: bool, device: torch.device
) -> Peer:
    """One gradient step of stable-worldmodel's own LeWM and SIGReg on ``batch`` × ``length`` frames of 224×224 pixels,
    put together as its training script does: two loss terms, AdamW, gradients clipped to 1. The frames are already
    normalised, as its loader gives them. ``actions`` is the size of a block of actions.

    Raises:
        PeerUnavailable: it is not installed, or cannot be imported.
    """
    name, lewm = _stable_worldmodel(model, actions, device)
    from stable_worldmodel.wm.loss import SIGReg

    sigreg = SIGReg(knots=17, num_proj=model.sigreg_directions).to(device)
    optimiser = torch.optim.AdamW(lewm.parameters(), lr=5e-5, weight_decay=1e-3)
    pixels = torch.randn(batch, length, 3, 224, 224, device=device)
    action = torch.rand(batch, length, actions, device=device)
    history = model.transformer.history
    if length != history + 1:
        raise ValueError(f"it learns from its history of {history} frames and one more, not from {length}")
    lewm.train()

    def learn() -> None:
        optimiser.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            seen = lewm.encode({"pixels": pixels, "action": action})
            z = seen["emb"]
            predicted = lewm.predict(z[:, :history], seen["act_emb"][:, :history])
            loss = (predicted - z[:, 1:]).pow(2).mean() + model.sigreg_weight * sigreg(z.transpose(0, 1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lewm.parameters(), 1.0)
        optimiser.step()

    return Peer(name, learn, _count(lewm))


def _stable_worldmodel(model: LeWMConfig, actions: int, device: torch.device) -> tuple[str, Any]:
    """Its name with its version, and its LeWM of the sizes of ours, built as its training script builds it.

    Raises PeerUnavailable.
    """
    try:
        from stable_worldmodel.wm.lewm import LeWM
        from stable_worldmodel.wm.lewm.module import MLP, Embedder, Predictor
        from transformers import ViTConfig, ViTModel

        name = f"{STABLE_WORLDMODEL} {version(STABLE_WORLDMODEL)}"
    # A torchvision that was built for another torch raises RuntimeError or OSError.
    except (ImportError, OSError, RuntimeError, PackageNotFoundError) as error:
        raise unavailable(STABLE_WORLDMODEL, error) from error
    dim, vit, predictor = model.latent_dim, model.vit, model.transformer
    encoder = ViTModel(
        ViTConfig(
            hidden_size=vit.width,
            num_hidden_layers=vit.depth,
            num_attention_heads=vit.heads,
            intermediate_size=vit.mlp,
            image_size=224,
            patch_size=vit.patch,
        ),
        add_pooling_layer=False,
    )
    lewm = LeWM(
        encoder,
        Predictor(
            num_frames=predictor.history,
            depth=predictor.depth,
            heads=predictor.heads,
            mlp_dim=predictor.mlp,
            input_dim=dim,
            hidden_dim=dim,
            dim_head=predictor.head_dim,
            dropout=predictor.dropout,
        ),
        Embedder(input_dim=actions, emb_dim=dim),
        projector=MLP(vit.width, vit.projector, dim, norm_fn=torch.nn.BatchNorm1d),
        pred_proj=MLP(dim, predictor.projector, dim, norm_fn=torch.nn.BatchNorm1d),
    )
    return name, lewm.to(device)


def _count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
