"""Holds that an earlier life of the task took and this run does not know (contract §4, earlier lives).

A hold ends once. So every other hold is cancelled before one is committed: a cancel that takes effect proves that the
hold was not committed, and after a refused one the ledger decides. A missing entry decides nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from temporalio import workflow

from comfyui_temporal.contracts.credits import CancelHoldReply
from comfyui_temporal.contracts.errors import HOLD_NAMELESS, Answer, ExceptionCode, Refusal, RefusalKind
from comfyui_temporal.contracts.requests import HoldState, RequestedHold
from comfyui_temporal.contracts.size_budget import MAX_KEPT_HOLDS
from workflows.hold_ends import HoldEnds
from workflows.ledger_search import LedgerSearch, Shown
from workflows.row_look import RowLook
from workflows.task_ledger import TaskLedger
from workflows.task_record import TaskRecord

NAMELESS_RECORDED: Final = "nameless-hold-of-an-earlier-life-recorded"
ROW_AWAITED: Final = "row-awaited-where-holds-may-be-forgotten"
NAMELESS_COUNTED: Final = "nameless-holds-counted-beside-the-known-ones"
MORE_SHOWN: Final = "nameless-hold-looked-for-where-more-are-shown-than-known"
UNKNOWN_RECORDED: Final = "unknown-end-of-an-earlier-lifes-hold-recorded"
UNKNOWN_LOOKED_UP: Final = "unknown-ends-looked-up-again-at-the-delivery"
NEWEST_LAST: Final = "holds-of-the-ledger-oldest-first"
ENDS_SEEN: Final = "unknown-ends-seen-by-the-last-reading"
SHOWN_FIRST: Final = "holds-awaited-in-the-ledger-where-a-cancel-is-refused"
OLDER_CANCELLED: Final = "holds-older-than-those-kept-cancelled-where-one-is-open"
CHARGES_RECORDED: Final = "charges-sent-before-recorded-where-an-end-is-unknown"
SEEN_AFTER_END: Final = "charge-seen-after-the-end-recorded"
REASON: Final = "taken before the task's run was reset"
"""The same in every request: a run that continues as new, and is reset, may send one again under its key."""


class ForgottenHolds:
    """The task's row holds their ids, and so does a ledger that shows ids."""

    def __init__(
        self,
        state: HoldState,
        ledger: LedgerSearch,
        ends: HoldEnds,
        record: TaskRecord,
        look: RowLook,
        cancel: Callable[[str, str, str], Awaitable[Answer[CancelHoldReply] | None]],
    ) -> None:
        """`cancel`: takes a hold's id, the end of the call's key and the reason."""
        self._state = state
        self._ledger = ledger
        self._ends = ends
        self._record = record
        self._look = look
        self._cancel = cancel
        self.was_committed = False
        """Whether the ledger shows a commit of any of the task's holds: the task is settled."""
        self.is_unknown = False
        """Whether the last reading leaves open what the task was charged."""
        self.is_done = False
        """Whether they were given back: no more of them can appear."""
        self._is_after_end = False
        """Whether the task's end is written: nobody reads the ledger again, and the row's credits stay as they are."""
        self._has_left = False
        """Whether one of the last cancels was refused for a reason that says nothing of the hold's end."""
        self._cancelled: set[str] = set()
        self._seen: set[str] = set()
        """Ids of the task's holds that row, ledger and this run knew when they were given back."""

    def left(self) -> list[str]:
        """Those that only the row knows and that this run has not cancelled."""
        known = {hold.pre_deduct_id for hold in self._state.asked if hold.pre_deduct_id}
        forgotten = self._look.forgotten_holds(known, left_out=self._state.granted_before)
        return [hold_id for hold_id in forgotten if hold_id not in self._cancelled]

    @property
    def cancelled(self) -> int:
        """How many holds this run has cancelled here: of them, a cancel took effect."""
        return len(self._cancelled)

    @property
    def known(self) -> int:
        """How many holds the task has had at least, in all its lives."""
        own = {hold.pre_deduct_id for hold in self._state.asked if hold.pre_deduct_id}
        in_row = self._look.row.hold_ids if self._look.row is not None else []
        return max(len(self._seen.union(own, in_row)), self._state.granted_before + len(own))

    @property
    def numbers_taken(self) -> int:
        """How many hold numbers are taken at least."""
        known = len(self._look.row.hold_ids) if self._look.row is not None else 0
        return max(known, self._state.asked_count)

    async def give_back(self, *, keep_one: bool = False) -> bool:
        """Cancel them, and find out what the task was charged. Returns whether there is any such hold.

        `keep_one`: the newest hold of the task that may be open is kept, as this run's own, to be committed; this run's
        other holds are cancelled too, also those whose end could not be found out before.
        """
        has_row = await self._look.once()
        first = ledger = await self._ledger.read()
        # A delivery is settled by the ledger alone: a store that is away must not delay it.
        if not (has_row or keep_one) and self._may_be_forgotten(ledger) and workflow.patched(ROW_AWAITED):
            await self._look.once_back()
        own = {hold.pre_deduct_id: hold for hold in self._state.asked if hold.pre_deduct_id}
        stands = {} if ledger is None else ledger.open_holds().named
        in_row = [*own, *self._look.forgotten_holds(set(own), left_out=self._state.granted_before)]
        in_ledger = [each for each in stands if each not in in_row]
        if len(in_ledger) > 1 and workflow.patched(NEWEST_LAST):
            in_ledger.reverse()  # a ledger is newest first
        known = dict.fromkeys([*in_row, *in_ledger])
        self._seen.update(known)
        may_stand = self._may_stand(list(known), own, ledger)
        kept = may_stand[-1] if keep_one and may_stand and self._state.asked else None
        if kept is not None and kept not in own:
            self._adopt(kept, stands.get(kept) or (ledger.holds[0].amount if ledger and ledger.holds else 0))
        doubtful: list[str] = []
        finds_out_again = keep_one and workflow.patched(UNKNOWN_LOOKED_UP)
        if finds_out_again:
            self._ends.find_out_again()
            doubtful = self._doubtful(ledger)
        await self._cancel_older(ledger, set(own), open_at_most=len(doubtful) + len(may_stand))
        others = [each for each in may_stand if each != kept and (keep_one or each not in own)]
        if await self._cancel_all([*doubtful, *others], own):
            # Without ids only a full ledger shows that none is missing.
            is_by_count = ledger is not None and not ledger.tells_ids and len(in_row) >= MAX_KEPT_HOLDS
            count = self.known if is_by_count else len(known)
            ledger = await self._ledger.once_all_ended(but=self.own_standing(), known=count)
        elif self._has_left and self._lacks_holds(ledger, len(known)) and workflow.patched(SHOWN_FIRST):
            ledger = await self._ledger.once_shown(len(known))  # it may lack the commit of the hold that was left
        is_learned = self._learn_charged(ledger)
        if is_learned and not keep_one and self._ends.are_unknown and self._have_all_ended(ledger, list(known)):
            self._ends.find_out_again()
        self.is_unknown = not is_learned if finds_out_again else self._state.is_unknown
        # With `keep_one` a charge follows, and whoever makes it records what stays unknown, with its cost.
        if not is_learned and not keep_one and workflow.patched(UNKNOWN_RECORDED):
            self._record_unknown()
        named = 0 if self._look.row is None else len(self._look.row.hold_ids)
        if self._shows_nameless(first, known=max(len(known), named), open_at_most=len(doubtful) + len(may_stand)):
            await self._record_nameless()
        self.is_done = True
        return len(known) > len(own)

    async def give_back_after_end(self, *, is_charged: bool) -> None:
        """Cancel what only the row knew, once its end is written: what that changes is recorded, for people to see."""
        self._is_after_end = True
        if not is_charged:
            charged = self._state.charged
            await self.give_back()
            if self._state.charged != charged and workflow.patched(SEEN_AFTER_END):
                self._record_after_end(f"shows that {self._state.charged} points were charged")
            return
        left = self.left()
        self._seen.update(left)
        if not await self._cancel_all(left, {}):
            return
        ledger = await self._ledger.once_all_ended(but=self.own_standing(), known=self.known)
        charged_in_all = None if ledger is None else ledger.charged()
        if charged_in_all is None:
            self._record_unknown()
        elif charged_in_all != self._state.charged:
            self._record_after_end(f"shows that {charged_in_all} points were charged")

    async def look_for_charges(self, sent: int) -> bool:
        """Find the charges that earlier lives sent, if the last reading does not show as many. None is sent again.

        Those that the ledger does not show in time leave it unknown what the task was charged: then returns False.
        """
        newest = self._ledger.newest
        if sent <= (0 if newest is None else len(newest.charges)):
            return True
        self._ends.charges = max(self._ends.charges, sent)
        if newest is None or self._ends.are_unknown:
            if workflow.patched(CHARGES_RECORDED):
                self._record_unknown("does not show a charge that was sent before", of="charges")
            return False
        is_shown = await self._ledger.charge_shown(sent, may_repeat=False) is Shown.CHARGED
        if is_shown and self._learn_charged(self._ledger.newest):
            return True
        self.is_unknown = True
        self._ends.mark_unknown()
        self._record_unknown("does not show a charge that was sent before")
        return False

    def price_learned(self) -> None:
        """The record of what stays unknown names the price of the delivered work, where one is known by now."""
        if self.is_unknown and self._ends.price is not None:
            self._record_unknown()

    def _have_all_ended(self, ledger: TaskLedger | None, known: list[str]) -> bool:
        """Whether the ledger shows the end of every hold: what it shows decides, not what was unknown before."""
        if ledger is None:
            return False
        stands = ledger.open_holds()
        is_whole = len(ledger.holds) >= len(known) + (0 if ledger.tells_ids else self._state.granted_before)
        has_ends = not ledger.tells_ids or ledger.ended_ids().issuperset(known)
        return is_whole and has_ends and not stands.named and not stands.nameless and workflow.patched(ENDS_SEEN)

    async def _cancel_all(self, hold_ids: list[str], own: dict[str, RequestedHold]) -> bool:
        """Cancel these holds. Returns whether one of them may have been committed."""
        is_unsure = self._has_left = False
        for pre_deduct_id in hold_ids:
            answer = await self._cancel(pre_deduct_id, f"forgotten:{pre_deduct_id}", REASON)
            is_unsure |= self._is_unsure(pre_deduct_id, answer)
            if answer is not None and answer.reply is not None:
                self._cancelled.add(pre_deduct_id)
            if pre_deduct_id in own:
                own[pre_deduct_id].resolved = True
        return is_unsure

    async def _cancel_older(self, ledger: TaskLedger | None, own: set[str], *, open_at_most: int) -> None:
        """Cancel what an earlier life took before all that this run keeps: where holds never expire it may stand.

        Only where a ledger without ids shows an open hold beside the others; one with ids names it.
        """
        if ledger is None or ledger.tells_ids or ledger.open_holds().nameless <= open_at_most:
            return
        older = self._look.older_holds(own, left_out=self._state.granted_before)
        older = [each for each in older if each not in self._cancelled]
        if older and workflow.patched(OLDER_CANCELLED):
            await self._cancel_all(older, {})

    def _may_be_forgotten(self, ledger: TaskLedger | None) -> bool:
        """Whether there may be a hold whose id only the row knows: there was an earlier life, or the ledger shows more
        holds than this run has requested.
        """
        is_shown = ledger is not None and len(ledger.holds) > self._state.asked_count
        return is_shown or self._look.life.is_sure or self._state.lives > 0

    def _shows_nameless(self, ledger: TaskLedger | None, *, known: int, open_at_most: int) -> bool:
        """Whether a ledger without ids shows an open hold that is none of the `known` ones."""
        if ledger is None or ledger.tells_ids or not ledger.open_holds().nameless:
            return False
        is_more = len(ledger.holds) > known + self._state.granted_before
        if ledger.open_holds().nameless <= open_at_most:
            # An earlier life may have ended some of these, so that one of the open holds is none of them.
            return is_more and workflow.patched(MORE_SHOWN)
        if not workflow.patched(NAMELESS_RECORDED):
            return False
        # A ledger that lags may show a known hold and not its end yet.
        return is_more or not workflow.patched(NAMELESS_COUNTED)

    async def _record_nameless(self) -> None:
        own = [hold.amount for hold in self._state.asked if hold.pre_deduct_id and not hold.resolved]
        left = await self._ledger.nameless_beside(own)
        if not left.nameless:
            return
        self._state.asked_again = 0  # a doubled hold of this run is among them
        self._record.record_exception(
            HOLD_NAMELESS,
            ExceptionCode.HOLD_DOUBLED,
            f"{left.nameless_points} points are held from before the task's run was reset. Neither row nor ledger "
            "shows the id: the hold ends by expiry, or the service's operator cancels it.",
            amount=left.nameless_points,
            holds=left.nameless,
        )

    def _may_stand(self, known: list[str], own: dict[str, RequestedHold], ledger: TaskLedger | None) -> list[str]:
        """Those of `known` whose end is not shown, oldest first."""
        ended = set() if ledger is None else ledger.ended_ids()
        for pre_deduct_id, hold in own.items():
            hold.resolved |= pre_deduct_id in ended
        in_order = self._look.row.hold_ids if self._look.row is not None else []
        place = {pre_deduct_id: n for n, pre_deduct_id in enumerate(in_order)}
        ended |= {pre_deduct_id for pre_deduct_id, hold in own.items() if hold.resolved}
        ended |= self._cancelled
        return sorted((each for each in known if each not in ended), key=lambda each: place.get(each, len(place)))

    def _doubtful(self, ledger: TaskLedger | None) -> list[str]:
        """This run's holds of which neither an answer nor `ledger` shows the end: their cancel was refused."""
        shown = self._cancelled | (set() if ledger is None else ledger.ended_ids())
        doubtful = [hold.pre_deduct_id for hold in self._state.granted_holds() if hold.is_doubtful]
        return [hold_id for hold_id in doubtful if hold_id and hold_id not in shown]

    def _adopt(self, pre_deduct_id: str, amount: int) -> None:
        """Make a forgotten hold this run's own."""
        like = self._state.asked[-1]
        request = like.request.model_copy(update={"estimated_cost": amount})
        adopted = self._state.add(self.numbers_taken + 1, request, like.asked_at)
        adopted.pre_deduct_id, adopted.amount = pre_deduct_id, amount

    def own_standing(self) -> int:
        """How many holds of this run are open, as far as it knows."""
        return sum(bool(hold.pre_deduct_id) and not hold.resolved for hold in self._state.asked)

    def _is_unsure(self, pre_deduct_id: str, answer: Answer[CancelHoldReply] | None) -> bool:
        """Whether a hold may have been committed, by the answer to its cancel."""
        if answer is None or answer.refusal is None:
            return False
        match answer.refusal.kind:
            case RefusalKind.HOLD_ALREADY_RESOLVED:
                return True
            case RefusalKind.HOLD_NOT_FOUND:
                return False
        self._has_left = True
        self._record_left(pre_deduct_id, answer.refusal)
        return False

    @staticmethod
    def _lacks_holds(ledger: TaskLedger | None, known: int) -> bool:
        """Whether a ledger lags behind the task's holds."""
        return ledger is not None and ledger.is_complete and len(ledger.holds) < known

    def _learn_charged(self, ledger: TaskLedger | None) -> bool:
        """Whether the ledger shows what was charged."""
        charged = None if ledger is None else ledger.charged()
        if ledger is None or charged is None:
            self._ends.mark_unknown()
            return False
        self.was_committed = bool(ledger.commits)
        self._state.charged = max(self._state.charged, charged)
        return True

    def _record_after_end(self, what: str) -> None:
        self._record.record_exception(
            "forgotten_after_end",
            ExceptionCode.UNDO_UNFINISHED,
            f"Holds from before the task's run was reset were cancelled after its end, and the ledger {what}. The "
            "task's credits are those of its end: compare them with its ledger.",
        )

    def _record_unknown(self, what: str = "does not show how every hold ended", *, of: str = "reset") -> None:
        if self._is_after_end:
            self._record_after_end(what)
            return
        # While the task runs it has no price yet. The record that its end writes has one, under a key of its own.
        is_at_end = self._ends.price is not None
        self._record.record_exception(
            self._ends.unknown_key if is_at_end and of == "reset" else f"settlement_unknown:{of}",
            ExceptionCode.SETTLEMENT_UNKNOWN,
            f"The task's run was reset, and the ledger {what}. "
            + ("Nothing more is charged, and the" if is_at_end else "The")
            + " ledger is read again hourly for a day.",
            **self._ends.details,
        )

    def _record_left(self, pre_deduct_id: str, refusal: Refusal) -> None:
        self._ends.left_open()
        self._record.record_exception(
            f"hold_left:{pre_deduct_id}",
            ExceptionCode.HOLD_LEFT_TO_EXPIRY,
            f"Hold {pre_deduct_id}, taken before the run was reset, could not be cancelled. {refusal.sentence}",
            pre_deduct_id=pre_deduct_id,
        )
