"""Control images: allowed sources, and how they are fetched (pitfall 29).

    https://…            hosts on an allow-list; resolved once, the address checked and pinned; no redirects
    file://, s3://, …    below a root of the job's tenant

The content must be a picture of limited size. Its type is read from its first bytes; the sender's file name and
content type are ignored.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

import httpx

from bridge.storage import STORAGE_ERRORS, Storage
from comfyui_temporal.contracts.paths import is_plain
from runtime.stated_size import is_stated_above

MAX_IMAGE_BYTES: Final = 20 * 1024 * 1024
FETCH_SECONDS: Final = 30.0
_SIGNATURES: Final[tuple[tuple[bytes, str], ...]] = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
)
_STORE_SCHEMES: Final = ("file", "s3", "gs", "az")

Resolve = Callable[[str, int], Awaitable[list[str]]]


class ImageRefused(ValueError):
    """The image is refused; the text gives the reason."""


class ImageUnreachable(Exception):
    """The image cannot be fetched now, but perhaps later."""


@dataclass(frozen=True)
class FetchedImage:
    content: bytes
    content_type: str


async def _resolve(host: str, port: int) -> list[str]:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


class ControlImages:
    """`hosts`: allowed hosts of https images; `.example.org` allows all subdomains. `roots` contain `{tenant_id}`."""

    def __init__(
        self,
        *,
        hosts: Iterable[str] = (),
        roots: Iterable[str] = (),
        max_bytes: int = MAX_IMAGE_BYTES,
        resolve: Resolve = _resolve,
    ) -> None:
        self._hosts = [host.lower() for host in hosts]
        self._roots = list(roots)
        self._max_bytes = max_bytes
        self._resolve = resolve

    def problem(self, address: str, tenant_id: str) -> str | None:
        """Why this address is refused, or None. Makes no request."""
        try:
            parts = urlsplit(address)
            port = parts.port
        except ValueError:
            return "is not a valid address"
        if parts.scheme in _STORE_SCHEMES:
            return None if self._below_root(address, tenant_id) else "is not below a folder of the tenant's images"
        if parts.scheme != "https":
            return "must be an https:// address or in object storage"
        if "@" in parts.netloc or port not in (None, 443):
            return "must not contain credentials or a port"
        if not self._is_allowed(parts.hostname or ""):
            allowed = ", ".join(self._hosts) or "none"
            return f"is on a host that is not allowed; allowed are {allowed}"
        return None

    async def fetch(self, address: str, tenant_id: str) -> FetchedImage:
        """Raises ImageRefused, ImageUnreachable."""
        problem = self.problem(address, tenant_id)
        if problem:
            raise ImageRefused(f"it {problem}")
        content = await (self._download(address) if address.startswith("https:") else self._read(address, tenant_id))
        content_type = picture_type(content)
        if content_type is None:
            raise ImageRefused("it is not a PNG, JPEG, GIF or WebP picture")
        return FetchedImage(content, content_type)

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

    async def _read(self, address: str, tenant_id: str) -> bytes:
        below = self._below_root(address, tenant_id)
        assert below is not None
        try:
            storage = Storage(below[0])
            if not await asyncio.to_thread(storage.keeps_inside, below[1]):
                raise ImageRefused("its path leaves the tenant's folder")
            if await storage.size_bytes(below[1]) > self._max_bytes:
                raise ImageRefused(f"it is larger than {self._max_bytes} bytes")
            return await storage.read_whole(below[1])
        except FileNotFoundError:
            raise ImageRefused("it does not exist") from None
        except ImageRefused:
            raise
        except STORAGE_ERRORS as error:
            raise ImageUnreachable(f"its storage cannot be read: {type(error).__name__}") from None

    async def _download(self, address: str) -> bytes:
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
                content = bytearray()
                too_large = ImageRefused(f"it is larger than {self._max_bytes} bytes")
                if is_stated_above(response.headers.get("content-length"), self._max_bytes):
                    raise too_large
                async for chunk in response.aiter_bytes():
                    content += chunk
                    if len(content) > self._max_bytes:
                        raise too_large
                return bytes(content)
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


def picture_type(content: bytes) -> str | None:
    """The content type, from the first bytes; None if it is not a picture that ComfyUI loads."""
    for signature, content_type in _SIGNATURES:
        if content.startswith(signature):
            return content_type
    return "image/webp" if content[:4] == b"RIFF" and content[8:12] == b"WEBP" else None


def address_of(control: Mapping[str, Any]) -> str:
    return str(control.get("image_url") or "")
