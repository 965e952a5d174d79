"""What a tenant may train on: the folders directly below its own `DATASET_ROOTS`, as a worker lists them."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import Field

from comfyui_temporal.contracts.fields import CallerId, OwnModel

DATASET_LIST_WORKFLOW: Final = "DatasetListWorkflow"
DATASET_LIST_PREFIX: Final = "datasets-of-"
MAX_DATASETS: Final = 200
MAX_LIST_BYTES: Final = 128 * 1024
"""Of names and addresses together."""


class DatasetView(OwnModel):
    """A dataset: what an order's `dataset` says, and for people its name and how much there is of it."""

    dataset_id: CallerId
    """The name where it is an id, else one that is made of it: the same each time."""
    source_uri: str
    name: str
    """The folder's."""
    file_count: int | None = None
    """Null where the files could not be counted in time."""
    total_bytes: int | None = None
    is_whole: bool = True
    """False: there are more files than were counted, and more than a training takes."""


class DatasetQuestion(OwnModel):
    """Whose datasets."""

    tenant_id: CallerId


class DatasetList(OwnModel):
    """By name; null where the worker has no `DATASET_ROOTS`."""

    datasets: Annotated[list[DatasetView], Field(max_length=MAX_DATASETS)] | None = None
    is_whole: bool = True
    """False: there are more than are listed."""
