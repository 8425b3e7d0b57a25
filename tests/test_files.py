"""Files: atomic writes; a damaged or foreign checkpoint is refused with one clear error."""

import builtins
import io
import json
import os
import pickle
import shutil
import stat
import subprocess
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tinymoe import files

ROOT = Path(__file__).resolve().parent.parent

ARRAYS = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "blocks.0.b": np.array(1.5), "empty": np.zeros((0, 2)),
          "ids": np.array([1, 2])}


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
    "empty": b"", "text": b"once upon a time", "zip signature alone": b"PK\x03\x04",
    "npz without header": npz(a=np.ones(2)),
    "header of another type": npz(__header__=np.ones(2)), "header not a dict": npz(__header__=np.array("[1]")),
    "header without kind": npz(__header__=np.array("{}")), "header not JSON": npz(__header__=np.array("{")),
    "pickled entry": npz(__header__=HEADER, a=np.array([Bomb()], dtype=object)),
    "pickled header": npz(__header__=np.array(Bomb(), dtype=object)),
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


def test_one_flipped_bit_is_refused_or_harmless(tmp_path):
    """Also in the headers of the archive and of its members, where a shifted start of the data gives other numbers."""
    checkpoint, array = tmp_path / "c.npz", np.arange(6, dtype=np.float32)
    files.save_arrays(checkpoint, {"w": array}, {"kind": "model"})
    whole = checkpoint.read_bytes()
    for place, bit in enumerate(np.random.default_rng(0).integers(0, 8, len(whole))):
        checkpoint.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1:])
        try:
            arrays, _ = files.load_arrays(checkpoint, "model")
        except files.CheckpointError:
            continue
        assert [a.tobytes() for a in arrays.values()] == [array.tobytes()]


def npy(header, data=b""):
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x02\x00" + len(text).to_bytes(4, "little") + text + data


SHAPE = "{{'descr': '{}', 'fortran_order': False, 'shape': {}, }}".format
LYING = {  # headers of members that say something else than their data
    "cut": npy("{'descr': '<f4', 'fortran_order': False, 'sha"), "nested": npy("(" * 5000),
    "overlong": npy(SHAPE("<f4", "(" + "1, " * 20000 + ")")),
    "huge": npy(SHAPE("<f4", f"({10**18},)"), bytes(8)),
    "more than 64 bits": npy(SHAPE("<f4", f"(0, {10**18}, {10**18})")),
    "thousands of digits": npy(SHAPE("<f4", "(" + "9" * 5000 + ",)")), "too few": npy(SHAPE("<f4", "(3,)"), bytes(8)),
    "too many": npy(SHAPE("<f4", "(1,)"), bytes(8)), "objects": npy(SHAPE("|O8", "(1,)"), bytes(8)),
    "records": npy(SHAPE("<f4, <f4", "(1,)"), bytes(8)),
    "no such number": npy(SHAPE("<f3", "(1,)"), bytes(3)), "wide text": npy(SHAPE("<U999999999", "(1,)"), bytes(8)),
    "nothing": b"",
}


@pytest.mark.parametrize("member", LYING.values(), ids=LYING)
def test_a_member_that_lies_about_its_size_is_refused_before_memory_is_taken(member, tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, HEADER)
    with zipfile.ZipFile(tmp_path / "c.npz", "w") as archive:
        archive.writestr("__header__.npy", buffer.getvalue())
        archive.writestr("w.npy", member)
    with pytest.raises(files.CheckpointError, match="not a complete tinymoe model"):
        files.load_arrays(tmp_path / "c.npz", "model")


def test_a_small_file_cannot_become_large_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_INFLATED", 1 << 20)
    files.save_arrays(tmp_path / "c.npz", {"w": np.zeros(1 << 20)}, {"kind": "model"}, compress=True)
    with pytest.raises(files.CheckpointError, match="would need more than 1 MiB"):
        files.load_arrays(tmp_path / "c.npz", "model")
    files.save_arrays(tmp_path / "c.npz", {"w": np.zeros(1 << 20)}, {"kind": "model"})  # as large as it is in memory
    assert files.load_arrays(tmp_path / "c.npz", "model")[0]["w"].shape == (1 << 20,)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compressed_member_takes_no_more_memory_than_it_declares(method, tmp_path):
    with zipfile.ZipFile(tmp_path / "c.npz", "w") as archive:
        archive.writestr("w.npy", bytes(1 << 24), compress_type=method)
        archive.getinfo("w.npy").file_size = 100  # the table at the end of the file says so
    tracemalloc.start()
    with pytest.raises(files.CheckpointError, match="not a complete tinymoe model"):
        files.load_arrays(tmp_path / "c.npz", "model")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("array",
                         [np.arange(6.0).reshape(2, 3).T, np.arange(4, dtype=">i2"), np.array([True]),
                          np.array("text \u00fc"), np.array(1j)])
def test_every_kind_of_plain_array_is_read(array, tmp_path):
    files.save_arrays(tmp_path / "c.npz", {"a": array}, {"kind": "model"})
    read = files.load_arrays(tmp_path / "c.npz", "model")[0]["a"]
    assert read.dtype == array.dtype and (read == array).all() and read.flags.writeable


def test_control_characters_of_a_file_do_not_reach_the_terminal(tmp_path):
    files.save_arrays(tmp_path / "c.npz", {}, {"kind": "\x1b[31mred\u202e\udcff\n"})
    with pytest.raises(files.CheckpointError, match=r"holds a \\x1b\[31mred\\u202e\\udcff, not a model"):
        files.load_arrays(tmp_path / "c.npz", "model")


# -- writing ------------------------------------------------------------------------------------

def test_write_atomically_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "new" / "folder" / "a.txt"
    for content in ("first", b"\x00second", "dritter \u00fc"):
        files.write_atomically(path, content)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert stat.S_IMODE(path.stat().st_mode) & 0o444 == 0o444
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("module, where", [(os, "replace"), (os, "fsync"), (builtins, "open")])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_old_file_and_no_other(module, where, error, tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    files.write_atomically(path, "old")

    def interrupt(*args, **kwargs):
        raise error

    monkeypatch.setattr(module, where, interrupt)
    with pytest.raises(type(error)):
        files.write_atomically(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_decides_who_may_read_a_file(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        files.write_atomically(tmp_path / "a.txt", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == mode


def test_a_link_is_followed_where_a_user_names_it_and_replaced_elsewhere(tmp_path):
    outside, link = tmp_path / "outside.txt", tmp_path / "folder" / "link"
    outside.write_text("old")
    link.parent.mkdir()
    link.symlink_to(outside)
    files.write_atomically(link, "through", follow=True)
    assert outside.read_text() == "through" and link.is_symlink()
    files.write_atomically(link, "beside")
    assert outside.read_text() == "through" and link.read_text() == "beside" and not link.is_symlink()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_or_device_is_written_to_where_a_user_names_it_and_refused_elsewhere(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="device or a pipe"):
        files.write_atomically(pipe, "content")
    reader = subprocess.Popen([sys.executable, "-c", f"print(open({str(pipe)!r}).read())"], stdout=subprocess.PIPE,
                              text=True)
    files.write_atomically(pipe, "content", follow=True)
    assert reader.communicate(timeout=120)[0] == "content\n" and stat.S_ISFIFO(pipe.stat().st_mode)
    code = "from tinymoe import files; files.write_atomically('/dev/fd/1', 'content', follow=True)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "content"


def test_only_leftovers_of_this_program_are_removed(tmp_path, monkeypatch):
    def kill(*args, **kwargs):
        raise SystemExit  # stands for a kill: what follows does not run

    monkeypatch.setattr(os, "replace", kill)
    monkeypatch.setattr(files.Path, "unlink", kill)
    with pytest.raises(SystemExit):
        files.write_atomically(tmp_path / "log.jsonl", "rows")
    monkeypatch.undo()
    mine = [".notes.txt", ".keep.d", ".lock", "a.1234abcd.tinymoe"]
    for name in mine:
        (tmp_path / name).touch()
    assert len(list(tmp_path.iterdir())) == 5
    files.remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(mine)


def test_the_next_write_removes_what_a_killed_one_left(tmp_path):
    """Not what another process writes now: this test's parent stands for one."""
    def temporary(pid, age=0):
        path = tmp_path / f".{age}.txt.{pid:08x}.tinymoe"  # the parent may be the process 1
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
        return path

    running = temporary(os.getppid())
    gone = [temporary(os.getpid()), temporary(1, age=61)]
    if sys.platform.startswith("linux"):
        gone.append(temporary(2**31))  # no process can have this number
    files.write_atomically(tmp_path / "b.txt", "text")
    assert running.exists() and not any(path.exists() for path in gone)


def test_a_write_that_is_killed_leaves_nothing_after_the_next(tmp_path):
    code = (f"import os, signal; from tinymoe import files; files.os.replace = lambda *names: os.kill(os.getpid(), 9); "
            f"files.write_atomically({str(tmp_path / 'FINDINGS.md')!r}, 'text')")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT)
    assert len(list(tmp_path.iterdir())) == 1
    if not sys.platform.startswith("linux"):
        os.utime(next(tmp_path.iterdir()), (0, 0))
    files.write_atomically(tmp_path / "FINDINGS.md", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["FINDINGS.md"]


def test_a_folder_that_vanishes_is_named(tmp_path, monkeypatch):
    def vanish(*names):
        shutil.rmtree(tmp_path / "out")
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(os, "replace", vanish)
    with pytest.raises(OSError, match="its folder vanished"):
        files.write_atomically(tmp_path / "out" / "a.txt", "text")


def test_the_new_file_is_complete_before_it_takes_the_place(tmp_path, monkeypatch):
    path, seen, replace = tmp_path / "a.txt", [], os.replace

    def spy(source, target):
        with open(source, "rb") as f:
            seen.append((os.path.dirname(source) == str(tmp_path), f.read()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", spy)
    files.write_atomically(path, "content")
    assert seen == [(True, b"content")]


def test_json_refuses_nan_and_keeps_the_old_file(tmp_path):
    files.write_json(tmp_path / "a.json", {"loss": 1.5})
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "a.json", {"loss": float("nan")})
    with pytest.raises(ValueError):
        files.write_rows(tmp_path / "a.json", [{"loss": 1.0}, {"loss": float("inf")}])
    assert json.loads((tmp_path / "a.json").read_text()) == {"loss": 1.5}


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_numbers_that_are_not_finite_are_no_json(tmp_path, number):
    path = tmp_path / "a.json"
    path.write_text(f'{{"loss": [0.5]}}\n{{"loss": [{number}]}}\n')
    assert files.read_rows(path) == [{"loss": [0.5]}]
    path.write_text(f'{{"loss": [{number}]}}')
    with pytest.raises(ValueError, match="is not a JSON object"):
        files.read_json(path)


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
