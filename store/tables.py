"""The tables. `migrations/` creates them; a test compares the two."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Double,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

EVENTS_CHANNEL: Final = "task_events"
"""The one NOTIFY channel; a payload is `task_id:seq`."""

metadata: Final = MetaData()


def _instant(name: str, *, nullable: bool = False) -> Column[Any]:
    return Column(name, DateTime(timezone=True), nullable=nullable)


def _json(name: str) -> Column[Any]:
    """A JSON document; None is SQL's NULL, never JSON's."""
    return Column(name, JSONB(none_as_null=True))


def _texts(name: str) -> Column[Any]:
    return Column(name, ARRAY(Text), nullable=False, server_default=text("'{}'::text[]"))


def _task_id(*, primary_key: bool = True) -> Column[Any]:
    return Column("task_id", Text, ForeignKey("tasks.task_id", ondelete="CASCADE"), primary_key=primary_key)


task_claims = Table(
    "task_claims",
    metadata,
    Column("task_id", Text, primary_key=True),
    Column("first_execution_run_id", Text, nullable=False),
    Column("workflow_id", Text, nullable=False),
    Column("tenant_id", Text, nullable=False),
    Column("input_sha256", Text, nullable=False),
    _instant("claimed_at"),
    Index("task_claims_of_tenant", "tenant_id"),
    comment="Who holds a task id (contract §8); outlives the task's row.",
)

tasks = Table(
    "tasks",
    metadata,
    Column("task_id", Text, ForeignKey("task_claims.task_id"), primary_key=True),
    Column("tenant_id", Text, nullable=False),
    Column("user_id", Text, nullable=False),
    Column("scene", Text, nullable=False),
    Column("template_id", Text, nullable=False),
    Column("priority", Text, nullable=False),
    Column("resolution", Text, nullable=False),
    Column("workflow_id", Text, nullable=False),
    Column("first_execution_run_id", Text, nullable=False),
    Column("input_sha256", Text, nullable=False),
    _instant("created_at"),
    _instant("updated_at"),
    _instant("ended_at", nullable=True),
    Column("version", BigInteger, nullable=False),
    Column("last_seq", BigInteger, nullable=False),
    Column("last_log_position", BigInteger, nullable=False, server_default=text("0")),
    Column("job_sequences", JSONB, nullable=False, server_default=text("'{}'::jsonb")),
    Column("status", Text, nullable=False),
    Column("stage", Text),
    Column("progress", Double, nullable=False),
    _instant("next_eta", nullable=True),
    Column("estimated_time", Double),
    Column("gpu_slots", Integer),
    Column("queue_position", BigInteger),
    Column("job_id", Text),
    Column("attempts", Integer, nullable=False),
    Column("credits", JSONB, nullable=False),
    Column("prices", JSONB, nullable=False),
    _json("confirmation"),
    Column("result_urls", JSONB, nullable=False),
    _json("output"),
    _json("error"),
    _json("dataset"),
    _json("taken"),
    _instant("ticked_at", nullable=True),
    _instant("last_event_at", nullable=True),
    _instant("settlement_looked_at", nullable=True),
    Column("run_id", Text),
    Column("run_number", Integer, nullable=False, server_default=text("0")),
    Column("lives", Integer, nullable=False, server_default=text("0")),
    _instant("life_began_at", nullable=True),
    Column("given_back_by", Text),
    _texts("earlier_run_ids"),
    _texts("hold_ids"),
    _texts("job_ids"),
    Index("tasks_by_time", text("created_at DESC"), text("task_id DESC")),
    Index("tasks_of_tenant", "tenant_id", text("created_at DESC"), text("task_id DESC")),
    Index("tasks_of_tenant_by_status", "tenant_id", "status", text("created_at DESC"), text("task_id DESC")),
    Index("tasks_of_tenant_by_scene", "tenant_id", "scene", text("created_at DESC"), text("task_id DESC")),
    Index(
        "tasks_of_tenant_by_scene_and_status",
        *("tenant_id", "scene", "status", text("created_at DESC"), text("task_id DESC")),
    ),
    Index("tasks_open", "created_at", "task_id", postgresql_where=text("ended_at IS NULL")),
    Index("tasks_open_of_tenant", "tenant_id", postgresql_where=text("ended_at IS NULL")),
    Index("tasks_by_end", "ended_at", postgresql_where=text("ended_at IS NOT NULL")),
    Index(
        "tasks_unsettled",
        "ended_at",
        postgresql_where=text("credits ->> 'settlement' = 'unknown' AND ended_at IS NOT NULL"),
    ),
    Index("tasks_queued", "priority", postgresql_where=text("status = 'queued'")),
    comment="One row a task; job_sequences: the newest sequence written of each job.",
)
"""`taken` is what the workflow last took of its job, `ticked_at` the last tick that is like it. `run_id` is the acting
run, `lives` counts resets, `hold_ids` and `job_ids` are those of every run."""

task_events = Table(
    "task_events",
    metadata,
    _task_id(),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("key", Text, nullable=False),
    Column("event", Text, nullable=False),
    _instant("ts"),
    Column("attempt", Integer, nullable=False),
    Column("status", Text, nullable=False),
    Column("stage", Text),
    Column("progress", Double),
    _instant("next_eta", nullable=True),
    Column("queue_position", BigInteger),
    Column("message", Text),
    Column("credits_delta", BigInteger),
    Column("balance_after", BigInteger),
    _json("result_urls"),
    _json("output"),
    _json("error"),
    _json("confirmation"),
    Column("job_id", Text),
    Column("sequence", BigInteger),
    Column("traceparent", Text),
    UniqueConstraint("task_id", "key", name="task_events_key"),
    comment="A task's history (contract §6): seq is 1, 2, 3 … without a gap, key the workflow's name of the fact.",
)

task_inputs = Table(
    "task_inputs",
    metadata,
    _task_id(),
    _json("document"),
    Column("sealed", LargeBinary),
    comment="What was asked for (contract §6); sealed: encrypted, where encryption keys are set.",
)

training_log = Table(
    "training_log",
    metadata,
    _task_id(),
    Column("position", BigInteger, primary_key=True, autoincrement=False),
    Column("training_id", Text, nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("line", Integer, nullable=False),
    _instant("ts"),
    Column("level", Text, nullable=False),
    Column("message", Text, nullable=False),
    _json("metrics"),
    UniqueConstraint("task_id", "training_id", "sequence", "line", name="training_log_line"),
    comment="Lines of callbacks in order of arrival; line 0 of a sequence holds its metrics.",
)

task_exceptions = Table(
    "task_exceptions",
    metadata,
    _task_id(),
    Column("key", Text, primary_key=True),
    Column("code", Text, nullable=False),
    Column("message", Text, nullable=False),
    Column("details", JSONB, nullable=False),
    _instant("ts"),
    Index("task_exceptions_by_code", "code", "ts"),
    comment="What ops should look at (contract §4, §6).",
)

store_home = Table(
    "store_home",
    metadata,
    Column("only_one", Boolean, primary_key=True),
    Column("namespace", Text, nullable=False),
    Column("namespace_id", Text),
    Column("bound_at", DateTime(timezone=True), nullable=False, server_default=text("now()")),
    CheckConstraint("only_one", name="store_home_has_one_row"),
    comment="The Temporal namespace that the tasks of this store run in.",
)

unseen_tasks = Table(
    "unseen_tasks",
    metadata,
    _task_id(),
    Column("reason", Text, nullable=False),
    Column("first_at", DateTime(timezone=True), nullable=False, server_default=text("now()")),
    Column("last_at", DateTime(timezone=True), nullable=False, server_default=text("now()")),
    Column("times", Integer, nullable=False, server_default=text("1")),
    comment="Open tasks that the reconciler could not look at the last time it tried.",
)

tenant_starts = Table(
    "tenant_starts",
    metadata,
    Column("tenant_id", Text, primary_key=True),
    Column("task_id", Text, primary_key=True),
    Column("at", DateTime(timezone=True), nullable=False, server_default=text("now()")),
    Column("bytes", BigInteger, nullable=False),
    comment="The starts of the last minute, for the limits of each tenant (contract §7).",
)

tenant_streams = Table(
    "tenant_streams",
    metadata,
    Column("tenant_id", Text, primary_key=True),
    Column("process_id", Text, primary_key=True),
    Column("open", Integer, nullable=False),
    Column("reported_at", DateTime(timezone=True), nullable=False, server_default=text("now()")),
    comment="The open streams of each gateway process, for the limits of each tenant (contract §7).",
)

uploads = Table(
    "uploads",
    metadata,
    Column("upload_id", Text, primary_key=True),
    Column("tenant_id", Text, nullable=False),
    Column("user_id", Text, nullable=False),
    Column("declared", Text),
    Column("kind", Text),
    Column("content_type", Text),
    Column("size_bytes", BigInteger, nullable=False),
    Column("received_bytes", BigInteger, nullable=False),
    _texts("parts"),
    Column("sha256", Text),
    Column("metadata", Text, nullable=False),
    _instant("created_at"),
    _instant("expires_at"),
    _instant("whole_at", nullable=True),
    Index("uploads_of_tenant", "tenant_id"),
    Index("uploads_by_expiry", "expires_at"),
    Index("uploads_by_age", "created_at"),
    comment="Files that callers send for their tasks (contract §6); parts: what of them is in object storage.",
)

audit_log = Table(
    "audit_log",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("at", DateTime(timezone=True), nullable=False, server_default=text("now()")),
    Column("operation", Text, nullable=False),
    Column("status", Integer, nullable=False),
    Column("code", Text),
    Column("tenant_id", Text, nullable=False),
    Column("user_id", Text, nullable=False),
    Column("token_id", Text, nullable=False),
    Column("task_id", Text),
    Index("audit_log_by_time", "at"),
    comment="Who did what, or was refused (contract §7). A trigger keeps it append-only.",
)
