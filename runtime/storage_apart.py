"""Uploads have a place of their own: what is older than every known upload is deleted there, whoever wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit


def check_apart(uploads_url: str | None, stores: Mapping[str, str], roots: Mapping[str, list[str]]) -> None:
    """`stores` and `roots`: setting → addresses. Raises ValueError naming both settings.

    No store may be the uploads' address, lie inside it or hold it. A root, of what callers bring, may hold it: nothing
    of the root is deleted then.
    """
    if uploads_url is None:
        return
    uploads = _place(uploads_url)
    for setting, url in stores.items():
        place = _place(url)
        if place[: len(uploads)] == uploads or uploads[: len(place)] == place:
            raise _overlap(setting)
    for setting, urls in roots.items():
        if any(_place(url.partition("{tenant_id}")[0])[: len(uploads)] == uploads for url in urls):
            raise _overlap(setting)


def _overlap(setting: str) -> ValueError:
    return ValueError(
        f"uploads_url and {setting} must be different places, neither inside the other: a purge deletes old files "
        f"below uploads_url, and would delete those of {setting}"
    )


def _place(url: str) -> tuple[str, ...]:
    """Scheme, bucket and folders. What is no address is refused by whoever uses it."""
    parts = urlsplit(url)
    path = unquote(parts.netloc + parts.path)
    if parts.scheme == "file":
        return ("file", *Path(path).resolve().parts)
    return (parts.scheme, *(part for part in path.split("/") if part))
