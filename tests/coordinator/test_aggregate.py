"""Aggregation against formulas written out value by value, SciPy, and hostile uploads."""

from __future__ import annotations

import math
import statistics
from itertools import combinations, permutations

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from edgestill.coordinator.distillation import aggregation as module
from edgestill.coordinator.distillation.aggregation import AggregationError, Upload, aggregate
from edgestill.coordinator.task.task import RULES, Aggregation

ROWS, LATENT, CLASSES = 6, 4, 3
FINITE = st.floats(-1e30, 1e30, width=32)
LABELS = np.array([0, 1, 2, 0, 1, 2])


def random_uploads(count: int, seed: int = 0, rows: int = ROWS) -> list[Upload]:
    rng = np.random.default_rng(seed)
    return [
        Upload(
            f"d-{index:03}",
            {
                "latents": rng.normal(size=(rows, LATENT)).astype(np.float32),
                "logits": rng.normal(size=(rows, CLASSES)).astype(np.float32),
            },
            samples=int(rng.integers(1, 100)),
            class_counts=tuple(int(count) for count in rng.integers(0, 20, CLASSES)),
        )
        for index in range(count)
    ]


def replaced(upload: Upload, **arrays: np.ndarray) -> Upload:
    return Upload(upload.device, {**upload.arrays, **arrays}, upload.samples, upload.class_counts)


def latents_of(*values: object, samples: int = 1) -> list[Upload]:
    return [
        Upload(f"d-{index:03}", {"latents": np.asarray(value, np.float32)}, samples)
        for index, value in enumerate(values)
    ]


def each_value(uploads: list[Upload], name: str):
    """Row, column and the values of all uploads there, as Python floats."""
    rows, width = uploads[0].arrays[name].shape
    for row in range(rows):
        for column in range(width):
            yield row, column, [float(upload.arrays[name][row, column]) for upload in uploads]


def test_the_mean_weighs_devices_by_samples() -> None:
    uploads = random_uploads(5)
    result = aggregate(uploads, Aggregation("mean"))
    total = sum(upload.samples for upload in uploads)
    for name in ("latents", "logits"):
        assert result[name].dtype == np.float32
        for row, column, values in each_value(uploads, name):
            expected = math.fsum(u.samples * v for u, v in zip(uploads, values, strict=True)) / total
            assert result[name][row, column] == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_a_device_that_claims_a_billion_samples_weighs_as_ten_median_devices() -> None:
    honest = latents_of(*[[[1.0]]] * 20, samples=50)
    liar = Upload("d-liar", {"latents": np.full((1, 1), 100.0, np.float32)}, 999_999_999)
    (((value,),),) = (aggregate([*honest, liar], Aggregation("mean"))["latents"],)
    assert value == pytest.approx((20 * 1.0 + 10 * 100.0) / 30)
    # of two devices, the one that claims less says what is usual
    (((value,),),) = (aggregate([honest[0], liar], Aggregation("mean"))["latents"],)
    assert value == pytest.approx((1.0 + 10 * 100.0) / 11)


def test_a_device_that_claims_a_billion_samples_of_a_class_weighs_as_ten_median_devices() -> None:
    honest = [Upload(u.device, u.arrays, 50, (5, 0)) for u in latents_of(*[[[1.0], [1.0]]] * 20)]
    liar = Upload("d-liar", {"latents": np.full((2, 1), 100.0, np.float32)}, 50, (999_999_999, 0))
    labels = np.array([0, 1])
    first, second = aggregate([*honest, liar], Aggregation("class_mean"), None, labels)["latents"][:, 0]
    assert first == pytest.approx((20 * 1.0 + 10 * 100.0) / 30)
    assert second == pytest.approx((20 * 1.0 + 100.0) / 21), "nobody has any of class 1: by samples"


def test_devices_without_any_samples_count_alike() -> None:
    uploads = latents_of([[1.0, 2.0]], [[3.0, 4.0]], samples=0)
    np.testing.assert_array_equal(aggregate(uploads, Aggregation("mean"))["latents"], [[2.0, 3.0]])


def test_the_class_mean_weighs_each_row_by_who_knows_its_class() -> None:
    uploads = random_uploads(4)
    counts = [(5, 0, 0), (1, 0, 3), None, (0, 0, 1)]
    uploads = [Upload(u.device, u.arrays, u.samples, c) for u, c in zip(uploads, counts, strict=True)]
    result = aggregate(uploads, Aggregation("class_mean"), None, LABELS)
    weights_by_class = {0: [5, 1, 0, 0], 1: [u.samples for u in uploads], 2: [0, 3, 0, 1]}
    for name in ("latents", "logits"):
        for row, column, values in each_value(uploads, name):
            weights = weights_by_class[int(LABELS[row])]
            expected = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
            assert result[name][row, column] == pytest.approx(expected, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_the_median_is_that_of_each_value(count: int) -> None:
    uploads = random_uploads(count)
    result = aggregate(uploads, Aggregation("median"))
    for name in ("latents", "logits"):
        for row, column, values in each_value(uploads, name):
            assert result[name][row, column] == np.float32(statistics.median(values))


@pytest.mark.parametrize(
    ("count", "trim"), [(1, 0.4), (2, 0.2), (4, 0.2), (5, 0.2), (10, 0.3), (7, 0.49), (5, 0.0)]
)
def test_the_trimmed_mean_cuts_the_share_at_either_end(count: int, trim: float) -> None:
    uploads = random_uploads(count)
    result = aggregate(uploads, Aggregation("trimmed_mean", trim=trim))["latents"]
    cut = next(k for k in range(count) if k >= trim * count - 1e-9 or 2 * (k + 1) >= count)
    for row, column, values in each_value(uploads, "latents"):
        kept = sorted(values)[cut : count - cut]
        assert result[row, column] == pytest.approx(statistics.fmean(kept), rel=1e-6, abs=1e-7)
    if (trim * count).is_integer():
        stack = np.stack([upload.arrays["latents"] for upload in uploads]).astype(np.float64)
        np.testing.assert_allclose(result, scipy.stats.trim_mean(stack, trim, axis=0), rtol=1e-6)


@pytest.mark.parametrize(("count", "byzantine"), [(3, 0.2), (5, 0.2), (7, 0.2), (9, 0.34)])
def test_krum_takes_the_upload_with_the_nearest_neighbours(count: int, byzantine: float) -> None:
    for seed in range(5):
        uploads = random_uploads(count, seed)
        vectors = [np.concatenate([a.ravel() for a in u.arrays.values()]).astype(float) for u in uploads]
        kept = count - int(byzantine * count) - 2
        scores = [
            min(
                sum(math.dist(v, w) ** 2 for w in group)
                for group in combinations(vectors[:i] + vectors[i + 1 :], kept)
            )
            for i, v in enumerate(vectors)
        ]
        result = aggregate(uploads, Aggregation("krum", byzantine=byzantine))
        for name, array in result.items():
            np.testing.assert_array_equal(array, uploads[int(np.argmin(scores))].arrays[name])


def test_krum_breaks_ties_by_name() -> None:
    corner = np.eye(4, dtype=np.float32)
    uploads = [Upload(f"d-{name}", {"latents": corner[[i]]}, 1) for i, name in enumerate("cadb")]
    result = aggregate(uploads, Aggregation("krum", byzantine=0.0))
    np.testing.assert_array_equal(result["latents"], corner[[1]])


def test_krum_refuses_too_few_uploads() -> None:
    with pytest.raises(AggregationError, match="more than 4 uploads to withstand 1, and there are 4"):
        aggregate(random_uploads(4), Aggregation("krum", byzantine=0.25))


def test_outputs_are_clipped_row_by_row() -> None:
    upload = Upload(
        "d-a", {"latents": np.array([[3, 4], [0.3, 0.4], [0, 0]]), "logits": np.array([[0, -9]] * 3)}, 1
    )
    result = aggregate([upload], Aggregation(clip=1.0))
    np.testing.assert_allclose(result["latents"], [[0.6, 0.8], [0.3, 0.4], [0, 0]], rtol=1e-6)
    np.testing.assert_array_equal(result["logits"], [[0, -1]] * 3)


def parameters(device: str, seed: int, size: float) -> Upload:
    rng = np.random.default_rng(seed)
    arrays = {
        "weight": rng.normal(size=(2, 3, 2)) * size,
        "bias": rng.normal(size=2) * size,
        "count": np.float32(3),
    }
    return Upload(device, {name: np.float32(array) for name, array in arrays.items()}, 5)


def flat(arrays: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([np.ravel(arrays[name]).astype(float) for name in sorted(arrays)])


def test_the_median_clip_bounds_what_scaling_can_do() -> None:
    """Each row is shortened to the median of the uploads' norms of that row: NumPy, upload by upload."""
    uploads = random_uploads(5)
    uploads[2] = replaced(uploads[2], latents=uploads[2].arrays["latents"] * np.float32(1e6))
    result = aggregate(uploads, Aggregation(clip="median"))["latents"]
    stack = np.stack([upload.arrays["latents"].astype(np.float64) for upload in uploads])
    norms = np.linalg.norm(stack, axis=2, keepdims=True)
    stack *= np.minimum(1, np.median(norms, axis=0) / norms)
    weights = np.array([upload.samples for upload in uploads], np.float64)
    np.testing.assert_allclose(result, np.average(stack, axis=0, weights=weights), rtol=1e-5, atol=1e-6)
    zeros = latents_of(np.zeros((2, 3)), np.zeros((2, 3)), np.ones((2, 3)))
    assert not aggregate(zeros, Aggregation(clip="median"))["latents"].any()


def test_parameters_are_clipped_by_their_whole_distance_to_the_previous() -> None:
    previous = dict(parameters("d-p", 9, 1.0).arrays)
    uploads = [parameters("d-a", 1, 10.0), parameters("d-b", 2, 0.001)]
    for upload in uploads:
        clipped = flat(aggregate([upload], Aggregation(clip=2.0), previous))
        update = flat(dict(upload.arrays)) - flat(previous)
        expected = flat(previous) + update * min(1.0, 2.0 / np.linalg.norm(update))
        np.testing.assert_allclose(clipped, expected, rtol=1e-5, atol=1e-6)
    both = aggregate(uploads, Aggregation(clip=1e9), previous)
    np.testing.assert_allclose(
        flat(both), np.mean([flat(dict(u.arrays)) for u in uploads], axis=0), rtol=1e-5
    )
    assert {name: array.shape for name, array in both.items()} == {
        "weight": (2, 3, 2),
        "bias": (2,),
        "count": (),
    }


def test_without_previous_parameters_updates_are_clipped_to_the_median() -> None:
    uploads = [parameters(f"d-{index}", 1, 1.0) for index in range(4)] + [parameters("d-x", 2, 1e6)]
    result = aggregate(uploads, Aggregation(clip=0.5))
    # four are the median itself; the fifth moves the mean by at most a fifth of the clip
    assert np.linalg.norm(flat(result) - flat(dict(uploads[0].arrays))) == pytest.approx(0.1, rel=1e-5)


@given(
    st.sampled_from(RULES),
    st.booleans(),
    st.none() | st.floats(0.1, 10),
    st.permutations(range(6)),
    st.integers(0, 3),
    st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_any_order_of_arrival_gives_the_same_bytes(
    rule: str, align: bool, clip: float | None, order: list[int], seed: int, with_previous: bool
) -> None:
    uploads = random_uploads(6, seed)
    previous = dict(random_uploads(1, 99)[0].arrays) if with_previous else None
    spec = Aggregation(rule, clip=clip, align=align, byzantine=0.2)
    expected = aggregate(uploads, spec, previous, LABELS)
    actual = aggregate([uploads[index] for index in order], spec, previous, LABELS)
    assert list(actual) == list(expected)
    assert all(actual[name].tobytes() == expected[name].tobytes() for name in expected)


@pytest.mark.parametrize("rule", RULES)
def test_blocks_do_not_change_the_result(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = random_uploads(6, rows=6)
    spec = Aggregation(rule, clip=1.5, align=True)
    whole = aggregate(uploads, spec, None, LABELS)
    monkeypatch.setattr(module, "_BLOCK_VALUES", 6 * LATENT * 2)
    for name, array in aggregate(uploads, spec, None, LABELS).items():
        np.testing.assert_allclose(array, whole[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rule", RULES)
def test_uploads_that_agree_are_kept(rule: str) -> None:
    upload = random_uploads(1)[0]
    uploads = [Upload(f"d-{i}", upload.arrays, i, upload.class_counts) for i in range(5)]
    for name, array in aggregate(uploads, Aggregation(rule), None, LABELS).items():
        np.testing.assert_allclose(array, upload.arrays[name], rtol=1e-6)


@given(
    npst.arrays(np.float32, (8, 3, 2), elements=st.floats(-100, 100, width=32)),
    npst.arrays(np.float32, (2, 3, 2), elements=st.floats(allow_nan=False, allow_infinity=False, width=32)),
    st.sampled_from(["median", "trimmed_mean"]),
    st.permutations(range(10)),
)
@settings(max_examples=150, deadline=None)
def test_a_fifth_of_hostile_uploads_stays_inside_the_honest_range(
    honest: np.ndarray, hostile: np.ndarray, rule: str, names: list[int]
) -> None:
    uploads = [
        Upload(f"d-{name}", {"latents": values}, 10**9)
        for name, values in zip(names, [*honest, *hostile], strict=True)
    ]
    result = aggregate(uploads, Aggregation(rule, trim=0.2))["latents"]
    # of float32, the mean of equal values may be off by a rounding
    low, high = np.nextafter(honest.min(axis=0), -np.inf), np.nextafter(honest.max(axis=0), np.inf)
    assert ((low <= result) & (result <= high)).all()


@given(
    npst.arrays(np.float32, (2, 3, 2), elements=st.floats(allow_nan=False, allow_infinity=False, width=32))
)
@settings(max_examples=60, deadline=None)
def test_krum_takes_an_honest_upload(hostile: np.ndarray) -> None:
    honest = np.random.default_rng(1).normal(size=(8, 3, 2)).astype(np.float32)
    far = hostile + np.where(hostile < 0, -100, 100).astype(np.float32)
    result = aggregate(latents_of(*far.clip(-3e38, 3e38), *honest), Aggregation("krum", byzantine=0.2))[
        "latents"
    ]
    assert any((result == values).all() for values in honest)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("align", [True, False])
def test_the_result_is_finite_whatever_finite_values_come(rule: str, align: bool) -> None:
    largest = np.finfo(np.float32).max
    rng = np.random.default_rng(2)
    uploads = [
        Upload(
            f"d-{i}",
            {"latents": np.float32(rng.choice([-largest, largest, 0, 1e-45], (6, 4)))},
            2**53,
            (2**53,),
        )
        for i in range(5)
    ]
    result = aggregate(uploads, Aggregation(rule, align=align), None, LABELS)["latents"]
    assert np.isfinite(result).all()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda u: replaced(u, latents=u.arrays["latents"][:-1]),
            r"'latents' of d-002 is \[5, 4\], not \[6, 4\]",
        ),
        (
            lambda u: replaced(u, latents=u.arrays["latents"] * np.float32(np.nan)),
            "'latents' of d-002 holds NaN",
        ),
        (
            lambda u: replaced(u, logits=u.arrays["logits"] / np.float32(0)),
            "'logits' of d-002 holds NaN or infinity",
        ),
        (
            lambda u: replaced(u, more=u.arrays["logits"]),
            "d-002 has latents, logits, more, not latents, logits",
        ),
        (lambda u: Upload("d-001", u.arrays, u.samples), "two uploads of d-001"),
        (lambda u: Upload(u.device, u.arrays, -1), "d-002 says it has -1 samples"),
        (lambda u: Upload(u.device, u.arrays, 2**60), "samples"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_uploads_that_do_not_fit_together_are_named(spoil, message: str) -> None:
    uploads = random_uploads(3)
    with pytest.raises(AggregationError, match=message) as caught:
        aggregate([*uploads[:2], spoil(uploads[2])], Aggregation())
    assert caught.value.hint


def test_what_else_is_refused() -> None:
    uploads = random_uploads(3)
    with pytest.raises(AggregationError, match="nothing to aggregate"):
        aggregate([], Aggregation())
    with pytest.raises(AggregationError, match="is empty"):
        aggregate([Upload("d-a", {}, 1)], Aggregation())
    with pytest.raises(AggregationError, match="without the classes of its rows"):
        aggregate(uploads, Aggregation("class_mean"))
    with pytest.raises(AggregationError, match="3 rows|labels for 6 rows"):
        aggregate(uploads, Aggregation("class_mean"), None, LABELS[:4])
    with pytest.raises(AggregationError, match="class counts of d-000"):
        spoilt = Upload("d-000", uploads[0].arrays, 1, (1, -2, 3))
        aggregate([spoilt, *uploads[1:]], Aggregation("class_mean"), None, LABELS)
    with pytest.raises(AggregationError, match="previous outputs"):
        aggregate(uploads, Aggregation(), {"latents": np.zeros((2, 2), np.float32)})
    with pytest.raises(AggregationError, match="not a matrix"):
        aggregate(latents_of(np.zeros(3)), Aggregation())


def test_inputs_are_left_as_they_are() -> None:
    uploads = random_uploads(5)
    before = [{name: array.tobytes() for name, array in upload.arrays.items()} for upload in uploads]
    for rule in RULES:
        aggregate(uploads, Aggregation(rule, clip=0.1, align=True), None, LABELS)
    assert before == [{name: array.tobytes() for name, array in upload.arrays.items()} for upload in uploads]


def test_every_order_of_three_is_one() -> None:
    uploads = random_uploads(3, seed=11)
    results = {aggregate(order, Aggregation())["latents"].tobytes() for order in permutations(uploads)}
    assert len(results) == 1
