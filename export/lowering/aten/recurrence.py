"""nn.LSTM, nn.GRU and nn.RNN, unrolled: the products with the inputs of all steps are one product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from edgestill.export.lowering.aten.context import ATEN, RANDOM, Context, Refusal, Row
from edgestill.export.lowering.aten.movement import unsqueezed
from edgestill.export.lowering.aten.noise import drop
from edgestill.export.lowering.graph import Value

aten = torch.ops.aten


def _lstm_cell(gates: Value, h: Value, state: Value | None, size: int) -> tuple[Value, Value]:
    inside = gates.narrow(1, 0, 2 * size).apply("sigmoid")
    new = inside.narrow(1, 0, size) * gates.narrow(1, 2 * size, 3 * size).apply("tanh")
    state = new if state is None else inside.narrow(1, size, 2 * size) * state + new
    return gates.narrow(1, 3 * size, 4 * size).apply("sigmoid") * state.apply("tanh"), state


def _gru_step(of_x: Value, of_h: Value, h: Value | None, size: int) -> Value:
    both = (of_x.narrow(1, 0, 2 * size) + of_h.narrow(1, 0, 2 * size)).apply("sigmoid")
    reset, keep = both.narrow(1, 0, size), both.narrow(1, size, 2 * size)
    candidate = (of_x.narrow(1, 2 * size, 3 * size) + reset * of_h.narrow(1, 2 * size, 3 * size)).apply("tanh")
    return candidate - keep * candidate if h is None else (h - candidate) * keep + candidate


def _given(state: Any) -> Value | None:
    """An initial state; None where it is zero."""
    if isinstance(state, torch.Tensor) and not bool(state.any()):
        return None
    return state


def _direction(c: Context, kind: str, xs: Value, weights: Sequence[Any], biased: bool, h: Any, state: Any, back: bool):
    """One layer in one direction over xs [T, B, I]: outputs [T, B, H], the last output, the last cell state."""
    steps, batch = xs.shape[:2]
    into, within, *rest = (c.value(w) for w in weights)
    biases, projection = (rest[:2], rest[2:]) if biased else ([], rest)
    size = within.shape[0] // {"lstm": 4, "gru": 3}.get(kind, 1)
    of_x = xs.reshape(steps * batch, -1) @ into.swap()
    if biased:
        joint = biases[0] if kind == "gru" else biases[0] + biases[1]
        of_x = of_x + joint.reshape(1, -1)
    outputs: list[Value] = []
    for t in reversed(range(steps)) if back else range(steps):
        x = of_x.narrow(0, t * batch, (t + 1) * batch)
        of_h = None if h is None else c.value(h) @ within.swap()
        if kind == "gru":
            of_h = of_h if of_h is not None else c.graph.constant(np.zeros((1, 3 * size)))
            of_h = of_h + biases[1].reshape(1, -1) if biased else of_h
            h = _gru_step(x, of_h, h, size)
        else:
            gates = x if of_h is None else x + of_h
            if kind == "lstm":
                h, state = _lstm_cell(gates, h, state, size)
                h = h @ projection[0].swap() if projection else h
            else:
                h = gates.apply(kind)
        outputs.append(h)
    ordered = outputs[::-1] if back else outputs
    return c.graph.apply("concat", *ordered, axis=0).reshape(steps, batch, -1), h, state


def _recurrent(kind: str) -> Row:
    def rule(c: Context, x, hidden, weights, biased, layers, dropout, train, bidirectional, batch_first):
        xs = c.value(x)
        if xs.rank != 3:
            raise Refusal(f"nn.{kind.upper()} without a batch", hint="give it [batch, time, features]")
        xs = xs.transpose(1, 0, 2) if batch_first else xs
        states = list(hidden) if isinstance(hidden, list | tuple) else [hidden]
        directions = 2 if bidirectional else 1
        each = len(weights) // (layers * directions)
        last: list[list[Value]] = [[], []]
        for layer in range(layers):
            parts = []
            for direction in range(directions):
                i = layer * directions + direction
                starts = [_given(_row_of(state, i)) for state in states] + [None]
                y, h, cell = _direction(
                    c, kind, xs, weights[i * each : (i + 1) * each], biased, starts[0], starts[1], direction == 1
                )
                parts.append(y)
                last[0].append(h)
                last[1].append(cell)
            xs = c.graph.apply("concat", *parts, axis=2)
            if dropout and train and layer < layers - 1:
                xs = drop(c, xs, dropout, True)[0]
        ends = [
            c.graph.apply("concat", *(unsqueezed(value, 0) for value in side), axis=0)
            for side in last
            if side[0] is not None
        ]
        return (xs.transpose(1, 0, 2) if batch_first else xs, *ends)

    return rule


def _row_of(state: Any, i: int) -> Any:
    return state[i] if isinstance(state, torch.Tensor) else state.narrow(0, i, i + 1).reshape(*state.shape[1:])


_RECURRENT = {aten.lstm.input: "lstm", aten.gru.input: "gru", aten.rnn_tanh.input: "tanh", aten.rnn_relu.input: "relu"}
ATEN |= {overload: _recurrent(kind) for overload, kind in _RECURRENT.items()}
RANDOM.update(_RECURRENT)  # in place: `|=` with keys would make another set
