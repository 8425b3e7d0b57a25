"""Published weights in .safetensors, of a small Mixtral, OLMoE, Qwen-MoE, GPT-OSS or DeepSeek-V3, as a Transformer.

The files store four things in another form, which does not change the result:

    a matrix is (out, in) there, (in, out) here;
    an expert's gate and up matrices are two there and one here, (D, 2F), with the activated half first;
    DeepSeek-V3's rotary positions turn entries 2i and 2i + 1 together, ours i and i + d/2: we reorder the columns;
    GPT-OSS holds all experts in one array, gate and up columns in turns, perhaps in four bits (MXFP4).

An unsupported setting that would change the logits raises an error that names it. Settings that only training reads
(dropout, coefficients of losses, the layers of multi-token prediction) are ignored.
"""

import dataclasses
import math
from pathlib import Path

import numpy as np

from ..files import CheckpointError, printable, read_json
from ..moe.settings import FLAG, Check, integer_from
from .block import Block
from .config import ModelConfig
from .counting import KEYS, SIZES, architecture_of_published, checked, require_size
from .transformer import Transformer

OTHERS = {"mixtral": "", "olmoe": "norm_topk_prob", "qwen2_moe": "norm_topk_prob", "qwen3_moe": "norm_topk_prob",
          "gpt_oss": "sliding_window",  # keys that a config.json needs beside its sizes
          "deepseek_v3": "n_group topk_group norm_topk_prob routed_scaling_factor"}
YARN = {"original_length": "original_max_position_embeddings"} | {
    name: name for name in ("factor", "beta_fast", "beta_slow", "truncate", "attention_factor")}
QWEN = "decoder_sparse_step mlp_only_layers use_sliding_window max_window_layers"
OPTIONAL = {"qwen2_moe": f"{QWEN} qkv_bias", "qwen3_moe": f"{QWEN} attention_bias num_local_experts",
            "gpt_oss": "attention_bias initial_context_length experts_per_token quantization_config"}
DEFAULTS = {"mixtral": (1e-5, 1e6), "olmoe": (1e-5, 1e4), "qwen2_moe": (1e-6, 1e4), "qwen3_moe": (1e-6, 1e4),
            "gpt_oss": (1e-5, 1.5e5), "deepseek_v3": (1e-6, 1e4)}  # rms_norm_eps, rope_theta
ONLY = {"deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1},
        "gpt_oss": {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}}  # key -> the only value that can be computed
READ = """tie_word_embeddings num_key_value_heads head_dim rms_norm_eps rope_theta rope_scaling rope_parameters
    rope_interleave sliding_window layer_types num_nextn_predict_layers""".split()
IGNORED = """model_type architectures auto_map dtype torch_dtype transformers_version use_cache bos_token_id
    eos_token_id pad_token_id initializer_range attention_dropout output_router_logits router_aux_loss_coef
    router_jitter_noise aux_loss_alpha seq_aux pretraining_tp ep_size qk_head_dim _name_or_path return_dict id2label
    label2id chunk_size_feed_forward max_length _attn_implementation_autoset""".split()
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
MXFP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])  # the numbers of four bits
INDEX = "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
LATENT = {"query_down": "q_a_proj", "query_norm": "q_a_layernorm", "query": "q_b_proj", "latent": "kv_a_proj_with_mqa",
          "latent_norm": "kv_a_layernorm", "key_value": "kv_b_proj", "out": "o_proj"}
GROUPED = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "query_norm": "q_norm", "key_norm": "k_norm",
           "out": "o_proj"}


def model_config(config: dict) -> ModelConfig:
    """The ModelConfig of a published config.json, given as a dict, with aux_coef 0.

    model_type: mixtral, olmoe, qwen2_moe, qwen3_moe, gpt_oss or deepseek_v3.
    Raises ValueError for another model_type, a missing or unknown key, a wrong value, and an unsupported setting.
    Stretched rotary positions (YaRN), sliding windows below the longest sequence and quantised weights are read for
    gpt_oss alone.
    """
    config = checked(config)
    kind = config.get("model_type")
    if str(kind) not in OTHERS:
        raise ValueError(f"model_type {kind!r} cannot be read: those that can are {', '.join(OTHERS)}")
    _refuse(config, kind)
    eps, theta = DEFAULTS[kind]
    options = {"renormalise": kind in ("mixtral", "gpt_oss") or config["norm_topk_prob"]}
    if kind == "deepseek_v3":
        options["gate_scale"] = float(config["routed_scaling_factor"])
        if (config["n_group"] or 1) > 1:
            options |= {"n_groups": config["n_group"], "group_limit": config["topk_group"]}
    theta, yarn = _rope(config, kind, theta)
    made, longest = architecture_of_published(config), config["max_position_embeddings"]
    windows = [window if window < longest else 0 for window in made.windows]  # the others limit nothing
    return dataclasses.replace(
        made, windows=windows if any(windows) else (), seq_len=longest, norm_eps=config.get("rms_norm_eps", eps),
        rope_theta=theta, yarn=yarn, latent_eps=eps if kind == "deepseek_v3" else None,
        router_options=options, aux_coef=0.0)


def _refuse(config, kind):
    """Raise ValueError for a missing setting, and for an unsupported one that would change the logits."""
    sizes, others = (*KEYS, "max_position_embeddings", *SIZES[kind].split()), OTHERS[kind].split()
    if missing := [key for key in (*sizes, *others) if key not in config]:
        raise ValueError(f"the config of this {kind} lacks {', '.join(missing)}: add them")
    quantised = config.get("quantization_config")
    if quantised and (kind != "gpt_oss" or quantised.get("quant_method") != "mxfp4"):
        raise ValueError(f"quantization_config {printable(str(quantised))[:80]}: weights of eight bits or fewer cannot "
                         "be read, only quant_method mxfp4 of gpt_oss: save them as bfloat16, without this key")
    only = {"hidden_act": "silu", "is_causal": True} | ONLY.get(kind, {})
    for key, value in only.items():
        if config.get(key, value) != value:
            raise ValueError(f"{key} {config[key]!r} is not supported: only {value!r} is")
    known = {*sizes, *others, *only, *READ, *IGNORED, *OPTIONAL.get(kind, "").split()}
    if other := [f"{key} {value!r}" for key, value in sorted(config.items()) if key not in known and not (
            value is None or value is False or value in ("", [], {}))]:  # a 0 may change the logits
        raise ValueError(f"not supported: {printable(', '.join(other))}; remove it from the config if it changes "
                         f"nothing for this {kind}")
    _refuse_windows(config, kind)
    heads = config["num_attention_heads"]
    if kind == "deepseek_v3" and config.get("num_key_value_heads", heads) not in (heads, None):
        raise ValueError(f"num_key_value_heads {config['num_key_value_heads']!r} must be num_attention_heads {heads}: "
                         "in latent attention heads share no keys and values")


def _refuse_windows(config, kind):
    """Raise ValueError for attention that does not see the whole prefix."""
    window, longest = config.get("sliding_window"), config["max_position_embeddings"]
    if kind.startswith("qwen") and not config.get("use_sliding_window"):
        window = None
    if kind != "gpt_oss" and window and window < longest:
        raise ValueError(f"sliding_window {window} is not supported: lower max_position_embeddings {longest} to it, so "
                         "that no sequence is longer than the window")
    types, layers = {"full_attention", *(["sliding_attention"] if window else [])}, config.get("layer_types") or ()
    if other := set(layers) - types:
        raise ValueError(f"layer_types {printable(', '.join(sorted(other)))}: only {' and '.join(sorted(types))} "
                         "can be computed here")
    if kind == "gpt_oss" and layers and len(layers) < config["num_hidden_layers"]:
        raise ValueError(f"layer_types must name each of the {config['num_hidden_layers']} layers, not {len(layers)}")


def _rope(config, kind, default):
    """(base of the rotary angles, ModelConfig.yarn), from any of the keys that hold them.

    GPT-OSS must say which positions it has. Raises ValueError for other stretched positions than its YaRN.
    """
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})  # not both, as transformers does
    theta = rope.pop("rope_theta", config.get("rope_theta", default))
    rest = {name: value for name, value in rope.items() if name not in ("rope_type", "type") and value is not None
            and (name, value) != ("partial_rotary_factor", 1)}
    kinds = {str(rope[name]) for name in ("rope_type", "type") if name in rope}  # a second one must be the same
    if kind != "gpt_oss":
        kinds = kinds or {"default"}
    if kind == "gpt_oss" and kinds == {"yarn"} and rest.keys() <= set(YARN.values()):
        if lacking := [key for key in ("factor", YARN["original_length"]) if key not in rest]:
            raise ValueError(f"its rotary positions {rope} lack {' and '.join(lacking)}")
        FLAG.require("truncate", rope.get("truncate", True))  # null is not the default for transformers
        return theta, {name: rest[key] for name, key in YARN.items() if key in rest}
    if kinds != {"default"} or rest:
        raise ValueError(f"rotary positions with {rope} are not supported: only plain ones are, without rope_scaling, "
                         "and for gpt_oss a rope_type of default or yarn")
    return theta, None


def _read(path, *layer):
    """(dict of config.json, its ModelConfig, tensors: name -> {"shape", "dtype", "data"}) of a folder or one file.

    layer: the only one that is needed, if it is given; files that the index names for others are not read.
    """
    try:
        from safetensors import SafetensorError, deserialize
    except ImportError:
        raise ImportError("reading published weights needs a package that is not installed: "
                          "pip install safetensors") from None
    path, tensors = Path(path), {}
    folder, files = path if path.is_dir() else path.parent, _files(path, *layer)
    published = _json(folder / "config.json")
    config = model_config(published)  # raises before anything large is read
    for number in layer:
        last = config.n_layers - 1
        Check(integer_from(0, last + 1), f"a whole number from 0 to {last}").require("layer", number)
    for file in files:
        try:
            found = dict(deserialize(file.read_bytes()))
        except OSError as error:
            raise CheckpointError(f"cannot read {file} ({error.strerror}): fetch it again") from None
        except SafetensorError as error:
            raise CheckpointError(f"{file} is not a complete .safetensors file ({printable(error)}): "
                                  "fetch it again") from None
        if twice := sorted(found.keys() & tensors.keys()):
            raise CheckpointError(f"{folder} holds {twice[0]} in {file.name} and in another file: move one away")
        tensors |= {name: t for name, t in found.items() if not name.endswith("rotary_emb.inv_freq")}  # older files
    return published, config, tensors


def _files(path, *layer):
    """The .safetensors files of a path: the path itself, or of a folder model.safetensors, else those that its index
    names (for a layer, if it is given), else all. A consolidated*.safetensors has other names for the same weights."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: check the path")
    if not path.is_dir():
        if path.suffix in PICKLED:
            raise CheckpointError(f"{path} is a pickle, which can run code when it is read: convert it to .safetensors")
        return [path]
    if (path / "model.safetensors").is_file():  # an index beside it is of before, for transformers too
        return [path / "model.safetensors"]
    index = sorted(path.glob("*.safetensors.index.json"), key=lambda file: (file.name != INDEX, file.name))
    if index:
        there = _json(index[0]).get("weight_map")
        if not isinstance(there, dict):
            there = {}
        needed = tuple(f"model.layers.{number}." for number in layer)
        names = {str(file) for name, file in there.items() if name.startswith(needed)}
        names = sorted(names or set(map(str, there.values())))
        if not names or not all(name.endswith(".safetensors") and Path(name).name == name for name in names):
            raise CheckpointError(f"{index[0]} names {printable(names)[:200]}: it must name .safetensors files of its "
                                  "own folder")
        if absent := [name for name in names if not (path / name).is_file()]:
            raise CheckpointError(f"{index[0]} names {printable(', '.join(absent))[:200]}: fetch it, it is not there")
        return [path / name for name in names]
    files = sorted(file for file in path.glob("*.safetensors") if file.is_file())
    if not files:
        pickled = sorted(file.name for file in path.iterdir() if file.suffix in PICKLED)
        only = f", only pickles ({', '.join(pickled)}), which tinymoe never reads: convert them" if pickled else ""
        raise CheckpointError(f"{path} holds no .safetensors file{only or ': check the path'}")
    return [file for file in files if not file.name.startswith("consolidated")] or files


def _json(path):
    """The object in a JSON file. Raises CheckpointError where there is none."""
    try:
        return read_json(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: put the model's config.json beside its weights") from None
    except (OSError, ValueError):
        raise CheckpointError(f"{path} is no JSON object: fetch it again") from None


class _Weights:
    """Tensors by their published names. Each is taken once; `finish` lists those missing, misshapen or left over.

    config: of the model that they are for. Raises CheckpointError if it is far larger than they are.
    """

    def __init__(self, path, config, tensors, dtype):
        self.path, self.tensors, self.dtype, self.problems = path, tensors, np.dtype(dtype), []
        if self.dtype not in (np.float32, np.float64):
            raise ValueError(f"dtype {self.dtype} must be float32 or float64")
        try:
            require_size(config, sum(math.prod(t["shape"]) for t in tensors.values()))
        except ValueError as error:
            raise CheckpointError(f"{path} does not fit its config.json: {error}") from None

    def take(self, name, shape, dtypes=DTYPES):
        """The named array, checked against its published shape, in the model's dtype."""
        found = self.tensors.pop(name, None)
        if found is None:
            self.problems.append(f"{name} {shape} is missing")
        elif tuple(found["shape"]) != shape:
            self.problems.append(f"{name} has shape {tuple(found['shape'])}, not {shape}")
        elif found["dtype"] not in dtypes:
            self.problems.append(f"{name} is {found['dtype']}, not one of {', '.join(dtypes)}")
        else:
            array = np.frombuffer(found["data"], dtypes[found["dtype"]]).reshape(shape)
            if found["dtype"] == "BF16":  # the upper half of a float32, a type that NumPy lacks
                array = (array.astype(np.uint32) << 16).view(np.float32)
            return self._finite(name, array)
        return np.zeros(shape, self.dtype)

    def _finite(self, name, array):
        """The array in the model's dtype. Raises CheckpointError for NaN, and for what is too large."""
        with np.errstate(over="ignore"):
            array = array.astype(self.dtype)
        if not np.isfinite(array).all():
            raise CheckpointError(f"{self.path}: {name} is not finite in {self.dtype}: fetch the file again")
        return array

    def take_packed(self, name, shape):
        """The named array (E, I, O), plain or in MXFP4: 32 numbers of a row share a scale (OCP 2023, section 5.1).

        In MXFP4, NAME_blocks (E, O, I / 32, 16) has two numbers a byte, the lower half first, and NAME_scales
        (E, O, I / 32) the exponents, plus 127.
        """
        E, I, O = shape  # noqa: E741
        if name in self.tensors or I % 32:
            return self.take(name, shape)
        blocks, scales = (self.take(f"{name}_{part}", (E, O, I // 32, *rest), {"U8": "u1"}).astype(np.uint8)
                          for part, rest in (("blocks", (16,)), ("scales", ())))
        numbers = MXFP4[np.stack([blocks & 15, blocks >> 4], axis=-1)].reshape(E, O, I // 32, 32)
        exact = self._finite(name, np.ldexp(numbers, scales[..., None].astype(int) - 127))
        return np.ascontiguousarray(exact.reshape(E, O, I).transpose(0, 2, 1))

    def fill(self, parameter, name):
        """Set a parameter to the named tensor, transposed."""
        parameter.data = np.ascontiguousarray(self.take(name, parameter.shape[::-1]).T)

    def finish(self):
        """Raise a CheckpointError that lists every problem, if there is one."""
        left = [f"{name} is not part of this model" for name in sorted(self.tensors)]
        problems = [*self.problems[:6], *left[:2], *self.problems[6:], *left[2:]]  # what is left may explain the others
        if problems:
            more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
            raise CheckpointError(f"{self.path} does not fit its config.json: {'; '.join(problems[:8])}{more}")


def load(path: str | Path, dtype=np.float32) -> Transformer:
    """The Transformer of a published model, in float32 or float64.

    path: a folder with config.json and .safetensors files, with or without an index, or one such file beside its
    config.json. Raises ImportError without the package safetensors, ValueError for what `model_config` refuses, and
    CheckpointError for files that are missing, broken or pickled, or whose tensors do not fit the config.
    """
    published, config, tensors = _read(path)
    extra = min(published.get("num_nextn_predict_layers") or 0, len(tensors))  # layers of multi-token prediction
    beyond = tuple(f"model.layers.{config.n_layers + i}." for i in range(extra))
    weights = _Weights(path, config, {name: t for name, t in tensors.items() if not name.startswith(beyond)}, dtype)
    model = Transformer(config, dtype=dtype)
    embedding = weights.take("model.embed_tokens.weight", (config.vocab_size, config.d_model))
    model.token_embedding.weight.data = embedding
    for i, block in enumerate(model.blocks):
        _fill(block, weights, f"model.layers.{i}.", config, published)
    weights.fill(model.norm.weight, "model.norm.weight")
    if model.head is not None:
        weights.fill(model.head.weight, "lm_head.weight")
    elif "lm_head.weight" in tensors and not np.array_equal(weights.take("lm_head.weight", embedding.shape), embedding):
        weights.problems.append("lm_head.weight is not the embedding, which tie_word_embeddings says it is")
    weights.finish()
    return model


def load_block(path: str | Path, layer: int = 0, dtype=np.float32) -> Block:
    """One Block of a published model. Its feed_forward is a MoELayer, or dense in DeepSeek-V3's first layers.

    path: as in `load`, but only the tensors of this layer are needed. Their names may start with model.layers.N. or
    without a prefix. Raises as `load` does, and ValueError for a layer that the config does not have.
    """
    published, config, tensors = _read(path, layer)
    prefix = f"model.layers.{layer}." if any(name.startswith(("model.", "lm_head.")) for name in tensors) else ""
    tensors = {name: t for name, t in tensors.items() if name.startswith(prefix)}
    if not tensors:
        raise CheckpointError(f"{path} holds no tensor of layer {layer}: give the folder, or the file that holds them")
    alone = dataclasses.replace(config, vocab_size=1, n_layers=1, moe_layers=(0,) if config.router_of(layer) else (),
                                windows=())
    weights = _Weights(path, alone, tensors, dtype)
    block = Block(config, config.router_of(layer), np.random.default_rng(0), dtype, config.window_of(layer))
    _fill(block, weights, prefix, config, published)
    weights.finish()
    return block


def _fill(block, weights, prefix, config, published):
    """Set the weights of one layer."""
    kind, latent = published["model_type"], config.attention == "latent"
    weights.fill(block.norm1.weight, f"{prefix}input_layernorm.weight")
    weights.fill(block.norm2.weight, f"{prefix}post_attention_layernorm.weight")
    names = LATENT | ({} if config.q_rank else {"query": "q_proj"}) if latent else GROUPED
    for ours, theirs in names.items():
        part = getattr(block.attention, ours)
        for name in ("weight", "bias"):
            if getattr(part, name, None) is not None:
                weights.fill(getattr(part, name), f"{prefix}self_attn.{theirs}.{name}")
    if latent and published.get("rope_interleave", True):
        _pair_halves(block.attention)
    fused = f"{prefix}mlp.experts.gate_up_proj" in weights.tensors  # all experts in one array, as in transformers 5
    mlp, layer = f"{prefix}{'block_sparse_moe' if kind == 'mixtral' and not fused else 'mlp'}.", block.feed_forward
    if not block.is_moe:
        layer.up.weight.data, layer.down.weight.data = _gated(weights, mlp, config.d_model, config.d_ff)
        return
    if kind == "gpt_oss":
        _fill_gpt_oss(block, weights, prefix)
        return
    weights.fill(layer.router.weight, f"{mlp}gate.weight")
    if latent:
        weights.fill(layer.router.bias, f"{mlp}gate.e_score_correction_bias")
    bank = layer.experts
    if fused:
        for matrices, name in ((bank.w1, "gate_up_proj"), (bank.w2, "down_proj")):
            E, I, O = matrices.shape  # noqa: E741
            matrices.data = np.ascontiguousarray(weights.take(f"{mlp}experts.{name}", (E, O, I)).transpose(0, 2, 1))
    else:
        experts = [_gated(weights, f"{mlp}experts.{e}.", config.d_model, config.d_expert, kind == "mixtral")
                   for e in range(config.n_experts)]
        bank.w1.data, bank.w2.data = map(np.stack, zip(*experts))
    if layer.shared is not None:
        name = "shared_experts" if latent else "shared_expert"
        layer.shared.up.weight.data, layer.shared.down.weight.data = _gated(
            weights, f"{mlp}{name}.", config.d_model, config.shared_width)
    if layer.shared_gate is not None:
        weights.fill(layer.shared_gate.weight, f"{mlp}shared_expert_gate.weight")


def _fill_gpt_oss(block, weights, prefix):
    """Set sinks, router and experts. GPT-OSS stores all experts in one array, with gate and up in turns."""
    layer, bank = block.feed_forward, block.feed_forward.experts
    weights.fill(block.attention.sinks, f"{prefix}self_attn.sinks")
    for name in ("weight", "bias"):
        weights.fill(getattr(layer.router, name), f"{prefix}mlp.router.{name}")
    experts, halves = f"{prefix}mlp.experts.", np.r_[0:bank.w1.shape[2]:2, 1:bank.w1.shape[2]:2]
    bank.w1.data = weights.take_packed(f"{experts}gate_up_proj", bank.w1.shape)[..., halves]
    bank.b1.data = weights.take(f"{experts}gate_up_proj_bias", bank.b1.shape)[..., halves]
    bank.w2.data = weights.take_packed(f"{experts}down_proj", bank.w2.shape)
    bank.b2.data = weights.take(f"{experts}down_proj_bias", bank.b2.shape)


def _gated(weights, prefix, d_model, width, mixtral=False):
    """(D, 2F), (F, D): the gate and up matrices side by side, and the down matrix; (silu(x gate) * (x up)) @ down."""
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    both = [weights.take(f"{prefix}{name}.weight", (width, d_model)).T for name in (gate, up)]
    down = weights.take(f"{prefix}{down}.weight", (d_model, width)).T
    return np.ascontiguousarray(np.concatenate(both, axis=1)), np.ascontiguousarray(down)


def _pair_halves(attention):
    """Reorder the rotary columns to 0, 2, ..., 1, 3, ...: neighbours 2i and 2i + 1 become entries i and i + d/2."""
    order = np.r_[0:attention.rope_dim:2, 1:attention.rope_dim:2]
    query, latent = attention.query.weight.data, attention.latent.weight.data
    heads = query.reshape(len(query), attention.n_heads, -1)  # a view
    for columns in (heads[..., attention.head_dim:], latent[:, attention.kv_rank:]):
        columns[...] = columns[..., order]
