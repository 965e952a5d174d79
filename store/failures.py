"""Failures of the task store.

StoreFailure          a sentence that names the address, what was tried and what to do
├── StoreUnavailable  no answer, no connection, a time limit, missing tables: try again
├── NotTheClaimant    a run writes to a task that another run claimed: never try again
├── NotToBeSettled   the task is open, or its settlement is known: nothing to close by hand
├── TaskUnknown       the task has no row
├── TablesTooOld      the tables are of an older version: migrate them
├── WriteRefused      PostgreSQL rejects the values themselves: a defect, a retry cannot help
└── FilesUnavailable  files of tasks cannot be deleted from object storage: try again
"""

from __future__ import annotations


class StoreFailure(Exception):
    """Any failure of the task store. `str()` of it is a sentence to display, without secrets."""


class StoreUnavailable(StoreFailure):
    """PostgreSQL cannot be used now. All work of the store may be repeated."""


class NotTheClaimant(StoreFailure):
    """The task id is claimed by another run (contract §8)."""


class TaskUnknown(StoreFailure):
    """The store does not have the task."""


class NotToBeSettled(StoreFailure):
    """A settlement that is not unknown is not closed by hand."""


class TablesTooOld(StoreFailure):
    """The database has no tables, or those of an older version."""


class WriteRefused(StoreFailure):
    """PostgreSQL rejects the values."""


class StartRefused(Exception):
    """A claim is beyond one of its tenant's limits. No failure: `str()` of it is a sentence for the caller."""


class FilesUnavailable(StoreFailure):
    """Object storage cannot be used now."""
