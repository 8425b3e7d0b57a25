"""Training: the loop of one run. It takes a batch, learns from it, and now and then evaluates, logs and saves.

A RunPlan (plan.py) holds the ModelConfig, the TrainConfig and the seed of a run. `evaluate` (evaluation.py) measures
the loss and the routers on validation windows.
"""

import json
import math
import time

import numpy as np

from .. import kernels
from ..moe import metrics
from .evaluation import Validation, evaluate, first_nonfinite, first_windows, losses_by_part, measured
from .identity import RunError, describe, machine
from .loading import first_model, trainable
from .optim import AdamW, clip_gradients, learning_rate, no_decay_names
from .plan import Event, RunPlan
from .run_folder import RunFolder

TRAINING_NUMBERS = ("train_loss", "cross_entropy", "balance", "z", "gradient_norm")  # in every row; null if unknown


class NonFiniteLoss(Exception):
    """The loss or a gradient is no longer finite. step: when; layer: where it began."""

    def __init__(self, step, layer, reason):
        super().__init__(f"{reason} at step {step}, beginning in {layer}; lower the learning rate")
        self.step, self.layer, self.reason = step, layer, reason


class Trainer:
    """The state of a run: its model, optimizer, random generators and log. Raises ValueError where `trainable` does."""

    def __init__(self, model, plan: RunPlan, corpus):
        self.model, self.plan, self.corpus = model, plan, corpus
        self.parameters = trainable(model, plan)
        self.optimizer = AdamW(self.parameters, weight_decay=plan.training.weight_decay,
                               no_decay=no_decay_names(self.parameters))
        continued = [1] if plan.start else []  # a continued run draws new batches
        self.generators = {"data": np.random.default_rng([plan.seed, 1, *continued]),
                           "noise": np.random.default_rng([plan.seed, 2, *continued])}
        self.step, self.seconds, self.rows = 0, 0.0, []
        self.wall_started = time.perf_counter()  # a resumed run sets it back by the time it had (checkpoint.py)
        self.since_row = []  # the numbers of each step since the last row of the log, by name
        self.initial_divergence = [metrics.weight_divergence(layer.experts) for layer in model.moe_parts()]

    @np.errstate(all="ignore")  # numbers that are not finite are found below, and raised as NonFiniteLoss
    def learn(self, ids, targets, domain=None) -> float:
        """Take one step of the optimizer; returns the cross-entropy before it. Raises NonFiniteLoss."""
        started, c = time.perf_counter(), self.plan.training
        self.step += 1
        self.optimizer.lr = learning_rate(self.step, c.steps, c.learning_rate, c.warmup)
        output = self.model.forward(ids, training=True, rng=self.generators["noise"], domain=domain)
        terms = self.model.loss_terms(output, targets)
        if not np.isfinite(terms.total.data):
            where = first_nonfinite(self.model, ids, domain) or "the loss"
            raise NonFiniteLoss(self.step, where, "the loss is not finite")
        self.optimizer.zero_grad()
        terms.total.backward(retain_graph=False)
        norm = clip_gradients(self.parameters, c.max_norm)
        if not math.isfinite(norm):
            bad = [name for name, p in self.parameters.items() if p.grad is not None and not np.isfinite(p.grad).all()]
            # the backward pass goes from the last parameter to the first
            raise NonFiniteLoss(self.step, (bad or ["the norm"])[-1], "the gradient is not finite")
        self.optimizer.step()
        self.model.after_step(output.routings)
        loss = terms.cross_entropy.item()
        self.since_row.append({"train_loss": terms.total.item(), "cross_entropy": loss, "gradient_norm": norm,
                               **{name: term.item() for name, term in terms.terms.items()}})
        self.seconds += time.perf_counter() - started
        return loss

    def advance(self) -> float:
        """One step: draw a batch and learn from it."""
        batch_size, seq_len = self.plan.training.batch_size, self.plan.model.seq_len
        return self.learn(*self.corpus.labelled_batch(self.generators["data"], batch_size, seq_len))

    def evaluate_and_save(self, folder: RunFolder):
        """Evaluate the model, add a row to the log, and save the state."""
        valid = self.validation(self.plan.training.eval_windows)
        row, routings, _ = self.evaluate(valid)
        warnings = []
        for part, numbers in zip(self.model.moe_parts(), row["layers"]):
            warnings += metrics.alarms(numbers["layer"], numbers["load"], row["validation_tokens"],
                                       part.router if self.step else None)
        self.rows.append({"step": self.step, "seconds": round(self.seconds, 3),
                          "learning_rate": self.optimizer.lr if self.step else None,
                          **self._means_since_row(), **row, "warnings": warnings})
        folder.save(self, first_windows(valid, routings))

    def _means_since_row(self):
        """Means of the training numbers since the last row, by name; None for a term that has no finite value."""
        steps = self.since_row or [{}]
        self.since_row = []
        names = list(dict.fromkeys([*TRAINING_NUMBERS, *(name for numbers in steps for name in numbers)]))
        means = np.mean([[numbers.get(name, math.nan) for name in names] for numbers in steps], axis=0)
        # NaN where a step lacks the term; a term that is NaN itself has coefficient 0, else the run would have stopped
        return {name: mean if math.isfinite(mean) else None for name, mean in zip(names, means.tolist())}

    def validation(self, n_windows: int) -> Validation:
        """n_windows validation windows of each domain, spread over its validation text."""
        windows = self.corpus.validation(n_windows, self.plan.model.seq_len)
        return Validation(*windows, self.corpus.names, self.plan.training.batch_size)

    @np.errstate(all="ignore")
    def evaluate(self, valid: Validation):
        """(row, routings, nats) as evaluation.evaluate returns them. Raises NonFiniteLoss."""
        found = evaluate(self.model, valid, self.initial_divergence)
        try:
            json.dumps(found[0], allow_nan=False)
        except ValueError:
            layer = first_nonfinite(self.model, valid.ids, valid.domain) or "the loss"
            raise NonFiniteLoss(self.step, layer, "the validation loss is not finite") from None
        return found

    @property
    def wall_seconds(self) -> float:
        """Seconds since the run began, without those between an interruption and the next start."""
        return time.perf_counter() - self.wall_started


def train(plan: RunPlan, corpus, folder, on_event=lambda event: None, fresh=False) -> dict:
    """Train a run in `folder`, from its checkpoint if there is one. Returns the summary, a dict.

    A finished run is left as it is. on_event is called with an Event when the run is resumed and after every step.
    fresh: throw away what the run left in the folder; a str throws it away once, however often train is called with it.
    Raises RunError, files.CheckpointError, CorpusError, and NonFiniteLoss, which failure.json records.
    """
    folder = RunFolder(folder)
    config = describe(plan, corpus)
    if summary := folder.finished(config, fresh):  # without the lock, so that a read-only folder will do
        return summary
    kernels.compile_all(np.float32)  # before training: every process then reads the same code, and has the same bits
    with folder.locked():
        if summary := folder.finished(config, fresh):  # another process has trained it, and this one waited
            return summary
        try:  # build the model first: running out of memory must not delete files
            trainer = Trainer(first_model(plan, folder.path.parent), plan, corpus)
        except (ValueError, TypeError) as error:
            raise RunError(str(error)) from None
        folder.create(config | {"parameters": trainer.model.count_parameters()} | machine(), fresh)
        return _train_to_the_end(trainer, folder, on_event)


def _train_to_the_end(trainer, folder, on_event):
    plan, evaluation_steps = trainer.plan, trainer.plan.training.evaluation_steps()

    def report(kind, loss=0.0):
        on_event(Event(kind, plan.run_id, trainer.step, loss, steps=plan.training.steps))

    try:
        if not folder.resume(trainer):
            trainer.evaluate_and_save(folder)
        elif trainer.step:
            report("resumed")
        while trainer.step < plan.training.steps:
            loss = trainer.advance()
            if trainer.step in evaluation_steps:
                trainer.evaluate_and_save(folder)
            report("step", loss)
        valid = trainer.validation(plan.training.final_windows)
        final, _, nats = trainer.evaluate(valid)
    except NonFiniteLoss as error:
        folder.end("failure.json", {"run_id": plan.run_id, **vars(error)})
        raise
    summary = {"run_id": plan.run_id, "config_id": plan.config_id, "seed": plan.seed, "steps": trainer.step,
               "status": "complete", "seconds": round(trainer.seconds, 3),
               "wall_seconds": round(trainer.wall_seconds, 3), "final": {"step": trainer.step, **final},
               "causal_by_part": losses_by_part(nats, valid)}
    if plan.measure:
        summary["measured"] = measured(plan.measure, trainer, final)
    folder.end("summary.json", summary)
    return summary
