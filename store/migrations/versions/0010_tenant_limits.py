"""Counts for the limits of each tenant.

Revision ID: 0010
Revises: 0009
"""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "tenant_starts",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("task_id", sa.Text(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "task_id"),
        comment="The starts of the last minute, for the limits of each tenant (contract §7).",
    )
    op.create_table(
        "tenant_streams",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("process_id", sa.Text(), nullable=False),
        sa.Column("open", sa.Integer(), nullable=False),
        sa.Column("reported_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "process_id"),
        comment="The open streams of each gateway process, for the limits of each tenant (contract §7).",
    )
    op.create_index(
        "tasks_open_of_tenant", "tasks", ["tenant_id"], postgresql_where=sa.text("ended_at IS NULL")
    )


def downgrade() -> None:
    op.drop_index("tasks_open_of_tenant", "tasks")
    op.drop_table("tenant_streams")
    op.drop_table("tenant_starts")
