"""Small students with what parity has to cope with: biases that only rounding moves, kinks, dropout, several inputs."""

from __future__ import annotations

import torch
from torch import nn

from edgestill.export.students import Student


def biased(latent_size: int, classes: int) -> Student:
    """Two convolutions whose bias BatchNorm takes away again, pooling with ties, dropout; images [3, 12, 12]."""
    blocks = [
        nn.Sequential(nn.Conv2d(inputs, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2))
        for inputs, width in ((3, 4), (4, 6))
    ]
    head = nn.Sequential(nn.Flatten(), nn.Dropout(0.25), nn.Linear(6, latent_size))
    return Student(nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1)), head, nn.Linear(latent_size, classes))


class TwoInputs(nn.Module):
    """An existing model without parts, for --split head: windows [2, 9] and tokens [5]; one weight is used twice."""

    def __init__(self, latent_size: int, classes: int):
        super().__init__()
        self.embed, self.mix = nn.Embedding(7, 6), nn.Linear(9, 6)
        self.tied = nn.Linear(6, 7, bias=False)
        self.tied.weight = self.embed.weight
        self.body, self.norm = nn.Linear(13, latent_size), nn.BatchNorm1d(latent_size)
        self.head = nn.Linear(latent_size, classes)

    def forward(self, window: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        seen = torch.tanh(self.mix(window).mean(1) + self.embed(tokens).mean(1))
        return self.head(self.norm(self.body(torch.cat((seen, self.tied(seen)), 1))))
