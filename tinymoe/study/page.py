"""FINDINGS.md as one HTML file: the same paragraphs, figures inline, tables that sort, numbers that lead to their runs.

It reads the Markdown of these documents: headings, tables, lists, images; in a line bold, italic, code and links. The
template is report.html.
"""

import base64
import re
from html import escape
from pathlib import Path

from ..files import require_ours, write_atomically
from . import figures, gathered, report
from .markdown import WORDS, escaped, run_ids
from .quantities import LOSS
from .results import Results
from .wording import GLOSSARY, METHODS


def write_page(found: list[Results], published=None, absent=()) -> Path:
    """Write report.html of one experiment into its folder, or of all that is published into `published`: its path.

    found, absent: as gathered.published_results gives. Figures that are missing are drawn first.
    """
    for results in found:
        if not report.images(results):
            figures.draw_all(results)
    if published is None:
        folder, title = found[0].folder, found[0].experiment.question
        body = blocks(report.document(found[0]), found[0]) + run_list(found[0])
    else:
        figures.draw_forest(found, published)
        folder, title = Path(published), "Findings"
        body = blocks(gathered.document(found, absent, published, section=lambda results: ""), None, found, folder)
        body += "<h2>The experiments</h2>" + "".join(map(whole_experiment, found))
    require_ours(folder / "report.html", "<title>tinymoe: ")
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    write_atomically(folder / "report.html", template.replace("__TITLE__", escape(title)).replace("__BODY__", body))
    return folder / "report.html"


def whole_experiment(results):
    """An experiment's document that opens when it is asked for; the words and methods stand once in the page."""
    shared = (GLOSSARY, METHODS, WORDS, "## Methods")
    heading, *rest = (part for part in report.document(results) if part not in shared)
    question = inline(heading.removeprefix("# "), results)
    return (f'<details class="experiment" id="{anchor(results)}"><summary>{question}</summary>'
            f"{blocks(rest, results)}{run_list(results)}</details>")


def anchor(results, name=""):
    """The id of an experiment in the page, or of a setting's runs."""
    return re.sub(r"[^\w.-]", "-", f"{results.experiment.name}{'-runs-' if name else ''}{name}")


def run_list(results):
    """The runs behind the numbers: a line for each setting with its run ids, steps, rate and losses."""
    rows = []
    for name, runs in results.groups.items():
        steps, rates = ({run.config["training"][field] for run in runs} for field in ("steps", "learning_rate"))
        losses = ", ".join(f"seed {run.seed}: {run.final[LOSS]:.4f}" for run in runs)
        rows.append(f'<tr id="{anchor(results, name)}"><td><code>{escape(name)}</code></td>'
                    f"<td>{escape(', '.join(run_ids(runs)))}</td><td>{', '.join(map(str, sorted(steps)))}</td>"
                    f"<td>{', '.join(f'{rate:g}' for rate in sorted(rates))}</td><td>{losses}</td></tr>")
    where = "runs.jsonl, or the folders in runs/"
    return (f'<details class="runs"><summary>Runs of {escape(results.experiment.name)} ({where})</summary>'
            + html_table(("setting", "run ids", "steps", "learning rate", "causal loss (nats)"), rows) + "</details>")


def html_table(head, rows):
    """A table that sorts, of cells of its head and whole rows."""
    heads = "".join(f"<th>{cell}</th>" for cell in head)
    return (f'<div class="table"><table class="sorts"><thead><tr>{heads}</tr></thead>'
            f'<tbody>{"".join(rows)}</tbody></table></div>')


def blocks(paragraphs, results, found=(), folder=None):
    """HTML of paragraphs of Markdown. results: whose settings are named; found: of several experiments, each by its
    link; folder: of the images, if not that of the results."""
    parts = [part for paragraph in paragraphs for part in paragraph.split("\n\n") if part]
    return "\n".join(block(part, results, found, folder or results.folder) for part in parts)


def block(text, results, found, folder):
    if heading := re.match(r"(#+) (.*)", text):
        level, words = len(heading[1]), heading[2]
        return f'<h{level} id="{re.sub(r"[^a-z0-9]+", "-", words.lower())}">{inline(words, results)}</h{level}>'
    if image := re.match(r"!\[(.*)\]\((.*)\)", text):
        data = base64.b64encode((folder / image[2]).read_bytes()).decode()
        return f'<p class="figure"><img src="data:image/png;base64,{data}" alt="{escape(image[1])}"></p>'
    if text.startswith("| "):
        head, _, *rows = (line[2:-2].split(" | ") for line in text.splitlines())
        return html_table([inline(cell, results) for cell in head], [table_row(row, results, found) for row in rows])
    if text.startswith("- "):
        return "<ul>" + "".join(f"<li>{inline(line[2:], results)}</li>" for line in text.splitlines()) + "</ul>"
    return f"<p>{inline(text, results)}</p>"


def table_row(cells, results, found):
    """A row; pointing at it tells the run ids of all settings that it names."""
    results = results or next((each for each in found if gathered.link(each) in cells), None)
    named = [] if results is None else [
        name for name in results.groups if f"`{name}`" in " ".join(cells)
        or cells[0] in (name, escaped(results.label(name)))]
    ids = [each for name in named for each in run_ids(results.groups[name])]
    hint = f' title="runs of {escape(results.experiment.name)}: {escape(", ".join(ids))}"' if ids else ""
    if named and cells[0] in (named[0], escaped(results.label(named[0]))):
        first, *rest = cells
        cells = [f"[{first}](#{anchor(results, named[0])})", *rest]
    return f"<tr{hint}>" + "".join(f"<td>{inline(cell, results)}</td>" for cell in cells) + "</tr>"


def inline(text, results):
    """HTML of a line of Markdown. The name of a setting is a link to its runs, and pointing at it tells their ids."""
    def name_or_code(found):
        runs = results.groups.get(found[1]) if results is not None else None
        hint = escape(", ".join(run_ids(runs))) if runs else ""
        code = f"<code>{found[1]}</code>"
        return f'<a href="#{anchor(results, found[1])}" title="{hint}">{code}</a>' if runs else code

    text = re.sub(r"&(?!#\d+;)", "&amp;", text)
    text = re.sub(r"<(?!br>)", "&lt;", text).replace(" ± ", "&#160;±&#160;")
    text = re.sub(r"\[([^\]]+)\]\(([^)]+)\)", link_in_page, text)
    text = re.sub(r"`([^`]+)`", name_or_code, text)
    return re.sub(r"\*(.+?)\*", r"<em>\1</em>", re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text))


def link_in_page(found):
    """A link of Markdown; the document of an experiment is a part of the page."""
    target = re.sub(r"^(?:experiments/([\w.-]+)|full)/FINDINGS\.md$", lambda of: f"#{of[1] or 'study'}", found[2])
    return f'<a href="{escape(target)}">{found[1]}</a>'
