"""One Temporal plugin for client, worker, replayer and tests.

Every workflow runs and is replayed with the same converter and runner, so a replay test proves the real configuration
(decision 7).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final, TypeGuard, TypeVar

import temporalio.api.common.v1
import temporalio.client
import temporalio.converter
from pydantic import BaseModel, ValidationError
from temporalio import workflow
from temporalio.common import RawValue
from temporalio.contrib.pydantic import PydanticPayloadConverter
from temporalio.converter import CompositePayloadConverter
from temporalio.exceptions import ApplicationError
from temporalio.plugin import SimplePlugin
from temporalio.worker import UnsandboxedWorkflowRunner, WorkflowRunner

from comfyui_temporal.contracts.errors import FailureCode, sentences_of
from comfyui_temporal.contracts.fields import CallerModel
from comfyui_temporal.contracts.handed_on import (
    Doubtful,
    KeptModel,
    RunArgument,
    as_json,
    has_unknown_fields,
    read_tolerantly,
)
from comfyui_temporal.encryption import NO_ENCRYPTION, EncryptedFailures, PayloadEncryption

Model = TypeVar("Model", bound=BaseModel)
Caller = TypeVar("Caller", bound=CallerModel)
_PYDANTIC: Final = PydanticPayloadConverter()
"""Shared by all runs: a converter for each run would build and keep the validators of all payload types."""


class _InvalidArgument(Exception):
    """An argument that callers may not give. The text names the problem of each field and repeats no value."""


class TaskPayloadConverter(CompositePayloadConverter):
    """Pydantic's converter, with two more rules.

    1. A caller's bad argument ends as `input_invalid` (pitfall 1). Without this rule a bad field, a foreign encoding or
       a wrong number of arguments would fail the workflow task for ever. The run decides whether an argument is a
       caller's: a questionable argument reaches it as `Doubtful`.
    2. Data that our runs and workers pass on keeps unknown fields (pitfall 41).
    """

    def __init__(self) -> None:
        super().__init__(*_PYDANTIC.converters.values())

    def to_payloads(self, values: Sequence[Any]) -> list[temporalio.api.common.v1.Payload]:
        return super().to_payloads([_with_unknown_fields(value) for value in values])

    def from_payloads(
        self,
        payloads: Sequence[temporalio.api.common.v1.Payload],
        type_hints: list[type] | None = None,
    ) -> list[Any]:
        hints: Sequence[type | None] = type_hints or [None] * len(payloads)
        return [self._value(payload, hint) for payload, hint in zip(payloads, hints, strict=False)]

    def _value(self, payload: temporalio.api.common.v1.Payload, hint: type | None) -> Any:
        if hint is None:
            return self._untyped(payload)
        if _is_a(hint, RunArgument):
            return self._argument(payload, hint)
        if _is_a(hint, CallerModel):
            return self._from_caller(payload, hint)
        if _is_a(hint, KeptModel) and _is_json(payload):
            return read_tolerantly(hint, payload.data)
        return super().from_payloads([payload], [hint])[0]

    def _argument(self, payload: temporalio.api.common.v1.Payload, hint: type[RunArgument]) -> RunArgument | Doubtful:
        as_read: RunArgument | None = None
        if _is_json(payload):
            with contextlib.suppress(ValidationError):
                as_read = read_tolerantly(hint, payload.data)
        if getattr(as_read, "carried", None) is not None:
            return as_read  # type: ignore[return-value]  # the run itself rejects a forged one
        try:
            return self._strictly(payload, hint)
        except _InvalidArgument as refusal:
            return Doubtful(str(refusal), as_read)

    def _from_caller(self, payload: temporalio.api.common.v1.Payload, hint: type[CallerModel]) -> CallerModel:
        """An update's argument, or another value from a caller. Values in the history were accepted by some worker."""
        if _is_json(payload) and workflow.in_workflow() and workflow.unsafe.is_replaying():
            return read_tolerantly(hint, payload.data)
        try:
            return self._strictly(payload, hint)
        except _InvalidArgument as refusal:
            raise ApplicationError(
                f"The input is not valid: {refusal}.", type=FailureCode.INPUT_INVALID, non_retryable=True
            ) from None

    def _strictly(self, payload: temporalio.api.common.v1.Payload, hint: type[Caller]) -> Caller:
        """Raises _InvalidArgument."""
        try:
            value = super().from_payloads([payload], [hint])[0]
        except ValidationError as error:
            raise _InvalidArgument("; ".join(sentences_of(error))) from None
        except Exception as error:
            raise _InvalidArgument(f"the argument is not JSON ({type(error).__name__})") from None
        if not isinstance(value, hint):
            raise _InvalidArgument("the argument is not a JSON object")
        return value

    def _untyped(self, payload: temporalio.api.common.v1.Payload) -> Any:
        try:
            return super().from_payloads([payload])[0]
        except Exception:
            # Only reached with a wrong number of arguments: the guard that counts them rejects the call.
            return RawValue(payload)


def _with_unknown_fields(value: Any) -> Any:
    is_kept = isinstance(value, KeptModel | RunArgument)
    return as_json(value) if is_kept and has_unknown_fields(value) else value


def _is_json(payload: temporalio.api.common.v1.Payload) -> bool:
    return payload.metadata.get("encoding") == b"json/plain"


def _is_a(hint: Any, model: type[Model]) -> TypeGuard[type[Model]]:
    return isinstance(hint, type) and issubclass(hint, model)


DATA_CONVERTER: Final = replace(
    temporalio.converter.DataConverter.default,
    payload_converter_class=TaskPayloadConverter,
    payload_codec=NO_ENCRYPTION,
)


def data_converter_of(encryption: PayloadEncryption) -> temporalio.converter.DataConverter:
    if not encryption.encrypts:
        return replace(DATA_CONVERTER, payload_codec=encryption)
    return replace(DATA_CONVERTER, payload_codec=encryption, failure_converter_class=EncryptedFailures)


def _unsandboxed(_runner: WorkflowRunner | None) -> WorkflowRunner:
    return UnsandboxedWorkflowRunner()


class TasksPlugin(SimplePlugin):
    """Converter, encryption, runner and `interceptors`. Give it to a client: its workers have them too.

    A deliberate departure: no sandbox. The sandbox loads workflow modules again for every run, which costs 660 KiB for
    each open workflow (pitfall 8). With the modules passed through it guards nothing and still costs 18 KiB and a fifth
    of the worker's time up to the first wait. workflows/ruff.toml, the import rules in pyproject.toml and the replay of
    recorded histories keep workflow code deterministic.
    """

    def __init__(
        self, encryption: PayloadEncryption = NO_ENCRYPTION, interceptors: Sequence[temporalio.client.Interceptor] = ()
    ) -> None:
        super().__init__(
            "comfyui-temporal",
            data_converter=data_converter_of(encryption),
            interceptors=interceptors,
            workflow_runner=_unsandboxed,
        )
