"""Trainings with long lists of files over HTTP: the list itself, up to 4 MiB, or a manifest of the caller's own."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from comfyui_temporal.contracts.size_budget import MAX_INLINE_LIST_BYTES
from gateway.request_limits import MAX_BODY_BYTES
from tests.conftest import unique
from tests.gateway.conftest import Api
from tests.gateway.serving import answer_to_head, bearer, token_for

CONFIRMED = 5_000


def dataset_of(api: Api, count: int, path_characters: int = 200) -> tuple[Path, list[str]]:
    """A dataset of so many files whose list takes so much; their names."""
    folder = api.platform.folder / "datasets" / "tenant-demo" / unique("long")
    names = [f"{n:05}/".ljust(path_characters - 4, "f") + ".txt" for n in range(count)]
    for name in names:
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("one")
    (folder / "not asked for.txt").write_text("another")
    return folder, names


def order_of(api: Api, **dataset: Any) -> dict[str, Any]:
    order = api.platform.training(max_credits=CONFIRMED, task_id=unique("training"))
    del order["tenant_id"], order["user_id"]
    return order | {"dataset": {"dataset_id": "long", **dataset}}


async def trained_on(api: Api, task_id: str) -> int:
    """How many files a training that has ended well was made of, as its row tells."""
    task = await api.ended(task_id)
    assert task["status"] == "completed", task
    row = await api.platform.store.task(task_id)
    assert row is not None and row.dataset is not None and row.dataset.manifest is not None
    assert row.dataset.files is None
    return row.dataset.manifest.file_count


async def test_a_list_that_no_input_takes_is_trained_on(api: Api) -> None:
    folder, names = dataset_of(api, 800)
    assert len(json.dumps(names)) > MAX_INLINE_LIST_BYTES
    order = order_of(api, source_uri=folder.as_uri(), files=names)
    answer = await api.call("POST", "/trainings", order)
    assert answer.status_code == 202, answer.text
    again = await api.call("POST", "/trainings", order)
    other = await api.call("POST", "/trainings", order | {"dataset": order["dataset"] | {"files": names[1:]}})
    assert (again.status_code, again.json()["task_id"]) == (200, order["task_id"])
    assert (other.status_code, other.json()["code"]) == (409, "task_exists")
    run = api.platform.client.get_workflow_handle(f"task-{order['task_id']}")
    async for event in run.fetch_history_events(page_size=1):
        [payload] = event.workflow_execution_started_event_attributes.input.payloads
        assert len(payload.data) < 1_000, "the run carries the list by its checksum"
        break
    assert await trained_on(api, order["task_id"]) == 800
    assert (await api.call("POST", "/trainings", order)).status_code == 200, "a repeat after its end too"


async def test_a_short_list_stays_in_the_input(api: Api) -> None:
    """As in the first release: the same order twice, before and after an update, is one task."""
    folder, names = dataset_of(api, 3)
    order = order_of(api, source_uri=folder.as_uri(), files=names)
    assert (await api.call("POST", "/trainings", order)).status_code == 202
    run = api.platform.client.get_workflow_handle(f"task-{order['task_id']}")
    async for event in run.fetch_history_events(page_size=1):
        [payload] = event.workflow_execution_started_event_attributes.input.payloads
        assert json.loads(payload.data)["dataset"]["files"] == names
        break
    assert await trained_on(api, order["task_id"]) == 3


async def test_a_manifest_of_the_callers_own_is_trained_on(api: Api) -> None:
    folder, names = dataset_of(api, 5)
    raw = json.dumps(names[:4]).encode()
    (folder / "wanted.json").write_bytes(raw)
    manifest = {"uri": (folder / "wanted.json").as_uri(), "sha256": hashlib.sha256(raw).hexdigest()}
    order = order_of(api, source_uri=folder.as_uri(), manifest=manifest)
    assert (await api.call("POST", "/trainings", order)).status_code == 202
    assert await trained_on(api, order["task_id"]) == 4
    assert (folder / "wanted.json").exists()


async def test_a_list_of_four_megabytes_is_taken_and_a_longer_one_is_not(api: Api) -> None:
    names = [f"{n:05}".ljust(205, "f") + "/" + "f" * 204 for n in range(10_000)]
    order = order_of(api, source_uri=(api.platform.folder / "datasets" / "tenant-demo" / "faces").as_uri(), files=names)
    assert 4_000_000 < len(json.dumps(names)) < 4 * 1024 * 1024
    answer = await api.call("POST", "/trainings", order)
    assert answer.status_code == 202, answer.text
    task = await api.ended(order["task_id"])
    assert task["error"]["code"] == "dataset_invalid" and "is not in" in task["error"]["message"]
    kept = api.platform.folder / "objects" / "snapshots" / order["task_id"]

    async def is_deleted() -> bool:
        return not [path for path in kept.rglob("*") if path.is_file()]

    await api.platform.until(is_deleted)  # the deletion comes after the last event
    names = [name + "f" * 20 for name in names]
    answer = await api.call("POST", "/trainings", order_of(api, source_uri="file:///x", files=names))
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
    assert "4224 KiB" in answer.json()["detail"]


async def test_a_stranger_has_no_room_for_a_long_list(api: Api) -> None:
    """The body is read before the token is checked: 4 MiB of each stranger were kept."""
    head = {"Content-Type": "application/json", "Content-Length": str(MAX_BODY_BYTES + 1)}
    for token in (
        {},
        bearer("x"),
        bearer(token_for(secret="another secret, just as long as the right one is: 64 bytes")),
    ):
        assert await answer_to_head(api.http, "POST", "/api/v1/tasks/trainings", head | token) == 413


@pytest.mark.parametrize(
    ("dataset", "field"),
    [
        ({"files_sha256": "0" * 64}, "dataset.files_sha256"),
        ({"files": ["a"], "manifest": {"uri": "file:///x", "sha256": "0" * 64}}, "dataset"),
        ({"manifest": {"uri": "file:///x", "sha256": "x"}}, "dataset.manifest.sha256"),
        ({"manifest": {"uri": "file:///x"}}, "dataset.manifest.sha256"),
    ],
)
async def test_what_is_not_a_callers_to_give_is_named(api: Api, dataset: dict[str, Any], field: str) -> None:
    answer = await api.call("POST", "/trainings", order_of(api, source_uri="file:///x/", **dataset))
    assert (answer.status_code, answer.json()["code"]) == (422, "input_invalid")
    assert [problem["field"] for problem in answer.json()["fields"]] == [field]


@pytest.mark.slow
async def test_storage_that_is_away_starts_nothing(api: Api) -> None:
    folder, names = dataset_of(api, 800)
    order = order_of(api, source_uri=folder.as_uri(), files=names)
    blocked = api.platform.folder / "objects" / "snapshots" / order["task_id"]
    blocked.parent.mkdir(parents=True, exist_ok=True)
    blocked.write_text("a file where the folder would be")
    answer = await api.call("POST", "/trainings", order)
    assert (answer.status_code, answer.json()["code"]) == (503, "storage_unavailable")
    assert answer.headers["retry-after"]
    assert (await api.call("GET", f"/{order['task_id']}")).status_code == 404
    blocked.unlink()
    assert (await api.call("POST", "/trainings", order)).status_code == 202
    assert await trained_on(api, order["task_id"]) == 800
