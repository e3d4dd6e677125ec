"""The places that the coordinator's contract tests run on: SQLite in memory and on disk, PostgreSQL; files, S3."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgestill.coordinator.store.blobs import Blobs, FileBlobs, ObjectBlobs
from edgestill.coordinator.store.database import Store

STORES = ("memory", "sqlite", "postgresql")
BLOBS = ("files", "memory", "s3")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[str]:
    """A server of its own in a temporary folder; the URL of its administrator's database.

    PostgreSQL refuses to run as root: it then runs as `postgres`, or as `nobody` where there is no such user.
    """
    for program in ("initdb", "postgres", "pg_ctl"):
        if _program(program) is None:
            pytest.skip(f"PostgreSQL's {program} is not installed (Debian: apt-get install postgresql)")
    folder = Path(tempfile.mkdtemp(prefix="edgestill-pg-"))
    user = _unprivileged_user()
    if user is not None:
        folder.chmod(0o755)
        os.chown(folder, pwd.getpwnam(user).pw_uid, pwd.getpwnam(user).pw_gid)
    port = free_port()
    data = folder / "data"
    try:
        _run(user, "initdb", "--pgdata", str(data), "--username=edgestill", "--auth=trust", "--no-sync",
             "--encoding=UTF8", "--no-locale")  # fmt: skip
        options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories= -c fsync=off"
        _run(user, "pg_ctl", "--pgdata", str(data), "--wait", "--timeout=60", "--options", options,
             "--log", str(folder / "log"), "start")  # fmt: skip
        yield f"postgresql://edgestill@127.0.0.1:{port}/postgres"
    finally:
        if (data / "postmaster.pid").exists():
            _run(user, "pg_ctl", "--pgdata", str(data), "--mode=immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgresql_url(postgresql_server: str) -> Iterator[str]:
    """A new, empty database."""
    import psycopg

    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(postgresql_server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    yield postgresql_server.removesuffix("postgres") + name
    with psycopg.connect(postgresql_server, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(params=STORES)
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Every kind of database, empty."""
    if request.param == "postgresql":
        return str(request.getfixturevalue("postgresql_url"))
    return "sqlite://" if request.param == "memory" else f"sqlite:///{tmp_path / 'coordinator.db'}"


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    opened = Store(store_url)
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """An S3 server on localhost with the bucket `edgestill`; its address."""
    moto_server = pytest.importorskip("moto.server", reason="the S3 server of the tests is moto[server]")
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    settings = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        import httpx2

        httpx2.put(f"{address}/edgestill").raise_for_status()
        yield address
        server.stop()


@pytest.fixture(params=BLOBS)
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    """Every kind of place for blobs, empty."""
    if request.param == "files":
        return FileBlobs(tmp_path / "blobs")
    if request.param == "memory":
        return ObjectBlobs("memory://")
    request.getfixturevalue("s3_server")
    return ObjectBlobs(f"s3://edgestill/{uuid.uuid4().hex}")


def _unprivileged_user() -> str | None:
    """Whom to run PostgreSQL as; None where this is no root already."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


def _program(name: str) -> str | None:
    """A server program; Debian keeps them off the PATH."""
    if (found := shutil.which(name)) is not None:
        return found
    return next((str(path) for path in sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))), None)


def _run(user: str | None, program: str, *arguments: str) -> None:
    command = [str(_program(program)), *arguments]
    # pg_ctl's server keeps what it inherits open: a pipe would never end
    with tempfile.TemporaryFile() as output:
        done = subprocess.run(
            command, stdout=output, stderr=output, user=user, cwd="/", timeout=120, check=False
        )
        if done.returncode != 0:
            output.seek(0)
            raise RuntimeError(f"{program}: {output.read().decode(errors='replace')}")
