"""One finding of `doctor`: what was checked, the result, what to do."""

from __future__ import annotations

from enum import StrEnum

from comfyui_temporal.contracts.fields import OwnModel


class Verdict(StrEnum):
    OK = "ok"
    NOTE = "note"
    """It works, but an operator should know about it."""
    WRONG = "wrong"


class Finding(OwnModel):
    """`what` was checked, `says` describes the result, `advice` what to do about a problem."""

    what: str
    verdict: Verdict
    says: str
    advice: str = ""


def ok(what: str, says: str) -> Finding:
    return Finding(what=what, verdict=Verdict.OK, says=says)


def note(what: str, says: str, advice: str = "") -> Finding:
    return Finding(what=what, verdict=Verdict.NOTE, says=says, advice=advice)


def wrong(what: str, says: str, advice: str) -> Finding:
    return Finding(what=what, verdict=Verdict.WRONG, says=says, advice=advice)
