"""Alert rules and dashboard: every metric that they name is exported, every runbook exists, the rules' tests pass."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from prometheus_client import Metric

import worker
from activities import metrics
from bridge import pool_gauges, server_gauges
from comfyui_temporal.contracts.errors import ExceptionCode, FailureCode
from gateway.metrics import Metrics

DEPLOY = Path(__file__).parents[2] / "deploy"
OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"
RULES, RULE_TESTS = DEPLOY / "prometheus" / "rules.yaml", DEPLOY / "prometheus" / "tests.yaml"
DASHBOARD = DEPLOY / "grafana" / "dashboard.json"
TEMPORALS: Final = {
    *("temporal_num_pollers", "temporal_worker_task_slots_available", "temporal_sticky_cache_size"),
    "temporal_workflow_task_execution_failed_total",
    "temporal_workflow_task_schedule_to_start_latency_seconds_bucket",
    "temporal_activity_execution_failed_total",
    "temporal_sticky_cache_total_forced_eviction_total",
}
"""Of the SDK (https://docs.temporal.io/references/sdk-metrics), by their names on our pages."""
PROMETHEUS_OWN: Final = {"up", "ALERTS"}
WORDS: Final = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
NO_METRICS: Final = {
    *("sum", "max", "min", "rate", "increase", "histogram_quantile", "time", "scalar", "vector"),
    *("max_over_time", "min_over_time", "timestamp", "clamp_max"),
    *("by", "on", "offset", "or", "and", "unless"),
}


def exported() -> set[str]:
    """The names of every sample on any page of ours."""
    counted = {f"{name}_total" for name in metrics.COUNTERS}
    buckets = {f"{name}_{part}" for name in metrics.BUCKETS_SECONDS for part in ("bucket", "sum", "count")}
    gauges = {*metrics.GAUGES, *pool_gauges.GAUGES, *server_gauges.GAUGES, worker.RECONCILE_EVERY}
    return {*counted, *buckets, *gauges, *(name for metric in gateways() for name in samples_of(metric))}


def gateways() -> Iterator[Metric]:
    yield from Metrics().registry.collect()


def samples_of(metric: Metric) -> list[str]:
    parts = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
    return [metric.name + part for part in parts.get(metric.type, [""])]


def named_in(expression: str) -> set[str]:
    """The metrics that a PromQL expression names."""
    bare = re.sub(r"\{[^}]*\}", "", expression)
    bare = re.sub(r"\b(by|on|group_left|ignoring) ?\([^)]*\)", "", bare)
    bare = re.sub(r"\[[^\]]*\]", "", bare)
    bare = re.sub(r"\boffset \w+", "", bare)
    return {word for word in WORDS.findall(bare) if word not in NO_METRICS}


@cache
def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def dashboard_expressions() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def test_every_metric_that_is_named_is_exported() -> None:
    known = exported() | TEMPORALS | PROMETHEUS_OWN
    for expression in [*(rule["expr"] for rule in rules()), *dashboard_expressions()]:
        found = named_in(expression)
        assert found, expression
        assert found <= known, f"{found - known} in {expression}"


def test_every_metric_of_the_tasks_is_on_the_dashboard() -> None:
    shown = set().union(*map(named_in, dashboard_expressions()))
    ours = {name for name in exported() if not name.startswith("gateway_") and not name.endswith(("_sum", "_count"))}
    assert ours - shown == {"tasks_queued", "tasks_queue_sla_missed"}


def test_labels_that_a_rule_asks_for_have_values_that_exist() -> None:
    values = {
        "code": {*ExceptionCode, *FailureCode},
        "read": {"hourly", "by_hand"},
        "priority": {"accelerated", "standard"},
    }
    for rule in rules():
        for label, value in re.findall(r"(\w+)=\"([^\"]+)\"", rule["expr"]):
            assert value in values.get(label, {value}), f"{label}={value} in {rule['alert']}"


def headings() -> dict[str, str]:
    """Each heading of the operators' page, as its address, and the text below it."""
    parts = re.split(r"^#+ (.+)$", OPERATIONS.read_text(), flags=re.MULTILINE)
    return {
        re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-"): text.strip()
        for title, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def test_every_alert_has_a_runbook_of_its_own_that_says_what_to_do() -> None:
    for rule in rules():
        page, _, heading = rule["annotations"]["runbook"].partition("#")
        assert page == "docs/operations.md"
        assert heading == rule["alert"].lower()
        assert len(headings().get(heading, "")) > 100, f"{rule['alert']} has no runbook"
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["summary"].endswith(".")


def test_each_alert_is_once_silent_and_once_fires_in_the_rules_own_tests() -> None:
    seen: dict[str, set[bool]] = {}
    for test in yaml.safe_load(RULE_TESTS.read_text())["tests"]:
        for case in test["alert_rule_test"]:
            seen.setdefault(case["alertname"], set()).add(bool(case["exp_alerts"]))
    assert seen == {rule["alert"]: {True, False} for rule in rules()}


PROMTOOL = shutil.which("promtool")


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian's package prometheus): rules untested")
def test_the_rules_own_tests_pass(tmp_path: Path) -> None:
    assert PROMTOOL is not None
    for command in (["check", "rules", str(RULES)], ["test", "rules", str(RULE_TESTS)]):
        done = subprocess.run([PROMTOOL, *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    # A rule that never fires is found.
    (tmp_path / "rules.yaml").write_text(RULES.read_text().replace('"undo_unfinished"', '"undo_finished"'))
    (tmp_path / "tests.yaml").write_text(RULE_TESTS.read_text())
    broken = subprocess.run([PROMTOOL, "test", "rules", str(tmp_path / "tests.yaml")], capture_output=True, check=False)
    assert broken.returncode != 0


def test_the_dashboard_is_one_that_grafana_can_load() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert [variable["name"] for variable in dashboard["templating"]["list"]] == ["datasource"]
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, f"{panel['title']} lies over another panel"
        assert place["x"] + place["w"] <= 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert panel["targets"]
