"""Draws the figures of a run as SVG: `python -m proof.benchmarks.drawing .run/bench.json docs/performance.svg`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final
from xml.sax.saxutils import escape

from proof.benchmarks.results import Results
from proof.benchmarks.throughput import Rate

WIDTH, BAR, GAP, LABEL, TOP = 720, 18, 6, 230, 34
COLOURS: Final = {"ours": "#2563eb", "bare Temporal": "#64748b", "DBOS": "#d97706"}
Bar = tuple[str, str, float]
"""Contestant, label, value."""


def drawing(results: Results) -> str:
    """The SVG document: processor time of a task, by callbacks and by open tasks."""
    charts = (
        [
            ("Processor time of a task with five callbacks, in ms", _bars(results.comparison.rounds, "")),
            ("… by callbacks of its job", _bars(results.by_callbacks or [], "{rate.callbacks} callbacks")),
            ("… while other tasks are open", _bars(results.by_open_tasks or [], "{rate.open_tasks:,} open")),
        ]
        if results.comparison
        else []
    )
    parts, top = [], 10
    for title, bars in charts:
        if bars:
            drawn, height = _chart(title, bars, top)
            parts.append(drawn)
            top += height
    style = "text{font:13px system-ui,sans-serif;fill:#475569}.title{font-weight:600}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{top}" role="img">'
        f"<style>{style}</style>{''.join(parts)}</svg>\n"
    )


def _bars(rates: Iterable[Rate], label: str) -> list[Bar]:
    """The median of each contestant's rounds under one label."""
    found: dict[tuple[str, str], list[float]] = {}
    for rate in rates:
        spent = 1000 * sum(rate.processor_seconds.values())
        found.setdefault((rate.name, label.format(rate=rate)), []).append(spent)
    return [(name, shown, sorted(values)[len(values) // 2]) for (name, shown), values in found.items()]


def _chart(title: str, bars: Sequence[Bar], top: int) -> tuple[str, int]:
    longest = max(value for _, _, value in bars)
    drawn = [f'<text class="title" x="10" y="{top + 14}">{escape(title)}</text>']
    for n, (name, label, value) in enumerate(bars):
        y = top + TOP - 10 + n * (BAR + GAP)
        width = round((WIDTH - LABEL - 80) * value / longest)
        drawn.append(f'<text x="10" y="{y + 13}">{escape(f"{name} {label}".strip())}</text>')
        drawn.append(f'<rect x="{LABEL}" y="{y}" width="{width}" height="{BAR}" fill="{COLOURS.get(name, "#000")}"/>')
        drawn.append(f'<text x="{LABEL + width + 6}" y="{y + 13}">{value:.0f}</text>')
    return "".join(drawn), TOP + len(bars) * (BAR + GAP) + 16


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_text(drawing(Results.model_validate_json(source.read_text())))
