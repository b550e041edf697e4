"""The schema of every command. Hydra's DictConfig becomes these dataclasses here and goes no deeper."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from typing import Any

import hydra.utils
from hydra.core.config_store import ConfigStore
from hydra.errors import InstantiationException
from omegaconf import MISSING, DictConfig, OmegaConf

from nas.errors import UserError
from nas.metrics import LIMITS

FRESH_LEARNING_RATE, TRAINED_LEARNING_RATE = 4e-3, 5e-4  # from random weights; from those of a checkpoint


@dataclass
class TrainConfig:
    """How a model is trained: AdamW, on the same batches whatever the number of processes."""

    steps: int = 500  # of the optimizer
    batch: int = 8  # rows per step
    length: int | None = None  # tokens per row; null: the model's whole context
    learning_rate: float | None = None  # null: 4e-3, or 5e-4 for a supernet that starts from a checkpoint
    warmup_share: float = 0.2  # of the steps, linear; then cosine down to final_share of the learning rate
    final_share: float = 0.05  # of the learning rate, at the end
    weight_decay: float = 0.1  # on matrices only
    clip_norm: float = 0.5  # of the gradients
    seed: int = 0  # of weights and batches
    precision: str = "auto"  # fp32 | bf16 (autocast); auto: bf16 on a GPU
    accumulate: int = 1  # microbatches that share out the rows of a step: less memory, the same step
    recompute: bool = False  # activation checkpointing: a layer's activations are computed again in the backward pass
    compile: bool = False  # torch.compile; a minute once, then faster steps on a GPU
    parallel: str = "ddp"  # under torchrun: ddp (the full model on each) | fsdp (FSDP2: the model is sharded)
    log_every: int = 10  # steps
    validate_every: int = 100  # steps
    checkpoint_every: int = 50  # steps; what an interrupted training goes on from
    validation_windows: int = 32  # context-long windows of validation text

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate at the end of the warm-up."""
        return FRESH_LEARNING_RATE if self.learning_rate is None else self.learning_rate


@dataclass
class SupernetConfig(TrainConfig):
    """How a supernet is trained."""

    sharing: str = "auto"  # a rule of nas/model/sharing.py; auto: separate with init, else sliced
    # all; kv: only what the smaller choices have alone, K/V heads and corrections, which follow the largest vector's
    # logits; auto: kv with init and separate heads where the largest vector is the checkpoint, else all
    trainable: str = "auto"
    output_rank: int = 0  # separate: rank of each smaller choice's own correction of the output projection; 0: none
    recipe: str = "mixed"  # mixed: every row its own text and vector | sandwich: the same text at several vectors
    largest_first: float = 0.0  # of the steps: so long only the largest vector is trained
    largest_share: float = 0.125  # mixed: of a step's rows that run the largest vector
    smallest_share: float = 0.125  # mixed: of those that run the smallest
    vectors_per_text: int = 4  # sandwich: the largest, the smallest and random ones
    # sandwich, kv: share of the loss of all but the largest that follows its logits; null: 0.5, and 1 with kv
    distillation_weight: float | None = None
    distillation_temperature: float = 1.0  # of the logits that are followed

    @property
    def distilled_share(self) -> float:
        if self.distillation_weight is None:
            return 1.0 if self.trainable == "kv" else 0.5
        return self.distillation_weight


@dataclass
class InitConfig:
    """The trained Hugging Face checkpoint that a supernet starts from; ``init=DIR`` is short for init.checkpoint."""

    checkpoint: str | None = None  # its directory; null: random weights
    align: str | None = "auto"  # auto: K/V heads of separate sharing are aligned, then merged; null: merged as they are
    calibration_tokens: int = 8192  # of the training text, by which they are aligned


@dataclass
class WorkloadConfig:
    """What the model is served for. Lengths are in tokens a sequence."""

    batch: Any = 64  # or max: of each vector as many sequences as fit into memory_gib
    context: int | None = None  # tokens in the cache at the timed decode step; null: the space's whole context
    prompt: int | None = None  # tokens of the timed prefill; null: half of the context
    dtype: str = "auto"  # fp32 | bf16; auto: bf16 on a GPU, fp32 on a CPU
    # eager | graph (CUDA graph) | compiled (torch.compile and CUDA graph); auto: compiled on a GPU, eager on a CPU
    runtime: str = "auto"
    memory_gib: float | None = None  # for batch=max; null: what the device leaves to PyTorch
    engine: str = "none"  # tgi, vllm: adds to a decode step what that does, where an estimate knows it (docs/a10g.md)


@dataclass
class CostConfig:
    """What an hour of the card and a kWh of its electricity cost; docs/energy.md has the formulas."""

    price_per_hour: float | None = None  # of the card, in any currency; null: unknown
    # kg CO2e a kWh; the world's mean of 2024 by Ember's Global Electricity Review 2025. Better: that of your grid
    grid_kg_per_kwh: float = 0.473
    pue: float = 1.0  # power usage effectiveness: the data centre's power over its computers'; 1: cooling not counted
    utilisation: float = 1.0  # share of the year that the card decodes; the rest it idles


@dataclass
class MeasureConfig:
    """The grid of `nas measure`, which always contains the workload, and how it is timed."""

    batches: list[int] | None = None  # null: a quarter and half of the workload's batch, and that batch
    contexts: list[int] | None = None  # null: a quarter, half and all of the workload's context
    prompts: list[int] | None = None  # null: half of the workload's prompt, and that prompt
    check_at: list[list[int]] | None = None  # more [batch, context] for the check; null: halfway between grid points
    rounds: int = 5  # every point is timed once per round, in shuffled order; on a CPU, until two rounds agree
    spread: float = 0.02  # a point whose 20th and 80th percentiles lie further apart gets up to as many rounds more
    drift: float = 0.02  # so do the points around a sentinel that was further off; not on a CPU
    segment: int = 24  # at most so many points between two looks at the sentinel; on a GPU, no more than 0.4 s of them
    energy_s: float = 5.0  # seconds of decode steps for each reading of power, on a GPU; 0: none
    energy_batches: list[int] | None = None  # null: the smallest and the largest
    seed: int = 0  # of the shuffling


@dataclass
class StageConfig:
    name: str = MISSING  # of the run directory, RUNS_DIR/COMMAND/NAME; the same name again finishes an interrupted run
    runs_dir: str = "runs"  # where all commands look for earlier runs
    logger: dict[str, Any] | None = None  # a tracker that gets what the command's runs write: conf/logger


@dataclass
class Train(StageConfig):
    """nas train, and what a search has that may train a supernet first."""

    space: str | None = None  # a name, a .yaml file, or a checkpoint's directory; null: that of init, else tiny
    init: InitConfig = field(default_factory=InitConfig)
    data: dict[str, Any] = MISSING  # the text: conf/data
    tokenizer: str | None = None  # a tokenizer.json or a directory with one; null: init's, else one is trained
    train: SupernetConfig = field(default_factory=SupernetConfig)


@dataclass
class LatencyParts(StageConfig):
    """What the commands have that may measure."""

    device: str = "this"  # this: the GPU here, else the CPU; or a folder of latency_models
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    check: int = 4  # end-to-end models of random vectors timed against the predictor, at each of a few workloads


@dataclass
class Measure(LatencyParts):
    space: str = "tiny"  # a name, a .yaml file, or a checkpoint's directory
    publish: str | None = None  # copy the finished table into this folder of device folders too


ConstraintsConfig = make_dataclass(
    "ConstraintsConfig",
    [(key, float | None, None) for key in LIMITS],
    namespace={
        "__module__": __name__,
        "__doc__": "Limits on what a vector may cost by the predictor: max_decode_ms, min_tokens_per_s, …; null: none.",
    },
)


@dataclass
class Search(LatencyParts, Train):
    serve: str | None = None  # the space that costs are of, if `space` is but a proxy for losses; null: the same
    budget: str = "60"  # vectors whose loss is evaluated: a number, a duration (90s, 30m, 2h), all or auto
    cost: CostConfig = field(default_factory=CostConfig)
    objectives: list[str] = field(default_factory=lambda: ["loss_nats", "tokens_per_s"])  # two or three metrics
    constraints: ConstraintsConfig = field(default_factory=ConstraintsConfig)  # type: ignore[valid-type]
    sampler: dict[str, Any] = MISSING  # what proposes vectors: conf/sampler
    seed: int = 0  # of the proposals
    supernet: str | None = None  # directory of a train run; null: the first that fits, else train one
    latency: str | None = None  # directory of a measure run; null: the newest that fits, else measure or estimate
    warm_start: Any = None  # directory of a finished search, or a list of them: their vectors enter this one
    workers: int = 1  # processes on this machine that share the search
    storage: str | None = None  # postgresql://USER@HOST/DATABASE, for workers elsewhere; null: study.db in the run
    worker: int = 0  # means nothing: sweep over it (worker=0,1,2) to start so many jobs that share one search
    heartbeat_s: float = 10.0  # a worker that has been silent for six of these is taken for dead


@dataclass
class Report(StageConfig):
    run: str = MISSING  # directory of a search, or of a sweep of searches
    reference: str | None = None  # a search whose front the others are measured by, such as an exhaustive one
    trained: str | None = None  # a nas finetune run of an export of it: losses before and after are drawn, too


@dataclass
class Export(StageConfig):
    run: str = MISSING  # directory of a search
    select: str = "all"  # all of the front | knee | best_loss | fastest | a vector, such as 4-2-1-1
    export: dict[str, Any] = MISSING  # one or several formats: conf/export


@dataclass
class Finetune(StageConfig):
    checkpoint: str | None = None  # a directory that nas export or nas finetune wrote; or
    run: str | None = None  # a nas export run: all of its vectors, each on the same batches
    from_scratch: bool = False  # train random weights by the checkpoint's configuration
    data: dict[str, Any] = MISSING  # the text: conf/data
    distill: str | None = None  # a teacher's Hugging Face directory, of the same vocabulary; null: text alone
    distillation_weight: float = 1.0  # share of the loss that follows the teacher's logits, not the text
    distillation_temperature: float = 1.0  # both softened by it; above 1 the less likely tokens count for more
    tokenizer: str | None = None  # as for nas train; null: the checkpoint's, else one is trained
    train: TrainConfig = field(default_factory=TrainConfig)
    export: dict[str, Any] = MISSING  # what the trained model is written as: conf/export


@dataclass
class Generate(StageConfig):
    checkpoint: str = MISSING  # a directory that nas export or nas finetune wrote
    prompt: str = MISSING  # a text
    new_tokens: int = 64  # of each continuation
    batch: int = 1  # so many continuations of the prompt
    temperature: float = 0.0  # 0: the likeliest token each time
    seed: int = 0  # of the draws at a temperature
    dtype: str = "auto"  # as in workload
    runtime: str = "auto"  # as in workload


@dataclass
class FurtherConfig:
    """More training of the extracted sub-networks, each on the same batches."""

    steps: int | None = None  # null: a quarter of the supernet's
    learning_rate: float | None = None  # null: a quarter of the supernet's
    seed: int = 1000  # of the batches; not the supernet's


@dataclass
class AloneConfig:
    """Models trained from the start without a supernet, by its configuration: a whole training for each seed."""

    vectors: int = 8  # of those that are compared; 0: train none alone
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])  # of weights and batches
    steps: int | None = None  # null: as many as the supernet's


@dataclass
class Fidelity(StageConfig):
    supernet: str = MISSING  # directory of a train run
    data: dict[str, Any] = MISSING  # the text that the supernet was trained on
    init: str | None = None  # the checkpoint that it started from, if it did: the models trained alone start there too
    vectors: int = 24  # that are compared
    equal_total: int = 12  # of these, so many with the same total of groups
    seed: int = 0  # which vectors
    validation_windows: int = 256  # by which all models are compared
    checkpoint_every: int = 200  # steps
    further: FurtherConfig = field(default_factory=FurtherConfig)
    alone: AloneConfig = field(default_factory=AloneConfig)


STAGES: dict[str, type[StageConfig]] = {
    stage.__name__.lower(): stage for stage in (Train, Measure, Search, Report, Export, Finetune, Generate, Fidelity)
}


# What values must be, by the names of their fields, which mean the same in every command; other numbers are positive.
_NOT_NEGATIVE = "check energy_s equal_total grid_kg_per_kwh output_rank seeds temperature vectors weight_decay worker"
_SHARES = "distillation_weight final_share largest_first largest_share smallest_share utilisation warmup_share"
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    **dict.fromkeys(_NOT_NEGATIVE.split(), (lambda number: number >= 0, "be 0 or more")),
    **dict.fromkeys(_SHARES.split(), (lambda number: 0 <= number <= 1, "lie between 0 and 1")),
    "pue": (lambda number: number >= 1, "be 1 or more"),
    "seed": (lambda number: 0 <= number < 2**32, f"lie between 0 and {2**32 - 1}"),
}
_MAY_BE_EMPTY = ("check_at", "objectives", "seeds", "warm_start")
_OPTIONS = {
    "precision": ("auto", "fp32", "bf16"),
    "trainable": ("auto", "all", "kv"),
    "parallel": ("ddp", "fsdp"),
    "dtype": ("auto", "fp32", "bf16"),
    "runtime": ("auto", "eager", "graph", "compiled"),
}


def register() -> None:
    """Makes the schemas known to Hydra as ``<stage>_schema``."""
    for stage, schema in STAGES.items():
        ConfigStore.instance().store(name=f"{stage}_schema", node=schema)


def to_stage(config: DictConfig) -> Any:
    """Turns Hydra's composed config into the dataclass of its command and checks it."""
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise UserError(f"{missing[0]} is needed; give {missing[0]}=…")
    stage = OmegaConf.to_object(config)
    validate(stage)
    return stage


def validate(config: Any, prefix: str = "") -> None:
    """Refuses a tree of config dataclasses with a value out of range, or a key that Hydra was told to add."""
    if unknown := sorted(vars(config).keys() - {item.name for item in fields(config)}):
        raise UserError(f"there is no key {prefix}{unknown[0]}; --help lists the keys")
    for name, value in vars(config).items():
        if is_dataclass(value):
            validate(value, f"{prefix}{name}.")
        elif broken := _broken_rule(prefix + name, name, value):
            shown = f"'{value}'" if isinstance(value, str) else value
            raise UserError(f"{prefix}{name} is {shown}{broken}")


def _broken_rule(key: str, name: str, value: Any) -> str | None:
    """How the sentence about a value goes on, if it breaks a rule."""
    if key == "workload.batch":
        good = value == "max" or (type(value) is int and value > 0)
        return None if good else " but must be a positive number of sequences, or max"
    if name == "check_at" and not all(len(pair) == 2 and min(pair) > 0 for pair in value or ()):
        return "; give pairs of batch and context, such as [[64,1024],[96,1500]]"
    if name == "name" and (not value.strip("./ ") or ".." in value.split("/")):
        return ", which names no run directory; give another name="
    if name == "runs_dir" and not value.strip():
        return ", which names no directory; give another runs_dir="
    if name in _OPTIONS and value not in _OPTIONS[name]:
        return f"; use {', '.join(_OPTIONS[name])}"
    numbers = value if isinstance(value, list) else [value]
    if {type(number) for number in numbers} <= {int, float}:
        keeps, rule = _RANGES.get(name, (lambda number: number > 0, "be positive"))
        if not all(map(keeps, numbers)) or not (numbers or name in _MAY_BE_EMPTY):
            return f" but must {rule}"
    return None


def build(spec: dict[str, Any], **more: Any) -> Any:
    """Makes the object that the YAML of a group in conf/ describes."""
    try:
        return hydra.utils.instantiate(spec, _convert_="all", **more)
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        reason = error.__cause__ or str(error).splitlines()[0]
        raise UserError(f"{spec.get('_target_')} cannot be made from {spec}: {reason}; fix the values") from None
