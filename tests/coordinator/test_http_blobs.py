"""Blobs over HTTP: ranges, conditions, and digests."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgestill.coordinator.http.routes.blobs import parse_range
from edgestill.coordinator.http.routes.bodies import sha256_of_content_digest
from edgestill.coordinator.problems import Problem
from tests.support.coordinator_site import Site, content_digest, make_site, problem_of

pytestmark = pytest.mark.unit


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return make_site(tmp_path)


def test_ranges_and_conditions_of_a_blob(site: Site) -> None:
    device = site.enrol()
    digest = device.get("/v1/assignment").json()["student"]["bundle"]
    path, etag, size = f"/v1/blobs/{digest}", f'"{digest}"', len(site.bundle)
    whole = device.get(path)
    assert whole.headers["etag"] == etag and whole.headers["accept-ranges"] == "bytes"
    assert "private" in whole.headers["cache-control"]
    part = device.get(path, Range="bytes=100-199")
    assert (part.status_code, part.content) == (206, site.bundle[100:200])
    assert part.headers["content-range"] == f"bytes 100-199/{size}"
    assert device.get(path, Range="bytes=2990-", **{"If-Range": etag}).content == site.bundle[2990:]
    assert device.get(path, Range="bytes=1-2", **{"If-Range": '"other"'}).status_code == 200
    assert device.get(path, Range="bytes=0-1,5-6").content == site.bundle
    beyond = device.get(path, Range=f"bytes={size}-")
    assert (
        problem_of(beyond) == "range_not_satisfiable" and beyond.headers["content-range"] == f"bytes */{size}"
    )
    for match in (etag, "*", f'"x", W/{etag}'):
        unchanged = device.get(path, **{"If-None-Match": match})
        assert unchanged.status_code == 304 and unchanged.content == b"" and unchanged.headers["etag"] == etag
    assert device.get(path, **{"If-None-Match": '"other"'}).content == site.bundle
    head = site.client.head(path, headers=device.headers)
    assert head.content == b"" and head.headers["content-length"] == str(size)


@given(st.integers(0, 40), st.integers(0, 60), st.one_of(st.none(), st.integers(0, 60)))
def test_a_range_is_a_slice(size: int, first: int, last: int | None) -> None:
    data = bytes(range(size))
    text = f"bytes={first}-{'' if last is None else last}"
    expected = data[first:] if last is None else data[first : last + 1]
    if last is not None and last < first:
        assert parse_range(text, size) is None
    elif not expected:
        with pytest.raises(Problem):
            parse_range(text, size)
    else:
        start, stop = parse_range(text, size)
        assert data[start:stop] == expected


@given(st.integers(1, 40), st.integers(1, 60))
def test_a_suffix_range_is_the_end(size: int, count: int) -> None:
    data = bytes(range(size))
    start, stop = parse_range(f"bytes=-{count}", size)
    assert data[start:stop] == data[-count:]


@given(st.text(max_size=30))
def test_any_other_range_is_ignored(text: str) -> None:
    try:
        found = parse_range(text, 10)
    except Problem as problem:
        assert problem.kind == "range_not_satisfiable"
    else:
        assert found is None or 0 <= found[0] < found[1] <= 10


def test_a_digest_among_others_is_found() -> None:
    digest = sha256_of_content_digest(content_digest(b"x"))
    for header in (f"md5=:abc=:, {content_digest(b'x')}", f"{content_digest(b'x')};q=1, unknown=?1"):
        assert sha256_of_content_digest(header) == digest
