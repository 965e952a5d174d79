"""A test pattern: a small graph that shows whether a server runs what it is given, on its GPU.

It needs no model and leaves no file among the results. `ImageBlur` computes on the GPU, so a card whose CUDA context is
broken fails it.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from bridge.server import PromptRefused, PromptState, Server, ServerError

PATTERN: Final[Mapping[str, Any]] = {
    "ground": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0}},
    "blurred": {
        "class_type": "ImageBlur",
        "inputs": {"image": ["ground", 0], "blur_radius": 1, "sigma": 1.0},
    },
    "shown": {"class_type": "PreviewImage", "inputs": {"images": ["blurred", 0]}},
}


@dataclass(frozen=True)
class Probe:
    """Runs the pattern. `within_seconds`: how long it may take; a healthy server needs well under a second."""

    within_seconds: float = 60.0
    poll_seconds: float = 0.5

    async def problem(self, server: Server) -> str | None:
        """Why the server did not run the pattern, or None if it did."""
        prompt_id = str(uuid.uuid4())
        try:
            if not (await server.queue()).is_empty:
                return "it runs something else"
            await server.submit(_new_pattern(), prompt_id)
            return await self._problem_of(server, prompt_id)
        except PromptRefused as refused:
            return f"it refused the test pattern: {refused.details.message}"
        except ServerError as error:
            return str(error)

    async def _problem_of(self, server: Server, prompt_id: str) -> str | None:
        until = time.monotonic() + self.within_seconds
        while time.monotonic() < until:
            prompt = await server.look_up(prompt_id, ["shown"])
            if prompt.state is PromptState.ENDED:
                error = prompt.result.error if prompt.result else None
                return None if error is None else f"the test pattern failed: {error.message}"
            await asyncio.sleep(self.poll_seconds)
        await server.cancel(prompt_id)
        return f"the test pattern did not end within {self.within_seconds:g} s"


def _new_pattern() -> dict[str, Any]:
    """A pattern of another colour each time: a server shows what it has cached without running it."""
    pattern = {node: {**described, "inputs": dict(described["inputs"])} for node, described in PATTERN.items()}
    pattern["ground"]["inputs"]["color"] = uuid.uuid4().int % 0x1000000
    return pattern
