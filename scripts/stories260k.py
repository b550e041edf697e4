"""A supernet from a real trained model, on a laptop: stories260K, which tells children's stories with 260,000 weights.

Converts llama2.c's stories260K.bin and tok512.bin into a Hugging Face Llama directory, lets the model write text that a
supernet can learn from, trains a supernet that starts from the model, and writes docs/stories260k/losses.csv: the loss
of uniform and mixed vectors as the supernet starts, with heads aligned or merged as they are, and after the training.
The last line of stdout is JSON: the losses of the uniform vectors before and after.

    python scripts/stories260k.py SRC OUT      # SRC holds the two files; OUT gets model/, stories.jsonl and runs/
    python scripts/stories260k.py SRC OUT --no-training        # model and text alone
    python scripts/stories260k.py SRC OUT --rank 0             # K/V heads trained alone: losses-rank-0.csv
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from shared import argument_parser, finished
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, logging

from nas.data import prepare_tokens, validation_windows
from nas.data.corpora import TextCorpus
from nas.data.tokenizer import load_tokenizer
from nas.files import write_atomically, write_csv
from nas.model import Supernet
from nas.model.pretrained import read_checkpoint
from nas.model.supernet import load_supernet
from nas.quality import mean_loss, vector_losses
from nas.run import FinishedRun, origin
from nas.space import Vector, format_vector, parse_vector
from nas.stages.train import load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
SPACE_MARK = "\N{LOWER ONE EIGHTH BLOCK}"  # how sentencepiece writes a space
BEGIN, UNSEEN = "<s>", "</s>"  # as sentencepiece names tokens 1 and 2
END = 1  # every story that the model was trained on begins with it, and so ends before it; it never saw token 2
STORIES, ROWS, SEED = 2000, 200, 0
LAYERS = 5
TRAINING = (
    *("train.steps=400", "train.batch=16", "train.learning_rate=1e-2"),
    *("train.weight_decay=0", "train.smallest_share=0.25", "train.validate_every=100"),
)
RANK = 16  # of each smaller choice's correction of the output projection
MIXED = ("4-4-2-2-1", "1-2-2-4-4", "4-2-1-1-1", "1-1-1-2-4", "2-4-1-4-2", "4-1-2-1-4")
SAMPLE_TEXT = """\
Once upon a time, there was a little girl named Lily. She loved to play in the park with her red ball. One day, the \
ball rolled into a big bush. Lily was sad. She asked her mom for help. Her mom smiled and said, "Let's look for it \
together." They looked and looked. Then Lily saw the ball behind a tree. She was so happy! She hugged her mom and \
said, "Thank you, Mom!" They went home and had a yummy lunch.
One day, Tim and his dog Max went for a walk. The sun was bright and the sky was blue. Max saw a bird and ran fast. \
Tim said, "Max, wait for me!" The bird flew away to its nest. Max was tired, so they sat under a tree. Tim gave Max \
some water. They were good friends. They played all day and then they went to bed.
"""


def main(source: Path, out: Path, training: bool, rank: int) -> None:
    """Does all of it; what is there already is not made again."""
    logging.disable_progress_bar()
    model, corpus = out / "model", out / "stories.jsonl"
    convert(source, model)
    windows = as_windows(model, SAMPLE_TEXT, 64)
    print(f"Loss of {model} on sentences of our own: {transformers_loss(model, windows):.3f} nats/token")
    if not corpus.is_file():
        write_corpus(model, corpus)
    if not training:
        return
    suffix = "" if rank == RANK else f"-rank-{rank}"
    words = (f"init={model}", "data=text", f"data.path={corpus}", f"train.output_rank={rank}", *TRAINING)
    run = finished("train", f"stories260k{suffix}", *words, runs=out / "runs")
    table = losses(model, corpus, run)
    print(table.to_string(index=False))
    target = ROOT / "docs" / "stories260k" / f"losses{suffix}.csv"
    write_csv(target, table)
    print(f"Wrote {target.relative_to(ROOT)}")
    rows, named = table.set_index("vector"), {"largest": 4, "uniform_2": 2, "uniform_1": 1}
    uniform = {name: format_vector((groups,) * LAYERS) for name, groups in named.items()}
    times = ("before", "after")
    print(json.dumps({f"{name}_{at}": rows[f"{at}_nats"][vector] for at in times for name, vector in uniform.items()}))


def convert(source: Path, folder: Path) -> Path:
    """Writes the model and its tokenizer as a Hugging Face directory."""
    weights = (source / "stories260K.bin").read_bytes()
    width, hidden, layers, heads, kv_heads, vocabulary, context = struct.unpack_from("7i", weights)
    assert vocabulary > 0  # negative would announce an output head of its own
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=END,
        eos_token_id=END,
    )
    model = LlamaForCausalLM(config)
    values = torch.from_numpy(np.frombuffer(weights, np.float32, offset=struct.calcsize("7i")).copy())
    model.load_state_dict(_llama_state(config, values))
    model.save_pretrained(folder)
    _tokenizer(source / "tok512.bin", vocabulary).save(str(folder / "tokenizer.json"))
    return folder


def _llama_state(config: LlamaConfig, values: Tensor) -> dict[str, Tensor]:
    """The tensors of llama2.c's file, which lie one kind after the other, by their names in Hugging Face's Llama."""
    width, hidden, depth = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    kv_width = width // config.num_attention_heads * config.num_key_value_heads
    kinds = {
        "input_layernorm": (width,),
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (kv_width, width),
        "self_attn.v_proj": (kv_width, width),
        "self_attn.o_proj": (width, width),
        "post_attention_layernorm": (width,),
        "mlp.gate_proj": (hidden, width),
        "mlp.down_proj": (width, hidden),
        "mlp.up_proj": (hidden, width),
    }
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, width)}
    sizes |= {f"model.layers.{layer}.{kind}.weight": size for kind, size in kinds.items() for layer in range(depth)}
    sizes |= {"model.norm.weight": (width,)}
    counts = [int(np.prod(size)) for size in sizes.values()]
    rotary = config.max_position_embeddings * (width // config.num_attention_heads)  # its table, cosines and sines
    assert len(values) == sum(counts) + rotary
    parts = zip(sizes.items(), values[: sum(counts)].split(counts), strict=True)
    state = {name: part.view(size) for (name, size), part in parts}
    for name in [name for name in state if "q_proj" in name or "k_proj" in name]:
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        pairs = state[name].view(heads, -1, 2, width)  # llama2.c rotates neighbours, Hugging Face one half by the other
        state[name] = pairs.transpose(1, 2).reshape(-1, width)
    return state | {"lm_head.weight": state["model.embed_tokens.weight"]}


def _tokenizer(file: Path, vocabulary: int) -> Tokenizer:
    """llama2.c's tokenizer: sentencepiece's BPE, which joins the pair whose whole scores best, and spells the rest."""
    content, at = file.read_bytes(), 4
    pieces, scores = [], {}
    for _ in range(vocabulary):
        score, length = struct.unpack_from("fi", content, at)
        piece = content[at + 8 : at + 8 + length].decode().replace(" ", SPACE_MARK)
        at += 8 + length
        pieces.append(piece)
        scores[piece] = score
    pieces[:3] = ["<unk>", BEGIN, UNSEEN]
    ids = {piece: number for number, piece in enumerate(pieces)}
    merges = []
    for piece in sorted(pieces[3 + 256 :], key=lambda piece: -scores[piece]):  # after the specials and the bytes
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges += sorted((pair for pair in splits if set(pair) <= ids.keys()), key=lambda pair: [ids[p] for p in pair])
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE_MARK), normalizers.Replace(" ", SPACE_MARK)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False) for piece in pieces[:3]])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, END)])
    return tokenizer


def as_windows(model: Path, text: str, length: int) -> Tensor:
    """The lines of a text as windows of ``length`` predicted tokens, each line a story."""
    tokenizer = load_tokenizer(str(model))
    tokens = [token for line in text.splitlines() for token in tokenizer.encode(line).ids]
    return validation_windows(np.array(tokens, np.uint32), len(tokens) // length, length)


@torch.no_grad()
def transformers_loss(model: Path, windows: Tensor) -> float:
    """The loss in nats per token that transformers computes."""
    reference = AutoModelForCausalLM.from_pretrained(model)
    return mean_loss(lambda tokens: reference(tokens).logits, windows)


@torch.no_grad()
def tell(model: Path, rows: int) -> Iterator[str]:
    """Stories that the model tells; those that its context cuts short are left out."""
    teller, tokenizer = AutoModelForCausalLM.from_pretrained(model), load_tokenizer(str(model))
    ends = {"max_length": 512, "eos_token_id": END, "pad_token_id": END}
    drawn = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    prompt = torch.full((rows, 1), END)
    told = teller.generate(prompt, attention_mask=torch.ones_like(prompt), **ends, **drawn)
    for tokens in told[:, 1:].tolist():
        if END in tokens:
            yield tokenizer.decode(tokens[: tokens.index(END)])


def write_corpus(model: Path, file: Path) -> None:
    """Writes STORIES stories, one a line."""
    torch.manual_seed(SEED)
    stories: list[str] = []
    while len(stories) < STORIES:
        stories += tell(model, ROWS)
        print(f"{len(stories)} stories", flush=True)
    lines = "".join(json.dumps({"text": story}) + "\n" for story in stories)
    write_atomically(file, lambda path: path.write_text(lines, encoding="utf-8"))


def losses(model: Path, corpus: Path, run: FinishedRun) -> pd.DataFrame:
    """The losses of the vectors before and after the run, on the validation windows of its text."""
    checkpoint, trained = read_checkpoint(model), load_supernet(run, CPU).eval()
    fresh, merged = (Supernet(trained.space, run.config["train"]["sharing"]).eval() for _ in range(2))
    cache = run.path.parent.parent / "cache"
    data = prepare_tokens(TextCorpus(str(corpus)), str(model), 512, cache)
    load_checkpoint(checkpoint, fresh, run.config, data, cache)
    checkpoint.load_into(merged)
    windows = validation_windows(data.validation, 64, trained.space.shape.max_position_embeddings)
    vectors: list[Vector] = [*trained.space.uniform_vectors(), *map(parse_vector, MIXED)]
    by_time = (vector_losses(supernet, vectors, windows) for supernet in (merged, fresh, trained))
    rows = [*zip(map(format_vector, vectors), *by_time, strict=True)]
    original = transformers_loss(model, windows)
    rows.append(("checkpoint in transformers", original, original, float("nan")))
    return pd.DataFrame(rows, columns=["vector", "not_aligned_nats", "before_nats", "after_nats"]).assign(
        steps=run.config["train"]["steps"],
        learning_rate=run.config["train"]["learning_rate"],
        output_rank=run.config["train"].get("output_rank", 0),
        validation_tokens=windows[:, 1:].numel(),
        **origin(),
    )


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("source", type=Path, help="folder with the two files")
    parser.add_argument("out", type=Path, help="gets model/, stories.jsonl and runs/")
    parser.add_argument("--no-training", action="store_true", help="only the model and its text")
    parser.add_argument("--rank", type=int, default=RANK, help="of the corrections of the output projection, 0: none")
    given = parser.parse_args()
    main(given.source, given.out, not given.no_training, given.rank)
