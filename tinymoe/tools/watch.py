"""A page on 127.0.0.1 that follows the runs of a folder while they train: losses, loads and routes. It only reads."""

import json
import sys
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import numpy as np

from ..files import CheckpointError, load_arrays, printable
from ..study.palette import EXPERTS, INKS, symbol
from ..study.quantities import LOSS
from ..study.rows import load_runs, overview
from ..training.data import CorpusError
from ..training.evaluation import first_choices
from ..training.run_folder import saved_routings
from . import view


def state(folder) -> dict:
    """What the page shows of a results folder, ready for JSON: its runs, by id, and `error`, what cannot be read."""
    runs, strange = [], []
    try:
        progress = {row["run"]: row for row in overview(folder)}
        for run in load_runs(folder):
            try:
                runs.append(_run(Path(folder), run, progress.get(run.run_id)))
            except (KeyError, TypeError, IndexError, AttributeError, ValueError):
                strange.append(printable(run.run_id))
        error = f"{', '.join(strange)}: rows of another version" if strange else "" if runs else "no run yet"
    except (OSError, ValueError) as problem:
        runs, error = [], printable(problem)
    return {"folder": str(folder), "runs": runs, "error": error}


def _run(folder, run, progress):
    if progress is None:  # a row of runs.jsonl, without a folder
        progress = {"state": "finished" if run.summary else "failed", "steps": run.log[-1]["step"],
                    "loss": run.final[LOSS] if run.summary else None}
    layers = [layer["layer"] for layer in run.log[-1]["layers"]] if run.log else []
    return {"id": run.run_id, "state": progress["state"], "steps": progress["steps"],
            "loss": progress["loss"],
            "rows": [[row["step"], row.get("cross_entropy"), row[LOSS], row["seconds"]] for row in run.log],
            "loads": {layer: [_shares(row["layers"][place]["load"]) for row in run.log]
                      for place, layer in enumerate(layers)},
            "warnings": run.log[-1].get("warnings", []) if run.log else [],
            "routes": _routes(folder / "runs" / run.run_id)}


def _shares(load):
    """The load of each expert over the mean: 1 at balance."""
    return [round(share, 3) for share in (np.array(load) / max(np.mean(load), 1e-9)).tolist()]


def _routes(run):
    """The newest saved routes of the first window of each domain: the bytes, and first choices by layer; or None."""
    paths = saved_routings(run)
    if not paths:
        return None
    try:
        arrays, header = load_arrays(paths[-1], "routings")
    except CheckpointError:  # a file that is no routing
        return None
    shape = arrays["ids"].shape
    first = first_choices(arrays["chosen"], arrays["gates"])
    windows = [int(np.argmax(arrays["domain"] == d)) for d in range(len(header["names"]))]
    return {"step": header["step"], "names": header["names"],
            "text": ["".join(map(symbol, arrays["ids"][w].tolist())) for w in windows],
            "first": {layer: first[place].reshape(shape)[windows].tolist()
                      for place, layer in enumerate(header["model"]["moe_layers"])}}


def page() -> str:
    """The page; its script asks for the state every few seconds."""
    template = Path(__file__).with_name("watch.html").read_text(encoding="utf-8")
    return template.replace("__COLOURS__", json.dumps(EXPERTS)).replace("__INKS__", json.dumps(INKS))


def serve(folder, port: int = 0) -> ThreadingHTTPServer:
    """A server of this folder on 127.0.0.1; port 0 takes a free one. Call its serve_forever(). Raises OSError."""
    return _Server(("127.0.0.1", port), partial(_Handler, Path(folder)))


class _Server(ThreadingHTTPServer):
    def handle_error(self, request, address):
        """Nothing: a page that is closed or loaded again ends its connection."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, address)


class _Handler(BaseHTTPRequestHandler):
    """GET / is the page, GET /state its JSON, GET /routes/RUN the page of `view`. There is nothing else."""

    def __init__(self, folder, *connection):
        self.folder = folder
        super().__init__(*connection)

    def do_GET(self):
        host = self.headers.get("Host", "").rsplit(":", 1)[0]
        if host not in ("127.0.0.1", "localhost"):  # a page of another site that points its name here
            return self.send_error(403)
        if self.path == "/":
            self._send(page(), "text/html")
        elif self.path == "/state":
            self._send(json.dumps(state(self.folder)), "application/json")
        elif self.path.startswith("/routes/"):
            self._send_routes(unquote(self.path.removeprefix("/routes/")))
        else:
            self.send_error(404)

    def _send_routes(self, name):
        runs = self.folder / "runs"  # compared by name: a name may be too long for the file system
        run = next((place for place in runs.glob("*") if place.name == name and place.is_dir()), None)
        if run is None or name.startswith("."):
            return self.send_error(404)
        try:
            self._send(view.page(run), "text/html")
        except (CheckpointError, CorpusError, OSError) as error:
            self._send(printable(error), "text/plain", 404)

    def _send(self, text, kind, code=200):
        body = text.encode("utf-8", "replace")
        self.send_response(code)
        for name, value in (("Content-Type", f"{kind}; charset=utf-8"), ("Content-Length", str(len(body))),
                            ("Cache-Control", "no-store"),  # the page and the rows change all the time
                            ("X-Content-Type-Options", "nosniff")):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        """Nothing: the terminal stays quiet."""
