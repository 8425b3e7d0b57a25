"""The lease of a run's folder, which says to all hosts which process writes there.

A lock of the operating system (flock) is exact and ends with its process, but on a file system that several hosts share
it may hold within one host only. So the process that has the lock also makes a file `.lease1`. It names the process
and its host, and a thread renews its time. Why only one process writes the folder:

1. The file is made with O_EXCL: of several hosts one succeeds, on NFS (version 3 and later) too.
2. A lease is stale when it was not renewed for SECONDS; one of this host also when its process is gone.
   The time of renewal and the present are both the file server's; the present is that of a file just written there.
   So clocks need not agree.
3. A stale lease is not removed first, since by then another host may have put its own in that place. Who takes it over
   makes the file of the next number, looks again, and withdraws unless its own is the only change. Of two that took
   over at the same time the later one sees the earlier one's file. Then the stale files are removed.
4. Before each save a process reads its file, and stops if that is gone: it slept until its lease was stale.
   What it could still write at that moment are complete files of the same run, with the bits that the other writes.
"""

import contextlib
import errno
import json
import os
import platform
import re
import threading
import time
from pathlib import Path

from ..files import from_json, host_tag, is_gone, temporary_name
from .identity import RunError


def _seconds(text):
    with contextlib.suppress(ValueError):
        if 0 < float(text) <= 1e9:
            return float(text)
    raise RunError(f"TINYMOE_LEASE is {text!r}: set it to a number of seconds above 0, at most 1e9, or unset it")


SECONDS = _seconds(os.environ.get("TINYMOE_LEASE") or "90")  # a lease that was not renewed for so long is stale


class Lease:
    """The lease of one folder. path: its file, once it was made."""

    def __init__(self, folder):
        self.folder, self.path, self._content, self._ended = Path(folder), None, b"", threading.Event()

    def take(self, locked: bool) -> bool:
        """Make the file if there is none, or only stale ones; False if another process holds the lease.

        locked: whether this process has the lock of the operating system. Raises OSError.
        """
        before = _leases(self.folder)
        if before and not self._are_stale(before, locked):
            return False
        number = max(before, default=0) + 1
        path = _path(self.folder, number)
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        content = json.dumps({"host": platform.node(), "tag": host_tag(), "pid": os.getpid(),
                              "started": time.time()}).encode()
        try:
            with open(handle, "wb") as file:
                file.write(content)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise OSError(error.errno, f"{error.strerror}: make room, or choose another folder", str(path)) from None
        self.path, self._content = path, content
        after = _leases(self.folder)
        if after.pop(number, (b"",))[0] != content or after != before:
            self._remove()
            return False
        for number in before:
            _path(self.folder, number).unlink(missing_ok=True)
        threading.Thread(target=self._renew, daemon=True).start()
        return True

    def held(self) -> bool:
        """Whether the file is there, and ours."""
        found = self.path and _read(self.path)
        return bool(found) and found[0] == self._content

    def release(self):
        """Remove the file, if it is ours."""
        self._ended.set()
        self._remove()

    def _remove(self):
        if self.held():
            self.path.unlink(missing_ok=True)

    def _renew(self):
        while not self._ended.wait(SECONDS / 6):
            with contextlib.suppress(OSError):  # the network may be back the next time
                if self.held():
                    os.utime(self.path)

    def _are_stale(self, leases, locked):
        clock = self.folder / temporary_name(".clock")
        with open(clock, "w") as file:
            now = os.fstat(file.fileno()).st_mtime
        clock.unlink(missing_ok=True)
        for content, changed in leases.values():
            tag, pid, _ = _holder(content)
            gone = tag == host_tag() and (locked or is_gone(pid))
            if not gone and now - changed <= (SECONDS if tag else 2):
                return False
        return True


def holder(folder) -> dict | None:
    """{"host", "pid"} of the process that writes a folder; None if there is none. Clocks of hosts may differ."""
    leases = _leases(folder)
    content, changed = leases[max(leases)] if leases else (b"", 0.0)
    tag, pid, host = _holder(content)
    if time.time() - changed > 2 * SECONDS or tag == host_tag() and is_gone(pid):
        return None
    return {"host": host, "pid": pid}


def _holder(content):
    """(tag, pid, host) in the content of a lease; (None, 0, "?") if it is damaged, or not yet written."""
    with contextlib.suppress(ValueError, TypeError, KeyError, OverflowError, RecursionError):
        value = from_json(content)
        if 0 <= int(value["pid"]) < 2**32:
            return str(value["tag"]), int(value["pid"]), str(value["host"])
    return None, 0, "?"


def _path(folder, number):
    return Path(folder, f".lease{number}")


def _leases(folder):
    """{number: (content, time of change)} of the leases in a folder; {} if there is no folder."""
    with contextlib.suppress(FileNotFoundError):
        names = [name for name in os.listdir(folder) if re.fullmatch(r"\.lease[1-9]\d{0,17}", name)]
        found = {int(name[6:]): _read(Path(folder, name)) for name in names}
        return {number: lease for number, lease in found.items() if lease}
    return {}


def _read(path):
    """(content, time of change) of a file, None if there is none. Opening it makes NFS ask the server."""
    try:
        with open(path, "rb") as file:
            return file.read(1000), os.fstat(file.fileno()).st_mtime
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):  # ESTALE: another host has removed it meanwhile
            return None
        raise
