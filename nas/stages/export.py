"""nas export: front vectors as model directories, with the supernet's weights or as configurations of the served shape;
and how other stages open those.
"""

from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

from nas import console
from nas.config import Export
from nas.data.tokenizer import load_tokenizer
from nas.errors import UserError
from nas.export import exporters
from nas.export.hf import CONFIG, weight_files
from nas.files import read_csv
from nas.latency.predictor import Workload
from nas.metrics import COLUMNS, PAIRED_SE
from nas.model import Decoder
from nas.model.supernet import load_supernet
from nas.run import FinishedRun, is_run, start_run
from nas.search import Objectives
from nas.search.pareto import knee
from nas.shape import ModelShape
from nas.space import Vector, parse_vector, searched_space


def run(config: Export, path: Path) -> None:
    """Exports the selected vectors into ``path``, a folder each."""
    search = FinishedRun(Path(config.run), "search")
    supernet_run = search.parent("supernet")
    front, trials = (read_csv(search.artifact(f"{name}.csv"), COLUMNS) for name in ("front", "trials"))
    chosen = select(config.select, front, trials, Objectives(tuple(search.config["objectives"])))
    formats = exporters(config.export)
    sources = {kind: _source(kind, search, supernet_run) for kind in {exporter.of_served for exporter, _ in formats}}
    made = [(exporter, path / below, sources[exporter.of_served]) for exporter, below in formats]
    for exporter, _, source in made:
        exporter.check(source.shape, source.tokenizer)
    resolved = {"run": config.run, "select": config.select, "export": config.export}
    with start_run(path, "export", resolved, parents={"search": search, "supernet": supernet_run}) as run:
        for row in chosen.to_dict(orient="records"):
            vector, card = parse_vector(row["vector"]), model_card(row, search)
            for exporter, below, source in made:
                folder = below / _folder_name(row["vector"])
                exporter.write(source.model_at(vector), source.tokenizer, folder, card)
                console.print(f"Exported {folder}")
        run.finish()


class Source(NamedTuple):
    """What models are made from."""

    shape: ModelShape
    tokenizer: Path | None
    model_at: Callable[[Vector], Decoder]


def _source(of_served: bool, search: FinishedRun, supernet_run: FinishedRun) -> Source:
    """The supernet, or the served shape, whose models have no weights."""
    tokenizer = supernet_run.artifact("tokenizer.json")
    if not of_served:
        supernet = load_supernet(supernet_run, torch.device("cpu"))
        return Source(supernet.space.shape, tokenizer, supernet.extract)
    shape = searched_space(search.config)[0].shape

    def without_weights(vector: Vector) -> Decoder:
        with torch.device("meta"):
            return Decoder(shape, vector)

    if (size := load_tokenizer(str(tokenizer)).get_vocab_size()) <= shape.vocab_size:
        return Source(shape, tokenizer, without_weights)
    beyond = f"its {size} tokens exceed the served vocab_size of {shape.vocab_size}"
    console.warn(f"The supernet's tokenizer is left out: {beyond}; put a smaller one into the folders")
    return Source(shape, None, without_weights)


def _folder_name(vector: str) -> str:
    """The vector, with underscores where it is long: transformers' cache spells hyphens out, within 255 characters."""
    return vector if len(vector.replace("-", "_hyphen_")) < 250 else vector.replace("-", "_")


def select(choice: str, front: pd.DataFrame, trials: pd.DataFrame, objectives: Objectives) -> pd.DataFrame:
    """The rows that a ``select=`` value names."""
    if choice == "all":
        return front
    if choice == "knee":
        return front.iloc[[knee(front, objectives)]]
    if choice == "best_loss":
        return front.nsmallest(1, "loss_nats")
    if choice == "fastest":
        return front.nlargest(1, "tokens_per_s")
    rows = trials[trials["vector"] == choice]
    if rows.empty:
        raise UserError(
            f"select is '{choice}', which this search did not evaluate; use a vector of its trials.csv, or all, knee, "
            "best_loss or fastest"
        )
    return rows


def model_card(row: Mapping[Hashable, Any], search: FinishedRun) -> dict[str, str]:
    """What the model card states of a vector. Costs are of the served shape, which need not be the model's."""
    source, at = row["latency_source"], Workload(**search.config["workload"] | {"batch": row["batch"]})
    tells = pd.notna(row.get(PAIRED_SE))
    error = f"; standard error of its difference to the largest vector's {row[PAIRED_SE]:.5f}" if tells else ""
    return {
        "KV groups by layer": row["vector"],
        "losses are of": search.config["space"]["name"],
        "costs are of": searched_space(search.config)[0].name,
        "inherited validation loss": f"{row['loss_nats']:.5f} nats/token, with the supernet's weights (measured)"
        + error,
        "decode step": f"{row['decode_ms']:.4f} ms ({source}; {at})",
        "decode throughput": f"{row['tokens_per_s']:,.1f} tokens/s ({source}; {at})",
        "prefill": f"{row['prefill_ms']:.4f} ms ({source}; the same)",
        "KV cache": f"{row['kv_bytes_per_token']} bytes per token in {at.dtype}",
        "where the latency comes from": search.config["latency"],
        "searched with": f"gqa-nas {search.info['versions']['gqa-nas']}, {search.info['started'][:10]}",
    }


def exported_models(folder: Path) -> list[Path]:
    """The directory itself, or those of the models that it holds, in hf/ if there are several formats."""
    files = ([*folder.glob(f"{below}{CONFIG}")] for below in ("", "*/", "hf/*/"))
    return sorted(file.parent for file in next(filter(None, files), []))


def open_checkpoint(reference: str, with_weights: bool = True) -> tuple[Path, dict[str, FinishedRun]]:
    """An exported model's directory, and as parent the run that wrote it if it still lies there, its files verified.

    ``reference`` is the directory, or one with a single exported model inside, in hf/ if there are several formats.
    Without weights the configuration is enough.
    """
    folder = Path(reference)
    found = exported_models(folder)
    if not found:
        raise UserError(
            f"checkpoint {folder} does not exist or has no {CONFIG}; give a directory that 'nas export' (export=hf) or "
            "'nas finetune' wrote"
        )
    source = found[0]
    if len(found) > 1:
        raise UserError(f"checkpoint {folder} holds {len(found)} models; give one of them, such as {source}")
    writer = next((FinishedRun(at) for at in list(source.parents)[:2] if is_run(at)), None)
    files = [source / CONFIG, source / "tokenizer.json", *(weight_files(source) or [source / "model.safetensors"])]
    for file in files:
        if writer and (name := file.relative_to(writer.path).as_posix()) in writer.artifacts:
            writer.artifact(name)
        elif with_weights and not file.is_file():
            fix = "export it again with weights, or train it by nas finetune from_scratch=true"
            if file.name == "tokenizer.json":
                fix = "copy that of its model into it"
            raise UserError(f"{source} has no {file.name}; {fix}")
    return source, {"checkpoint": writer} if writer else {}
