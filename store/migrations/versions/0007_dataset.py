"""What a training trains on: the address, checksum and counts of its list of files.

Revision ID: 0007
Revises: 0006
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("tasks", sa.Column("dataset", postgresql.JSONB(), nullable=True))


def downgrade() -> None:
    op.drop_column("tasks", "dataset")
