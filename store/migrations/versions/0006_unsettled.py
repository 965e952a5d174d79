"""Which ended tasks have an unknown settlement, and when their ledger was last checked.

Revision ID: 0006
Revises: 0005
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("tasks", sa.Column("settlement_looked_at", sa.DateTime(timezone=True), nullable=True))
    op.create_index(
        "tasks_unsettled",
        "tasks",
        ["ended_at"],
        postgresql_where=sa.text("credits ->> 'settlement' = 'unknown' AND ended_at IS NOT NULL"),
    )


def downgrade() -> None:
    op.drop_index("tasks_unsettled", "tasks")
    op.drop_column("tasks", "settlement_looked_at")
