"""nas generate: continues a prompt with an exported model, on the runtime that `nas measure` times.

generated.txt  the text, prompt included; of several continuations one after the other
"""

import time
from pathlib import Path

import torch

from nas.config import Generate, WorkloadConfig
from nas.console import progress_bar, say
from nas.data.tokenizer import end_of_text_id, load_tokenizer
from nas.errors import UserError
from nas.export.hf import read_exported
from nas.files import write_atomically
from nas.latency.device import this_device
from nas.latency.model import resolve_workload
from nas.latency.pool import DTYPES
from nas.run import start_run
from nas.serving import KVCache, Runner, ServingModel, generate


def run(config: Generate, path: Path) -> None:
    """Generates into ``path``."""
    folder = Path(config.checkpoint)
    model = read_exported(folder)
    tokenizer = load_tokenizer(config.checkpoint)
    stop = end_of_text_id(tokenizer)
    prompt = tokenizer.encode(config.prompt).ids
    limit, device = model.shape.max_position_embeddings, this_device()
    if not prompt or len(prompt) + config.new_tokens > limit:
        raise UserError(
            f"prompt has {len(prompt)} tokens and new_tokens is {config.new_tokens}, but the model takes 1 to {limit} "
            "together; change either"
        )
    try:
        workload = resolve_workload(
            WorkloadConfig(config.batch, dtype=config.dtype, runtime=config.runtime), model.shape, device
        )
    except UserError as error:  # which names keys of other commands
        raise UserError(str(error).removeprefix("workload.")) from None
    asked = {"checkpoint": config.checkpoint, "prompt": config.prompt, "new_tokens": config.new_tokens}
    asked |= {"batch": config.batch, "seed": config.seed, "temperature": config.temperature, "workload": str(workload)}
    with start_run(path, "generate", asked, {"generate": config.seed}) as this_run:
        torch_device, dtype = torch.device("cuda" if device.is_gpu else "cpu"), DTYPES[workload.dtype]
        served = ServingModel.of(model, torch_device, dtype)
        cache = KVCache(model.shape, model.kv_heads, config.batch, len(prompt) + config.new_tokens, torch_device, dtype)
        tokens = torch.tensor([prompt] * config.batch, device=torch_device)
        runner, begun = Runner(served, cache, workload.runtime), time.perf_counter()
        with progress_bar("Generating", config.new_tokens) as bar:
            new = generate(
                runner,
                tokens,
                config.new_tokens,
                config.temperature,
                config.seed,
                stop,
                bar.update,
            ).tolist()
        seconds = time.perf_counter() - begun
        texts = [config.prompt + tokenizer.decode(_until(row, stop)) for row in new]
        write_atomically(
            path / "generated.txt", lambda file: file.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
        )
        this_run.log(tokens=config.batch * len(new[0]), seconds=seconds)
        this_run.finish()
    for text in texts:
        say(text)
    say(f"({config.batch} x {len(new[0])} tokens in {seconds:.2f} s, preparation included: {workload}, {device.name})")


def _until(tokens: list[int], stop: int | None) -> list[int]:
    return tokens[: tokens.index(stop)] if stop in tokens else tokens
