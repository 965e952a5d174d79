"""Index of the tasks that have not ended, for the reconciler.

Revision ID: 0003
Revises: 0002
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("tasks_open", "tasks", ["created_at", "task_id"], postgresql_where=sa.text("ended_at IS NULL"))


def downgrade() -> None:
    op.drop_index("tasks_open", "tasks")
