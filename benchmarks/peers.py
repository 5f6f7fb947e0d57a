"""Other packages' decisions at the sizes of ours, to be timed beside it in one run. They come with ``.[peers]``."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

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


def stable_worldmodel_decision(
    model: LeWMConfig, cem: SamplingConfig, *, horizon: int, block: int, actions: int, device: torch.device
) -> Peer:
    """One decision by stable-worldmodel's own LeWM and CEM solver, built as its training script builds them: encode a
    frame and a goal of 224×224 pixels, then search plans of ``horizon`` blocks of ``block`` actions. Random weights.

    Raises:
        PeerUnavailable: it is not installed, or cannot be imported.
    """
    try:
        from stable_worldmodel import PlanConfig
        from stable_worldmodel.solver import CEMSolver
        from stable_worldmodel.wm.lewm import LeWM
        from stable_worldmodel.wm.lewm.module import MLP, Embedder, Predictor
        from transformers import ViTConfig, ViTModel

        name = f"{STABLE_WORLDMODEL} {version(STABLE_WORLDMODEL)}"
    # A torchvision that was built for another torch raises RuntimeError or OSError.
    except (ImportError, OSError, RuntimeError, PackageNotFoundError) as error:
        why = str(error).strip().partition("\n")[0]
        hint = "pip install -e '.[peers]'"
        if "torchvision" in why:
            hint = "it needs a torchvision built for the torch that is installed"
        raise PeerUnavailable(
            f"{STABLE_WORLDMODEL} cannot be used here: {type(error).__name__}: {why} ({hint})"
        ) from error
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
        Embedder(input_dim=block * actions, emb_dim=dim),
        projector=MLP(vit.width, vit.projector, dim, norm_fn=torch.nn.BatchNorm1d),
        pred_proj=MLP(dim, predictor.projector, dim, norm_fn=torch.nn.BatchNorm1d),
    )
    lewm = lewm.to(device).eval()
    solver = CEMSolver(lewm, num_samples=cem.samples, n_steps=cem.iterations, topk=cem.elites, device=device)
    solver.configure(
        action_space=Box(-1, 1, (1, actions), np.float32),
        n_envs=1,
        config=PlanConfig(horizon=horizon, receding_horizon=horizon, action_block=block),
    )
    frames = torch.rand(2, 1, 1, 3, 224, 224)
    seen = {"pixels": frames[0], "goal": frames[1], "action": torch.zeros(1, 1, block * actions)}

    def decide() -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its time
            solver.solve(dict(seen))

    return Peer(name, decide, sum(p.numel() for p in lewm.parameters()))
