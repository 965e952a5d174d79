"""The price of a completed task (contract §5), from what both services have: never from what the task reports."""

from __future__ import annotations

import math
from typing import Final

from comfyui_temporal.contracts.comfyui import TaskPriority
from comfyui_temporal.contracts.errors import ExceptionCode
from comfyui_temporal.contracts.task_store import TaskRow
from proof.checks.finished_task import Exempt, Findings, FinishedTask, Rule
from proof.simulators.admin_wire import RunSeen

LEFT_BY_CORRECTION: Final = ExceptionCode.SETTLEMENT_CORRECTED.value


def check_price(task: FinishedTask, exempt: frozenset[Exempt], findings: Findings) -> None:
    """What was taken and what is reported as short add up to the price; a shortfall has a record of its points."""
    row, delivery = task.row, _delivery(task)
    if not isinstance(row, TaskRow) or not task.is_completed or delivery is None or Exempt.PRICE in exempt:
        return
    if row.credits.charged is None:
        return
    due, short = task.charges.taken + row.credits.shortfall, row.credits.shortfall
    least, most = _image(task, row, delivery) if delivery.kind == "image" else _training(task, row, delivery)
    rule = Rule.DOUBLE_CHARGE if due > most else Rule.MISCHARGE
    shown = f"{least}" if least == most else f"{least} to {most}"
    findings.must(
        least <= due <= most, rule, f"{task.charges.taken} points were taken, {short} are short, the price is {shown}"
    )
    recorded = [details.get("shortfall") for code, details in task.records if code == ExceptionCode.SHORTFALL]
    is_recorded = short in recorded or LEFT_BY_CORRECTION in task.codes
    findings.must(not short or is_recorded, Rule.MISREPORTED, f"{short} points are short, recorded are {recorded}")


def _delivery(task: FinishedTask) -> RunSeen | None:
    """The job or training that was delivered; the row's, where there are several."""
    delivered = [job for job in task.jobs if job.state.get("result_urls") or job.state.get("output")]
    named = [job for job in delivered if task.row is not None and job.run_id == task.row.job_id]
    return next(iter([*named, *reversed(delivered)]), None)


def _image(task: FinishedTask, row: TaskRow, delivery: RunSeen) -> tuple[int, int]:
    """Its cost, never more than was held. Where it states none its estimate counts, which only the row has kept."""
    cost = delivery.state.get("actual_cost")
    cost = row.prices.job if cost is None else cost
    held = _held(task)
    price = held if cost is None else min(cost, held)
    return (0 if cost is None else price), price


def _held(task: FinishedTask) -> int:
    """Points of the hold that was committed; of the newest where none was."""
    committed = [hold.amount for hold in task.holds if hold.phase == "committed"]
    return max(committed) if committed else max((hold.amount for hold in task.holds), default=0)


def _training(task: FinishedTask, row: TaskRow, delivery: RunSeen) -> tuple[int, int]:
    """The table's price of the hours used. Which checkpoint a later attempt resumed from is not seen here.

    It may be limited by what the payer confirmed, which is never less than the dearest hold.
    """
    used = delivery.state.get("gpu_hours_used")
    hours = delivery.state.get("gpu_hours") or 0.0 if used is None else used
    place = [job.run_id for job in task.jobs].index(delivery.run_id)
    checkpoints = [job.state.get("checkpoint") or {} for job in task.jobs[:place]]
    carried = math.fsum(checkpoint.get("gpu_hours_used") or 0.0 for checkpoint in checkpoints)
    least, most = (
        task.prices.training(
            base_model=row.resolution, accelerated=row.priority is TaskPriority.ACCELERATED, gpu_hours=known
        )
        for known in (hours, hours + carried)
    )
    return min(least, max((hold.amount for hold in task.holds), default=least)), most
