"""structlog configuration, for entry points only. One JSON object in each line, on standard error."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Collection
from types import TracebackType
from typing import Final

import structlog

from comfyui_temporal.contracts.errors import FailureCode
from runtime.trace_context import current_ids

_CODES: Final = frozenset(code.value for code in FailureCode)
HIDDEN: Final = "[hidden]"
MIN_HIDDEN_CHARACTERS: Final = 8
"""A shorter value is hidden by its place alone, or it would be cut out of ordinary words."""
OURS: Final = (
    *("activities", "bridge", "codec_server", "comfyui_temporal", "doctor", "gateway", "gpu_worker", "local_stack"),
    *("proof", "runtime", "simulators", "store", "worker", "workflows"),
)
"""Loggers whose level is the setting's. Libraries log at INFO at most: at DEBUG they write headers and bodies."""
_OF_RUN: Final = ("workflow_id", "activity_type", "attempt")
_BEHIND: Final = re.compile(r" \(\{.*\}\)$", re.DOTALL)
_SECRETS: Final = (
    (re.compile(r"\beyJ[\w-]+\.[\w-]+(?:\.[\w-]*)?"), HIDDEN),  # JWT
    (re.compile(r"\b(bearer|basic) +[^\s\"',\\]+", re.IGNORECASE), rf"\1 {HIDDEN}"),
    (re.compile(r"\bwhsec_[\w+/=-]+"), HIDDEN),
    (re.compile(r"\bv1a?,[\w+/-]{16,}=*"), HIDDEN),  # webhook-signature
    # In an address, a cookie or a DSN: `token=…`, `X-Amz-Signature=…`, `sig=…`
    (
        re.compile(r"((?:token|signature|secret|password|credential|\bsig) ?= ?)[^\s&\"';,\\]+", re.IGNORECASE),
        rf"\1{HIDDEN}",
    ),
    (re.compile(r"(://[^\s:/@\"\\]*):[^\s/\"\\]+@"), rf"\1:{HIDDEN}@"),
)


class _Redacting(structlog.stdlib.ProcessorFormatter):
    """Takes secrets out of whole lines: whoever logged them, in whatever field, tracebacks too."""

    hidden: tuple[str, ...] = ()

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record), self.hidden)


class _WithoutRetries(logging.Filter):
    """Leaves out the SDK's line, with a traceback, for each failed try of a call: `outside_call` names its outcome."""

    def filter(self, record: logging.LogRecord) -> bool:
        failure = record.exc_info[1] if record.exc_info else None
        # By its name: simulators log too, and know nothing of Temporal.
        is_known = type(failure).__name__ == "ApplicationError" and getattr(failure, "type", None) in _CODES
        return not (is_known and record.name == "temporalio.activity")


class _RunAsFields(logging.Filter):
    """The SDK writes all that it knows of a run behind the message: `_OF_RUN` of it become fields of the line."""

    def filter(self, record: logging.LogRecord) -> bool:
        known = {**getattr(record, "temporal_workflow", {}), **getattr(record, "temporal_activity", {})}
        if known and isinstance(record.msg, str):
            record.msg = _BEHIND.sub("", record.msg)
            for name in _OF_RUN:
                if name in known:
                    setattr(record, name, known[name])
        return True


def redacted(line: str, hidden: Collection[str] = ()) -> str:
    """The line without tokens, signatures, passwords in addresses, and the values in `hidden`."""
    for value in hidden:
        line = line.replace(value, HIDDEN)
    for pattern, replacement in _SECRETS:
        line = pattern.sub(replacement, line)
    return line


def configure_logs(*, level: str = "INFO", as_json: bool = True, hidden: Collection[str] = ()) -> None:
    """Send the records of structlog and of the standard library, and uncaught exceptions, through one chain.

    Bind `task_id`, `workflow_id`, `tenant_id` with `structlog.contextvars`; never a prompt, secret or token. `hidden`:
    this process's secrets, which no line shows.
    """
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _with_trace,
        structlog.processors.format_exc_info,
    ]
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    formatter = _Redacting(
        foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder(allow=_OF_RUN)],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
    )
    # The longest first: a value that contains another is hidden whole. Also as it stands inside JSON.
    values = {form for value in hidden for form in (value, json.dumps(value)[1:-1])}
    formatter.hidden = tuple(sorted((v for v in values if len(v) >= MIN_HIDDEN_CHARACTERS), key=len, reverse=True))
    handler.setFormatter(formatter)
    handler.addFilter(_WithoutRetries())
    handler.addFilter(_RunAsFields())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(logging.INFO, logging.getLevelNamesMapping()[level]))
    for name in OURS:
        logging.getLogger(name).setLevel(level)
    # httpx logs each request's address at INFO, uvicorn each request. Neither helps, and both may contain ids.
    for noisy in ("httpx", "httpcore", "uvicorn.access", "alembic.runtime.migration"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    sys.excepthook = _log_uncaught


def _with_trace(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """The record with `trace_id` and `span_id` of the work that it is about, if that is traced."""
    if (ids := current_ids()) is not None:
        event["trace_id"], event["span_id"] = ids
    return event


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    logging.getLogger("runtime").critical("uncaught", exc_info=(kind, error, trace))
