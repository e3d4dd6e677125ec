"""Sliding windows over images from contiguous slices, padding, products of masks and sums alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import reduce
from itertools import product
from operator import add

from edgestill.export.lowering.graph import Value
from edgestill.export.lowering.operators import LOWEST
from edgestill.export.lowering.rewrite import pull_back

Pair = tuple[int, int]
NONE = ((0, 0), (0, 0))
CHANNELS_FIRST, CHANNELS_LAST = (2, 3), (1, 2)


def total(parts: list[Value]) -> Value:
    return reduce(add, parts)


def phase(x: Value, axis: int, first: int, step: int) -> Value:
    """Entries first, first + step, … of an axis, `first` being less than `step`: of rows of `step` one slice."""
    if step == 1:
        return x
    missing = -x.shape[axis] % step
    x = x.pad([0] * x.rank, [missing if i == axis else 0 for i in range(x.rank)])
    before, rows, behind = x.shape[:axis], x.shape[axis] // step, x.shape[axis + 1 :]
    after = math.prod(behind)
    if after == 1:  # a pass that turns is quicker than one that picks single entries
        x = x.reshape(-1, step).transpose(1, 0).narrow(0, first, first + 1)
    else:
        x = x.reshape(*before, rows, step * after).narrow(axis + 1, first * after, (first + 1) * after)
    return x.reshape(*before, rows, *behind)


def strided(x: Value, axis: int, start: int, count: int, step: int) -> Value:
    """Entries start, start + step, … of an axis, from contiguous slices."""
    start, first = divmod(start, step)
    return phase(x, axis, first, step).narrow(axis, start, start + count)


class Windows:
    """The sliding windows over the two axes of images [N, C, H, W] or [N, H, W, C]."""

    def __init__(
        self, x: Value, axes: Pair, kernel: Pair, stride: Pair, padding: tuple[Pair, Pair], dilation: Pair = (1, 1),
        fill: float = 0.0,
    ):  # fmt: skip
        self.axes, self.kernel, self.stride, self.dilation = axes, kernel, stride, dilation
        begins, ends, self.size = [0] * 4, [0] * 4, ()
        for axis, k, step, sides, gap in zip(axes, kernel, stride, padding, dilation, strict=True):
            size, reach = x.shape[axis], gap * (k - 1) + 1
            count = (size + sum(sides) - reach) // step + 1
            whole = max(size + sides[0], (count - 1) * step + reach)
            begins[axis], ends[axis] = sides[0], whole + -whole % step - size - sides[0]
            self.size += (count,)
        self.padded = x.pad(begins, ends, fill)

    def along(self, x: Value, i: int) -> list[Value]:
        """For each place along one side of the kernel what the windows have there of x, padded as `padded` is."""
        places = (k * self.dilation[i] for k in range(self.kernel[i]))
        return [strided(x, self.axes[i], place, self.size[i], self.stride[i]) for place in places]

    def cut(self) -> list[Value]:
        """For each place of the kernel, row by row, what the windows have there: images of their number."""
        parts = []
        for place in product(*map(range, self.kernel)):
            part, starts = self.padded, []
            for axis, k, gap, step in zip(self.axes, place, self.dilation, self.stride, strict=True):
                start, first = divmod(k * gap, step)
                part, starts = phase(part, axis, first, step), [*starts, start]
            for axis, start, count in zip(self.axes, starts, self.size, strict=True):
                part = part.narrow(axis, start, start + count)
            parts.append(part)
        return parts


def by_axis(a: dict) -> Iterator[dict]:
    """The attributes of a pooling along the rows, and of one along the columns."""
    for i in (1, 0):
        alone = {"kernel": (1, 1), "stride": (1, 1), "padding": NONE, "dilation": (1, 1)}
        yield {key: (value[0], a[key][1]) if i else (a[key][0], value[1]) for key, value in alone.items()}


def _places(x: Value, axes: Pair, a: dict) -> list[Value]:
    return Windows(x, axes, **a, fill=LOWEST if any(map(any, a["padding"])) else 0.0).cut()


def largest(x: Value, axes: Pair, a: dict) -> Value:
    """Max pooling."""
    return reduce(lambda left, right: left.apply("maximum", right), _places(x, axes, a))


def to_largest(dy: Value, x: Value, y: Value, axes: Pair, a: dict) -> Value:
    """The gradient of max pooling, whose value is y: to the first largest pixel of a window alone, as in PyTorch. After
    ReLU, ties are common."""
    left, kept = dy, []
    for place in _places(x, axes, a)[:-1]:
        passed_on = left.apply("masked", y.apply("greater", place))
        kept.append(left - passed_on)
        left = passed_on
    return pull_back(lambda x: _places(x, axes, a), [*kept, left], [x])[0]
