"""Traffic by hand, by brute force, and against a real exchange between processes."""
import numpy as np
import pytest

from exchange import exchange
from tinymoe import ExpertBank, RouteContext, Tensor
from tinymoe.moe import devices as comm
from tinymoe.moe import routers
from tinymoe.moe.routing import from_mask


def routing(gates):
    gates = Tensor(np.array(gates, float))
    return from_mask(gates.data != 0, gates, gates, gates)


# Four tokens, four experts, two devices: tokens 0, 1 and experts 0, 1 lie on device 0.
HAND = [[1, 1, 0, 0],       # stays at home: one row, though it has two experts
        [0, 1, 0, 1],       # stays, and goes to device 1
        [1, 0, 0, 0],       # goes to device 0
        [0, 0, 0, 0]]       # goes nowhere


def test_traffic_by_hand():
    t = comm.traffic(routing(HAND), 2, d_model=3, bytes_per_number=4)
    assert t.rows.tolist() == [[2, 1], [1, 0]] and t.reach.tolist() == [1, 2, 1, 0]
    assert t.load.tolist() == [4, 1] and t.slowest == 4 / 2.5
    assert t.sent.tolist() == [[0, 12], [12, 0]] and t.total_bytes == 48 and t.largest_link == 12
    # 12 bytes out and in at 6 bytes a second, twice, and four assignments of 10 operations at 20 a second
    assert t.seconds(bandwidth=6, flops=20, flops_per_assignment=10) == 2 * 2 + 2
    half = comm.traffic(routing(HAND), 2, d_model=3, bytes_per_number=0.5)  # states of 1.5 bytes
    assert half.total_bytes == 6 and half.largest_link == 1.5


def test_on_one_device_nothing_is_sent():
    t = comm.traffic(routing(HAND), 1, 3)
    assert t.total_bytes == 0 and t.largest_link == 0 and t.slowest == 1 and t.rows.tolist() == [[3]]


@pytest.mark.parametrize("n_devices, message", [(3, "3 devices .*4 tokens"), (8, "8 devices")])
def test_devices_share_equally(n_devices, message):
    with pytest.raises(ValueError, match=message):
        comm.traffic(routing(HAND), n_devices, 3)


def routed(name="top_k", k=2, n=24, d=6, e=8, **options):
    rng = np.random.default_rng(0)
    router = routers.make(name, d, e, k, dtype=np.float64, router_std=1.0, **options)
    x = rng.standard_normal((n, d))
    return x, router(Tensor(x), RouteContext())


@pytest.mark.parametrize("n_devices", [2, 4, 8])
def test_traffic_against_a_double_loop(n_devices):
    x, r = routed()
    t, pairs = comm.traffic(r, n_devices, 6), set()
    for token, expert in zip(r.token, r.expert):
        pairs.add((token, token // (24 // n_devices), expert // (8 // n_devices)))
    rows = np.zeros((n_devices, n_devices), int)
    for _, here, there in pairs:
        rows[here, there] += 1
    np.testing.assert_array_equal(t.rows, rows)
    assert t.load.sum() == 48 and t.reach.sum() == len(pairs)


def test_group_limits_bound_the_devices_a_token_reaches():
    free, limited = (comm.traffic(routed(k=4, n=64, **options)[1], 4, 6)
                     for options in ({}, dict(n_groups=4, group_limit=2)))
    assert free.reach.max() > 2 and limited.reach.max() == 2 and limited.total_bytes < free.total_bytes


@pytest.mark.parametrize("n_devices, n, d", [
    (2, 1024, 64),  # half a megabyte: more than a pipe holds
    pytest.param(4, 24, 6, marks=pytest.mark.slow)])
def test_the_real_exchange_gives_the_same_output_and_sends_what_was_simulated(n_devices, n, d):
    x, r = routed(n=n, d=d)
    bank = ExpertBank(8, d, 5, dtype=np.float64, seed=3)
    y, rows = exchange(bank, x, r, n_devices)
    np.testing.assert_allclose(y, bank(Tensor(x), r).data, atol=1e-12)
    np.testing.assert_array_equal(rows, comm.traffic(r, n_devices, d).rows)


def test_the_busiest_device_decides_and_not_the_busiest_link():
    """Device 0 sends a row to each of two others: 8 bytes at 1 a second, out and in again."""
    rows = np.array([[0, 1, 1], [0, 0, 0], [0, 0, 0]])
    for each in (rows, rows.T):
        t = comm.Traffic(each, np.array([0, 1, 1]), np.array([2]), row_bytes=4)
        assert t.seconds(bandwidth=1, flops=1, flops_per_assignment=0) == 16 and t.largest_link == 4
