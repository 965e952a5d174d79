"""The contract as JSON Schema, for services in any language: `python -m comfyui_temporal.contracts.schemas [--check]`.

Without an option it writes `docs/schemas/`. With `--check` it writes nothing, and the exit code is 1 if a file there
differs from the models, is missing, or has no model any more.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from pydantic import TypeAdapter

from comfyui_temporal.contracts import comfyui, credits, errors, stack, start_answer, task_events, tasks

FOLDER: Final = Path("docs/schemas")
DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"


class WireSchema(NamedTuple):
    """One thing that crosses a wire. `mode`: `validation` for what is read, `serialization` for what we write."""

    name: str
    what: str
    type: Any
    mode: Literal["validation", "serialization"] = "validation"


SCHEMAS: Final[tuple[WireSchema, ...]] = (
    WireSchema("image-task", "input of `ImageGenerationWorkflow`", tasks.ImageTask),
    WireSchema(
        "image-result",
        "its result, and a failure's details (none where the input could not be read)",
        tasks.ImageResult,
        "serialization",
    ),
    WireSchema("training-task", "input of `TrainingWorkflow`", tasks.TrainingTask),
    WireSchema(
        "training-result",
        "its result, and a failure's details (none where the input could not be read)",
        tasks.TrainingResult,
        "serialization",
    ),
    WireSchema("job-callback", "signal `comfyui_callback` of an image task; ComfyUI's callback", comfyui.JobCallback),
    WireSchema(
        "training-callback", "signal `comfyui_callback` of a training; ComfyUI's callback", comfyui.TrainingCallback
    ),
    WireSchema("image-progress", "answer to `progress`, image", tasks.ImageProgress, "serialization"),
    WireSchema("training-progress", "answer to `progress`, training", tasks.TrainingProgress, "serialization"),
    WireSchema("credits-summary", "answer to the query `credits`", tasks.CreditsSummary, "serialization"),
    WireSchema("cancel-task", "argument of the update and the signal `cancel_task`", tasks.CancelTask),
    WireSchema("cancel-task-outcome", "answer to `cancel_task`", tasks.CancelTaskOutcome, "serialization"),
    WireSchema("wait-until-held", "argument of the update `wait_until_held`", start_answer.WaitUntilHeld),
    WireSchema("start-answer", "answer to `wait_until_held`", start_answer.StartAnswer, "serialization"),
    WireSchema("confirm-price", "argument of the update and the signal `confirm_price`", tasks.ConfirmPrice),
    WireSchema("confirm-price-outcome", "answer to `confirm_price`", tasks.ConfirmPriceOutcome, "serialization"),
    WireSchema("task-event", "one event of a task", task_events.TaskEvent, "serialization"),
    WireSchema("heartbeat", "the event `system.heartbeat` of a stream", task_events.Heartbeat, "serialization"),
    WireSchema("job-request", "`POST /comfyui/v1/jobs`", comfyui.JobRequest, "serialization"),
    WireSchema("job-accepted", "its answer", comfyui.JobAccepted),
    WireSchema("job-state", "`GET /comfyui/v1/jobs/{job_id}`, and `POST …/cancel`", comfyui.JobState),
    WireSchema("training-request", "`POST /comfyui/v1/training`", comfyui.TrainingRequest, "serialization"),
    WireSchema("training-accepted", "its answer", comfyui.TrainingAccepted),
    WireSchema(
        "training-state", "`GET /comfyui/v1/training/{id}`, `POST …/start`, `POST …/cancel`", comfyui.TrainingState
    ),
    WireSchema("gpu-list", "`GET /comfyui/v1/gpus`", list[comfyui.GpuPool]),
    WireSchema("estimate-request", "`POST /api/v1/credits/estimate`", credits.EstimateRequest, "serialization"),
    WireSchema("estimate", "its answer", credits.Estimate),
    WireSchema("pre-deduct-request", "`POST /api/v1/credits/pre-deduct`", credits.PreDeductRequest, "serialization"),
    WireSchema("hold-reply", "its answer, and that of commit", credits.HoldReply),
    WireSchema("commit-request", "`POST /api/v1/credits/commit`", credits.CommitRequest, "serialization"),
    WireSchema("cancel-hold-request", "`POST /api/v1/credits/cancel`", credits.CancelHoldRequest, "serialization"),
    WireSchema("cancel-hold-reply", "its answer", credits.CancelHoldReply),
    WireSchema("charge-request", "`POST /api/v1/credits/charge`", credits.ChargeRequest, "serialization"),
    WireSchema("charge-reply", "its answer", credits.ChargeReply),
    WireSchema("balance", "`GET /api/v1/credits/balance`", credits.Balance),
    WireSchema("ledger", "`GET /api/v1/credits/ledger`", credits.Ledger),
    WireSchema("error-body", "every error of ComfyUI and the credits service", errors.WireErrorBody),
    WireSchema("stack-description", "`.run/stack.json` of a local stack", stack.StackDescription, "serialization"),
)


def rendered() -> dict[str, str]:
    """File name → text, for every schema and their index. The same models always give the same bytes."""
    files = {f"{schema.name}.json": _as_json(schema) for schema in SCHEMAS}
    rows = "".join(f"| [{schema.name}]({schema.name}.json) | {schema.what} |\n" for schema in SCHEMAS)
    files["README.md"] = (
        "# JSON Schemas\n\nMade from the models by `python -m comfyui_temporal.contracts.schemas`; do not edit. "
        "Example payloads are in [../examples](../examples/README.md).\n\n"
        f"| schema | what it describes |\n| --- | --- |\n{rows}"
    )
    return files


def _as_json(schema: WireSchema) -> str:
    document = TypeAdapter(schema.type).json_schema(mode=schema.mode)
    return json.dumps({"$schema": DIALECT, **document}, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def drifted(folder: Path) -> list[str]:
    """The files of `folder` that do not match the models: changed, missing, or left over."""
    wanted = rendered()
    stale = [name for name, text in wanted.items() if _text_of(folder / name) != text]
    left_over = [path.name for path in folder.glob("*.json") if path.name not in wanted]
    return sorted(stale + left_over)


def _text_of(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def write(folder: Path) -> None:
    """Make `folder` match the models."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = rendered()
    for path in folder.glob("*.json"):
        if path.name not in wanted:
            path.unlink()
    for name, text in wanted.items():
        (folder / name).write_text(text, encoding="utf-8")


def main(arguments: Sequence[str]) -> int:
    """The command; its exit code."""
    if arguments not in ([], ["--check"]):
        sys.stderr.write("usage: python -m comfyui_temporal.contracts.schemas [--check]\n")
        return 2
    if not arguments:
        write(FOLDER)
        return 0
    differing = drifted(FOLDER)
    for name in differing:
        sys.stderr.write(
            f"{FOLDER / name} differs from the models: run python -m comfyui_temporal.contracts.schemas, commit it.\n"
        )
    return 1 if differing else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
