"""Writes a bundle, a folder or a .zip, whole or not at all, so that `Bundle.open` finds what its manifest says."""

from __future__ import annotations

import glob
import json
import shutil
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from edgestill.runtime.bundle.manifest import FORMAT
from edgestill.runtime.errors import UsageError
from edgestill.runtime.files import sha256_of_file, sync, write_atomically


@contextmanager
def replacing(output: Path, source: Path | None = None) -> Iterator[Path]:
    """A folder, empty or a copy of `source`, that takes the place of `output` when the block ends without an error.

    It is packed if `output` ends in `.zip` or is a file. After an error, also of the move, `output` is as it was.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(output)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch:
        new, old = Path(scratch) / "bundle", Path(scratch) / "replaced"
        new.mkdir(mode=0o755)
        if source is not None:
            shutil.copytree(source, new, dirs_exist_ok=True)
        yield new
        if output.suffix == ".zip" or output.is_file():
            new = zip_bundle(new, Path(scratch) / "bundle.zip")
        for path in [new, *new.rglob("*")] if new.is_dir() else [new]:
            sync(path)
        if output.is_dir():  # stays until the scratch folder goes, so that a failing move loses nothing
            output.rename(old)
        try:
            new.replace(output)
        except OSError:
            if old.exists():
                old.rename(output)
            raise
        sync(output.parent)


def _remove_stale(output: Path) -> None:
    """Removes what a killed export left over an hour ago; a younger one may belong to a writer."""
    for folder in output.parent.glob(f".{glob.escape(output.name)}.????????"):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > 3600:
                shutil.rmtree(folder)


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes manifest.json with the digests of all other files in the folder."""
    paths = [
        path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / "manifest.json"
    ]
    files = {
        path.relative_to(folder).as_posix(): {
            "sha256": sha256_of_file(path),
            "size_bytes": path.stat().st_size,
        }
        for path in paths
    }
    text = json.dumps({**manifest, "files": files}, indent=1) + "\n"
    write_atomically(folder / "manifest.json", [text.encode()])


def zip_bundle(folder: Path, target: Path) -> Path:
    """A bundle's folder as a .zip whose bytes depend on nothing but its files' names and bytes."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for path in sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).as_posix()):
            if path.is_file():
                # neither clock nor file rights may change the digest
                member = zipfile.ZipInfo(path.relative_to(folder).as_posix(), (1980, 1, 1, 0, 0, 0))
                member.compress_type = zipfile.ZIP_DEFLATED
                member.external_attr = 0o644 << 16
                archive.writestr(member, path.read_bytes())
    return target


def check_output(output: Path, overwrite: bool) -> None:
    """Errors: UsageError for a bundle that is there already, unless `overwrite`, and for anything else there."""
    if output.is_symlink() and not output.exists():
        raise UsageError(f"{output} is a link to nothing", hint="give another --output")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    is_bundle = _is_bundle(output)
    if not (is_bundle and overwrite):
        hint = "add --overwrite to replace the bundle" if is_bundle else "give another --output"
        raise UsageError(f"{output} exists already", hint)


def _is_bundle(path: Path) -> bool:
    """Whether a bundle of whatever version, damaged or not, is at `path`; no other folder is ever deleted."""
    try:
        opened = path if path.is_dir() else zipfile.Path(path)
        manifest = json.loads((opened / "manifest.json").read_bytes())
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT
