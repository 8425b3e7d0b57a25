"""Markov text with known entropy and labelled sources: the lowest possible loss is known exactly.

A source places 64 letters on a circle in its own order, and steps along it by one of its own four strides. In every
source all letters are equally frequent, so one letter alone carries no information about its source; two in a row do.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import entr

LETTERS = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+-", np.uint8)
CHANCES = np.array([1 / 2, 1 / 4, 1 / 8, 1 / 8])  # of the four strides
N_SOURCES, N_BYTES = 4, 400_000


@dataclass(frozen=True, eq=False)
class Source:
    """One Markov chain. order (64,): the letters around the circle; strides (4,): its steps, all different."""

    order: np.ndarray
    strides: np.ndarray

    def transitions(self) -> np.ndarray:
        """(64, 64): P[i, j], the probability that letter j follows letter i."""
        chain = np.zeros((len(LETTERS), len(LETTERS)))
        for stride, chance in zip(self.strides, CHANCES):
            chain[self.order, np.roll(self.order, -stride)] = chance
        return chain

    def sample(self, rng, n=N_BYTES) -> bytes:
        """n bytes of the chain; the first letter is drawn uniformly."""
        walk = np.cumsum(np.append(rng.integers(len(LETTERS)), rng.choice(self.strides, n - 1, p=CHANCES)))
        return LETTERS[self.order[walk % len(LETTERS)]].tobytes()


def sources() -> list[Source]:
    """The four sources, always the same."""
    rng, n = np.random.default_rng(0), len(LETTERS)
    return [Source(rng.permutation(n), rng.choice(np.arange(1, n), len(CHANCES), replace=False))
            for _ in range(N_SOURCES)]


def entropy_rate(chain) -> float:
    """Entropy of a Markov chain, nats per letter: -sum_i pi_i sum_j P_ij ln P_ij with pi P = pi (Shannon 1948).

    chain: P (L, L), irreducible. A model that must first infer which of S sources it reads pays at most ln S in total.
    """
    values, vectors = np.linalg.eig(chain.T)
    stationary = np.real(vectors[:, np.argmin(abs(values - 1))])
    surprise = entr(chain).sum(axis=1)
    return float(stationary @ surprise / stationary.sum())


def blind_rate() -> float:
    """The lowest loss, in nats per letter, of a model that sees one letter only and so cannot infer the source."""
    # all sources and all letters are equally likely
    return entropy_rate(np.mean([source.transitions() for source in sources()], axis=0))


def domains():
    """Yield (name, bytes, entropy rate) of each source."""
    rng = np.random.default_rng([0, 1])
    for s, source in enumerate(sources()):
        yield f"source {s}", source.sample(rng), entropy_rate(source.transitions())
