"""Text of known entropy: the chains are what they say, and nobody gets below the floor."""

import numpy as np
import pytest

from tinymoe.training import synthetic
from tinymoe.training.data import SYNTHETIC, load_corpus


@pytest.mark.parametrize("chain, expected", [
    ([[.5, .5], [.5, .5]], np.log(2)),              # a fair coin
    ([[0, 1], [1, 0]], 0),                          # no choice
    # pi = (2/3, 1/3): 2/3 of the time a choice of two, 1/3 of the time none
    ([[.5, .5], [1, 0]], 2 / 3 * np.log(2))])
def test_entropy_rates_by_hand(chain, expected):
    assert synthetic.entropy_rate(np.array(chain, float)) == pytest.approx(expected)


def test_every_source_goes_on_with_four_letters_and_uses_all_alike():
    for source in synthetic.sources():
        chain = source.transitions()
        assert np.array_equal(np.sort(chain, axis=1)[:, -4:], [[1 / 8, 1 / 8, 1 / 4, 1 / 2]] * 64)
        np.testing.assert_allclose(chain.sum(axis=0), 1)
        assert synthetic.entropy_rate(chain) == pytest.approx(1.75 * np.log(2))


def test_who_never_finds_the_source_pays_the_surprise_of_the_mean_chain():
    chains = [source.transitions() for source in synthetic.sources()]
    paid = [-chain[i, j] * np.log(np.mean([other[i, j] for other in chains])) / 64 / 4
            for chain in chains for i, j in zip(*np.nonzero(chain))]
    assert synthetic.blind_rate() == pytest.approx(sum(paid))


def test_the_text_follows_the_chain():
    source = synthetic.sources()[1]
    text = np.frombuffer(source.sample(np.random.default_rng(0), 100_000), np.uint8)
    index = np.empty(256, int)
    index[synthetic.LETTERS] = np.arange(64)
    seen = np.zeros((64, 64))
    np.add.at(seen, (index[text[:-1]], index[text[1:]]), 1)
    assert (seen[source.transitions() == 0] == 0).all()
    np.testing.assert_allclose(seen / seen.sum(axis=1, keepdims=True), source.transitions(), atol=0.06)


def test_as_a_corpus_it_knows_its_floor_and_is_the_same_again():
    one, two = load_corpus(SYNTHETIC), load_corpus(SYNTHETIC)
    assert one.names == [f"source {i}" for i in range(4)]
    assert [d.sha256 for d in one.domains] == [d.sha256 for d in two.domains]
    assert one.describe()["source 2"]["entropy_rate"] == pytest.approx(1.75 * np.log(2))
    counts = np.stack([np.bincount(d.tokens, minlength=256)[synthetic.LETTERS] for d in one.domains]) / 400_000
    assert abs(counts - 1 / 64).max() < 0.002  # a letter alone says nothing of its source


def test_a_reader_who_counts_pairs_comes_close_to_the_floor_and_not_below():
    """Pairs counted in the training text, read with the source known: the loss is the entropy rate, but for chance."""
    for domain in load_corpus(SYNTHETIC).domains[:2]:
        counts = np.full((256, 256), 1e-9)
        for a, b in domain.train:
            np.add.at(counts, (domain.tokens[a:b - 1], domain.tokens[a + 1:b]), 1)
        logs = np.log(counts / counts.sum(axis=1, keepdims=True))
        nats = np.mean([-logs[domain.tokens[a:b - 1], domain.tokens[a + 1:b]].mean() for a, b in domain.valid])
        assert abs(nats - domain.entropy_rate) < 0.01
