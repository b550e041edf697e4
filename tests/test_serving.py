"""The serving model against the plain decoder, its kernel against PyTorch's attention; generation; memory."""

import dataclasses
import importlib.util
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.autograd.profiler import profile

from nas.config import Generate
from nas.data.tokenizer import end_of_text_id, load_tokenizer, train_tokenizer
from nas.errors import UserError
from nas.export.hf import HfExporter
from nas.latency.device import this_device
from nas.latency.memory import MemoryModel
from nas.latency.pool import LayerPool
from nas.latency.predictor import DTYPE_BYTES, Point, Workload
from nas.model import Decoder
from nas.serving import KVCache, Runner, ServingModel, generate
from nas.serving.batching import padded_batches
from nas.serving.layers import InputMajorLinear, randomise, split_k_linear
from nas.serving.runtime import DTYPES, compile_layers, fastest_rows
from nas.shape import FEATURES, ModelShape
from nas.space import SearchSpace
from nas.stages.generate import workload_of
from tests.conftest import Nas, random_supernet

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
SHAPE = ModelShape(
    num_hidden_layers=3,
    hidden_size=48,
    num_attention_heads=12,
    head_dim=8,
    intermediate_size=64,
    vocab_size=97,
    max_position_embeddings=24,
)
# What Triton's GEMMs take; with one group, the first is left to cuBLAS.
WHOLE_TILES = dataclasses.replace(SHAPE, hidden_size=256, num_attention_heads=8, head_dim=32, intermediate_size=512)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
groups = st.lists(st.sampled_from([1, 2, 3, 4, 6, 12]), min_size=3, max_size=3)
Continued = Callable[..., tuple[str, str]]


@st.composite
def shapes(draw: st.DrawFn) -> ModelShape:
    """Shapes with any features but stretched rotary embeddings."""
    flags = {key: draw(st.booleans()) for key in FEATURES if key != "rope_scaling"}
    return dataclasses.replace(SHAPE, **flags, rope_scaling=None, tie_word_embeddings=draw(st.booleans()))


def random_decoder(shape: ModelShape, vector: list[int], seed: int = 0) -> Decoder:
    space = SearchSpace("one", shape, tuple((groups,) for groups in vector))
    return random_supernet(space, seed).extract(space.largest).eval()


def tokens_of(shape: ModelShape, rows: int, length: int) -> Tensor:
    return torch.randint(shape.vocab_size, (rows, length), generator=torch.Generator().manual_seed(3))


def runner_of(decoder: Decoder, rows: int, length: int) -> Runner:
    """A decoder as it is served on a CPU, with an empty cache."""
    return Runner(ServingModel.of(decoder), KVCache(decoder.shape, decoder.kv_heads, rows, length))


@torch.no_grad()
def whole_logits(decoder: Decoder, tokens: Tensor) -> Tensor:
    return decoder(tokens)  # type: ignore[no-any-return]


@settings(max_examples=12, deadline=None)
@given(shapes(), groups, st.integers(1, 10))
def test_prompt_and_steps_give_the_logits_of_the_whole_forward_pass(
    shape: ModelShape, vector: list[int], prompt: int
) -> None:
    decoder, tokens = random_decoder(shape, vector), tokens_of(shape, 2, 16)
    runner, whole = runner_of(decoder, 2, 24), whole_logits(decoder, tokens)
    torch.testing.assert_close(runner.prefill(tokens[:, :prompt]), whole[:, prompt - 1], atol=1e-4, rtol=1e-4)
    for position in range(prompt, 16):
        step = runner.decode(tokens[:, position], position)
        torch.testing.assert_close(step, whole[:, position], atol=1e-4, rtol=1e-4)


def test_prompts_in_several_chunks_are_prompts_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, tokens = random_decoder(SHAPE, [4, 1, 2]), tokens_of(SHAPE, 5, 6)
    runners, logits = [runner_of(decoder, 5, 8) for _ in range(2)], []
    for runner, limit in zip(runners, (1000, 12), strict=True):  # five rows at once, and two, two, one
        monkeypatch.setattr("nas.serving.batching.PREFILL_TOKENS", limit)
        logits.append(runner.prefill(tokens))
    torch.testing.assert_close(*logits)
    for one, parts in zip(*(runner.cache.layers for runner in runners), strict=True):
        torch.testing.assert_close(one.keys, parts.keys)
        torch.testing.assert_close(one.values, parts.values)


@needs_triton
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("width", "count"), [(64, 2), (63, 1)])
def test_split_k_partials_add_up_to_the_linear_layer(bias: bool, width: int, count: int) -> None:
    linear, x_BF = InputMajorLinear(width, 48, bias), torch.randn(5, width)
    partials = split_k_linear(x_BF, linear)
    assert partials.shape == (count, 5, 48)
    torch.testing.assert_close(partials.sum(0), linear(x_BF))


def test_a_weight_lies_input_by_input_and_is_still_a_linear_layers() -> None:
    model, x_BF = ServingModel.of(random_decoder(SHAPE, [4, 1, 2])), torch.randn(5, SHAPE.hidden_size)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(linears) == 4 * SHAPE.num_hidden_layers + 1
    for linear in linears:
        assert linear.weight.shape == (linear.out_features, linear.in_features)
        assert linear.weight.t().is_contiguous()
    head = nn.Linear(SHAPE.hidden_size, SHAPE.vocab_size, bias=False)
    head.weight.data.copy_(model.lm_head.weight)
    torch.testing.assert_close(model.lm_head(x_BF), head(x_BF))


@settings(max_examples=25, deadline=None)
@given(groups, st.integers(1, 6), st.integers(1, 30), st.sampled_from(["fp32", "bf16"]))
def test_the_cache_is_two_storages_with_the_bytes_of_the_closed_form(
    vector: list[int], batch: int, length: int, dtype: str
) -> None:
    cache = KVCache(SHAPE, vector, batch, length, "cpu", DTYPES[dtype])
    tensors = [(layer.keys, layer.values) for layer in cache.layers]
    keys, values = ({pair[kind].untyped_storage().data_ptr() for pair in tensors} for kind in (0, 1))
    assert (len(keys), len(values), len(keys | values)) == (1, 1, 2)
    held = sum(tensor.untyped_storage().nbytes() for tensor in tensors[0])
    assert held == batch * length * SHAPE.kv_bytes_per_token(vector, DTYPE_BYTES[dtype])
    parts = [tensor for pair in tensors for tensor in pair]
    for mark, part in enumerate(parts):
        part.fill_(mark)
    assert all((part == mark).all() for mark, part in enumerate(parts))  # none lies over another
    assert [part.shape[1] for part in parts[::2]] == vector


def test_rows_of_the_cache_are_views_that_write_through() -> None:
    cache = KVCache(SHAPE, [4, 1, 2], 5, 8)
    for part in cache.rows(1, 3):
        part.keys.fill_(1.0)
        part.values.fill_(2.0)
    for layer in cache.layers:
        for written, tensor in ((1.0, layer.keys), (2.0, layer.values)):
            assert (tensor[1:3] == written).all()
            assert (tensor[[0, 3, 4]] == 0).all()


@settings(max_examples=30, deadline=None)
@given(shapes(), groups, st.integers(1, 5), st.sampled_from(["fp32", "bf16"]))
def test_weights_and_cache_are_predicted_byte_for_byte(
    shape: ModelShape, vector: list[int], batch: int, dtype: str
) -> None:
    model = ServingModel(shape, vector, "cpu", DTYPES[dtype])
    cache = KVCache(shape, vector, batch, 20, "cpu", DTYPES[dtype])
    weights = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    storages = [part.untyped_storage() for layer in cache.layers for part in (layer.keys, layer.values)]
    stores = {storage.data_ptr(): storage.nbytes() for storage in storages}
    predicted = MemoryModel(shape, Workload(batch, 20, 10, dtype, "eager"), on_gpu=False).at(vector, batch)
    assert predicted.weights == sum(weights.values())
    assert predicted.kv_cache == sum(stores.values())


def most_bytes(call: Callable[[], object]) -> int:
    """The most memory that a call held at once."""
    with torch.inference_mode(), profile(profile_memory=True) as profiled:
        call()
    events = [event for event in profiled.kineto_results.events() if event.name() == "[memory]"]
    changes: list[int] = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes))


@pytest.mark.parametrize(
    ("changes", "batch", "prompt"),
    [
        ({"intermediate_size": 1024}, 800, 20),
        ({"head_dim": 128, "intermediate_size": 64}, 800, 20),
        ({"vocab_size": 20_000}, 64, 10),
        ({"vocab_size": 20_000}, 512, 10),
    ],
    ids=["a wide MLP", "wide attention", "logits of one chunk", "logits of many chunks"],
)
def test_the_workspace_is_what_prompts_and_a_step_hold_at_once(
    changes: dict[str, int], batch: int, prompt: int
) -> None:
    shape, vector = dataclasses.replace(SHAPE, **changes), [4, 1, 2]  # type: ignore[arg-type]
    runner, tokens = runner_of(random_decoder(shape, vector), batch, 24), tokens_of(shape, batch, prompt)

    def serve() -> Tensor:
        logits_BV = runner.prefill(tokens)
        return runner.decode(logits_BV.argmax(-1), prompt)

    predicted = MemoryModel(shape, Workload(batch, 24, prompt, "fp32", "eager"), on_gpu=False).at(vector, batch)
    assert 0.95 < predicted.workspace / most_bytes(serve) < 1.2


@settings(max_examples=25)
@given(groups, st.floats(0, 3e6), st.booleans())
def test_the_largest_batch_is_the_last_that_fits(vector: list[int], memory_bytes: float, on_gpu: bool) -> None:
    model = MemoryModel(SHAPE, Workload("max", 20, 10, "fp32", "eager", 1.0), on_gpu)
    fitting = [batch for batch in range(1, 400) if model.at(vector, batch).total <= memory_bytes]
    assert model.largest_batch(vector, memory_bytes) == max(fitting, default=0)


def test_a_memory_in_which_nothing_fits_is_one_sentence() -> None:
    workload = Workload("max", 20, 10, "fp32", "eager", 1e-6)
    with pytest.raises(UserError, match=r"not one sequence of 1-1-1 .* fits into workload\.memory_gib=1e-06"):
        MemoryModel(SHAPE, workload, on_gpu=False).batch((1, 1, 1))


@settings(max_examples=25)
@given(groups, st.integers(1, 500), st.booleans())
def test_the_batch_is_the_given_one_or_the_largest_that_fits(vector: list[int], batch: int, on_gpu: bool) -> None:
    assert MemoryModel(SHAPE, Workload(batch, 20, 10, "fp32", "eager"), on_gpu).batch(vector) == batch
    model = MemoryModel(SHAPE, Workload("max", 20, 10, "fp32", "eager", 0.15), on_gpu)
    found = model.batch(vector)
    assert model.at(vector, found).total <= 0.15 * 2**30 < model.at(vector, found + 1).total


def test_greedy_generation_takes_the_likeliest_token_each_time() -> None:
    decoder, tokens = random_decoder(SHAPE, [4, 1, 2]), tokens_of(SHAPE, 2, 5)
    seen: list[int] = []
    new = generate(runner_of(decoder, 2, 20), tokens, 8, progress=seen.append)
    for _ in range(8):
        tokens = torch.cat((tokens, whole_logits(decoder, tokens)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(new, tokens[:, 5:])
    assert seen == list(range(1, 9))


def test_drawn_tokens_depend_on_the_seed_alone() -> None:
    decoder, tokens = random_decoder(SHAPE, [4, 1, 2]), tokens_of(SHAPE, 2, 5)

    def drawn(seed: int) -> list[list[int]]:
        return generate(runner_of(decoder, 2, 20), tokens, 12, temperature=1000.0, seed=seed).tolist()

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_generation_ends_when_every_row_has_stopped() -> None:
    decoder, tokens = random_decoder(SHAPE, [4, 1, 2]), tokens_of(SHAPE, 1, 5)
    free = generate(runner_of(decoder, 1, 20), tokens, 10)[0].tolist()
    stop = free[3]
    ended = generate(runner_of(decoder, 1, 20), tokens, 10, stop={stop})[0].tolist()
    assert ended == free[: free.index(stop) + 1]


def test_a_row_that_has_stopped_goes_on_until_the_last_one_has() -> None:
    shape = dataclasses.replace(SHAPE, vocab_size=5)  # so few that each is drawn soon
    decoder, tokens = random_decoder(shape, [4, 1, 2]), tokens_of(shape, 3, 2)

    def drawn(seen: list[int], *stop: int) -> list[list[int]]:
        runner = runner_of(decoder, 3, 24)
        return generate(runner, tokens, 22, temperature=20.0, stop=stop, progress=seen.append).tolist()

    free, ends = drawn([]), []
    for stop in range(5):
        ends.append([row.index(stop) + 1 if stop in row else 99 for row in free])
        seen: list[int] = []
        assert drawn(seen, stop) == [row[: max(ends[-1])] for row in free]
        assert seen == list(range(1, min(22, max(ends[-1])) + 1))
    assert any(min(end) < max(end) < 22 for end in ends)  # or nothing was seen here


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_tokens_are_drawn_from_the_softmax_at_the_temperature(temperature: float) -> None:
    rows, shape = 4000, dataclasses.replace(SHAPE, vocab_size=5)
    decoder, tokens = random_decoder(shape, [4, 1, 2]), torch.full((rows, 1), 3)
    shares = generate(runner_of(decoder, rows, 2), tokens, 1, temperature)[:, 0].bincount(minlength=5) / rows
    logits = whole_logits(decoder, tokens[:1])[0, -1]
    assert (logits.softmax(-1) - (logits / 4).softmax(-1)).abs().max() > 0.1
    torch.testing.assert_close(shares, (logits / temperature).softmax(-1), atol=5 * 0.5 / rows**0.5, rtol=0)


@needs_triton
def test_the_kernels_compute_what_pytorchs_operations_do() -> None:
    """On the GPU, or in Triton's interpreter."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    environment = os.environ if device == "cuda" else {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, str(Path(__file__).with_name("kernels.py")), device]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if "0-dimensional arrays" in done.stderr:
        pytest.skip("this Triton's interpreter does not know this NumPy")
    assert done.returncode == 0, done.stderr


@needs_triton
@pytest.mark.parametrize(("problems", "depth"), [(1, 3), (264, 3), (265, 2), (528, 2), (529, 3)])
def test_pipelines_are_shorter_where_more_programs_fit(problems: int, depth: int) -> None:
    from nas.serving.attention import pipeline_stages

    assert pipeline_stages(problems, 132) == depth


@needs_triton
def test_few_rows_of_whole_tiles_are_for_triton_on_a_hopper_card_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from nas.serving import gemm, launch

    def is_for_triton(rows: int = 128, inputs: int = 64, outputs: int = 64, **changes: Any) -> bool:
        dtype, tile = changes.get("dtype", torch.bfloat16), changes.get("tile", gemm._SPLIT_K)
        x, weight = torch.empty(rows, inputs, dtype=dtype), torch.empty(inputs, outputs, dtype=dtype)
        weight = weight.t().contiguous() if changes.get("row_major") else weight.t()
        return gemm._is_for_triton(x, weight, inputs, outputs, tile)

    assert not is_for_triton()
    assert launch.pdl_options(torch.empty(1, 1)) == {"PDL": False}
    for module in (launch, gemm):
        monkeypatch.setattr(module, "is_hopper", lambda _: True)
    assert is_for_triton()
    assert is_for_triton(64, outputs=128, tile=gemm._WIDE)
    assert not is_for_triton(65, outputs=128, tile=gemm._WIDE)
    for other in ({"rows": 129}, {"inputs": 96}, {"outputs": 96}, {"dtype": torch.float32}, {"row_major": True}):
        assert not is_for_triton(**other)
    assert [launch.pdl_options(torch.empty(rows, 1))["PDL"] for rows in (1, 128, 129)] == [True, True, False]


@needs_triton
@pytest.mark.parametrize(
    ("kernel", "tile"), [("_gate_up_kernel", "_GATE_UP"), ("_split_k_kernel", "_SPLIT_K"), ("_split_k_kernel", "_WIDE")]
)
def test_the_gemms_compile_for_a_hopper_card_and_fit_into_its_multiprocessors(
    kernel: str, tile: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    from nas.serving import gemm
    from nas.serving.launch import MOST_ROWS

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # or Triton warns
    function, tiled = getattr(gemm, kernel), getattr(gemm, tile)
    fixed = {"ROWS": MOST_ROWS, "COLUMNS": tiled.columns, "INPUTS": tiled.inputs, "PDL": True}
    kinds = {name: "*bf16" if name.endswith("_ptr") else "i32" for name in function.arg_names} | dict.fromkeys(
        fixed, "constexpr"
    )
    source = triton.compiler.ASTSource(
        function,
        kinds,
        {(index,): fixed[name] for index, name in enumerate(kinds) if name in fixed},
        {(index,): [["tt.divisibility", 16]] for index, name in enumerate(kinds) if name not in fixed},
    )
    options = {"num_warps": tiled.warps, "num_stages": tiled.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.metadata.shared <= 227 * 1024
    assert "griddepcontrol.wait" in compiled.asm["ptx"]


@needs_triton
@pytest.mark.parametrize(
    ("problems", "length", "unsplit", "splits"),
    [
        (132, 2048, 132, 1),
        (128, 2048, 128, 1),
        (96, 2048, 0, 2),
        (64, 2048, 0, 3),
        (144, 2048, 132, 8),  # 12 in the tail wave: 96 splits of 256 tokens, and no shorter
        (192, 2048, 132, 2),
        (208, 2048, 208, 1),  # too many in the tail wave to be split
        (1, 2048, 0, 8),
        (1, 131_072, 0, 16),
        (1, 300, 1, 1),
    ],
)
def test_the_sequences_of_the_tail_wave_are_split(problems: int, length: int, unsplit: int, splits: int) -> None:
    from nas.serving.attention import split_tail_wave

    assert split_tail_wave(problems, length, 132) == (unsplit, splits)


@pytest.mark.parametrize(
    ("batch", "runtime", "rows"),
    [
        (1, "graph", [1]),
        (64, "compiled", [64]),
        (65, "graph", [65, 72, 80, 96, 112, 128]),
        (144, "compiled", [144, 160, 176, 192]),
        (192, "graph", [192]),
        (144, "eager", [144]),
    ],
)
def test_only_large_steps_in_a_graph_are_padded(batch: int, runtime: str, rows: list[int]) -> None:
    assert padded_batches(batch, runtime) == rows


@needs_triton
@pytest.mark.parametrize("fastest", [144, 160])
def test_a_step_computes_as_many_rows_as_are_fastest(fastest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = ServingModel.of(random_decoder(SHAPE, [4, 1, 2])).layers
    seen: list[int] = []
    linear_layer = split_k_linear

    def seeing(x_BF: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
        if linear is layers[1].qkv_proj:
            seen.append(len(x_BF))
        return linear_layer(x_BF, linear)

    monkeypatch.setattr("nas.serving.runtime.split_k_linear", seeing)

    def milliseconds(run: Callable[[], None]) -> float:
        run()
        return 1.0 if seen[-1] == fastest else 1.005 if seen[-1] > fastest else 1.02

    monkeypatch.setattr("nas.serving.gemm.swiglu", lambda gate_up_BF: gate_up_BF.chunk(2, dim=1)[0])  # a GPU's
    monkeypatch.setattr("nas.serving.runtime.milliseconds", milliseconds)
    monkeypatch.setattr("nas.serving.runtime.captured", lambda call, _: call)
    monkeypatch.setattr("torch.cuda.graph_pool_handle", lambda: None)
    assert fastest_rows(layers, 144, "graph") == fastest
    assert set(seen) == {144, 160, 176, 192}
    seen.clear()
    assert (fastest_rows(layers, 144, "eager"), fastest_rows(layers, 64, "graph"), seen) == (144, 64, [])


@needs_triton
def test_a_step_is_not_padded_unless_that_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 0.995, 1.1, 1.1] * 6)
    monkeypatch.setattr("nas.serving.runtime.milliseconds", lambda _: next(times))
    monkeypatch.setattr("nas.serving.runtime.captured", lambda call, _: call)
    monkeypatch.setattr("torch.cuda.graph_pool_handle", lambda: None)
    assert fastest_rows(ServingModel.of(random_decoder(SHAPE, [4, 1, 2])).layers, 144, "graph") == 144


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_timed_lies_in_memory_as_what_serves(tied: bool) -> None:
    shape = dataclasses.replace(SHAPE, tie_word_embeddings=tied)
    space = SearchSpace("one", shape, ((4, 2),) * 3)
    points = [Point("decode", "layer", (2,), 3, 16)]
    pool = LayerPool(space, "fp32", "eager", torch.device("cpu"), points, 2**30)
    model = ServingModel(shape, (4, 2, 2), "cpu", torch.float32)
    served = model.layers[0]
    for name, parameter in pool._layers[0][4].named_parameters():
        assert parameter.stride() == served.get_parameter(name).stride(), name
    _, norm, head = pool._embeddings_and_heads[0]
    assert [p.stride() for p in head.parameters()] == [model.lm_head.weight.stride()]
    assert norm.weight.stride() == model.norm.weight.stride()


def test_the_pool_sends_as_many_rows_through_as_the_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, str]] = []

    def rows(_: object, batch: int, runtime: str) -> int:
        asked.append((batch, runtime))
        return batch + 3

    monkeypatch.setattr("nas.latency.pool.fastest_rows", rows)
    monkeypatch.setattr("nas.latency.pool.padded_batches", lambda batch, _: [batch, batch + 3])
    points = [Point("decode", "embedding", (), 5, 1), Point("prefill", "embedding", (), 2, 4)]
    pool = LayerPool(SearchSpace("one", SHAPE, ((2,),) * 3), "fp32", "eager", torch.device("cpu"), points, 2**30)
    assert [len(pool.prepare(point)[0]()[0]) for point in points] == [8, 2]
    assert (asked, pool.step_rows) == ([(5, "eager")], {5: 8})


def test_memory_counts_the_rows_to_which_a_step_may_be_padded() -> None:
    shape = dataclasses.replace(SHAPE, vocab_size=20_000)

    def workspace(batch: int, runtime: str) -> int:
        return MemoryModel(shape, Workload(batch, 20, 1, "fp32", runtime), on_gpu=True).at([4, 1, 2], batch).workspace

    handed_out = 4 * 20_000  # bytes a row of the logits that are no part of a step
    assert workspace(65, "graph") == workspace(128, "graph") - 63 * handed_out
    assert workspace(65, "eager") < workspace(65, "graph")


@needs_gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("runtime", ["eager", "graph", "compiled"])
@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        (SHAPE, 3),
        (dataclasses.replace(SHAPE, qk_norm=True), 3),
        (SHAPE, 130),
        (WHOLE_TILES, 3),
        (WHOLE_TILES, 100),
        (WHOLE_TILES, 130),
    ],
    ids=["few", "few, q/k norms", "many", "few in tiles", "some in tiles", "many in tiles"],
)
def test_every_runtime_gives_the_logits_of_the_whole_forward_pass_in_fp32(
    runtime: str, dtype: str, shape: ModelShape, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "nas.serving.runtime.fastest_rows", lambda _, batch, runtime: padded_batches(batch, runtime)[-1]
    )
    decoder, tokens = random_decoder(shape, [4, 1, 2]), tokens_of(shape, rows, 20)
    model = ServingModel.of(decoder, "cuda", DTYPES[dtype])
    runner = Runner(model, KVCache(shape, [4, 1, 2], rows, 24, "cuda", DTYPES[dtype]), runtime)
    logits = [runner.prefill(tokens[:, :8].cuda()).float().cpu()]
    logits += [runner.decode(tokens[:, at].cuda(), at).float().cpu() for at in range(8, 20)]
    expected = whole_logits(decoder, tokens)[:, 7:]
    error = (torch.stack(logits, dim=1) - expected).norm() / expected.norm()
    plain = whole_logits(decoder.to("cuda", DTYPES[dtype]), tokens.cuda())[:, 7:].float().cpu()
    assert error < (1e-5 if dtype == "fp32" else 1.2 * (plain - expected).norm() / expected.norm())


@needs_gpu
@pytest.mark.parametrize("rows", [8, 100])
def test_kernels_with_programmatic_dependent_launch_read_nothing_that_is_not_there_yet(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = dataclasses.replace(WHOLE_TILES, hidden_size=4096, num_attention_heads=32, head_dim=128)
    shape = dataclasses.replace(shape, intermediate_size=11008, max_position_embeddings=600)
    vector = [1, 4, 2]
    model = ServingModel(shape, vector, "cuda", torch.bfloat16)
    randomise(model, torch.Generator("cuda").manual_seed(0))
    tokens = tokens_of(shape, rows, 1)[:, 0].cuda()

    def logits() -> Iterator[torch.Tensor]:
        cache = KVCache(shape, vector, rows, 600, "cuda", torch.bfloat16)
        for layer in cache.layers:
            for part in (layer.keys, layer.values):
                part.normal_(generator=torch.Generator("cuda").manual_seed(1))
        runner = Runner(model, cache, "graph")
        for _ in range(200):
            yield runner.decode(tokens, 599).clone()

    early = list(logits())
    monkeypatch.setattr("nas.serving.launch.MOST_ROWS", 0)
    late = next(logits())
    assert all(torch.equal(one, late) for one in early)


@needs_gpu
def test_finding_the_fastest_rows_leaves_no_memory_behind() -> None:
    model = ServingModel(dataclasses.replace(WHOLE_TILES, hidden_size=2048), [1, 2, 4], "cuda", torch.bfloat16)
    randomise(model, torch.Generator("cuda").manual_seed(0))
    assert fastest_rows(model.layers, 130, "graph") in padded_batches(130, "graph")  # opens the libraries
    before = torch.cuda.memory_reserved()
    assert fastest_rows(model.layers, 130, "graph") in padded_batches(130, "graph")
    assert torch.cuda.memory_reserved() == before


def export_to(folder: Path, decoder: Decoder) -> Path:
    tokenizer = folder / "bytes.json"
    train_tokenizer(["the cat sat on the mat and looked at the moon " * 50], 270).save(str(tokenizer))
    HfExporter().write(decoder, tokenizer, folder / "model", {})
    return folder / "model"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model whose tokenizer knows bytes."""
    shape = dataclasses.replace(SHAPE, vocab_size=270)
    return export_to(tmp_path_factory.mktemp("checkpoint"), random_decoder(shape, [4, 1, 2]))


@pytest.fixture(scope="module")
def indifferent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model to which all tokens are equally likely; the first of them is the end of a text."""
    decoder = random_decoder(dataclasses.replace(SHAPE, vocab_size=270), [4, 1, 2])
    with torch.no_grad():
        decoder.model.norm.weight.zero_()
    return export_to(tmp_path_factory.mktemp("indifferent"), decoder)


@pytest.fixture
def continued(nas: Nas, tmp_path: Path) -> Continued:
    """Runs the command; the text that it writes, and what it prints."""

    def run(checkpoint: Path, prompt: str, *arguments: str) -> tuple[str, str]:
        name = f"run-{len(list(tmp_path.glob('runs/generate/*')))}"
        result = nas("generate", f"checkpoint={checkpoint}", f"prompt={prompt}", *arguments, f"name={name}")
        assert result.code == 0, result.err
        return (tmp_path / "runs/generate" / name / "generated.txt").read_bytes().decode(), result.out

    return run


def test_a_prompt_is_continued_and_written_down(continued: Continued, checkpoint: Path) -> None:
    texts = []
    for _ in range(2):
        text, printed = continued(checkpoint, "the cat", "new_tokens=6", "batch=2")
        texts.append(text)
        assert text.split("\n\n")[0] in printed
    assert texts[0] == texts[1]
    first, second = texts[0].rstrip("\n").split("\n\n")
    assert first == second  # greedy
    assert first.startswith("the cat")
    assert len(first) > len("the cat")


def test_the_space_before_the_first_new_word_is_kept(continued: Continued, tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "▁the": 1, "▁cat": 2, "▁sat": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.save(str(tmp_path / "words.json"))
    decoder = random_decoder(dataclasses.replace(SHAPE, vocab_size=4), [4, 1, 2])
    HfExporter().write(decoder, tmp_path / "words.json", tmp_path / "model", {})
    with torch.no_grad():
        next_word = int(decoder(torch.tensor([[1, 2]]))[0, -1].argmax())
    word = {0: "<unk>", 1: " the", 2: " cat", 3: " sat"}[next_word]
    assert continued(tmp_path / "model", "the cat", "new_tokens=1", "dtype=fp32")[0] == f"the cat{word}\n"


@pytest.mark.parametrize("prompt", ["def f(x, ${y}", '[a]: it\'s "é", \\\n', "null"])
def test_a_prompt_needs_no_quotes_of_hydra(continued: Continued, checkpoint: Path, prompt: str) -> None:
    assert continued(checkpoint, prompt, "new_tokens=2")[0].startswith(prompt)


def test_the_command_writes_what_the_plain_decoder_finds_likeliest_up_to_its_context(
    continued: Continued, checkpoint: Path
) -> None:
    tokenizer, decoder = load_tokenizer(str(checkpoint)), HfExporter().read(checkpoint).eval()
    prompt = tokenizer.encode("the cat").ids
    tokens = torch.tensor([prompt])
    while tokens.shape[1] < 24:
        tokens = torch.cat((tokens, whole_logits(decoder, tokens)[:, -1:].argmax(-1)), dim=1)
    new = tokens[0, len(prompt) :].tolist()
    assert end_of_text_id(tokenizer) not in new
    text, printed = continued(checkpoint, "the cat", f"new_tokens={24 - len(prompt)}", "dtype=fp32")
    assert text == "the cat" + tokenizer.decode(new) + "\n"
    assert text in printed


def test_each_continuation_is_drawn_by_the_seed_and_ends_at_its_own_end_of_text(
    continued: Continued, indifferent: Path
) -> None:
    tokenizer, model = load_tokenizer(str(indifferent)), HfExporter().read(indifferent)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prompt, stop = tokenizer.encode("the cat").ids, end_of_text_id(tokenizer)
    assert stop == 0
    texts = []
    for seed in (1, 2):
        runner = Runner(ServingModel.of(model, device), KVCache(model.shape, model.kv_heads, 40, 24, device))
        tokens = torch.tensor([prompt] * 40, device=device)
        rows = generate(runner, tokens, 16, temperature=0.5, seed=seed).tolist()
        kept = [row[: row.index(stop)] if stop in row else row for row in rows]
        assert {len(row) for row in kept} != {16}  # some end early, and not all
        assert 16 in {len(row) for row in kept}
        expected = "\n\n".join("the cat" + tokenizer.decode(row) for row in kept) + "\n"
        asked = ("new_tokens=16", "batch=40", "temperature=0.5", "dtype=fp32", "runtime=eager", f"seed={seed}")
        texts.append(continued(indifferent, "the cat", *asked)[0])
        assert texts[-1] == expected
    assert texts[0] != texts[1]


def test_generation_by_the_command_ends_at_the_end_of_the_text(continued: Continued, indifferent: Path) -> None:
    text, printed = continued(indifferent, "the cat", "new_tokens=16")
    assert text == "the cat\n"
    assert "(0 tokens in " in printed


@pytest.mark.parametrize(
    ("changes", "tokens", "words"),
    [
        ({"new_tokens": 4}, [], "prompt has 0 tokens .* takes 1 to 24 together; change either"),
        ({"new_tokens": 20}, [1] * 5, "prompt has 5 tokens and new_tokens is 20"),
        ({"new_tokens": 1}, [1, 97], "the prompt has token 97 but the model knows 97 tokens; give it its own"),
        (
            {"new_tokens": 9, "batch": 10**10},
            [1],
            "10000000000 continuations of 10 tokens .* lower batch or new_tokens",
        ),
    ],
)
def test_what_cannot_be_generated_is_one_sentence(changes: dict[str, Any], tokens: list[int], words: str) -> None:
    config = Generate(checkpoint="model", prompt="", runtime="eager", dtype="fp32", **changes)
    with pytest.raises(UserError, match=words):
        workload_of(config, tokens, Decoder(SHAPE, [4, 1, 2]), this_device())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can run graphs")
def test_a_runtime_that_needs_a_gpu_is_refused_on_a_cpu(nas: Nas, checkpoint: Path) -> None:
    result = nas("generate", f"checkpoint={checkpoint}", "prompt=the cat", "new_tokens=6", "runtime=graph")
    assert result.code == 1
    assert result.err.startswith("nas generate: runtime=graph needs a GPU")


@pytest.mark.parametrize(("on_gpu", "variable", "names"), [(True, "CC", "gcc or clang"), (False, "CXX", r"g\+\+")])
def test_a_missing_compiler_is_one_sentence(
    on_gpu: bool, variable: str, names: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: on_gpu)
    monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    layer = nn.Linear(1, 1)
    with pytest.raises(UserError, match=rf"{names} is not on the PATH; install one, set {variable} .*runtime=graph"):
        compile_layers([layer])
    (tmp_path / "mine").touch(0o755)
    monkeypatch.setenv(variable, "mine")
    compile_layers([layer])
    monkeypatch.setenv(variable, "gone")
    with pytest.raises(UserError, match="gone is not on the PATH"):
        compile_layers([layer])
