"""Runs a simulation from settings to the summary."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from edgestill.simulation.federation import Federation, mean_accuracies
from edgestill.simulation.pool import open_pool
from edgestill.simulation.settings import SimulationSettings
from edgestill.simulation.students import prepare_students


def simulate(
    settings: SimulationSettings, work_dir: Path, cache: Path, progress: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """One JSON line a round, then the summary; the same settings give the same values but for `*_s`.

    `work_dir` keeps blobs and the devices' states, `cache` exported bundles. Errors: EdgestillError.
    """
    started_s = time.perf_counter()
    bundles, global_bundle = prepare_students(settings, cache, progress)
    work_dir = work_dir.resolve()  # Ray's workers run elsewhere
    work_dir.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(work_dir / "devices", ignore_errors=True)  # states of an earlier simulation
    federation = Federation(settings, bundles, global_bundle, work_dir)
    progress(
        f"{settings.devices} devices, {settings.rounds} rounds of {settings.goal_uploads} uploads, "
        f"{settings.processes} worker{'s' * (settings.processes != 1)}"
    )
    lines = []
    with open_pool(settings.processes, settings.ray) as pool:
        for number in range(1, settings.rounds + 1):
            lines.append(federation.run_round(number, pool))
            yield lines[-1]
        alone: dict[str, float | None] = {"t_priv": None, "t_uni": None}
        if settings.local_only:
            progress(f"the same {len(federation.tally.after)} devices, each alone")
            alone = mean_accuracies(list(federation.train_alone(pool).values()))
    yield {"summary": summarise(federation, lines, alone, time.perf_counter() - started_s)}


def summarise(
    federation: Federation, lines: list[dict[str, Any]], alone: dict[str, float | None], wall_s: float
) -> dict[str, Any]:
    """The figures of a whole simulation."""
    tally = federation.tally
    best = next((line for line in reversed(lines) if line["best"]), None)
    completed = [line for line in lines if line["phase"] == "completed"]
    means = mean_accuracies(list(tally.after.values()))
    trainings = max(1, tally.trainings)
    return {
        "t_priv": means["t_priv"],
        "t_uni": means["t_uni"],
        "local_only_t_priv": alone["t_priv"],
        "local_only_t_uni": alone["t_uni"],
        "bytes_up_per_device_round": round(tally.bytes_up / trainings),
        "bytes_down_per_device_round": round(tally.bytes_down / trainings),
        "trainings_per_s": tally.trainings / tally.wall_s if tally.wall_s else 0.0,
        "digest": completed[-1]["published"] if completed else None,
        "global_t_uni": completed[-1]["global_t_uni"] if completed else None,
        "best_round": best["round"] if best else None,
        "best_global_t_uni": best["global_t_uni"] if best else None,
        "devices": federation.settings.devices,
        "devices_took_part": len(tally.times),
        "poisoners": len(federation.poisoners),
        "rounds_completed": len(completed),
        "rounds_abandoned": len(lines) - len(completed),
        "trainings": tally.trainings,
        "setup_bytes_per_device": round(tally.setup_bytes / max(1, len(tally.times))),
        "refusals": federation.refusals(),
        "notices": federation.notices.as_json(),
        "wall_s": wall_s,
    }
