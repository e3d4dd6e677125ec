"""Windows that lie wholly in the padding, and convolutions in groups, in both layouts."""

from __future__ import annotations

import pytest
from torch import nn

from edgestill.export.exporter import ExportOptions
from edgestill.export.lowering.graph import Graph
from edgestill.export.step import InputOptions
from edgestill.export.student import Student
from tests.support.export_oracle import LAYOUTS, assert_step_equals_eager, make_inputs, prepare

CONVOLUTIONS = {
    "rows of padding": ((9, 1, 16), nn.Conv2d(9, 8, 3, padding=1)),
    "depthwise, larger than the image": ((4, 2, 2), nn.Conv2d(4, 4, 5, padding=2, groups=4)),
    "mostly padding": ((3, 2, 3), nn.Conv2d(3, 4, 7, padding=3)),
    "two groups": ((4, 6, 6), nn.Conv2d(4, 8, 3, groups=2)),
    "channel multiplier, stride": ((3, 7, 7), nn.Conv2d(3, 6, 3, stride=2, padding=1, groups=3)),
}


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("name", sorted(CONVOLUTIONS))
def test_convolutions_equal_eager(name: str, layout: str) -> None:
    shape, convolution = CONVOLUTIONS[name]
    perception = nn.Sequential(convolution, nn.Hardswish(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    student = Student(perception, nn.Linear(convolution.out_channels, 5), nn.Linear(5, 3))
    options = ExportOptions(latent_size=5, classes=3, batch=4, input=InputOptions(shape, "float32"))
    spec, student = prepare(options, student)
    assert_step_equals_eager(spec, student, layout, make_inputs(spec, 1))


def test_no_pad_by_a_negative_size_reaches_an_artifact() -> None:
    graph = Graph()
    images = graph.input("images", (1, 2, 2, 1))
    with pytest.raises(ValueError, match="negative"):
        graph.apply("pad", images, begins=(0, -1, 0, 0), ends=(0, 1, 0, 0))
