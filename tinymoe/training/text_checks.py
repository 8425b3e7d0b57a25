"""What a corpus and its windows need, checked, with messages that say what to do."""

from ..moe.settings import WHOLE
from .texts import CorpusError


def require_sizes(**sizes) -> None:
    """Raise ValueError for a size that is no whole number of at least 1."""
    for name, size in sizes.items():
        WHOLE.require(name, size)


def require_length(name: str, raw: bytes, seq_len: int) -> None:
    """Raise CorpusError for a domain of less than 4 * (seq_len + 1) bytes, ValueError for a seq_len below 1."""
    require_sizes(seq_len=seq_len)
    if not isinstance(raw, (bytes, bytearray)):
        raise CorpusError(f"domain '{name}' is a {type(raw).__name__}, but must be bytes: encode a str by .encode()")
    least = 4 * (seq_len + 1)
    if len(raw) < least:
        what = "is empty" if not raw else f"has only {len(raw):,} bytes"
        raise CorpusError(f"domain '{name}' {what}; seq_len {seq_len} needs at least {least:,} (two windows of "
                          f"{seq_len + 1} to train and two to validate): give a longer text, or take a smaller seq_len")


def require_windows(names: list[str], counts, kind: str, seq_len: int) -> None:
    """Raise CorpusError for a domain without any window of this kind."""
    for name, count in zip(names, counts):
        if count == 0:
            raise CorpusError(f"domain '{name}' has no {kind} span of {seq_len + 1} bytes (seq_len {seq_len} + 1): "
                              f"split it with load_corpus(..., seq_len={seq_len}), or take a smaller seq_len")
