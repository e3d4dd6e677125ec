"""The table of built-in students in docs/students.md, from the registry."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from edgestill.export.students import ARCHITECTURES, StudentOptions, build_student

MEASURED = Path(__file__).with_name("results") / "networks"


def _ratios(engine: str) -> dict[str, float]:
    """Step time over eager PyTorch's by student, from the record that `make networks` wrote."""
    file = MEASURED / f"{engine}.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    measured = {r["network"]: r["ratio"] for r in records if "ratio" in r}
    return {n.removeprefix("built-in:"): ratio for n, ratio in measured.items() if n.startswith("built-in:")}


def students_table() -> str:
    """The built-in students as a Markdown table; parameters and forward FLOPs a sample (two a multiplication and
    addition in convolutions and matrix products) are those of default widths, a latent of 128 and 10 classes."""
    lines = [
        "| name | perception module | source | input | `--widths` by default | parameters | MFLOP forward | "
        "step ÷ eager |",
        "| --- | --- | --- | --- | --- | ---: | ---: | ---: |",
    ]
    ratios = _ratios("onnxruntime")
    for row in ARCHITECTURES.values():
        student = build_student(row.name, StudentOptions())
        dtype = torch.int64 if row.input_dtype == "int64" else torch.float32
        with FlopCounterMode(display=False) as counter:
            student(torch.zeros(2, *row.input_shape, dtype=dtype))
        what = row.build.__doc__.partition("\n")[0].rstrip(".")
        shape, widths = (",".join(map(str, given)) for given in (row.input_shape, row.widths))
        size, flops = sum(p.numel() for p in student.parameters()), counter.get_total_flops() / 2e6
        cells = (
            f"`{row.name}`",
            what,
            row.source,
            f"{shape} {row.input_dtype}",
            widths,
            f"{size:,}",
            f"{flops:,.1f}",
            f"{ratios[row.name]:.2f}" if row.name in ratios else "",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
