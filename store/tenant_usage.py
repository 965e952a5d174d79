"""What this process counted of a tenant's starts a moment ago, and has admitted since.

Counting takes as long as there are starts and open tasks to count, and every start of the tenant waits for it. Far from
every limit the count of a moment ago is enough.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from comfyui_temporal.contracts.tenant_limits import WINDOW_SECONDS, Allowance, Limit, TenantLimits

COUNTED_FOR_SECONDS: Final = 5.0
SHARE: Final = 50
"""Between two counts a process admits a fiftieth of what is left. So a limit up to 50 is exact, and a larger one may be
exceeded by a fiftieth for each process."""
OPEN_AGAIN_SECONDS: Final = 5
"""When a caller at a limit of what is open may try again: it depends on what ends."""
MAX_TENANTS: Final = 10_000


class Used(NamedTuple):
    """What a tenant has started within a minute, and has open."""

    starts: int
    sent: int
    opened: int
    frees_in: int = WINDOW_SECONDS
    """Seconds until the oldest start is a minute old."""

    def with_own(self, starts: int, sent: int) -> Used:
        return Used(self.starts + starts, self.sent + sent, self.opened + starts, self.frees_in)

    def refused_by(self, limits: TenantLimits) -> Limit | None:
        """The first limit that is exceeded."""
        return next((limit for limit, most, used, _ in self._against(limits) if 0 < most < used), None)

    def allowances(self, limits: TenantLimits) -> list[Allowance]:
        return [
            Allowance(limit=limit, most=most, left=max(0, most - used), resets_in_seconds=seconds)
            for limit, most, used, seconds in self._against(limits)
            if most
        ]

    def _against(self, limits: TenantLimits) -> Iterator[tuple[Limit, int, int, int]]:
        yield Limit.STARTS, limits.starts_per_minute, self.starts, self.frees_in
        yield Limit.BYTES, limits.bytes_per_minute, self.sent, self.frees_in
        yield Limit.OPEN_TASKS, limits.open_tasks, self.opened, OPEN_AGAIN_SECONDS


@dataclass
class _Counted:
    used: Used
    at: float
    own_starts: int = 0
    own_bytes: int = 0


class TenantUsage:
    """Of all tenants, for one process."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._of: OrderedDict[str, _Counted] = OrderedDict()

    def counted(self, tenant_id: str, used: Used) -> None:
        """Remember a count; it includes the start that it was made for."""
        self._of[tenant_id] = _Counted(used, self._clock())
        self._of.move_to_end(tenant_id)
        if len(self._of) > MAX_TENANTS:
            self._of.popitem(last=False)

    def after(self, tenant_id: str, size: int, limits: TenantLimits) -> Used | None:
        """What is used after one more start of `size` bytes, which is admitted; None where it must be counted."""
        known = self._of.get(tenant_id)
        if known is None or self._clock() - known.at > COUNTED_FOR_SECONDS:
            return None
        starts, sent = known.own_starts + 1, known.own_bytes + size
        if known.used.with_own(SHARE * starts, SHARE * sent).refused_by(limits) is not None:
            return None
        known.own_starts, known.own_bytes = starts, sent
        return known.used.with_own(starts, sent)
