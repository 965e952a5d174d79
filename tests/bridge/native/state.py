"""One stand-in server's whole state, and what `POST /prompt` does."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from pathlib import Path
from typing import Any, Final

from tests.bridge.native.definitions import Definitions
from tests.bridge.native.drawing import Saving
from tests.bridge.native.executor import Executor
from tests.bridge.native.prompt_queue import Item, Json, PromptQueue
from tests.bridge.native.sockets import Sockets
from tests.bridge.native.traps import Traps
from tests.bridge.native.validation import validate

_UUID: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_NO_PROMPT: Final = {
    "type": "no_prompt",
    "message": "No prompt provided",
    "details": "No prompt provided",
    "extra_info": {},
}
_BAD_ID: Final = {
    "type": "invalid_prompt_id",
    "message": "prompt_id must be a canonical UUID",
    "details": "",
    "extra_info": {},
}


class Native:
    """One server's whole state. Only the files in `folder` survive the process."""

    def __init__(self, folder: Path, traps: Traps) -> None:
        self.traps = traps
        self.saving = Saving(folder)
        self.definitions = Definitions(folder)
        self.sockets = Sockets(lambda: self.traps)
        self.messages: asyncio.Queue[tuple[str, Any, str | None]] = asyncio.Queue()
        self.queue = PromptQueue(lambda: self.enqueue("status", {"status": self.status()}, None))
        self.executor = Executor(
            self.queue, self.saving, self.enqueue, lambda: self.traps, is_output=self.definitions.is_output
        )
        self.submissions: list[str] = []
        """The prompt id of every `/prompt` that took effect."""
        self.sent: list[Json] = []
        """What each of them asked for, as `GraphSeen`."""
        self.requests: list[Json] = []
        self.number = 0
        self.answers = asyncio.Event()
        """Cleared while requests hang."""
        self.set(self.traps)

    def set(self, traps: Traps) -> None:
        """Replace the traps. Hanging requests continue if the new traps allow it."""
        self.traps = traps
        if traps.hang:
            self.answers.clear()
        else:
            self.answers.set()

    def forget(self) -> None:
        """Clear queue, history and cache as a restart would, while the process goes on."""
        self.queue.wipe()
        self.queue.history.clear()
        self.executor.drop()

    def enqueue(self, event: str, data: Any, client_id: str | None) -> None:
        self.messages.put_nowait((event, data, client_id))

    def status(self) -> Json:
        return {"exec_info": {"queue_remaining": self.queue.remaining}}

    async def publish(self) -> None:
        """Send published messages in order."""
        while True:
            event, data, client_id = await self.messages.get()
            if event == "preview":
                image, metadata = data
                await self.sockets.send_preview(image, metadata, client_id)
            else:
                await self.sockets.send(event, data, client_id)

    def executing(self, client_id: str) -> str | None:
        return self.executor.node if self.executor.client_id == client_id else None

    def submit(self, body: Json) -> tuple[int, Json]:
        """Handle `POST /prompt`. Returns HTTP status and body."""
        number = float(body["number"]) if "number" in body else self._next_number(front=bool(body.get("front")))
        if "prompt" not in body:
            return 400, {"error": _NO_PROMPT, "node_errors": {}}
        for node in body["prompt"].values() if isinstance(body["prompt"], dict) else ():
            kind = node.get("class_type")
            if kind in self.traps.replaced_nodes:
                node["class_type"] = self.traps.replaced_nodes[kind]
        prompt_id = str(body.get("prompt_id", uuid.uuid4()))
        if self.traps.strict_prompt_ids and not _UUID.fullmatch(prompt_id):
            return 400, {"error": _BAD_ID, "node_errors": {}}
        verdict = validate(
            body["prompt"],
            lambda kind: self.definitions.of(kind, self.traps.models) if self.definitions.known(kind) else None,
            self.saving.has_input,
            body.get("partial_execution_targets"),
        )
        if verdict.error is not None:
            return 400, {"error": verdict.error, "node_errors": verdict.node_errors}
        extra = dict(body.get("extra_data", {}))
        if "client_id" in body:
            extra["client_id"] = body["client_id"]
        extra["create_time"] = int(time.time() * 1000)
        item: Item = (number, prompt_id, body["prompt"], extra, verdict.outputs)
        self.queue.put(item)
        self.executor.log("got prompt\n")
        self.submissions.append(prompt_id)
        self.sent.append({"graph": body["prompt"], "targets": body.get("partial_execution_targets")})
        errors: Any = verdict.node_errors or ([] if self.traps.node_errors_as_list else {})
        if self.traps.node_errors_on_200:
            errors = _another_output(verdict.outputs)
        return 200, {"prompt_id": prompt_id, "number": number, "node_errors": errors}

    def _next_number(self, *, front: bool) -> float:
        number = -self.number if front else self.number
        self.number += 1
        return number


def _another_output(outputs: list[str]) -> Json:
    wrong = {
        "type": "required_input_missing",
        "message": "Required input is missing",
        "details": "images",
        "extra_info": {"input_name": "images"},
    }
    bad = max(outputs) + "9"
    return {bad: {"errors": [wrong], "dependent_outputs": [bad], "class_type": "SaveImage"}}
