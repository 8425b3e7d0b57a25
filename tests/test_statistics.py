"""Tests over seeds: hand-worked numbers, a published table of power, simulations in plain NumPy, and verdicts."""

import math

import numpy as np
import pytest
from scipy import stats

from tinymoe.study.statistics import (
    Comparison,
    Contrast,
    benjamini_hochberg,
    corrected,
    holm,
    seeds_needed,
    t_interval,
    text_uncertainty,
)

DIFFERENCE = Contrast("loss", "a", minus="b")


def compared(*values, margin=0.01, correction=holm):
    return corrected([Comparison(DIFFERENCE, values, margin)], correction)[0]


def test_t_interval_by_hand():
    # 1, 2, 6: mean 3; squares 4 + 1 + 9 = 14, variance 14 / 2 = 7, standard error sqrt(7 / 3) = 1.5275;
    # t(0.975, 2) = 4.3027, half width 6.5724; t(0.95, 2) = 2.9200, half width 4.4604. t = 3 / 1.5275 = 1.9640 with 2
    # degrees of freedom: p = 1 - t / sqrt(t^2 + 2) = 1 - 1.9640 / 2.4202 = 0.1885.
    interval = t_interval([1.0, 2.0, 6.0])
    assert interval.mean == pytest.approx(3.0)
    assert interval.half == pytest.approx(6.5724, abs=1e-4)
    assert interval.p == pytest.approx(0.1885, abs=1e-4)
    assert t_interval([1.0, 2.0, 6.0], 0.9).half == pytest.approx(4.4604, abs=1e-4)
    assert math.isnan(t_interval([1.0]).half)


def test_equal_values_are_certain():
    assert (t_interval([0.3] * 3).half, t_interval([0.3] * 3).p, t_interval([0.0] * 3).p) == (0, 0, 1)
    assert t_interval([0.1 + 0.2, 0.3, 0.3]).half == 0  # the first is 4e-17 more


def test_sign_flips_by_hand():
    """1, 2, 6 have the largest sum of all 8 choices of signs; its mirror image is as large: 2 / 8."""
    assert compared(1.0, 2.0, 6.0).p_flip == 0.25
    # 12 equal signs: 2 of 4096
    assert compared(*np.linspace(1, 2, 12)).p_flip == pytest.approx(2 / 4096)
    # 1, 2, -6: mean -1. |sum| >= 3 for signs +++ 9, ++- 3, +-+ 5, -++ 7 and their mirror images: all 8
    assert compared(1.0, 2.0, -6.0).p_flip == 1


def test_two_one_sided_tests_by_hand():
    """0, 2, 4 (in thousandths): mean 2, SD 2, standard error 2 / sqrt(3) = 1.1547. To the nearer end, 10, it is
    t = 8 / 1.1547 = 6.9282 with 2 degrees of freedom: p = (1 - t / sqrt(t^2 + 2)) / 2 = (1 - 6.9282 / 7.0711) / 2,
    which is 0.0101."""
    found = compared(0.0, 0.002, 0.004)
    assert found.p_same == pytest.approx(0.0101, abs=1e-4) and found.verdict == "same"
    assert compared(0.0, 0.002, 0.004, margin=0.005).verdict == "not known"
    assert math.isnan(compared(0.0, 0.002, 0.004, margin=None).p_same)


def test_the_interval_of_90_percent_lies_in_the_margin_exactly_where_both_tests_reject():
    rng = np.random.default_rng(0)
    for _ in range(200):
        found = compared(*rng.normal(0.004, 0.006, rng.integers(2, 12)))
        low, high = found.interval90.low, found.interval90.high
        assert (low > -0.01 and high < 0.01) == (found.p_same < 0.05)


@pytest.mark.parametrize("values, verdict, within", [
    ((0.02, 0.021, 0.022), "different", False), ((-0.02, -0.021, -0.022), "different", False),
    ((0.004, 0.005, 0.006), "different", True), ((0.0, 0.002, -0.002), "same", True),
    ((0.01, 0.03, -0.02), "not known", False), ((0.3,), "not tested", False), ((), "not tested", False),
    ((0.1, math.nan), "not tested", False), ((0.0, 0.0), "same", True), ((0.005, 0.005), "different", True)])
def test_verdicts(values, verdict, within):
    found = compared(*values)
    assert (found.verdict, found.within) == (verdict, within)


def test_the_power_is_that_of_published_tables():
    """One-sample t-test, two-sided 5%, power 80%: half an SD needs 34 seeds, one SD 10 (Cohen's tables)."""
    def smallest(n):
        values = np.array([*np.tile([1.0, -1.0], n // 2), *([0.0] * (n % 2))])
        return compared(*values / values.std(ddof=1)).smallest

    assert smallest(33) > 0.5 >= smallest(34) and smallest(9) > 1 >= smallest(10)


@pytest.mark.parametrize("scatter", [0.6, 1.5])
def test_so_many_seeds_are_needed_as_a_simulation_says(scatter):
    """SD in margins. The share of 20,000 studies with the right verdict, where the truth is 0 and where it is 1."""
    def power(n):
        values = np.random.default_rng(n).normal(0, scatter, (20_000, n))
        mean, error = values.mean(axis=1), values.std(axis=1, ddof=1) / np.sqrt(n)
        same = np.abs(mean) + stats.t.ppf(0.95, n - 1) * error < 1
        return min(same.mean(), (np.abs(mean + 1) > stats.t.ppf(0.975, n - 1) * error).mean())

    n = seeds_needed(scatter)
    assert power(n) > 0.79 and power(n - 1) < 0.81


def test_seeds_needed_at_the_ends():
    assert seeds_needed(0) == 2 and seeds_needed(1e-6) == 2 and seeds_needed(100) is None
    # two seeds of an SD of 0.02 margins: by simulation the power is 0.83 and 0.99, at 5% over four comparisons
    assert seeds_needed(1e-6, 0.0125) == seeds_needed(0.02, 0.0125) == 2
    assert compared(0.0, 1.0).needed is None


def test_holm_by_hand():
    """Sorted .01, .02, .04 times 3, 2, 1: .03, .04, .04. Of .01, .03, .04 the last may not be below the second, .06."""
    assert holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]).max() == 1


def test_a_comparison_that_is_not_tested_counts_in_its_family():
    """t = 11 with 2 degrees of freedom, p = 0.0082: three times that by Holm, and by Benjamini and Hochberg."""
    family = [Comparison(DIFFERENCE, values) for values in ((0.4, 0.4, 0.3), (0.1,), ())]
    for correction in (holm, benjamini_hochberg):
        first, *others = corrected(family, correction)
        assert first.corrected == pytest.approx(3 * 0.00816, abs=1e-4)
        assert [one.verdict for one in others] == ["not tested"] * 2
    assert corrected([], holm) == []


def test_ratios_are_computed_as_logarithms():
    """2 and 8 against 1 and 2: ratios 2 and 4, whose geometric mean is sqrt(8)."""
    numbers = {"a": {0: 2.0, 1: 8.0}, "b": {0: 1.0, 1: 2.0}}
    ratio = Contrast("m", "a", over="b")
    found = t_interval(ratio.of(lambda metric, name: numbers[name]))
    assert ratio.shown(found.mean) == pytest.approx(math.sqrt(8)) and ratio.shown(0.0) == 1


def test_the_share_of_the_text():
    """Seeds that agree leave all uncertainty to the text; stretches that agree within a domain leave none to it."""
    rng = np.random.default_rng(0)
    text, seeds = rng.normal(size=(1, 24)), rng.normal(size=(6, 1))
    low, high, share = text_uncertainty([np.repeat(text, 6, axis=0), np.repeat(text + 5, 6, axis=0)])
    assert low < text.mean() + 2.5 < high and share == pytest.approx(1, abs=0.1)
    low, high, share = text_uncertainty([np.repeat(seeds, 24, axis=1), np.repeat(seeds + 5, 8, axis=1)])
    assert low < seeds.mean() + 2.5 < high and share == pytest.approx(0, abs=1e-9)  # the 5 between domains adds nothing
    assert text_uncertainty([text, text]) is None


def test_the_uncertainty_of_seeds_and_text_by_hand():
    """The squares of the half widths of both t intervals are added: 2.5706 standard errors of 6 seeds, 2.0687 of 24
    stretches. The text's share is that of the two squared standard errors."""
    x = np.random.default_rng(1).normal(size=(6, 1)) + np.random.default_rng(2).normal(size=(1, 24))
    low, high, share = text_uncertainty([x], n_resamples=4000)
    seeds, text = x.mean(axis=1).var(ddof=1) / 6, x.mean(axis=0).var(ddof=1) / 24
    assert share == pytest.approx(text / (seeds + text), abs=0.03)
    assert (high - low) / 2 == pytest.approx(math.hypot(2.5706 * seeds**0.5, 2.0687 * text**0.5), rel=0.02)
    assert (high + low) / 2 == pytest.approx(x.mean())


def test_the_domain_with_the_fewest_stretches_decides_the_quantile_of_the_text():
    """Seeds agree. 24 stretches are alike, two are 0 and 1: their standard error is 0.5, that of the mean of both
    domains 0.25; t(0.975, 1) is 12.706."""
    low, high, _ = text_uncertainty([np.zeros((3, 24)), np.tile([0.0, 1.0], (3, 1))], n_resamples=4000)
    assert (high - low) / 2 == pytest.approx(12.706 * 0.25, rel=0.05)


@pytest.mark.parametrize("n", [3, 6])
def test_the_interval_over_seeds_and_text_covers_the_truth_and_is_no_narrower_than_that_of_seeds(n):
    """400 studies of 3 domains whose true mean is 0: SD 0.2 of seeds, 1 of stretches, 0.3 of both together."""
    rng, covered = np.random.default_rng(n), 0
    for _ in range(400):
        seeds = rng.normal(0, 0.2, (n, 1))
        parts = [seeds + rng.normal(0, 1, (1, 24)) + rng.normal(0, 0.3, (n, 24)) for _ in range(3)]
        low, high, _ = text_uncertainty(parts, n_resamples=200)
        assert (high - low) / 2 >= t_interval(np.mean([part.mean(axis=1) for part in parts], axis=0)).half
        covered += low < 0 < high
    assert 0.94 < covered / 400 < 0.99  # with few seeds it is a little too wide


def test_the_same_is_corrected_too():
    """Two comparisons whose uncorrected p of the same is between 2.5% and 5%: alone each is the same, together neither
    is; and a larger family makes no "different" of p = 0.04 a "same"."""
    values = (0.0, 0.003, 0.006)
    assert 0.025 < compared(*values).p_same < 0.05 and compared(*values).verdict == "same"
    family = corrected([Comparison(DIFFERENCE, values, 0.01)] * 2, holm)
    assert [one.verdict for one in family] == ["not known"] * 2
    assert family[0].corrected_same == pytest.approx(2 * family[0].p_same)
    sure = (0.005, 0.006, 0.0065, 0.0008)
    alone, together = compared(*sure), corrected([Comparison(DIFFERENCE, sure, 0.01),
                                                  *[Comparison(DIFFERENCE, (0.2, -0.2), 0.01)] * 4], holm)[0]
    assert alone.interval.p < 0.05 < together.corrected and together.interval.low > 0
    assert (alone.verdict, together.verdict, together.interval90) == ("different", "not known", alone.interval90)
    unbounded = corrected([Comparison(DIFFERENCE, values, 0.01), Comparison(DIFFERENCE, values)], holm)
    assert unbounded[0].verdict == "same" and math.isnan(unbounded[1].corrected_same)  # one test of the same


def test_smallest_effect_and_seeds_needed_allow_for_the_family():
    """10 seeds show an effect of one SD at 5% (Cohen). At 1% it takes about (3.25 + 0.88) / (2.26 + 0.88) of it, by
    the quantiles t(0.995, 9), t(0.975, 9) and t(0.8, 9)."""
    values = np.array([1.0, -1.0] * 5)
    family = corrected([Comparison(DIFFERENCE, tuple(values / values.std(ddof=1)), 1.0)] * 5, holm)
    power = stats.nct.sf(stats.t.ppf(0.995, 9), 9, family[0].smallest * math.sqrt(10))
    assert power == pytest.approx(0.8) and family[0].smallest == pytest.approx(4.13 / 3.14, abs=0.03)
    assert family[0].needed == seeds_needed(1, 0.01) > seeds_needed(1) == compared(*family[0].values, margin=1.0).needed


def test_the_seeds_needed_have_the_range_of_their_sd():
    """The SD of 8 seeds lies between 0.661 and 2.035 of the one seen (chi-squared quantiles 16.013 and 1.690, 7)."""
    values = np.array([1.0, -1.0] * 4)
    one = compared(*(values / values.std(ddof=1)), margin=1.0)
    assert one.needed_range == (seeds_needed(math.sqrt(7 / 16.013)), seeds_needed(math.sqrt(7 / 1.690)))
    assert one.needed_range[0] < one.needed < one.needed_range[1]
    assert not one.between and compared(0.0049, 0.005, 0.0051, margin=0.01).between  # half the margin, little scatter


def test_a_factor_of_the_second_setting_by_hand():
    """Seeds 0 and 1 are common: 3 - 2 * 1 and 4 - 2 * 5."""
    one, numbers = Contrast("loss", "a", minus="b", times=2), {"a": {0: 3.0, 1: 4.0, 2: 9.0}, "b": {0: 1.0, 1: 5.0}}
    assert one.of(lambda metric, name: numbers[name]).tolist() == [1, -6] and str(one) == "`a` - 2 · `b`"
