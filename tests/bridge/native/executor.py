"""Runs queued prompts one at a time and tells of it as ComfyUI 0.8.0 does (`execution.py`, `main.prompt_worker`)."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from tests.bridge.native.drawing import Saving, Value, picture, value_of
from tests.bridge.native.outputs import leave
from tests.bridge.native.prompt_queue import Item, Json, PromptQueue
from tests.bridge.native.traps import Traps

STEPPING: Final = frozenset({"KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced", "TrainLoraNode"})
"""Node classes that tell `progress` step by step."""
_GLANCE_SECONDS: Final = 0.005
_DEFAULT_STEPS: Final = 4
_LOG_ENTRIES: Final = 300
_OUT_OF_MEMORY: Final = (
    "Allocation on device \nThis error means you ran out of memory on your GPU.\n\nTIPS: If the workflow worked before "
    "you might have accidentally set the batch_size to a large number."
)
Say = Callable[[str, Any, str | None], None]
"""(event, data, client id): into the order of messages; `None` is everyone."""


class Interrupted(Exception):
    """Somebody asked to stop what runs."""


class NodeFailed(Exception):
    """A node's exception: `kind` is its Python class's full name."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass
class Run:
    """One execution of a prompt, for tests: the same prompt id twice is two of these."""

    prompt_id: str
    began: float
    ended: float | None = None
    outcome: str = "running"
    nodes: list[str] = field(default_factory=list)


@dataclass
class _Prompt:
    """What is known while a prompt runs."""

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
    """The one worker. `client_id` keeps the last prompt's between prompts, as ComfyUI's server does."""

    def __init__(
        self,
        queue: PromptQueue,
        saving: Saving,
        say: Say,
        traps: Callable[[], Traps],
        *,
        is_output: Callable[[str], bool],
    ) -> None:
        self._queue = queue
        self._is_output = is_output
        self._saving = saving
        self._say = say
        self._traps = traps
        self._cache: dict[str, Json] = {}
        self.interrupt = False
        self.client_id: str | None = None
        self.node: str | None = None
        self.runs: list[Run] = []
        self.logs: deque[dict[str, str]] = deque(maxlen=_LOG_ENTRIES)
        self._running: asyncio.Task[None] | None = None

    def drop(self) -> None:
        """Stop what runs without a word, and forget the cache."""
        self._cache = {}
        self._queue.running.clear()
        if self._running is not None:
            self._running.cancel()

    async def work(self) -> None:
        """Take the next prompt, for ever."""
        while True:
            if self._traps().worker_dead or not (taken := self._queue.take()):
                await asyncio.sleep(_GLANCE_SECONDS)
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
        self._tell(prompt, "execution_start", {})
        run.outcome = await self._nodes(prompt, run)
        await asyncio.sleep(self._traps().history_delay_seconds)
        run.ended = time.time()
        self._settle(number, prompt, run)
        self.log(f"Prompt executed in {run.ended - run.began:.2f} seconds\n")

    def _settle(self, number: int, prompt: _Prompt, run: Run) -> None:
        is_success = run.outcome == "success"
        outputs = {node: ui["output"] for node, ui in prompt.ui.items()}
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
            self._say("executing", {"node": None, "prompt_id": prompt.prompt_id}, self.client_id)

    async def _nodes(self, prompt: _Prompt, run: Run) -> str:
        """Every node that an output needs, in order; the outcome."""
        order = _order(prompt.graph, prompt.item[4])
        for node in _order(prompt.graph, list(prompt.graph)):
            if node in order:
                prompt.values[node] = self._value(prompt, node)
        cached = [node for node in prompt.graph if node in prompt.values and self._cached(prompt, node) is not None]
        self._tell(prompt, "execution_cached", {"nodes": cached})
        node = ""
        try:
            for node in order:
                if node in cached:
                    self._show_cached(prompt, node)
                else:
                    await self._node(prompt, node)
                    run.nodes.append(node)
        except Interrupted:
            self._tell(prompt, "execution_interrupted", self._where(prompt, node), to_everyone=True)
            return "interrupted"
        except (NodeFailed, OSError, ValueError) as failure:
            self._tell(prompt, "execution_error", self._where(prompt, node) | _described(failure, prompt.graph[node]))
            return "error"
        self._cache = {self._signature(prompt, node): prompt.ui.get(node, {}) for node in order}
        self._tell(prompt, "execution_success", {})
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
        """A file's name is no part of its picture, and yet of what ComfyUI compares: all inputs of a node."""
        return f"{prompt.values[node].digest}:{prompt.graph[node]['inputs'].get('filename_prefix')}"

    def _show_cached(self, prompt: _Prompt, node: str) -> None:
        """As 0.8.0: only a prompt with a client id is shown the outputs that the cache holds."""
        ui = self._cached(prompt, node) or {}
        if self.client_id is not None:
            self._say("executed", self._named(prompt, node) | {"output": ui.get("output")}, self.client_id)
            if ui:
                prompt.ui[node] = ui
        self._finish(prompt, node)

    async def _node(self, prompt: _Prompt, node: str) -> None:
        described = prompt.graph[node]
        kind = described["class_type"]
        self._progress(prompt, node, "running", 0.0, 1.0)
        if self.client_id is not None:
            self.node = node
            self._say("executing", self._named(prompt, node), self.client_id)
        steps = described["inputs"].get("steps", _DEFAULT_STEPS) if kind in STEPPING else 0
        for step in range(1, steps + 1 if isinstance(steps, int) else _DEFAULT_STEPS + 1):
            await self._spend(self._traps().step_seconds)
            self._step(prompt, node, step, steps if isinstance(steps, int) else _DEFAULT_STEPS)
        await self._spend(0 if steps else self._traps().node_seconds)
        self._fail(kind)
        value_of(described, self._above(prompt, node), self._saving.folders["input"])
        extras = set(self._traps().extra_outputs)
        ui = leave(described, self._above(prompt, node), self._saving, extras) if self._is_output(kind) else {}
        if ui:
            meta = {"node_id": node, "display_node": node, "parent_node": None, "real_node_id": node}
            prompt.ui[node] = {"meta": meta, "output": ui}
            if self.client_id is not None:
                self._say("executed", self._named(prompt, node) | {"output": ui}, self.client_id)
        self._finish(prompt, node)
        prompt.executed.append(node)

    def _fail(self, kind: str) -> None:
        if kind in self._traps().fail_nodes:
            raise NodeFailed("RuntimeError", f"{self._traps().fail_nodes[kind]}\n")
        if self._traps().out_of_memory > 0 and kind in STEPPING | {"SaveImage"}:
            self._traps().out_of_memory -= 1
            raise NodeFailed("torch.OutOfMemoryError", _OUT_OF_MEMORY)

    async def _spend(self, seconds: float) -> None:
        """Let time pass as the traps have it. Raises Interrupted."""
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
            await asyncio.sleep(_GLANCE_SECONDS if is_held else min(left, _GLANCE_SECONDS))

    def _step(self, prompt: _Prompt, node: str, step: int, steps: int) -> None:
        self._progress(prompt, node, "running", float(step), float(steps))
        told = {"value": step, "max": steps, "prompt_id": prompt.prompt_id, "node": node}
        self._say("progress", told, self.client_id)
        if prompt.graph[node]["class_type"] == "TrainLoraNode":
            self._train(step, steps)
        if self._traps().previews:
            dot = picture(prompt.values[node].digest, 1, 1)
            self._say("preview", (dot, self._named(prompt, node)), self.client_id)

    def _train(self, step: int, steps: int) -> None:
        """The loss stands in the server's log alone: a progress bar that overwrites itself until it is full."""
        loss = f"loss={0.05 + 1 / step:.4f}"
        line = f"\rTraining LoRA: {100 * step // steps:3}%|###| {step}/{steps} [00:01<00:01,  1.00it/s, {loss}]"
        self.log(line)
        if step == steps:
            self.log("\n")

    def log(self, said: str) -> None:
        """What ComfyUI's `app/logger.py` keeps of what it prints: 300 entries, an unfinished line written over."""
        if said.startswith("\r") and self.logs and not self.logs[-1]["m"].endswith("\n"):
            self.logs.pop()
        self.logs.append({"t": datetime.now(UTC).replace(tzinfo=None).isoformat(), "m": said})

    def _finish(self, prompt: _Prompt, node: str) -> None:
        most = prompt.progress.get(node, {}).get("max", 1.0)
        self._progress(prompt, node, "finished", most, most)

    def _progress(self, prompt: _Prompt, node: str, state: str, value: float, most: float) -> None:
        """`progress_state` names every node that is not pending, and no other."""
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
        self._say("progress_state", {"prompt_id": prompt.prompt_id, "nodes": nodes}, self.client_id)

    def _tell(self, prompt: _Prompt, event: str, data: Json, *, to_everyone: bool = False) -> None:
        """Into the history's messages, and to the client id; without one only what is meant for everyone is sent."""
        said = data | {"prompt_id": prompt.prompt_id, "timestamp": int(time.time() * 1000)}
        prompt.messages.append([event, said])
        if self.client_id is not None or to_everyone:
            self._say(event, said, self.client_id)

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
    """Every node above the outputs, each after what it needs."""
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
