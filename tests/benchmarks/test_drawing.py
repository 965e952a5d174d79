"""The drawing of a run's figures is a readable SVG that names each contestant and figure."""

from __future__ import annotations

from xml.etree import ElementTree

from proof.benchmarks.drawing import drawing
from proof.benchmarks.results import Results
from proof.benchmarks.throughput import Comparison, Rate


def rate(name: str, milliseconds: float, callbacks: int = 5) -> Rate:
    spent = {"worker": milliseconds / 1000}
    return Rate(name=name, tasks=1, tasks_per_second=1.0, callbacks=callbacks, processor_seconds=spent)


def test_each_figure_is_a_bar_as_long_as_it_is_large() -> None:
    results = Results.begun(quick=True)
    results.comparison = Comparison(rounds=[rate("ours", 100), rate("bare Temporal", 200)], to_bare=2, to_dbos=2)
    results.by_callbacks = [rate("ours", 110, 50), rate("bare Temporal", 440, 50)]

    tree = ElementTree.fromstring(drawing(results))
    texts = [each.text for each in tree.iter("{http://www.w3.org/2000/svg}text")]
    widths = [int(each.get("width", "0")) for each in tree.iter("{http://www.w3.org/2000/svg}rect")]
    assert {"100", "200", "110", "440", "ours 50 callbacks", "bare Temporal 50 callbacks"} <= set(texts)
    assert abs(widths[1] - 2 * widths[0]) <= 2 and abs(widths[3] - 4 * widths[2]) <= 4
