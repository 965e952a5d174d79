"""Public https hosts on loopback: real TLS with a certificate for their names, behind an address that is public."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

PUBLIC = "93.184.215.14"


class HttpsHosts(httpx.AsyncBaseTransport):
    """Answers by `host/path`: status and body, or the address that it leads to. The rest is a 404.

    As a transport it takes requests for `PUBLIC`, and for no other address.
    """

    def __init__(self, tls: ssl.SSLContext) -> None:
        self.files: dict[str, bytes] = {}
        self.leads_to: dict[str, str] = {}
        self.statuses: dict[str, int] = {}
        self.requests: list[str] = []
        self.halfway: dict[str, asyncio.Event] = {}
        """A file is sent to its middle, and the rest once this is set."""
        self._inner = httpx.AsyncHTTPTransport(verify=tls)
        self._port = 0

    async def resolve(self, host: str, port: int) -> list[str]:
        return [PUBLIC]

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        assert request.url.host == PUBLIC, "only the address that was checked is used"
        request.url = request.url.copy_with(host="127.0.0.1", port=self._port)
        return await self._inner.handle_async_request(request)

    async def aclose(self) -> None:
        """The client closes its transport after each file."""

    @asynccontextmanager
    async def served(self, tls: ssl.SSLContext) -> AsyncIterator[None]:
        server = await asyncio.start_server(self._answer, "127.0.0.1", 0, ssl=tls)
        self._port = server.sockets[0].getsockname()[1]
        async with server:
            yield
        await self._inner.aclose()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        path = head[0].split(" ")[1]
        host = next(line.split(": ")[1] for line in head if line.lower().startswith("host:"))
        name = host + path
        self.requests.append(name)
        body, headers = self.files.get(name, b""), ""
        status = self.statuses.get(name, 200 if name in self.files else 404)
        if name in self.leads_to:
            status, headers = 302, f"location: {self.leads_to[name]}\r\n"
        writer.write(
            f"HTTP/1.1 {status} .\r\n{headers}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode()
        )
        middle = len(body) // 2
        writer.write(body[:middle])
        await writer.drain()
        if name in self.halfway:
            await self.halfway[name].wait()
        writer.write(body[middle:])
        await writer.drain()
        writer.close()


@asynccontextmanager
async def https_hosts(folder: Path, *names: str) -> AsyncIterator[HttpsHosts]:
    """Hosts of these names."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
        .sign(key, hashes.SHA256())
    )
    files: Mapping[str, bytes] = {
        "host.pem": certificate.public_bytes(serialization.Encoding.PEM),
        "host.key": key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(folder / "host.pem", folder / "host.key")
    hosts = HttpsHosts(ssl.create_default_context(cafile=str(folder / "host.pem")))
    async with hosts.served(serving):
        yield hosts
