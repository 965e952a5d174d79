"""What a tenant may train on: its own folders, counted within limits, in a local folder and in a bucket."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
from temporalio.exceptions import ApplicationError
from temporalio.testing import ActivityEnvironment

from activities import dataset_list
from activities.dataset_list import DatasetFolders, DatasetListActivities, dataset_id_of
from activities.object_folders import ObjectFolder, is_inside
from comfyui_temporal.contracts.datasets import DatasetList, DatasetQuestion
from tests.activities.s3_bucket import BUCKET, s3


def root_of(folder: Path) -> str:
    return f"{folder.as_uri()}/{{tenant_id}}/"


def filled(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"1234")


async def listed(*roots: str, tenant_id: str = "tenant-demo") -> DatasetList:
    activities = DatasetListActivities(DatasetFolders(roots))
    return await ActivityEnvironment().run(activities.list_datasets, DatasetQuestion(tenant_id=tenant_id))


def counts(found: DatasetList) -> dict[str, tuple[int | None, int | None]]:
    return {each.name: (each.file_count, each.total_bytes) for each in found.datasets or []}


async def test_a_tenants_folders_are_listed_with_their_files_and_no_other_tenants(tmp_path: Path) -> None:
    filled(tmp_path / "tenant-demo" / "cats", "1.png", "more/2.png")
    filled(tmp_path / "tenant-demo" / "empty")
    filled(tmp_path / "tenant-demo", "no-dataset.txt")
    filled(tmp_path / "tenant-demo-2" / "secret", "1.png")
    found = await listed(root_of(tmp_path))
    assert counts(found) == {"cats": (2, 8), "empty": (0, 0)}
    cats = (found.datasets or [])[0]
    assert (cats.dataset_id, cats.source_uri) == ("cats", f"{(tmp_path / 'tenant-demo' / 'cats').as_uri()}/")
    assert found.is_whole and cats.is_whole
    assert counts(await listed(root_of(tmp_path), tenant_id="tenant-demo-2")) == {"secret": (1, 4)}
    assert counts(await listed(root_of(tmp_path), tenant_id="nobody")) == {}


async def test_a_bucket_is_listed_by_its_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    async with s3(monkeypatch) as bucket:
        await bucket.put(
            {
                "data/tenant-demo/cats/1.png": b"1234",
                "data/tenant-demo/cats/2.png": b"1234",
                "data/tenant-demo/my dogs/1.png": b"1",
                "data/tenant-other/secret/1.png": b"1",
            }
        )
        found = await listed(f"s3://{BUCKET}/data/{{tenant_id}}/", f"s3://{BUCKET}/more/{{tenant_id}}/")
        assert counts(found) == {"cats": (2, 8), "my dogs": (1, 1)}
        assert [each.source_uri for each in found.datasets or []] == [
            f"s3://{BUCKET}/data/tenant-demo/cats/",
            f"s3://{BUCKET}/data/tenant-demo/my%20dogs/",
        ]


async def test_a_link_out_of_the_root_names_no_dataset_and_counts_as_no_file(tmp_path: Path) -> None:
    filled(tmp_path / "tenant-other" / "secret", "1.png", "2.png")
    filled(tmp_path / "tenant-demo" / "cats", "1.png")
    (tmp_path / "tenant-demo" / "others").symlink_to(tmp_path / "tenant-other" / "secret")
    (tmp_path / "tenant-demo" / "cats" / "2.png").symlink_to(tmp_path / "tenant-other" / "secret" / "2.png")
    (tmp_path / "tenant-demo" / "cats" / "more").symlink_to(tmp_path / "tenant-other" / "secret")
    assert counts(await listed(root_of(tmp_path))) == {"cats": (1, 4)}


async def test_without_roots_that_is_said(tmp_path: Path) -> None:
    assert (await listed()).datasets is None


async def test_names_in_any_script_have_an_id_and_an_address_that_is_read(tmp_path: Path) -> None:
    for name in ("猫 照片", "a" * 80, "cats & dogs"):
        filled(tmp_path / "tenant-demo" / name, "1.png")
    found = await listed(root_of(tmp_path))
    assert counts(found) == dict.fromkeys(("猫 照片", "a" * 80, "cats & dogs"), (1, 4))
    ids = [each.dataset_id for each in found.datasets or []]
    assert len(set(ids)) == 3 and all(len(each) <= 64 for each in ids)
    assert dataset_id_of("cats & dogs") == dataset_id_of("cats & dogs") != dataset_id_of("cats + dogs")


async def test_more_than_are_listed_or_counted_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        filled(tmp_path / "tenant-demo" / f"set-{number}", "1.png", "2.png", "3.png")
    folders = DatasetFolders([root_of(tmp_path)], max_files=2)
    found = await folders.of("tenant-demo")
    assert {(each.file_count, each.is_whole) for each in found.datasets or []} == {(2, False)}
    monkeypatch.setattr(dataset_list, "MAX_DATASETS", 3)
    found = await folders.of("tenant-demo")
    assert (len(found.datasets or []), found.is_whole) == (3, False)
    monkeypatch.setattr(dataset_list, "MAX_LIST_BYTES", 2 * (len(tmp_path.as_uri()) + 40))
    found = await folders.of("tenant-demo")
    assert 0 < len(found.datasets or []) < 3 and not found.is_whole


async def test_many_folders_are_resolved_beside_the_event_loop_and_no_more_than_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker's event loop serves all its other calls meanwhile."""
    for number in range(30):
        filled(tmp_path / "tenant-demo" / f"set-{number:02}")
    resolved = list[str]()

    def watched(folder: Path, path: str) -> bool:
        assert threading.current_thread() is not threading.main_thread()
        resolved.append(path)
        return is_inside(folder, path)

    monkeypatch.setattr(dataset_list, "is_inside", watched)
    monkeypatch.setattr(dataset_list, "MAX_DATASETS", 3)
    monkeypatch.setattr(dataset_list, "BATCH", 2)
    found = await DatasetFolders([root_of(tmp_path)]).of("tenant-demo")
    assert [each.name for each in found.datasets or []] == ["set-00", "set-01", "set-02"]
    assert not found.is_whole
    assert resolved == ["set-00", "set-01", "set-02", "set-03"]


async def test_what_cannot_be_counted_in_time_is_listed_without_a_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path / "tenant-demo" / "cats", "1.png")
    monkeypatch.setattr(ObjectFolder, "objects", lambda self: _Never())
    found = await DatasetFolders([root_of(tmp_path)], count_seconds=0.05).of("tenant-demo")
    assert counts(found) == {"cats": (None, None)}


class _Never:
    def __aiter__(self) -> _Never:
        return self

    async def __anext__(self) -> None:
        await asyncio.Event().wait()


async def test_a_store_that_cannot_be_read_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async with s3(monkeypatch):
        with pytest.raises(ApplicationError, match="cannot be listed"):
            await listed("s3://no-such-bucket/{tenant_id}/")
