"""Folders for stacks of tests."""

from __future__ import annotations

from pathlib import Path

from local_stack.folder import RunFolder
from local_stack.ports import free_ports


def new_run_folder(path: Path) -> RunFolder:
    """A folder whose stack uses free ports, never the usual ones.

    Those may be another stack's, which is just being restarted: then this stack's worker would take the other's tasks.
    """
    folder = RunFolder(path)
    folder.remember_ports(free_ports())
    return folder
