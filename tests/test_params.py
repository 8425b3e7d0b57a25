"""Counting: exact for the published models, and the same as counting the arrays for our own."""
import pytest

from tinymoe import ModelConfig, Transformer, params


def whole(preset, **options):
    return params.count(params.architecture(params.PRESETS[preset]), **options)[-1]


@pytest.mark.parametrize("preset, total, active", [
    ("mixtral-8x7b", 46_702_792_704, 12.9e9), ("grok-1", 315_684_820_992, None), ("olmoe-1b-7b", 6_919_161_856, 1.3e9),
    ("deepseek-v3", 671_026_419_200, None)])
def test_the_published_models(preset, total, active):
    counted = whole(preset)
    assert counted.total == total
    assert active is None or counted.active == pytest.approx(active, rel=.02)


def test_deepseek_counts_37_billion_active_without_one_of_its_embeddings():
    parts = {p.name: p for p in params.count(params.architecture(params.PRESETS["deepseek-v3"]))}
    assert parts["all"].active - parts["embedding"].active == pytest.approx(37e9, rel=.02)


@pytest.mark.parametrize("changes", [dict(), dict(moe_layers=()), dict(top_k=1, n_shared=2, d_expert=3), dict(moe_layers=(0, 1)),
                                     dict(router="noisy_top_k"), dict(activation="swiglu"), dict(router="sigmoid_bias"), dict(norm="rms", bias=False, tied=True),
                                     dict(n_kv_heads=1, head_dim=6, qk_norm=True, post_norm=True), dict(positions="rotary"),
                                     dict(attention="latent", q_rank=3, v_dim=5), dict(attention="latent", bias=False)])
def test_our_own_models(changes):
    config = ModelConfig(**dict(vocab_size=11, n_layers=2, d_model=8, n_heads=2, d_ff=6, seq_len=5, moe_layers=(1,), n_experts=4) | changes)
    counted = params.count(params.architecture(config.to_dict()))[-1]
    assert {"total": counted.total, "active": round(counted.active)} == Transformer(config).count_parameters()


def test_a_second_head_is_counted_apart_and_never_active():
    config = ModelConfig(vocab_size=11, n_layers=2, d_model=8, n_heads=2, d_ff=6, seq_len=5, moe_layers=(1,), n_experts=4, mtp_coef=.1)
    parts = {p.name: p for p in params.count(params.architecture(config.to_dict()))}
    model = Transformer(config)
    assert parts["all"].total == model.count_parameters()["total"] and parts["second head"].active == 0
    assert parts["second head"].total == sum(p.size for p in model.next_but_one.parameters().values())


def test_work_by_hand():
    """One layer, D 2, one head, a dense layer of width 3 without gate, 5 tokens in the vocabulary; 7 positions.

    Attention 4 matrices of 4 weights, feed-forward 12, head 10: 38 weights, 76 operations; scores and values 2 * 7 * 2 each.
    """
    a = params.Architecture(n_layers=1, d_model=2, vocab_size=5, n_heads=1, head_dim=2, n_kv_heads=1, d_ff=3, n_dense=1, gated=False)
    assert params.count(a)[-1].flops == 76 and params.count(a, context=7)[-1].flops == 76 + 56
    tied = params.Architecture(n_layers=1, d_model=2, vocab_size=5, n_heads=1, head_dim=2, n_kv_heads=1, d_ff=3, n_dense=1, gated=False,
                               tied=True)
    assert params.count(tied)[-1].flops == 76 and params.count(tied)[-1].total == params.count(a)[-1].total - 10


def test_what_is_no_config_is_refused():
    with pytest.raises(ValueError, match="lacks .*hidden_size"):
        params.architecture({"num_hidden_layers": 3})
