"""Control images and other files that a request names: allowed sources, and how they are fetched (pitfall 29).

    https://…            hosts on an allow-list; resolved once, the address checked and pinned; no redirects
    file://, s3://, …    below a root of the job's tenant
    upload:UPLOAD_ID     what the job's tenant has sent to the gateway (comfyui_temporal/contracts/uploads.py)

The content must be of the kind that is asked for, and of limited size. Its type is read from its first bytes; the
sender's file name and content type are ignored.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

import httpx

from bridge.storage import STORAGE_ERRORS, Storage
from comfyui_temporal.contracts.paths import is_plain
from comfyui_temporal.contracts.uploads import (
    HEAD_BYTES,
    KIND_NAMES,
    MAX_IMAGE_BYTES,
    FileKind,
    InputKind,
    file_type,
    is_upload,
    upload_id_of,
    upload_path,
)
from runtime.stated_size import is_stated_above

MAX_FILE_BYTES: Final = 512 * 1024 * 1024
FETCH_SECONDS: Final = 30.0
_STORE_SCHEMES: Final = ("file", "s3", "gs", "az")

Resolve = Callable[[str, int], Awaitable[list[str]]]


class ImageRefused(ValueError):
    """The file is refused; the text gives the reason."""


class ImageUnreachable(Exception):
    """The file cannot be fetched now, but perhaps later."""


@dataclass(frozen=True)
class FetchedFile:
    """A file whose beginning was checked. `chunks` raise ImageRefused, ImageUnreachable."""

    content_type: str
    chunks: AsyncIterator[bytes]


async def _resolve(host: str, port: int) -> list[str]:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


class ControlImages:
    """`hosts`: allowed hosts of https images; `.example.org` allows all subdomains. `roots` contain `{tenant_id}`.

    `uploads`: where tenants' uploads lie; None: none is taken. `max_bytes` of a picture, `max_file_bytes` of a video or
    sound.
    """

    def __init__(
        self,
        *,
        hosts: Iterable[str] = (),
        roots: Iterable[str] = (),
        uploads: Storage | None = None,
        max_bytes: int = MAX_IMAGE_BYTES,
        max_file_bytes: int = MAX_FILE_BYTES,
        resolve: Resolve = _resolve,
    ) -> None:
        self._hosts = [host.lower() for host in hosts]
        self._roots = list(roots)
        self._uploads = uploads
        self._max_bytes = max_bytes
        self._max_file_bytes = max_file_bytes
        self._resolve = resolve

    def problem(self, address: str, tenant_id: str) -> str | None:
        """Why this address is refused, or None. Makes no request."""
        if is_upload(address):
            if self._uploads is None:
                return "is an upload, and none is taken here"
            return None if upload_id_of(address) else "must be upload:UPLOAD_ID"
        try:
            parts = urlsplit(address)
            port = parts.port
        except ValueError:
            return "is not a valid address"
        if parts.scheme in _STORE_SCHEMES:
            return None if self._below_root(address, tenant_id) else "is not below a folder of the tenant's images"
        if parts.scheme != "https":
            return "must be an https:// address, an upload, or in object storage"
        if "@" in parts.netloc or port not in (None, 443):
            return "must not contain credentials or a port"
        if not self._is_allowed(parts.hostname or ""):
            allowed = ", ".join(self._hosts) or "none"
            return f"is on a host that is not allowed; allowed are {allowed}"
        return None

    async def missing(self, address: str, tenant_id: str) -> str | None:
        """Why an upload cannot be used, or None; None too while its storage does not answer: it is fetched later."""
        upload_id = upload_id_of(address)
        if upload_id is None or self._uploads is None:
            return None
        try:
            await self._uploads.size_bytes(upload_path(tenant_id, upload_id))
        except FileNotFoundError:
            return f"there is no complete upload {upload_id} of this tenant, or it has expired"
        except STORAGE_ERRORS:
            return None
        return None

    @asynccontextmanager
    async def opened(
        self, address: str, tenant_id: str, kind: InputKind = InputKind.IMAGE
    ) -> AsyncIterator[FetchedFile]:
        """A file of this kind, as it arrives. Raises ImageRefused, ImageUnreachable."""
        problem = self.problem(address, tenant_id)
        if problem:
            raise ImageRefused(f"it {problem}")
        most = self._max_bytes if kind.file is FileKind.IMAGE else self._max_file_bytes
        arriving = (
            self._download(address, most) if address.startswith("https:") else self._read(address, tenant_id, most)
        )
        async with aclosing(arriving) as chunks:
            head = b""
            while len(head) < HEAD_BYTES and (chunk := await anext(chunks, b"")):
                head += chunk
            found = file_type(head[:HEAD_BYTES])
            if found is None or found.kind is not kind.file:
                raise ImageRefused(f"it is not {KIND_NAMES[kind.file]}")

            async def whole() -> AsyncIterator[bytes]:
                yield head
                async for more in chunks:
                    yield more

            yield FetchedFile(found.content_type, whole())

    def _is_allowed(self, host: str) -> bool:
        host = host.lower().rstrip(".")
        return any(host == name or (name.startswith(".") and host.endswith(name)) for name in self._hosts)

    def _below_root(self, address: str, tenant_id: str) -> tuple[str, str] | None:
        """The root and the path below it, or None."""
        for template in self._roots:
            root = template.replace("{tenant_id}", tenant_id)
            path = address.removeprefix(root)
            if address.startswith(root) and is_plain(path) and "%" not in path:
                return root, path
        return None

    async def _read(self, address: str, tenant_id: str, most: int) -> AsyncGenerator[bytes, None]:
        try:
            storage, path = self._place_of(address, tenant_id)
            if not await asyncio.to_thread(storage.keeps_inside, path):
                raise ImageRefused("its path leaves the tenant's folder")
            if await storage.size_bytes(path) > most:
                raise ImageRefused(f"it is larger than {most} bytes")
            async for chunk in storage.read(path):
                yield chunk
        except FileNotFoundError:
            expired = ", or has expired" if is_upload(address) else ""
            raise ImageRefused(f"it does not exist{expired}") from None
        except ImageRefused:
            raise
        except STORAGE_ERRORS as error:
            raise ImageUnreachable(f"its storage cannot be read: {type(error).__name__}") from None

    def _place_of(self, address: str, tenant_id: str) -> tuple[Storage, str]:
        """Where the file lies. Raises STORAGE_ERRORS."""
        if (upload_id := upload_id_of(address)) is not None and self._uploads is not None:
            return self._uploads, upload_path(tenant_id, upload_id)
        below = self._below_root(address, tenant_id)
        assert below is not None
        return Storage(below[0]), below[1]

    async def _download(self, address: str, most: int) -> AsyncGenerator[bytes, None]:
        parts = urlsplit(address)
        host = parts.hostname or ""
        pinned = await self._public_address(host)
        target = f"https://{f'[{pinned}]' if ':' in pinned else pinned}{parts.path or '/'}"
        target += f"?{parts.query}" if parts.query else ""
        try:
            async with (
                httpx.AsyncClient(timeout=FETCH_SECONDS, follow_redirects=False, trust_env=False) as http,
                http.stream("GET", target, headers={"host": host}, extensions={"sni_hostname": host}) as response,
            ):
                if response.status_code >= 500 or response.status_code == 429:
                    raise ImageUnreachable(f"its host answered HTTP {response.status_code}")
                if response.status_code != 200:
                    raise ImageRefused(f"its host answered HTTP {response.status_code}; redirects are not followed")
                too_large = ImageRefused(f"it is larger than {most} bytes")
                if is_stated_above(response.headers.get("content-length"), most):
                    raise too_large
                left = most
                async for chunk in response.aiter_bytes():
                    left -= len(chunk)
                    if left < 0:
                        raise too_large
                    yield chunk
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ImageUnreachable(f"its host did not answer: {type(error).__name__}") from None

    async def _public_address(self, host: str) -> str:
        """One address of the host; all of its addresses must be public. Raises ImageRefused, ImageUnreachable."""
        try:
            found = await self._resolve(host, 443)
        except OSError:
            raise ImageUnreachable("its host cannot be resolved") from None
        if not found or not all(is_public(address) for address in found):
            raise ImageRefused("its host has an address that is not public")
        return found[0]


NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
LOCAL_NAT64: Final = ipaddress.IPv6Network("64:ff9b:1::/48")
"""NAT64 prefix of a local network (RFC 8215): its target is unknown."""
IPV4_COMPATIBLE: Final = ipaddress.IPv6Network("::/96")


def is_public(address: str) -> bool:
    """Whether an IP address is public. IPv4 addresses inside IPv6 ones are unwrapped."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address):
        inner = parsed.ipv4_mapped or parsed.sixtofour or (parsed.teredo[1] if parsed.teredo else None)
        if inner is not None:
            return is_public(str(inner))
        if parsed in LOCAL_NAT64:
            return False
        # The last 32 bits are an IPv4 address.
        if parsed in NAT64 or parsed in IPV4_COMPATIBLE:
            return is_public(str(ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)))
    return parsed.is_global and not parsed.is_multicast


def address_of(control: Mapping[str, Any]) -> str:
    return str(control.get("image_url") or "")
