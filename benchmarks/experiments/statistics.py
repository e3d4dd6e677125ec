"""Means with their 95 % intervals and paired tests, by Student's t distribution.

Sources: Student, The probable error of a mean (1908); the distribution by the regularised incomplete beta function,
as a continued fraction (Press et al., Numerical Recipes, 6.4). Tests compare with SciPy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Mean:
    """Mean of `seeds` values and the half width of its 95 % interval; None where one value has no spread."""

    mean: float
    ci95: float | None
    seeds: int

    def as_json(self) -> dict[str, float | int | None]:
        return {"mean": self.mean, "ci95": self.ci95, "seeds": self.seeds}

    def shown(self, form: str) -> str:
        """Mean and interval in a format such as `+.2f`; the sign is the mean's alone."""
        half_width = "" if self.ci95 is None else f" ± {self.ci95:{form.removeprefix('+')}}"
        return f"{self.mean:{form}}{half_width}"

    def __str__(self) -> str:
        return self.shown(".3f")


@dataclass(frozen=True)
class PairedTest:
    """Two-sided paired t-test: the mean difference first − second, its 95 % interval, t and p.

    t and p are None where all differences are the same, up to rounding.
    """

    difference: Mean
    t: float | None
    p: float | None


def mean_with_interval(values: Sequence[float]) -> Mean:
    """Errors: ValueError without values."""
    count = len(values)
    if count == 0:
        raise ValueError("no values to average")
    mean = math.fsum(values) / count
    if count == 1:
        return Mean(mean, None, 1)
    return Mean(mean, t_quantile(0.975, count - 1) * _standard_error(values, mean), count)


def paired_test(first: Sequence[float], second: Sequence[float]) -> PairedTest:
    """Compares values that belong together, such as those of one seed. Errors: ValueError for unequal lengths."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    difference = mean_with_interval(differences)
    error = _standard_error(differences, difference.mean) if len(differences) > 1 else 0.0
    if error < 1e-12:
        return PairedTest(difference, None, None)
    t = difference.mean / error
    return PairedTest(difference, t, 2 * (1 - t_cdf(abs(t), len(differences) - 1)))


def show_p(p: float | None) -> str | None:
    """A p-value with two significant digits, however small."""
    return None if p is None else f"{p:.2g}"


def t_cdf(t: float, freedom: int) -> float:
    """Probability that Student's t with `freedom` degrees of freedom is at most t."""
    square = t * t
    if square < freedom:  # from the middle, where the tail's argument would be rounded to 1
        return 0.5 + math.copysign(0.5, t) * _incomplete_beta(0.5, freedom / 2, square / (freedom + square))
    tail = 0.5 * _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + square))
    return 1 - tail if t > 0 else tail


def t_quantile(probability: float, freedom: int) -> float:
    """The t whose `t_cdf` is the probability, to about 1e-9. Errors: ValueError outside (0, 1)."""
    if not 0 < probability < 1:
        raise ValueError(f"a probability of {probability}")
    low, high = -1.0, 1.0
    while t_cdf(low, freedom) > probability:
        low *= 2
    while t_cdf(high, freedom) < probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def _standard_error(values: Sequence[float], mean: float) -> float:
    count = len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b) for 0 ≤ x ≤ 1."""
    if x <= 0 or x >= 1:
        return min(1.0, max(0.0, x))
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    )
    if x < (a + 1) / (a + b + 2):  # where the fraction converges fast; else by the symmetry of the function
        return front * _beta_fraction(a, b, x) / a
    return 1 - front * _beta_fraction(b, a, 1 - x) / b


def _beta_fraction(a: float, b: float, x: float) -> float:
    """Lentz's evaluation of the continued fraction."""
    tiny = 1e-300
    c, d = 1.0, 1 / _away_from_zero(1 - (a + b) * x / (a + 1), tiny)
    result = d
    for m in range(1, 1000):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / _away_from_zero(1 + numerator * d, tiny)
            c = _away_from_zero(1 + numerator / c, tiny)
            result *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return result


def _away_from_zero(value: float, tiny: float) -> float:
    return value if abs(value) > tiny else tiny
