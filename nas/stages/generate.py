"""nas generate: continues a prompt with an exported model, on the runtime that `nas measure` times.

generated.txt  the text, prompt included; of several continuations one after the other
"""

import itertools
import time
from pathlib import Path

import torch

from nas import console
from nas.config import Generate
from nas.data.tokenizer import as_ids, document_frame, load_tokenizer, special_ids
from nas.errors import UserError
from nas.export.hf import HfExporter
from nas.files import write_atomically
from nas.latency import Device, Workload, this_device
from nas.latency.memory import MemoryModel
from nas.latency.predictor import resolve_runtime
from nas.model import Decoder
from nas.run import start_run
from nas.serving import KVCache, Runner, ServingModel, generate
from nas.serving.runtime import DTYPES
from nas.stages.export import open_checkpoint


def run(config: Generate, path: Path) -> None:
    """Generates into ``path``."""
    source, parents = open_checkpoint(config.checkpoint)
    model, tokenizer, device = HfExporter().read(source), load_tokenizer(str(source)), this_device()
    before, after = document_frame(tokenizer, source / "tokenizer.json")
    stop = {*after, *as_ids(special_ids(source / "tokenizer.json").get("eos_token_id"))}
    prompt = before + tokenizer.encode(config.prompt, add_special_tokens=False).ids
    workload, shape, vector = workload_of(config, prompt, model, device), model.shape, model.kv_heads
    kept = ("checkpoint", "prompt", "new_tokens", "batch", "seed", "temperature")
    resolved = {name: getattr(config, name) for name in kept} | {"workload": str(workload)}
    with start_run(path, "generate", resolved, {"generate": config.seed}, parents) as run:
        torch_device, dtype = torch.device("cuda" if device.is_gpu else "cpu"), DTYPES[workload.dtype]
        served = ServingModel.of(model, torch_device, dtype)
        del model  # its weights were copied
        cache = KVCache(shape, vector, config.batch, workload.context, torch_device, dtype)
        tokens = torch.tensor([prompt] * config.batch, device=torch_device)
        runner, begun = Runner(served, cache, workload.runtime), time.perf_counter()
        with console.progress_bar("Generating", config.new_tokens) as bar:
            new_BN = generate(runner, tokens, config.new_tokens, config.temperature, config.seed, stop, bar)
        rows = [list(itertools.takewhile(lambda token: token not in stop, row)) for row in new_BN.tolist()]
        seconds, count = time.perf_counter() - begun, sum(map(len, rows))
        # Decoded with the prompt, for some tokenizers drop the space at the beginning of a text.
        start = len(tokenizer.decode(prompt))
        texts = [config.prompt + tokenizer.decode(prompt + row)[start:] for row in rows]
        text = "\n\n".join(texts) + "\n"
        write_atomically(path / "generated.txt", lambda file: file.write_text(text, encoding="utf-8"))
        run.log(tokens=count, seconds=seconds)
        run.finish()
    for text in texts:
        console.print(text)
    console.print(f"({count} tokens in {seconds:.2f} s, preparation included: {workload}, {device.name})")


def workload_of(config: Generate, prompt: list[int], model: Decoder, device: Device) -> Workload:
    """What the model is to serve; a UserError if prompt, model and memory do not go together."""
    shape, length = model.shape, len(prompt) + config.new_tokens
    limit = shape.max_position_embeddings
    if not prompt or length > limit:
        raise UserError(
            f"prompt has {len(prompt)} tokens and new_tokens is {config.new_tokens}, but the model takes 1 to {limit} "
            "together; change either"
        )
    if max(prompt) >= shape.vocab_size:
        what = f"{config.checkpoint}: the prompt has token {max(prompt)} but the model knows {shape.vocab_size} tokens"
        raise UserError(f"{what}; give it its own tokenizer.json")
    dtype, runtime = resolve_runtime(config.dtype, config.runtime, device)
    workload = Workload(config.batch, length, len(prompt), dtype, runtime)
    needed = MemoryModel(shape, workload, device.is_gpu).at(model.kv_heads, config.batch).total
    if needed > device.usable_bytes:
        raise UserError(
            f"{config.batch} continuations of {length} tokens take {needed / 2**30:.1f} GiB but {device.name} has "
            f"{device.usable_bytes / 2**30:.1f}; lower batch or new_tokens"
        )
    return workload
