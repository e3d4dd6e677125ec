"""Blobs by the SHA-256 of their bytes: in a folder, or in an object store (S3 and what speaks like it).

A blob never changes, so it may be put twice, cached for ever, and read by any replica. `put` returns only when
the bytes are durable: whoever commits a digest to the database afterwards never points at nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from edgestill.runtime.errors import EdgestillError
from edgestill.runtime.files import sync

CHUNK_BYTES = 1 << 20
_ABANDONED_S = 86_400.0
_DIGEST = re.compile(r"[0-9a-f]{64}")


class BlobError(EdgestillError):
    """A blob that is not there, is damaged, or could not be stored."""


class Blobs(Protocol):
    """What the service needs of a place for blobs; `FileBlobs` and `ObjectBlobs` keep the same contract."""

    def put(self, data: bytes | bytearray | Iterable[bytes], digest: str | None = None) -> str:
        """Stores the bytes durably and returns their digest; the same bytes again are stored once.

        `digest` is that of the bytes, where the caller has computed it already.
        """

    def put_file(self, path: Path) -> str:
        """Stores a file's bytes durably and returns their digest."""

    def open_range(self, digest: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """The bytes from `start` up to `stop` (the end) in chunks. Errors: BlobError when there is no such blob."""

    def size(self, digest: str) -> int | None:
        """How many bytes the blob has; None when there is none."""

    def path(self, digest: str) -> Path:
        """The blob as a local file, not to be changed. Errors: BlobError, also when the copy is damaged."""

    def delete(self, digest: str) -> None:
        """Removes the blob, if it is there."""

    def age_s(self, digest: str) -> float | None:
        """Seconds since the blob was put last, by the clock of the place; None when there is none."""

    def older_than(self, age_s: float) -> Iterator[str]:
        """Digests of the blobs that were put last longer ago than this."""


def open_blobs(location: str) -> Blobs:
    """The place that a setting names: `s3://BUCKET/PREFIX`, `memory://`, or a folder."""
    return ObjectBlobs(location) if "://" in location else FileBlobs(Path(location))


def read_blob(blobs: Blobs, digest: str) -> bytes:
    """All bytes of a blob, checked against the digest. Errors: BlobError."""
    data = b"".join(blobs.open_range(digest))
    if hashlib.sha256(data).hexdigest() != digest:
        raise BlobError(f"blob {digest}: its bytes have another digest", "restore it from a backup")
    return data


class FileBlobs:
    """Blobs in a folder: `ab/abcd…`, written under `incoming` and renamed."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._incoming = self.folder / "incoming"
        try:
            self._make_folders()
        except OSError as error:
            raise BlobError(
                f"{self.folder}: cannot make the folder: {error.strerror}", "choose another --blobs"
            ) from error
        self._remove_abandoned()

    def put(self, data: bytes | bytearray | Iterable[bytes], digest: str | None = None) -> str:
        chunks = [data] if isinstance(data, bytes | bytearray | memoryview) else data
        try:
            return self._put(chunks, digest)
        except OSError as error:
            raise BlobError(
                f"{self.folder}: cannot write: {error.strerror or error}", "check rights and free space"
            ) from error

    def put_file(self, path: Path) -> str:
        return self.put(_chunks_of(Path(path)))

    def open_range(self, digest: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        if self.size(digest) is None:
            raise _missing(digest)
        return _chunks_of(self._place(digest), start, stop)

    def size(self, digest: str) -> int | None:
        if not _DIGEST.fullmatch(digest):
            return None
        try:
            return self._place(digest).stat().st_size
        except FileNotFoundError:
            return None

    def path(self, digest: str) -> Path:
        if self.size(digest) is None:
            raise _missing(digest)
        return self._place(digest)

    def delete(self, digest: str) -> None:
        if _DIGEST.fullmatch(digest):
            self._place(digest).unlink(missing_ok=True)

    def age_s(self, digest: str) -> float | None:
        if not _DIGEST.fullmatch(digest):
            return None
        try:
            return time.time() - self._place(digest).stat().st_mtime
        except FileNotFoundError:
            return None

    def older_than(self, age_s: float) -> Iterator[str]:
        for folder in sorted(self.folder.glob("[0-9a-f][0-9a-f]")):
            for path in sorted(folder.iterdir()):
                if (age := self.age_s(path.name)) is not None and age > age_s:
                    yield path.name

    def _put(self, chunks: Iterable[bytes], digest: str | None) -> str:
        descriptor, temporary = tempfile.mkstemp(dir=self._incoming)
        try:
            hasher = hashlib.sha256()
            with os.fdopen(descriptor, "wb", buffering=0) as file:
                for chunk in chunks:
                    if digest is None:
                        hasher.update(chunk)
                    _write_all(file, chunk)
                os.fsync(file.fileno())
            digest = digest or hasher.hexdigest()
            place = self._place(digest)
            os.replace(temporary, place)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        sync(place.parent)
        return digest

    def _make_folders(self) -> None:
        """All folders at once: a folder made with a blob would have to be flushed before the blob counts."""
        self._incoming.mkdir(parents=True, exist_ok=True)
        for number in range(256):
            (self.folder / f"{number:02x}").mkdir(exist_ok=True)
        sync(self.folder)

    def _place(self, digest: str) -> Path:
        return self.folder / digest[:2] / digest

    def _remove_abandoned(self) -> None:
        """Clears what a killed process left half written; another replica's present writes are younger."""
        for path in self._incoming.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < time.time() - _ABANDONED_S:
                    path.unlink()


class ObjectBlobs:
    """Blobs in an object store under `ab/abcd…`; credentials and endpoint come from the environment (`AWS_…`)."""

    def __init__(self, url: str, **options: Any) -> None:
        self._url = url
        try:
            import obstore
        except ImportError as error:
            raise BlobError(f"{url} needs obstore", "pip install 'edgestill[s3]'") from error
        self._obstore = obstore
        if url.startswith("s3://") and os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://"):
            options.setdefault("client_options", {"allow_http": True})
        try:
            if url.startswith("memory:"):
                self._store: Any = obstore.store.MemoryStore()
            else:
                self._store = obstore.store.from_url(url, **options)
        except (obstore.exceptions.BaseError, ValueError) as error:
            raise BlobError(f"{url}: {error}", "give --blobs s3://BUCKET/PREFIX or a folder") from error
        self._copies = tempfile.TemporaryDirectory(prefix="edgestill-blobs-", ignore_cleanup_errors=True)

    def put(self, data: bytes | bytearray | Iterable[bytes], digest: str | None = None) -> str:
        if isinstance(data, bytes | bytearray | memoryview):
            digest = digest or hashlib.sha256(data).hexdigest()
            with self._errors("store", digest):
                self._obstore.put(self._store, _key(digest), bytes(data))
            return digest
        # the key is the digest, so the bytes must all have been seen before the first is sent
        with tempfile.NamedTemporaryFile(dir=self._copies.name, delete=False) as file:
            for chunk in data:
                file.write(chunk)
        try:
            return self.put_file(Path(file.name))
        finally:
            Path(file.name).unlink(missing_ok=True)

    def put_file(self, path: Path) -> str:
        hasher = hashlib.sha256()
        for chunk in _chunks_of(Path(path)):
            hasher.update(chunk)
        digest = hasher.hexdigest()
        with self._errors("store", digest):
            self._obstore.put(self._store, _key(digest), Path(path))
        return digest

    def open_range(self, digest: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        size_bytes = self.size(digest)
        if size_bytes is None:
            raise _missing(digest)
        return self._ranges(digest, start, size_bytes if stop is None else min(stop, size_bytes))

    def size(self, digest: str) -> int | None:
        if not _DIGEST.fullmatch(digest):
            return None
        with self._errors("look up", digest):
            try:
                return int(self._obstore.head(self._store, _key(digest))["size"])
            except FileNotFoundError:
                return None

    def path(self, digest: str) -> Path:
        if not _DIGEST.fullmatch(digest):
            raise _missing(digest)
        copy = Path(self._copies.name) / digest
        if copy.is_file():
            return copy
        hasher = hashlib.sha256()
        with tempfile.NamedTemporaryFile(dir=self._copies.name, delete=False) as file:
            for chunk in self.open_range(digest):
                hasher.update(chunk)
                file.write(chunk)
        if hasher.hexdigest() != digest:
            Path(file.name).unlink()
            raise BlobError(f"{self._url}: blob {digest} is damaged", "restore it from a backup")
        os.replace(file.name, copy)
        return copy

    def delete(self, digest: str) -> None:
        if _DIGEST.fullmatch(digest):
            with self._errors("delete", digest), contextlib.suppress(FileNotFoundError):  # some stores say so
                self._obstore.delete(self._store, _key(digest))

    def age_s(self, digest: str) -> float | None:
        if not _DIGEST.fullmatch(digest):
            return None
        with self._errors("look up", digest):
            try:
                return _age_s(self._obstore.head(self._store, _key(digest)))
            except FileNotFoundError:
                return None

    def older_than(self, age_s: float) -> Iterator[str]:
        with self._errors("list", "of every"):
            for found in self._obstore.list(self._store):
                for meta in found:
                    digest = str(meta["path"]).rpartition("/")[2]
                    if _DIGEST.fullmatch(digest) and meta["path"] == _key(digest) and _age_s(meta) > age_s:
                        yield digest

    def _ranges(self, digest: str, start: int, stop: int) -> Iterator[bytes]:
        for position in range(start, stop, 8 * CHUNK_BYTES):
            with self._errors("read", digest):
                end = min(stop, position + 8 * CHUNK_BYTES)
                data = self._obstore.get_range(self._store, _key(digest), start=position, end=end)
            yield bytes(data)

    @contextlib.contextmanager
    def _errors(self, verb: str, digest: str) -> Iterator[None]:
        try:
            yield
        except (self._obstore.exceptions.BaseError, OSError) as error:
            raise BlobError(
                f"{self._url}: cannot {verb} blob {digest[:12]}…: {error}",
                "check the bucket, AWS_ENDPOINT_URL and the credentials",
            ) from error


def _age_s(meta: Mapping[str, Any]) -> float:
    return time.time() - float(meta["last_modified"].timestamp())


def _key(digest: str) -> str:
    return f"{digest[:2]}/{digest}"


def _missing(digest: str) -> BlobError:
    return BlobError(f"there is no blob {digest}", "check that database and blobs belong together")


def _chunks_of(path: Path, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        remaining = None if stop is None else max(0, stop - start)
        while chunk := file.read(CHUNK_BYTES if remaining is None else min(CHUNK_BYTES, remaining)):
            remaining = None if remaining is None else remaining - len(chunk)
            yield chunk


def _write_all(file: Any, chunk: bytes | bytearray) -> None:
    rest = memoryview(chunk)
    while len(rest):  # without a buffer, a write may take a part only
        rest = rest[file.write(rest) :]
