"""Files that are whole or not there: everything the project writes goes through here.

A file is written beside its place under another name, forced to disk, and renamed: whoever is
killed in between leaves the old file. Arrays are stored as .npz and never unpickled.
"""

import io
import json
import os
import re
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np


class CheckpointError(Exception):
    """A checkpoint that cannot be read or does not belong here; the message says what to do."""


def write_whole(path, content):
    """Write str or bytes to path so that it appears complete or not at all, making its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tinymoe", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(content.encode() if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):  # a full disk names no file
            raise OSError(error.errno, f"{error.strerror}: make room, or choose another folder", str(path)) from None
        raise


def remove_leftovers(folder):
    """Delete the temporary files that a killed `write_whole` left in a folder, and nothing else."""
    for path in Path(folder).glob(".*"):
        if re.fullmatch(r"\..+\.[a-z0-9_]{8}\.tinymoe", path.name) and path.is_file():
            path.unlink(missing_ok=True)


def write_json(path, value):
    """Write a value as indented JSON; NaN is refused, since it is no JSON."""
    write_whole(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path):
    """The JSON object in a file, a dict. Raises OSError if it cannot be read, ValueError if it is something else."""
    try:
        value = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object")
    return value


def read_rows(path):
    """The JSON objects of a .jsonl file, up to the first line that is none: a kill has torn it."""
    rows = []
    if not Path(path).exists():
        return rows
    for line in Path(path).read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(row, dict):
            break
        rows.append(row)
    return rows


def write_rows(path, rows):
    """Write objects as .jsonl, one a line."""
    write_whole(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def save_arrays(path, arrays, header, compress=False):
    """Write a dict of arrays and a JSON-able header as one .npz file."""
    buffer = io.BytesIO()
    (np.savez_compressed if compress else np.savez)(buffer, **arrays, __header__=np.array(json.dumps(header)))
    write_whole(path, buffer.getvalue())


def load_arrays(path, kind):
    """(arrays, header) of a file that `save_arrays` wrote with header["kind"] == kind.

    Raises CheckpointError for a missing, truncated or foreign file. Nothing is unpickled.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        header = json.loads(str(arrays.pop("__header__")))
        if header["kind"] != kind:
            raise CheckpointError(f"{path} holds a {header['kind']}, not a {kind}: give another file")
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: check the path") from None
    except (OSError, ValueError, KeyError, TypeError, EOFError, AttributeError, RuntimeError,
            zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointError(f"{path} is not a whole tinymoe {kind} ({type(error).__name__}): it may be truncated or "
                              "from another program; move it away") from None
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
