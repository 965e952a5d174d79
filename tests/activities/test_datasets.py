"""Dataset snapshots: whole, checked, resumed, temporary. Problems of a dataset are reported file by file."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from temporalio import activity
from temporalio.exceptions import ApplicationError
from temporalio.testing import ActivityEnvironment

from activities.datasets import DatasetActivities, DatasetSnapshots
from activities.object_folders import BadAddress, ObjectFolder, read_address
from activities.outside_http import OutsideFailure
from comfyui_temporal.contracts.calls import SnapshotOrder
from comfyui_temporal.contracts.comfyui import DatasetFile, ManifestReference, SnapshotReference
from comfyui_temporal.contracts.errors import FailureCode
from comfyui_temporal.contracts.permissions import Scene
from tests.activities.calls import call_for
from tests.activities.s3_bucket import BUCKET, s3

FILES = {"images/1.png": b"one", "images/2.png": b"two" * 1_000, "captions/1.txt": "ein Löwe".encode()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "datasets" / "tenant-demo" / "cats"
    for path, content in FILES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


@pytest.fixture
def objects(tmp_path: Path) -> Path:
    return tmp_path / "objects"


def order(source: Path | str, *, files: list[str] | None = None, **changes: Any) -> SnapshotOrder:
    uri = source if isinstance(source, str) else source.as_uri()
    given = {"call_for": call_for(scene=Scene.MODEL_TRAIN), "dataset_id": "cats", "source_uri": uri, "files": files}
    return SnapshotOrder(**(given | changes))


ANYWHERE = ("file:///", "s3://bucket/", "gs://bucket/")


def activities(objects: Path, **limits: Any) -> DatasetActivities:
    return DatasetActivities(DatasetSnapshots(objects.as_uri(), **{"dataset_roots": ANYWHERE, **limits}))


EARLIER = datetime(2026, 1, 1, tzinfo=UTC)
LATER = EARLIER + timedelta(hours=1)


def environment(
    *details: Any, began_at: datetime = EARLIER, ordered_at: datetime = EARLIER + timedelta(minutes=1)
) -> ActivityEnvironment:
    """`began_at`: when the attempt began; `ordered_at`: when the activity was scheduled."""
    env = ActivityEnvironment()
    env.info = replace(
        env.info,
        heartbeat_details=list(details),
        start_to_close_timeout=timedelta(hours=1),
        started_time=began_at,
        scheduled_time=ordered_at,
    )
    return env


async def files_of(objects: Path, snapshot: SnapshotReference) -> list[DatasetFile]:
    """The snapshot's list, as a training request will hold it."""
    assert snapshot.files is None, "a run carries a reference"
    return (await DatasetSnapshots(objects.as_uri()).whole(snapshot)).files


async def refused(objects: Path, wanted: SnapshotOrder, **limits: Any) -> str:
    """The sentence of a snapshot that ends `dataset_invalid` without a retry."""
    with pytest.raises(ApplicationError) as raised:
        await environment().run(activities(objects, **limits).snapshot, wanted)
    assert (raised.value.type, raised.value.non_retryable) == ("dataset_invalid", True)
    return raised.value.message


def copied(objects: Path) -> dict[str, bytes]:
    folder = objects / "snapshots" / "task-1" / "cats" / "files"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


async def test_a_snapshot_holds_every_file_with_size_and_checksum(source: Path, objects: Path) -> None:
    snapshot = await environment().run(activities(objects).snapshot, order(source))
    assert copied(objects) == FILES
    assert {file.path: (file.size_bytes, file.sha256) for file in await files_of(objects, snapshot)} == {
        path: (len(content), hashlib.sha256(content).hexdigest()) for path, content in FILES.items()
    }
    assert snapshot.snapshot_uri == (objects / "snapshots/task-1/cats/files").as_uri() + "/"
    [kept] = (objects / "snapshots/task-1/cats").glob("list-*.json")
    sha256 = hashlib.sha256(kept.read_bytes()).hexdigest()
    assert snapshot.manifest == ManifestReference(
        uri=(objects / f"snapshots/task-1/cats/list-{sha256}.json").as_uri(),
        sha256=sha256,
        file_count=len(FILES),
        total_bytes=sum(len(content) for content in FILES.values()),
    )


async def test_a_snapshot_does_not_follow_later_changes_of_its_source(source: Path, objects: Path) -> None:
    first = await environment().run(activities(objects).snapshot, order(source))
    (source / "images/1.png").write_bytes(b"another")
    assert copied(objects) == FILES
    again = await environment().run(activities(objects).snapshot, order(source))
    assert again == first, "an answer that was lost is given again"


async def test_only_the_listed_files_are_copied(source: Path, objects: Path) -> None:
    wanted = order(source, files=["images/2.png", "captions/1.txt", "images/2.png"])
    snapshot = await environment().run(activities(objects).snapshot, wanted)
    assert [file.path for file in await files_of(objects, snapshot)] == ["captions/1.txt", "images/2.png"]
    assert set(copied(objects)) == {"captions/1.txt", "images/2.png"}


async def test_another_order_is_not_answered_with_an_old_manifest(source: Path, objects: Path) -> None:
    await environment().run(activities(objects).snapshot, order(source, files=["images/1.png"]))
    snapshot = await environment().run(activities(objects).snapshot, order(source))
    assert len(await files_of(objects, snapshot)) == 3


@pytest.mark.parametrize(
    "name", ["ä b#c%20?.png", "manifest.json", ".hidden", "a/b/c/d/e.txt", "a+b&c=d.txt", "🦁.png"]
)
async def test_odd_names_are_copied_too(source: Path, objects: Path, name: str) -> None:
    (source / name).parent.mkdir(parents=True, exist_ok=True)
    (source / name).write_bytes(b"odd")
    for files, began_at in ((None, EARLIER), ([name], LATER)):
        snapshot = await environment(began_at=began_at).run(activities(objects).snapshot, order(source, files=files))
        assert name in [file.path for file in await files_of(objects, snapshot)]
        assert copied(objects)[name] == b"odd"
        await environment().run(activities(objects).delete_snapshot, order(source))


async def test_large_files_stream_and_heartbeat(source: Path, objects: Path) -> None:
    content = b"0123456789abcdef" * (24 * 65_536)
    (source / "large.bin").write_bytes(content)
    env, beats = environment(), []
    env.on_heartbeat = lambda *details: beats.append(details)
    snapshot = await env.run(activities(objects).snapshot, order(source))
    large = next(file for file in await files_of(objects, snapshot) if file.path == "large.bin")
    assert (large.size_bytes, large.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert beats[-1][0]["files_total"] == 4


class Interrupted(DatasetSnapshots):
    """Storage that goes away after `writes` files, once."""

    writes: int = 2
    written: list[str]

    async def _copied(self, source: Any, target: Any, item: Any) -> Any:
        if len(self.written) == self.writes:
            self.writes = -1
            raise self._storage_away(OSError("no route to host"))
        file = await super()._copied(source, target, item)
        self.written.append(item.path)
        return file


async def interrupted_once(source: Path, objects: Path) -> tuple[Interrupted, Any]:
    """A snapshot that stopped after two of three files, and the heartbeat that it left."""
    client = Interrupted(objects.as_uri(), dataset_roots=ANYWHERE)
    client.written = []
    env, beats = environment(), []
    env.on_heartbeat = lambda *details: beats.append(details)
    with pytest.raises(ApplicationError) as raised:
        await env.run(DatasetActivities(client).snapshot, order(source))
    assert (raised.value.type, raised.value.non_retryable) == ("internal", False)
    assert "COMFYUI_TEMPORAL_OBJECT_STORE_URL" in raised.value.message
    assert not (objects / "snapshots/task-1/cats/manifest.json").exists()
    return client, beats[-1][0]


async def test_the_next_attempt_goes_on_where_the_last_one_stopped(source: Path, objects: Path) -> None:
    client, left = await interrupted_once(source, objects)
    assert left["files_done"] == 2
    snapshot = await environment(left).run(DatasetActivities(client).snapshot, order(source))
    assert client.written == ["captions/1.txt", "images/1.png", "images/2.png"], "each file was copied once"
    assert copied(objects) == FILES
    assert [file.sha256 for file in await files_of(objects, snapshot)] == [
        hashlib.sha256(FILES[path]).hexdigest() for path in sorted(FILES)
    ]


@pytest.mark.parametrize("damage", [b"onf", b"on", None])
async def test_a_copy_that_was_changed_or_lost_meanwhile_is_not_trusted(
    source: Path, objects: Path, damage: bytes | None
) -> None:
    client, left = await interrupted_once(source, objects)
    victim = objects / "snapshots/task-1/cats/files/images/1.png"
    if damage is None:
        victim.unlink()
    else:
        victim.write_bytes(damage)
    await environment(left).run(DatasetActivities(client).snapshot, order(source))
    assert copied(objects) == FILES


@pytest.mark.parametrize(
    "left", ["text", {"files_done": -1}, {"files_done": 99, "digest": "x"}, None, {"files_done": []}]
)
async def test_an_unreadable_heartbeat_means_a_fresh_start(source: Path, objects: Path, left: Any) -> None:
    await environment(left).run(activities(objects).snapshot, order(source))
    assert copied(objects) == FILES


async def test_the_list_of_a_deleted_snapshot_is_missing_and_not_an_outage(source: Path, objects: Path) -> None:
    """A run that was reset may need it after the task ended. An outage would be retried without end."""
    snapshot = await environment().run(activities(objects).snapshot, order(source))
    await environment().run(activities(objects).delete_snapshot, order(source))
    with pytest.raises(OutsideFailure, match="is missing") as raised:
        await files_of(objects, snapshot)
    assert raised.value.code is FailureCode.DATASET_INVALID


async def test_an_empty_dataset_is_invalid(tmp_path: Path, objects: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no file" in await refused(objects, order(tmp_path / "empty"))


async def test_a_missing_folder_and_a_missing_file_are_named(source: Path, objects: Path, tmp_path: Path) -> None:
    assert "nowhere" in await refused(objects, order(tmp_path / "nowhere"))
    assert "'images/9.png'" in await refused(objects, order(source, files=["images/1.png", "images/9.png"]))
    assert "'images'" in await refused(objects, order(source, files=["images"]))


@pytest.mark.parametrize("files", [["../secret.txt"], ["images/../../secret.txt"], ["/etc/hostname"]])
async def test_a_path_that_leads_out_is_refused(source: Path, objects: Path, files: list[str]) -> None:
    (source.parent / "secret.txt").write_text("secret")
    assert "points outside" in await refused(objects, order(source, files=files))
    assert copied(objects) == {}


@pytest.mark.parametrize("files", [None, ["images/link.txt"], ["folder/secret.txt"]])
async def test_a_symbolic_link_out_of_the_folder_is_refused(
    source: Path, objects: Path, tmp_path: Path, files: list[str] | None
) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "secret.txt").write_text("secret")
    (source / "images/link.txt").symlink_to(tmp_path / "private" / "secret.txt")
    (source / "folder").symlink_to(tmp_path / "private")
    assert "points outside" in await refused(objects, order(source, files=files))


async def test_a_symbolic_link_inside_the_folder_is_a_file_like_another(source: Path, objects: Path) -> None:
    (source / "again.png").symlink_to(source / "images/1.png")
    await environment().run(activities(objects).snapshot, order(source))
    assert copied(objects)["again.png"] == b"one"


async def test_limits_of_count_and_size_are_kept(source: Path, objects: Path) -> None:
    assert "more than 2 files" in await refused(objects, order(source), max_files=2)
    assert "more than 2 files" in await refused(objects, order(source, files=sorted(FILES)), max_files=2)
    assert "the limit is 10" in await refused(objects, order(source), max_bytes=10)


async def test_a_list_of_files_that_no_history_can_hold_is_refused(
    source: Path, objects: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("activities.dataset_source.MAX_SENT_LIST_BYTES", 300)
    assert "Use shorter paths" in await refused(objects, order(source))


@pytest.mark.parametrize(
    "uri",
    [
        "http://example.com/cats",
        "/etc",
        "s3://",
        "s3://key:secret@bucket/cats",
        "file:///srv/datasets/tenant-demo/../tenant-other",
        "file:///srv/datasets/tenant-demo/%2e%2e/tenant-other",
        "s3://bucket/tenant-demo/%2E%2e/tenant-other",
        "s3://bucket/cats?versionId=1",
        "file:///srv/\x00",
        "",
        "file://[",
    ],
)
async def test_an_address_that_is_not_taken_is_refused_without_its_secrets(objects: Path, uri: str) -> None:
    with pytest.raises(BadAddress):
        read_address(uri)
    sentence = await refused(objects, order(uri))
    assert "source_uri" in sentence
    assert "secret" not in sentence


async def test_a_source_outside_of_the_tenants_roots_is_refused(source: Path, objects: Path, tmp_path: Path) -> None:
    roots = ["s3://bucket/{tenant_id}/", f"{(tmp_path / 'datasets').as_uri()}/{{tenant_id}}/"]
    await environment().run(activities(objects, dataset_roots=roots).snapshot, order(source))
    other = tmp_path / "datasets" / "tenant-demo2" / "dogs"
    other.mkdir(parents=True)
    (other / "1.png").write_bytes(b"1")
    (source.parent / "disguised").symlink_to(other)
    for outside in (other, source.parent / "disguised", tmp_path):
        assert "tenant" in await refused(objects, order(outside), dataset_roots=roots)
    for outside_uri in ("s3://bucket/tenant-demo2/dogs", "s3://bucket/tenant-other", "gs://bucket/tenant-demo/x"):
        assert "tenant" in await refused(objects, order(outside_uri), dataset_roots=roots)


async def test_without_roots_no_source_is_read(source: Path, objects: Path) -> None:
    """Seen: any folder that the worker could read was taken then."""
    assert "COMFYUI_TEMPORAL_DATASET_ROOTS" in await refused(objects, order(source), dataset_roots=())


@pytest.mark.parametrize("task_id", ["../task-2", "", "a/b", ".."])
async def test_a_task_id_that_names_no_folder_is_refused(source: Path, objects: Path, task_id: str) -> None:
    wanted = order(source, call_for=call_for(task_id=task_id))
    assert "task_id" in await refused(objects, wanted)
    with pytest.raises(ApplicationError, match="task_id"):
        await environment().run(activities(objects).delete_snapshot, wanted)


async def test_a_deleted_snapshot_is_gone_and_no_other(source: Path, objects: Path) -> None:
    mine, others = order(source), order(source, call_for=call_for(task_id="task-10"))
    for wanted in (mine, others):
        await environment().run(activities(objects).snapshot, wanted)
    for _ in range(2):
        await environment().run(activities(objects).delete_snapshot, mine)
    assert [path.name for path in (objects / "snapshots").iterdir()] == ["task-10"]
    assert (objects / "snapshots/task-10/cats/manifest.json").exists()
    assert (source / "images/1.png").exists()


async def test_deleting_a_missing_snapshot_is_no_error(source: Path, objects: Path) -> None:
    await environment().run(activities(objects).delete_snapshot, order(source))


async def test_storage_that_cannot_be_made_is_retried(source: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file, no folder")
    with pytest.raises(ApplicationError) as raised:
        await environment().run(activities(tmp_path / "taken").snapshot, order(source))
    assert (raised.value.type, raised.value.non_retryable) == ("internal", False)


async def test_remote_storage_that_is_away_is_retried(
    source: Path, objects: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("activities.object_folders.RETRIES", {"max_retries": 0})
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": "s",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    away = DatasetActivities(DatasetSnapshots("s3://bucket/prefix", dataset_roots=ANYWHERE))
    for running in (
        environment().run(away.snapshot, order(source)),
        environment().run(away.delete_snapshot, order(source)),
        environment().run(activities(objects).snapshot, order("s3://bucket/tenant-demo/cats")),
    ):
        with pytest.raises(ApplicationError) as raised:
            await running
        assert (raised.value.type, raised.value.non_retryable) == ("internal", False)


class CutOff(DatasetSnapshots):
    """Goes on copying after Temporal gave its attempt up: before its n-th file another worker deletes the snapshot."""

    def __init__(self, objects: Path, *, before_file: int, deleting: DatasetActivities, **limits: Any) -> None:
        super().__init__(objects.as_uri(), dataset_roots=ANYWHERE, **limits)
        self._left, self._deleting = before_file, deleting
        self.order: SnapshotOrder

    async def _copied(self, source: Any, target: Any, item: Any) -> Any:
        self._left -= 1
        if self._left == 0:
            await environment(ordered_at=LATER).run(self._deleting.delete_snapshot, self.order)
        return await super()._copied(source, target, item)


@pytest.mark.parametrize("before_file", [1, 2, len(FILES)])
async def test_a_copy_that_lands_after_its_deletion_does_not_stay(
    source: Path, objects: Path, before_file: int
) -> None:
    late = CutOff(objects, before_file=before_file, deleting=activities(objects))
    late.order = order(source)
    with pytest.raises(ApplicationError, match="deleted while it was made"):
        await environment().run(DatasetActivities(late).snapshot, late.order)
    assert not (objects / "snapshots").exists() or not list((objects / "snapshots").iterdir())


async def test_a_late_copy_that_is_cancelled_on_the_way_leaves_nothing(source: Path, objects: Path) -> None:
    class Stuck(CutOff):
        async def _copied(self, source: Any, target: Any, item: Any) -> Any:
            file = await super()._copied(source, target, item)
            if self._left <= 0:
                env.cancel(activity.ActivityCancellationDetails(not_found=True))
                await asyncio.Event().wait()
            return file

    env = environment()
    late = Stuck(objects, before_file=2, deleting=activities(objects))
    late.order = order(source)
    with pytest.raises(ApplicationError):
        async with asyncio.timeout(5):
            await env.run(DatasetActivities(late).snapshot, late.order)
    assert not list((objects / "snapshots").rglob("*.png"))


async def test_a_copy_that_begins_after_a_deletion_stays_also_when_the_deletion_comes_again(
    source: Path, objects: Path
) -> None:
    wanted = order(source)
    await environment(ordered_at=LATER).run(activities(objects).delete_snapshot, wanted)
    await environment(began_at=LATER + timedelta(seconds=1)).run(activities(objects).snapshot, wanted)
    await environment(ordered_at=LATER).run(activities(objects).delete_snapshot, wanted)
    assert copied(objects) == FILES


async def test_notes_of_deletions_are_not_kept_for_ever(source: Path, objects: Path) -> None:
    old, new = (order(source, call_for=call_for(task_id=task_id)) for task_id in ("old", "new"))
    await environment().run(activities(objects).delete_snapshot, old)
    three_days_ago = time.time() - 3 * 86_400
    os.utime(objects / "deleted/old.cats", (three_days_ago, three_days_ago))
    await environment().run(activities(objects).delete_snapshot, new)
    assert [path.name for path in (objects / "deleted").iterdir()] == ["new.cats"]


class Slow(DatasetSnapshots):
    """Copies for ever."""

    async def _copied(self, source: Any, target: Any, item: Any) -> Any:
        await asyncio.Event().wait()


@pytest.mark.parametrize("by_workflow", [True, False])
async def test_a_cancelled_snapshot_stops_and_a_stopping_worker_leaves_it_to_the_next(
    source: Path, objects: Path, by_workflow: bool
) -> None:
    env = environment()
    began = asyncio.Event()
    env.on_heartbeat = lambda *_: began.set()
    running = asyncio.ensure_future(
        env.run(DatasetActivities(Slow(objects.as_uri(), dataset_roots=ANYWHERE)).snapshot, order(source))
    )
    async with asyncio.timeout(5):
        await began.wait()
    env.cancel(activity.ActivityCancellationDetails(cancel_requested=by_workflow, worker_shutdown=not by_workflow))
    with pytest.raises(asyncio.CancelledError if by_workflow else ApplicationError) as raised:
        async with asyncio.timeout(5):
            await running
    if isinstance(raised.value, ApplicationError):
        assert not raised.value.non_retryable


async def test_a_relative_address_lies_below_the_working_directory(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    client = DatasetActivities(DatasetSnapshots("file://.run/objects", dataset_roots=ANYWHERE))
    snapshot = await environment().run(client.snapshot, order("file://datasets/tenant-demo/cats/"))
    assert snapshot.snapshot_uri.startswith((tmp_path / ".run/objects").as_uri())
    assert copied(tmp_path / ".run/objects") == FILES


async def test_a_source_that_changes_while_it_is_copied_is_refused(
    source: Path, objects: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def longer(self: ObjectFolder, path: str) -> AsyncIterator[bytes]:
        yield FILES[path] + b"more"

    monkeypatch.setattr(ObjectFolder, "read", longer)
    assert "changed while it was copied" in await refused(objects, order(source))


class VanishingSource(DatasetSnapshots):
    """Each file of the source is deleted just before it is copied."""

    async def _copied(self, source: Any, target: Any, item: Any) -> Any:
        (self.folder / item.path).unlink()
        return await super()._copied(source, target, item)

    folder: Path


async def test_a_file_that_vanishes_while_it_is_copied_is_named(source: Path, objects: Path) -> None:
    client = VanishingSource(objects.as_uri(), dataset_roots=ANYWHERE)
    client.folder = source
    with pytest.raises(ApplicationError) as raised:
        await environment().run(DatasetActivities(client).snapshot, order(source))
    assert (raised.value.type, raised.value.non_retryable) == ("dataset_invalid", True)
    assert "'captions/1.txt'" in raised.value.message
    assert copied(objects) == {}


def test_an_unusable_setting_is_named_at_start(objects: Path) -> None:
    with pytest.raises(ValueError, match="COMFYUI_TEMPORAL_OBJECT_STORE_URL: must begin with"):
        DatasetSnapshots("/objects")
    with pytest.raises(ValueError, match="COMFYUI_TEMPORAL_DATASET_ROOTS: must begin with"):
        DatasetSnapshots(objects.as_uri(), dataset_roots=["datasets/{tenant_id}/"])


async def test_a_store_in_ones_own_network_needs_no_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    async with s3(monkeypatch) as bucket:
        await bucket.put({f"datasets/tenant-demo/cats/{path}": content for path, content in FILES.items()})
        client = DatasetSnapshots(f"s3://{BUCKET}/objects", dataset_roots=[f"s3://{BUCKET}/datasets/{{tenant_id}}/"])
        wanted = order(f"s3://{BUCKET}/datasets/tenant-demo/cats/")
        snapshot = await environment().run(DatasetActivities(client).snapshot, wanted)
        copies = {f"objects/snapshots/task-1/cats/files/{path}": content for path, content in FILES.items()}
        assert copies.items() <= (await bucket.objects()).items()
        assert {file.path for file in (await client.whole(snapshot)).files} == set(FILES)
        await environment().run(DatasetActivities(client).delete_snapshot, wanted)
        left = {key for key in await bucket.objects() if key.startswith("objects/")}
        assert left == {"objects/deleted/task-1.cats"}, "the mark that keeps a late snapshot from being made again"
