"""One seed's task: its input, the services' terms, what goes wrong, and what clients do meanwhile.

Clients act at the n-th step of the schedule, so that every point of it is equally likely, or together with a job's
last report.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Final

from comfyui_temporal.contracts.comfyui import TaskPriority
from comfyui_temporal.contracts.continuation import ImageRun, TrainingRun
from comfyui_temporal.contracts.policy import Policy
from comfyui_temporal.contracts.prices import PriceTable
from proof.simulation.comfyui_model import ComfyUITerms, Flicker
from proof.simulation.credits_model import CreditsTerms
from proof.simulation.fault_schedule import FaultSchedule, Party
from proof.simulation.timeline import START, Timeline
from proof.simulation.versions import Release

TASK_ID: Final = "t1"
RUN_ID: Final = "run-1"
IMAGE: Final = "ImageGenerationWorkflow"
TRAINING: Final = "TrainingWorkflow"
_ROOT: Final = "file:///datasets/tenant/"
NOT_OFFERED: Final = "no_such_extra"
PLENTY: Final = 100_000
"""A balance that is never too short."""
KINDS: Final = ("image", "training")


_CALLS: Final = (
    *("submit_job", "create_training", "start_training", "get_job", "get_training", "cancel_job", "cancel_training"),
    *("estimate", "pre_deduct", "pre_deduct", "commit", "cancel_hold", "ledger", "claim", *("write",) * 5),
)
"""The calls that an outage may begin with."""


class Action(StrEnum):
    """What a client, an operator or a machine does to the task."""

    CANCEL_BY_UPDATE = "cancel by update"
    CANCEL_BY_TEMPORAL = "cancel by Temporal"
    CONFIRM = "confirm"
    BAD_UPDATE = "bad update"
    GARBAGE = "garbage"
    OLD_CALLBACK = "old callback"
    QUERY = "query"
    KILL = "kill"
    EVICT = "evict"
    HOLD_CANCELLED_BY_OPERATOR = "hold cancelled by operator"
    BALANCE_RISES = "balance rises"
    BALANCE_FALLS = "balance falls"
    PAUSE = "pause"
    LONG_KILL = "workers away for long"
    OLD_WRITE = "old write"
    WAIT_UNTIL_HELD = "wait until held"
    RESET = "reset"


_OFTEN: Final = {
    Action.KILL: (0, 0, 1, 2),
    Action.GARBAGE: (0, 0, 3),
    Action.EVICT: (0, 1),
    Action.QUERY: (2, 2, 12),
    Action.OLD_CALLBACK: (0, 2),
}
"""How many times each is done: one of these numbers."""
_RARE: Final = {Action.PAUSE: 0.08, Action.OLD_WRITE: 0.15}
"""The probability that each is done once."""
PROFILES: Final = ("contract", "field", "both")
"""Whose credits service: one by our contract, the platform's own, or either by the seed."""


@dataclass
class Actions:
    """What is done at which step: (step, action), and with which of a job's reports."""

    at_step: list[tuple[int, Action]] = field(default_factory=list)
    on_last_report: list[Action] = field(default_factory=list)
    on_nth_callback: list[Action] = field(default_factory=list)
    """Once, with the n-th callback."""
    nth_callback: int = 0
    drawn: tuple[tuple[int, Action], ...] = ()
    """What was in `at_step` at first."""


@dataclass
class Scenario:
    """Everything that a seed decides before the schedule begins."""

    workflow_type: str
    task: ImageRun | TrainingRun
    policy: Policy
    faults: FaultSchedule
    credits: CreditsTerms
    comfyui: ComfyUITerms
    actions: Actions
    job_price_offset: int
    gpu_hours: float
    has_no_gpu: bool
    is_dataset_invalid: bool
    is_id_taken: bool
    dearer_by: tuple[int, ...] = ()
    """Points by which each further image job of the task is dearer."""
    tells_resumed_from: bool = False
    hands_on_as: Release = Release.PRESENT
    """The release whose worker sometimes continues the run."""
    checkpoints: int | None = None
    """How many a training passes, where it is not drawn when it begins: many, while the store is away."""
    resets_at_end: int = 0
    """How often the run is reset when the task has ended."""
    waits_from_start: bool = False
    """Whether the task is started by a client that waits until credits are held."""

    @property
    def is_image(self) -> bool:
        return self.workflow_type == IMAGE

    @property
    def is_accelerated(self) -> bool:
        return self.task.priority is TaskPriority.ACCELERATED

    @property
    def has_wrong_input(self) -> bool:
        return isinstance(self.task, ImageRun) and NOT_OFFERED in self.task.extras

    @property
    def is_paused(self) -> bool:
        return any(action in (Action.PAUSE, Action.LONG_KILL) for _, action in self.actions.drawn)

    @property
    def is_easy_on_credits(self) -> bool:
        """Whether nothing keeps a hold from being renewed in time."""
        faults, falls = self.faults, any(action == Action.BALANCE_FALLS for _, action in self.actions.drawn)
        has_faults = bool(faults.call_faults or faults.outages or faults.outage_with or faults.slow_tasks)
        has_faults |= faults.route_outage_with is not None
        is_reachable = not (has_faults or self.is_paused)
        return is_reachable and self.credits.balance == PLENTY and not falls

    @property
    def table_price(self) -> int:
        """The price by the table when the task begins, in points."""
        if isinstance(self.task, ImageRun):
            extras = {name: value for name, value in self.task.extras.items() if name != NOT_OFFERED}
            return self.policy.prices.image(
                resolution=self.task.resolution.value,
                accelerated=self.is_accelerated,
                extras=extras,
                images=self.task.images,
            )
        return self.policy.prices.training(
            base_model=self.task.base_model, accelerated=self.is_accelerated, gpu_hours=self.gpu_hours
        )


def drawn(
    rng: random.Random,
    more: random.Random,
    newest: random.Random,
    timeline: Timeline,
    kind: str,
    *,
    profile: str,
    resets: float,
    troubles: bool = True,
) -> Scenario:
    """The scenario of these generators' seed. Without `troubles` it is as it was before they were drawn.

    `more` is for what was added later, `newest` for what came after that, so that older draws stay the same.
    """
    is_image = kind == "image"
    task: ImageRun | TrainingRun = _image(rng) if is_image else _training(rng)
    scenario = Scenario(
        workflow_type=IMAGE if is_image else TRAINING,
        task=task,
        policy=_policy(rng, is_image, _prices(more, is_image)),
        faults=_faults(rng, timeline, is_image),
        credits=CreditsTerms(),
        comfyui=_comfyui(rng, is_image),
        actions=_actions(rng, is_image),
        job_price_offset=_rarely(rng, 0.08, lambda: rng.choice((-3, 4, 4, 100)), 0),
        gpu_hours=rng.choice((0.5, 1.0, 2.5)),
        has_no_gpu=rng.random() < 0.03,
        is_dataset_invalid=rng.random() < 0.03,
        is_id_taken=rng.random() < 0.01,
    )
    if more.random() < 0.15:
        scenario.task = scenario.task.model_copy(update={"priority": TaskPriority.ACCELERATED})
    scenario.credits = _credits(rng, scenario.table_price)
    _add_more(more, scenario)
    scenario.credits.is_field = profile == "field" or (profile == "both" and more.random() < 0.3)
    if not scenario.is_id_taken and more.random() < resets:
        scenario.resets_at_end = more.choice((0, 1, 1, 2))
        acts = scenario.actions.at_step
        acts.extend((more.randrange(100), Action.RESET) for _ in range(more.choice((0, 1, 1, 2))))
        acts.sort(key=lambda act: act[0], reverse=True)
    if scenario.credits.is_field:
        scenario.credits.tells_kinds = False
        scenario.credits.acts_and_fails = more.random() < 0.3
    _add_newest(newest, scenario)
    if troubles:
        _add_troubles(newest, scenario)
    return scenario


def _add_newest(newest: random.Random, scenario: Scenario) -> None:
    scenario.credits.tells_balance = newest.random() < 0.9
    scenario.waits_from_start = newest.random() < 0.5
    if newest.random() < 0.3:
        acts = scenario.actions.at_step
        acts.extend((newest.randrange(60), Action.WAIT_UNTIL_HELD) for _ in range(newest.choice((1, 1, 3))))
        acts.sort(key=lambda act: act[0], reverse=True)
    # A whole day in the queue is thousands of workflow tasks, and shows nothing that an hour does not.
    if scenario.is_image and newest.random() < 0.95:
        cap = newest.choice((30.0, 60.0, 120.0))
        scenario.policy = scenario.policy.model_copy(update={"cap_minutes": cap})
    if scenario.is_image and newest.random() < 0.2:
        _ask_for_several(newest.choice((2, 4, 16)), scenario)
    scenario.credits.refuses_cancels = _rarely(newest, 0.05, lambda: newest.choice((1, 1, 2, 100)), 0)


def _add_troubles(newest: random.Random, scenario: Scenario) -> None:
    """Drawn last: what came before stays as it was."""
    if newest.random() < 0.1:
        terms = scenario.comfyui
        terms.flickers, terms.flickers_at = newest.choice(list(Flicker)), newest.choice((1, 1, 2, 3))
        terms.flickers_for = newest.choice((30.0, 300.0, 1_200.0))
    if newest.random() < 0.1:
        scenario.credits.lag_seconds = newest.choice((400.0, 590.0))
    if scenario.is_image and newest.random() < 0.02:
        scenario.job_price_offset = scenario.credits.price_offset = -1_000_000
    faults = scenario.faults
    if faults.outage_with is None and newest.random() < 0.04:
        faults.outage_with = (newest.choice(_CALLS), newest.choice((2_400, 5_000)))
    if newest.random() < 0.06:
        faults.route_outage_with = (newest.choice(_CALLS), newest.choice((60, 600, 2_400, 5_000)))
    if newest.random() < 0.04:
        acts = scenario.actions
        acts.at_step = sorted([*acts.at_step, (newest.randrange(60), Action.LONG_KILL)], reverse=True)
        acts.drawn = tuple(acts.at_step)


def _ask_for_several(images: int, scenario: Scenario) -> None:
    """Balance and ceiling stay as near to the price as they were drawn."""
    price, task = scenario.table_price, scenario.task
    scenario.task = task.model_copy(update={"images": images})
    dearer = scenario.table_price - price
    if scenario.credits.balance != PLENTY:
        scenario.credits.balance += dearer
    if isinstance(task, ImageRun) and task.max_credits is not None:
        scenario.task = scenario.task.model_copy(update={"max_credits": task.max_credits + dearer})


def _prices(more: random.Random, is_image: bool) -> PriceTable:
    """Sometimes so dear that a charge needs several parts."""
    if more.random() > 0.04:
        return PriceTable()
    return PriceTable(image_base=4_500) if is_image else PriceTable(points_per_gpu_hour=900)


def _add_more(more: random.Random, scenario: Scenario) -> None:
    terms = scenario.credits
    if more.random() < 0.15:
        scenario.dearer_by = tuple(more.choice((0, 0, 3, 9)) for _ in range(4))
    terms.price_offset = _rarely(more, 0.03, lambda: -1_000_000, terms.price_offset)
    terms.grants_more = _rarely(more, 0.04, lambda: 7, 0)
    terms.commits_less = _rarely(more, 0.02, lambda: 1, 0)
    terms.says_less = _rarely(more, 0.02, lambda: 3, 0)
    scenario.tells_resumed_from = more.random() < 0.3
    scenario.hands_on_as = _rarely(more, 0.1, lambda: more.choice((Release.NEWER, Release.OLDER)), Release.PRESENT)
    if not scenario.is_image and more.random() < 0.03:
        _let_much_wait(scenario)
    for action, chance in _RARE.items():  # drawn last, so that earlier draws do not change
        if more.random() < chance:
            scenario.actions.at_step.append((more.randrange(100), action))
    scenario.actions.at_step.sort(key=lambda act: act[0], reverse=True)
    scenario.actions.drawn = tuple(scenario.actions.at_step)


def _rarely(rng: random.Random, chance: float, then: Callable[[], Any], otherwise: Any) -> Any:
    return then() if rng.random() < chance else otherwise


def _image(rng: random.Random) -> ImageRun:
    return ImageRun(
        task_id=TASK_ID,
        tenant_id="tenant",
        user_id="user",
        template_id="text-to-image",
        prompt="a lighthouse",
        extras=_rarely(rng, 0.04, lambda: {NOT_OFFERED: True}, rng.choice(({}, {"hires_fix": True}))),
        max_credits=_rarely(rng, 0.1, lambda: rng.choice((20, 500, 500)), None),
    )


def _training(rng: random.Random) -> TrainingRun:
    window = None
    if rng.random() < 0.1:
        opens = datetime.fromtimestamp(START, UTC) + timedelta(minutes=10)
        window = {"not_before": opens, "not_after": opens + timedelta(minutes=rng.choice((1, 120)))}
    return TrainingRun.model_validate(
        {
            "task_id": TASK_ID,
            "tenant_id": "tenant",
            "user_id": "user",
            "template_id": "lora-train",
            "dataset": {"dataset_id": "d1", "source_uri": _ROOT + "d1/"},
            "hyperparameters": {"epochs": 2, "batch_size": 1, "learning_rate": 0.1},
            "max_credits": rng.choice((None, 500, 10_000, 10_000, 10_000, 130)),
            "window": window,
        }
    )


def _let_much_wait(scenario: Scenario) -> None:
    """A large input, and more events than the list of unwritten events holds."""
    faults, task = scenario.faults, scenario.task
    scenario.checkpoints = 150
    faults.outages[Party.STORE] = [(START + 60, START + 7_200)]
    faults.quiet_from = max(faults.quiet_from, START + 7_200)
    files = [f"{number:06}{'x' * 180}.png" for number in range(500)]
    dataset = task.dataset.model_copy(update={"files": files})  # type: ignore[union-attr]
    scenario.task = task.model_copy(update={"dataset": dataset})


def _policy(rng: random.Random, is_image: bool, prices: PriceTable) -> Policy:
    return Policy(
        prices=prices,
        callback_url=f"https://gateway.example/callbacks/comfyui/{TASK_ID}",
        poll_after_seconds=30 if is_image else 300,
        poll_at_most_seconds=120 if is_image else 1_800,
        deadline_factor=3,
        counts_from_processing=True,
        checks_balance_first=True,
        cap_minutes=24 * 60 if is_image else 30 * 24 * 60,
        charge_shortfall=rng.random() < 0.2,
        queue_sla_minutes=rng.choice((0.5, 8)),
        continue_as_new_events=rng.choice((20, 30, 50, 2_000, 2_000)),
        dataset_roots=[_ROOT],
    )


def _faults(rng: random.Random, timeline: Timeline, is_image: bool) -> FaultSchedule:
    faults = FaultSchedule(timeline, rng, quiet_from=START)
    if rng.random() < 0.1:
        return faults
    faults.quiet_from += rng.choice((30, 300, 1_500)) if is_image else rng.choice((600, 7_200, 20_000))
    faults.call_faults = rng.choice((0.0, 0.1, 0.3))
    faults.task_losses = rng.choice((0.0, 0.05, 0.2))
    faults.slow_tasks = rng.choice((0.0, 0.1, 0.4))
    faults.callback_losses = rng.choice((0.0, 0.1, 0.5))
    faults.callback_copies = rng.choice((0.0, 0.3))
    kind = rng.random()
    if kind < 0.2:
        begin = START + rng.choice((0, 1, 10, 10, 100, 1_000))
        end = begin + rng.choice((5, 60, 600, 1_200))
        faults.outages[rng.choice(list(Party))] = [(begin, end)]
        faults.quiet_from = max(faults.quiet_from, end)
    elif kind < 0.5:
        faults.outage_with = (rng.choice(_CALLS), rng.choice((5, 60, 600, 1_200)))
    return faults


def _credits(rng: random.Random, price: int) -> CreditsTerms:
    return CreditsTerms(
        balance=rng.choice((price, price + 1, price - 1, 2 * price - 1, 2 * price, *(PLENTY,) * 8)),
        price_offset=_rarely(rng, 0.08, lambda: rng.choice((-2, 3, 3, 90)), 0),
        lag_seconds=rng.choice((0.0, 0.0, 5.0, 200.0, 1_000.0)),
        tells_kinds=rng.random() < 0.95,
        refuses_holds_with=_rarely(rng, 0.02, lambda: "authorization_quota_exceeded", None),
        refuses_commits_with=_rarely(rng, 0.02, lambda: rng.choice(("amount_invalid", "pre_deduct_not_found")), None),
    )


def _comfyui(rng: random.Random, is_image: bool) -> ComfyUITerms:
    lacks = {route for route in ("cancel", "start", "list_gpus") if rng.random() < 0.02}
    return ComfyUITerms(
        not_offered=frozenset(lacks),
        refuses_submits_with=_rarely(rng, 0.02, lambda: "template_not_found", None),
        minutes=rng.choice((0.1, 1.0, 4.0)) if is_image else rng.choice((5.0, 45.0, 100.0)),
        sends_callbacks=rng.random() < 0.9,
    )


def _actions(rng: random.Random, is_image: bool) -> Actions:
    most, actions = (60 if is_image else 120), Actions()
    steps = rng.choice((12, most, most))
    cancels = rng.choice((0, 0, 1, 1, 2))
    for _ in range(cancels):
        cancel = rng.choice((Action.CANCEL_BY_UPDATE, Action.CANCEL_BY_TEMPORAL))
        when = rng.random()
        if when < 0.2:
            actions.on_last_report.append(cancel)
        elif when < 0.5:
            actions.on_nth_callback.append(rng.choice((cancel, Action.CANCEL_BY_TEMPORAL)))
            actions.nth_callback = rng.randrange(1, 6 if is_image else 12)
        else:
            actions.at_step.append((rng.randrange(steps), cancel))
    for action, counts in _OFTEN.items():
        actions.at_step.extend((rng.randrange(steps), action) for _ in range(rng.choice(counts)))
    if rng.random() < 0.15:
        actions.at_step.append(
            (
                rng.randrange(steps),
                rng.choice((Action.BALANCE_RISES, Action.BALANCE_FALLS, Action.HOLD_CANCELLED_BY_OPERATOR)),
            )
        )
    if rng.random() < 0.1:
        actions.on_last_report.append(Action.KILL)
    if not is_image:
        actions.at_step.extend((rng.randrange(steps), Action.CONFIRM) for _ in range(rng.choice((0, 1, 3))))
    if rng.random() < 0.05:
        actions.at_step.append((rng.randrange(steps), Action.BAD_UPDATE))
    actions.at_step.sort(reverse=True)
    actions.drawn = tuple(actions.at_step)
    return actions
