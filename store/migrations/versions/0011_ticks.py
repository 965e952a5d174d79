"""What a tick is compared with, and the newest event's time.

Revision ID: 0011
Revises: 0010
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("tasks", sa.Column("taken", JSONB(none_as_null=True)))
    op.add_column("tasks", sa.Column("ticked_at", sa.DateTime(timezone=True)))
    op.add_column("tasks", sa.Column("last_event_at", sa.DateTime(timezone=True)))


def downgrade() -> None:
    op.drop_column("tasks", "last_event_at")
    op.drop_column("tasks", "ticked_at")
    op.drop_column("tasks", "taken")
