"""A report on a grid of runs: who learns how fast, how sure that is, and what is missing.

    python -m benchmarks.report runs/dmc6 --out report/

writes index.html (interactive, one file, opens from disk), PNGs for papers, scores.csv and scores.md, aggregates.csv
and aggregates.json. Runs may still be going on.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from benchmarks.curves import REFERENCE
from benchmarks.plot import PlotError, Reference, read_references
from benchmarks.provenance import command_line, machine_line, now, software
from benchmarks.survey import Survey, SurveyError, survey

if TYPE_CHECKING:
    from benchmarks.report_data import Content

LEAST_DRAWS = 100


@dataclass(frozen=True)
class ReportConfig:
    """Report on folders of runs: curves, scores and aggregates with intervals, and what is missing."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """A folder that benchmarks.run wrote, or any folders with runs of runners.train in them."""
    out: Path
    """Folder for the report, made if it is not there."""
    reps: int = 2_000
    """How often each bootstrap draws."""
    machine: str = ""
    """What the runs ran on, if not this machine."""
    note: str = ""
    """What else a reader should know; it stands on top of the page."""
    reference: Path = REFERENCE
    """Published figures to draw beside the runs: CSV with task, obs, algorithm, env_steps, mean_return and source."""


class ReportError(ValueError):
    """No report can be made. The message says why and what to do."""


def report(options: ReportConfig, command: str) -> list[Path]:
    """Read the runs and write everything; the files, the page first.

    Raises:
        ReportError: no folder was named, or an impossible number of draws, or packages are missing.
        SurveyError: there is nothing to report on; nothing is written then.
        PlotError: the published figures cannot be read. Nor then.
        OSError: the report cannot be written.
    """
    if not options.runs:
        raise ReportError("no folder was named; give one that benchmarks.run or runners.train wrote")
    if options.reps < LEAST_DRAWS:
        raise ReportError(f"--reps is {options.reps}, but a bootstrap must draw at least {LEAST_DRAWS} times")
    found = survey(options.runs)
    references = read_references(options.reference)
    _check_writable(options.out)
    return _write(options, found, references, command)


def _check_writable(out: Path) -> None:
    """Raises OSError before minutes of computing, not after."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out):
        pass


def _write(options: ReportConfig, found: Survey, references: list[Reference], command: str) -> list[Path]:
    try:
        from benchmarks import pictures, report_data, report_html
    except (ImportError, TypeError) as error:  # rliable's own imports end in the latter where pandas is 3
        raise ReportError(
            f"a report needs other packages than those here ({error}); get them with pip install -e '.[report]'"
        ) from error
    content = report_data.gather(found, references, options.reps)
    about = _about(options, found, command)
    title = f"Report on {', '.join(path.resolve().name for path in options.runs)}"
    out = options.out
    files = [out / name for name in ("index.html", "scores.md", "scores.csv", "aggregates.csv", "aggregates.json")]
    files[0].write_text(report_html.page(content, title, list(about.items())), encoding="utf-8")
    files[1].write_text(_markdown(content, title, about), encoding="utf-8")
    report_data.write_scores(files[2], content)
    report_data.write_aggregates(files[3], content)
    files[4].write_text(report_data.as_json(content, {**about, "software": software()}), encoding="utf-8")
    return files + pictures.draw_all(out, content)


def _about(options: ReportConfig, found: Survey, command: str) -> dict[str, str]:
    """Where the report comes from."""
    about = {
        "command": command,
        "date": now(),
        "machine": options.machine or machine_line(),
        "agents": ", ".join(found.agents),
        "budget": f"{found.env_steps:,} env_steps",
    }
    return {**about, "note": options.note} if options.note else about


def _markdown(content: Content, title: str, about: dict[str, Any]) -> str:
    from benchmarks.report_data import aggregate_rows, count, markdown, published_rows, score_rows
    from benchmarks.statistics import HOW_SCORES_ARE_READ

    parts = [f"# {title}\n", "".join(f"- {name}: {value}\n" for name, value in about.items())]
    notes = [*content.found.notes, *content.notes]
    if notes:
        parts.append("".join(f"> {text}\n>\n" for text in notes))
    parts.append(f"Mean over seeds [95 % interval] (seeds). {HOW_SCORES_ARE_READ}\n")
    for budget in content.budgets:
        parts += [f"## Scores at {count(budget)} env_steps\n", markdown(score_rows(content, budget))]
        known = list(published_rows(content, budget))
        if known:
            parts.append(markdown(known))
    for one in content.aggregates:
        left_out = "".join(f"> Not in these aggregates: {text}.\n>\n" for text in one.block.left_out)
        parts += [f"## Aggregates at {count(one.block.env_steps)} env_steps\n", left_out, markdown(aggregate_rows(one))]
    return "\n".join(part for part in parts if part)


def main(args: Sequence[str] | None = None) -> int:
    """0, or 1 after an error."""
    args = sys.argv[1:] if args is None else args
    options = tyro.cli(ReportConfig, args=args, prog="python -m benchmarks.report")
    try:
        written = report(options, command_line("benchmarks.report", args))
    except (ReportError, SurveyError, PlotError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(str(path) for path in written))
    return 0


if __name__ == "__main__":
    sys.exit(main())
