"""The ledger of the credits service: double entry, append-only (contract §4).

Each person's points are on two accounts, `available` and `frozen`; they come from `issued` and go to `revenue`. An
entry is a set of postings whose debits equal its credits; its `change` and `frozen_change` are its effects on the two.
A hold is resolved once, by exactly one of commit, cancel, expiry; the file itself refuses a second resolution and any
edit of an entry.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from comfyui_temporal.contracts.credits import LedgerKind
from proof.simulators.admin_wire import AccountSeen, BalanceCheck, EntrySeen, HoldSeen
from proof.simulators.clock import Clock
from proof.simulators.replies import Refused
from proof.simulators.state_file import StateFile

_SCHEMA = """
CREATE TABLE IF NOT EXISTS accounts (
    tenant_id TEXT NOT NULL,
    user_id TEXT NOT NULL,
    balance INTEGER NOT NULL CHECK (balance >= 0),
    frozen INTEGER NOT NULL CHECK (frozen >= 0),
    PRIMARY KEY (tenant_id, user_id)
);
CREATE TABLE IF NOT EXISTS holds (
    pre_deduct_id TEXT PRIMARY KEY,
    tenant_id TEXT NOT NULL,
    user_id TEXT NOT NULL,
    task_id TEXT NOT NULL,
    template_id TEXT NOT NULL,
    scene TEXT NOT NULL,
    amount INTEGER NOT NULL CHECK (amount > 0),
    expire_at REAL NOT NULL,
    phase TEXT NOT NULL CHECK (phase IN ('open', 'committed', 'cancelled', 'expired'))
);
CREATE INDEX IF NOT EXISTS holds_open ON holds (expire_at) WHERE phase = 'open';
CREATE TABLE IF NOT EXISTS entries (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    ledger_id TEXT NOT NULL UNIQUE,
    tenant_id TEXT NOT NULL,
    user_id TEXT NOT NULL,
    task_id TEXT,
    kind TEXT NOT NULL,
    change INTEGER NOT NULL,
    frozen_change INTEGER NOT NULL,
    balance_after INTEGER NOT NULL,
    frozen_after INTEGER NOT NULL,
    reason TEXT NOT NULL,
    created_at REAL NOT NULL,
    pre_deduct_id TEXT
);
CREATE INDEX IF NOT EXISTS entries_person ON entries (tenant_id, user_id, number);
CREATE UNIQUE INDEX IF NOT EXISTS resolved_once ON entries (pre_deduct_id)
    WHERE kind IN ('commit', 'cancel', 'expire');
CREATE TABLE IF NOT EXISTS postings (
    number INTEGER NOT NULL REFERENCES entries (number),
    account TEXT NOT NULL,
    side TEXT NOT NULL CHECK (side IN ('debit', 'credit')),
    amount INTEGER NOT NULL CHECK (amount > 0)
);
CREATE TRIGGER IF NOT EXISTS entries_stand BEFORE UPDATE ON entries
    BEGIN SELECT RAISE(ABORT, 'a ledger entry is never edited'); END;
CREATE TRIGGER IF NOT EXISTS postings_stand BEFORE UPDATE ON postings
    BEGIN SELECT RAISE(ABORT, 'a posting is never edited'); END;
"""
_RESOLVED_AS: Final = {
    LedgerKind.COMMIT: "committed",
    LedgerKind.CANCEL: "cancelled",
    LedgerKind.EXPIRE: "expired",
}


@dataclass(frozen=True)
class Person:
    """Whose account: a tenant's user."""

    tenant_id: str
    user_id: str


@dataclass(frozen=True)
class Hold:
    """An amount moved from `balance` to `frozen` until it is resolved or `expire_at` (seconds since the epoch)."""

    pre_deduct_id: str
    person: Person
    task_id: str
    template_id: str
    scene: str
    amount: int
    expire_at: float
    phase: str


class Ledger:
    """Every effect on points. Calls run inside the caller's transaction; refusals are contract §4's."""

    def __init__(self, state: StateFile, clock: Clock, *, ends_holds: bool = True) -> None:
        """`ends_holds`: a hold whose `expire_at` has passed is returned by the service itself."""
        self._state = state
        self._clock = clock
        self._ends_holds = ends_holds
        state.lay_out(_SCHEMA)

    def balances(self, person: Person) -> tuple[int, int] | None:
        """`balance` and `frozen` in points, or None where there is no such account."""
        row = self._state.row(
            "SELECT balance, frozen FROM accounts WHERE tenant_id = ? AND user_id = ?", person.tenant_id, person.user_id
        )
        return (row["balance"], row["frozen"]) if row else None

    def set_balance(self, person: Person, balance: int) -> None:
        """Grant or take back what is missing; an entry like any other. The account is made where it is missing."""
        standing = self.balances(person)
        if standing is None:
            self._state.run("INSERT INTO accounts VALUES (?, ?, 0, 0)", person.tenant_id, person.user_id)
        change = balance - (standing[0] if standing else 0)
        if change or standing is None:
            self._enter(person, LedgerKind.GRANT, change, 0, reason="granted")

    def hold(
        self, person: Person, *, task_id: str, template_id: str, scene: str, amount: int, expire_in: float
    ) -> Hold:
        """Move `amount` to `frozen` for `expire_in` seconds. Raises Refused `insufficient_balance`."""
        self._demand(person, amount)
        expire_at = self._clock.timestamp() + expire_in
        hold = Hold(_new_id("hold"), person, task_id, template_id, scene, amount, expire_at, "open")
        self._state.run(
            "INSERT INTO holds VALUES (?, ?, ?, ?, ?, ?, ?, ?, 'open')",
            hold.pre_deduct_id,
            person.tenant_id,
            person.user_id,
            task_id,
            template_id,
            scene,
            amount,
            expire_at,
        )
        self._enter(person, LedgerKind.PRE_DEDUCT, -amount, amount, reason="pre-deduct", hold=hold)
        return hold

    def find_hold(self, pre_deduct_id: str) -> Hold | None:
        row = self._state.row("SELECT * FROM holds WHERE pre_deduct_id = ?", pre_deduct_id)
        return _hold_of(row) if row else None

    def commit(self, hold: Hold, actual_cost: int) -> None:
        """Take `actual_cost` of the hold, return the rest. Raises Refused by contract §4's names."""
        if hold.phase != "open":
            raise Refused("pre_deduct_already_processed")
        if actual_cost < 1:
            raise Refused("amount_invalid")
        if actual_cost > hold.amount:
            raise Refused("hold_insufficient")
        self._resolve(hold, LedgerKind.COMMIT, returned=hold.amount - actual_cost, reason="commit")

    def cancel(self, hold: Hold, reason: str) -> None:
        """Return the whole hold. Raises Refused `pre_deduct_already_processed`."""
        if hold.phase != "open":
            raise Refused("pre_deduct_already_processed")
        self._resolve(hold, LedgerKind.CANCEL, returned=hold.amount, reason=reason)

    def expire_due(self) -> None:
        """Return every hold whose `expire_at` has passed, in the order they ended."""
        if not self._ends_holds:
            return
        with self._state.transaction():
            for row in self._state.rows(
                "SELECT * FROM holds WHERE phase = 'open' AND expire_at <= ? ORDER BY expire_at, pre_deduct_id",
                self._clock.timestamp(),
            ):
                hold = _hold_of(row)
                self._resolve(hold, LedgerKind.EXPIRE, returned=hold.amount, reason="expired", at=hold.expire_at)

    def expire_now(self, pre_deduct_id: str) -> None:
        """Expire an open hold now; a resolved one is left as it is."""
        self._state.run(
            "UPDATE holds SET expire_at = ? WHERE pre_deduct_id = ? AND phase = 'open'",
            self._clock.timestamp(),
            pre_deduct_id,
        )
        self.expire_due()

    def next_expiry(self) -> float | None:
        """When the next open hold ends by itself, in seconds since the epoch."""
        if not self._ends_holds:
            return None
        row = self._state.row("SELECT min(expire_at) AS soonest FROM holds WHERE phase = 'open'")
        return row["soonest"] if row else None

    def charge(
        self, person: Person, *, task_id: str, amount: int, reason: str, refusal: tuple[int, str] = (402, "40201")
    ) -> EntrySeen:
        """Take `amount` from `balance` without a hold. Raises Refused `insufficient_balance`, as `refusal` says."""
        status, code = refusal
        self._demand(person, amount, status=status, code=code)
        return self._enter(person, LedgerKind.CHARGE, -amount, 0, reason=reason, task_id=task_id)

    def uses(self, tenant_id: str, template_id: str, user_id: str | None = None) -> int:
        """How many holds on the template are open or committed: what a quota counts."""
        row = self._state.row(
            "SELECT count(*) AS uses FROM holds WHERE tenant_id = ?1 AND template_id = ?2"
            " AND (?3 IS NULL OR user_id = ?3) AND phase IN ('open', 'committed')",
            tenant_id,
            template_id,
            user_id,
        )
        return row["uses"] if row else 0

    def page(
        self, person: Person, *, limit: int, before: int | None, task_id: str | None, until: float
    ) -> tuple[list[EntrySeen], int | None]:
        """Entries created up to `until`, newest first, and the number to go on before (None at the end)."""
        rows = self._state.rows(
            "SELECT * FROM entries WHERE tenant_id = ?1 AND user_id = ?2 AND created_at <= ?3"
            " AND (?4 IS NULL OR number < ?4) AND (?5 IS NULL OR task_id = ?5) ORDER BY number DESC LIMIT ?6",
            person.tenant_id,
            person.user_id,
            until,
            before,
            task_id,
            limit + 1,
        )
        shown = rows[:limit]
        return [_entry_of(row) for row in shown], (shown[-1]["number"] if len(rows) > limit else None)

    def all_entries(self) -> list[EntrySeen]:
        """Oldest first."""
        return [_entry_of(row) for row in self._state.rows("SELECT * FROM entries ORDER BY number")]

    def all_holds(self) -> list[HoldSeen]:
        return [_hold_seen(row) for row in self._state.rows("SELECT * FROM holds ORDER BY rowid")]

    def all_accounts(self) -> list[AccountSeen]:
        return [AccountSeen(**dict(row)) for row in self._state.rows("SELECT * FROM accounts ORDER BY 1, 2")]

    def _demand(self, person: Person, amount: int, **where: Any) -> None:
        standing = self.balances(person)
        if standing is None or standing[0] < amount:
            raise Refused("insufficient_balance", **where)

    def _resolve(self, hold: Hold, kind: LedgerKind, *, returned: int, reason: str, at: float | None = None) -> None:
        self._state.run(
            "UPDATE holds SET phase = ? WHERE pre_deduct_id = ? AND phase = 'open'",
            _RESOLVED_AS[kind],
            hold.pre_deduct_id,
        )
        self._enter(hold.person, kind, returned, -hold.amount, reason=reason, hold=hold, at=at)

    def _enter(
        self,
        person: Person,
        kind: LedgerKind,
        change: int,
        frozen_change: int,
        *,
        reason: str,
        hold: Hold | None = None,
        task_id: str | None = None,
        at: float | None = None,
    ) -> EntrySeen:
        """Write one entry with its postings, and move the two balances by it."""
        self._state.run(
            "UPDATE accounts SET balance = balance + ?, frozen = frozen + ? WHERE tenant_id = ? AND user_id = ?",
            change,
            frozen_change,
            person.tenant_id,
            person.user_id,
        )
        balance, frozen = self.balances(person) or (0, 0)
        ledger_id = _new_id("entry")
        number = self._state.run(
            "INSERT INTO entries (ledger_id, tenant_id, user_id, task_id, kind, change, frozen_change, balance_after,"
            " frozen_after, reason, created_at, pre_deduct_id) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            ledger_id,
            person.tenant_id,
            person.user_id,
            hold.task_id if hold else task_id,
            kind.value,
            change,
            frozen_change,
            balance,
            frozen,
            reason,
            at or self._clock.timestamp(),
            hold.pre_deduct_id if hold else None,
        )
        self._post(number, person, kind, change, frozen_change)
        row = self._state.row("SELECT * FROM entries WHERE number = ?", number)
        assert row is not None
        return _entry_of(row)

    def _post(self, number: int, person: Person, kind: LedgerKind, change: int, frozen_change: int) -> None:
        """A person's points are what the service owes: a credit raises an account, a debit lowers it."""
        other_side = "issued" if kind is LedgerKind.GRANT else "revenue"
        for account, amount in (
            (f"available:{person.tenant_id}:{person.user_id}", change),
            (f"frozen:{person.tenant_id}:{person.user_id}", frozen_change),
            (other_side, -(change + frozen_change)),
        ):
            if amount:
                side = "credit" if amount > 0 else "debit"
                self._state.run("INSERT INTO postings VALUES (?, ?, ?, ?)", number, account, side, abs(amount))

    def check(self) -> BalanceCheck:
        """Check the ledger: debits equal credits, sums equal balances, each hold resolved at most once."""
        problems = [
            *(f"entry {row['number']}: debits and credits differ by {row['rest']}" for row in self._unbalanced()),
            *(
                f"{row['tenant_id']}/{row['user_id']}: {row['balance']} and {row['frozen']} frozen stand,"
                f" the entries come to {row['changes']} and {row['frozen_changes']}"
                for row in self._untrue_accounts()
            ),
            *(f"entry {row['number']}: what stood after it is not the sum up to it" for row in self._untrue_entries()),
            *(f"hold {row['pre_deduct_id']}: {row['ends']} ends, phase {row['phase']}" for row in self._untrue_holds()),
        ]
        counted = self._state.row(
            "SELECT (SELECT count(*) FROM accounts) AS accounts, (SELECT count(*) FROM entries) AS entries,"
            " (SELECT count(*) FROM holds WHERE phase = 'open') AS open_holds"
        )
        assert counted is not None
        return BalanceCheck(ok=not problems, problems=problems, **dict(counted))

    def _unbalanced(self) -> list[Any]:
        return self._state.rows(
            "SELECT number, sum(CASE side WHEN 'debit' THEN amount ELSE -amount END) AS rest FROM postings"
            " GROUP BY number HAVING rest <> 0"
        )

    def _untrue_accounts(self) -> list[Any]:
        return self._state.rows(
            """
            WITH posted AS (
                SELECT account, sum(CASE side WHEN 'credit' THEN amount ELSE -amount END) AS points
                FROM postings GROUP BY account)
            SELECT a.*, coalesce(sum(e.change), 0) AS changes, coalesce(sum(e.frozen_change), 0) AS frozen_changes
            FROM accounts a LEFT JOIN entries e ON e.tenant_id = a.tenant_id AND e.user_id = a.user_id
            GROUP BY a.tenant_id, a.user_id
            HAVING a.balance <> changes OR a.frozen <> frozen_changes
                OR a.balance <> coalesce((SELECT points FROM posted
                    WHERE account = 'available:' || a.tenant_id || ':' || a.user_id), 0)
                OR a.frozen <> coalesce((SELECT points FROM posted
                    WHERE account = 'frozen:' || a.tenant_id || ':' || a.user_id), 0)
            """
        )

    def _untrue_entries(self) -> list[Any]:
        return self._state.rows(
            """
            SELECT number FROM (
                SELECT number, balance_after, frozen_after, sum(change) OVER person AS balance,
                    sum(frozen_change) OVER person AS frozen
                FROM entries WINDOW person AS (PARTITION BY tenant_id, user_id ORDER BY number))
            WHERE balance_after <> balance OR frozen_after <> frozen
            """
        )

    def _untrue_holds(self) -> list[Any]:
        return self._state.rows(
            "SELECT h.pre_deduct_id, h.phase, count(e.number) AS ends FROM holds h LEFT JOIN entries e"
            " ON e.pre_deduct_id = h.pre_deduct_id AND e.kind IN ('commit', 'cancel', 'expire')"
            " GROUP BY h.pre_deduct_id HAVING ends <> (h.phase <> 'open')"
        )


def _new_id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}"


def utc_of(timestamp: float) -> datetime:
    return datetime.fromtimestamp(timestamp, UTC)


def _hold_of(row: Any) -> Hold:
    person = Person(row["tenant_id"], row["user_id"])
    return Hold(
        row["pre_deduct_id"],
        person,
        row["task_id"],
        row["template_id"],
        row["scene"],
        row["amount"],
        row["expire_at"],
        row["phase"],
    )


def _hold_seen(row: Any) -> HoldSeen:
    fields = {name: row[name] for name in HoldSeen.model_fields}
    return HoldSeen(**fields | {"expire_at": utc_of(row["expire_at"])})


def _entry_of(row: Any) -> EntrySeen:
    fields = {name: row[name] for name in EntrySeen.model_fields}
    return EntrySeen(**fields | {"created_at": utc_of(row["created_at"])})
