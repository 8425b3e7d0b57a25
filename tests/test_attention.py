"""Attention and its variants against plain loops, and the options of the model that they make possible."""
import functools
import re

import numpy as np
import pytest

import naive
from tinymoe import ModelConfig, RouteContext, Tensor, Transformer, gradcheck
from tinymoe.autograd import functional as F
from tinymoe.layers.attention import CausalSelfAttention
from tinymoe.layers.latent_attention import LatentAttention
from tinymoe.layers.windowed_attention import WindowedAttention, stretched

B, T, D = 2, 5, 8


def states(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def decided(layer):
    """The layer with weights large enough to matter."""
    for i, p in enumerate(layer.parameters().values()):
        p.data = states(*p.shape, seed=i) / np.sqrt(p.shape[0])
    return layer


def rms(x, weight):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight


def turn(x, t):
    """A vector (d,) turned to position t: complex numbers of entries i and i + d/2."""
    half = len(x) // 2
    z = (x[:half] + 1j * x[half:]) * np.exp(1j * t * 10_000.0 ** (-np.arange(half) / half))
    return np.concatenate([z.real, z.imag])


def attend(q, k, v):
    """One head, one sequence: q, k (T, d), v (T, dv), one position at a time."""
    out = np.zeros((len(q), v.shape[1]))
    for t in range(len(q)):
        w = np.exp([q[t] @ k[s] / np.sqrt(q.shape[1]) for s in range(t + 1)])
        out[t] = sum(w[s] * v[s] for s in range(t + 1)) / w.sum()
    return out


# -- rotary positions ---------------------------------------------------------------------------

def test_rotary_by_hand():
    """d = 2: one pair, turned by t radians. Position 0 stays; at position 1 (1, 0) becomes (cos 1, sin 1)."""
    y = F.rotary(Tensor(np.array([[[[1., 0]], [[1., 0]], [[0., 2]]]]))).data[0, :, 0]
    np.testing.assert_allclose(y, [[1, 0], [np.cos(1), np.sin(1)], [-2 * np.sin(2), 2 * np.cos(2)]])


def test_a_product_of_turned_vectors_depends_on_their_distance_alone():
    q, k = states(6), states(6, seed=1)
    x = Tensor(np.tile(np.stack([q, k]), (1, 9, 1, 1)))                      # (1, 9, 2, 6)
    turned = F.rotary(x).data[0]
    np.testing.assert_allclose(turned[7, 0] @ turned[4, 1], turned[3, 0] @ turned[0, 1])
    np.testing.assert_allclose(turned[5, 1], turn(k, 5))
    assert gradcheck(F.rotary, Tensor(states(2, 3, 2, 4)))
    for shape, base in (((1, 2, 1, 3), 10.0), ((1, 2, 1, 4), np.ones(1)), ((1, 2, 1, 4), np.ones(3))):
        with pytest.raises(ValueError, match="a number or .* not " + re.escape(f"x {shape} and base {np.shape(base)}")):
            F.rotary(Tensor(states(*shape)), base)


# -- layers against loops -----------------------------------------------------------------------

@pytest.mark.parametrize("H, G, d, rotary, qk_norm",
                         [(4, 4, 2, False, False), (4, 2, 2, True, False), (4, 1, 6, True, True),
                          (4, 2, 4, True, "head")])
def test_grouped_attention_against_a_loop(H, G, d, rotary, qk_norm):
    layer = decided(CausalSelfAttention(D, H, np.random.default_rng(0), dtype=np.float64, n_kv_heads=G, head_dim=d,
                                        biases="none", rotary=rotary, qk_norm=qk_norm))
    x = states(B, T, D)
    q, k, v = (x @ w.weight.data for w in (layer.query, layer.key, layer.value))
    if qk_norm == "head":  # each run of d numbers by itself
        q, k = (np.concatenate([rms(z[..., i:i + d], norm.weight.data) for i in range(0, z.shape[-1], d)], axis=-1)
                for z, norm in ((q, layer.query_norm), (k, layer.key_norm)))
    elif qk_norm:
        q, k = rms(q, layer.query_norm.weight.data), rms(k, layer.key_norm.weight.data)
    out = np.zeros((B, T, H * d))
    for b in range(B):
        for h in range(H):
            g = h // (H // G)
            parts = [z[b][:, i * d:(i + 1) * d] for z, i in ((q, h), (k, g), (v, g))]
            if rotary:
                parts[:2] = [np.array([turn(row, t) for t, row in enumerate(z)]) for z in parts[:2]]
            out[b][:, h * d:(h + 1) * d] = attend(*parts)
    np.testing.assert_allclose(layer(Tensor(x)).data, out @ layer.out.weight.data, atol=1e-12)
    assert gradcheck(lambda x, *_: layer(x), Tensor(x), *layer.parameters().values())


@pytest.mark.parametrize("window, sinks, yarn", [(2, False, None), (0, True, None), (1, True, None), (9, False, None),
                                                 (3, True, dict(factor=2.0, original_length=8, beta_fast=1.0))])
def test_windowed_attention_against_a_loop(window, sinks, yarn):
    """A query at t sees the positions s > t - window; a sink adds exp(s) to the sum of the weights."""
    layer = decided(WindowedAttention(D, 4, np.random.default_rng(0), dtype=np.float64, n_kv_heads=2, biases="qkv",
                                      rotary=yarn is not None, window=window, sinks=sinks, yarn=yarn))
    x, d, out = states(B, T, D), 2, np.zeros((B, T, D))
    q, k, v = (x @ w.weight.data + w.bias.data for w in (layer.query, layer.key, layer.value))
    angles, factor = stretched(d, 10_000.0, **yarn) if yarn else (np.zeros(1), 1)
    for b, h, t in np.ndindex(B, 4, T):
        g, seen = h // 2, range(max(0, t - window + 1) if window else 0, t + 1)
        query, keys = q[b, t, h * d:][:d], {s: k[b, s, g * d:][:d] for s in seen}
        z = {s: (complex(*query) * np.exp(1j * angles[0] * (t - s)) * complex(*keys[s]).conjugate()).real for s in seen}
        weights = {s: np.exp(factor**2 * z[s] / np.sqrt(d)) for s in seen}
        total = sum(weights.values()) + (np.exp(layer.sinks.data[h]) if sinks else 0)
        out[b, t, h * d:][:d] = sum(weights[s] / total * v[b, s, g * d:][:d] for s in seen)
    np.testing.assert_allclose(layer(Tensor(x)).data, out @ layer.out.weight.data, atol=1e-12)
    assert gradcheck(lambda x, *_: layer(x), Tensor(x), *layer.parameters().values())


def test_stretched_positions_by_hand():
    """d = 8 and base e^2 give the frequencies e^-0.5i. With L = 2 pi e the turns over L are e^(1 - 0.5i): e for pair 0,
    1 for pair 2 and 1/e for pair 4. So pair 0 keeps its frequency, and with beta_slow 1/e, pair i has i/4 of the
    frequency that is 3 times slower. 0.1 ln 3 + 1 scales queries and keys."""
    base, L = np.exp(2), 2 * np.pi * np.e
    options = dict(factor=3.0, original_length=L, beta_fast=np.e, beta_slow=1 / np.e)
    angles, factor = stretched(8, base, **options, truncate=False)
    np.testing.assert_allclose(angles, [np.exp(-0.5 * i) * (i / 4 / 3 + 1 - i / 4) for i in range(4)])
    assert factor == pytest.approx(1 + 0.1 * np.log(3)) and stretched(8, base, **options, attention_factor=2.0)[1] == 2
    rounded, _ = stretched(8, base, **options | dict(beta_fast=np.exp(0.6), beta_slow=np.exp(-0.4)))  # i 0.8 to 2.8
    np.testing.assert_allclose(rounded, [np.exp(-0.5 * i) * (i / 3 / 3 + 1 - i / 3) for i in range(4)])


@pytest.mark.parametrize("q_rank", [0, 3])
def test_latent_attention_against_a_loop(q_rank):
    H, d, r, dv, c = 2, 3, 4, 5, 6
    layer = decided(LatentAttention(D, H, np.random.default_rng(0), dtype=np.float64, head_dim=d, q_rank=q_rank,
                                    kv_rank=c, rope_dim=r,
                                    v_dim=dv))
    x = states(B, T, D)
    low = x if not q_rank else rms(x @ layer.query_down.weight.data, layer.query_norm.weight.data)
    q = (low @ layer.query.weight.data).reshape(B, T, H, d + r)
    latent = x @ layer.latent.weight.data
    kv = (rms(latent[..., :c], layer.latent_norm.weight.data) @ layer.key_value.weight.data).reshape(B, T, H, d + dv)
    out = np.zeros((B, T, H * dv))
    for b in range(B):
        for h in range(H):
            queries = [np.concatenate([q[b, t, h, :d], turn(q[b, t, h, d:], t)]) for t in range(T)]
            keys = [np.concatenate([kv[b, t, h, :d], turn(latent[b, t, c:], t)]) for t in range(T)]
            out[b][:, h * dv:(h + 1) * dv] = attend(np.array(queries), np.array(keys), kv[b, :, h, d:])
    np.testing.assert_allclose(layer(Tensor(x)).data, out @ layer.out.weight.data, atol=1e-12)
    assert gradcheck(lambda x, *_: layer(x), Tensor(x), *layer.parameters().values())


@pytest.mark.parametrize("biases, those", [("none", []), ("qkv", ["query", "key", "value"]),
                                           ("all", ["query", "key", "value", "out"])])
def test_biases_of_attention(biases, those):
    layer = CausalSelfAttention(4, 2, np.random.default_rng(0), biases=biases)
    assert [name.removesuffix(".bias") for name in layer.parameters() if name.endswith("bias")] == those
    changed = ModelConfig(**SMALL | dict(attention_bias=biases, bias=False))
    assert changed.attention_biases == biases
    assert ModelConfig(**SMALL).attention_biases == "all"
    assert ModelConfig(**SMALL, bias=False).attention_biases == "none"
    with pytest.raises(ValueError, match="attention_bias .* left out with latent"):
        ModelConfig(**SMALL | dict(attention="latent", attention_bias=biases))


@pytest.mark.parametrize("options, message", [
    (dict(windows=[2]), r"windows \(2,\) must be a list with one number for each of the 2 layers"),
    (dict(windows=[2, -1]), "windows"), (dict(yarn=dict(factor=2.0, original_length=4)), "without rotary positions"),
    (dict(attention="latent", sinks=True), "sinks True must be left out with latent"),
    (dict(positions="rotary", yarn=dict(factor=2.0)), "must be an object with factor and original_length"),
    (dict(positions="rotary", yarn=dict(factor=0, original_length=4)), "yarn"),
    (dict(positions="rotary", yarn=dict(factor=2, original_length=4, other=1)), "yarn")])
def test_windows_and_stretched_positions_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**SMALL | options)


@pytest.mark.parametrize("n_heads, options, message", [(3, {}, "n_heads 3"), (4, dict(n_kv_heads=3), "n_kv_heads 3")])
def test_heads_must_fit(n_heads, options, message):
    with pytest.raises(ValueError, match=message):
        CausalSelfAttention(D, n_heads, np.random.default_rng(0), **options)
    with pytest.raises(ValueError, match=message):
        ModelConfig(d_model=D, n_heads=n_heads, **options)


# -- in the model -------------------------------------------------------------------------------

SMALL = dict(vocab_size=7, n_layers=2, d_model=4, n_heads=2, d_ff=6, seq_len=5, moe_layers=(1,), n_experts=3, top_k=2)
IDS = np.array([[0, 3, 6, 2, 5], [1, 1, 4, 0, 2]])
OPTIONS = {
    "rms": dict(norm="rms"), "post norms": dict(post_norm=True), "rotary": dict(positions="rotary"),
    "grouped, no biases": dict(n_kv_heads=1, bias=False), "qk norm": dict(qk_norm=True),
    "norm of each head, some biases": dict(qk_norm="head", attention_bias="qkv", bias=False), "tied": dict(tied=True),
    "wide heads": dict(head_dim=3), "latent": dict(attention="latent", kv_rank=3, rope_dim=2, q_rank=2, v_dim=3),
    "angles and epsilons": dict(attention="latent", q_rank=2, kv_rank=3, rope_dim=4, rope_theta=9., norm_eps=.1,
                                latent_eps=.2),
    "windows, sinks, stretched": dict(windows=[2, 0], sinks=True, positions="rotary",
                                      yarn=dict(factor=2., original_length=4)),
    "clamped": dict(activation="clamped_swiglu", n_shared=1),
    "two tokens ahead": dict(mtp_coef=.3),
    "all": dict(norm="rms", positions="rotary", bias=False, n_kv_heads=1, qk_norm=True, tied=True, post_norm=True,
                mtp_coef=.3, n_shared=1, d_shared=3, shared_gate=True)}


def model(**changes):
    m = Transformer(ModelConfig(**SMALL | changes), dtype=np.float64)
    for p in m.parameters().values():
        p.data = p.data * 20 if p.ndim > 1 else p.data
    return m


@pytest.mark.parametrize("changes", [pytest.param(changes, id=name, marks=[] if name == "all" else
                                                  pytest.mark.slow) for name, changes in OPTIONS.items()])
def test_gradients_of_the_whole(changes):
    m = model(**changes)
    result = gradcheck(lambda *_: m.loss(IDS, (IDS + 1) % 7).total, *m.parameters().values())
    assert result, result


@pytest.mark.parametrize("changes", OPTIONS.values(), ids=OPTIONS)
def test_options_are_causal_and_are_saved(changes, tmp_path):
    m, later = model(**changes), IDS.copy()
    later[:, 3:] = (later[:, 3:] + 1) % 7
    logits = m.forward(IDS).logits.data
    np.testing.assert_allclose(m.forward(later).logits.data[:, :3], logits[:, :3], atol=1e-12)
    assert (m.forward(later).logits.data[:, 3:] != logits[:, 3:]).any()
    m.save(tmp_path / "model.npz")
    np.testing.assert_array_equal(Transformer.load(tmp_path / "model.npz").forward(IDS).logits.data, logits)


@pytest.mark.parametrize("changes",
                         [dict(norm_eps=.1), dict(norm="rms", norm_eps=.1), dict(qk_norm=True, norm="rms", norm_eps=.1),
                                     dict(positions="rotary", head_dim=4, rope_theta=9.),
                                     dict(attention="latent", rope_dim=4, rope_theta=9.),
                                     dict(attention="latent", latent_eps=.1), dict(post_norm=True, norm_eps=.1)])
def test_angles_and_epsilons_are_those_of_the_config(changes):
    """Another number gives other logits, the default the same bits."""
    usual = {"norm_eps": 1e-5, "rope_theta": 1e4, "latent_eps": 1e-5}
    name = next(name for name in usual if name in changes)
    plain = model(**{key: value for key, value in changes.items() if key != name}).forward(IDS).logits.data
    np.testing.assert_array_equal(model(**changes | {name: usual[name]}).forward(IDS).logits.data, plain)
    assert np.abs(model(**changes).forward(IDS).logits.data - plain).max() > 1e-4


def test_without_learned_positions_a_model_has_no_table_of_them():
    assert "position_embedding.weight" in model().parameters()
    for changes in (dict(positions="rotary"), dict(attention="latent")):
        assert "position_embedding.weight" not in model(**changes).parameters()


def test_a_tied_model_lists_its_embedding_once():
    m = model(tied=True)
    assert "head.weight" not in m.parameters()
    assert len({id(p) for p in m.parameters().values()}) == len(m.parameters())
    np.testing.assert_allclose(m.forward(IDS).logits.data,
                               m.norm(m.forward(IDS).states).data @ m.token_embedding.weight.data.T)


def test_without_biases_there_are_none():
    assert not any(name.endswith(("bias", "b1", "b2")) for name in model(bias=False, norm="rms").parameters())


def test_the_second_head_is_asked_for_the_token_after_the_next():
    """The first target of a sequence is an input of its loss but not an answer; the last target is only an answer."""
    m = model(mtp_coef=1.0)
    targets = (IDS + 1) % 7
    seen = []
    original, F.cross_entropy = F.cross_entropy, lambda logits, t: seen.append(np.array(t)) or original(logits, t)
    try:
        terms = m.loss(IDS, targets)
    finally:
        F.cross_entropy = original
    np.testing.assert_array_equal(seen[1], targets[:, 1:].reshape(-1))
    assert terms.total.item() == pytest.approx(terms.cross_entropy.item() + .01 * terms.balance.item() +
                                               terms.multi_token.item())


@pytest.mark.parametrize("layer", [CausalSelfAttention, LatentAttention, WindowedAttention,
                                   functools.partial(WindowedAttention, window=2, sinks=True)])
@pytest.mark.parametrize("shape", [(0, 4, D), (2, 0, D)])
@pytest.mark.filterwarnings("error")
def test_attention_over_nothing_is_empty(layer, shape, both_kernels):
    x = Tensor(np.zeros(shape), requires_grad=True)
    y = layer(D, 2, np.random.default_rng(0), dtype=np.float64)(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape


@pytest.mark.parametrize("layer", [CausalSelfAttention, LatentAttention, WindowedAttention])
@pytest.mark.parametrize("d_model", [10, 3])
def test_heads_that_do_not_divide_the_width_are_refused(layer, d_model):
    with pytest.raises(ValueError, match=f"^d_model {d_model} is not divisible by n_heads 4: change one of them"):
        layer(d_model, 4, 0)
    assert layer(d_model, 4, 0, head_dim=2).head_dim == 2


@pytest.mark.parametrize("options", [dict(biases="QKV"), dict(qk_norm="heads")])
def test_words_that_attention_does_not_know_are_refused(options):
    with pytest.raises(ValueError, match=r"biases .* must be all, qkv or none, and qk_norm .* true, false or head"):
        CausalSelfAttention(4, 2, 0, **options)


def test_attention_without_a_width_is_refused():
    with pytest.raises(ValueError, match="d > 0"):
        CausalSelfAttention(0, 2, np.random.default_rng(0))(Tensor(np.zeros((1, 4, 0), np.float32)))


def test_the_second_head_by_hand():
    """From each state but the last and the embedding of its target: the loss of the target after it."""
    m = model(mtp_coef=1.0)
    head, states, targets = m.next_but_one, m.forward(IDS).states, (IDS + 1) % 7
    both = [head.state_norm(states[:, :-1]).data, head.next_norm(m.token_embedding(targets[:, :-1])).data]
    joined = Tensor(np.concatenate(both, axis=-1) @ head.join.weight.data)
    logits = m.read_out(head.block(joined, RouteContext())[0]).data.reshape(-1, 7)
    assert head.loss(m, states, targets).item() == pytest.approx(naive.cross_entropy(logits, targets[:, 1:].ravel()))
