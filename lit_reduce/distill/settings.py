"""Settings of ``train``; configs/train.yaml explains each."""

from dataclasses import dataclass, field

from lit_reduce.settings import BackboneSettings, ReducerSettings

CONTROLS = ("random", "grid", "pool", "fastervlm")
STRONGEST = ("mmtok", "cdpruner", "divprune", "todre", "vispruner")  # on validation questions, see README


@dataclass
class DataSettings:
    """Which questions: the group ``data``."""

    name: str = "pocket"
    val: str | None = None
    test: str | None = None
    images: int = 700
    turns: int = 8
    val_images: int = 64
    test_rows: int = 200
    cache: str | None = "outputs/cache"


@dataclass
class LossSettings:
    """Weights of the losses; ``rank`` goes in a straight line from its first to its last value in stage 2."""

    kl: float = 1.0
    ce: float = 0.5
    hinge: float = 0.5
    rank_first: float = 2.0
    rank_last: float = 0.2
    temperature: float = 1.0
    budget: float = 1.0


@dataclass
class TrainSettings:
    """Settings of ``train``."""

    backbone: BackboneSettings = field(default_factory=BackboneSettings)
    reducer: ReducerSettings = field(default_factory=lambda: ReducerSettings("covipal"))
    data: DataSettings = field(default_factory=DataSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    start: str | None = None
    only: list[str] | None = None
    output: str = "outputs/train"
    seed: int = 0
    budgets: list[int] = field(default_factory=lambda: [16, 32, 64, 128, 192])
    budget_weights: list[float] | None = None
    curriculum: float = 0.0
    positions: str = "keep"
    guide_layers: list[int] | None = None
    guide_rows: str = "text"
    guide_steps: int = 180
    steps: int = 300
    pictures: int = 8
    turns: int = 4
    gate: str = "exact"
    tau: float = 0.3
    relax: list[float] = field(default_factory=lambda: [1.0, 0.1])
    candidates: float = 1.5
    learning_rate: float = 1e-3
    lr_find: bool = False
    weight_decay: float = 0.01
    warmup: int = 30
    clip: float = 1.0
    ema: float = 0.98
    precision: str = "auto"
    checkpointing: bool = False
    val_every: int = 100
    val_budgets: list[int] = field(default_factory=lambda: [64, 32])
    patience: int | None = None
    save_every: int = 50
    devices: int = 1
    accelerator: str = "auto"
    logger: str = "csv"
    table_budgets: list[int] = field(default_factory=lambda: [192, 128, 64, 32, 16])
    yardsticks: list[str] = field(default_factory=lambda: [*CONTROLS, *STRONGEST])
    table_batch: int = 50
    runs: int = 3
