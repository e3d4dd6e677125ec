"""A teacher's latents and logits on a device's own samples, computed once and kept beside the state file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgestill.runtime.bundle import wire
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.data.classes import KnownClasses, find_places, join_names
from edgestill.runtime.engines.registry import Engine, open_engine
from edgestill.runtime.errors import BundleError, UsageError, WireError
from edgestill.runtime.training.checkpoint import classes_of, load_named_state


@dataclass(frozen=True)
class TeacherOutputs:
    """Latents [N, l] and logits [N, K], float32, one row a sample; None: not published, which `plan` fills."""

    latents: np.ndarray | None = None
    logits: np.ndarray | None = None

    def take(self, chosen: np.ndarray) -> TeacherOutputs:
        return TeacherOutputs(self.latents[chosen], self.logits[chosen])

    @staticmethod
    def zeros(samples: int, latent_size: int, classes: int) -> TeacherOutputs:
        """What stands where there are no outputs and a weight of zero says so."""
        return TeacherOutputs(
            np.zeros((samples, latent_size), np.float32), np.zeros((samples, classes), np.float32)
        )

    @staticmethod
    def joined(first: TeacherOutputs, second: TeacherOutputs) -> TeacherOutputs:
        return TeacherOutputs(
            np.concatenate([first.latents, second.latents]), np.concatenate([first.logits, second.logits])
        )


def split_teacher_name(name: str) -> tuple[Path, Path | None]:
    """`BUNDLE[:CHECKPOINT]` as two paths; a path that exists as it stands is a bundle."""
    if Path(name).exists() or ":" not in name:
        return Path(name), None
    bundle, checkpoint = name.rsplit(":", 1)
    return Path(bundle), Path(checkpoint)


def encode_all(
    engine: Engine, images: np.ndarray, batch: int, more: tuple[np.ndarray, ...] = ()
) -> TeacherOutputs:
    """Latents and logits of all samples (`images` and `more` as in `Dataset`); the last batch is filled up from the
    first samples."""
    latents, logits = [], []
    for start in range(0, len(images), batch):
        chosen = np.arange(start, start + batch) % len(images)
        some_latents, some_logits = engine.encode(*(array[chosen] for array in (images, *more)))
        latents.append(some_latents)
        logits.append(some_logits)
    return TeacherOutputs(np.concatenate(latents)[: len(images)], np.concatenate(logits)[: len(images)])


def in_order_of(
    outputs: TeacherOutputs, teacher: KnownClasses, student: Bundle, names: tuple[str, ...]
) -> TeacherOutputs:
    """Outputs whose logits stand in the order of the student's classes, which `names` name; as they are where nobody
    says, or where the student learns from no logits. Errors: UsageError with both lists."""
    if outputs.logits is None or not student.objective.takes_logits or not (teacher and names):
        return outputs
    if teacher.names == names:
        return outputs
    found = find_places(names, teacher.names)
    columns = [place for place in found if place is not None]
    if len(columns) != outputs.logits.shape[1]:
        raise UsageError(
            f"{teacher.whose} has classes {join_names(teacher.names)}; the student's are {join_names(names)}",
            "use a teacher of the same classes, or one whose latents alone are learnt from (--objective lkd)",
        )
    return TeacherOutputs(outputs.latents, np.ascontiguousarray(outputs.logits[:, columns]))


class Teacher:
    """An opened teacher bundle with its state; engines start only when something is not in the cache."""

    def __init__(self, name: str, student: Bundle, engine_name: str | None, threads: int) -> None:
        """Errors: BundleError or UsageError when the teacher's outputs do not fit the student."""
        path, checkpoint = split_teacher_name(name)
        self._bundle = Bundle.open(path)
        try:
            _check_fits(self._bundle, student)
            if checkpoint is None:
                self._state, self.classes = self._bundle.initial_state(), classes_of(self._bundle)
            else:
                self._state, self.classes = load_named_state(checkpoint, self._bundle)
        except BaseException:
            self._bundle.close()
            raise
        # the student's engine if the teacher has it, else the teacher's own first choice
        self._engine_name = engine_name if engine_name in self._bundle.engines else None
        self._threads = threads
        self._engine: Engine | None = None

    @property
    def digest(self) -> str:
        """SHA-256 over the teacher's model and its state."""
        from edgestill.runtime.data.dataset import digest_of_arrays

        names = np.frombuffer(self._bundle.model_digest.encode(), np.uint8)
        return digest_of_arrays(names, *self._state.values())

    def outputs(
        self, images: np.ndarray, images_digest: str, cache: Path, more: tuple[np.ndarray, ...] = ()
    ) -> TeacherOutputs:
        """Outputs on samples, from the cache if it is of this teacher and samples, else computed and kept."""
        key = {"format": "edgestill-teacher-outputs", "teacher": self.digest, "images": images_digest}
        if cache.exists():
            try:
                cached = wire.load(cache)
            except WireError:
                cached = wire.Tensors({}, {"format": key["format"]})  # a damaged cache is computed anew
            if cached.metadata.get("format") != key["format"]:
                raise UsageError(
                    f"{cache} is where the teacher's outputs are kept, but it is another file",
                    "move it away, or give another --state",
                )
            if cached.metadata == key and {"latents", "logits"} <= cached.arrays.keys():
                return TeacherOutputs(cached.arrays["latents"], cached.arrays["logits"])
        if self._engine is None:
            self._engine = open_engine(self._bundle, self._engine_name, self._threads)
            self._engine.load_state(self._state)
        outputs = encode_all(self._engine, images, self._bundle.batch, more)
        wire.save(cache, {"latents": outputs.latents, "logits": outputs.logits}, key)
        return outputs

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._bundle.close()


def _check_fits(teacher: Bundle, student: Bundle) -> None:
    if not student.objective.needs_teacher:
        raise UsageError(
            f"{student.source}: objective {student.objective.name} takes no teacher",
            "leave --teacher out, or export the student with --objective lkd",
        )
    if student.objective.takes_latents and teacher.latent_size != student.latent_size:
        raise BundleError(
            f"{teacher.source}: latents of {teacher.latent_size}, the student's are of {student.latent_size}",
            f"export the teacher with --latent-size {student.latent_size}",
        )
    wanted = student.objective.teacher_latent_size
    if wanted is not None and teacher.latent_size != wanted:
        raise BundleError(
            f"{teacher.source}: latents of {teacher.latent_size}, the student's heads take {wanted}",
            f"export the student with --teacher-latent-size {teacher.latent_size}",
        )
    if student.objective.takes_logits and teacher.classes != student.classes:
        raise BundleError(
            f"{teacher.source}: {teacher.classes} classes, the student has {student.classes}",
            "use a teacher of the same task",
        )
    taken, expected = ([(s.shape, s.dtype) for s in bundle.samples] for bundle in (teacher, student))
    if taken != expected:
        raise BundleError(
            f"{teacher.source}: takes {' and '.join(map(str, teacher.samples))}, "
            f"the student {' and '.join(map(str, student.samples))}",
            "use a teacher that takes the same samples",
        )
