"""Names of the bridge's activities and queues: what its workflows know of the code that touches the world."""

from __future__ import annotations

import hashlib
from enum import StrEnum
from typing import Final

BRIDGE_QUEUE: Final = "comfyui-bridge"
"""Default name of the bridge's own queue: workflows, callbacks and everything else that needs no GPU. The names of all
other queues are made from it, so that several bridges can share a namespace."""
JOB_WORKFLOW: Final = "ComfyUIJobWorkflow"
KEY_WORKFLOW: Final = "ComfyUIKeyWorkflow"
TRAINING_WORKFLOW: Final = "ComfyUITrainingWorkflow"
CANCEL_UPDATE: Final = "cancel"
START_UPDATE: Final = "start"
MOVE_UPDATE: Final = "move"
VIEW_QUERY: Final = "view"

TAKE_SERVER: Final = "take_server"
RUN_GRAPH: Final = "run_graph"
COPY_RESULTS: Final = "copy_results"
SEND_CALLBACK: Final = "send_callback"
FETCH_CONTROLS: Final = "fetch_controls"
SIGN_RESULTS: Final = "sign_results"
CLEAR_UP: Final = "clear_up"
INGEST_DATASET: Final = "ingest_dataset"
PUBLISH_MODEL: Final = "publish_model"

LEAST_MINUTES: Final = 1.0
"""The shortest `estimated_time` that is announced for what is not over: tasks reckon their deadline from it (three
times by default), and a server that fails is found out after two minutes. `next_eta` is as near as it is known."""
TICKS: Final = 100
"""Sequence numbers set aside for a run's ticks: one for each whole percent."""
BODY_MEMO: Final = "body_sha256"
ANSWER_MEMO: Final = "answer"
STATUS_MEMO: Final = "status"
SERVER_MEMO: Final = "server"
SECONDS_MEMO: Final = "ran_seconds"
RESOLUTION_MEMO: Final = "resolution"


class RunFailureType(StrEnum):
    """Types of the failures after which a job goes to the pool again."""

    LOST = "prompt_lost"
    """The server does not know the prompt any more: the next one has a new id."""
    GONE = "server_gone"
    DEAD = "server_dead"
    HANDED_BACK = "handed_back"
    """The worker was told to stop."""


def pool_queue(bridge_queue: str, pool: str) -> str:
    """Jobs of a pool that wait for a server."""
    return f"{bridge_queue}-pool-{pool}"


def server_queue(bridge_queue: str, server: str) -> str:
    """What only the worker beside this server can do."""
    return f"{bridge_queue}-server-{server}"


def presence_queue(bridge_queue: str) -> str:
    """Polled by every GPU worker, whatever it does: its pollers' identities say which servers there are."""
    return f"{bridge_queue}-gpus"


def workflow_id(tenant_id: str, key: str) -> str:
    """One workflow for a tenant's idempotency key."""
    return f"comfyui-job-{_hashed(tenant_id, key)}"


def run_id_of(kind: str, tenant_id: str, key: str) -> str:
    """The job's or training's id on the wire: `job-…`, `training-…`."""
    return f"{kind}-{_hashed(tenant_id, key)}"


def workflow_of(run_id: str) -> str:
    """The workflow of a job's or training's id."""
    return f"comfyui-job-{run_id.rpartition('-')[2]}"


def _hashed(tenant_id: str, key: str) -> str:
    return hashlib.sha256(f"{tenant_id}\n{key}".encode("utf-8", "replace")).hexdigest()[:40]
