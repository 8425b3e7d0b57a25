"""Expert parallelism: what a Routing costs when its experts lie on several devices, and the exchange itself.

Device d of P holds experts d E/P to (d + 1) E/P and tokens d N/P to (d + 1) N/P. A layer sends each token once to
every device that holds one of its experts (dispatch), each device runs its experts and adds up what they give a token,
weighted by the gates, and sends that sum back (combine). All of it follows from the Routing alone.
"""

import multiprocessing
from dataclasses import dataclass

import numpy as np

from .experts import ExpertBank
from .routing import from_mask
from ..autograd.tensor import Tensor, no_grad


@dataclass(frozen=True)
class Traffic:
    """What one layer's forward pass moves and waits for.

    rows (P, P) int: token states sent from device to device in the dispatch, as many in the combine the other way;
        the diagonal is what stays at home, which costs nothing.
    load (P,) int: assignments that each device computes.
    reach (N,) int: devices that each token goes to, its own included where an expert of its lies there.
    row_bytes: of one state.
    """

    rows: np.ndarray
    load: np.ndarray
    reach: np.ndarray
    row_bytes: int

    @property
    def sent(self):
        """(P, P) bytes of the dispatch from device to device, without what stays at home."""
        return self.row_bytes * (self.rows - np.diag(np.diag(self.rows)))

    @property
    def total_bytes(self):
        """Bytes of dispatch and combine together, over all links."""
        return 2 * int(self.sent.sum())

    @property
    def largest_link(self):
        """Bytes of the dispatch over the busiest pair of devices."""
        return int(self.sent.max())

    @property
    def slowest(self):
        """The largest load of a device over the mean: 1 at balance, P where one device does all the work."""
        return float(self.load.max() / self.load.mean()) if self.load.any() else 1.0

    def seconds(self, bandwidth, flops, flops_per_assignment):
        """The critical path: dispatch, the slowest device's experts, combine.

        bandwidth: bytes a second that a device sends, and receives at the same time; a phase lasts until the busiest
        device is done. flops: floating-point operations a second of a device; 4 D F for one assignment to an
        expert of two matrices.
        """
        phase = max(self.sent.sum(axis=0).max(), self.sent.sum(axis=1).max()) / bandwidth
        return float(2 * phase + self.load.max() * flops_per_assignment / flops)


def traffic(routing, n_devices, d_model, bytes_per_number=4):
    """The Traffic of a Routing over n_devices. Raises ValueError unless n_devices divides E and N."""
    token_at, expert_at = homes(routing.n_tokens, n_devices, "tokens"), homes(routing.n_experts, n_devices, "experts")
    reached = np.zeros((routing.n_tokens, n_devices), bool)
    reached[routing.token, expert_at[routing.expert]] = True
    rows = np.zeros((n_devices, n_devices), int)
    np.add.at(rows, token_at, reached)
    return Traffic(rows, np.bincount(expert_at[routing.expert], minlength=n_devices), reached.sum(axis=1),
                   d_model * bytes_per_number)


def homes(n, n_devices, what):
    """(n,) the device of each of n tokens or experts, in equal runs."""
    if n_devices < 1 or n % n_devices:
        raise ValueError(f"{n_devices} devices do not share {n} {what} equally: choose a divisor")
    return np.repeat(np.arange(n_devices), n // n_devices)


# -- the exchange itself, between processes -----------------------------------------------------

def exchange(bank, x, routing, n_devices):
    """bank(x, routing) computed by n_devices processes that hold a part of the experts and of the tokens each.

    Returns y (N, D), and the rows (P, P) that were really sent, to be compared with `traffic`. x: (N, D) array.
    """
    token_at, expert_at = homes(len(x), n_devices, "tokens"), homes(bank.n_experts, n_devices, "experts")
    gates, chosen = routing.to_dense().data, routing.mask()
    context = multiprocessing.get_context("spawn")
    links = {(p, q): context.Pipe() for p in range(n_devices) for q in range(p + 1, n_devices)}
    pipes, workers = [], []
    for d in range(n_devices):
        mine = {q: links[min(d, q), max(d, q)][d > q] for q in range(n_devices) if q != d}
        here = expert_at == d
        weights = [w.data[here] for w in (bank.w1, bank.b1, bank.w2, bank.b2)]
        pipe, far_end = context.Pipe()
        workers.append(context.Process(target=_device, daemon=True, args=(
            d, far_end, mine, weights, bank.activation, x[token_at == d], gates[token_at == d],
            chosen[token_at == d], expert_at)))
        workers[-1].start()
        far_end.close()
        pipes.append(pipe)
    for ends in links.values():  # so that a worker that dies ends the others, instead of leaving them to wait
        for end in ends:
            end.close()
    try:
        parts = [pipe.recv() for pipe in pipes]
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
    return np.concatenate([y for y, _ in parts]), np.stack([sent for _, sent in parts])


def _device(d, result, links, weights, activation, x, gates, chosen, expert_at):
    """One device: dispatch its tokens, run its experts on what arrives, combine what comes back."""
    goes = {q: np.flatnonzero(chosen[:, expert_at == q].any(axis=1)) for q in [d, *links]}
    leaving = {q: (x[rows], gates[rows][:, expert_at == q]) for q, rows in goes.items()}
    arrived = {q: _swap(link, d < q, leaving[q]) for q, link in links.items()} | {d: leaving[d]}
    done = {q: _run(weights, activation, *states) for q, states in arrived.items()}
    back = {q: _swap(link, d < q, done[q]) for q, link in links.items()} | {d: done[d]}
    y = np.zeros_like(x)
    for q in sorted(goes):
        y[goes[q]] += back[q]
    result.send((y, [len(goes[q]) for q in sorted(goes)]))


def _swap(link, first, value):
    """Send a value and get the other side's. One side sends first, and all go through their links in one order: a pipe
    holds only so much, and two that both wait for room would wait for ever."""
    if first:
        link.send(value)
        return link.recv()
    got = link.recv()
    link.send(value)
    return got


def _run(weights, activation, x, gates):
    """sum over this device's experts e of gates[:, e] FFN_e(x)"""
    n_experts, d_model, d_ff = weights[0].shape
    bank, gates = ExpertBank(n_experts, d_model, d_ff, activation, "numpy", dtype=x.dtype), Tensor(gates)
    bank.w1, bank.b1, bank.w2, bank.b2 = map(Tensor, weights)
    with no_grad():
        return bank(Tensor(x), from_mask(gates.data != 0, gates, gates, gates)).data
