"""How a run's files are delivered: under which names, how many of them one by one, and without their metadata."""

from __future__ import annotations

import re
import tempfile
import zipfile
from collections.abc import AsyncIterator, Iterable
from contextlib import contextmanager
from typing import IO, Any, Final
from urllib.parse import quote

from bridge.file_metadata import PIECE_BYTES, without_metadata
from bridge.server import ResultFile
from bridge.storage import safe_name
from bridge.task_files import AGAIN, FOLDER
from comfyui_temporal.contracts.errors import ErrorDetails, FailureCode
from comfyui_temporal.contracts.size_budget import MAX_RESULT_URLS

MOST_FILES: Final = 1_000
"""Of one run. Their list goes through Temporal, whose limit is 2 MiB."""
MOST_LIST_BYTES: Final = 1024 * 1024
BUNDLE: Final = "more-results.zip"
"""More results than a job may name: all but the first ones are in it."""
MAX_NAME_BYTES: Final = 240
"""Of a percent-encoded name. An address is at most 2,048 bytes (contract §8)."""
IN_MEMORY_BYTES: Final = 32 * 1024 * 1024
_NUMBERED: Final = re.compile(r"_(\d{5,})_?(?=\.[^.]*$)")


def too_much(files: list[ResultFile], texts: list[str]) -> ErrorDetails | None:
    """Why this cannot be delivered, or None. Not tried again: another run makes as much."""
    problem = ""
    if len(files) + len(texts) > MOST_FILES:
        problem = f"{len(files) + len(texts)} results; at most {MOST_FILES:,} can be delivered"
    size = sum(len(file.model_dump_json()) for file in files) + sum(len(text.encode()) for text in texts)
    if not problem and size > MOST_LIST_BYTES:
        problem = f"texts and names of {size} bytes; at most {MOST_LIST_BYTES:,} can be delivered"
    if not problem:
        return None
    message = f"The run made {problem}. Make fewer in one task."
    return ErrorDetails(code=FailureCode.WORKFLOW_INVALID.value, message=message, retryable=False)


def own_names(files: Iterable[ResultFile], texts: int, job_id: str) -> list[str]:
    """A name for each file and then for each text, below the job's folder. No two are equal, also ignoring case."""
    names: list[str] = []
    taken = {BUNDLE}
    wanted = [_readable(file, job_id) for file in files] + [f"text-{number}.txt" for number in range(1, texts + 1)]
    for name in wanted:
        stem, dot, suffix = name.rpartition(".")
        stem, dot = (stem, dot) if stem else (name, "")
        free, number = name, 2
        while free.lower() in taken:
            free, number = f"{stem}-{number}{dot}{suffix if dot else ''}", number + 1
        taken.add(free.lower())
        names.append(free)
    return names


def _readable(file: ResultFile, job_id: str) -> str:
    """`save-image_00001_.png` → `save-image-1.png`, in its own folder, without the folders that we chose."""
    folders = [safe_name(part) for part in file.subfolder.replace("\\", "/").split("/") if part]
    if folders[:2] == [FOLDER, safe_name(job_id)]:
        folders = folders[3:] if len(folders) > 2 and AGAIN.fullmatch(folders[2]) else folders[2:]
    name = _shortened(_NUMBERED.sub(lambda found: f"-{int(found[1])}", safe_name(file.filename)))
    path = "/".join([*folders, name])
    return path if len(quote(path)) <= 2 * MAX_NAME_BYTES else name


def _shortened(name: str) -> str:
    stem, dot, suffix = name.rpartition(".")
    if not stem or len(quote(dot + suffix)) > MAX_NAME_BYTES // 4:
        stem, dot, suffix = name, "", ""
    while len(quote(stem + dot + suffix)) > MAX_NAME_BYTES:
        stem = stem[:-1]
    return stem + dot + suffix


def single_count(results: int) -> int:
    """How many of them are delivered one by one; the others go into the bundle."""
    return results if results <= MAX_RESULT_URLS else MAX_RESULT_URLS - 1


@contextmanager
def scratch_file() -> Any:
    """A file that is gone afterwards."""
    with tempfile.SpooledTemporaryFile(max_size=IN_MEMORY_BYTES) as file:
        yield file


async def kept(chunks: AsyncIterator[bytes], file: IO[bytes]) -> None:
    async for chunk in chunks:
        file.write(chunk)


async def pieces(file: IO[bytes], *, is_stripped: bool) -> AsyncIterator[bytes]:
    """The file from its beginning; `is_stripped`: without its metadata."""
    if is_stripped:
        for piece in without_metadata(file):
            yield piece
        return
    file.seek(0)
    while piece := file.read(PIECE_BYTES):
        yield piece


class Bundle:
    """A zip of files that are packed already: stored, not compressed."""

    def __init__(self, file: IO[bytes]) -> None:
        self._zip = zipfile.ZipFile(file, "w", zipfile.ZIP_STORED)

    async def add(self, name: str, content: AsyncIterator[bytes]) -> None:
        # A date of its own would make each attempt's bundle another file.
        entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
        with self._zip.open(entry, "w", force_zip64=True) as inside:
            async for chunk in content:
                inside.write(chunk)

    def close(self) -> None:
        self._zip.close()
