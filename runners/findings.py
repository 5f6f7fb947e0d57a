"""The questions that can be asked of a world model: each one computed, drawn, and put into words and numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from runners import diagnosis_plots as plots
from runners.action_effects import STEPS, action_effects
from runners.config import ConfigError
from runners.latents import geometry, open_loop, principal_axes
from runners.probes import ProbeScores, Sets, probe
from runners.questions import EDITS, QUESTIONS
from runners.recordings import Recordings, follow, plain_observations
from runners.report_page import Picture, Section, Table
from runners.subject import Finding, Subject
from runners.surprise import AFTER, BEFORE, EDITED_ROWS, Edited, Surprise, surprise
from runners.viewer import CONTEXT
from worldmodels.interface import Batch

_PANELS = 6


# -- probes ------------------------------------------------------------------------------------------------------------


def find_probes(subject: Subject) -> Finding:
    """What can be read of the physical state."""
    recordings = subject.recordings
    names, values = subject.recordings.quantities(subject.names, subject.angles)
    if not names:
        raise ConfigError("nothing moved in the episodes played, so there is nothing to probe for")
    untrained = follow(subject.untrained, recordings)
    observed, observations = plain_observations(recordings)
    sources = {
        "latent z": subject.followed.z,
        "features": subject.followed.feat,
        "untrained z": untrained.z,
        "untrained features": untrained.feat,
        observed: observations,
    }
    targets = _sets(torch.from_numpy(values).float(), recordings)
    scores = probe({name: _sets(x, recordings) for name, x in sources.items()}, targets, seed=subject.seed)
    held_out = [bool(spread > 0) for spread in targets.held_out.std(0)]
    chart = plots.png(plots.probe_bars(names, scores))
    best = _means(scores["features"], held_out)
    section = Section(
        name="probes",
        question=QUESTIONS["probes"],
        pictures=[Picture("probes.png", chart, "R² of linear and MLP probes on held-out episodes, cut at −0.25")],
        tables=[
            Table(
                (f"R² of {kind}", *scores),
                [(name, *(found[which][i] for found in scores.values())) for i, name in enumerate(names)],
            )
            for which, kind in enumerate(("linear probes", "MLP probes"))
        ],
        notes=[],
        glance=[("physical state in the features, mean R² of linear probes", best, "near 1")],
    )
    figures = {
        "quantities": names,
        "held_out_rows": len(targets.held_out),
        "r2": {source: found._asdict() for source, found in scores.items()},
        "mean_linear_r2": {source: _means(found, held_out) for source, found in scores.items()},
    }
    return Finding(section, figures)


def _means(scores: ProbeScores, counted: list[bool]) -> float:
    return float(np.mean([value for value, count in zip(scores.linear, counted, strict=True) if count]))


def _sets(x: Float[Tensor, "R F"], recordings: Recordings) -> Sets:
    """Split by episode; the first row of each is left out, since nothing has moved there yet."""
    return Sets(*(x[recordings.rows(before=1, after=0, among=part)] for part in recordings.split))


# -- action effects ----------------------------------------------------------------------------------------------------


def find_effects(subject: Subject, starts: int) -> Finding:
    """What the model thinks that actions do."""
    rng = np.random.default_rng(subject.seed)
    possible = subject.held_out_rows("asking for action effects", subject.model.history - 1, STEPS)
    rows = np.sort(rng.choice(possible, min(starts, len(possible)), replace=False))
    env = subject.make_env("state")
    try:
        found = action_effects(subject.model, subject.followed.states, subject.recordings, rows, env, seed=subject.seed)
    finally:
        env.close()
    few = len(found.directions) == subject.recordings.action.shape[1]
    labels = [f"action {i}" if few else f"direction {i}" for i in range(len(found.directions))]
    chart = plots.png(plots.effects_scatter(found, labels))
    whole = found.agreement(STEPS)
    notes = []
    if whole.slope is None:
        notes = ["There is no correlation: from these moments opposite actions really earn the same."]
    elif whole.correlation is None:
        notes = ["There is no correlation: the model imagines the same reward for opposite actions everywhere."]
    section = Section(
        name="effects",
        question=QUESTIONS["effects"],
        pictures=[Picture("effects.png", chart, "Left: each point is one moment. Right: the same for fewer steps")],
        tables=[
            Table(
                ("", "correlation", "slope"),
                [
                    *((label, *found.agreement(STEPS, i)) for i, label in enumerate(labels)),
                    ("all", *whole),
                ],
            )
        ],
        notes=notes,
        glance=[
            ("action effects, correlation", whole.correlation, "above 0.9"),
            ("action effects, slope", whole.slope, "0.6 to 1"),
        ],
    )
    figures = {
        "starts": len(rows),
        "directions": found.directions,
        "by_steps": {str(k): found.agreement(k)._asdict() for k in range(1, STEPS + 1)},
        "by_direction": [found.agreement(STEPS, i)._asdict() for i in range(len(labels))],
        "predicted": found.predicted[..., -1].tolist(),
        "real": found.real[..., -1].tolist(),
    }
    return Finding(section, figures)


# -- surprise ----------------------------------------------------------------------------------------------------------


def find_surprise(subject: Subject, clips: int) -> Finding:
    """Whether it notices what cannot be."""
    subject.held_out_rows("asking for surprise", max(subject.model.history, BEFORE), AFTER + 1)
    recordings = subject.recordings
    env = subject.make_env("as trained") if recordings.physical is not None else None
    try:
        found = surprise(subject.model, subject.followed, recordings, subject.scale, clips, env, seed=subject.seed)
    finally:
        if env is not None:
            env.close()
    chart = plots.png(plots.auroc_bars(found))
    shown = [Picture("surprise.png", chart, "How well surprise tells edited rows from plausible ones")]
    for edited in found.edits:
        strip = plots.png(_strip(found, edited, recordings))
        shown.append(Picture(f"surprise-{edited.name}.png", strip, f"{edited.name}: {EDITS[edited.name].words}"))
    section = Section(
        name="surprise",
        question=QUESTIONS["surprise"],
        pictures=shown,
        tables=[
            Table(
                ("edit", "AUROC", "edited, median", "plausible, median"),
                [(one.name, one.auroc, _edited_median(one), float(np.median(found.plausible))) for one in found.edits],
            )
        ],
        notes=[f"The edit {name!r} is left out: {why}." for name, why in found.left_out.items()],
        glance=[(f"surprise at {one.name}, AUROC", one.auroc, EDITS[one.name].good) for one in found.edits],
    )
    figures = {
        "clips": len(found.starts),
        "auroc": {one.name: one.auroc for one in found.edits},
        "edited_median": {one.name: _edited_median(one) for one in found.edits},
        "plausible_median": float(np.median(found.plausible)),
        "plausible_rows": len(found.plausible),
        "left_out": found.left_out,
    }
    return Finding(section, figures)


def _edited_median(edited: Edited) -> float:
    rows = EDITED_ROWS[edited.name]
    return float(np.median(edited.scores[:, :rows][edited.clips.alive[:, :rows]]))


def _strip(found: Surprise, edited: Edited, recordings: Recordings) -> Any:
    """The clip in the middle of its kind by how surprising it was."""
    scores = edited.scores[:, : EDITED_ROWS[edited.name]].mean(1)
    example = int(np.argsort(scores)[len(scores) // 2])
    if recordings.obs.ndim != 4:
        return plots.surprise_strip(found, edited, example, None, None)
    start = found.starts[example]
    recorded = recordings.obs[start + np.arange(1 - BEFORE, AFTER + 1)]
    shown = np.concatenate([recorded[:BEFORE], edited.clips.obs[example]])
    return plots.surprise_strip(found, edited, example, recorded, shown)


# -- open loop and geometry --------------------------------------------------------------------------------------------


def find_open_loop(subject: Subject, horizon: int) -> Finding:
    """How far ahead it sees."""
    model, recordings = subject.model, subject.recordings
    starts = subject.held_out_rows("looking ahead", max(model.history - 1, 1), horizon)
    found = open_loop(model, subject.followed.z, subject.followed.states, recordings, subject.scale, horizon)
    chart = plots.png(plots.open_loop_curves(found))
    shown = [Picture("open-loop.png", chart, "Error in the latent against the steps that were only imagined")]
    strips = _decoded_strips(subject, min(horizon, 15))
    notes = ["No strips of pictures: the checkpoint holds no decoder that has learned (--loop.view-steps)."]
    last, first = found.model[-1], found.model[0]
    section = Section(
        name="open-loop",
        question=QUESTIONS["open-loop"],
        pictures=shown + strips,
        tables=[
            Table(
                ("steps", "world model", "linear baseline", "copy the last"),
                [
                    (k + 1, found.model[k], found.linear[k], found.copy_last[k])
                    for k in sorted({0, 2, 5, 9, horizon - 1})
                    if k < horizon
                ],
            )
        ],
        notes=[] if strips else notes,
        glance=[
            ("open-loop error after 1 step, relative to the latents' variance", first, "far below 1"),
            (f"open-loop error after {horizon} steps", last, f"below linear, {found.linear[-1]:.2f}"),
        ],
    )
    return Finding(section, {"horizon": horizon, "rows": len(starts), **found._asdict()})


def _decoded_strips(subject: Subject, horizon: int) -> list[Picture]:
    """Real against imagined frames of three held-out moments; none without a decoder, or in shorter episodes."""
    recordings, length = subject.recordings, CONTEXT + horizon
    rows = recordings.rows(before=0, after=length - 1, among=recordings.split.held_out)
    if subject.viewer is None or not len(rows):
        return []
    chosen = np.random.default_rng(subject.seed).choice(rows, min(3, len(rows)), replace=False)
    device = next(subject.model.parameters()).device
    batch = Batch(*(x.to(device) for x in recordings.batch(chosen, length)))
    strip = subject.viewer.strip(subject.model, batch, horizon=horizon)
    caption = (
        "Held-out moments; in each, real frames, decoded latents and their difference. Right of the orange line the "
        "model is only told the actions. The decoder learned on the side and is no judge of fine detail"
    )
    return [Picture("open-loop-strips.png", plots.picture(strip), caption)]


def find_geometry(subject: Subject) -> Finding:
    """How the latents lie."""
    z, recordings, loop = subject.followed.z, subject.recordings, subject.run.loop
    found = geometry(z, recordings, loop.batch * loop.length, seed=subject.seed)
    colours = {"reward": recordings.reward, "agent steps since the start": recordings.step.astype(float)}
    if recordings.physical is not None:
        names, values = subject.recordings.quantities(subject.names, subject.angles)
        colours = {name: values[:, i] for i, name in enumerate(names[:_PANELS])} or colours
    points, share = principal_axes(z)
    caption = f"The latents of all rows on their two principal axes, {100 * sum(share):.0f} % of the variance"
    chart = plots.png(plots.latent_map(points.numpy(), colours))
    section = Section(
        name="geometry",
        question=QUESTIONS["geometry"],
        pictures=[Picture("geometry.png", chart, caption)],
        tables=[
            Table(
                ("", "value"),
                [
                    ("effective rank, of " + str(found.latent_dim), found.effective_rank),
                    (f"SIGReg statistic of {found.sigreg_rows} rows", found.sigreg),
                    ("temporal straightness", found.straightness),
                    ("variance of a dimension, mean", found.variance_mean),
                    ("variance of a dimension, least", found.variance_min),
                ],
            )
        ],
        notes=[],
        glance=[
            (f"effective rank, of {found.latent_dim}", found.effective_rank, "above the number of things that move"),
            ("temporal straightness", found.straightness, "well above 0"),
        ],
    )
    return Finding(section, found._asdict())
