"""Runs queued prompts one at a time, with ComfyUI 0.8.0's messages (`execution.py`, `main.prompt_worker`)."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections import deque
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from tests.bridge.native.drawing import Saving, Value, picture, value_of
from tests.bridge.native.outputs import write_outputs
from tests.bridge.native.prompt_queue import Item, Json, PromptQueue
from tests.bridge.native.traps import Traps

STEPPING: Final = frozenset({"KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced", "TrainLoraNode"})
"""Node classes that send `progress` for each step."""
_POLL_SECONDS: Final = 0.005
_DEFAULT_STEPS: Final = 4
_LOG_ENTRIES: Final = 300
_OUT_OF_MEMORY: Final = (
    "Allocation on device \nThis error means you ran out of memory on your GPU.\n\nTIPS: If the workflow worked before "
    "you might have accidentally set the batch_size to a large number."
)
Publish = Callable[[str, Any, str | None], None]
"""(event, data, client id). A client id of None means all clients."""


class Interrupted(Exception):
    """The running prompt is to stop."""


class NodeFailed(Exception):
    """A node's exception: `kind` is its Python class's full name."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass
class Run:
    """One execution of a prompt, for tests. A prompt id that runs twice has two."""

    prompt_id: str
    began: float
    ended: float | None = None
    outcome: str = "running"
    nodes: list[str] = field(default_factory=list)


@dataclass
class _Prompt:
    """State of a running prompt."""

    item: Item
    messages: list[list[Any]] = field(default_factory=list)
    executed: list[str] = field(default_factory=list)
    ui: dict[str, Json] = field(default_factory=dict)
    progress: dict[str, Json] = field(default_factory=dict)
    values: dict[str, Value] = field(default_factory=dict)

    @property
    def prompt_id(self) -> str:
        return self.item[1]

    @property
    def graph(self) -> Json:
        return self.item[2]


class Executor:
    """The single worker. Between prompts, `client_id` stays the last prompt's, as in ComfyUI."""

    def __init__(
        self,
        queue: PromptQueue,
        saving: Saving,
        publish: Publish,
        traps: Callable[[], Traps],
        *,
        is_output: Callable[[str], bool],
    ) -> None:
        self._queue = queue
        self._is_output = is_output
        self._saving = saving
        self._publish = publish
        self._traps = traps
        self._cache: dict[str, Json] = {}
        self.interrupt = False
        self.client_id: str | None = None
        self.node: str | None = None
        self.runs: list[Run] = []
        self.logs: deque[dict[str, str]] = deque(maxlen=_LOG_ENTRIES)
        self._running: asyncio.Task[None] | None = None

    def drop(self) -> None:
        """Stop the running prompt without any message, and clear the cache."""
        self._cache = {}
        self._queue.running.clear()
        if self._running is not None:
            self._running.cancel()

    async def work(self) -> None:
        """Run prompts, one after another."""
        while True:
            if self._traps().worker_dead or not (taken := self._queue.take()):
                await asyncio.sleep(_POLL_SECONDS)
                continue
            self._running = asyncio.create_task(self._execute(*taken))
            try:
                await asyncio.wait({self._running})
            finally:
                self._running.cancel()
            if not self._running.cancelled() and (problem := self._running.exception()) is not None:
                traceback.print_exception(problem)
            self._running = None

    async def _execute(self, number: int, item: Item) -> None:
        prompt = _Prompt(item)
        run = Run(prompt.prompt_id, time.time())
        self.runs.append(run)
        self.interrupt = False
        self.client_id = item[3].get("client_id")
        self._record(prompt, "execution_start", {})
        run.outcome = await self._nodes(prompt, run)
        await asyncio.sleep(self._traps().history_delay_seconds)
        run.ended = time.time()
        self._finish_prompt(number, prompt, run)
        self.log(f"Prompt executed in {run.ended - run.began:.2f} seconds\n")

    def _finish_prompt(self, number: int, prompt: _Prompt, run: Run) -> None:
        is_success = run.outcome == "success"
        outputs = {node: ui["output"] for node, ui in prompt.ui.items() if node not in self._traps().lost_outputs}
        if self._traps().empty_cached_outputs and is_success and not run.nodes:
            outputs = {}
        status = {
            "status_str": "success" if is_success else "error",
            "completed": is_success,
            "messages": prompt.messages,
        }
        meta = {node: ui["meta"] for node, ui in prompt.ui.items()}
        self._queue.done(number, {"outputs": outputs, "meta": meta}, status, self._traps().history_limit)
        self.node = None
        if self.client_id is not None:
            self._publish("executing", {"node": None, "prompt_id": prompt.prompt_id}, self.client_id)

    async def _nodes(self, prompt: _Prompt, run: Run) -> str:
        """Run every node that an output needs, in order. Returns the outcome."""
        order = _order(prompt.graph, prompt.item[4])
        for node in _order(prompt.graph, list(prompt.graph)):
            if node in order:
                prompt.values[node] = self._value(prompt, node)
        cached = [node for node in prompt.graph if node in prompt.values and self._cached(prompt, node) is not None]
        self._record(prompt, "execution_cached", {"nodes": cached})
        node = ""
        try:
            for node in order:
                if node in cached:
                    self._show_cached(prompt, node)
                else:
                    await self._node(prompt, node)
                    run.nodes.append(node)
        except Interrupted:
            self._record(prompt, "execution_interrupted", self._where(prompt, node), to_everyone=True)
            return "interrupted"
        except (NodeFailed, OSError, ValueError) as failure:
            self._record(prompt, "execution_error", self._where(prompt, node) | _described(failure, prompt.graph[node]))
            return "error"
        self._cache = {self._signature(prompt, node): prompt.ui.get(node, {}) for node in order}
        self._record(prompt, "execution_success", {})
        return "success"

    def _value(self, prompt: _Prompt, node: str) -> Value:
        above = self._above(prompt, node)
        try:
            return value_of(prompt.graph[node], above, self._saving.folders["input"])
        except (OSError, ValueError, KeyError):
            return Value(f"unreadable {node} {time.monotonic_ns()}")

    def _above(self, prompt: _Prompt, node: str) -> dict[str, Value]:
        links = {name: link for name, link in prompt.graph[node]["inputs"].items() if isinstance(link, list)}
        return {name: prompt.values[link[0]] for name, link in links.items()}

    def _cached(self, prompt: _Prompt, node: str) -> Json | None:
        return self._cache.get(self._signature(prompt, node))

    def _signature(self, prompt: _Prompt, node: str) -> str:
        """ComfyUI compares all inputs of a node, and so also the file name, which does not change the picture."""
        return f"{prompt.values[node].digest}:{prompt.graph[node]['inputs'].get('filename_prefix')}"

    def _show_cached(self, prompt: _Prompt, node: str) -> None:
        """As in 0.8.0: only a prompt with a client id gets the outputs from the cache."""
        ui = self._cached(prompt, node) or {}
        if self.client_id is not None:
            self._publish("executed", self._named(prompt, node) | {"output": ui.get("output")}, self.client_id)
            if ui:
                prompt.ui[node] = ui
        self._finish(prompt, node)

    async def _node(self, prompt: _Prompt, node: str) -> None:
        described = prompt.graph[node]
        kind = described["class_type"]
        self._progress(prompt, node, "running", 0.0, 1.0)
        if self.client_id is not None:
            self.node = node
            self._publish("executing", self._named(prompt, node), self.client_id)
        steps = described["inputs"].get("steps", _DEFAULT_STEPS) if kind in STEPPING else 0
        for step in range(1, steps + 1 if isinstance(steps, int) else _DEFAULT_STEPS + 1):
            await self._spend(self._traps().step_seconds)
            self._step(prompt, node, step, steps if isinstance(steps, int) else _DEFAULT_STEPS)
        await self._spend(0 if steps else self._traps().node_seconds)
        self._fail(kind)
        value_of(described, self._above(prompt, node), self._saving.folders["input"])
        extras = set(self._traps().extra_outputs)
        ui = write_outputs(described, self._above(prompt, node), self._saving, extras) if self._is_output(kind) else {}
        if "text" in ui and self._traps().text_bytes:
            ui["text"] = ["x" * self._traps().text_bytes]
        if ui and self._traps().blocked:
            self._block(prompt, node)
        elif ui and self._traps().expanding:
            self._expand(prompt, node, kind, extras)
        elif ui:
            meta = {"node_id": node, "display_node": node, "parent_node": None, "real_node_id": node}
            prompt.ui[node] = {"meta": meta, "output": ui}
            if self.client_id is not None:
                self._publish("executed", self._named(prompt, node) | {"output": ui}, self.client_id)
        self._finish(prompt, node)
        prompt.executed.append(node)

    def _block(self, prompt: _Prompt, node: str) -> None:
        """As `execution.py` does for an `ExecutionBlocker` with a message: only the client is told."""
        if self.client_id is not None:
            what = {"exception_message": f"Execution Blocked: {self._traps().blocked}", "traceback": []}
            data = self._where(prompt, node) | what | {"exception_type": "ExecutionBlocked"}
            self._publish("execution_error", data | {"prompt_id": prompt.prompt_id}, self.client_id)

    def _expand(self, prompt: _Prompt, node: str, kind: str, extras: Set[str]) -> None:
        for number in range(1, self._traps().expanding + 1):
            inner = f"{node}.0.0.{number}"
            ui = write_outputs(prompt.graph[node], self._above(prompt, node), self._saving, extras)
            meta = {"node_id": inner, "display_node": node, "parent_node": node, "real_node_id": node}
            prompt.ui[inner] = {"meta": meta, "output": ui}
            named = {"node": inner, "display_node": node, "prompt_id": prompt.prompt_id}
            if self.client_id is not None:
                self._publish("executing", named, self.client_id)
                self._publish("executed", named | {"output": ui}, self.client_id)

    def _fail(self, kind: str) -> None:
        if kind in self._traps().fail_nodes:
            raise NodeFailed("RuntimeError", f"{self._traps().fail_nodes[kind]}\n")
        if self._traps().out_of_memory > 0 and kind in STEPPING | {"SaveImage"}:
            self._traps().out_of_memory -= 1
            raise NodeFailed("torch.OutOfMemoryError", _OUT_OF_MEMORY)

    async def _spend(self, seconds: float) -> None:
        """Wait as the traps say. Raises Interrupted."""
        ends = time.monotonic() + seconds
        while True:
            traps = self._traps()
            if self.interrupt and not traps.stuck:
                self.interrupt = False
                raise Interrupted
            is_held = traps.hold or traps.stuck or traps.worker_dead
            left = ends - time.monotonic()
            if left <= 0 and not is_held:
                return
            await asyncio.sleep(_POLL_SECONDS if is_held else min(left, _POLL_SECONDS))

    def _step(self, prompt: _Prompt, node: str, step: int, steps: int) -> None:
        self._progress(prompt, node, "running", float(step), float(steps))
        data = {"value": step, "max": steps, "prompt_id": prompt.prompt_id, "node": node}
        self._publish("progress", data, self.client_id)
        if prompt.graph[node]["class_type"] == "TrainLoraNode":
            self._train(step, steps)
        if self._traps().previews:
            dot = picture(prompt.values[node].digest, 1, 1)
            self._publish("preview", (dot, self._named(prompt, node)), self.client_id)

    def _train(self, step: int, steps: int) -> None:
        """The loss is only in the server's log: a progress bar that overwrites itself until it is full."""
        loss = f"loss={0.05 + 1 / step:.4f}"
        line = f"\rTraining LoRA: {100 * step // steps:3}%|###| {step}/{steps} [00:01<00:01,  1.00it/s, {loss}]"
        self.log(line)
        if step == steps:
            self.log("\n")

    def log(self, text: str) -> None:
        """Keep log entries as ComfyUI's `app/logger.py` does: 300 entries, and an unfinished line is overwritten."""
        if text.startswith("\r") and self.logs and not self.logs[-1]["m"].endswith("\n"):
            self.logs.pop()
        self.logs.append({"t": datetime.now(UTC).replace(tzinfo=None).isoformat(), "m": text})

    def _finish(self, prompt: _Prompt, node: str) -> None:
        most = prompt.progress.get(node, {}).get("max", 1.0)
        self._progress(prompt, node, "finished", most, most)

    def _progress(self, prompt: _Prompt, node: str, state: str, value: float, most: float) -> None:
        """`progress_state` has every node that is not pending, and no others."""
        prompt.progress[node] = {
            "value": value,
            "max": most,
            "state": state,
            "node_id": node,
            "prompt_id": prompt.prompt_id,
            "display_node_id": node,
            "parent_node_id": None,
            "real_node_id": node,
        }
        nodes = {name: dict(entry) for name, entry in prompt.progress.items()}
        self._publish("progress_state", {"prompt_id": prompt.prompt_id, "nodes": nodes}, self.client_id)

    def _record(self, prompt: _Prompt, event: str, data: Json, *, to_everyone: bool = False) -> None:
        """Add to the history's messages and send to the client. Without a client id, send only what is for all."""
        step = self._traps().clock_step_seconds if event == "execution_success" else 0.0
        full = data | {"prompt_id": prompt.prompt_id, "timestamp": int((time.time() + step) * 1000)}
        prompt.messages.append([event, full])
        if self.client_id is not None or to_everyone:
            self._publish(event, full, self.client_id)

    def _named(self, prompt: _Prompt, node: str) -> Json:
        return {"node": node, "display_node": node, "prompt_id": prompt.prompt_id}

    def _where(self, prompt: _Prompt, node: str) -> Json:
        kind = prompt.graph[node]["class_type"]
        return {"node_id": node, "node_type": kind, "executed": list(prompt.executed)}


def _described(failure: Exception, node: Json) -> Json:
    kind = failure.kind if isinstance(failure, NodeFailed) else type(failure).__name__
    inputs = {name: [str(given)] for name, given in node["inputs"].items() if not isinstance(given, list)}
    return {
        "exception_message": str(failure),
        "exception_type": kind,
        "traceback": [f'  File "{Path("execution.py")}", line 518, in execute\n'],
        "current_inputs": inputs,
        "current_outputs": [],
    }


def _order(graph: Json, outputs: list[str]) -> list[str]:
    """Every node upstream of the outputs, each after its inputs."""
    order: list[str] = []

    def visit(node: str) -> None:
        if node in order:
            return
        for link in graph[node]["inputs"].values():
            if isinstance(link, list):
                visit(link[0])
        order.append(node)

    for output in outputs:
        visit(output)
    return order
