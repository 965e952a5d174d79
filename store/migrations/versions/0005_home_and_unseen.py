"""Which Temporal namespace the store belongs to, and open tasks whose run could not be checked.

Revision ID: 0005
Revises: 0004
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "store_home",
        sa.Column("only_one", sa.Boolean(), nullable=False),
        sa.Column("namespace", sa.Text(), nullable=False),
        sa.Column("namespace_id", sa.Text(), nullable=True),
        sa.Column("bound_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("only_one", name="store_home_has_one_row"),
        sa.PrimaryKeyConstraint("only_one"),
        comment="The Temporal namespace that the tasks of this store run in.",
    )
    op.create_table(
        "unseen_tasks",
        sa.Column("task_id", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("first_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("last_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("times", sa.Integer(), server_default=sa.text("1"), nullable=False),
        sa.ForeignKeyConstraint(["task_id"], ["tasks.task_id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("task_id"),
        comment="Open tasks that the reconciler could not look at the last time it tried.",
    )


def downgrade() -> None:
    op.drop_table("unseen_tasks")
    op.drop_table("store_home")
