"""Field types shared by every wire model.

Two rules (contract §1). Input from callers is strict: unknown fields are rejected and unclean text is an error
(`CallerModel`). Input from other services is read tolerantly: unknown fields are ignored, percentages clamped, unclean
text repaired, and an unreadable field that only informs (`next_eta`, `queue_position`) does not invalidate its message
(`OutsideModel`).
"""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    StrictInt,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from comfyui_temporal.contracts.size_budget import (
    MAX_ADDRESS_BYTES,
    MAX_MESSAGE_BYTES,
    MAX_NAME_BYTES,
    MAX_PROMPT_BYTES,
)

MAX_DEPTH: Final = 32
"""Maximum nesting of any JSON value from outside."""
MAX_MINUTES: Final = 30 * 24 * 60
"""The longest duration that may be announced: a training's cap of 30 days (contract §1), in minutes."""
MAX_POINTS: Final = 1_000_000_000

_UNCLEAN = re.compile("[\x00\ud800-\udfff]")
_BLANKS = re.compile("[\x00-\x20]")
_CONTROLS = re.compile("[\x00-\x1f]")
_ESCAPED = re.compile(r'["\\]')


class CallerModel(BaseModel):
    """Sent by callers: unknown fields are rejected, numbers are finite."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class OutsideModel(BaseModel):
    """Sent by ComfyUI or the credits service: unknown fields are ignored, numbers are finite."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class OwnModel(BaseModel):
    """Sent by us, or exchanged between our own parts."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


def repaired(text: str) -> str:
    """The text with every NUL and lone surrogate replaced by U+FFFD: PostgreSQL and protobuf reject both."""
    return _UNCLEAN.sub("\ufffd", text)


def text_bytes(text: str) -> int:
    """The most bytes that a text takes in JSON: six for a control character, two for a quotation mark or backslash."""
    plain = len(text.encode("utf-8", "surrogatepass"))
    return plain + 5 * len(_CONTROLS.findall(text)) + len(_ESCAPED.findall(text))


def shortened(text: str, limit_bytes: int = MAX_MESSAGE_BYTES) -> str:
    """The text, shortened to at most `limit_bytes` bytes in JSON. An ellipsis marks the cut."""
    if len(text) * 6 <= limit_bytes or (len(text) <= limit_bytes and text_bytes(text) <= limit_bytes):
        return text
    left, cut = limit_bytes - len("…".encode()), 0
    while cut < len(text) and (left := left - text_bytes(text[cut])) >= 0:
        cut += 1
    return text[:cut] + "…"


def _clean(text: str) -> str:
    if _UNCLEAN.search(text):
        raise ValueError("must not contain NUL characters or lone surrogates")
    return text


def _at_most_bytes(limit: int) -> AfterValidator:
    def check(text: str) -> str:
        if len(text.encode("utf-8", "surrogatepass")) > limit:
            raise ValueError(f"must not be longer than {limit} bytes in UTF-8")
        return text

    return AfterValidator(check)


def check_json(value: Any, depth: int = 0) -> None:
    """Raise ValueError if a JSON value is nested deeper than 32 or contains unclean text or a non-finite number."""
    if depth > MAX_DEPTH:
        raise ValueError(f"must not nest deeper than {MAX_DEPTH}")
    if isinstance(value, str):
        _clean(value)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError("must be a finite number")
    elif isinstance(value, int) and not -(2**63) <= value < 2**64:
        raise ValueError("must fit into 64 bits")
    elif isinstance(value, dict):
        for key, item in value.items():
            _clean(key)
            check_json(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            check_json(item, depth + 1)


def _checked_json(value: JsonValue) -> JsonValue:
    check_json(value)
    return value


def informative(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    """A field that only informs: an unreadable value becomes None and the message still counts."""
    try:
        return handler(value)
    except ValidationError:
        return None


Informative = WrapValidator(informative)
NotKept = Field(exclude=True)
"""A field of a reply that is read but not stored: neither histories nor continuations hold it (pitfall 43)."""


def first_of(count: int) -> BeforeValidator:
    """The first entries of a list or object from another service; the rest is left out."""

    def cut(value: Any) -> Any:
        if isinstance(value, list):
            return value[:count]
        return dict(islice(value.items(), count)) if isinstance(value, dict) else value

    return BeforeValidator(cut)


CallerId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
"""An id from a caller (contract §1): workflow ids, headers and fairness keys are made from it."""
OutsideId = Annotated[str, StringConstraints(pattern=r"^[._:-]*[A-Za-z0-9][A-Za-z0-9._:-]*$", max_length=128)]
"""An id from another service (contract §1); percent-encoded in paths."""


CallerText = Annotated[str, AfterValidator(_clean)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""A checksum in hex."""
Prompt = Annotated[CallerText, _at_most_bytes(MAX_PROMPT_BYTES)]
WRITTEN_BY_US: Final = {"written_by_us": True}
"""Validation context of what our own runs and workers wrote: an earlier release took some of what is refused now."""


def _not_blank(text: str, info: ValidationInfo) -> str:
    if not text.strip() and info.context != WRITTEN_BY_US:
        raise ValueError("must not be blank")
    return text


TaskPrompt = Annotated[Prompt, AfterValidator(_not_blank), Field(json_schema_extra={"pattern": r"\S"})]
"""A task's prompt: a blank one would cost what a picture of something costs."""
CallerMessage = Annotated[CallerText, _at_most_bytes(MAX_MESSAGE_BYTES)]
OutsideText = Annotated[str, AfterValidator(repaired), AfterValidator(shortened)]
OutsideName = Annotated[str, AfterValidator(repaired), AfterValidator(lambda text: shortened(text, MAX_NAME_BYTES))]
"""A word that another service chooses: a code, a version, a metric's name."""
CleanJson = Annotated[JsonValue, AfterValidator(_checked_json)]


def _whole(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a whole number, not a boolean")
    return value


Points = Annotated[int, BeforeValidator(_whole), Field(ge=-MAX_POINTS, le=MAX_POINTS)]
"""Whole points from another service. A float without a fraction is read as a whole number."""


def stated(lowest: float, highest: float) -> AfterValidator:
    """A number that decides how a job's end is charged. If it is out of range it is kept just outside, so that it is
    reported.

    Rejecting it would invalidate the whole message, and the job would seem silent.
    """
    return AfterValidator(lambda number: type(number)(min(max(number, lowest - 1), highest + 1)))


StatedPoints = Annotated[int, BeforeValidator(_whole), stated(-MAX_POINTS, MAX_POINTS)]
"""As `Points`; an out-of-range value becomes `MAX_POINTS + 1`, or is below `-MAX_POINTS`."""
CallerPoints = Annotated[StrictInt, Field(ge=1, le=MAX_POINTS)]


def _clamped_percent(value: float) -> float:
    return min(100.0, max(0.0, value))


Percent = Annotated[float, AfterValidator(_clamped_percent)]
Minutes = Annotated[float, Field(gt=0), AfterValidator(lambda minutes: min(minutes, float(MAX_MINUTES)))]
"""A duration in minutes, clamped to 30 days."""
Sequence = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=2**53)]
Counted = Annotated[int, Field(ge=0, le=2**53)]
"""A count from another service. PostgreSQL and some JSON readers cannot hold larger ones."""


def _in_utc(instant: datetime) -> datetime:
    try:
        instant.astimezone(UTC)
    except OverflowError:
        raise ValueError("must be between the years 1 and 9999 in UTC") from None
    return instant


Instant = Annotated[AwareDatetime, AfterValidator(_in_utc)]
"""ISO 8601 time with offset. PostgreSQL would reject one that UTC cannot express."""


def _web_address(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be an http or https address")
    return without_blanks(url)


def without_blanks(url: str) -> str:
    """The same address. Raises ValueError for a blank or control character in it."""
    if _BLANKS.search(url):
        raise ValueError("must not contain blanks or control characters")
    return url


def in_json_at_most(limit_bytes: int) -> AfterValidator:
    """A text that is rejected, not shortened, if it is too long in JSON: a shortened address would be wrong."""

    def check(text: str) -> str:
        if text_bytes(text) > limit_bytes:
            raise ValueError(f"must not take more than {limit_bytes} bytes")
        return text

    return AfterValidator(check)


WebAddress = Annotated[
    str,
    Field(max_length=2048),
    AfterValidator(_clean),
    AfterValidator(_web_address),
    in_json_at_most(MAX_ADDRESS_BYTES),
]


def minutes_from(start: datetime, minutes: float) -> datetime:
    """The time `minutes` after `start`. The duration is clamped to 30 days so that arithmetic never overflows."""
    return start + timedelta(minutes=min(minutes, float(MAX_MINUTES)))
