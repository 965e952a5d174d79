"""Deletion: of tasks that ended long ago, of results and models, of a tenant. What was not meant stays."""

from __future__ import annotations

import asyncio
import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from pydantic import ValidationError
from temporalio.client import Client
from temporalio.common import SearchAttributeKey, SearchAttributePair, TypedSearchAttributes
from temporalio.testing import WorkflowEnvironment

from comfyui_temporal.contracts.comfyui import TaskPriority, TrainingLogLine
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.task_store import TrainingLogWrite
from comfyui_temporal.contracts.tasks import TaskStatus
from comfyui_temporal.contracts.tenant_limits import NO_LIMITS
from runtime.settings import Settings
from store import NotTheClaimant, StoredUpload, TaskStore
from store.__main__ import _purge
from store.upkeep import LINES_AT_ONCE
from store.uploads import DELETED_AT_ONCE, UploadRows
from tests.conftest import NewDatabase, unique
from tests.store.facts import claim_of, end, fact, new_task_id, write_of
from tests.waiting import until


async def command(*arguments: str, **settings: str) -> tuple[int | None, str]:
    """Exit code and output of `python -m store`."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "store", *arguments),
        env={**os.environ, **{f"COMFYUI_TEMPORAL_{name}": value for name, value in settings.items()}},
        cwd=Path(__file__).parents[2],
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode, output.decode()


async def ended_task(store: TaskStore, tenant_id: str, **state: Any) -> str:
    task_id = new_task_id()
    await store.claim(claim_of(task_id, tenant_id=tenant_id))
    await store.write(write_of(task_id, fact("a"), end(), status=TaskStatus.COMPLETED, **state))
    return task_id


def write_files(folder: Path, *paths: str, age: timedelta = timedelta(0)) -> None:
    at = (datetime.now(UTC) - age).timestamp()
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"x")
        os.utime(folder / path, (at, at))


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


async def test_the_command_purges_what_ended_before_the_retention_and_the_claims_stay(
    new_database: NewDatabase,
) -> None:
    dsn = await new_database()
    store = TaskStore(dsn)
    now = datetime.now(UTC)
    old, young, still_open = (new_task_id() for _ in range(3))
    for task_id, at in ((old, now - timedelta(days=31)), (young, now - timedelta(days=29))):
        await store.claim(claim_of(task_id))
        await store.write(write_of(task_id, fact("a"), end(ts=at), status=TaskStatus.COMPLETED))
    await store.claim(claim_of(still_open, at=now - timedelta(days=100)))
    lines = [TrainingLogLine(ts=now, level="info", message="x")] * 3_000
    await store.note_made(old, "job", "t")
    for sequence in range(2):
        await store.write_log(old, [TrainingLogWrite(task_id=old, training_id="t", sequence=sequence, lines=lines)])
    assert LINES_AT_ONCE < 6_000

    code, output = await command("purge", DATABASE_DSN=dsn, RETENTION_DAYS="30")

    assert code == 0
    assert output.startswith("1 tasks")
    assert await store.task(old) is None
    assert await store.events(old) == [] and await store.training_log(old) == []
    assert await store.is_claimed(old)
    assert await store.claimed_input(old) == "0" * 64
    assert not await store.claim(claim_of(old, run_id="another-run"))
    assert await store.task(young) is not None and await store.task(still_open) is not None
    await store.close()


def test_nothing_is_purged_before_30_days() -> None:
    with pytest.raises(ValidationError, match="retention_days"):
        Settings(_env_file=None, retention_days=29)


async def test_the_queues_are_reported_by_priority(new_database: NewDatabase) -> None:
    store = TaskStore(await new_database())
    ago = datetime.now(UTC) - timedelta(minutes=10)
    for _ in range(2):
        await store.claim(claim_of(new_task_id(), priority=TaskPriority.ACCELERATED, at=ago))
    running = new_task_id()
    await store.claim(claim_of(running))
    await store.write(write_of(running, fact("a")))

    states = {state.priority: state for state in await store.queue_states()}

    assert states[TaskPriority.ACCELERATED].queued == 2
    assert 600 <= states[TaskPriority.ACCELERATED].oldest_seconds < 660
    assert (states[TaskPriority.STANDARD].queued, states[TaskPriority.STANDARD].oldest_seconds) == (0, 0.0)
    await store.close()


async def test_a_purge_deletes_results_with_their_task_and_older_models_only_by_setting(
    new_database: NewDatabase, tmp_path: Path
) -> None:
    dsn = await new_database()
    store = TaskStore(dsn)
    old = await ended_task(store, "tenant-a", job_id="job-1", attempts=1)
    await store.note_made(old, "job", "training-0")
    still_open = new_task_id()
    await store.claim(claim_of(still_open))
    await store.note_made(still_open, "job", "job-2")
    of_old = {
        "results/job-1/1/a.png",
        "controls/job-1/0",
        "datasets/training-0/list.json",
        f"snapshots/{old}/set/a.png",
    }
    model, checkpoint = "models/tenant-a/training-0.safetensors", "checkpoints/tenant-a/training-0/1.safetensors"
    of_open = {"results/job-2/a.png", f"snapshots/{still_open}/set/a.png"}
    write_files(tmp_path, *of_old, *of_open)
    write_files(tmp_path, model, checkpoint, age=timedelta(days=31))
    write_files(tmp_path, "results/job-3/a.png", age=timedelta(days=8))
    fetched = "fetched-models/tenant-a/2026-W40/{}.safetensors"
    write_files(tmp_path, fetched.format("old"), age=timedelta(days=31))
    write_files(tmp_path, fetched.format("new"), age=timedelta(days=29))
    of_open.add(fetched.format("new"))
    stores = {"BRIDGE_STORE_URL": tmp_path.as_uri(), "OBJECT_STORE_URL": tmp_path.as_uri()}

    code, output = await command("purge", DATABASE_DSN=dsn, **stores)
    assert (code, files_in(tmp_path)) == (0, {*of_open, model, checkpoint, "results/job-3/a.png"}), output

    code, output = await command(
        "purge", DATABASE_DSN=dsn, RESULT_RETENTION_DAYS="7", MODEL_RETENTION_DAYS="30", **stores
    )
    assert (code, files_in(tmp_path)) == (0, of_open), output
    await store.close()


def upload_of(tenant_id: str, *, ago: timedelta, upload_id: str | None = None) -> StoredUpload:
    """One that was kept for an hour, so long ago."""
    began = datetime.now(UTC) - ago
    return StoredUpload(
        upload_id=upload_id or unique("upload"),
        tenant_id=tenant_id,
        user_id="user-a",
        size_bytes=1,
        created_at=began,
        expires_at=began + timedelta(hours=1),
    )


async def test_a_purge_deletes_uploads_a_day_after_they_expired_and_what_no_row_names(
    new_database: NewDatabase, tmp_path: Path
) -> None:
    dsn = await new_database()
    store, hours = TaskStore(dsn), timedelta(hours=1)
    old, expired = upload_of("tenant-a", ago=26 * hours), upload_of("tenant-a", ago=24 * hours)
    for upload in (old, expired):
        await store.uploads.admit(upload, NO_LIMITS)
    write_files(tmp_path, f"tenant-a/{old.upload_id}", f"tenant-a/{old.upload_id}.parts/0-1-x")
    write_files(tmp_path, f"tenant-a/{expired.upload_id}", f"tenant-a/{expired.upload_id}.parts/0-1-y", age=23 * hours)
    write_files(tmp_path, "tenant-b/orphan", "tenant-b/orphan.parts/0-1-z", age=26 * hours)
    others = {"results/job/1/a.png", "orphan", "tenant-b/orphan.tar", "tenant-b/orphan.parts/a/b"}
    write_files(tmp_path, *others, age=26 * hours)
    kept = {f"tenant-a/{expired.upload_id}", f"tenant-a/{expired.upload_id}.parts/0-1-y", *others}

    code, output = await command("purge", DATABASE_DSN=dsn, UPLOADS_URL=tmp_path.as_uri(), **stores_beside(tmp_path))

    assert (code, files_in(tmp_path)) == (0, kept), output
    assert "1 uploads that had expired were deleted, and 4 files of uploads" in output
    assert [each.upload_id for each in await store.uploads.of_tenant("tenant-a")] == [expired.upload_id]
    await store.close()


async def test_an_upload_that_is_kept_longer_while_a_purge_runs_stays(
    new_database: NewDatabase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repeat of its order keeps it and writes its file again, after the purge had found it."""
    dsn = await new_database()
    store, hours = TaskStore(dsn), timedelta(hours=1)
    repeated, old = upload_of("tenant-a", ago=26 * hours), upload_of("tenant-a", ago=26 * hours)
    for upload in (repeated, old):
        await store.uploads.admit(upload, NO_LIMITS)
        write_files(tmp_path, f"tenant-a/{upload.upload_id}", age=26 * hours)
    find = UploadRows.expired

    async def found_before_the_repeat(rows: UploadRows, *args: Any, **since: Any) -> list[StoredUpload]:
        found = await find(rows, *args, **since)
        if found:
            later = repeated.model_copy(update={"expires_at": datetime.now(UTC) + hours})
            await store.uploads.admit(later, NO_LIMITS)
            write_files(tmp_path, f"tenant-a/{repeated.upload_id}")
        return found

    monkeypatch.setattr(UploadRows, "expired", found_before_the_repeat)
    stores: dict[str, Any] = {name.lower(): url for name, url in stores_beside(tmp_path).items()}
    await _purge(Settings(_env_file=None, uploads_url=tmp_path.as_uri(), **stores), dsn)

    assert files_in(tmp_path) == {f"tenant-a/{repeated.upload_id}"}
    assert [each.upload_id for each in await store.uploads.of_tenant("tenant-a")] == [repeated.upload_id]
    await store.close()


def stores_beside(uploads: Path) -> dict[str, str]:
    """The other stores, empty."""
    return {f"{name}_STORE_URL": uploads.with_name(f"{uploads.name}-{name}").as_uri() for name in ("BRIDGE", "OBJECT")}


async def test_an_upload_that_an_open_task_may_name_outlives_its_time_and_no_other_waits_for_it(
    new_database: NewDatabase, tmp_path: Path
) -> None:
    """A task waits in a queue for as long as it takes, and fetches its files for each attempt."""
    dsn = await new_database()
    store, hours = TaskStore(dsn), timedelta(hours=1)
    named = [upload_of("tenant-a", ago=90 * hours, upload_id=f"named-{n:02}") for n in range(DELETED_AT_ONCE + 1)]
    begun_later, of_other = upload_of("tenant-a", ago=80 * hours), upload_of("tenant-b", ago=90 * hours)
    for upload in (*named, begun_later, of_other):
        await store.uploads.admit(upload, NO_LIMITS)
        write_files(tmp_path, f"{upload.tenant_id}/{upload.upload_id}", age=90 * hours)
    waits, began = new_task_id(), datetime.now(UTC) - 89.5 * hours
    await store.claim(claim_of(waits, tenant_id="tenant-a", at=began))
    training = claim_of(new_task_id(), tenant_id="tenant-b", at=began)
    await store.claim(training.model_copy(update={"scene": Scene.MODEL_TRAIN}))

    async def purged() -> set[str]:
        code, output = await command(
            "purge", DATABASE_DSN=dsn, UPLOADS_URL=tmp_path.as_uri(), **stores_beside(tmp_path)
        )
        assert code == 0, output
        return files_in(tmp_path)

    assert await purged() == {f"tenant-a/{upload.upload_id}" for upload in named}
    await store.write(write_of(waits, fact("a"), end(), status=TaskStatus.COMPLETED))
    assert await purged() == set()
    assert await store.uploads.of_tenant("tenant-a") == []
    await store.close()


async def test_what_killed_processes_left_on_a_disk_is_deleted_a_day_later(
    new_database: NewDatabase, tmp_path: Path
) -> None:
    """Storage on a disk writes beside an object's place, under a name that it never lists."""
    dsn, age = await new_database(), timedelta(hours=25)
    old = {
        *("uploads/tenant-a/film#1", "uploads/tenant-a/film.parts/0-1-x#12", "bridge/results/job-1/1/a.png#1"),
        *("bridge/models/tenant-a/t.safetensors#1", "bridge/checkpoints/tenant-a/t/1#2", "bridge/controls/job-1/0#1"),
        *("bridge/fetched-models/tenant-a/w/m#1", "bridge/datasets/t/list.json#1", "objects/snapshots/t/set/a.png#1"),
    }
    kept = {"uploads/tenant-a/new#1", "bridge/results/job-2/a.png#1"}
    others = {"uploads/deep/er/a#1", "bridge/other/a#1", "objects/other/a#1", "bridge/results/job-1/issue#one"}
    write_files(tmp_path, *old, *others, age=age)
    write_files(tmp_path, *kept)
    places = {"UPLOADS_URL": "uploads", "BRIDGE_STORE_URL": "bridge", "OBJECT_STORE_URL": "objects"}

    code, output = await command(
        "purge", DATABASE_DSN=dsn, **{name: (tmp_path / folder).as_uri() for name, folder in places.items()}
    )

    assert (code, files_in(tmp_path)) == (0, kept | others), output
    assert f"and {len(old)} files" in output
    assert not (tmp_path / "bridge" / "checkpoints" / "tenant-a").exists()


@pytest.mark.parametrize("setting", ["BRIDGE_STORE_URL", "OBJECT_STORE_URL", "DATASET_ROOTS", "BRIDGE_IMAGE_ROOTS"])
@pytest.mark.parametrize(
    ("uploads", "other", "is_refused"),
    [
        ("s3://bucket", "s3://bucket", True),
        ("s3://bucket/", "s3://bucket/other", True),
        ("s3://bucket/uploads", "s3://bucket/uploads%2Fbelow", True),
        ("file:///data", "file:///data/x/../bridge", True),
        ("s3://bucket/up", "s3://bucket/uploads", False),
        ("s3://bucket/uploads", "s3://other/uploads", False),
        ("s3://bucket/uploads", "gs://bucket/uploads", False),
    ],
)
def test_uploads_that_share_their_place_are_refused_by_both_settings(
    setting: str, uploads: str, other: str, is_refused: bool
) -> None:
    """One bucket for everything is what people write first. Its first purge deleted every result and model."""
    is_root = "ROOTS" in setting
    given: dict[str, Any] = {setting.lower(): [f"{other}/{{tenant_id}}/"] if is_root else other}
    if is_refused:
        with pytest.raises(ValidationError, match=f"uploads_url and {setting.lower()} must be different places"):
            Settings(_env_file=None, uploads_url=uploads, **given)
    else:
        Settings(_env_file=None, uploads_url=uploads, **given)
    if is_refused and not is_root:
        given = {"uploads_url": other, setting.lower(): uploads}
        with pytest.raises(ValidationError, match="must be different places"):
            Settings(_env_file=None, **given)


async def test_rows_stay_while_the_files_that_they_name_cannot_be_deleted(
    new_database: NewDatabase, tmp_path: Path
) -> None:
    dsn = await new_database()
    store = TaskStore(dsn)
    task_id = await ended_task(store, "tenant-a", job_id="job-1", attempts=1)
    nowhere = {"AWS_ENDPOINT_URL": "http://127.0.0.1:1", "AWS_ALLOW_HTTP": "true", "AWS_ACCESS_KEY_ID": "k"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**nowhere, "AWS_SECRET_ACCESS_KEY": "s", "AWS_REGION": "r"}.items():
            patch.setenv(name, value)
        code, output = await command("forget", "tenant-a", DATABASE_DSN=dsn, BRIDGE_STORE_URL="s3://bucket/bridge")
    assert code == 1 and "s3://bucket/bridge cannot be used" in output
    assert await store.task(task_id) is not None
    await store.close()


async def test_a_tenant_is_forgotten_and_no_other_and_its_ids_stay_taken(
    new_database: NewDatabase, tmp_path: Path, temporal_env: WorkflowEnvironment
) -> None:
    dsn = await new_database()
    store, tenant, other = TaskStore(dsn), unique("tenant"), unique("other")
    gone, purged, kept = [
        await ended_task(store, tenant_id, job_id=f"job-{number}", attempts=1)
        for number, tenant_id in enumerate((tenant, tenant, other))
    ]
    assert await store.delete_tasks([purged])
    line = TrainingLogLine(ts=datetime.now(UTC), level="info", message="x")
    await store.note_made(gone, "job", "t")
    await store.write_log(gone, [TrainingLogWrite(task_id=gone, training_id="t", sequence=1, lines=[line])])
    of_other = {f"models/{other}/t.safetensors", "results/job-2/a.png", f"snapshots/{kept}/set/a.png"}
    write_files(
        tmp_path, *of_other, f"models/{tenant}/t.safetensors", f"checkpoints/{tenant}/t/1", "results/job-0/a.png"
    )
    leftovers = [f"models/{tenant}/u#1", f"checkpoints/{tenant}/u/1#1", f"fetched-models/{tenant}/w/m#1"]
    leftovers += [f"snapshots/{gone}/set/a.png#1", "results/job-0/b.png#3", "controls/job-0/0#1", "datasets/t/a#1"]
    write_files(tmp_path, *leftovers)
    client, uploads = temporal_env.client, tmp_path.with_name(f"{tmp_path.name}-uploads")
    await client.start_workflow(
        "None",
        id=unique("run"),
        task_queue=unique("queue"),
        search_attributes=TypedSearchAttributes(
            [SearchAttributePair(SearchAttributeKey.for_keyword("TenantId"), tenant)]
        ),
    )
    await until(lambda: is_counted(client, tenant), within_seconds=30)
    settings = {
        "DATABASE_DSN": dsn,
        "TEMPORAL_ADDRESS": client.service_client.config.target_host,
        "BRIDGE_STORE_URL": tmp_path.as_uri(),
        "OBJECT_STORE_URL": tmp_path.as_uri(),
        "UPLOADS_URL": uploads.as_uri(),
    }
    sent, others = (upload_of(name, ago=timedelta(0)) for name in (tenant, other))
    for upload in (sent, others):
        await store.uploads.admit(upload, NO_LIMITS)
        write_files(uploads, f"{upload.tenant_id}/{upload.upload_id}")
    write_files(uploads, f"{tenant}/{sent.upload_id}.parts/0-1-x", f"{tenant}/orphan", f"{tenant}/orphan.parts/1#1")

    code, output = await command("forget", tenant, **settings)

    assert code == 0, output
    assert "1 tasks and 14 files were deleted" in output
    assert "still holds 1 runs of the tenant" in output and "days after its end" in output
    assert f"temporal workflow delete --namespace default --query 'TenantId = \"{tenant}\"'" in output
    assert await store.task(gone) is None and await store.events(gone) == [] and await store.training_log(gone) == []
    assert files_in(tmp_path) == of_other
    assert files_in(uploads) == {f"{other}/{others.upload_id}"}
    assert not [folder for root in (tmp_path, uploads) for folder in root.rglob(tenant)]
    assert await store.task(kept) is not None and await store.claimed_input(kept) == "0" * 64
    connection = await asyncpg.connect(dsn)
    for table in ("tasks", "task_claims", "uploads"):
        assert await connection.fetchval(f"SELECT count(*) FROM {table} WHERE tenant_id = $1", tenant) == 0
    await connection.close()
    for task_id in (gone, purged):
        assert await store.is_claimed(task_id)
        assert not await store.claim(claim_of(task_id))
        with pytest.raises(NotTheClaimant):
            late = write_of(task_id, fact("late"))
            await store.write(late.model_copy(update={"claim": claim_of(task_id)}))
    assert (await command("forget", tenant, **settings))[0] == 0
    await store.close()


async def is_counted(client: Client, tenant_id: str) -> bool:
    return (await client.count_workflows(f'TenantId = "{tenant_id}"')).count == 1


async def test_a_tenant_with_an_open_task_is_not_forgotten(new_database: NewDatabase) -> None:
    dsn = await new_database()
    store = TaskStore(dsn)
    ended, still_open = await ended_task(store, "tenant-a"), new_task_id()
    await store.claim(claim_of(still_open))

    code, output = await command("forget", "tenant-a", DATABASE_DSN=dsn)

    assert code == 1
    assert f"has 1 open tasks, which were not deleted ({still_open})" in output and "comfyui-tasks cancel" in output
    assert await store.task(ended) is not None and await store.task(still_open) is not None
    await store.close()


async def test_no_tenants_id_leads_out_of_the_folder_of_tenants() -> None:
    code, output = await command("forget", "../other", DATABASE_DSN="postgresql://nobody@127.0.0.1:1/none")
    assert code == 2 and "1 to 64 letters" in output
