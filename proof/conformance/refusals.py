"""An invalid request is refused by name, with the field, and has no effect (contract §2, §3)."""

from __future__ import annotations

from typing import Any, Final

from comfyui_temporal.contracts.comfyui import JobAccepted
from proof.conformance.cases import Case, add_case, case
from proof.conformance.subject import Subject, accepted, new_task, refused
from proof.conformance.subject import demand as demand_that

_BAD_JOBS: Final[dict[str, tuple[dict[str, Any], str, str]]] = {
    "an_unknown_resolution": ({"resolution": "8k"}, "payload_invalid", "resolution"),
    "an_unknown_priority": ({"priority": "urgent"}, "payload_invalid", "priority"),
    "a_prompt_that_is_no_text": ({"prompt": 5}, "payload_invalid", "prompt"),
    "controls_that_are_no_list": ({"controls": "none"}, "payload_invalid", "controls"),
    "an_extra_without_a_price": ({"extras": {"turbo": True}}, "payload_invalid", "turbo"),
    "extras_that_are_no_object": ({"extras": []}, "payload_invalid", "extras"),
    "a_callback_url_that_is_no_web_address": ({"callback_url": "ftp://x"}, "payload_invalid", "callback_url"),
    "a_missing_field": ({"task_id": None}, "payload_invalid", "task_id"),
    "an_unknown_template": ({"template_id": "no-such-template"}, "template_not_found", ""),
}
_GOOD: Final = {"epochs": 1, "batch_size": 1, "learning_rate": 0.1}
_BAD_TRAININGS: Final[dict[str, tuple[dict[str, Any], str]]] = {
    "no_epochs": ({"hyperparameters": _GOOD | {"epochs": 0}}, "epochs"),
    "an_empty_batch": ({"hyperparameters": _GOOD | {"batch_size": 0}}, "batch_size"),
    "a_learning_rate_of_nothing": ({"hyperparameters": _GOOD | {"learning_rate": 0}}, "learning_rate"),
    "no_learning_rate": ({"hyperparameters": {"epochs": 1, "batch_size": 1}}, "learning_rate"),
    "an_unknown_base_model": ({"base_model": "no-such-model"}, "base_model"),
    "a_gpu_that_is_not_there": ({"gpu_type": "abacus"}, "gpu_type"),
    "a_checkpoint_that_is_not_there": ({"resume_from": "file:///no/such/checkpoint"}, "resume_from"),
    "a_dataset_that_is_no_object": ({"dataset": "cats"}, "dataset"),
}


def _bad(name: str, path: str, change: dict[str, Any], message: str, field: str) -> None:
    async def check(subject: Subject) -> None:
        task = new_task()
        whole = subject.job_body(task) if path == "/jobs" else subject.training_body(task)
        # None means that the field is left out.
        body = {part: value for part, value in (whole | change).items() if value is not None}
        fields = refused(await subject.post(path, body, f"{task}:submit:1"), message)
        names_it = not field or any(field in line for line in fields)
        demand_that(names_it, f"the refusal does not name {field}: {fields}")

    what = "job" if path == "/jobs" else "training"
    title = f"a {what} with {name.replace('_', ' ')} is refused by name"
    add_case(Case(f"{what}_refused_{name}", title, check, trains=what == "training"))


for _name, (_change, _message, _field) in _BAD_JOBS.items():
    _bad(_name, "/jobs", _change, _message, _field)
for _name, (_change, _field) in _BAD_TRAININGS.items():
    _bad(_name, "/training", _change, "payload_invalid", _field)


@case("bytes that are no JSON object are refused, and so are NaN and deep nesting")
async def what_is_no_json_is_refused(subject: Subject) -> None:
    task = new_task()
    deep = b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}"
    for number, content in enumerate((b"{", b"[]", b'"text"', b'{"task_id": NaN}', b"\xff\xfe", deep), start=1):
        answer = await subject.send("POST", "/jobs", content=content, key=f"{task}:submit:{number}")
        refused(answer, "payload_invalid")


@case("a POST without a key, or with one that is no key, is refused")
async def a_post_needs_a_key(subject: Subject) -> None:
    task = new_task()
    for key in (None, "", "k" * 5000):
        fields = refused(await subject.send("POST", "/jobs", subject.job_body(task), key=key), "payload_invalid")
        names_it = any("idempotency-key" in line.lower() for line in fields)
        demand_that(names_it, f"the refusal does not name X-Idempotency-Key: {fields}")


@case("a prompt of any language, with emoji and line ends, is taken")
async def any_text_is_taken(subject: Subject) -> None:
    task = new_task()
    body = subject.job_body(task, prompt='ein Leuchtturm\n灯台 🗼 "quoted" \\ {{braces}}\t')
    accepted(await subject.post("/jobs", body, f"{task}:submit:1"), JobAccepted)
