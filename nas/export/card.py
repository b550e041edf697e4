"""The model card that lies beside an exported model, whatever its format."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nas.model import Decoder
from nas.space import format_vector


@dataclass(frozen=True)
class Card:
    """What the cards of one format say: its name, its library on the hub, how it is loaded, and what to know."""

    form: str
    library: str
    usage: str
    notes: Sequence[str] = ()

    def write(self, model: Decoder, folder: Path, rows: Mapping[str, str]) -> None:
        """Writes README.md; ``rows`` are further statements, by title."""
        shape, widths = model.shape, sorted({spec.intermediate_size for spec in model.specs})
        stated = "\n".join(f"| {title} | {value} |" for title, value in rows.items())
        paragraphs = [
            f"---\nlibrary_name: {self.library}\npipeline_tag: text-generation\n"
            "tags: [nemotron-nas, grouped-query-attention, neural-architecture-search]\n---\n"
            f"# A model with KV groups {format_vector(model.kv_heads)}",
            f"A Llama-style decoder whose layers differ in their number of KV groups: {shape.num_hidden_layers} "
            f"layers, width {shape.hidden_size}, {shape.num_attention_heads} heads of {shape.head_dim}, "
            f"FFN {listed(widths)}, vocabulary {shape.vocab_size}, context {shape.max_position_embeddings}; "
            f"{shape.parameters(model.kv_heads):,} parameters. Found by gqa-nas.",
            *self.notes,
            f"| what | value |\n| --- | --- |\n{stated}",
            self.usage,
        ]
        (folder / "README.md").write_text("\n\n".join(paragraphs), encoding="utf-8")


def has_weights(model: Decoder) -> bool:
    return not model.lm_head.weight.is_meta


def listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
