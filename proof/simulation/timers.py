"""The timers of one run."""

from __future__ import annotations

from collections.abc import Callable

from proof.simulation.sdk import StartTimer, WorkflowActivationJob, activation_api
from proof.simulation.timeline import Scheduled, Timeline


class Timers:
    """Those that have not fired; `rung` is called with the job that fires."""

    def __init__(self, timeline: Timeline, rung: Callable[[WorkflowActivationJob], None]) -> None:
        self._timeline = timeline
        self._rung = rung
        self._open: dict[int, Scheduled] = {}

    def start(self, timer: StartTimer, began_at: float) -> None:
        """A timer that was started at `began_at`: a reset run's goes on where it was."""

        def ring() -> None:
            if self._open.pop(timer.seq, None) is not None:
                self._rung(WorkflowActivationJob(fire_timer=activation_api.FireTimer(seq=timer.seq)))

        seconds = timer.start_to_fire_timeout.ToTimedelta().total_seconds()
        self._open[timer.seq] = self._timeline.at(began_at + seconds, ring)

    def cancel(self, seq: int) -> None:
        timer = self._open.pop(seq, None)
        if timer is not None:
            timer.cancel()

    def cancel_all(self) -> None:
        for seq in list(self._open):
            self.cancel(seq)
