"""Lists of files by reference: what the gateway keeps, callers' manifests, and a snapshot's own list (pitfall 39)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from temporalio.exceptions import ApplicationError

from activities.datasets import DatasetActivities, DatasetSnapshots
from activities.file_lists import FileLists
from activities.object_folders import read_address
from activities.outside_http import OutsideFailure
from comfyui_temporal.contracts.comfyui import SnapshotReference
from comfyui_temporal.contracts.size_budget import MAX_FILE_LIST_BYTES, PAYLOAD_BYTES, json_bytes
from comfyui_temporal.contracts.tasks import DatasetManifest
from tests.activities.s3_bucket import BUCKET, s3
from tests.activities.test_datasets import (
    FILES,
    LATER,
    activities,
    copied,
    environment,
    files_of,
    objects,
    order,
    source,
)

__all__ = ["objects", "source"]

TWO = ["images/2.png", "captions/1.txt"]


def manifest_at(path: Path, content: bytes, **changes: Any) -> DatasetManifest:
    path.write_bytes(content)
    return DatasetManifest(**{"uri": path.as_uri(), "sha256": hashlib.sha256(content).hexdigest(), **changes})


async def refusal(objects: Path, source: Path, **fields: Any) -> str:
    """The sentence of a snapshot that ends `dataset_invalid` without a retry."""
    roots = [f"{source.parents[1].as_uri()}/{{tenant_id}}/"]
    with pytest.raises(ApplicationError) as raised:
        await environment().run(activities(objects, dataset_roots=roots).snapshot, order(source, **fields))
    assert (raised.value.type, raised.value.non_retryable) == ("dataset_invalid", True)
    return raised.value.message


async def test_a_list_that_the_gateway_kept_names_the_files(source: Path, objects: Path) -> None:
    lists = FileLists(read_address(objects.as_uri()))
    sha256 = await lists.put("task-1", "cats", TWO)
    assert await lists.put("task-1", "cats", TWO) == sha256, "the same list is one object"
    snapshot = await environment().run(activities(objects).snapshot, order(source, files_sha256=sha256))
    assert [file.path for file in await files_of(objects, snapshot)] == sorted(TWO)
    assert await environment().run(activities(objects).snapshot, order(source, files_sha256=sha256)) == snapshot
    await environment().run(activities(objects).delete_snapshot, order(source))
    assert not list((objects / "snapshots").rglob("*.json")), "it goes with the snapshot"


async def test_a_list_that_is_not_there_says_what_to_check(source: Path, objects: Path) -> None:
    assert "must share COMFYUI_TEMPORAL_OBJECT_STORE_URL" in await refusal(objects, source, files_sha256="0" * 64)


async def test_a_callers_manifest_names_the_files(source: Path, objects: Path) -> None:
    wanted = order(source, manifest=manifest_at(source.parent / "wanted ü.json", json.dumps(TWO).encode()))
    snapshot = await environment().run(activities(objects).snapshot, wanted)
    assert [file.path for file in await files_of(objects, snapshot)] == sorted(TWO)
    await environment().run(activities(objects).delete_snapshot, wanted)
    assert (source.parent / "wanted ü.json").exists(), "it is the caller's own"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[]", "is not a JSON array of 1 to 10,000 relative paths"),
        (b'{"files": ["a"]}', "is not a JSON array"),
        (b'["images/1.png", "../secret"]', "(entry 1: Value error, must be a relative path without '..')"),
        (b'["images/1.png"', "is not a JSON array"),
        (b'["not there.png"]', "'not there.png' is not in"),
        (b'["' + b"a" * MAX_FILE_LIST_BYTES + b'"]', f"is larger than {MAX_FILE_LIST_BYTES} bytes"),
    ],
    ids=["empty", "object", "leads out of the folder", "truncated", "missing file", "too large"],
)
async def test_an_unusable_manifest_is_refused_with_its_reason(
    source: Path, objects: Path, content: bytes, said: str
) -> None:
    assert said in await refusal(objects, source, manifest=manifest_at(source / "list.json", content))


async def test_a_manifest_that_was_changed_or_is_not_the_tenants_is_refused(source: Path, objects: Path) -> None:
    changed = manifest_at(source / "list.json", json.dumps(TWO).encode(), sha256="0" * 64)
    assert "it was changed" in await refusal(objects, source, manifest=changed)
    gone = changed.model_copy(update={"uri": (source / "gone.json").as_uri()})
    assert "is not there" in await refusal(objects, source, manifest=gone)
    foreign = manifest_at(source.parents[2] / "list.json", json.dumps(TWO).encode())
    assert "is not below a folder of the task's tenant" in await refusal(objects, source, manifest=foreign)
    (source / "link.json").symlink_to(source.parents[2] / "list.json")
    linked = foreign.model_copy(update={"uri": (source / "link.json").as_uri()})
    assert "points outside" in await refusal(objects, source, manifest=linked)
    climbing = foreign.model_copy(update={"uri": f"{source.as_uri()}/%2e%2e%2f%2e%2e%2f%2e%2e%2flist.json"})
    assert await refusal(objects, source, manifest=climbing)


async def test_lists_lie_in_a_bucket_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async with s3(monkeypatch) as bucket:
        raw = json.dumps(TWO).encode()
        await bucket.put({f"datasets/tenant-demo/cats/{path}": content for path, content in FILES.items()})
        await bucket.put({"datasets/tenant-demo/list.json": raw})
        client = DatasetSnapshots(f"s3://{BUCKET}/objects", dataset_roots=[f"s3://{BUCKET}/datasets/{{tenant_id}}/"])
        uri = f"s3://{BUCKET}/datasets/tenant-demo/list.json"
        manifest = DatasetManifest(uri=uri, sha256=hashlib.sha256(raw).hexdigest())
        source = f"s3://{BUCKET}/datasets/tenant-demo/cats/"
        sha256 = await FileLists(read_address(f"s3://{BUCKET}/objects")).put("task-1", "cats", TWO)
        for fields in ({"manifest": manifest}, {"files_sha256": sha256}):
            snapshot = await environment().run(DatasetActivities(client).snapshot, order(source, **fields))
            assert [file.path for file in (await client.whole(snapshot)).files] == sorted(TWO)
        await environment().run(DatasetActivities(client).delete_snapshot, order(source))
        left = {path for path in await bucket.objects() if path.startswith("objects/")}
        assert left == {"objects/deleted/task-1.cats"}


async def test_a_list_that_was_touched_is_never_sent(source: Path, objects: Path) -> None:
    snapshot = await environment().run(activities(objects).snapshot, order(source))
    [kept] = (objects / "snapshots/task-1/cats").glob("list-*.json")
    kept.write_bytes(kept.read_bytes().replace(b"images/1.png", b"images/9.png"))
    for touched in (True, False):
        with pytest.raises(OutsideFailure, match="missing or does not match its sha256") as raised:
            await files_of(objects, snapshot)
        assert not raised.value.may_be_retried
        if touched:
            kept.unlink()


async def test_an_attempt_that_lands_late_leaves_the_list_as_it_was(source: Path, objects: Path) -> None:
    """The list that one attempt recorded is still there after the other attempt has written its own."""
    first = await environment().run(activities(objects).snapshot, order(source))
    (objects / "snapshots/task-1/cats/manifest.json").unlink()
    assert await environment(began_at=LATER).run(activities(objects).snapshot, order(source)) == first
    (source / "images/1.png").write_bytes(b"another")
    (objects / "snapshots/task-1/cats/manifest.json").unlink()
    second = await environment(began_at=LATER).run(activities(objects).snapshot, order(source))
    assert second != first and await files_of(objects, first) != await files_of(objects, second)


async def test_what_the_first_release_wrote_is_read(source: Path, objects: Path) -> None:
    """A manifest that holds the order's list and the snapshot's, and a carried snapshot that holds its files."""
    snapshot = await environment().run(activities(objects).snapshot, order(source, files=TWO))
    path = objects / "snapshots/task-1/cats/manifest.json"
    whole = await DatasetSnapshots(objects.as_uri()).whole(snapshot)
    old = {"source_uri": source.as_uri(), "asked_files": TWO, "snapshot": whole.model_dump()}
    path.write_text(json.dumps(old))
    assert await environment().run(activities(objects).snapshot, order(source, files=TWO)) == snapshot
    assert json.loads(path.read_text()) == old, "its copies were not written again"
    inline = SnapshotReference.model_validate(old["snapshot"])
    assert await DatasetSnapshots(objects.as_uri()).whole(inline) == whole
    await environment().run(activities(objects).snapshot, order(source))
    assert set(copied(objects)) == set(FILES)


async def test_a_reference_is_small_however_long_the_list(source: Path, objects: Path) -> None:
    for n in range(300):
        (source / f"{n:03}{'x' * 200}.txt").write_bytes(b"")
    snapshot = await environment().run(activities(objects).snapshot, order(source))
    assert json_bytes(snapshot) < 1024 < PAYLOAD_BYTES
