"""How long something takes, measured many times."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from pydantic import BaseModel


class Spread(BaseModel):
    """Seconds."""

    samples: int
    p50: float
    p95: float
    slowest: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        p95 = statistics.quantiles(seconds, n=20)[-1] if len(seconds) > 1 else seconds[0]
        return cls(
            samples=len(seconds), p50=statistics.median(seconds), p95=min(p95, max(seconds)), slowest=max(seconds)
        )
