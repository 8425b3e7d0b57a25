"""Upcycling: a mixture that starts from a trained dense model."""

import dataclasses

import numpy as np

from .config import ModelConfig
from .transformer import Transformer


def upcycle(dense: Transformer, config: ModelConfig, seed: int = 0) -> Transformer:
    """A mixture that starts from a trained dense model (Komatsuzaki et al. 2022).

    Every expert is a copy of the dense feed-forward layer; routers are drawn anew. If the gates of each token sum
    to 1, the output at the start is that of the dense model.
    Raises ValueError unless `dense` has no MoE layers, and `config` is of the same sizes, without other experts.
    """
    if _dense_settings(config) != _dense_settings(dense.config) or dense.config.moe_layers or config.n_shared \
            or config.n_columns > config.n_experts or config.expert_width != config.d_ff:
        raise ValueError("upcycling takes a dense model and a config of the same sizes, with experts as wide as "
                         "its feed-forward layers, and none that are shared, copy or zero")
    model, known = Transformer(config, seed, dense.token_embedding.weight.dtype), dense.parameters()
    for name, p in model.parameters().items():
        if name in known:
            p.data = known[name].data.copy()
    for i in config.moe_layers:
        bank, layer = model.blocks[i].feed_forward.experts, dense.blocks[i].feed_forward
        for p, q in ((bank.w1, layer.up.weight), (bank.b1, layer.up.bias), (bank.w2, layer.down.weight),
                     (bank.b2, layer.down.bias)):
            if q is not None:
                p.data = np.repeat(q.data[None], config.n_experts, axis=0)
    return model


def _dense_settings(config):
    """The settings of the dense parts: the fields before moe_layers."""
    names = [field.name for field in dataclasses.fields(config)]
    return [getattr(config, name) for name in names[:names.index("moe_layers")]]
