"""The transformer as a whole: gradients, causality, loss arithmetic, parameter counts, save and load, errors."""
import contextlib
import copy
import dataclasses
import hashlib
import itertools
import json
import pickle
import tracemalloc
from typing import Literal

import numpy as np
import pytest

import naive
import naive_routing
from tinymoe import ExpertBank, ModelConfig, RouteContext, Tensor, Transformer, gradcheck, nn, optim
from tinymoe.autograd import functional as F
from tinymoe.autograd import tensor
from tinymoe.files import CheckpointError, save_arrays
from tinymoe.layers.attention import CausalSelfAttention
from tinymoe.layers.latent_attention import LatentAttention
from tinymoe.model.counting import count
from tinymoe.model.generate import generate
from tinymoe.model.upcycling import upcycle
from tinymoe.moe import losses, routers, settings
from tinymoe.moe.layer import MoELayer
from tinymoe.moe.routers import ROUTERS
from tinymoe.moe.routing import from_mask, largest, limit_capacity
from tinymoe.training.evaluation import first_nonfinite

SMALL = dict(vocab_size=7, n_layers=2, d_model=4, n_heads=2, d_ff=6, seq_len=5, moe_layers=(1,), n_experts=3, top_k=2)
IDS = np.array([[0, 3, 6, 2, 5], [1, 1, 4, 0, 2]])
TARGETS = (IDS + 1) % 7



def model(seed=0, dtype=np.float64, scale=20, **changes):
    """A small model. scale: of its weights; at 20 the routers are decided and every part matters."""
    m = Transformer(ModelConfig(**SMALL | changes), seed, dtype)
    for p in m.parameters().values():
        p.data = (p.data * scale if p.ndim > 1 else p.data).astype(dtype)
    return m


# -- gradients and arithmetic -------------------------------------------------------------------

@pytest.mark.parametrize(
    "changes",
    [
        dict(moe_layers=()),
        dict(router_options=dict(renormalise=False), activation="silu"),
        dict(router="noisy_top_k", losses=dict(load=0.1)),
        pytest.param(dict(top_k=1, aux_coef=0.1), marks=pytest.mark.slow),
        pytest.param(dict(losses=dict(z=0.1, importance=0.1)), marks=pytest.mark.slow),
        pytest.param(dict(capacity_factor=0.75), marks=pytest.mark.slow),
        pytest.param(dict(router="expert_choice", top_k=1.5), marks=pytest.mark.slow),
    ],
)
def test_gradcheck_of_the_whole(changes):
    m = model(**changes)
    result = gradcheck(lambda *_: m.loss(IDS, TARGETS, True, np.random.default_rng(0)).total, *m.parameters().values())
    assert result, result


def test_loss_terms_add_up():
    m = model(router="noisy_top_k", moe_layers=(0, 1), aux_coef=.5, losses=dict(z=.25, importance=2., load=3.))
    output = m.forward(IDS, True, np.random.default_rng(0))
    terms = m.loss_terms(output, TARGETS)
    for name, loss in (
        ("balance", losses.load_balancing_loss),
        ("z", losses.z_loss),
        ("importance", losses.importance_loss),
        ("load", losses.load_loss),
    ):
        first, second = (loss(r).item() for r in output.routings)
        assert getattr(terms, name).item() == pytest.approx((first + second) / 2)       # the mean over MoE layers
    logits = output.logits.data.reshape(-1, 7)
    by_hand = np.mean([np.log(np.exp(row).sum()) - row[t] for row, t in zip(logits, TARGETS.ravel())])
    assert terms.cross_entropy.item() == pytest.approx(by_hand)
    assert terms.total.item() == pytest.approx(by_hand + .5 * terms.balance.item() + .25 * terms.z.item()
                                               + 2 * terms.importance.item() + 3 * terms.load.item())


def test_terms_without_a_coefficient():
    terms = model(aux_coef=0).loss(IDS, TARGETS)
    assert terms.total.item() == terms.cross_entropy.item() and terms.balance.item() > 0      # reported all the same
    assert terms.importance is None and terms.load is None
    dense = model(moe_layers=()).loss(IDS, TARGETS)
    assert dense.balance is None and dense.z is None and dense.total.item() == dense.cross_entropy.item()


def test_evaluation_with_a_load_coefficient():
    """noisy_top_k has no smooth load at evaluation; the loss must still be there."""
    terms = model(router="noisy_top_k", losses=dict(load=.1)).loss(IDS, TARGETS)
    assert terms.load is None and np.isfinite(terms.total.item())


def test_dense_only_has_no_routing_and_an_moe_layer_one_each():
    assert model(moe_layers=()).forward(IDS).routings == []
    routings = model(n_layers=4, moe_layers=(3, 0)).forward(IDS).routings
    assert [(r.n_tokens, r.n_experts) for r in routings] == [(10, 3)] * 2


def test_a_capacity_limit_is_applied_and_falls_away_for_causal_routing():
    m = model(
        router="noisy_top_k", scale=0, capacity_factor=0.5
    )  # all tie: experts 0 and 1 have all, C = ceil(.5 * 10 * 2 / 3) = 4
    assert m.forward(IDS).routings[0].load.tolist() == [4, 4, 0]
    assert m.forward(IDS, causal=True).routings[0].load.tolist() == [10, 10, 0]


def test_initial_loss_is_that_of_a_uniform_guess():
    ids = np.random.default_rng(0).integers(256, size=(2, 129))
    terms = Transformer(ModelConfig(n_layers=2, moe_layers=(1,), d_model=64)).loss(ids[:, :-1], ids[:, 1:])
    assert terms.cross_entropy.item() == pytest.approx(np.log(256), abs=.05)
    assert terms.balance.item() == pytest.approx(1, abs=.05)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("router", ["top_k", "noisy_top_k", "expert_choice"])
def test_dtype_is_kept_everywhere(router, dtype):
    m = model(dtype=dtype, router=router, losses=dict(z=.1, importance=.1), capacity_factor=1.0)
    rng = np.random.default_rng(0)
    terms = m.loss(IDS, TARGETS, True, rng)
    terms.total.backward()
    assert {t.dtype for t in (terms.total, terms.cross_entropy, *terms.terms.values())} == {np.dtype(dtype)}
    assert {p.grad.dtype for p in m.parameters().values() if p.requires_grad} == {np.dtype(dtype)}


# -- causality ----------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, call, leaks", [
    (dict(), {}, False), (dict(top_k=1), {}, False), (dict(router="noisy_top_k"), {}, False),
    (dict(router="expert_choice"), {}, True), (dict(router="expert_choice"), dict(causal=True), False),
    (dict(capacity_factor=.5), {}, True), (dict(capacity_factor=.5), dict(causal=True), False)])
def test_changing_later_tokens(changes, call, leaks):
    """Over all ways to change the last two tokens of the first sequence: do its earlier logits, or the second
    sequence's, move?"""
    m, moved = model(**changes), 0
    before = m.forward(IDS, **call).logits.data
    for a, b in np.ndindex(7, 7):
        ids = IDS.copy()
        ids[0, 3:] = a, b
        after = m.forward(ids, **call).logits.data
        moved = max(moved, np.abs(after - before)[0, :3].max(), np.abs(after - before)[1].max())
    assert (moved > 1e-3) if leaks else (moved < 1e-10)
    assert m.causal is (not leaks) or call


# -- configuration ------------------------------------------------------------------------------

@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(d_model=10, n_heads=4), "d_model 10 is not divisible by n_heads 4"),
        (dict(top_k=9), "top_k 9 .*n_experts 8"),
        (dict(top_k=0), "top_k 0"),
        (dict(top_k=float("nan")), "top_k nan"),
        (dict(top_k=1.5), "top_k 1.5 .*whole"),
        (dict(n_layers=0, moe_layers=()), "n_layers 0"),
        (dict(d_ff=2.5), "d_ff 2.5"),
        (dict(n_layers=0), "n_layers 0"),
        (dict(moe_layers=(6,)), r"moe_layers \(6,\).*5"),
        (dict(moe_layers=(-1,)), r"\(-1,\)"),
        (dict(capacity_factor=0), "capacity_factor 0"),
        (dict(capacity_factor=float("nan")), "capacity_factor nan"),
        (dict(router="topk"), "router 'topk'.*expert_choice"),
        (dict(activation="tanh"), "activation 'tanh'.*gelu"),
        (dict(drop_policy="last"), "drop_policy 'last'.*order"),
        (dict(expert_backend="gpu"), "expert_backend 'gpu'.*numba"),
        (dict(router="expert_choice", router_options=dict(jitter=0.1)), "jitter.*expert_choice"),
        (dict(norm_eps=0), "norm_eps 0 must be"),
        (dict(rope_theta=float("inf")), "rope_theta inf"),
        (dict(latent_eps=-1), "latent_eps -1"),
        (dict(losses=dict(load=0.1)), r"losses\.load.*noisy_top_k"),
        (dict(losses=dict(balance=0.1)), "aux_coef"),
        (dict(losses=dict(policy=1)), r"losses\.policy 1 must be 0 unless the router is one of reinforce$"),
        (dict(router="hash", losses=dict(similarity=0.1)), r"losses\.similarity 0.1 must be 0 unless .* top_k, "),
        (dict(router="real_bias", router_options=dict(n_real=3)), "n_real is no option of real_bias"),
        (dict(router="hash", router_options=dict(vocab_size=9)), "vocab_size is no option of hash"),
        (dict(losses=dict(zz=0.1)), "zz.*importance"),
        (dict(router=["top_k", "hash"]), "3 MoE layers"),
        (dict(router_options=dict(n_groups=2.5, group_limit=1)), "n_groups 2.5 must be a whole"),
        (dict(router_options=dict(renormalise=1)), "renormalise 1 must be true or false"),
        (dict(router=3), "router 3 must be a name"),
    ],
)
def test_impossible_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**changes)


def test_config_round_trip():
    config = ModelConfig(moe_layers=[5, 1, 5], router="expert_choice", top_k=1.5, capacity_factor=1.25)
    assert config.moe_layers == (1, 5)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="n_expert, topk"):
        ModelConfig.from_dict({"topk": 2, "n_expert": 4, "n_layers": 2})


def test_a_config_of_numpy_integers_can_be_written():
    config = ModelConfig(n_experts=np.int64(8), moe_layers=list(np.arange(1, 6, 2)), top_k=np.int64(2))
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == ModelConfig()
    config = ModelConfig(router_options={"jitter": np.float32(.5)}, losses={"z": np.float64(.1)})
    assert json.loads(json.dumps(config.to_dict()))["router_options"] == {"jitter": .5} and config.losses == {"z": .1}


# -- parameters, files --------------------------------------------------------------------------

def test_parameter_counts_by_hand():
    """V = 7, T = 5, D = 4, F = 6, E = 3, K = 2. Attention 4 (16 + 4) = 80, two norms 16; dense FFN 24 + 6 + 24 + 4 =
    58.

    Embeddings 28 + 20, dense block 80 + 16 + 58 = 154, MoE block 96 + router 12 + 3 * 58 = 282, last norm 8, head
    28: 520. A token meets two of the three experts: 520 - 58. Expert choice has three thresholds besides.
    """
    assert model().count_parameters() == {"total": 520, "active": 462}
    assert model(top_k=1.5, router="expert_choice").count_parameters()["active"] == 520 + 3 - 87
    assert model(moe_layers=()).count_parameters() == {"total": 520 - 12 - 2 * 58, "active": 520 - 12 - 2 * 58}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_save_and_load(tmp_path, dtype):
    m, path = model(dtype=dtype, router="noisy_top_k"), tmp_path / "model.npz"
    m.save(path)
    other = Transformer.load(path)
    assert other.config == m.config and list(tmp_path.iterdir()) == [path]
    np.testing.assert_array_equal(other.forward(IDS).logits.data, m.forward(IDS).logits.data)
    assert {p.dtype for p in other.parameters().values()} == {np.dtype(dtype)}


def test_a_link_is_written_through_and_stays(tmp_path):
    (tmp_path / "link.npz").symlink_to(tmp_path / "target.npz")
    model().save(tmp_path / "link.npz")
    assert (tmp_path / "link.npz").is_symlink() and Transformer.load(tmp_path / "target.npz").config == model().config


def spoilt(path, how):
    good, arrays = path.read_bytes(), {k: p.data for k, p in model().parameters().items()}
    if isinstance(how, int):
        return path.write_bytes(good[:how * len(good) // 100])
    if how == "text":
        return path.write_text("not a model")
    if how == "pickle":
        return np.savez(path, weights=np.array([{}], dtype=object))
    if how == "array":
        with open(path, "wb") as f:
            return np.save(f, np.ones(3))
    header = {"kind": "run" if how == "kind" else "model", "config": SMALL | ({"d_model": 8} if how == "shape" else {})}
    header |= {"unknown key": {"config": {"depth": 3}}, "no config": {"config": None}}.get(how, {})
    save_arrays(path, arrays if how != "a weight missing" else dict(list(arrays.items())[:-1]), header)


@pytest.mark.parametrize(
    "how",
    [0, 50, 99, "text", "pickle", "array", "kind", "shape", "unknown key", "no config", "a weight missing", "gone"],
)
def test_what_is_no_checkpoint_is_refused_by_name(tmp_path, how):
    path = tmp_path / "model.npz"
    model().save(path)
    path.unlink() if how == "gone" else spoilt(path, how)
    with pytest.raises(CheckpointError, match="model.npz"):
        Transformer.load(path)


@pytest.fixture
def little_memory():
    """Fails if more than 50 MB are allocated at once."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


@pytest.mark.parametrize("name", ROUTERS)
def test_a_config_allocates_nothing(name, little_memory):
    config = ModelConfig(n_experts=2_000_000_000, vocab_size=2_000_000_000, router=name, top_k=1)
    assert config.n_experts == 2_000_000_000


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(vocab_size=40_000_000), r"asks for 320,000,.* parameters, but the file holds 520 numbers"),
        (dict(n_experts=2_000_000_000), "numbers"),
        (dict(d_model=2_000_000), "numbers"),
        (dict(seq_len=10**9), "numbers"),
        (dict(n_layers=10_000), "numbers"),
        (dict(n_layers=2_000_000_000), "n_layers 2000000000 must be .* to 10,000"),
        (dict(n_shared=10**9), "numbers"),
        (dict(mtp_coef=0.1), "next_but_one.* is missing"),
        (dict(router="hash", vocab_size=10**9), "numbers"),
    ],
)
def test_a_config_that_asks_for_more_than_the_file_holds_is_refused_before_it_is_made(
    tmp_path, changes, message, little_memory
):
    path = tmp_path / "model.npz"
    save_arrays(
        path, {name: p.data for name, p in model().parameters().items()}, {"kind": "model", "config": SMALL | changes}
    )
    with pytest.raises(CheckpointError, match=message):
        Transformer.load(path)


def test_same_seed_same_bits():
    losses_ = [
        model(seed, np.float32, router="noisy_top_k").loss(IDS, TARGETS, True, np.random.default_rng(1))
        for seed in (3, 3, 4)
    ]
    for terms in losses_:
        terms.total.backward()
    assert losses_[0].total.item() == losses_[1].total.item() != losses_[2].total.item()


# -- modules ------------------------------------------------------------------------------------

def linear(n_in=2, n_out=3, seed=0):
    return nn.Linear(n_in, n_out, np.random.default_rng(seed), dtype=float)


class Held(nn.Module):
    """A module with the attributes that it is given."""

    def __init__(self, **attributes):
        vars(self).update(attributes)

    def forward(self, x):
        return x


def test_a_shared_module_is_listed_once_by_its_first_name():
    """Would have caught: AdamW, which moved its weights twice, and a norm of sqrt(2) where it is 1."""
    one = linear(1, 1)
    m = Held(a=one, inner=Held(b=one, own=linear()), again=[one.weight])
    assert list(m.parameters()) == ["a.weight", "a.bias", "inner.own.weight", "inner.own.bias"]
    one.weight.grad = np.ones((1, 1))
    assert optim.clip_gradients(m.parameters(), 5.0) == 1
    before = one.weight.item()
    optim.AdamW(m.parameters(), lr=0.1, weight_decay=0.0).step()
    assert one.weight.item() == pytest.approx(before - 0.1)


def test_modules_in_tuples_dicts_and_nested_lists_have_parameters():
    scale = nn.ones(2, float)
    m = Held(flat=[linear(), None], pair=(linear(), scale), by_name={"up": linear(), 1: [[linear()]]}, n=3, empty=[])
    assert list(m.parameters()) == [
        "flat.0.weight", "flat.0.bias", "pair.0.weight", "pair.0.bias", "pair.1", "by_name.up.weight",
        "by_name.up.bias", "by_name.1.0.0.weight", "by_name.1.0.0.bias"]
    assert repr(m) == "Held(38 parameters)" and repr(m.flat[0]) == "Linear(9 parameters)"


def test_a_result_that_is_kept_for_a_look_is_no_parameter(monkeypatch, tmp_path):
    """Would have caught: a saved file that could not be loaded, because last_probs was in it."""
    m = model(router="top_k")
    router, names = m.moe_parts()[0].router, list(m.parameters())
    forward = router.forward

    def keeping(x, context):
        routing = forward(x, context)
        router.last_probs = routing.probs
        return routing

    monkeypatch.setattr(type(router), "forward", lambda self, x, context: keeping(x, context))
    m.loss(IDS, TARGETS).total.backward(retain_graph=False)
    assert list(m.parameters()) == names and router.last_probs.shape == (10, 3)
    m.save(tmp_path / "model.npz")
    assert list(Transformer.load(tmp_path / "model.npz").parameters()) == names


def test_freeze_takes_one_name():
    """Would have caught: the letters of "weight", one of which is in every name."""
    m = Held(up=linear(), down=linear())
    nn.freeze(m, "up.")
    assert [name for name, p in m.parameters().items() if p.requires_grad] == ["down.weight", "down.bias"]
    with pytest.raises(ValueError, match="no parameter has 'router' in its name: choose from up.weight, "):
        nn.freeze(m, "router")


def test_a_trained_model_is_copied_and_pickled_with_its_gradients(monkeypatch):
    m = model(seed=1)
    m.loss(IDS, TARGETS).total.backward()
    optim.AdamW(m.parameters()).step()
    content = pickle.dumps(m)
    monkeypatch.setattr(tensor, "_clock", itertools.count())  # as in a new process
    for other in (pickle.loads(content), copy.deepcopy(m)):
        for name, p in other.parameters().items():
            np.testing.assert_array_equal(p.data, m.parameters()[name].data)
            np.testing.assert_array_equal(p.grad, m.parameters()[name].grad)
            assert not np.shares_memory(p.data, m.parameters()[name].data)
    terms = pickle.loads(content).loss(IDS, TARGETS)
    terms.total.backward()
    assert terms.total.item() == m.loss(IDS, TARGETS).total.item()


@pytest.mark.parametrize("make", [
    lambda rng: nn.Linear(2, 2, rng), lambda rng: nn.Embedding(2, 2, rng), lambda rng: nn.FeedForward(2, 2, rng),
    lambda rng: CausalSelfAttention(2, 1, rng), lambda rng: LatentAttention(2, 1, rng, kv_rank=2, rope_dim=2)])
def test_a_layer_takes_a_seed_and_draws_each_weight_anew(make):
    from_seed, again = make(3).parameters(), make(np.random.default_rng(3)).parameters()
    assert all((p.data == again[name].data).all() for name, p in from_seed.items())
    drawn = [p.data.ravel()[0] for p in from_seed.values() if p.ndim == 2]
    assert len(set(drawn)) == len(drawn)


def test_layers_take_arrays():
    x, layer, context = np.ones((10, 4)), model().moe_parts()[0], RouteContext(IDS)
    routing = layer.router(x, context)
    np.testing.assert_array_equal(routing.probs.data, layer.router(Tensor(x), context).probs.data)
    np.testing.assert_array_equal(layer.experts(x, routing).data, layer.experts(Tensor(x), routing).data)
    np.testing.assert_array_equal(layer(x, context)[0].data, layer(Tensor(x), context)[0].data)
    assert nn.LayerNorm(4, float)(x).data.tolist() == np.zeros((10, 4)).tolist()


@pytest.mark.parametrize("ids", [np.zeros((1, 6), int), np.zeros(5, int), np.zeros((1, 0), int), np.zeros((0, 4), int)])
def test_ids_of_a_wrong_shape(ids):
    with pytest.raises(ValueError, match="seq_len 5"):
        model().forward(ids)


def test_an_id_outside_the_vocabulary():
    with pytest.raises(IndexError, match="^ids run from 0 to 7, but vocab_size is 7: the model has the ids 0 to 6$"):
        model().forward(np.array([[0, 7]]))
    with pytest.raises(IndexError, match="ids run from -1 to 2"):
        model().forward([[-1, 2]])
    with pytest.raises(IndexError, match="must be integers, not dtype float64"):
        model().forward(np.array([[0., 1.]]))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name, value, where", [
    (None, None, None), ("blocks.0.norm1.weight", np.nan, "parameter blocks.0.norm1.weight"),
    ("blocks.1.feed_forward.experts.w2", 1e38, "layer 1"),
    ("blocks.0.attention.out.weight", 3e38, "layer 0"), ("head.weight", 3e38, "the head")])
def test_the_first_place_that_is_not_finite(name, value, where):
    m = model(dtype=np.float32)
    if name:
        m.parameters()[name].data[:] = value
    assert first_nonfinite(m, IDS) == where


# -- shared experts, other widths, upcycling ----------------------------------------------------

def test_copy_and_zero_experts_by_hand():
    """Columns: two experts, a copy, a zero. Gates 1/2 each: a token adds half of each of its experts' outputs."""
    config = ModelConfig(**SMALL | dict(n_experts=2, n_copy=1, n_zero=1, router="hash", losses={"global_batch": .1}))
    layer = Transformer(config, seed=1, dtype=np.float64).moe_parts()[0]
    table = np.zeros((7, 4))
    table[0, [0, 2]] = table[1, [1, 3]] = table[2, [2, 3]] = 1
    layer.router.table.data = table
    x = Tensor(np.random.default_rng(0).standard_normal((1, 3, 4)))
    y, routing = layer(x, RouteContext(np.array([[0, 1, 2]])))
    bank = layer.experts
    outputs = [F.activation(x[0] @ bank.w1[e] + bank.b1[e], "gelu") @ bank.w2[e] + bank.b2[e] for e in (0, 1)]
    wanted = [outputs[0][0] + x[0, 0], outputs[1][1], x[0, 2]]
    np.testing.assert_allclose(y.data[0], [row.data / 2 for row in wanted])
    assert routing.load.tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize("router", ["top_k", "real_bias", "expert_choice", "cosine_top_k"])
def test_copy_and_zero_experts_are_counted_without_parameters(router):
    config = ModelConfig(**SMALL | dict(n_copy=1, n_zero=2, router=router, losses={"global_batch": .1}))
    parts = {part.name: part.total for part in count(config)}
    assert parts["all"] == Transformer(config).count_parameters()["total"]
    with pytest.raises(ValueError, match="n_devices 3 must be 1 where there are copy or zero experts"):
        ModelConfig(**SMALL | dict(n_copy=1, n_devices=3))


def test_a_shared_expert_is_a_column_of_ones():
    """A shared expert added to what the others give equals a bank in which expert 0 serves every token with gate 1."""
    layer = Transformer(ModelConfig(**SMALL | dict(n_shared=1, d_expert=3)), seed=1, dtype=np.float64).moe_parts()[0]
    x = Tensor(np.random.default_rng(0).standard_normal((2, 5, 4)))
    y, routing = layer(x, RouteContext())
    bank, shared = ExpertBank(4, 4, 3, dtype=np.float64), layer.shared
    for name, own in (
        ("w1", shared.up.weight),
        ("b1", shared.up.bias),
        ("w2", shared.down.weight),
        ("b2", shared.down.bias),
    ):
        getattr(bank, name).data = np.concatenate([own.data[None], getattr(layer.experts, name).data])
    gates = Tensor(np.concatenate([np.ones((10, 1)), routing.to_dense().data], axis=1))
    both = bank(x.reshape(10, 4), from_mask(gates.data > 0, gates, gates, gates))
    np.testing.assert_allclose(y.data.reshape(10, 4), both.data, atol=1e-14)


def test_the_gate_of_the_shared_experts():
    """With w = (ln 3, 0, 0, 0) the token (1, 0, 0, 0) has the gate 3/4, the token 0 the gate 1/2. Two shared experts
    of width 5 are one layer of width 10, whose output is 8 for the first token and, from its bias, 2 for the second.
    """
    config = ModelConfig(**SMALL | dict(n_shared=2, d_shared=5, shared_gate=True))
    layer, routed = (Transformer(c, seed=1, dtype=np.float64).moe_parts()[0] for c in (config, ModelConfig(**SMALL)))
    assert layer.shared.up.weight.shape == (4, 10) and layer.shared_gate.weight.shape == (4, 1)
    layer.shared_gate.weight.data[:] = [[np.log(3)], [0], [0], [0]]
    x = Tensor(np.array([[[1.0, 0, 0, 0], [0, 0, 0, 0]]]))
    layer.shared = lambda x: 2 + 6 * x[..., :1]
    layer.router, layer.experts = routed.router, routed.experts
    added = layer(x, RouteContext())[0].data - routed(x, RouteContext())[0].data
    np.testing.assert_allclose(added, [[[6] * 4, [1] * 4]], atol=1e-14)
    for changes in (dict(shared_gate=True), dict(d_shared=5)):
        with pytest.raises(ValueError, match=f"{next(iter(changes))} .* must be left out where n_shared is 0"):
            ModelConfig(**SMALL | changes)


def test_fine_grained_experts_cost_what_the_coarse_ones_do():
    """Twice as many experts of half the width, twice as many active: the same weights, active and in all, but for
    biases and router."""
    coarse = Transformer(ModelConfig(**SMALL | dict(d_expert=6, top_k=1))).count_parameters()
    fine = Transformer(ModelConfig(**SMALL | dict(d_expert=3, top_k=2, n_experts=6))).count_parameters()
    d, e = 4, 3
    assert fine["total"] - coarse["total"] == d * e + d * e  # the router's columns, and a second b2 for each expert
    assert fine["active"] - coarse["active"] == d * e + d


@pytest.mark.parametrize("router", ["top_k", "sigmoid_bias"])
@pytest.mark.parametrize("changes", [{}, dict(bias=False, activation="swiglu")])
def test_an_upcycled_model_starts_as_the_dense_one(router, changes):
    dense = Transformer(ModelConfig(**SMALL | dict(moe_layers=()) | changes), seed=1, dtype=np.float64)
    model = upcycle(dense, ModelConfig(**SMALL | dict(router=router, moe_layers=(0, 1)) | changes), seed=5)
    np.testing.assert_allclose(model.forward(IDS).logits.data, dense.forward(IDS).logits.data, atol=1e-12)
    model.loss(IDS, TARGETS).total.backward()
    assert all(
        np.abs(p.grad).max() > 0 for name, p in model.parameters().items() if "w1" in name or "router.weight" in name
    )
    model.moe_parts()[0].experts.w1.data += 1                           # copies, not views
    assert (dense.forward(IDS).logits.data != model.forward(IDS).logits.data).any()


def test_top_1_is_not_renormalised_so_it_does_not_start_as_the_dense_one():
    dense = Transformer(ModelConfig(**SMALL | dict(moe_layers=())), seed=1, dtype=np.float64)
    model = upcycle(dense, ModelConfig(**SMALL | dict(top_k=1)))
    assert not np.allclose(model.forward(IDS).logits.data, dense.forward(IDS).logits.data)


@pytest.mark.parametrize("changes", [dict(d_ff=8), dict(n_shared=1), dict(n_copy=1), dict(n_zero=1), dict(d_expert=3),
                                     dict(n_layers=3)])
def test_what_does_not_fit_is_not_upcycled(changes):
    dense = Transformer(ModelConfig(**SMALL | dict(moe_layers=())))
    with pytest.raises(ValueError, match="same sizes"):
        upcycle(dense, ModelConfig(**SMALL | changes))
    with pytest.raises(ValueError, match="dense model"):
        upcycle(Transformer(ModelConfig(**SMALL)), ModelConfig(**SMALL))


# -- one router a layer, options, penalties, configs of version 0.1 -------------------------------

def test_each_moe_layer_may_have_a_router_of_its_own():
    config = ModelConfig(**SMALL | dict(n_layers=3, moe_layers=(0, 2), router=["hash", "noisy_top_k"], top_k=2,
                                        router_options={"jitter": .1}, losses={"load": .5}))
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    m = Transformer(config, dtype=np.float64)
    assert [part.router.name for part in m.moe_parts()] == ["hash", "noisy_top_k"]
    assert m.moe_parts()[1].router.jitter == 0.1 and [config.router_of(i) for i in range(3)] == [
        "hash",
        None,
        "noisy_top_k",
    ]
    output = m.forward(IDS, True, np.random.default_rng(0))
    terms = m.loss_terms(output, TARGETS)
    assert terms.load.item() == pytest.approx(losses.load_loss(output.routings[1]).item())  # of the layer that has one
    with pytest.raises(ValueError, match="gate_scale is no option of hash, noisy_top_k, which takes .*jitter"):
        dataclasses.replace(config, router_options={"gate_scale": 2.0})


@pytest.fixture
def penalised(monkeypatch):
    """A top-1 router with a term of its own and a state that grows by one in each step."""
    monkeypatch.setitem(ROUTERS, "penalised", None)  # which takes the name out again at the end

    class Penalised(routers.LinearRouter, name="penalised"):
        """strength: of the penalty."""

        shapes = {"weight": "DE", "count": "E"}

        def __init__(self, *args, strength: float = 2.0, **options):
            super().__init__(*args, **options)
            self.strength, self.count = strength, Tensor(np.zeros(self.weight.shape[1], self.weight.dtype))

        def forward(self, x, context):
            probs = F.softmax(logits := self.scores(x))
            return from_mask(largest(probs.data, 1), probs, logits, probs)

        def penalty(self, routing, context):
            return self.strength * (routing.probs ** 2).mean() * context.seq_len

        def after_step(self, routing):
            self.count.data = self.count.data + 1


def test_a_router_may_add_a_penalty_and_save_a_state(penalised, tmp_path):
    m = model(router="penalised", router_options={"strength": 3.0}, top_k=1, moe_layers=(0, 1), aux_coef=0)
    output = m.forward(IDS)
    terms = m.loss_terms(output, TARGETS)
    by_hand = np.mean([3 * (r.probs.data ** 2).mean() * IDS.shape[1] for r in output.routings])
    assert terms.penalty.item() == pytest.approx(by_hand)
    assert terms.total.item() == pytest.approx(terms.cross_entropy.item() + by_hand)
    assert gradcheck(lambda *_: m.loss(IDS, TARGETS).total, m.moe_parts()[0].router.weight).ok
    m.after_step(output.routings)
    m.save(tmp_path / "model.npz")
    assert (Transformer.load(tmp_path / "model.npz").moe_parts()[1].router.count.data == 1).all()
    assert routers.find("penalised").meaning("strength") == "of the penalty."
    with pytest.raises(ValueError, match="strength -1 must be a finite number of at least 0"):
        model(router="penalised", router_options={"strength": -1}, top_k=1)


def test_options_are_annotated_attributes_or_arguments(monkeypatch):
    for name in ("parent", "closed", "fixed"):
        monkeypatch.setitem(ROUTERS, name, None)

    class Parent(routers.LinearRouter, name="parent"):
        kind: Literal["hot", "cold"] = "hot"
        width: int | None = None
        temperature: float = 1.0
        paper: str = "an annotation makes no option of what describes a router"

    class Closed(Parent, name="closed"):
        def __init__(self, d_model, n_experts, top_k, rng, dtype, slope: float = 0.5):
            super().__init__(d_model, n_experts, top_k, rng, dtype)

    class Fixed(Parent, name="fixed"):
        kind = "cold"
        temperature: float = 2.0

    assert [list(cls.options()) for cls in (Parent, Closed, Fixed)] == [
        ["router_std", "kind", "width", "temperature"], ["slope"], ["router_std", "width", "temperature"]]
    assert Fixed.options()["temperature"].default == 2 and Parent.options()["kind"].default == "hot"
    made = routers.make("parent", 4, 4, kind="cold", width=3)
    assert (made.kind, made.width, made.temperature, Parent.kind) == ("cold", 3, 1.0, "hot")
    for name, options, message in (("parent", dict(kind="warm"), "kind 'warm' must be one of hot, cold"),
                                   ("parent", dict(width=1.5), "width 1.5 must be a whole number .*, or None"),
                                   ("parent", dict(temperature=-1), "temperature -1 must be a finite number"),
                                   ("fixed", dict(kind="hot"), "kind is no option of fixed"),
                                   ("closed", dict(kind="hot"), "kind is no option of closed, which takes slope"),
                                   ("parent", dict(paper="x"), "paper is no option")):
        with pytest.raises(ValueError, match=message):
            routers.make(name, 4, 4, **options)


def test_what_is_no_option_says_how_to_make_it_one(monkeypatch):
    monkeypatch.setitem(ROUTERS, "warm", None)

    class Warm(routers.TopK, name="warm"):
        temp = 0.3
        jitter = 0.0

    for make in (lambda **options: routers.make("warm", 4, 4, **options),
                 lambda **options: ModelConfig(router="warm", router_options=options)):
        with pytest.raises(ValueError, match="temp is no option of warm, .*annotate it .*`temp: float = 0.3`$"):
            make(temp=0.5)
        with pytest.raises(ValueError, match="jitter is no option of warm, .*: the class fixes it at 0.0$"):
            make(jitter=0.5)
        with pytest.raises(ValueError, match="cold is no option of warm, which takes [a-z_, ]*$"):
            make(cold=0.5)


@pytest.mark.parametrize("entry, message", [
    (lambda r, c: r.gate.sum(), r"LOSSES\['mine'\] is a function, but must be a Loss: write .* = Loss\("),
    (losses.Loss("by expert", lambda r, c: r.probs.mean(axis=0)), r"the loss mine returned a Tensor \(3,\), but"),
    (losses.Loss("a number", lambda r, c: 1.5), "the loss mine returned a float, but must return a scalar Tensor")])
def test_an_entry_of_the_losses_that_is_wrong_is_named(monkeypatch, entry, message):
    m = model()
    monkeypatch.setitem(losses.LOSSES, "mine", entry)
    with pytest.raises(ValueError, match=message):
        model(losses={"mine": .5}).loss(IDS, TARGETS)
    if not isinstance(entry, losses.Loss):
        with pytest.raises(ValueError, match=message):
            m.loss(IDS, TARGETS)


def test_a_penalty_that_is_no_scalar_is_named(monkeypatch):
    monkeypatch.setattr(routers.TopK, "penalty", lambda self, routing, context: routing.probs)
    with pytest.raises(ValueError, match=r"the loss penalty returned a Tensor \(10, 3\), but must return a scalar"):
        model().loss(IDS, TARGETS)


@pytest.mark.parametrize("targets", [TARGETS.T, TARGETS.reshape(-1), TARGETS[:, :4], TARGETS[:1]])
def test_targets_have_the_shape_of_the_ids(targets):
    with pytest.raises(ValueError, match=r"^targets have shape .*, but the ids \(2, 5\): each id needs the token"):
        model().loss(IDS, targets)
    assert model().loss(IDS.tolist(), TARGETS.tolist()).total.item() == model().loss(IDS, TARGETS).total.item()


def test_loss_terms_say_what_they_have():
    terms = model().loss(IDS, TARGETS)
    with pytest.raises(AttributeError, match="^LossTerms has no 'backward': it has total, cross_entropy, balance, z; "
                                             "for gradients call .total.backward()"):
        terms.backward()
    assert terms.multi_token is None and terms.balance is terms.terms["balance"]
    assert copy.copy(terms).balance is terms.balance  # which asks for attributes before there are any


def test_a_seed_stands_for_its_generator():
    noisy = model(router="noisy_top_k")
    one, other, third = (noisy.loss(IDS, TARGETS, True, rng).total.item() for rng in (1, np.random.default_rng(1), 0))
    assert one == other != third
    text = [list(generate(model(vocab_size=128), prompt, 4, rng=rng)) for prompt, rng in (
        (b"hello", 1), ("hello", np.random.default_rng(1)), (b"hello", None), (b"hello", 0))]
    assert text[0] == text[1] != text[2] == text[3]


@pytest.mark.parametrize("length", [-3, 1.5])
def test_a_length_below_0_is_refused(length):
    with pytest.raises(ValueError, match=f"length {length} must be a whole number of at least 0"):
        generate(model(), b"\1", length)
    assert list(generate(model(), b"\1", 0)) == []


@pytest.mark.parametrize("router, error", [("expert_choice", None), ("top_p", "threshold is missing")])
def test_only_expert_choice_may_lack_its_thresholds(router, error):
    """Files of before they were kept have none."""
    m = model(router=router, aux_coef=0.0)
    arrays = {name: p.data for name, p in m.parameters().items() if not name.endswith("router.threshold")}
    assert len(arrays) < len(m.parameters())
    with pytest.raises(ValueError, match=error) if error else contextlib.nullcontext():
        Transformer.from_arrays(m.config, arrays)


def test_a_tuple_among_options_is_a_list_as_in_a_file():
    config = ModelConfig(n_layers=2, moe_layers=(1,), router_options={"n_groups": 1}, losses={})
    object.__setattr__(config, "router_options", {"widths": (3, 4)})
    settings.check_fields(config)
    assert config.router_options == {"widths": [3, 4]}


def test_a_model_of_arrays_takes_a_config_or_its_dict():
    m = model()
    arrays = {name: p.data for name, p in m.parameters().items()}
    for config in (m.config, m.config.to_dict()):
        assert Transformer.from_arrays(config, arrays).loss(IDS, TARGETS).total.item() == m.loss(
            IDS, TARGETS).total.item()


def test_a_layer_alone_has_defaults_and_its_parts_differ():
    """With the seed 0 twice, the first numbers of router and experts would be the same, up to the same factor."""
    config = ModelConfig(**SMALL)
    layer, same = MoELayer(config), MoELayer(config, "top_k", np.random.default_rng(0), .02, np.float32)
    for name, p in layer.parameters().items():
        np.testing.assert_array_equal(p.data, same.parameters()[name].data)
    drawn = layer.router.weight.data.reshape(-1), layer.experts.w1.data.reshape(-1)[:12]
    assert not np.isclose(*drawn).any()
    y, routing = layer(Tensor(np.ones((2, 5, 4), np.float32)))
    assert y.shape == (2, 5, 4) and routing.n_tokens == 10


def test_a_loss_that_is_added_to_the_table_is_trained_on(monkeypatch):
    monkeypatch.setitem(losses.LOSSES, "gates", losses.Loss("sum of gates", lambda r, c: r.gate.sum()))
    m = model(losses={"gates": .5}, aux_coef=0, router_options={"renormalise": False})
    terms = m.loss(IDS, TARGETS)
    assert terms.total.item() == pytest.approx(terms.cross_entropy.item() + .5 * terms.terms["gates"].item())


def test_a_config_of_version_0_1_is_read():
    config = ModelConfig.from_dict(
        {
            "router": "top_k",
            "n_groups": 2,
            "group_limit": 1,
            "jitter": None,
            "z_coef": 0.1,
            "load_coef": 0.0,
            "policy_coef": 1.0,
            "n_devices": 2,
            "device_coef": 0.2,
        }
    )
    assert config.router_options == {"n_groups": 2, "group_limit": 1} and config.losses == {"z": .1, "device": .2}
    drawn = ModelConfig.from_dict({"router": "reinforce", "top_k": 1, "policy_coef": 0.0})
    assert (
        drawn.coefficients()["policy"] == 0 and ModelConfig(router="reinforce", top_k=1).coefficients()["policy"] == 1
    )


def test_a_user_file_makes_its_router_known(tmp_path, monkeypatch):
    monkeypatch.setitem(ROUTERS, "mine", None)
    path = tmp_path / "mine.py"
    path.write_text("from tinymoe.moe.routers import TopK\n\n\nclass Mine(TopK, name='mine'):\n    'Mine.'\n")
    assert routers.load_file(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert routers.make("mine", 4, 4).name == "mine"
    path.write_text("""from __future__ import annotations
from dataclasses import dataclass
from typing import Literal
from tinymoe.moe.routers import TopK

@dataclass
class Pair:
    one: int

class Mine(TopK, name="mine"):
    kind: Literal["a", "b"] = "a"
    width: Literal[1, 2] = 1
""")
    routers.load_file(path)
    assert routers.make("mine", 4, 4, kind="b", width=2).width == 2
    with pytest.raises(ValueError, match="width 3 must be one of 1, 2"):
        routers.make("mine", 4, 4, width=3)
    path.write_text("class Mine(")
    with pytest.raises(ValueError, match="cannot import .*mine.py .SyntaxError"):
        routers.load_file(path)
    with pytest.raises(ValueError, match="unknown router 'other'.*--import FILE.py"):
        routers.make("other", 4, 4)
    with pytest.raises(ValueError, match="has a router named 'hash' already"):
        type("Other", (routers.Router,), {"__module__": "mine"}, name="hash")


def test_a_changed_routing_is_what_the_experts_run():
    m = model(top_k=1)
    before = m.forward(IDS).logits.data
    layer = m.moe_parts()[0]
    layer.change_routing = lambda routing, x: from_mask(
        np.roll(routing.mask(), 1, axis=1), routing.probs, routing.logits, routing.probs
    )
    changed = m.forward(IDS)
    assert (changed.logits.data != before).any()
    layer.change_routing = None
    assert (m.forward(IDS).logits.data == before).all()


def test_layers_that_do_not_rise_have_one_router():
    assert ModelConfig(**SMALL | dict(moe_layers=(1, 0), router="hash")).moe_layers == (0, 1)
    with pytest.raises(ValueError, match=r"moe_layers \[1, 0\] must rise where router is a list"):
        ModelConfig(**SMALL | dict(moe_layers=(1, 0), router=["hash", "top_k"]))


def test_losses_over_devices_have_the_devices_of_the_config():
    m = model(n_experts=4, n_devices=2, max_devices=2, losses={"device": 1.0, "communication": 1.0})
    output = m.forward(IDS)
    r, terms = output.routings[0], m.loss_terms(output, TARGETS)
    assert terms.device.item() == pytest.approx(naive_routing.device_balance(r.mask(), r.probs.data, 2))
    assert terms.communication.item() == pytest.approx(naive_routing.communication(r.mask(), r.probs.data, 2, 2))


@pytest.mark.parametrize("loss, value", [("device", 162.4), ("global_batch", 196.4), ("balance", 196.4)])
def test_losses_count_what_was_wanted(loss, value):
    """Loads (6, 2, 1, 0) become (3, 2, 1, 0); the sums of the scores are (6.9, 2.9, 1.9, 0.9).

    4 (6 * 6.9 + 2 * 2.9 + 1 * 1.9) / 81, and of two devices 2 (8 * 9.8 + 1 * 2.8) / 81. The batch is the first one.
    """
    scores = Tensor(np.eye(4)[[0] * 6 + [1] * 2 + [2]] + 0.1)
    routing = from_mask(scores.data > 1, scores, scores, scores)
    context = losses.LossContext(None, 9, n_devices=2, recent_share=np.zeros(4), balance_batches=4)
    of = losses.LOSSES[loss].of
    assert of(limit_capacity(routing, 4 / 3, 1), context).item() == of(routing, context).item()
    assert of(routing, context).item() == pytest.approx(value / 81)


def test_a_block_with_norms_behind_its_parts():
    """Grok-1: x + norm(attention(norm(x))), then the same around the dense layer."""
    m = model(post_norm=True, moe_layers=())
    block, x = m.blocks[0], np.random.default_rng(0).standard_normal((2, 5, 4))
    for i, norm in enumerate((block.norm1, block.norm2, block.post1, block.post2)):
        norm.weight.data = norm.weight.data * (i + 2)

    def norm(layer, z):
        rows = naive.layer_norm(z.reshape(-1, 4), layer.weight.data, layer.bias.data, 1e-5)
        return rows.reshape(z.shape)

    y = x + norm(block.post1, block.attention(Tensor(norm(block.norm1, x))).data)
    want = y + norm(block.post2, block.feed_forward(Tensor(norm(block.norm2, y))).data)
    np.testing.assert_allclose(block(Tensor(x), RouteContext())[0].data, want)


def test_the_last_weights_of_a_branch_start_smaller():
    """0.02 / sqrt(2 L), because 2 L branches add up (GPT-2)."""
    m = Transformer(ModelConfig(n_layers=8, d_model=64, d_ff=128, moe_layers=(1,), n_heads=2), seed=0)
    for weight in (m.blocks[0].attention.out.weight, m.blocks[0].feed_forward.down.weight,
                   m.blocks[1].feed_forward.experts.w2):
        assert weight.data.std() == pytest.approx(0.02 / 4, rel=0.05)
    assert m.blocks[1].feed_forward.experts.w1.data.std() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("text, match", [
    ("import sys; sys.exit(0)", "SystemExit: 0"), ("raise GeneratorExit('no')", "GeneratorExit: no"),
    ("from tinymoe.moe.losses import LOSSES, Loss\nLOSSES['z'] = Loss('mine', None)", "named 'z' already"),
    ("from tinymoe.moe.routers import ROUTERS, TopK\nROUTERS['top_k'] = type('A', (TopK,), {})",
     "named 'top_k' already"),
    ("from tinymoe.moe.routers import ROUTERS\nROUTERS['foo'] = 5", "ROUTERS..foo.. must be a Router")])
def test_a_file_that_ends_the_program_or_takes_our_names_is_refused(tmp_path, monkeypatch, text, match):
    monkeypatch.setitem(routers.ROUTERS, "foo", None)
    del routers.ROUTERS["foo"]  # and again after the test
    before = dict(routers.ROUTERS), dict(losses.LOSSES)
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ValueError, match=match):
        routers.load_file(tmp_path / "mine.py")
    routers.ROUTERS.pop("foo", None)
    assert before == (routers.ROUTERS, losses.LOSSES)


def test_weights_of_half_precision_are_refused():
    m = model()
    arrays = {name: p.data.astype(np.float16) for name, p in m.parameters().items()}
    with pytest.raises(ValueError, match="its weights are float16: they must be float32 or float64"):
        Transformer.from_arrays(m.config, arrays)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    m = model()
    m.head.weight.data[0, 0] = np.nan
    m.save(tmp_path / "m.npz")
    with pytest.raises(CheckpointError, match="head.weight is not finite"):
        Transformer.load(tmp_path / "m.npz")
