"""The task store's first tables.

Revision ID: 0001
Revises:
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "task_claims",
        sa.Column("task_id", sa.Text(), nullable=False),
        sa.Column("first_execution_run_id", sa.Text(), nullable=False),
        sa.Column("workflow_id", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("input_sha256", sa.Text(), nullable=False),
        sa.Column("claimed_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("task_id"),
        comment="Who holds a task id (contract §8); outlives the task's row.",
    )
    op.create_table(
        "tasks",
        sa.Column("task_id", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("user_id", sa.Text(), nullable=False),
        sa.Column("scene", sa.Text(), nullable=False),
        sa.Column("template_id", sa.Text(), nullable=False),
        sa.Column("priority", sa.Text(), nullable=False),
        sa.Column("resolution", sa.Text(), nullable=False),
        sa.Column("workflow_id", sa.Text(), nullable=False),
        sa.Column("first_execution_run_id", sa.Text(), nullable=False),
        sa.Column("input_sha256", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("last_seq", sa.BigInteger(), nullable=False),
        sa.Column("last_log_position", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("job_sequences", JSONB(), server_default=sa.text("'{}'::jsonb"), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("stage", sa.Text(), nullable=True),
        sa.Column("progress", sa.Double(), nullable=False),
        sa.Column("next_eta", sa.DateTime(timezone=True), nullable=True),
        sa.Column("estimated_time", sa.Double(), nullable=True),
        sa.Column("gpu_slots", sa.Integer(), nullable=True),
        sa.Column("queue_position", sa.BigInteger(), nullable=True),
        sa.Column("job_id", sa.Text(), nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("credits", JSONB(), nullable=False),
        sa.Column("prices", JSONB(), nullable=False),
        sa.Column("confirmation", JSONB(), nullable=True),
        sa.Column("result_urls", JSONB(), nullable=False),
        sa.Column("output", JSONB(), nullable=True),
        sa.Column("error", JSONB(), nullable=True),
        sa.ForeignKeyConstraint(["task_id"], ["task_claims.task_id"]),
        sa.PrimaryKeyConstraint("task_id"),
        comment="One row a task; job_sequences: the newest sequence written of each job.",
    )
    op.create_index("tasks_by_time", "tasks", [sa.text("created_at DESC"), sa.text("task_id DESC")], unique=False)
    op.create_index(
        "tasks_of_tenant", "tasks", ["tenant_id", sa.text("created_at DESC"), sa.text("task_id DESC")], unique=False
    )
    op.create_index(
        "tasks_of_tenant_by_status",
        "tasks",
        ["tenant_id", "status", sa.text("created_at DESC"), sa.text("task_id DESC")],
        unique=False,
    )
    op.create_table(
        "task_events",
        sa.Column("task_id", sa.Text(), nullable=False),
        sa.Column("seq", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("event", sa.Text(), nullable=False),
        sa.Column("ts", sa.DateTime(timezone=True), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("stage", sa.Text(), nullable=True),
        sa.Column("progress", sa.Double(), nullable=True),
        sa.Column("next_eta", sa.DateTime(timezone=True), nullable=True),
        sa.Column("queue_position", sa.BigInteger(), nullable=True),
        sa.Column("message", sa.Text(), nullable=True),
        sa.Column("credits_delta", sa.BigInteger(), nullable=True),
        sa.Column("balance_after", sa.BigInteger(), nullable=True),
        sa.Column("result_urls", JSONB(), nullable=True),
        sa.Column("output", JSONB(), nullable=True),
        sa.Column("error", JSONB(), nullable=True),
        sa.Column("confirmation", JSONB(), nullable=True),
        sa.Column("job_id", sa.Text(), nullable=True),
        sa.Column("sequence", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(["task_id"], ["tasks.task_id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("task_id", "seq"),
        sa.UniqueConstraint("task_id", "key", name="task_events_key"),
        comment="A task's history (contract §6): seq is 1, 2, 3 … without a gap, key the workflow's name of the fact.",
    )
    op.create_table(
        "task_exceptions",
        sa.Column("task_id", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("code", sa.Text(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("details", JSONB(), nullable=False),
        sa.Column("ts", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["task_id"], ["tasks.task_id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("task_id", "key"),
        comment="What ops should look at (contract §4, §6).",
    )
    op.create_index("task_exceptions_by_code", "task_exceptions", ["code", "ts"], unique=False)
    op.create_table(
        "training_log",
        sa.Column("task_id", sa.Text(), nullable=False),
        sa.Column("position", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("training_id", sa.Text(), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("line", sa.Integer(), nullable=False),
        sa.Column("ts", sa.DateTime(timezone=True), nullable=False),
        sa.Column("level", sa.Text(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("metrics", JSONB(), nullable=True),
        sa.ForeignKeyConstraint(["task_id"], ["tasks.task_id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("task_id", "position"),
        sa.UniqueConstraint("task_id", "training_id", "sequence", "line", name="training_log_line"),
        comment="Lines of callbacks in order of arrival; line 0 of a sequence holds its metrics.",
    )


def downgrade() -> None:
    for table in ("training_log", "task_exceptions", "task_events", "tasks", "task_claims"):
        op.drop_table(table)
