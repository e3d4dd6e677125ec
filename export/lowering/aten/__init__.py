"""What each ATen operator is in the Graph's operators: one row an operator, a module a family (context.py)."""

from edgestill.export.lowering.aten import (  # noqa: F401 - each enters its rows into the table
    convolution,
    elementwise,
    movement,
    noise,
    normalization,
    pooling,
    products,
    recurrence,
    resampling,
)
from edgestill.export.lowering.aten.context import ATEN, Context, Refusal, way_out

__all__ = ["ATEN", "Context", "Refusal", "families", "way_out"]


def families() -> dict[str, list[str]]:
    """The names of ATen's operators that have a row, by the module that the row stands in (docs/lowering.md)."""
    found: dict[str, set[str]] = {}
    for operator, rule in ATEN.items():
        found.setdefault(rule.__module__.rpartition(".")[2], set()).add(operator.overloadpacket.__name__)
    return {family: sorted(names) for family, names in sorted(found.items())}
