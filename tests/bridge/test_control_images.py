"""Allowed sources of control images: no address from a caller reaches a private network or another tenant's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bridge.allowed_hosts import AllowedHosts, FileRefused, FileUnreachable, is_public
from bridge.control_images import ControlImages
from bridge.storage import Storage
from comfyui_temporal.contracts.uploads import InputKind

HOST = "pictures.example.org"


async def fetched(images: ControlImages, address: str, kind: InputKind = InputKind.IMAGE) -> tuple[str, bytes]:
    """Content type and bytes, as a job of `tenant-demo` gets them."""
    async with images.opened(address, "tenant-demo", kind) as file:
        return file.content_type, b"".join([chunk async for chunk in file.chunks])


def images(folder: Path, *addresses: str) -> ControlImages:
    async def resolve(host: str, port: int) -> list[str]:
        if not addresses:
            raise OSError("no such host")
        return list(addresses)

    hosts = AllowedHosts([".example.org"], resolve=resolve)
    return ControlImages(hosts=hosts, roots=[folder.as_uri() + "/{tenant_id}/"])


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        (f"https://{HOST}/a.png", None),
        (f"https://{HOST}:443/a.png", None),
        (f"http://{HOST}/a.png", "must be an https"),
        (f"https://{HOST}:8443/a.png", "or a port"),
        (f"https://user:secret@{HOST}/a.png", "not contain credentials"),
        ("https://example.org.evil.test/a.png", "not allowed"),
        ("https://evilexample.org/a.png", "not allowed"),
        ("https://127.0.0.1/a.png", "not allowed"),
        ("https://[::1]/a.png", "not allowed"),
        ("javascript:alert(1)", "must be an https"),
        (f"HTTP://{HOST}/a.png", "must be an https"),
        ("FILE:///etc/passwd", "must be an https"),
        ("https://[", "is not a valid address"),
        ("s3://their-bucket/a.png", "is not below"),
    ],
)
def test_an_address_is_accepted_or_refused_before_any_request(
    tmp_path: Path, address: str, problem: str | None
) -> None:
    found = images(tmp_path).problem(address, "tenant-demo")
    assert (found is None) if problem is None else (problem in (found or "")), found


@pytest.mark.parametrize(
    "path",
    ["../other/a.png", "%2e%2e/other/a.png", "%252e%252e/other/a.png", "/etc/passwd", "a\\..\\b.png", "", "./a.png"],
)
def test_a_path_that_leaves_the_tenants_folder_is_refused(tmp_path: Path, path: str) -> None:
    address = f"{tmp_path.as_uri()}/tenant-demo/{path}"
    assert images(tmp_path).problem(address, "tenant-demo")
    assert images(tmp_path).problem(f"{tmp_path.as_uri()}/tenant-other/a.png", "tenant-demo")


async def test_a_symbolic_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "tenant-demo").mkdir()
    (tmp_path / "tenant-demo" / "a.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(FileRefused, match="leaves the tenant's folder"):
        await fetched(images(tmp_path), f"{tmp_path.as_uri()}/tenant-demo/a.png")


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "::1",
        "::ffff:10.0.0.1",
        "::ffff:169.254.169.254",
        "192.0.2.1",
        "198.18.0.1",
        "240.0.0.1",
        "2001:db8::1",
        "fe80::1",
        "fc00::1",
        "64:ff9b::a00:1",
        "64:ff9b:1::5db8:d70e",
        "::127.0.0.1",
        "::",
        "2002:a00:1::",
        "224.0.0.1",
        "nonsense",
    ],
)
async def test_a_host_whose_address_is_not_public_is_refused_before_any_request(tmp_path: Path, address: str) -> None:
    assert not is_public(address)
    with pytest.raises(FileRefused, match="not public"):
        await fetched(images(tmp_path, "93.184.215.14", address), f"https://{HOST}/a.png")


async def test_a_host_that_cannot_be_resolved_may_be_tried_again(tmp_path: Path) -> None:
    with pytest.raises(FileUnreachable):
        await fetched(images(tmp_path), f"https://{HOST}/a.png")


def test_public_addresses_are_public() -> None:
    assert is_public("93.184.215.14")
    assert is_public("2606:2800:21f:cb07:6820:80da:af6b:8b2c")


PNG = b"\x89PNG\r\n\x1a\n" + b"x" * 3_000_000
WAV = b"RIFF\x00\x00\x00\x00WAVEfmt "


def with_uploads(folder: Path, **limits: Any) -> ControlImages:
    return ControlImages(uploads=Storage(folder.as_uri()), **limits)


async def test_an_upload_is_its_own_tenants_and_of_the_kind_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "tenant-demo").mkdir()
    (tmp_path / "tenant-other").mkdir()
    (tmp_path / "tenant-demo" / "one").write_bytes(PNG)
    (tmp_path / "tenant-other" / "theirs").write_bytes(PNG)
    (tmp_path / "tenant-demo" / "sound").write_bytes(WAV)
    files = with_uploads(tmp_path)
    assert await fetched(files, "upload:one") == ("image/png", PNG)
    assert await fetched(files, "upload:one", InputKind.MASK) == ("image/png", PNG)
    assert await fetched(files, "upload:sound", InputKind.AUDIO) == ("audio/wav", WAV)
    for address, kind, reason in (
        ("upload:theirs", InputKind.IMAGE, "does not exist, or has expired"),
        ("upload:one", InputKind.VIDEO, "not an MP4, WebM or MOV"),
        ("upload:sound", InputKind.IMAGE, "not a PNG, JPEG, GIF or WebP"),
    ):
        with pytest.raises(FileRefused, match=reason):
            await fetched(files, address, kind)
    assert await files.missing("upload:one", "tenant-demo") is None
    assert "no complete upload theirs" in (await files.missing("upload:theirs", "tenant-demo") or "")


@pytest.mark.parametrize(
    "upload_id", ["../tenant-other/a", "%2e%2e/tenant-other/a", "a/b", "a.parts", "", "a\nb", "x" * 65, "a b"]
)
async def test_no_id_of_an_upload_leads_to_another_place(tmp_path: Path, upload_id: str) -> None:
    (tmp_path / "tenant-other").mkdir()
    (tmp_path / "tenant-other" / "a").write_bytes(PNG)
    assert with_uploads(tmp_path).problem(f"upload:{upload_id}", "tenant-demo") == "must be upload:UPLOAD_ID"
    with pytest.raises(FileRefused, match="must be upload"):
        await fetched(with_uploads(tmp_path), f"upload:{upload_id}")


async def test_a_file_is_limited_by_its_kind_and_without_storage_no_upload_is_taken(tmp_path: Path) -> None:
    (tmp_path / "tenant-demo").mkdir()
    (tmp_path / "tenant-demo" / "one").write_bytes(PNG)
    (tmp_path / "tenant-demo" / "sound").write_bytes(WAV)
    files = with_uploads(tmp_path, max_bytes=1_000_000, max_file_bytes=10)
    for address, kind in (("upload:one", InputKind.IMAGE), ("upload:sound", InputKind.AUDIO)):
        with pytest.raises(FileRefused, match="larger than"):
            await fetched(files, address, kind)
    assert ControlImages().problem("upload:one", "tenant-demo") == "is an upload, and none is taken here"
