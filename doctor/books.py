"""Compare a task's credits with the ledger, as its payer sees it."""

from __future__ import annotations

from typing import Final, TypeVar

from activities.credits import CreditsClient, entries_of_task
from comfyui_temporal.contracts.calls import CallFor
from comfyui_temporal.contracts.credits import Balance, Ledger, LedgerEntry
from comfyui_temporal.contracts.errors import Answer
from comfyui_temporal.contracts.tasks import CreditsSummary
from doctor.finding import Finding, ok, wrong
from workflows.task_ledger import TaskLedger

PAGE: Final = 200
MAX_PAGES: Final = 500
T = TypeVar("T")
QUIET_READS: Final = 3
"""Balance and ledger are two reads: they are compared only if no other task's entry was added in between."""


class LedgerUnreadable(Exception):
    """The service refused to show balance or ledger. The text gives the reason."""


async def check_books(credits: CreditsClient, call_for: CallFor, reported: dict[str, CreditsSummary]) -> list[Finding]:
    """One finding for the account, one for each task in `reported`. Raises LedgerUnreadable, OutsideFailure."""
    for _ in range(QUIET_READS):
        before = await _balance(credits, call_for)
        entries = await _ledger(credits, call_for)
        if await _balance(credits, call_for) == before:
            break
    tasks = [_check_task(task_id, entries_of_task(entries, task_id), summary) for task_id, summary in reported.items()]
    return [_check_account(before, entries), *tasks]


def _check_account(account: Balance, entries: list[LedgerEntry]) -> Finding:
    if any(entry.frozen_change is None for entry in entries):
        return ok("ledger", "shows no effect on frozen points: only the charge of each task is compared")
    balance = sum(entry.change for entry in entries)
    frozen = sum(entry.frozen_change or 0 for entry in entries)
    says = f"balance {account.balance} = sum of {len(entries)} entries, frozen {account.frozen} = sum of their holds"
    if (account.balance, account.frozen) == (balance, frozen):
        return ok("ledger", says)
    return wrong(
        "ledger",
        f"the account says {account.balance} and {account.frozen} frozen, its {len(entries)} entries {balance} "
        f"and {frozen}",
        "An entry is missing or counted twice: check the credits service.",
    )


def _check_task(task_id: str, entries: list[LedgerEntry], reported: CreditsSummary) -> Finding:
    what = f"ledger of {task_id}"
    reading = TaskLedger(entries)
    charged, frozen = reading.charged(), reading.open_holds().points
    if charged is not None and (charged, frozen) == (reported.charged, 0):
        return ok(what, f"{charged} points charged, nothing frozen any more, in {len(entries)} entries")
    says, shows = _points(reported.charged), _points(charged)
    return wrong(
        what,
        f"the task says {says} charged; its {len(entries)} entries took {shows} and leave {frozen} frozen",
        "See the task's exception records and the run in the Temporal UI.",
    )


def _points(points: int | None) -> str:
    return "an unknown number" if points is None else str(points)


async def _balance(credits: CreditsClient, call_for: CallFor) -> Balance:
    return _shown(await credits.balance(call_for))


async def _ledger(credits: CreditsClient, call_for: CallFor) -> list[LedgerEntry]:
    entries: list[LedgerEntry] = []
    cursor: str | None = None
    for _ in range(MAX_PAGES):
        page: Ledger = _shown(await credits.ledger_page(call_for, limit=PAGE, cursor=cursor))
        entries += page.entries
        cursor = page.cursor
        if not cursor:
            return entries
    raise LedgerUnreadable(f"The ledger has more than {MAX_PAGES * PAGE} entries: too many to add up here.")


def _shown(answer: Answer[T]) -> T:
    if answer.reply is None:
        raise LedgerUnreadable(answer.refusal.sentence if answer.refusal else "The service shows no ledger.")
    return answer.reply
