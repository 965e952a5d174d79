"""Which templates a server can run, from its `/object_info`.

Read at the start and again and again: models are added while a server runs. A reading that fails changes nothing. As
long as none has succeeded, templates that need no model run, and the others wait.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from enum import StrEnum
from typing import Any, Final

import structlog

from bridge.graph_check import MODEL_INPUTS, NoModel, chosen_models, graph_problems, missing_node_types
from bridge.graphs import reachable
from bridge.orders import Missing
from bridge.server import Server, ServerError
from bridge.templates import Template
from comfyui_temporal.contracts.errors import FailureCode
from runtime.background import running_in_background

REFRESH_SECONDS: Final = 60.0
RETRY_SECONDS: Final = 5.0
FRESH_SECONDS: Final = 2.0
"""A reading is not repeated within it, however many jobs ask for one."""

log = structlog.get_logger(__name__)


class TemplateState(StrEnum):
    """Whether a server can run a template."""

    FIT = "fit"
    UNFIT = "unfit"
    UNKNOWN = "unknown"
    """The server's lists were never read, and the template needs a model."""


class Fitness:
    """One server's templates. Empty node types mean that this kind of server does not say: everything fits."""

    def __init__(
        self, server: Server, templates: Iterable[Template], *, on_change: Callable[[], None] = lambda: None
    ) -> None:
        self._server = server
        self._templates = {template.template_id: template for template in templates}
        self._info: Mapping[str, Any] | None = None
        self._read_at = float("-inf")
        self._reading = asyncio.Lock()
        self.missing: dict[str, Missing] = {}
        """Unfit template → what the server lacks."""
        self.on_change = on_change

    def state_of(self, template_id: str) -> TemplateState:
        """A template that this worker does not know counts as fit: its bridge may have it."""
        if template_id in self.missing:
            return TemplateState.UNFIT
        template = self._templates.get(template_id)
        if self._info is None and template is not None and needs_models(template):
            return TemplateState.UNKNOWN
        return TemplateState.FIT

    def template(self, template_id: str) -> Template | None:
        """One of the templates that are judged here."""
        return self._templates.get(template_id)

    @property
    def templates(self) -> list[str]:
        """Ids of the templates that are judged here."""
        return sorted(self._templates)

    @property
    def fit(self) -> set[str]:
        """Ids of the templates that may run here."""
        return {name for name in self._templates if self.state_of(name) is TemplateState.FIT}

    @property
    def unknown(self) -> list[str]:
        """Ids of the templates that wait for the server's lists."""
        return sorted(name for name in self._templates if self.state_of(name) is TemplateState.UNKNOWN)

    async def node_types(self) -> Mapping[str, Any]:
        """What was read last. Raises ServerError if nothing was."""
        if self._info is None:
            await self.refresh()
        assert self._info is not None
        return self._info

    async def refresh(self) -> None:
        """Read the server's lists again, unless that was just done. Raises ServerError; then the last ones stay."""
        async with self._reading:
            if time.monotonic() - self._read_at < FRESH_SECONDS:
                return
            info = await self._server.node_types()
            self._read_at = time.monotonic()
            is_first = self._info is None
            self._info = info
            self._judge(info, logs_all=is_first)

    def replace(self, templates: Iterable[Template]) -> None:
        """Judge these templates from now on, by what was read last."""
        self._templates = {template.template_id: template for template in templates}
        self._judge(self._info or {}, logs_all=True)

    def _judge(self, info: Mapping[str, Any], *, logs_all: bool) -> None:
        missing = {name: found for name, template in self._templates.items() if (found := _missing(template, info))}
        if missing == self.missing and not logs_all:
            return
        for name, what in missing.items():
            log.warning("template_unusable_here", template_id=name, problems=what.reasons)
        self.missing = missing
        self.on_change()

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Read the lists now and then, while the body runs."""
        async with running_in_background(self._watch()):
            yield

    async def _watch(self) -> None:
        is_logged = False
        while True:
            try:
                await self.refresh()
                is_logged = False
            except ServerError as error:
                if not is_logged:
                    log.warning("object_info_unread", reason=str(error))
                is_logged = True
            await asyncio.sleep(REFRESH_SECONDS if not is_logged else RETRY_SECONDS)


def problems_of(template: Template, info: Mapping[str, Any]) -> list[str]:
    """What a server with these node types would refuse in a template, one sentence each."""
    found = graph_problems(template.graph, info, template.result_nodes, uploads=template.filled_in_later())
    try:
        chosen_models(template.graph, info, template.models_needed(), template.result_nodes)
    except NoModel as missing:
        found.append(str(missing))
    return found


def needs_models(template: Template) -> bool:
    """Whether a server needs a model file to run the template."""
    if template.models_needed():
        return True
    nodes = [template.graph[node]["inputs"] for node in reachable(template.graph, template.result_nodes)]
    return any(isinstance(inputs.get(name), str) for inputs in nodes for name in MODEL_INPUTS)


def _missing(template: Template, info: Mapping[str, Any]) -> Missing | None:
    if not info or not (problems := problems_of(template, info)):
        return None
    has_all_nodes = not missing_node_types(template.graph, info, template.result_nodes)
    code = FailureCode.MODEL_MISSING if needs_models(template) and has_all_nodes else FailureCode.WORKFLOW_INVALID
    return Missing.of(code, problems)
