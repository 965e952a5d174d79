"""Which run of a task acts, how often it was reset, and every hold and job of all of its runs.

Revision ID: 0004
Revises: 0003
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

LISTS = ("earlier_run_ids", "hold_ids", "job_ids")
COLUMNS = ("run_id", "run_number", "lives", "life_began_at", "given_back_by", *LISTS)


def upgrade() -> None:
    op.add_column("tasks", sa.Column("run_id", sa.Text(), nullable=True))
    op.add_column("tasks", sa.Column("run_number", sa.Integer(), server_default=sa.text("0"), nullable=False))
    op.add_column("tasks", sa.Column("lives", sa.Integer(), server_default=sa.text("0"), nullable=False))
    op.add_column("tasks", sa.Column("life_began_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("tasks", sa.Column("given_back_by", sa.Text(), nullable=True))
    for name in LISTS:
        op.add_column("tasks", sa.Column(name, ARRAY(sa.Text()), server_default=sa.text("'{}'::text[]"), nullable=False))


def downgrade() -> None:
    for name in reversed(COLUMNS):
        op.drop_column("tasks", name)
