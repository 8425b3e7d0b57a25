"""Files: whole or not there, and a checkpoint that is anything else is refused with one clear error."""
import io
import json
import os
import pickle
import stat

import numpy as np
import pytest

from tinymoe import files

ARRAYS = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "blocks.0.b": np.array(1.5), "empty": np.zeros((0, 2)), "ids": np.array([1, 2])}


@pytest.fixture
def checkpoint(tmp_path):
    files.save_arrays(tmp_path / "c.npz", ARRAYS, {"kind": "model", "step": 3})
    return tmp_path / "c.npz"


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a file was unpickled",)


def test_arrays_come_back_bit_for_bit(checkpoint):
    arrays, header = files.load_arrays(checkpoint, "model")
    assert header == {"kind": "model", "step": 3} and arrays.keys() == ARRAYS.keys()
    for name, a in ARRAYS.items():
        assert arrays[name].dtype == a.dtype and arrays[name].shape == a.shape and arrays[name].tobytes() == a.tobytes()


HEADER = np.array(json.dumps({"kind": "model"}))
FOREIGN = {
    "empty": b"", "text": b"once upon a time", "zip signature alone": b"PK\x03\x04", "npz without header": npz(a=np.ones(2)),
    "header of another type": npz(__header__=np.ones(2)), "header not a dict": npz(__header__=np.array("[1]")),
    "header without kind": npz(__header__=np.array("{}")), "header not JSON": npz(__header__=np.array("{")),
    "pickled entry": npz(__header__=HEADER, a=np.array([Bomb()], dtype=object)), "pickled header": npz(__header__=np.array(Bomb(), dtype=object)),
    "pickle": pickle.dumps(Bomb()), "npy": npz(a=np.ones(2))[30 + 5:],
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_foreign_files_are_refused_and_left_alone(content, tmp_path):
    path = tmp_path / "c.npz"
    path.write_bytes(content)
    with pytest.raises(files.CheckpointError, match=r"c\.npz"):
        files.load_arrays(path, "model")
    assert path.read_bytes() == content


def test_a_single_array_a_folder_and_nothing_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.ones(3))
    for name in ("a.npy", ".", "missing.npz"):
        with pytest.raises(files.CheckpointError):
            files.load_arrays(tmp_path / name, "model")


def test_another_kind_is_named(checkpoint):
    with pytest.raises(files.CheckpointError, match="holds a model, not a run"):
        files.load_arrays(checkpoint, "run")


def test_truncation_at_any_byte_is_refused(checkpoint):
    whole = checkpoint.read_bytes()
    for length in range(0, len(whole), 7):
        checkpoint.write_bytes(whole[:length])
        with pytest.raises(files.CheckpointError):
            files.load_arrays(checkpoint, "model")


def test_a_flipped_byte_is_refused_or_harmless(checkpoint):
    """Harmless where the archive holds what is not read, as dates: then the arrays must be the same."""
    whole = checkpoint.read_bytes()
    for place in range(0, len(whole), 3):
        checkpoint.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1:])
        try:
            arrays, _ = files.load_arrays(checkpoint, "model")
        except files.CheckpointError:
            continue
        assert sorted(a.tobytes() for a in arrays.values()) == sorted(a.tobytes() for a in ARRAYS.values())


# ---- writing ----------------------------------------------------------------------------------------------------------------------

def test_write_whole_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "new" / "folder" / "a.txt"
    for content in ("first", b"\x00second", "dritter \u00fc"):
        files.write_whole(path, content)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert stat.S_IMODE(path.stat().st_mode) & 0o444 == 0o444
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("where", ["replace", "fsync", "chmod"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_old_file_and_no_other(where, error, tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    files.write_whole(path, "old")

    def interrupt(*args, **kwargs):
        raise error

    monkeypatch.setattr(os, where, interrupt)
    with pytest.raises(type(error)):
        files.write_whole(path, "new")
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_the_new_file_is_complete_before_it_takes_the_place(tmp_path, monkeypatch):
    path, seen, replace = tmp_path / "a.txt", [], os.replace

    def spy(source, target):
        with open(source, "rb") as f:
            seen.append((os.path.dirname(source) == str(tmp_path), f.read()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", spy)
    files.write_whole(path, "content")
    assert seen == [(True, b"content")]


def test_json_refuses_nan_and_keeps_the_old_file(tmp_path):
    files.write_json(tmp_path / "a.json", {"loss": 1.5})
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "a.json", {"loss": float("nan")})
    with pytest.raises(ValueError):
        files.write_rows(tmp_path / "a.json", [{"loss": 1.0}, {"loss": float("inf")}])
    assert json.loads((tmp_path / "a.json").read_text()) == {"loss": 1.5}


def test_rows_are_read_up_to_a_torn_line(tmp_path):
    path, rows = tmp_path / "log.jsonl", [{"step": 1, "loss": 0.5}, {"step": 2, "name": "\u2028 \u00fc"}]
    assert files.read_rows(path) == []
    files.write_rows(path, rows)
    assert files.read_rows(path) == rows
    whole = path.read_bytes()
    for length in range(len(whole) - 1):
        path.write_bytes(whole[:length])
        assert files.read_rows(path) in (rows[:0], rows[:1], rows)
    path.write_bytes(whole + b'{"step": 3, "na\xff\x00')
    assert files.read_rows(path) == rows
