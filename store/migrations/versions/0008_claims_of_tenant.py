"""Index of a tenant's claims, for its deletion.

Revision ID: 0008
Revises: 0007
"""

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("task_claims_of_tenant", "task_claims", ["tenant_id"])


def downgrade() -> None:
    op.drop_index("task_claims_of_tenant", "task_claims")
