"""Does training the K/V heads of a Llama-3.1-8B fit one 80 GB card, and what does a step cost beside its yardstick?

Makes a supernet of that shape with random weights on the GPU, frozen in bf16 but for the K/V heads of the smaller
choices, and trains it for some steps of 8,192 tokens, as `nas train init=DIR` does; once with activations kept, once
computed again. The yardsticks are passes of the plain model of that shape, frozen, over as many tokens: a forward pass
without gradients, and a forward and a backward pass through its layers, down to their inputs. Every row of the table is
one kind of step with its median time, its peak memory and what the check before a training predicts for it. The last
line of stdout is JSON.

    python scripts/bench_kv_training.py                                            # about a minute on an H100
    python scripts/bench_kv_training.py --tiny --csv kv_training.csv               # a trial on a CPU
"""

import argparse
import gc
import json
import math
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from nas.config import SupernetConfig
from nas.files import write_atomically, write_csv
from nas.model import Decoder, Supernet
from nas.run import origin
from nas.shape import ModelShape
from nas.space import SearchSpace
from nas.training.heads import train_smaller_heads
from nas.training.loop import autocast, computed_in, make_optimizer, make_ready, training_device, training_step
from nas.training.recipes import supernet_loss, training_bytes

OUT, PAGE = Path("docs/benchmarks/kv_training.csv"), Path("docs/checkpoints.md")
LLAMA = ModelShape(
    num_hidden_layers=32,
    hidden_size=4096,
    num_attention_heads=32,
    head_dim=128,
    intermediate_size=14336,
    vocab_size=128256,
    max_position_embeddings=131072,
    rope_theta=500000.0,
    rope_scaling={
        "rope_type": "llama3",
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
)
TINY = replace(LLAMA, num_hidden_layers=3, hidden_size=64, num_attention_heads=8, head_dim=8, intermediate_size=96)
DEVICE = training_device()
ON_GPU = DEVICE.type == "cuda"
WARM_UP = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, nargs="+", default=[2, 4, 8], help="choices of every layer")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--tiny", action="store_true", help="a tiny shape")
    parser.add_argument("--compile", action="store_true", default=ON_GPU, help="also on a CPU")
    parser.add_argument("--csv", type=Path, default=OUT)
    given = parser.parse_args()
    shape = replace(TINY, vocab_size=512) if given.tiny else LLAMA
    name = "tiny" if given.tiny else "llama-3.1-8b"
    space = SearchSpace(name, shape, (tuple(given.groups),) * shape.num_hidden_layers)
    options = SupernetConfig(
        batch=given.batch,
        length=given.length,
        precision="bf16",
        compile=given.compile,
        sharing="separate",
        trainable="kv",
        largest_share=0.0,
    )
    rows = [*training(space, options, given.rounds), *yardsticks(space, options, given.rounds)]
    common = {"space": space.name, "groups": "-".join(map(str, given.groups)), "tokens": given.batch * given.length}
    for row in rows:
        row["tokens_per_s"] = common["tokens"] / row["seconds"]
    table = pd.DataFrame([common | row | {"rounds": given.rounds} | origin() for row in rows])
    print(table.iloc[:, :9].to_string(index=False))
    write_csv(given.csv, table)
    if given.csv == OUT:
        old, lines = PAGE.read_text(encoding="utf-8"), markdown(table)
        new = re.sub(r"(?<=<!-- kv -->\n).*?(?=<!-- /kv -->)", f"\n{lines}\n\n", old, flags=re.DOTALL)
        write_atomically(PAGE, lambda path: path.write_text(new, encoding="utf-8"))
    seconds = table.set_index("kind")["seconds"]
    results = {
        "peak_gib": rows[0]["peak_gib"],
        "predicted_gib": rows[0]["predicted_gib"],
        "tokens_per_s": rows[0]["tokens_per_s"],
        "step_s": seconds["kv step"],
        # the largest vector's forward pass, which is what is learned from, and those of the vector that learns
        "step_over_both_forwards_and_backward": seconds["kv step"]
        / (seconds["forward"] + seconds["forward and backward"]),
        "step_over_one_forward_and_backward": seconds["kv step"] / (seconds["forward"] + seconds["backward"]),
    }
    print(json.dumps({name: round(value, 4) for name, value in results.items()}))


def markdown(table: pd.DataFrame) -> str:
    """The page's table."""
    lines = ["| | s | tokens/s | peak GiB | predicted GiB |", "| --- | ---: | ---: | ---: | ---: |"]
    for row in table.to_dict("records"):
        predicted = "" if math.isnan(row["predicted_gib"]) else f"{row['predicted_gib']:.1f}"
        cells = f"{row['seconds']:.3f} | {row['tokens_per_s']:,.0f} | {row['peak_gib']:.1f} | {predicted}"
        lines.append(f"| {row['kind']} | {cells} |")
    return "\n".join(lines)


def on_device(make: Callable[[], Any]) -> Any:
    """A model made in bf16 where it is used: in fp32 it would not fit."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with DEVICE:
            return make()
    finally:
        torch.set_default_dtype(before)


def training(space: SearchSpace, options: SupernetConfig, rounds: int) -> list[dict[str, Any]]:
    """Steps of training the smaller choices' heads."""
    supernet = on_device(lambda: Supernet(space, options.sharing))
    train_smaller_heads(supernet, computed_in(options.precision, DEVICE))
    tokens = np.random.default_rng(0).integers(0, space.shape.vocab_size, 1_000_000).astype(np.uint32)
    loss_at = supernet_loss(space, tokens, options, options.length or 0)
    ready, optimizer = make_ready(supernet, options), make_optimizer(supernet, options)
    rows = []
    for kind, recompute in (("kv step", False), ("kv step, activations computed again", True)):
        if recompute:
            make_ready(supernet, replace(options, compile=False, recompute=True))  # around what is compiled already
        row = timed(kind, lambda step: training_step(ready, loss_at, step, optimizer, options), rounds)
        kept = training_bytes(replace(options, recompute=recompute), supernet.decoder, space.largest)
        rows.append(row | {"predicted_gib": sum(kept) / 2**30})
    return rows


def yardsticks(space: SearchSpace, options: SupernetConfig, rounds: int) -> list[dict[str, Any]]:
    """Passes of the plain model."""
    model: Decoder = on_device(lambda: Decoder(space.shape, space.largest)).requires_grad_(False)
    make_ready(model, options)
    tokens = torch.randint(space.shape.vocab_size, (options.batch, options.length or 0), device=DEVICE)
    rope, embedded = model.rope(0, tokens.shape[1]), model.model.embed_tokens(tokens).requires_grad_(True)
    marks: list[float] = []

    @torch.no_grad()
    def forward(_: int) -> None:
        with autocast("bf16", DEVICE):
            model(tokens)

    def through_layers(_: int) -> None:
        x: Tensor = embedded
        with autocast("bf16", DEVICE):
            for layer in model.model.layers:
                x = layer(x, rope)
        gradient = torch.ones_like(x)
        synchronize()
        begin = time.perf_counter()
        x.backward(gradient)
        synchronize()
        marks.append(time.perf_counter() - begin)
        for tensor in (embedded, *model.parameters()):
            tensor.grad = None

    both = timed("forward and backward", through_layers, rounds)
    backward = statistics.median(marks[-rounds:] or [math.nan])
    return [timed("forward", forward, rounds), both, both | {"kind": "backward", "seconds": backward}]


def timed(kind: str, step: Callable[[int], object], rounds: int) -> dict[str, Any]:
    """Median time and peak memory of steps, the first ones left out of the time."""
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    try:
        for number in range(WARM_UP + rounds):
            synchronize()
            begin = time.perf_counter()
            step(number)
            synchronize()
            seconds.append(time.perf_counter() - begin)
    except torch.OutOfMemoryError as error:
        print(f"{kind} does not fit: {error}", flush=True)
        seconds = [math.nan] * (WARM_UP + 1)
    print(f"{kind}: {', '.join(f'{second:.3f}' for second in seconds)} s", flush=True)
    peak = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if ON_GPU else (0, 0)
    return {
        "kind": kind,
        "seconds": statistics.median(seconds[WARM_UP:]),
        "peak_gib": peak[0] / 2**30,
        "reserved_gib": peak[1] / 2**30,
    }


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
