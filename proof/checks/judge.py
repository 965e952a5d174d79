"""Every rule on one task that has ended."""

from __future__ import annotations

from collections.abc import Iterable

from comfyui_temporal.contracts.tasks import TaskStatus
from proof.checks.events import check_events, check_stream
from proof.checks.finished_task import NOTHING_EXPECTED, Exempt, Expected, Finding, Findings, FinishedTask, Rule
from proof.checks.histories import check_history
from proof.checks.money import check_money
from proof.checks.price import check_price


class NotCollected(Exception):
    """Evidence is missing, and its absence is not exempt: the caller has to collect it or name the exemption."""


def judge(task: FinishedTask, expected: Expected = NOTHING_EXPECTED, exempt: Iterable[Exempt] = ()) -> list[Finding]:
    """The broken rules; empty if all hold. Raises NotCollected."""
    exemptions, findings = frozenset(exempt), Findings()
    _check_evidence(task, exemptions)
    _check_end(task, expected, exemptions, findings)
    check_money(task, expected, exemptions, findings)
    check_price(task, exemptions, findings)
    check_events(task, findings)
    _check_jobs(task, expected, exemptions, findings)
    if Exempt.RESULT not in exemptions:
        _check_result(task, findings)
    if Exempt.STREAM not in exemptions:
        check_stream(task, findings)
    if Exempt.HISTORY not in exemptions:
        for history in task.histories or ():
            check_history(history, exemptions, findings)
    if Exempt.SNAPSHOT not in exemptions:
        findings.must(not task.snapshot_files, Rule.LEFT_SNAPSHOT, f"not deleted: {task.snapshot_files}")
    return findings.found


def _check_evidence(task: FinishedTask, exempt: frozenset[Exempt]) -> None:
    evidence = {
        Exempt.RESULT: task.result,
        Exempt.STREAM: task.streamed,
        Exempt.HISTORY: task.histories,
        Exempt.SNAPSHOT: task.snapshot_files,
    }
    missing = [name for name, found in evidence.items() if found is None and name not in exempt]
    if missing:
        raise NotCollected(f"{task.task_id}: no evidence on {', '.join(missing)}")


def _check_end(task: FinishedTask, expected: Expected, exempt: frozenset[Exempt], findings: Findings) -> None:
    row = task.row
    if row is None:
        findings.must(Exempt.NO_ROW in exempt, Rule.NOT_ENDED, "it has no row")
        return
    findings.must(task.has_ended, Rule.NOT_ENDED, "its row is open")
    if expected.ends is not None:
        allowed = " or ".join(sorted(expected.ends))
        findings.must(row.status in expected.ends, Rule.WRONG_END, f"it ended {row.status}, not {allowed}: {row.error}")


def _check_jobs(task: FinishedTask, expected: Expected, exempt: frozenset[Exempt], findings: Findings) -> None:
    """No job or training runs on after its task has ended."""
    alive = [job.run_id for job in task.jobs if not job.is_over]
    findings.must(not alive or Exempt.JOB_RUNS_OUT in exempt, Rule.ORPHAN_JOB, f"jobs still run: {alive}")
    if expected.jobs is not None:
        is_right = len(task.jobs) == expected.jobs
        findings.must(is_right, Rule.WRONG_END, f"{len(task.jobs)} jobs were made, not {expected.jobs}")


def _check_result(task: FinishedTask, findings: Findings) -> None:
    """The run's own result agrees with the row."""
    result, row = task.result or {}, task.row
    if row is None:
        return
    status = result.get("status", TaskStatus.CANCELLED)
    findings.must(row.status == status, Rule.WRONG_END, f"the row says {row.status}, the result {status}")
    kept = row.model_dump(mode="json")
    for name in ("credits", "result_urls", "output", "attempts", "gpu_slots", "estimated_time"):
        if name in result:
            is_same = kept[name] == result[name]
            findings.must(is_same, Rule.MISREPORTED, f"{name}: the row has {kept[name]}, the result {result[name]}")
