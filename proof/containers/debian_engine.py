"""A container engine made of Debian's packages, in a folder of its own.

It needs root on Debian, and Debian's packages. No service manager, no registry: packages are unpacked, dockerd is
started by hand and ended by its pid file. Addresses of mirrors are those that apt is set up with.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from proof.containers.engine import CannotRun, Engine
from proof.containers.name_server import answering_no

UNPACKED: Final = ("docker.io", "containerd", "tini")
INSTALLED: Final = {"runc": "runc", "debootstrap": "debootstrap", "iptables": "iptables"}
"""Package → the program that it brings."""
COMPOSE_SUITE: Final = "trixie"
"""Debian 12's compose is of the first generation: it refuses a file with a name."""
KEYRING: Final = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
HOST: Final = "10.77.0.1"
"""This machine, as containers see it."""
FORWARDING: Final = Path("/proc/sys/net/ipv4/ip_forward")
MOST_FILES: Final = 65_536
APT_SECONDS: Final = 300.0
START_SECONDS: Final = 60.0
END_SECONDS: Final = 30.0


@contextmanager
def debian_engine(folder: Path) -> Iterator[Engine]:
    """An engine that runs while the body runs. `folder` may be used again: then packages are not fetched again.

    Raises CannotRun.
    """
    missing = [name for name in ("apt-get", "dpkg-deb", "ip") if shutil.which(name) is None]
    if os.geteuid() != 0 or missing:
        why = f"{' and '.join(missing)} are missing" if missing else "this is not root"
        raise CannotRun(f"No container engine answers, and none can be made: {why}; it takes root on Debian.")
    forwarded = FORWARDING.read_text()
    try:
        programs = _unpacked(folder)
        with _daemon(folder, programs) as engine, ExitStack() as beside:
            beside.enter_context(answering_no(HOST))
            yield engine
    except (OSError, subprocess.SubprocessError) as error:
        raise CannotRun(f"No container engine answers, and none could be made: {_sentence(error)}") from error
    finally:
        if FORWARDING.read_text() != forwarded:
            FORWARDING.write_text(forwarded)


def open_files() -> int:
    """The most files that a process of this machine may have open: an engine without more rights cannot raise it."""
    return min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], MOST_FILES)


def mirror() -> str:
    """The Debian mirror that apt is set up with. Raises CannotRun."""
    listed = _ran("apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Origin: Debian")
    found = [line for line in listed.splitlines() if line and "security" not in line]
    if not found:
        raise CannotRun("No container engine answers, and none can be made: apt knows no Debian mirror.")
    return found[0]


def _unpacked(folder: Path) -> Path:
    """The folder `usr` with the engine's programs."""
    programs = folder / "programs"
    if (programs / "usr/libexec/docker/cli-plugins/docker-compose").exists():
        return programs / "usr"
    packages = folder / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    _ran("apt-get", "update", "-qq")
    wanted = [package for package, program in INSTALLED.items() if shutil.which(program) is None]
    if wanted:
        _ran("apt-get", "install", "-y", "-qq", "--no-install-recommends", *wanted)
    _ran("apt-get", "download", "-qq", *UNPACKED, cwd=packages)
    _fetch_compose(folder / "apt", packages)
    for package in packages.glob("*.deb"):
        _ran("dpkg-deb", "-x", str(package), str(programs))
    return programs / "usr"


def _fetch_compose(apt: Path, packages: Path) -> None:
    """With lists of its own: apt's own know one suite."""
    for needed in ("lists/partial", "cache/archives/partial"):
        (apt / needed).mkdir(parents=True, exist_ok=True)
    sources = apt / "sources.list"
    sources.write_text(f"deb [signed-by={KEYRING}] {mirror()} {COMPOSE_SUITE} main\n")
    options = {
        "Dir::Etc::SourceList": sources,
        "Dir::Etc::SourceParts": os.devnull,
        "Dir::State::Lists": apt / "lists",
        "Dir::Cache": apt / "cache",
    }
    words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    _ran("apt-get", *words, "update", "-qq")
    _ran("apt-get", *words, "download", "-qq", "docker-compose", cwd=packages)


@contextmanager
def _daemon(folder: Path, programs: Path) -> Iterator[Engine]:
    _end_daemon(folder)
    plugins = folder / "config" / "cli-plugins"
    plugins.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        (plugins / "docker-compose").symlink_to(programs / "libexec/docker/cli-plugins/docker-compose")
    path = os.pathsep.join([str(programs / "bin"), str(programs / "sbin"), os.environ.get("PATH", os.defpath)])
    environment = {
        "PATH": path,
        "DOCKER_HOST": f"unix://{folder / 'docker.sock'}",
        "DOCKER_CONFIG": str(folder / "config"),
        # The old builder is in the package, the new one is not.
        "DOCKER_BUILDKIT": "0",
    }
    engine = Engine("", str(programs / "bin" / "docker"), environment, stand_ins=True, name_server=HOST)
    log = folder / "dockerd.log"
    with log.open("ab") as output:
        process = subprocess.Popen(  # noqa: S603
            _command(folder, programs),
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # Ctrl-C is for us: the containers are taken down first.
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while (version := _version(engine)) is None:
            if process.poll() is not None or time.monotonic() > deadline:
                last = log.read_text(errors="replace").strip().splitlines()[-1:]
                raise CannotRun(f"No container engine answers, and dockerd did not start: {' '.join(last)[-400:]}")
            time.sleep(0.2)
        _forget_earlier_runs(engine)
        yield Engine(f"Debian's dockerd {version}", engine.docker, environment, stand_ins=True, name_server=HOST)
    finally:
        _end_daemon(folder)
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)


def _forget_earlier_runs(engine: Engine) -> None:
    """A run that was killed left its containers, which this daemon has started again. The engine is ours alone."""
    if left := engine.run("ps", "--all", "--quiet").stdout.split():
        engine.run("rm", "--force", "--volumes", *left)
    for kind in ("network", "volume"):
        engine.run(kind, "prune", "--force")


def _command(folder: Path, programs: Path) -> list[str]:
    """The machine's own network stays as it is: containers reach each other and this machine, and nothing else."""
    given = {
        "data-root": folder / "data",
        "exec-root": folder / "exec",
        "host": f"unix://{folder / 'docker.sock'}",
        "pidfile": folder / "dockerd.pid",
        "iptables": "false",
        "ip-forward": "false",
        "ip-masq": "false",
        "bip": f"{HOST}/24",
        "storage-driver": "overlay2",
        "default-ulimit": f"nofile={open_files()}:{open_files()}",
        "init-path": programs / "bin" / "tini-static",
        "userland-proxy-path": programs / "sbin" / "docker-proxy",
    }
    return [str(programs / "sbin" / "dockerd"), *(f"--{name}={value}" for name, value in given.items())]


def _version(engine: Engine) -> str | None:
    done = engine.run("version", "--format", "{{.Server.Version}}", within_seconds=20, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _end_daemon(folder: Path) -> None:
    """End the dockerd of this folder, also one that an earlier run left, and take its network away."""
    pidfile = folder / "dockerd.pid"
    with suppress(OSError, ValueError):
        pid = int(pidfile.read_text())
        if b"dockerd" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGTERM)
            deadline = time.monotonic() + END_SECONDS
            while _runs(pid) and time.monotonic() < deadline:
                time.sleep(0.1)
            _ran("ip", "link", "delete", "docker0")
    # It leaves this file mounted, and the folder could not be deleted.
    namespace = folder / "exec" / "netns" / "default"
    if os.path.ismount(namespace):
        _ran("umount", str(namespace))
    with suppress(OSError):
        pidfile.unlink()


def _runs(pid: int) -> bool:
    """Whether the process has not ended; its parent, us, may not have asked for its exit code yet."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def _ran(*command: str, cwd: Path | None = None) -> str:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(  # noqa: S603
        command, env=environment, cwd=cwd, capture_output=True, text=True, check=True, timeout=APT_SECONDS
    )
    return done.stdout


def _sentence(error: OSError | subprocess.SubprocessError) -> str:
    said = str(getattr(error, "stderr", "") or "").strip().splitlines()[-1:]
    return f"{error}{': ' if said else ''}{''.join(said)}"
