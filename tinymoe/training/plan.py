"""A run as data: the model, how it is trained, and the events that it reports."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from ..model.config import ModelConfig
from ..moe.settings import NOT_NEGATIVE, POSITIVE, SEED, SHARE, WHOLE, check_fields, setting


@dataclass(frozen=True)
class TrainConfig:
    """How a run trains and how often it is evaluated. Raises ValueError for impossible values."""

    steps: int = setting(2000, "training steps", WHOLE)
    batch_size: int = setting(8, "windows of seq_len bytes in a batch", WHOLE)
    learning_rate: float = setting(2e-3, "the largest rate, after the warm-up", POSITIVE)
    warmup: float = setting(0.05, "share of the steps in which the rate rises", SHARE)
    weight_decay: float = setting(0.1, "decay of weight matrices; other parameters have none", NOT_NEGATIVE)
    max_norm: float = setting(1.0, "largest norm of the gradient; a larger gradient is scaled down", POSITIVE)
    n_evaluations: int = setting(20, "evaluations while training; one more comes before it", WHOLE)
    eval_windows: int = setting(8, "windows of each domain at each evaluation", WHOLE)
    final_windows: int = setting(64, "windows of each domain at the end", WHOLE)

    def __post_init__(self):
        check_fields(self)

    def evaluation_steps(self) -> set[int]:
        """The steps after which the model is evaluated and saved. The last step is one of them."""
        n = min(self.n_evaluations, self.steps)
        return {round(self.steps * (i + 1) / n) for i in range(n)}


@dataclass(frozen=True)
class RunPlan:
    """What to train: a model, how, and with which seed. Raises ValueError for an impossible seed.

    start: the config id of another run of the study with this seed, whose trained weights this run starts with; a
        mixture is upcycled from a dense model.
    measure: measure(trainer) -> dict ready for JSON, called at the end and kept in the summary.
    imports: paths of the user's files that define routers or losses; they are executed before the model is made.
    plan_hash: of the experiment's plan, see study/experiment.py; config.json records it.
    """

    config_id: str
    purpose: str
    seed: int = field(metadata={"check": SEED})
    model: ModelConfig
    training: TrainConfig
    start: str | None = None
    measure: Callable | None = None
    imports: tuple = ()
    plan_hash: str | None = None

    def __post_init__(self):
        check_fields(self)

    @property
    def run_id(self) -> str:
        return f"{self.config_id}-seed{self.seed}"

    @property
    def start_id(self) -> str | None:
        """The run id of the run that this one starts with."""
        return self.start and replace(self, config_id=self.start).run_id


@dataclass(frozen=True)
class Event:
    """Progress of one run.

    kind: "resumed" (from `step`), "step" (`loss`: its cross-entropy), "done", "failed" (`message`: why), or "busy":
        another process trains the run.
    steps: how many the run has, where the kind is "resumed" or "step".
    """

    kind: str
    run_id: str
    step: int = 0
    loss: float = 0.0
    message: str = ""
    steps: int = 0
