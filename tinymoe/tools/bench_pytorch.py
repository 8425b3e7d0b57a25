"""The layer and the training step of `python cli.py bench` in PyTorch, as a user would write them there.

Not a part of tinymoe: where PyTorch is installed, the benchmark runs this file in a process of its own, so that two
libraries do not compete for the cores. It reads one JSON object of cases, and prints a list of milliseconds.
"""

import json
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class Experts(nn.Module):
    """The usual loop over experts: gather the tokens of each, apply it, and add its gated output."""

    def __init__(self, n_experts, d_model, d_ff):
        super().__init__()
        self.experts = nn.ModuleList(dense(d_model, d_ff) for _ in range(n_experts))

    def forward(self, x, chosen, gates):
        """x (N, D), chosen and gates (N, K) -> (N, D)"""
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, place = torch.where(chosen == e)
            y = y.index_add(0, token, expert(x[token]) * gates[token, place, None])
        return y


class Mixture(nn.Module):
    """Top-K routing with gates that sum to 1, and the balance loss of the last call."""

    def __init__(self, c):
        super().__init__()
        self.top_k, self.router = int(c["top_k"]), nn.Linear(c["d_model"], c["n_experts"], bias=False)
        self.experts = Experts(c["n_experts"], c["d_model"], c["d_ff"])

    def forward(self, x):
        tokens = x.flatten(0, 1)
        probs = self.router(tokens).softmax(-1)
        gates, chosen = probs.topk(self.top_k)
        load = torch.bincount(chosen.flatten(), minlength=probs.shape[1]) / chosen.numel()
        self.balance = probs.shape[1] * (load * probs.mean(0)).sum()
        return self.experts(tokens, chosen, gates / gates.sum(-1, keepdim=True)).view_as(x)


class Block(nn.Module):
    def __init__(self, c, feed_forward):
        super().__init__()
        d = c["d_model"]
        self.n_heads, self.feed_forward = c["n_heads"], feed_forward
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def attention(self, x):
        q, k, v = (part.unflatten(2, (self.n_heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, 2))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


def dense(d_model, d_ff):
    return nn.Sequential(nn.Linear(d_model, d_ff), nn.GELU(approximate="tanh"), nn.Linear(d_ff, d_model))


def training_step(c, batch_size):
    """A function that takes one step of the model with the fields `c` of a ModelConfig."""
    blocks = nn.Sequential(*(Block(c, Mixture(c) if i in c["moe_layers"] else dense(c["d_model"], c["d_ff"]))
                             for i in range(c["n_layers"])))
    model = nn.ModuleDict({"token": nn.Embedding(c["vocab_size"], c["d_model"]), "blocks": blocks,
                           "position": nn.Embedding(c["seq_len"], c["d_model"]), "norm": nn.LayerNorm(c["d_model"]),
                           "head": nn.Linear(c["d_model"], c["vocab_size"], bias=False)})
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)

    def step():
        ids = torch.randint(0, c["vocab_size"], (batch_size, c["seq_len"] + 1))
        x = model["token"](ids[:, :-1]) + model["position"].weight
        logits = model["head"](model["norm"](blocks(x)))
        balance = sum(block.feed_forward.balance for block in blocks if isinstance(block.feed_forward, Mixture))
        optimizer.zero_grad()
        (F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()) + c["aux_coef"] * balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return step


def layer(n_tokens, d_model, n_experts, top_k):
    """A function that runs one expert layer forward and backward, for random choices."""
    experts = Experts(n_experts, d_model, 4 * d_model)
    gates, chosen = torch.rand(n_tokens, n_experts).topk(top_k)
    leaves = [torch.randn(n_tokens, d_model, requires_grad=True), gates.requires_grad_(), *experts.parameters()]
    dy = torch.randn(n_tokens, d_model)

    def both():
        for leaf in leaves:
            leaf.grad = None
        experts(leaves[0], chosen, gates).backward(dy)
    return both


def milliseconds(function, repeats):
    """The median over the calls after the first three, which warm up."""
    times = []
    for _ in range(repeats + 3):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return float(np.median(times[3:]))


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    torch.set_num_threads(asked["threads"])
    torch.manual_seed(0)
    made = [layer(**size) for size in asked["layers"]] + [training_step(c, asked["batch_size"]) for c in asked["steps"]]
    print(json.dumps([milliseconds(function, asked["repeats"]) for function in made]))
