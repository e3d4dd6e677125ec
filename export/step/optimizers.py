"""Optimizers as functional updates in forward operators: SGD with momentum, AdamW, exactly as torch.optim has them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

from edgestill.export.lowering.graph import Graph, Value
from edgestill.runtime.bundle.manifest import Optimizer, TensorSpec

_JOINT = "joint vector"
CLIP_UNIT = "largest norm of all gradients together"


@dataclass(frozen=True)
class Method:
    """An optimizer: what it takes at every step and its unit, in order; what it keeps; and its step."""

    hyperparameters: dict[str, str]
    slots: tuple[str, ...]
    """Kept for each trained parameter, in its shape, as `optimizer.SLOT.PARAMETER`."""
    rule: Callable[..., dict[str, Value]]
    """(optimizer, graph, state, gradients, inputs) → new values of what it updates, by state name."""
    numbers: tuple[str, ...] = ()
    """Kept once, as `optimizer.NUMBER`."""


def hyperparameters(optimizer: Optimizer) -> list[TensorSpec]:
    """What the optimizer takes at every step, in order."""
    given = METHODS[optimizer.name].hyperparameters | ({"clip_norm": CLIP_UNIT} if optimizer.clips else {})
    return [TensorSpec(name, (1,), "float32", unit) for name, unit in given.items()]


def slots(optimizer: Optimizer, parameters: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the optimizer's state for the trained parameters; every slot starts at zero."""
    method = METHODS[optimizer.name]
    kept = {f"optimizer.{slot}.{name}": shape for name, shape in parameters.items() for slot in method.slots}
    return kept | {f"optimizer.{name}": (1,) for name in method.numbers}


def update(
    optimizer: Optimizer,
    graph: Graph,
    state: dict[str, Value],
    gradients: dict[str, Value],
    inputs: dict[str, Value],
    joint_size: int = 0,
) -> dict[str, Value]:
    """New values of the trained parameters and their slots, by state name.

    Parameters of at most `joint_size` elements are updated together, end to end in one vector.
    """
    method = METHODS[optimizer.name].rule

    def rule(*given: Any) -> dict[str, Value]:
        *others, gradients, inputs = given
        return method(*others, _clipped(gradients, inputs["clip_norm"]) if optimizer.clips else gradients, inputs)

    joined = [name for name, gradient in gradients.items() if gradient.size <= joint_size]
    if len(joined) < 2:
        return rule(optimizer, graph, state, gradients, inputs)

    def join(values: Iterable[Value]) -> Value:
        return graph.apply("concat", *(value.reshape(-1) for value in values), axis=0)

    prefixes = ("", *(f"optimizer.{slot}." for slot in METHODS[optimizer.name].slots))
    vectors = {prefix: [prefix + name for name in joined] for prefix in prefixes}
    state = state | {
        prefix + _JOINT: join(state[name] for name in names) for prefix, names in vectors.items()
    }
    separate = {name: gradient for name, gradient in gradients.items() if name not in joined}
    joint = {_JOINT: join(gradients[name] for name in joined)}
    new = rule(optimizer, graph, state, separate | joint, inputs)
    for prefix, names in vectors.items():
        vector, start = new.pop(prefix + _JOINT), 0
        for name in names:
            stop = start + state[name].size
            new[name] = vector.narrow(0, start, stop).reshape(*state[name].shape)
            start = stop
    return new


def _clipped(gradients: dict[str, Value], norm: Value) -> dict[str, Value]:
    """All gradients times one factor of at most 1, so that their global norm is at most `norm` [1].

    As torch.nn.utils.clip_grad_norm_ has it. Source: Pascanu, Mikolov and Bengio 2013.
    """
    rows = [(g * g).reshape(g.shape[0] if g.rank > 1 else 1, -1).sum(1) for g in gradients.values()]
    root = reduce(add, (squares.sum(0).reshape(1) for squares in rows)).apply("sqrt")
    factor = (norm / (root + 1e-6)).apply("minimum", 1.0)
    return {name: gradient * _of_rank(factor, gradient) for name, gradient in gradients.items()}


def _sgd(optimizer, graph, state, gradients, inputs):
    new = {}
    for name, gradient in gradients.items():
        parameter = state[name]
        rate, momentum, decay = (
            _of_rank(inputs[key], parameter) for key in ("learning_rate", "momentum", "weight_decay")
        )
        gradient = gradient + parameter * decay
        slot = f"optimizer.momentum.{name}"
        new[slot] = state[slot] * momentum + gradient
        step = gradient + new[slot] * momentum if optimizer.nesterov else new[slot]
        new[name] = parameter - step * rate
    return new


def _adamw(optimizer, graph, state, gradients, inputs):
    rate, beta1, beta2, epsilon, decay = (
        inputs[key] for key in ("learning_rate", "beta1", "beta2", "epsilon", "weight_decay")
    )
    new = {}
    for i, beta in ((1, beta1), (2, beta2)):
        # 1 − βᵗ is kept itself: from βᵗ it would lose its digits in the first steps.
        name = f"optimizer.bias_correction{i}"
        new[name] = state[name] * beta + (1.0 - beta)
    step_size = rate / new["optimizer.bias_correction1"]
    root2 = graph.apply("sqrt", new["optimizer.bias_correction2"])
    kept = 1.0 - rate * decay
    for name, gradient in gradients.items():
        parameter = state[name]
        b1, b2 = _of_rank(beta1, parameter), _of_rank(beta2, parameter)
        mean_name, square_name = f"optimizer.exp_avg.{name}", f"optimizer.exp_avg_sq.{name}"
        new[mean_name] = mean = state[mean_name] * b1 + gradient * (1.0 - b1)
        new[square_name] = square = state[square_name] * b2 + gradient * gradient * (1.0 - b2)
        divisor = graph.apply("sqrt", square) / _of_rank(root2, parameter) + _of_rank(epsilon, parameter)
        new[name] = parameter * _of_rank(kept, parameter) - mean / divisor * _of_rank(step_size, parameter)
    return new


def _of_rank(scalar: Value, like: Value) -> Value:
    return scalar.reshape(*(1,) * len(like.shape))


METHODS = {
    "sgd": Method(
        {
            "learning_rate": "parameter units a step",
            "momentum": "share kept a step, 0-1",
            "weight_decay": "L2 factor",
        },
        ("momentum",),
        _sgd,
    ),
    "adamw": Method(
        {
            "learning_rate": "parameter units a step",
            "beta1": "decay of the mean, 0-1",
            "beta2": "decay of the square, 0-1",
            "epsilon": "added to the root",
            "weight_decay": "decoupled factor",
        },
        ("exp_avg", "exp_avg_sq"),
        _adamw,
        ("bias_correction1", "bias_correction2"),
    ),
}
