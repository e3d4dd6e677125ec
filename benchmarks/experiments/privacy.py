"""Experiment `privacy`: images rebuilt from the latents or logits that a device uploads, by protection.

A student learns private images as a device's first round trains it, and its outputs on the transfer set are packed as
step 4 packs them, with the clipping, noise and precision of the cell. The attacks read the unpacked body. Who knows
what, and what the numbers do not say: docs/privacy.md, "Attacks, measured".
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgestill.benchmarks.experiments.exports import ENGINE, export_cached
from edgestill.benchmarks.experiments.grid import Cell, Context, Options, Stage
from edgestill.benchmarks.experiments.inversion import (
    Represent,
    invert_by_gradient,
    psnr_db,
    ssim,
    train_decoder,
)
from edgestill.benchmarks.experiments.locks import locked
from edgestill.benchmarks.experiments.privacy_report import encode_strip, make_report
from edgestill.benchmarks.experiments.report import Report, require_one_each
from edgestill.benchmarks.experiments.sources import load_data, load_transfer
from edgestill.export.parity.reference import load_student_state, rebuild_student
from edgestill.runtime.bundle.bundle import Bundle
from edgestill.runtime.data.dataset import Dataset
from edgestill.runtime.device import outputs
from edgestill.runtime.device.local_round import Equipment, Privacy, expected_outputs, pack_round
from edgestill.runtime.device.local_round import Options as DeviceOptions
from edgestill.runtime.device.local_training import LocalSettings, Transfer, train_locally
from edgestill.runtime.device.privacy import epsilon
from edgestill.runtime.engines.registry import Engine, open_engine
from edgestill.runtime.errors import DataError
from edgestill.runtime.randomness import SUBSET, permutation
from edgestill.runtime.training.evaluation import evaluate
from edgestill.simulation.bundles import BundleRequest

NAME = "privacy"
TITLE = "Images rebuilt from uploaded latents and logits, by protection"
PROTECTIONS: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "int8": {"precision": "int8"},
    "clip": {"clip": 1.0},
    "noise 0.0001": {"clip": 1.0, "noise_multiplier": 1e-4},
    "noise 0.001": {"clip": 1.0, "noise_multiplier": 1e-3},
    "noise 0.01": {"clip": 1.0, "noise_multiplier": 1e-2},
    "noise 1": {"clip": 1.0, "noise_multiplier": 1.0},
}
"""Clip 1.0 shortens every row of this student, so that only directions are left."""
FULL = {
    "latents": tuple(PROTECTIONS),
    "logits": ("none", "int8", "noise 0.001"),
}
QUICK = {"latents": ("none", "int8", "clip", "noise 0.001", "noise 1"), "logits": ("none",)}
COMMON = {
    "student": "cnn3", "widths": "", "batch": 32, "latent_size": 128, "learning_rate": 0.01, "precision": "fp32",
    "clip": None, "noise_multiplier": 0.0, "smoothness": [1.0, 10.0],
}  # fmt: skip
FULL_SIZE = {
    "private_samples": 2000, "epochs": 20, "transfer_samples": 5000, "attacked_samples": 200, "decoder_epochs": 8,
    "gradient_samples": 24, "gradient_steps": 100,
}  # fmt: skip
QUICK_SIZE = {
    "private_samples": 1000, "epochs": 8, "transfer_samples": 1000, "attacked_samples": 100, "decoder_epochs": 8,
    "gradient_samples": 16, "gradient_steps": 60,
}  # fmt: skip
FULL_SEEDS, QUICK_SEEDS, PICTURES = 3, 1, 4
CPU_S_A_CELL, CPU_S_A_STUDENT = {False: 150.0, True: 25.0}, {False: 90.0, True: 20.0}
"""Measured on one of two busy cores of an AMD EPYC."""


@dataclass(frozen=True)
class Victim:
    """A device with its trained student, which an attacker wants to know the images of."""

    bundle: Bundle
    engine: Engine
    private: Dataset
    state: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Targets:
    """Images [N, C, H, W] as the bundle takes them: the coordinator's to learn from and to choose by, and to attack."""

    known: np.ndarray
    validation: np.ndarray
    attacked: Mapping[str, np.ndarray]


def stages(options: Options) -> list[Stage]:
    return [lambda records: cells(options)]


def cells(options: Options) -> list[Cell]:
    """Every protection of both exchanges for every seed; pictures are kept of the first seed only."""
    grid, size, seeds = (QUICK, QUICK_SIZE, QUICK_SEEDS) if options.quick else (FULL, FULL_SIZE, FULL_SEEDS)
    # seeds innermost, so that workers begin with different students
    return [
        Cell(NAME, {**COMMON, **size, **PROTECTIONS[protection], "exchange": exchange, "protection": protection,
                    "seed": seed, "pictures": 0 if seed else PICTURES, "data": options.data,
                    "transfer": options.transfer, "quick": options.quick})
        for exchange, protections in grid.items()
        for protection in protections
        for seed in range(options.seeds or seeds)
    ]  # fmt: skip


def estimate_minutes(options: Options, workers: int) -> float:
    grid = cells(options)
    seeds = len({cell.settings["seed"] for cell in grid})
    cpu_s = len(grid) * CPU_S_A_CELL[options.quick] + seeds * CPU_S_A_STUDENT[options.quick]
    return cpu_s / 60 / workers


def report(records: Sequence[Mapping[str, Any]]) -> Report:
    require_one_each(records, ("exchange", "protection", "seed"))
    return make_report(sorted(records, key=_place), TITLE)


def _place(record: Mapping[str, Any]) -> tuple[bool, int, int]:
    settings = record["settings"]
    return settings["exchange"] != "latents", [*PROTECTIONS].index(settings["protection"]), settings["seed"]


def run_cell(settings: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Trains the student (or finds it trained), releases its outputs with the cell's protection and attacks them."""
    torch.set_num_threads(1)  # sums over several threads round differently
    test = load_data(context.data).choose("test")
    transfer = load_transfer(context.transfer)
    with open_victim(settings, context) as victim:
        unseen = test.take(settings["attacked_samples"], settings["seed"]).images
        targets = _targets(settings, transfer, victim.private, unseen)
        bundle = victim.bundle
        accuracy = evaluate(victim.engine, test, bundle.batch, bundle.classes).accuracy
        return {"student_accuracy": accuracy, **_attack(settings, victim, targets)}


@contextmanager
def open_victim(settings: Mapping[str, Any], context: Context) -> Iterator[Victim]:
    """A device with its student trained, its engine holding that state."""
    context.cache.mkdir(parents=True, exist_ok=True)
    bundle = Bundle.open(_exported(settings, context.cache))
    engine = open_engine(bundle, ENGINE, threads=1)
    try:
        private = load_data(context.data).train.take(settings["private_samples"], settings["seed"])
        state = _trained(settings, bundle, engine, private, context.cache)
        engine.load_state(state)
        yield Victim(bundle, engine, private, state)
    finally:
        engine.close()
        bundle.close()


def _exported(settings: Mapping[str, Any], cache: Path) -> Path:
    options = ("--widths", settings["widths"]) if settings["widths"] else ()
    request = BundleRequest(settings["student"], settings["batch"], settings["latent_size"], options=options)
    return export_cached(request, cache, settings["seed"])


def _trained(
    settings: Mapping[str, Any], bundle: Bundle, engine: Engine, private: Dataset, cache: Path
) -> dict[str, np.ndarray]:
    """The state after a device's first round: nothing is published yet, so labels alone.

    All cells of a seed share a checkpoint, which `train_locally` goes on from only if it is of this very training.
    """
    local = LocalSettings(epochs=settings["epochs"], learning_rate=settings["learning_rate"])
    words = json.dumps([bundle.model_digest, private.digest, settings["seed"], vars(local)])
    path = cache / f"privacy-{hashlib.sha256(words.encode()).hexdigest()[:16]}.safetensors"
    start = bundle.initial_state()
    with locked(path.with_suffix(".lock")):
        return train_locally(engine, bundle, private, None, None, local, settings["seed"], start, path).state


def _targets(settings: Mapping[str, Any], transfer: np.ndarray, private: Dataset, unseen: Dataset) -> Targets:
    """Errors: DataError for a transfer set that leaves nothing to learn from."""
    if len(transfer) < settings["transfer_samples"]:
        raise DataError(
            f"a transfer set of {len(transfer)} images, the experiment takes {settings['transfer_samples']}",
            "give --transfer with more images, such as CIFAR-100's",
        )
    chosen = permutation(settings["seed"], SUBSET, 0, len(transfer))[: settings["transfer_samples"]]
    count = settings["attacked_samples"]
    if len(chosen) < 3 * count:
        raise DataError(
            f"a transfer set of {len(chosen)} images, {count} of them to attack and {count} to choose by",
            f"give one of {3 * count} images or more",
        )
    return Targets(
        transfer[chosen[2 * count :]],
        transfer[chosen[count : 2 * count]],
        {
            "transfer": transfer[chosen[:count]],
            "private": private.take(count, settings["seed"]).images,
            "unseen": unseen,
        },
    )


def _attack(settings: Mapping[str, Any], victim: Victim, targets: Targets) -> dict[str, Any]:
    seed, count = settings["seed"], settings["attacked_samples"]
    uploaded = np.concatenate([targets.attacked["transfer"], targets.validation, targets.known])
    rows, packed = release(settings, victim, uploaded, len(uploaded), 0)
    leaked = {
        name: release(settings, victim, images, len(uploaded), number)[0]
        for number, (name, images) in enumerate(targets.attacked.items(), 1)
        if name != "transfer"
    }
    few = settings["gradient_samples"]
    leaked |= {"transfer": rows[:count], "few": leaked["private"][:few]}
    known, validation = as_floats(targets.known), as_floats(targets.validation)
    attacked = {name: as_floats(images) for name, images in targets.attacked.items()}
    attacked["few"] = attacked["private"][:few]
    mean_image = known.mean(axis=0)

    decode = train_decoder(
        rows[2 * count :],
        known,
        (rows[count : 2 * count], validation),
        epochs=settings["decoder_epochs"],
        seed=seed,
    )
    means = {name: np.broadcast_to(mean_image, images.shape) for name, images in attacked.items()}
    decoded = {name: decode(leaked[name]) for name in attacked}
    rebuilt = {"mean_image": means, "decoder": decoded}
    own_rows, own_images = rows[count : 2 * count][:few], validation[:few]
    chosen = {}
    for attack, own_start, start in (
        ("gradient", means["few"], means["few"]),
        ("refined", decode(own_rows), decoded["few"]),
    ):
        chosen[attack], found = _descend(
            settings, victim, (own_rows, own_start, own_images), leaked["few"], start
        )
        rebuilt[attack] = {"few": found}
    multiplier = settings["noise_multiplier"]
    return {
        "bytes_up": len(packed.body),
        "epsilon": epsilon(multiplier, 1, Privacy.delta) if multiplier else None,
        "relative_error": _relative_error(settings, victim, uploaded, rows),
        "smoothness": chosen,
        "attacks": {
            attack: {name: scores(attacked[name], images, mean_image) for name, images in found.items()}
            for attack, found in rebuilt.items()
        },
        "pictures": _pictures(settings["pictures"], attacked["few"], rebuilt),
    }


def _descend(
    settings: Mapping[str, Any],
    victim: Victim,
    own: tuple[np.ndarray, np.ndarray, np.ndarray],
    rows: np.ndarray,
    start: np.ndarray,
) -> tuple[float, np.ndarray]:
    """The gradient attack on `rows`, with the smoothness that served best on the attacker's own rows, start and images.

    Returns that smoothness, too.
    """
    descend = partial(
        invert_by_gradient,
        open_student(victim, settings["exchange"], settings["clip"]),
        steps=settings["gradient_steps"],
    )
    own_rows, own_start, own_images = own
    tried = {
        value: psnr_db(own_images, descend(own_rows, own_start, smoothness=value)).mean()
        for value in settings["smoothness"]
    }
    best = max(settings["smoothness"], key=lambda value: tried[value])
    return best, descend(rows, start, smoothness=best)


def release(
    settings: Mapping[str, Any], victim: Victim, images: np.ndarray, protected_rows: int, stream: int
) -> tuple[np.ndarray, outputs.Packed]:
    """Step 4 on these images, as the coordinator reads it: rows [N, l], and the body.

    The noise of a value is that of a release of `protected_rows` rows, however many images there are. It follows from
    the seed here, so that a run can be repeated; a device draws it from the operating system.
    """
    privacy = None
    if settings["clip"] is not None:
        multiplier = settings["noise_multiplier"] * math.sqrt(protected_rows / len(images))
        privacy = Privacy(settings["clip"], multiplier)
    task = {"exchange": settings["exchange"], "precision": settings["precision"]}
    transfer = Transfer(images)
    equipment = Equipment(
        task, victim.bundle, victim.engine, victim.private, transfer, options=DeviceOptions(privacy=privacy)
    )
    random = np.random.default_rng([settings["seed"], stream])
    packed, _ = pack_round(equipment, victim.state, random, None)
    expected = expected_outputs(task, victim.bundle, transfer)
    rows, _ = outputs.unpack(packed.body, packed.content_encoding, expected)
    return rows[settings["exchange"]], packed


def _relative_error(
    settings: Mapping[str, Any], victim: Victim, images: np.ndarray, rows: np.ndarray
) -> float:
    """How far the released rows lie from those without noise and rounding, by the norm of these."""
    clean = {**settings, "precision": "fp32", "noise_multiplier": 0.0}
    exact = release(clean, victim, images, len(images), 0)[0]
    return float(np.linalg.norm(rows - exact) / np.linalg.norm(exact))


def open_student(victim: Victim, exchange: str, clip: float | None) -> Represent:
    """The victim's student in PyTorch: rows of images from 0 to 1, clipped as the device clips them."""
    student: nn.Module = rebuild_student(victim.bundle)
    load_student_state(student, victim.state)
    student.eval().requires_grad_(False)
    form = victim.bundle.input
    mean, deviation = (torch.tensor(values).view(1, -1, 1, 1) for values in (form.mean, form.std))

    def represent(images: torch.Tensor) -> torch.Tensor:
        latents, logits = student((images - mean) / deviation)
        rows = latents if exchange == "latents" else logits
        return rows if clip is None else rows * (clip / rows.norm(dim=1, keepdim=True).clamp_min(clip))

    return represent


def as_floats(images: np.ndarray) -> np.ndarray:
    """uint8 images as float32 from 0 to 1."""
    return images.astype(np.float32) / 255


def scores(images: np.ndarray, rebuilt: np.ndarray, mean_image: np.ndarray) -> dict[str, float]:
    """Means over images; `gain_db` is the PSNR less that of the mean image, which takes no upload to guess."""
    psnr = psnr_db(images, rebuilt)
    gain = psnr - psnr_db(images, np.broadcast_to(mean_image, images.shape))
    return {
        "psnr_db": float(psnr.mean()),
        "gain_db": float(gain.mean()),
        "ssim": float(ssim(images, rebuilt).mean()),
        "images": len(images),
    }


def _pictures(count: int, few: np.ndarray, rebuilt: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, str]:
    """The first private images and what each attack made of them; none for a count of 0."""
    strips = {"original": few, **{attack: found["few"] for attack, found in rebuilt.items()}}
    return {name: encode_strip(images[:count]) for name, images in strips.items()} if count else {}
