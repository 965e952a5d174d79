"""The trace of each event.

Revision ID: 0012
Revises: 0011
"""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("task_events", sa.Column("traceparent", sa.Text()))


def downgrade() -> None:
    op.drop_column("task_events", "traceparent")
