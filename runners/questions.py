"""The questions of a diagnosis in words: what is asked, what a good answer looks like, and what a bad one means."""

from __future__ import annotations

from typing import Literal, NamedTuple

PartName = Literal["probes", "effects", "surprise", "open-loop", "geometry"]
NEEDS_PHYSICS: tuple[PartName, ...] = ("probes", "effects")
"""Questions that are about the simulator's own state."""


class Question(NamedTuple):
    """A title, what is asked, and how to read the answer."""

    title: str
    asked: str
    good: str
    bad: str


QUESTIONS: dict[PartName, Question] = {
    "probes": Question(
        "What the latent knows",
        "Can a simple reader find the physical state in the latent z, and in the features that policy and critic see? "
        "R² is 1 for a perfect reading and 0 for always answering the mean, on episodes that the reader was not fitted "
        "to. Beside them, the same readers on an untrained encoder and on the observation itself, this one and the one "
        "before (pixels in grey, averaged down to 16×16).",
        "positions, and the sine and cosine of angles, near 1 from z by the linear probe already; velocities near 1 "
        "from the features, which hold how z moved. Both above the untrained encoder.",
        "a quantity that the MLP cannot find in the features is lost: no policy on them can react to it. One that only "
        "the MLP finds is there, but tangled. No better than untrained: training has taught nothing about it.",
    ),
    "effects": Question(
        "What actions do",
        "From the same held-out moment, how much more reward would six steps of action +1 bring than of −1? Imagined "
        "by the model, and simulated from the same physical state.",
        "correlation above 0.9 and a slope of 0.6 to 1: the policy, which climbs the imagined effect, climbs the real "
        "one.",
        "a slope far below 1: the model thinks that actions hardly matter, and the policy stops improving although it "
        "could. A correlation below 0.7: it is pushed to wrong actions in many states. Agents that plateaued on "
        "cartpole swing-up had .65 and .2 to .35; with latents that held the pole's angle it became .93 and .6 to .9.",
    ),
    "surprise": Question(
        "What surprises it",
        "How wrong is the one-step prediction, relative to the latents' variance, when something impossible happens? "
        "An AUROC of 1: every edited row surprises more than every plausible one; 0.5: no difference.",
        "teleport and colour near 1, gravity and edits of time above 0.8 where things move. The curve stays low before "
        "the edit and leaps at it.",
        "0.5: the edit is not in the latents, or the prediction is always as wrong. A colour that does not surprise "
        "can be wanted: the latent then holds places and not looks. Below 0.5: what is edited is easier to predict "
        "than life, as a picture that stands still is for a model that expects little to move. No edit of time can be "
        "seen where nothing moves.",
    ),
    "open-loop": Question(
        "How far it sees",
        "The model observes, then only imagines, from the actions that were really taken. How far does its latent "
        "drift from the one that the real frame gives?",
        "below both baselines at every horizon that the agent imagines, and far below 1.",
        "above copying the last latent, the model has learned nothing of what moves; above the linear baseline (least "
        "squares from two latents and the actions, one fit for each horizon), nothing that is not linear; at 1 and "
        "beyond, it knows no more than the mean.",
    ),
    "geometry": Question(
        "How the latents lie",
        "Do the latents use their room, and does time run smoothly through them?",
        "an effective rank well above the number of things that move; SIGReg near 1.05, which Gaussian latents have; "
        "straightness well above 0: steps that go on, so that prediction is easy; colours that change smoothly over "
        "the map.",
        "an effective rank near 1, or a dimension without variance: collapse. SIGReg in the tens: far from the "
        "Gaussian that training asks for (episodes of one policy are narrower than the replay, so some excess is "
        "usual). Straightness near −0.5: the latent jumps about like noise.",
    ),
}


class Edit(NamedTuple):
    """What an edit of the surprise test does, and the AUROC to hope for."""

    words: str
    good: str


_WHERE_IT_SHOWS = "above 0.8 where things move"
EDITS = {
    "teleport": Edit("everything jumps to a place that other episodes have visited", "near 1"),
    "colour": Edit("all that can move turns green", "near 1"),
    "gravity": Edit("everything falls the other way from here on", _WHERE_IT_SHOWS),
    "freeze": Edit(
        "the picture stands still for three steps while the actions go on, then catches up, which is not counted",
        _WHERE_IT_SHOWS,
    ),
    "skip": Edit("one step is missing", _WHERE_IT_SHOWS),
}
