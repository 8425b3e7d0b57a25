"""A question of one's own, in one file. Run it by: python cli.py experiment docs/my_question.py --quick

Without --quick: 500 steps, three seeds. With --full: the plan, `steps` and `seeds`, at the best of `rates`. Settings
change a small model: 4 layers of width 64, in two of them the top 2 of 8 experts; `model=` changes it for all.
Fields: tinymoe/study/experiment.py; metrics: quantities.py. A router or a loss may stand here too."""

from tinymoe.experiments import LOSS, Contrast, Experiment, Primary, Setting, over_steps

my_question = Experiment(
    name="second-expert", question="Is the second expert of a byte worth its work?",
    settings=(Setting("top-1", "one expert a byte", model={"top_k": 1}), Setting("top-2", "two experts a byte")),
    primary=(Primary(question="Does a second expert lower the loss?", contrast=Contrast(LOSS, "top-2", minus="top-1"),
                     lower="The second expert lowers the loss.", higher="The second expert raises the loss.",
                     same="The second expert changes the loss by less than 0.01 nats.",
                     not_known="Whether it helps is not known."),),
    metrics=(LOSS, "megaflops", "load_cv"), figures={"over_steps": over_steps("top-1", LOSS)},
    seeds=8, steps=1000, rates=(1e-3, 2e-3, 4e-3))
