"""Folders for stacks of tests."""

from __future__ import annotations

from pathlib import Path

from local_stack.folder import RunFolder
from local_stack.ports import PREFERRED, any_free_port


def new_run_folder(path: Path) -> RunFolder:
    """A folder whose stack uses free ports, never the usual ones.

    Those may be another stack's, which is just being restarted: then this stack's worker would take the other's tasks.
    """
    folder, ports = RunFolder(path), dict[str, int]()
    for part in PREFERRED:
        ports[part] = any_free_port(set(ports.values()))
    folder.remember_ports(ports)
    return folder
