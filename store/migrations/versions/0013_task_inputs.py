"""What was asked for with each task.

Revision ID: 0013
Revises: 0012
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "task_inputs",
        sa.Column("task_id", sa.Text(), sa.ForeignKey("tasks.task_id", ondelete="CASCADE"), primary_key=True),
        sa.Column("document", JSONB(none_as_null=True)),
        sa.Column("sealed", sa.LargeBinary()),
        comment="What was asked for (contract §6); sealed: encrypted, where encryption keys are set.",
    )


def downgrade() -> None:
    op.drop_table("task_inputs")
