"""From a PyTorch student to a graph: torch.export traces it, each ATen operator is said in the Graph's (aten).

The student is traced twice, as it trains and as it infers, so dropout, stochastic depth, batch statistics and whatever
else differs between the modes is in the right graph. What would be altered on the way is refused.
"""

from __future__ import annotations

import linecache
import logging
import operator
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from traceback import walk_tb
from typing import Any

import torch
from torch import nn

from edgestill.export.lowering.aten import ATEN, Context, Refusal, way_out
from edgestill.export.lowering.graph import Graph, LoweringError, Value
from edgestill.runtime.errors import EdgestillError

aten = torch.ops.aten


@dataclass(frozen=True)
class SampleSpec:
    """One tensor of a batch as the student takes it: shape with the batch."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # float32 or int64


@dataclass(frozen=True)
class Captured:
    """A student's forward pass in one mode.

    The graph's inputs are the samples and the state that it reads, by their PyTorch names, and uniform numbers
    `noise.0`, `noise.1`, …; its outputs `latents` [B, l], `logits` [B, K] and `next.NAME` of the buffers written.
    """

    graph: Graph
    noise: tuple[tuple[int, ...], ...] = field(default=())

    @property
    def latents(self) -> Value:
        return self.graph.outputs["latents"]

    @property
    def logits(self) -> Value:
        return self.graph.outputs["logits"]

    @property
    def written(self) -> tuple[str, ...]:
        return tuple(n.removeprefix("next.") for n in self.graph.outputs if n.startswith("next."))


def capture(parts: nn.Module, samples: Sequence[SampleSpec], training: bool, prefix: str = "") -> Captured:
    """The graph of `parts`, a module from samples to (latents, logits), in training or in inference mode.

    `prefix` is cut from the names of the state. Errors: LoweringError that names every blocker: its place in the
    student, the operator and a way out.
    """
    for name, parameter in parts.named_parameters():
        if parameter.dtype != torch.float32:
            raise LoweringError(
                f"the student's {name.removeprefix(prefix)} is {parameter.dtype}",
                hint="make the student float32: student.float()",
            )
    parts.train(training)
    for name, buffer in parts.named_buffers():
        if buffer.is_floating_point() and buffer.dtype != torch.float32:
            raise LoweringError(
                f"the student's buffer {name.removeprefix(prefix)} is {buffer.dtype}", hint="make the student float32"
            )
    try:
        examples = tuple(torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in samples)
    except RuntimeError as error:
        raise LoweringError(f"no memory for a batch of {samples[0].shape[0]}", hint="a smaller --batch") from error
    buffers = {name: tensor.clone() for name, tensor in parts.named_buffers()}
    try:
        with warnings.catch_warnings(), _silenced(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")  # PyTorch's tracing warns of PyTorch's own code
            program = torch.export.export(parts, examples)
            _detach_results_without_gradient(program)
            decompositions = torch.export.default_decompositions().items()
            program = program.run_decompositions({k: rule for k, rule in decompositions if k not in ATEN})
    except EdgestillError:
        raise
    except Exception as error:
        shapes = ", ".join(f"{spec.name} {list(spec.shape)} of {spec.dtype}" for spec in samples)
        why = _first_line(error)
        hint = next(
            (hint for pattern, hint in _UNTRACED.items() if re.search(pattern, f"{error}")), _UNTRACED[""]
        )
        raise LoweringError(
            f"PyTorch cannot trace the student on {shapes}{_raised_at(error, parts, prefix)}: {why}", hint
        ) from error
    finally:
        for name, tensor in parts.named_buffers():
            if name in buffers and tensor.shape == buffers[name].shape and not torch.equal(tensor, buffers[name]):
                tensor.data.copy_(buffers[name])
    return _Reader(program, parts, samples, prefix).read()


def _detach_results_without_gradient(program: torch.export.ExportedProgram) -> None:
    """Marks what a `torch.no_grad()` block computes, before decompositions forget where it began."""
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if "wrap_with_set_grad_enabled" not in str(node.target) or node.args[0] is not False:
            continue
        for result in [user for user in node.users if user.target is operator.getitem]:
            if not isinstance(result.meta.get("val"), torch.Tensor):
                continue
            with graph.inserting_after(result):
                detached = graph.call_function(aten.detach.default, (result,))
            detached.meta = dict(result.meta)
            result.replace_all_uses_with(detached, delete_user_cb=lambda user, own=detached: user is not own)
    program.graph_module.recompile()


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _raised_at(error: BaseException, parts: nn.Module, prefix: str) -> str:
    """The module that was called last, and the last line of the student's own code."""
    paths = {id(module): (name, type(module).__name__) for name, module in parts.named_modules() if name}
    called, line = None, ""
    for frame, number in walk_tb(error.__traceback__):
        called = paths.get(id(frame.f_locals.get("self")), called)
        file = frame.f_code.co_filename
        if called and frame.f_globals.get("__name__", "").partition(".")[0] not in ("torch", "edgestill"):
            line = f" ({Path(file).name}, line {number}: {linecache.getline(file, number).strip()})"
    if called is None:  # PyTorch found it afterwards, and names an attribute that it made of it
        name = re.search(r"attribute: ([\w.]+)\.\w+\.", str(error))
        called = next((pair for pair in paths.values() if name and pair[0] == name[1]), None)
    return f" in {called[0].removeprefix(prefix)} ({called[1]}){line}" if called else ""


@contextmanager
def _silenced() -> Iterator[None]:
    """PyTorch's tracing logs its own stack for what it then raises."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


class _Reader:
    def __init__(
        self,
        program: torch.export.ExportedProgram,
        parts: nn.Module,
        samples: Sequence[SampleSpec],
        prefix: str,
    ):
        self.program, self.samples, self.prefix = program, samples, prefix
        self.parameters = dict.fromkeys(name for name, _ in parts.named_parameters())
        self.tensors = dict(parts.state_dict(keep_vars=True)) | dict(parts.named_buffers())
        self.names = {id(tensor): name for name, tensor in [*parts.named_buffers(), *parts.named_parameters()]}
        self.context = Context(Graph())
        self.known: dict[torch.fx.Node, Any] = {}
        self.refusals: dict[str, LoweringError] = {}
        self.counts: list[str] = []

    def read(self) -> Captured:
        self._inputs()
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                self.known[node] = self._computed(node)
        if self.refusals:
            raise _joined(list(self.refusals.values()))
        graph = self.context.graph
        self._outputs()
        drawn = {value.name: value for value in self.context.noise}
        graph.prune({value.name for value in graph.inputs} - drawn.keys())
        for value in graph.inputs:
            if value.name in self.counts:
                raise LoweringError(
                    f"the student's outputs depend on its buffer {value.name}, which changes and is not float32",
                    hint="make it a float32 buffer: those are state",
                )
        return Captured(graph, tuple(value.shape for value in drawn.values()))

    def _inputs(self) -> None:
        """Values of the graph for what is given at run time, tensors for what is not."""
        signature, given = self.program.graph_signature, iter(self.samples)
        nodes = (node for node in self.program.graph.nodes if node.op == "placeholder")
        for node, spec in zip(nodes, signature.input_specs, strict=True):
            kind = spec.kind.name
            if kind in ("PARAMETER", "BUFFER"):
                self.known[node] = self._state(spec.target, set(signature.buffers_to_mutate.values()))
            elif kind == "CONSTANT_TENSOR":
                self.known[node] = self.program.constants[spec.target]
            elif kind == "USER_INPUT":
                sample = next(given)
                self.known[node] = self.context.graph.input(sample.name, sample.shape, sample.dtype)
            elif kind == "CUSTOM_OBJ":
                raise LoweringError(
                    f"the student computes with {spec.target}, which is no tensor",
                    hint="a random generator of its own: leave it out, the runtime draws from seed and step",
                )
            else:  # a token of an operator with effects, which is refused itself
                self.known[node] = None

    def _state(self, target: str, written: set[str]) -> Any:
        """An input where it is state, which has one for tied weights, or a count, which only the student may need."""
        tensor = self.tensors[target]
        name = self.names.get(id(tensor), target)  # of tied weights, the first
        own = name.removeprefix(self.prefix)
        if name in self.parameters or is_state(tensor, name in written):
            given_before = [value for value in self.context.graph.inputs if value.name == own]
            return (given_before or [self.context.graph.input(own, tuple(tensor.shape))])[0]
        if name not in written:
            return tensor.detach()
        self.counts.append(own)
        return self.context.graph.input(own, tuple(tensor.shape), "int64")

    def _computed(self, node: torch.fx.Node) -> Any:
        self.context.graph.path = _place(node)[0].removeprefix(self.prefix)
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), self.known.get)
        if any(self.known.get(value, self) is None for value in node.all_input_nodes):
            if not self.refusals:
                self._refuse(node, f"{node.target} of what is no tensor")
            return None  # what it needs was refused
        if node.target is operator.getitem:
            if (part := args[0][args[1]]) is None and node.users:
                self._refuse(node.args[0], f"what {node.args[0].target} gives besides its first value,")
            return part
        try:
            return self.context.compute(node, args, kwargs)
        except Refusal as error:
            what, hint = f"{error}", error.hint
        except LoweringError:
            raise
        except Exception as error:  # a rule met arguments that nobody thought of
            what, hint = f"{node.target} ({type(error).__name__}: {_first_line(error)})", None
        self._refuse(node, what, hint)
        return self._stand_in(node.meta.get("val"))

    def _refuse(self, node: torch.fx.Node, what: str, hint: str | None = None) -> None:
        path, module = _place(node)
        where = path.removeprefix(self.prefix) + (f" ({module})" if module else "")
        error = LoweringError(f"{where}: {what} cannot be lowered to a training graph", hint or way_out(node))
        self.refusals.setdefault(f"{where} {what}", error)

    def _stand_in(self, result: Any) -> Any:
        """Values in place of a refused operator's, so that what comes after it is looked at, too."""
        if isinstance(result, list | tuple):
            return [self._stand_in(one) for one in result]
        if not isinstance(result, torch.Tensor) or not all(isinstance(size, int) for size in result.shape):
            return None
        dtype = "float32" if result.is_floating_point() or result.dtype == torch.bool else "int64"
        return self.context.graph.input(f"refused.{len(self.context.graph.inputs)}", tuple(result.shape), dtype)

    def _outputs(self) -> None:
        graph, own = self.context.graph, []
        nodes = self.program.graph.output_node().args[0]
        for spec, node in zip(self.program.graph_signature.output_specs, nodes, strict=True):
            value = self.known[node] if isinstance(node, torch.fx.Node) else node
            if spec.kind.name == "USER_OUTPUT":
                own.append(value)
            elif spec.kind.name == "BUFFER_MUTATION" and self.tensors[spec.target].dtype == torch.float32:
                graph.output("next." + spec.target.removeprefix(self.prefix), self.context.value(value))
        if len(own) != 2:
            raise LoweringError(
                f"the student gives {len(own)} tensors for latents and logits",
                hint="`representation` and `output` return one tensor each",
            )
        batch = self.samples[0].shape[0]
        for name, value in zip(("latents", "logits"), own, strict=True):
            value = self.context.value(value)
            if value.rank != 2 or value.shape[0] != batch:
                part = "representation" if name == "latents" else "output"
                raise LoweringError(
                    f"the {name} of `{part}` have shape {list(value.shape)}, not [{batch}, size]",
                    hint="put nn.Flatten() before the first nn.Linear of `representation`",
                )
            graph.output(name, value)


def is_state(buffer: torch.Tensor, written: bool) -> bool:
    """Whether a buffer is state: float32 numbers that the step writes, or finite ones that it reads."""
    return buffer.dtype == torch.float32 and (written or bool(torch.isfinite(buffer).all()))


def _joined(errors: list[LoweringError]) -> LoweringError:
    if len(errors) == 1:
        return errors[0]
    lines = [f"{error.message} (hint: {error.hint})" for error in errors]
    return LoweringError(
        f"{len(errors)} things in the student cannot be lowered:\n  " + "\n  ".join(lines),
        hint="each line names a place and a way out",
    )


def _place(node: torch.fx.Node) -> tuple[str, str]:
    """The path of the module that a node comes from, and the module's type, if it is not the student itself."""
    path, kind = next(reversed((node.meta.get("nn_module_stack") or {"": ("", "")}).values()))
    return path or "forward()", kind.rsplit(".", 1)[-1] if path else ""


_ONE_VALUE = "a BatchNorm over one value has no variance: export with a larger --batch, or use nn.GroupNorm"
_UNTRACED = {
    "more than 1 value per channel": _ONE_VALUE,
    "data-dependent": "no branch, loop, number or shape of a graph depends on values: use torch.where with a mask, and "
    "sequences of one length instead of packed ones",
    "nested_tensor": "use tensors of one length with a mask instead of nested tensors",
    "FakeTensor|fake tensor|data pointer|not allocated|tensor subclasses": "what leaves PyTorch is lost: no NumPy, no "
    "formatting of values, detach() instead of .data, torch.stack instead of torch.tensor of tensors",
    "": "check --input-shape, put nn.Flatten() before the first nn.Linear, or write that line with other operators",
}
"""The way out by what PyTorch says."""
