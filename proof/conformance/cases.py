"""Cases: their names, and how they are run, in parallel, each to an outcome."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from proof.conformance.subject import Broken, NotOffered, Subject, Unreachable

_AT_ONCE: Final = 8
_ROOMS: Final = ("reads", "permissions", "images", "refusals", "idempotency", "cancels", "callbacks", "trainings")
"""Modules of cases, in the order of the report."""

Check = Callable[[Subject], Awaitable[None]]


class Verdict(StrEnum):
    HELD = "held"
    NOT_OFFERED = "not_offered"
    BROKEN = "broken"


@dataclass(frozen=True)
class Case:
    """One requirement. `name` is unique; `title` is its sentence, or the route."""

    name: str
    title: str
    check: Check
    changes_nothing: bool = False
    needs_scopes: bool = False
    """Whether tokens of chosen scopes and tenants are needed, which a static service token cannot give."""
    trains: bool = False
    """Whether it is about trainings, which a platform for images alone does not have."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a case. `says`: what was expected and what was received."""

    case: Case
    verdict: Verdict
    says: str = ""


_all: list[Case] = []


def case(
    title: str, *, changes_nothing: bool = False, needs_scopes: bool = False, trains: bool = False
) -> Callable[[Check], Check]:
    """Add a check to the cases, under its function's name."""

    def add(check: Check) -> Check:
        add_case(Case(check.__name__, title, check, changes_nothing, needs_scopes, trains))
        return check

    return add


def add_case(one: Case) -> None:
    """Raises ValueError where the name is taken."""
    if any(other.name == one.name for other in _all):
        raise ValueError(f"there are two cases {one.name!r}")
    _all.append(one)


def cases(*, changes_nothing: bool | None = None, with_scopes: bool = True, with_trainings: bool = True) -> list[Case]:
    """All cases, or those that change nothing (or something), or those for a server with fewer features."""
    for room in _ROOMS:
        importlib.import_module(f"proof.conformance.{room}")
    return [
        one
        for one in _all
        if changes_nothing in (None, one.changes_nothing)
        and (with_scopes or not one.needs_scopes)
        and (with_trainings or not one.trains)
    ]


async def run(chosen: Iterable[Case], subject: Subject) -> list[Outcome]:
    """Every outcome, in the cases' order; eight run at a time. Raises Unreachable where no server answers."""
    room = asyncio.Semaphore(_AT_ONCE)

    async def one(case: Case) -> Outcome:
        async with room:
            return await outcome_of(case, subject)

    running = [asyncio.create_task(one(case)) for case in chosen]
    try:
        return list(await asyncio.gather(*running))
    finally:
        # If one case ends the run, the others must stop: their client is closed next.
        for each in running:
            each.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def outcome_of(case: Case, subject: Subject) -> Outcome:
    """Raises Unreachable."""
    try:
        await case.check(subject)
    except NotOffered as missing:
        return Outcome(case, Verdict.NOT_OFFERED, str(missing))
    except Unreachable:
        raise
    except Broken as broken:
        return Outcome(case, Verdict.BROKEN, str(broken))
    return Outcome(case, Verdict.HELD)
