"""What can go wrong with the task store.

StoreFailure          a sentence that names the address, what was tried and what to do
├── StoreUnavailable  silence, no connection, a time limit, missing tables: try again
├── NotTheClaimant    a run writes to a task that another run claimed: never try again
├── TaskUnknown       no row of that task
└── WriteRefused      PostgreSQL refuses the values themselves: a defect, trying again cannot help
"""

from __future__ import annotations


class StoreFailure(Exception):
    """Any failure of the task store; `str()` of it is a sentence for people, without secrets."""


class StoreUnavailable(StoreFailure):
    """PostgreSQL cannot do it now; everything that the store does may be repeated."""


class NotTheClaimant(StoreFailure):
    """The task id is claimed by another run (contract §8)."""


class TaskUnknown(StoreFailure):
    """The store has no such task."""


class WriteRefused(StoreFailure):
    """PostgreSQL refuses the values."""
