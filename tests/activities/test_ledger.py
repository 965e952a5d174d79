"""A task's ledger as a workflow gets it: whether it is complete, how long it takes, what of a long one is left out.

`tests/activities/test_outside_http.py` has the ordinary path over several pages.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from activities.credits import CUT, CreditsClient, entries_of_task, fitting
from activities.outside_http import OutsideFailure, time_limit
from comfyui_temporal.contracts.calls import LedgerQuery
from comfyui_temporal.contracts.credits import Ledger, LedgerEntry, LedgerKind
from comfyui_temporal.contracts.errors import FailureCode
from comfyui_temporal.contracts.size_budget import MAX_LEDGER_BYTES, json_bytes
from tests.activities.calls import call_for, tokens
from tests.activities.loopback import Answer, Seen, always, error_body, serving

Page = dict[str, Any]
NO_LONGER_PAGE = always(422, {"detail": "limit: at most 200"})


def entries(count: int, **more: object) -> list[dict[str, object]]:
    return [{"ledger_id": f"l-{n}", "change": -1, "task_id": "task-1"} | more for n in range(count)]


def service(page: Callable[[int, str | None], Page | Answer], *, seconds: float = 0) -> Answer:
    """Shows `page(limit, cursor)`, or answers as that says, after `seconds`."""

    async def answer(request: Seen, writer: asyncio.StreamWriter) -> None:
        query = httpx.URL(request.target).params
        shown = page(int(query["limit"]), query.get("cursor"))
        await asyncio.sleep(seconds)
        await (always(200, shown) if isinstance(shown, dict) else shown)(request, writer)

    return answer


async def silence(request: Seen, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(60)


async def read(answer: Answer, *, limit: int = 2) -> Ledger:
    async with serving(answer) as server, CreditsClient(server.url, tokens()) as client:
        reply = (await client.ledger(LedgerQuery(call_for=call_for(), task_id="task-1", limit=limit))).reply
    assert reply is not None
    return reply


@pytest.mark.parametrize(
    "page",
    [
        pytest.param({"entries": entries(1)}, id="a page that is not full"),
        pytest.param({"entries": entries(2, kind="charge")}, id="a full page of a service with kinds"),
        pytest.param({"entries": [*entries(1), *entries(1, kind="charge")]}, id="some entries have kinds"),
        pytest.param({"entries": entries(1), "cursor": ""}, id="an empty cursor"),
    ],
)
async def test_a_ledger_that_ends_on_its_first_page_is_complete(page: Page) -> None:
    """Also where the service would refuse a longer page: none is needed."""
    ledger = await read(service(lambda limit, _: page if limit == 2 else NO_LONGER_PAGE))
    assert (len(ledger.entries), ledger.cursor) == (len(page["entries"]), None)


async def test_the_pages_of_a_service_without_kinds_are_followed() -> None:
    def page(limit: int, cursor: str | None) -> Page:
        return {"entries": entries(2), "cursor": "p2"} if cursor is None else {"entries": entries(1)}

    ledger = await read(service(page))
    assert (len(ledger.entries), ledger.cursor) == (3, None)


@pytest.mark.parametrize(
    "longer",
    [
        pytest.param(NO_LONGER_PAGE, id="a refusal of its length"),
        pytest.param(always(404, error_body("account_not_found", "40401")), id="a definite refusal"),
        pytest.param(always(503), id="no answer"),
    ],
)
async def test_a_full_page_stays_without_an_end_where_a_longer_one_is_not_shown(longer: Answer) -> None:
    ledger = await read(service(lambda limit, _: {"entries": entries(2)} if limit == 2 else longer))
    assert (len(ledger.entries), bool(ledger.cursor)) == (2, True)


async def test_a_page_of_the_greatest_length_is_requested_once() -> None:
    answer = service(lambda limit, _: {"entries": entries(limit)})
    async with serving(answer) as server, CreditsClient(server.url, tokens()) as client:
        reply = (await client.ledger(LedgerQuery(call_for=call_for(), task_id="task-1", limit=1000))).reply
        assert len(server.seen) == 1
    assert reply is not None
    assert (len(reply.entries), bool(reply.cursor)) == (1000, True)


async def test_a_longer_page_may_take_its_time() -> None:
    ledger = await read(service(lambda limit, _: {"entries": entries(min(limit, 3))}, seconds=0.1))
    assert (len(ledger.entries), ledger.cursor) == (3, None)


async def test_all_pages_together_take_no_longer_than_one_call_may() -> None:
    slow = service(lambda _, cursor: {"entries": [], "cursor": f"{cursor}+"}, seconds=0.25)
    began = time.monotonic()
    with time_limit(0.4), pytest.raises(OutsideFailure) as raised:
        await read(slow)
    assert raised.value.code is FailureCode.CREDITS_UNAVAILABLE
    assert time.monotonic() - began < 5


async def test_a_longer_page_that_does_not_come_in_time_is_left() -> None:
    began = time.monotonic()
    with time_limit(3):
        ledger = await read(service(lambda limit, _: {"entries": entries(2)} if limit == 2 else silence, seconds=1))
    assert (len(ledger.entries), bool(ledger.cursor)) == (2, True)
    assert time.monotonic() - began < 4.5


async def test_a_long_ledger_is_left_with_what_was_read_in_a_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("activities.credits.LEDGER_SECONDS", 0.2)

    def page(_: int, cursor: str | None) -> Page:
        return {"entries": entries(1), "cursor": str(int(cursor or 0) + 1)}

    ledger = await read(service(page, seconds=0.05))
    assert 0 < len(ledger.entries) < 20
    assert ledger.cursor == str(len(ledger.entries))


def entry(
    name: str, change: int, hold: str | None = "h-1", kind: LedgerKind | None = None, *, task_id: str | None = "task-1"
) -> LedgerEntry:
    """By its kind if it has one, else by a reason, which `name` begins with."""
    reason = name.partition(":")[0] if kind is None else ""
    return LedgerEntry(ledger_id=name, change=change, task_id=task_id, pre_deduct_id=hold, kind=kind, reason=reason)


def held(name: str, hold: str | None = "h-1", points: int = 24) -> LedgerEntry:
    return entry(name, -points, hold, LedgerKind.PRE_DEDUCT)


def ended(name: str, kind: LedgerKind, hold: str | None = "h-1", points: int = 24) -> LedgerEntry:
    return entry(name, points, hold, kind)


def names_in(found: list[LedgerEntry]) -> list[str]:
    return [each.ledger_id for each in found]


def test_an_entry_belongs_to_a_task_by_its_id_else_by_its_hold() -> None:
    shown = [
        entry("cancel:mine", 24, task_id=None),
        entry("cancel:of-no-task", 24, "h-9", task_id=""),
        entry("cancel:of-another-task", 24, task_id="task-2"),
        entry("charge:of-nobody", -1, None, task_id=None),
        entry("charge:mine", -1, None),
        held("hold"),
    ]
    assert names_in(entries_of_task(shown, "task-1")) == ["cancel:mine", "charge:mine", "hold"]


def size_of(shown: list[LedgerEntry]) -> int:
    return sum(json_bytes(each) + len(",") for each in shown)


CANCEL, EXPIRE, COMMIT, GRANT = LedgerKind.CANCEL, LedgerKind.EXPIRE, LedgerKind.COMMIT, LedgerKind.GRANT
TWO_PAIRS = [
    ended("cancel-2", CANCEL, "h-2"),
    held("hold-2", "h-2"),
    ended("cancel-1", CANCEL),
    held("hold-1"),
    entry("charge", -1, None),
]


@pytest.mark.parametrize("cursor", [None, "p7"])
@pytest.mark.parametrize(
    ("shown", "too_much", "left"),
    [
        pytest.param(TWO_PAIRS, 0, names_in(TWO_PAIRS), id="what fits exactly stays whole"),
        pytest.param(TWO_PAIRS, 1, ["cancel-2", "hold-2", "charge"], id="the oldest pair is enough"),
        pytest.param(TWO_PAIRS, size_of(TWO_PAIRS[2:4]), ["cancel-2", "hold-2", "charge"], id="exactly enough"),
        pytest.param(TWO_PAIRS, size_of(TWO_PAIRS[2:4]) + 1, ["charge"], id="one byte more than the oldest pair"),
        pytest.param(
            [entry("charge", -1, None), ended("expiry", EXPIRE), held("hold")], 1, ["charge"], id="an expiry too"
        ),
        pytest.param(
            [entry("charge", -1, None), entry("cancel:1", 24, None), entry("pre_deduct:1", -24, None)],
            1,
            ["charge"],
            id="in a ledger without kinds and ids",
        ),
        pytest.param(
            [held("new", None), ended("cancel", CANCEL, None), held("middle", None), held("old", None)],
            1,
            ["new", "middle"],
            id="of nameless holds the oldest",
        ),
    ],
)
def test_the_oldest_holds_that_were_given_back_are_left_out_of_a_long_ledger(
    monkeypatch: pytest.MonkeyPatch, shown: list[LedgerEntry], too_much: int, left: list[str], cursor: str | None
) -> None:
    """They charged nothing: the ledger is as complete as it was."""
    monkeypatch.setattr("activities.credits.MAX_LEDGER_BYTES", size_of(shown) - too_much)
    ledger = fitting(Ledger(entries=shown, cursor=cursor))
    assert (names_in(ledger.entries), ledger.cursor) == (left, cursor)


@pytest.mark.parametrize(
    "shown",
    [
        pytest.param([entry("charge", -1, None), held("open", "h-2"), held("old")], id="an open hold"),
        pytest.param([ended("cancel", CANCEL, "h-2"), held("open", "h-3"), held("old")], id="another hold's cancel"),
        pytest.param([ended("cancel", CANCEL, points=20), held("open", "h-3"), held("old")], id="another amount"),
        pytest.param([ended("commit", COMMIT), held("open", "h-3"), held("old")], id="a commit of nothing"),
        pytest.param([ended("grant", GRANT, None), held("open", None), held("old", None)], id="a grant of as much"),
        pytest.param(
            [entry("refund_pre_deduct:1", 24, None), entry("commit:1", -1, None), entry("pre_deduct:1", -24, None)],
            id="a commit's rest",
        ),
        pytest.param([held("hold"), ended("cancel", CANCEL), held("old", "h-2")], id="a cancel that is older"),
    ],
)
@pytest.mark.parametrize(("cursor", "says"), [(None, CUT), ("p7", "p7")])
@pytest.mark.parametrize("too_much", ["one byte", "one entry", "one entry and a byte"])
def test_a_ledger_without_its_oldest_entries_is_not_complete(
    monkeypatch: pytest.MonkeyPatch, shown: list[LedgerEntry], cursor: str | None, says: str, too_much: str
) -> None:
    oldest = size_of(shown[-1:])
    bytes_more = {"one byte": 1, "one entry": oldest, "one entry and a byte": oldest + 1}[too_much]
    monkeypatch.setattr("activities.credits.MAX_LEDGER_BYTES", size_of(shown) - bytes_more)
    ledger = fitting(Ledger(entries=shown, cursor=cursor))
    kept = shown[:-2] if too_much == "one entry and a byte" else shown[:-1]
    assert (names_in(ledger.entries), ledger.cursor) == (names_in(kept), says)


def test_entries_are_cut_beside_a_pair_that_was_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = [entry("new", -1, None), entry("old", -1, None), ended("cancel", CANCEL), held("hold")]
    monkeypatch.setattr("activities.credits.MAX_LEDGER_BYTES", size_of(shown[:1]))
    ledger = fitting(Ledger(entries=shown))
    assert (names_in(ledger.entries), ledger.cursor) == (["new"], CUT)


def test_the_longest_ledger_of_a_task_is_filled_to_its_limit_and_not_beyond() -> None:
    shown = [entry(f"charge:{number}", -1, None) for number in range(3_000)]
    ledger = fitting(Ledger(entries=shown))
    assert ledger.entries == shown[: len(ledger.entries)]
    assert MAX_LEDGER_BYTES - size_of(shown[:1]) - 10 < size_of(ledger.entries) <= MAX_LEDGER_BYTES
