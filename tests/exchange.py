"""Expert parallelism for real: processes that hold a part of the experts and of the tokens each, to check `traffic`
with.

Device d of P holds experts d E/P to (d + 1) E/P and tokens d N/P to (d + 1) N/P. A layer sends each token once to every
device that holds one of its experts (dispatch). Each device runs its experts, adds up what they give a token, weighted
by the gates, and sends the sum back (combine).
"""

import multiprocessing

import numpy as np

from tinymoe import ExpertBank, Tensor, no_grad
from tinymoe.moe.routing import from_mask


def exchange(bank, x, routing, n_devices):
    """bank(x, routing) computed by n_devices processes that hold a part of the experts and of the tokens each.

    Returns y (N, D), and the rows (P, P) that were really sent, to be compared with `traffic`. x: (N, D) array.
    """
    token_at, expert_at = (np.arange(n) * n_devices // n for n in (len(x), bank.n_experts))
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
    for ends in links.values():  # so that the others end too when a worker dies
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
    """Send a value and receive the other side's. One side sends first, and all use their links in one order: a pipe has
    little room, and two processes that both wait for room would wait for ever."""
    if first:
        link.send(value)
        return link.recv()
    got = link.recv()
    link.send(value)
    return got


def _run(weights, activation, x, gates):
    """sum over this device's experts e of gates[:, e] FFN_e(x)"""
    n_experts, d_model, d_ff = weights[0].shape
    bank, gates = (
        ExpertBank(n_experts, d_model, d_ff, activation=activation, backend="numpy", dtype=x.dtype),
        Tensor(gates),
    )
    bank.w1, bank.b1, bank.w2, bank.b2 = map(Tensor, weights)
    with no_grad():
        return bank(Tensor(x), from_mask(gates.data != 0, gates, gates, gates)).data
