"""A report as one HTML page that opens from disk: plotly.js, the pictures and the tables are all inside."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from plotly.offline import get_plotlyjs

from benchmarks import interactive
from benchmarks.curves import training_command
from benchmarks.report_data import Content, TaskCurves, aggregate_rows, count, published_rows, score_rows, seeds_said
from benchmarks.statistics import HOW_SCORES_ARE_READ, Aggregates
from benchmarks.survey import Survey, short
from runners.report_page import Table, document, list_of, note, table

_HEAD = """<style>main { max-width: 1240px; } h3 { font-size: 1.05rem; margin: 18px 0 0; }
.plotly-graph-div { background: #fff; border-radius: 8px; } #scores th { white-space: normal; }
summary { cursor: pointer; color: var(--accent); }</style>
"""

PUBLISHED = (
    "Grey figures are published ones: means over the seeds of runs that their authors put out, read as the mean of the "
    "points within 5 % of a budget, else of the nearest within 20 %. They were not made under this page's protocol. "
    "From pixels, DreamerV3 and TD-MPC2 take each action twice; from state, the algorithms differ in action repeat. "
    "DreamerV3's scores are its training episodes under the exploring policy, TD-MPC2's are evaluations; for the "
    "others the sources do not say. Pixels are dm_control's own picture, which here is --env.render canonical. Read "
    "them as where the field stands, not as a race."
)
AGGREGATED = (
    "Scores are returns divided by 1000, the most that a dm_control task gives. The IQM is the mean of the middle half "
    "of all runs; the optimality gap is how much is missing to 1, on average. Intervals and bands are 95 %, from a "
    "bootstrap that draws each task's seeds anew (stratified), by rliable; a single seed has none."
)
CURVES = (
    "Lines are means over seeds, each interpolated between its evaluations; bands are 95 % bootstrap intervals of the "
    "mean. Broken lines are agents that see the state. A dotted line goes on over fewer seeds, where others ended or "
    "are not there yet. Against wall-clock time, the same points lie where their seeds were on average; it includes "
    "evaluations, and says as much about the machine, and what ran beside, as about the agent. Click a name to hide "
    "it, twice to see it alone; drag to zoom."
)


def page(content: Content, title: str, facts: Sequence[tuple[str, str]]) -> str:
    """The whole page."""
    names = [("scores", "Scores"), ("curves", "Learning curves")]
    names += [
        (f"at-{one.block.env_steps}", f"Aggregates at {count(one.block.env_steps)}") for one in content.aggregates
    ]
    names.append(("protocol", "How this was measured"))
    links = "".join(f'<a href="#{name}">{escape(said)}</a>' for name, said in names)
    body = [
        f"<h1>{escape(title)}</h1>",
        list_of(facts),
        _coverage(content),
        f"<nav>{links}</nav>",
        _section("scores", "Scores", _scores(content)),
        _section("curves", "Learning curves", _curves(content)),
        *(
            _section(name, said, _aggregates(content, one))
            for (name, said), one in zip(names[2:-1], content.aggregates, strict=True)
        ),
        _section(*names[-1], _protocol(content)),
    ]
    return document(title, "".join(body), f"{_HEAD}<script>{get_plotlyjs()}</script>")


def _section(name: str, title: str, inside: str) -> str:
    return f'<section id="{name}"><h2>{escape(title)}</h2>{inside}</section>'


def _soft(text: str) -> str:
    return f'<p class="soft">{escape(text)}</p>'


def _coverage(content: Content) -> str:
    """What is there and what is not, before anything else."""
    found = content.found
    finished, total = sum(map(found.finished, found.wanted)), len(found.wanted)
    said = f"{finished} of {total} runs reached their budget of {found.env_steps:,} env_steps."
    rows = [[short(task), *(_cell(found, task, agent) for agent in found.agents)] for task in found.tasks]
    notes = "".join(map(note, [*found.notes, *content.notes]))
    counts = table(Table(["runs finished", *found.agents], rows))
    return f'<section id="coverage"><h2>What is here, and what is missing</h2><p>{said}</p>{notes}{counts}</section>'


def _cell(found: Survey, task: str, agent: str) -> str:
    wanted = [key for key in found.wanted if key[:2] == (task, agent)]
    finished = sum(map(found.finished, wanted))
    going = sum(key in found.runs for key in wanted) - finished
    return f"{finished} of {len(wanted)}" + (f", {going} unfinished" if going else "") if wanted else "–"


def _scores(content: Content) -> str:
    parts = [_soft(f"Mean over seeds [95 % interval] (number of seeds). {HOW_SCORES_ARE_READ}")]
    for budget in content.budgets:
        header, *rows = score_rows(content, budget)
        parts += [f"<h3>at {budget:,} env_steps</h3>", table(Table(header, rows))]
        known = list(published_rows(content, budget))
        if known:
            parts.append(table(Table(known[0], known[1:])))
    return "".join(parts)


def _curves(content: Content) -> str:
    parts = [_soft(CURVES)]
    if content.published:
        parts.append(_soft(PUBLISHED))
    for i, one in enumerate(content.curves):
        parts += [
            f"<h3>{escape(short(one.task))}</h3>",
            _soft(_conditions(content.found, one)),
            interactive.learning_curves(content, one, f"curves-{i}"),
        ]
    return "".join(parts)


def _conditions(found: Survey, one: TaskCurves) -> str:
    """Seeds, action repeat and rendering of a task's runs; by agent where they are not the same for all."""
    parts = [seeds_said(one)]
    for name, of in (("action repeat", lambda row: row.action_repeat), ("rendering", lambda row: row.render)):
        groups: dict[str, list[str]] = {}
        for curve in one.curves:
            values = sorted({str(of(row)) for run in found.of(one.task, curve.agent) for row in run.rows})
            groups.setdefault(" and ".join(values), []).append(curve.agent)
        said = [value if len(groups) == 1 else f"{value} ({', '.join(own)})" for value, own in groups.items()]
        parts.append(f"{name} {', '.join(said)}")
    return " · ".join(parts)


def _aggregates(content: Content, one: Aggregates) -> str:
    block, steps = one.block, one.block.env_steps
    seeds = "; ".join(f"{agent} {', '.join(map(str, own))}" for agent, own in block.seeds.items())
    header, *rows = aggregate_rows(one)
    parts = [
        _soft(AGGREGATED),
        f"<p>Over {escape(', '.join(map(short, block.tasks)))}. Seeds: {escape(seeds)}.</p>",
        *(note(f"Not in these aggregates: {text}.") for text in block.left_out),
        interactive.aggregates(content, one, f"aggregates-{steps}"),
        table(Table(header, rows)),
        "<h3>Performance profiles</h3>",
        _soft("The share of runs that score above τ: a curve above another everywhere is the better agent."),
        interactive.profiles(content, one, f"profiles-{steps}"),
    ]
    if one.improvements:
        parts += [
            "<h3>Probability of improvement</h3>",
            _soft(
                "How probable it is that a run of the first agent scores higher than one of the second on the same "
                "task, averaged over tasks; a tie is half. An interval that holds 0.5 shows no difference."
            ),
            interactive.improvements(content, one, f"improvement-{steps}"),
        ]
    return "".join(parts)


def _protocol(content: Content) -> str:
    found = content.found
    rows: list[list[str | int]] = []
    for task in found.tasks:
        for agent in found.agents:
            runs = found.of(task, agent)
            if runs:
                config, row = runs[0].config, runs[0].rows[-1]
                every = f"{config.loop.eval_every:,}"
                protocol: list[str | int] = [row.action_repeat, row.render, config.num_envs, row.episodes, every]
                rows.append([short(task), agent, *protocol, training_command(config)])
    header = ["task", "agent", "action repeat", "rendering", "environments", "episodes", "evaluated every", "command"]
    sources = sorted({one.source for one in content.published})
    quoted = _soft(f"Published figures come from GitHub: {', '.join(sources)}.") if sources else ""
    return (
        _soft(
            "env_steps count simulator steps, action repeat included. Evaluations play whole episodes with the "
            "deterministic policy in environments that training never sees."
        )
        + quoted
        + f"<details><summary>Settings and command of each agent on each task (first seed)</summary>"
        f"{table(Table(header, rows), 'words')}</details>"
    )
