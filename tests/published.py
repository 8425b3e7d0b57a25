"""Oracle for interop: small models of published families under their published names, from the papers' equations.

Imports only numpy. `tensors` draws weights, `logits` computes the forward pass in float64, a token and an expert at
a time.
"""
import numpy as np

CONFIGS = {
    "mixtral": {
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "vocab_size": 13, "hidden_size": 16,
        "intermediate_size": 10, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 12, "rms_norm_eps": 1e-5,
        "rope_theta": 1e6, "hidden_act": "silu", "sliding_window": None, "tie_word_embeddings": False},
    "olmoe": {
        "model_type": "olmoe", "architectures": ["OlmoeForCausalLM"], "vocab_size": 13, "hidden_size": 16,
        "intermediate_size": 10, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
        "num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": False, "max_position_embeddings": 12,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": None, "attention_bias": False, "clip_qkv": None,
        "tie_word_embeddings": False},
    "qwen2_moe": {
        "model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], "vocab_size": 13, "hidden_size": 16,
        "intermediate_size": 9, "moe_intermediate_size": 6, "shared_expert_intermediate_size": 11,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 5,
        "num_experts_per_tok": 2, "norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": [1],
        "max_position_embeddings": 12, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "use_sliding_window": False,
        "sliding_window": 4, "max_window_layers": 21, "tie_word_embeddings": False},
    "qwen3_moe": {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 13, "hidden_size": 16,
        "intermediate_size": 9, "moe_intermediate_size": 6, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 6, "num_experts": 5, "num_experts_per_tok": 2, "norm_topk_prob": True,
        "decoder_sparse_step": 2, "mlp_only_layers": [], "max_position_embeddings": 12, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "rope_scaling": None, "attention_bias": False, "use_sliding_window": False,
        "sliding_window": None, "max_window_layers": 48, "tie_word_embeddings": False},
    "gpt_oss": {
        "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "vocab_size": 13, "hidden_size": 32,
        "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "experts_per_token": 2, "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "attention_bias": True,
        "max_position_embeddings": 12, "initial_context_length": 6, "rms_norm_eps": 1e-5, "rope_theta": 150.0,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 2.0, "beta_slow": 0.05, "truncate": False,
                         "original_max_position_embeddings": 6},
        "swiglu_limit": 7.0, "hidden_act": "silu", "tie_word_embeddings": False},
    "deepseek_v3": {
        "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "vocab_size": 13, "hidden_size": 16,
        "intermediate_size": 10, "moe_intermediate_size": 6, "num_hidden_layers": 3, "first_k_dense_replace": 1,
        "num_attention_heads": 3, "num_key_value_heads": 3, "q_lora_rank": 7, "kv_lora_rank": 8, "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4, "v_head_dim": 5, "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 3,
        "n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
        "topk_method": "noaux_tc", "max_position_embeddings": 12, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "num_nextn_predict_layers": 1, "tie_word_embeddings": False},
}


def shapes(c):
    """Published name -> shape."""
    D, H, kind, out = c["hidden_size"], c["num_attention_heads"], c["model_type"], {}
    d = c.get("head_dim") or D // H

    def mlp(prefix, width, names=("gate_proj", "up_proj", "down_proj")):
        for name, shape in zip(names, ((width, D), (width, D), (D, width))):
            out[f"{prefix}{name}.weight"] = shape

    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        out |= {p + "input_layernorm.weight": (D,), p + "post_attention_layernorm.weight": (D,)}
        a = p + "self_attn."
        if kind == "deepseek_v3":
            r, nope, rope, v = (c[k] for k in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
            q = c["q_lora_rank"]
            out |= (
                {
                    a + "q_a_proj.weight": (q, D),
                    a + "q_a_layernorm.weight": (q,),
                    a + "q_b_proj.weight": (H * (nope + rope), q),
                }
                if q
                else {a + "q_proj.weight": (H * (nope + rope), D)}
            )
            out |= {a + "kv_a_proj_with_mqa.weight": (r + rope, D), a + "kv_a_layernorm.weight": (r,),
                    a + "kv_b_proj.weight": (H * (nope + v), r), a + "o_proj.weight": (D, H * v)}
            if i < c["first_k_dense_replace"]:
                mlp(p + "mlp.", c["intermediate_size"])
                continue
            out |= {p + "mlp.gate.weight": (c["n_routed_experts"], D),
                    p + "mlp.gate.e_score_correction_bias": (c["n_routed_experts"],)}
            for e in range(c["n_routed_experts"]):
                mlp(f"{p}mlp.experts.{e}.", c["moe_intermediate_size"])
            mlp(p + "mlp.shared_experts.", c["moe_intermediate_size"] * c["n_shared_experts"])
            continue
        G = c["num_key_value_heads"]
        out |= {a + "q_proj.weight": (H * d, D), a + "k_proj.weight": (G * d, D), a + "v_proj.weight": (G * d, D),
                a + "o_proj.weight": (D, H * d)}
        if kind == "olmoe":
            out |= {a + "q_norm.weight": (H * d,), a + "k_norm.weight": (G * d,)}
        if kind == "qwen3_moe":
            out |= {a + "q_norm.weight": (d,), a + "k_norm.weight": (d,)}
        if kind == "qwen2_moe" and c.get("qkv_bias", True) or kind == "qwen3_moe" and c["attention_bias"]:
            out |= {a + "q_proj.bias": (H * d,), a + "k_proj.bias": (G * d,), a + "v_proj.bias": (G * d,)}
            out |= {a + "o_proj.bias": (D,)} if kind == "qwen3_moe" else {}
        if kind.startswith("qwen") and (i in c["mlp_only_layers"] or (i + 1) % c["decoder_sparse_step"]):
            mlp(p + "mlp.", c["intermediate_size"])
            continue
        if kind == "gpt_oss":
            E, F = c["num_local_experts"], c["intermediate_size"]
            out |= {a + f"{name}_proj.bias": (n,) for name, n in zip("qkvo", (H * d, G * d, G * d, D))}
            out |= {a + "sinks": (H,), p + "mlp.router.weight": (E, D), p + "mlp.router.bias": (E,),
                    p + "mlp.experts.gate_up_proj": (E, D, 2 * F), p + "mlp.experts.gate_up_proj_bias": (E, 2 * F),
                    p + "mlp.experts.down_proj": (E, F, D), p + "mlp.experts.down_proj_bias": (E, D)}
            continue
        E = c["num_local_experts" if kind == "mixtral" else "num_experts"]
        m = p + ("block_sparse_moe." if kind == "mixtral" else "mlp.")
        out[m + "gate.weight"] = (E, D)
        for e in range(E):
            mlp(f"{m}experts.{e}.", c.get("moe_intermediate_size") or c["intermediate_size"],
                *([("w1", "w3", "w2")] if kind == "mixtral" else []))
        if kind == "qwen2_moe":
            mlp(m + "shared_expert.", c["shared_expert_intermediate_size"])
            out[m + "shared_expert_gate.weight"] = (1, D)
    out |= {"model.embed_tokens.weight": (c["vocab_size"], D), "model.norm.weight": (D,)}
    return out if c["tie_word_embeddings"] else out | {"lm_head.weight": (c["vocab_size"], D)}


def tensors(c, seed=0, dtype=np.float32):
    """Weights in sorted order of their names: matrices N(0, 0.3^2), norms around 1, the correction bias around 0."""
    rng, out = np.random.default_rng(seed), {}
    for name, shape in sorted(shapes(c).items()):
        out[name] = ((0.3 if len(shape) > 1 else 0.2) * rng.standard_normal(shape) + ("norm" in name)).astype(dtype)
    return out


def norm(x, weight, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def silu(x):
    return x / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def turn(x, t, theta, neighbours, yarn=None):
    """One vector at position t: its pairs (2i, 2i + 1), or (i, i + d/2), turn by t theta^(-2i/d) (Su et al. 2021,
    eq. 34). With YaRN (Peng et al. 2023, section 3.2 and 3.4), pair i makes L theta^(-2i/d) / 2 pi turns over the
    original length L; a ramp goes from 0 at beta_fast turns to 1 at beta_slow, linear in i."""
    d, y = len(x), np.empty_like(x)
    for i in range(d // 2):
        a, b = (2 * i, 2 * i + 1) if neighbours else (i, i + d // 2)
        angle = t * theta ** (-2 * i / d)
        if yarn:
            low, high = (d * np.log(yarn["original_max_position_embeddings"] / (turns * 2 * np.pi)) / 2 / np.log(theta)
                         for turns in (yarn["beta_fast"], yarn["beta_slow"]))
            if yarn.get("truncate", True):
                low, high = np.floor(low), np.ceil(high)
            low, high = max(low, 0), min(high, d - 1)
            ramp = min(max((i - low) / (high - low), 0), 1)
            angle = ramp * angle / yarn["factor"] + (1 - ramp) * angle
        y[a], y[b] = x[a] * np.cos(angle) - x[b] * np.sin(angle), x[a] * np.sin(angle) + x[b] * np.cos(angle)
    return y


def attend(q, k, v):
    """q, k (T, H, d), v (T, H, dv) -> (T, H dv), causally (Vaswani et al. 2017, eq. 1)."""
    T, H, d = q.shape
    return np.array([np.concatenate([softmax(k[:t + 1, h] @ q[t, h] / np.sqrt(d)) @ v[:t + 1, h] for h in range(H)])
                     for t in range(T)])


def sink_attention(c, w, x, window):
    """GPT-OSS: each head has a logit more, without a value, and some layers see the last `window` positions."""
    T, H, G, d = len(x), c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    q, k, v = ((x @ w[f"{name}_proj.weight"].T + w[f"{name}_proj.bias"]).reshape(T, -1, d) for name in "qkv")
    yarn, theta, out = c["rope_scaling"], c["rope_theta"], np.zeros((T, H, d))
    yarn = yarn if yarn["rope_type"] == "yarn" else None
    factor = (yarn.get("attention_factor") or 0.1 * np.log(yarn["factor"]) + 1) if yarn else 1
    for t in range(T):
        for h in range(H):
            seen, g = range(max(0, t - window + 1) if window else 0, t + 1), h // (H // G)
            query = factor * turn(q[t, h], t, theta, False, yarn)
            z = [query @ (factor * turn(k[s, g], s, theta, False, yarn)) / np.sqrt(d) for s in seen]
            p = softmax(np.array([*z, w["sinks"][h]]))
            out[t, h] = sum(p[i] * v[s, g] for i, s in enumerate(seen))
    return out.reshape(T, H * d) @ w["o_proj.weight"].T + w["o_proj.bias"]


def clamped_experts(c, w, x):
    """GPT-OSS, one token: gate and up in turns, both clamped at 7, the logits with a bias."""
    z, y = w["router.weight"] @ x + w["router.bias"], 0
    best = np.argsort(-z)[:c["num_experts_per_tok"]]
    for e, g in zip(best, softmax(z[best])):
        both = x @ w["experts.gate_up_proj"][e] + w["experts.gate_up_proj_bias"][e]
        gate, up = np.minimum(both[0::2], 7), np.clip(both[1::2], -7, 7)
        hidden = (up + 1) * gate / (1 + np.exp(-1.702 * gate))
        y = y + g * (hidden @ w["experts.down_proj"][e] + w["experts.down_proj_bias"][e])
    return y


def grouped_attention(c, w, x):
    """All but DeepSeek-V3. OLMoE normalises all queries and all keys of a token, Qwen3 those of each head."""
    T, H, G, d = (
        len(x),
        c["num_attention_heads"],
        c["num_key_value_heads"],
        len(w["q_proj.weight"]) // c["num_attention_heads"],
    )
    q, k, v = (x @ w[f"{name}_proj.weight"].T + w.get(f"{name}_proj.bias", 0) for name in "qkv")
    if c["model_type"] == "qwen3_moe":
        q, k = (np.array([np.concatenate([norm(head, w[f"{name}_norm.weight"], c["rms_norm_eps"])
                                          for head in row.reshape(-1, d)]) for row in z])
                for z, name in ((q, "q"), (k, "k")))
    if c["model_type"] == "olmoe":
        q, k = (norm(z, w[f"{name}_norm.weight"], c["rms_norm_eps"]) for z, name in ((q, "q"), (k, "k")))
    q, k = (
        np.array([[turn(head, t, c["rope_theta"], False) for head in z[t].reshape(-1, d)] for t in range(T)])
        for z in (q, k)
    )
    k, v = (z.reshape(T, G, d).repeat(H // G, axis=1) for z in (k, v))
    return attend(q, k, v) @ w["o_proj.weight"].T + w.get("o_proj.bias", 0)


def latent_attention(c, w, x):
    """DeepSeek-V3, eq. 1 to 11."""
    T, H, r, nope, rope = (
        len(x),
        *(c[k] for k in ("num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim")),
    )
    pairs = c.get("rope_interleave", True)
    if c["q_lora_rank"]:
        q = norm(x @ w["q_a_proj.weight"].T, w["q_a_layernorm.weight"], 1e-6) @ w["q_b_proj.weight"].T
    else:
        q = x @ w["q_proj.weight"].T
    q, latent = q.reshape(T, H, nope + rope), x @ w["kv_a_proj_with_mqa.weight"].T
    kv = (norm(latent[:, :r], w["kv_a_layernorm.weight"], 1e-6) @ w["kv_b_proj.weight"].T).reshape(T, H, -1)
    k = np.concatenate([kv[..., :nope], np.zeros((T, H, rope))], axis=-1)
    for t in range(T):
        k[t, :, nope:] = turn(latent[t, r:], t, c["rope_theta"], pairs)
        for h in range(H):
            q[t, h, nope:] = turn(q[t, h, nope:], t, c["rope_theta"], pairs)
    return attend(q, k, kv[..., nope:]) @ w["o_proj.weight"].T


def gates(c, w, x):
    """{expert: gate} of one token x (D,)."""
    K, scores = c["num_experts_per_tok"], w["gate.weight"] @ x
    if c["model_type"] != "deepseek_v3":
        p = softmax(scores)
        best = np.argsort(-p)[:K]
        total = p[best].sum() if c["model_type"] == "mixtral" or c["norm_topk_prob"] else 1
        return {e: p[e] / total for e in best}
    s = 1 / (1 + np.exp(-scores))  # DeepSeek-V3, eq. 12 to 16
    biased = (s + w["gate.e_score_correction_bias"]).reshape(c["n_group"], -1)
    groups = np.argsort(-np.sort(biased)[:, -2:].sum(1))[:c["topk_group"]]
    size = biased.shape[1]
    best = sorted((e for g in groups for e in range(g * size, (g + 1) * size)), key=lambda e: -biased.flat[e])[:K]
    total = sum(s[e] for e in best) + 1e-20 if c["norm_topk_prob"] else 1
    return {e: c["routed_scaling_factor"] * s[e] / total for e in best}


def mlp(w, prefix, x, names=("gate_proj", "up_proj", "down_proj")):
    gate, up, down = (w[f"{prefix}{name}.weight"] for name in names)
    return down @ (silu(gate @ x) * (up @ x))


def feed_forward(c, w, x):
    """One token x (D,)."""
    if c["model_type"] == "gpt_oss":
        return clamped_experts(c, w, x)
    if "gate.weight" not in w:
        return mlp(w, "", x)
    names = [("w1", "w3", "w2")] if c["model_type"] == "mixtral" else []
    y = sum(g * mlp(w, f"experts.{e}.", x, *names) for e, g in gates(c, w, x).items())
    if c["model_type"] == "qwen2_moe":
        return y + mlp(w, "shared_expert.", x) / (1 + np.exp(-(w["shared_expert_gate.weight"] @ x)))
    return y + mlp(w, "shared_experts.", x) if c.get("n_shared_experts") else y


def block(c, weights, i, x):
    """x (T, D) -> (T, D)."""
    def part(name):
        start = f"model.layers.{i}.{name}."
        return {key.removeprefix(start): value for key, value in weights.items() if key.startswith(start)}

    attention = latent_attention if c["model_type"] == "deepseek_v3" else grouped_attention
    w, eps = part("block_sparse_moe" if c["model_type"] == "mixtral" else "mlp"), c["rms_norm_eps"]
    if c["model_type"] == "gpt_oss":
        def attention(c, w, x):
            return sink_attention(c, w, x, c["sliding_window"] if c["layer_types"][i] == "sliding_attention" else 0)
    x = x + attention(c, part("self_attn"), norm(x, part("input_layernorm")["weight"], eps))
    return x + np.array([feed_forward(c, w, row) for row in norm(x, part("post_attention_layernorm")["weight"], eps)])


def logits(c, weights, ids):
    """ids (B, T) -> (B, T, V)."""
    weights, out = {name: a.astype(float) for name, a in weights.items()}, []
    for sequence in ids:
        x = weights["model.embed_tokens.weight"][sequence]
        for i in range(c["num_hidden_layers"]):
            x = block(c, weights, i, x)
        head = weights["model.embed_tokens.weight" if c["tie_word_embeddings"] else "lm_head.weight"]
        out.append(norm(x, weights["model.norm.weight"], c["rms_norm_eps"]) @ head.T)
    return np.array(out)
