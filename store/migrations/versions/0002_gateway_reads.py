"""Indexes of what the gateway reads: lists by scene, what has ended, what is queued.

Revision ID: 0002
Revises: 0001
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

NEWEST_FIRST = (sa.text("created_at DESC"), sa.text("task_id DESC"))


def upgrade() -> None:
    op.create_index("tasks_of_tenant_by_scene", "tasks", ["tenant_id", "scene", *NEWEST_FIRST])
    op.create_index("tasks_of_tenant_by_scene_and_status", "tasks", ["tenant_id", "scene", "status", *NEWEST_FIRST])
    op.create_index("tasks_by_end", "tasks", ["ended_at"], postgresql_where=sa.text("ended_at IS NOT NULL"))
    op.create_index("tasks_queued", "tasks", ["priority"], postgresql_where=sa.text("status = 'queued'"))


def downgrade() -> None:
    for index in ("tasks_queued", "tasks_by_end", "tasks_of_tenant_by_scene_and_status", "tasks_of_tenant_by_scene"):
        op.drop_index(index, "tasks")
