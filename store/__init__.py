"""The task store: PostgreSQL through SQLAlchemy 2 and asyncpg.

failures.py      every failure, as one tree
database.py      engine, limits, and the one place that maps driver errors to failures
tables.py        the tables; migrations/ creates them
schema.py        whether a database's tables are those that this code needs
fact_rules.py    which facts become events (contract §6), as a pure function
lives.py         which run of a task acts, and what it may not know of the runs before it
ticks.py         figures that the gateway stores without the workflow, in one statement
tasks.py         claim, write (row + events + exceptions + NOTIFY in one transaction), log lines
reads.py         tasks, events, training log, exceptions
stream_reads.py  heads of tasks, events of many tasks together
listener.py      one LISTEN connection: which task was written
home.py          which Temporal namespace the store belongs to
unseen.py        open tasks whose run could not be checked
unsettled.py     ended tasks whose settlement is unknown: taken, corrected
by_hand.py       an unknown settlement that an operator closes
tenant_limits.py what each tenant starts and has open, counted for its limits
tenant_usage.py  ... and when the count of a moment ago is enough
upkeep.py        deletion of ended tasks and of tenants, the state of the queues
tenant_reads.py  a tenant at a glance
inputs.py        what was asked for
figures.py       figures of all tasks, for operators
audit.py         who did what, or was refused
uploads.py       files that callers send for their tasks
task_files.py    what they leave in object storage
cursors.py       opaque positions
"""

from store.audit import AuditRecord
from store.cursors import CursorInvalid
from store.failures import (
    NotTheClaimant,
    StartRefused,
    StoreFailure,
    StoreUnavailable,
    TablesTooOld,
    TaskUnknown,
    WriteRefused,
)
from store.figures import StoreFigures
from store.home import StoreHome
from store.inputs import StoredInput
from store.listener import EventListener
from store.migrate import migrate
from store.reads import StoredEvent
from store.stream_reads import TaskHead
from store.task_store import TaskStore
from store.ticks import TickAnswer
from store.unseen import UnseenTask, UnseenTaskRow
from store.upkeep import QueueState
from store.uploads import StoredUpload

__all__ = [
    "AuditRecord",
    "CursorInvalid",
    "EventListener",
    "NotTheClaimant",
    "QueueState",
    "StartRefused",
    "StoreFailure",
    "StoreFigures",
    "StoreHome",
    "StoreUnavailable",
    "StoredEvent",
    "StoredInput",
    "StoredUpload",
    "TablesTooOld",
    "TaskHead",
    "TaskStore",
    "TaskUnknown",
    "TickAnswer",
    "UnseenTask",
    "UnseenTaskRow",
    "WriteRefused",
    "migrate",
]
