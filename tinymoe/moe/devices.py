"""Expert parallelism: what a Routing costs when its experts lie on several devices.

Experts and tokens lie on P devices in equal runs. A layer sends each token once to every device that holds one of its
experts (dispatch). Each device runs its experts, adds up what they give a token, weighted by the gates, and sends the
sum back (combine). All of it follows from the Routing alone.
"""

from dataclasses import dataclass

import numpy as np

from .routing import Routing


@dataclass(frozen=True)
class Traffic:
    """What the forward pass of one layer sends, and what it waits for.

    rows (P, P) int: token states that the dispatch sends from device to device, and the combine back. Those on the
        diagonal stay on their device, which costs nothing.
    load (P,) int: assignments that each device computes.
    reach (N,) int: devices that each token goes to, its own included if one of its experts lies there.
    row_bytes: bytes of one state.
    """

    rows: np.ndarray
    load: np.ndarray
    reach: np.ndarray
    row_bytes: float

    @property
    def sent(self) -> np.ndarray:
        """(P, P) bytes of the dispatch from device to device; 0 on the diagonal."""
        return self.row_bytes * (self.rows - np.diag(np.diag(self.rows)))

    @property
    def total_bytes(self) -> float:
        """Bytes of dispatch and combine, over all links."""
        return (2 * self.sent.sum()).item()

    @property
    def largest_link(self) -> float:
        """Bytes of the dispatch over the busiest pair of devices."""
        return self.sent.max().item()

    @property
    def slowest(self) -> float:
        """The largest load of a device over the mean: 1 at balance, P where one device does all the work."""
        return float(self.load.max() / self.load.mean()) if self.load.any() else 1.0

    def seconds(self, bandwidth: float, flops: float, flops_per_assignment: float) -> float:
        """Seconds of the critical path: dispatch, the experts of the slowest device, combine.

        bandwidth: bytes a second that a device can send, and receive at the same time; the busiest device decides.
        flops: floating-point operations a second of a device. flops_per_assignment: 4 D F for two matrices.
        """
        phase = max(self.sent.sum(axis=0).max(), self.sent.sum(axis=1).max()) / bandwidth
        return float(2 * phase + self.load.max() * flops_per_assignment / flops)


def traffic(routing: Routing, n_devices: int, d_model: int, bytes_per_number: float = 4) -> Traffic:
    """The Traffic of a Routing over n_devices. Raises ValueError unless n_devices divides E and N."""
    token_at, expert_at = homes(routing.n_tokens, n_devices, "tokens"), homes(routing.n_experts, n_devices, "experts")
    reached = np.zeros((routing.n_tokens, n_devices), bool)
    reached[routing.token, expert_at[routing.expert]] = True
    rows = np.zeros((n_devices, n_devices), int)
    np.add.at(rows, token_at, reached)
    return Traffic(rows, np.bincount(expert_at[routing.expert], minlength=n_devices), reached.sum(axis=1),
                   d_model * bytes_per_number)


def homes(n: int, n_devices: int, what: str) -> np.ndarray:
    """(n,) the device of each of n tokens or experts, in equal runs. ValueError where they do not divide."""
    if n_devices < 1 or n % n_devices:
        raise ValueError(f"{n_devices} devices do not share {n} {what} equally: choose a divisor")
    return np.repeat(np.arange(n_devices), n // n_devices)
