"""Training: which vectors a step runs, the learning rate's schedule, and the loop on a model with a known optimum."""

import functools
import itertools
import json
import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from nas.config import SupernetConfig, Train, TrainConfig
from nas.data import training_batch
from nas.errors import UserError
from nas.model import Decoder, Supernet
from nas.quality import vector_losses
from nas.run import Run
from nas.space import SearchSpace, Totals, Vector, load_space
from nas.stages.train import Training
from nas.training.heads import freeze, train_smaller_heads, with_trained_heads
from nas.training.loop import Microbatch, fit, full_state_dict, learning_rate_at, make_optimizer, make_ready
from nas.training.recipes import (
    Distillation,
    check_recipe,
    check_training_memory,
    distilled_loss,
    divergence,
    step_plan,
    text_loss,
    training_bytes,
)
from tests.conftest import logits_at, random_supernet

RECIPES_AND_TEXTS = {"mixed": 12, "sandwich": 3}  # texts of a step of 12 rows


def vectors_of(space: SearchSpace, config: SupernetConfig, step: int) -> list[Vector]:
    """All vectors of a step, in order."""
    return [vector for text in step_plan(space, config, step) for vector in text]


@given(st.integers(0, 2**32 - 1), st.integers(0, 10**6), st.sampled_from(sorted(RECIPES_AND_TEXTS)))
def test_the_plan_of_a_step_is_a_function_of_seed_and_step_and_fills_the_batch(
    seed: int, step: int, recipe: str
) -> None:
    space, config = load_space("tiny"), SupernetConfig(seed=seed, batch=12, recipe=recipe)
    plan = step_plan(space, config, step)
    assert plan == step_plan(space, config, step)
    assert len(plan) == RECIPES_AND_TEXTS[recipe]
    vectors = vectors_of(space, config, step)
    assert len(vectors) == 12
    for vector in vectors:
        space.check(vector)


def test_a_sandwich_has_the_largest_first_the_smallest_and_vectors_of_its_own_between(micro: SearchSpace) -> None:
    config = SupernetConfig(recipe="sandwich", batch=40, vectors_per_text=5)
    plan = step_plan(micro, config, 3)
    assert {len(text) for text in plan} == {5}
    assert {(text[0], text[1]) for text in plan} == {(micro.largest, micro.smallest)}
    assert len({tuple(text[2:]) for text in plan}) > 4


def test_the_largest_and_smallest_get_their_shares(micro: SearchSpace) -> None:
    config = SupernetConfig(batch=6, largest_share=0.25, smallest_share=0.125)
    vectors = [vector for step in range(2000) for vector in vectors_of(micro, config, step)]
    by_chance = (1 - 0.375) / len(Totals(micro.choices).reachable)  # an end is the only vector of its total
    assert vectors.count(micro.largest) / len(vectors) == pytest.approx(0.25 + by_chance, abs=0.015)
    assert vectors.count(micro.smallest) / len(vectors) == pytest.approx(0.125 + by_chance, abs=0.015)


def test_the_first_steps_train_the_largest_vector_alone_where_asked_for(micro: SearchSpace) -> None:
    config = SupernetConfig(steps=10, batch=8, largest_first=0.3, recipe="sandwich")
    alone = [set(vectors_of(micro, config, step)) == {micro.largest} for step in range(10)]
    assert alone == [True] * 3 + [False] * 7
    assert len(step_plan(micro, config, 0)) == 8  # no text is run twice at the same vector


def test_every_total_of_a_step_comes_from_its_own_stretch_of_the_range() -> None:
    totals = Totals(load_space("tiny").choices)
    for seed in range(20):
        drawn = [sum(vector) for vector in totals.draw_stratified(len(totals.reachable), np.random.default_rng(seed))]
        assert drawn == totals.reachable.tolist()


@given(st.lists(st.sets(st.sampled_from([1, 2, 4, 8]), min_size=1), min_size=1, max_size=5))
def test_the_counts_of_totals_are_those_of_brute_force(choices: list[set[int]]) -> None:
    counts = Counter(sum(vector) for vector in itertools.product(*choices))
    totals = Totals([tuple(sorted(allowed)) for allowed in choices])
    assert {total: totals.counts[total] for total in totals.reachable.tolist()} == counts


def test_draws_of_one_total_are_uniform_over_its_vectors(micro: SearchSpace) -> None:
    vectors = Totals(micro.choices).draw(np.full(7000, 7), np.random.default_rng(0))
    counts = Counter(vectors)
    wanted = {vector for vector in itertools.product((1, 2, 4), repeat=3) if sum(vector) == 7}
    assert counts.keys() == wanted
    assert all(abs(count / 7000 - 1 / len(wanted)) < 0.02 for count in counts.values())


def test_distillation_is_the_divergence_that_pytorch_computes() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, 11, generator=generator, requires_grad=True)
    targets = torch.randint(11, (6, 5), generator=generator)
    entropy = [F.cross_entropy(logits[row], targets[row]) for row in range(6)]
    first, others = [entropy[0], entropy[3]], [entropy[row] for row in (1, 2, 4, 5)]
    logs = (logits / 2).log_softmax(-1)
    soft = [
        4 * F.kl_div(logs[row], logs[teacher].detach(), log_target=True, reduction="batchmean")
        for row, teacher in ((1, 0), (2, 0), (4, 3), (5, 3))
    ]
    wanted = torch.stack([*first, *(0.3 * loss for loss in others), *(0.7 * loss for loss in soft)]).sum() / 6
    loss = distilled_loss(logits, targets, 3, Distillation(weight=0.7, temperature=2.0))
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    assert logits.grad is not None
    teacher = torch.autograd.grad(torch.stack(first).sum() / 6, logits)[0]
    torch.testing.assert_close(logits.grad[[0, 3]], teacher[[0, 3]])  # nothing flows into the teacher


@pytest.mark.parametrize("weight", [1.0, 0.7])
def test_following_a_teacher_piece_by_piece_is_the_divergence_that_pytorch_computes(weight: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 700, 11, generator=generator, requires_grad=True)  # two rows for each of two texts
    teacher, targets = torch.randn(2, 700, 11, generator=generator), torch.randint(11, (2, 700), generator=generator)
    rows, repeated = targets.repeat_interleave(2, 0), teacher.repeat_interleave(2, 0)
    arguments = ((logits / 2).log_softmax(-1).flatten(0, 1), (repeated / 2).log_softmax(-1).flatten(0, 1))
    wanted = weight * 4 * F.kl_div(*arguments, log_target=True, reduction="batchmean")
    wanted = wanted + (1 - weight) * F.cross_entropy(logits.flatten(0, 1), rows.flatten())
    loss = divergence(logits, teacher, rows, Distillation(weight, temperature=2.0))
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (loss, wanted)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_what_smaller_choices_have_alone_is_trained_and_kept_in_fp32(
    micro: SearchSpace, dtype: torch.dtype
) -> None:
    supernet = random_supernet(micro, sharing="separate", output_rank=3)
    start = {name: tensor.clone() for name, tensor in supernet.decoder.state_dict().items()}
    tokens = torch.randint(micro.shape.vocab_size, (2, 8))
    with torch.no_grad():
        before = logits_at(supernet, tokens, [micro.largest] * 2)
    train_smaller_heads(supernet, dtype)
    trained = trained_of(supernet)
    shape, smaller = micro.shape, [choices[:-1] for choices in micro.choices]
    heads = 2 * shape.hidden_size * shape.head_dim * sum(map(sum, smaller))
    corrections = 3 * (shape.num_attention_heads * shape.head_dim + shape.hidden_size) * sum(map(len, smaller))
    assert sum(parameter.numel() for parameter in trained) == heads + corrections
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    kept = {parameter.dtype for parameter in supernet.parameters() if not parameter.requires_grad}
    assert kept == {dtype}
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits_at(supernet, tokens, [micro.smallest] * 2).float().square().mean().backward()
    make_optimizer(supernet, TrainConfig(learning_rate=0.1)).step()
    after = random_supernet(micro, seed=1, sharing="separate", output_rank=3)
    saved = with_trained_heads(start, full_state_dict(supernet.decoder))
    moved = [name for name in start if ".correction.up" in name or ".k_proj." in name]
    assert moved and not any(torch.equal(saved[name], start[name]) for name in moved)
    after.decoder.load_state_dict(saved)
    with torch.no_grad():
        assert torch.equal(logits_at(after, tokens, [micro.largest] * 2), before)
        assert (logits_at(after, tokens, [micro.smallest] * 2) - before).abs().max() > 0.01


def test_heads_that_are_trained_alone_are_validated_in_fp32_though_the_others_are_in_bf16(micro: SearchSpace) -> None:
    supernet, vectors = random_supernet(micro, sharing="separate"), [micro.largest, micro.smallest]
    windows = torch.randint(micro.shape.vocab_size, (3, 9))
    before = vector_losses(supernet, vectors, windows)
    train_smaller_heads(supernet, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert vector_losses(supernet, vectors, windows) == pytest.approx(before, rel=0.02)
        losses = supernet.decoder.token_losses(torch.randn(4, micro.shape.hidden_size), torch.arange(4))
    assert losses.dtype == torch.float32


@pytest.mark.parametrize("recompute", [False, True])
def test_layers_with_heads_that_are_trained_alone_share_their_graphs(
    micro: SearchSpace, monkeypatch: pytest.MonkeyPatch, recompute: bool
) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr("torch.compile", partial(torch.compile, backend=backend))
    supernet = random_supernet(micro, sharing="separate", output_rank=3)
    tokens = torch.randint(micro.shape.vocab_size, (2, 8))
    train_smaller_heads(supernet, torch.float32)
    wanted = logits_at(supernet, tokens, [micro.smallest] * 2)
    make_ready(supernet, TrainConfig(compile=True, recompute=recompute))
    logits = logits_at(supernet, tokens, [micro.smallest] * 2)
    torch.testing.assert_close(logits, wanted)
    gradients = [torch.autograd.grad(x.square().mean(), trained_of(supernet)) for x in (logits, wanted)]
    torch.testing.assert_close(*gradients)
    assert len(graphs) == 2  # into the first layer comes nothing that has a gradient


def trained_of(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_a_teachers_logits_are_followed_and_it_stays_as_it_is(micro: SearchSpace, weight: float) -> None:
    student, model = (random_supernet(micro, seed).extract((4, 1, 2)) for seed in (0, 1))
    freeze(model, torch.float32)
    tokens, options = np.arange(200, dtype=np.uint32) % micro.shape.vocab_size, TrainConfig(batch=2, seed=3)
    loss = text_loss(tokens, options, 16, (model, Distillation(weight, 2.0)))(student, 5, Microbatch())
    windows = training_batch(tokens, 3, 5, 2, 16)
    logs, taught = ((each(windows[:, :-1]) / 2).log_softmax(-1) for each in (student, model))
    wanted = weight * 4 * F.kl_div(logs, taught, reduction="sum", log_target=True) / windows[:, 1:].numel()
    wanted = wanted + (1 - weight) * F.cross_entropy(student(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    same = text_loss(tokens, options, 16, (model, Distillation(1.0, 1.0)))(model, 0, Microbatch())
    assert float(same) == pytest.approx(0, abs=1e-5)


def test_the_microbatches_of_a_step_share_out_its_rows_once_each() -> None:
    rows = list(range(12))
    assert [row for index in range(4) for row in rows[Microbatch(index, 4).of(12)]] == rows
    with pytest.raises(UserError, match=r"12 texts .* 1 processes × 5 microbatches; .*train\.batch"):
        Microbatch(0, 5).of(12)
    with pytest.raises(UserError, match="4 texts"):
        Microbatch(0, 5).of(4)


def test_the_learning_rate_climbs_to_its_peak_and_falls_to_its_final_share() -> None:
    config = TrainConfig(steps=100, learning_rate=1.0, warmup_share=0.2, final_share=0.1)
    rates = [learning_rate_at(step, config) for step in range(100)]
    assert rates[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[20] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    middle = rates[20 + (99 - 20) // 2]
    assert middle == pytest.approx(0.55, abs=0.02)  # half way between peak and end


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_run_of_a_few_steps_has_a_learning_rate_too(steps: int) -> None:
    rates = [learning_rate_at(step, TrainConfig(steps=steps, learning_rate=1.0)) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)


class Point(nn.Module):
    """A model that is a point."""

    def __init__(self) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.zeros(3))


def test_the_loop_finds_a_known_optimum_and_returns_the_last_validation(tmp_path: Path) -> None:
    target, model = torch.tensor([1.0, -2.0, 0.5]), Point()

    def validate() -> dict[str, float]:
        assert not model.training
        return {"distance": float((model.at - target).norm())}

    config = TrainConfig(steps=400, learning_rate=0.1, clip_norm=1e9, validate_every=100, log_every=50)
    last = fit(model, lambda *_: ((model.at - target) ** 2).sum(), config, Run(tmp_path), validate)
    assert last["distance"] < 0.05
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "distance" in line] == [100, 200, 300, 400]
    losses = [line["loss_nats"] for line in lines if "loss_nats" in line]
    assert losses[0] > 100 * losses[-1]
    assert np.isfinite([line["gradient_norm"] for line in lines if "gradient_norm" in line]).all()


def test_a_training_that_diverges_stops_and_keeps_its_last_good_checkpoint(tmp_path: Path) -> None:
    model = Point()

    def loss_at(_: nn.Module, step: int, __: Microbatch) -> Tensor:
        return model.at.sum() * (float("inf") if step == broken else 1.0)

    config = TrainConfig(steps=10, log_every=2, checkpoint_every=2)
    broken = 0
    with pytest.raises(UserError, match=r"no longer finite within the 2 steps up to 2; lower .*no checkpoint yet"):
        fit(model, loss_at, config, Run(tmp_path), dict)
    broken, model = 5, Point()
    with pytest.raises(
        UserError, match=r"up to 6; lower train\.learning_rate .* last good checkpoint is .*checkpoint\.pt"
    ):
        fit(model, loss_at, config, Run(tmp_path), dict)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 4


def stop_after_checkpoint(folder: Path) -> tuple[Point, TrainConfig, Path]:
    """A model in training, stopped; its options and its checkpoint's file."""
    model, config = Point(), TrainConfig(steps=3, checkpoint_every=2)

    def stop() -> dict[str, float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model, lambda *_: model.at.sum(), config, Run(folder), stop)
    return model, config, folder / "checkpoint.pt"


@pytest.mark.parametrize("content", [b"", b"no archive", None])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, content: bytes | None) -> None:
    model, config, file = stop_after_checkpoint(tmp_path)
    weights = torch.load(file, weights_only=True)["model"]["at"].numpy().tobytes()
    file.write_bytes(file.read_bytes().replace(weights, bytes(12)) if content is None else content)
    with pytest.raises(UserError, match=r"checkpoint .*checkpoint\.pt is corrupt \(.+\); remove it"):
        fit(model, lambda *_: model.at.sum(), config, Run(tmp_path), dict)


@pytest.mark.parametrize(
    ("keys", "words"),
    [(["model"], "at"), (["optimizer", "state"], "exp_avg of at"), (["optimizer", "state", "at"], "exp_avg_sq of at")],
)
@pytest.mark.parametrize("more", [False, True])
def test_a_checkpoint_with_too_few_or_too_many_tensors_is_refused(
    tmp_path: Path, keys: list[str], words: str, more: bool
) -> None:
    model, config, file = stop_after_checkpoint(tmp_path)
    content = torch.load(file, weights_only=True)
    tensors = functools.reduce(operator.getitem, keys, content)
    name = "exp_avg_sq" if "at" in keys else "at"
    if more:
        tensors["another"], words = tensors[name], "another"
    else:
        del tensors[name]
    torch.save(content, file)
    with pytest.raises(UserError, match=rf"checkpoint\.pt is corrupt \(.*{words}.*\); remove it"):
        fit(model, lambda *_: model.at.sum(), config, Run(tmp_path), dict)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"recipe": "secret"}, r"train\.recipe is 'secret'; use mixed, sandwich"),
        ({"largest_share": 0.8, "smallest_share": 0.3}, r"largest_share 0\.8 and .*smallest_share 0\.3 .*; lower one"),
        ({"recipe": "sandwich", "vectors_per_text": 3, "batch": 4}, r"vectors_per_text is 3 .* train\.batch, 4"),
        ({"recipe": "sandwich", "vectors_per_text": 1}, r"vectors_per_text is 1 but must be 2 or more"),
        ({"output_rank": 2, "sharing": "pooled"}, r"output_rank is 2 but train\.sharing pooled; use separate"),
    ],
)
def test_a_recipe_whose_numbers_do_not_go_together_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_recipe(SupernetConfig(**options))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": 10**12}, r"training it takes at least .* GiB .* logits of 1000000000000 rows.*lower train\.batch"),
        ({"length": 33}, r"train\.length is 33 but the model's context is 32; lower it"),
    ],
)
def test_a_training_that_cannot_fit_is_refused(micro: SearchSpace, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_training_memory("it", TrainConfig(**options), random_supernet(micro).decoder, micro.largest)
    many = TrainConfig(batch=10**12, accumulate=10**12)
    check_training_memory("it", many, random_supernet(micro).decoder, micro.largest)


def test_a_frozen_model_takes_less_memory(micro: SearchSpace, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, vector, rows = micro.shape, micro.largest, TrainConfig(batch=1, length=1, precision="bf16")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    supernet = random_supernet(micro, sharing="separate")
    train_smaller_heads(supernet, torch.bfloat16)
    trained = sum(parameter.numel() for parameter in trained_of(supernet))
    have = 2 * shape.parameters(vector) + 16 * trained + 3 * 2 * shape.vocab_size  # bytes
    wide = 2 * (shape.hidden_size + shape.num_attention_heads * shape.head_dim + shape.intermediate_size)
    have += 2 * sum(wide + 2 * groups * shape.head_dim for groups in vector)
    assert sum(training_bytes(rows, supernet.decoder, vector)) == have
    assert sum(training_bytes(replace(rows, recompute=True), supernet.decoder, vector)) < have
    assert sum(training_bytes(rows, Decoder(shape, vector), vector)) > have
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=have))
    check_training_memory("it", rows, supernet.decoder, vector)
    with pytest.raises(UserError, match="training it takes at least"):
        check_training_memory("it", rows, supernet.decoder, vector, teacher=1)


def test_what_smaller_choices_have_alone_counts_where_all_is_trained(
    micro: SearchSpace, micro_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = SupernetConfig(batch=1, length=1, trainable="all", sharing="separate", output_rank=3)
    parameters = sum(parameter.numel() for parameter in Supernet(micro, "separate", 3).parameters())
    _, activations = training_bytes(options, Decoder(micro.shape, micro.largest), micro.largest)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    training = Training(Train(name="it", space=str(micro_file), train=options))
    total = 16 * parameters + activations
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=total))
    training.check_memory()
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=total - 1))
    with pytest.raises(UserError, match="training space micro takes at least"):
        training.check_memory()
