"""What a child does between fork and exec: it ties its life to the supervisor's and, for PostgreSQL, drops root.

On Linux the kernel ends a child whose supervisor was killed; elsewhere the next start does, by `folder.py`'s record.
PostgreSQL refuses to run as root, so there it runs as `nobody`. One capability lets that user pass through the folder;
otherwise the folder and all folders above it would have to be opened to everyone.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

UNPRIVILEGED_USER: Final = "nobody"

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_KEEPCAPS: Final = 8
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_RAISE: Final = 2
_CAP_DAC_OVERRIDE: Final = 1
_CAPABILITY_VERSION_3: Final = 0x20080522
_IS_LINUX: Final = sys.platform == "linux"
_libc: Final = ctypes.CDLL(None, use_errno=True)


def runs_as_root() -> bool:
    return os.geteuid() == 0


def give_to_unprivileged_user(folder: Path) -> None:
    """Give a folder to the unprivileged user: PostgreSQL must own its data."""
    user = pwd.getpwnam(UNPRIVILEGED_USER)
    os.chown(folder, user.pw_uid, user.pw_gid)


def before_exec(*, orphan_signal: signal.Signals, unprivileged: bool) -> Callable[[], None]:
    """For `preexec_fn`: the child gets `orphan_signal` when this process dies; `unprivileged`: never as root."""
    parent = os.getpid()
    user = pwd.getpwnam(UNPRIVILEGED_USER) if unprivileged and runs_as_root() else None

    def prepare() -> None:
        if user is not None:
            _become(user.pw_uid, user.pw_gid)
        if _IS_LINUX:
            # A change of user clears it, so this comes second.
            _check(_libc.prctl(_PR_SET_PDEATHSIG, int(orphan_signal), 0, 0, 0), "PR_SET_PDEATHSIG")
            if os.getppid() != parent:
                os._exit(1)

    return prepare


def _become(user: int, group: int) -> None:
    if _IS_LINUX:
        _check(_libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0), "PR_SET_KEEPCAPS")
    os.setgroups([])
    os.setgid(group)
    os.setuid(user)
    if _IS_LINUX:
        capability = 1 << _CAP_DAC_OVERRIDE
        header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
        _check(_libc.capset(header, struct.pack("6I", capability, capability, capability, 0, 0, 0)), "capset")
        _check(_libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, _CAP_DAC_OVERRIDE, 0, 0), "PR_CAP_AMBIENT_RAISE")


def _check(result: int, call: str) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{call}: {os.strerror(error)}")
