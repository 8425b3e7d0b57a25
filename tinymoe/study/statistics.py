"""Statistics over the seeds of a study: intervals, tests of differences paired by seed, corrections and verdicts.

SciPy makes the tests. Two things are not in it: Holm's correction, and the number of seeds that a test needs.
"""

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from functools import cache, cached_property

import numpy as np
import scipy  # its parts are read when they are first used

MARGIN = 0.01  # nats a byte, below which losses count as the same: 1% of perplexity
LEVEL, POWER = 0.05, 0.8  # of all tests; the chance of a right verdict for which seeds are planned
MOST_SEEDS = 1000  # more are not planned
VERDICTS = ("different", "same", "not known", "not tested")  # see the glossary in wording.py


@dataclass(frozen=True)
class Interval:
    """Mean of n values and half the width of its interval; half is nan where n is 1."""

    mean: float
    half: float
    n: int
    p: float = math.nan  # two-sided p value, against a mean of zero

    low = property(lambda self: self.mean - self.half)
    high = property(lambda self: self.mean + self.half)


def _equal(values):
    """Whether all values are the same but for rounding, which gives equal values a standard deviation above 0."""
    return np.ptp(values) <= 1e-12 * np.abs(values).max()


def t_interval(values, confidence: float = 0.95) -> Interval:
    """Student's t interval of a mean, n - 1 degrees of freedom. One value has no interval, and no value a mean."""
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    mean = float(values.mean()) if n else math.nan
    if n < 2 or not np.isfinite(values).all():
        return Interval(mean, math.nan, n)
    if _equal(values):
        return Interval(float(values[0]), 0.0, n, float(mean == 0.0))
    test = scipy.stats.ttest_1samp(values, 0)
    return Interval(mean, float(test.confidence_interval(confidence).high) - mean, n, float(test.pvalue))


@dataclass(frozen=True)
class Contrast:
    """A quantity of one setting, or its difference from (`minus`) or ratio to (`over`) another's, paired by seed.

    times: a factor of `minus`. A ratio is computed as its logarithm; `shown` undoes that.
    """

    metric: str
    setting: str
    _: KW_ONLY
    minus: str | None = None
    times: float = 1
    over: str | None = None

    def __post_init__(self):
        if self.minus and self.over:
            raise ValueError(f"{self}: a contrast is a difference or a ratio: give minus or over")
        if self.times != 1 and not self.minus:
            raise ValueError(f"{self}: times is a factor of minus: name that setting")

    @property
    def settings(self) -> tuple[str, ...]:
        """The ids of all settings that it needs."""
        return (self.setting, *filter(None, (self.minus, self.over)))

    @np.errstate(divide="ignore", invalid="ignore")
    def of(self, numbers: Callable) -> np.ndarray:
        """(seeds,) array over the common seeds, of numbers(metric, setting) -> {seed: value}."""
        parts = [numbers(self.metric, name) for name in (self.setting, self.minus, self.over) if name]
        seeds = [seed for seed in parts[0] if all(seed in part for part in parts)]
        first, *other = (np.array([part[seed] for seed in seeds], float) for part in parts)
        if self.minus:
            return first - self.times * other[0]
        return np.log(first / other[0]) if self.over else first

    def shown(self, number: float) -> float:
        """A number of the scale of `of` as it is told: a ratio instead of its logarithm."""
        return float(np.exp(number)) if self.over else float(number)

    def __str__(self) -> str:
        if self.minus:
            return f"`{self.setting}` - {'' if self.times == 1 else f'{self.times:g} · '}`{self.minus}`"
        return f"`{self.setting}`" + (f" / `{self.over}`" if self.over else "")


@dataclass(frozen=True)
class Comparison:
    """A Contrast over its common seeds, tested against 0, and against both ends of ±margin if it has one.

    values: one of each seed. corrected, corrected_same: its p values, corrected over the `family` comparisons of its
    family.
    """

    contrast: Contrast
    values: tuple
    margin: float | None = None
    corrected: float = math.nan
    corrected_same: float = math.nan
    family: int = 1

    n = property(lambda self: len(self.values))
    mean = property(lambda self: self.interval.mean)
    tested = property(lambda self: math.isfinite(self.interval.half))
    sd = property(lambda self: float(np.std(self.values, ddof=1)))

    @cached_property
    def interval(self) -> Interval:
        return t_interval(self.values)

    @property
    def interval90(self) -> Interval:
        """Inside ±margin exactly where both one-sided tests reject at 5%; without correction."""
        return t_interval(self.values, 0.9)

    @cached_property
    def p_flip(self) -> float:
        """Two-sided p value of the sign-flip permutation test: exact up to 16 seeds, of 65,536 draws for more."""
        test = scipy.stats.permutation_test((self.values,), np.mean, permutation_type="samples", n_resamples=2**16,
                                            vectorized=True, random_state=0)
        return float(test.pvalue)

    @property
    def p_same(self) -> float:
        """The larger p value of the two one-sided tests against -margin and margin; nan without seeds or margin."""
        if self.margin is None or not self.tested:
            return math.nan
        if _equal(self.values):
            return float(abs(self.mean) >= self.margin)
        return float(max(scipy.stats.ttest_1samp(self.values, -self.margin, alternative="greater").pvalue,
                         scipy.stats.ttest_1samp(self.values, self.margin, alternative="less").pvalue))

    @property
    def smallest(self) -> float:
        """The smallest effect that so many seeds of this SD show with 80% power, by the t-test at 5% / family.

        The level is Bonferroni's, a bound for Holm's.
        """
        return _detectable(self.n, LEVEL / self.family) * self.sd / math.sqrt(self.n)

    @property
    def needed(self) -> int | None:
        """Seeds of this SD that decide with 80% power whether the true value is 0 or the margin, by tests at
        5% / family; None: over 1,000."""
        return self._seeds_of(self.sd)

    @property
    def needed_range(self) -> tuple[int | None, int | None]:
        """`needed` at both ends of the 95% interval of the SD, by the chi-squared distribution."""
        return tuple(self._seeds_of(self.sd * math.sqrt((self.n - 1) / end))
                     for end in scipy.stats.chi2.ppf([0.975, 0.025], self.n - 1))

    @property
    def between(self) -> bool:
        """Whether it has the seeds that are `needed`: undecided, it then seems to lie between 0 and the margin."""
        return self.needed is not None and self.needed <= self.n

    def _seeds_of(self, sd):
        return seeds_needed(sd / self.margin, LEVEL / self.family)

    @property
    def within(self) -> bool:
        """Whether it is shown to be inside ±margin, after the correction."""
        return self.corrected_same < LEVEL

    @property
    def overlaps(self) -> bool:
        """Whether the interval has numbers inside ±margin."""
        return self.interval.low < self.margin and self.interval.high > -self.margin

    @property
    def verdict(self) -> str:
        """One of VERDICTS; the last without two seeds, or where a run lacks the number."""
        if not self.tested:
            return "not tested"
        return "different" if self.corrected < LEVEL else "same" if self.within else "not known"


@cache
def _detectable(n, level):
    """The effect, in standard errors, that n seeds show with 80% power by a two-sided t-test."""
    critical = scipy.stats.t.ppf(1 - level / 2, n - 1)  # the other tail adds less than 1e-6 to the power
    return scipy.optimize.brentq(lambda effect: scipy.stats.nct.sf(critical, n - 1, effect) - POWER, 0,
                                 4 * critical + 10)


def seeds_needed(scatter: float, level: float = LEVEL) -> int | None:
    """The smallest number of seeds with 80% power for both verdicts; None where it is over MOST_SEEDS.

    scatter: the SD in units of the margin. "different" for a true value of the margin (two-sided t-test), "same" for a
    true value of 0 (two one-sided tests; the power is exact where it is not small).
    """
    if scatter == 0:
        return 2
    n = np.arange(2, MOST_SEEDS + 1)
    critical = scipy.stats.t.ppf(1 - level / 2, n - 1)
    effect = np.minimum(np.sqrt(n) / scatter, 4 * critical + 10)  # beyond it the power is above 80%
    differ = scipy.stats.nct.sf(critical, n - 1, effect)
    same = 2 * scipy.stats.nct.sf(scipy.stats.t.ppf(1 - level, n - 1), n - 1, effect) - 1
    enough = np.flatnonzero((differ >= POWER) & (same >= POWER))
    return int(n[enough[0]]) if len(enough) else None


def holm(p_values) -> np.ndarray:
    """Adjusted p values of the step-down correction (Holm 1979)."""
    p = np.asarray(p_values, float)
    order, adjusted = np.argsort(p, kind="stable"), np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return adjusted


def benjamini_hochberg(p_values) -> np.ndarray:
    """Adjusted p values that bound the share of false ones among the small (Benjamini & Hochberg 1995)."""
    return scipy.stats.false_discovery_control(p_values)


def corrected(comparisons, correction) -> list[Comparison]:
    """The same comparisons, a family, with corrected p values: those of 0, and those of the margins that are given.

    One that is not tested counts as one with p = 1.
    """
    def adjusted(p_values):
        return map(float, correction([1.0 if math.isnan(p) else p for p in p_values]) if p_values else ())

    found = adjusted([one.interval.p for one in comparisons])
    same = adjusted([one.p_same for one in comparisons if one.margin is not None])
    return [replace(one, corrected=next(found), corrected_same=math.nan if one.margin is None else next(same),
                    family=len(comparisons)) for one in comparisons]


def text_uncertainty(differences, n_resamples: int = 1000) -> tuple[float, float, float] | None:
    """(low, high, share): the 95% interval of a mean over seeds and text, and the text's share of its variance.

    differences: for each domain an array (seeds, stretches of text). The mean is that of the means of the domains. Its
    variance is that of the mean over seeds plus that of the text: the bootstrap's, which draws stretches within each
    domain. Half the interval's width is the root of the sum of the squares of the half widths of Student's intervals
    for each of both, so it is never narrower than that of the seeds. None with one seed or one stretch.
    """
    if min(min(each.shape) for each in differences) < 2:
        return None
    seeds = t_interval(np.mean([each.mean(axis=1) for each in differences], axis=0))
    means = [each.mean(axis=0) for each in differences]
    # a bootstrap of k values has (k - 1) / k of their variance
    spread = [x.mean() + (x - x.mean()) * math.sqrt(len(x) / (len(x) - 1)) for x in means]
    text = float(scipy.stats.bootstrap(spread, lambda *drawn, axis: np.mean([x.mean(axis=axis) for x in drawn], axis=0),
                                       vectorized=True, method="percentile", n_resamples=n_resamples,
                                       random_state=0).standard_error)
    t = [float(scipy.stats.t.ppf(1 - LEVEL / 2, n - 1)) for n in (seeds.n, min(map(len, means)))]
    half, both = math.hypot(seeds.half, t[1] * text), math.hypot(seeds.half / t[0], text)
    return seeds.mean - half, seeds.mean + half, (text / both) ** 2 if both else math.nan


def enough_digits(numbers, digits: int, bound: float = 0.0) -> int:
    """At least `digits` after the point; more where a number would look like `bound` but differs in 6 digits."""
    while any(round(x, digits) == round(bound, digits) and round(x, 6) != round(bound, 6) for x in numbers):
        digits += 1
    return digits
