"""Settings of ``train``."""

from dataclasses import dataclass

from lit_reduce.options import option
from lit_reduce.settings.groups import AUTO, BackboneSettings, ReducerSettings, backbone, preset, reducer

GATES = ("exact", "concrete", "noise")
LOGGERS = ("csv", "tensorboard", "wandb")
CONTROLS = ("random", "grid", "pool", "fastervlm")
STRONGEST = ("mmtok", "cdpruner", "divprune", "todre", "vispruner")  # on validation questions


@dataclass
class DataSettings:
    """Which questions: the group ``data``."""

    name: str = option(
        AUTO,
        "a reference model, for its rendered pictures, or a JSON-lines file with image, prompt and optional answer; "
        "auto: the default reference model",
    )
    val: str | None = option(None, "validation file; null holds back every 20th picture of a file")
    test: str | None = option(
        None, "file of the table; null: the test questions of the reference model, or the validation file"
    )
    images: int = option(700, "training pictures (reference models only)", min=1)
    turns: int = option(8, "questions on each training picture (reference models only)", min=1)
    val_images: int = option(64, "validation pictures (reference models only)", min=1)
    test_rows: int = option(200, "questions in the table", min=1)
    cache: str | None = option("outputs/cache", "folder of the teacher's outputs; null computes them at every step")


@dataclass
class LossSettings:
    """Weights of the losses: the group ``loss``."""

    kl: float = option(1.0, "weight of the KL divergence to the teacher's answer distribution", min=0)
    ce: float = option(0.5, "weight of the cross-entropy of the answer itself", min=0)
    hinge: float = option(0.5, "share of the top-K hinge in the ranking loss", min=0, max=1)
    rank_first: float = option(2.0, "weight of the ranking loss when stage 2 begins", min=0)
    rank_last: float = option(0.2, "weight of the ranking loss when stage 2 ends; linear in between", min=0)
    temperature: float = option(1.0, "temperature of the KL divergence", above=0)
    budget: float = option(1.0, "gate=concrete: weight of the squared relative miss of the budget", min=0)


@dataclass
class TrainSettings:
    """Train a reducer on a frozen backbone and export it as a plug-in.

    python train.py
    python train.py steps=800 reducer.options.width=128 output=outputs/wide
    python train.py reducer=packer

    A killed run continues when it is started again. Stage 1 trains scores or new tokens from the teacher's attention;
    stage 2 follows the teacher's answers.
    """

    backbone: BackboneSettings = backbone()
    reducer: ReducerSettings = reducer(
        "covipal", "the reducer that is trained; reducer.options.KEY=VALUE sets its size"
    )
    data: DataSettings = option(DataSettings, "which questions")
    preset: str = preset()
    init_from: str | None = option(
        None, "folder or hub id of a plug-in of that reducer, whose weights training starts from", was="start"
    )
    trainable: list[str] | None = option(
        None, "names of the weights that train, as [rest], or of the modules that hold them; null: all", was="only"
    )
    output: str = option("outputs/train", "folder of checkpoints, log, plug-in, table and the resolved settings")
    seed: int = option(0, "seed of the weights, of the order of questions and of the budgets", min=0)
    budgets: list[int | float] = option(
        [16, 192],
        "smallest and largest count of kept tokens, or ratios as [0.05,0.5] where counts differ between pictures; "
        "each step draws one in between",
        above=0,
        min_items=1,
    )
    budget_weights: list[float] | None = option(None, "one weight for each of budgets, to draw from these alone", min=0)
    curriculum: float = option(0.0, "share of the steps on which budgets come down from all tokens", min=0, max=1)
    positions: str = option(
        "keep", "position ids of kept tokens: the original ones, or without gaps", choices=("keep", "renumber")
    )
    guide_layers: list[int] | None = option(
        None, "decoder layers whose attention guides stage 1; null: the upper half without the last"
    )
    guide_rows: str = option(
        "text", "whose attention: everything after the picture, or the answer", choices=("text", "answer")
    )
    guide_steps: int = option(180, "steps of stage 1", min=0)
    steps: int = option(300, "steps of both stages", min=1)
    pictures: int = option(8, "pictures in a step, for each process", min=1)
    turns: int = option(4, "questions of each picture in a step", min=1)
    gate: str = option(
        "exact",
        "how stage 2 lets gradients reach the scores: the best tokens, hard; a relaxed sample, as many on average; or "
        "noise over the others",
        choices=GATES,
    )
    tau: float = option(0.3, "softness of the gate, in units of the standard deviation of the scores", above=0)
    relax: list[float] = option(
        [1.0, 0.1], "gate=concrete: first and last softness of the sample, geometric in between", above=0, min_items=1
    )
    candidates: float = option(1.5, "tokens that enter the decoder in stage 2, as a multiple of the budget", min=1)
    loss: LossSettings = option(LossSettings, "weights of the losses")
    learning_rate: float = option(0.001, "peak rate of AdamW: linear warm-up, cosine down to a hundredth", above=0)
    lr_find: bool = option(
        False, "true raises the rate on a copy, prints the loss and where it falls fastest, and stops"
    )
    weight_decay: float = option(0.01, "weight decay of AdamW", min=0)
    warmup: int = option(30, "steps over which the rate rises", min=0)
    clip: float = option(1.0, "largest gradient norm; 0: no clipping", min=0)
    ema: float = option(
        0.98, "decay of the moving average of weights that is validated and exported; 0: none", min=0, below=1
    )
    precision: str = option(
        "auto", "Lightning's name, as 32-true or bf16-mixed; auto: the latter on CPUs that are faster in bfloat16"
    )
    checkpointing: bool = option(
        False, "true computes the language model's activations twice instead of keeping them: less memory, slower"
    )
    val_every: int = option(100, "steps between validations", min=1)
    val_budgets: list[int | float] = option(
        [64, 32], "budgets that are validated, counts or ratios", above=0, min_items=1
    )
    patience: int | None = option(None, "validations without a better accuracy before training stops; null: never")
    save_every: int = option(50, "steps between checkpoints", min=1)
    devices: int = option(1, "processes (CPU) or GPUs; 2 give the result of 1 with twice the pictures", min=1)
    accelerator: str = option("auto", "Lightning's accelerator: auto, gpu, cpu")
    logger: str = option("csv", "where the log goes", choices=LOGGERS)
    table_budgets: list[int | float] = option(
        [192, 128, 64, 32, 16], "columns of the table, counts or ratios; [] for no table", above=0
    )
    baselines: list[str] = option(
        [*CONTROLS, *STRONGEST], "training-free reducers in the table: controls and the strongest", was="yardsticks"
    )
    table_batch: int = option(50, "questions at a time for the table", min=1)
    runs: int = option(3, "timed runs to the first token, in turns; 0: no timing", min=0)
