"""Progress never falls, and ComfyUI's errors become error codes of the contract."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bridge.native.events import MessageReader
from bridge.native.failures import execution_details, refusal_details
from bridge.progress import RunProgress
from comfyui_temporal.contracts.errors import JOB_CODES

GRAPH: dict[str, Any] = {
    "load": {"class_type": "Loader", "inputs": {}},
    "sample": {"class_type": "KSampler", "inputs": {"steps": 18, "model": ["load", 0]}},
    "save": {"class_type": "SaveImage", "inputs": {"images": ["sample", 0]}},
    "aside": {"class_type": "KSampler", "inputs": {"steps": 1_000, "model": ["load", 0]}},
}


def test_nodes_count_by_their_steps_and_only_if_a_result_needs_them() -> None:
    progress, reader = RunProgress(GRAPH, ["save"]), MessageReader()
    progress.add(reader.read("executing", {"node": "load"}))
    progress.add(reader.read("executing", {"node": "sample"}))
    assert progress.percent == 5
    progress.add(reader.read("progress", {"node": "sample", "value": 9, "max": 18}))
    assert progress.percent == 50
    progress.add(reader.read("progress_state", {"nodes": {"sample": {"state": "finished", "value": 18, "max": 18}}}))
    assert progress.percent == 95
    progress.add(reader.read("executed", {"node": "save"}))
    assert progress.percent == 99, "100 is published with the result"


def test_cached_nodes_and_what_only_they_need_do_not_count() -> None:
    progress, reader = RunProgress(GRAPH, ["save"]), MessageReader()
    progress.add(reader.read("execution_cached", {"nodes": ["sample"]}))
    assert progress.percent == 0
    progress.add(reader.read("progress", {"node": "save", "value": 1, "max": 2}))
    assert progress.percent == 50


@pytest.mark.parametrize(
    ("kind", "data", "is_end"),
    [
        ("execution_success", {}, True),
        ("execution_error", {}, True),
        ("execution_interrupted", {}, True),
        ("executing", {"node": None}, True),
        ("executing", {"node": "load"}, False),
        ("executed", {"node": "save"}, False),
    ],
)
def test_a_message_about_the_end_is_recognised(kind: str, data: dict[str, Any], is_end: bool) -> None:
    assert MessageReader().read(kind, data).is_end is is_end


KINDS = st.sampled_from(["execution_cached", "executing", "progress", "progress_state", "executed", "other"])
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([*GRAPH]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["node", "nodes", "value", "max", "state", "errors", "error", "node_errors", *GRAPH]), inner
        )
    ),
    max_leaves=6,
)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=30)
@given(
    st.lists(
        st.tuples(KINDS, st.dictionaries(st.sampled_from(["node", "nodes", "value", "max"]), ANYTHING, max_size=3)),
        max_size=6,
    )
)
def test_after_any_messages_the_percent_is_whole_and_never_falls(messages: list[tuple[str, Any]]) -> None:
    progress, reader = RunProgress(GRAPH, ["save"], first_percent=3), MessageReader()
    seen = [progress.percent]
    for kind, data in messages:
        progress.add(reader.read(kind, data))
        seen.append(progress.percent)
    assert seen == sorted(seen)
    assert all(3 <= percent <= 99 for percent in seen)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=60)
@given(ANYTHING)
def test_any_refusal_becomes_an_error_code_of_the_contract(body: Any) -> None:
    assert refusal_details(body).code in JOB_CODES
    assert execution_details(body).code in JOB_CODES


@pytest.mark.parametrize(
    ("exception", "message", "code"),
    [
        ("torch.OutOfMemoryError", "Allocation on device 0 would exceed allowed memory.", "gpu_out_of_memory"),
        ("RuntimeError", "CUDA out of memory. Tried to allocate 2 GiB", "gpu_out_of_memory"),
        ("builtins.FileNotFoundError", "Model in folder 'loras' with filename 'x' not found.", "model_missing"),
        ("builtins.ValueError", "bad latent", "node_error"),
    ],
)
def test_an_exception_on_the_server_becomes_a_code_with_its_node(exception: str, message: str, code: str) -> None:
    data = {"node_id": "3", "node_type": "KSampler", "exception_type": exception, "exception_message": message}
    details = execution_details([["execution_start", {}], ["execution_error", data]])
    assert (details.code, details.node, details.may_be_retried()) == (code, "3", False)
    assert message in details.message
