"""Values of keys that are refused, and those at the edges that are not."""

from typing import Any

import pytest

from nas.config import (
    ConstraintsConfig,
    Fidelity,
    FurtherConfig,
    Generate,
    Measure,
    MeasureConfig,
    Search,
    SupernetConfig,
    Train,
    TrainConfig,
    WorkloadConfig,
    validate,
)
from nas.errors import UserError


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (TrainConfig(steps=0), "steps is 0 but must be positive"),
        (TrainConfig(seed=-1), "seed is -1 but must lie between 0 and"),
        (TrainConfig(seed=2**32), "seed is 4294967296 but must lie between 0 and"),
        (TrainConfig(weight_decay=-1.0), "weight_decay is -1.0 but must be 0 or more"),
        (TrainConfig(warmup_share=2.0), "warmup_share is 2.0 but must lie between 0 and 1"),
        (TrainConfig(precision="fp8"), "precision is 'fp8'; use auto, fp32, bf16"),
        (TrainConfig(parallel="pipeline"), "parallel is 'pipeline'; use ddp, fsdp"),
        (SupernetConfig(largest_first=1.5), "largest_first is 1.5 but must lie between 0 and 1"),
        (SupernetConfig(distillation_temperature=0.0), "distillation_temperature is 0.0 but must be positive"),
        (Train(name="n", train=SupernetConfig(steps=0)), "train.steps is 0"),
        (Train(name=""), "name is '', which names no run directory"),
        (Train(name=".."), "name is '..', which names no run directory"),
        (Train(name="../../x"), "name is '../../x', which names no run directory"),
        (Train(name="x", runs_dir=" "), "runs_dir is ' ', which names no directory"),
        (Search(name="n", workload=WorkloadConfig(batch=0)), "workload.batch is 0 but must be a positive number"),
        (Search(name="n", workload=WorkloadConfig(batch=None)), "workload.batch is None but must be a positive number"),
        (Search(name="n", workload=WorkloadConfig(batch="many")), "workload.batch is 'many' but must be a positive"),
        (Search(name="n", workload=WorkloadConfig(batch=True)), "workload.batch is True but must be a positive"),
        (WorkloadConfig(dtype="int8"), "dtype is 'int8'; use auto, fp32, bf16"),
        (WorkloadConfig(runtime="fast"), "runtime is 'fast'; use auto, eager"),
        (ConstraintsConfig(max_memory_gib=0.0), "max_memory_gib is 0.0 but must be positive"),
        (Search(name="n", workers=0), "workers is 0 but must be positive"),
        (Search(name="n", seed=-1), "seed is -1 but must lie between 0 and"),
        (MeasureConfig(batches=[]), "batches is [] but must be positive"),
        (MeasureConfig(batches=[1, 0]), "batches is [1, 0] but must be positive"),
        (MeasureConfig(check_at=[[1]]), "check_at is [[1]]; give pairs of batch and context"),
        (Measure(name="n", check=-1), "check is -1 but must be 0 or more"),
        (FurtherConfig(steps=0), "steps is 0 but must be positive"),
        (Fidelity(name="n", seed=-1), "seed is -1 but must lie between"),
        (Generate(name="n", temperature=-1.0), "temperature is -1.0 but must be 0 or more"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_it_must_be(config: Any, words: str) -> None:
    with pytest.raises(UserError) as refusal:
        validate(config)
    assert str(refusal.value).startswith(words)


@pytest.mark.parametrize(
    "config",
    [
        Train(name="a/b.1", train=SupernetConfig(warmup_share=0.0, final_share=1.0, weight_decay=0.0, seed=2**32 - 1)),
        Search(name="n", workload=WorkloadConfig(batch="max"), constraints=ConstraintsConfig(min_tokens_per_s=0.5)),
        Measure(name="n", measure=MeasureConfig(check_at=[])),
        Measure(name="n", check=0, measure=MeasureConfig(batches=[1, 2], check_at=[[1, 8]])),
        Generate(name="n", checkpoint="c", prompt=""),
    ],
)
def test_a_value_at_the_edge_is_taken(config: Any) -> None:
    validate(config)


def test_a_key_that_there_is_not_is_named() -> None:
    train = TrainConfig()
    train.__dict__["setps"] = 3  # what Hydra's + does
    with pytest.raises(UserError, match=r"there is no key train\.setps"):
        validate(train, "train.")
