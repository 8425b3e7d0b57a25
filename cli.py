#!/usr/bin/env python3
"""The command line of tinymoe. Heavy imports are inside the commands, so that --help is instant."""

import os
import signal


def _end_at_once(number, frame):
    os.write(2, b"\nInterrupted.\n")
    os._exit(130)


if __name__ == "__main__":  # before the other imports: Ctrl-C during them is one line too
    signal.signal(signal.SIGINT, _end_at_once)

import codecs
import collections
import contextlib
import functools
import itertools
import json
import math
import re
import shutil
import sys
from pathlib import Path

import click

os.environ["MPLBACKEND"] = "agg"  # figures are files; a notebook's backend may be missing in this environment

HERE = Path(__file__).resolve().parent
RESULTS = (HERE if (HERE / "pyproject.toml").exists() else Path()) / "results"  # installed: in the current folder
COUNT, PATH = click.IntRange(min=1), click.Path(path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


class Commands(click.Group):
    """The commands, and how each of them ends: 0 done, 1 failed, 2 wrong usage, 130 interrupted by Ctrl-C.

    Every error is one line. A character that the output cannot encode becomes a question mark.
    """

    def main(self, *args, **kwargs):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError):  # closed, or another kind of stream
                stream.reconfigure(errors="replace")
        try:
            return super().main(*args, **kwargs)
        except OSError as error:  # the commands handle their files: this is the output, on a full disk
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python writes what is left again at its exit
            raise SystemExit(_say(f"Error: cannot write the output: {error}")) from None

    def invoke(self, context):
        try:
            with _ending_if_interrupted("\nInterrupted."):
                return super().invoke(context)
        except Exception as error:
            if isinstance(error, MemoryError):
                error = click.ClickException(f"not enough memory: {error or 'no more'}: choose smaller sizes")
            ours = type(error).__module__.startswith("tinymoe.")  # the errors of the package say what to do
            if not ours and not isinstance(error, click.ClickException):
                raise
            error = click.ClickException(str(error)) if ours else error
            if "tinymoe" in sys.modules:
                from tinymoe.files import printable
                error.message = printable(error.message)  # it may quote a file
            raise error from None

    def list_commands(self, context):
        return list(self.commands)

    def format_commands(self, context, formatter):
        with formatter.section("Commands"):
            formatter.write_dl([(name, each.get_short_help_str(limit=200)) for name, each in self.commands.items()])


def _say(message, code=1):
    """Print a line to the error stream; returns the exit code."""
    click.echo(message, err=True)
    return code


@contextlib.contextmanager
def _ending_if_interrupted(message):
    """End with this line after Ctrl-C. If it came in compiled code, Python has made a SystemError of it."""
    try:
        yield
    except (KeyboardInterrupt, SystemError) as error:
        if isinstance(error, SystemError) and not isinstance(error.__cause__, KeyboardInterrupt):
            raise
        raise SystemExit(_say(message, code=130)) from None


@contextlib.contextmanager
def _refusing(*errors, usage=False, about=""):
    """Report these exceptions in one line, and exit with code 1, or 2 for wrong usage."""
    try:
        yield
    except errors as error:
        kind = click.UsageError if usage else click.ClickException
        raise kind(about + (str(error) or type(error).__name__)) from None


def _table(columns, rows):
    """Print rows of cells as they come; a dash for None. columns: {heading: format of its cells, "9.1f" or "<8"}."""
    headings = [re.sub(r"^\+?(\d+).*", r">\1", cell) for cell in columns.values()]  # without digits and types
    click.echo("  ".join(map(format, columns, headings)).rstrip())
    for row in rows:
        cells = (format("-", heading) if cell is None else format(cell, form)
                 for cell, heading, form in zip(row, headings, columns.values()))
        click.echo("  ".join(cells).rstrip())


def _print_version(context, option, asked):
    if asked:
        import tinymoe
        click.echo(f"tinymoe {tinymoe.__version__}")
        context.exit()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
             epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.")
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version,
              help="Show the version and exit.")
def main():
    """Mixture-of-experts language models in NumPy: study, check and measure routing on a laptop's CPU."""


def _folder(context, option, value):
    """A folder for results, as a Path."""
    path = _named(value)
    if path and os.path.isfile(path):
        raise click.BadParameter(f"{path} is a file: give a folder")
    return path


def _file(context, option, value):
    """A file to write, as a Path. It may replace a file, but none that a run or its results consist of."""
    path = _named(value)
    if path and os.path.isdir(path):
        raise click.BadParameter(f"{path} is a folder: give a file")
    if path:
        from tinymoe.tools.view import belongs_to_a_run
        if belongs_to_a_run(path):
            raise click.BadParameter(f"{path} is a file of a run: choose another name")
    return path


def _picture(context, option, value):
    """A file for a figure, as a Path."""
    path = _file(context, option, value)
    if path and path.suffix.lower() != ".png":
        raise click.BadParameter(f"{path}: a figure is a PNG: choose a name that ends in .png")
    return path


def _named(value):
    """A path. Reports name it, so its name must be text."""
    if value == "":
        raise click.BadParameter("the name is empty")
    try:
        str(value).encode()
    except UnicodeEncodeError:
        raise click.BadParameter("the name must be valid UTF-8") from None
    return value if value is None else Path(value)


def _names(module, table):
    """Completes a word in the shell by the names of a table of the package, else by files."""
    def complete(context, parameter, word):
        from importlib import import_module

        from click.shell_completion import CompletionItem
        known = getattr(import_module(f"tinymoe.{module}"), table)
        return [name for name in known if name.startswith(word)] or [CompletionItem(word, type="file")]
    return complete


def _scheduler(context, option, value):
    """The address of a Dask scheduler."""
    if value is not None and not re.fullmatch(r"(tcp|tls)://[^\s/]+:\d{1,5}", value):
        raise click.BadParameter("write tcp://HOST:PORT, or tls://HOST:PORT with certificates")
    return value


def _execute_files(context, option, paths):
    """Run the files of --import; returns their absolute paths."""
    paths = tuple(map(os.path.abspath, paths))
    if paths:
        from tinymoe.moe.routers import ROUTERS
        from tinymoe.training.identity import RunError, execute_files
        with _refusing(RunError, ValueError):
            execute_files(paths)  # which training asks for again, and does not run again
            for router in ROUTERS.values():
                router.options()  # ValueError where they cannot be read
    return paths


def _cores():
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _out_option(text, callback=_folder, **settings):
    return click.option("--out", "-o", type=click.Path(), callback=callback, help=text, **settings)


def _scale(quick, full):
    """The name of the Scale."""
    if quick and full:
        raise click.UsageError("--quick and --full contradict each other: give one of them")
    return "quick" if quick else "full" if full else "default"


_import_option = click.option("--import", "imports", multiple=True, type=click.Path(), metavar="FILE.py", is_eager=True,
                              callback=_execute_files, help="Run this file first: it defines a router or a loss.")
_set_option = click.option("--set", "overrides", multiple=True, metavar="NAME=VALUE",
                           help="Change a setting, e.g. n_experts=16; `options` lists them. Repeat for several.")


def _training_options(command):
    """The options of the commands that train many runs."""
    for option in reversed((
            click.option("--jobs", "-j", type=COUNT, default=_cores, show_default="number of cores",
                         help="Runs side by side, each in a process with one thread. With -j 1, or one run left, this "
                              "process trains on all threads."),
            click.option("--scheduler", metavar="URL", callback=_scheduler,
                         help="Train on the workers of this Dask scheduler, tcp://HOST:PORT; see docs/cluster.md."),
            click.option("--text", type=click.Path(),
                         help="A file, a folder whose entries are domains, or: synthetic.  [default: installed texts]"),
            click.option("--fresh", is_flag=True,
                         help="Delete existing results of these runs instead of resuming; leave it out to resume."),
            click.option("--plot-only", is_flag=True, help="Train nothing: make figures and findings again."),
            _import_option)):
        command = option(command)
    return command


def _settings(overrides):
    """NAME=VALUE texts as (fields of ModelConfig, fields of TrainConfig). Raises click.UsageError for other names.

    router.NAME=VALUE sets an option of the router, losses.NAME=VALUE the coefficient of a loss.
    """
    import dataclasses

    from tinymoe.model.config import ModelConfig
    from tinymoe.training.plan import TrainConfig
    model, training = {}, {}
    known = {field.name: part for cls, part in ((ModelConfig, model), (TrainConfig, training))
             for field in dataclasses.fields(cls)}
    for text in overrides:
        name, equals, value = text.partition("=")
        with contextlib.suppress(ValueError, RecursionError):  # else it stays text
            value = json.loads(value) if len(re.findall(r"[\[{]", value)) < 100 else value  # none has so many
        group, _, key = name.partition(".")
        if equals and key and group in ("router", "losses"):
            options = model.setdefault("router_options" if group == "router" else group, {})
            if not isinstance(options, dict):
                raise click.UsageError(f"--set {text}: {group} is already set as a whole, to {options}")
            options[key] = value
        elif equals and name in known:
            known[name][name] = value
        else:
            raise click.UsageError(f"--set {text}: {f'there is no setting {name}: ' if equals else ''}write NAME=VALUE "
                                   "with a name that `options` lists, such as steps, router.NAME for an option of the "
                                   "router, losses.NAME for a coefficient")
    return model, training


@main.command()
@click.option("--quick", is_flag=True, help="200 steps a config instead of 2,000.")
@click.option("--full", is_flag=True, help="As planned for publication: every seed, and learning rates that are chosen "
              "first.")
@click.option("--steps", "-n", type=COUNT, help="Training steps of each run.")
@click.option("--config", "configs", multiple=True, type=click.Choice(list("ABCDEFG"), case_sensitive=False),
              help="Train only this config; repeat for several.  [default: all]")
@click.option("--seeds", type=click.IntRange(1, 1000),
              help="Runs of each config, seeds 0 to N - 1.  [default: 1; with --full as planned]")
@_out_option("Folder of the results.  [default: results/full, results/quick, or with --full results/planned]")
@click.option("--plot", is_flag=True, help="Draw the figures at the end.")
@click.option("--extend", is_flag=True, help="Train existing runs on to --steps, from their checkpoints.")
@_training_options
@_set_option
def study(quick, full, steps, configs, seeds, out, plot, plot_only, overrides, **how):
    """Train configs A to G on real text and report what they did.

    \b
    A  top-1 without a balance loss
    B  top-1, balance coefficient 0.01
    C  top-1, balance coefficient 0.1
    D  top-2, balance coefficient 0.01: Mixtral style
    E  expert choice: two experts a byte on average
    F  as D, with noise on the scores
    G  as D, with gates that do not sum to 1: Grok-1 style

    Interrupt it at any time; the same command resumes from the last checkpoint.
    """
    from tinymoe.experiments import STUDY
    scale = _scale(quick, full)
    if how["extend"] and (scale == "full" or how["fresh"]):
        raise click.UsageError("--extend continues existing runs: leave --full and --fresh out")
    model, training = _settings(overrides)
    fields = {"only": list(dict.fromkeys(configs)), "model": model,
              "training": ({"steps": steps} if steps else {}) | training}
    out = out or RESULTS / {"quick": "quick", "default": "full", "full": "planned"}[scale]
    _conduct(STUDY, None if plot_only else scale, seeds, out, plot=plot or plot_only, show=_print_study, fields=fields,
             **how)


def _print_study(results):
    """The table of the configs on the screen. It shows the measured experts a byte: some routers do not fix K."""
    def row(name, runs):
        means = (results.mean(metric, name) for metric in (
            "causal_perplexity", "val_perplexity", "causal_bits_per_byte", "load_cv", "experts_per_token"))
        causal, leaky, *others = (mean if math.isfinite(mean) else None for mean in means)
        return name, len(runs), causal, f"{leaky:.3f}" if leaky != causal else "", *others

    _table({"config": "<6", "seeds": "5", "perplexity": "10.3f", "(leaky)": ">7", "bits per byte": "13.3f",
            "load CV": "7.3f", "experts a byte": "14.2f"}, itertools.starmap(row, results.groups.items()))


def _conduct(experiment, scale, seeds, out, plot, show, fields=None, **how):
    """Train the runs of a scale, unless it is None; write and draw what is under `out`, and show(results).

    fields: arguments of Experiment.runs. With the scale "full", a sweep first chooses the learning rates.
    """
    from tinymoe.study import report
    from tinymoe.study.results import Results
    if scale is None and (how["fresh"] or how.get("extend")):
        raise click.UsageError("--plot-only trains nothing: leave --fresh and --extend out")
    failures = _train_all(experiment, scale, seeds, out, fields=fields or {}, **how) if scale else {}
    with _refusing(ValueError, OSError):
        results = Results(experiment, out)
        try:
            if plot:
                from tinymoe.study.figures import draw_all
                click.echo(f"{len(draw_all(results))} figure(s) in {out / 'figures'}")
        finally:  # the document shows the figures that are there
            report.write_findings(results)
            report.write_summary_csv(results)
    show(results)
    click.echo(f"findings in {out / 'FINDINGS.md'}")
    if failures:
        raise SystemExit(1)


def _train_all(experiment, scale, seeds, out, fields, **how):
    """Train the sweep, if the scale has one, and then the runs: {run id: why it failed}. Exits if there is no result.

    A sweep run may fail because its loss did not stay finite. After any other failure no rate is chosen.
    """
    from tinymoe.study.results import best_rates
    from tinymoe.study.rows import load_runs
    chooses = scale == "full" and "learning_rate" not in fields.get("training", {})
    with _refusing(ValueError, TypeError, usage=True):
        size = experiment.scale(scale)
        seeds = seeds or size.seeds
        runs = experiment.runs(size, seeds, **fields)
        sweep = experiment.sweep(size, **fields) if chooses else []
        if both := {run.seed for run in sweep} & {run.seed for run in runs}:
            raise ValueError(f"--seeds {seeds} would use seed {min(both)}, which chooses learning rates: give fewer")
    anew = [run.run_id for run in (*sweep, *runs)]  # noted at once: without --fresh the command goes on with both
    if sweep:
        failures = _train(sweep, out, anew, **how)
        anew = ()
        if not all(" is not finite at step " in message for message in failures.values()):  # see NonFiniteLoss
            message = "No learning rate was chosen, so nothing else was trained: correct what failed first."
            raise SystemExit(_say(message))
        with _refusing(ValueError):
            rates = best_rates(experiment, load_runs(out), fields.get("only"))
        click.echo("learning rates: " + ", ".join(f"{name} {rate:g}" for name, rate in rates.items()))
        runs = experiment.runs(size, seeds, rates=rates, **fields)
    failures = _train(runs, out, anew, **how)
    if len(failures) == len(runs):
        raise SystemExit(1)
    return failures


def _train(runs, out, anew, text, jobs, fresh, imports, scheduler, extend=False):
    """Train the runs that runs.jsonl does not hold, with a progress bar, and say which failed: {run id: message}.

    anew: the ids of what --fresh throws away; none where it was noted before.
    """
    import dataclasses

    from tinymoe import kernels
    from tinymoe.study.rows import ANEW, forget_begun, remaining
    from tinymoe.study.runner import run_study
    from tinymoe.tools.progress import Progress
    runs = [dataclasses.replace(run, imports=imports) for run in runs]
    with _refusing(ValueError, OSError):
        forget_begun(out)
        todo = runs if fresh else remaining(runs, out, text, extend)
        if extend and todo:
            _lengthen(todo, out, text)
    if len(todo) < len(runs):
        click.echo(f"{len(runs) - len(todo)} of {len(runs)} runs are finished in {out}")
    if not todo:
        return {}
    steps = " or ".join(map(str, sorted({run.training.steps for run in todo})))
    where = f"on {scheduler}" if scheduler else f"{min(jobs, len(todo))} at a time"
    click.echo(f"{len(todo)} run(s) of {steps} steps, {where} -> {out}")
    if scheduler:
        click.echo("waiting for the scheduler and its workers, up to a minute")
    if not scheduler and not kernels.is_compiled("float32"):
        click.echo("The kernels are compiled first, once on this machine: half a minute or more without progress.")
    progress = Progress(todo)
    if signal.getsignal(signal.SIGINT) is _end_at_once:  # all is imported: from here on, KeyboardInterrupt
        signal.signal(signal.SIGINT, signal.default_int_handler)
    how = "The same command resumes from the last checkpoints."
    if fresh:
        how = f"Leave --fresh out to resume. Runs that had not begun keep their old results if you delete {out / ANEW}."
    with _ending_if_interrupted(f"\nInterrupted. {how}"), _refusing(ValueError, OSError), progress.bar:
        try:
            failures = run_study(todo, out, text, jobs, fresh and anew, progress.note, scheduler)
        finally:
            forget_begun(out)
    _say_failures(failures)
    if failures and fresh:
        _say("To go on, run the command without --fresh, which deletes finished runs too.")
    return failures


def _lengthen(runs, out, text):
    """Let those that are there go on to more steps. All are checked first: where one cannot, none is changed."""
    from tinymoe.training.data import corpora_of
    from tinymoe.training.run_folder import RunFolder
    corpora = corpora_of(text)
    for change in (RunFolder.longer, RunFolder.lengthen):
        for run in runs:
            change(RunFolder(out / "runs" / run.run_id), run, corpora(run.model.seq_len))


def _say_failures(failures):
    """Print one line for all runs that failed in the same way."""
    from tinymoe.files import printable
    alike = collections.defaultdict(list)
    for run_id, message in failures.items():
        alike[message.replace(run_id, "")].append((run_id, message))
    for (run_id, message), *others in alike.values():
        _say(printable(f"Error: {run_id} failed: {message}"))
        if others:
            _say(printable(f"Error: {', '.join(name for name, _ in others)} failed likewise"))


@main.command()
@click.argument("name", metavar="[NAME|FILE.py]", required=False, shell_complete=_names("experiments", "EXPERIMENTS"))
@click.option("--quick", is_flag=True, help="60 steps and two seeds, to test that it runs.")
@click.option("--full", is_flag=True, help="As planned for publication: its steps, seeds, and learning rates that are "
              "chosen first; takes hours.")
@click.option("--seeds", type=click.IntRange(1, 1000),
              help="Runs of each setting, N seeds, from 0 on unless its plan has a first seed.  [default: 3; 2 with "
                   "--quick; with --full as planned]")
@_out_option("Folder of the results.  [default: results/experiments/NAME; with --quick or --full "
             "results/experiments-quick/NAME or -full/NAME]")
@_training_options
def experiment(name, quick, full, seeds, out, plot_only, text, **how):
    """Run an experiment and report the result, or list them all.

    NAME is one of the list, or a file of yours that defines an Experiment, such as docs/my_question.py. Without NAME it
    lists the experiments. Interrupt it at any time; the same command resumes from the last checkpoints.
    """
    from tinymoe.experiments import EXPERIMENTS
    from tinymoe.moe.losses import LOSSES
    from tinymoe.moe.routers import ROUTERS
    if name is None:
        for name, each in EXPERIMENTS.items():
            click.echo(f"{name:14} {each.question}  ({len(each.settings)} settings)")
        click.echo("\n`experiment NAME` runs one: three seeds, mostly 3 to 20 minutes on two idle cores.")
        return
    scale, before = _scale(quick, full), (dict(ROUTERS), dict(LOSSES))
    chosen = _experiment(name)
    if before != (ROUTERS, LOSSES):  # the file defines a router or a loss of its own: workers need it too
        how["imports"] += (os.path.abspath(name),)
    if chosen.measure and not chosen.measure.__module__.startswith("tinymoe."):
        how["jobs"] = 1  # another process could not find a function of this file
    if text is not None and chosen.text:
        raise click.UsageError(f"{name} is about its own text, {chosen.text}: leave --text out")
    out = out or RESULTS / f"experiments{'' if scale == 'default' else '-' + scale}" / chosen.name
    _conduct(chosen, None if plot_only else scale, seeds, out, plot=True, show=_print_finding,
             text=chosen.text if text is None else text, **how)


def _experiment(name):
    """The Experiment of this name, or of a user's file. Raises click.UsageError for another name."""
    from tinymoe.experiments import EXPERIMENTS, from_file
    if name in EXPERIMENTS:
        return EXPERIMENTS[name]
    if not name.endswith(".py"):
        raise click.UsageError(f"no experiment {name}: choose one of {', '.join(EXPERIMENTS)}, or give a file.py")
    with _refusing(ValueError):
        return from_file(name)


def _print_finding(results):
    """The question, what weakens the answer, and the answer."""
    from tinymoe.files import printable
    from tinymoe.study.caveats import warnings
    from tinymoe.study.report import finding
    click.echo(f"\n{results.experiment.question}")
    for line in (*warnings(results), *finding(results)):
        click.echo(click.wrap_text(f"- {printable(line.replace('**', ''))}", 100, subsequent_indent="  "))


@main.command()
@click.argument("folder", type=FOLDER, default=RESULTS / "published")
@_import_option
@_refusing(ValueError, OSError)
def findings(folder, imports):
    """Gather the study and the experiments into one document.

    It reads FOLDER/full and FOLDER/experiments and writes FOLDER/FINDINGS.md: the answers, the claims, and a section
    for each experiment, except those defined in your own files. It also draws FOLDER/figures/primary.png. For your own
    runs FOLDER is results. Runs of --full are found if they were written with --out FOLDER/full or --out
    FOLDER/experiments/NAME.

    [default: results/published]
    """
    from tinymoe.experiments import EXPERIMENTS, STUDY
    from tinymoe.files import require_ours
    from tinymoe.study import gathered
    from tinymoe.study.figures import draw_forest
    from tinymoe.study.markdown import WORDS
    require_ours(folder / "FINDINGS.md", WORDS)  # before a figure is drawn
    found, absent = gathered.published_results(folder, STUDY, EXPERIMENTS.values())
    draw_forest(found, folder)
    click.echo(gathered.gather(folder, found, absent))


@main.command("report")
@click.argument("folder", type=FOLDER)
@click.option("--experiment", "name", metavar="NAME|FILE.py", shell_complete=_names("experiments", "EXPERIMENTS"),
              help="The experiment in FOLDER.  [default: that of the folder's name, else the study]")
@_import_option
@_refusing(ValueError, OSError)
def report_page(folder, name, imports):
    """Write the findings of a results folder as one HTML page.

    FOLDER/report.html holds the figures, tables that sort, and the run ids behind each number, in one file. FOLDER has
    the results of the study or of one experiment, or of all of them in FOLDER/full and FOLDER/experiments.
    """
    from tinymoe.experiments import EXPERIMENTS, STUDY
    from tinymoe.study import gathered, page
    from tinymoe.study.results import Results
    if name is None and any((folder / part).is_dir() for part in ("full", "experiments")):
        found, absent = gathered.published_results(folder, STUDY, EXPERIMENTS.values())
        click.echo(page.write_page(found, folder, absent))
    else:
        chosen = _experiment(name) if name else EXPERIMENTS.get(folder.resolve().name, STUDY)
        click.echo(page.write_page([Results(chosen, folder)]))


@main.command()
@click.argument("folder", type=FOLDER)
@_refusing(ValueError, OSError)
def compact(folder):
    """Put the runs of a folder into one file, runs.jsonl.

    It writes one line for each run in FOLDER/runs that has finished or failed, with its config, log and summary. Lines
    of other runs stay. Reports and figures read this file as they read the run folders, which stay where they are.
    """
    from tinymoe.study.rows import compact as write_compact
    path, n = write_compact(folder)
    click.echo(f"{n} runs in {path}")


@main.command()
@click.argument("paths", nargs=-1, required=True, type=FOLDER, metavar="RUN_OR_FOLDER...")
@_out_option("The figure.", _picture, default=RESULTS / "compare.png")
@_import_option
@_refusing(ValueError, OSError)
def compare(paths, out, imports):
    """Put runs of any folders into one table and one figure.

    Give run folders and results folders. Runs that differ only in their seed are one line, their mean. The figure shows
    the loss and the load of the busiest expert over the steps, and one against the other.
    """
    from tinymoe.study import compare as c
    from tinymoe.study.figures import save
    found = c.groups(paths)
    columns, rows = c.table(found)
    forms = [f"<{max(map(len, (name, *(str(row[i]) for row in rows))))}" if i < 2 else f"{len(name)}.3f" if i > 2 else
             f"{len(name)}" for i, name in enumerate(columns)]
    _table(dict(zip(columns, forms)), rows)
    for line in c.cautions(found):
        click.echo(f"Careful: {line}")
    save(c.draw(found), out, follow=True)
    click.echo(f"figure in {out}")


@main.command()
@click.argument("folder", type=FOLDER)
@click.option("--csv", "form", flag_value="csv", default="csv", show_default=False,
              help="A table that every program reads (the default).")
@click.option("--parquet", "form", flag_value="parquet", help="A smaller file with types; needs the package pyarrow.")
@_out_option("The file to write.  [default: FOLDER/rows.csv or FOLDER/rows.parquet]", _file)
@_refusing(ValueError, OSError)
def rows(folder, form, out):
    """Write every row of a folder's runs as one flat table.

    It is for pandas, R and others. It has one line for each run, evaluation and MoE layer, and columns such as load.0
    for the load of expert 0.
    """
    from tinymoe.files import as_csv, write_atomically
    from tinymoe.study import compare as c
    flat, path = c.flat_rows(folder), out or folder / f"rows.{form}"
    try:
        content = as_csv(flat) if form == "csv" else c.as_parquet(flat)
    except ImportError:
        raise click.ClickException("--parquet needs the package pyarrow: pip install pyarrow, or use --csv") from None
    write_atomically(path, content, follow=bool(out))  # a link in the folder may have come with it
    click.echo(f"{len(flat)} rows of {len(flat[0])} columns in {path}")


@main.command()
@click.argument("folder", type=FOLDER)
@_refusing(ValueError, OSError)
def runs(folder):
    """Show which runs are finished, running, failed or waiting.

    FOLDER is the --out of a study or experiment, which may be running, on this machine or on others.
    """
    from tinymoe.files import printable
    from tinymoe.study.rows import overview
    from tinymoe.tools.progress import duration
    found = overview(folder)
    if not found:
        raise click.ClickException(f"{folder}: " + (
            "its finished runs are in runs.jsonl: `rows` or `compare` shows them" if (folder / "runs.jsonl").exists()
            else "no runs in it: give the --out of a study or experiment"))
    _table({"run": "<16", "state": "<8", "step": ">11", "causal loss": ">11", "left": ">8", "where": "<"},
           ((printable(r["run"]), r["state"], f"{r['step']}/{r['steps'] or '?'}",
             "" if r["loss"] is None else f"{r['loss']:.3f}", "" if r["left"] is None else duration(r["left"]),
             printable(r["where"])) for r in found))
    states = collections.Counter(r["state"] for r in found)
    click.echo(", ".join(f"{states[s]} {s}" for s in ("finished", "running", "failed", "waiting")))


@main.command()
@click.option("--long", "whole", is_flag=True, help="A page with formulas, sources and users: docs/routers.md.")
@_import_option
def routers(whole, imports):
    """List the routers: who chooses, balance, causality, cost."""
    from tinymoe.moe.routers import ROUTERS
    from tinymoe.tools import router_page
    if whole:
        click.echo(router_page.page(), nl=False)
        return
    columns = {"name": "<17", "who chooses": "<11", "equal load": "<22", "causal": "<18", "learned": "<7",
               "cost a layer": "<36", "paper": "<"}
    _table(columns, ((name, r.chooses, r.balanced, router_page.causal(r), "yes" if r.learned else "no", r.cost, r.paper)
                     for name, r in ROUTERS.items()))
    click.echo("\nN tokens, D width, E experts. Causal: a token's route depends on its own prefix alone.\n"
               "`study --config A --set router=NAME --out results/NAME` trains one.")


@main.command()
@_import_option
def options(imports):
    """List what --set can change, with defaults and meanings.

    --set NAME=VALUE changes one: numbers, true, false, null, lists such as [1,3] (quote them in zsh), or text.
    """
    import dataclasses

    from tinymoe.model.config import ModelConfig
    from tinymoe.moe.losses import LOSSES
    from tinymoe.moe.routers import ROUTERS
    from tinymoe.moe.routers.options import OF_THE_MODEL
    from tinymoe.training.plan import TrainConfig

    def shown(default):
        with contextlib.suppress(TypeError, ValueError):  # a user's router may have any default
            return json.dumps(default)
        return str(default)

    takers = {}  # one line for each option, with the routers that take it
    for name, router in ROUTERS.items():
        for option, parameter in router.options().items():
            if option in OF_THE_MODEL:
                continue
            meaning = re.split(r"(?<!al)\. ", router.meaning(option))[0].rstrip(".")
            takers.setdefault((f"router.{option}", shown(parameter.default), meaning), []).append(name)
    tables = {what: [(one.name, shown(one.default), one.metadata["meaning"]) for one in dataclasses.fields(config)]
              for what, config in (("the model of the study", ModelConfig), ("its training", TrainConfig))}
    tables["options of the router"] = [(*option, f"{meaning} ({', '.join(names)})") for (*option, meaning), names
                                       in sorted(takers.items(), key=str)]
    tables["coefficients of losses"] = [(f"losses.{name}", shown(0.0), loss.meaning)
                                        for name, loss in LOSSES.items() if name != "balance"]
    for what, rows in tables.items():
        _table({what: "<26", "default": "<12", "meaning": "<"}, rows)
        click.echo()


@main.command()
@click.argument("model", metavar="PRESET|FILE.json", shell_complete=_names("model.counting", "PRESETS"))
@click.option("--context", type=click.IntRange(0, 2**31 - 1), default=0, help="Positions that a token attends to.")
@click.option("--bytes", "width", type=click.FloatRange(0, 64, min_open=True), default=2,
              help="Memory of one parameter: 4 for float32, 2 for bfloat16, 0.5 for four bits.")
def params(model, context, width):
    """Count a model's parameters, FLOPs and memory, part by part.

    Presets: mixtral-8x7b, grok-1, olmoe-1b-7b, qwen1.5-moe-a2.7b, qwen3-30b-a3b, gpt-oss-20b, deepseek-v3, in upper
    or lower case. A file: a published config.json, or that of a run.

    Active parameters are those that one token uses, embedding and head included. FLOPs are those of the forward pass of
    one token: two for each active weight of a matrix product, and attention over --context positions.
    """
    from tinymoe.files import read_json
    from tinymoe.model import counting
    if width != width:
        raise click.UsageError("--bytes nan: give a number above 0")
    with _refusing(OSError, ValueError, TypeError, AttributeError, ArithmeticError, MemoryError, about=f"{model}: "):
        config = counting.PRESETS.get(model.lower())
        if config is None:
            path = Path(model, "config.json") if Path(model).is_dir() else Path(model)
            if not path.exists():
                raise click.UsageError(f"{model}: no file, and no preset: choose one of {', '.join(counting.PRESETS)}")
            config = read_json(path)
            config = config.get("model", config)  # a run's config.json holds its model
        parts = counting.count(counting.architecture(config), context)
    _table({"": "<16", "total": "18,", "active": "18,.0f", "MFLOP a token": "14,.1f", "GB": "9.3f"}, (
        (part.name, part.total, part.active, part.flops / 1e6, part.total * width / 1e9)
        for part in parts if part.total or part.flops))


@main.command()
@click.argument("subject", metavar="ROUTER|RUN|FILE", shell_complete=_names("moe.routers", "ROUTERS"))
@click.option("--steps", "-n", type=click.IntRange(min=0), show_default="50",
              help="Training steps before the test; for a router only.")
@click.option("--ids", type=click.Path(), help="A file of token ids, as text or .npy; for a file or run.")
@click.option("--text", type=click.Path(), help="A file, a folder whose entries are domains, or: synthetic.")
@_import_option
@_set_option
def probe(subject, steps, ids, text, imports, overrides):
    """Test whether MoE layers leak, collapse, or starve experts.

    ROUTER is trained in a small model first. RUN is a folder with a checkpoint. FILE is an .npz of weights, or
    published weights: a folder with config.json and .safetensors files.

    The tokens are bytes of text: validation windows of the text that a run was trained on, or of the installed texts.
    Published weights whose vocabulary is not of bytes get random ids, unless --ids gives others.
    """
    from tinymoe.files import printable
    from tinymoe.study import probes
    with _refusing(OSError, ValueError, TypeError, MemoryError, ImportError):
        found = _probed(subject, steps, ids=ids, text=text, overrides=overrides)
        model, ids, targets, domain = found.model, found.ids, found.targets, found.domain
        click.echo(f"{printable(found.about)}\n")
        reports = probes.layer_reports(model, ids, domain)
    _table({"layer": "5", "router": "<14", "leaks": "6.1%", "leaks in training": "17.1%", "effective experts": "17.2f",
            "of": "4", "largest load": "12.1%", "dead": "4", "tokens without": "14.1%"},
           ((r.layer, r.router, *r.leaks, r.effective, len(r.load), r.load.max() / max(1, r.load.sum()),
             r.dead, r.uncovered) for r in reports))
    click.echo("leaks: share of earlier tokens whose experts change when later tokens do, by this layer's own choice.\n"
               "effective experts: exp(entropy of the load). largest load: share of all assignments.\n"
               "dead: experts under 1% of their fair share.")
    click.echo("\n".join(["\nalarms", *(probes.alarms(model, reports, ids, targets, domain) or ["none"])]))
    effects = {"later tokens, as evaluated": probes.causality(model, ids, domain=domain),
               "later tokens, as trained": probes.causality(model, ids, domain=domain, training=True),
               "later tokens, routed on the prefix alone": probes.causality(model, ids, domain=domain, causal=True)}
    apart = probes.batch_independence(model, ids, domain)
    effects |= {f"other sequences: {what}": found for what, found in apart.items()}
    click.echo()
    _table({"effect on a token of, through all layers": "<44", "rerouted": "8.1%", "largest change of logits": "24.1e"},
           ((what, found.tokens, found.logits) for what, found in effects.items()))
    leak = probes.leak_in_loss(model, ids, targets, domain)
    click.echo(f"\nloss on the prefix alone, minus as evaluated: {leak:+.5f} nats\n")
    _table({"the router's gradient from": "<44", "coefficient": "11g", "norm": "9.2e", "": "<"},
           ((term, coefficient, norm, "exactly zero" if norm == 0 else "" if coefficient else "at coefficient 1")
            for term, (coefficient, norm) in probes.gradient_path(model, ids, targets, domain).items()))
    click.echo("\nfirst MoE layer: mean score of the exact balanced assignment, minus that of another way to choose")
    _table({"way to choose": "<44", "shortfall": "+9.5f"}, probes.assignment_shortfall(model, ids, domain).items())


def _probed(subject, steps, ids, text, overrides):
    """The probes.Subject of a router's name, trained for some steps, or of a path."""
    from tinymoe.moe.routers import ROUTERS
    from tinymoe.study import probes
    from tinymoe.training.plan import TrainConfig
    if subject not in ROUTERS and os.path.exists(subject):
        if steps is not None or overrides:
            raise click.UsageError("--steps and --set are for a router: a file or run is probed as it is")
        return probes.loaded(subject, ids, text)
    if ids is not None:
        raise click.UsageError("--ids is for a file or run: a router is trained and probed on text")
    if subject not in ROUTERS and (os.sep in subject or Path(subject).suffix in (".npz", ".safetensors")):
        raise click.UsageError(f"{subject} does not exist: check the path, or name a router")
    (model, training), steps = _settings(overrides), 50 if steps is None else steps
    with _refusing(ValueError, TypeError, usage=True):
        config = probes.small_model({"router": subject} | model)
        training = TrainConfig(**{"steps": max(1, steps)} | training)
    return probes.trained(config, steps, training, text)


@main.command()
@click.argument("run", type=PATH)
@click.argument("text")
@click.option("--gate", is_flag=True, help="Show the gate of the first choice, as bars.")
@click.option("--entropy", is_flag=True, help="Show the entropy of the router's probabilities, as bars.")
@click.option("--load", is_flag=True, help="Show how many bytes each expert has, as a histogram.")
@click.option("--layer", "layers", multiple=True, type=int, help="Show only this layer; repeat for several.")
@_import_option
def route(run, text, gate, entropy, load, layers, imports):
    """Show in the terminal which expert each byte of TEXT goes to.

    It shows each MoE layer of the model in folder RUN. Routes are decided on the prefix alone. Below each byte stands
    its first choice, the expert with the largest gate.
    """
    (model, step), data = _model(run), text.encode("utf-8", "surrogateescape")
    from tinymoe.tools import view
    config = model.config
    if not data:
        raise click.UsageError("TEXT is empty: give at least one byte")
    if not config.moe_layers or not set(layers) <= set(config.moe_layers):
        wanted, there = (", ".join(map(str, some)) for some in (layers or ["all"], config.moe_layers or ["none"]))
        raise click.UsageError(f"--layer {wanted}: the layers of {run} with experts are {there}")
    colour, width = os.isatty(1) and not os.environ.get("NO_COLOR"), shutil.get_terminal_size((80, 24)).columns
    for layer, routing in zip(config.moe_layers, view.prefix_routings(model, data)):
        if not layers or layer in layers:
            click.echo(f"layer {layer}, {routing.n_experts} experts, step {step:,}")
            click.echo("\n".join(view.lines(data, routing, colour, width, gate=gate, entropy=entropy)))
            if load:
                click.echo("\n".join(view.load_lines(routing)))
    bars = "; bars: ▁ 0 to █ 1, an entropy as a share of ln E, its largest" if gate or entropy else ""
    click.echo("Below a byte: the expert with its largest gate; -: none.\n"
               f"↵ newline, → tab, ¤ another control byte, · above 127{bars}")
    if len(data) > config.seq_len:
        click.echo(f"{len(data)} bytes are more than one window: the model starts again every {config.seq_len}.")
    if view.note(config):
        click.echo(f"Here routes are decided on the prefix alone. Otherwise: {view.note(config)}")


@_refusing(OSError)
def _model(run):
    """(model, step) of the last checkpoint of a run."""
    from tinymoe.training.loading import load_checkpoint
    if os.path.isfile(run):
        raise click.UsageError(f"{run} is a file: give the folder of a run")
    return load_checkpoint(run)


@main.command()
@click.argument("run", type=PATH)
@click.option("--text", type=click.Path(), help="Show the first bytes of this file instead of validation windows.")
@_out_option("The page to write.  [default: RUN/view.html]", _file)
@_import_option
@_refusing(OSError)
def view(run, text, out, imports):
    """Write an HTML page of the routes over the steps of a run.

    It shows text by layer and expert and needs no network. Without saved routings, or with --text, it shows what the
    last checkpoint does.
    """
    from tinymoe.files import write_atomically
    from tinymoe.tools import view as v
    path, page = out or run / "view.html", v.page(run, text)
    write_atomically(path, page, follow=bool(out))  # a link in the folder may have come with it
    click.echo(f"{path} ({len(page.encode()) / 1e6:.1f} MB): open it in a browser")


@main.command()
@click.argument("out", type=FOLDER)
@click.option("--port", type=click.IntRange(0, 65535), default=8321, help="The port of the page; 0: any free one.")
@_refusing(OSError)
def watch(out, port):
    """Serve a page that follows the runs in folder OUT as they train.

    It shows losses, loads and routes, on this machine alone (127.0.0.1), and only reads. Ctrl-C ends it.
    """
    from tinymoe.tools.watch import serve
    try:
        server = serve(out, port)
    except OSError as error:
        raise click.ClickException(f"port {port}: {error.strerror}: choose another; 0 takes a free one") from None
    with server:
        click.echo(f"http://127.0.0.1:{server.server_port} follows {out}; Ctrl-C ends it")
        server.serve_forever()


@main.command()
@click.argument("run", type=PATH)
@click.option("--prompt", required=True, help="The text to continue.")
@click.option("--length", "-n", type=COUNT, default=256, help="Bytes to add.")
@click.option("--temperature", type=float, default=1.0, help="Below 1 favours likely bytes; 0 takes the likeliest.")
@click.option("--top", type=COUNT, help="Draw only among the N likeliest bytes.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="The same seed gives the same text.")
@_import_option
def generate(run, prompt, length, temperature, top, seed, imports):
    """Continue a text, byte by byte, with the model of a run.

    Each byte is routed on the prefix alone.
    """
    (model, step), data = _model(run), prompt.encode("utf-8", "surrogateescape")
    from tinymoe import kernels
    from tinymoe.model.generate import generate as sample
    kernels.set_threads(1)  # one window is too little work to share; the text is the same
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character appears when its last byte is there

    def show(raw, final=False):
        text = decoder.decode(raw, final)
        click.echo("".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text), nl=False)

    with _refusing(ValueError, usage=True):
        drawn = sample(model, data, length, temperature, rng=seed, top=top)
    show(data)
    try:
        for byte in drawn:
            show(bytes([byte]))
    finally:  # an error starts a line of its own
        show(b"", final=True)
        click.echo()
    _say(f"checkpoint of step {step:,}")  # not into the text where that goes to a file


@main.command()
@click.option("--router", default="top_k", help="The router of the example.",
              shell_complete=_names("moe.routers", "ROUTERS"))
@click.option("--seed", type=click.IntRange(min=0), help="Seed of other numbers.  [default: those of docs/explain.md]")
@click.option("--step", is_flag=True, help="Wait for a key after each part.")
@click.option("--figure", type=click.Path(), callback=_picture,
              help="Draw one token through router, experts and sum into this file.")
@_import_option
@_set_option
@_refusing(OSError)
def explain(router, seed, step, figure, imports, overrides):
    """Work out one layer on four tokens, number by number.

    It shows scores, choice, gates, which experts ran, their outputs, the balance loss and its gradient, and what a
    capacity limit drops. The same is computed by hand beside it.
    """
    from tinymoe import kernels
    from tinymoe.tools.explain import SEED, Example
    (model, training), before = _settings(overrides), kernels.active()
    kernels.use("numpy")  # for four tokens there is no need to compile
    try:
        with _refusing(ValueError, usage=True):
            example = Example({"router": router} | model | training, SEED if seed is None else seed)
        if figure:
            from tinymoe.study.figures import save
            from tinymoe.tools.explain import draw
            save(draw(example), figure, follow=True)
        for part in example.parts():
            click.echo(part)
            if step:
                click.pause("")
    finally:
        kernels.use(before)


@main.command()
@click.option("--only", metavar="TEXT", help="Check only what has this text in its name.")
@_import_option
def gradcheck(only, imports):
    """Compare every gradient with finite differences."""
    from tinymoe.tools import checks
    rows = []
    for row in checks.run_all(only):
        click.echo(row.line())
        rows.append(row)
    if not rows:
        raise click.UsageError(f"--only {only}: no check has this in its name; run without it for the list")
    failed = [row.name for row in rows if not row.ok]
    worst = max(row.error for row in rows)
    plural = "s" if len(rows) > 1 else ""
    click.echo(f"\n{len(rows)} check{plural}, largest relative error {worst:.1e}, {len(failed)} failed")
    if failed:
        raise SystemExit(1)


def _sizes(context, option, values):
    """Each N,D,E,K as keyword arguments of ExpertBank.benchmark."""
    found = [re.fullmatch(",".join([r"(\d{1,9})"] * 4), value) for value in values]
    for value, match in zip(values, found):
        if not match or 0 in (numbers := list(map(int, match.groups()))) or numbers[3] > numbers[2]:
            raise click.BadParameter(f"{value!r} is not N,D,E,K (four whole numbers from 1 to 999999999, K at most E)")
    return [dict(zip(("n_tokens", "d_model", "n_experts", "top_k"), map(int, match.groups()))) for match in found]


@main.command()
@click.option("--quick", is_flag=True, help="The two smallest sizes of the expert backends, and no scaling.")
@click.option("--profile", is_flag=True, help="Only the training step, operation by operation.")
@click.option("--sizes", multiple=True, callback=_sizes, metavar="N,D,E,K",
              help="Only the expert backends, at N tokens, width D, E experts, K a token. Repeatable.")
@click.option("--threads", type=COUNT, help="Threads of the kernels.  [default: one for each core]")
@click.option("--repeats", type=COUNT, default=7, help="Timings of each number, whose median is shown; the profile is "
              "a mean over three times as many steps.")
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON, one a line, instead of tables.")
@_out_option("Folder of the rows and figures.", default=RESULTS / "bench")
@_set_option
@_refusing(OSError, ValueError)
def bench(quick, profile, sizes, threads, repeats, as_json, out, overrides):
    """Time experts and training steps, and PyTorch if it is there.

    With --set it times only the step, of a model with these settings: --set n_layers=4 --set d_model=64 --set d_ff=256
    --set 'moe_layers=[1,3]' is that of most experiments.
    """
    from tinymoe import kernels
    from tinymoe.tools import bench as b
    if sizes and (quick or profile or overrides) or quick and (profile or overrides):
        raise click.UsageError("--sizes times the experts alone, --profile and --set the step alone, --quick a part of "
                               "all: give one of them")
    step, measured = _timed_step(overrides), functools.partial(_measured, out, as_json)
    warning = b.busy()  # before this program itself is a load
    if threads:
        with _refusing(ValueError, usage=True, about="--threads: "):
            kernels.set_threads(threads)
    compiled = kernels.compile_all("float32")
    if warning:
        _say(f"Warning: {warning}")
    if not as_json:
        click.echo(f"compiled in {compiled:.1f} s (kept for the next time); {b.describe(b.machine())}")
    if not (profile or overrides):
        rows = measured("ladder", b.ladder(sizes or (b.LADDER[:2] if quick else b.LADDER), repeats), {
            "n_tokens": "8", "d_model": "7", "n_experts": "9", "top_k": "5", "backend": "<8", "pass": "<18",
            "first_ms": "9.1f", "ms": "9.2f", "relative": "8.3f", "difference": "10.1e"}, b.draw_ladder)
        if not as_json:
            click.echo("ms: the median; first_ms: the first call, which compiles; relative: over naive, below 1 is "
                       "faster.\ndifference: the largest from naive. The loop is timed at the first size alone.")
        if max(row["difference"] or 0 for row in rows) > 1e-3:
            raise click.ClickException("the backends disagree: see the column difference")
    if not (profile or sizes):
        measured("step", b.three_ways(*step, repeats), {"step": "<28", "ms": "9.1f", "relative": "8.3f"})
        if beyond := b.beyond_pytorch(step[0]):
            _say(f"No row for PyTorch: the model in bench_pytorch.py has no {', '.join(beyond)}")
    if not sizes:
        peak = b.sgemm_gflops()
        rows = [row | {"sgemm_gflops": peak, "sgemm_threads": kernels.get_threads()}
                for row in b.step_profile(*step, 3 * repeats)]
        measured("profile", rows, {"operation": "<28", "calls": "6.0f", "ms": "9.2f", "share": "6.1%",
                                   "gflops": "8.1f", "sgemm_gflops": "12.0f"}, b.draw_profile)
    if not (profile or overrides or sizes or quick):
        measured("scaling", b.scaling(repeats=repeats),
                 {"against": "<10", "value": "6g", "ms": "9.1f", "relative": "8.2f"}, b.draw_scaling)
    if not as_json:
        click.echo(f"\nrows and figures in {out}")


def _measured(out, as_json, name, rows, columns, draw=None):
    """Print these columns of the rows as they come; write them, draw them and return them."""
    from tinymoe.tools.bench import write
    shown, kept = itertools.tee(rows)
    if not as_json:
        click.echo()
        _table(columns, ([row[key] for key in columns] for row in shown))
    rows = write(out, name, kept)
    if as_json:
        click.echo("\n".join(json.dumps({"table": name} | row) for row in rows))
    if draw:
        draw(rows, out / f"{name}.png")
    return rows


def _timed_step(overrides):
    """(ModelConfig, batch size) of the step that `bench` times. Raises click.UsageError for other settings."""
    from tinymoe.model.config import ModelConfig
    from tinymoe.training.plan import TrainConfig
    model, training = _settings(overrides)
    if training.keys() - {"batch_size"}:
        raise click.UsageError(f"--set {min(training)}: a timed step has the settings of the model and batch_size")
    with _refusing(ValueError, TypeError, usage=True):
        return ModelConfig(**model), TrainConfig(**training).batch_size


def run():
    """The program: Ctrl-C ends it at once, also while it imports; `_train` has an answer of its own."""
    signal.signal(signal.SIGINT, _end_at_once)
    main()


if __name__ == "__main__":
    run()
