"""One set of outputs from many uploads: a pure function of the accepted set, the same bytes in any order.

First every upload is clipped, then (on request) its latents are turned towards a reference, then (on request) uploads
that disagree with the others are left out, then the rule combines the uploads value by value. All sums are float64 and
run in the order of the devices' numbers, then names; results are float32.
Rules: weighted mean (McMahan et al. 2017), median and trimmed mean (Yin et al. 2018), Krum (Blanchard et al. 2017).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from edgestill.coordinator.distillation.alignment import Motion, find_motion, reference_device
from edgestill.coordinator.distillation.screening import agreement, odd_ones
from edgestill.coordinator.task.task import Aggregation, share_of
from edgestill.runtime.errors import EdgestillError

OUTPUTS = ("latents", "logits")
_BLOCK_VALUES = 2**22
"""Values of all uploads that are held as float64 at once: 32 MiB."""
_MAX_SAMPLES = 2**53
_MOST_OF_MEDIAN = 10.0
"""What a device says of its samples weighs at most as much as this many median devices."""
_FLOAT32_MAX = float(np.finfo(np.float32).max)


class AggregationError(EdgestillError):
    """Uploads that cannot be combined."""


@dataclass(frozen=True)
class Upload:
    """What one device sent: arrays by name, float32; `samples` and `class_counts` as it says itself."""

    device: str
    arrays: Mapping[str, np.ndarray]
    samples: int
    class_counts: tuple[int, ...] | None = None
    number: int = 0
    """The device's, by the code that it enrolled with: unlike its name the same whenever a federation is repeated."""


def aggregate(
    uploads: Sequence[Upload],
    spec: Aggregation,
    previous: Mapping[str, np.ndarray] | None = None,
    transfer_labels: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """The aggregate of all uploads, by name, float32 and finite.

    `latents` [N, l] and `logits` [N, K] are outputs; any other names are parameters and statistics. `previous` are
    the global outputs before, in the same form; `transfer_labels` [N] are the classes of the transfer samples.

    - clip: outputs are shortened row by row to this norm ("median": to the uploads' median norm of that row); of
      parameters, the whole update, which is the difference to `previous` (to the median of the uploads where there is
      none).
    - align: see `coordinator/distillation/alignment.py`; to the previous latents, else to the reference device's.
    - screen: see `left_out`.
    - what a device says of its samples, or of its samples of a class, is believed up to 10 times the lower median of
      what those devices say that have any: nobody outvotes all others by saying more.
    - `mean` weighs devices by samples; `class_mean` weighs the outputs of a sample of class c by how many samples of
      c a device has, and by samples where nobody has any; `median`, `trimmed_mean` and `krum` ignore what devices
      say of themselves. `trimmed_mean` cuts the share `trim` of the uploads at either end, rounded up, so that a
      hostile share of at most that is always outvoted, and leaves the median at least.
    - `krum` gives the one upload that lies nearest to its n − f − 2 nearest others, f = `byzantine` · n rounded
      down; ties go to the first device in order.

    Errors: AggregationError for no upload, a device twice, arrays that differ in names or shapes or hold NaN.
    """
    ordered, entries = _prepared(uploads, spec, previous)
    if spec.screen:
        odd = _odd(entries, previous)
        ordered = [upload for index, upload in enumerate(ordered) if not odd[index]]
        entries = {
            name: [v for index, v in enumerate(views) if not odd[index]] for name, views in entries.items()
        }
    if spec.rule == "krum":
        chosen = _krum(entries, share_of(len(ordered), spec.byzantine), len(ordered))
        entries = {name: [views[chosen]] for name, views in entries.items()}
    result = {}
    for name, views in entries.items():
        weights = _weights(name, ordered, spec, views[0].rows, transfer_labels)
        flat = np.empty((views[0].rows, views[0].width), np.float32)
        for start, stop, stack in _blocks(views):
            block = _combine(stack, spec, weights[:, start:stop])
            # what a hostile upload blows up stays finite, as the wire demands
            flat[start:stop] = np.clip(block, -_FLOAT32_MAX, _FLOAT32_MAX)
        result[name] = flat.reshape(ordered[0].arrays[name].shape)
    return result


def left_out(
    uploads: Sequence[Upload], spec: Aggregation, previous: Mapping[str, np.ndarray] | None = None
) -> tuple[str, ...]:
    """The devices whose uploads `aggregate` leaves out because they disagree with the others, in order.

    Agreement is the cosine with the coordinate-wise median of all uploads: of outputs without each column's mean, so
    that outputs of other samples do not agree; of parameters as differences to `previous`, and without these nobody is
    left out. An upload must agree in everything that it holds. None of fewer than four. Errors: as `aggregate`.
    """
    if not spec.screen:
        return ()
    ordered, entries = _prepared(uploads, spec, previous)
    odd = _odd(entries, previous)
    return tuple(upload.device for index, upload in enumerate(ordered) if odd[index])


def _prepared(
    uploads: Sequence[Upload], spec: Aggregation, previous: Mapping[str, np.ndarray] | None
) -> tuple[list[Upload], dict[str, list[_View]]]:
    """The uploads in order, and what each array has to say after clipping and alignment, a view a device."""
    ordered = _in_order(uploads, previous)
    entries = {name: _clipped(name, ordered, spec, previous) for name in sorted(ordered[0].arrays)}
    if not set(entries) <= set(OUTPUTS):
        entries = _with_whole_norm(entries, spec.clip)
    if spec.align and "latents" in entries:
        entries["latents"] = _aligned(entries["latents"], (previous or {}).get("latents"))
    return ordered, entries


def _odd(entries: Mapping[str, Sequence[_View]], previous: Mapping[str, np.ndarray] | None) -> np.ndarray:
    """Which uploads [n] disagree with the others in any of their outputs, or in all their parameters together."""
    if set(entries) <= set(OUTPUTS):
        found = [odd_ones(agreement(_around(views, None))) for views in entries.values()]
        return np.any(found, axis=0)
    before = {name: _as_matrix(array) for name, array in (previous or {}).items() if name in entries}
    if not before:
        return np.zeros(len(next(iter(entries.values()))), bool)
    parts = (part for name in sorted(before) for part in _around(entries[name], before[name]))
    return odd_ones(agreement(parts))


def _around(views: Sequence[_View], base: np.ndarray | None) -> Iterator[np.ndarray]:
    """The blocks of all views, as differences to `base`, or to each upload's mean row."""
    means = None if base is not None else np.stack([view.read().mean(axis=0) for view in views])
    for start, stop, stack in _blocks(views):
        yield stack - (means[:, None] if means is not None else base[start:stop].astype(np.float64))


def _in_order(uploads: Sequence[Upload], previous: Mapping[str, np.ndarray] | None) -> list[Upload]:
    ordered = sorted(uploads, key=lambda upload: (upload.number, upload.device))
    if not ordered:
        raise AggregationError("there is nothing to aggregate", "accept at least one upload")
    if len({upload.device for upload in ordered}) < len(ordered):
        names = sorted(upload.device for upload in ordered)
        twice = next(one for one, other in zip(names, names[1:], strict=False) if one == other)
        raise AggregationError(f"there are two uploads of {twice}", "accept one upload a device")
    shapes = {name: np.shape(array) for name, array in ordered[0].arrays.items()}
    if not shapes:
        raise AggregationError(f"the upload of {ordered[0].device} is empty", "upload outputs or parameters")
    for upload in ordered:
        if not 0 <= upload.samples <= _MAX_SAMPLES:
            raise AggregationError(
                f"{upload.device} says it has {upload.samples} samples", "refuse the upload"
            )
        _check_arrays(upload.device, upload.arrays, shapes)
    if previous is not None:
        used = {name: array for name, array in previous.items() if name in shapes}
        _check_arrays("the previous outputs", used, {name: shapes[name] for name in used})
    return ordered


def _check_arrays(
    whose: str, arrays: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    if set(arrays) != set(shapes):
        raise AggregationError(
            f"{whose} has {', '.join(sorted(arrays))}, not {', '.join(sorted(shapes))}",
            "aggregate uploads of one task only",
        )
    for name, array in arrays.items():
        if np.shape(array) != shapes[name]:
            raise AggregationError(
                f"{name!r} of {whose} is {list(np.shape(array))}, not {list(shapes[name])}",
                "refuse the upload: it is of another student or transfer set",
            )
        if not np.isfinite(array).all():
            raise AggregationError(f"{name!r} of {whose} holds NaN or infinity", "refuse the upload")
        if name in OUTPUTS and np.ndim(array) != 2:
            raise AggregationError(f"{name!r} of {whose} is not a matrix", "upload one row a transfer sample")


@dataclass(frozen=True)
class _View:
    """One array of one device as a matrix, clipped and moved when its rows are read: no second copy is held."""

    matrix: np.ndarray
    scale: np.ndarray | float = 1.0
    """What the distance to `base` is multiplied with: by row [rows], or of all."""
    base: np.ndarray | None = None
    motion: Motion | None = None

    @property
    def rows(self) -> int:
        return self.matrix.shape[0]

    @property
    def width(self) -> int:
        return self.matrix.shape[1]

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [stop − start, width] in float64."""
        values = self.matrix[start:stop].astype(np.float64)
        scale = self.scale[start:stop, None] if isinstance(self.scale, np.ndarray) else self.scale
        if self.base is not None and scale != 1.0:
            base = self.base[start:stop].astype(np.float64)
            values = base + (values - base) * scale
        elif self.base is None:
            values *= scale
        return values if self.motion is None else self.motion.apply(values)


def _clipped(
    name: str, ordered: Sequence[Upload], spec: Aggregation, previous: Mapping[str, np.ndarray] | None
) -> list[_View]:
    """A view a device; outputs are clipped here, of parameters only the base is set."""
    views = [_View(_as_matrix(upload.arrays[name])) for upload in ordered]
    if spec.clip is None:
        return views
    if name in OUTPUTS:
        norms = np.stack([_row_norms(view) for view in views])
        scales = _shortening(norms, spec.clip)
        return [replace(view, scale=scale) for view, scale in zip(views, scales, strict=True)]
    if previous is not None and name in previous:
        base = _as_matrix(previous[name])
    else:
        base = np.empty_like(views[0].matrix)
        for start, stop, stack in _blocks(views):
            base[start:stop] = np.median(stack, axis=0)
    return [replace(view, base=base) for view in views]


def _with_whole_norm(entries: dict[str, list[_View]], clip: float | str | None) -> dict[str, list[_View]]:
    if clip is None:
        return entries
    squares = np.zeros(len(next(iter(entries.values()))))
    for views in entries.values():
        for index, view in enumerate(views):
            difference = view.matrix.astype(np.float64) - view.base
            squares[index] += np.sum(difference * difference)
    scales = _shortening(np.sqrt(squares), clip)
    return {
        name: [replace(view, scale=float(scale)) for view, scale in zip(views, scales, strict=True)]
        for name, views in entries.items()
    }


def _row_norms(view: _View) -> np.ndarray:
    return np.sqrt(np.sum(np.square(view.matrix.astype(np.float64)), axis=1))


def _shortening(norms: np.ndarray, clip: float | str) -> np.ndarray:
    """1 where a norm is within `clip`, else what brings it there; norms [devices] or [devices, rows]."""
    limit = np.median(norms, axis=0) if clip == "median" else np.float64(clip)
    return np.where(norms > limit, limit / np.maximum(norms, np.maximum(limit, 1e-300)), 1.0)


def _aligned(views: list[_View], previous: np.ndarray | None) -> list[_View]:
    if previous is None:
        target = views[reference_device([view.read for view in views])].read()
    else:
        target = np.asarray(previous, np.float64)
    return [replace(view, motion=find_motion(view.read(), target)) for view in views]


def _as_matrix(array: np.ndarray) -> np.ndarray:
    array = np.asarray(array, np.float32)
    return array.reshape(array.shape[0] if array.ndim else 1, -1) if array.size else array.reshape(0, 1)


def _blocks(views: Sequence[_View]) -> Iterator[tuple[int, int, np.ndarray]]:
    """Start, stop and the rows between of all views [n, stop − start, width]."""
    step = max(1, _BLOCK_VALUES // max(1, len(views) * views[0].width))
    for start in range(0, views[0].rows, step):
        stop = min(start + step, views[0].rows)
        yield start, stop, np.stack([view.read(start, stop) for view in views])


def _weights(
    name: str, ordered: Sequence[Upload], spec: Aggregation, rows: int, labels: np.ndarray | None
) -> np.ndarray:
    """Weight of every device for every row [n, rows]; no device has any where all say 0, so all count alike."""
    samples = _believed(np.array([float(upload.samples) for upload in ordered]))
    if not samples.any():
        samples = np.ones(len(ordered))
    weights = np.broadcast_to(samples[:, None], (len(ordered), rows))
    if spec.rule != "class_mean":
        return weights
    if labels is None or name not in OUTPUTS:
        raise AggregationError(
            f"class_mean cannot weigh {name!r} without the classes of its rows",
            "use a labelled transfer set, or the rule mean",
        )
    labels = np.asarray(labels)
    classes = max((len(upload.class_counts or ()) for upload in ordered), default=0)
    if labels.shape != (rows,) or labels.min(initial=0) < 0:
        raise AggregationError(f"{list(labels.shape)} labels for {rows} rows", "use the task's transfer set")
    counts = np.zeros((len(ordered), max(classes, int(labels.max(initial=0)) + 1)))
    for index, upload in enumerate(ordered):
        shared = upload.class_counts or ()
        if any(not 0 <= count <= _MAX_SAMPLES for count in shared):
            raise AggregationError(f"the class counts of {upload.device} are not counts", "refuse the upload")
        counts[index, : len(shared)] = shared
    counts = np.stack([_believed(column) for column in counts.T], axis=1)
    by_class = counts[:, labels]
    return np.where(by_class.any(axis=0), by_class, weights)


def _believed(claims: np.ndarray) -> np.ndarray:
    """Claims [n], cut to a multiple of the lower median of those above 0: of two, the smaller says what is usual."""
    some = np.sort(claims[claims > 0])
    if not len(some):
        return claims
    return np.minimum(claims, _MOST_OF_MEDIAN * some[(len(some) - 1) // 2])


def _combine(stack: np.ndarray, spec: Aggregation, weights: np.ndarray) -> np.ndarray:
    """Uploads [n, rows, width] and weights [n, rows] to [rows, width]."""
    match spec.rule:
        case "mean" | "class_mean":
            shares = weights / _sum_in_order(weights)
            return _sum_in_order(stack * shares[:, :, None])
        case "median":
            return np.median(stack, axis=0)
        case "trimmed_mean":
            uploads = len(stack)
            cut = min(math.ceil(round(uploads * spec.trim, 9)), (uploads - 1) // 2)
            kept = np.sort(stack, axis=0)[cut : uploads - cut]
            return _sum_in_order(kept) / len(kept)
        case "krum":
            return stack[0]
    raise AggregationError(f"there is no aggregation rule {spec.rule!r}", "see docs/federation.md")


def _sum_in_order(values: np.ndarray) -> np.ndarray:
    """The sum over the first axis, one after another: NumPy's own order depends on the memory's layout."""
    total = values[0].copy()
    for entry in values[1:]:
        total += entry
    return total


def _krum(entries: Mapping[str, list[_View]], hostile: int, uploads: int) -> int:
    """Index of the chosen upload. Source: Blanchard et al. 2017, section 4."""
    neighbours = uploads - hostile - 2
    if neighbours <= hostile:
        raise AggregationError(
            f"Krum needs more than {2 * hostile + 2} uploads to withstand {hostile}, and there are {uploads}",
            "raise the task's minimum, or lower byzantine",
        )
    squares = np.zeros((uploads, uploads))
    for views in entries.values():
        for _, _, stack in _blocks(views):
            # around the median, so that an offset that all share does not cost precision
            block = (stack - np.median(stack, axis=0)).reshape(uploads, -1)
            norms = np.sum(block * block, axis=1)
            squares += np.maximum(norms[:, None] + norms[None, :] - 2.0 * (block @ block.T), 0.0)
    # np.sort puts a device's distance to itself, which is 0, first; the diagonal is rounded to it
    np.fill_diagonal(squares, 0.0)
    nearest = np.sort(squares, axis=1)[:, 1 : neighbours + 1]
    return int(np.argmin(nearest.sum(axis=1)))
