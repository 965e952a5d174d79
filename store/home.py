"""Which Temporal namespace a store belongs to. In any other namespace all its tasks would look vanished."""

from __future__ import annotations

from typing import Final

from sqlalchemy import func, literal, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from comfyui_temporal.contracts.fields import OwnModel
from store.tables import store_home


class StoreHome(OwnModel):
    """A Temporal namespace. `namespace_id` is the server's own id of it; None if it is not known.

    Two servers may both have a namespace `default`; their ids differ.
    """

    namespace: str
    namespace_id: str | None = None

    def is_same(self, other: StoreHome) -> bool:
        """By name, and by id if both are known."""
        ids = {self.namespace_id, other.namespace_id} - {None}
        return self.namespace == other.namespace and len(ids) < 2

    def __str__(self) -> str:
        return f"{self.namespace!r}" + (f" (id {self.namespace_id})" if self.namespace_id else "")


_READ: Final = select(store_home.c.namespace, store_home.c.namespace_id)


async def home(connection: AsyncConnection) -> StoreHome | None:
    row = (await connection.execute(_READ)).one_or_none()
    return None if row is None else StoreHome.model_validate(dict(row._mapping))


async def bind(connection: AsyncConnection, wanted: StoreHome) -> StoreHome:
    """Bind a store that is not bound yet. Returns the binding that it has now, which may be another one."""
    await connection.execute(_inserted(wanted).on_conflict_do_nothing())
    if wanted.namespace_id is not None:
        # It was bound by name alone: the first process that runs in this namespace adds its id.
        await connection.execute(
            update(store_home)
            .where(store_home.c.namespace == wanted.namespace, store_home.c.namespace_id.is_(None))
            .values(namespace_id=wanted.namespace_id)
        )
    bound = await home(connection)
    assert bound is not None
    return bound


async def rebind(connection: AsyncConnection, wanted: StoreHome) -> None:
    """Bind the store, even if it was bound before."""
    row = _inserted(wanted)
    values = {name: row.excluded[name] for name in ("namespace", "namespace_id", "bound_at")}
    await connection.execute(row.on_conflict_do_update(index_elements=["only_one"], set_=values))


def _inserted(wanted: StoreHome):  # type: ignore[no-untyped-def]
    return insert(store_home).values(only_one=literal(True), bound_at=func.now(), **wanted.model_dump())
