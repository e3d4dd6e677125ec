"""The state between steps, double-buffered: a step reads one set of arrays and writes the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from edgestill.runtime.bundle.manifest import GraphSpec, TensorSpec
from edgestill.runtime.engines.program import Arrays, Buffers

NEXT = "next."
"""A graph calls a state tensor by its name on the way in, and by this and its name on the way out."""


class State:
    """All state tensors of an opened bundle. A step that fails leaves them as they were, for it writes the other set.

    A tensor that no step writes has one array, in both sets. The second set is allocated by the first step.
    """

    def __init__(
        self, specs: Sequence[TensorSpec], allocate: Callable[[Sequence[TensorSpec]], Buffers]
    ) -> None:
        self._specs = tuple(specs)
        self._allocate = allocate
        self._sets = [allocate(self._specs)]
        self.current = 0
        """Which set holds the state: 0 or 1."""

    def load(self, arrays: Arrays) -> None:
        """Replaces the state by copies. The caller has checked names, shapes and dtypes."""
        for name, array in self._sets[self.current].items():
            np.copyto(array, arrays[name], casting="no")

    def copy(self) -> dict[str, np.ndarray]:
        return {name: array.copy() for name, array in self._sets[self.current].items()}

    def advance(self) -> None:
        """Makes what a step has written the state."""
        self.current = 1 - self.current

    def tensors_of(
        self, graph: GraphSpec, others: Arrays
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Inputs and outputs of a graph that runs on the present state, by the graph's names and in its order.

        `others`: the arrays of what is not state.
        """
        read = self._sets[self.current]
        inputs = {name: others[name] if name in others else read[name] for name in graph.inputs}
        outputs = {}
        for name in graph.outputs:
            if name in others:
                outputs[name] = others[name]
            else:
                outputs[name] = self._other_set()[name.removeprefix(NEXT)]
        return inputs, outputs

    def _other_set(self) -> Buffers:
        if len(self._sets) == 1:
            written = self._allocate([spec for spec in self._specs if spec.written])
            self._sets.append({**self._sets[0], **written})
        return self._sets[1 - self.current]
