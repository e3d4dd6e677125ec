"""A task's JSON: any task survives the way there and back, and every wrong field is named."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgestill.coordinator.rounds.round import Rules
from edgestill.coordinator.task.task import (
    EXCHANGES,
    PRECISIONS,
    RULES,
    Aggregation,
    Distil,
    StudentEntry,
    Task,
    TransferEntry,
    parse_task,
    share_of,
)
from edgestill.runtime.device.local_settings import LocalSettings
from edgestill.runtime.device.outputs import MOST_CLASS_COUNTS
from edgestill.runtime.errors import UsageError
from edgestill.runtime.training.hyperparameters import HYPERPARAMETERS

STUDENT = {
    "student": "cnn3",
    "bundle": "a" * 64,
    "size_bytes": 1000,
    "engines": ["onnxruntime"],
    "memory_bytes": 10**8,
    "model_digest": "b" * 64,
}
TRANSFER = {"blob": "c" * 64, "samples": 40, "size_bytes": 500, "labelled": False}
LEAST: dict[str, Any] = {"name": "birds", "students": [STUDENT], "transfer": TRANSFER}


def with_field(path: str, value: Any, base: dict[str, Any] = LEAST) -> dict[str, Any]:
    task = json.loads(json.dumps(base))
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    node: Any = task
    for part in parents:
        node = node.setdefault(part, {}) if isinstance(node, dict) else node[part]
    node[last] = value
    return task


@pytest.mark.parametrize("name", ["cnn3", "leaf.py:LeafNet", "my_package.students:make_leaf"])
def test_own_students_take_part(name: str) -> None:
    assert parse_task(with_field("students", [STUDENT | {"student": name}])).students[0].student == name


def test_the_defaults_are_those_of_the_contract() -> None:
    task = parse_task(LEAST)
    assert (task.exchange, task.mode, task.precision) == ("latents", "consensus", "fp16")
    numbers = dict.fromkeys(HYPERPARAMETERS)
    assert task.as_json()["local"] == {
        "epochs": 1, **numbers, "transfer_fraction": 0.5, "augment": "", "checkpoint_every": 50,
    }  # fmt: skip
    assert task.as_json()["distil"] == {"epochs": 1, **numbers, "alpha": 1.0, "deadline_s": 600.0}
    assert task.as_json()["aggregation"] == {
        "rule": "mean",
        "clip": None,
        "trim": 0.2,
        "byzantine": 0.2,
        "align": False,
        "screen": False,
    }
    assert parse_task(with_field("transfer.labelled", True)).distil.alpha == 0.5
    assert parse_task(with_field("goal", 5)).minimum == 3
    assert parse_task(with_field("global_student", STUDENT)).mode == "global"
    assert parse_task(with_field("exchange", "parameters")).precision == "fp32"


def test_a_task_gives_the_rules_of_its_rounds() -> None:
    task = parse_task({**LEAST, "goal": 7, "minimum": 4, "over_selection": 2, "deadline_s": 60})
    assert task.rules() == Rules(
        goal=7, minimum=4, over_selection=2.0, deadline_s=60.0, distil_deadline_s=task.distil.deadline_s
    )
    assert task.rules().selected_at_most == 14


def test_what_an_upload_must_hold() -> None:
    task = {**LEAST, "latent_size": 16, "classes": 3}
    expected = {
        "latents": {"latents": (40, 16)},
        "logits": {"logits": (40, 3)},
        "both": {"latents": (40, 16), "logits": (40, 3)},
    }
    for exchange, shapes in expected.items():
        assert parse_task({**task, "exchange": exchange}).expected_upload() == shapes
    shapes = {"output.weight": [3, 16], "bn.count": []}
    parameters = parse_task({**task, "exchange": "parameters", "parameter_shapes": shapes})
    assert parameters.expected_upload(parameters.students[0]) == {"output.weight": (3, 16), "bn.count": ()}


def test_a_device_gets_the_largest_student_that_fits() -> None:
    def entry(name: str, parameters: int, memory_bytes: int, *engines: str) -> dict[str, Any]:
        digest = f"{parameters:064x}"
        return STUDENT | {
            "student": name,
            "parameters": parameters,
            "memory_bytes": memory_bytes,
            "engines": list(engines),
            "bundle": digest,
        }

    task = parse_task(
        LEAST
        | {
            "students": [
                entry("small", 10, 100, "onnxruntime", "executorch"),
                entry("large", 30, 200, "onnxruntime"),
                entry("middle", 20, 300, "executorch"),
            ]
        }
    )
    cases = {
        (("onnxruntime", "executorch"), None): "large",
        (("onnxruntime", "executorch"), 199): "small",
        (("onnxruntime",), 200): "large",
        (("executorch",), 300): "middle",
        (("executorch",), 299): "small",
    }
    for (engines, memory_bytes), name in cases.items():
        student = task.fitting_student(engines, memory_bytes)
        assert student is not None and student.student == name
    assert task.fitting_student(["onnxruntime"], 99) is None
    assert task.fitting_student(["qualcomm-htp"], None) is None


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("name", "Birds"),
        ("name", "a" * 41),
        ("name", "birds\n"),
        ("students", []),
        ("students.0.bundle", "A" * 64),
        ("students.0.engines", ["onnxruntime", "onnxruntime"]),
        ("students.0.size_bytes", 1.5),
        ("students.0.memory_bytes", -1),
        ("transfer.samples", True),
        ("transfer.labelled", 1),
        ("exchange", "gradients"),
        ("mode", None),
        ("aggregation.rule", ["mean"]),
        ("aggregation.clip", 0),
        ("aggregation.trim", 0.5),
        ("aggregation.byzantine", float("nan")),
        ("local.alpha", 1.01),
        ("local.learning_rate", "0.01"),
        ("local.momentum", 1.0),
        ("local.augment", "flip,blur"),
        ("distil.deadline_s", 0),
        ("distil.epochs", 0),
        ("precision", "fp8"),
        ("rounds", 0),
        ("over_selection", 0.99),
        ("deadline_s", math.inf),
        ("latent_size", 10**400),
    ],
)
def test_a_wrong_field_is_named_with_its_value_and_what_is_allowed(path: str, value: Any) -> None:
    with pytest.raises(UsageError) as caught:
        parse_task(with_field(path, value))
    field, shown = path.replace(".0", "[0]"), json.dumps(value)
    assert caught.value.message == f"task: {field} is {shown if len(shown) <= 60 else shown[:57] + '...'}"
    assert caught.value.hint and caught.value.hint.startswith(f"{field} must be ")


def test_a_wrong_size_in_a_shape_is_named() -> None:
    with pytest.raises(UsageError) as caught:
        parse_task(LEAST | {"exchange": "parameters", "parameter_shapes": {"weight": [3, -1]}})
    assert caught.value.message == "task: parameter_shapes.weight[1] is -1"


@pytest.mark.parametrize("path", ["name", "students", "transfer", "students.0.bundle", "transfer.labelled"])
def test_what_has_no_default_must_be_there(path: str) -> None:
    task = with_field(path, None)
    *parents, last = path.split(".")
    node: Any = task
    for part in parents:
        node = node[int(part)] if part.isdigit() else node[part]
    del node[last]
    with pytest.raises(UsageError, match="is missing") as caught:
        parse_task(task)
    assert path.replace(".0", "[0]") in caught.value.message


@pytest.mark.parametrize("path", ["gaol", "local.lr", "students.0.size", "aggregation.f"])
def test_an_unknown_field_is_refused(path: str) -> None:
    with pytest.raises(UsageError, match="no such field"):
        parse_task(with_field(path, 1))


@pytest.mark.parametrize("data", [None, [], "birds", 3, {"name": "birds", "students": {}, "transfer": []}])
def test_anything_but_a_task_is_refused(data: Any) -> None:
    with pytest.raises(UsageError):
        parse_task(data)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"goal": 2, "minimum": 3}, "minimum"),
        ({"goal": 100_000, "over_selection": 1.5}, "over_selection"),
        ({"students": [STUDENT, STUDENT]}, "students"),
        ({"mode": "global"}, "global_student"),
        ({"mode": "consensus", "global_student": STUDENT}, "global_student"),
        ({"exchange": "parameters", "mode": "global", "global_student": STUDENT}, "mode"),
        ({"exchange": "parameters", "precision": "int8"}, "precision"),
        (
            {
                "exchange": "parameters",
                "students": [STUDENT, STUDENT | {"bundle": "d" * 64, "model_digest": "e" * 64}],
            },
            "students",
        ),
        ({"parameter_shapes": {"weight": [3]}}, "parameter_shapes"),
        ({"test": TRANSFER}, "test.labelled"),
        ({"aggregation": {"rule": "class_mean"}}, "aggregation.rule"),
        ({"aggregation": {"align": True}, "exchange": "logits"}, "aggregation.align"),
        ({"aggregation": {"rule": "krum"}, "goal": 5, "minimum": 2}, "aggregation.byzantine"),
        (
            {"aggregation": {"rule": "krum", "byzantine": 0.4}, "goal": 10, "minimum": 9},
            "aggregation.byzantine",
        ),
    ],
)
def test_fields_that_are_wrong_together_are_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_task(LEAST | fields)
    assert caught.value.message.startswith(f"task: {named} is ")


@pytest.mark.parametrize(
    "fields",
    [
        {"aggregation": {"rule": "krum"}, "goal": 5, "minimum": 3},
        {"aggregation": {"rule": "krum", "byzantine": 0.4}, "goal": 9, "minimum": 9},
        {"aggregation": {"rule": "class_mean"}, "transfer": TRANSFER | {"labelled": True}},
        {"aggregation": {"rule": "median", "align": True, "clip": 3}, "exchange": "both"},
        {"test": TRANSFER | {"labelled": True}, "global_student": STUDENT},
    ],
)
def test_fields_that_are_right_together_are_taken(fields: dict[str, Any]) -> None:
    assert parse_task(parse_task(LEAST | fields).as_json()) == parse_task(LEAST | fields)


def test_counts_a_class_need_room_in_an_upload() -> None:
    labelled = LEAST | {"transfer": TRANSFER | {"labelled": True}, "aggregation": {"rule": "class_mean"}}
    assert parse_task(labelled | {"classes": MOST_CLASS_COUNTS}).classes == MOST_CLASS_COUNTS
    with pytest.raises(UsageError, match="class_mean") as caught:
        parse_task(labelled | {"classes": MOST_CLASS_COUNTS + 1})
    assert "room for the counts of 3000" in str(caught.value.hint)
    assert parse_task(LEAST | {"classes": 100_000}).classes == 100_000


@pytest.mark.parametrize(
    ("fields", "risky"),
    [
        ({"exchange": "latents"}, False),
        ({"exchange": "parameters"}, True),
        ({"exchange": "parameters", "aggregation": {"clip": "median"}}, False),
        ({"exchange": "parameters", "aggregation": {"clip": 1.5}}, False),
        ({"exchange": "parameters", "aggregation": {"rule": "median"}}, False),
    ],
)
def test_a_mean_that_one_device_decides_is_a_risk(fields: dict[str, Any], risky: bool) -> None:
    risks = parse_task(LEAST | fields).risks()
    assert bool(risks) == risky and all("--clip median" in risk for risk in risks)


def test_a_share_that_is_a_whole_number_is_not_rounded_away() -> None:
    assert [share_of(100, 0.29), share_of(5, 0.2), share_of(4, 0.2), share_of(9, 0.4)] == [29, 1, 0, 3]


DIGESTS = st.integers(0, 2**256 - 1).map(lambda number: f"{number:064x}")
WORDS = st.from_regex(r"[a-z][a-z0-9_-]{0,10}", fullmatch=True)
SIZES = st.integers(1, 2**32)
STUDENTS = st.builds(
    StudentEntry,
    student=WORDS,
    bundle=DIGESTS,
    size_bytes=SIZES,
    engines=st.lists(WORDS, min_size=1, max_size=3, unique=True).map(tuple),
    memory_bytes=st.integers(0, 2**40),
    model_digest=st.just("b" * 64),
    parameters=st.integers(0, 2**30),
)
TRANSFERS = st.builds(TransferEntry, DIGESTS, st.integers(1, 10**6), SIZES, labelled=st.just(True))


@st.composite
def tasks(draw: st.DrawFn) -> Task:
    exchange = draw(st.sampled_from(EXCHANGES))
    parameters = exchange == "parameters"
    global_student = None if parameters else draw(st.none() | STUDENTS)
    rules = [name for name in RULES if not (parameters and name == "class_mean")]
    aggregation = Aggregation(
        rule=draw(st.sampled_from(rules)),
        clip=draw(st.none() | st.floats(1e-9, 1e9)),
        trim=draw(st.floats(0, 0.49)),
        byzantine=draw(st.floats(0, 0.2)),
        align=draw(st.booleans()) and exchange in ("latents", "both"),
    )
    goal = draw(st.integers(3, 200))
    return Task(
        name=draw(st.from_regex(r"[a-z][a-z0-9-]{0,39}", fullmatch=True)),
        students=tuple(draw(st.lists(STUDENTS, min_size=1, max_size=3, unique_by=lambda s: s.bundle))),
        transfer=draw(TRANSFERS),
        exchange=exchange,
        mode="consensus" if global_student is None else "global",
        global_student=global_student,
        test=draw(st.none() | TRANSFERS),
        latent_size=draw(st.integers(1, 4096)),
        classes=draw(st.integers(2, 1000)),
        aggregation=aggregation,
        local=LocalSettings(
            epochs=draw(st.integers(1, 9)),
            learning_rate=draw(st.floats(0, 10)),
            alpha=draw(st.floats(0, 1)),
            augment=draw(st.sampled_from(["", "flip", "flip,crop"])),
        ),
        distil=Distil(deadline_s=draw(st.floats(0.001, 1e5))),
        precision=draw(st.sampled_from(PRECISIONS[: 2 if parameters else 3])),
        rounds=draw(st.integers(1, 10**6)),
        goal=goal,
        over_selection=draw(st.floats(1, 10)),
        minimum=draw(st.integers(3, goal)),
        deadline_s=draw(st.floats(0.001, 1e6)),
        parameter_shapes=draw(
            st.dictionaries(
                st.text(max_size=8), st.lists(st.integers(0, 512), max_size=4).map(tuple), max_size=3
            )
        )
        if parameters
        else {},
    )


@given(tasks())
@settings(deadline=None)
def test_any_task_survives_json_both_ways(task: Task) -> None:
    assert parse_task(json.loads(json.dumps(task.as_json()))) == task


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(
    st.sampled_from([*parse_task(LEAST).as_json(), "local.alpha", "aggregation.clip", "students.0.engines"]),
    JSON,
)
@settings(max_examples=300, deadline=None)
def test_any_value_of_a_field_is_taken_or_refused_with_a_hint(path: str, value: Any) -> None:
    try:
        task = parse_task(with_field(path, value))
    except UsageError as error:
        assert error.hint
    else:
        assert parse_task(task.as_json()) == task
