"""Databases of other versions: an older one is brought to the newest, a newer one is refused with the way back."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from alembic.migration import MigrationContext
from sqlalchemy import inspect, text

from edgestill.coordinator.model import body_of, find_model
from edgestill.coordinator.service import Service
from edgestill.coordinator.store import migrations
from edgestill.coordinator.store.blobs import FileBlobs
from edgestill.coordinator.store.database import Store, StoreError
from edgestill.runtime.cli import main
from tests.support.coordinator_backends import *  # noqa: F403  fixtures
from tests.support.coordinator_commands import CREATE, make_place, run_json  # noqa: F401  fixture
from tests.support.coordinator_round import Clock, add_task, enrol, run_due, submit

pytestmark = pytest.mark.unit
VERSIONS = migrations.versions()


def pretend(url: str, version: str) -> None:
    """Gives a database the version of a program that is not this one."""
    store = Store(url)
    with store.engine.begin() as connection:
        connection.execute(text("update alembic_version set version_num = :version"), {"version": version})
    store.close()


@pytest.mark.parametrize("version", VERSIONS[:-1])
def test_back_to_an_older_version_and_forth_again_keeps_a_federation(
    version: str, store_url: str, tmp_path: Path  # noqa: F811
) -> None:
    if store_url == "sqlite://":
        pytest.skip("a database in memory is not migrated")
    blobs = FileBlobs(tmp_path / "blobs")
    service = Service(Store(store_url), blobs, Clock())
    task = add_task(service, tmp_path, global_student=True, exchange="both")
    devices = [enrol(service) for _ in range(2)]
    for device in devices:
        service.ask(device, {})
        submit(service, task, device, "birds.1")
    run_due(service, tmp_path)
    before, model = service.rounds("birds")[0], body_of(service, find_model(service, "birds", None))
    service.store.close()
    older = Store(store_url, "any")
    undone = older.downgrade(version)
    assert [line.partition(":")[0] for line in undone] == VERSIONS[: VERSIONS.index(version) : -1]
    with older.engine.connect() as connection:
        assert MigrationContext.configure(connection).get_current_revision() == version
        if version < "0004":
            assert "stopped_s" not in {one["name"] for one in inspect(connection).get_columns("tasks")}
    older.close()
    service = Service(Store(store_url), blobs, Clock())
    after = service.rounds("birds")[0]
    kept = ("number", "phase", "selected", "accepted", "published", "metrics", "closed_s", "student_state")
    assert [getattr(after, name) for name in kept] == [getattr(before, name) for name in kept]
    assert body_of(service, find_model(service, "birds", None)) == model, "and it can be taken out"
    for device in devices:
        assert service.ask(device, {})["round"] == "birds.2"
        assert submit(service, task, device, "birds.2") == "created"
    service.store.close()


# What the program of version 0004 reads of a task: it refuses any other field.
OLDER = {
    "0004": "name students transfer.blob transfer.samples transfer.size_bytes transfer.labelled exchange mode "
    "global_student test.blob test.samples test.size_bytes test.labelled latent_size classes aggregation.rule "
    "aggregation.clip aggregation.trim aggregation.byzantine aggregation.align aggregation.screen local.epochs "
    "local.learning_rate local.momentum local.weight_decay local.beta1 local.beta2 local.epsilon local.alpha "
    "local.temperature local.logit_share local.neighbours local.neighbour_scale local.transfer_fraction local.augment "
    "local.checkpoint_every distil.epochs distil.learning_rate distil.momentum distil.weight_decay distil.beta1 "
    "distil.beta2 distil.epsilon distil.alpha distil.temperature distil.logit_share distil.neighbours "
    "distil.neighbour_scale distil.deadline_s parameter_shapes precision rounds goal over_selection minimum deadline_s"
}


def fields_of(value: dict, path: str = "") -> set[str]:
    found = set()
    for name, entry in value.items():
        below = fields_of(entry, f"{path}{name}.") if isinstance(entry, dict) and entry else {f"{path}{name}"}
        found |= {f"{path}{name}"} if name in ("global_student", "parameter_shapes") else below
    return found


@pytest.mark.parametrize("version", OLDER)
def test_an_older_program_can_read_the_tasks_after_a_downgrade(version: str, tmp_path: Path) -> None:
    """A new field of a task fails here, until the version that brought it takes it away (v0005_best_round.py)."""
    service = Service(Store(f"sqlite:///{tmp_path / 'c.db'}"), FileBlobs(tmp_path / "blobs"), Clock())
    task = add_task(service, tmp_path, ca_cert=None, seed=5, class_names=["a", "b", "c", "d"])
    assert set(OLDER[version].split()) < fields_of(task.as_json())
    service.store.close()
    store = Store(f"sqlite:///{tmp_path / 'c.db'}", "any")
    store.downgrade(version)
    with store.engine.connect() as connection:
        (definition,) = connection.execute(text("select definition from tasks")).scalars()
    store.close()
    assert fields_of(json.loads(definition)) == set(OLDER[version].split())


def test_a_task_that_runs_by_something_new_keeps_its_database_new(tmp_path: Path) -> None:
    service = Service(Store(f"sqlite:///{tmp_path / 'c.db'}"), FileBlobs(tmp_path / "blobs"), Clock())
    add_task(service, tmp_path, local={"clip_norm": 1.0})
    store = Store(f"sqlite:///{tmp_path / 'c.db'}", "any")
    with pytest.raises(StoreError, match="task birds runs by local.clip_norm") as caught:
        store.downgrade("0004")
    assert "`edgestill task stop birds --database" in caught.value.hint
    assert migrations.version_of(store.engine) == VERSIONS[-1] and len(service.tasks()) == 1
    service.stop_task("birds")
    service.store.close()
    store.downgrade("0004")
    store.close()


def test_a_newer_database_is_refused_and_left_as_it_is(store_url: str) -> None:  # noqa: F811
    if store_url == "sqlite://":
        pytest.skip("a database in memory is never newer")
    pretend(store_url, "9999")
    for schema in ("newest", "checked"):
        with pytest.raises(StoreError) as caught:
            Store(store_url, schema)
        assert "is of version 9999" in caught.value.message
        assert f"`edgestill downgrade --to {VERSIONS[-1]} --database" in caught.value.hint
    for wanted in VERSIONS:
        store = Store(store_url, "any")
        with pytest.raises(StoreError, match="version 9999"):
            store.downgrade(wanted)
        assert migrations.version_of(store.engine) == "9999"
        store.close()


@pytest.mark.contract
def test_the_hint_of_an_older_program_is_what_the_newer_one_does(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """This program plays both: as one that knows no version after the second, it is refused by what it made itself."""
    run_json(capsys, *CREATE)
    before = run_json(capsys, "task", "show", "birds", "--data-dir", "fed")
    with monkeypatch.context() as older:
        older.setattr(migrations, "versions", lambda: VERSIONS[:2])
        assert main(["serve", "--data-dir", "fed", "--port", "0"]) == 1
        error = capsys.readouterr().err
    assert f"is of version {VERSIONS[-1]}, this edgestill knows versions up to {VERSIONS[1]}" in error
    (hinted,) = re.findall(r"`(edgestill [^`]*)`", error)
    assert main(shlex.split(hinted)[1:]) == 0
    said = capsys.readouterr()
    assert [line.split()[1] for line in said.out.splitlines()] == [f"{one}:" for one in VERSIONS[:1:-1]]
    store = Store("sqlite:///fed/coordinator.db", "any")
    assert migrations.version_of(store.engine) == VERSIONS[1]
    store.close()
    with pytest.raises(StoreError, match="the database is of version 0002"):
        Store("sqlite:///fed/coordinator.db", "checked")
    assert main(["backup", "--data-dir", "fed", "--output", "b"]) == 1, "not by another version's program"
    assert main(["downgrade", "--data-dir", "fed", "--to", VERSIONS[3]]) == 1
    assert "older version than 0004 already" in capsys.readouterr().err
    assert run_json(capsys, "task", "show", "birds", "--data-dir", "fed") == before
