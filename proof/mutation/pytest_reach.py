"""pytest plugin: which test reaches which blocks. `python -m pytest -p mutation.pytest_reach --reach FILE …`

A test reaches the blocks that run between its own beginning and the next test's, so its fixtures count too. What a
server or worker of a whole module does counts for the test during which it happens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from proof.mutation.reach import Block, note_into

_reached = set[Block]()
_found: dict[str, list[Block]] = {}
_seconds: dict[str, float] = {}
_failed = set[str]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reach", required=True, help="where to write what each test reaches, as JSON")


def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    note_into(_reached)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    _reached.clear()
    yield
    _found[item.nodeid] = sorted(_reached)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _seconds[report.nodeid] = _seconds.get(report.nodeid, 0.0) + report.duration * (report.when == "call")
    if report.failed:
        _failed.add(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    passed = {test: blocks for test, blocks in _found.items() if test not in _failed}
    seconds = {test: round(_seconds[test], 2) for test in passed}
    worker = getattr(session.config, "workerinput", {}).get("workerid", "")
    file = Path(session.config.getoption("--reach"))
    file.with_stem(file.stem + worker).write_text(
        json.dumps({"tests": passed, "seconds": seconds, "failed": sorted(_failed)})
    )
