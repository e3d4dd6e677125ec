"""The contract of blobs, the same on files, in memory and on an S3 server; and what only files promise."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgestill.coordinator.store.blobs import BlobError, Blobs, FileBlobs, ObjectBlobs, open_blobs, read_blob
from tests.support.coordinator_backends import blobs, s3_server  # noqa: F401  fixtures

pytestmark = pytest.mark.unit
MISSING = "0" * 64


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("data", [b"", b"x", os.urandom(3 << 20)], ids=["empty", "one", "3 MiB"])
def test_a_blob_comes_back_as_it_was(blobs: Blobs, data: bytes) -> None:  # noqa: F811
    digest = blobs.put(data)
    assert digest == digest_of(data)
    assert blobs.size(digest) == len(data)
    assert read_blob(blobs, digest) == data
    assert blobs.path(digest).read_bytes() == data


def test_chunks_files_and_bytes_are_the_same_blob(blobs: Blobs, tmp_path: Path) -> None:  # noqa: F811
    path = tmp_path / "some"
    path.write_bytes(b"one two")

    def chunks() -> Iterator[bytes]:
        yield b"one"
        yield b" two"

    assert {blobs.put(chunks()), blobs.put_file(path), blobs.put(b"one two")} == {digest_of(b"one two")}


def test_ranges_are_those_of_the_bytes(blobs: Blobs) -> None:  # noqa: F811
    data = os.urandom(9 << 20)
    digest = blobs.put(data)
    for start, stop in ((0, 1), (5, 5), (1 << 20, 9 << 20), (len(data) - 1, None), (7, None), (3, 2**40)):
        assert b"".join(blobs.open_range(digest, start, stop)) == data[start:stop]


@pytest.mark.parametrize("digest", [MISSING, "../../etc/passwd", "", "A" * 64, "0" * 63 + "/"])
def test_a_blob_that_is_not_there(blobs: Blobs, digest: str) -> None:  # noqa: F811
    assert blobs.size(digest) is None
    with pytest.raises(BlobError, match="no blob"):
        blobs.open_range(digest)
    with pytest.raises(BlobError, match="no blob"):
        blobs.path(digest)
    blobs.delete(digest)


def test_a_deleted_blob_is_gone_and_can_come_again(blobs: Blobs) -> None:  # noqa: F811
    digest = blobs.put(b"gone")
    blobs.delete(digest)
    assert blobs.size(digest) is None
    assert blobs.put(b"gone") == digest
    assert read_blob(blobs, digest) == b"gone"


def test_many_writers_of_the_same_and_of_other_blobs(blobs: Blobs) -> None:  # noqa: F811
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda index=index: found.append(blobs.put(b"%d" % (index % 3))))
        for index in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted(digest_of(b"%d" % (index % 3)) for index in range(12))


def test_a_writer_that_fails_leaves_nothing(blobs: Blobs, tmp_path: Path) -> None:  # noqa: F811
    def chunks() -> Iterator[bytes]:
        yield b"half"
        raise RuntimeError("the source fails")

    with pytest.raises(RuntimeError):
        blobs.put(chunks())
    assert blobs.size(digest_of(b"half")) is None
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_s3_is_reached_by_other_instances_and_prefixes_are_apart(s3_server: str) -> None:  # noqa: F811
    digest = open_blobs("s3://edgestill/one").put(b"shared")
    assert read_blob(open_blobs("s3://edgestill/one"), digest) == b"shared"
    assert open_blobs("s3://edgestill/other").size(digest) is None


def test_an_object_store_that_is_away_is_a_blob_error(s3_server: str) -> None:  # noqa: F811
    away = ObjectBlobs("s3://edgestill/x", endpoint="http://127.0.0.1:9", retry_config={"max_retries": 0})
    for call in (lambda: away.put(b"x"), lambda: away.size(MISSING), lambda: away.delete(MISSING)):
        with pytest.raises(BlobError, match="s3://edgestill/x"):
            call()
    with pytest.raises(BlobError, match="s3://no-such-bucket"):
        ObjectBlobs("s3://no-such-bucket").put(b"x")


def test_a_location_that_means_nothing() -> None:
    with pytest.raises(BlobError, match="nowhere://"):
        open_blobs("nowhere://x")


def test_damaged_bytes_are_seen(tmp_path: Path) -> None:
    files = FileBlobs(tmp_path)
    digest = files.put(b"intact")
    files.path(digest).write_bytes(b"broken")
    with pytest.raises(BlobError, match="digest"):
        read_blob(files, digest)
    assert files.put(b"intact") == digest
    assert read_blob(files, digest) == b"intact"


def test_what_a_killed_writer_left_is_cleared_after_a_day(tmp_path: Path) -> None:
    files = FileBlobs(tmp_path)
    digest = files.put(b"kept")
    old, young = tmp_path / "incoming/old", tmp_path / "incoming/young"
    old.write_bytes(b"half")
    young.write_bytes(b"half")
    os.utime(old, (0, 0))
    again = FileBlobs(tmp_path)
    assert not old.exists() and young.exists()
    assert read_blob(again, digest) == b"kept"


def test_bytes_and_name_are_flushed_before_put_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = FileBlobs(tmp_path)
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def seen_fsync(descriptor: int) -> None:
        target = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append("folder" if target.is_dir() else "file")
        fsync(descriptor)

    def seen_replace(source: Path, target: Path) -> None:
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "replace", seen_replace)
    files.put(b"durable")
    assert events == ["file", "rename", "folder"]
