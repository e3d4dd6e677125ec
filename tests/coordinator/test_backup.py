"""Backups are taken while a coordinator serves, are whole whenever they are taken, and go on where they were."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from edgestill.coordinator.service import Service
from edgestill.coordinator.store import backup
from edgestill.coordinator.store.backup import restore_backup, write_backup
from edgestill.coordinator.store.blobs import BlobError, Blobs, FileBlobs, read_blob
from edgestill.coordinator.store.database import Store
from edgestill.coordinator.store.sweep import blobs_of
from edgestill.runtime.cli import main
from edgestill.runtime.errors import EdgestillError, UsageError
from tests.support.coordinator_backends import *  # noqa: F403  fixtures
from tests.support.coordinator_commands import CREATE, make_place, run_json, serving  # noqa: F401  fixture
from tests.support.coordinator_round import Clock, add_task, enrol, make_upload, run_due, submit

pytestmark = pytest.mark.unit
DAY_S = 86_400.0


def open_service(url: str, blobs: Blobs | Path, clock: Callable[[], float] | None = None) -> Service:
    return Service(Store(url), FileBlobs(blobs) if isinstance(blobs, Path) else blobs, clock or Clock())


def check_whole(folder: Path) -> None:
    """Every blob that the database of a backup refers to is there, with its own bytes."""
    store, blobs = Store(f"sqlite:///{folder / 'coordinator.db'}"), FileBlobs(folder / "blobs")
    with store.read() as transaction:
        needed = transaction.references.all_referred()
        needed |= {digest for record in transaction.tasks() for digest in blobs_of(record.task)}
    store.close()
    assert needed and all(hashlib.sha256(read_blob(blobs, one)).hexdigest() == one for one in needed)


@pytest.mark.parametrize("there", ["sqlite", "postgresql"])
def test_a_round_that_was_open_is_finished_after_a_restore(
    there: str, store_url: str, tmp_path: Path, request: pytest.FixtureRequest  # noqa: F811
) -> None:
    """The oracle is the coordinator that went on: the outputs that both publish are the same bytes."""
    if there == "postgresql" and not store_url.startswith("postgresql"):
        restored_url = request.getfixturevalue("postgresql_url")
    else:
        restored_url = f"sqlite:///{tmp_path / 'restored.db'}"
    clock = Clock()
    first = open_service(store_url, tmp_path / "blobs", clock)
    task = add_task(first, tmp_path)
    one, two, late = (enrol(first) for _ in range(3))
    for device in (one, two, late):
        first.assignment(device)
        assert first.ask(device, {"battery": 0.5})["round"] == "birds.1"
    assert submit(first, task, one, "birds.1") == "created"
    code = first.issue_code("birds")
    contents = write_backup(first.store, first.blobs, tmp_path / "backup")
    assert (contents.tasks, contents.devices) == (1, 3) and contents.copied_blobs == contents.blobs
    clock.now_s += 5
    second = open_service(restored_url, tmp_path / "restored", clock)
    restore_backup(tmp_path / "backup", second.store, second.blobs)
    digests = []
    for service in (first, second):
        assert submit(service, task, one, "birds.1") == "same", "what was acknowledged stays"
        assert service.ask(two, {})["round"] == "birds.1", "and who is selected"
        assert submit(service, task, two, "birds.1") == "created"
        assert run_due(service, tmp_path) == 1
        (overview,) = service.rounds("birds")
        assert overview.phase == "completed" and overview.accepted == tuple(sorted((one.name, two.name)))
        digests.append(overview.published)
        assert service.ask(one, {})["round"] == "birds.2"
        assert service.enrol(code, {"name": "new", "engines": ["onnxruntime"]})["task"] == "birds"
    assert digests[0] == digests[1]
    with pytest.raises(UsageError, match="has tasks already"):
        restore_backup(tmp_path / "backup", second.store, second.blobs)
    first.store.close()
    second.store.close()


@pytest.mark.parametrize("kind", ["files", "memory"])
def test_backups_of_a_coordinator_at_work_are_whole(kind: str, tmp_path: Path) -> None:
    """Rounds come and go, and what they leave is deleted, while one backup after another is taken."""
    blobs: Blobs = FileBlobs(tmp_path / "blobs")
    if kind == "memory":
        from edgestill.coordinator.store.blobs import open_blobs

        blobs = open_blobs("memory://")
    service = open_service(f"sqlite:///{tmp_path / 'c.db'}", blobs)
    task = add_task(service, tmp_path, rounds=500)
    devices = [enrol(service) for _ in range(2)]
    over, failed = threading.Event(), []

    def work() -> None:
        try:
            for number in range(1, 500):
                for device in devices:
                    service.ask(device, {})
                    submit(service, task, device, f"birds.{number}")
                run_due(service, tmp_path)
                service.tick()  # also sweeps
                if over.is_set() and number > 3:
                    return
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        numbers = []
        for index in range(4):
            folder = tmp_path / f"backup-{index % 2}"  # each a second time, too
            write_backup(service.store, blobs, folder)
            assert {path.name for path in folder.iterdir()} == {"coordinator.db", "blobs", "edgestill-backup"}
            check_whole(folder)
            with closing(sqlite3.connect(folder / "coordinator.db")) as database:
                numbers.append(database.execute("select count(*) from rounds").fetchone()[0])
            kept = {path.name for path in (folder / "blobs").glob("??/*")}
        assert numbers == sorted(numbers)
    finally:
        over.set()
        thread.join()
    assert failed == []
    write_backup(service.store, blobs, folder)
    assert {path.name for path in (folder / "blobs").glob("??/*")} != kept, "what nobody needs any more has left"
    service.store.close()


def test_a_blob_that_goes_while_it_is_copied_makes_the_backup_begin_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = open_service(f"sqlite:///{tmp_path / 'c.db'}", tmp_path / "blobs")
    task = add_task(service, tmp_path)
    devices = [enrol(service) for _ in range(2)]
    for device in devices:
        service.ask(device, {})
    submit(service, task, devices[0], "birds.1")
    upload = make_upload(task, "birds.1", devices[0].name).digest
    open_range, opened = service.blobs.open_range, []

    def finish_the_round_first(digest: str, *span: int):
        opened.append(digest)
        if opened.count(upload) == 1 and digest == upload:
            submit(service, task, devices[1], "birds.1")
            run_due(service, tmp_path)
            while service.blobs.size(upload) is not None:
                service.tick()
        return open_range(digest, *span)

    monkeypatch.setattr(service.blobs, "open_range", finish_the_round_first)
    write_backup(service.store, service.blobs, tmp_path / "backup")
    check_whole(tmp_path / "backup")
    assert upload in opened and FileBlobs(tmp_path / "backup/blobs").size(upload) is None
    with closing(sqlite3.connect(tmp_path / "backup/coordinator.db")) as database:
        assert database.execute("select phase from rounds where number = 1").fetchone() == ("completed",)
    service.store.close()


def test_a_damaged_or_missing_blob_is_named_and_the_last_backup_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = open_service(f"sqlite:///{tmp_path / 'c.db'}", tmp_path / "blobs")
    task = add_task(service, tmp_path)
    write_backup(service.store, service.blobs, tmp_path / "backup")
    add_task(service, tmp_path, name="crows", transfer={
        **task.transfer.__dict__, "blob": service.blobs.put(b"x" * 50), "size_bytes": 50,
    })  # fmt: skip
    digest = hashlib.sha256(b"x" * 50).hexdigest()
    (path,) = (tmp_path / "blobs").glob(f"??/{digest}")
    path.write_bytes(b"y" * 50)
    with pytest.raises(BlobError, match=f"{digest} is damaged"):
        write_backup(service.store, service.blobs, tmp_path / "backup")
    path.unlink()
    copies: list[Path] = []
    copy_database = backup._copy_database
    monkeypatch.setattr(backup, "_copy_database", lambda *given: copies.append(given[1]) or copy_database(*given))
    with pytest.raises(BlobError, match=f"{digest} is missing"):
        write_backup(service.store, service.blobs, tmp_path / "backup")
    assert len(copies) == 2, "a newer copy of the database names it too"
    check_whole(tmp_path / "backup")
    other = open_service(f"sqlite:///{tmp_path / 'other.db'}", tmp_path / "other")
    restore_backup(tmp_path / "backup", other.store, other.blobs)
    assert [record.name for record in other.tasks()] == ["birds"]
    service.store.close()
    other.store.close()


def contents_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_neither_takes_a_coordinator_for_a_backup_nor_the_reverse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    services = {}
    for name in ("federation", "other"):
        (tmp_path / name).mkdir()
        services[name] = open_service(f"sqlite:///{tmp_path / name}/coordinator.db", tmp_path / name / "blobs")
        add_task(services[name], tmp_path)
        enrol(services[name])

    def refused(words: str, message: str) -> None:
        before = {name: contents_of(tmp_path / name) for name in services}
        assert main(words.split()) == 2
        said = capsys.readouterr().err
        assert message in said and "hint: " in said
        assert before == {name: contents_of(tmp_path / name) for name in services}

    refused("backup --data-dir federation --output federation", "the coordinator keeps the database")
    refused("backup --data-dir federation --output federation/blobs", "the coordinator keeps the blobs")
    refused("backup --data-dir federation --output other", "is not empty, and no backup")
    refused("restore other --data-dir third", "no backup: edgestill-backup is not there")
    assert main("backup --data-dir federation --output kept".split()) == 0
    for words in ("serve --port 0 --data-dir", "task list --data-dir", "backup --output x --data-dir"):
        refused(f"{words} kept", "kept is a backup")
    refused("restore kept --database sqlite:///kept/coordinator.db --blobs b", "kept is a backup")
    # who serves one all the same, with a program that does not know the mark, does not lose it
    (tmp_path / "kept/coordinator.db").rename(tmp_path / "kept/c.db")
    served = open_service(f"sqlite:///{tmp_path / 'kept/c.db'}", tmp_path / "kept/blobs")
    with pytest.raises(UsageError, match="the coordinator keeps the database"):
        write_backup(served.store, served.blobs, tmp_path / "kept")
    for service in (served, *services.values()):
        service.store.close()


def test_two_backups_at_once_do_not_spoil_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = open_service(f"sqlite:///{tmp_path / 'c.db'}", tmp_path / "blobs")
    add_task(service, tmp_path)
    folder, copy_blob = tmp_path / "backup", backup._copy_blob
    (folder / ".incoming-killed").mkdir(parents=True)
    (folder / ".incoming-killed/coordinator.db").write_bytes(b"half")
    (folder / "edgestill-backup").touch()
    other = open_service(f"sqlite:///{tmp_path / 'other.db'}", tmp_path / "other")
    refused = []

    def meanwhile(*given: object) -> bool:
        for work in (write_backup, lambda *of: restore_backup(of[2], *of[:2])):
            (folder / "coordinator.db").touch()
            with pytest.raises(EdgestillError, match="is at work there") as caught:
                work(other.store, other.blobs, folder)
            refused.append(caught.value.hint)
        return copy_blob(*given)

    monkeypatch.setattr(backup, "_copy_blob", meanwhile)
    write_backup(service.store, service.blobs, folder)
    assert refused and all("again when that one has ended" in hint for hint in refused)
    assert {path.name for path in folder.iterdir()} == {"coordinator.db", "blobs", "edgestill-backup"}
    check_whole(folder)
    monkeypatch.undo()
    restore_backup(folder, other.store, other.blobs)
    for one in (service, other):
        one.store.close()


@pytest.mark.contract
def test_the_commands_while_a_coordinator_serves(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_json(capsys, *CREATE)
    with serving():
        first = run_json(capsys, "backup", "--data-dir", "fed", "--output", "copies/today")
        assert (first["tasks"], first["blobs"]) == (1, 2) and first["copied_blobs"] == 2
        assert main(["backup", "--data-dir", "fed", "--output", "copies/today"]) == 0
        said = capsys.readouterr()
    assert "2 blobs (0 copied)" in said.out
    assert "`edgestill restore copies/today --data-dir NEW_DIR`" in said.err
    assert (place / "copies/today").stat().st_mode & 0o077 == 0, "it holds what tokens are checked by"
    assert main(["restore", "copies/today", "--data-dir", "again"]) == 0
    assert "`edgestill serve --data-dir again`" in capsys.readouterr().err
    before, after = (run_json(capsys, "task", "show", "birds", "--data-dir", one) for one in ("fed", "again"))
    assert before == after
    for wrong in (["restore", "copies", "--data-dir", "third"], ["restore", "copies/today", "--data-dir", "again"],
                  ["backup", "--data-dir", "nowhere", "--output", "x"]):  # fmt: skip
        assert main(wrong) == 2, capsys.readouterr()
    assert json.dumps(before)  # plain values
