"""One HTML page that needs nothing else: pictures inside, readable on light and on dark screens."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from runners.questions import Question

_STYLE = """
:root { color-scheme: light dark; --text: #1d232b; --soft: #5b6673; --line: #d9dee4; --back: #f6f7f9; --card: #fff;
  --accent: #0a5ea8; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e8ed; --soft: #9aa6b3; --line: #343c46; --back: #14181d;
  --card: #1c2229; --accent: #6cb4f5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1020px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 4px; }
h2 { font-size: 1.3rem; margin: 0 0 4px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 22px 24px;
  margin-top: 22px; }
p { margin: 6px 0 10px; }
nav { margin-top: 14px; }
nav a { display: inline-block; margin-right: 16px; color: var(--accent); }
.soft, figcaption, dt { color: var(--soft); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 18px; margin: 12px 0 0; font-size: .93rem; }
dd { margin: 0; overflow-wrap: anywhere; }
.reading { border-left: 3px solid var(--accent); padding: 2px 0 2px 14px; margin: 12px 0; }
.reading p { margin: 4px 0; }
.note { border-left: 3px solid #d9822b; padding: 2px 0 2px 14px; margin: 12px 0; }
figure { margin: 18px 0 4px; }
figure img { display: block; width: 100%; height: auto; background: #fff; border-radius: 8px;
  border: 1px solid var(--line); padding: 6px; }
figcaption { font-size: .9rem; margin-top: 6px; }
.scroll { overflow-x: auto; margin: 14px 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 12px 4px 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; }
th:first-child, td:first-child, .words td { text-align: left; }
.words th { text-align: left; }
.words td { white-space: normal; }
code { font: .9em ui-monospace, monospace; }
"""


class Table(NamedTuple):
    """A header and rows; numbers are rounded, None is a dash."""

    header: Sequence[str]
    rows: Sequence[Sequence[str | float | int | None]]


class Picture(NamedTuple):
    """A PNG and what it shows."""

    name: str
    """Of the file."""
    png: bytes
    caption: str


class Section(NamedTuple):
    """One question, its answer, and how to read it."""

    name: str
    """Of the anchor."""
    question: Question
    pictures: Sequence[Picture]
    tables: Sequence[Table]
    notes: Sequence[str]
    """What was left out, and why."""
    glance: Sequence[tuple[str, float | None, str]]
    """The few numbers that stand on top of the page: what, how much, and what is good."""


def page(title: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section], notes: Sequence[str]) -> str:
    """The whole page. All text is plain and is escaped here."""
    glance = [(what, value, good) for section in sections for what, value, good in section.glance]
    links = "".join(f'<a href="#{escape(one.name)}">{escape(one.question.title)}</a>' for one in sections)
    parts = [
        f"<h1>{escape(title)}</h1>",
        list_of(facts),
        *(note(text) for text in notes),
        f"<nav>{links}</nav>",
        f"<section><h2>At a glance</h2>{table(Table(('', 'value', 'good'), glance), 'words')}</section>",
        *(_section(section) for section in sections),
    ]
    return document(title, "".join(parts))


def document(title: str, body: str, head: str = "") -> str:
    """A page in this style around a body. ``body`` and ``head`` are HTML, the title is plain."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style>{head}</head>\n"
        f"<body><main>{body}</main></body></html>\n"
    )


def _section(section: Section) -> str:
    question = section.question
    pictures = "".join(
        f'<figure><img alt="{escape(one.caption)}" src="data:image/png;base64,{base64.b64encode(one.png).decode()}">'
        f"<figcaption>{escape(one.caption)}</figcaption></figure>"
        for one in section.pictures
    )
    good, bad = f"<p><b>Good:</b> {escape(question.good)}</p>", f"<p><b>Bad:</b> {escape(question.bad)}</p>"
    tables = "".join(map(table, section.tables))
    return (
        f'<section id="{escape(section.name)}"><h2>{escape(question.title)}</h2>'
        f'<p class="soft">{escape(question.asked)}</p><div class="reading">{good}{bad}</div>'
        f"{''.join(map(note, section.notes))}{pictures}{tables}</section>"
    )


def list_of(facts: Sequence[tuple[str, str]]) -> str:
    """Names and values; plain text."""
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts) + "</dl>"


def note(text: str) -> str:
    """What a reader must know; plain text."""
    return f'<div class="note"><p>{escape(text)}</p></div>'


def table(content: Table, kind: str = "") -> str:
    """A table as HTML; ``words`` as its kind breaks long cells."""
    head = "".join(f"<th>{escape(name)}</th>" for name in content.header)
    cells = ("".join(f"<td>{escape(_cell(value))}</td>" for value in row) for row in content.rows)
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    return f'<div class="scroll"><table class="{kind}"><tr>{head}</tr>{body}</table></div>'


def _cell(value: str | float | int | None) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) < 1000 else f"{value:.3g}"
    return str(value)
