"""ComfyUI's own API (0.3.64 to 0.38) as a `bridge.server.Server`.

server.py     HTTP
events.py     the WebSocket
history.py    a history entry → the prompt's result
failures.py   ComfyUI's errors → error codes of contract §1
"""

from bridge.native.server import NativeServer

__all__ = ["NativeServer"]
