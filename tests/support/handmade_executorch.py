"""Adds ExecuTorch graphs to the handmade bundle: its linear step in torch, lowered without the exporter."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir.passes import MemoryPlanningPass

from edgestill.runtime.bundle.bundle import Bundle
from tests.support.handmade_bundle import (
    CLASSES,
    LATENT,
    MEAN,
    STD,
    file_records,
    write_handmade_bundle,
    write_manifest,
)

KINDS = {"float32": torch.float32, "uint8": torch.uint8, "int64": torch.int64}


def write_executorch_bundle(folder: Path, planned_io: bool = False) -> Path:
    """A handmade `lkd` bundle for onnxruntime and executorch.

    `planned_io` gives inputs and outputs a place in the program's own arena, as ExecuTorch does by default.
    """
    write_handmade_bundle(folder)
    bundle = Bundle.open(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "executorch").mkdir()
    graphs = {}
    for name, module in (("train_step", Step()), ("encode", Encode())):
        graph = bundle.graph("onnxruntime", name)
        specs = {spec.name: spec for spec in (*bundle.state_specs, *bundle.inputs(name))}
        examples = tuple(torch.zeros(specs[i].shape, dtype=KINDS[specs[i].dtype]) for i in graph.inputs)
        file = f"executorch/{name}.pte"
        (folder / file).write_bytes(lower(module, examples, planned_io))
        graphs[name] = {"file": file, "inputs": [*graph.inputs], "outputs": [*graph.outputs], "operators": {}}
        graphs[name]["planned_memory_bytes"] = None
    manifest["graphs"]["executorch"] = graphs
    manifest["files"] = file_records(folder)
    write_manifest(folder, manifest)
    return folder


def lower(module: torch.nn.Module, examples: tuple[torch.Tensor, ...], planned_io: bool = False) -> bytes:
    """The .pte of a module for XNNPACK."""
    edge = to_edge_transform_and_lower(
        torch.export.export(module, examples, strict=False),
        partitioner=[XnnpackPartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    )
    plan = MemoryPlanningPass(alloc_graph_input=planned_io, alloc_graph_output=planned_io)
    return edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=plan)).buffer


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A matrix product that XNNPACK takes with a weight that is an input."""
    return torch.bmm(a.unsqueeze(0), b.unsqueeze(0)).squeeze(0)


def normalise(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).reshape(1, -1, 1, 1) for values in (MEAN, STD))
    return ((images.to(torch.float32) / 255 - mean) / std).reshape(images.shape[0], -1)


class Encode(torch.nn.Module):
    def forward(self, weight, bias, output_weight, output_bias, images):
        latents = product(normalise(images), weight.t()) + bias
        return latents, product(latents, output_weight.t()) + output_bias


class Step(torch.nn.Module):
    """Inputs and outputs in the order of the handmade ONNX graph."""

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        parameters, slots = inputs[:4], inputs[4:8]
        images, labels, label_weights, teacher_latents, teacher_weights, alpha, rate, momentum, decay = (
            inputs[8:]
        )
        x = normalise(images)
        latents, logits = Encode()(*parameters, images)
        p = torch.softmax(logits, 1)
        one_hot = torch.nn.functional.one_hot(labels, CLASSES).to(torch.float32)
        w, v = ((u / torch.clamp(u.sum(), min=1e-12)).unsqueeze(1) for u in (label_weights, teacher_weights))
        difference = latents - teacher_latents
        ce = -(w * torch.log_softmax(logits, 1) * one_hot).sum().reshape(1)
        distillation = (v * difference * difference).sum().reshape(1) / LATENT
        d_logits = (1 - alpha) * w * (p - one_hot)
        d_latents = product(d_logits, parameters[2]) + alpha * v * difference * (2 / LATENT)
        gradients = (
            product(d_latents.t(), x),
            d_latents.sum(0),
            product(d_logits.t(), latents),
            d_logits.sum(0),
        )
        slots = [momentum * s + g + decay * q for s, g, q in zip(slots, gradients, parameters, strict=True)]
        parameters = [q - rate * s for q, s in zip(parameters, slots, strict=True)]
        loss = (1 - alpha) * ce + alpha * distillation
        return (*parameters, *slots, loss, ce, distillation, latents, logits)
