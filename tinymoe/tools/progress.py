"""How far runs are while they train: a bar in a terminal, lines without one."""

import os
import time

import click


class Progress:
    """A bar over the steps of all runs, with losses and the time left; without a terminal, a line every half minute."""

    INTERVAL = 30  # seconds between two lines

    def __init__(self, runs, clock=time.monotonic):
        self.steps = {run.run_id: run.training.steps for run in runs}
        self.reached = dict.fromkeys(self.steps, 0)
        self.losses = {}  # of the runs that train now
        self.clock, self.terminal = clock, os.isatty(1)
        self.started, self.trained, self.printed = None, 0, 0.0  # time starts at the first step, after compiling
        self.bar = click.progressbar(length=sum(self.steps.values()), label="training", show_eta=True,
                                     item_show_func=lambda _: "  ".join(f"{r} {x:.3f}" for r, x in self.losses.items()))

    def note(self, event):
        run = event.run_id
        new = (event.step if event.kind in ("step", "resumed") else self.steps[run]) - self.reached[run]
        self.reached[run] += new
        if event.kind == "step":
            self.losses[run] = event.loss
            self.count(new)
        elif event.kind == "resumed":
            click.echo(("\r\x1b[K" if self.terminal else "") + f"{run}: resumed from step {event.step}")
        else:
            self.losses.pop(run, None)
            if not self.terminal:
                click.echo(f"{run}: {event.kind}")
        self.bar.update(new, event)

    def count(self, steps):
        """Count steps of training. Without a terminal, print a line when one is due."""
        now = self.clock()
        if self.started is None:
            self.started = self.printed = now
            return
        self.trained += steps
        if not self.terminal and now - self.printed >= self.INTERVAL:
            self.printed = now
            done, total = sum(self.reached.values()), sum(self.steps.values())
            left = (now - self.started) / max(1, self.trained) * (total - done)
            training = "; ".join(f"{r} step {self.reached[r]}, loss {loss:.3f}" for r, loss in self.losses.items())
            click.echo(f"{done / total:.0%}, {duration(left)} left: {training}")


def duration(seconds) -> str:
    """Seconds as text: `40 s`, `12 min` or `3.4 h`."""
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"
