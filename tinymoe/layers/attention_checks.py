"""What an attention layer takes, checked, with messages that say what to do."""

BIASES = ("none", "qkv", "all")  # which linear layers have one: see CausalSelfAttention


def check_heads(d_model: int, n_heads: int, head_dim: int | None) -> None:
    """Raise ValueError where the width of a head is not given, and n_heads does not divide d_model."""
    if head_dim is None and d_model % n_heads:
        raise ValueError(f"d_model {d_model} is not divisible by n_heads {n_heads}: change one of them, or give "
                         "head_dim")


def check_attention(d_model: int, n_heads: int, head_dim: int | None, n_kv_heads: int, biases: str,
                    qk_norm: bool | str) -> None:
    """Raise the errors that the docstring of CausalSelfAttention names."""
    check_heads(d_model, n_heads, head_dim)
    if n_heads % n_kv_heads:
        raise ValueError(f"n_heads {n_heads} is not divisible by n_kv_heads {n_kv_heads}: change one of them")
    if biases not in BIASES or qk_norm not in (True, False, "head"):
        raise ValueError(f"biases {biases!r} must be all, qkv or none, and qk_norm {qk_norm!r} true, false or head")
