"""The folder of one run: its files, its lock, and how an interrupted run is resumed.

config.json comes first; log.jsonl, routings/STEP.npz and checkpoint.npz follow at every evaluation; summary.json comes
last and says that the run is finished, or failure.json says why it stopped. Training after a checkpoint depends on the
checkpoint alone, so a resumed run ends with the same bits as one that was never interrupted.
"""

import contextlib
import os
import re
import time
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system: runs are not locked
    fcntl = None

from .. import files
from ..files import CheckpointError
from . import checkpoint
from .identity import NOTED, RunError, describe, differing, noted, with_defaults
from .lease import Lease

FILES = ("summary.json", "checkpoint.npz", "log.jsonl", "failure.json", "config.json")
ROUTINGS = "routings"  # the folder of what the routers did to a few validation windows, one file for each evaluation
AGAIN = "move this run's folder away and run the same command again"


class Busy(RunError):
    """A run that another process trains now."""


def saved_routings(run: str | Path) -> list[Path]:
    """The files of saved routings in the folder of a run, by step."""
    found = (path for path in Path(run, ROUTINGS).glob("*.npz") if re.fullmatch(r"\d{6,}", path.stem))
    return sorted(found, key=lambda path: int(path.stem))


class RunFolder:
    """The files of one run. Only files of a run are removed. A link is an error: it leads out of the folder."""

    def __init__(self, path: str | Path):
        self.path, self.lease = Path(path), None

    def summary(self) -> dict | None:
        """The summary of a finished run whose files are complete; None for any other."""
        try:
            summary = files.read_json(self.path / "summary.json")  # first: a run in training has none
            rows = files.read_rows(self.path / "log.jsonl")
            complete = summary["status"] == "complete" and rows[-1]["step"] == summary["steps"]
            return summary if complete and (self.path / "config.json").exists() else None
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def finished(self, config: dict, fresh: bool | str) -> dict | None:
        """The summary if the run is finished and not to be trained again. Raises RunError if it is another run."""
        summary = None if self.discards(fresh) else self.summary()
        if summary:
            self.require_same(config)
        return summary

    def is_to_do(self, fresh: bool | str) -> bool:
        """Whether the run is to be trained: it is not finished, or is thrown away."""
        return self.discards(fresh) or self.summary() is None

    def discards(self, fresh: bool | str) -> bool:
        """Whether `fresh` throws away the run that is there: True does, a command's name unless it began that run."""
        if not isinstance(fresh, str):
            return fresh
        try:
            return files.read_json(self.path / "config.json").get("fresh") != fresh
        except (OSError, ValueError):
            return True

    @contextlib.contextmanager
    def locked(self):
        """Make the folder and hold its lock and lease, so that only one process writes it. Both end with the process.

        Raises Busy if another process holds it, RunError if the folder cannot be locked.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        inside = [self.path / name for name in (".", ".lock", ROUTINGS, *FILES)]
        for path in [*inside, *self.path.glob(f"{ROUTINGS}/*")]:
            if path.is_symlink():
                raise RunError(f"{path} is a link, but a run writes only inside its own folder: remove the link")
        handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        lease = Lease(self.path)
        try:
            if fcntl:
                self._wait_for_lock(handle, lease)
                self.lease = lease
            yield
        except FileNotFoundError as error:
            if self.path in Path(error.filename or "").parents:  # a file of ours
                raise self._vanished() from None
            raise
        finally:
            self.lease = None
            try:
                lease.release()
            finally:
                os.close(handle)

    def _wait_for_lock(self, handle, lease):
        unlocked, locked = os.environ.get("TINYMOE_NO_LOCK"), False
        for _ in range(100):  # ten seconds: the workers of a killed study need a moment to exit
            locked = locked or not unlocked and self._lock(handle)
            if (locked or unlocked) and lease.take(locked):
                return
            time.sleep(0.1)
        raise Busy(f"{self.path} is being written by another process: wait for it, or choose another --out")

    def _lock(self, handle):
        """Lock a file for this process; whether that succeeded."""
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        except OSError as error:
            raise RunError(f"{self.path} cannot be locked ({error.strerror}): choose another --out, or set "
                           "TINYMOE_NO_LOCK=1 if no other process writes there") from None

    def create(self, config: dict, fresh: bool | str):
        """Write config.json, or check that it describes the same run; remove what belongs to no checkpoint.

        fresh: first remove the files of the run that is there, see `train`. One without a row is always removed. Raises
        RunError if the folder holds another run, or one that nothing describes. A run that continues on another kind of
        processor, or with other versions, notes that in config.json.
        """
        path = self.path / "config.json"
        has_rows = any((self.path / name).exists() for name in FILES if name != "config.json")
        if self.discards(fresh) or not has_rows:
            for name in FILES:  # summary.json first: after a crash no run looks finished
                (self.path / name).unlink(missing_ok=True)
        if path.exists():
            self.require_same(config)
            found = files.read_json(path)
            more = {several: [*before, config[name]] for name, several in NOTED.items()
                    if (before := noted(found, name)) and config[name] not in before}
            if more:
                files.write_json(path, found | more)
        elif any((self.path / name).exists() for name in FILES):
            raise RunError(f"{self.path} holds files of a run, but no config.json that says of which: {AGAIN}")
        else:
            files.write_json(path, config | ({"fresh": fresh} if isinstance(fresh, str) else {}))
        (self.path / "failure.json").unlink(missing_ok=True)
        routings = self.path / ROUTINGS
        for folder in (self.path, routings):
            files.remove_leftovers(folder, alone=True)
        if not (self.path / "checkpoint.npz").exists():  # the saved routings are of an earlier run
            for path in saved_routings(self.path):
                path.unlink()
            with contextlib.suppress(OSError):  # it does not exist, or holds files of the user
                routings.rmdir()

    def longer(self, plan, corpus) -> dict | None:
        """The config.json of the run that is there, with the larger number of steps of `plan`; None where there is no
        run, or one of at least as many steps.

        It notes under `extended` at which step, from and to how many steps. Raises RunError where the run differs in
        more than its steps, CheckpointError without a checkpoint.
        """
        path, steps = self.path / "config.json", plan.training.steps
        if not path.exists():
            return None
        try:
            found = files.read_json(path)
            before = found["training"]["steps"]
            if before >= steps:
                return None
            config = found | {"training": found["training"] | {"steps": steps}}
            different = differing(config, describe(plan, corpus))
            at = files.load_arrays(self.path / "checkpoint.npz", "checkpoint")[1]["step"]
            config["extended"] = [*found.get("extended", []), {"step": at, "from": before, "to": steps}]
        except (ValueError, TypeError, AttributeError, KeyError):
            raise RunError(f"{path} is not the JSON object that a run writes: {AGAIN}") from None
        if different:
            raise RunError(f"{self.path} differs in more than its steps ({'; '.join(different)}): not extended")
        return config

    def lengthen(self, plan, corpus):
        """Let the run that is there go on to the steps of `plan`, as `longer` says.

        From there on the learning rate follows the schedule of the longer run.
        """
        if not (self.path / "config.json").exists():
            return
        with self.locked():
            if config := self.longer(plan, corpus):
                (self.path / "summary.json").unlink(missing_ok=True)  # first: after a crash the old command ends it
                files.write_json(self.path / "config.json", config)

    def resume(self, trainer) -> bool:
        """Restore the trainer's state from the checkpoint; False if there is none.

        Raises CheckpointError if the checkpoint is damaged or belongs to another run, or if the log is incomplete.
        """
        path, plan = self.path / "checkpoint.npz", trainer.plan
        if not path.exists():
            return False
        (arrays, state), rows = files.load_arrays(path, "checkpoint"), files.read_rows(self.path / "log.jsonl")
        try:
            model = with_defaults({"model": state["model"]})["model"]
            if (state["run_id"], model) != (plan.run_id, plan.model.to_dict()):
                raise ValueError("it is of another run")
            rows = rows[:state["n_rows"]]
            if not rows or rows[-1]["step"] != state["step"]:
                raise ValueError("its log.jsonl is incomplete")
            checkpoint.restore(trainer, arrays, state, rows)
        except (ValueError, TypeError, KeyError, ArithmeticError) as error:
            raise CheckpointError(f"{path} cannot be resumed, {error}: {AGAIN}") from None
        return True

    def save(self, trainer, routings: dict):
        """Write the trainer's log, the routings that it recorded (none for a dense model), and the checkpoint."""
        self._require_there()
        state = checkpoint.header(trainer)
        files.write_rows(self.path / "log.jsonl", trainer.rows)
        if routings:
            header = {"kind": "routings", "names": trainer.corpus.names,
                      **{name: state[name] for name in ("run_id", "model", "step")}}
            files.save_arrays(self.path / ROUTINGS / f"{trainer.step:06}.npz", routings, header, compress=True)
        files.save_arrays(self.path / "checkpoint.npz", checkpoint.arrays(trainer), state)

    def end(self, name: str, value: dict):
        """Write summary.json, which marks the run as finished, or failure.json, which says why it stopped."""
        self._require_there()
        files.write_json(self.path / name, value)

    def _require_there(self):
        """Raise RunError if the folder vanished, Busy if another process took it over while this one was stopped."""
        if not (self.path / "config.json").exists():  # writing would make the folder again, with a part of the files
            raise self._vanished()
        if self.lease and not self.lease.held():
            raise Busy(f"the lease of {self.path} vanished, or another process took it over while this one was "
                       "stopped: run the same command again")

    def _vanished(self):
        return RunError(f"{self.path} vanished while the run was training: run the same command again")

    def require_same(self, config: dict):
        """Raise RunError, naming the differences, if config.json describes another run than `config`."""
        path = self.path / "config.json"
        try:
            found = files.read_json(path)
            different = differing(found, config)
            shorter = bool(different) and found["training"]["steps"] < config["training"]["steps"]
        except (ValueError, TypeError, AttributeError, KeyError):
            raise RunError(f"{path} is not the JSON object that a run writes: {AGAIN}") from None
        if different:
            longer = shorter and [text.split()[1] for text in different] == ["steps"]
            raise RunError(f"{self.path} holds a run with other settings ({'; '.join(different)}): choose another "
                           f"--out, or start again with --fresh{', or lengthen it with --extend' if longer else ''}")
