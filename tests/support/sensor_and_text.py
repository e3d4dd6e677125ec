"""A student whose samples have two tensors, windows and tokens, with dropout of both."""

from __future__ import annotations

import torch
from torch import nn

CHANNELS, LENGTH, TOKENS, VOCABULARY = 3, 12, 5, 7


class Perception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(CHANNELS, 8, 3, padding=1)
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.dropout = nn.Dropout(0.25)

    def forward(self, windows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        heard = torch.relu(self.convolution(windows)).mean(2)
        read = self.embedding(tokens).mean(1)
        return torch.cat([self.dropout(heard), self.dropout(read)], 1)


class SensorAndText(nn.Module):
    def __init__(self, latent_size: int, classes: int) -> None:
        super().__init__()
        self.perception = Perception()
        self.representation = nn.Linear(16, latent_size)
        self.output = nn.Linear(latent_size, classes)


def student(latent_size: int, classes: int) -> nn.Module:
    return SensorAndText(latent_size, classes)
