"""The coefficient of the balance loss, from one published convention to another."""

# The factor, besides the coefficient, of a layer's sum over e of E f_e P_e, with f_e = n_e / (N K).
CONVENTIONS = {
    "tinymoe": lambda n_layers, top_k: 1 / n_layers,  # mean over layers
    "switch": lambda n_layers, top_k: top_k,  # f_e = n_e / N; a loss for each layer, summed
    "megatron": lambda n_layers, top_k: 1,  # a loss for each layer, summed
    "hf_mixtral": lambda n_layers, top_k: top_k / n_layers,  # f_e = n_e / N; tokens of all layers in one mean
    "deepseek": lambda n_layers, top_k: 1,  # a loss for each layer, summed
}


def equivalent_coefficient(coefficient: float, source: str, target: str, n_layers: int, top_k: float) -> float:
    """The coefficient of the balance loss that gives `target` the gradient that `coefficient` gives `source`.

    source, target: names in CONVENTIONS, else ValueError; n_layers: MoE layers. For "hf_mixtral", which pools the
    layers before the product, it is exact where all layers have the same load. The loss of "deepseek" is of each
    sequence, as the loss `sequence` is here.
    """
    for unknown in {source, target} - CONVENTIONS.keys():
        raise ValueError(f"unknown convention {unknown!r}: choose one of {', '.join(CONVENTIONS)}")
    if not (n_layers > 0 and top_k > 0):
        raise ValueError(f"n_layers {n_layers} and top_k {top_k} must be above 0")
    return coefficient * CONVENTIONS[source](n_layers, top_k) / CONVENTIONS[target](n_layers, top_k)
