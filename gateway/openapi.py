"""The OpenAPI document: the framework's own, without its wrong additions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from fastapi import FastAPI

from comfyui_temporal.contracts.task_events import Heartbeat
from gateway.problems import PROBLEM_JSON

_FRAMEWORK_REFUSALS: Final = ("HTTPValidationError", "ValidationError")
"""Bodies that are never sent: every refusal is a problem document."""


class DocumentedApp(FastAPI):
    """FastAPI, with a document that describes errors as they are sent.

    1. A problem is `application/problem+json` alone; the framework adds its default media type to every model.
    2. Heartbeats are described: they come in streams, whose frames the framework does not know.
    3. A route that rejects no input documents no 422; the framework adds one for every parameter.
    """

    def openapi(self) -> dict[str, Any]:
        is_made = self.openapi_schema is not None
        document = super().openapi()
        if not is_made:
            for responses in _responses_of(document):
                _correct(responses)
            schemas = document["components"]["schemas"]
            schemas["Heartbeat"] = Heartbeat.model_json_schema()
            for name in _FRAMEWORK_REFUSALS:
                schemas.pop(name, None)
        return document


def _responses_of(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for operations in document["paths"].values():
        for operation in operations.values():
            yield operation["responses"]


def _correct(responses: dict[str, Any]) -> None:
    for status, response in list(responses.items()):
        content = response.get("content", {})
        if PROBLEM_JSON in content:
            response["content"] = {PROBLEM_JSON: content[PROBLEM_JSON]}
        elif any(name in str(content) for name in _FRAMEWORK_REFUSALS):
            del responses[status]
