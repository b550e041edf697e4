"""What one engine makes of one exported model; run by scripts/engines_check.py with the engine's own Python.

    python scripts/engine_run.py ENGINE FOLDER REFERENCE.json

Prints JSON: first the engine's version; last what it computed: the greedy tokens after each prompt; log-probabilities
after every prefix of the fixed ids (of all tokens, or of the next id alone); the tokens of each text; the KV cache.
"""

import importlib.metadata
import json
import os
import re
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any


def transformers(folder: str, reference: dict[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, reference["dtype"])
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype).eval().to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    tokens = []
    with torch.no_grad():
        for prompt in reference["prompts"]:
            ids = torch.tensor([prompt], device=device)
            new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=reference["new"])
            tokens.append(new[0, len(prompt) :].tolist())
        passed = model(torch.tensor([reference["ids"]], device=device), use_cache=True)
    return {
        "tokens": tokens,
        "log_probabilities": passed.logits[0].float().log_softmax(-1).tolist(),
        "texts": [tokenizer(text).input_ids for text in reference["texts"]],
        "kv_heads": [layer.keys.shape[1] for layer in passed.past_key_values.layers],
    }


def mlx(folder: str, reference: dict[str, Any]) -> dict[str, Any]:
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.generate import generate_step
    from mlx_lm.models.cache import make_prompt_cache

    mx.set_default_device(mx.cpu)
    model, tokenizer = load(folder, tokenizer_config={"trust_remote_code": True})
    tokens = []
    for prompt in reference["prompts"]:
        cache, new = make_prompt_cache(model), []
        for token, _ in generate_step(mx.array(prompt), model, max_tokens=reference["new"], prompt_cache=cache):
            new.append(int(token))
            if token == reference["end"]:
                break
        tokens.append(new)
    logits = model(mx.array([reference["ids"]]))[0].astype(mx.float32)
    return {
        "tokens": tokens,
        "log_probabilities": (logits - mx.logsumexp(logits, axis=-1, keepdims=True)).tolist(),
        "texts": [list(tokenizer.encode(text)) for text in reference["texts"]],
        "kv_heads": [layer.keys.shape[1] for layer in cache],
    }


@contextmanager
def stderr_into(file: IO[bytes]) -> Iterator[None]:
    """What this process and the C++ code in it write to stderr goes to a file."""
    kept = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)


def llama_cpp(folder: str, reference: dict[str, Any], flash_attention: bool = True) -> dict[str, Any]:
    """llama.cpp's server, in this process; the size of its cache stands in its log."""
    import xllamacpp

    kinds, context = xllamacpp.llama_flash_attn_type, 4096
    params = xllamacpp.CommonParams()
    params.model.path = str(Path(folder) / "model.gguf")
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.cpuparams.n_threads = context, 1, 0, 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if not flash_attention:
        params.flash_attn_type = kinds.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup, params.fit_params, params.verbosity = False, False, 5
    with tempfile.TemporaryFile() as log, stderr_into(log):
        server = xllamacpp.Server(params)

        def post(route: str, **body: Any) -> Any:
            request = urllib.request.Request(
                server.listening_address + route, json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            return json.loads(urllib.request.urlopen(request, timeout=120).read())

        greedy = {"n_predict": reference["new"], "temperature": 0, "samplers": ["top_k"], "top_k": 1}
        # Of raw logits. The token that is drawn is a letter: an end of text or half a character comes without any.
        all_of_them = {"n_predict": 1, "samplers": [], "n_probs": reference["vocabulary"]}
        all_of_them["logit_bias"] = [[reference["letter"], 1e4]]
        tokens, rows = [], []
        for prompt in reference["prompts"]:
            tokens.append(
                post("/completion", prompt=prompt, return_tokens=True, cache_prompt=False, **greedy)["tokens"]
            )
        for length in range(1, len(reference["ids"]) + 1):
            answer = post("/completion", prompt=reference["ids"][:length], cache_prompt=False, **all_of_them)
            found = {row["id"]: row["logprob"] for row in answer["completion_probabilities"][0]["top_logprobs"]}
            rows.append([found[token] for token in range(reference["vocabulary"])])
        texts = [post("/tokenize", content=text, add_special=True, parse_special=False) for text in reference["texts"]]
        log.seek(0)
        mebibytes = re.findall(r"KV buffer size = +([\d.]+) MiB", log.read().decode(errors="replace"))
    return {
        "tokens": tokens,
        "log_probabilities": rows,
        "texts": [answer["tokens"] for answer in texts],
        "kv_values_per_token": round(sum(map(float, mebibytes)) * 2**20 / 4 / context),
    }


def vllm(folder: str, reference: dict[str, Any]) -> dict[str, Any]:
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
    os.environ["TRITON_F32_DEFAULT"] = "ieee"  # or attention in fp32 multiplies in TF32 on a GPU
    from vllm import LLM, SamplingParams

    memory = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 2**30}  # several share a GPU; not read on a CPU
    llm = LLM(folder, trust_remote_code=True, dtype=reference["dtype"], enforce_eager=True, **memory)
    cache = llm.llm_engine.vllm_config.cache_config
    prompts = [{"prompt_token_ids": prompt} for prompt in reference["prompts"]]
    greedy = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=reference["new"]))
    ids = reference["ids"]
    (whole,) = llm.generate({"prompt_token_ids": ids}, SamplingParams(max_tokens=1, prompt_logprobs=0))
    of_next = [found[ids[at + 1]].logprob for at, found in enumerate(whole.prompt_logprobs[1:])]
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in greedy],
        "log_probabilities_of_next": of_next,
        "texts": [llm.get_tokenizer().encode(text) for text in reference["texts"]],
        "kv_tokens_in_a_gib": cache.num_gpu_blocks * cache.block_size,
    }


def megatron(folder: str, reference: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001
    """Megatron-Core's model from the exported configuration, which has no weights."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs import get_gpt_heterogeneous_layer_spec
    from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    arguments = json.loads((Path(folder) / "model_arguments.json").read_text())
    config = HeterogeneousTransformerConfig(
        heterogeneous_layers_config_path=f"{folder}/heterogeneous_layers_config.json",
        activation_func=torch.nn.functional.silu,
        use_cpu_initialization=True,
        **arguments["config"],
    )
    model = GPTModel(config, get_gpt_heterogeneous_layer_spec(config, use_te=False), **arguments["model"])
    return {
        "parameters": sum(tensor.numel() for tensor in model.parameters()),
        "kv_heads": [layer.self_attention.num_query_groups_per_partition for layer in model.decoder.layers],
    }


ENGINES: dict[str, tuple[Callable[[str, dict[str, Any]], dict[str, Any]], str]] = {
    "transformers": (transformers, "transformers"),
    "mlx-lm": (mlx, "mlx_lm"),
    "llama.cpp": (llama_cpp, "xllamacpp"),
    "llama.cpp without flash attention": (partial(llama_cpp, flash_attention=False), "xllamacpp"),
    "vllm": (vllm, "vllm"),
    "megatron-core": (megatron, "megatron"),
}

if __name__ == "__main__":
    if "--help" in sys.argv:
        print(__doc__)
        sys.exit()
    run, module = ENGINES[sys.argv[1]]
    package = importlib.metadata.packages_distributions()[module][0]  # vllm's is vllm, or vllm-cpu
    print(json.dumps({"version": f"{package} {importlib.metadata.version(package)}"}), flush=True)
    print(json.dumps(run(sys.argv[2], json.loads(Path(sys.argv[3]).read_text()))))
