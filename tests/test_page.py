"""The page of results: it says what FINDINGS.md says, numbers lead to their runs, and it works in a browser."""

import base64
import dataclasses
import html
import json
import re
import subprocess

import pytest
from click.testing import CliRunner

import cli
from test_report import LOSSES, STUDY, change, write_run, write_study
from test_view import BROWSER, CATCH, lightness
from tinymoe import experiments
from tinymoe.experiments import EXPERIMENTS, LOSS, Results, Setting, over_steps
from tinymoe.study import page, report

AB = dataclasses.replace(EXPERIMENTS["fine-grained"], name="ab", primary=(), exploratory=(), rates=(), metrics=(LOSS,),
                         figures={"over_steps": over_steps("A", LOSS)}, settings=(Setting("A", "a"), Setting("B", "b")))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A study, and an experiment whose settings have names of the study's."""
    folder = tmp_path_factory.mktemp("published")
    write_study(folder / "full")
    for name in "AB":
        for seed in (0, 4):
            write_run(folder / "experiments/ab", name, seed, LOSSES[name][0])
    return folder


def write(folder, *typed):
    done = CliRunner().invoke(cli.main, ["report", str(folder), *typed])
    assert done.exit_code == 0 and done.output.strip() == str(folder / "report.html"), done.output
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def whole(published):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments, "EXPERIMENTS", {"ab": AB})
        return write(published)


def drawn_by_hand(experiment, folder):
    """Files with the marks of fresh figures, so that none is drawn."""
    (folder / "figures").mkdir()
    for name in experiment.figures:
        mark = report.mark(Results(experiment, folder), name)
        (folder / "figures" / f"{name}.png").write_bytes(f"Description\0{mark}".encode())


def write_sweep(folder, name, rate, seed, loss):
    """A run of the sweep of AB; loss None: a failed one."""
    write_run(folder / "made", name, seed, loss or 2.0)
    run = (folder / f"made/runs/{name}-seed{seed}").rename(folder / f"runs/{name}@{rate:g}-seed{seed}")
    change(run, None, config_id=f"{name}@{rate:g}", run_id=run.name)
    change(run, "training", learning_rate=rate)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"run_id": run.name}))
    if loss is None:
        (run / "summary.json").unlink()
        (run / "failure.json").write_text('{"reason": "the loss is not finite", "step": 3}')


def words(text, markup):
    """The words and numbers of a text without what matches its markup."""
    text = html.unescape(re.sub(markup, " ", text)).replace("\xa0", " ")
    return re.sub(r"[`*|#\[\]]", " ", text).split()


def main_of(text):
    return re.search(r"<main>(.*)</main>", text, re.S)[1]


def test_the_page_of_an_experiment_says_what_its_findings_say(tmp_path):
    drawn_by_hand(STUDY, write_study(tmp_path))
    text, said = write(tmp_path), report.write_findings(Results(STUDY, tmp_path)).read_text()
    assert base64.b64encode((tmp_path / "figures/over_steps.png").read_bytes()).decode() in text
    shown = re.sub(r'<details class="runs">.*</details>|</?span[^>]*>', "", main_of(text))
    assert words(shown, "<[^>]*>") == words(said, r"(?m)!\[.*?\]\(.*?\)|\]\([^)]*\)|<br>|---|^- ")


@pytest.mark.slow
def test_every_number_of_a_table_leads_to_its_runs(whole):
    """In the table of settings the row of A, in a table of differences a row of both; each of its own experiment."""
    study, ab = re.findall(r'<details class="experiment" id="([\w-]+)">', whole)
    assert (study, ab) == ("study", "ab")
    rows = re.findall(r"<tr title=\"([^\"]*)\">(.*?)</tr>", whole)
    (one,) = [title for title, row in rows if ">no load balancing<" in row]
    assert one == "runs of study: A-seed{0,1,2}"
    (two,) = [title for title, row in rows if "C-runs" in row or "+0.367" in row and ">different<" in row]
    assert two == "runs of study: A-seed{0,1,2}, B-seed{0,1,2}"
    assert [title for title, _ in rows if title.startswith("runs of ab: A")] == ["runs of ab: A-seed{0,4}"]
    targets = set(re.findall(r'href="#([^"]+)"', whole))
    assert targets <= set(re.findall(r'id="([^"]+)"', whole)) and {"ab-runs-A", "study-runs-A"} <= targets
    assert "<td>A-seed{0,4}</td><td>20</td><td>0.001</td><td>seed 0: 1.9000, seed 4: 1.9000</td>" in whole


@pytest.mark.slow
def test_the_page_needs_no_other_file(whole, published):
    assert whole.count('src="data:image/png;base64,') == len(list(published.rglob("*.png"))) > 5
    assert re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', whole) == []
    assert "# The experiments" not in whole and "<h1" in whole and "__" not in main_of(whole)


def test_text_of_rows_is_text_in_the_page(tmp_path):
    bad = 'a|b <img src=x> `c` **d** [e](f) "q" </script>&amp;'
    write_study(tmp_path, n_seeds=1, losses={"A": (2.0,), "B": (1.5,)})
    for name in "AB":
        change(tmp_path / f"runs/{name}-seed0", "model", router=bad)
        change(tmp_path / f"runs/{name}-seed0", "versions", **{bad: bad})
    (tmp_path / "runs" / bad.replace("/", "")).mkdir()
    text = main_of(write(tmp_path))
    assert "<img src=x" not in text and "</script" not in text and "<strong>d" not in text and 'href="f"' not in text
    assert bad in html.unescape(text)


def test_blocks_by_hand(tmp_path):
    results = Results(STUDY, write_study(tmp_path, n_seeds=1))
    assert page.blocks(["## A *b* < 1 & 2\n\n- one\n- `x`", "|  | **q** |\n| --- | --- |\n| 1 ± 2 |  |"], results) == (
        '<h2 id="a-b-1-2">A <em>b</em> &lt; 1 &amp; 2</h2>\n<ul><li>one</li><li><code>x</code></li></ul>\n'
        '<div class="table" tabindex="0"><table><thead><tr><th scope="col"></th>'  # its rows are quantities: no sorting
        '<th scope="col"><strong>q</strong></th></tr></thead>'
        '<tbody><tr><td><span class="whole">1 ± 2</span></td><td></td></tr></tbody></table></div>')
    assert page.inline("`A`, [x](experiments/dense/FINDINGS.md)", results) == (
        '<a href="#study-runs-A" title="A-seed0"><code>A</code></a>, <a href="#dense">x</a>')


def test_a_figure_stands_with_its_caption(tmp_path):
    (tmp_path / "x.png").write_bytes(b"a figure")
    results = Results(STUDY, write_study(tmp_path, n_seeds=1))
    text = page.blocks(['Loss (nats)\n\n![x](x.png)\n\n*Of `A`, "x" > 0.*\n\n*more*'], results)
    assert re.sub(' (src|title)="[^"]*"', "", text) == (
        '<p>Loss (nats)</p>\n<figure><img alt="Of A, &quot;x&quot; &gt; 0."><figcaption>Of '
        '<a href="#study-runs-A"><code>A</code></a>, "x" > 0.</figcaption></figure>\n<p><em>more</em></p>')


def test_figures_are_drawn_where_one_is_missing_or_of_other_runs(tmp_path, monkeypatch):
    two = dataclasses.replace(AB, figures={name: AB.figures["over_steps"] for name in ("one", "two")})
    drawn_by_hand(two, write_study(tmp_path, losses={name: LOSSES[name] for name in "AB"}))
    called = []
    monkeypatch.setattr(page.figures, "draw_all", called.append)
    page.write_page([Results(two, tmp_path)])
    assert called == []
    for spoil in (lambda path: path.write_bytes(b"Description\0rows 0123"), lambda path: path.unlink()):
        spoil(tmp_path / "figures/two.png")
        page.write_page([Results(two, tmp_path)])
        assert len(called) == 1
        called.clear()


def test_rates_lead_to_the_runs_of_the_sweep(tmp_path):
    """2.0 and 2.2 at 0.001, 1.8 and 1.8 at 0.002, and a run that failed at 0.004."""
    swept = dataclasses.replace(AB, rates=(1e-3, 2e-3, 4e-3))
    write_study(tmp_path, n_seeds=2, losses={name: LOSSES[name] for name in "AB"})
    for rate, seed, loss in ((1e-3, 100, 2.0), (1e-3, 101, 2.2), (2e-3, 100, 1.8), (2e-3, 101, 1.8), (4e-3, 100, None)):
        write_sweep(tmp_path, "A", rate, seed, loss)
    drawn_by_hand(swept, tmp_path)
    text = page.write_page([Results(swept, tmp_path)]).read_text()
    (title, row), = re.findall(r'<tr title="([^"]*)">(<td>.*?</td><td>2.100</td><td><strong>1.800</strong>)', text)
    assert title == "runs of ab: A@0.001-seed{100,101}, A@0.002-seed{100,101}, A@0.004-seed100"
    assert row.startswith('<td><a href="#ab-runs-A-0.001">A</a></td>')
    assert ('<tr id="ab-runs-A-0.001"><td><code>A@0.001</code></td><td>A@0.001-seed{100,101}</td><td>20</td>'
            "<td>0.001</td><td>seed 100: 2.0000, seed 101: 2.2000</td></tr>") in text
    assert "<td>0.004</td><td>seed 100: not finite</td>" in text
    assert '<tr title="runs of ab: A-seed{0,1}"><td><a href="#ab-runs-A">A</a></td>' in text


def test_an_experiment_that_has_the_name_of_a_setting_is_none(tmp_path):
    results = Results(AB, write_study(tmp_path, n_seeds=1))
    assert page.table_row(["A", "3"], ["experiment", "runs"], results, ()) == "<tr><td>A</td><td>3</td></tr>"
    assert page.table_row(["B", "as `A`"], ["setting", "what"], results, ()).startswith(
        '<tr title="runs of ab: A-seed0, B-seed0"><td><a href="#ab-runs-B">B</a></td>')


@pytest.mark.slow
def test_in_the_page_of_all_each_thing_stands_once(whole):
    ids = re.findall(r'(?<=[ ])id="([^"]*)"', whole)
    assert len(ids) == len(set(ids)) and "study-primary-comparisons" in ids
    assert whole.count("Corrected p: p value") == whole.count("A claim <em>held</em>") == 1
    assert whole.count("These comparisons were not planned") == 1
    assert whole.count('explained <a href="#words-used-here">here</a>') == 2 and ">below</a>" not in whole
    assert '<p>The experiments: <a href="#study">study</a>, <a href="#ab">ab</a>.</p>' in whole
    levels = [int(level) for level in re.findall(r"<h(\d)", main_of(whole))]
    assert levels[levels.index(3):].count(3) == 2 and set(levels) == {1, 2, 3, 4} and levels.index(4) > levels.index(3)


def test_whose_results_they_are_can_be_said(tmp_path):
    write_study(tmp_path / "ab", losses={name: LOSSES[name] for name in "AB"})
    refused = CliRunner().invoke(cli.main, ["report", str(tmp_path / "ab"), "--experiment", "dense"])
    assert refused.exit_code == 1 and "no finished run of the experiment dense" in refused.output
    assert "What do seven routings do" in write(tmp_path / "ab")
    assert CliRunner().invoke(cli.main, ["report", str(tmp_path), "--experiment", "nope"]).exit_code == 2


DRIVE = """<script>
const out = {}, cells = column => [...table.tBodies[0].rows].map(row => row.cells[column].textContent);
const table = document.querySelector("#study table.sorts"), heads = [...table.tHead.rows[0].cells];
const place = heads.findIndex(head => head.textContent.startsWith("causal loss (nats)"));
const click = column => heads[column].querySelector("button").click();
click(place); out.up = cells(place); out.sorted = heads[place].getAttribute("aria-sort");
click(place); out.down = cells(place); click(0); out.names = cells(0).map(text => text[0]);
const other = [...document.querySelectorAll("table.sorts")].at(-1);
out.orders = [...other.tHead.rows[0].cells].map((head, i) => [1, 2, 3].map(() => {
  head.querySelector("button").click();
  return [...other.tBodies[0].rows].map(row => row.cells[i].textContent).join("|"); }));
out.closed = document.querySelectorAll("details[open]").length;
location.hash = "#ab-runs-A"; reveal(); out.open = document.querySelectorAll("details[open]").length;
dispatchEvent(new Event("beforeprint")); out.all = document.querySelectorAll("details:not([open])").length;
dispatchEvent(new Event("afterprint")); out.after = document.querySelectorAll("details[open]").length;
const ink = () => [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color];
out.light = ink(); document.getElementById("theme").click(); out.dark = ink();
const print = [...document.styleSheets[0].cssRules].find(rule => rule.conditionText === "print");
print.media.mediaText = "all"; out.printed = ink(); print.media.mediaText = "print";
document.getElementById("theme").click(); out.again = ink();
out.resources = performance.getEntriesByType("resource").filter(one => !one.name.startsWith("data:")).length;
out.images = [...document.images].every(image => image.complete && image.naturalWidth > 500);
out.wide = document.documentElement.scrollWidth - innerWidth;
const pre = document.createElement("pre"); pre.id = "result"; pre.textContent = JSON.stringify({errors, ...out});
document.body.append(pre);
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the PATH")
def test_the_page_in_a_browser(whole, tmp_path):
    rows = (("[-0.2, 0.1]", "E32", "aux-0.1", "over 1,000 seeds"), ("[+0.1, 0.4]", "E8", "aux-0.03", "20 seeds"),
            ("[-1.5, -1.0]", "E8b", "aux-0", "over 1,000 seeds"))
    added = page.html_table(["interval", "name", "setting", "seeds"],
                            ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows])
    driven = whole.replace("</main>", added + "</main>").replace("<style>", CATCH + "<style>").replace(
        "</html>", DRIVE + "</html>")
    (tmp_path / "page.html").write_text(driven, encoding="utf-8")
    quiet = "disable-gpu disable-quic no-first-run disable-background-networking disable-component-update disable-sync"
    dom = subprocess.run([BROWSER, "--headless", "--no-sandbox", *(f"--{name}" for name in quiet.split()),
                          f"--user-data-dir={tmp_path / 'profile'}", "--window-size=500,900",
                          "--virtual-time-budget=5000", "--dump-dom", (tmp_path / "page.html").as_uri()],
                         capture_output=True, timeout=120).stdout.decode()
    got = json.loads(html.unescape(re.search(r'<pre id="result">(.*?)</pre>', dom, re.S)[1]))
    assert got["errors"] == [] and got["resources"] == 0 and got["images"] and got["wide"] <= 0
    losses = [float(cell.split()[0]) for cell in got["up"]]
    assert losses == sorted(losses) and got["down"][0] == got["up"][-1] and got["sorted"] == "ascending"
    assert got["names"] == sorted(got["names"]) == list("ABCDEFG")
    orders = (2, 0, 1), (1, 2, 0), (2, 1, 0), (1, 0, 2)
    for (up, down, planned), wanted, before in zip(got["orders"], orders, zip(*rows), strict=True):
        assert up == "|".join(before[i] for i in wanted) and planned == "|".join(before)
        assert down.split("|")[0] == before[wanted[-1]]
    assert (got["closed"], got["open"], got["all"], got["after"]) == (0, 2, 0, 2)
    (bright, ink), (ground, pale) = got["light"], got["dark"]
    assert lightness(bright) > 200 > 60 > lightness(ink) and lightness(ground) < 60 < 200 < lightness(pale)
    assert got["again"] == got["light"] and got["printed"] == ["rgb(255, 255, 255)", "rgb(0, 0, 0)"]
