"""Documents in Markdown: tables, lists and headings, and texts of files that add no markup."""

import re

from ..files import printable, require_ours, write_atomically

WORDS = "## Words used here"  # a heading of all documents


def escaped(text) -> str:
    """A text that comes from a file, on one line, for Markdown: it adds no markup, no HTML and no cell to a table."""
    return re.sub(r"[&<>|*~`$\\]|(?<=\])\(", lambda found: f"&#{ord(found[0])};", printable(text))


def table(header, rows):
    """A Markdown table; empty without rows."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) if len(lines) > 2 else ""


def bullets(lines):
    return "\n".join(f"- {line}" for line in lines)


def bold(sentences):
    return "\n\n".join(f"**{sentence}**" for sentence in sentences)


def chapter(heading, *parts):
    """A heading and its paragraphs, none where the last of them is empty."""
    return [f"## {heading}", *parts] if parts[-1] else []


def joined(words):
    """`a`, `a and b` or `a, b and c`."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def enumerated(numbers):
    """`0 to 11` for whole numbers that follow each other, else `0, 2, 5`."""
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(f"{n:,}" for n in numbers)


def run_ids(runs):
    """The ids of all runs, with the seeds of a setting in braces: A-seed{0,1,2}."""
    ids = {}
    for run in runs:
        before, mark, seed = run.run_id.rpartition("-seed")
        ids.setdefault(before + mark, []).append(seed)
    return [first + (n[0] if len(n) == 1 else "{" + ",".join(n) + "}") for first, n in ids.items()]


def write_paragraphs(path, paragraphs):
    """Write a document. Raises FileExistsError in place of one that this program did not make."""
    require_ours(path, WORDS)
    write_atomically(path, "\n\n".join(filter(None, paragraphs)) + "\n")
    return path
