"""`edgestill inspect`: what is in a bundle."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.bundle.manifest import ROLES
from edgestill.runtime.console import add_json_option, printable
from edgestill.runtime.data.classes import join_names
from edgestill.runtime.native.plan_work import read_plan


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("inspect", help="what is in a bundle", description=__doc__)
    parser.add_argument(
        "bundle", type=Path, metavar="BUNDLE", help="a folder or .zip from `edgestill export`"
    )
    add_json_option(parser, "one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    with Bundle.open(arguments.bundle) as bundle:
        report = examine(bundle)
    print(json.dumps(report) if arguments.json else describe(report))
    return 0


def examine(bundle: Bundle) -> dict[str, Any]:
    """The report as JSON values."""
    manifest = bundle.manifest
    state = {
        role: {
            "tensors": sum(spec.role == role for spec in manifest.state),
            "elements": sum(math.prod(spec.shape) for spec in manifest.state if spec.role == role),
            "size_bytes": sum(spec.size_bytes for spec in manifest.state if spec.role == role),
        }
        for role in ROLES
    }
    engines = {
        engine: {
            graph: {
                "file": spec.file,
                "size_bytes": manifest.files[spec.file].size_bytes,
                "operators": dict(spec.operators),
                "operator_count": sum(spec.operators.values()),
                "not_delegated": not_delegated(spec.operators),
                "planned_memory_bytes": spec.planned_memory_bytes,
                **(plan_of(bundle, graph) if engine == "native" else {}),
            }
            for graph, spec in graphs.items()
        }
        for engine, graphs in manifest.graphs.items()
    }
    return {
        "bundle": str(bundle.source),
        "edgestill_version": manifest.edgestill_version,
        "student": {
            "name": manifest.student.name,
            "options": dict(manifest.student.options),
            "parameters": manifest.student.parameters,
        },
        "latent_size": manifest.latent_size,
        "classes": manifest.classes,
        "class_names": list(manifest.class_names),
        "batch": manifest.batch,
        "input": {"shape": list(manifest.input.shape), "dtype": manifest.input.dtype},
        "more_inputs": [
            {"name": spec.name, "shape": list(spec.shape), "dtype": spec.dtype}
            for spec in manifest.more_inputs
        ],
        "noise": [list(spec.shape) for spec in bundle.noise_specs],
        "objective": {
            key: value
            for key, value in asdict(manifest.objective).items()
            if key in ("name", "kd_loss") or value is not None
        },
        "optimizer": {"name": manifest.optimizer.name, "nesterov": manifest.optimizer.nesterov}
        | ({"clips": True} if manifest.optimizer.clips else {}),
        "freeze": list(manifest.freeze),
        "common_head": manifest.common_head,
        "flops_per_step": manifest.flops_per_step,
        "training_memory_bytes": bundle.training_memory_bytes,
        "state": state,
        "engines": engines,
        "parity": {engine: dict(record) for engine, record in manifest.parity.items()},
        "files": {name: record.size_bytes for name, record in manifest.files.items()},
        "size_bytes": sum(record.size_bytes for record in manifest.files.values()),
        "model_digest": bundle.model_digest,
    }


def plan_of(bundle: Bundle, graph: str) -> dict[str, Any]:
    """A native graph's plan: what its kernels do, and the memory of a process with one thread beyond what it imports.

    `process_bytes`: the plan with its arena and scratch, the state (twice where a step writes it), inputs and results.
    """
    plan = read_plan(bundle.file(bundle.graph("native", graph).file))
    times = {spec.name: 2 if graph == "train_step" and spec.written else 1 for spec in bundle.state_specs}
    state = sum(times[spec.name] * spec.size_bytes for spec in bundle.state_specs)
    passed = sum(spec.size_bytes for spec in (*bundle.inputs(graph), *bundle.outputs(graph)))
    return {
        "plan": {
            "arena_bytes": plan.arena_bytes,
            "scratch_bytes_per_thread": plan.scratch_bytes,
            "constant_bytes": plan.constant_bytes,
            "process_bytes": plan.memory_bytes(threads=1) + state + passed,
            "kernels": {name: asdict(work) for name, work in plan.kernels.items()},
        }
    }


def not_delegated(operators: Mapping[str, int]) -> dict[str, int] | None:
    """The operators of a graph beside the pieces that a delegate runs; None where the engine has no delegates.

    A delegate NAME is counted as `NAME.delegate`, and what its pieces hold as `NAME.OPERATOR`.
    """
    delegates = tuple(name.removesuffix("delegate") for name in operators if name.endswith(".delegate"))
    if not delegates:
        return None
    return {name: count for name, count in operators.items() if not name.startswith(delegates)}


def describe(report: dict[str, Any]) -> str:
    """The report as lines for a person."""
    student = report["student"]
    options = ", ".join(f"{name} {value}" for name, value in student["options"].items())
    objective = " ".join(filter(None, [report["objective"]["name"], report["objective"]["kd_loss"]]))
    if negatives := report["objective"].get("negatives"):
        objective += f" with {negatives} negatives"
    nesterov = " with Nesterov momentum" if report["optimizer"]["nesterov"] else ""
    clips = ", clipping gradients" if report["optimizer"].get("clips") else ""
    flops, noise = report["flops_per_step"], sum(map(math.prod, report["noise"]))
    lines = [
        f"student     {student['name']}{f' ({options})' if options else ''}, "
        f"{student['parameters']:,} parameters",
        f"input       {report['batch']} x {_form(report['input'])}"
        + "".join(f", {more['name']} {_form(more)}" for more in report["more_inputs"]),
        *([f"noise       {noise:,} numbers a step"] if noise else []),
        f"output      latents of {report['latent_size']}, {report['classes']} classes{_named(report['class_names'])}",
        f"objective   {objective}, optimizer {report['optimizer']['name']}{nesterov}{clips}",
        f"frozen      {', '.join(report['freeze']) or 'nothing'}"
        + (f"; {report['common_head']} is the common head" if report["common_head"] else ""),
        f"a step      {f'{flops / 1e9:.3g} GFLOP' if flops else 'FLOP not counted'}",
        f"training    {_megabytes(report['training_memory_bytes'])} by plan: what --memory of join must allow",
        f"bundle      {_megabytes(report['size_bytes'])} in {len(report['files'])} files, "
        f"by edgestill {report['edgestill_version']}",
        "",
        "state",
    ]
    for role, part in report["state"].items():
        lines.append(f"  {role:<10} {part['tensors']:>4} tensors  {_megabytes(part['size_bytes']):>10}")
    for engine, graphs in report["engines"].items():
        lines += ["", f"engine {engine}: {_parity(report['parity'].get(engine))}"]
        for name, graph in graphs.items():
            planned = graph["planned_memory_bytes"]
            exact = engine == "native"  # the others allocate for themselves
            memory = f", {'' if exact else 'at least '}{_megabytes(planned)} for its values" if planned else ""
            lines.append(
                f"  {name:<10} {graph['operator_count']} operators, {_megabytes(graph['size_bytes'])}{memory}"
            )
            if plan := graph.get("plan"):
                lines += [f"  {'':<10} {line}" for line in _planned(plan)]
            else:
                lines.append(f"  {'':<10} {_counted(graph['operators'])}")
            if (rest := graph["not_delegated"]) is not None:
                lines.append(f"  {'':<10} not delegated: {_counted(rest) or 'nothing'}")
    return "\n".join(lines)


def _planned(plan: Mapping[str, Any]) -> Iterator[str]:
    """Kernels, those that do most first, with their shares of all products, or of all bytes that the others move."""
    yield (
        f"process: {_megabytes(plan['process_bytes'])} beyond Python and what it imports: arena "
        f"{_megabytes(plan['arena_bytes'])}, scratch {_megabytes(plan['scratch_bytes_per_thread'])} a thread, "
        f"constants {_megabytes(plan['constant_bytes'])}, plan, state, inputs"
    )
    kernels = plan["kernels"]
    flops, moved = (sum(work[key] for work in kernels.values()) for key in ("flops", "moved_bytes"))
    for name, work in sorted(kernels.items(), key=lambda item: (-item[1]["flops"], -item[1]["moved_bytes"])):
        if work["flops"]:
            done = f"{work['flops'] / 1e9:8.3f} GFLOP {work['flops'] / flops:6.1%} of the products"
        else:
            share = work["moved_bytes"] / (moved or 1)
            done = f"{work['moved_bytes'] / 1e6:8.2f} MB    {share:6.1%} of the bytes of the others"
        yield f"{name:<14} {work['calls']:>4} calls {done}"


def _counted(operators: Mapping[str, int]) -> str:
    """The most frequent first."""
    frequent = sorted(operators.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{operator} {count}" for operator, count in frequent)


def _form(spec: Mapping[str, Any]) -> str:
    return f"{'x'.join(map(str, spec['shape']))} {spec['dtype']}"


def _parity(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return "not verified yet"
    verdict = "agrees with eager PyTorch" if record.get("ok") else "DIFFERS from eager PyTorch"
    multiple, worst = record.get("multiple"), record.get("worst", "unknown")
    if not isinstance(multiple, int | float):  # of a bundle that an older edgestill verified
        return f"{verdict} over {record.get('steps', '?')} steps, by an older measure: verify it again"
    error = f"at most {multiple:.3g} times eager float32's error, {worst}"
    return f"{verdict} over {record.get('steps', '?')} steps ({error})"


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.2f} MB" if size_bytes >= 10_000 else f"{size_bytes} B"


def _named(names: list[str]) -> str:
    return f": {printable(join_names(names))}" if names else ""
