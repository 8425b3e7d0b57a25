#!/usr/bin/env python3
"""The command line of tinymoe. Heavy imports are inside the commands, so that --help is instant."""

import contextlib
import json
import os
import sys
import time
from pathlib import Path

import click

HERE = Path(__file__).resolve().parent
RESULTS = (HERE if (HERE / "pyproject.toml").exists() else Path()) / "results"  # installed: in the current folder


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
            return super().invoke(context)
        except KeyboardInterrupt:
            raise SystemExit(_say("\nInterrupted.", code=130)) from None
        except ValueError as error:
            from tinymoe.kernels import KernelsError
            if isinstance(error, KernelsError):
                raise click.ClickException(str(error)) from None
            raise
        except click.ClickException as error:
            if "tinymoe" in sys.modules:  # the message may quote a file
                from tinymoe.files import printable
                error.message = printable(error.message)
            raise

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
def _refusing(*errors, usage=False):
    """Make one line of these exceptions: code 1, or 2 where the values that were given do not fit (usage)."""
    try:
        yield
    except errors as error:
        kind = click.UsageError if usage else click.ClickException
        raise kind(" ".join(str(error).split()) or type(error).__name__) from None


def _print_version(context, option, asked):
    if asked:
        import tinymoe
        click.echo(f"tinymoe {tinymoe.__version__}")
        context.exit()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]},
             epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.")
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version,
              help="Show the version and exit.")
def main():
    """Mixture-of-experts language models in NumPy: study, check and measure routing on a laptop's CPU."""


# -- options of several commands ----------------------------------------------------------------

def _folder(context, option, value):
    """A folder for results, as a Path: not the empty name, and one that can be written into reports."""
    if value is None or isinstance(value, Path):
        return value
    try:
        value.encode()
    except UnicodeEncodeError:
        raise click.BadParameter("the name must be valid UTF-8") from None
    if not value:
        raise click.BadParameter("the name of a folder is empty")
    return Path(value)


def _load_files(context, option, paths):
    """Run the files of --import; returns their absolute paths."""
    if paths:
        from tinymoe.moe import routers
        with _refusing(ValueError):
            for path in paths:
                routers.load_file(path)
    return tuple(str(Path(path).resolve()) for path in paths)


def _cores():
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _out_option(text, **settings):
    return click.option("--out", type=click.Path(), callback=_folder, help=text, **settings)


_import_option = click.option("--import", "imports", multiple=True, type=click.Path(), metavar="FILE.py", is_eager=True,
                              callback=_load_files, help="Run this file first: it defines a router or a loss.")
_set_option = click.option("--set", "overrides", multiple=True, metavar="NAME=VALUE",
                           help="Change a setting, e.g. n_experts=16; `options` lists them. Repeat for several.")


def _training_options(command):
    """The options of the commands that train many runs."""
    for option in reversed((
            click.option("--jobs", type=click.IntRange(min=1), default=_cores, show_default="number of cores",
                         help="Runs side by side, each in a process with one thread."),
            click.option("--text", type=click.Path(),
                         help="A file, a folder whose entries are domains, or: synthetic.  [default: installed texts]"),
            click.option("--fresh", is_flag=True, help="Delete what these runs left before, instead of resuming."),
            click.option("--plot-only", is_flag=True, help="Train nothing: draw and write from the rows in --out."),
            _import_option)):
        command = option(command)
    return command


def _settings(overrides):
    """NAME=VALUE texts as (fields of ModelConfig, fields of TrainConfig). Raises click.UsageError for other names.

    router.NAME=VALUE sets an option of the router, losses.NAME=VALUE the coefficient of a loss.
    """
    import dataclasses

    from tinymoe.model.config import ModelConfig
    from tinymoe.training.trainer import TrainConfig
    model, training = {}, {}
    known = {field.name: part for cls, part in ((ModelConfig, model), (TrainConfig, training))
             for field in dataclasses.fields(cls)}
    for text in overrides:
        name, equals, value = text.partition("=")
        with contextlib.suppress(ValueError, RecursionError):  # else it stays text
            value = json.loads(value)
        group, dot, key = name.partition(".")
        if dot and equals and group in ("router", "losses"):
            model.setdefault({"router": "router_options"}.get(group, group), {})[key] = value
        elif equals and name in known:
            known[name][name] = value
        else:
            raise click.UsageError(f"--set {text}: write NAME=VALUE with a name that `options` lists, such as steps, "
                                   "router.NAME for an option of the router, losses.NAME for a coefficient")
    return model, training


# -- study --------------------------------------------------------------------------------------

@main.command()
@click.option("--quick", is_flag=True, help="200 steps a config instead of 2,000.")
@click.option("--steps", type=click.IntRange(min=1), help="Training steps of each run.")
@click.option("--config", "configs", multiple=True, type=click.Choice(list("ABCDEF"), case_sensitive=False),
              help="Train only this config; repeat for several.  [default: all]")
@click.option("--seeds", type=click.IntRange(1, 1000), default=1, show_default=True,
              help="Runs of each config, seeds 0 to N - 1.")
@_out_option("Folder of the results.  [default: results/quick or results/full]")
@click.option("--plot", is_flag=True, help="Draw the figures at the end.")
@_training_options
@_set_option
def study(quick, steps, configs, seeds, jobs, text, out, plot, plot_only, fresh, imports, overrides):
    """Train configs A to F on real text and report what they did.

    Interrupt it at any time; the same command resumes from the last checkpoint.
    """
    from tinymoe.experiments import STUDY
    out = out or RESULTS / ("quick" if quick else "full")
    failures, all_runs = {}, []
    if not plot_only:
        all_runs = _study_runs(STUDY, configs, seeds, steps, STUDY.scales["quick" if quick else "default"], overrides)
        failures = _train(all_runs, out, text, jobs, fresh, imports)
    if not all_runs or len(failures) < len(all_runs):
        _print_study(_write_up(STUDY, out, plot or plot_only))
        click.echo(f"findings in {out / 'FINDINGS.md'}")
    if failures:
        raise SystemExit(1)


def _print_study(results):
    """The table of the configs on the screen. It shows the measured experts a byte: some routers do not fix K."""
    click.echo("config  seeds  perplexity  (leaky)  bits per byte  load CV  experts a byte")
    for name, runs in results.groups.items():
        causal, leaky, bits, cv, k = (results.mean(metric, name) for metric in (
            "causal_perplexity", "val_perplexity", "causal_bits_per_byte", "load_cv", "experts_per_token"))
        leak = f"{leaky:.3f}" if leaky != causal else ""
        click.echo(f"{name:6}  {len(runs):5}  {causal:10.3f}  {leak:7}  {bits:13.3f}  {cv:7.3f}  {k:14.2f}")


def _train(all_runs, out, text, jobs, fresh, imports):
    """Train the runs with a progress bar, and say which failed; returns the messages of those."""
    import dataclasses

    from tinymoe.files import printable
    from tinymoe.study import runner as s
    from tinymoe.training.data import CorpusError
    all_runs = [dataclasses.replace(run, imports=imports) for run in all_runs] if imports else all_runs
    steps = " or ".join(map(str, sorted({run.training.steps for run in all_runs})))
    click.echo(f"{len(all_runs)} run(s) of {steps} steps, {min(jobs, len(all_runs))} at a time -> {out}")
    if not s.kernels.is_compiled("float32"):
        click.echo("The kernels are compiled first, once on this machine: half a minute or more without progress.")
    try:
        with _refusing(CorpusError, OSError), Progress(all_runs) as progress:
            failures = s.run_study(all_runs, out, text, jobs, fresh, progress.note)
    except KeyboardInterrupt:
        raise SystemExit(_say("\nInterrupted. The same command resumes from the last checkpoints.", code=130)) from None
    for run_id, message in failures.items():
        _say(printable(f"Error: {run_id} failed: {message}"))
    return failures


def _study_runs(experiment, configs, seeds, steps, scale, overrides):
    """The runs that the options describe; click.UsageError for values that fit no model."""
    model, training = _settings(overrides)
    training = ({} if steps is None else {"steps": steps}) | training
    with _refusing(ValueError, TypeError, usage=True):
        return experiment.runs(scale, seeds, list(dict.fromkeys(map(str.upper, configs))), model, training)


class Progress:
    """A bar over the steps of all runs, with losses and the time left; without a terminal, a line every half minute."""

    INTERVAL = 30  # seconds between two lines

    def __init__(self, all_runs, clock=time.monotonic):
        self.steps = {run.run_id: run.training.steps for run in all_runs}
        self.reached = dict.fromkeys(self.steps, 0)
        self.losses = {}  # of the runs that train now
        self.clock, self.terminal = clock, os.isatty(1)
        self.trained = self.started = self.printed = None  # steps after the first; when it was, and the last line

    def __enter__(self):
        self.bar = click.progressbar(length=sum(self.steps.values()), label="training", show_eta=True,
                                     item_show_func=lambda _: "  ".join(f"{r} {x:.3f}" for r, x in self.losses.items()))
        self.bar.__enter__()
        return self

    def __exit__(self, *error):
        self.bar.__exit__(*error)

    def note(self, event):
        run, before = event.run_id, self.reached[event.run_id]
        self.reached[run] = event.step if event.kind in ("step", "resumed") else self.steps[run]
        if event.kind == "step":
            self.losses[run] = event.loss
            self.count(self.reached[run] - before)
        elif event.kind == "resumed":
            click.echo(("\r\x1b[K" if self.terminal else "") + f"{run}: resumed from step {event.step}")
        else:
            self.losses.pop(run, None)
            if not self.terminal:
                click.echo(f"{run}: {event.kind}")
        self.bar.update(self.reached[run] - before, event)

    def count(self, steps):
        """Count steps of training, and print a line when one is due. Time starts at the first step, after compiling."""
        now = self.clock()
        if self.started is None:
            self.trained, self.started, self.printed = 0, now, now
            return
        self.trained += steps
        if not self.terminal and now - self.printed >= self.INTERVAL:
            self.printed = now
            click.echo(self.line())

    def line(self):
        """How far all runs are, how long the rest takes, and the step and loss of each that trains now."""
        done, total = sum(self.reached.values()), sum(self.steps.values())
        left = (self.clock() - self.started) / max(1, self.trained) * (total - done)
        training = "; ".join(f"{r} step {self.reached[r]}, loss {loss:.3f}" for r, loss in self.losses.items())
        return f"{done / total:.0%}, {_duration(left)} left: {training}"


def _duration(seconds):
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def _write_up(experiment, out, plot):
    """Write FINDINGS.md and summary.csv of the runs under `out`, then draw the figures; returns the Results."""
    from tinymoe.study import report
    from tinymoe.study.results import Results
    with _refusing(ValueError, OSError):
        report.write_findings(experiment, out)
        report.write_summary_csv(out)
        results = Results(experiment, out)
        if plot:
            from tinymoe.study.figures import draw_all
            click.echo(f"{len(draw_all(results))} figure(s) in {out / 'figures'}")
            report.write_findings(experiment, out)  # again, to show the figures
    return results


# -- experiment ---------------------------------------------------------------------------------

@main.command()
@click.argument("name", required=False)
@click.option("--quick", "scale", flag_value="quick", help="60 steps and two seeds: does it run?")
@click.option("--full", "scale", flag_value="full", help="The study's model and 2,000 steps: hours.")
@click.option("--seeds", type=click.IntRange(1, 1000),
              help="Runs of each setting, seeds 0 to N - 1.  [default: 3; 2 with --quick]")
@_out_option("Folder of the results.  [default: results/experiments/NAME; -quick and -full have their own]")
@_training_options
def experiment(name, scale, seeds, jobs, text, out, fresh, plot_only, imports):
    """Run an experiment and report the result; list them all.

    Without NAME it lists the experiments. Interrupt it at any time; the same command resumes from the last checkpoints.
    """
    from tinymoe import experiments as lab
    from tinymoe.study import report
    if name is None:
        return _list_experiments(lab.EXPERIMENTS)
    if name not in lab.EXPERIMENTS:
        raise click.UsageError(f"no experiment {name}: choose one of {', '.join(lab.EXPERIMENTS)}")
    chosen = lab.EXPERIMENTS[name]
    size = chosen.scales[scale or "default"]
    if text is not None and chosen.text:
        raise click.UsageError(f"{name} is about its own text, {chosen.text}: leave --text out")
    out = out or RESULTS / f"experiments{'-' + scale if scale else ''}" / name
    runs = chosen.runs(size, seeds or size.seeds)
    failures = {} if plot_only else _train(runs, out, chosen.text if text is None else text, jobs, fresh, imports)
    results = _write_up(chosen, out, plot=True)
    lines = [click.wrap_text(f"- {line.replace('**', '')}", 100, subsequent_indent="  ")
             for line in (*report.warnings(results), *report.finding(results))]
    click.echo("\n".join(["", chosen.question, *lines, "", f"findings in {out / 'FINDINGS.md'}"]))
    if failures:
        raise SystemExit(1)


def _list_experiments(experiments):
    for name, each in experiments.items():
        click.echo(f"{name:14} {each.question}  ({len(each.settings)} settings)")
    click.echo("\npython cli.py experiment NAME runs one: three seeds, mostly 3 to 20 minutes on two idle cores.")


@main.command()
@click.argument("folder", type=click.Path(path_type=Path), default=RESULTS / "published")
def findings(folder):
    """Gather the study and the experiments into one document.

    It reads FOLDER/full and FOLDER/experiments and writes FOLDER/FINDINGS.md: the study, ten claims, open questions.
    FOLDER is results/published; for your own runs give results.
    """
    from tinymoe.experiments import EXPERIMENTS, STUDY
    from tinymoe.study import report
    with _refusing(ValueError, OSError):
        click.echo(report.gather(folder, STUDY, EXPERIMENTS.values()))


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
def compact(folder):
    """Put the runs of a folder into one file, runs.jsonl.

    It writes one line for each run in FOLDER/runs, with the run's config, log and summary. Reports and figures read
    this file as they read the run folders, which stay where they are.
    """
    from tinymoe.study.results import compact as write_compact
    with _refusing(ValueError, OSError):
        path, n = write_compact(folder)
    click.echo(f"{n} runs in {path}")


# -- routers, options ---------------------------------------------------------------------------

@main.command()
@_import_option
def routers(imports):
    """List the routers: who chooses, balance, causality, cost."""
    from tinymoe.moe.routers import ROUTERS
    lines = [("name", "who chooses", "equal load", "causal", "learned", "cost a layer", "paper")]
    for name, router in ROUTERS.items():
        causal = {(True, True): "yes", (True, False): "not while training", (False, False): "no"}[
            router.causal, router.causal_training]
        learned = "yes" if router.learned else "no"
        lines.append((name, router.chooses, router.balanced, causal, learned, router.cost, router.paper))
    _table(lines)
    click.echo("\nN tokens, D width, E experts. Causal: a token's route depends on its own prefix alone.\n"
               "`study --config D --set router=NAME --out results/NAME` trains one.")


@main.command()
@_import_option
def options(imports):
    """List what --set can change, with defaults and meanings.

    --set NAME=VALUE changes one: numbers, true, false, null, lists such as [1,3], or text.
    """
    import dataclasses

    from tinymoe.model.config import ModelConfig
    from tinymoe.moe.losses import LOSSES
    from tinymoe.moe.routers import ROUTERS
    from tinymoe.training.trainer import TrainConfig
    for config, what in ((ModelConfig, "the model"), (TrainConfig, "training")):
        fields = [(field.name, json.dumps(field.default), field.metadata.get("meaning", ""))
                  for field in dataclasses.fields(config)]
        _table([(what, "default", "meaning"), *fields])
        click.echo()
    takers = {}  # one line for each option, with the routers that take it
    for name, router in ROUTERS.items():
        for option, parameter in router.options().items():
            if option != "vocab_size":  # that is the model's
                meaning = router.meaning(option).split(". ")[0].rstrip(".")
                key = f"router.{option}", json.dumps(parameter.default), meaning
                takers.setdefault(key, []).append(name)
    _table([("options of the router", "default", "meaning"),
            *((*key[:2], f"{key[2]} ({', '.join(names)})") for key, names in sorted(takers.items()))])
    click.echo()
    _table([("coefficients of losses", "default", "meaning"),
            *((f"losses.{name}", "0.0", loss.meaning) for name, loss in LOSSES.items() if name != "balance")])


def _table(lines):
    """Print rows of cells in columns; the first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


# -- params -------------------------------------------------------------------------------------

@main.command()
@click.argument("model", metavar="PRESET|FILE.json")
@click.option("--context", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True,
              help="Positions that a token attends to.")
@click.option("--bytes", "width", type=click.FloatRange(0, 64, min_open=True), default=2, show_default=True,
              help="Memory of one parameter: 4 for float32, 2 for bfloat16, 0.5 for four bits.")
def params(model, context, width):
    """Count a model's parameters, FLOPs and memory, part by part.

    Presets: mixtral-8x7b, grok-1, olmoe-1b-7b, deepseek-v3. A file: a published config.json, or that of a run.

    Active parameters are those that one token uses, embedding and head included. FLOPs are those of the forward pass of
    one token: two for each active weight of a matrix product, and attention over --context positions.
    """
    from tinymoe.model import counting as p
    if model not in p.PRESETS and not Path(model).exists():
        raise click.ClickException(f"no file {model}, and no preset: choose one of {', '.join(p.PRESETS)}")
    try:
        config = p.PRESETS.get(model)
        if config is None:
            config = json.loads(Path(model).read_text(encoding="utf-8"))
            if not isinstance(config, dict):
                raise ValueError("not a JSON object")
            config = config.get("model", config)  # a run's config.json holds its model
        parts = p.count(p.architecture(config), context)
    except (OSError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError, MemoryError) as error:
        raise click.ClickException(f"{model}: {str(error) or type(error).__name__}") from None
    click.echo(f"{'':16} {'total':>18} {'active':>18} {'MFLOP a token':>14} {'GB':>9}")
    for part in parts:
        if part.total or part.flops:
            click.echo(f"{part.name:16} {part.total:18,} {part.active:18,.0f} {part.flops / 1e6:14,.1f} "
                       f"{part.total * width / 1e9:9.3f}")


# -- probe --------------------------------------------------------------------------------------

@main.command()
@click.argument("router")
@click.option("--steps", type=click.IntRange(min=0), default=50, show_default=True,
              help="Training steps before the probes.")
@_import_option
@_set_option
def probe(router, steps, imports, overrides):
    """Test a router on a small model: causality, gradients, collapse."""
    from tinymoe.model.config import ModelConfig
    from tinymoe.moe.routers import ROUTERS
    from tinymoe.study import probes
    from tinymoe.training.data import CorpusError, load_corpus
    from tinymoe.training.trainer import NonFiniteLoss, TrainConfig
    small = {"d_model": 32, "d_ff": 64, "n_layers": 2, "moe_layers": (0, 1), "seq_len": 64, "router": router,
             "top_k": 1 if router in ROUTERS and ROUTERS[router].top_1_only else 2}
    model, training = _settings(overrides)
    with _refusing(ValueError, TypeError, MemoryError, CorpusError, NonFiniteLoss):
        config, training = ModelConfig(**small | model), TrainConfig(**{"steps": max(1, steps)} | training)
        if not config.moe_layers or config.seq_len < 2 or config.vocab_size < 256:
            raise ValueError("a probe needs a layer with experts, seq_len of at least 2 and vocab_size of at least 256")
        model, ids, targets = probes.trained(config, load_corpus(None, seq_len=config.seq_len), steps, training)

    def influence(what, found):
        click.echo(f"  {what:44} {found.tokens:6.1%} of tokens rerouted, logits change by up to {found.logits:.1e}")

    click.echo(f"{', '.join(config.routers)} after {steps} steps, {len(ids)} sequences of {config.seq_len} bytes")
    click.echo("\nEffect of later tokens on earlier ones")
    influence("as evaluated", probes.causality(model, ids))
    influence("as trained", probes.causality(model, ids, training=True))
    influence("routed on the prefix alone", probes.causality(model, ids, causal=True))
    click.echo(f"  {'loss on the prefix alone, less as evaluated':44} {probes.flattery(model, ids, targets):+.5f} nats")
    click.echo("\nEffect of the other sequences of a batch")
    for what, found in probes.batch_independence(model, ids).items():
        influence(what, found)
    click.echo("\nNorm of the router's gradient, from")
    for term, (coefficient, norm) in probes.gradient_path(model, ids, targets).items():
        exactly = "  exactly zero" if norm == 0 else ""
        click.echo(f"  {f'{term}, coefficient {coefficient:g}':44} {norm:.2e}{exactly}")
    click.echo("\nMean score, short of the exact balanced assignment's (below 0: higher than balance allows)")
    for way, short in probes.assignment_shortfall(model, ids).items():
        click.echo(f"  {way:44} {short:+.5f}")
    click.echo("\nAlarms")
    click.echo("\n".join(f"  {warning}" for warning in probes.alarms(model, ids, targets) or ["none"]))


# -- route --------------------------------------------------------------------------------------

@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("text")
@click.option("--gate", is_flag=True, help="Show the gate of the first choice, as bars.")
@click.option("--entropy", is_flag=True, help="Show the entropy of the router's probabilities, as bars.")
@click.option("--layer", "layers", multiple=True, type=int,
              help="Show only this layer; repeat for several.  [default: all]")
@_import_option
def route(run, text, gate, entropy, layers, imports):
    """Show in the terminal which expert each byte of TEXT goes to.

    It shows each MoE layer of the model in folder RUN. Routes are decided on the prefix alone. Below each byte stands
    its first choice, the expert with the largest gate.
    """
    model, data = _model(run), text.encode("utf-8", "surrogateescape")
    from shutil import get_terminal_size

    from tinymoe.tools import view
    known = model.config.moe_layers
    if not data:
        raise click.UsageError("TEXT is empty: give at least one byte")
    if not known or not set(layers) <= set(known):
        wanted, there = (", ".join(map(str, some)) for some in (layers or ["all"], known or ["none"]))
        raise click.ClickException(f"--layer {wanted}: the layers of {run} with experts are {there}")
    colour = os.isatty(1) and not os.environ.get("NO_COLOR")
    for layer, routing in zip(known, view.prefix_routings(model, data)):
        if not layers or layer in layers:
            click.echo(f"layer {layer}, {routing.n_experts} experts")
            for line in view.lines(data, routing, colour, get_terminal_size((80, 24)).columns, gate, entropy):
                click.echo(line)
    bars = "; bars: ▁ 0 to █ 1, an entropy as a share of ln E, its largest" if gate or entropy else ""
    click.echo(f"-: no expert; ↵ newline, → tab, ¤ another control byte, · above 127{bars}")
    if len(data) > model.config.seq_len:
        click.echo(f"{len(data)} bytes are more than one window: the model starts again every {model.config.seq_len}.")
    if view.note(model.config):
        click.echo(f"These routes are decided on the prefix alone. Otherwise: {view.note(model.config)}")


def _model(run):
    """The model of a run folder."""
    from tinymoe.files import CheckpointError
    from tinymoe.training.run_folder import load_model
    with _refusing(CheckpointError):
        return load_model(run)


# -- view ---------------------------------------------------------------------------------------

@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--text", type=click.Path(), help="Show the first bytes of this file instead of validation windows.")
@click.option("--out", type=click.Path(path_type=Path), help="The page to write.  [default: RUN/view.html]")
@_import_option
def view(run, text, out, imports):
    """Write an HTML page of the routes over the steps of a run.

    It shows text by layer and expert and needs no network. Without saved routings, and with --text, it shows what the
    last checkpoint does.
    """
    from tinymoe.files import CheckpointError, write_atomically
    from tinymoe.tools import view as v
    from tinymoe.training.data import CorpusError
    out = out or run / "view.html"
    with _refusing(CheckpointError, CorpusError, OSError):
        if v.belongs_to_a_run(out):
            raise click.UsageError(f"--out {out} is a file of a run: choose a name that ends in .html")
        page = v.page(run, text)
        write_atomically(out, page, follow=True)
    click.echo(f"{out} ({len(page.encode()) / 1e6:.1f} MB): open it in a browser")


# -- generate -----------------------------------------------------------------------------------

@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="The text to continue.")
@click.option("--length", type=click.IntRange(min=1), default=256, show_default=True, help="Bytes to add.")
@click.option("--temperature", type=float, default=1.0, show_default=True,
              help="Below 1: more of the likely bytes; 0: always the likeliest.")
@click.option("--top", type=click.IntRange(min=1), help="Draw only among the N likeliest bytes.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="The same seed, the same text.")
@_import_option
def generate(run, prompt, length, temperature, top, seed, imports):
    """Continue a text, byte by byte, with the model of a run.

    Each byte is routed on the prefix alone.
    """
    from codecs import getincrementaldecoder

    model, data = _model(run), prompt.encode("utf-8", "surrogateescape")
    import numpy as np

    from tinymoe import kernels
    from tinymoe.model.generate import generate as sample
    kernels.set_threads(1)  # one window is too little work to share; the text is the same
    decoder = getincrementaldecoder("utf-8")("replace")  # a character appears when its last byte is there

    def show(raw, final=False):
        text = decoder.decode(raw, final)
        click.echo("".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text), nl=False)

    with _refusing(ValueError, usage=True):
        drawn = sample(model, data, length, temperature, np.random.default_rng(seed), top)
    show(data)
    for byte in drawn:
        show(bytes([byte]))
    show(b"", final=True)
    click.echo()


# -- gradcheck ----------------------------------------------------------------------------------

@main.command()
@click.option("--only", metavar="TEXT", help="Check only what has this text in its name.")
def gradcheck(only):
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
    click.echo(f"\n{len(rows)} checks, largest relative error {worst:.1e}, {len(failed)} failed")
    if failed:
        raise SystemExit(1)


# -- bench --------------------------------------------------------------------------------------

@main.command()
@click.option("--quick", is_flag=True, help="The two smallest sizes of the expert backends, and no scaling.")
@click.option("--profile", is_flag=True, help="Only the training step, operation by operation.")
@click.option("--repeats", type=click.IntRange(min=1), default=7, show_default=True,
              help="Timings of each number, of which the median counts; the profile is a mean of 3 N steps.")
@_out_option("Folder of the rows and figures.", default=RESULTS / "bench")
def bench(quick, profile, repeats, out):
    """Time experts, a training step three ways, and how both scale."""
    from tinymoe.tools import bench as b
    with _refusing(OSError):
        seconds = b.kernels.compile_all("float32")
        click.echo(f"compiled in {seconds:.1f} s (kept for the next time); {_describe(b.machine())}")
        if not profile:
            _ladder(b, out, b.LADDER[:2] if quick else b.LADDER, repeats)
            _three_ways(b, out, repeats)
        _profile(b, out, repeats)
        if not (profile or quick):
            _scaling(b, out, repeats)
    click.echo(f"\nrows and figures in {out}")


def _describe(machine):
    info = machine["thread_info"]
    blas = ", ".join("{name} {version} at {threads} thread(s)".format_map(pool) for pool in info["blas"])
    numba = f"numba {info['numba']} ({info['threading_layer']})" if info["numba"] else "NumPy kernels"
    return f"{machine['threads']} thread(s), {numba}, {blas}; {machine['processor']}, {machine['cores']} cores"


def _ladder(b, out, sizes, repeats):
    click.echo(f"\n{'N':>5} {'D':>4} {'E':>3} {'K':>2}  {'backend':8} {'pass':20} {'first ms':>9} {'ms':>9} "
               f"{'to naive':>9} {'difference':>11}")
    rows, naive = [], {}
    for row in b.ladder(sizes, repeats):
        rows.append(row)
        size = tuple(row[k] for k in ("n_tokens", "d_model", "n_experts", "top_k", "pass"))
        if row["backend"] == "naive":
            naive[size] = row["ms"]
        faster = f"{naive[size] / row['ms']:8.1f}x" if size in naive else ""
        click.echo("{:5} {:4} {:3} {:2}  ".format(*size) + f"{row['backend']:8} {row['pass']:20} "
                   f"{row['first_ms']:9.1f} {row['ms']:9.2f} {faster:>9} {row['difference']:11.1e}")
    b.write(out, "ladder", rows)
    b.draw_ladder(rows, out / "ladder.png")
    if max(row["difference"] for row in rows) > 1e-3:
        raise click.ClickException("the backends disagree: see the column difference")


def _three_ways(b, out, repeats):
    rows = b.three_ways(repeats=repeats)
    b.write(out, "step", rows)
    click.echo(f"\n{'one training step':28} {'ms':>9} {'faster':>8}")
    for row in rows:
        click.echo(f"{row['step']:28} {row['ms']:9.1f} {1 / row['relative']:7.1f}x")


def _profile(b, out, repeats):
    rows, peak = b.step_profile(repeats=3 * repeats), b.sgemm_gflops()
    rows = [row | {"sgemm_gflops": peak, "sgemm_threads": b.kernels.get_threads()} for row in rows]
    b.write(out, "profile", rows)
    b.draw_profile(rows, out / "profile.png")
    click.echo(f"\n{'one training step':28} {'calls':>6} {'ms':>8} {'share':>6} {'GFLOP/s':>8}   "
               f"(sgemm alone: {peak:.0f})")
    for row in rows:
        click.echo("{operation:28} {calls:6.0f} {ms:8.2f} {share:6.1%} {gflops:8.1f}".format_map(row))


def _scaling(b, out, repeats):
    rows = b.scaling(repeats=repeats)
    b.write(out, "scaling", rows)
    b.draw_scaling(rows, out / "scaling.png")
    click.echo(f"\n{'against':10} {'value':>6} {'ms':>9} {'relative':>9}")
    for row in rows:
        click.echo("{against:10} {value:6g} {ms:9.1f} {relative:8.2f}x".format_map(row))


if __name__ == "__main__":
    main()
