"""Small files within an order: `data:image/png;base64,…` in the place of an address.

The gateway keeps each as an upload and puts its address into the task: the bytes are in no history, no log and no
stored input. The upload's id is made of task and content, so that a repeat of the order is the same task.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass
from typing import Any, Final

from comfyui_temporal.contracts.uploads import upload_address

_INLINE: Final = re.compile(r"data:[a-z]+/[A-Za-z0-9.+-]+(?:;[A-Za-z0-9=.-]+)*;base64,")
MAX_ADDRESS_CHARACTERS: Final = 2_048


@dataclass(frozen=True)
class InlineFile:
    """A file in an order. `field`: where; `upload_id`: under which id it is kept."""

    field: str
    upload_id: str
    content: bytes


def is_inline(value: Any) -> bool:
    """Whether a value is a file, rightly written or not."""
    return isinstance(value, str) and _INLINE.match(value) is not None


def content_of(value: str) -> bytes:
    """The bytes of an inline file. Raises ValueError."""
    found = _INLINE.match(value)
    assert found is not None, "only what is_inline"
    try:
        content = base64.b64decode(value[found.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("is not base64 after 'base64,'") from None
    if not content:
        raise ValueError("is an empty file")
    return content


def checked_address(value: str) -> str:
    """The value, an address or an inline file. Raises ValueError."""
    if is_inline(value):
        content_of(value)
    elif value.startswith("data:"):
        raise ValueError("must be written like data:image/png;base64,…")
    elif len(value) > MAX_ADDRESS_CHARACTERS:
        raise ValueError(f"must not have more than {MAX_ADDRESS_CHARACTERS} characters")
    return value


def inline_id(tenant_id: str, task_id: str, content: bytes) -> str:
    """The upload's id: the same for a repeat, another for every task."""
    checksum = hashlib.sha256(content).hexdigest()
    return "inline-" + hashlib.sha256(f"{tenant_id}\n{task_id}\n{checksum}".encode()).hexdigest()[:40]


def as_address(value: Any, tenant_id: str, task_id: str) -> Any:
    """The value, with the address of its upload in the place of an inline file."""
    return upload_address(inline_id(tenant_id, task_id, content_of(value))) if is_inline(value) else value
