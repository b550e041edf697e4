"""Decode throughput of one model in vLLM, with random weights; the part of vllm_check.py that runs in vLLM's Python.

    python vllm_decode.py DIRECTORY MEMORY_GIB CONTEXT MOST_SEQUENCES

DIRECTORY holds a model's configuration. The batch is the largest up to MOST_SEQUENCES whose caches of CONTEXT
tokens fit into what vLLM leaves for them. All prompts are read first; then steps are timed in which every
sequence gets one token, shortly before the context is full. The last line is JSON.
"""

import json
import os
import sys
import time

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")

if "--help" in sys.argv:
    print(__doc__)
    sys.exit()

import random

import torch
import vllm
from vllm.entrypoints.llm import LLM
from vllm.sampling_params import SamplingParams

NEW_TOKENS = 160  # of each sequence: the first ones begin while others still read their prompts
TIMED_STEPS = 32


def main() -> None:
    directory, gib, context, most = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    sizes = list(range(8, most + 1, 8))
    begun = time.perf_counter()
    llm = LLM(
        directory,
        load_format="dummy",
        dtype="bfloat16",
        trust_remote_code=True,
        skip_tokenizer_init=True,
        max_model_len=context,
        gpu_memory_utilization=gib * 2**30 / torch.cuda.get_device_properties(0).total_memory,
        max_num_seqs=sizes[-1],
        max_num_batched_tokens=8192,
        enable_prefix_caching=False,
        compilation_config={"cudagraph_capture_sizes": [size for size in sizes if size >= 0.9 * most - 8]},
    )
    engine = llm.llm_engine
    cache = engine.vllm_config.cache_config
    cache_tokens = cache.num_gpu_blocks * cache.block_size
    started_s = time.perf_counter() - begun
    batch = min(most, cache_tokens // context)
    rng = random.Random(0)
    for index in range(batch):
        prompt = {"prompt_token_ids": [rng.randrange(5, 31_000) for _ in range(context - NEW_TOKENS)]}
        engine.add_request(
            str(index), prompt, SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
        )
    while len(engine.step()) < batch:  # until one step serves them all
        assert engine.get_num_unfinished_requests() == batch, "the first have ended before the last began"
    begun = time.perf_counter()
    for _ in range(TIMED_STEPS):
        outputs = engine.step()
        assert len(outputs) == batch and not any(output.finished for output in outputs)
    seconds = (time.perf_counter() - begun) / TIMED_STEPS
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs) / batch
    found = {
        "batch": batch,
        "context": round(context - NEW_TOKENS + tokens - TIMED_STEPS / 2),
        "vllm_ms": 1e3 * seconds,
        "cache_tokens": cache_tokens,
        "started_s": round(started_s),
        "vllm": vllm.__version__,
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
