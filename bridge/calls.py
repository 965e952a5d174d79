"""Names of the bridge's workflows, activities and task queues. Workflow code calls activities by these names."""

from __future__ import annotations

import hashlib
from enum import StrEnum
from typing import Final

BRIDGE_QUEUE: Final = "comfyui-bridge"
"""Default name of the bridge's own queue, for workflows, callbacks and everything else that needs no GPU. All other
queue names are derived from it, so several bridges can share a namespace."""
JOB_WORKFLOW: Final = "ComfyUIJobWorkflow"
KEY_WORKFLOW: Final = "ComfyUIKeyWorkflow"
TRAINING_WORKFLOW: Final = "ComfyUITrainingWorkflow"
CANCEL_UPDATE: Final = "cancel"
START_UPDATE: Final = "start"
MOVE_UPDATE: Final = "move"
ESTIMATE_UPDATE: Final = "estimate"
VIEW_QUERY: Final = "view"
SERVER_WORKFLOW: Final = "ComfyUIServerWorkflow"

TAKE_SERVER: Final = "take_server"
RUN_GRAPH: Final = "run_graph"
COPY_RESULTS: Final = "copy_results"
CLEAN_SERVER: Final = "clean_server"
SEND_CALLBACK: Final = "send_callback"
FETCH_CONTROLS: Final = "fetch_controls"
FETCH_MODELS: Final = "fetch_models"
SIGN_RESULTS: Final = "sign_results"
CLEAR_UP: Final = "clear_up"
INGEST_DATASET: Final = "ingest_dataset"
PUBLISH_MODEL: Final = "publish_model"
CHECK_SERVERS: Final = "check_servers"

LEAST_MINUTES: Final = 1.0
"""The shortest `estimated_time` of a run that is not over. A task's deadline is a multiple of it (3 by default), and a
failed server is noticed only after two minutes. `next_eta` has no such minimum."""
TICKS: Final = 100
"""Sequence numbers reserved for a run's ticks: one for each whole percent."""
BODY_MEMO: Final = "body_sha256"
ANSWER_MEMO: Final = "answer"
STATUS_MEMO: Final = "status"
SERVER_MEMO: Final = "server"
SECONDS_MEMO: Final = "ran_seconds"
RESOLUTION_MEMO: Final = "resolution"
MANIFEST_MEMO: Final = "manifest_seconds"
"""What the manifest expected of the run whose time is in `SECONDS_MEMO`."""
REPORT_MEMO: Final = "server_report"
STORAGE_AWAY: Final = "storage_unavailable"
"""Type of the failure of a call that cannot use object storage now. It is retried, and so is a job that it ended."""
TEMPLATE_UNFIT: Final = "template_unfit"
"""Type of the failure with which a server hands a job over to its template's queue."""


class RunFailureType(StrEnum):
    """Types of failures after which a job returns to the pool."""

    LOST = "prompt_lost"
    """The server no longer knows the prompt. The next prompt has a new id."""
    GONE = "server_gone"
    DEAD = "server_dead"
    HANDED_BACK = "handed_back"
    """The worker was stopped, or cannot use object storage now: the job waits for a server again.

    It counts as a failed run only with an error: what the job needs cannot be read, though storage can be used.
    """
    SICK = "server_sick"
    """The server takes no prompts, its GPU is broken, or it fails whatever it is given."""
    UNFIT = "server_unfit"
    """The server lacks a model or node that the job needs."""
    INTERRUPTED = "prompt_interrupted"
    """Someone stopped the run at the server, not by a cancel of the job. The next prompt has a new id."""


def pool_queue(bridge_queue: str, pool: str) -> str:
    """The queue of a pool's jobs that wait for a server."""
    return f"{bridge_queue}-pool-{pool}"


def template_queue(bridge_queue: str, pool: str, template_id: str) -> str:
    """The queue of a template's jobs that not every server of the pool can run."""
    return f"{pool_queue(bridge_queue, pool)}-template-{template_id}"


def report_id(bridge_queue: str, server: str) -> str:
    """The workflow id of a server's report."""
    return f"{bridge_queue}-report-{server}"


def server_queue(bridge_queue: str, server: str) -> str:
    """The queue of activities that only this server's worker can run."""
    return f"{bridge_queue}-server-{server}"


def presence_queue(bridge_queue: str) -> str:
    """A queue that every GPU worker polls at all times. Its pollers' identities show which servers exist."""
    return f"{bridge_queue}-gpus"


def workflow_id(tenant_id: str, key: str) -> str:
    """The workflow id for a tenant's idempotency key."""
    return f"comfyui-job-{_hashed(tenant_id, key)}"


def run_id_of(kind: str, tenant_id: str, key: str) -> str:
    """The job's or training's id on the wire: `job-…`, `training-…`."""
    return f"{kind}-{_hashed(tenant_id, key)}"


def workflow_of(run_id: str) -> str:
    """The workflow id of a job or training."""
    return f"comfyui-job-{run_id.rpartition('-')[2]}"


def _hashed(tenant_id: str, key: str) -> str:
    return hashlib.sha256(f"{tenant_id}\n{key}".encode("utf-8", "replace")).hexdigest()[:40]
