"""Text whose truth is known: byte sources of exact entropy, so that a loss has a floor and a topic has an owner.

Each source walks along the same 64 letters, put on a circle in an order of its own, by one of four strides of its own,
with chances 1/2, 1/4, 1/8, 1/8: a Markov chain. In every source every letter is equally frequent, so that a letter by
itself says nothing of its source; only what follows it does.
"""

from dataclasses import dataclass

import numpy as np

LETTERS = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+-", np.uint8)
CHANCES = np.array([1 / 2, 1 / 4, 1 / 8, 1 / 8])
N_SOURCES, N_BYTES = 4, 400_000


@dataclass(frozen=True, eq=False)
class Source:
    """order (64,): the letters around the circle; strides (4,): different steps along it."""

    order: np.ndarray
    strides: np.ndarray

    def transitions(self):
        """(64, 64): P[i, j], the chance that letter j follows letter i."""
        chain = np.zeros((len(LETTERS), len(LETTERS)))
        for stride, chance in zip(self.strides, CHANCES):
            chain[self.order, np.roll(self.order, -stride)] = chance
        return chain

    def text(self, rng, n=N_BYTES):
        """n bytes, from a uniformly drawn letter on."""
        walk = np.cumsum(np.append(rng.integers(len(LETTERS)), rng.choice(self.strides, n - 1, p=CHANCES)))
        return LETTERS[self.order[walk % len(LETTERS)]].tobytes()


def sources(seed=0):
    """The Sources of a seed."""
    rng, n = np.random.default_rng(seed), len(LETTERS)
    return [Source(rng.permutation(n), rng.choice(np.arange(1, n), len(CHANCES), replace=False))
            for _ in range(N_SOURCES)]


def entropy_rate(chain):
    """Nats a letter of a Markov chain: -sum over i of pi_i sum over j of P_ij ln P_ij, pi P = pi (Shannon 1948).

    chain: P (L, L), irreducible. A reader who must first find out which of S sources he reads pays at most ln S more,
    once.
    """
    values, vectors = np.linalg.eig(chain.T)
    stationary = np.real(vectors[:, np.argmin(abs(values - 1))])
    surprise = -(chain * np.log(np.where(chain > 0, chain, 1))).sum(axis=1)
    return float(stationary @ surprise / stationary.sum())


def blind_rate(seed=0):
    """Nats a letter of the best reader who sees one letter at a time, and so never finds out which source he reads.

    The sources are equally likely and every letter is equally frequent, so this is the entropy rate of their mean.
    """
    return entropy_rate(np.mean([source.transitions() for source in sources(seed)], axis=0))


def texts(seed=0):
    """Yield (name, bytes, entropy rate) of each source."""
    rng = np.random.default_rng([seed, 1])
    for s, source in enumerate(sources(seed)):
        yield f"source {s}", source.text(rng), entropy_rate(source.transitions())
