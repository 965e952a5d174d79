"""What no honest client sends, made from a seed: handshakes, frames, callbacks; each often begins as a good one."""

from __future__ import annotations

import base64
import gzip
import json
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeVar
from urllib.parse import quote

from comfyui_temporal.contracts.comfyui import JobStatus
from tests.gateway.serving import delivery, tick, training_tick

T = TypeVar("T")
Headers = list[tuple[str, bytes]]

ODD_TEXTS: Final = (
    *("", " ", "*", ",", ",,,,", "\x00", "\ufffd", "%", "%00", "%zz", "..", "../../etc/passwd", "null", "true", "-1"),
    *("0", "1" * 400, "a" * 5_000, "\ud7ff", "🦄" * 50, "' OR 1=1 --", "{{7*7}}", "\r\nX-Injected: 1", "é", "\u2028"),
    *("Infinity", "NaN", "1e999", "9" * 5_000, "[]", "{}"),
)
ODD_VALUES: Final[tuple[Any, ...]] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.0, 1e308, "", "x", [], {}, [[]]),
    *([None] * 50, {"a": {"b": {"c": {}}}}, "\x00", "\ud800", "a" * 10_000, float("nan"), float("inf"), ["\x00"]),
)
PATHS: Final = ("/api/v1/tasks/stream/ws",) * 20 + (
    *("/api/v1/tasks/stream/ws/", "/api/v1/tasks/stream/%77s", "//api/v1/tasks/stream/ws", "/api/v1/tasks/stream/sse"),
    *("/", "/ws", "/metrics", "/callbacks/comfyui/x", "/api/v1/tasks/%00/events", "*", "/%", "/%ff%fe", "/é"),
)
HEADER_NAMES: Final = ("Content-Encoding", "Content-Type", "Accept", "Expect", "Cookie", "Origin", "X-Forwarded-For")
HEADER_VALUES: Final = (
    *(
        b"",
        b"gzip",
        b"br",
        b"text/plain",
        b"application/json; charset=utf-16",
        b"100-continue",
        b"\xff\xfe",
        b"\x80" * 50,
    ),
    *(
        b"999.999.999.999",
        b"127.0.0.1, \xff",
        b"comfyui_temporal_token=",
        b"a=b; " * 100,
        b"null",
        b"https://evil.example",
    ),
)


class Nonsense(random.Random):
    """Random, but the same for the same seed."""

    def happens(self, share: float) -> bool:
        return self.random() < share

    # Text and bytes

    def text(self, good: Sequence[str] = ()) -> str:
        roll = self.random()
        if good and roll < 0.5:
            return self.choice(good)
        if good and roll < 0.7:
            return self.damaged(self.choice(good).encode()).decode("latin-1")
        if roll < 0.9:
            return self.choice(ODD_TEXTS)
        return "".join(chr(self.randrange(1, 0xD7FF)) for _ in range(self.randrange(20)))

    def damaged(self, raw: bytes) -> bytes:
        changed = bytearray(raw)
        for _ in range(self.randrange(1, 4)):
            place = self.randrange(len(changed) + 1)
            match self.randrange(4):
                case 0:
                    del changed[place : place + self.randrange(1, 20)]
                case 1:
                    changed[place:place] = self.randbytes(self.randrange(1, 20))
                case 2 if place < len(changed):
                    changed[place] ^= 1 << self.randrange(8)
                case _:
                    changed[place:place] = changed[: self.randrange(1, 50)]
        return bytes(changed)

    def value(self, depth: int = 0) -> Any:
        if depth < 3 and self.happens(0.2):
            return {self.text(): self.value(depth + 1) for _ in range(self.randrange(4))}
        return self.choice(ODD_VALUES)

    # WebSocket

    def handshake(self, *, tasks: Sequence[str], tokens: Sequence[str], cursors: Sequence[str]) -> bytes:
        """A whole request; half of them are ones that open."""
        target = self.choice(PATHS)
        query: list[tuple[str, str]] = []
        is_good = self.happens(0.4)
        if is_good:
            target = PATHS[0]
            query.append(self.choice([("task_id", tasks[0]), ("subscribe", ",".join(tasks)), ("subscribe", "*")]))
        else:
            lists = [*tasks, ",".join(tasks), "*", "*,*", ",".join(["a"] * 200)]
            given: dict[str, Sequence[str]] = {"task_id": tasks, "subscribe": lists, "cursor": cursors, "token": tokens}
            for _ in range(self.randrange(5)):
                name = self.choice([*given, "unknown"])
                query.append((name, self.text(given.get(name, ()))))
        raw = self.happens(0.1)
        parts = [f"{name}={value if raw else quote(value, safe='', errors='replace')}" for name, value in query]
        address = target + ("?" + "&".join(parts) if parts else "")
        headers: Headers = [
            ("Host", b"gateway"),
            ("Connection", b"Upgrade"),
            ("Upgrade", b"websocket"),
            ("Sec-WebSocket-Version", b"13"),
            ("Sec-WebSocket-Key", base64.b64encode(self.randbytes(16))),
        ]
        if is_good or self.happens(0.7):
            headers.append(("Authorization", b"Bearer " + (tokens[0] if is_good else self.text(tokens)).encode()))
        if not is_good:
            headers = self.odd_headers(headers)
        return self.head("GET" if is_good or self.happens(0.95) else "POST", address, headers)

    def frames(self) -> Iterator[bytes]:
        for _ in range(self.randrange(6)):
            match self.randrange(6):
                case 0:
                    yield self.frame(0x1, self.text().encode("utf-8", "surrogatepass"))
                case 1:
                    yield self.frame(self.randrange(16), self.randbytes(self.randrange(200)), first=self.randrange(16))
                case 2:
                    yield self.frame(0x8, self.close_payload())
                case 3:
                    yield self.frame(0x9, self.randbytes(self.randrange(130)))
                case 4:
                    yield self.frame(self.choice((0x0, 0x2)), self.randbytes(self.choice((125, 126, 5_000, 70_000))))
                case _:
                    yield self.randbytes(self.randrange(1, 100))

    def close_payload(self) -> bytes:
        code = self.choice((0, 999, 1000, 1001, 1004, 1005, 1006, 1012, 1015, 2999, 3000, 4999, 5000, 65_535))
        return self.choice(
            (b"", b"\x03", struct.pack("!H", code) + self.choice((b"", b"bye", b"\xff\xfe", b"x" * 200)))
        )

    def frame(self, opcode: int, payload: bytes, *, first: int = 0x8) -> bytes:
        """`first`: FIN and the reserved bits. Not all are masked, and some state a wrong length."""
        size = len(payload) if self.happens(0.9) else self.choice((0, 125, 65_535, 2**40, 2**63))
        is_masked = 0x80 if self.happens(0.95) else 0
        head = bytes([(first << 4) | opcode])
        if size < 126:
            head += bytes([is_masked | size])
        elif size < 65_536:
            head += bytes([is_masked | 126]) + struct.pack("!H", size)
        else:
            head += bytes([is_masked | 127]) + struct.pack("!Q", size)
        if not is_masked:
            return head + payload
        mask = self.randbytes(4)
        return head + mask + bytes(byte ^ mask[place % 4] for place, byte in enumerate(payload))

    # Callbacks

    def callback(self, task_id: str, **fields: Any) -> bytes:
        """A body; `fields` are in each that is JSON."""
        sequence = self.choice((1, self.randrange(1, 10**6), 2**63, 0, -1))
        kinds: list[dict[str, Any]] = [tick(sequence), delivery(sequence), training_tick(sequence)]
        body = {"task_id": task_id, **self.choice(kinds), **fields}
        for _ in range(self.randrange(4)):
            body[self.choice([*body, "unknown", "log", "output", "error_details", "occurred_at"])] = self.value()
        if self.happens(0.1):
            body["job_status"] = self.choice([*(status.value for status in JobStatus), "unheard-of"])
        if self.happens(0.1):
            body["log"] = [{"ts": self.value(), "level": self.value(), "message": self.text()} for _ in range(50)]
        raw = json.dumps({**body, **fields}).encode()
        match self.randrange(12):
            case 0:
                return self.damaged(raw)
            case 1:
                return self.randbytes(self.randrange(300))
            case 2:
                return gzip.compress(raw)
            case 3:
                return raw.decode().encode("utf-16")
            case 4:
                return raw[:-1] + b', "task_id": "another", "task_id": 5}'
            case 5:
                return raw[:-1] + b', "deep": ' + b"[" * 20_000 + b"]" * 20_000 + b"}"
            case 6:
                return raw[:-1] + b', "filler": "' + b"x" * self.choice((60_000, 66_000, 257_000, 300_000)) + b'"}'
        return raw

    def webhook_headers(self, signed: dict[str, str], signed_at: Callable[[datetime], dict[str, str]]) -> Headers:
        """Of a callback: as they should be, or of another time, or twice, or damaged, or left out."""
        if self.happens(0.2):
            signed = signed_at(
                datetime.now(UTC) + timedelta(seconds=self.choice((-400, -299, 299, 400, -(10**9), 10**9)))
            )
        headers: Headers = [(name, value.encode()) for name, value in signed.items()]
        if self.happens(0.5):
            return headers
        for place, (name, value) in enumerate(list(headers)):
            match self.randrange(8):
                case 0:
                    headers[place] = (name, self.damaged(value).translate(None, b"\r\n\x00"))
                case 1:
                    headers.append((name, value if self.happens(0.5) else self.text().encode("utf-8", "replace")))
                case 2:
                    headers[place] = (name, self.choice(HEADER_VALUES))
                case 3:
                    headers[place] = ("x-left-out", b"")
        return self.odd_headers(headers)

    def callback_request(self, task_id: str, raw: bytes, headers: Headers) -> bytes:
        target = quote(task_id) if self.happens(0.9) else quote(self.text(), safe="", errors="replace")
        # Longer than it is would have to wait for the time limit of a body.
        length = len(raw) if self.happens(0.95) else self.choice((0, len(raw) // 2))
        framed: Headers = [("Host", b"gateway"), ("Content-Length", str(length).encode())]
        body = raw
        match self.randrange(20):
            case 0:
                framed[1] = ("Content-Length", self.choice((b"-1", b"1e3", b"x", b"9" * 40, b"0x10", b"+5")))
            case 1:
                framed.append(framed[1])
            case 2 | 3:
                framed[1] = ("Transfer-Encoding", self.choice((b"chunked", b"chunked", b"gzip, chunked", b"identity")))
                body = b"".join(
                    b"%x\r\n%s\r\n" % (len(raw[at : at + 7_000]), raw[at : at + 7_000])
                    for at in range(0, len(raw), 7_000)
                )
                body += b"0\r\n\r\n" if self.happens(0.8) else b"zz\r\n"
        method = "POST" if self.happens(0.95) else self.choice(("PUT", "GET", "OPTIONS", "BREW"))
        return self.head(method, f"/callbacks/comfyui/{target}", [*framed, *headers]) + body

    # Heads

    def odd_headers(self, headers: Headers) -> Headers:
        changed = list(headers)
        for _ in range(self.randrange(3)):
            match self.randrange(5):
                case 0 if changed:
                    del changed[self.randrange(len(changed))]
                case 1 if changed:
                    changed.append(self.choice(changed))
                case 2 if changed:
                    place = self.randrange(len(changed))
                    changed[place] = (changed[place][0], self.choice(HEADER_VALUES))
                case 3:
                    changed += [(f"x-{number}", b"y" * self.choice((1, 100))) for number in range(self.randrange(150))]
                case _:
                    changed.append((self.choice(HEADER_NAMES), self.choice(HEADER_VALUES)))
        self.shuffle(changed)
        return changed

    def head(self, method: str, target: str, headers: Headers) -> bytes:
        line = f"{method} {target} HTTP/1.1\r\n".encode("utf-8", "replace")
        return line + b"".join(b"%s: %s\r\n" % (name.encode(), value) for name, value in headers) + b"\r\n"


def close_code_in(received: bytes) -> int | None:
    """Of the first close frame among a server's frames."""
    at = 0
    while at + 2 <= len(received):
        opcode, size = received[at] & 0x0F, received[at + 1] & 0x7F
        at += 2
        if size >= 126:
            width = 2 if size == 126 else 8
            size = int.from_bytes(received[at : at + width], "big")
            at += width
        if opcode == 0x8:
            return int.from_bytes(received[at : at + 2], "big") if size >= 2 else None
        at += size
    return None
