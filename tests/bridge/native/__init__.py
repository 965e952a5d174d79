"""A stand-in for one ComfyUI server: its own API in a real process, with every known trap as a switch.

Routes, messages and refusals follow ComfyUI 0.8.0's source (`server.py`, `execution.py`, `comfy_execution/jobs.py`,
`comfy_execution/progress.py`, `main.py`); `object_info.json` was recorded from that version running on a CPU. It was
also run side by side with the real server (`tests/bridge/real`).

    async with NativeServer(folder) as server:      # a process of its own; `kill`, `restart`, `freeze`
        await server.admin.set(step_seconds=0.05)   # traps: `traps.Traps`
        assert await server.admin.runs_of(prompt_id) == 1

Deliberate departures:
1. Nothing is computed. A picture is drawn from a digest of everything upstream of the node that saves it: the same
   graph gives the same picture, another seed another one. Sizes are the graph's.
2. A graph runs in an asyncio task, not in a thread. The cache keeps what the last prompt used, as in ComfyUI.
3. `POST /api/jobs/{id}/cancel` is later than 0.8.0 and off by default (`jobs_api="cancel"`).
4. It has only the routes and node classes that the bridge may use. Previews are one pixel.
"""

from tests.bridge.native.admin import NativeAdmin, RunSeen
from tests.bridge.native.process import NativeServer
from tests.bridge.native.traps import Traps

__all__ = ["NativeAdmin", "NativeServer", "RunSeen", "Traps"]
