"""The transformer as a whole: gradients, causality, loss arithmetic, parameter counts, save and load, errors."""
import json

import numpy as np
import pytest

from tinymoe import ModelConfig, Tensor, Transformer, gradcheck, losses
from tinymoe.files import CheckpointError, save_arrays

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

@pytest.mark.parametrize("changes", [dict(moe_layers=()), dict(top_k=1, aux_coef=.1), dict(z_coef=.1, importance_coef=.1),
                                     dict(renormalise=False, activation="silu"), dict(capacity_factor=.75),
                                     dict(router="expert_choice", top_k=1.5), dict(router="noisy_top_k", load_coef=.1)])
def test_gradcheck_of_the_whole(changes):
    m = model(**changes)
    result = gradcheck(lambda *_: m.loss(IDS, TARGETS, True, np.random.default_rng(0)).total, *m.parameters().values())
    assert result, result


def test_loss_terms_add_up():
    m = model(router="noisy_top_k", moe_layers=(0, 1), aux_coef=.5, z_coef=.25, importance_coef=2., load_coef=3.)
    output = m.forward(IDS, True, np.random.default_rng(0))
    terms = m.loss_terms(output, TARGETS)
    for name, loss in (("balance", losses.load_balancing_loss), ("z", losses.z_loss), ("importance", losses.importance_loss),
                       ("load", losses.load_loss)):
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
    terms = model(router="noisy_top_k", load_coef=.1).loss(IDS, TARGETS)
    assert terms.load is None and np.isfinite(terms.total.item())


def test_dense_only_has_no_routing_and_an_moe_layer_one_each():
    assert model(moe_layers=()).forward(IDS).routings == []
    routings = model(n_layers=4, moe_layers=(3, 0)).forward(IDS).routings
    assert [(r.n_tokens, r.n_experts) for r in routings] == [(10, 3)] * 2


def test_a_capacity_limit_is_applied_and_falls_away_for_causal_routing():
    m = model(router="noisy_top_k", scale=0, capacity_factor=.5)      # all tie: experts 0 and 1 have all, C = ceil(.5 * 10 * 2 / 3) = 4
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
    m = model(dtype=dtype, router=router, z_coef=.1, importance_coef=.1, capacity_factor=1.0)
    rng = np.random.default_rng(0)
    terms = m.loss(IDS, TARGETS, True, rng)
    terms.total.backward()
    assert {t.dtype for t in vars(terms).values() if t is not None} == {np.dtype(dtype)}
    assert {p.grad.dtype for p in m.parameters().values()} == {np.dtype(dtype)}


# -- causality ----------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, call, leaks", [
    (dict(), {}, False), (dict(top_k=1), {}, False), (dict(router="noisy_top_k"), {}, False),
    (dict(router="expert_choice"), {}, True), (dict(router="expert_choice"), dict(causal=True), False),
    (dict(capacity_factor=.5), {}, True), (dict(capacity_factor=.5), dict(causal=True), False)])
def test_changing_later_tokens(changes, call, leaks):
    """Over all ways to change the last two tokens of the first sequence: do its earlier logits, or the second sequence's, move?"""
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

@pytest.mark.parametrize("changes, message", [
    (dict(d_model=10, n_heads=4), "d_model 10 is not divisible by n_heads 4"),
    (dict(top_k=9), "top_k 9 .*n_experts 8"), (dict(top_k=0), "top_k 0"), (dict(top_k=float("nan")), "top_k nan"),
    (dict(top_k=1.5), "top_k 1.5 .*whole"), (dict(n_layers=0, moe_layers=()), "n_layers 0"), (dict(d_ff=2.5), "d_ff 2.5"),
    (dict(n_layers=0), "n_layers 0"),
    (dict(moe_layers=(6,)), r"moe_layers \(6,\).*5"), (dict(moe_layers=(-1,)), r"\(-1,\)"),
    (dict(capacity_factor=0), "capacity_factor 0"), (dict(capacity_factor=float("nan")), "capacity_factor nan"),
    (dict(router="topk"), "router 'topk'.*expert_choice"), (dict(activation="tanh"), "activation 'tanh'.*gelu"),
    (dict(drop_policy="last"), "drop_policy 'last'.*order"), (dict(expert_backend="gpu"), "expert_backend 'gpu'.*numba"),
    (dict(router="expert_choice", renormalise=True), "renormalise.*expert_choice"),
    (dict(load_coef=.1), "load_coef.*noisy_top_k")])
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
    config = ModelConfig(n_experts=np.int64(8), moe_layers=list(np.arange(1, 6, 2)))
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == ModelConfig()


# -- parameters, files --------------------------------------------------------------------------

def test_parameter_counts_by_hand():
    """V = 7, T = 5, D = 4, F = 6, E = 3, K = 2. Attention 4 (16 + 4) = 80, two norms 16; dense FFN 24 + 6 + 24 + 4 = 58.

    Embeddings 28 + 20, dense block 80 + 16 + 58 = 154, MoE block 96 + router 12 + 3 * 58 = 282, last norm 8, head 28: 520.
    A token meets two of the three experts: 520 - 58.
    """
    assert model().count_parameters() == {"total": 520, "active": 462}
    assert model(top_k=1.5, router="expert_choice").count_parameters()["active"] == 520 - 87
    assert model(moe_layers=()).count_parameters() == {"total": 520 - 12 - 2 * 58, "active": 520 - 12 - 2 * 58}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_save_and_load(tmp_path, dtype):
    m, path = model(dtype=dtype, router="noisy_top_k"), tmp_path / "model.npz"
    m.save(path)
    other = Transformer.load(path)
    assert other.config == m.config and list(tmp_path.iterdir()) == [path]
    np.testing.assert_array_equal(other.forward(IDS).logits.data, m.forward(IDS).logits.data)
    assert {p.dtype for p in other.parameters().values()} == {np.dtype(dtype)}


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


@pytest.mark.parametrize("how", [0, 50, 99, "text", "pickle", "array", "kind", "shape", "unknown key", "no config", "a weight missing", "gone"])
def test_what_is_no_checkpoint_is_refused_by_name(tmp_path, how):
    path = tmp_path / "model.npz"
    model().save(path)
    path.unlink() if how == "gone" else spoilt(path, how)
    with pytest.raises(CheckpointError, match="model.npz"):
        Transformer.load(path)


def test_same_seed_same_bits():
    losses_ = [model(seed, np.float32, router="noisy_top_k").loss(IDS, TARGETS, True, np.random.default_rng(1)) for seed in (3, 3, 4)]
    for terms in losses_:
        terms.total.backward()
    assert losses_[0].total.item() == losses_[1].total.item() != losses_[2].total.item()


@pytest.mark.parametrize("ids", [np.zeros((1, 6), int), np.zeros(5, int), np.zeros((1, 0), int)])
def test_ids_of_a_wrong_shape(ids):
    with pytest.raises(ValueError, match="seq_len 5"):
        model().forward(ids)


def test_an_id_outside_the_vocabulary():
    with pytest.raises(IndexError, match="7"):
        model().forward(np.array([[0, 7]]))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name, value, where", [
    (None, None, None), ("blocks.0.norm1.weight", np.nan, "parameter blocks.0.norm1.weight"),
    ("blocks.1.feed_forward.experts.w2", 1e38, "layer 1"),
    ("blocks.0.attention.out.weight", 3e38, "layer 0"), ("head.weight", 3e38, "the head")])
def test_the_first_place_that_is_not_finite(name, value, where):
    m = model(dtype=np.float32)
    if name:
        m.parameters()[name].data[:] = value
    assert m.first_nonfinite(IDS) == where
