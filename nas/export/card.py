"""The model card that lies beside an exported model, whatever its format."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from nas.model import Decoder
from nas.space import format_vector

_COMPARED = "tokens, log-probabilities, cache of each layer"
# What scripts/engines_check.py found; docs/engines.csv has each row. By format: engine, command, checked, what fails.
_ENGINES = {
    "hf": [
        (
            "transformers 5.24.0, 4.57.6",
            "`from_pretrained(DIR, trust_remote_code=True)`",
            _COMPARED,
            "peft's prefix tuning, which has one cache size for all layers",
        ),
        (
            "vLLM 0.32.0 (on a CPU)",
            "`vllm serve DIR --trust-remote-code`",
            _COMPARED,
            "0.22.0 in bf16 on an H200 gave a wrong log-probability where layers differ in groups, in fp32 none; with "
            "tensor parallelism, a layer with fewer groups than ranks is replicated and saves less",
        ),
        (
            "mlx-lm 0.32.2 (on a CPU)",
            "`mlx_lm.generate --model DIR --trust-remote-code --prompt TEXT`",
            _COMPARED,
            "heads that are not hidden_size / heads wide, biases in some projections only, norms of queries and keys",
        ),
    ],
    "gguf": [
        (
            "llama.cpp (xllamacpp 2026.10.11549)",
            "`llama-server -m model.gguf`",
            _COMPARED,
            "norms of queries and keys; without flash attention every layer's values take the largest layer's room",
        ),
        ("Ollama", "`ollama create NAME`, `FROM ./model.gguf` in Modelfile", "not tried", "as llama.cpp"),
    ],
    "uniform": [("transformers 5.24.0", "`from_pretrained(DIR)`", _COMPARED, "saving: its cache is the largest's")],
    "modelopt": [("NVIDIA ModelOpt, Megatron-Bridge", "their readers of `block_configs`", "not tried", "")],
    "megatron": [
        (
            "Megatron-Core 0.16.1 (on a CPU)",
            "see below",
            "groups of each layer, number of parameters",
            "Megatron-LM's command line; scaled rotary embeddings other than linear ones and Llama 3.1's",
        )
    ],
}
_LIBRARIES = {"gguf": "gguf", "megatron": "megatron-core"}  # of other formats: transformers


def write_card(
    form: str, model: Decoder, folder: Path, rows: Mapping[str, str], notes: Sequence[str] = (), usage: str = ""
) -> None:
    """Writes README.md for a model of the format ``form``; ``rows`` are statements about it, by title."""
    shape = model.shape
    paragraphs = [
        f"---\nlibrary_name: {_LIBRARIES.get(form, 'transformers')}\npipeline_tag: text-generation\n"
        "tags: [nemotron-nas, grouped-query-attention, neural-architecture-search]\n---\n"
        f"# A model with KV groups {format_vector(model.kv_heads)}",
        f"A Llama-style decoder whose layers differ in their number of KV groups: {shape.num_hidden_layers} "
        f"layers, width {shape.hidden_size}, {shape.num_attention_heads} heads of {shape.head_dim}, "
        f"FFN {shape.intermediate_size}, vocabulary {shape.vocab_size}, context {shape.max_position_embeddings}; "
        f"{shape.parameters(model.kv_heads):,} parameters. Found by gqa-nas.",
        *notes,
        _table(("what", "value"), rows.items()),
        "Where this format runs, tried in November 2026 with small models:",
        _table(("engine", "command", "compared with the exported model", "does not work"), _ENGINES[form]),
        usage,
    ]
    (folder / "README.md").write_text("\n\n".join(paragraphs), encoding="utf-8")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
