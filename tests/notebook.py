"""A notebook from a script with cells (# %%), with what they print and draw; with the standard library alone."""

import ast
import base64
import contextlib
import io
import json
import re


def cells(script):
    """[(kind, text)] of a script; kind is "markdown" or "code"."""
    found = []
    for part in script.split("# %%")[1:]:
        first, _, text = part.partition("\n")
        kind = "markdown" if "[markdown]" in first else "code"
        lines = (re.sub("^# ?", "", line) if kind == "markdown" else line for line in text.split("\n"))
        found.append((kind, "\n".join(lines).strip()))
    return found


def run(script, name="tour"):
    """[outputs of each cell], as a notebook stores them. An exception in a cell is raised."""
    names, outputs = {"__name__": name}, []
    for kind, text in cells(script):
        outputs.append(_outputs(text, names) if kind == "code" else None)
    return outputs


def _outputs(text, names):
    """Run one cell; a figure in its last line is shown."""
    tree, printed, shown = ast.parse(text), io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "cell", "exec"), names)
        if last is not None:
            shown = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    found = [{"output_type": "stream", "name": "stdout", "text": printed.getvalue()}] if printed.getvalue() else []
    if hasattr(shown, "savefig"):
        image = io.BytesIO()
        shown.savefig(image, format="png", dpi=80, metadata={"Software": None})
        found.append({"output_type": "display_data", "metadata": {},
                      "data": {"image/png": base64.b64encode(image.getvalue()).decode()}})
    return found


def notebook(script):
    """The text of the .ipynb file (format 4.5) of a script, run."""
    made, count = [], 0
    for number, ((kind, text), outputs) in enumerate(zip(cells(script), run(script))):
        cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": text}
        if kind == "code":
            count += 1
            cell |= {"execution_count": count, "outputs": outputs}
        made.append(cell)
    return json.dumps({"cells": made, "metadata": {"language_info": {"name": "python"}}, "nbformat": 4,
                       "nbformat_minor": 5}, indent=1, ensure_ascii=False) + "\n"
