"""What one tenant may use at a time (contract §7), and the answer to what is checked against it."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from pydantic import Field

from comfyui_temporal.contracts.fields import OwnModel

WINDOW_SECONDS: Final = 60
MAX_LIMIT: Final = 999_999_999_999_999
"""The largest number that a header of this kind can state (RFC 9651)."""


class Limit(StrEnum):
    """The limits by their names in headers, sentences and metrics."""

    STARTS = "starts"
    BYTES = "bytes"
    OPEN_TASKS = "open-tasks"
    OPEN_STREAMS = "open-streams"
    OPEN_UPLOADS = "open-uploads"
    UPLOAD_BYTES = "upload-bytes"


class TenantLimits(OwnModel):
    """One tenant's limits; 0: none."""

    starts_per_minute: int = Field(default=0, ge=0, le=MAX_LIMIT)
    bytes_per_minute: int = Field(default=0, ge=0, le=MAX_LIMIT)
    """Of the bodies of starts: prompts, lists of files."""
    open_tasks: int = Field(default=0, ge=0, le=MAX_LIMIT)
    open_streams: int = Field(default=0, ge=0, le=MAX_LIMIT)
    open_uploads: int = Field(default=0, ge=0, le=MAX_LIMIT)
    """Those that are not whole yet."""
    upload_bytes: int = Field(default=0, ge=0, le=MAX_LIMIT)
    """Of all uploads that are kept, each with the size that it will have."""

    @property
    def bounds_starts(self) -> bool:
        """Whether a start has to be counted."""
        return bool(self.starts_per_minute or self.bytes_per_minute or self.open_tasks)


NO_LIMITS: Final = TenantLimits()


class Allowance(OwnModel):
    """How much of one limit is left."""

    limit: Limit
    most: int
    left: int
    """Never below 0."""
    resets_in_seconds: int
    """When more of it may be there again; a guess for what is open or kept: it depends on what ends."""


class Admission(OwnModel):
    """Whether a start, a stream or an upload is within its tenant's limits."""

    refused: Limit | None = None
    """The limit that is used up; None: admitted."""
    allowances: list[Allowance] = []
    """Those that are set, as they are after this one."""

    @property
    def retry_after_seconds(self) -> int:
        """When to try again after a refusal."""
        return next((each.resets_in_seconds for each in self.allowances if each.limit is self.refused), 1)

    def sentence(self, tenant_id: str) -> str:
        """What is used up, and what to do."""
        most = next((each.most for each in self.allowances if each.limit is self.refused), 0)
        match self.refused:
            case Limit.STARTS:
                used = f"has started {most} tasks within a minute, its limit. Nothing was started"
            case Limit.BYTES:
                used = f"has sent {most} bytes of orders within a minute, its limit. Nothing was started"
            case Limit.OPEN_TASKS:
                used = f"has {most} open tasks, its limit. Nothing was started: wait until some have ended"
            case Limit.OPEN_UPLOADS:
                used = f"has {most} unfinished uploads, its limit. Finish or delete some"
            case Limit.UPLOAD_BYTES:
                used = f"may keep {most} bytes of uploads, and this one is too many. Delete some"
            case _:
                used = f"has {most} open streams, its limit. Close some"
        return f"The tenant {tenant_id} {used}; try again in {self.retry_after_seconds} s."
