"""Published weights: the logits of the equations (published.py), and some computed by another implementation."""
import json
import struct
import sys
import tracemalloc

import numpy as np
import pytest

import published
import tinymoe as tm
from tinymoe.files import CheckpointError
from tinymoe.model import published as interop

safetensors = pytest.importorskip("safetensors.numpy")
IDS = np.arange(24).reshape(2, 12) * 5 % 13  # two sequences
CASES = [
    (kind, changes)
    for kind, all_changes in {
        "mixtral": [
            {},
            dict(num_key_value_heads=1, num_experts_per_tok=1, rope_theta=5e3),
            dict(num_experts_per_tok=4, head_dim=6, tie_word_embeddings=True, rms_norm_eps=1e-3, sliding_window=12),
        ],
        "olmoe": [
            {},
            dict(norm_topk_prob=True, rope_theta=123.0),
            dict(num_key_value_heads=2, num_experts_per_tok=6, rms_norm_eps=0.01),
        ],
        "qwen2_moe": [
            {},
            dict(norm_topk_prob=True, mlp_only_layers=[], decoder_sparse_step=2, num_experts_per_tok=5),
            dict(qkv_bias=False, num_key_value_heads=4, tie_word_embeddings=True, rope_theta=123.0, rms_norm_eps=0.01),
            dict(use_sliding_window=True, sliding_window=12, max_window_layers=1,
                 layer_types=["full_attention", "sliding_attention", "full_attention"]),
        ],
        "qwen3_moe": [
            {},
            dict(attention_bias=True, norm_topk_prob=False, decoder_sparse_step=1, mlp_only_layers=[0, 2, 7]),
            dict(num_key_value_heads=1, num_experts_per_tok=1, tie_word_embeddings=True, rms_norm_eps=0.01),
            dict(head_dim=4, rope_parameters={"rope_type": "default", "rope_theta": 77.0}, rope_theta=77.0),
        ],
        "gpt_oss": [
            {},
            dict(sliding_window=1, num_experts_per_tok=1, num_key_value_heads=1, tie_word_embeddings=True),
            dict(layer_types=["full_attention"] * 3, num_experts_per_tok=4,
                 rope_scaling={"rope_type": "default"}, rms_norm_eps=0.01),
            dict(rope_scaling={"rope_type": "yarn", "factor": 2.0, "beta_fast": 0.5, "beta_slow": 0.02,
                               "attention_factor": 0.8, "original_max_position_embeddings": 8}),
        ],
        "deepseek_v3": [
            {},
            dict(q_lora_rank=None, norm_topk_prob=False, rope_theta=77.0),
            dict(n_group=1, topk_group=1, num_experts_per_tok=1),
            dict(n_group=2, topk_group=1, rms_norm_eps=1e-4),
            dict(rope_interleave=False, norm_topk_prob=False, num_experts_per_tok=1, first_k_dense_replace=0),
            dict(first_k_dense_replace=3, v_head_dim=9),
        ],
    }.items()
    for changes in all_changes
]
EXPECTED = {  # logits[:, -1, :4] of published.tensors(config) at IDS, by transformers 5.23 and torch in float32
    "mixtral": [[-0.612210, 0.230485, 1.086692, 1.549395], [-0.124139, -0.786215, 0.459319, -0.397344]],
    "olmoe": [[-0.216276, -0.871258, 0.390392, 1.451659], [-0.478358, -0.479563, 0.300667, 0.174819]],
    "qwen2_moe": [[-0.463739, 0.676507, -1.779352, -0.984865], [1.317792, 0.569951, -2.503868, 1.119230]],
    "qwen3_moe": [[0.108560, -0.874207, 1.484422, -1.010987], [0.169598, -0.641300, 1.078199, 0.882139]],
    "gpt_oss": [[-1.626823, 2.229304, -0.491924, 1.837184], [-0.868555, 1.478827, -2.794535, 1.718482]],
    "deepseek_v3": [[-2.234393, 0.191332, -0.717464, -1.475339], [-1.564351, -0.051145, -1.487943, 2.180880]]}


def write(folder, config, tensors, name="model.safetensors"):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.save_file(tensors, folder / name)
    return folder


def model_of(tmp_path, kind, changes, dtype=np.float32):
    config = published.CONFIGS[kind] | changes
    tensors = published.tensors(config)
    return config, tensors, interop.load(write(tmp_path / "model", config, tensors), dtype)


def logits(model):
    return model.forward(IDS).logits.data


@pytest.mark.parametrize("kind, changes", CASES)
def test_the_logits_are_those_of_the_equations(tmp_path, kind, changes):
    config, tensors, model = model_of(tmp_path, kind, changes, np.float64)
    expected = published.logits(config, tensors, IDS)
    np.testing.assert_allclose(logits(model), expected, rtol=0, atol=1e-12)
    single = interop.load(tmp_path / "model" / "model.safetensors")  # one file, float32
    assert logits(single).dtype == np.float32
    np.testing.assert_allclose(logits(single), expected, rtol=0, atol=1e-5 * abs(expected).max())


@pytest.mark.parametrize("kind", EXPECTED)
def test_the_logits_are_those_of_another_implementation(tmp_path, kind):
    *_, model = model_of(tmp_path, kind, {})
    np.testing.assert_allclose(logits(model)[:, -1, :4], EXPECTED[kind], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind, layer", [("mixtral", 0), ("olmoe", 1), ("deepseek_v3", 0), ("deepseek_v3", 2),
                                         ("qwen2_moe", 0), ("qwen2_moe", 1), ("qwen3_moe", 1), ("gpt_oss", 1),
                                         ("gpt_oss", 2)])
def test_a_block_alone(tmp_path, kind, layer):
    """Its tensors are enough, under the model's names or under its own; so is the whole model."""
    config = published.CONFIGS[kind]
    tensors, prefix = published.tensors(config, dtype=np.float64), f"model.layers.{layer}."
    part = {name: a for name, a in tensors.items() if name.startswith(prefix)}
    x = np.random.default_rng(1).standard_normal((1, 12, config["hidden_size"]))
    expected = published.block(config, tensors, layer, x[0])
    for held in (tensors, part, {name.removeprefix(prefix): a for name, a in part.items()}):
        block = interop.load_block(write(tmp_path / "block", config, held), layer, np.float64)
        y, routing = block(tm.Tensor(x), tm.RouteContext())
        np.testing.assert_allclose(y.data[0], expected, rtol=0, atol=1e-12)
        assert (routing is None) == ((kind, layer) in [("deepseek_v3", 0), ("qwen2_moe", 1)])
    for wrong in (9, True, 1.0, "1", None, "all"):
        with pytest.raises(ValueError, match=f"layer {wrong!r} must be a whole number from 0 to"):
            interop.load_block(tmp_path / "block", wrong)


@pytest.mark.parametrize("index", [True, False])
def test_several_files(tmp_path, index):
    config, tensors, whole = model_of(tmp_path, "mixtral", {})
    names, folder = list(tensors), tmp_path / "parts"
    files = {"a.safetensors": names[:20], "b.safetensors": names[20:]}
    for file, held in files.items():
        write(folder, config, {name: tensors[name] for name in held}, file)
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps(
            {"weight_map": {name: file for file, held in files.items() for name in held}}))
        (folder / "consolidated.safetensors.index.json").write_text('{"weight_map": {"w": "gone.safetensors"}}')
        (folder / "other.safetensors").write_bytes(b"not in the index")
    else:
        (folder / "consolidated.00.safetensors").write_bytes(b"the same weights under other names")
    np.testing.assert_array_equal(logits(interop.load(folder)), logits(whole))
    with pytest.raises(CheckpointError, match="missing"):
        interop.load(folder / "a.safetensors")


def test_a_block_alone_reads_only_its_files(tmp_path):
    config, folder = published.CONFIGS["olmoe"], tmp_path / "parts"
    tensors, prefix = published.tensors(config), "model.layers.1."
    files = {name: "b.safetensors" if name.startswith(prefix) else "a.safetensors" for name in tensors}
    for file in ("a.safetensors", "b.safetensors"):
        write(folder, config, {name: a for name, a in tensors.items() if files[name] == file}, file)
    with pytest.raises(CheckpointError, match="b.safetensors holds no tensor of layer 0: give the folder"):
        interop.load_block(folder / "b.safetensors", 0)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (folder / "a.safetensors").unlink()
    assert interop.load_block(folder, 1).is_moe
    with pytest.raises(CheckpointError, match="names a.safetensors: fetch it"):
        interop.load_block(folder, 0)


@pytest.mark.parametrize("kind", ["mixtral", "olmoe", "qwen2_moe", "deepseek_v3"])
def test_experts_may_lie_in_one_array(tmp_path, kind):
    """As transformers 5 holds them: gate_up_proj (E, 2F, D), gate first, and down_proj (E, D, F)."""
    config, tensors, model = model_of(tmp_path, kind, {})
    for i in range(config["num_hidden_layers"]):
        here = f"model.layers.{i}.mlp."
        layer = {name.replace(f"{i}.block_sparse_moe", f"{i}.mlp").removeprefix(here): name for name in tensors}
        experts = [name for name in layer if name.startswith("experts.")]
        gate, up, down = ([tensors[layer[name]] for name in experts if name.split(".")[2] in which]
                          for which in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")))
        if experts:
            fused = {f"{here}experts.gate_up_proj": np.concatenate([gate, up], axis=1),
                     f"{here}experts.down_proj": np.array(down),
                     f"{here}gate.weight": tensors.pop(layer["gate.weight"])}
            tensors = {name: a for name, a in tensors.items() if name not in [layer[e] for e in experts]} | fused
    np.testing.assert_array_equal(logits(interop.load(write(tmp_path / "fused", config, tensors))), logits(model))


@pytest.mark.parametrize("value, stored", [(np.nan, np.float32), (-np.inf, np.float32), (1e200, np.float64)])
def test_weights_that_are_not_finite_are_named(tmp_path, value, stored):
    config = published.CONFIGS["olmoe"]
    tensors, name = published.tensors(config, dtype=stored), "model.layers.1.mlp.gate.weight"
    tensors[name][0, 0] = value
    with pytest.raises(CheckpointError, match=f"{name} is not finite in float32"):
        interop.load(write(tmp_path, config, tensors))


def test_a_window_that_limits_nothing_is_dropped():
    def windows(kind, **changes):
        return interop.model_config(published.CONFIGS[kind] | changes).windows

    assert windows("mixtral", sliding_window=12) == windows("gpt_oss", sliding_window=12) == ()
    assert windows("gpt_oss", sliding_window=11) == (11, 0, 11)


@pytest.mark.parametrize("kind", published.CONFIGS)
def test_a_value_of_a_wrong_type_is_refused_in_one_line(kind):
    config = published.CONFIGS[kind]
    for key in [*config, "rope_parameters", "sliding_window", "layer_types", "num_nextn_predict_layers", "head_dim"]:
        for value in ("8", "false", -2, 1.5, float("nan"), True, [1], ["a"], {"a": [1]}, None):
            try:
                interop.model_config(config | {key: value})
            except ValueError as error:
                assert "\n" not in str(error)
    for wrong in ([], "x", None, 3):
        with pytest.raises(ValueError, match="a model's config .* must be an object"):
            interop.model_config(wrong)


@pytest.mark.parametrize("kind", ["F16", "BF16", "F64"])
def test_other_types_of_numbers(tmp_path, kind):
    """Numbers that each type holds exactly give the logits of float32. The file is written by hand: bytes and a
    header."""
    config, header, data = published.CONFIGS["deepseek_v3"], {}, b""
    exact = {name: (a.view(np.uint32) & 0xFFFF0000).view(np.float32).astype(np.float16).astype(np.float32)
             for name, a in published.tensors(config).items()}
    exact = {name: np.where(np.abs(a) < 1e-3, 0, a).astype(np.float32) for name, a in exact.items()}  # no subnormals
    for name, a in exact.items():
        forms = {"F16": a.astype("<f2"), "F64": a.astype("<f8"), "BF16": (a.view(np.uint32) >> 16).astype("<u2")}
        raw = forms[kind].tobytes()
        header[name] = {"dtype": kind, "shape": a.shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    plain = logits(interop.load(write(tmp_path, config, exact)))
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    np.testing.assert_array_equal(logits(interop.load(tmp_path)), plain)


def test_a_qwen3_file_may_call_its_experts_local(tmp_path):
    """As transformers writes it since version 5; the logits are the same."""
    config, tensors, model = model_of(tmp_path, "qwen3_moe", {})
    renamed = {"num_local_experts" if key == "num_experts" else key: value for key, value in config.items()}
    np.testing.assert_array_equal(logits(interop.load(write(tmp_path / "new", renamed, tensors))), logits(model))


def test_numbers_of_four_bits(tmp_path):
    """Blocks of 16 bytes hold 32 numbers, the lower half of a byte first; a scale s multiplies them by 2^(s - 127)."""
    config = published.CONFIGS["gpt_oss"] | {"quantization_config": {"quant_method": "mxfp4"}}
    tensors, packed, rng = published.tensors(config), {}, np.random.default_rng(0)
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        E, inner, outer = tensors[name].shape
        blocks = rng.integers(0, 256, (E, outer, inner // 32, 16), dtype=np.uint8)
        scales = rng.integers(122, 126, (E, outer, inner // 32), dtype=np.uint8)
        exact = np.zeros((E, inner, outer), np.float32)
        for e, o, b, i in np.ndindex(blocks.shape):
            for half, number in enumerate((blocks[e, o, b, i] % 16, blocks[e, o, b, i] // 16)):
                exact[e, 32 * b + 2 * i + half, o] = values[number] * 2.0 ** (int(scales[e, o, b]) - 127)
        tensors[name] = exact
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    plain = logits(interop.load(write(tmp_path / "plain", config, tensors)))
    rest = {name: a for name, a in tensors.items() if f"{name}_blocks" not in packed}
    np.testing.assert_array_equal(logits(interop.load(write(tmp_path / "packed", config, rest | packed))), plain)
    np.testing.assert_allclose(plain, published.logits(config, tensors, IDS), atol=1e-5)
    packed["model.layers.0.mlp.experts.down_proj_scales"][0] = 255  # 2 to the power of 128
    with pytest.raises(CheckpointError, match="layers.0.mlp.experts.down_proj is not finite"):
        interop.load(write(tmp_path / "packed", config, rest | packed))
    packed["model.layers.0.mlp.experts.down_proj_scales"][0] = 127
    del packed["model.layers.1.mlp.experts.down_proj_scales"]
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.experts.down_proj_scales \(4, 32, 2\) is missing"):
        interop.load(write(tmp_path / "packed", config, rest | packed))


def test_it_is_a_model_like_any_other(tmp_path):
    """Saved and loaded it is the same, settings included, and it can be trained."""
    *_, model = model_of(tmp_path, "deepseek_v3", dict(rope_theta=77.0, rms_norm_eps=1e-3))
    model.save(tmp_path / "own.npz")
    np.testing.assert_array_equal(logits(tm.Transformer.load(tmp_path / "own.npz")), logits(model))
    model.loss(IDS, IDS).total.backward()
    assert all(p.grad is not None for p in model.parameters().values() if p.requires_grad)


def test_what_changes_no_logits_may_be_there(tmp_path):
    config = published.CONFIGS["deepseek_v3"]
    tensors = published.tensors(config)
    plain = logits(interop.load(write(tmp_path, config, tensors)))
    more = {
        "model.layers.3.eh_proj.weight": np.ones((16, 32)),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2),
    }
    settings = {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "torch_dtype": "float32",
        "unknown": None,
    }
    np.testing.assert_array_equal(logits(interop.load(write(tmp_path, config | settings, tensors | more))), plain)
    config = published.CONFIGS["mixtral"] | {"tie_word_embeddings": True}
    tensors = published.tensors(config) | {"lm_head.weight": published.tensors(config)["model.embed_tokens.weight"]}
    assert interop.load(write(tmp_path, config, tensors)).head is None
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    with pytest.raises(CheckpointError, match="lm_head.weight is not the embedding"):
        interop.load(write(tmp_path, config, tensors))


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("mixtral", dict(model_type="llama"), "'llama' cannot be read.*mixtral"),
        ("mixtral", dict(sliding_window=8), "sliding_window 8"),
        ("mixtral", dict(hidden_act="gelu"), "hidden_act 'gelu'"),
        ("mixtral", dict(quantization_config={"bits": 4}), "quantization_config"),
        ("deepseek_v3", dict(quantization_config={"quant_method": "fp8"}, ep=1), "fp8.*eight bits or fewer cannot"),
        ("mixtral", dict(final_logit_softcapping=30.0), "final_logit_softcapping 30.0"),
        ("olmoe", dict(attention_bias=True), "attention_bias True"),
        ("olmoe", dict(clip_qkv=8.0), "clip_qkv 8.0"),
        ("olmoe", dict(rope_scaling={"type": "linear", "factor": 2.0}), "linear"),
        ("deepseek_v3", dict(rope_scaling={"type": "yarn", "factor": 40}), "yarn"),
        ("deepseek_v3", dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}), "yarn"),
        ("qwen2_moe", dict(use_sliding_window=True), "sliding_window 4 is not supported"),
        ("qwen2_moe", dict(layer_types=["full_attention", "sliding_attention"]), "layer_types sliding_attention"),
        ("qwen3_moe", dict(layer_types=["linear_attention"]), "layer_types linear_attention"),
        ("qwen2_moe", dict(attention_bias=True), "attention_bias True.* changes nothing for this qwen2_moe"),
        ("qwen3_moe", dict(shared_expert_intermediate_size=8), "shared_expert_intermediate_size 8"),
        ("qwen3_moe", dict(model_type="qwen3_next"), "'qwen3_next' cannot be read"),
        ("qwen3_moe", dict(decoder_sparse_step=0), "decoder_sparse_step 0 must be a whole number"),
        ("qwen3_moe", dict(mlp_only_layers=3), "mlp_only_layers 3 must be a list"),
        ("qwen3_moe", dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "yarn"),
        ("gpt_oss", dict(swiglu_limit=6.0), "swiglu_limit 6.0"),
        ("gpt_oss", dict(rope_scaling=None), "rotary positions with .* for gpt_oss a rope_type of default or yarn"),
        ("gpt_oss", dict(rope_scaling={"rope_type": "linear", "factor": 2.0}), "linear"),
        *[("gpt_oss", dict(rope_scaling=dict(rope_type=kind, type="yarn", factor=2.0,
                                             original_max_position_embeddings=6)), f"{kind}.* are not supported")
          for kind in ("linear", "default")],
        ("gpt_oss", dict(rope_scaling={"rope_type": "default", "type": "yarn"}), "yarn.* are not supported"),
        *[("gpt_oss", dict(rope_scaling=dict(rope_type="yarn", factor=2.0, original_max_position_embeddings=6,
                                             truncate=value)), f"truncate {value} must be") for value in (None, 0)],
        ("gpt_oss", dict(layer_types=None, sliding_window=None), "sliding_window None must be a whole number"),
        ("gpt_oss", dict(layer_types=None, sliding_window=0), "sliding_window 0 must be a whole number of at least 1"),
        ("gpt_oss", dict(attention_bias=None), "attention_bias None must be true or false"),
        *[("deepseek_v3", {key: "false"}, f"{key} 'false' must be true or false")
          for key in ("norm_topk_prob", "rope_interleave", "tie_word_embeddings")],
        *[("qwen2_moe", {key: 1}, f"{key} 1 must be true or false") for key in ("qkv_bias", "use_sliding_window")],
        *[("deepseek_v3", dict(n_group=value), f"n_group {value!r} must be") for value in (-2, 0, True, "4")],
        ("deepseek_v3", dict(routed_scaling_factor=None), "routed_scaling_factor None must be"),
        ("qwen3_moe", dict(moe_intermediate_size=0), "moe_intermediate_size 0 must be"),
        ("gpt_oss", dict(rope_scaling={"rope_type": "yarn", "factor": 2.0, "mscale": 1.0}), "mscale"),
        ("gpt_oss", dict(rope_scaling={"rope_type": "yarn", "factor": 2.0}), "yarn.* lack original_max_position_emb"),
        ("qwen3_moe", dict(is_causal=False), "is_causal False is not supported"),
        ("olmoe", dict(clip_qkv=0.0), "not supported: clip_qkv 0.0"),
        ("gpt_oss", dict(quantization_config={"quant_method": "gptq"}), "only quant_method mxfp4"),
        ("gpt_oss", dict(layer_types=["full_attention"]), "layer_types must name each of the 3 layers, not 1"),
        ("gpt_oss", dict(layer_types=["chunked_attention"] * 3), "layer_types chunked_attention"),
        ("gpt_oss", dict(sliding_window=-1), "sliding_window -1"),
        ("mixtral", dict(attention_bias=True), "attention_bias True"),
        ("mixtral", dict(scoring_func="sigmoid"), "scoring_func 'sigmoid'.* changes nothing for this mixtral"),
        ("olmoe", dict(swiglu_limit=7.0), "swiglu_limit 7.0"),
        ("deepseek_v3", dict(topk_method="greedy"), "topk_method 'greedy'"),
        ("deepseek_v3", dict(scoring_func="softmax"), "scoring_func 'softmax'"),
        ("deepseek_v3", dict(moe_layer_freq=2), "moe_layer_freq 2"),
        ("deepseek_v3", dict(num_key_value_heads=1), "num_key_value_heads 1"),
        ("deepseek_v3", dict(topk_group=5), "group_limit 5"),
        ("deepseek_v3", dict(qk_rope_head_dim=3), "rope_dim 3"),
        ("deepseek_v3", dict(rms_norm_eps=0), "norm_eps 0"),
        ("mixtral", dict(hidden_size="16"), "hidden_size '16' must be a whole number"),
        ("mixtral", dict(num_attention_heads=0), "num_attention_heads 0 must be"),
        ("olmoe", dict(rope_theta=-1.0), "rope_theta -1.0"),
    ],
)
def test_configs_that_would_be_computed_wrongly_are_refused(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        interop.model_config(published.CONFIGS[kind] | changes)


@pytest.mark.parametrize("kind", published.CONFIGS)
def test_sizes_that_are_not_given_are_named(kind):
    config = dict(published.CONFIGS[kind])
    del config["num_experts_per_tok"], config["hidden_size"]
    with pytest.raises(ValueError, match="lacks hidden_size, num_experts_per_tok"):
        interop.model_config(config)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("model.norm.weight"), r"model.norm.weight \(16,\) is missing"),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.ones(3)}),
            "q_proj.bias is not part of this model",
        ),
        (
            lambda t: t.update({"lm_head.weight": np.ones((16, 13))}),
            r"lm_head.weight has shape \(16, 13\), not \(13, 16\)",
        ),
        (lambda t: t.update({"lm_head.weight": np.ones((13, 16), np.int8)}), "lm_head.weight is I8"),
        (
            lambda t: [t.pop(name) for name in list(t) if "experts" in name],
            r"w1.weight \(10, 16\) is missing.*and 16 more",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, change, message):
    config = published.CONFIGS["mixtral"]
    tensors = published.tensors(config)
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        interop.load(write(tmp_path, config, tensors))


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("mixtral", dict(vocab_size=40_000_000), "asks for 1,280,.* parameters, but the file holds"),
        ("mixtral", dict(num_local_experts=2_000_000_000), "asks for"),
        ("mixtral", dict(num_hidden_layers=10_000), "asks for"),
        ("deepseek_v3", dict(intermediate_size=2_000_000_000), "asks for"),
        (
            "olmoe",
            dict(num_hidden_layers=2_000_000_000),
            "num_hidden_layers 2000000000 must be a whole number from 1 to 10,000",
        ),
        ("deepseek_v3", dict(num_nextn_predict_layers=2_000_000_000, vocab_size=10**9), "asks for"),
    ],
)
def test_a_config_far_larger_than_its_tensors_is_refused_before_the_model_is_made(tmp_path, kind, changes, message):
    folder = write(tmp_path / "model", published.CONFIGS[kind] | changes, published.tensors(published.CONFIGS[kind]))
    tracemalloc.start()
    with pytest.raises((ValueError, CheckpointError), match=message):
        interop.load(folder)
    if changes.keys() & {"num_local_experts", "intermediate_size"}:  # a layer alone is too large too
        with pytest.raises(CheckpointError, match="asks for"):
            interop.load_block(folder, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


def test_files_that_cannot_be_read_are_refused_by_name(tmp_path):
    def refused(message, path=tmp_path):
        with pytest.raises(CheckpointError, match=message):
            interop.load(path)

    refused("holds no .safetensors file: check the path")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused("only pickles .pytorch_model.bin.")
    refused("is a pickle", tmp_path / "pytorch_model.bin")
    config = published.CONFIGS["mixtral"]
    write(tmp_path, config, published.tensors(config))
    refused("none.safetensors does not exist", tmp_path / "none.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    for broken in (content[:5], content[:-1], b""):
        (tmp_path / "model.safetensors").write_bytes(broken)
        refused("not a complete .safetensors file")
    index = tmp_path / "model.safetensors.index.json"
    (tmp_path / "model.safetensors").unlink()
    for names, message in (({"w": f"../{tmp_path.name}/copy.safetensors"}, "must name .safetensors files of its own"),
                           ({"w": "pytorch_model.bin"}, "must name"), ({}, "must name"),
                           ({"v": "copy.safetensors", "w": "gone.safetensors"}, "names gone.safetensors: fetch it")):
        (tmp_path / "copy.safetensors").write_bytes(content)
        index.write_text(json.dumps({"weight_map": names}))
        refused(message)
    index.unlink()
    (tmp_path / "again.safetensors").write_bytes(content)
    refused("in again.safetensors and in another file|in copy.safetensors and in another file")
    (tmp_path / "model.safetensors").write_bytes(content)
    interop.load(tmp_path)  # it comes first, as for transformers: what is beside it may be of before
    (tmp_path / "config.json").write_text("[1]")
    refused("config.json is no JSON object")
    (tmp_path / "config.json").unlink()
    refused("config.json does not exist")


def test_the_package_is_asked_for_only_where_it_is_needed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert interop.model_config(published.CONFIGS["olmoe"]).qk_norm
    with pytest.raises(ImportError, match="pip install safetensors"):
        interop.load(tmp_path)


def test_only_float32_and_float64(tmp_path):
    with pytest.raises(ValueError, match="float16 must be float32 or float64"):
        model_of(tmp_path, "olmoe", {}, np.float16)
