"""Plans that once made libedgestill leave its memory, run for ever or do what C does not define.

Each is a plan made anew and then changed, so that it means the same when the words of a kernel's call change.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from edgestill.export.lowering.gradient import gradients
from edgestill.export.lowering.graph import Graph
from edgestill.export.targets import native
from edgestill.export.targets.native_plan import KERNELS
from edgestill.runtime.engines import native as native_engine

HUGE = 2**63 - 1
NO_BASE = 2**40
HEAD_WORDS, BODY = 8, 10
"""Of a plan, and of a program before its loads."""


@dataclass
class Call:
    kernel: str
    words: list[int]


class Words:
    """A plan in pieces that can be changed."""

    def __init__(self, plan: bytes):
        self.head = list(struct.unpack_from(f"<{HEAD_WORDS}q", plan))
        words = struct.unpack_from(f"<{self.head[7]}q", plan)
        place = HEAD_WORDS + 2 * self.head[2]
        self.memories = list(words[HEAD_WORDS:place])
        self.constants = plan[8 * self.head[7] :]
        self.calls: list[Call] = []
        for _ in range(self.head[5]):
            stop = place + 2 + words[place + 1]
            self.calls.append(Call(KERNELS[words[place]], list(words[place + 2 : stop])))
            place = stop

    def call(self, kernel: str, of: Callable[[list[int]], bool] = lambda words: True) -> list[int]:
        """The words of the first call of a kernel for which `of` holds."""
        return next(call.words for call in self.calls if call.kernel == kernel and of(call.words))

    def to_bytes(self) -> bytes:
        body = [
            word for call in self.calls for word in (KERNELS.index(call.kernel), len(call.words), *call.words)
        ]
        head = [*self.head]
        head[2], head[5], head[7] = (
            len(self.memories) // 2,
            len(self.calls),
            8 + len(self.memories) + len(body),
        )
        words = [*head, *self.memories, *body]
        return struct.pack(f"<{len(words)}q", *words) + self.constants


def check_plan(plan: bytes) -> str | None:
    """What the library says against a plan, if anything."""
    memory = np.zeros(len(plan) // 8 + 1, np.int64)
    memory.view(np.uint8)[: len(plan)] = np.frombuffer(plan, np.uint8)
    call = ctypes.c_int64()
    wrong = native_engine._library().edgestill_check(memory.ctypes.data, len(plan), ctypes.byref(call))
    return wrong and wrong.decode()


def hostile_plans() -> Iterator[tuple[str, bytes, str | None]]:
    """Name, plan, and why it is refused; None where it runs and does no harm."""

    def changed(plan: bytes, kernel: str, place: int, value: int, of=lambda words: True) -> bytes:
        words = Words(plan)
        words.call(kernel, of)[place] = value
        return words.to_bytes()

    # numbers of parts that overflow: partial results of no bytes
    yield "conv-grad-images", changed(_convolution(8, 12, 2), "conv_grad", -1, HUGE), "a part holds no image"
    plan = changed(_convolution(20, 20, 20), "depthwise", -1, HUGE, lambda words: words[-2] == 2)
    yield "depthwise-images", plan, "a depthwise convolution is none"
    plan = _plan(lambda x, y: x.apply("matmul", y), (5, 33), (33, 17))
    yield "product-panels", changed(plan, "product", -2, HUGE), "a product has an empty side"

    # operands that a kernel does not use
    graph = Graph()
    graph.output("y", graph.input("x", (6,), "int64").apply("one_hot", classes=5))
    yield "one-hot-base", changed(_bytes(graph), "index", 0, NO_BASE), None
    window = {"kernel": (2, 2), "stride": (2, 2), "padding": ((0, 0), (0, 0))}
    graph = Graph()
    x = graph.input("x", (2, 3, 4, 4))
    y = x.apply("avg_pool2d", **window)
    graph.output("gradient.x", gradients(graph, (y * y).sum(0, 1, 2, 3).reshape(1), [x])["x"])
    plan = changed(_bytes(graph), "pool", 0, NO_BASE, lambda words: words[-2] == 3)
    yield "pool-mean-gradient-base", plan, "an operand names no memory"
    for place in (2, 6):  # below zero: there is none
        yield f"pool-no-base-{place}", changed(_bytes(graph), "pool", place, -NO_BASE), None

    # sizes that multiply with nothing
    plan = _plan(lambda x: x.apply("tanh"), (4, 9))
    yield "map-columns", changed(plan, "map", 9, HUGE), "a program is too long"
    words = Words(_plan(lambda x: x.apply("reduce_max", axes=(0,)), (4, 12)))
    words.call("reduce")[7:9] = 0, HUGE
    yield "reduce-outer", words.to_bytes(), "nothing is reduced"

    # ∞ and NaN as an exponent
    for name, bits in (("nan", 0x7FC00000), ("infinite", 0x7F800000)):
        words = Words(_plan(lambda x: x.apply("power", exponent=1.7), (36,)))
        program = words.call("map")
        program[BODY + 9 * program[5] + 5] = bits
        yield f"power-{name}", words.to_bytes(), None

    # scratch of which the second thread's would not be aligned
    words = Words(_convolution(8, 12, 2))
    words.head[4] += 8
    yield "scratch-not-aligned", words.to_bytes(), "the plan's head is out of range"

    # a call at the end of the file that has no words
    words = Words(plan)
    words.calls, words.constants, words.head[6] = [Call("copy", [])], b"", 0
    yield "copy-cut-off", words.to_bytes(), "a call has another number of words than its kernel takes"

    # work without end in no memory
    words = Words(_plan(lambda x: x.reshape(6, 6).apply("transpose", permutation=(1, 0)), (36,)))
    copied = words.call("copy")
    copied[8:] = [2**30, 1, 1, 1, 1, 1, *[0] * 12]
    yield "copy-without-end", words.to_bytes(), "a copy moves more than its result holds"
    words = Words(plan)
    words.calls = [Call("map", [2**40, 1, 1, 1, 2**40, *[0] * 4, 1])]
    yield "program-without-result", words.to_bytes(), "a program makes nothing"

    # results in runs: over one another, which no memory bounds, of no whole runs, and beyond their memory
    for run, (why, *changed_words) in enumerate((
        ("a program's results overlap", 1, 0, 1),
        ("a program's results overlap", 0, 36, 1),
        ("a program's results overlap", 5, 36, 1),
        ("a program's results overlap", 6, 11, 2 + 1),
        ("an operand reaches beyond its memory", 6, 7, 1),
        ("an operand reaches beyond its memory", 36, 0, 2),
        ("a program's results overlap", 6, -7, 1),
        ("a size is out of range", 36, 0, 2**40),
    )):  # fmt: skip
        words = Words(_plan(lambda x: x.apply("tanh"), (36,)))
        program = words.call("map")
        place = BODY + 9 * program[5] + 6 * program[6] + 3
        program[place : place + 3] = changed_words
        yield f"program-runs-{run}", words.to_bytes(), why


def _bytes(graph: Graph) -> bytes:
    return native.make_plan(native.lower(graph)).to_bytes()


def _plan(make: Callable, *shapes: tuple[int, ...]) -> bytes:
    graph = Graph()
    graph.output("made", make(*(graph.input(f"x{i}", shape) for i, shape in enumerate(shapes))))
    return _bytes(graph)


def _convolution(channels: int, outputs: int, groups: int) -> bytes:
    graph = Graph()
    x, w = graph.input("x", (5, channels, 6, 6)), graph.input("w", (outputs, channels // groups, 3, 3))
    pads = ((1, 1), (1, 1))
    y = x.apply("conv2d", w, stride=(1, 1), padding=pads, dilation=(1, 1), groups=groups).apply("tanh")
    graph.output("gradient.w", gradients(graph, (y * y).sum(0, 1, 2, 3).reshape(1), [w])["w"])
    return _bytes(graph)
