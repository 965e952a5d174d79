"""Switches for everything that can go wrong with a ComfyUI server."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Lost = Literal["before", "after"]


class Traps(BaseModel):
    """All switches. Some traps have none, because ComfyUI always has them and so does this server:

    a duplicate prompt id runs twice · events go only to the submitting client id, or to everyone without one · a socket
    that reconnects under a client id stops receiving when the old one closes · `queue_pending` is a heap ·
    `execution_success` comes before the history entry · a pending prompt that is deleted leaves no trace · a restart
    empties queue and history · uploads of other bytes under a known name are renamed · `node_errors` on 200 if one
    of two outputs is bad · `PreviewImage` gives files of type `temp` · an `/interrupt` without id stops whatever runs.
    """

    model_config = ConfigDict(extra="forbid")

    step_seconds: float = 0.005
    """Duration of each step of a sampling or training node."""
    node_seconds: float = 0.005
    """Duration of any other node."""
    clock_step_seconds: float = 0.0
    """The server's clock is set by this while a prompt runs."""
    hold: bool = False
    """Nothing progresses while this is set, but interrupts work. For tests that need a running prompt."""
    stuck: bool = False
    """As `hold`, but interrupts are ignored: a call into a driver that never returns."""
    worker_dead: bool = False
    """The worker thread has died: HTTP works, pending prompts stay pending and a running one never ends."""
    silent_websocket: bool = False
    """Sockets open but receive no messages."""
    websocket_refused: bool = False
    hang: bool = False
    """No HTTP request except `/admin` is answered until this is unset."""
    answer_delay_seconds: float = 0.0
    lose_prompt: dict[Lost, int] = {}
    """How many `/prompt` requests are cut without an answer, before or after they took effect."""
    broken_routes: dict[str, int] = {}
    """Path without `/api` (or its beginning, with `*`) → HTTP status to answer instead."""
    proxy_path: str = ""
    """A proxy serves ComfyUI below this path, such as `/gpu-1`, and nothing elsewhere."""
    proxy_header: str = ""
    """A proxy demands this header, `Name: value`, of every request and socket."""
    history_delay_seconds: float = 0.0
    """Between `execution_success` and the history entry; the prompt is still `queue_running` meanwhile."""
    history_limit: int = 10_000
    empty_cached_outputs: bool = False
    """A prompt whose outputs are all cached succeeds with empty `outputs` (before July 2026, seen for some clients)."""
    lost_outputs: set[str] = set()
    """The history lacks the outputs of these nodes, although the prompt succeeded."""
    extra_outputs: set[Literal["temp", "gifs", "audio", "text", "subfolder"]] = set()
    """`SaveImage` also returns these kinds of files."""
    text_bytes: int = 0
    """Length of the text that `SaveImage` returns with `extra_outputs`."""
    node_errors_on_200: bool = False
    """A prompt is queued although one of its outputs was refused, as if the graph had a second, bad output."""
    node_errors_as_list: bool = False
    """Servers before 0.3.44 answer `[]` if there are none."""
    jobs_api: Literal["none", "read", "cancel"] = "read"
    """`/api/jobs`: none (before December 2025), read (0.8.0), with cancel (June 2026)."""
    targeted_interrupt: bool = True
    """False: a server before 0.3.56, whose `/interrupt` ignores `prompt_id` and stops whatever runs."""
    interrupt_delay_seconds: float = 0.0
    """Delay between `/interrupt`'s check of the prompt id and the interrupt, which stops whatever runs by then."""
    strict_prompt_ids: bool = False
    """Newer servers refuse a prompt id that is not a canonical lower-case UUID."""
    out_of_memory: int = 0
    """How many prompts fail with out of memory at their longest node."""
    fail_nodes: dict[str, str] = {}
    """Node class → message of the exception that it raises."""
    models: dict[str, list[str]] = {}
    """Folder → model files, e.g. `checkpoints`; others are refused as `value_not_in_list`."""
    max_upload_bytes: int = 100 * 1024 * 1024
    expanding: int = 0
    """`SaveImage` expands into so many nodes: each has an id of its own, such as `save.0.0.1`, and saves a picture."""
    blocked: str = ""
    """Output nodes do not run, because a node before them blocks them with this message; the prompt succeeds."""
    replaced_nodes: dict[str, str] = {}
    """Node class that the server does not have → the one that it takes instead (February 2026)."""
    previews: bool = False
    """Send a binary preview with each step."""
