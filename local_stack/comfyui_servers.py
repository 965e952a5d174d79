"""Checks that the real ComfyUI servers of a stack answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import httpx

LOOK_SECONDS: Final = 3.0
OF_A_PROXY: Final = frozenset({401, 403, 407})
"""A proxy that demands something is there; the GPU worker has what it demands, and says what it lacks."""


def silent_servers(urls: Iterable[str]) -> Iterator[str]:
    """A sentence for each server that does not answer. It may still be starting; its jobs wait for it."""
    for url in urls:
        try:
            answer = httpx.get(f"{url.rstrip('/')}/system_stats", timeout=LOOK_SECONDS, trust_env=False)
            if answer.status_code not in OF_A_PROXY:
                answer.raise_for_status()
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            yield (
                f"ComfyUI at {url} does not answer ({str(error) or type(error).__name__}). Jobs wait until it does: "
                "start it, or set the right address: COMFYUI=http://host:port."
            )
