"""Prints the findings of `doctor`."""

from __future__ import annotations

from typing import Final

from rich.console import Console
from rich.text import Text

from comfyui_temporal.command_line.terminal import printable
from doctor.finding import Finding, Verdict

_STYLES: Final = {Verdict.OK: "green", Verdict.NOTE: "yellow", Verdict.WRONG: "red"}


def print_findings(console: Console, findings: list[Finding]) -> None:
    """One line for each check, and the advice below each problem."""
    width = max((len(finding.what) for finding in findings), default=0)
    for finding in findings:
        verdict = (f"{finding.verdict.value:<6}", _STYLES[finding.verdict])
        says = f"{finding.what:<{width}}  {printable(finding.says)}"
        console.print(Text.assemble(verdict, says), soft_wrap=True)
        if finding.advice and finding.verdict is not Verdict.OK:
            console.print(Text(f"      {printable(finding.advice)}", style="dim"), soft_wrap=True)
