"""`/api/jobs`, made from queue and history as in `comfy_execution/jobs.py` of 0.8.0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from fastapi.responses import JSONResponse

from tests.bridge.native.prompt_queue import Item, Json, PromptQueue

STATUSES: Final = ("pending", "in_progress", "completed", "failed")
_ENDS: Final = ("execution_success", "execution_error", "execution_interrupted")


def find(queue: PromptQueue, prompt_id: str) -> Json | None:
    """One job with all its fields, or None. Looks in the history first, as ComfyUI does."""
    if prompt_id in queue.history:
        return _ended(prompt_id, queue.history[prompt_id], with_outputs=True)
    for item in queue.running.values():
        if item[1] == prompt_id:
            return _queued(item, "in_progress")
    for item in queue.pending:
        if item[1] == prompt_id:
            return _queued(item, "pending")
    return None


def listed(queue: PromptQueue, query: Mapping[str, str]) -> JSONResponse:
    """`GET /api/jobs` with status, sort_order, limit and offset."""
    wanted = [part.strip().lower() for part in query.get("status", "").split(",") if part.strip()] or list(STATUSES)
    if wrong := [status for status in wanted if status not in STATUSES]:
        problem = f"Invalid status value(s): {', '.join(wrong)}. Valid values: {', '.join(STATUSES)}"
        return JSONResponse({"error": problem}, status_code=400)
    limit = int(query["limit"]) if "limit" in query else None
    offset = max(0, int(query.get("offset", 0)))
    found = [_queued(item, "in_progress") for item in queue.running.values()]
    found += [_queued(item, "pending") for item in queue.pending]
    found += [_ended(prompt_id, entry) for prompt_id, entry in queue.history.items()]
    found = [job for job in found if job["status"] in wanted]
    found.sort(key=lambda job: job.get("create_time", 0), reverse=query.get("sort_order", "desc") == "desc")
    page = found[offset:][:limit]
    pagination = {
        "offset": offset,
        "limit": limit,
        "total": len(found),
        "has_more": offset + len(page) < len(found),
    }
    return JSONResponse({"jobs": page, "pagination": pagination})


def _pruned(job: Json) -> Json:
    return {name: given for name, given in job.items() if given is not None}


def _queued(item: Item, status: str) -> Json:
    return _pruned(
        {
            "id": item[1],
            "status": status,
            "priority": item[0],
            "create_time": item[3].get("create_time"),
            "outputs_count": 0,
        }
    )


def _ended(prompt_id: str, entry: Json, *, with_outputs: bool = False) -> Json:
    number, _, graph, extra, _ = entry["prompt"]
    status = entry["status"]
    messages: dict[str, Any] = dict(status["messages"])
    end: Json = next((messages[name] for name in _ENDS if name in messages), {})
    count, preview = _summary(entry["outputs"])
    job = _pruned(
        {
            "id": prompt_id,
            "status": "completed" if status["status_str"] == "success" else "failed",
            "priority": number,
            "create_time": extra.get("create_time"),
            "execution_start_time": messages.get("execution_start", {}).get("timestamp"),
            "execution_end_time": end.get("timestamp"),
            "execution_error": messages.get("execution_error"),
            "outputs_count": count,
            "preview_output": preview,
        }
    )
    if with_outputs:
        workflow = {"prompt": graph, "extra_data": extra}
        job |= {"outputs": entry["outputs"], "execution_status": status, "workflow": workflow}
    return job


def _summary(outputs: Json) -> tuple[int, Json | None]:
    """The number of files, and one to show: an output rather than a temp file."""
    files = [
        item | {"nodeId": node, "mediaType": kind}
        for node, shown in outputs.items()
        for kind, items in shown.items()
        if kind != "animated" and isinstance(items, list)
        for item in items
        if isinstance(item, dict)
    ]
    seen = [file for file in files if file["mediaType"] in {"images", "video", "audio"} or file.get("format")]
    best = next((file for file in seen if file["type"] == "output"), seen[0] if seen else None)
    return len(files), best
