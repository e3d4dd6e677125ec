"""nn.LSTM, nn.GRU and nn.RNN, unrolled: the products with the inputs of all steps are one product."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgestill.export.lowering.aten.context import Context, Refusal, Row, rows
from edgestill.export.lowering.aten.noise import drop
from edgestill.export.lowering.graph import Value


def _lstm_cell(gates: Value, state: Value | None, size: int) -> tuple[Value, Value]:
    let, keep, new, show = _gates(gates, size)
    new = let.apply("sigmoid") * new.apply("tanh")
    state = new if state is None else keep.apply("sigmoid") * state + new
    return show.apply("sigmoid") * state.apply("tanh"), state


def _gru_cell(of_x: Value, of_h: Value, h: Value | None, size: int) -> Value:
    (reset, keep, new), (reset_h, keep_h, new_h) = _gates(of_x, size), _gates(of_h, size)
    keep = (keep + keep_h).apply("sigmoid")
    candidate = (new + (reset + reset_h).apply("sigmoid") * new_h).apply("tanh")
    return candidate - keep * candidate if h is None else (h - candidate) * keep + candidate


def _gates(whole: Value, size: int) -> list[Value]:
    """All of one shape, so that a cell's elementwise operators can be one program."""
    return [whole.narrow(1, start, start + size) for start in range(0, whole.shape[1], size)]


def _direction(
    kind: str, xs: Value, weights: Sequence[Value], biased: bool, h: Value | None, state: Value | None, back: bool
) -> tuple[Value, Value, Value | None]:
    """One layer in one direction over xs [T, B, I]: outputs [T, B, H], the last output, the last cell state."""
    steps, batch = xs.shape[:2]
    into, within, *rest = weights
    biases, projection = (rest[:2], rest[2:]) if biased else ([], rest)
    size = within.shape[0] // {"lstm": 4, "gru": 3}.get(kind, 1)
    of_x = xs.reshape(steps * batch, -1) @ into.swap()
    if biased:
        joint = biases[0] if kind == "gru" else biases[0] + biases[1]
        of_x = of_x + joint.reshape(1, -1)
    outputs: list[Value] = []
    for t in reversed(range(steps)) if back else range(steps):
        gates = of_x.narrow(0, t * batch, (t + 1) * batch)
        of_h = None if h is None else h @ within.swap()
        if kind == "gru":
            of_h = of_h or xs.graph.constant(np.zeros((1, 3 * size)))
            h = _gru_cell(gates, of_h + biases[1].reshape(1, -1) if biased else of_h, h, size)
        else:
            gates = gates if of_h is None else gates + of_h
            h, state = _lstm_cell(gates, state, size) if kind == "lstm" else (gates.apply(kind), None)
            h = h @ projection[0].swap() if projection else h
        outputs.append(h)
    return xs.graph.apply("concat", *outputs[:: -1 if back else 1], axis=0).reshape(steps, batch, -1), h, state


def _recurrent(kind: str) -> Row:
    def rule(c: Context, xs, hidden, weights, biased, layers, dropout, train, bidirectional, batch_first):
        if xs.rank != 3:
            raise Refusal(f"nn.{kind.upper()} without a batch", hint="give it [batch, time, features]")
        xs = xs.transpose(1, 0, 2) if batch_first else xs
        states = hidden if isinstance(hidden, list | tuple) else [hidden]
        directions = 2 if bidirectional else 1
        each = len(weights) // (layers * directions)
        ends = []
        for layer in range(layers):
            parts = []
            for i in range(layer * directions, (layer + 1) * directions):
                h, state = (*(_start(state, i) for state in states), None)[:2]
                own = weights[i * each : (i + 1) * each]
                y, *end = _direction(kind, xs, own, biased, h, state, i % directions == 1)
                parts.append(y)
                ends.append(end)
            xs = c.graph.apply("concat", *parts, axis=2)
            if dropout and train and layer < layers - 1:
                xs = drop(c, xs, dropout, True)[0]
        last = [c.graph.apply("concat", *side, axis=0) for side in zip(*ends, strict=True) if side[0] is not None]
        return xs.transpose(1, 0, 2) if batch_first else xs, *last

    return rule


def _start(states: Value, i: int) -> Value | None:
    """The i-th initial state; None where it is zero."""
    state = states.narrow(0, i, i + 1).reshape(*states.shape[1:])
    return state if state.constant is None or state.constant.any() else None


KINDS = {"lstm": "lstm", "gru": "gru", "rnn_tanh": "tanh", "rnn_relu": "relu"}
rows({f"{name}.input": _recurrent(kind) for name, kind in KINDS.items()}, random=True)
