"""No path or address from outside leads out of its folder, however often it is decoded on the way (pitfall 57)."""

from __future__ import annotations

import asyncio
import posixpath
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from activities.object_folders import BadAddress, ObjectFolder, OutsideFolder, read_address
from bridge.control_images import ControlImages
from bridge.storage import Storage
from comfyui_temporal.contracts.paths import is_plain

Takes = Callable[[Path, str], bool]
"""Whether a door takes a path below this folder."""

PIECES = ["..", ".", "/", "\\", "%2e", "%2E", "%2f", "%5c", "%252e", "%25", "%", "%00", "\0", "a", "b.png", " ", "é"]
paths = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)


def storage_takes(folder: Path, path: str) -> bool:
    return Storage(folder.as_uri()).path_of(f"{folder.as_uri()}/{path}") is not None


def images_take(folder: Path, path: str) -> bool:
    images = ControlImages(roots=[f"{folder.parent.as_uri()}/{{tenant_id}}/"])
    return images.problem(f"{folder.as_uri()}/{path}", folder.name) is None


def datasets_take(folder: Path, path: str) -> bool:
    try:
        return read_address(f"{folder.as_uri()}/{path}").text.startswith(folder.as_uri())
    except BadAddress:
        return False


def files_of_a_dataset_take(folder: Path, path: str) -> bool:
    try:
        asyncio.run(ObjectFolder(read_address(folder.as_uri())).check_inside(path))
    except (OutsideFolder, ValueError):
        return False
    return True


DOORS: list[Takes] = [storage_takes, images_take, datasets_take, files_of_a_dataset_take]


@pytest.mark.parametrize("takes", DOORS)
@given(path=paths)
@example(path="%2e%2e/secret")
@example(path="%252e%252e/secret")
@example(path="a/..%5c../secret")
def test_no_path_that_is_taken_leaves_its_folder(
    tmp_path_factory: pytest.TempPathFactory, takes: Takes, path: str
) -> None:
    folder = tmp_path_factory.getbasetemp() / "tenant"
    folder.mkdir(exist_ok=True)
    if not takes(folder, path):
        return
    for _ in range(5):
        where = posixpath.normpath(posixpath.join(str(folder), path.replace("\\", "/").lstrip("/")))
        assert f"{where}/".startswith(f"{folder}/"), path
        path = unquote(path)


@pytest.mark.parametrize(
    "name", ["a.png", "below/a b.png", "100%.png", "50%25.txt", "..a", "a..png", "Löwe.png", "🦁.png"]
)
def test_an_ordinary_name_is_taken(name: str) -> None:
    assert is_plain(name)


@pytest.mark.parametrize("path", ["", "/", "/a", "./a", "a/.", "a\\b", "a\nb", "%2525252525252e"])
def test_a_path_that_is_not_plain_is_not_taken(path: str) -> None:
    assert not is_plain(path)
