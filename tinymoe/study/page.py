"""FINDINGS.md as one HTML file: the same paragraphs, figures inline, tables that sort, numbers that lead to their runs.

It reads the Markdown of these documents: headings, tables, lists, images; in a line bold, italic, code and links. The
template is report.html.
"""

import base64
import re
from html import escape, unescape
from pathlib import Path

from ..files import require_ours, write_atomically
from . import figures, gathered, report
from .markdown import WORDS, escaped, run_ids
from .quantities import LOSS
from .results import Results
from .wording import EXPLORATORY, GLOSSARY, METHODS, PRIMARY


def write_page(found: list[Results], published=None, absent=()) -> Path:
    """Write report.html of one experiment into its folder, or of all that is published into `published`: its path.

    found, absent: as gathered.published_results gives. Where a figure is missing, or shows other runs, those of
    its experiment are drawn first.
    """
    for results in found:
        fresh = report.drawn(results)
        if not all(fresh.get(name) for name in results.experiment.figures):
            figures.draw_all(results)
    if published is None:
        folder, title = found[0].folder, found[0].experiment.question
        body = blocks(report.document(found[0]), found[0]) + run_list(found[0])
    else:
        figures.draw_forest(found, published)
        folder, title = Path(published), "Findings"
        first, opening, *rest = gathered.document(found, absent, published, section=lambda *_: "")
        links = ", ".join(f"[{results.experiment.name}](#{anchor(results)})" for results in found)
        said = [first, opening, f"The experiments: {links}.", *rest, "## The experiments",
                f"**Primary comparisons.** {PRIMARY}", f"**Exploratory comparisons.** {EXPLORATORY}"]
        body = blocks(said, None, found, folder) + "".join(whole_experiment(results, found) for results in found)
    require_ours(folder / "report.html", "<title>tinymoe: ")
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    write_atomically(folder / "report.html", template.replace("__TITLE__", escape(title)).replace("__BODY__", body))
    return folder / "report.html"


def whole_experiment(results, found):
    """An experiment's document that opens when it is asked for; the words and methods stand once in the page, above."""
    shared = (GLOSSARY, METHODS, WORDS, "## Methods", PRIMARY, EXPLORATORY, report.verdicts([results]))
    heading, *rest = (part.replace("[below](", "[here](") for part in report.document(results) if part not in shared)
    question = inline(heading.removeprefix("# "), results)
    body = blocks(gathered.later(results, found), None, found) + blocks(rest, results)
    body = body.replace('<h2 id="', f'<h4 id="{anchor(results)}-').replace("</h2>", "</h4>")
    return (f'<details class="experiment" id="{anchor(results)}"><summary><h3>{question}</h3></summary>'
            f"{body}{run_list(results)}</details>")


def anchor(results, name=""):
    """The id of an experiment in the page, or of a setting's runs."""
    return re.sub(r"[^\w.-]", "-", f"{results.experiment.name}{'-runs-' if name else ''}{name}")


def swept(results):
    """{setting@rate: runs} of the sweep that have ended."""
    found = {}
    for run in results.sweep_runs:
        if run.state != "unfinished":
            found.setdefault(run.config_id, []).append(run)
    return found


def run_list(results):
    """The runs behind the numbers: a line for each setting with its run ids, steps, rate and losses."""
    rows, sweep = [], swept(results)
    for name, runs in (results.groups | sweep).items():
        steps, rates = ({run.config["training"][field] for run in runs} for field in ("steps", "learning_rate"))
        losses = ", ".join(f"seed {run.seed}: {f'{run.final[LOSS]:.4f}' if run.summary else 'not finite'}"
                           for run in runs)
        rows.append(f'<tr id="{anchor(results, name)}"><td><code>{escape(name)}</code></td>'
                    f"<td>{escape(', '.join(run_ids(runs)))}</td><td>{', '.join(map(str, sorted(steps)))}</td>"
                    f"<td>{', '.join(f'{rate:g}' for rate in sorted(rates))}</td><td>{losses}</td></tr>")
    where = "runs.jsonl, or the folders in runs/"
    more = "; setting@rate: runs that chose the learning rate" if sweep else ""
    return (f'<details class="runs"><summary>Runs of {escape(results.experiment.name)} ({where}{more})</summary>'
            + html_table(("setting", "run ids", "steps", "learning rate", "causal loss (nats)"), rows) + "</details>")


def html_table(head, rows):
    """A table. head: its cells; rows: whole <tr> elements. It sorts, unless the first heading is empty, whose rows are
    different quantities."""
    heads = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    start = '<div class="table"><table class="sorts">' if head[0] else '<div class="table" tabindex="0"><table>'
    return f"{start}<thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def blocks(paragraphs, results, found=(), folder=None):
    """HTML of paragraphs of Markdown. results: whose settings are named; found: of several experiments, each by its
    link; folder: of the images, if not that of the results."""
    whole = [re.sub(r"!\[.*?\](\(.*?\))\n\n\*(.*)\*", r"![\2]\1", each) for each in paragraphs]  # image and caption
    parts = [part for paragraph in whole for part in paragraph.split("\n\n") if part]
    return "\n".join(block(part, results, found, folder or results.folder) for part in parts)


def block(text, results, found, folder):
    if heading := re.match(r"(#+) (.*)", text):
        level, words = len(heading[1]), heading[2]
        return f'<h{level} id="{re.sub(r"[^a-z0-9]+", "-", words.lower())}">{inline(words, results)}</h{level}>'
    if image := re.match(r"!\[(.*)\]\((.*)\)", text):
        data = base64.b64encode((folder / image[2]).read_bytes()).decode()
        caption = inline(image[1], results)
        alt = escape(unescape(re.sub("<[^>]*>", "", caption)))
        return (f'<figure><img src="data:image/png;base64,{data}" alt="{alt}"><figcaption>{caption}</figcaption>'
                "</figure>")
    if text.startswith("| "):
        head, _, *rows = (line[2:-2].split(" | ") for line in text.splitlines())
        return html_table([inline(cell, results) for cell in head],
                          [table_row(row, head, results, found) for row in rows])
    if text.startswith("- "):
        return "<ul>" + "".join(f"<li>{inline(line[2:], results)}</li>" for line in text.splitlines()) + "</ul>"
    return f"<p>{inline(text, results)}</p>"


def table_row(cells, head, results, found):
    """A row; pointing at it tells the run ids of all settings that it names. A setting in front is a link to its runs,
    in a table of learning rates to those of the sweep."""
    results = results or next((each for each in found if gathered.link(each) in cells), None)
    first, groups = cells[0], results.groups if results else {}
    if "chosen rate" in head and results:  # learning rates
        groups = swept(results)
        own = named = [name for name in groups if name.startswith(f"{first}@")]
    else:
        own = [name for name in groups if head[0] == "setting" and first in (name, escaped(results.label(name)))]
        named = [name for name in groups if name in own or f"`{name}`" in " ".join(cells)]
    ids = [each for name in named for each in run_ids(groups[name])]
    hint = f' title="runs of {escape(results.experiment.name)}: {escape(", ".join(ids))}"' if ids else ""
    if own:
        cells = [f"[{first}](#{anchor(results, own[0])})", *cells[1:]]
    return f"<tr{hint}>" + "".join(f"<td>{inline(cell, results)}</td>" for cell in cells) + "</tr>"


def inline(text, results):
    """HTML of a line of Markdown. The name of a setting is a link to its runs, and pointing at it tells their ids."""
    def name_or_code(found):
        runs = results.groups.get(found[1]) if results is not None else None
        hint = escape(", ".join(run_ids(runs))) if runs else ""
        code = f"<code>{found[1]}</code>"
        return f'<a href="#{anchor(results, found[1])}" title="{hint}">{code}</a>' if runs else code

    text = re.sub(r"&(?!#\d+;)", "&amp;", text)
    text = re.sub(r"<(?!br>)", "&lt;", text)
    text = re.sub(r"([+-]?[\d.,]*\d) ± ([\d.,]*\d)", r'<span class="whole">\1 ± \2</span>', text)
    text = re.sub(r"\[([^\]]+)\]\(([^)]+)\)", link_in_page, text)
    text = re.sub(r"`([^`]+)`", name_or_code, text)
    return re.sub(r"\*(.+?)\*", r"<em>\1</em>", re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text))


def link_in_page(found):
    """A link of Markdown; the document of an experiment is a part of the page."""
    target = re.sub(r"^(?:experiments/([\w.-]+)|full)/FINDINGS\.md$", lambda of: f"#{of[1] or 'study'}", found[2])
    return f'<a href="{escape(target)}">{found[1]}</a>'
