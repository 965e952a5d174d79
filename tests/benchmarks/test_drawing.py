"""The drawing of a run's figures is a readable SVG: a line for each contestant, through each of its figures."""

from __future__ import annotations

from xml.etree import ElementTree

from proof.benchmarks.drawing import drawing
from proof.benchmarks.results import Results
from proof.benchmarks.spread import Spread
from proof.benchmarks.throughput import Rate

SVG = "{http://www.w3.org/2000/svg}"


def rate(name: str, milliseconds: float, *, callbacks: int = 5, under_way: int = 120) -> Rate:
    return Rate(
        name=name,
        tasks=1,
        tasks_per_second=1000 / milliseconds,
        callbacks=callbacks,
        under_way=under_way,
        processor_seconds={"worker": milliseconds / 1000},
        beyond_job=Spread.of([0.5]),
    )


def drawn(results: Results) -> ElementTree.Element:
    return ElementTree.fromstring(drawing(results))


def heights(tree: ElementTree.Element, title: str) -> dict[str, float]:
    """Hover text of each point of the chart with that title → its distance from the chart's zero."""
    parts = list(tree)
    begin = next(n for n, part in enumerate(parts) if part.text == title)
    later = (n for n, part in enumerate(parts) if n > begin and part.get("class") == "title")
    chart = parts[begin : next(later, len(parts))]
    zero = max(float(part.get("y1", "0")) for part in chart if part.tag == f"{SVG}line")
    points = [part for part in chart if part.tag == f"{SVG}circle"]
    return {next(iter(point)).text or "": zero - float(point.get("cy", "0")) for point in points}


def test_a_point_is_as_high_as_its_figure() -> None:
    results = Results.begun(quick=True)
    results.by_callbacks = [
        rate("ours", 100),
        rate("ours", 110, callbacks=50),
        rate("bare Temporal", 440, callbacks=50),
        rate("DBOS", 220, callbacks=50),
    ]
    shown = heights(drawn(results), "Processor time of a task, in ms")
    assert shown.keys() == {"ours: 100 at 5", "ours: 110 at 50", "bare Temporal: 440 at 50", "DBOS: 220 at 50"}
    assert abs(shown["bare Temporal: 440 at 50"] - 4 * shown["ours: 110 at 50"]) < 1
    assert abs(shown["DBOS: 220 at 50"] - 2 * shown["ours: 110 at 50"]) < 1


def test_throughput_and_latency_are_drawn_by_load_and_by_callbacks() -> None:
    results = Results.begun(quick=True)
    results.by_load = [rate("ours", 100, under_way=20), rate("DBOS", 200, under_way=120)]
    results.by_callbacks = [rate("ours", 100), rate("DBOS", 200)]
    titles = [part.text for part in drawn(results) if part.get("class") == "title"]
    assert len(titles) == 6
    assert sum("a second" in str(title) for title in titles) == 2
    assert sum("beyond those of its job" in str(title) for title in titles) == 2


def test_a_point_of_several_rounds_is_their_median() -> None:
    results = Results.begun(quick=True)
    results.by_load = [rate("ours", each) for each in (100, 110, 400)]
    assert "ours: 110 at 120" in heights(drawn(results), "Processor time of a task, in ms")


def test_names_of_lines_that_end_close_together_are_apart() -> None:
    results = Results.begun(quick=True)
    results.by_load = [rate(name, 100 + n) for n, name in enumerate(("ours", "bare Temporal", "DBOS"))]
    names = [part for part in drawn(results) if part.text in {"DBOS", "ours"}]
    assert abs(float(names[0].get("y", "0")) - float(names[1].get("y", "0"))) >= 16


def test_nothing_measured_is_an_empty_drawing() -> None:
    assert list(drawn(Results.begun(quick=True)).iter(f"{SVG}polyline")) == []
