"""The store's contract, the same on SQLite in memory, SQLite on disk and PostgreSQL."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text

from edgestill.coordinator.rounds.round import Accepted, open_round
from edgestill.coordinator.store import migrations
from edgestill.coordinator.store.database import Store, StoreError
from edgestill.coordinator.store.records import DeviceRecord, UploadRecord
from edgestill.coordinator.store.schema import metadata
from edgestill.coordinator.task.task import Task, parse_task
from tests.support.coordinator_backends import postgresql_server, postgresql_url, store, store_url  # noqa: F401  fixtures

pytestmark = pytest.mark.unit


def make_task(name: str = "birds", **fields: object) -> Task:
    student = {"student": "cnn3", "bundle": "b" * 64, "size_bytes": 1, "engines": ["onnxruntime"],
               "memory_bytes": 1, "model_digest": "d" * 64}  # fmt: skip
    transfer = {"blob": "c" * 64, "samples": 4, "size_bytes": 1, "labelled": False}
    return parse_task({"name": name, "students": [student], "transfer": transfer, **fields})


@pytest.fixture
def filled(store: Store) -> Store:  # noqa: F811
    """A task, two devices and a round."""
    task = make_task()
    with store.write() as transaction:
        transaction.add_task(task, 1.0)
        for letter in "ab":
            transaction.add_device(f"d-{letter * 16}", "birds", letter * 64, {"engines": ["x"]}, 2.0)
        transaction.add_round("birds", open_round(1, task.rules(), 3.0))
    return store


A, B = "d-" + "a" * 16, "d-" + "b" * 16
UPLOAD = UploadRecord(A, "e" * 64, 100, "zstd", 7, (3, 4), 5.0)


def test_what_is_written_comes_back(filled: Store) -> None:
    with filled.write() as transaction:
        transaction.add_selection("birds", 1, B, 4.0)
        transaction.add_selection("birds", 1, A, 4.0)
        transaction.add_uploads("birds", 1, [UPLOAD])
        transaction.put_report("birds", 1, A, {"samples": 1}, 6.0)
        transaction.put_report("birds", 1, A, {"samples": 2}, 7.0)
        transaction.count_refusals("birds", 1, "late", 2)
        transaction.count_refusals("birds", 1, "late", 3)
    with filled.read() as transaction:
        assert [record.task for record in transaction.tasks()] == [make_task()]
        assert transaction.members("birds", 1) == (frozenset({A, B}), {A: Accepted("e" * 64, 7)})
        assert transaction.uploads("birds", 1) == [UPLOAD]
        assert [r.report for r in transaction.reports("birds")] == [{"samples": 2}]
        assert [(r.number, r.kind, r.count) for r in transaction.refusals("birds")] == [(1, "late", 5)]
        assert transaction.device(A) == transaction.device_with_token("a" * 64)
        device = transaction.device(A)
        assert isinstance(device, DeviceRecord) and device.stored_bytes == 100 and device.status == {}
        assert transaction.last_seen_s("birds") == 2.0 and transaction.last_seen_s("fish") is None


def test_a_block_that_raises_leaves_nothing(filled: Store) -> None:
    with pytest.raises(ZeroDivisionError), filled.write() as transaction:
        transaction.add_uploads("birds", 1, [UPLOAD])
        transaction.note("birds", "upload", 5.0)
        raise ZeroDivisionError
    with filled.read() as transaction:
        assert transaction.uploads("birds", 1) == []
        assert transaction.last_change() == 0


def test_a_round_is_saved_with_one_more_version(filled: Store) -> None:
    with filled.write() as transaction:
        head = transaction.round_head("birds")
        assert head is not None and head.version == 1
        ended = replace(head.round, phase="completed", published="f" * 64)
        transaction.save_round("birds", ended, 1, closed_s=9.0, published_bytes=12, metrics={"t_uni": 0.5})
        transaction.add_round("birds", open_round(2, make_task().rules(), 9.0))
    with filled.read() as transaction:
        head = transaction.round_head("birds", 1)
        assert head is not None and head.version == 2 and head.round == ended
        assert (head.closed_s, head.published_bytes, head.metrics) == (9.0, 12, {"t_uni": 0.5})
        assert transaction.round_head("birds").number == 2  # type: ignore[union-attr]
        assert transaction.last_published("birds") == ("f" * 64, 12)
        assert transaction.last_published("birds", before=1) is None
        assert transaction.was_published("birds", "f" * 64) and not transaction.was_published(
            "birds", "e" * 64
        )


def test_a_second_upload_of_a_device_is_refused_by_the_database_itself(filled: Store) -> None:
    with filled.write() as transaction:
        transaction.add_uploads("birds", 1, [UPLOAD])
    with pytest.raises(StoreError), filled.write() as transaction:
        transaction.add_uploads("birds", 1, [replace(UPLOAD, digest="0" * 64)])


def test_a_row_of_an_unknown_round_is_refused_by_the_database_itself(filled: Store) -> None:
    with pytest.raises(StoreError), filled.write() as transaction:
        transaction.add_selection("birds", 7, A, 1.0)


def test_a_code_is_used_once_and_not_after_it_expired(filled: Store) -> None:
    with filled.write() as transaction:
        transaction.add_code("1" * 64, "birds", 100.0)
        transaction.add_code("2" * 64, "birds", 100.0)
        assert transaction.use_code("2" * 64, A, 100.0) is None
        assert transaction.use_code("3" * 64, A, 50.0) is None
        assert transaction.use_code("1" * 64, A, 99.0) == ("birds", 1)
        assert transaction.use_code("1" * 64, B, 99.0) is None


def test_a_lease_is_exclusive_until_it_expires(filled: Store) -> None:
    with filled.write() as transaction:
        assert transaction.take_lease("birds", 1, "one", 10.0, 20.0)
        assert not transaction.take_lease("birds", 1, "two", 19.0, 29.0)
        assert transaction.take_lease("birds", 1, "one", 19.0, 30.0)
        assert transaction.take_lease("birds", 1, "two", 30.0, 40.0)
        assert transaction.lease("birds", 1) == ("two", 40.0)
        transaction.drop_lease("birds", 1)
        assert transaction.lease("birds", 1) is None


def test_transactions_on_a_task_run_one_after_another(filled: Store) -> None:
    def count() -> None:
        for _ in range(5):
            with filled.write() as transaction:
                transaction.lock_task("birds")
                device = transaction.device(A)
                assert device is not None
                transaction.set_device(A, stored_bytes=device.stored_bytes + 1)
                transaction.note("birds", "device", 1.0)

    threads = [threading.Thread(target=count) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with filled.read() as transaction:
        device = transaction.device(A)
        assert device is not None and device.stored_bytes == 30
        assert [change.sequence for change in transaction.changes(0, 100)] == list(range(1, 31))


def test_changes_of_several_tasks_appear_in_the_order_of_their_numbers(filled: Store) -> None:
    """A reader that goes on from the last sequence it saw misses nothing, though writers of two tasks overlap."""
    with filled.write() as transaction:
        transaction.add_task(make_task("fish"), 1.0)
    seen: list[int] = []
    stop = threading.Event()

    def write(task: str) -> None:
        for _ in range(20):
            with filled.write() as transaction:
                transaction.lock_task(task)
                transaction.note(task, "device", 1.0)
                transaction.note(task, "round", 1.0)

    def read() -> None:
        while True:
            last = stop.is_set()
            with filled.read() as transaction:
                seen.extend(change.sequence for change in transaction.changes(seen[-1] if seen else 0, 7))
            if last and len(seen) >= 80:
                return

    writers = [threading.Thread(target=write, args=(task,)) for task in ("birds", "fish")]
    reader = threading.Thread(target=read)
    for thread in (*writers, reader):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    reader.join(30)
    assert seen == list(range(1, 81))


def test_old_changes_are_dropped(filled: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgestill.coordinator.store.transaction.CHANGES_KEPT", 100)
    for _ in range(3):
        with filled.write() as transaction:
            for _ in range(600):
                transaction.note("birds", "device", 1.0)
    with filled.read() as transaction:
        assert transaction.last_change() == 1800
        numbers = [change.sequence for change in transaction.changes(0, 10_000)]
        assert numbers == list(range(501, 1801))


def test_opening_again_keeps_everything_and_matches_the_schema(store_url: str) -> None:  # noqa: F811
    if store_url == "sqlite://":
        pytest.skip("a database in memory cannot be opened again")
    first = Store(store_url)
    with first.write() as transaction:
        transaction.add_task(make_task(), 1.0)
    second = Store(store_url)
    with second.read() as transaction:
        assert [record.name for record in transaction.tasks()] == ["birds"]
    with second.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        assert connection.execute(text("select version_num from alembic_version")).scalar() == "0005"
    first.close()
    second.close()


def test_replicas_that_start_together_migrate_once(store_url: str) -> None:  # noqa: F811
    if store_url == "sqlite://":
        pytest.skip("a database in memory has one process")
    failed: list[Exception] = []

    def start() -> None:
        try:
            Store(store_url).close()
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=start) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_a_migration_can_be_undone(store: Store) -> None:  # noqa: F811
    from alembic import command

    if store.url.database in (None, ""):
        pytest.skip("a database in memory is not migrated")
    with store.engine.begin() as connection:
        command.downgrade(migrations.alembic_config(connection), "base")
        left = compare_metadata(MigrationContext.configure(connection), metadata)
        assert {change[1].name for change in left if change[0] == "add_table"} == set(metadata.tables)


def test_sqlite_is_as_durable_as_promised(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 'a.db'}")  # noqa: F811
    with store.engine.connect() as connection:
        pragmas = {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
                   for name in ("journal_mode", "synchronous", "foreign_keys")}  # fmt: skip
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}


@pytest.mark.parametrize(
    "url",
    ["nonsense", "mysql://x/y", "sqlite:////no/such/folder/a.db", "postgresql://edgestill@127.0.0.1:9/x"],
)
def test_a_database_that_cannot_be_opened_says_so(url: str) -> None:
    with pytest.raises(StoreError) as caught:
        Store(url)
    assert caught.value.hint


def test_an_error_never_shows_a_password_or_a_statement(tmp_path: Path) -> None:
    with pytest.raises(StoreError) as caught:
        Store("postgresql://edgestill:sesame@127.0.0.1:9/x")
    assert "sesame" not in f"{caught.value.message} {caught.value.hint}"
    store = Store(f"sqlite:///{tmp_path / 'a.db'}")  # noqa: F811
    with pytest.raises(StoreError) as caught, store.write() as transaction:
        transaction.add_device(A, "no-task", "secret-hash", {}, 1.0)
    assert "secret-hash" not in caught.value.message
