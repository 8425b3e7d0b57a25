"""Counting: exact for the published models, and the same as counting the arrays for our own."""
import dataclasses

import numpy as np
import pytest

from tinymoe import ModelConfig, Transformer
from tinymoe.model import counting as params

PUBLISHED = {  # the keys and values of the models' own config files
    "mixtral-8x7b": {
        "model_type": "mixtral", "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
        "vocab_size": 32000, "tie_word_embeddings": False},
    "grok-1": {
        "model_type": "grok-1", "num_hidden_layers": 64, "hidden_size": 6144, "intermediate_size": 32768,
        "num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128, "num_local_experts": 8,
        "num_experts_per_tok": 2, "vocab_size": 131072, "tie_word_embeddings": True},
    "olmoe-1b-7b": {
        "model_type": "olmoe", "num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 1024,
        "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
        "vocab_size": 50304, "tie_word_embeddings": False},
    "qwen1.5-moe-a2.7b": {
        "model_type": "qwen2_moe", "num_hidden_layers": 24, "hidden_size": 2048, "intermediate_size": 5632,
        "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "num_attention_heads": 16,
        "num_key_value_heads": 16, "num_experts": 60, "num_experts_per_tok": 4, "decoder_sparse_step": 1,
        "vocab_size": 151936, "tie_word_embeddings": False},
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "num_hidden_layers": 48, "hidden_size": 2048, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "num_experts": 128, "num_experts_per_tok": 8, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "attention_bias": False, "vocab_size": 151936, "tie_word_embeddings": False},
    "gpt-oss-20b": {
        "model_type": "gpt_oss", "num_hidden_layers": 24, "hidden_size": 2880, "intermediate_size": 2880,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32,
        "num_experts_per_tok": 4, "sliding_window": 128, "attention_bias": True, "vocab_size": 201088,
        "tie_word_embeddings": False},
    "deepseek-v3": {
        "model_type": "deepseek_v3", "num_hidden_layers": 61, "first_k_dense_replace": 3, "hidden_size": 7168,
        "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1,
        "num_experts_per_tok": 8, "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536,
        "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "vocab_size": 129280, "tie_word_embeddings": False},
}


def whole(preset, **options):
    return params.count(params.architecture(params.PRESETS[preset]), **options)[-1]


@pytest.mark.parametrize("preset, total, active", [
    ("mixtral-8x7b", 46_702_792_704, 12.9e9), ("grok-1", 315_684_820_992, None), ("olmoe-1b-7b", 6_919_161_856, 1.3e9),
    ("qwen1.5-moe-a2.7b", 14_315_784_192, 2.7e9), ("qwen3-30b-a3b", 30_532_122_624, 3.3e9),
    ("gpt-oss-20b", 20_914_757_184, None), ("deepseek-v3", 671_026_419_200, None)])
def test_the_published_models(preset, total, active):
    counted = whole(preset)
    assert counted.total == total
    assert params.count(params.architecture(PUBLISHED[preset])) == params.count(
        params.architecture(params.PRESETS[preset])
    )
    assert active is None or counted.active == pytest.approx(active, rel=.02)


def test_gpt_oss_counts_3_6_billion_active_without_one_of_its_embeddings():
    parts = {p.name: p for p in params.count(params.PRESETS["gpt-oss-20b"])}
    assert parts["all"].active - parts["embedding"].active == pytest.approx(3.6e9, rel=.01)
    full = dataclasses.replace(params.PRESETS["gpt-oss-20b"], windows=())
    assert params.count(full, context=4096)[-1].flops > params.count(params.PRESETS["gpt-oss-20b"], 4096)[-1].flops


def test_deepseek_counts_37_billion_active_without_one_of_its_embeddings():
    parts = {p.name: p for p in params.count(params.architecture(params.PRESETS["deepseek-v3"]))}
    assert parts["all"].active - parts["embedding"].active == pytest.approx(37e9, rel=.02)


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(moe_layers=()),
        dict(top_k=1, n_shared=2, d_expert=3),
        dict(n_shared=2, d_shared=5, shared_gate=True),
        dict(moe_layers=(0, 1)),
        dict(router="noisy_top_k"),
        dict(activation="swiglu"),
        dict(router="sigmoid_bias"),
        dict(norm="rms", bias=False, tied=True),
        dict(n_kv_heads=1, head_dim=6, qk_norm=True, post_norm=True),
        dict(n_heads=4, n_kv_heads=2, head_dim=3, qk_norm="head", attention_bias="qkv", bias=False),
        dict(attention_bias="all", bias=False),
        dict(attention_bias="none"),
        dict(positions="rotary"),
        dict(sinks=True, windows=[3, 0], activation="clamped_swiglu", router="biased_top_k"),
        dict(attention="latent", q_rank=3, v_dim=5),
        dict(attention="latent", bias=False),
    ],
)
def test_our_own_models(changes):
    config = ModelConfig(
        **dict(vocab_size=11, n_layers=2, d_model=8, n_heads=2, d_ff=6, seq_len=5, moe_layers=(1,), n_experts=4)
        | changes
    )
    counted = params.count(params.architecture(config.to_dict()))[-1]
    assert {"total": counted.total, "active": round(counted.active)} == Transformer(config).count_parameters()


def test_a_second_head_is_counted_apart_and_never_active():
    config = ModelConfig(
        vocab_size=11, n_layers=2, d_model=8, n_heads=2, d_ff=6, seq_len=5, moe_layers=(1,), n_experts=4, mtp_coef=0.1
    )
    parts = {p.name: p for p in params.count(params.architecture(config.to_dict()))}
    model = Transformer(config)
    assert parts["all"].total == model.count_parameters()["total"] and parts["second head"].active == 0
    assert parts["second head"].total == sum(p.size for p in model.next_but_one.parameters().values())


def test_work_by_hand():
    """One layer, D 2, one head, a dense layer of width 3 without gate, 5 tokens in the vocabulary; 7 positions.

    Attention 4 matrices of 4 weights, feed-forward 12, head 10: 38 weights, 76 operations; scores and values 2 * 7 *
    2 each.
    """
    a = ModelConfig(n_layers=1, d_model=2, vocab_size=5, n_heads=1, d_ff=3, moe_layers=(), seq_len=7)
    assert params.count(a)[-1].flops == 76 and params.count(a, context=7)[-1].flops == 76 + 56
    two = dataclasses.replace(a, n_layers=2, windows=[3, 0])  # 3 and 7 positions, or 2 and 2 of a context of 2
    assert [params.count(two, context=n)[-1].flops - params.count(two)[-1].flops for n in (7, 2)] == [80, 32]
    latent = dataclasses.replace(a, attention="latent", kv_rank=1, rope_dim=2, head_dim=2, v_dim=4, q_rank=0)
    assert params.count(latent, context=7)[-1].flops - params.count(latent)[-1].flops == 2 * 7 * (2 + 2 + 4)
    mixture = dataclasses.replace(a, moe_layers=(0,), n_experts=3, top_k=2, n_shared=1)  # three of four, and D x E
    assert params.count(mixture)[-1].flops == 76 + 2 * (2 * 12 + 2 * 3)
    cosine = dataclasses.replace(mixture, router="cosine_top_k", router_options={"router_width": 5})  # D x R and R x E
    assert params.count(cosine)[-1].flops == 76 + 2 * (2 * 12 + 2 * 5 + 5 * 3)
    in_text = params.count(two, length=6)[-1].flops - params.count(two)[-1].flops  # (1+2+3+3+3+3)/6, (1+2+3+4+5+6)/6
    assert in_text == 8 * (2.5 + 3.5)
    tied = params.count(dataclasses.replace(a, tied=True))[-1]
    assert tied.flops == 76 and tied.total == params.count(a)[-1].total - 10


def test_what_is_no_config_is_refused():
    with pytest.raises(ValueError, match="a model's config .1. must be an object"):
        params.architecture([1])
    with pytest.raises(ValueError, match="lacks .*hidden_size"):
        params.architecture({"num_hidden_layers": 3})


@pytest.mark.parametrize("preset", params.PRESETS)
def test_a_small_model_of_the_same_kind_is_a_setting(preset):
    """Sizes shrunk, everything else as in the preset: it runs forwards and backwards, and its arrays are what was
    counted."""
    big = params.PRESETS[preset]
    config = dataclasses.replace(
        big,
        vocab_size=11,
        n_layers=2,
        moe_layers=(1,),
        d_model=8,
        d_ff=6,
        n_heads=4,
        seq_len=5,
        n_experts=8,
        d_expert=big.d_expert and 4,
        n_kv_heads=big.n_kv_heads and 2,
        head_dim=big.head_dim and 4,
        q_rank=min(big.q_rank, 3),
        kv_rank=3,
        rope_dim=2,
        v_dim=big.v_dim and 2,
        windows=big.windows and (3, 0),
        top_k=2,
        router_options=big.router_options
        | ({"n_groups": 4, "group_limit": 2} if "n_groups" in big.router_options else {}),
    )
    model, ids = Transformer(config), np.arange(10).reshape(2, 5) % 11
    model.loss(ids, ids).total.backward()
    assert all(np.isfinite(p.grad).all() for p in model.parameters().values() if p.requires_grad and p.grad is not None)
    counted = params.count(params.architecture(config))[-1]
    assert {"total": counted.total, "active": round(counted.active)} == model.count_parameters()


TINY_MIXTRAL = {
    "model_type": "mixtral",
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 10,
    "intermediate_size": 6,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"num_attention_heads": 0}, "n_heads 0|division"),
        ({"hidden_size": -8}, "hidden_size -8"),
        ({"num_hidden_layers": 2.5}, "n_layers 2.5"),
        ({"num_hidden_layers": True}, "n_layers True"),
        ({"vocab_size": float("nan")}, "vocab_size nan"),
        ({"vocab_size": 10**400}, "vocab_size"),
        ({"num_local_experts": [4]}, "num_local_experts"),
        ({"num_experts_per_tok": 9}, "top_k 9 .*at most n_experts 4"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok None"),
        ({"intermediate_size": 0}, "d_ff 0 must be"),
        ({"num_key_value_heads": 3}, "n_kv_heads 3 must be a divisor of n_heads 4"),
        ({"model_type": "llama4"}, "model_type 'llama4' is not understood"),
        ({"model_type": "qwen2_moe"}, "lacks .*shared_expert_intermediate_size"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step 0 must be"),
        ({"moe_layer_freq": None}, "moe_layer_freq None must be"),
        ({"mlp_only_layers": [-1]}, "mlp_only_layers .* must be a list"),
        ({"model_type": "llama", "attention_bias": True}, "attention_bias"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings 'false' must be true or false"),
        ({"sliding_window": "8"}, "sliding_window '8' must be a whole number"),
        ({"model_type": "gpt_oss", "head_dim": 2}, "sliding_window None must be a whole number of at least 1"),
    ],
)
def test_a_published_config_that_makes_no_sense_is_refused(changes, match):
    assert params.count(params.architecture(TINY_MIXTRAL))[-1].total > 0
    with pytest.raises((ValueError, ArithmeticError), match=match):
        params.architecture(TINY_MIXTRAL | changes)


@pytest.mark.parametrize("lost", ["num_local_experts", "num_key_value_heads", "num_experts_per_tok",
                                  "intermediate_size"])
def test_a_published_config_that_lacks_a_size_is_not_counted_as_another_model(lost):
    """Would have caught: Mixtral without its number of experts, counted as a dense model."""
    with pytest.raises(ValueError, match=f"lacks {lost}"):
        params.architecture({name: value for name, value in TINY_MIXTRAL.items() if name != lost})


def test_a_grok_config_of_either_spelling_is_tied_unless_it_says_otherwise():
    """Untied, it has another 131,072 x 6,144 weights. Would have caught: a dense model, where K or E was missing."""
    config = {key: value for key, value in PUBLISHED["grok-1"].items() if key != "tie_word_embeddings"}
    other = {"num_experts" if key == "num_local_experts" else key: value for key, value in config.items()}
    untied = config | {"tie_word_embeddings": False}
    assert [params.count(params.architecture(each))[-1].total for each in (config, other, untied)] == [
        315_684_820_992, 315_684_820_992, 315_684_820_992 + 131_072 * 6_144]
    for lost in ("num_experts", "num_experts_per_tok", "num_key_value_heads"):
        with pytest.raises(ValueError, match=f"lacks {lost}"):
            params.architecture({key: value for key, value in other.items() if key != lost})


def test_a_deepseek_config_says_whether_its_queries_have_a_latent():
    """Width 1536 or none: D r + r H 192 + r, or D H 192 weights in each of 61 layers."""
    config = PUBLISHED["deepseek-v3"]
    with pytest.raises(ValueError, match="lacks q_lora_rank"):
        params.architecture({key: value for key, value in config.items() if key != "q_lora_rank"})
    more = params.count(config | {"q_lora_rank": None})[-1].total - params.count(config)[-1].total
    assert more == 61 * (7168 * 128 * 192 - 1536 * (7168 + 128 * 192 + 1))


@pytest.mark.parametrize("changes, layers", [
    ({}, (0, 1, 2, 3, 4, 5)), (dict(decoder_sparse_step=2), (1, 3, 5)), (dict(mlp_only_layers=[0, 4, 9]), (1, 2, 3, 5)),
    (dict(decoder_sparse_step=3, mlp_only_layers=[2]), (5,)), (dict(moe_layer_freq=2, first_k_dense_replace=1), (2, 4)),
    (dict(num_local_experts=0), ()), (dict(first_k_dense_replace=7), ())])
def test_the_layers_with_experts(changes, layers):
    """Qwen counts its steps from the end of the first: layer i has experts if step divides i + 1."""
    assert params.architecture(TINY_MIXTRAL | dict(num_hidden_layers=6) | changes).moe_layers == layers


def test_the_table_of_hash_routing_is_counted_and_not_made():
    config = ModelConfig(
        vocab_size=31,
        n_layers=2,
        d_model=8,
        n_heads=2,
        d_ff=6,
        seq_len=5,
        moe_layers=(0, 1),
        n_experts=4,
        router="hash",
    )
    counted = {p.name: p for p in params.count(params.architecture(config))}
    assert counted["routers"].total == 2 * 31 * 4 and counted["routers"].flops == 0
    assert counted["all"].total == Transformer(config).count_parameters()["total"]
    huge = dataclasses.replace(config, vocab_size=10**9)  # a table of 4 * 10**9 numbers, for each layer
    assert params.count(params.architecture(huge))[-1].total > 8 * 10**9


def test_copy_and_zero_experts_have_their_share_of_the_choices():
    """4 of 8 columns are experts, so of 2 choices one is expected to be an expert."""
    four = ModelConfig(n_experts=4, top_k=2)
    experts = [next(part for part in params.count(config) if part.name == "experts") for config in (
        four, dataclasses.replace(four, n_copy=3, n_zero=1), dataclasses.replace(four, top_k=1))]
    assert experts[1].total == experts[0].total and experts[1].active == experts[2].active == experts[0].active / 2


def test_a_router_that_steers_the_real_experts_leaves_a_token_real_k_of_them():
    """1.5 in each layer, or in one of three: (1.5 + 1 + 1) / 3. Without copies all of K = 2 are real."""
    def active(n_copy=4, **fields):
        config = ModelConfig(**dict(n_experts=4, top_k=2, n_copy=n_copy) | fields)
        return next(part.active for part in params.count(config) if part.name == "experts")

    one, steered = active(n_copy=0, top_k=1), {"router_options": {"real_k": 1.5}}
    assert active(router="real_bias", **steered) == pytest.approx(1.5 * one)
    assert active(router=["top_k", "real_bias", "top_k"], **steered) == pytest.approx(3.5 / 3 * one)
    assert active(router="real_bias") == active() == one and active(0, router="real_bias", **steered) == 2 * one
    assert active(1, router="real_bias", top_k=3) == 2 * one  # three different choices, one of them the copy at most


@pytest.mark.parametrize("asked, message", [
    ({"context": -1}, "context -1 must be at least 0"), ({"length": 0}, "length 0 at least 1"),
    ({"experts_per_token": 9}, "experts_per_token 9 must be from 0 to n_experts 8"),
    ({"experts_per_token": -1}, "experts_per_token -1 must be")])
def test_what_no_token_can_have_is_not_counted(asked, message):
    with pytest.raises(ValueError, match=message):
        params.count(ModelConfig(), **asked)


def test_a_sliding_window_of_all_layers_is_counted():
    mistral = {"model_type": "mistral", "num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 8,
               "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 8}
    assert params.architecture(mistral).windows == ()
    assert params.architecture(mistral | {"sliding_window": 4}).windows == (4, 4)


def test_a_published_model_is_counted_by_its_name():
    assert params.count("mixtral-8x7b") == params.count(params.PRESETS["mixtral-8x7b"])
    assert params.count(ModelConfig().to_dict()) == params.count(ModelConfig())
    with pytest.raises(ValueError, match="^unknown model 'mixtral': choose one of mixtral-8x7b, grok-1, "):
        params.count("mixtral")
    assert not hasattr(params, "find")
