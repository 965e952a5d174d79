"""Draws the figures of a run: `python -m proof.benchmarks.drawing .run/bench.json docs/images/performance.svg`."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from xml.sax.saxutils import escape

from proof.benchmarks.results import Results
from proof.benchmarks.throughput import Rate

WIDTH, TITLE, PLOT, LEFT, RIGHT, FOOT = 720, 34, 170, 60, 130, 46
COLOURS: Final = {"ours": "#2563eb", "bare Temporal": "#64748b", "DBOS": "#d97706"}
STYLE: Final = (
    "text{font:13px system-ui,sans-serif;fill:#475569}.title{font-weight:600}"
    "line{stroke:#cbd5e1}polyline{fill:none;stroke-width:2}"
)
MARKS: Final = 4
"""Horizontal lines of a chart above its zero."""


@dataclass(frozen=True)
class Chart:
    """Lines of all contestants: `value` of each rate over its `at`, both from zero on."""

    title: str
    foot: str
    rates: Sequence[Rate]
    at: Callable[[Rate], int]
    value: Callable[[Rate], float]

    def lines(self) -> dict[str, dict[int, float]]:
        """Contestant → where → the median of its rounds there."""
        found: dict[str, dict[int, list[float]]] = {}
        for rate in self.rates:
            found.setdefault(rate.name, {}).setdefault(self.at(rate), []).append(self.value(rate))
        return {name: {x: statistics.median(each) for x, each in sorted(at.items())} for name, at in found.items()}

    def drawn(self, top: int) -> str:
        lines = self.lines()
        widest = max(x for points in lines.values() for x in points)
        step = _round_step(max(y for points in lines.values() for y in points.values()) / MARKS)
        parts = [_text(10, top + 14, self.title, "title")]
        floor = top + TITLE + PLOT

        def across(x: float) -> float:
            return round(LEFT + (WIDTH - LEFT - RIGHT) * x / widest, 1)

        def up(y: float) -> float:
            return round(floor - PLOT * y / (step * MARKS), 1)

        for mark in range(MARKS + 1):
            y = up(step * mark)
            parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
            parts.append(_text(LEFT - 8, y + 4, f"{step * mark:g}", anchor="end"))
        for x in sorted({x for points in lines.values() for x in points}):
            parts.append(_text(across(x), floor + 18, str(x), anchor="middle"))
        parts.append(_text(LEFT, floor + 36, self.foot))
        for name, points in lines.items():
            colour = COLOURS.get(name, "#000")
            shown = " ".join(f"{across(x)},{up(y)}" for x, y in points.items())
            parts.append(f'<polyline points="{shown}" stroke="{colour}"/>')
            for x, y in points.items():
                label = f"<title>{escape(name)}: {y:.4g} at {x}</title>"
                parts.append(f'<circle cx="{across(x)}" cy="{up(y)}" r="3" fill="{colour}">{label}</circle>')
        lasts = sorted(((up(list(points.values())[-1]), name) for name, points in lines.items()), reverse=True)
        below = float("inf")
        for y, name in lasts:  # names of lines that end close together are not on top of each other
            below = min(y + 4, below - 16)
            parts.append(_text(WIDTH - RIGHT + 10, below, name, fill=COLOURS.get(name, "#000")))
        return "".join(parts)


def drawing(results: Results) -> str:
    """The SVG document: throughput, latency and processor time by load and by ticks of a task."""
    by_load, by_callbacks = results.by_load or [], results.by_callbacks or []
    load, ticks = "tasks under way", "callbacks of a task's job"
    charts = [
        Chart("Tasks a second", load, by_load, _under_way, lambda rate: rate.tasks_per_second),
        Chart("Seconds of a task beyond those of its job, p50", load, by_load, _under_way, _beyond_job),
        Chart("Processor time of a task, in ms", load, by_load, _under_way, _processor_ms),
        Chart("Processor time of a task, in ms", ticks, by_callbacks, _callbacks, _processor_ms),
        Chart(
            "Tasks a second that two processors carry, by that processor time",
            ticks,
            by_callbacks,
            _callbacks,
            lambda rate: 2_000 / _processor_ms(rate),
        ),
        Chart("Seconds of a task beyond those of its job, p50", ticks, by_callbacks, _callbacks, _beyond_job),
    ]
    charts = [chart for chart in charts if chart.rates]
    height = TITLE + PLOT + FOOT
    drawn = "".join(chart.drawn(10 + n * height) for n, chart in enumerate(charts))
    size = f'width="{WIDTH}" height="{10 + len(charts) * height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img"><style>{STYLE}</style>{drawn}</svg>\n'


def _under_way(rate: Rate) -> int:
    return rate.under_way


def _callbacks(rate: Rate) -> int:
    return rate.callbacks


def _processor_ms(rate: Rate) -> float:
    return 1000 * sum(rate.processor_seconds.values())


def _beyond_job(rate: Rate) -> float:
    return rate.beyond_job.p50 if rate.beyond_job else 0.0


def _round_step(least: float) -> float:
    """The next 1, 2 or 5 times a power of ten; 1 for a chart of zeros."""
    if least <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return next(each * power for each in (1, 2, 5, 10) if each * power >= least)


def _text(x: float, y: float, text: str, kind: str = "", *, anchor: str = "start", fill: str = "") -> str:
    given = {"class": kind, "text-anchor": "" if anchor == "start" else anchor, "style": f"fill:{fill}" if fill else ""}
    attributes = "".join(f' {name}="{value}"' for name, value in given.items() if value)
    return f'<text x="{x}" y="{y}"{attributes}>{escape(text)}</text>'


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_text(drawing(Results.model_validate_json(source.read_text())))
