"""llama.cpp's format: one file, ``model.gguf``, for llama-server, Ollama and what else is built on llama.cpp.

Its architecture is `deci`, whose heads and FFN widths are arrays, an entry per layer, so that each layer's KV cache has
the size of its groups. llama.cpp's own converter refuses these models or drops parts of them; the tensors are named by
the maintained table of the package `gguf`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
from gguf import GGMLQuantizationType as Ggml
from torch import Tensor

from nas.data.tokenizer import as_ids, chat_template, document_frame, load_tokenizer, special_or_usual_ids
from nas.errors import UserError
from nas.export.card import write_card
from nas.files import read_json, write_atomically
from nas.model import Decoder
from nas.model.decoder import rope_frequencies, untied
from nas.shape import ModelShape

FILE = "model.gguf"
_DTYPES = {
    "fp32": (Ggml.F32, gguf.LlamaFileType.ALL_F32),
    "fp16": (Ggml.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (Ggml.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (Ggml.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp's names of ways to split a text before the merges, by the steps of `_step`.
_BYTE_LEVEL = {
    ("words",): "gpt-2",
    ("digits", "words"): "smollm",
    (_WORDS % r"\p{N}{1,3}", "bytes"): "llama-bpe",
    (_WORDS % r"\p{N}", "bytes"): "qwen2",
}
_SENTENCEPIECE = {(): "llama", ("spaces",): "llama"}


class GgufExporter:
    """See `nas.export.Exporter`."""

    of_served = False

    def __init__(self, dtype: str = "fp32") -> None:
        if dtype not in _DTYPES:
            raise UserError(f"export.dtype is '{dtype}'; for gguf use {', '.join(_DTYPES)}")
        self.dtype, self.file_type = _DTYPES[dtype]

    def check(self, shape: ModelShape, tokenizer: Path | None) -> None:
        if shape.qk_norm:
            raise UserError(
                "gguf cannot hold this model: llama.cpp's deci architecture has no norms of queries and keys "
                "(qk_norm); use export=hf, or export=uniform with llama.cpp's converter"
            )
        if tokenizer:
            _kind(tokenizer)

    def write(self, model: Decoder, tokenizer: Path | None, folder: Path, card: Mapping[str, str]) -> None:
        self.check(model.shape, tokenizer)
        writer = gguf.GGUFWriter(None, "deci")
        self._add_shape(writer, model)
        writer.add_name(folder.name)
        if tokenizer:
            _add_tokenizer(writer, tokenizer, model.shape.vocab_size)
        self._add_tensors(writer, model)

        def save(path: Path) -> None:
            writer.write_header_to_file(path)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()

        write_atomically(folder / FILE, save)
        write_card("gguf", model, folder, card)

    def _add_shape(self, writer: gguf.GGUFWriter, model: Decoder) -> None:
        shape, layers = model.shape, len(model.kv_heads)
        writer.add_type("model")
        writer.add_file_type(self.file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_block_count(layers)
        writer.add_context_length(shape.max_position_embeddings)
        writer.add_embedding_length(shape.hidden_size)
        writer.add_vocab_size(shape.vocab_size)
        writer.add_head_count([shape.num_attention_heads] * layers)
        writer.add_head_count_kv(list(model.kv_heads))
        writer.add_feed_forward_length([shape.intermediate_size] * layers)
        for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
            add(shape.head_dim)
        writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
        writer.add_rope_freq_base(shape.rope_theta)
        if shape.rope_scaling:  # as divisors of the frequencies and a factor, which hold every kind of scaling exactly
            (plain, _), (scaled, amplitude) = (rope_frequencies(shape, how) for how in (None, shape.rope_scaling))
            writer.add_tensor("rope_freqs.weight", (plain / scaled).numpy())
            writer.add_rope_scaling_attn_factors(amplitude)

    def _add_tensors(self, writer: gguf.GGUFWriter, model: Decoder) -> None:
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DECI, len(model.kv_heads))
        for name, tensor in untied(model.shape, model.state_dict()).items():
            module, _, kind = name.rpartition(".")
            if module.endswith("q_proj"):
                tensor = _neighbours(tensor, model.shape.num_attention_heads)
            if module.endswith("k_proj"):
                tensor = _neighbours(tensor, model.kv_heads[int(name.split(".")[2])])
            values = tensor.detach().float().cpu().contiguous().numpy()
            stored = self.dtype if values.ndim > 1 else Ggml.F32
            if values.shape[-1] % gguf.GGML_QUANT_SIZES[stored][0]:
                stored = Ggml.F16  # what llama.cpp does with rows that are no multiple of a block
            writer.add_tensor(
                f"{names.get_name(module)}.{kind}", gguf.quants.quantize(values, stored), raw_dtype=stored
            )


def _neighbours(tensor: Tensor, heads: int) -> Tensor:
    """Rows of q or k reordered within each head, for llama.cpp rotates neighbours, and Hugging Face halves."""
    reordered: Tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    return reordered


def _kind(tokenizer: Path) -> str:
    """llama.cpp's name for how a text becomes the symbols that a tokenizer.json merges; `llama` for SentencePiece's."""
    content = read_json(tokenizer)
    model, splits = content["model"], _steps(content.get("pre_tokenizer"), "pretokenizers")
    kinds, normal = (_SENTENCEPIECE, {"Prepend", "Replace"}) if model.get("byte_fallback") else (_BYTE_LEVEL, {"NFC"})
    name = kinds.get(tuple(map(_step, splits)))
    normalizers = {step["type"] for step in _steps(content.get("normalizer"), "normalizers")}
    if model["type"] != "BPE" or not name or normalizers - normal:
        how = f"{model['type']} after {', '.join(step['type'] for step in splits) or 'no split'}"
        raise UserError(
            f"gguf cannot hold {tokenizer}: llama.cpp has no name for its kind ({how}); train with one of the kind of "
            "GPT-2, Llama 2, Llama 3, Qwen2 or SmolLM, or use export=hf"
        )
    return name


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a sequence in a tokenizer.json, or the only one."""
    return [] if part is None else part[key] if part["type"] == "Sequence" else [part]


def _step(step: dict[str, Any]) -> str:
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return "words" if step.get("use_regex", True) else "bytes"
        case {"type": "Digits", "individual_digits": True}:
            return "digits"
        case {"type": "Metaspace", "split": False}:
            return "spaces"
        case {"type": "Split", "pattern": {"Regex": str(expression)}}:
            return expression
    return "unknown"


def _vocabulary(content: dict[str, Any], is_sentencepiece: bool, size: int) -> tuple[list[str], list[gguf.TokenType]]:
    """Tokens and their types by id, of what a tokenizer.json holds, filled up with unused ones."""
    tokens, types = [f"[UNUSED{index}]" for index in range(size)], [gguf.TokenType.UNUSED] * size
    vocabulary = content["model"]["vocab"]
    for token, index in vocabulary.items():
        is_byte = is_sentencepiece and token.startswith("<0x")
        tokens[index], types[index] = token, gguf.TokenType.BYTE if is_byte else gguf.TokenType.NORMAL
    for added in content["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    if is_sentencepiece and (unknown := content["model"].get("unk_token")) is not None:
        types[vocabulary[unknown]] = gguf.TokenType.UNKNOWN
    return tokens, types


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Path, vocab_size: int) -> None:
    """Adds the tokens, and the merges or what they amount to."""
    kind, content, loaded = _kind(tokenizer), read_json(tokenizer), load_tokenizer(str(tokenizer))
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in content["model"]["merges"]]
    tokens, types = _vocabulary(content, kind == "llama", vocab_size)
    if kind == "llama":  # SentencePiece merges to the token of the highest score first
        rank = {left + right: -float(at) for at, (left, right) in reversed([*enumerate(merges)])}
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([rank.get(token, 0.0) for token in tokens])
        writer.add_add_space_prefix(loaded.encode("a", add_special_tokens=False).tokens[0].startswith("▁"))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(kind)
        writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = special_or_usual_ids(tokenizer, loaded)
    begin, ends = (as_ids(special.get(key)) for key in ("bos_token_id", "eos_token_id"))
    writer.add_add_bos_token(bool(document_frame(loaded, tokenizer)[0]))
    if begin:
        writer.add_bos_token_id(begin[0])
    if ends:
        writer.add_eos_token_id(ends[0])
        writer.add_pad_token_id(special.get("pad_token_id", ends[0]))
    if len(ends) > 1:  # such as the end of a turn
        writer.add_eot_token_id(ends[1])
    if template := chat_template(tokenizer):
        writer.add_chat_template(template)
