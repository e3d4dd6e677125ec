"""Taking the model out: `edgestill task export` and `GET /v1/tasks/…`, in PyTorch and in a bundle."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from starlette.testclient import TestClient
from torch import nn

from edgestill.coordinator.distillation.global_student import evaluate_global
from edgestill.coordinator.http.app import make_app
from edgestill.coordinator.http.routes import models
from edgestill.coordinator.service import Service
from edgestill.coordinator.settings import Settings
from edgestill.coordinator.store.blobs import FileBlobs, read_blob
from edgestill.coordinator.store.database import Store
from edgestill.coordinator.task.task import Task
from edgestill.runtime.bundle import wire
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.bundle.manifest import InputSpec
from edgestill.runtime.cli import main
from edgestill.runtime.device import outputs
from edgestill.runtime.device.local_training import Transfer
from edgestill.runtime.engines.registry import open_engine
from tests.coordinator.test_best_round import play, stored
from tests.support.coordinator_round import Clock, add_task, describe_task, enrol, run_due, submit
from tests.support.coordinator_site import problem_of
from tests.support.handmade_bundle import CHANNELS, CLASSES, LATENT, MEAN, SIZE, STD

pytestmark = pytest.mark.unit
NAMES = ["apple", "banana", "cherry", "Dattel ü"]


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Service:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "federation"
    folder.mkdir()
    return Service(Store(f"sqlite:///{folder / 'coordinator.db'}"), FileBlobs(folder / "blobs"), Clock())


def add(service: Service, folder: Path, **fields: object) -> Task:
    fields = {"goal": 1, "over_selection": 1.0, "class_names": NAMES, **fields}
    return service.create_task(describe_task(folder / "task", service.blobs, **fields))


def export(*more: str) -> int:
    return main(["task", "export", "birds", "--data-dir", "federation", "--output", "m.safetensors", *more])


def site(service: Service, client: tuple[str, int] = ("127.0.0.1", 50000), **settings: Any) -> TestClient:
    app = make_app(service, Settings(allowed_hosts="testserver", **settings), loop=False)
    return TestClient(app, raise_server_exceptions=False, client=client)


class Linear(nn.Module):
    """What the handmade bundle holds, as a person would have written it."""

    def __init__(self) -> None:
        super().__init__()
        self.representation = nn.Linear(CHANNELS * SIZE * SIZE, LATENT)
        self.output = nn.Linear(LATENT, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (MEAN, STD))
        return self.output(self.representation(((images / 255 - mean) / std).flatten(1)))


def test_the_best_and_the_last_model_with_their_bundle(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    validation = stored(tmp_path, service.blobs, 7)
    task = add(service, tmp_path, global_student=True, validation=validation, rounds=3)
    play(service, task, tmp_path, 3)
    rounds = service.rounds("birds")
    best = next(one.number for one in rounds if one.best)
    for wanted, number in (("best", best), ("last", 3), (None, best), ("3", 3)):
        more = [] if wanted is None else ["--round", wanted]
        assert export("--overwrite", "--bundle", "out", "--json", *more) == 0
        said = json.loads(capsys.readouterr().out)
        assert (said["round"], said["best"], said["bundle"]) == (number, number == best, "out")
        # in the bundle it is as good as the coordinator found it
        with Bundle.open("out") as bundle:
            state = bundle.check_state(wire.load("m.safetensors").arrays)
            engine = open_engine(bundle, threads=1)
            found = evaluate_global(bundle, engine, state, Transfer.load(service.blobs.path(validation["blob"])))
            engine.close()
        assert found.accuracy == rounds[number - 1].metrics["validation_accuracy"]
        # and read by the official package
        with safetensors.safe_open("m.safetensors", "numpy") as file:
            about = file.metadata()
        assert (about["task"], about["round"], json.loads(about["class_names"])) == ("birds", str(number), NAMES)


def test_it_loads_into_pytorch_and_predicts(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = add(service, tmp_path, global_student=True)
    play(service, task, tmp_path, 1)
    assert export("--bundle", "out.zip") == 0
    assert "edgestill predict out.zip --state m.safetensors --resize IMAGE" in capsys.readouterr().err
    with monkeypatch.context() as patched:  # as of a bundle for sensors
        patched.setattr(InputSpec, "is_image", False)
        assert export("--bundle", "out.zip", "--overwrite") == 0
    assert "edgestill predict out.zip --state m.safetensors --data PATH" in capsys.readouterr().err
    state = safetensors.torch.load_file("m.safetensors")
    student = Linear()
    student.load_state_dict({k: v for k, v in state.items() if not k.startswith(("optimizer.", "crd."))})
    images = np.random.default_rng(0).integers(0, 256, (11, CHANNELS, SIZE, SIZE), dtype=np.uint8)
    np.savez("x.npz", x=images)
    assert main("predict out.zip --state m.safetensors --data x.npz --threads 1 --json".split()) == 0
    *said, _ = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    wanted = torch.softmax(student(torch.from_numpy(images)), 1).detach().numpy()
    np.testing.assert_allclose([one["probabilities"] for one in said], wanted, rtol=1e-3, atol=1e-6)
    assert [one["class"] for one in said] == [NAMES[n] for n in wanted.argmax(axis=1)]


def test_every_round_of_exchanged_parameters(service: Service, tmp_path: Path) -> None:
    task = add(service, tmp_path, exchange="parameters")
    play(service, task, tmp_path, 2)
    for number, one in enumerate(service.rounds("birds"), 1):
        assert export("--round", str(number), "--overwrite") == 0
        published, _ = outputs.unpack(read_blob(service.blobs, one.published), "identity", task.expected_upload())
        state = safetensors.numpy.load_file("m.safetensors")
        for name, array in published.items():
            np.testing.assert_array_equal(state[name], array)
        slots = [array for name, array in state.items() if name.startswith("optimizer.")]
        assert slots and not any(array.any() for array in slots)


def test_over_http_as_the_command_writes_it(service: Service, tmp_path: Path) -> None:
    task = add(service, tmp_path, global_student=True, rounds=3)
    play(service, task, tmp_path, 2)
    assert export("--bundle", "out.zip") == 0
    client = site(service, dashboard_token="secret")
    headers = {"Authorization": "Bearer secret"}
    for round in ("last", "2"):
        answer = client.get("/v1/tasks/birds/model", params={"round": round}, headers=headers)
        assert answer.status_code == 200 and answer.content == Path("m.safetensors").read_bytes()
        assert 'filename="birds-round-2.safetensors"' in answer.headers["content-disposition"]
    bundle = client.get("/v1/tasks/birds/bundle", headers=headers)
    assert bundle.content == Path("out.zip").read_bytes()
    assert len(bundle.content) == int(bundle.headers["content-length"])
    # a device's token opens nothing here, nor does none
    enrolled = service.enrol(service.issue_code("birds"), {"name": "pi", "engines": [], "memory_bytes": 1})
    for given in ({}, {"Authorization": f"Bearer {enrolled['token']}"}, {"Authorization": "Bearer wrong"}):
        for path in ("model", "bundle"):
            assert problem_of(client.get(f"/v1/tasks/birds/{path}", headers=given)) == "unauthorised"
    for path, kind in (
        ("nobody/model", "no_such_task"), ("nobody/bundle", "no_such_task"), ("birds/model?round=best", "no_model"),
        ("birds/model?round=3", "no_model"), ("birds/model?round=0", "invalid"), ("birds/model?round=", "invalid"),
        ("BIRDS/model", "invalid"), ("birds/model?round=1e9", "invalid"),
    ):  # fmt: skip
        assert problem_of(client.get(f"/v1/tasks/{path}", headers=headers)) == kind, path


def test_without_a_token_models_stay_on_the_machine(service: Service, tmp_path: Path) -> None:
    """A proxy says who asks; the address that devices are told says whether there may be one."""
    play(service, add(service, tmp_path, global_student=True, rounds=3), tmp_path, 1)
    here, there = ("127.0.0.1", 50000), ("192.0.2.9", 50000)
    for settings, client, allowed in (
        ({}, here, True), ({}, there, False), ({"host": "0.0.0.0"}, here, False), ({"host": "0.0.0.0"}, there, False),
        ({"public_url": "https://edge.example"}, here, False), ({"public_url": "http://localhost:80"}, here, True),
        ({"host": "0.0.0.0", "dashboard_token": "secret"}, there, True),
    ):  # fmt: skip
        asking = site(service, client, **settings)
        headers = {"Authorization": "Bearer secret"}
        for path in ("model", "bundle"):
            answer = asking.get(f"/v1/tasks/birds/{path}", headers=headers)
            if allowed:
                assert answer.status_code == 200, settings
            else:
                assert problem_of(answer) == "token_not_set" and "task export TASK" in answer.json()["hint"]
        links, command = "/v1/tasks/birds/model", "edgestill task export birds --output birds.safetensors"
        page = asking.get("/tasks/birds?token=secret").text
        kept_private = settings.get("host") == "0.0.0.0" or "example" in settings.get("public_url", "")
        assert (links in page) == ("dashboard_token" in settings or not kept_private), settings
        assert (command in page) != (links in page)


def test_who_has_a_model_already_does_not_get_it_again(service: Service, tmp_path: Path) -> None:
    task = add(service, tmp_path, global_student=True, rounds=3)
    play(service, task, tmp_path, 2)
    client = site(service)
    for path in ("model", "bundle"):
        first = client.get(f"/v1/tasks/birds/{path}")
        known = {"If-None-Match": f'"other", W/{first.headers["etag"]}'}
        again = client.get(f"/v1/tasks/birds/{path}", headers=known)
        assert (first.status_code, again.status_code, again.content) == (200, 304, b"")
        assert again.headers["etag"] == first.headers["etag"]
    other = client.get("/v1/tasks/birds/model?round=2", headers={"If-None-Match": '"x"'})
    assert other.status_code == 200
    device = enrol(service, "birds")
    service.ask(device, {})
    submit(service, task, device, "birds.3")
    run_due(service, tmp_path)
    known = {"If-None-Match": other.headers["etag"]}
    newer = client.get("/v1/tasks/birds/model", headers=known)
    assert newer.status_code == 200 and newer.content != other.content


def test_models_are_made_one_at_a_time_and_few_are_in_memory(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(service, add(service, tmp_path, global_student=True), tmp_path, 1)
    made, at_once, begun, go_on = models.body_of, [], threading.Semaphore(0), threading.Event()

    def make(*given: object) -> bytes:
        at_once.append(1)
        begun.release()
        assert go_on.wait(60) and len(at_once) == 1
        at_once.pop()
        return made(*given)

    monkeypatch.setattr(models, "body_of", make)
    client = site(service, threads=1)
    with client, ThreadPoolExecutor(5) as threads:
        asked = [threads.submit(client.get, "/v1/tasks/birds/model") for _ in range(4)]
        assert begun.acquire(timeout=60)
        places = client.app.state.context
        while places.model_places:
            time.sleep(0.01)
        fifth = client.get("/v1/tasks/birds/model")
        assert problem_of(fifth) == "unavailable" and int(fifth.headers["retry-after"]) >= 1
        assert client.get("/v1/tasks/birds/bundle").status_code == 200, "others go on, even with one thread"
        go_on.set()
        bodies = {one.result(60).content for one in asked}
        assert len(bodies) == 1 and client.get("/v1/tasks/birds/model").content in bodies
        assert places.model_places == 4


def test_models_that_are_not_there(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(message: str, *more: str) -> None:
        assert export(*more) == 2 and not Path("m.safetensors").exists()
        said = capsys.readouterr().err
        assert message in said and "hint: " in said

    task = add(service, tmp_path, global_student=True, rounds=3)
    refused("has not completed a round yet")
    play(service, task, tmp_path, 3)
    refused("has completed no round 4, but 1, 2, 3", "--round", "4")
    refused("no validation images", "--round", "best")
    refused("give best, last or a round's number", "--round", "newest")
    # what the sweep deletes of rounds that are neither the last nor the best
    service.blobs.delete(service.rounds("birds")[0].student_state)
    refused("of round birds.1 the model is no longer there", "--round", "1")
    assert main("task export fish --data-dir federation --output m.safetensors".split()) == 2
    said = capsys.readouterr().err
    assert "no task fish" in said and "`edgestill task list --data-dir federation`" in said
    Path("there").write_text("kept")
    assert main("task export birds --data-dir federation --output there".split()) == 2
    assert "add --overwrite" in capsys.readouterr().err
    Path("folder").mkdir()
    assert main("task export birds --data-dir federation --output folder".split()) == 2
    said = capsys.readouterr().err
    assert "--output folder/birds.safetensors" in said and "--overwrite" not in said
    assert main("task export birds --data-dir federation --output m.safetensors --bundle there".split()) == 2
    assert Path("there").read_text() == "kept" and not Path("m.safetensors").exists()


def test_a_task_of_outputs_alone_has_no_model(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_task(service, tmp_path)
    assert export() == 2
    assert "work folder of its device" in capsys.readouterr().err
