"""Files: atomic writes, arrays without pickle, JSON rows. Everything the project writes goes through here.

Arrays are stored as .npz. They are read with a parser of their own that checks sizes and checksums before it builds an
array; pickled content is never loaded.
"""

import contextlib
import csv
import functools
import hashlib
import io
import json
import math
import os
import platform
import re
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np

TEMPORARY = re.compile(r"\..+\.([0-9a-f]{8})?([0-9a-f]{8})\.tinymoe")  # a file that is being written: host, process
MAX_INFLATED = 1 << 30  # bytes that the compressed arrays of one file may become in memory
NPY = re.compile(rb"\x93NUMPY(?:\x01\0..|[\x02\x03]\0....)"  # magic, version, length of the header (numpy.lib.format)
                 rb"\{'descr': '([<>|][biufcU]\d{1,9})', 'fortran_order': (True|False), "
                 rb"'shape': \(((?:\d{1,19}, ?)*\d{0,19})\),? ?\} *\n", re.DOTALL)


class CheckpointError(Exception):
    """A checkpoint that cannot be read or does not belong here. The message says what to do."""


def printable(text):
    """A text on one line: white space becomes single blanks, control characters become escapes such as \\x1b.

    Names and values that come out of files go through here before a terminal shows them.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(str(text).split()))


def cache_folder() -> Path | None:
    """The user's folder for what tinymoe keeps between runs: in XDG_CACHE_HOME, or in ~/.cache; None without a home."""
    path = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "tinymoe")
    return path if path.is_absolute() else None  # without a home "~" stays


def write_atomically(path, content, follow=False):
    """Write str or bytes to a file: readers see old or new content, never a part. Makes its folder.

    follow: for a path that a user names. The target of a link is written, and so is a device or pipe. Otherwise a link
        is replaced by a file, so that nothing outside the folder changes.
    Raises OSError, also for a device or a pipe without `follow`.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    if path.exists() and not (path.is_file() or path.is_dir() or path.is_symlink() and not follow):
        if not follow:
            raise FileExistsError(f"{path} is a device or a pipe: remove it, or choose another folder")
        return path.write_bytes(data)
    if follow:
        path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    temporary = path.with_name(temporary_name(path.name))
    try:
        with open(temporary, "xb") as f:  # its permissions are what the umask leaves
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # a file system that is read-only refuses this too
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):  # a full disk names no file
            vanished = isinstance(error, FileNotFoundError)  # the folder, or the file that was to be renamed
            advice = "its folder vanished" if vanished else "make room, or choose another folder"
            raise OSError(error.errno, f"{error.strerror}: {advice}", str(path)) from None
        raise


def require_ours(path, mark: str):
    """Raise FileExistsError if there is a file without `mark`, a text that all files of ours have."""
    if path.exists() and mark not in path.read_text(encoding="utf-8", errors="replace"):
        raise FileExistsError(f"{path} was not made by this program: move it away, or give another folder")


@functools.cache
def host_tag() -> str:
    """Eight hex digits that tell this host, since it was started, from others. A container counts as a host."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):
        parts += Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:8]


def is_gone(pid: int) -> bool:
    """Whether a process of this host has ended; False where that cannot be seen."""
    return Path("/proc/self").exists() and not Path(f"/proc/{pid}").exists()


def temporary_name(name: str) -> str:
    """The name of the temporary file that this process renames to `name`."""
    return f".{name}.{host_tag()}{os.getpid():08x}.tinymoe"


def remove_leftovers(folder, alone=False):
    """Delete the temporary files of killed writes in a folder: those a minute old, or whose process is gone.

    alone: no other process writes there, so that all of them are leftovers, those of other hosts too.
    """
    for path in Path(folder).glob(".*.tinymoe"):
        if name := TEMPORARY.fullmatch(path.name):
            writer = int(name[2], 16)
            gone = alone or name[1] in (None, host_tag()) and (writer == os.getpid() or is_gone(writer))
            with contextlib.suppress(OSError):  # it is removed by now, or another user's
                if path.is_file() and (gone or time.time() - path.stat().st_mtime > 60):
                    path.unlink()


def write_json(path, value):
    """Write a value as indented JSON. Raises ValueError for NaN and infinity, which JSON does not have."""
    write_atomically(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path):
    """The JSON object in a file, a dict, as `from_json` reads it. Raises OSError if it cannot be read, else ValueError.
    """
    try:
        return _json_object(Path(path).read_bytes())
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is not a JSON object") from None


def write_rows(path, rows):
    """Write objects as .jsonl, one a line."""
    write_atomically(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def as_csv(rows):
    """Dicts as CSV with a heading, as text: the names of all rows, and an empty cell where a row lacks one."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def read_rows(path):
    """The JSON objects of a .jsonl file, one a line; stops at a truncated line, and at one that is no object."""
    rows = []
    with contextlib.suppress(FileNotFoundError, ValueError, RecursionError):
        for line in Path(path).read_text(errors="replace").splitlines():
            rows.append(_json_object(line))
    return rows


def from_json(text):
    """The value of a JSON text. Raises ValueError for another text, and for NaN and infinity, also for 1e999."""
    return json.loads(text, parse_float=_finite, parse_constant=_finite)


def _finite(number):
    if not math.isfinite(value := float(number)):
        raise ValueError(f"{number} is not finite")
    return value


def _json_object(text):
    value = from_json(text)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def save_arrays(path, arrays, header, compress=False, follow=False):
    """Write a dict of arrays and a header (a dict that JSON takes) as one .npz file; follow: as in write_atomically."""
    buffer = io.BytesIO()
    (np.savez_compressed if compress else np.savez)(buffer, **arrays, __header__=np.array(json.dumps(header)))
    write_atomically(path, buffer.getvalue(), follow)


def load_arrays(path, kind):
    """(arrays, header) of a file that `save_arrays` wrote with header["kind"] == kind.

    Sizes are bounded before anything is allocated, and each array's checksum is compared before the array is built.
    Raises CheckpointError for a missing, truncated, damaged or foreign file.
    """
    try:
        with zipfile.ZipFile(path) as stored:
            members = stored.infolist()
            if any(one.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for one in members):
                raise ValueError("a compression that numpy does not write")
            if sum(one.file_size for one in members if one.compress_type != zipfile.ZIP_STORED) > MAX_INFLATED:
                raise CheckpointError(f"{path} would need more than {MAX_INFLATED >> 20} MiB: it is no tinymoe {kind}")
            arrays = {one.filename.removesuffix(".npy"): _array(_content(stored, one)) for one in members}
        header = from_json(str(arrays.pop("__header__")))
        found = header["kind"]
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: check the path") from None
    except (OSError, ValueError, LookupError, TypeError, EOFError, ArithmeticError, RuntimeError, MemoryError,
            zipfile.BadZipFile, zlib.error) as error:  # RecursionError is a RuntimeError
        raise CheckpointError(f"{path} is not a complete tinymoe {kind} ({type(error).__name__}): it may be truncated, "
                              "damaged, or from another program; move it away") from None
    if found != kind:
        raise CheckpointError(f"{path} holds a {printable(found)[:40]}, not a {kind}: give another file")
    return arrays, header


def load_arrays_into(targets, arrays):
    """Copy each array into the target of the same name; both are dicts of arrays, and the targets keep their dtype.

    Raises ValueError where a name is missing or unknown, or a shape differs. Then nothing is copied.
    """
    for name in [*targets, *arrays]:
        if name not in arrays or name not in targets:
            raise ValueError(f"{name} is missing" if name in targets else f"{name} is not expected")
        if arrays[name].shape != targets[name].shape:
            raise ValueError(f"{name} has the shape {arrays[name].shape}, not {targets[name].shape}")
    for name, array in arrays.items():
        targets[name][...] = array


def _content(stored, member):
    """The bytes of a member, as many as it declares. Raises BadZipFile where its checksum is of others."""
    with stored.open(member) as f:
        return f.read(member.file_size)  # without a size it would be inflated to its end


def _array(raw):
    """The array of the bytes of a .npy file. Raises ValueError where header and size do not agree."""
    start = NPY.match(raw)
    if start is None:
        raise ValueError("no header of a plain array")
    dtype, order, shape = np.dtype(start[1].decode()), "F" if start[2] == b"True" else "C", start[3].decode()
    shape = tuple(int(n) for n in shape.split(",") if n.strip())
    if math.prod(shape) * dtype.itemsize != len(raw) - start.end():
        raise ValueError("the size of the data is not that of the shape")
    return np.frombuffer(raw, dtype, offset=start.end()).reshape(shape, order=order).copy()
