"""What `federation` and `poisoning` share: one simulated federation on disjoint private, transfer and test images."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from edgestill.benchmarks.experiments.exports import export_cached
from edgestill.benchmarks.experiments.grid import Context
from edgestill.benchmarks.experiments.locks import locked
from edgestill.benchmarks.experiments.sources import load_data
from edgestill.runtime.data.dataset import Dataset, Splits
from edgestill.runtime.errors import DataError
from edgestill.runtime.randomness import SUBSET, permutation
from edgestill.simulation.bundles import BundleRequest
from edgestill.simulation.run import simulate
from edgestill.simulation.settings import Poison, SimulationSettings
from edgestill.simulation.students import narrow, prepare_students

WIDTH_DIVISOR = 4
"""Of all students."""
AS_RECORDED = {
    "optimizer": "sgd", "common_head": False, "augment": "", "alpha": None, "local_epochs": 1, "distil_epochs": 2,
    "transfer_labels": False, "validation": "",
}  # fmt: skip
"""What the committed records were made with where their settings do not say; a simulation has other defaults."""
KEPT = ("round", "phase", "t_priv", "t_uni", "global_t_uni", "bytes_up", "bytes_down", "accepted")
"""What is recorded of every round."""


@dataclass(frozen=True)
class Bundles:
    """How students are exported: with the common head, or with an output layer of their own; and once an architecture,
    or `independent` times with other initial weights, one a device."""

    objective: str
    common_head: bool = False
    independent: int | None = None


def run_federation(
    settings: Mapping[str, Any], context: Context, bundles: Bundles | None = None, validate: bool = False
) -> dict[str, Any]:
    """One simulation of a cell's settings: its summary and its rounds.

    Settings are those of `SimulationSettings` by name, and `train_samples` (private images of all devices) and
    `transfer_samples`, both from the training split and disjoint. `bundles` None: what the simulation exports by
    itself. `validate`: T_priv and T_uni are drawn from `validation_samples` training images that nobody trains on, not
    from the test split.
    """
    known = {field.name for field in fields(SimulationSettings)}
    given = AS_RECORDED | {name: value for name, value in settings.items() if name in known}
    given["students"] = tuple(settings["students"])
    if given.get("poison") is not None:
        given["poison"] = Poison.parse(given["poison"])
    cache = context.cache / "bundles"
    with tempfile.TemporaryDirectory(prefix="edgestill-experiment-") as name:
        folder = Path(name)
        splits = load_data(context.data)
        private, transfer, validation = take_apart(splits, settings)
        tests = validation if validate else splits.choose("test")
        data, shared = folder / "data.npz", folder / "transfer.npz"
        np.savez(
            data, x_train=private.images, y_train=private.labels, x_test=tests.images, y_test=tests.labels
        )
        np.savez(shared, x_train=transfer.images, y_train=transfer.labels)
        # as in the committed records, also with AdamW
        given["weight_decay"] = 0.0
        given |= {"data": str(data), "transfer": str(shared), "transfer_count": len(transfer)}
        given["workers"] = 1  # cells are run side by side
        # two processes would export the same student into the same folder
        with locked(cache / "simulated.lock"):
            if bundles is None:
                prepare_students(SimulationSettings(**given), cache, _keep_quiet)
            else:
                given["bundles"] = export_bundles(settings, bundles, cache)
                distils = settings["mode"] == "global"
                given["global_bundle"] = given["bundles"][-1] if distils else None
        *rounds, last = simulate(SimulationSettings(**given), folder / "work", cache, _keep_quiet)
    summary = {key: value for key, value in last["summary"].items() if key != "digest"}
    return {**summary, "rounds": [{key: line[key] for key in KEPT} for line in rounds]}


def export_bundles(settings: Mapping[str, Any], bundles: Bundles, cache: Path) -> tuple[Path, ...]:
    """The students' bundles, cached or exported; initial weights follow the seed. Errors: ExportFailed."""
    first = settings["seed"] * 1000
    exported = []
    for student in settings["students"]:
        for number in range(bundles.independent or 1):
            options = narrow(student, WIDTH_DIVISOR)
            if bundles.common_head:
                options += ("--common-head",)
            request = BundleRequest(
                student,
                settings["batch"],
                settings["latent_size"],
                bundles.objective,
                settings["optimizer"],
                options,
            )
            exported.append(export_cached(request, cache, first + number))
    return tuple(exported)


def take_apart(splits: Splits, settings: Mapping[str, Any]) -> tuple[Dataset, Dataset, Dataset]:
    """Private images of all devices, the transfer set and validation images of the training split: drawn by the seed,
    no image in two of them. Errors: DataError."""
    wanted = [settings[name] for name in ("train_samples", "transfer_samples")]
    wanted.append(settings.get("validation_samples", 0))
    if sum(wanted) > len(splits.train):
        raise DataError(
            f"{len(splits.train)} training images, and {' + '.join(map(str, wanted))} are asked for",
            "give the data of the full experiment, or run it with --quick",
        )
    order = permutation(settings["seed"], SUBSET, 0, len(splits.train))
    private, transfer, validation = np.split(order[: sum(wanted)], np.cumsum(wanted)[:-1])
    train = splits.train
    return train.select(np.sort(private)), train.select(np.sort(transfer)), train.select(np.sort(validation))


def _keep_quiet(line: str) -> None:
    """The grid reports progress."""
