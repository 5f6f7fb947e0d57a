"""The amortised planner of a run: trained on recorded episodes with the world model frozen, and kept with the run."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64

from agents.amortised import AmortisedConfig, AmortisedPolicy, HindsightRows, learn
from runners.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from runners.dataset import Dataset
from runners.disk import discard_folder
from runners.viewer import undisturbed
from worldmodels.lewm import LeWorldModel

FOLDER = "amortised"
"""In the run's folder: a checkpoint like any other, of the planner alone."""

_LOG = logging.getLogger(__name__)
_AT_ONCE = 256
"""Pictures that are encoded at once."""


def amortised_policy(
    model: LeWorldModel,
    data: Dataset,
    episodes: Int64[np.ndarray, " N"],
    config: AmortisedConfig,
    *,
    longest: int,
    seed: int,
    run_dir: Path,
    checkpoint: Path,
    progress: Callable[[int, str], None],
) -> tuple[AmortisedPolicy, bool]:
    """That of the run, if it was made of the same checkpoint, data and settings; else a new one, which is saved.

    Args:
        episodes: those to learn from.
        longest: see ``AmortisedPolicy``.
        progress: told how many updates are done, and how well it goes.

    Returns:
        The policy, and whether it was trained here and now.

    Raises:
        DiskFull: there is no room to save it.
    """
    torch.manual_seed(seed)
    device = next(model.parameters()).device
    action_dim = data.spaces()[1].shape[0]
    policy = AmortisedPolicy(model.config.latent_dim, action_dim, longest, config).to(device)
    made_of = {
        "checkpoint": f"{checkpoint.name} {_sum(checkpoint / 'SHA256SUMS')}",
        "data": _sum(data.path / "index.json", data.path / "dataset.json"),
        "episodes": _digest(episodes.astype(np.int64).tobytes()),
        "settings": dataclasses.asdict(config) | {"longest": longest, "seed": seed},
    }
    folder = run_dir / FOLDER
    if _load(policy, folder, made_of):
        return policy, False
    progress(0, "amortised planner: encoding recorded episodes")
    rows = hindsight_rows(model, data, episodes, config.rows, seed)
    policy.train()
    for update, loss in enumerate(learn(policy, rows, config, torch.Generator().manual_seed(seed)), 1):
        if update % 50 == 0 or update == config.updates:
            progress(update, f"amortised planner: action error {float(loss):.4f}")
    policy.eval()
    if folder.exists():
        discard_folder(folder)
    save_checkpoint(folder, {"policy": policy.state_dict()}, made_of)
    return policy, True


def _load(policy: AmortisedPolicy, folder: Path, made_of: dict[str, Any]) -> bool:
    """Whether ``folder`` holds what was made of the same, which ``policy`` then is."""
    if not folder.exists():
        return False
    try:
        state, about = load_checkpoint(folder)
        if about != made_of:
            return False
        policy.load_state_dict(state["policy"])
    except (CheckpointError, RuntimeError, KeyError, TypeError) as error:
        _LOG.warning("%s; it is trained again", error)
        return False
    policy.eval()
    return True


def hindsight_rows(
    model: LeWorldModel, data: Dataset, episodes: Int64[np.ndarray, " N"], most: int, seed: int
) -> HindsightRows:
    """Whole episodes as ``model`` encodes them, random ones of ``episodes``: up to ``most`` rows, but at least one."""
    device = next(model.parameters()).device
    order = np.random.default_rng(seed).permutation(episodes)
    lengths = data.spans[order, 2]
    chosen = order[: max(1, int(np.searchsorted(lengths.cumsum(), most, side="right")))]
    parts = []
    with undisturbed(model):
        for stream, first, length in data.spans[chosen]:
            episode = data.replay.take(np.array([stream]), np.array([first]), int(length))
            z = torch.cat([model.encode(obs.to(device)).float() for obs in episode.obs[0].split(_AT_ONCE)])
            ahead = torch.arange(int(length) - 1, -1, -1, device=device)
            parts.append(HindsightRows(z, episode.action[0].to(device), ahead))
    return HindsightRows(*(torch.cat(field) for field in zip(*parts, strict=True)))


def _sum(*files: Path) -> str:
    return _digest(b"".join(file.read_bytes() for file in files))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
