# %% [markdown]
# # A tour of tinymoe
#
# From the chain rule to a trained mixture of experts, in one page. `docs/tour.py` is the source; `tour.ipynb` is made
# from it by `PYTHONPATH=. python tests/test_docs.py --tour`, with what the cells print. The training takes about a
# minute on one core.

# %% [markdown]
# ## Autograd
#
# A Tensor records what is computed with it. `backward` fills `.grad` of the leaves. `gradcheck` compares with finite
# differences.

# %%
import sys

sys.path[:0] = [".", ".."]  # where tinymoe is, if it is not installed: this folder's parent
import numpy as np

import tinymoe as tm

x = tm.Tensor([[0.1, 0.2], [0.3, 0.4]], requires_grad=True)
y = (x @ x.T).tanh().mean()
y.backward()
print(y.item(), x.grad, sep="\n")
print("gradient right:", tm.gradcheck(lambda x: tm.functional.softmax(x @ x) ** 2, x).ok)

# %% [markdown]
# ## A router
#
# It turns hidden states x (N tokens, D) into a sparse gate matrix G (N, E experts). Here each of four tokens takes its
# two best of four experts. The load counts the columns of G, the coverage its rows.

# %%
rng = np.random.default_rng(0)
x = tm.Tensor(rng.normal(size=(4, 3)))
router = tm.routers.make("top_k", d_model=3, n_experts=4, top_k=2, seed=1, dtype=np.float64, router_std=1.0)
routing = router(x, tm.RouteContext())
print(routing.to_dense().data.round(2))
print("load", routing.load, "coverage", routing.coverage)

# %% [markdown]
# ## A layer
#
# Only the chosen experts run. The output is the sum of their outputs, each times its gate: the same, by hand.

# %%
bank = tm.ExpertBank(n_experts=4, d_model=3, d_ff=5, activation="relu", seed=2, dtype=np.float64)
y = bank(x, routing).data
by_hand = np.zeros_like(y)
for n, e in zip(routing.token, routing.expert):
    hidden = np.maximum(x.data[n] @ bank.w1.data[e] + bank.b1.data[e], 0)
    by_hand[n] += routing.to_dense().data[n, e] * (hidden @ bank.w2.data[e] + bank.b2.data[e])
print("largest difference below 1e-12:", np.abs(y - by_hand).max() < 1e-12)

# %% [markdown]
# The balance loss is 1 at perfect balance. It can fall below: f counts choices, P averages probabilities. Its gradient
# reaches the router's weights through the probabilities.

# %%
loss = tm.losses.load_balancing_loss(routing)
loss.backward()
print(f"balance loss {loss.item():.4f}, norm of its gradient {np.linalg.norm(router.weight.grad):.4f}")

# %% [markdown]
# ## Train for a minute
#
# A small model of bytes: three blocks, of which the last two have eight experts each. The texts come from installed
# packages. The run leaves its rows, routes and weights in a folder.

# %%
import tempfile

from tinymoe.training.data import load_corpus
from tinymoe.training.plan import RunPlan, TrainConfig
from tinymoe.training.trainer import train

STEPS = 300
folder = tempfile.mkdtemp() + "/runs/tour-seed0"
config = tm.ModelConfig(n_layers=3, d_model=64, d_ff=128, seq_len=64, moe_layers=(1, 2), n_experts=8, top_k=2)
plan = RunPlan("tour", purpose="a tour", seed=0, model=config, training=TrainConfig(steps=STEPS, eval_windows=4))
summary = train(plan, load_corpus(None, config.seq_len), folder)
final = summary["final"]
print(f"loss {final['causal_cross_entropy']:.2f} nats a byte; a uniform guess has {np.log(256):.2f}")

# %% [markdown]
# ## Look at the routes
#
# Below each byte stands its first choice, the expert with the largest gate.

# %%
from tinymoe.tools import view
from tinymoe.training.loading import load_model

text = b"In the beginning God created for i in range(10):"
for layer, routing in zip(config.moe_layers, view.prefix_routings(load_model(folder), text)):
    print("layer", layer)
    print("\n".join(view.lines(text, routing, colour=False, width=80)))

# %% [markdown]
# ## The rows
#
# One row for each evaluation and layer; `tinymoe rows FOLDER` writes the same as a file. With pandas, a table of them:

# %%
from pathlib import Path

from tinymoe.study.compare import flat_rows

rows = flat_rows(Path(folder).parent.parent)
try:
    import pandas
    table = pandas.DataFrame(rows)
    print(table[["step", "layer", "causal_cross_entropy", "load_cv"]].iloc[::6].round(3).to_string(index=False))
except ImportError:
    print(f"{len(rows)} rows; pip install pandas shows them as a table")

# %%
import matplotlib.pyplot as plt

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.6), layout="constrained")
for layer in config.moe_layers:
    mine = [row for row in rows if row["layer"] == layer and not row["at_end"]]
    left.plot([row["step"] for row in mine], [row["causal_cross_entropy"] for row in mine], color="black")
    right.plot([row["step"] for row in mine], [row["load_cv"] for row in mine], label=f"layer {layer}")
left.set(xlabel="step", ylabel="causal loss (nats)")
right.set(xlabel="step", ylabel="load CV: 0 is balance")
right.legend()
plt.close()  # Jupyter would show it twice
figure
