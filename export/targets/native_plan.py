"""A plan: kernel calls in their order, and where each value lies in one arena.

The words of a call are explained beside its kernel (edge_runtime/native/library/kernels.c).
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from edgestill.export.lowering.graph import Graph, LoweringError, Value
from edgestill.export.targets.native_fusion import Fusion
from edgestill.runtime.native.plan_work import KERNELS, MAGIC, VERSION

ALIGNMENT = 64
RANK = 6
"""The most axes that a copy goes through."""
ITEM_BYTES = {"float32": 4, "int64": 8, "uint8": 1}


@dataclass(frozen=True)
class View:
    """A tensor in place: where its first element lies and how far apart its elements are, counted in elements."""

    base: str  # the value whose memory it is
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def dense(self) -> bool:
        return joint_axes(self.shape, self.strides) == joint_axes(self.shape, dense_strides(self.shape))


@dataclass(frozen=True)
class Unpooled:
    """The gradient of a pooling whose windows lie side by side, not in memory: read from dy and the winners."""

    value: Value
    dy: View
    winners: View
    sizes: tuple[int, int, int, int]  # channels, width, height and width of a window

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape


@dataclass
class Call:
    """A kernel call. Arguments are words, or a view (base and offset, filled in when places are known)."""

    kernel: str
    arguments: list[int | View | None]
    reads: list[str]
    writes: list[str]
    what: str
    over: list[tuple[str, str]] = field(default_factory=list)
    """What it reads, and what may be written over it, element by element."""


def dense_strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def bits_of(number: float) -> int:
    return struct.unpack("<i", struct.pack("<f", number))[0]


class Plan:
    """The plan of a graph. Bases: the arena, the constants, then the graph's inputs and outputs in their order."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.calls: list[Call] = []
        self.views: dict[str, View] = {}
        self.sizes: dict[str, int] = {}  # bytes in the arena, by name
        self.outside: dict[str, int] = {}  # base of what is not in the arena
        self.constants: dict[str, tuple[int, np.ndarray]] = {}
        self.constant_bytes = self.scratch = 0
        self.named = 0
        self.fusion = Fusion(graph)
        self.loose: set[str] = set()  # what others than programs read
        self.direct: dict[str, View] = {}  # where a value is wanted outside
        self.parts = self.fusion.parts()
        self.wholes: dict[str, View] = {}  # what has such parts, by name
        self.packed: dict[tuple[View, int], View] = {}  # right sides of products, as kernels read them
        self.unpooled: dict[str, Unpooled] = {}
        self.winners: dict[str, View] = {}  # of each pooling, by its result

    # --- values ------------------------------------------------------------------------------------------------------
    def view(self, value: Value) -> View:
        """Where a value is, as its producer left it."""
        if value.name not in self.views:
            if value.constant is None:
                raise KeyError(value.name)
            array = np.ascontiguousarray(value.constant)
            self.constants[value.name] = (self.constant_bytes, array)
            self.constant_bytes += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
            self.views[value.name] = View(value.name, value.dtype, value.shape, dense_strides(value.shape))
        return self.views[value.name]

    def dense(self, value: Value) -> View:
        """Where a value lies end to end; copied there where it does not."""
        view = self.view(value)
        if not view.dense:
            view = self.views[value.name] = self.copied(view, "transpose")
        return View(view.base, view.dtype, value.shape, dense_strides(value.shape), view.offset)

    def copied(self, view: View, what: str) -> View:
        """End to end, elsewhere."""
        to = self.new(view.shape, view.dtype)
        self.copy(view, to, what)
        return to

    def new(self, shape: Sequence[int], dtype: str = "float32") -> View:
        self.named += 1
        name = f"memory {self.named}"
        self.sizes[name] = max(math.prod(shape), 1) * ITEM_BYTES[dtype]
        return View(name, dtype, tuple(shape), dense_strides(shape))

    def result(self, value: Value, runs: bool = False) -> View:
        """Memory for a value: the output's that it is, a part of what is joined of it, or the arena's. End to end, or,
        where the kernel can write so, in `runs` of elements that are equally far apart."""
        view = self.direct.get(value.name) or self._part(value)
        if view is None or not (view.dense or (runs and runs_of(view))):
            view = self.new(value.shape, value.dtype)
        self.views[value.name] = view
        return view

    def _part(self, value: Value) -> View | None:
        if value.name not in self.parts:
            return None
        part, start, axis, whole = self.parts[value.name]
        to = self.whole(whole)
        strides = reshaped(part.shape, to.strides, value.shape)
        return strides and View(to.base, to.dtype, value.shape, strides, to.offset + start * to.strides[axis])

    def whole(self, value: Value) -> View:
        """Where what is joined lies; its parts may be there before."""
        if value.name not in self.wholes:
            part = self._part(value)
            self.wholes[value.name] = self.direct.get(value.name) or part or self.new(value.shape, value.dtype)
        return self.wholes[value.name]

    def side_by_side(self, value: Value, axis: int, parts: Sequence[Value]) -> View | None:
        """The whole where its parts lie already, unless it is wanted elsewhere."""
        first = self.view(parts[0])
        if value.name in self.wholes or value.name in self.direct or len(parts) < 2:
            return None
        apart, rest = divmod(self.view(parts[1]).offset - first.offset, parts[0].shape[axis])
        strides = (*first.strides[:axis], apart, *first.strides[axis + 1 :])
        whole, start = View(first.base, first.dtype, value.shape, strides, first.offset), 0
        for part in parts:
            place = View(first.base, first.dtype, part.shape, strides, first.offset + start * apart)
            if rest or apart <= 0 or not same_place(self.view(part), place):
                return None
            start += part.shape[axis]
        return whole

    def call(
        self, kernel: str, what: str, reads: Iterable[View], writes: Iterable[View], arguments: list,
        over: Sequence[tuple[View, View]] = (),
    ) -> None:  # fmt: skip
        """`over`: views of the same elements in the same order; the second may be written where the first lies."""
        reads, writes = [v.base for v in reads], [v.base for v in writes]
        alone = [(a.base, b.base) for a, b in over if reads.count(a.base) == 1]
        self.calls.append(Call(kernel, arguments, reads, writes, what, alone))

    def copy(self, source: View, to: View, what: str, fill: float | None = None, filled: View | None = None) -> None:
        item = ITEM_BYTES[source.dtype]
        axes = joint_axes(source.shape, source.strides, to.strides)
        if len(axes) > RANK and fill is None:  # along the shortest axis, one after the other
            axis = min((i for i, size in enumerate(source.shape) if size > 1), key=lambda i: source.shape[i])
            for i in range(source.shape[axis]):
                self.copy(_at(source, axis, i), _at(to, axis, i), what)
            return
        if len(axes) > RANK:
            raise LoweringError(f"a {what} of {len(axes)} axes is more than the engine native copies at once")
        axes = _as_copied(axes)
        count = 0 if fill is None else math.prod(filled.shape)
        bits = 0 if fill is None else (bits_of(fill) if source.dtype == "float32" else int(fill))
        words = [source, to, item, bits, count, len(axes)]
        for i in range(3):
            words += [axis[i] * (item if i else 1) for axis in axes]
        if fill is not None:  # the filled whole begins where the copied part's memory does
            nothing = [*[1] * RANK, *[0] * 2 * RANK]
            self.call("copy", what, [], [filled], [filled, filled, item, bits, count, RANK, *nothing])
            words[4] = 0
        self.call("copy", what, [source], [to], words)

    # --- places ------------------------------------------------------------------------------------------------------
    def place(self) -> None:
        """Offsets in the arena: each value at the lowest place that is free from its first use to its last."""
        home = self._overwritten()
        first: dict[str, int] = {}
        last: dict[str, int] = {}
        for i, call in enumerate(self.calls):
            for name in (*call.reads, *call.writes):
                first.setdefault(home.get(name, name), i)
                last[home.get(name, name)] = i
        self.offsets: dict[str, int] = {}
        taken: list[tuple[int, int, int, int]] = []
        order = sorted((name for name in self.sizes if name in first), key=lambda n: (-self.sizes[n], first[n]))
        end = 0
        for name in order:
            size = -(-self.sizes[name] // ALIGNMENT) * ALIGNMENT
            overlapping = sorted(
                (start, stop) for start, stop, begin, until in taken if begin <= last[name] and until >= first[name]
            )
            place = 0
            for start, stop in overlapping:
                if start - place >= size:
                    break
                place = max(place, stop)
            self.offsets[name] = place
            taken.append((place, place + size, first[name], last[name]))
            end = max(end, place + size)
        self.offsets.update((name, self.offsets[there]) for name, there in home.items())
        self.arena_bytes = end
        self.scratch = -(-self.scratch // ALIGNMENT) * ALIGNMENT

    def _overwritten(self) -> dict[str, str]:
        """Values that are written over what a call reads for the last time: whose memory they take, by name."""
        first: dict[str, int] = {}
        last: dict[str, int] = {}
        for i, call in enumerate(self.calls):
            first.update((name, i) for name in call.writes if name not in first)
            last.update((name, i) for name in (*call.reads, *call.writes))
        home: dict[str, str] = {}
        for i, call in enumerate(self.calls):
            for name, to in call.over:
                there = home.get(name, name)
                fits = name in self.sizes and self.sizes[name] == self.sizes.get(to)
                if fits and to not in home and last[there] == i == first[to]:
                    home[to] = there
                    last[there] = last[to]
        return home

    def _word(self, argument: int | View | None) -> list[int]:
        if argument is None:
            return [-1, 0]
        if isinstance(argument, View):
            offset = argument.offset * ITEM_BYTES[argument.dtype]
            if argument.base in self.outside:
                return [self.outside[argument.base], offset]
            if argument.base in self.constants:
                return [1, self.constants[argument.base][0] + offset]
            return [0, self.offsets[argument.base] + offset]
        return [int(argument)]

    def to_bytes(self) -> bytes:
        graph = self.graph
        bases = [(self.arena_bytes, 1), (self.constant_bytes, 0)]
        bases += [(value.size * ITEM_BYTES[value.dtype], 0) for value in graph.inputs]
        bases += [(value.size * ITEM_BYTES[value.dtype], 1) for value in graph.outputs.values()]
        words: list[int] = []
        for call in self.calls:
            body = [word for argument in call.arguments for word in self._word(argument)]
            words += [KERNELS.index(call.kernel), len(body), *body]
        head = [MAGIC, VERSION, len(bases), self.arena_bytes, self.scratch, len(self.calls), self.constant_bytes, 0]
        head += [word for base in bases for word in base]
        head[7] = len(head) + len(words)
        constants = bytearray(self.constant_bytes)
        for offset, array in self.constants.values():
            constants[offset : offset + array.nbytes] = array.tobytes()
        return struct.pack(f"<{head[7]}q", *head, *words) + bytes(constants)

    def kernels(self) -> dict[str, int]:
        return dict(sorted(Counter(call.kernel for call in self.calls).items()))


def same_place(view: View, other: View) -> bool:
    """Whether two views of a shape are the same elements in the same order."""
    if (view.base, view.dtype, view.offset, view.shape) != (other.base, other.dtype, other.offset, other.shape):
        return False
    return all(a == b or n == 1 for n, a, b in zip(view.shape, view.strides, other.strides, strict=True))


def _at(view: View, axis: int, index: int) -> View:
    """What lies at an index of an axis, which stays."""
    shape = (*view.shape[:axis], 1, *view.shape[axis + 1 :])
    return View(view.base, view.dtype, shape, view.strides, view.offset + index * view.strides[axis])


def runs_of(view: View) -> tuple[int, int, int] | None:
    """Elements of a run, from one run to the next, and from one element to the next; None where a place is not of
    runs that follow one another."""
    axes = joint_axes(view.shape, view.strides) or [(1, 1)]
    (size, step), (runs, pitch) = axes[-1], axes[0] if len(axes) == 2 else (1, 0)
    fits = len(axes) <= 2 and step > 0 and (runs == 1 or pitch > (size - 1) * step)
    return (size, pitch, step) if fits else None


def reshaped(shape: Sequence[int], strides: Sequence[int], new: Sequence[int]) -> tuple[int, ...] | None:
    """The strides of the same memory in another shape; None where that cannot be said."""
    axes = joint_axes(shape, strides)
    result: list[int] = []
    rest = axes.pop() if axes else (1, 1)
    for size in reversed(new):
        if size == 1:
            result.append(0)
            continue
        if rest[0] == 1:
            if not axes:
                return None
            rest = axes.pop()
        if rest[0] % size:
            return None
        result.append(rest[1])
        rest = (rest[0] // size, rest[1] * size)
    return tuple(result[::-1])


def _as_copied(axes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Axes (size, stride from, stride to) in the order of a copy's words: first the one that threads share, last the
    one along which the result lies end to end, before that, where it is another, the one along which the source does.
    """
    axes = axes or [(1, 0, 0)]
    last = axes[-1]
    others = axes[:-1]
    unit = next((axis for axis in others if axis[1] == 1 and last[1] != 1), None)
    if unit:
        others.remove(unit)
    if not others:  # threads share parts of an axis
        whole = unit or last
        parts = next((n for n in (32, 24, 16, 12, 8, 6, 4, 3, 2) if whole[0] % n == 0 and whole[0] // n >= 16), 1)
        others = [(parts, *(whole[0] // parts * stride for stride in whole[1:]))]
        whole = (whole[0] // parts, *whole[1:])
        unit, last = (whole, last) if unit else (None, whole)
    shared = max(others, key=lambda axis: axis[0], default=(1, 0, 0))
    rest = [axis for axis in others if axis is not shared]
    if unit is None:
        rest, unit = rest[:-1], rest[-1] if rest else (1, 0, 0)
    return [shared, *[(1, 0, 0)] * (RANK - 3 - len(rest)), *rest, unit, last]


def joint_axes(shape: Sequence[int], *strides: Sequence[int]) -> list[tuple[int, ...]]:
    """(size, stride of each) of the axes that matter, neighbours joined where they lie end to end in all."""
    axes: list[tuple[int, ...]] = []
    for size, *apart in zip(shape, *strides, strict=True):
        if size == 1:
            continue
        if axes and all(outer == size * inner for outer, inner in zip(axes[-1][1:], apart, strict=True)):
            axes[-1] = (axes[-1][0] * size, *apart)
        else:
            axes.append((size, *apart))
    return axes


def broadcast(plan: Plan, value: Value, shape: tuple[int, ...]) -> View:
    """The value repeated to a shape, in place."""
    view = plan.view(value)
    extra = len(shape) - len(view.shape)
    strides = [0] * extra + [s if n > 1 else 0 for n, s in zip(view.shape, view.strides, strict=True)]
    return View(view.base, view.dtype, shape, tuple(strides), view.offset)
