"""What a device keeps between two moments at which it may be killed: a folder, or memory for a simulation.

| file | what |
| --- | --- |
| `identity.json` | coordinator, device name, token; readable by the owner alone |
| `authority.pem` | the certificate that the enrolment code named, which the coordinator is known by |
| `journal.json` | where the device stands in which round (`participant.Participant`) |
| `student-DIGEST.safetensors` | the student between rounds, of the bundle with this model digest |
| `training-ROUND.safetensors` | checkpoint of a round's training, at its end the trained state |
| `rounds.json` | by model digest, how many rounds the student has been trained in, and the last of them |
| `alone-DIGEST.safetensors` | the same student trained on the device's own data alone, with `--compare-alone` |
| `alone-training-ROUND.N.safetensors` | checkpoint of its training of that number |
| `upload-ROUND.bin` | the body, until the coordinator has it |
| `blobs/` | downloads by SHA-256 |
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from edgestill.runtime.bundle import wire
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.device.participant import Participant
from edgestill.runtime.errors import EdgestillError, StateError, UsageError, WireError
from edgestill.runtime.files import sync, write_atomically

FORMAT = "edgestill-journal"
_MAX_JSON_BYTES = 2**20


@dataclass(frozen=True)
class Alone:
    """A student that learns from nobody: its state after so many trainings, and the last round it is done with."""

    state: Mapping[str, np.ndarray]
    rounds: int = 0
    done: str = ""


class Keep(Protocol):
    """Where a device keeps its things. Every method leaves either the old or the new behind."""

    def read(self) -> Participant:
        """Where the device stands; a new participant when nothing was written yet."""

    def write(self, participant: Participant) -> None:
        """Makes it durable."""

    def student(self, bundle: Bundle) -> dict[str, np.ndarray]:
        """The student's state between rounds: the bundle's initial one before the first."""

    def training_path(self, round_name: str) -> Path | None:
        """Where training keeps its checkpoints; None for nowhere."""

    def keep_trained(self, round_name: str, state: Mapping[str, np.ndarray]) -> None:
        """Keeps the state that training came to, where it is not in `training_path` already."""

    def trained(self, round_name: str, bundle: Bundle) -> dict[str, np.ndarray]:
        """That state."""

    def put_body(self, round_name: str, body: bytes) -> None: ...

    def body(self, round_name: str) -> bytes: ...

    def settle(self, round_name: str, bundle: Bundle) -> None:
        """The trained state becomes that of the student it is of, which may be another than the bundle's by now;
        repeating it does no harm."""

    def rounds(self, bundle: Bundle) -> tuple[int | None, str]:
        """In how many rounds the student was trained, and the last one's name; None where nobody counted."""

    def alone(self, bundle: Bundle) -> Alone:
        """The student that is trained alone."""

    def alone_training_path(self, round_name: str, number: int) -> Path | None:
        """Where the training of that number keeps its checkpoints; None for nowhere."""

    def keep_alone(self, alone: Alone, bundle: Bundle) -> None:
        """Keeps it after a training."""

    def forget_alone(self, bundle: Bundle) -> None:
        """Removes it, so that it starts anew."""

    def clean(self, current_round: str | None) -> None:
        """Removes what belongs to other rounds."""

    def blob_path(self, digest: str) -> Path: ...

    def clean_blobs(self, needed: Collection[str]) -> None:
        """Removes the downloads that nothing asks for any more, such as earlier rounds' global outputs."""


class WorkMemory:
    """A `Keep` that lasts as long as the object; downloads go to `blobs`, which many devices may share."""

    def __init__(self, blobs: Path, student: Mapping[str, np.ndarray] | None = None) -> None:
        self._blobs = blobs
        self._participant = Participant()
        self._student = None if student is None else dict(student)
        self._trained: dict[str, dict[str, np.ndarray]] = {}
        self._bodies: dict[str, bytes] = {}
        self._rounds: tuple[int | None, str] = (0 if student is None else None, "")
        self._alone: Alone | None = None

    def read(self) -> Participant:
        return self._participant

    def write(self, participant: Participant) -> None:
        self._participant = participant

    def student(self, bundle: Bundle) -> dict[str, np.ndarray]:
        return bundle.initial_state() if self._student is None else dict(self._student)

    def training_path(self, round_name: str) -> Path | None:
        return None

    def keep_trained(self, round_name: str, state: Mapping[str, np.ndarray]) -> None:
        self._trained[round_name] = dict(state)

    def trained(self, round_name: str, bundle: Bundle) -> dict[str, np.ndarray]:
        return self._trained[round_name]

    def put_body(self, round_name: str, body: bytes) -> None:
        self._bodies[round_name] = body

    def body(self, round_name: str) -> bytes:
        return self._bodies[round_name]

    def settle(self, round_name: str, bundle: Bundle) -> None:
        if round_name in self._trained:
            self._student = self._trained.pop(round_name)
            self._rounds = _one_more(self._rounds, round_name)

    def rounds(self, bundle: Bundle) -> tuple[int | None, str]:
        return self._rounds

    def alone(self, bundle: Bundle) -> Alone:
        return self._alone or Alone(bundle.initial_state())

    def alone_training_path(self, round_name: str, number: int) -> Path | None:
        return None

    def keep_alone(self, alone: Alone, bundle: Bundle) -> None:
        self._alone = alone

    def forget_alone(self, bundle: Bundle) -> None:
        self._alone = None

    def clean(self, current_round: str | None) -> None:
        for kept in (self._trained, self._bodies):
            for name in [name for name in kept if name != current_round]:
                del kept[name]

    def blob_path(self, digest: str) -> Path:
        return self._blobs / digest

    def clean_blobs(self, needed: Collection[str]) -> None:
        pass  # other devices may use them


class WorkFolder:
    """A `Keep` in a folder, of one process at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            (folder / "blobs").mkdir(parents=True, exist_ok=True)
            self._lock = _lock(folder / "lock")
        except OSError as error:
            raise UsageError(
                f"--work-dir {folder}: {error.strerror or error}", "give a folder that can be written"
            ) from error

    def close(self) -> None:
        self._lock.close()

    def identity(self) -> dict[str, str] | None:
        """`{"url", "device", "token", "task"}`; None before enrolment. Errors: StateError."""
        value = _read_json(self.folder / "identity.json")
        if value is None:
            return None
        if any(not isinstance(value.get(name), str) for name in ("url", "device", "token", "task")):
            raise StateError(
                f"{self.folder / 'identity.json'} is not readable", "enrol again in another --work-dir"
            )
        return value

    def write_identity(self, identity: Mapping[str, str]) -> None:
        """Keeps the token, for the owner's eyes alone."""
        text = json.dumps(dict(identity), indent=1)
        write_atomically(self.folder / "identity.json", [text.encode()], mode=0o600)

    def authority(self) -> Path | None:
        """The certificate that the code named; None where it named none."""
        path = self.folder / "authority.pem"
        return path if path.exists() else None

    def write_authority(self, certificate: str) -> None:
        write_atomically(self.folder / "authority.pem", [certificate.encode()])

    def read(self) -> Participant:
        path = self.folder / "journal.json"
        value = _read_json(path)
        if value is None:
            return Participant()
        try:
            if value["format"] != FORMAT or value["format_version"] != 1:
                raise StateError(f"format {value['format']!r}, version {value['format_version']!r}")
            return Participant.from_json(value["participant"])
        except (KeyError, TypeError, StateError) as error:
            raise StateError(
                f"{path} is not a journal of this version: {error}",
                "remove it: the device then starts with its next round",
            ) from error

    def write(self, participant: Participant) -> None:
        value = {"format": FORMAT, "format_version": 1, "participant": participant.as_json()}
        write_atomically(self.folder / "journal.json", [json.dumps(value, indent=1).encode()])

    def student(self, bundle: Bundle) -> dict[str, np.ndarray]:
        path = self.student_path(bundle)
        if not path.exists():
            return bundle.initial_state()
        return bundle.check_state(wire.load(path).arrays, source=str(path))

    def training_path(self, round_name: str) -> Path | None:
        return self.folder / f"training-{round_name}.safetensors"

    def keep_trained(self, round_name: str, state: Mapping[str, np.ndarray]) -> None:
        pass  # the last checkpoint is that state

    def trained(self, round_name: str, bundle: Bundle) -> dict[str, np.ndarray]:
        path = self.folder / f"training-{round_name}.safetensors"
        return bundle.check_state(wire.load(path).arrays, source=str(path))

    def put_body(self, round_name: str, body: bytes) -> None:
        write_atomically(self.folder / f"upload-{round_name}.bin", [body])

    def body(self, round_name: str) -> bytes:
        path = self.folder / f"upload-{round_name}.bin"
        return path.read_bytes() if path.exists() else b""

    def settle(self, round_name: str, bundle: Bundle) -> None:
        trained = self.folder / f"training-{round_name}.safetensors"
        if trained.exists():  # else it happened before the device was killed
            model = _model_of(trained) or bundle.model_digest
            counts = _read_json(self._counts_path) or {}
            # counted first: whoever is killed in between does it again, and does not count the same round twice
            counts[model] = _one_more(self._rounds_of(model), round_name)
            write_atomically(self._counts_path, [json.dumps(counts, indent=1).encode()])
            os.replace(trained, self._path_of(model))
            sync(self.folder)

    def rounds(self, bundle: Bundle) -> tuple[int | None, str]:
        return self._rounds_of(bundle.model_digest)

    def alone(self, bundle: Bundle) -> Alone:
        path = self._alone_path(bundle)
        if path.exists():
            found = wire.load(path)
            if "rounds" in found.metadata:  # else nobody counted, and it begins anew
                state = bundle.check_state(found.arrays, source=str(path))
                return Alone(state, int(found.metadata["rounds"]), found.metadata["round"])
        return Alone(bundle.initial_state())

    def alone_training_path(self, round_name: str, number: int) -> Path | None:
        return self.folder / f"alone-training-{round_name}.{number}.safetensors"

    def keep_alone(self, alone: Alone, bundle: Bundle) -> None:
        about = {"round": alone.done, "rounds": str(alone.rounds)}
        wire.save(self._alone_path(bundle), alone.state, about)

    def forget_alone(self, bundle: Bundle) -> None:
        self._alone_path(bundle).unlink(missing_ok=True)

    def clean(self, current_round: str | None) -> None:
        kept = (f"training-{current_round}.", f"alone-training-{current_round}.", f"upload-{current_round}.")
        for pattern in ("training-*", "alone-training-*", "upload-*", ".*.partial"):
            for path in self.folder.glob(pattern):
                if not path.name.startswith(kept):
                    path.unlink(missing_ok=True)

    def blob_path(self, digest: str) -> Path:
        return self.folder / "blobs" / digest

    def clean_blobs(self, needed: Collection[str]) -> None:
        for path in (self.folder / "blobs").iterdir():
            if path.name.removesuffix(".partial") not in needed:
                path.unlink(missing_ok=True)

    def student_path(self, bundle: Bundle) -> Path:
        """Where the student lies once a round has been trained: a state file like any other."""
        return self._path_of(bundle.model_digest)

    def other_students(self, bundle: Bundle) -> list[Path]:
        """The files of students that this device trained before it got the bundle's; none once it has trained that."""
        if self.student_path(bundle).exists():
            return []
        return sorted(self.folder.glob("student-*.safetensors"))

    def _path_of(self, model_digest: str) -> Path:
        return self.folder / f"student-{model_digest[:16]}.safetensors"

    def _rounds_of(self, model_digest: str) -> tuple[int | None, str]:
        found = (_read_json(self._counts_path) or {}).get(model_digest)
        if isinstance(found, list) and len(found) == 2:
            return found[0], str(found[1])
        # an older edgestill trained without counting
        return None if self._path_of(model_digest).exists() else 0, ""

    @property
    def _counts_path(self) -> Path:
        return self.folder / "rounds.json"

    def _alone_path(self, bundle: Bundle) -> Path:
        return self.folder / f"alone-{bundle.model_digest[:16]}.safetensors"


def _one_more(rounds: tuple[int | None, str], round_name: str) -> tuple[int | None, str]:
    count, last = rounds
    return (count if count is None or last == round_name else count + 1), round_name


def _model_of(path: Path) -> str | None:
    """The digest of the model that a training's checkpoint is of; None where it does not say."""
    try:
        return str(json.loads(wire.load(path).metadata["run"])["model"])
    except (KeyError, TypeError, ValueError, WireError):
        return None


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        with path.open("rb") as file:
            value = json.loads(file.read(_MAX_JSON_BYTES))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise StateError(f"{path}: not readable: {error}", "remove it, or give another --work-dir") from error
    if not isinstance(value, dict):
        raise StateError(f"{path}: not a JSON object", "remove it, or give another --work-dir")
    return value


def _lock(path: Path) -> IO[bytes]:
    """Keeps a second process out for as long as the file is open; the system frees it however a process ends."""
    file = path.open("ab")
    try:
        import fcntl
    except ImportError:  # Windows
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise EdgestillError(
            f"{path.parent} is in use by another `edgestill join`",
            "give every device a --work-dir of its own",
        ) from error
    return file
