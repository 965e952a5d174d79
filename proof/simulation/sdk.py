"""The only module that imports temporalio's private modules, for one version of them.

A run is driven through the interface between the SDK's Python layer and its core: activations in, commands out. That
interface may change with any release. With another version installed this import fails. Then compare the modules below
with the new version's, run the simulation, and raise `VERSION`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any, Final

from temporalio import activity, workflow
from temporalio.bridge.proto import activity_result
from temporalio.bridge.proto import workflow_activation as activation_api
from temporalio.bridge.proto.workflow_activation import WorkflowActivation, WorkflowActivationJob
from temporalio.bridge.proto.workflow_commands import (
    ScheduleActivity,
    ScheduleLocalActivity,
    StartTimer,
    WorkflowCommand,
)
from temporalio.converter import DataConverter, PayloadConverter
from temporalio.worker._workflow_instance import WorkflowInstance, WorkflowInstanceDetails

VERSION: Final = "1.35.0"

if version("temporalio") != VERSION:
    raise ImportError(
        f"The simulation uses private modules of temporalio {VERSION}, but {version('temporalio')} is installed: "
        "see proof/simulation/sdk.py."
    )


def workflow_definition(workflow_class: type) -> workflow._Definition:
    """What `@workflow.defn` recorded. Raises ValueError where the class has no such decorator."""
    return workflow._Definition.must_from_class(workflow_class)


def activity_definition(function: Callable[..., Any]) -> activity._Definition | None:
    """What `@activity.defn` recorded; None where the function has no such decorator."""
    return activity._Definition.from_callable(function)


def payload_converter_factory(converter: DataConverter) -> Callable[[], PayloadConverter]:
    return converter._new_payload_converter


__all__ = [
    "VERSION",
    "ScheduleActivity",
    "ScheduleLocalActivity",
    "StartTimer",
    "WorkflowActivation",
    "WorkflowActivationJob",
    "WorkflowCommand",
    "WorkflowInstance",
    "WorkflowInstanceDetails",
    "activation_api",
    "activity_definition",
    "activity_result",
    "payload_converter_factory",
    "workflow_definition",
]
