"""Whatever arrives, in whatever order: the run ends up knowing the newest, every end, and no flood."""

from __future__ import annotations

import asyncio
import gc
import weakref
from dataclasses import dataclass, field

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from comfyui_temporal.contracts.comfyui import JobCallback
from comfyui_temporal.contracts.scenes import Callback
from gateway.callback_news import BURST, PER_SECOND, news_of
from gateway.callback_relay import CallbackRelay, Relayed


@dataclass
class Recorder:
    """Signals that arrive, or do not, as a test wants it."""

    outcomes: list[bool]
    arrived: list[Callback] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0

    async def signal(self, _task_id: str, callback: Callback) -> Relayed:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        for _ in range(3):
            await asyncio.sleep(0)
        self.in_flight -= 1
        if self.outcomes and not self.outcomes.pop():
            return Relayed.UNAVAILABLE
        self.arrived.append(callback)
        return Relayed.SIGNALLED


def job_states(seed: list[tuple[int, bool]]) -> list[JobCallback]:
    """The states of one job in order of sequence. They differ little, so some repeat the state before; some are ends.

    A job ends once: all its ends are the same.
    """
    states = []
    for sequence, (percent, is_slow) in enumerate(seed):
        is_end = percent == 3
        states.append(
            JobCallback.model_validate(
                {
                    "task_id": "t",
                    "job_id": "j",
                    "job_status": "delivery" if is_end else "processing",
                    "result_urls": ["https://a.example/1"] if is_end else [],
                    "stage_progress": percent,
                    "estimated_time": 9 if is_slow and not is_end else 3,
                    "sequence": sequence,
                }
            )
        )
    return states


_STATES = st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=8).map(job_states)


async def _deliver(relay: CallbackRelay, callback: JobCallback, *, late: int) -> None:
    """As ComfyUI does: after a refusal it comes again."""
    for _ in range(late):
        await asyncio.sleep(0)
    while await relay.take("t", callback) is Relayed.UNAVAILABLE:
        pass


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(_STATES, st.data(), st.lists(st.booleans(), max_size=4))
async def test_the_run_learns_the_newest_and_every_end(
    states: list[JobCallback], data: st.DataObject, outcomes: list[bool]
) -> None:
    order = data.draw(st.permutations([*states, *data.draw(st.lists(st.sampled_from(states), max_size=3))]))
    lateness = data.draw(st.lists(st.integers(0, 4), min_size=len(order), max_size=len(order)))
    recorder = Recorder(outcomes)
    relay = CallbackRelay(recorder)

    deliveries = zip(order, lateness, strict=True)
    await asyncio.gather(*(_deliver(relay, callback, late=late) for callback, late in deliveries))
    await relay.close()

    if not any(callback.has_ended() for callback in states[:-1]):  # what follows an end has no meaning
        newest_known = max(recorder.arrived, key=lambda callback: callback.sequence)
        assert news_of(newest_known) == news_of(states[-1])
    for newest_end in [callback for callback in states if callback.has_ended()][-1:]:
        assert news_of(newest_end) in [news_of(callback) for callback in recorder.arrived if callback.has_ended()]
    ticks = [callback.sequence for callback in recorder.arrived if not callback.has_ended()]
    assert ticks == sorted(set(ticks))
    assert recorder.most_in_flight == 1


async def test_a_return_to_the_last_signalled_state_is_signalled_while_another_signal_is_in_flight() -> None:
    first, other, back = job_states([(1, False), (2, False), (1, False)])
    recorder = Recorder([])
    relay = CallbackRelay(recorder)
    await relay.take("t", first)

    in_flight = asyncio.create_task(relay.take("t", other))
    while recorder.in_flight == 0:  # noqa: ASYNC110
        await asyncio.sleep(0)
    await relay.take("t", back)
    await in_flight

    assert [callback.sequence for callback in recorder.arrived] == [0, 1, 2]


async def test_nothing_of_a_callback_is_kept_once_it_was_signalled() -> None:
    [delivery] = job_states([(3, False)])
    recorder = Recorder([])
    relay = CallbackRelay(recorder)
    assert await relay.take("t", delivery) is Relayed.SIGNALLED
    assert await relay.take("t", delivery) is Relayed.COALESCED, "what it said is known all the same"
    left, urls = weakref.ref(delivery), id(delivery.result_urls)
    recorder.arrived.clear()
    del delivery
    await asyncio.sleep(0)
    gc.collect()
    assert left() is None
    assert not any(id(each) == urls for each in gc.get_objects() if isinstance(each, list) and len(each) == 1)


async def test_signals_stay_within_the_pace_under_any_load() -> None:
    now = 0.0
    recorder = Recorder([])
    relay = CallbackRelay(recorder, clock=lambda: now)
    sequence = 0
    for _ in range(100):
        now += 0.1
        for _ in range(20):
            sequence += 1
            body = {"job_id": "j", "job_status": "processing", "estimated_time": sequence, "sequence": sequence}
            await relay.take("t", JobCallback.model_validate(body))
    assert len(recorder.arrived) <= BURST + PER_SECOND * now
