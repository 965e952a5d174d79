"""Files at https addresses of hosts on an allow-list, for requests that strangers write (pitfall 29).

A host is resolved once for each request, all its addresses must be public, and the request goes to the one that was
checked. A redirect is followed only where it is allowed at all, and its target is checked in the same way.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Final
from urllib.parse import urljoin, urlsplit

import httpx

from runtime.http_transport import trusted_certificates
from runtime.stated_size import is_stated_above

FETCH_SECONDS: Final = 30.0
"""A host that sends nothing for so long does not answer."""

Resolve = Callable[[str, int], Awaitable[list[str]]]


class FileRefused(ValueError):
    """The file is refused; the text gives the reason."""


class FileUnreachable(Exception):
    """The file cannot be fetched now, but perhaps later."""


async def _resolve(host: str, port: int) -> list[str]:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


class AllowedHosts:
    """`hosts`: their names; `.example.org` allows all below it. `redirects`: how many are followed at most."""

    def __init__(
        self,
        hosts: Iterable[str] = (),
        *,
        redirects: int = 0,
        resolve: Resolve = _resolve,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._hosts = [host.lower() for host in hosts]
        self._redirects = redirects
        self.resolve = resolve
        self.transport = transport

    def problem(self, address: str, *, others: str = "") -> str | None:
        """Why this address is refused, or None. Makes no request. `others`: what else is taken, for the text."""
        try:
            parts = urlsplit(address)
            port = parts.port
        except ValueError:
            return "is not a valid address"
        if parts.scheme != "https":
            return f"must be an https:// address{f', {others}' if others else ''}"
        if "@" in parts.netloc or port not in (None, 443):
            return "must not contain credentials or a port"
        if not self._is_allowed(parts.hostname or ""):
            allowed = ", ".join(self._hosts) or "none"
            return f"is on a host that is not allowed; allowed are {allowed}"
        return None

    async def download(self, address: str, most: int) -> AsyncGenerator[bytes, None]:
        """The file's bytes as they arrive, `most` at most. Raises FileRefused, FileUnreachable."""
        try:
            async with self._answered(address) as response:
                too_large = FileRefused(f"it is larger than {most} bytes")
                if is_stated_above(response.headers.get("content-length"), most):
                    raise too_large
                left = most
                async for chunk in response.aiter_bytes():
                    left -= len(chunk)
                    if left < 0:
                        raise too_large
                    yield chunk
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise FileUnreachable(f"its host did not answer: {type(error).__name__}") from None

    @asynccontextmanager
    async def _answered(self, address: str) -> AsyncIterator[httpx.Response]:
        """The answer 200, behind the redirects that are followed."""
        async with httpx.AsyncClient(
            timeout=FETCH_SECONDS,
            follow_redirects=False,
            trust_env=False,
            verify=trusted_certificates(),
            transport=self.transport,
        ) as http:
            for left in range(self._redirects, -1, -1):
                problem = self.problem(address)
                if problem is not None:
                    raise FileRefused(f"it {problem}")
                host, target = await self._pinned(address)
                async with http.stream(
                    "GET", target, headers={"host": host}, extensions={"sni_hostname": host}
                ) as response:
                    status = response.status_code
                    if status == 200:
                        yield response
                        return
                    if status >= 500 or status == 429:
                        raise FileUnreachable(f"its host answered HTTP {status}")
                    if not response.has_redirect_location:
                        raise FileRefused(f"its host answered HTTP {status}")
                    if not left:
                        some = f"more than {self._redirects} redirects" if self._redirects else "redirects"
                        raise FileRefused(f"its host answered HTTP {status}; {some} are not followed")
                    address = urljoin(address, response.headers["location"])

    async def _pinned(self, address: str) -> tuple[str, str]:
        """Its host, and its address with the host's IP address in place of the name."""
        parts = urlsplit(address)
        host = parts.hostname or ""
        pinned = await self._public_address(host)
        target = f"https://{f'[{pinned}]' if ':' in pinned else pinned}{parts.path or '/'}"
        return host, target + (f"?{parts.query}" if parts.query else "")

    def _is_allowed(self, host: str) -> bool:
        host = host.lower().rstrip(".")
        return any(host == name or (name.startswith(".") and host.endswith(name)) for name in self._hosts)

    async def _public_address(self, host: str) -> str:
        """One address of the host; all of its addresses must be public. Raises FileRefused, FileUnreachable."""
        try:
            found = await self.resolve(host, 443)
        except OSError:
            raise FileUnreachable("its host cannot be resolved") from None
        if not found or not all(is_public(address) for address in found):
            raise FileRefused("its host has an address that is not public")
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
