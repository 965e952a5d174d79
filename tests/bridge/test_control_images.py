"""Allowed sources of control images: no address from a caller reaches a private network or another tenant's files."""

from __future__ import annotations

from pathlib import Path

import pytest

from bridge.control_images import ControlImages, ImageRefused, ImageUnreachable, is_public, picture_type

HOST = "pictures.example.org"


def images(folder: Path, *addresses: str) -> ControlImages:
    async def resolve(host: str, port: int) -> list[str]:
        if not addresses:
            raise OSError("no such host")
        return list(addresses)

    return ControlImages(hosts=[".example.org"], roots=[folder.as_uri() + "/{tenant_id}/"], resolve=resolve)


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
    with pytest.raises(ImageRefused, match="leaves the tenant's folder"):
        await images(tmp_path).fetch(f"{tmp_path.as_uri()}/tenant-demo/a.png", "tenant-demo")


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
    with pytest.raises(ImageRefused, match="not public"):
        await images(tmp_path, "93.184.215.14", address).fetch(f"https://{HOST}/a.png", "tenant-demo")


async def test_a_host_that_cannot_be_resolved_may_be_tried_again(tmp_path: Path) -> None:
    with pytest.raises(ImageUnreachable):
        await images(tmp_path).fetch(f"https://{HOST}/a.png", "tenant-demo")


def test_public_addresses_are_public() -> None:
    assert is_public("93.184.215.14")
    assert is_public("2606:2800:21f:cb07:6820:80da:af6b:8b2c")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"\x89PNG\r\n\x1a\n....", "image/png"),
        (b"\xff\xd8\xff\xe0", "image/jpeg"),
        (b"GIF89a", "image/gif"),
        (b"RIFF\x00\x00\x00\x00WEBPVP8 ", "image/webp"),
        (b"RIFF\x00\x00\x00\x00WAVE", None),
        (b"<svg xmlns=", None),
        (b"", None),
    ],
)
def test_a_picture_is_recognised_by_its_first_bytes(content: bytes, kind: str | None) -> None:
    assert picture_type(content) == kind
