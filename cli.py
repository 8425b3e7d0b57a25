#!/usr/bin/env python3
"""The command line of tinymoe. Heavy imports are inside the commands, so that --help is instant."""

import json
import os
from pathlib import Path

import click

RESULTS = Path(__file__).resolve().parent / "results"


class _Commands(click.Group):
    """Ctrl-C ends any command with one line and exit code 130, as shells expect.

    Kernels that cannot be used end it with one line and exit code 1.
    """

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


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
def main():
    """Mixture-of-experts language models in NumPy: study, check and measure routing on a laptop's CPU."""


# -- study --------------------------------------------------------------------------------------

@main.command()
@click.option("--quick", is_flag=True, help="200 steps a config instead of 2,000.")
@click.option("--steps", type=click.IntRange(min=1), help="Training steps of each run.")
@click.option("--config", "configs", multiple=True, type=click.Choice(list("ABCDEF"), case_sensitive=False),
              help="Train only this config; repeat for several.  [default: all]")
@click.option("--seeds", type=click.IntRange(min=1), default=1, show_default=True,
              help="Runs of each config, seeds 0 to N - 1.")
@click.option("--jobs", type=click.IntRange(min=1), default=os.cpu_count(), show_default="number of cores",
              help="Runs side by side, each in a process with one thread.")
@click.option("--text", type=click.Path(),
              help="A file, or a folder whose entries are domains, instead of the default corpus; or: synthetic.")
@click.option("--out", type=click.Path(path_type=Path),
              help="Folder of the results.  [default: results/quick or results/full]")
@click.option("--plot", is_flag=True, help="Draw the figures at the end.")
@click.option("--plot-only", is_flag=True, help="Train nothing: draw figures and write findings from what is in --out.")
@click.option("--fresh", is_flag=True, help="Throw away what these runs left before, instead of going on from it.")
@click.option("--set", "overrides", multiple=True, metavar="NAME=VALUE",
              help="Change any field of ModelConfig or TrainConfig, e.g. --set n_experts=16.")
def study(quick, steps, configs, seeds, jobs, text, out, plot, plot_only, fresh, overrides):
    """Train configs A to F on real text and write up what their routers did.

    Interrupt at any time; run the same command again to resume from the last checkpoints.
    """
    from tinymoe.experiments import STUDY
    out = out or RESULTS / ("quick" if quick else "full")
    failures, all_runs = {}, []
    if not plot_only:
        all_runs = _study_runs(STUDY, configs, seeds, steps, STUDY.scales["quick" if quick else "default"], overrides)
        failures = _train(all_runs, out, text, jobs, fresh)
    if not all_runs or len(failures) < len(all_runs):
        results = _write_up(STUDY, out, plot or plot_only)
        click.echo("config  seeds  perplexity  (leaky)  bits per byte  load CV")
        for name, runs in results.groups.items():
            causal, leaky, bits, cv = (results.mean(metric, name) for metric in (
                "causal_perplexity", "val_perplexity", "causal_bits_per_byte", "load_cv"))
            leak = f"{leaky:.3f}" if leaky != causal else ""
            click.echo(f"{name:6}  {len(runs):5}  {causal:10.3f}  {leak:7}  {bits:13.3f}  {cv:7.3f}")
        click.echo(f"findings in {out / 'FINDINGS.md'}")
    if failures:
        raise SystemExit(1)


def _train(all_runs, out, text, jobs, fresh):
    """Train the runs with a progress bar, and say which failed; returns the messages of those."""
    from tinymoe.study import runner as s
    from tinymoe.training.data import CorpusError
    click.echo(f"{len(all_runs)} run(s) of {_steps(all_runs)} steps, {min(jobs, len(all_runs))} at a time -> {out}")
    if not s.kernels.is_compiled("float32"):
        click.echo("The kernels are compiled first, once on this machine: half a minute or more without progress.")
    try:
        with _Progress(all_runs) as progress:
            failures = s.run_study(all_runs, out, text, jobs, fresh, progress.note)
    except KeyboardInterrupt:
        raise SystemExit(_say("\nInterrupted. The same command goes on from the last checkpoints.", code=130))
    except (CorpusError, OSError) as error:
        raise click.ClickException(_one_line(error)) from None
    for run_id, message in failures.items():
        _say(f"Error: {run_id} failed: {message}")
    return failures


def _steps(all_runs):
    return " or ".join(map(str, sorted({run.training.steps for run in all_runs})))


def _study_runs(experiment, configs, seeds, steps, scale, overrides):
    """The runs that the options describe; click.UsageError for values that fit no model."""
    model, training = _settings(overrides)
    training = ({} if steps is None else {"steps": steps}) | training
    try:
        return experiment.runs(scale, seeds, list(dict.fromkeys(map(str.upper, configs))), model, training)
    except (ValueError, TypeError) as error:
        raise click.UsageError(_one_line(error)) from None


def _settings(overrides):
    """NAME=VALUE texts as (fields of ModelConfig, fields of TrainConfig); click.UsageError for what is neither."""
    import dataclasses

    from tinymoe.model.config import ModelConfig
    from tinymoe.training.trainer import TrainConfig
    model, training = {}, {}
    known = {field.name: part for cls, part in ((ModelConfig, model), (TrainConfig, training))
             for field in dataclasses.fields(cls)}
    for text in overrides:
        name, equals, value = text.partition("=")
        if name not in known or not equals:
            raise click.UsageError(f"--set {text}: write NAME=VALUE with one of {', '.join(sorted(known))}")
        try:
            known[name][name] = json.loads(value)
        except json.JSONDecodeError:
            known[name][name] = value
    return model, training


class _Progress:
    """A bar over the steps of all runs, with the losses of those that train now, and the time left."""

    def __init__(self, all_runs):
        self.reached = {run.run_id: 0 for run in all_runs}
        self.steps = {run.run_id: run.training.steps for run in all_runs}
        self.losses = {}

    def __enter__(self):
        self.bar = click.progressbar(length=sum(self.steps.values()), label="training", show_eta=True,
                                     item_show_func=lambda _: "  ".join(f"{r} {x:.3f}" for r, x in self.losses.items()))
        self.bar.__enter__()
        return self

    def note(self, event):
        if event.kind == "step":
            self.losses[event.run_id] = event.loss
        elif event.kind == "resumed":
            click.echo(f"{event.run_id}: resumed from step {event.step}")
        else:
            self.losses.pop(event.run_id, None)
            if not os.isatty(1):  # nobody watches the bar: one line a run
                click.echo(f"{event.run_id}: {event.kind}")
        reached = event.step if event.kind in ("step", "resumed") else self.steps[event.run_id]
        before, self.reached[event.run_id] = self.reached[event.run_id], reached
        self.bar.update(reached - before, event)

    def __exit__(self, *error):
        self.bar.__exit__(*error)


def _write_up(experiment, out, plot):
    """Write FINDINGS.md and summary.csv of the runs under `out`, then draw the figures; returns the Results."""
    from tinymoe.study import report
    from tinymoe.study.results import Results
    try:
        report.write_findings(experiment, out)
        report.write_summary_csv(out)
        results = Results(experiment, out)
        if plot:
            from tinymoe.study.figures import draw_all
            click.echo(f"{len(draw_all(results))} figure(s) in {out / 'figures'}")
            report.write_findings(experiment, out)  # again, to show the figures
    except (ValueError, OSError) as error:
        raise click.ClickException(_one_line(error)) from None
    return results


def _say(message, code=1):
    click.echo(message, err=True)
    return code


def _one_line(error):
    return " ".join(str(error).split())


# -- experiment ---------------------------------------------------------------------------------

@main.command()
@click.argument("name", required=False)
@click.option("--quick", "scale", flag_value="quick", help="60 steps and two seeds: does it run?")
@click.option("--full", "scale", flag_value="full", help="The study's model and 2,000 steps: hours.")
@click.option("--seeds", type=click.IntRange(min=1),
              help="Runs of each setting, seeds 0 to N - 1.  [default: 3; 2 with --quick]")
@click.option("--jobs", type=click.IntRange(min=1), default=os.cpu_count(), show_default="number of cores",
              help="Runs side by side, each in a process with one thread.")
@click.option("--text", type=click.Path(), help="A file or folder instead of the experiment's text, or: synthetic.")
@click.option("--out", type=click.Path(path_type=Path),
              help="Folder of the results.  [default: results/experiments/NAME; -quick and -full have their own]")
@click.option("--fresh", is_flag=True, help="Throw away what these runs left before, instead of going on from it.")
@click.option("--plot-only", is_flag=True, help="Train nothing: draw figures and write findings from what is in --out.")
def experiment(name, scale, seeds, jobs, text, out, fresh, plot_only):
    """Run an experiment and say what came out; without NAME, list them.

    Interrupt at any time; run the same command again to resume from the last checkpoints.
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
    failures = {} if plot_only else _train(runs, out, chosen.text if text is None else text, jobs, fresh)
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
    """Gather FOLDER/full and FOLDER/experiments into FOLDER/FINDINGS.md.

    The document holds the study, ten claims of the literature and open questions. FOLDER is results/published unless
    another is given: results, for runs of your own.
    """
    from tinymoe.experiments import EXPERIMENTS, STUDY
    from tinymoe.study import report
    try:
        click.echo(report.gather(folder, STUDY, EXPERIMENTS.values()))
    except (ValueError, OSError) as error:
        raise click.ClickException(_one_line(error)) from None


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
def compact(folder):
    """Write FOLDER/runs.jsonl, one line for each run in FOLDER/runs.

    A line holds the run's config, log and summary. Reports and figures read this file as they read the run folders,
    which stay where they are; delete them yourself if you only want to publish the numbers.
    """
    from tinymoe.study.results import compact as write_compact
    try:
        path, n = write_compact(folder)
    except (ValueError, OSError) as error:
        raise click.ClickException(_one_line(error)) from None
    click.echo(f"{n} runs in {path}")


# -- routers ------------------------------------------------------------------------------------

@main.command()
def routers():
    """List the routers: who chooses, what is balanced, what is causal, what is learned, what it costs."""
    from tinymoe.moe.routers import ROUTERS
    lines = [("name", "who chooses", "equal load", "causal", "learned", "cost a layer", "paper")]
    for name, router in ROUTERS.items():
        causal = {(True, True): "yes", (True, False): "not while training", (False, False): "no"}[
            router.causal, router.causal_training]
        learned = "yes" if router.learned else "no"
        lines.append((name, router.chooses, router.balanced, causal, learned, router.cost, router.paper))
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    click.echo("\nN tokens, D width, E experts. Causal: a token's route depends on its own prefix alone.\n"
               "python cli.py study --config D --set router=NAME --out results/NAME trains one.")


# -- params -------------------------------------------------------------------------------------

@main.command()
@click.argument("model", metavar="PRESET|FILE.json")
@click.option("--context", type=click.IntRange(min=0), default=0, show_default=True,
              help="Positions that a token attends to.")
@click.option("--bytes", "width", type=click.FloatRange(min=0, min_open=True), default=2, show_default=True,
              help="Memory of one parameter: 4 for float32, 2 for bfloat16, 0.5 for four bits.")
def params(model, context, width):
    """Count parameters, work and memory of a preset or of a model's config file, part by part.

    Presets: mixtral-8x7b, grok-1, olmoe-1b-7b, deepseek-v3. A file: a published config.json, or that of a run.

    Active is what one token meets, embedding and head included. FLOPs are of the forward pass of one token: two for
    each active weight of a matrix product, and attention over --context positions.
    """
    from tinymoe.model import counting as p
    try:
        if model in p.PRESETS:
            config = p.PRESETS[model]
        else:
            config = json.loads(Path(model).read_text(encoding="utf-8"))
            if not isinstance(config, dict):
                raise ValueError(f"{model} is not a JSON object")
            config = config.get("model", config)  # a run's config.json holds its model
        parts = p.count(p.architecture(config), context)
    except FileNotFoundError:
        raise click.ClickException(f"no file {model}, and no preset: those are {', '.join(p.PRESETS)}") from None
    except (OSError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError, MemoryError) as error:
        raise click.ClickException(f"{model}: {_one_line(error) or type(error).__name__}") from None
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
@click.option("--set", "overrides", multiple=True, metavar="NAME=VALUE",
              help="Change any field of ModelConfig or TrainConfig.")
def probe(router, steps, overrides):
    """Try what a router does to a small model: causality, neighbours in the batch, gradients, collapse."""
    from tinymoe.study import probes
    from tinymoe.model.config import ModelConfig
    from tinymoe.training.data import CorpusError, load_corpus
    from tinymoe.moe.routers import ROUTERS
    from tinymoe.training.trainer import NonFiniteLoss, TrainConfig
    small = {"d_model": 32, "d_ff": 64, "n_layers": 2, "moe_layers": (0, 1), "seq_len": 64, "router": router,
             "top_k": 1 if router in ROUTERS and ROUTERS[router].top_1_only else 2}
    model, training = _settings(overrides)
    try:
        config, training = ModelConfig(**small | model), TrainConfig(**{"steps": max(1, steps)} | training)
        if not config.moe_layers or config.seq_len < 2 or config.vocab_size < 256:
            raise ValueError("a probe needs a layer with experts, seq_len of at least 2 and vocab_size of at least 256")
        model, ids, targets = probes.trained(config, load_corpus(None, seq_len=config.seq_len), steps, training)
    except (ValueError, TypeError, MemoryError, CorpusError, NonFiniteLoss) as error:
        raise click.ClickException(_one_line(error)) from None

    def influence(what, found):
        click.echo(f"  {what:44} {found.tokens:6.1%} of tokens rerouted, logits change by up to {found.logits:.1e}")

    click.echo(f"{config.router} after {steps} steps, {len(ids)} sequences of {config.seq_len} bytes")
    click.echo("\nA later token changes an earlier one")
    influence("as evaluated", probes.causality(model, ids))
    influence("as trained", probes.causality(model, ids, training=True))
    influence("routed on the prefix alone", probes.causality(model, ids, causal=True))
    click.echo(f"  {'loss on the prefix alone, less as evaluated':44} {probes.flattery(model, ids, targets):+.5f} nats")
    click.echo("\nA sequence depends on its batch")
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
def route(run, text, gate, entropy, layers):
    """Show which expert each byte of TEXT goes to, in each MoE layer of the model in folder RUN.

    Routes are decided on the prefix alone. Below each byte stands its first choice, the expert with the largest gate.
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
        click.echo(f"{len(data)} bytes are more than one window: the model starts anew every {model.config.seq_len}.")
    said = view.note(model.config)
    if said:
        click.echo(f"These routes are decided on the prefix alone. Otherwise: {said}")


def _model(run):
    """The model of a run folder; one line and exit code 1 where there is none."""
    from tinymoe.files import CheckpointError
    from tinymoe.training.run_folder import load_model
    try:
        return load_model(run)
    except CheckpointError as error:
        raise click.ClickException(_one_line(error)) from None


# -- view ---------------------------------------------------------------------------------------

@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--text", type=click.Path(), help="Show the first bytes of this file instead of validation windows.")
@click.option("--out", type=click.Path(path_type=Path), help="The page to write.  [default: RUN/view.html]")
def view(run, text, out):
    """Write one HTML page: text by layer and expert, over the training steps of the run in folder RUN.

    It needs no network. A run without saved routings, or --text, is shown as its last checkpoint routes.
    """
    from tinymoe.tools import view as v
    from tinymoe.training.data import CorpusError
    from tinymoe.files import CheckpointError, write_whole
    from tinymoe.training.run_folder import FILES
    out = out or run / "view.html"
    if out.name in FILES:
        raise click.UsageError(f"--out {out}: that is a file of a run; a page ends in .html")
    try:
        page = v.page(run, text)
        write_whole(out, page)
    except (CheckpointError, CorpusError, OSError) as error:
        raise click.ClickException(_one_line(error)) from None
    click.echo(f"{out} ({len(page.encode()) / 1e6:.1f} MB): open it in a browser")


# -- generate -----------------------------------------------------------------------------------

@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="The text to continue.")
@click.option("--length", type=click.IntRange(min=1), default=256, show_default=True, help="Bytes to add.")
@click.option("--temperature", type=float, default=1.0, show_default=True,
              help="Below 1 is safer; 0 takes the likeliest.")
@click.option("--top", type=click.IntRange(min=1), help="Draw only among the N likeliest bytes.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="The same seed, the same text.")
def generate(run, prompt, length, temperature, top, seed):
    """Continue a text with the model in folder RUN, byte by byte, routed on the prefix alone."""
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

    try:
        drawn = sample(model, data, length, temperature, np.random.default_rng(seed), top)
    except ValueError as error:
        raise click.UsageError(_one_line(error)) from None
    show(data)
    for byte in drawn:
        show(bytes([byte]))
    show(b"", final=True)
    click.echo()


# -- gradcheck ----------------------------------------------------------------------------------

@main.command()
@click.option("--only", metavar="TEXT", help="Check only what has this text in its name.")
def gradcheck(only):
    """Compare every gradient with finite differences; exits 1 if any is wrong."""
    from tinymoe.tools import checks
    rows = []
    for row in checks.run_all(only):
        click.echo(row.line())
        rows.append(row)
    if not rows:
        raise click.UsageError(f"--only {only}: nothing has this in its name; run without it for the list")
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
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "bench",
              help="Folder of the rows and figures.")
def bench(quick, profile, repeats, out):
    """Time the expert backends, a training step three ways and by operation, and how the time grows."""
    from tinymoe.tools import bench as b
    try:
        seconds = b.kernels.compile_all("float32")
        click.echo(f"compiled in {seconds:.1f} s (kept for the next time); {_describe(b.machine())}")
        if not profile:
            _ladder(b, out, b.LADDER[:2] if quick else b.LADDER, repeats)
            _three_ways(b, out, repeats)
        _profile(b, out, repeats)
        if not (profile or quick):
            _scaling(b, out, repeats)
    except OSError as error:
        raise click.ClickException(_one_line(error)) from None
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
