"""Progress is honest and never goes back; what ComfyUI says of a failure becomes one of the contract's codes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bridge.native_errors import execution_details, refusal_details
from bridge.progress import RunProgress
from comfyui_temporal.contracts.errors import JOB_CODES

GRAPH: dict[str, Any] = {
    "load": {"class_type": "Loader", "inputs": {}},
    "sample": {"class_type": "KSampler", "inputs": {"steps": 18, "model": ["load", 0]}},
    "save": {"class_type": "SaveImage", "inputs": {"images": ["sample", 0]}},
    "aside": {"class_type": "KSampler", "inputs": {"steps": 1_000, "model": ["load", 0]}},
}


def test_nodes_count_by_their_steps_and_only_those_that_a_result_needs() -> None:
    progress = RunProgress(GRAPH, ["save"])
    progress.heard("executing", {"node": "load"})
    progress.heard("executing", {"node": "sample"})
    assert progress.percent == 5
    progress.heard("progress", {"node": "sample", "value": 9, "max": 18})
    assert progress.percent == 50
    progress.heard("progress_state", {"nodes": {"sample": {"state": "finished", "value": 18, "max": 18}}})
    assert progress.percent == 95
    progress.heard("executed", {"node": "save"})
    assert progress.percent == 99, "100 is said when the result is there"


def test_what_was_cached_and_what_lies_behind_it_does_not_count() -> None:
    progress = RunProgress(GRAPH, ["save"])
    progress.heard("execution_cached", {"nodes": ["sample"]})
    assert progress.percent == 0
    progress.heard("progress", {"node": "save", "value": 1, "max": 2})
    assert progress.percent == 50


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
def test_whatever_a_server_says_percent_is_whole_and_never_goes_back(heard: list[tuple[str, Any]]) -> None:
    progress = RunProgress(GRAPH, ["save"], first_percent=3)
    seen = [progress.percent]
    for kind, data in heard:
        progress.heard(kind, data)
        seen.append(progress.percent)
    assert seen == sorted(seen)
    assert all(3 <= percent <= 99 for percent in seen)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=60)
@given(ANYTHING)
def test_whatever_a_server_refuses_with_the_code_is_the_contracts(said: Any) -> None:
    assert refusal_details(said).code in JOB_CODES
    assert execution_details(said).code in JOB_CODES


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
