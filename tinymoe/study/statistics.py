"""Statistics over the seeds of a study: intervals, differences paired by seed, Holm's correction, and verdicts."""

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace

import numpy as np
from scipy.stats import t as student_t


@dataclass(frozen=True)
class Interval:
    """Mean of n values and half the width of its 95% interval; half is nan where n is 1."""

    mean: float
    half: float
    n: int
    p: float = math.nan  # two-sided p value, against a mean of zero

    low = property(lambda self: self.mean - self.half)
    high = property(lambda self: self.mean + self.half)


def t_interval(values) -> Interval:
    """Student's t interval of a mean, n - 1 degrees of freedom. One value has no interval, and no value a mean."""
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    mean = float(values.mean()) if n else math.nan
    if n < 2 or not np.isfinite(values).all():
        return Interval(mean, math.nan, n)
    if np.ptp(values) == 0.0:  # rounding can raise the standard deviation of equal values above 0
        return Interval(mean, 0.0, n, float(mean == 0.0))
    error = float(values.std(ddof=1)) / math.sqrt(n)
    half = float(student_t.ppf(0.975, n - 1)) * error
    return Interval(mean, half, n, float(2 * student_t.sf(abs(mean) / error, n - 1)))


@dataclass(frozen=True)
class Contrast:
    """A quantity of one setting, or its difference from (`minus`) or ratio to (`over`) another's, paired by seed.

    setting: an id, or a tuple of ids for the smallest of them, seed by seed. times: a factor of `minus`.
    """

    metric: str
    setting: str | tuple
    _: KW_ONLY
    minus: str | None = None
    times: float = 1
    over: str | None = None

    @property
    def settings(self) -> tuple[str, ...]:
        """The ids of all settings that it needs."""
        first = self.setting if isinstance(self.setting, tuple) else (self.setting,)
        return (*first, *filter(None, (self.minus, self.over)))

    def of(self, numbers: Callable) -> np.ndarray:
        """(seeds,) array over the common seeds, of numbers(metric, setting) -> {seed: value}."""
        parts = [numbers(self.metric, name) for name in (self.setting, self.minus, self.over) if name]
        seeds = [seed for seed in parts[0] if all(seed in part for part in parts)]
        first, *other = (np.array([part[seed] for seed in seeds], float) for part in parts)
        if self.minus:
            return first - self.times * other[0]
        return first / other[0] if self.over else first

    def __str__(self) -> str:
        first = f"smallest of {', '.join(self.setting)}" if isinstance(self.setting, tuple) else f"`{self.setting}`"
        if self.minus:
            return f"{first} - {'' if self.times == 1 else f'{self.times:g} · '}`{self.minus}`"
        return f"{first} / `{self.over}`" if self.over else first


@dataclass(frozen=True)
class Comparison:
    """A planned Contrast with its interval over seeds, and whether it survives Holm's correction."""

    contrast: Contrast
    interval: Interval
    survives: bool = False

    @property
    def word(self) -> str:
        """"clear", "suggestive" or "undecided", see the glossary of report.py; "not tested" without two seeds."""
        if not math.isfinite(self.interval.half):
            return "not tested"
        if self.interval.low <= 0 <= self.interval.high:
            return "undecided"
        return "clear" if self.survives else "suggestive"

    @property
    def cells(self) -> list[str]:
        """[mean, interval, verdict] as text; with so many digits that no end of the interval looks like 0."""
        numbers, size = (self.interval.mean, self.interval.low, self.interval.high), abs(self.interval.mean)
        digits = enough_digits(numbers, 0 if size >= 100 else 1 if size >= 10 else 3 if size >= 0.01 else 4)
        mean, low, high = (f"{x:+,.{digits}f}" for x in numbers)
        return ["–" if math.isnan(self.interval.mean) else mean,
                "–" if self.word == "not tested" else f"[{low}, {high}]",
                self.word if self.interval.n else "no common seed"]


def holm(comparisons: list[Comparison]) -> list[Comparison]:
    """The same comparisons, each marked whether it survives Holm's (1979) step-down correction at the level 0.05."""
    tested = sorted(one.interval.p for one in comparisons if one.word != "not tested")
    failing = next((p for rank, p in enumerate(tested) if p > 0.05 / (len(tested) - rank)), math.inf)
    return [replace(one, survives=one.interval.p < failing) for one in comparisons]


def enough_digits(numbers, digits: int, bound: float = 0.0) -> int:
    """At least `digits` after the point; more where a number would look like `bound` but differs in 6 digits."""
    while any(round(x, digits) == round(bound, digits) and round(x, 6) != round(bound, 6) for x in numbers):
        digits += 1
    return digits
