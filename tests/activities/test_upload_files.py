"""Uploads in object storage: on a disk and in S3, what is written, joined and deleted."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from activities.object_folders import PART_BYTES, STORAGE_ERRORS
from activities.upload_files import UploadFiles
from bridge.control_images import ControlImages
from bridge.storage import Storage
from comfyui_temporal.contracts.uploads import InputKind
from tests.activities.s3_bucket import BUCKET, s3

HEAD = b"\x00\x00\x00\x20ftypisom"
PARTS = (HEAD, b"a" * PART_BYTES, b"b" * 1_000)
WHOLE = b"".join(PARTS)


async def joined_in(files: UploadFiles) -> None:
    names = [await files.put_part("tenant-a", "film", 0, part) for part in PARTS]
    for _ in range(2):
        joined = await files.join("tenant-a", "film", names)
        assert (joined.size_bytes, joined.sha256) == (len(WHOLE), hashlib.sha256(WHOLE).hexdigest())
        assert joined.head.startswith(HEAD)


async def test_parts_are_joined_read_by_the_bridge_and_deleted_in_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    async with s3(monkeypatch) as bucket:
        url = f"s3://{BUCKET}/uploads"
        files = UploadFiles.at(url)
        await joined_in(files)
        await files.put("tenant-a", "film-2", WHOLE)
        await files.put("tenant-ab", "film", WHOLE)
        async with ControlImages(uploads=Storage(url)).opened("upload:film", "tenant-a", InputKind.VIDEO) as film:
            assert b"".join([chunk async for chunk in film.chunks]) == WHOLE
        assert await files.delete("tenant-a", "film") == 4
        assert await files.delete("tenant-a", "film") == 0
        assert set(await bucket.objects()) == {"uploads/tenant-a/film-2", "uploads/tenant-ab/film"}
        assert await files.delete_of("tenant-a") == 1
        assert await files.delete_older(datetime.now(UTC) - timedelta(hours=1)) == 0
        assert set(await bucket.objects()) == {"uploads/tenant-ab/film"}


async def test_a_missing_part_makes_no_file_and_a_second_join_the_same_one(tmp_path: Path) -> None:
    files = UploadFiles.at(tmp_path.as_uri())
    await joined_in(files)
    name = await files.put_part("tenant-a", "cut", 0, HEAD)
    with pytest.raises(FileNotFoundError):
        await files.join("tenant-a", "cut", [name, "missing"])
    assert not (tmp_path / "tenant-a" / "cut").exists()
    assert (tmp_path / "tenant-a" / "film").read_bytes() == WHOLE
    assert await files.delete_older(datetime.now(UTC) + timedelta(hours=1)) == 5
    assert await files.delete_of("tenant-a") == 0


async def test_storage_that_is_away_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("AWS_ENDPOINT_URL", "http://127.0.0.1:1"), ("AWS_ALLOW_HTTP", "true"), ("AWS_REGION", "r")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    monkeypatch.setattr("activities.object_folders.RETRIES", {"max_retries": 0})
    with pytest.raises(STORAGE_ERRORS):
        await UploadFiles.at("s3://bucket").put("tenant-a", "film", WHOLE)
    for url in ("https://files.example/", "s3://key:secret@bucket/", "file://../x"):
        with pytest.raises(ValueError, match="COMFYUI_TEMPORAL_UPLOADS_URL"):
            UploadFiles.at(url)
