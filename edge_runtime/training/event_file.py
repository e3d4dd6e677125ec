"""Figures of a run as a TensorBoard event file: TFRecord frames of Event messages (protocol buffers), scalars alone.

Written by hand because TensorBoard's own writer needs packages that no device has. Formats: tensorflow/core/lib/io/
record_writer.h, tensorflow/core/util/event.proto and framework/summary.proto.
"""

from __future__ import annotations

import errno
import math
import os
import platform
import struct
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from edgestill.runtime.errors import UsageError
from edgestill.runtime.training.trainer import StepRecord

_STARTED = bytes((0x08, 0x01))  # SessionLog.status = START


def figures_of(record: StepRecord) -> dict[str, float | None]:
    """A step's figures by tag."""
    return {
        "train/loss": record.loss,
        "train/ce_loss": record.ce_loss,
        "train/distillation_loss": record.distillation_loss,
        "train/accuracy": record.accuracy,
        "train/learning_rate": record.learning_rate,
        "train/step_ms": record.ms,
    }


class EventFile:
    """A new event file in `folder`, which TensorBoard reads together with the older ones there.

    Each figure is written when `add` returns. A disk that is full later ends the file, with a warning, and not the run.
    `clock`: seconds of the epoch. Errors: UsageError where nothing can be written.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        stem = f"events.out.tfevents.{int(clock()):010d}.{platform.node() or 'device'}.{os.getpid()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            number = 0
            while (path := folder / f"{stem}.{number}").exists():
                number += 1
            self._file = path.open("xb", buffering=0)
        except OSError as error:
            raise UsageError(
                f"--log-dir {folder}: {error.strerror or error}", "give a folder that can be written"
            ) from error
        self._write(_message(3, b"brain.Event:2"))

    def begin(self, step: int) -> None:
        """Figures of older files from this step on, of whatever tag, are of a run that was stopped, and void."""
        self._write(_varint_field(2, step) + _message(7, _STARTED))

    def add(self, step: int, figures: Mapping[str, float | None]) -> None:
        """Figures at a step, by tag, such as `train/loss`; those that are None or not finite are left out."""
        values = b"".join(
            _message(1, _message(1, tag.encode()) + b"\x15" + struct.pack("<f", value))
            for tag, value in figures.items()
            if value is not None and math.isfinite(value)
        )
        if values:
            self._write(_varint_field(2, step) + _message(5, values))

    def close(self) -> None:
        """Closing twice is harmless."""
        self._file.close()

    def _write(self, rest: bytes) -> None:
        event = b"\x09" + struct.pack("<d", self._clock()) + rest
        length = struct.pack("<Q", len(event))
        if self._file.closed:
            return
        frame = length + _checksum(length) + event + _checksum(event)
        try:
            if self._file.write(frame) != len(frame):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            print(f"edgestill: warning: {self._file.name}: {error.strerror}: no more figures", file=sys.stderr)
            self._file.close()

    def __enter__(self) -> EventFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _varint(number: int) -> bytes:
    parts = bytearray()
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*parts, number))


def _varint_field(field: int, number: int) -> bytes:
    return _varint(field << 3) + _varint(number)


def _message(field: int, body: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(body)) + body


def _crc32c_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_TABLE = _crc32c_table()


def _checksum(data: bytes) -> bytes:
    """The masked CRC-32C of a frame. Source: RFC 3720, B.4; the mask is TFRecord's."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
