"""The lease of a run's folder, which says to all hosts which process writes there.

A lock of the operating system (flock) is exact and ends with its process, but on a file system that several hosts share
it may hold within one host only. So the process that has the lock also makes the file `.lease`. It names the process
and its host, and a thread renews its time. Why only one process writes the folder:

1. `.lease` is made with O_EXCL: of several hosts one succeeds, on NFS (version 3 and later) too.
2. A lease of this host is stale when its process is gone, one of another host when it was not renewed for SECONDS.
   Both times are the file server's: the second is that of a file just written there. So clocks need not agree.
3. Who takes over a stale lease renames it first: of several hosts one succeeds. If the renamed file is not the one that
   was judged, since another host was faster, it is renamed back.
4. Before each save a process reads `.lease`, and stops if the lease is not its own: it slept until its own was stale.
   What it could still write at that moment are complete files of the same run, with the bits that the other writes.
"""

import contextlib
import json
import os
import platform
import threading
import time
from pathlib import Path

from ..files import host_tag, is_gone, temporary_name

SECONDS = float(os.environ.get("TINYMOE_LEASE") or 90)  # a lease that was not renewed for so long is stale


class Lease:
    """The lease of one folder. path: its file."""

    def __init__(self, folder):
        self.path, self._ended = Path(folder, ".lease"), threading.Event()
        self._content = b""  # of our file, once we hold it

    def take(self, locked: bool) -> bool:
        """Make the file, or take over one that is stale; False if another process holds it.

        locked: whether this process has the lock of the operating system. Raises OSError.
        """
        content = json.dumps({"host": platform.node(), "tag": host_tag(), "pid": os.getpid(),
                              "started": time.time()}).encode()
        try:
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return self._remove_stale(locked) and self.take(locked)
        try:
            os.write(handle, content)
        finally:
            os.close(handle)
        self._content = content
        threading.Thread(target=self._renew, daemon=True).start()
        return True

    def held(self) -> bool:
        """Whether the file is still ours."""
        return self._content == _read(self.path)[0]

    def release(self):
        """Remove the file, if it is ours."""
        self._ended.set()
        if self._content and self.held():
            self.path.unlink(missing_ok=True)

    def _renew(self):
        while not self._ended.wait(SECONDS / 6):
            with contextlib.suppress(OSError):  # the network may be back the next time
                if self.held():
                    os.utime(self.path)

    def _remove_stale(self, locked):
        content, changed = _read(self.path)
        if changed is None:
            return True  # it was just released
        clock = self.path.with_name(temporary_name(".clock"))
        with open(clock, "w") as file:
            age = os.fstat(file.fileno()).st_mtime - changed
        clock.unlink(missing_ok=True)
        tag, pid = _holder(content)
        if not (age > (SECONDS if tag else 2) or tag == host_tag() and (locked or is_gone(pid))):
            return False
        aside = self.path.with_name(temporary_name(".lease"))
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.path, aside)
            if _read(aside)[0] == content:
                aside.unlink()
            else:
                os.rename(aside, self.path)
        return True


def holder(folder) -> dict | None:
    """{"host", "pid", ...} of the process that writes a folder; None if there is none. Clocks of hosts may differ."""
    content, changed = _read(Path(folder, ".lease"))
    tag, pid = _holder(content)
    if changed is None or time.time() - changed > 2 * SECONDS or tag == host_tag() and is_gone(pid):
        return None
    return json.loads(content) if tag else {"host": "?", "pid": pid}


def _holder(content):
    """(tag, pid) in the content of a lease; (None, 0) if it is damaged, or not yet written."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        value = json.loads(content)
        return str(value["tag"]), int(value["pid"])
    return None, 0


def _read(path):
    """(content, time of change) of a file, (None, None) if there is none. Opening it makes NFS ask the server."""
    try:
        with open(path, "rb") as file:
            return file.read(1000), os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None, None
