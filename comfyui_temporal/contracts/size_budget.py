"""How large things may be that Temporal carries: every limit of bytes and counts, with its reason, in one place.

What the server takes (1.32, its defaults):

    one payload                 2 MiB    more: the workflow task fails for ever (`PayloadsTooLarge`), or the start is
                                         refused
    one gRPC message            4 MiB    all commands of a workflow task, or one activity's result
    one history                50 MiB or 51,200 events: the run is terminated

What is ours stays well below, since a run that meets one of those is stuck with a hold and a job open (pitfalls 6, 39,
43). `tests/workflows/test_size_budget.py` fills every part to its worst and adds it up. Sizes are bytes of JSON, as a
payload holds it: a control character takes six bytes, a quotation mark two.
"""

from __future__ import annotations

from typing import Final

from pydantic import BaseModel

KIB: Final = 1024
SERVER_PAYLOAD_BYTES: Final = 2 * 1024 * KIB
PAYLOAD_BYTES: Final = 1024 * KIB
"""Of any one payload of ours: what a run carries on, an argument, a result, a marker, an answer to a query."""

# Lists of a dataset's files. They lie in object storage; a run carries address, checksum and counts.
MAX_FILE_LIST_BYTES: Final = 4 * 1024 * KIB
"""Of a list that a caller gives: 10,000 files with paths of 400 characters."""
MAX_INLINE_LIST_BYTES: Final = 128 * KIB
"""A longer one the gateway puts into object storage. Never less: what the first release took in a body of 128 KiB
stays the same input, so that a repeat of it is the same task."""
MAX_SENT_LIST_BYTES: Final = 6 * 1024 * KIB
"""Of the list that a training request holds, checksums included: a service takes bodies of 8 MiB."""
MAX_START_BYTES: Final = SERVER_PAYLOAD_BYTES - 4 * KIB
"""Of an input that a client hands to Temporal itself."""

# What callers give.
MAX_PROMPT_BYTES: Final = 16 * KIB
MAX_EXTRAS_BYTES: Final = 32 * KIB

# What a run keeps until it can be used.
MAX_SIGNAL_BYTES: Final = 256 * KIB
"""Of a callback as a signal; a larger one is counted and not read."""
SMALL_SIGNAL_BYTES: Final = 8 * KIB
MAX_READ_BYTES: Final = 2 * 1024 * KIB
"""Of callbacks larger than a small one, in one run. Reading eight of the largest takes a quarter of a second, and again
with each replay; a workflow task that takes two seconds is failed as a deadlock, again and again."""
MAX_INBOX: Final = 256
MAX_INBOX_BYTES: Final = 160 * KIB
"""One delivery at its largest (64 addresses) and some dozen other messages."""
MAX_UNWRITTEN: Final = 256
"""Facts that wait for the task store: of more, the oldest progress goes."""
MAX_UNWRITTEN_BYTES: Final = 256 * KIB
"""About 600 ordinary facts: two weeks of renewals while the store is away."""
MAX_EXCEPTIONS: Final = 64
MAX_EXCEPTIONS_BYTES: Final = 64 * KIB
"""Past it the first record of each code is kept, and the others are counted."""
MAX_KEPT_HOLDS: Final = 64
"""Holds that are over and still told; of older ones the number is kept."""
MAX_ATTEMPTS: Final = 16
MAX_TABLE_ENTRIES: Final = 256
"""Of extras and base models in the price table, which each run carries."""

# What is kept of another party's answer.
MAX_MESSAGE_BYTES: Final = 2 * KIB
MAX_ADDRESS_BYTES: Final = 2 * KIB
MAX_RESULT_URLS: Final = 64
MAX_OPTIONS: Final = 8
"""Of an estimate: there are two priorities."""
MAX_METRICS: Final = 64
"""Of a trained model."""
MAX_NAME_BYTES: Final = 128
"""Of a word that another party chooses: an error's code, a metric's name, a version."""
MAX_POOLS: Final = 64
"""Of the list of GPUs: types that decide whether the asked one is there."""
MAX_LEDGER_BYTES: Final = 256 * KIB
"""Of a task's ledger: about 1,500 entries."""


def json_bytes(value: BaseModel) -> int:
    """How many bytes a model takes in a payload."""
    return len(value.model_dump_json().encode())
