"""The common head's rule, against SciPy's transform; the same on every machine."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import scipy.fft

from edgestill.runtime.bundle.common_head import common_head
from edgestill.runtime.errors import UsageError

pytestmark = pytest.mark.tiny
SIZES = [(2, 2), (10, 128), (10, 64), (7, 33), (100, 100)]


@pytest.mark.parametrize(("classes", "latent_size"), SIZES)
def test_rows_are_those_of_the_orthonormal_cosine_transform(classes: int, latent_size: int) -> None:
    head = common_head(classes, latent_size)
    wanted = scipy.fft.dct(np.eye(latent_size), norm="ortho", axis=0)[:classes]
    assert head.dtype == np.float32 and head.shape == (classes, latent_size)
    np.testing.assert_allclose(head, wanted, rtol=0, atol=1e-7)
    exact = head.astype(np.float64)
    np.testing.assert_allclose(exact @ exact.T, np.eye(classes), rtol=0, atol=1e-6)


def test_its_bits_are_fixed() -> None:
    digest = hashlib.sha256(common_head(10, 128).tobytes()).hexdigest()
    assert digest == "1680970877a9fb787720a87f43344e691a1425a07de693bf75bf1820763abfc3"


def test_more_classes_than_latents_cannot_be_orthogonal() -> None:
    with pytest.raises(UsageError, match="11 classes for latents of 10") as caught:
        common_head(11, 10)
    assert "--latent-size 11" in str(caught.value.hint)
