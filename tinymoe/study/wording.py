"""The words that every document explains: terms, methods, and what its tables test."""

GLOSSARY = """- A *router* chooses K of E *experts* for each byte: its route. The *gate* is the weight with which a \
chosen expert's output is added.
- *Loss* is the cross-entropy of the validation text in nats per byte, the mean over its domains; lower is \
better. *Perplexity* is exp(loss).
- *Causal*: each byte is routed by itself and the bytes before it. Only a causal loss may be quoted for a language \
model. \
*Leaky*: routed as in training, where the route of a byte may depend on later bytes, or a byte may be dropped.
- The *load* of an expert is the number of bytes that it serves. *Load CV* is the standard deviation of the load over \
its mean, *MaxVio* its maximum over its mean, minus 1; both are 0 where all loads are equal. A *dead* expert has less \
than 1% of the mean load. *Coverage* is the share of bytes that have at least one expert. With a capacity limit each \
expert has a fixed number of places for bytes; *padding* is the share of places that stay empty.
- *Effective experts* are exp(entropy of the load): all experts where their loads are equal, 1 where one serves every \
byte. A layer is *collapsed* if they are fewer than half of its experts. It is *starved* if it is not collapsed but \
has a dead expert. Otherwise it is *in use*.
- *Function divergence* is the mean of 1 - cosine over pairs of experts' outputs for the same bytes: 0 where experts \
compute the same, about 1 where their outputs have nothing in common.
- *Domain information* says how well the expert of a byte predicts the domain of the text, in nats; 0 is chance. *Byte \
information* says the same of the byte. *Domain information beyond the byte* is taken among bytes of equal value. It \
can be the larger one: what expert and byte say together may be more than what each says alone. *Repetition*: the \
share of choices whose expert also serves the next byte; chance is about K / E.
- A *primary* comparison answers a question of an experiment. It was planned before the runs, with a *margin*: \
differences below the margin do not matter. For losses it is 0.01 nats unless the table says otherwise; that is 1% of \
perplexity. All other comparisons are *exploratory*: they suggest questions for other runs.
- Two settings are *different* when their difference is shown not to be 0 (t-test over seeds, 5%). They are the \
*same* when it is shown to lie within the margin (two one-sided tests, 5%). The p values of both are corrected for \
all comparisons of their kind in the experiment, primary or exploratory; no interval is. So an interval without 0, or \
within the margin, need not decide. Where neither is shown the answer is *not known*. Then the document says which \
effect would be seen with 80% power, and how many seeds would decide with 80% power between a true difference of 0 \
and of the margin. *Not tested*: fewer than two common seeds, or a run lacks the number.
- ± and brackets are 95% intervals over seeds (Student's t) unless a column says otherwise. There is no ± for one \
seed, or where all seeds agree. Differences are paired by seed."""
METHODS = """Information is the mutual information of expert and label, estimated from counts, minus its mean under \
shuffled labels. Domains are shuffled over windows, bytes over positions. Shuffled domains lose their link to the \
bytes too, so domain information beyond the byte is too low: with 1,000 windows a domain by 0.001 nats, with 64 by \
0.01, and in curves over steps, which have 16, by up to 0.04. The estimate is further off the more the experts say \
about the domain: by 0.12 nats in curves where the route is the domain. Weight divergence is the mean of 1 - cosine \
over pairs of experts' weights, divided by its value at initialisation. Numbers about experts are means over MoE \
layers, measured with the routing of training, without router noise. For expert choice this routes a whole batch, so \
its load and coverage do not belong to its causal loss. Where tables score all validation windows, a batch holds \
neighbouring windows, and the last batches lack the domains with the least text. So it is less even than a batch of \
training or of the curves: its MaxVio is higher, and a capacity limit drops more. A seed sets the weights, the noise \
and the order of the data, which is the same for all settings. Intervals cover the seed and not the choice of text, \
except those over seeds and text. Their variance is that of the mean over seeds plus that of the text, from a \
bootstrap of stretches within each domain. Their half width is the root of the summed squares of the half widths of \
the two t intervals. Intervals take the chosen learning rates as fixed. They assume that seeds scatter normally, which \
few seeds cannot check. They may pass a bound that a number cannot, such as a coverage of 1. Training times and \
core-hours are wall time, so they depend on what else ran on the machine."""
CLAIMS = """A claim *held* where every condition is shown, each by a one-sided t-test over seeds at 5%, paired by \
seed; ratios are tested as logarithms. It *did not hold* where the opposite of one condition is shown. Otherwise it is \
*undecided*. Brackets are 90% intervals: their ends are what the one-sided tests compare. There is no correction for \
the number of claims. *Held* needs all conditions, so it is wrong in at most 5% of cases. *Did not hold* needs one of \
them, so with several conditions it may be wrong in more than 5%."""
EVERY_RUN = """Two kinds of numbers are judged in every run instead: those that cannot pass their bound (dead experts, \
coverage), and changes that are either rounding or not."""
TO_DECIDE = """*To decide it*: the number of seeds with which a true difference of 0, or of the margin, would be \
recognised with 80% power; in brackets the range that the scatter of the seeds leaves open. They were not added, \
because a number of seeds that depends on the results would spoil the test. It takes a new experiment with seeds of \
its own, and the core-hours are those of all its runs."""
PRIMARY = """Corrected p: p value of the t-test against 0. Same: p value of the two one-sided tests against the \
margin. Both have Holm's correction over the primary comparisons of the experiment. The intervals have none, nor have \
sign flips: the permutation test that changes the signs of the seeds' differences. Its p is at least 2 / 2^n with n \
seeds, so with fewer than six it never falls below 5%. Smallest effect: the true difference that this number of seeds \
shows with 80% power, given the SD. Both this and the seeds that would decide are computed at 5% over the number of \
primary comparisons, a bound for Holm's correction. The core-hours are at the median of the runs here.

""" + TO_DECIDE
EXPLORATORY = """These comparisons were not planned to answer the question. Their p values are corrected by Benjamini \
and Hochberg: of those that are *different*, at most 5% are expected to be so by chance, and likewise of those that \
are the *same*. Beside *same* stands the p value of the two one-sided tests against the margin, else that of the test \
against 0."""
SWEEP = """Mean causal loss (nats) of the seeds 100 and 101, by peak learning rate. The rate with the lowest loss was \
taken before any other run existed; these runs are in no other number but the core-hours."""
DOMAINS = "Differences of the causal loss by domain, without correction; the loss is the mean over the domains."
CROSSINGS = """The last step at which two curves cross, on a straight line between the evaluations after step 0; – \
where they do not. The curves are measured on few bytes, so a late crossing may be chance."""
# what captions say of figures, where a setting has two seeds
CURVES = "lines are means over the seeds, coloured bands go from the lowest seed to the highest"
INTERVALS = "means and 95% intervals"
