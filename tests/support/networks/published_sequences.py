"""Published architectures for sensor windows, sound, point sets and text, small; each names its paper."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from tests.support.networks.layers import Recurrent
from tests.support.networks.network import TOKENS, VOCABULARY, Add, Apply, Cat, Network, conv_bn, network
from tests.support.networks.published_images import encoder, mean_token

Layers = list[nn.Module]
SENSORS, BRAIN, SPECTROGRAM, SOUND, POINTS = (6, 32), (1, 8, 64), (1, 25, 10), (1, 400), (3, 40)


def conv1d_bn(inputs: int, outputs: int, size: int, act: type | None = nn.ReLU, **form: int) -> nn.Sequential:
    """Convolution over time → BatchNorm → activation, if any."""
    layer = nn.Conv1d(
        inputs, outputs, size, padding="same" if form.get("stride", 1) == 1 else 0, bias=False, **form
    )
    return nn.Sequential(layer, nn.BatchNorm1d(outputs), *([act()] if act else []))


def _global() -> Layers:
    return [nn.AdaptiveAvgPool1d(1)]


class Causal(nn.Module):
    """Two dilated convolutions padded on the left, weight-normalised, dropped out (Bai et al. 2018, TCN)."""

    def __init__(self, inputs: int, outputs: int, dilation: int, size: int = 3):
        super().__init__()
        layers: Layers = []
        for channels in (inputs, outputs):
            layer = nn.Conv1d(channels, outputs, size, dilation=dilation)
            pad = nn.ConstantPad1d(((size - 1) * dilation, 0), 0.0)
            layers += [pad, parametrizations.weight_norm(layer), nn.ReLU(), nn.Dropout(0.2)]
        self.body = nn.Sequential(*layers)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv1d(inputs, outputs, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class Wave(nn.Module):
    """Gated dilated convolutions, residual and skip connections added up (van den Oord et al. 2016)."""

    def __init__(self, width: int, dilations: tuple[int, ...]):
        super().__init__()
        self.gates = nn.ModuleList(nn.Conv1d(width, 2 * width, 2, dilation=d) for d in dilations)
        self.outs = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in dilations[1:])
        self.skips = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in dilations)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(x)
        for gate, out, skip in zip(self.gates, (*self.outs, None), self.skips, strict=True):
            a, b = gate(F.pad(x, (gate.dilation[0], 0))).chunk(2, 1)
            y = torch.tanh(a) * torch.sigmoid(b)
            total = total + skip(y)
            x = x if out is None else x + out(y)
        return F.relu(total)


def inception_time(inputs: int, width: int) -> nn.Module:
    """Three long kernels behind a bottleneck, and a pooled branch (Ismail Fawaz et al. 2020)."""
    kernels = [nn.Conv1d(width, width, size, padding="same", bias=False) for size in (10, 5, 3)]
    long = nn.Sequential(nn.Conv1d(inputs, width, 1, bias=False), Cat(*kernels))
    pooled = nn.Sequential(nn.MaxPool1d(3, 1, 1), nn.Conv1d(inputs, width, 1, bias=False))
    return nn.Sequential(Cat(long, pooled), nn.BatchNorm1d(4 * width), nn.ReLU())


def fcn() -> Layers:
    """Wang et al. 2017."""
    return [conv1d_bn(6, 16, 8), conv1d_bn(16, 24, 5), conv1d_bn(24, 16, 3), *_global(), nn.Flatten()]


def eegnet() -> Layers:
    """Lawhern et al. 2018."""
    time = nn.Conv2d(1, 4, (1, 16), padding="same", bias=False)
    space = nn.Conv2d(4, 8, (8, 1), groups=4, bias=False)
    depthwise = nn.Conv2d(8, 8, (1, 8), padding="same", groups=8, bias=False)
    first = [
        time,
        nn.BatchNorm2d(4),
        space,
        nn.BatchNorm2d(8),
        nn.ELU(),
        nn.AvgPool2d((1, 4)),
        nn.Dropout(0.25),
    ]
    second = [depthwise, nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ELU(), nn.AvgPool2d((1, 8))]
    return [*first, *second, nn.Dropout(0.25)]


def deep_convnet() -> Layers:
    """Schirrmeister et al. 2017."""
    layers = [nn.Conv2d(1, 6, (1, 5)), nn.Conv2d(6, 6, (8, 1), bias=False), nn.BatchNorm2d(6), nn.ELU()]
    layers += [
        nn.MaxPool2d((1, 2)),
        nn.Dropout(0.5),
        nn.Conv2d(6, 12, (1, 5), bias=False),
        nn.BatchNorm2d(12),
    ]
    return [*layers, nn.ELU(), nn.MaxPool2d((1, 3))]


def shallow_convnet() -> Layers:
    """Squares, means, logarithms (Schirrmeister et al. 2017)."""
    power = [Apply(torch.square), nn.AvgPool2d((1, 16), (1, 4)), Apply(lambda x: x.clamp(min=1e-4).log())]
    return [
        nn.Conv2d(1, 8, (1, 9)),
        nn.Conv2d(8, 8, (8, 1), bias=False),
        nn.BatchNorm2d(8),
        *power,
        nn.Dropout(0.5),
    ]


class Broadcast(nn.Module):
    """Means over frequency, a convolution over time, broadcast again (Kim et al. 2021, BC-ResNet)."""

    def __init__(self, width: int):
        super().__init__()
        depthwise = nn.Conv2d(width, width, (1, 3), padding=(0, 1), groups=width, bias=False)
        self.frequency = nn.Sequential(depthwise, nn.BatchNorm2d(width))
        over_time = nn.Conv2d(width, width, (3, 1), padding=(2, 0), dilation=(2, 1), groups=width, bias=False)
        mix = (nn.Conv2d(width, width, 1), nn.Dropout2d(0.1))
        self.time = nn.Sequential(over_time, nn.BatchNorm2d(width), nn.SiLU(), *mix)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.frequency(x)
        return F.relu(x + y + self.time(y.mean(3, keepdim=True)))


def matchboxnet() -> Layers:
    """Separable convolutions over time with a residual (Majumdar and Ginsburg 2020)."""

    def separable(inputs: int, outputs: int, size: int, act: type | None = nn.ReLU) -> nn.Module:
        return nn.Sequential(
            nn.Conv1d(inputs, inputs, size, padding="same", groups=inputs), conv1d_bn(inputs, outputs, 1, act)
        )

    block = Add(
        separable(16, 24, 7), nn.Dropout(0.1), separable(24, 24, 7, None), shortcut=conv1d_bn(16, 24, 1, None)
    )
    return [Apply(lambda x: x[:, 0].transpose(1, 2)), separable(10, 16, 5), block, nn.ReLU(), *_global()]


class Points(nn.Module):
    """One network a point, the maximum over all of them, aligned by a learnt matrix (Qi et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.align = nn.Sequential(
            conv1d_bn(3, 16, 1), nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(16, 9)
        )
        self.each = nn.Sequential(conv1d_bn(3, 24, 1), conv1d_bn(24, 32, 1))
        self.register_buffer("identity", torch.eye(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        matrix = self.align(x).view(-1, 3, 3) + self.identity
        return self.each(torch.bmm(matrix, x)).max(2).values


class LstmFcn(nn.Module):
    """A convolutional and a recurrent branch (Karim et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutional = nn.Sequential(*fcn())
        self.recurrent = nn.Sequential(Recurrent(nn.LSTM(6, 8, batch_first=True)), nn.Dropout(0.4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat((self.convolutional(x), self.recurrent(x[:, :, ::2])), 1)


class TextCnn(nn.Module):
    """Convolutions of three sizes over token vectors, the maximum of each (Kim 2014)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.layers = nn.ModuleList(nn.Conv1d(16, 8, size) for size in (3, 4, 5))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        vectors = self.embed(x).transpose(1, 2)
        return self.dropout(torch.cat([F.relu(layer(vectors)).amax(2) for layer in self.layers], 1))


class Encoded(nn.Module):
    """Post-norm encoder layers over tokens with sines of their places, padding masked out (Vaswani et al. 2017)."""

    def __init__(self, depth: int = 1, shared: bool = False):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        angles = torch.arange(TOKENS[0])[:, None] / 10_000 ** (torch.arange(8) / 8)
        self.register_buffer("places", torch.cat((angles.sin(), angles.cos()), 1))
        layers = [
            nn.TransformerEncoderLayer(16, 4, 32, 0.1, batch_first=True)
            for _ in range(1 if shared else depth)
        ]
        self.layers = nn.ModuleList(layers * depth if shared else layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        used = (x > 3).float()
        vectors = 4.0 * self.embed(x) + self.places
        for layer in self.layers:
            vectors = layer(vectors)
        return (vectors * used[:, :, None]).sum(1) / used.sum(1, keepdim=True).clamp(min=1.0)


class BiLstmAttention(nn.Module):
    """A bidirectional LSTM whose states are weighted by what they say (Zhou et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 12)
        self.layer = nn.LSTM(12, 8, batch_first=True, bidirectional=True)
        self.query = nn.Parameter(torch.randn(16) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states, _ = self.layer(self.embed(x))
        weights = torch.softmax(states.tanh() @ self.query, 1)
        return (states * weights[:, :, None]).sum(1)


class Conformer(nn.Module):
    """Half feed-forward, attention, gated convolution, half feed-forward (Gulati et al. 2020)."""

    def __init__(self, width: int):
        super().__init__()
        self.halves = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)
            )
            for _ in range(2)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        depthwise = nn.Conv1d(width, width, 5, padding=2, groups=width)
        gated = (nn.Conv1d(width, 2 * width, 1), nn.GLU(1))
        self.convolution = nn.Sequential(
            *gated, depthwise, nn.BatchNorm1d(width), nn.SiLU(), nn.Conv1d(width, width, 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + 0.5 * self.halves[0](x)
        y = self.norms[0](x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.convolution(self.norms[1](x).transpose(1, 2)).transpose(1, 2)
        return self.norms[2](x + 0.5 * self.halves[1](x))


class Linformer(nn.Module):
    """Attention to a few learnt mixtures of the tokens (Wang et al. 2020)."""

    def __init__(self, tokens: int, width: int, few: int = 4):
        super().__init__()
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.mixtures = nn.Parameter(torch.randn(few, tokens) / tokens**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        k, v = torch.einsum("ft,btc->bfc", self.mixtures, self.kv(x)).chunk(2, 2)
        return x + torch.softmax(self.q(x) @ k.mT / x.shape[2] ** 0.5, -1) @ v


def crnn() -> Layers:
    """Convolutions over the spectrogram, then a recurrent layer over time (Shi et al. 2017)."""
    columns = Apply(lambda x: x.flatten(1, 2))
    pooled = [conv_bn(1, 8, 3), nn.MaxPool2d(2), conv_bn(8, 8, 3), nn.MaxPool2d((1, 2))]
    return [*pooled, Apply(lambda x: x.transpose(2, 3)), columns, Recurrent(nn.GRU(16, 12, batch_first=True))]


BY_INPUT: dict[tuple[tuple[int, ...], str], dict[str, Callable[[], Layers]]] = {
    (SENSORS, "float32"): {
        "fcn": fcn,
        "har-cnn": lambda: [conv1d_bn(6, 12, 5), nn.MaxPool1d(2), conv1d_bn(12, 16, 5), *_global()],
        "resnet-1d": lambda: [
            Add(
                conv1d_bn(6, 12, 8),
                conv1d_bn(12, 12, 5),
                conv1d_bn(12, 12, 3, None),
                shortcut=conv1d_bn(6, 12, 1, None),
            ),
            nn.ReLU(),
            *_global(),
        ],
        "inception-time": lambda: [inception_time(6, 6), inception_time(24, 6), *_global()],
        "tcn": lambda: [Causal(6, 12, 1), Causal(12, 12, 2), Causal(12, 12, 4), Apply(lambda x: x[:, :, -1])],
        "wavenet": lambda: [nn.Conv1d(6, 12, 1), Wave(12, (1, 2, 4)), *_global()],
        "lstm-fcn": lambda: [LstmFcn()],
        "deep-conv-lstm": lambda: [
            nn.Conv1d(6, 12, 5),
            nn.ReLU(),
            nn.Conv1d(12, 12, 5, stride=2),
            nn.ReLU(),
            Recurrent(nn.LSTM(12, 12, num_layers=2, dropout=0.5, batch_first=True)),
        ],
        "lstm-har": lambda: [Recurrent(nn.LSTM(6, 16, batch_first=True))],
        "bilstm-har": lambda: [
            Recurrent(nn.LSTM(6, 8, batch_first=True, bidirectional=True), last=False),
            mean_token(),
        ],
        "gru-har": lambda: [nn.AvgPool1d(2), Recurrent(nn.GRU(6, 12, num_layers=2, batch_first=True))],
        "transformer-har": lambda: [
            nn.Conv1d(6, 16, 4, 4),
            Apply(lambda x: x.transpose(1, 2)),
            *encoder(16, 2, 1, 0.1),
            mean_token(),
        ],
    },
    (BRAIN, "float32"): {
        "eegnet": eegnet,
        "deep-convnet": deep_convnet,
        "shallow-convnet": shallow_convnet,
    },
    (SPECTROGRAM, "float32"): {
        "ds-cnn": lambda: [
            nn.Conv2d(1, 16, (10, 4), 2, (5, 1), bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            *(conv_bn(16, 16, *form) for form in ((3, 1, 16), (), (3, 1, 16), ())),
            nn.AdaptiveAvgPool2d(1),
        ],
        "bc-resnet": lambda: [conv_bn(1, 8, 5, 2), Broadcast(8), Broadcast(8), nn.AdaptiveAvgPool2d(1)],
        "matchboxnet": matchboxnet,
        "crnn": crnn,
        "keyword-transformer": lambda: [
            Apply(lambda x: x[:, 0]),
            nn.Linear(10, 16),
            *encoder(16, 2, 2),
            mean_token(),
        ],
        "conformer": lambda: [Apply(lambda x: x[:, 0]), nn.Linear(10, 16), Conformer(16), mean_token()],
    },
    (SOUND, "float32"): {
        "m5": lambda: [
            conv1d_bn(1, 12, 40, stride=4),
            nn.MaxPool1d(4),
            conv1d_bn(12, 16, 3),
            nn.MaxPool1d(4),
            *_global(),
        ],
    },
    (POINTS, "float32"): {
        "pointnet": lambda: [Points()],
        "deep-sets": lambda: [
            nn.Conv1d(3, 24, 1),
            nn.Tanh(),
            nn.Conv1d(24, 24, 1),
            Apply(lambda x: x.sum(2) / 9),
        ],
    },
    (TOKENS, "int64"): {
        "text-cnn": lambda: [TextCnn()],
        "fasttext": lambda: [nn.Embedding(VOCABULARY, 16), mean_token()],
        "transformer-text": lambda: [Encoded()],
        "albert": lambda: [Encoded(2, shared=True)],
        "bilstm-attention": lambda: [BiLstmAttention()],
        "linformer": lambda: [
            nn.Embedding(VOCABULARY, 16),
            Linformer(12, 16),
            nn.LayerNorm(16),
            mean_token(),
        ],
    },
    ((20,), "float32"): {
        "mlp": lambda: [
            nn.Linear(20, 32),
            nn.BatchNorm1d(32),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(32, 32),
            nn.ReLU(),
        ],
    },
}
PUBLISHED: dict[str, Network] = {
    name: network(layers, shape, dtype, "published")
    for (shape, dtype), table in BY_INPUT.items()
    for name, layers in table.items()
}
