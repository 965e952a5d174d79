"""A metrics page as Prometheus reads it."""

from __future__ import annotations

import re

import httpx
from temporalio.runtime import Runtime

from activities.metrics import BUCKETS_SECONDS
from local_stack.ports import any_free_port
from runtime.metrics_page import metrics_runtime

SAMPLE = re.compile(r"(\w+)(?:\{(.*)\})? (\S+)")


def value_in(text: str, name: str, **labels: str) -> float | None:
    """A sample's value; None where there is none."""
    for line in text.splitlines():
        found = SAMPLE.fullmatch(line)
        if found and found[1] == name and all(f'{key}="{value}"' in (found[2] or "") for key, value in labels.items()):
            return float(found[3])
    return None


def names_in(text: str) -> set[str]:
    """The names of the metrics, as their types are stated."""
    return set(re.findall(r"^# TYPE (\w+) \w+$", text, re.MULTILINE))


class MetricsPage:
    """A page of its own, of a runtime that nothing else counts in."""

    def __init__(self) -> None:
        self._port = any_free_port()
        runtime = metrics_runtime("127.0.0.1", self._port, setting="METRICS_PORT", buckets=BUCKETS_SECONDS)
        assert runtime is not None
        self.runtime: Runtime = runtime

    @property
    def text(self) -> str:
        return httpx.get(f"http://127.0.0.1:{self._port}/metrics", trust_env=False).text

    def value(self, name: str, **labels: str) -> float:
        """A sample's value; 0 where it was not counted."""
        return value_in(self.text, name, **labels) or 0.0
