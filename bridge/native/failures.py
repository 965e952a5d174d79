"""ComfyUI's errors → the error codes of contract §1, with the node and a message."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from bridge.graph_check import MODEL_INPUTS
from comfyui_temporal.contracts.errors import ErrorDetails, FailureCode
from comfyui_temporal.contracts.fields import repaired, shortened

MAX_PROBLEMS: Final = 8
OUT_OF_MEMORY: Final = ("out of memory", "outofmemory")
BROKEN_GPU: Final = (
    *("cuda error", "hip error", "acceleratorerror", "cublas_status_", "cudnn_status_internal_error"),
    *("cudnn_status_execution_failed", "cudnn_status_not_initialized", "cufft_internal_error"),
    *("cuda driver", "no cuda gpus are available", "device-side assert", "illegal memory access"),
    *("unspecified launch failure", "uncorrectable ecc"),
)
"""What PyTorch says, in lower case, when the process can compute nothing any more until it is restarted."""


def refusal_details(body: Any) -> ErrorDetails:
    """From the body of a 400 to `/prompt`, or of a 200 with `node_errors`."""
    fields = body if isinstance(body, Mapping) else {}
    error = fields.get("error")
    node_errors = fields.get("node_errors")
    sentences: list[str] = []
    first_node: str | None = None
    missing_model = False
    for node_id, found in node_errors.items() if isinstance(node_errors, Mapping) else ():
        first_node = first_node or str(node_id)
        class_type = _text(found, "class_type")
        for problem in _list(found, "errors"):
            name = _text(problem.get("extra_info"), "input_name") if isinstance(problem, Mapping) else ""
            is_choice = _text(problem, "type") == "value_not_in_list"
            missing_model = missing_model or (is_choice and name in MODEL_INPUTS)
            text = _text(problem, "details") or _text(problem, "message")
            if is_choice:
                # The list that follows has the files of everybody who uses the server.
                text = text.partition(" not in ")[0]
            sentences.append(f"node {node_id} ({class_type}): {_text(problem, 'message')}: {text}")
    if not sentences:
        sentences = [_text(error, "message") or (error if isinstance(error, str) else "the graph was refused")]
    code = FailureCode.MODEL_MISSING if missing_model else FailureCode.WORKFLOW_INVALID
    message = "ComfyUI refused the graph: " + "; ".join(sentences[:MAX_PROBLEMS])
    return ErrorDetails(code=code.value, message=shortened(repaired(message)), retryable=False, node=first_node)


def execution_details(messages: Any) -> ErrorDetails:
    """How a run failed, from `status.messages` of its history entry: (name, data) pairs."""
    for name, data in _pairs(messages):
        if name == "execution_error":
            return _error_details(data)
        if name == "execution_interrupted":
            node = _text(data, "node_id") or None
            return ErrorDetails(
                code=FailureCode.CANCELLED.value,
                message="The run was interrupted on its ComfyUI server, not by a cancel of this job.",
                retryable=False,
                node=node,
            )
    return ErrorDetails(
        code=FailureCode.INTERNAL.value,
        message="ComfyUI reports that the run failed, without a reason.",
        retryable=True,
    )


def is_servers_fault(messages: Any) -> bool:
    """Whether a run failed because its GPU is broken, which fails every run after it too."""
    for name, data in _pairs(messages):
        if name == "execution_error":
            lowered = f"{_text(data, 'exception_type')} {_text(data, 'exception_message')}".lower()
            is_full = any(sign in lowered for sign in OUT_OF_MEMORY)
            return not is_full and any(sign in lowered for sign in BROKEN_GPU)
    return False


def is_interrupted(messages: Any) -> bool:
    """Whether someone stopped the run."""
    return any(name == "execution_interrupted" for name, _ in _pairs(messages))


def _error_details(data: Any) -> ErrorDetails:
    node, kind = _text(data, "node_id"), _text(data, "node_type")
    exception, text = _text(data, "exception_type"), _text(data, "exception_message").strip()
    code = FailureCode.NODE_ERROR
    lowered = f"{exception} {text}".lower()
    if "outofmemory" in lowered.replace(" ", "").replace("_", "") or "out of memory" in lowered:
        code = FailureCode.GPU_OUT_OF_MEMORY
    elif exception.endswith("FileNotFoundError") and "model" in lowered:
        code = FailureCode.MODEL_MISSING
    message = f"Node {node} ({kind}) failed: {exception.rpartition('.')[2]}: {text}"
    return ErrorDetails(code=code.value, message=shortened(repaired(message)), retryable=False, node=node or None)


def _pairs(messages: Any) -> list[tuple[str, Any]]:
    pairs = []
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, list) and len(message) == 2 and isinstance(message[0], str):
            pairs.append((message[0], message[1]))
    return pairs


def _text(holder: Any, name: str) -> str:
    value = holder.get(name) if isinstance(holder, Mapping) else None
    return value if isinstance(value, str) else "" if value is None else str(value)


def _list(holder: Any, name: str) -> list[Any]:
    value = holder.get(name) if isinstance(holder, Mapping) else None
    return value if isinstance(value, list) else []
