"""A corpus of small students: every layer that can be lowered, published architectures, and what must be refused."""

from tests.support.networks import layers, published_images, published_sequences
from tests.support.networks.network import Network, Refused
from tests.support.networks.refused import REFUSED

NETWORKS: dict[str, Network] = layers.LAYERS | published_images.PUBLISHED | published_sequences.PUBLISHED
BEYOND_EXPORT = {
    "batch-norm2d-cumulative": "BatchNorm with momentum=None reads its counter with .item(), which torch.export refuses"
}

__all__ = ["BEYOND_EXPORT", "NETWORKS", "REFUSED", "Network", "Refused"]
