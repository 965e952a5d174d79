"""What a version passes on is read by the next one and by the one before, without loss (pitfall 41)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from temporalio.api.common.v1 import Payload
from temporalio.api.enums.v1 import EventType as Happened
from temporalio.api.history.v1 import HistoryEvent
from temporalio.client import WorkflowHistory

from activities.orphans import HistoryReader, NotReadHere
from comfyui_temporal.contracts.fields import CallerModel
from comfyui_temporal.contracts.give_back import Orphans
from comfyui_temporal.contracts.handed_on import Doubtful, KeptModel, RunArgument
from comfyui_temporal.contracts.task_store import TaskRow
from comfyui_temporal.plugin import DATA_CONVERTER
from tests.versions.fullest import DOCUMENTS, fullest
from tests.versions.record import NEWEST, VERSIONS, rendered
from tests.versions.words import NEW_ENUM_VALUE, NEW_FIELD, at, enum_paths, leaves, new_fields_in, with_new_fields
from tests.workflows.record_histories import HISTORIES

CONVERTER = DATA_CONVERTER.payload_converter
RECORDED = sorted(VERSIONS.glob("*/*.json"))
KEPT = [name for name, model in DOCUMENTS.items() if issubclass(model, KeptModel | RunArgument)]


def payload(document: Any) -> Payload:
    return Payload(metadata={"encoding": b"json/plain"}, data=json.dumps(document).encode())


def read(name: str, document: Any) -> Any:
    """The document as a worker of today gets it."""
    [value] = CONVERTER.from_payloads([payload(document)], [DOCUMENTS[name]])
    return value


def serialized_again(value: Any) -> Any:
    [written] = CONVERTER.to_payloads([value])
    return json.loads(written.data)


def test_the_newest_version_is_recorded_as_it_is() -> None:
    """If this fails: run `python -m tests.versions.record`, and read docs/versioning.md."""
    recorded = {path.name: path.read_text() for path in (VERSIONS / NEWEST).glob("*.json")}
    assert recorded == rendered()


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda path: f"{path.parent.name} {path.stem}")
def test_what_an_older_version_passes_on_is_read_without_loss(recorded: Path) -> None:
    document = json.loads(recorded.read_text())
    value = read(recorded.stem, document)
    assert isinstance(value, DOCUMENTS[recorded.stem])
    again = leaves(serialized_again(value))
    assert {place: again.get(place) for place in leaves(document)} == leaves(document)


@pytest.mark.parametrize("name", KEPT)
def test_unknown_fields_are_kept_at_every_depth(name: str) -> None:
    document = with_new_fields(DOCUMENTS[name].model_validate(fullest(DOCUMENTS[name])))
    if name == "left-behind":
        del document[NEW_FIELD]  # may hold money: see below
    value = read(name, document)
    assert isinstance(value, DOCUMENTS[name]), value
    assert serialized_again(value) == document
    assert new_fields_in(document)
    copied = value.model_copy(deep=True)
    assert serialized_again(copied) == document, "a copy in a run keeps them too"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_an_unknown_enum_value_is_never_taken_for_another(name: str) -> None:
    """It cannot be read: a run's workflow task fails, an activity is retried on another worker."""
    model = DOCUMENTS[name].model_validate(fullest(DOCUMENTS[name]))
    for path in enum_paths(model):
        document = fullest(DOCUMENTS[name])
        at(document, path[:-1])[path[-1]] = NEW_ENUM_VALUE
        try:
            value = read(name, document)
        except ValidationError:
            continue
        assert isinstance(value, Doubtful) and value.as_read is None, path


def test_a_price_to_confirm_without_a_time_is_read_and_passed_on_with_one() -> None:
    """For a while null was kept of a training that runs on: in rows, writes, and what runs carry."""
    places: dict[str, tuple[str | int, ...]] = {
        "task-write": ("state", "confirmation"),
        "row-seen": ("row", "confirmation"),
        "training-run": ("carried", "record", "state", "confirmation"),
    }
    for name, place in places.items():
        document = fullest(DOCUMENTS[name])
        at(document, place[:-1])[place[-1]] = {"estimated_cost": 360, "confirm_by": None}
        kept = at(serialized_again(read(name, document)), place)
        assert kept["confirm_by"] is not None and kept["is_running"] is True, name


def test_a_caller_is_still_read_strictly() -> None:
    task = {"task_id": "a", "tenant_id": "t", "user_id": "u", "template_id": "x", "prompt": "p"}
    assert isinstance(read("image-run", task), DOCUMENTS["image-run"])
    doubtful = read("image-run", {**task, "options": {NEW_FIELD: 1}})
    assert isinstance(doubtful, Doubtful) and f"options.{NEW_FIELD}: Extra inputs are not permitted" in doubtful.reason
    assert doubtful.as_read is not None, "a run that a newer worker has begun goes on with it"
    for model in DOCUMENTS.values():
        if issubclass(model, RunArgument) and "carried" in model.model_fields:
            assert model.model_config["extra"] == "forbid"
    assert CallerModel.model_config["extra"] == "forbid"


def test_an_unknown_field_of_orphans_may_hold_money_and_is_refused() -> None:
    document = fullest(Orphans)
    nothings: list[Any] = [None, [], {}, False, 0, ""]
    for nothing in nothings:
        assert isinstance(read("left-behind", {**document, "vouchers": nothing}), Orphans)
    with pytest.raises(ValidationError, match="vouchers"):
        read("left-behind", {**document, "vouchers": [{"voucher_id": "v-1"}]})


def scheduled(name: str, document: Any) -> HistoryEvent:
    event = HistoryEvent(event_id=5, event_type=Happened.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED)
    attributes = event.activity_task_scheduled_event_attributes
    attributes.activity_type.name = name
    attributes.input.payloads.append(payload(document))
    return event


def new_reading() -> HistoryReader:
    row = TaskRow.model_validate(fullest(Orphans)["row"])
    return HistoryReader(Orphans(row=row, how="terminated"), DATA_CONVERTER)


@pytest.mark.parametrize("call", ["submit_job", "create_training", "pre_deduct", "cancel_hold", "charge", "snapshot"])
async def test_a_call_that_cannot_be_read_stops_the_give_back(call: str) -> None:
    with pytest.raises(NotReadHere, match=r"Event 5 .* may hold credits"):
        await new_reading().take(scheduled(call, {"call_for": 1}))


async def test_an_unknown_call_stops_the_give_back() -> None:
    with pytest.raises(NotReadHere, match="hold_two_at_once is not known here"):
        await new_reading().take(scheduled("hold_two_at_once", {}))


async def test_an_unreadable_continuation_stops_the_give_back() -> None:
    document = fullest(DOCUMENTS["image-run"])
    at(document, ("carried", "hold", "asked", 0))["n"] = "the second"
    event = HistoryEvent(event_id=1, event_type=Happened.EVENT_TYPE_WORKFLOW_EXECUTION_STARTED)
    event.workflow_execution_started_event_attributes.workflow_type.name = "ImageGenerationWorkflow"
    event.workflow_execution_started_event_attributes.input.payloads.append(payload(document))
    with pytest.raises(NotReadHere, match=r"carried\.hold\.asked\.0\.n"):
        await new_reading().take(event)


OF_NO_TASK = ("given_back", "reconciled", "reconciler_idle")
TASK_HISTORIES = sorted(path for path in HISTORIES.glob("*.json") if not path.stem.endswith(OF_NO_TASK))


@pytest.mark.parametrize("recorded", TASK_HISTORIES, ids=lambda path: path.stem)
async def test_every_recorded_history_is_read_to_its_end(recorded: Path) -> None:
    history = WorkflowHistory.from_json("any", recorded.read_text())  # noqa: ASYNC240
    reading = new_reading()
    for event in history.events:
        await reading.take(event)
    has_begun = not recorded.stem.endswith("short_of_points")  # those end at the price check
    assert bool(reading.orphans.jobs) == has_begun
