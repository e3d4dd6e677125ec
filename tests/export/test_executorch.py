"""Exported ExecuTorch programs: what of a step is delegated to XNNPACK, and what stays with portable kernels."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgestill.export.exporter import ExportOptions
from edgestill.export.students import ARCHITECTURES
from edgestill.runtime.bundle.manifest import InputSpec, Objective, Optimizer
from edgestill.runtime.engines.registry import engine_status
from tests.support.export_oracle import prepare

pytestmark = [
    pytest.mark.contract,
    pytest.mark.skipif(
        not engine_status("executorch").usable, reason=str(engine_status("executorch").reason)
    ),
]

PORTABLE = {"_to_dim_order_copy", "arange", "eq", "unsqueeze_copy", "view_copy"}
"""Of a student of convolutions: labels to one-hot rows, grey levels to numbers."""


def emit(options: ExportOptions, folder: Path) -> dict[str, dict]:
    from edgestill.export.targets import executorch

    return executorch.emit(prepare(options)[0], folder)


def test_a_step_of_cnn3_is_at_most_three_delegated_pieces(tmp_path: Path) -> None:
    options = ExportOptions(widths=(4, 8, 8), latent_size=8, batch=8)
    records = emit(options, tmp_path)
    for name, record in records.items():
        operators = record["operators"]
        assert {n for n in operators if not n.startswith("xnnpack.")} <= PORTABLE, name
        assert 1 <= operators["xnnpack.delegate"] <= 3
        activation = 8 * 4 * 32 * 32 * 4  # what XNNPACK keeps outside of the program's own arena counts, too
        assert record["planned_memory_bytes"] > activation
        assert (tmp_path / record["file"]).stat().st_size > 1000
    assert records["encode"]["outputs"] == ["latents", "logits"]


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("normalization", ["batch", "group", "none"])
@pytest.mark.parametrize(
    "name", [name for name in ARCHITECTURES if name.startswith(("cnn", "resnet8", "mobilenet-tiny"))]
)
def test_steps_of_convolutions_stay_delegated(name: str, normalization: str, tmp_path: Path) -> None:
    if name == "cnn1d":
        options = ExportOptions(student=name, latent_size=6, classes=3, batch=4, normalization=normalization)
    else:
        widths = {"cnn4": (4, 5, 6, 4), "cnn5": (4, 5, 6, 4, 7)}.get(name, (4, 5, 6))
        options = ExportOptions(
            student=name, widths=widths, normalization=normalization, latent_size=6, classes=3, batch=4,
            input=InputSpec((3, 16, 16)), objective=Objective("kd", "kl"),
            optimizer=Optimizer("adamw" if normalization == "group" else "sgd"),
        )  # fmt: skip
    operators = emit(options, tmp_path)["train_step"]["operators"]
    assert {n for n in operators if not n.startswith("xnnpack.")} <= PORTABLE
    assert 1 <= operators["xnnpack.delegate"] <= 3
