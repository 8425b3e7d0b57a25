"""The page that follows runs: over HTTP, and in a browser while rows appear."""

import contextlib
import html
import json
import re
import shutil
import subprocess
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest

from test_cli import invoke
from test_train import WORDS, tiny
from test_view import BROWSER, CATCH
from tinymoe import files
from tinymoe.tools import watch
from tinymoe.training import trainer as train
from tinymoe.training.data import load_corpus

OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # http_proxy does not count


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A folder with a finished run."""
    out = tmp_path_factory.mktemp("study")
    (out / "words.txt").write_text(WORDS)
    train.train(tiny("D"), load_corpus(out / "words.txt", 16), out / "runs/D-seed0")
    return out


def begin(done, out, rows=2):
    """The same run, as it was after its first rows."""
    shutil.copytree(done / "runs", out / "runs")
    run = out / "runs/D-seed0"
    (run / "summary.json").unlink()
    files.write_rows(run / "log.jsonl", files.read_rows(run / "log.jsonl")[:rows])
    for path in sorted((run / "routings").iterdir())[rows:]:
        path.unlink()


def finish(done, out):
    shutil.copytree(done / "runs", out / "runs", dirs_exist_ok=True)


@contextlib.contextmanager
def serving(out):
    """The address of a server of this folder."""
    with watch.serve(out) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


def get(address, **headers):
    """(status, text)"""
    try:
        with OPENER.open(urllib.request.Request(address, headers=headers)) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_the_state_follows_the_rows(done, tmp_path):
    begin(done, tmp_path)
    with serving(tmp_path) as address:
        run, = json.loads(get(address + "state")[1])["runs"]
        log, names = files.read_rows(done / "runs/D-seed0/log.jsonl"), "step cross_entropy causal_cross_entropy seconds"
        assert (run["id"], run["state"], run["steps"], run["routes"]["step"]) == ("D-seed0", "waiting", 6, 2)
        assert run["warnings"] == log[1]["warnings"]
        assert run["rows"] == [[row[name] for name in names.split()] for row in log[:2]]
        load = np.array(log[1]["layers"][0]["load"])
        layer = str(log[1]["layers"][0]["layer"])
        np.testing.assert_allclose(run["loads"][layer][1], load / load.mean(), atol=6e-4)
        finish(done, tmp_path)
        run, = json.loads(get(address + "state")[1])["runs"]
        assert run["state"] == "finished" and len(run["rows"]) == len(log) and run["routes"]["step"] == 6
        final = files.read_json(done / "runs/D-seed0/summary.json")["final"]
        assert run["loss"] == final["causal_cross_entropy"]
        saved, _ = files.load_arrays(done / "runs/D-seed0/routings/000006.npz", "routings")
        first = np.ravel(run["routes"]["first"][layer])
        gates = saved["gates"][0][:len(first)]
        assert (gates[np.arange(len(first)), first] == gates.max(axis=1)).all()
        assert get(address + "routes/D-seed0")[1].count("</script>") == 2


def test_it_only_reads_and_serves_nothing_else(done, tmp_path):
    finish(done, tmp_path)
    (tmp_path / "secret").write_text("secret")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with serving(tmp_path) as address:
        assert get(address)[0] == get(address + "state")[0] == 200
        for path in ("secret", "runs", "../secret", "routes/", "routes/..", "routes/%2e%2e", "routes/..%2f..%2fsecret",
                     "routes/D-seed0%2f..", "routes/nope", "routes/%00"):
            assert get(address + path)[0] == 404, path
        assert get(address + "state", Host="evil.example")[0] == 403
        with pytest.raises(urllib.error.HTTPError, match="501"):
            OPENER.open(urllib.request.Request(address, data=b"x", method="POST"))
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


@pytest.mark.parametrize("spoil, said", [
    (lambda run: (run / "summary.json").write_text("{"), "damaged"),
    (lambda run: shutil.rmtree(run), "no run yet")])
def test_what_cannot_be_read_is_said_on_the_page(done, tmp_path, spoil, said):
    finish(done, tmp_path)
    spoil(tmp_path / "runs/D-seed0")
    assert said in watch.state(tmp_path)["error"]


def test_rows_of_another_version_are_said_on_the_page(done, tmp_path):
    begin(done, tmp_path)
    files.write_rows(tmp_path / "runs/D-seed0/log.jsonl", [{"step": 0}])
    shutil.copytree(done / "runs/D-seed0", tmp_path / "runs/E-seed0")
    for name in ("config", "summary"):
        path = tmp_path / f"runs/E-seed0/{name}.json"
        path.write_text(path.read_text().replace("D-seed0", "E-seed0"))
    state = watch.state(tmp_path)
    assert state["error"] == "D-seed0: rows of another version" and [run["id"] for run in state["runs"]] == ["E-seed0"]


def test_a_run_without_rows_or_routes_is_shown_too(done, tmp_path):
    begin(done, tmp_path, rows=0)
    run, = watch.state(tmp_path)["runs"]
    assert run["rows"] == [] and run["routes"] is None and run["loads"] == {}


def test_the_command_refuses_a_folder_that_is_not_there_and_a_port_in_use(tmp_path):
    assert invoke("watch", tmp_path / "nowhere")[0] == 2
    with watch.serve(tmp_path) as server:
        code, output = invoke("watch", tmp_path, "--port", server.server_port)
    assert code == 1 and "Address already in use" in output


DRIVE = """<script>
const seenStates = [], real = draw;
const facts = () => ({rows: [...document.querySelectorAll("#runs tr")].map(r => r.textContent), curve: document.querySelector("#curves polyline").getAttribute("points").split(" ").filter(Boolean).length,
  rects: document.querySelectorAll("#loads rect").length, maps: document.querySelectorAll("#loads svg").length, bytes: document.querySelectorAll(".bytes i").length, routes: $("routetitle").textContent});
const said = [], fail = async answer => { fetch = answer; await follow().catch(() => {}); said.push($("about").textContent); };
draw = async () => { real(); seenStates.push(facts()); if (seenStates.length === 1) $("run D-seed0").focus(); if (seenStates.length === 2) {
  const focused = document.activeElement.id, names = [...document.querySelectorAll("#curves text")].map(t => t.getBBox());
  const inside = names.every(box => box.x >= 0 && box.x + box.width <= 900 && box.y >= 0 && box.y + box.height <= 300);
  await fail(async () => { throw Error(); }); await fail(async () => ({ok: false, status: 500}));
  $("about").textContent = "as before"; await fail(async () => ({ok: true, text: async () => "{"}));
  const wide = [...document.querySelectorAll("body *")].filter(c => c.getBoundingClientRect().right > innerWidth + 0.5 && !c.closest("svg, table")).length;
  document.body.append(make("pre", "", JSON.stringify({errors, seenStates, focused, inside, said, wide, resources: performance.getEntriesByType("resource").map(r => new URL(r.name).host)}), {id: "result"})); } };
</script>"""  # noqa: E501


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the PATH")
def test_in_a_browser_the_page_shows_rows_as_they_appear(done, tmp_path, monkeypatch):
    begin(done, tmp_path / "out")
    log = tmp_path / "out/runs/D-seed0/log.jsonl"
    files.write_rows(log, [row | {"warnings": ["layer 1 has collapsed", "again"]} for row in files.read_rows(log)])
    page, state = watch.page(), watch.state

    def grow(folder):
        found = state(folder)
        finish(done, folder)  # what the next request sees
        return found

    monkeypatch.setattr(watch, "state", grow)
    monkeypatch.setattr(watch, "page", lambda: page.replace("<style>", CATCH + "<style>", 1).replace(
        "follow();\n</script>", "</script>" + DRIVE + "<script>follow();</script>"))
    quiet = "disable-gpu disable-quic no-first-run disable-background-networking disable-component-update disable-sync"
    with serving(tmp_path / "out") as address:
        dom = subprocess.run([BROWSER, "--headless", "--no-sandbox", *(f"--{name}" for name in quiet.split()),
                              f"--user-data-dir={tmp_path / 'profile'}", "--window-size=500,900",
                              "--virtual-time-budget=8000", "--dump-dom", address], capture_output=True, timeout=120)
    got = json.loads(html.unescape(re.search(r'<pre [^>]*id="result">(.*?)</pre>', dom.stdout.decode(), re.S)[1]))
    first, second = got["seenStates"]
    assert got["errors"] == [] and got["wide"] == 0 and set(got["resources"]) == {address[7:-1]}
    assert got["focused"] == "run D-seed0" and got["inside"]
    ended, failed, other = got["said"]
    assert "does not answer" in ended and "an error (500)" in failed and other == "as before"
    assert "waiting; layer 1 has collapsed; again2 of 6" in first["rows"][0] and "finished6 of 6" in second["rows"][0]
    assert first["curve"] == 2 and second["curve"] == 4 and first["maps"] == second["maps"] == 1
    assert first["rects"] == 2 * 4 and second["rects"] == 4 * 4
    assert first["bytes"] == second["bytes"] == 16 and "step 6" in second["routes"]


def test_a_name_that_is_too_long_and_a_page_that_is_closed_are_no_errors(done, tmp_path, capsys):
    begin(done, tmp_path / "out")
    with serving(tmp_path / "out") as address, pytest.raises(urllib.error.HTTPError, match="404"):
        OPENER.open(f"{address}/routes/{'a' * 300}")
    server = watch.serve(tmp_path / "out")
    try:
        for error in (BrokenPipeError(), ConnectionResetError()):
            try:
                raise error
            except OSError:
                server.handle_error(None, None)
    finally:
        server.server_close()
    assert capsys.readouterr().err == ""
