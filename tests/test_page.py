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


def words(text, markup):
    """The words and numbers of a text without what matches its markup."""
    text = html.unescape(re.sub(markup, " ", text)).replace("\xa0", " ")
    return re.sub(r"[`*|#\[\]]", " ", text).split()


def main_of(text):
    return re.search(r"<main>(.*)</main>", text, re.S)[1]


def test_the_page_of_an_experiment_says_what_its_findings_say(tmp_path):
    (write_study(tmp_path) / "figures").mkdir()
    (tmp_path / "figures/imbalance.png").write_bytes(b"a figure")  # so that none is drawn
    text, said = write(tmp_path), report.write_findings(STUDY, tmp_path).read_text()
    assert base64.b64encode(b"a figure").decode() in text
    shown = re.sub(r'<details class="runs">.*</details>', "", main_of(text))
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
        '<div class="table"><table class="sorts"><thead><tr><th></th><th><strong>q</strong></th></tr></thead>'
        "<tbody><tr><td>1&#160;±&#160;2</td><td></td></tr></tbody></table></div>")
    assert page.inline("`A`, [x](experiments/dense/FINDINGS.md)", results) == (
        '<a href="#study-runs-A" title="A-seed0"><code>A</code></a>, <a href="#dense">x</a>')


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
out.closed = document.querySelectorAll("details[open]").length;
location.hash = "#ab-runs-A"; reveal(); out.open = document.querySelectorAll("details[open]").length;
dispatchEvent(new Event("beforeprint")); out.all = document.querySelectorAll("details:not([open])").length;
const ink = () => [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color];
out.light = ink(); document.getElementById("theme").click(); out.dark = ink();
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
    driven = whole.replace("<style>", CATCH + "<style>").replace("</html>", DRIVE + "</html>")
    (tmp_path / "page.html").write_text(driven, encoding="utf-8")
    quiet = "disable-gpu disable-quic no-first-run disable-background-networking disable-component-update disable-sync"
    dom = subprocess.run([BROWSER, "--headless", "--no-sandbox", *(f"--{name}" for name in quiet.split()),
                          f"--user-data-dir={tmp_path / 'profile'}", "--window-size=500,900",
                          "--virtual-time-budget=5000", "--dump-dom", (tmp_path / "page.html").as_uri()],
                         capture_output=True, timeout=120).stdout.decode()
    got = json.loads(html.unescape(re.search(r'<pre id="result">(.*?)</pre>', dom, re.S)[1]))
    assert got["errors"] == [] and got["resources"] == 0 and got["images"] and got["wide"] <= 0
    losses = [float(cell.split("\xa0")[0]) for cell in got["up"]]
    assert losses == sorted(losses) and got["down"][0] == got["up"][-1] and got["sorted"] == "ascending"
    assert got["names"] == sorted(got["names"]) == list("ABCDEFG")
    assert (got["closed"], got["open"], got["all"]) == (0, 2, 0)
    (bright, ink), (ground, pale) = got["light"], got["dark"]
    assert lightness(bright) > 200 > 60 > lightness(ink) and lightness(ground) < 60 < 200 < lightness(pale)
    assert got["again"] == got["light"]
