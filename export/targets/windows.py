"""Sliding windows over images [N, H, W, C] from reshape, contiguous slices, padding and sums alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np

from edgestill.export.lowering.graph import Value

Pair = tuple[int, int]


def concat(parts: Sequence[Value], axis: int) -> Value:
    return parts[0] if len(parts) == 1 else parts[0].graph.apply("concat", *parts, axis=axis)


def total(parts: Sequence[Value]) -> Value:
    return reduce(lambda a, b: a + b, parts)


def pad(x: Value, height: Pair, width: Pair, value: float = 0.0) -> Value:
    if not any(height) and not any(width):
        return x
    return x.pad((0, height[0], width[0], 0), (0, height[1], width[1], 0), value)


class Windows:
    """The sliding windows over images [N, H, W, C]: cut out as one tensor a window position, and summed back.

    With a stride the padded image is split into phases (row and column remainders) by reshape and slice, in each of
    which a window position is a contiguous slice.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        kernel: Pair,
        stride: Pair,
        padding: tuple[Pair, Pair],
        dilation: Pair = (1, 1),
    ):
        self.shape, self.kernel, self.stride, self.dilation = shape, kernel, stride, dilation
        self.padding, self.after = tuple(side[0] for side in padding), tuple(side[1] for side in padding)
        self.size = tuple(
            (shape[1 + i] + sum(padding[i]) - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
            for i in range(2)
        )
        reach = [dilation[i] * (kernel[i] - 1) // stride[i] + self.size[i] for i in range(2)]
        self.grid = tuple(max(reach[i], -(-(shape[1 + i] + self.padding[i]) // stride[i])) for i in range(2))

    def _offsets(self):
        """Row-major over the kernel: (phase, start within the phase) of each axis."""
        for i in range(self.kernel[0]):
            for j in range(self.kernel[1]):
                at = (i * self.dilation[0], j * self.dilation[1])
                yield [(at[k] % self.stride[k], at[k] // self.stride[k]) for k in range(2)]

    def cut(self, x: Value, fill: float = 0.0) -> list[Value]:
        """Row-major over the kernel, each [N, oh, ow, C]."""
        ends = [self.grid[i] * self.stride[i] - self.shape[1 + i] - self.padding[i] for i in range(2)]
        x = pad(x, (self.padding[0], max(ends[0], 0)), (self.padding[1], max(ends[1], 0)), fill)
        parts = []
        for (phase_h, top), (phase_w, left) in self._offsets():
            phase = self._phase(x, phase_h, phase_w)
            parts.append(phase.narrow(1, top, top + self.size[0]).narrow(2, left, left + self.size[1]))
        return parts

    def _phase(self, x: Value, phase_h: int, phase_w: int) -> Value:
        if self.stride == (1, 1):
            return x
        n, _, _, c = x.shape
        x = x.reshape(n, self.grid[0], self.stride[0], -1).narrow(2, phase_h, phase_h + 1)
        x = x.reshape(n, self.grid[0], self.grid[1], -1)
        return x.narrow(3, phase_w * c, (phase_w + 1) * c)

    def sum_back(self, parts: Sequence[Value]) -> Value:
        """The adjoint of `cut`: parts summed into images of the original shape."""
        if self.stride == (1, 1):
            return self._sum_shifted(parts)
        phases: dict[Pair, list[Value]] = {}
        for part, ((phase_h, top), (phase_w, left)) in zip(parts, self._offsets(), strict=True):
            height = (top, self.grid[0] - top - self.size[0])
            width = (left, self.grid[1] - left - self.size[1])
            phases.setdefault((phase_h, phase_w), []).append(pad(part, height, width))
        graph, (n, _, _, c) = parts[0].graph, self.shape
        zero = graph.constant(np.zeros((n, *self.grid, c)))
        # A row of phases that no window reaches is one constant: engines do not delegate a concatenation of constants.
        zero_row = graph.constant(np.zeros((n, self.grid[0], 1, self.grid[1] * self.stride[1] * c)))
        rows = []
        for phase_h in range(self.stride[0]):
            columns = [
                total(phases[phase_h, w]) if (phase_h, w) in phases else zero for w in range(self.stride[1])
            ]
            reached = any(column is not zero for column in columns)
            rows.append(concat(columns, 3).reshape(n, self.grid[0], 1, -1) if reached else zero_row)
        whole = concat(rows, 2).reshape(n, self.grid[0] * self.stride[0], self.grid[1] * self.stride[1], c)
        missing = [max(self.padding[i] + self.shape[1 + i] - whole.shape[1 + i], 0) for i in range(2)]
        whole = pad(whole, (0, missing[0]), (0, missing[1]))
        for i in range(2):
            whole = whole.narrow(1 + i, self.padding[i], self.padding[i] + self.shape[1 + i])
        return whole

    def _sum_shifted(self, parts: Sequence[Value]) -> Value:
        """Stride 1: the parts of each kernel row shifted along the width and summed, then the rows along the height."""
        kernel_h, kernel_w = self.kernel
        rows = []
        for i in range(kernel_h):
            row = [
                _shift(parts[i * kernel_w + j], 2, j * self.dilation[1] - self.padding[1], self.shape[2])
                for j in range(kernel_w)
            ]
            row = [part for part in row if part is not None]
            offset = i * self.dilation[0] - self.padding[0]
            rows.append(_shift(total(row), 1, offset, self.shape[1]) if row else None)
        rows = [row for row in rows if row is not None]
        return total(rows) if rows else parts[0].graph.constant(np.zeros(self.shape))


def _shift(x: Value, axis: int, offset: int, size: int) -> Value | None:
    """x moved by `offset` along its height (axis 1) or width (2) into `size`: the outside is cut, the rest zero; None
    where nothing is left inside."""
    start, stop = max(0, -offset), min(x.shape[axis], size - offset)
    if start >= stop:
        return None
    x = x.narrow(axis, start, stop)
    edges = (offset + start, size - offset - stop)
    return pad(x, edges, (0, 0)) if axis == 1 else pad(x, (0, 0), edges)
