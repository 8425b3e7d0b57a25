"""The corpus: domains, byte tokens, splits and batches.

A token is a byte (V = 256), so there is no tokenizer. A *domain* is one labelled kind of text, cut into *spans*:

    |------ train ------|valid|------------ train ------------|valid|------ train ------|

A window of T + 1 bytes (T inputs and T targets, one byte ahead) lies inside one span. So no window mixes two domains or
joins two spans, and training never sees a byte that validation predicts.

Axis letters: B batch, T time, W validation windows, S validation blocks of a domain.
"""

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .text_checks import require_length, require_sizes, require_windows
from .texts import EXPECTED_SHA256, SYNTHETIC, CorpusError, read_domains  # noqa: F401  (re-exported)

VALID_BLOCK = 4096  # bytes of a validation block; short texts have smaller blocks
VALID_SHARE = 10  # one byte in ten is for validation


@dataclass(frozen=True, eq=False)
class Domain:
    """One labelled text. `valid` (S, 2) and `train` (S + 1, 2) are spans: rows of [first byte, one past the last)."""

    name: str
    tokens: np.ndarray  # (n,) uint8
    train: np.ndarray
    valid: np.ndarray
    sha256: str
    matches: bool | None = None  # a default domain: whether it has the bytes of EXPECTED_SHA256; else None
    entropy_rate: float | None = None  # nats per byte, the lowest possible loss, where it is known


@dataclass(frozen=True, eq=False)
class Corpus:
    """Domains, and the windows drawn from them. In results, domain d is `domains[d]`, named `names[d]`."""

    domains: tuple[Domain, ...]

    @property
    def names(self) -> list[str]:
        return [domain.name for domain in self.domains]

    def batch(self, rng, batch_size, seq_len):
        """(ids, targets) of `labelled_batch`."""
        return self.labelled_batch(rng, batch_size, seq_len)[:2]

    def labelled_batch(self, rng, batch_size, seq_len):
        """Draw training windows: first a domain uniformly, then one of its window positions uniformly.

        rng: a Generator or a seed. Returns (ids (B, T), targets (B, T), domain (B,)), int64; targets one byte ahead.
        Raises CorpusError if a domain has no training span of seq_len + 1 bytes, ValueError for sizes below 1.
        """
        require_sizes(batch_size=batch_size, seq_len=seq_len)
        rng = np.random.default_rng(rng)
        # for each domain and span: how many windows fit up to the end of the span
        ends = [np.cumsum(np.maximum(d.train[:, 1] - d.train[:, 0] - seq_len, 0)) for d in self.domains]
        require_windows(self.names, [n[-1] for n in ends], "training", seq_len)
        domain = rng.integers(len(self.domains), size=batch_size)
        places = []
        for d, number in zip(domain, rng.integers([ends[d][-1] for d in domain])):
            span = np.searchsorted(ends[d], number, side="right")
            left = ends[d][span] - number  # windows of the span that start here or later
            places.append((d, self.domains[d].train[span, 1] - seq_len - left))
        return *self._windows(places, seq_len), domain

    def validation(self, n_windows_per_domain, seq_len):
        """Fixed validation windows, spread evenly over the validation blocks of each domain.

        Returns (ids (W, T), targets (W, T), domain (W,)), all int64. Domains take turns (window 0 of domain 0, window
        0 of domain 1, ...), so batches hold them equally if their size allows. No byte is a target twice. A domain with
        too few windows gives all that it has. Raises CorpusError if a domain has no block of seq_len + 1 bytes,
        ValueError for sizes below 1.
        """
        require_sizes(n_windows_per_domain=n_windows_per_domain, seq_len=seq_len)
        # windows side by side: neighbours share one byte, which is a target of the first only
        tiles = [np.concatenate([np.arange(first, end - seq_len, seq_len) for first, end in domain.valid])
                 for domain in self.domains]
        require_windows(self.names, map(len, tiles), "validation", seq_len)
        turns = []
        for d, tile in enumerate(tiles):
            n = min(n_windows_per_domain, len(tile))
            spread = tile[(2 * np.arange(n) + 1) * len(tile) // (2 * n)]  # the middle of each of n equal parts
            turns += [(turn, d, first) for turn, first in enumerate(spread)]
        places = [(d, first) for _, d, first in sorted(turns)]
        return *self._windows(places, seq_len), np.array([d for d, _ in places])

    def describe(self) -> dict:
        """What config.json records of each domain, by name: its size, its hash and its split."""
        return {d.name: {"bytes": len(d.tokens), "sha256": d.sha256, "matches": d.matches,
                         "entropy_rate": d.entropy_rate, "train_bytes": int(np.diff(d.train).sum()),
                         "valid_bytes": int(np.diff(d.valid).sum())} for d in self.domains}

    def _windows(self, places, seq_len):
        """(ids, targets), (B, T) each, of the windows at B places (domain, first byte)."""
        window = np.stack([self.domains[d].tokens[first:first + seq_len + 1] for d, first in places]).astype(np.int64)
        return window[:, :-1], window[:, 1:]


def load_corpus(text: str | Path | bytes | dict[str, bytes] | None = None, seq_len: int = 128) -> Corpus:
    """Read and split the default domains, or those of `text`: a path, SYNTHETIC, bytes, or a dict of them (texts.py).

    Any bytes are allowed; a domain needs 4 * (seq_len + 1) of them. A default domain with another hash than
    EXPECTED_SHA256 is still loaded; describe() says that it differs.
    Raises CorpusError if a package or the path is missing, unreadable, empty, too short, or too large for the memory;
    ValueError for a seq_len below 1.
    """
    try:
        return Corpus(tuple(_domain(seq_len, *found) for found in read_domains(text)))
    except OSError as error:
        raise CorpusError(f"cannot read {error.filename or text}: {error.strerror}; "
                          "check its permissions, or give --text another path") from None
    except MemoryError:
        raise CorpusError(f"the memory is too small for the text at '{text}': give --text a smaller one") from None


def corpora_of(text: str | Path | bytes | dict[str, bytes] | None = None) -> Callable[[int], Corpus]:
    """The Corpus of a text for each seq_len, as a function that reads it once for each."""
    return functools.cache(functools.partial(load_corpus, text))


def split_spans(n_bytes: int, seq_len: int):
    """Cut [0, n_bytes) into spans (train (S + 1, 2), valid (S, 2)): S validation blocks at equal distances.

    About one byte in ten is for validation. A block is a hundredth of the text, at most 4,096 bytes and at least two
    windows. Below 20 * (seq_len + 1) bytes the smallest block is more than a tenth. At 4 * (seq_len + 1) bytes, the
    smallest text that load_corpus takes, training and validation hold exactly two windows each.
    """
    block = max(2 * (seq_len + 1), min(n_bytes // 100, VALID_BLOCK))
    n_blocks = max(1, round(n_bytes / (VALID_SHARE * block)))
    middle = (2 * np.arange(n_blocks) + 1) * n_bytes // (2 * n_blocks)
    valid = np.stack((middle - block // 2, middle - block // 2 + block), axis=1)
    edges = np.concatenate(([0], valid.ravel(), [n_bytes]))
    return edges.reshape(-1, 2), valid  # the spans between the blocks, and the blocks


def _domain(seq_len, name, raw, expected=None, entropy_rate=None):
    require_length(name, raw, seq_len)
    train, valid = split_spans(len(raw), seq_len)
    sha256 = hashlib.sha256(raw).hexdigest()
    matches = None if expected is None else sha256 == expected
    return Domain(name, np.frombuffer(bytes(raw), np.uint8), train, valid, sha256, matches, entropy_rate)
