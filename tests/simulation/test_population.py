"""The draws of a simulation, its settings, attacks, virtual clock and pools."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest

from edgestill.runtime.errors import UsageError
from edgestill.simulation.attack import SCALE, spoil
from edgestill.simulation.pool import JOBS_A_WORKER, open_pool
from edgestill.simulation.population import poisoners, turns, uniform
from edgestill.simulation.settings import ATTACKS, Poison, SimulationSettings
from edgestill.simulation.students import WIDTHS, narrow
from edgestill.simulation.virtual import SeededEntropy, VirtualClock

SETTINGS = SimulationSettings(devices=4000, availability=0.7, dropout=0.1, seed=5)


def test_shares_of_devices_are_those_that_were_asked_for() -> None:
    drawn = turns(SETTINGS, 1)
    assert abs(len(drawn) / 4000 - 0.7) < 0.03
    assert abs(sum(turn.drops_out for turn in drawn) / len(drawn) - 0.1) < 0.02
    assert len({turn.device for turn in drawn}) == len(drawn)
    seconds = np.array([turn.uploads_after_s for turn in drawn])
    assert abs(np.median(seconds) / SETTINGS.deadline_s - 0.2) < 0.02
    assert seconds.min() > 0


def test_a_draw_depends_on_seed_and_round_alone() -> None:
    assert turns(SETTINGS, 1) == turns(SETTINGS, 1)
    assert turns(SETTINGS, 1) != turns(SETTINGS, 2)
    assert turns(SETTINGS, 1) != turns(dataclasses.replace(SETTINGS, seed=6), 1)
    # a device keeps its luck when others join
    np.testing.assert_array_equal(uniform(3, 100, 2, 10), uniform(3, 100, 2, 20)[:10])


def test_somebody_is_there_even_when_hardly_anybody_is() -> None:
    rare = dataclasses.replace(SETTINGS, devices=2, availability=1e-9)
    assert [len(turns(rare, number)) for number in range(1, 5)] == [1] * 4


def test_poisoners_are_the_share_and_the_same_in_every_round() -> None:
    hostile = dataclasses.replace(SETTINGS, devices=10, poison=Poison(0.2, "scale"))
    assert len(poisoners(hostile)) == 2
    assert poisoners(hostile) == poisoners(hostile)
    assert poisoners(dataclasses.replace(hostile, poison=None)) == frozenset()


@pytest.mark.parametrize("attack", ATTACKS)
def test_spoiled_outputs_pass_for_outputs(attack: str) -> None:
    latents = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
    spoiled = spoil({"latents": latents}, attack, seed=1)["latents"]
    assert spoiled.shape == latents.shape and spoiled.dtype == np.float32
    assert np.isfinite(spoiled).all() and not np.allclose(spoiled, latents)
    np.testing.assert_array_equal(spoil({"latents": latents}, attack, seed=1)["latents"], spoiled)
    if attack == "scale":
        np.testing.assert_allclose(spoiled, SCALE * latents)
    if attack == "shuffle":
        np.testing.assert_array_equal(np.sort(spoiled, axis=0), np.sort(latents, axis=0))


def test_an_unknown_attack_is_no_attack() -> None:
    with pytest.raises(ValueError, match="nonsense"):
        spoil({"latents": np.zeros((1, 1), np.float32)}, "nonsense", 0)


def test_poison_is_read_from_the_command_line() -> None:
    assert Poison.parse("0.25:shuffle") == Poison(0.25, "shuffle")
    for wrong in ("0.2", "0.2:melt", "x:scale", "1.5:scale", ":scale"):
        with pytest.raises(UsageError, match="--poison"):
            Poison.parse(wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"devices": 0},
        {"availability": 0.0},
        {"availability": 1.1},
        {"dropout": 1.0},
        {"exchange": "weights"},
        {"exchange": "parameters", "students": ("cnn3", "cnn4")},
        {"seed": -1},
        {"goal": 2, "minimum": 3},
        {"workers": 0},
    ],
)
def test_settings_that_make_no_sense_name_the_option(wrong: dict) -> None:
    with pytest.raises(UsageError, match="--"):
        SimulationSettings(**wrong)


def test_the_goal_is_what_is_expected_to_come_through() -> None:
    settings = SimulationSettings(devices=100, availability=0.7, dropout=0.1)
    assert settings.goal_uploads == 63 and settings.minimum_uploads == 31
    assert round(settings.over_selection * settings.goal_uploads) == 70
    assert SimulationSettings(devices=1, availability=0.1).goal_uploads == 1


def test_the_virtual_clock_never_goes_back() -> None:
    clock = VirtualClock(100.0)
    clock.advance_to(150.0)
    clock.advance_to(120.0)
    assert clock() == 150.0


def test_seeded_entropy_repeats_from_run_to_run_but_not_within_one() -> None:
    first, second, other = SeededEntropy(1), SeededEntropy(1), SeededEntropy(2)
    drawn = [first(16) for _ in range(100)]
    assert drawn == [second(16) for _ in range(100)]
    assert len(set(drawn)) == 100 and drawn[0] != other(16)
    assert len(first(33)) == 33


def test_widths_are_those_of_the_exporter() -> None:
    pytest.importorskip("torch")
    from edgestill.export.students import ARCHITECTURES, StudentOptions, build_student

    for name, widths in WIDTHS.items():
        words = narrow(name, 4)
        assert words == ("--widths", ",".join(str(width // 4) for width in widths))
        explicit, default = (
            build_student(name, StudentOptions(latent_size=8, classes=2, widths=given))
            for given in (widths, None)
        )
        assert [p.shape for p in explicit.parameters()] == [p.shape for p in default.parameters()]
    assert set(WIDTHS) == set(ARCHITECTURES)
    assert narrow("my.module:factory", 4) == () and narrow("cnn3", 1) == ()


def test_a_pool_of_processes_keeps_the_order_of_the_jobs() -> None:
    with open_pool(2, ray=False) as pool:
        assert list(pool.map(abs, range(-20, 0))) == list(range(20, 0, -1))


def test_ray_that_is_not_installed_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(UsageError, match="not installed"), open_pool(1, ray=True):
        pass


def test_jobs_are_made_when_they_are_needed_and_no_sooner() -> None:
    made: list[int] = []

    def jobs() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    with open_pool(2, ray=False) as pool:
        for number, result in enumerate(pool.map(abs, jobs())):
            assert result == number
            assert len(made) <= number + 1 + 2 * JOBS_A_WORKER
    assert len(made) == 100
