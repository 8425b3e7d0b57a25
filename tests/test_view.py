"""Looking inside: the terminal's lines by hand, the page's data, and the page itself in a browser."""

import base64
import html
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import naive
from test_train import WORDS, tiny
from tinymoe import Tensor, Transformer, files
from tinymoe.files import CheckpointError, load_arrays, save_arrays
from tinymoe.moe.routing import from_mask
from tinymoe.study.palette import EXPERTS
from tinymoe.tools import view
from tinymoe.training import loading
from tinymoe.training import trainer as train
from tinymoe.training.data import SYNTHETIC, CorpusError, load_corpus
from tinymoe.training.loading import load_model
from tinymoe.training.run_folder import saved_routings

ROOT = Path(__file__).resolve().parent.parent
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "words.txt").write_text(WORDS)
    (folder / "odd.txt").write_bytes(b"</script><b>&amp;\xff\x00\t" * 40)
    return load_corpus(folder, seq_len=16)


@pytest.fixture(scope="module", params=["D", "capacity", "E", "depths"])
def run(request, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    # in the last three some go without, and in the last one gates may be negative
    more = {"D": {}, "capacity": {"capacity_factor": 0.5}, "E": {"top_k": 1},
            "depths": {"router": "mixture_of_depths"}}[request.param]
    train.train(tiny("E" if request.param == "E" else "D", model={"moe_layers": [0, 1]} | more), corpus, folder)
    return folder


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def array(text, *shape):
    return np.frombuffer(base64.b64decode(text), np.uint8).reshape(shape or -1)


# -- the terminal --


def by_hand(gates, probs=None):
    gates = np.array(gates, float)
    probs = Tensor(gates if probs is None else np.array(probs, float))
    return from_mask(gates > 0, Tensor(gates), probs, probs)


def test_lines_by_hand():
    routing = by_hand([[.25, .75], [1, 0], [0, 0], [.5, .5]], [[.25, .75], [1, 0], [.5, .5], [.5, .5]])
    assert list(view.lines(b"a\n\xff ", routing, False, 80, gate=True, entropy=True)) == [
        "text    a↵· ", "expert  10-0", "gate    ▇█ ▅", "entropy ▇▁██", ""]  # -(.25 ln .25 + .75 ln .75) / ln 2 = 0.81


def test_a_histogram_by_hand():
    """Loads 3 and 1 of 4 assignments; the third byte has none, the first both."""
    assert list(view.load_lines(by_hand([[.5, .5], [1, 0], [0, 0], [1, 0]]))) == [
        f"expert 0  {40 * '█'}      3   75.0%", f"expert 1  {13 * '█'}{27 * ' '}      1   25.0%",
        "experts of a byte: 0 for 1 byte, 1 for 2 bytes, 2 for 1 byte", ""]


def test_long_lines_wrap_and_numbers_of_two_digits_are_read_downwards():
    routing = by_hand(np.eye(12)[[11, 3, 0, 7, 10, 1, 2, 5, 9]])
    assert list(view.lines(b"abcdefghi", routing, False, 16)) == [
        "text    abcdefgh", "expert  1   1   ", "        13070125", "", "text    i", "expert   ", "        9", ""]


def test_colour_adds_nothing_that_the_lines_below_do_not_say():
    routing = by_hand([[1, 0], [0, 1], [0, 0]])
    plain, coloured = (list(view.lines(b"abc", routing, colour, 80)) for colour in (False, True))
    assert [re.sub(r"\x1b\[[\d;]*m", "", line) for line in coloured] == plain
    assert coloured[0].count("\x1b[0m") == 2 and coloured[1:] == plain[1:]  # who has no expert has no colour


@pytest.mark.parametrize("byte, shown",
                         [(65, "A"), (32, " "), (10, "↵"), (9, "→"), (0, "¤"), (27, "¤"), (127, "¤"), (255, "·")])
def test_every_byte_has_one_visible_character(byte, shown):
    assert view.symbol(byte) == shown


def test_a_long_text_is_routed_by_windows_on_the_prefix_alone():
    model = Transformer(tiny("E").model)
    text = bytes(range(40))
    whole, = view.prefix_routings(model, text)
    parts = [view.prefix_routings(model, text[start:start + 16])[0] for start in (0, 16, 32)]
    assert (whole.mask() == np.concatenate([part.mask() for part in parts])).all() and whole.n_tokens == 40
    shorter, = view.prefix_routings(model, text[:9])
    assert (shorter.mask() == whole.mask()[:9]).all()


@pytest.mark.parametrize("name, there", [
    ("checkpoint.npz", True), ("log.jsonl", True), (".lock", True), ("routings/000006.npz", True),
    ("routings/new.html", True), ("runs.jsonl", True), (".lease1", True), ("view.html", False), ("notes.txt", False)])
def test_a_page_never_replaces_a_file_of_a_run(name, there, tmp_path):
    assert view.belongs_to_a_run(tmp_path / name) == there
    (tmp_path / "link").symlink_to(tmp_path / name)
    assert view.belongs_to_a_run(tmp_path / "link") == there


def test_the_terminal_needs_no_matplotlib():
    code = "import sys; from tinymoe.tools import view; print(any('matplotlib' in name for name in sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown == "False\n"


@pytest.mark.parametrize("model, said", [
    ({}, ""), ({"router": "expert_choice"}, "later bytes too, so"),
    ({"router": "sinkhorn"}, "sinkhorn looks at later bytes too while training"),
    ({"capacity_factor": 1.0}, "capacity limit")])
def test_a_note_says_where_the_route_is_not_causal(model, said):
    assert (said in view.note(tiny("D", model=model).model)) and (said or not view.note(tiny("D").model))


# -- the page's data --


def test_the_page_holds_what_the_run_saved(run):
    data = data_of(view.page(run))
    assert data["steps"] == [0, 2, 4, 6] and data["layers"] == [0, 1] and data["saturation"][-1] == [1, 1]
    final, _ = files.load_arrays(run / "routings" / "000006.npz", "routings")
    assert data["perByte"] == final["chosen"].sum() / (2 * len(data["domain"]) * 16)  # counted, whatever top_k says
    for step, probs, gates in zip(data["steps"], data["probs"], data["gates"]):
        saved, _ = files.load_arrays(run / "routings" / f"{step:06}.npz", "routings")
        shape = saved["probs"].shape
        assert (array(data["text"], *saved["ids"].shape) == saved["ids"]).all()
        assert ((array(gates, *shape) > 0) == saved["chosen"]).all()
        np.testing.assert_allclose(array(probs, *shape) / 255, saved["probs"], atol=.003)
        shown = np.where(saved["chosen"], (array(gates, *shape) - 1.0) / 254 * data["gateScale"] + data["gateLow"], 0)
        np.testing.assert_allclose(shown, saved["gates"], atol=.003 * data["gateScale"])


def test_saturation_is_the_share_of_the_final_assignments_that_were_there_before(corpus, tmp_path):
    """A byte may have more experts at the end than before, so it is not the share of those before."""
    train.train(tiny("D", model={"moe_layers": [0, 1], "router": "top_p"}, learning_rate=0.05), corpus, tmp_path)
    first, final = (load_arrays(tmp_path / f"routings/{step}.npz", "routings")[0]["chosen"]
                    for step in ("000000", "000006"))
    assert first.sum() != final.sum()
    assert data_of(view.page(tmp_path))["saturation"][0] == [
        (before & after).sum() / after.sum() for before, after in zip(first, final)]


@pytest.mark.parametrize("router, factor, marked", [
    ("top_k", 0.5, True), ("top_k", None, False), ("expert_choice", 0.5, False), ("top_p", 0.5, False),
    ("remoe", 0.5, False)])
def test_a_byte_has_lost_a_choice_only_where_its_router_always_chooses_k(router, factor, marked):
    config = tiny("D", model={"router": router, "capacity_factor": factor}).model
    full = np.ones((len(config.moe_layers), 4, config.n_experts), np.float16)
    arrays = {"ids": np.zeros((1, 4), np.uint8), "domain": np.zeros(1, int), "probs": full, "gates": full,
              "chosen": full > 0}
    header = {"run_id": "x", "model": config.to_dict(), "step": 0, "names": ["text"]}
    assert view._data([(arrays, header)])["limited"] == marked


def test_nothing_in_a_text_can_leave_the_script(corpus, tmp_path):
    odd = tmp_path / "odd.txt"
    odd.write_bytes(b"</script><script>alert(1)</script>&\xff")
    train.train(tiny("D"), corpus, tmp_path / "<!--<script><b>run")
    for page in (view.page(tmp_path / "<!--<script><b>run"), view.page(tmp_path / "<!--<script><b>run", odd)):
        assert page.count("</script>") == 2 and "__DATA__" not in page
        assert not re.search(r"""(src|href)\s*=\s*(?!"data:)|https?:|//\w+\.|@import|url\(""", page)
    data = data_of(page)
    assert base64.b64decode(data["text"]) == odd.read_bytes()[:32] and data["run"] == "<!--<script><b>run"
    assert data["steps"] == [None] and data["names"] == ["text"]
    odd.write_bytes(b"short")
    assert base64.b64decode(data_of(view.page(tmp_path / "<!--<script><b>run", odd))["text"]) == b"short"


def test_too_many_steps_are_thinned_and_the_last_stays(run, monkeypatch):
    size = files.load_arrays(run / "routings" / "000000.npz", "routings")[0]["probs"].size
    monkeypatch.setattr(view, "MAX_VALUES", 2 * size)
    assert data_of(view.page(run))["steps"] == [2, 6]


def test_an_old_run_shows_its_checkpoint(run, tmp_path, corpus, monkeypatch):
    shutil.copytree(run, tmp_path / "old", ignore=shutil.ignore_patterns("routings"))
    monkeypatch.setattr(loading, "load_corpus", lambda text, length: corpus)
    old, new = data_of(view.page(tmp_path / "old")), data_of(view.page(run))
    assert old["steps"] == [None] and old["text"] == new["text"] and old["names"] == new["names"]
    if old["router"] == "top_k" and not old["limited"]:  # the others' routes depend on the batch
        assert np.abs(array(old["probs"][0]).astype(int) - array(new["probs"][-1])).max() <= 1


def test_a_run_without_routings_is_shown_on_the_text_it_was_trained_on(tmp_path, corpus):
    own = load_corpus(SYNTHETIC, 16)
    for name, text in (("own", own), ("other", corpus)):
        train.train(tiny("A", model={"vocab_size": 256}), text, tmp_path / name)
        shutil.rmtree(tmp_path / name / "routings")
    assert data_of(view.page(tmp_path / "own"))["names"] == own.names
    with pytest.raises(CorpusError, match="a text that is not here: give --text"):
        view.page(tmp_path / "other")


def test_a_router_that_is_told_the_domain_has_a_page(tmp_path, corpus):
    train.train(tiny("D", steps=1, model={"router": "oracle", "top_k": 1}), corpus, tmp_path)
    assert data_of(view.page(tmp_path))["router"] == "oracle"


def test_routings_of_two_runs_make_no_page(tmp_path, corpus):
    train.train(tiny("D"), corpus, tmp_path)
    train.train(tiny("D", model={"moe_layers": [0, 1]}), corpus, tmp_path / "other")
    shutil.copy(tmp_path / "other/routings/000006.npz", tmp_path / "routings/000007.npz")
    arrays, header = load_arrays(tmp_path / "routings/000006.npz", "routings")
    save_arrays(tmp_path / "routings/000006.npz", {k: a for k, a in arrays.items() if k != "gates"}, header)
    with pytest.raises(CheckpointError, match="of another version or of several runs"):
        view.page(tmp_path)


@pytest.mark.parametrize("name, array", [
    ("probs", np.zeros((2, 32, 3))), ("probs", np.zeros(4)), ("gates", np.array("text")), ("ids", np.zeros(3)),
    ("chosen", np.zeros((1, 1, 1), bool)), ("gates", np.full((2, 64, 4), np.nan)), ("domain", np.array(1j))])
def test_arrays_that_do_not_fit_the_model_make_no_page(name, array, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run/routings/000006.npz"
    arrays, header = load_arrays(path, "routings")
    save_arrays(path, arrays | {name: array}, header)
    with pytest.raises(CheckpointError, match="of another version or of several runs"):
        view.page(tmp_path / "run")


def test_what_cannot_be_shown(run, tmp_path, corpus):
    (tmp_path / "empty").touch()
    with pytest.raises(CorpusError, match="is empty"):
        view.page(run, tmp_path / "empty")
    with pytest.raises(OSError, match="nowhere"):
        view.page(run, tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="does not exist"):
        view.page(tmp_path / "nowhere")
    train.train(tiny("A", model={"moe_layers": []}), corpus, tmp_path / "dense")
    with pytest.raises(CorpusError, match="routes nothing"):
        view.page(tmp_path / "dense", tmp_path / "dense" / "config.json")


# -- the page in a browser --

DRIVE = """<script>
const out = [], say = (name, value) => out.push([name, value]);
const key = name => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key: name, bubbles: true, cancelable: true}));
const slide = value => { $("step").value = value; $("step").dispatchEvent(new Event("input")); };
const panel = () => $("detail").textContent, count = what => document.querySelectorAll("#windows " + what).length;
try {
  say("cells", count(".cell"));
  say("none", count(".none")); say("lost", count(".lost"));
  say("patterns", [...document.querySelectorAll("#windows .none, #windows .lost")].every(c => getComputedStyle(c).backgroundImage.includes("gradient")));
  say("labels", [...document.querySelectorAll("#windows .cell")].every(c => c.getAttribute("aria-label").includes("expert")));
  cells[1][3].focus(); say("focused", panel()); say("bars", document.querySelectorAll("#detail .prob").length);
  say("same", count(".same"));
  say("ring", cells[1][3].matches(":focus") && getComputedStyle(cells[1][3]).outlineStyle);
  key("ArrowRight"); say("right", document.activeElement.n); key("ArrowLeft"); key("ArrowLeft"); say("left", document.activeElement.n);
  key("End"); say("end", document.activeElement.n); key("ArrowRight"); say("stays", document.activeElement.n);
  key("Home"); say("home", document.activeElement.n); key("ArrowDown"); say("down", document.activeElement.n);
  say("tab stops", count('.cell[tabindex="0"]')); say("blocks", count(".grid"));
  cells[0][5].dispatchEvent(new MouseEvent("mouseover", {bubbles: true})); say("hovered", panel());
  document.body.dispatchEvent(new KeyboardEvent("keydown", {key: "Escape", bubbles: true})); say("escaped", [$("detail").hidden, count(".same"), here]);
  show(cells[0][5]); const shown = $("detail").hidden; $("detail").querySelector(".close").click(); say("shut", [shown, $("detail").hidden]);
  say("experts", data.steps.map((_, i) => { slide(i); return cells[0].map(c => c.dataset.expert).join(" "); }));
  slide(0); say("first step", $("at").textContent); say("saturation", [...document.querySelectorAll(".saturation")].map(c => c.textContent));
  slide(data.steps.length - 1); say("last", $("at").textContent);
  const domains = $("domains").children, experts = $("experts").children;
  domains[1].click(); say("one domain", windows.map(w => !w.hidden)); say("pressed", domains[1].getAttribute("aria-pressed"));
  domains[0].click(); say("all domains", windows.map(w => !w.hidden));
  experts[2].click(); say("dim", cells.map(row => row.map(c => c.classList.contains("dim")))); experts[0].click(); say("bright", count(".dim"));
  say("numbers", getComputedStyle(cells[0][0], "::after").content);
  $("numbers").click(); say("no numbers", getComputedStyle(cells[0][0], "::after").content); $("numbers").click();
  say("sums", cells.flat().map(c => { show(c); const t = $("detail").querySelector(".gates"); return t ? t.textContent : ""; }));
  show(cells[1][3]); say("logits", [...document.querySelectorAll("#detail .logit")].map(c => c.textContent)); say("sum", panel());
  slide(0); show(cells[1][3]); say("no logits", [...document.querySelectorAll("#detail .logit")].map(c => c.textContent).join("")); slide(data.steps.length - 1);
  const second = [...$("choice").querySelectorAll("button")][1];
  if (second) { second.click(); say("second", cells[1].map(c => c.dataset.expert)); $("choice").querySelector("button").click(); }
  say("wide", [...document.querySelectorAll("body *")].filter(c => c.getBoundingClientRect().right > innerWidth + 0.5).map(c => c.outerHTML.slice(0, 80)));
  say("width", innerWidth); say("text", getComputedStyle(cells[0][0]).color);
  const colours = () => [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color];
  say("light", colours()); $("dark").click(); say("dark", colours());
  say("resources", performance.getEntriesByType("resource").length);
  say("reachable", [...document.querySelectorAll("button, input")].every(c => c.tabIndex === 0 && (c.textContent || c.labels.length)));
} catch (error) { errors.push(String(error)); }
document.body.append(make("pre", "", JSON.stringify({errors, ...Object.fromEntries(out)}), {id: "result"}));
</script>"""  # noqa: E501
CATCH = """<script>const errors = []; window.onerror = message => { errors.push(message); };
console.error = console.warn = message => errors.push(message);</script>"""


@pytest.fixture
def shown(run, tmp_path):
    """What a browser answers after the page's controls have been used, and the page's data."""
    if BROWSER is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on the PATH")
    page = view.page(run)
    page_with_script = page.replace("<style>", CATCH + "<style>").replace("</html>", DRIVE + "</html>")
    (tmp_path / "page.html").write_text(page_with_script, encoding="utf-8")
    quiet = "disable-gpu disable-quic no-first-run disable-background-networking disable-component-update disable-sync"
    dom = subprocess.run([BROWSER, "--headless", "--no-sandbox", *(f"--{name}" for name in quiet.split()),
                          f"--user-data-dir={tmp_path / 'profile'}", "--window-size=500,900",
                          "--virtual-time-budget=5000", "--dump-dom",
                          (tmp_path / "page.html").as_uri()], capture_output=True, timeout=120).stdout.decode()
    return json.loads(html.unescape(re.search(r'<pre [^>]*id="result">(.*?)</pre>', dom, re.S)[1])), data_of(page)


@pytest.mark.slow
def test_the_page_in_a_browser(shown, run):
    got, data = shown
    assert got["errors"] == [] and got["resources"] == 0 and got["reachable"]
    n = len(data["domain"]) * 16
    saved = [files.load_arrays(path, "routings")[0] for path in sorted((run / "routings").iterdir())]
    chosen, final = saved[-1]["chosen"], saved[-1]
    assert got["cells"] == 2 * n and got["bars"] == 4 and got["same"] == 2 and got["labels"] and got["patterns"]
    # marks
    coverage = chosen.sum(axis=2)
    limited = data["limited"]
    assert got["none"] == (coverage == 0).sum() and got["lost"] == (limited and ((coverage > 0) & (coverage < 2)).sum())
    assert (got["none"] + got["lost"] > 0) == (data["router"] != "top_k" or limited)
    # what pointing at a byte tells
    p = final["probs"][1, 3].astype(float)
    assert f"byte 3 of {data['names'][data['domain'][0]]}, layer 1" in got["focused"] and "layer 0" in got["hovered"]
    assert all(f"{value:.2f}" in got["focused"] for value in np.rint(p * 255) / 255)
    assert ("second choice" in got["focused"]) == (coverage[1, 3] > 1) and got["ring"] == "solid"
    # arrow keys
    assert [got[name] for name in ("right", "left", "end", "stays", "home", "down")] == [4, 2, 15, 15, 0, 0]
    assert got["tab stops"] == got["blocks"] == 2 * len(data["domain"])
    assert got["escaped"] == [True, 0, None] and got["shut"] == [False, True]
    # the slider
    gates = np.stack([np.where(arrays["chosen"][0], arrays["gates"][0], -np.inf) for arrays in saved])
    has = np.stack([arrays["chosen"][0].any(axis=1) for arrays in saved])
    for first, largest, covered in zip(got["experts"], gates, has):
        for token, expert in enumerate(first.split(" ")):
            assert expert == "–" if not covered[token] else largest[token, int(expert)] >= largest[token].max() - .005
    assert got["first step"] == "0 of 6" and got["last"] == "6 of 6"
    assert got["saturation"] == [f"{value:.2f}" for value in data["saturation"][0]]
    # filters
    assert got["one domain"] == [d == 0 for d in data["domain"]] and all(got["all domains"])
    assert got["pressed"] == "true"
    assert got["dim"] == (~chosen[:, :, 1]).tolist() and got["bright"] == 0
    assert len(got["numbers"]) > 2 and got["no numbers"] == "none"
    # gates that sum as shown; second choices
    for line in filter(None, got["sums"]):
        parts, whole = line.removeprefix("gates: ").split(" = ")
        assert round(sum(map(float, parts.split(" + "))), 2) == float(whole)
        assert float(whole) == 1 or data["router"] != "top_k" or limited
    if "second" in got:
        for shown_expert, gate, taken in zip(got["second"], saved[-1]["gates"][1], chosen[1]):
            assert shown_expert == "–" if taken.sum() < 2 else gate[int(shown_expert)] <= gate[taken].max()
    # narrow and dark
    assert got["width"] == 500 and got["wide"] == []
    (bright, ink), (ground, pale) = got["light"], got["dark"]
    assert lightness(bright) > 200 > 60 > lightness(ink) and lightness(ground) < 60 < 200 < lightness(pale)


def lightness(rgb):
    return np.mean([int(part) for part in re.findall(r"\d+", rgb)[:3]])


@pytest.mark.slow
def test_the_byte_in_focus_shows_logits_and_the_weighted_sum_of_the_last_step(shown, run):
    """Computed again from the checkpoint, by loops."""
    got, data = shown
    caught, model = [], load_model(run)
    part = model.moe_parts()[1]
    part.change_routing = lambda routing, x: caught.append((routing, x.data)) or routing
    model.forward(files.load_arrays(run / "routings/000006.npz", "routings")[0]["ids"].astype(int))
    (routing, x), bank = caught[0], part.experts
    np.testing.assert_allclose(list(map(float, got["logits"])), routing.logits.data[3], atol=0.0051)
    assert got["no logits"] == ""
    total, gates = np.zeros(x.shape[1]), routing.to_dense().data[3]
    for e in np.flatnonzero(routing.mask()[3]):
        w1, b1, w2, b2 = (w.data[e] for w in (bank.w1, bank.b1, bank.w2, bank.b2))
        hidden = np.array([naive.activation(z, "gelu") for z in x[3] @ w1 + b1])
        total += gates[e] * (hidden @ w2 + b2)
        assert f"{np.linalg.norm(hidden @ w2 + b2):.2f}" in got["sum"] and f"FFN{e}(x)" in got["sum"]
    assert f"size of y: {np.linalg.norm(total):.2f}" in got["sum"] or not gates.any()


def test_the_output_of_a_copy_expert_is_its_input_and_that_of_a_zero_expert_nothing():
    """4 experts, one copy, one zero. The sum is that of gates times outputs, expert by expert."""
    part = tiny("D", model={"n_copy": 1, "n_zero": 1, "moe_layers": [0]}).model
    part = Transformer(part, seed=1, dtype=np.float64).moe_parts()[0]
    n, rng = part.experts.n_experts, np.random.default_rng(0)
    x, gates = Tensor(rng.standard_normal((3, part.experts.w1.shape[1]))), np.zeros((3, n + 2))
    gates[0, [1, n]], gates[1, n], gates[2, n + 1] = (0.25, 0.5), 2, 1
    sizes, total = view._outputs(part, x, by_hand(gates))
    output = np.linalg.norm(part.experts.each(x).data, axis=2)  # (E, N)
    np.testing.assert_allclose(sizes[0, [1, n]], [output[1, 0], np.linalg.norm(x.data[0])])
    assert np.count_nonzero(sizes) == 3 and total[2] == 0 and total[1] == pytest.approx(2 * sizes[1, n])
    both = 0.25 * part.experts.each(x).data[1, 0] + 0.5 * x.data[0]
    assert total[0] == pytest.approx(np.linalg.norm(both))


def test_without_a_checkpoint_and_for_a_large_page_the_outputs_are_left_out(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint.npz"))
    assert "logits" in data_of(view.page(run)) and "logits" not in data_of(view.page(tmp_path / "run"))
    monkeypatch.setattr(view, "MAX_VALUES", 9)
    assert "logits" not in data_of(view.page(run))


# -- colours, as people with each kind of colour blindness see them --

SEEN = {"all cones": np.eye(3),  # Machado et al. 2009, severity 1, on linear RGB
        "protanopia": [[.152286, 1.052583, -.204868], [.114503, .786281, .099216], [-.003882, -.048116, 1.051998]],
        "deuteranopia": [[.367322, .860646, -.227968], [.280085, .672501, .047413], [-.011820, .042940, .968881]],
        "tritanopia": [[1.255528, -.076749, -.178779], [-.078411, .930809, .147602], [.004733, .691367, .303900]]}


def lab(linear):
    """CIE Lab of linear RGB, white D65."""
    xyz = np.array([[.4124564, .3575761, .1804375], [.2126729, .7151522, .0721750], [.0193339, .1191920, .9503041]])
    x, y, z = (np.cbrt(t) if t > 216 / 24389 else (24389 / 27 * t + 16) / 116
               for t in xyz @ np.clip(linear, 0, 1) / [.95047, 1, 1.08883])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("eyes", SEEN)
def test_no_two_experts_of_eight_have_colours_that_look_alike(eyes):
    """The distance in CIE Lab; 2.3 can just be seen. Okabe and Ito's eight have 16, and 6 as light tints."""
    rgb = np.array([[int(colour[i:i + 2], 16) for i in (1, 3, 5)] for colour in EXPERTS]) / 255
    linear = np.where(rgb <= .04045, rgb / 12.92, ((rgb + .055) / 1.055) ** 2.4)
    seen = [lab(np.array(SEEN[eyes]) @ colour) for colour in linear]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 20


def test_saved_routings_are_in_the_order_of_their_steps(tmp_path):
    (tmp_path / "routings").mkdir()
    for name in ("999000.npz", "1000000.npz", "000200.npz", "12.npz", "notes.npz"):
        (tmp_path / "routings" / name).touch()
    assert [path.stem for path in saved_routings(tmp_path)] == ["000200", "999000", "1000000"]
