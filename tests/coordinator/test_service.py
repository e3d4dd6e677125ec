"""The service on every kind of store and of blobs: enrolment, selection, uploads, step 5, what is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgestill.coordinator.distillation.aggregation import Upload, aggregate
from edgestill.coordinator.problems import Problem
from edgestill.coordinator.service import Service
from edgestill.coordinator.store.blobs import Blobs, FileBlobs, ObjectBlobs, read_blob
from edgestill.coordinator.store.database import Store
from edgestill.coordinator.task.task import Task, parse_task
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.device.outputs import pack, unpack
from edgestill.runtime.errors import UsageError
from tests.support.coordinator_backends import (  # noqa: F401  fixtures
    blobs,
    postgresql_server,
    postgresql_url,
    s3_server,
    store,
    store_url,
)
from tests.support.coordinator_round import (
    Clock,
    add_task,
    describe_task,
    enrol,
    make_upload,
    own_arrays,
    run_due,
    submit,
)

pytestmark = pytest.mark.unit


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def service(clock: Clock) -> Service:
    return Service(Store(), ObjectBlobs("memory://"), clock)


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(Problem) as caught:
        call()
    return caught.value.kind


def play_a_round(service: Service, folder: Path, **fields: Any) -> tuple[Task, list[str]]:
    task = add_task(service, folder, **fields)
    devices = [enrol(service) for _ in range(2)]
    for device in devices:
        work = service.ask(device, {"battery": 0.5})
        assert work is not None and work["round"] == "birds.1" and work["global_outputs"] is None
    for device in devices:
        assert submit(service, task, device, "birds.1") == "created"
        assert service.ask(device, {}) is None
    assert run_due(service, folder) == 1
    return task, [device.name for device in devices]


def expected_aggregate(task: Task, devices: list[str], round_name: str) -> dict[str, np.ndarray]:
    labels = np.arange(task.transfer.samples) % task.classes
    uploads = [Upload(device, own_arrays(task, round_name, device), 5) for device in devices]
    return aggregate(uploads, task.aggregation, None, labels)


def test_a_round_on_every_store(store: Store, clock: Clock, tmp_path: Path) -> None:  # noqa: F811
    check_a_round(Service(store, FileBlobs(tmp_path / "blobs"), clock), tmp_path)


def test_a_round_on_every_kind_of_blobs(blobs: Blobs, clock: Clock, tmp_path: Path) -> None:  # noqa: F811
    check_a_round(Service(Store(), blobs, clock), tmp_path)


def check_a_round(service: Service, folder: Path) -> None:
    task, devices = play_a_round(service, folder, exchange="both")
    (done,) = [one for one in service.rounds("birds") if one.phase == "completed"]
    assert done.accepted == done.selected == tuple(sorted(devices))
    assert done.published is not None
    body = read_blob(service.blobs, done.published)
    assert len(body) == done.published_bytes
    published, _ = unpack(body, "identity", task.expected_upload())
    for name, array in expected_aggregate(task, devices, "birds.1").items():
        np.testing.assert_array_equal(published[name], array)
    device = service.devices("birds")[0]
    work = service.ask(device, {})
    assert work is not None and work["round"] == "birds.2"
    assert (work["global_outputs"], work["size_bytes"]) == (done.published, len(body))
    service.report(device, "birds.2", device.name, {"samples": 3})
    assert service.rounds("birds")[1].reports == {device.name: {"samples": 3}}
    assert refusal(lambda: submit(service, task, device, "birds.7")) == "no_such_round"
    assert [(r.number, r.kind, r.count) for r in service.refusals("birds")] == [(0, "no_such_round", 1)]
    sequences = [change.sequence for change in service.changes(0)]
    assert sequences == sorted(set(sequences)) and sequences[-1] == service.last_change()


def test_a_global_student_is_distilled_evaluated_and_goes_on(service: Service, tmp_path: Path) -> None:
    task, _ = play_a_round(service, tmp_path, global_student=True, distil={"epochs": 2, "learning_rate": 0.1})
    first = service.rounds("birds")[0]
    assert first.phase == "completed", first.reason
    assert {"t_uni", "loss", "distil_loss", "distil_steps", "seconds"} <= set(first.metrics)
    state = service.tasks()[0].student_state
    assert state is not None and service.blobs.size(state)
    for device in service.devices("birds"):
        assert service.ask(device, {}) is not None
        assert submit(service, task, device, "birds.2") == "created"
    assert run_due(service, tmp_path) == 1
    second = service.rounds("birds")[1]
    assert second.phase == "completed" and second.published != first.published
    assert service.tasks()[0].student_state != state
    assert service.tasks()[0].finished
    device = service.devices("birds")[0]
    assert refusal(lambda: service.ask(device, {})) == "task_finished"


def test_parameters_are_averaged_and_evaluated(service: Service, tmp_path: Path) -> None:
    task, devices = play_a_round(service, tmp_path, exchange="parameters")
    done = service.rounds("birds")[0]
    assert done.phase == "completed", done.reason
    assert done.published is not None and "t_uni" in done.metrics
    published, _ = unpack(read_blob(service.blobs, done.published), "identity", task.expected_upload())
    for name in published:
        mean = np.mean([own_arrays(task, "birds.1", device)[name] for device in devices], axis=0)
        np.testing.assert_allclose(published[name], mean, atol=1e-6)


def test_a_loss_that_is_no_number_does_not_cost_the_round(
    store: Store,  # noqa: F811
    clock: Clock,
    tmp_path: Path,
) -> None:
    service = Service(store, FileBlobs(tmp_path / "blobs"), clock)
    task = add_task(service, tmp_path, exchange="parameters", goal=1, over_selection=1.0)
    device = enrol(service)
    assert service.ask(device, {}) is not None
    huge = {name: np.full(shape, 3e38, np.float32) for name, shape in task.expected_upload().items()}
    body = pack(huge, "fp32", {"samples": "1"}, compress=False).body
    digest = hashlib.sha256(body).hexdigest()
    assert service.submit(device, "birds.1", device.name, body, digest) == "created"
    with np.errstate(all="ignore"):
        assert run_due(service, tmp_path) == 1
    (done,) = [one for one in service.rounds("birds") if one.number == 1]
    assert done.phase == "completed", done.reason
    assert "loss" not in done.metrics and done.metrics["uploads"] == 1


def test_the_order_of_arrival_does_not_change_what_is_published(tmp_path: Path) -> None:
    digests = set()
    for order in ((0, 1, 2), (2, 0, 1)):
        random = np.random.default_rng(4)
        service = Service(Store(), ObjectBlobs("memory://"), Clock(), lambda n, r=random: r.bytes(n))
        task = add_task(service, tmp_path, goal=3)
        devices = [enrol(service) for _ in range(3)]
        for index in order:
            assert service.ask(devices[index], {}) is not None
        for index in order:
            submit(service, task, devices[index], "birds.1")
        run_due(service, tmp_path)
        digests.add(service.rounds("birds")[0].published)
    assert len(digests) == 1 and None not in digests


def test_uploads_are_refused_for_what_they_are(service: Service, clock: Clock, tmp_path: Path) -> None:
    task = add_task(service, tmp_path, goal=3, minimum=1, over_selection=1.0)
    one, two, three, four = (enrol(service) for _ in range(4))
    for device in (one, two, three):
        assert service.ask(device, {}) is not None
    assert service.ask(four, {}) is None
    sent = make_upload(task, "birds.1", one.name)

    def put(device=one, round_name="birds.1", name=None, body=sent.body, digest=None, encoding=None) -> str:
        digest = digest or hashlib.sha256(body).hexdigest()
        encoding = encoding or sent.content_encoding
        return service.submit(device, round_name, name or device.name, body, digest, encoding)

    def check(length: int | None, digest: str | None = sent.digest, encoding: str = "identity") -> object:
        return service.check_upload(one, "birds.1", one.name, length, digest, encoding)

    arrays = own_arrays(task, "birds.1", one.name)
    nan = {name: array.copy() for name, array in arrays.items()}
    raw = bytearray(pack(nan, "fp32", {"samples": "5"}, compress=False).body)
    raw[-4:] = np.float32("nan").tobytes()
    wrong_shape = pack({"latents": np.zeros((2, 2))}, "fp32", {"samples": "5"}, compress=False).body
    no_samples = pack(arrays, "fp32", {}, compress=False).body
    counts = pack(arrays, "fp32", {"samples": "5", "class_counts": "[1,2]"}, compress=False).body
    assert refusal(lambda: put(name=two.name)) == "foreign_device"
    assert refusal(lambda: put(round_name="fish.1")) == "no_such_round"
    assert refusal(lambda: put(round_name="birds.01")) == "no_such_round"
    assert refusal(lambda: check(None)) == "length_required"
    assert refusal(lambda: check(10, None)) == "malformed"
    assert refusal(lambda: check(10, encoding="gzip")) == "encoding"
    assert refusal(lambda: check(10**9)) == "too_large"
    assert refusal(lambda: put(device=four)) == "not_selected"
    assert refusal(lambda: put(digest="0" * 64)) == "digest_mismatch"
    assert refusal(lambda: put(body=b"nonsense", encoding="identity")) == "malformed"
    assert refusal(lambda: put(body=b"nonsense", encoding="zstd")) == "malformed"
    for body in (bytes(raw), wrong_shape, no_samples, counts):
        assert refusal(lambda body=body: put(body=body, encoding="identity")) == "wrong_outputs"
    assert [one.accepted for one in service.rounds("birds")] == [()]
    assert put() == "created" and put() == "same"
    assert refusal(lambda: put(body=no_samples, encoding="identity")) == "other_digest"
    clock.now_s += task.deadline_s
    assert refusal(lambda: submit(service, task, two, "birds.1")) == "late"
    assert put() == "same"
    counted = {refused.kind: refused.count for refused in service.refusals("birds")}
    assert counted["wrong_outputs"] == 4 and counted["malformed"] == 3 and counted["late"] == 1
    assert counted["no_such_round"] == 2


def test_nothing_is_written_for_a_refused_body(clock: Clock, tmp_path: Path) -> None:
    service = Service(Store(), FileBlobs(tmp_path / "blobs"), clock)
    add_task(service, tmp_path)
    device = enrol(service)
    service.ask(device, {})
    files, change = sorted((tmp_path / "blobs").rglob("*")), service.last_change()
    for body in (b"", b"x" * 500, b"{" * 100):
        digest = hashlib.sha256(body).hexdigest()
        assert (
            refusal(lambda b=body, d=digest: service.submit(device, "birds.1", device.name, b, d))
            == "malformed"
        )
    assert sorted((tmp_path / "blobs").rglob("*")) == files
    assert service.last_change() == change


def test_a_device_cannot_store_more_than_its_quota(clock: Clock, tmp_path: Path) -> None:
    service = Service(Store(), ObjectBlobs("memory://"), clock, quota_bytes=600)
    task = add_task(service, tmp_path, goal=1, over_selection=1.0, rounds=5)
    device = enrol(service)
    service.ask(device, {})
    assert submit(service, task, device, "birds.1") == "created"
    run_due(service, tmp_path)
    assert service.ask(device, {}) is not None
    assert refusal(lambda: submit(service, task, device, "birds.2")) == "quota"
    assert submit(service, task, device, "birds.1") == "same"


def test_devices_get_the_largest_student_that_fits_what_they_said_last(service: Service, tmp_path: Path) -> None:
    task = describe_task(tmp_path / "task", service.blobs).as_json()
    small = task["students"][0]
    other = service.blobs.put(b"a larger bundle")
    large = {**small, "student": "large", "bundle": other, "size_bytes": 15, "parameters": 99,
             "memory_bytes": 5000}  # fmt: skip
    service.create_task(parse_task({**task, "students": [small, large]}))
    big, little = enrol(service), enrol(service, memory_bytes=4000)
    assert service.assignment(big)["student"] == large
    assert service.assignment(little)["student"] == small
    assert "students" not in service.assignment(big)["task"]
    assert {d.name: d.student for d in service.devices("birds")} == {big.name: "large", little.name: "linear"}
    stranger = enrol(service, engines=["executorch"])
    assert refusal(lambda: service.assignment(stranger)) == "no_fitting_student"
    assert refusal(lambda: service.ask(stranger, {})) == "no_fitting_student"
    with pytest.raises(Problem, match=r"engines executorch and .*; \w+ needs \d+\.\d MB and onnxruntime"):
        service.assignment(stranger)
    # moved into a smaller container, and back: nobody keeps a student that cannot be trained there
    for memory_bytes, entry in ((4000, small), (10**9, large)):
        service.inform(big, {**big.info, "memory_bytes": memory_bytes})
        big = next(device for device in service.devices("birds") if device.name == big.name)
        assert service.assignment(big)["student"] == entry
        assert service.readable_blob(big, entry["bundle"]) == entry["size_bytes"]
    big = next(device for device in service.devices("birds") if device.name == big.name)
    assert service.readable_blob(big, other) == 15
    assert refusal(lambda: service.readable_blob(little, other)) == "not_found"
    assert service.readable_blob(little, task["transfer"]["blob"]) == task["transfer"]["size_bytes"]


def test_a_device_reads_neither_uploads_nor_states(service: Service, tmp_path: Path) -> None:
    task, names = play_a_round(service, tmp_path, global_student=True)
    device = service.devices("birds")[0]
    published = service.rounds("birds")[0].published
    assert published is not None and service.readable_blob(device, published)
    state = service.tasks()[0].student_state
    hidden = [make_upload(task, "birds.1", name).digest for name in names]
    for digest in (*hidden, state, "0" * 64):
        assert refusal(lambda digest=digest: service.readable_blob(device, digest)) == "not_found"


def test_codes_and_tokens(service: Service, clock: Clock, tmp_path: Path) -> None:
    add_task(service, tmp_path)
    code = service.issue_code("birds", lifetime_s=10)
    assert [len(group) for group in code.split("-")] == [5, 5, 5, 5]
    answer = service.enrol(code.lower().replace("-", " "), {"engines": ["onnxruntime"]})
    assert len(answer["device"]) == 18 and len(answer["token"]) == 47 and answer["task"] == "birds"
    assert service.authenticate(answer["token"]).name == answer["device"]
    assert refusal(lambda: service.enrol(code, {})) == "code_refused"
    expired = service.issue_code("birds", lifetime_s=10)
    clock.now_s += 10
    assert refusal(lambda: service.enrol(expired, {})) == "code_refused"
    assert refusal(lambda: service.authenticate("est_" + "x" * 43)) == "unauthorised"
    assert refusal(lambda: service.issue_code("fish")) == "no_such_task"


def test_no_secret_is_in_the_database(clock: Clock, tmp_path: Path) -> None:
    service = Service(Store(f"sqlite:///{tmp_path / 'a.db'}"), ObjectBlobs("memory://"), clock)
    add_task(service, tmp_path)
    code = service.issue_code("birds")
    token = service.enrol(code, {})["token"]
    written = b"".join(path.read_bytes() for path in tmp_path.glob("a.db*"))
    assert b"birds" in written
    for secret in (code, code.replace("-", ""), token, token[4:]):
        assert secret.encode() not in written
    shown = json.dumps([record.as_json() for record in service.devices("birds")])
    assert hashlib.sha256(token.encode()).hexdigest() not in shown


def test_a_task_needs_its_blobs_and_a_free_name(service: Service, tmp_path: Path) -> None:
    task = add_task(service, tmp_path)
    assert refusal(lambda: service.create_task(task)) == "task_exists"
    elsewhere = Service(Store(), ObjectBlobs("memory://"))
    with pytest.raises(UsageError, match="linear"):
        elsewhere.create_task(task)


def test_polls_do_not_each_cost_a_write(service: Service, clock: Clock, tmp_path: Path) -> None:
    add_task(service, tmp_path, goal=1, over_selection=1.0)
    one, two = enrol(service), enrol(service)
    service.ask(one, {})
    for _ in range(3):
        assert service.ask(two, {}) is None
    change = service.last_change()
    for _ in range(10):
        clock.now_s += 1
        assert service.ask(two, {}) is None
    assert service.last_change() == change
    clock.now_s += 10
    service.ask(two, {"battery": 0.4})
    (heard,) = [device for device in service.devices("birds") if device.name == two.name]
    assert (heard.status, heard.seen_s) == ({"battery": 0.4}, clock.now_s)


def test_a_bundle_in_the_blobs_is_the_students(service: Service, tmp_path: Path) -> None:
    task = add_task(service, tmp_path)
    with Bundle.open(service.blobs.path(task.students[0].bundle)) as bundle:
        assert bundle.model_digest == task.students[0].model_digest


def test_made_up_names_of_rounds_add_no_rows_of_refusals(service: Service, tmp_path: Path) -> None:
    task, _ = play_a_round(service, tmp_path)
    device, other = service.devices("birds")
    for number in range(2, 300):
        with pytest.raises(Problem):
            service.check_upload(device, f"birds.{number}", device.name, 10, "0" * 64)
        with pytest.raises(Problem):
            service.report(device, f"birds.{number}", other.name, {})
    with pytest.raises(Problem):
        service.check_upload(device, "birds.1", other.name, 10, "0" * 64)
    assert [(r.number, r.kind, r.count) for r in service.refusals("birds")] == [
        (0, "foreign_device", 298), (0, "no_such_round", 298), (1, "foreign_device", 1),
    ]  # fmt: skip
