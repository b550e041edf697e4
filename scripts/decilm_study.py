"""A study of DeciLM-6B's problem: 3^32 vectors searched on a proxy with DeciLM-6B's layers, and tests of the result.

    python scripts/decilm_study.py supernet --text TEXT --gpus 4    trains the proxies
    python scripts/decilm_study.py search --text TEXT               500 evaluations for each of three devices
    python scripts/decilm_study.py equal_cost --text TEXT           the best order of DeciLM-6B's own groups
    python scripts/decilm_study.py alone --text TEXT --gpus 4       that, DeciLM-6B's and uniform ones, trained alone
    python scripts/decilm_study.py transfer --text TEXT             what layers and vectors lose in the other proxies
    python scripts/decilm_study.py tau                              do the proxies agree? From the CSVs
    python scripts/decilm_study.py predicted                        does the sampler's loss model hold? From the CSVs
    python scripts/decilm_study.py figures                          from the CSVs alone

TEXT is what scripts/decilm_text.py made. The defaults are those of docs/decilm.md; --steps 4000 --batch 256 gives a
supernet a billion tokens. Runs are in runs/*/decilm-*, results in CSVs in --out. A part that is stopped, by --seconds
or a kill, goes on when its command is repeated where its runs/ are; what is finished is not made again. Rows of
supernets that are elsewhere stay in supernets.csv and transfer.csv.
"""

import argparse
import dataclasses
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import sem, ttest_rel
from shared import argument_parser

from nas.config import TrainConfig
from nas.data import TokenData, prepare_tokens, validation_windows
from nas.data.corpora import TextCorpus
from nas.files import value_hash, write_csv
from nas.model import Decoder, Supernet
from nas.quality import InheritedLoss, LossMemo, Windows
from nas.ranking import bootstrap_interval, kendall
from nas.report.figure import COLOURS, GREY, figure
from nas.report.front import draw_front, front_points
from nas.run import FinishedRun, origin
from nas.search import Objectives
from nas.search.exact import best_by_counts
from nas.search.loss_model import LossModel
from nas.space import SearchSpace, Totals, Vector, format_vector, load_space, parse_vector
from nas.stages.fidelity import Series, train
from nas.stages.train import inherited_loss, weights_identity
from nas.training.loop import training_device

SUPERNETS = {  # the share of --steps, and train.seed
    "main": (1, 0),
    "narrow": (1, 0),
    "half": (0.5, 0),
    "double": (2, 0),
    "half-seed1": (0.5, 1),
}
DEVICES = {  # the first one's costs are those of equal_cost; the H100's table ends at the batches of 21 GiB
    "h200": ("device=nvidia-h200", "workload.memory_gib=22.5"),
    "h100": ("device=nvidia-h100-80gb-hbm3", "workload.memory_gib=21"),
    "a10g": ("device=nvidia-a10g",),
}
DECILM = "DeciLM-6B"
COSTS = ["decode_ms", "tokens_per_s", "batch", "kv_bytes_per_token", "memory_gib", "latency_source"]
MICROBATCH = 32  # rows that a GPU computes at once
PROPOSALS = 8  # orders per round: the best by the mean of what is known of the layers, and by draws


class OutOfTimeError(BaseException):
    """--seconds are over."""


def supernet(given: argparse.Namespace) -> None:
    """Trains the proxies that are named, over the GPUs of this host."""
    for name in given.supernets:
        share, seed = SUPERNETS[name]
        keys = {"steps": round(share * given.steps), "seed": seed, **training(given)}
        keys["accumulate"] = microbatches(given.batch, given.gpus)
        print(f"{name}: {keys['steps'] * given.batch * length(given):,} tokens", flush=True)
        nas(given, "train", name, *(f"train.{key}={value}" for key, value in keys.items()), gpus=given.gpus)
        run = trained(name)
        losses = pd.read_json(run.path / "metrics.jsonl", lines=True).iloc[-1].filter(like="_loss_nats")
        options = {key: run.config["train"][key] for key in ("steps", "batch", "learning_rate", "validation_windows")}
        seen = options["steps"] * options["batch"] * length(given)
        row = {"supernet": name, "weights": run.digest()[:12], "space": space_of(given, name).name, "tokens": seen}
        write(given, "supernets", pd.DataFrame([row | options | dict(losses)]))


def search(given: argparse.Namespace) -> None:
    """Searches for the devices that are named; the next search finds many losses in the memory of the first."""
    for device in given.devices:
        words = given.words or DEVICES[device]
        nas(
            given,
            *("search", device, f"serve={given.serve}", "supernet=runs/train/decilm-main", f"budget={given.budget}"),
            *("workload.batch=max", f"workload.context={given.context}", *words),
            *(f"train.validation_windows={given.windows}", "check=0"),
        )
        trials = pd.read_csv(f"runs/search/decilm-{device}/trials.csv").assign(latencies_of=words[0])
        write(given, f"search_{device}", front_points(trials, space_of(given).reference_vectors()))


def write(given: argparse.Namespace, name: str, table: pd.DataFrame) -> pd.DataFrame:
    """Writes a result with the columns of its origin, below the rows of other supernets; shows its head."""
    path = given.out / f"{name}.csv"
    print(path, table.head(8).to_string(index=False), sep="\n", flush=True)
    table = table.assign(**origin())
    if "supernet" in table and path.is_file():
        before = pd.read_csv(path)
        table = pd.concat([before[~before["supernet"].isin(table["supernet"])], table])
    write_csv(path, table)
    return table


def equal_cost(given: argparse.Namespace) -> None:
    """What is to be had at DeciLM-6B's exact cost, and at its loss.

    A cost depends on how many layers have each choice, so all orders of the same groups cost the same. The best order
    was chosen by the windows of its loss: what it is better by is told on other windows too, three times as many. So
    are the uniform vectors, and the best one that is as fast.
    """
    loss, rng = loss_of(given, "main"), np.random.default_rng(0)
    trials, space = pd.read_csv(f"runs/search/decilm-{next(iter(DEVICES))}/trials.csv"), loss.supernet.space
    theirs = space.known_vectors[DECILM]
    orders = {theirs: DECILM, theirs[::-1]: "reversed"}
    while len(orders) < given.orders + 2:
        orders.setdefault(tuple(rng.permutation(theirs).tolist()), "random order")
    evaluated = dict.fromkeys([*map(parse_vector, trials["vector"]), *orders])
    for _ in range(given.rounds):
        losses = np.array(loss.of(list(evaluated)))
        model = LossModel(np.array(space.choice_indices(evaluated)), losses, len(space.choices[0]))
        for layers in (model.mean(), *(model.draw(rng) for _ in range(PROPOSALS - 1))):
            best = best_by_counts(layers.penalties_LK, layers.couplings_MKK).vectors_TL
            groups = (tuple(row) for row in np.array(space.choices[0])[best].tolist())
            found = next(vector for vector in groups if sorted(vector) == sorted(theirs))
            orders.setdefault(found, "searched order")
            evaluated.setdefault(found)
    losses_of = dict(zip(orders, loss.of(list(orders)), strict=True))
    best_order = min(orders, key=lambda vector: losses_of[vector])
    orders[best_order] = "best order" if best_order != theirs else DECILM
    faster = trials[trials["loss_nats"] <= losses_of[theirs]].nlargest(1, "tokens_per_s")["vector"].item()
    orders.setdefault(parse_vector(faster), "fastest at its loss")
    speed = trials.loc[trials["vector"] == format_vector(theirs), "tokens_per_s"].item()
    better = trials[trials["tokens_per_s"] >= speed].nsmallest(1, "loss_nats")["vector"].item()
    orders.setdefault(parse_vector(better), "best at its speed")
    for uniform in space.uniform_vectors():
        orders.setdefault(uniform, f"uniform {uniform[0]}")
    tuned, others = loss.memo.windows, held_out(given, loss)
    costs = {tuple(sorted(parse_vector(row["vector"]))): row for row in trials.to_dict("records")}
    rows = []
    for vector, kind in orders.items():
        row = {"kind": kind, "vector": format_vector(vector), "loss_nats": loss(vector)}
        both = [("", tuned)] + ([] if kind == "searched order" else [("held_out_", others(vector))])
        for name, windows in both:
            difference = windows[format_vector(vector)].astype(float) - windows[format_vector(theirs)]
            row |= {f"{name}difference_nats": difference.mean(), f"{name}difference_se_nats": float(sem(difference))}
        rows.append(row | {column: costs[tuple(sorted(vector))].get(column) for column in COSTS})
    write(given, "equal_cost", pd.DataFrame(rows).sort_values("loss_nats"))


def held_out(given: argparse.Namespace, loss: InheritedLoss) -> Callable[[Vector], dict[str, Windows]]:
    """A function to the losses of vectors, DeciLM-6B's too, on windows of validation that no search sees."""
    memo = LossMemo(Path("runs/cache") / f"decilm-held-out-{loss.memo.file.stem}.jsonl")
    held = InheritedLoss(loss.supernet, unseen_windows(given), memo)
    held(loss.supernet.space.known_vectors[DECILM])

    def losses(vector: Vector) -> dict[str, Windows]:
        held(vector)
        return memo.windows

    return losses


def unseen_windows(given: argparse.Namespace) -> torch.Tensor:
    """Three times as many windows of validation as a search sees, none of them among those."""
    windows = validation_windows(tokens(given, "main").validation, 4 * given.windows - 3, length(given))
    if len(windows) < 4 * given.windows - 3:
        sys.exit(
            f"The validation text has {len(windows)} windows, too few to keep some from the search; lower --windows"
        )
    return windows[torch.arange(len(windows)) % 4 != 0]  # every fourth is a search's


def alone(given: argparse.Namespace) -> None:
    """Trains four vectors from the start by several seeds, a process per GPU, and compares them seed by seed.

    Of a seed, which is never the supernet's, all have the same batches, and initial weights as far as they have the
    same ones. All are compared on windows by which no vector was chosen.
    """
    found = pd.read_csv(given.out / "equal_cost.csv").set_index("kind")["vector"]
    space, data = space_of(given), tokens(given, "main")
    uniform = {f"uniform {groups}": (groups,) * len(space.choices) for groups in space.choices[0][:2]}
    ours = {} if found.get("best order") is None else {"ours": parse_vector(found["best order"])}
    vectors = {DECILM: space.known_vectors[DECILM], **ours, **uniform}

    def start(vector: Vector, seed: int) -> Decoder:
        whole = Supernet(space)
        whole.initialise(torch.Generator().manual_seed(seed))
        return whole.extract(vector)

    steps = given.alone_steps
    options = TrainConfig(**training(given) | {"steps": steps, "batch": given.alone_batch, "validate_every": steps})
    options.accumulate = microbatches(given.alone_batch, 1)
    windows = unseen_windows(given).to(training_device())
    decisive = weights_identity(dataclasses.asdict(options) | {"seed": None})
    identity = value_hash([space.to_dict(), decisive, data.digest, list(windows.shape)])
    memo = LossMemo(Path("runs/cache") / f"decilm-alone-{identity}.jsonl")
    series = Series("alone", start, options, data, windows, memo)
    seeds = range(1, given.seeds + 1)
    trainings = [(series, vector, seed) for seed in seeds for vector in vectors.values()]
    if given.worker is None:
        workers = [[sys.executable, *sys.argv, "--worker", str(index)] for index in range(given.gpus)]
        wait(*(subprocess.Popen(worker, env=on_gpu(index)) for index, worker in enumerate(workers)))
    losses = train(trainings, Path("runs/fidelity/decilm-alone"))  # what others make is waited for, or is there
    if given.worker is not None:
        return
    table = pd.DataFrame(losses, columns=["vector", "kind", "seed", "steps", "loss_nats"]).drop(columns="kind")
    table.insert(0, "name", table["vector"].map({vector: name for name, vector in vectors.items()}))
    table["vector"] = table["vector"].map(format_vector)
    write(given, "alone", table.assign(batch=given.alone_batch, length=length(given)))
    by_seed = table.pivot_table("loss_nats", "seed", "name")
    rows = []
    for name in by_seed.columns.drop(DECILM):
        test = ttest_rel(by_seed[name], by_seed[DECILM])
        low, high = test.confidence_interval(0.95)
        rows.append((name, len(by_seed), (by_seed[name] - by_seed[DECILM]).mean(), low, high, test.pvalue))
    columns = ["name", "seeds", "difference_nats", "low_nats", "high_nats", "p"]
    write(given, "alone_differences", pd.DataFrame(rows, columns=columns))


def transfer(given: argparse.Namespace) -> None:
    """Penalties of single layers, and losses of whole vectors, in the proxies that are trained here."""
    space, rng, half = space_of(given), np.random.default_rng(1), given.compared // 2
    single = [
        tuple(allowed[0] if at == layer else allowed[-1] for at, allowed in enumerate(space.choices))
        for layer in range(len(space.choices))
    ]
    drawn = Totals(space.choices).draw_stratified(half, rng)
    theirs = space.known_vectors[DECILM]
    orders = list(dict.fromkeys(tuple(rng.permutation(theirs).tolist()) for _ in range(half)))
    kinds = {"largest": [space.largest], "layer": single, "drawn": drawn, "order": orders, DECILM: [theirs]}
    found = pd.read_csv(given.out / "equal_cost.csv").set_index("kind")["vector"].get("best order")
    kinds |= {"best order": [parse_vector(found)]} if found else {}
    tables = []
    for name in (name for name in SUPERNETS if finished("train", name)):
        loss, weights = loss_of(given, name), trained(name).digest()
        for kind, vectors in kinds.items():
            losses = zip(vectors, loss.of(vectors), strict=True)
            rows = [(format_vector(one), nats, loss.noise(one).get("paired_se_nats")) for one, nats in losses]
            frame = pd.DataFrame(rows, columns=["vector", "loss_nats", "paired_se_nats"])
            tables.append(frame.assign(kind=kind, supernet=name, weights=weights[:12]))
    write(given, "transfer", pd.concat(tables))


def tau(given: argparse.Namespace) -> None:
    """Whether two supernets agree: Kendall's τ of their losses, and of the total of groups alone with the second's."""
    losses, rows = pd.read_csv(given.out / "transfer.csv"), []
    for kind in ("layer", "order", "drawn"):
        by_net = losses[losses["kind"] == kind].pivot_table("loss_nats", "vector", "supernet").dropna()
        totals = -by_net.index.map(parse_vector).map(sum).to_numpy()
        for one, other in itertools.combinations((name for name in SUPERNETS if name in by_net), 2):
            first, second = by_net[one].to_numpy(), by_net[other].to_numpy()
            interval = bootstrap_interval(first, second[:, None], seed=0)
            rows.append((kind, one, other, len(by_net), kendall(first, second), *interval, kendall(totals, second)))
    columns = ["kind", "first", "second", "vectors", "tau", "low", "high", "tau_of_totals"]
    write(given, "tau", pd.DataFrame(rows, columns=columns))


def predicted(given: argparse.Namespace) -> None:
    """How well the sampler's loss model, told the first losses of a search, predicts vectors that it was not told.

    Beside it stands the plain sum of what each layer alone loses at one group, by which Puzzletron chooses blocks; of
    two groups it takes the share that they have of the uniform vectors' losses.
    """
    space, trials = space_of(given), pd.read_csv(given.out / f"search_{next(iter(DEVICES))}.csv")
    orders, main = pd.read_csv(given.out / "equal_cost.csv"), pd.read_csv(given.out / "transfer.csv")
    main = main[main["supernet"] == "main"]
    total, others = sum(space.known_vectors[DECILM]), main[main["kind"] == "drawn"]
    unseen = {
        "orders": orders[orders["kind"] == "random order"],
        "other totals": others[others["vector"].map(parse_vector).map(sum) != total],
    }
    one, two, four = (trials.set_index("name")["loss_nats"][f"uniform {groups}"] for groups in (1, 2, 4))
    penalties_L = main.loc[main["kind"] == "layer", "loss_nats"].to_numpy() - four
    shares = np.array([1, (two - four) / (one - four), 0])  # of a layer's penalty, by its choice

    def choices(table: pd.DataFrame) -> Any:
        return np.array(space.choice_indices(map(parse_vector, table["vector"])))

    def judged(kind: str, table: pd.DataFrame, predictions: Any, within: float | None) -> tuple[Any, ...]:
        losses = table["loss_nats"].to_numpy()
        tau = kendall(predictions, losses), *bootstrap_interval(predictions, losses[:, None], seed=0)
        by_total = kendall(-table["vector"].map(parse_vector).map(sum).to_numpy(), losses)
        error = np.sqrt(np.square(predictions - losses).mean())
        return kind, len(table), *tau, by_total, error, losses.std(), within

    rows: list[tuple[Any, ...]] = []
    for kind, table in unseen.items():
        sums = four + shares[choices(table)] @ penalties_L
        rows.append(("sum", len(penalties_L) + 3, *judged(kind, table, sums, None)))
    for told in (50, 100, 200, 500):
        known = trials.head(told)
        model = LossModel(choices(known), known["loss_nats"].to_numpy(copy=True), len(space.choices[0]))
        for kind, table in unseen.items():
            table = table[~table["vector"].isin(known["vector"])]
            means, deviations = model.means(choices(table)), model.deviations(choices(table))
            within = (abs(means - table["loss_nats"].to_numpy()) <= 2 * deviations).mean()
            rows.append(("sampler", told, *judged(kind, table, means, within)))
    columns = ["model", "told", "of", "vectors", "tau", "low", "high", "tau_of_totals", "rms_error_nats"]
    columns += ["deviation_nats", "within_two_deviations"]
    write(given, "predicted", pd.DataFrame(rows, columns=columns))


def figures(given: argparse.Namespace) -> None:
    """The fronts, the orders of DeciLM-6B's groups, what each layer loses, and the trainings alone, from the CSVs."""
    for device in (device for device in given.devices if (given.out / f"search_{device}.csv").is_file()):
        points = pd.read_csv(given.out / f"search_{device}.csv", keep_default_na=False, na_values=[""])
        points["name"] = points["name"].fillna("")
        words = " ".join(word.removeprefix("workload.") for word in DEVICES[device])
        caption = f"{words} batch=max context={given.context}, decode alone"
        with figure(
            given.out / f"front_{device}", f"{given.serve}'s costs, {given.spaces[0]}'s losses", caption
        ) as drawing:
            draw_front(drawing, points, Objectives(("loss_nats", "tokens_per_s")))
    orders, layers = pd.read_csv(given.out / "equal_cost.csv"), pd.read_csv(given.out / "transfer.csv")
    with figure(given.out / "layers", width=11) as drawing:
        left, right = drawing.subplots(1, 2)
        left.hist(orders.loc[orders["kind"] == "random order", "difference_nats"], bins=20, color=GREY, label="random")
        marked = orders[orders["kind"].isin([DECILM, "reversed", "best order"])]
        for colour, (_, row) in zip(COLOURS, marked.iterrows(), strict=False):
            left.axvline(row["difference_nats"], color=colour, label=row["kind"])
        left.set(xlabel=f"loss beside {DECILM}'s (nats)", ylabel=f"orders of {DECILM}'s groups")
        left.legend(fontsize=8)
        for colour, (name, rows) in zip(COLOURS, layers.groupby("supernet", sort=False), strict=False):
            largest = rows.loc[rows["kind"] == "largest", "loss_nats"].item()
            single = rows.loc[rows["kind"] == "layer", "loss_nats"] - largest
            right.plot(range(len(single)), single, "o-", color=colour, label=name, markersize=3)
        right.set(xlabel="layer that alone has the fewest groups", ylabel="loss beside the largest vector's (nats)")
        right.legend(fontsize=8)
    if not (given.out / "alone_differences.csv").is_file():
        return
    searched = pd.read_csv(given.out / f"search_{next(iter(DEVICES))}.csv")
    inherited = pd.concat([searched, orders]).drop_duplicates("vector").set_index("vector")["loss_nats"]
    trainings, rows = pd.read_csv(given.out / "alone.csv"), pd.read_csv(given.out / "alone_differences.csv")
    vectors, by_seed = trainings.groupby("name")["vector"].first(), trainings.pivot_table("loss_nats", "seed", "name")
    names, means = rows["name"], rows["difference_nats"]
    with figure(given.out / "alone", height=2.6) as drawing:
        axes, at = drawing.subplots(), rows.index
        seeds = by_seed[names].sub(by_seed[DECILM], axis="index")
        axes.scatter(seeds, np.tile(at, (len(seeds), 1)), color=GREY, label="a seed")
        ends = [means - rows["low_nats"], rows["high_nats"] - means]
        axes.errorbar(means, at, xerr=ends, fmt="s", capsize=3, color=COLOURS[0], label="mean, 95 %")
        differences = inherited[vectors[names]].to_numpy() - inherited[vectors[DECILM]]
        axes.plot(differences, at, "D", color=COLOURS[1], label="inherited")
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(at, names.replace("ours", "best order"))
        axes.set(xlabel=f"loss beside {DECILM}'s, trained alone (nats)", ylim=(len(at) - 0.5, -0.5))
        axes.legend(fontsize=8)


def training(given: argparse.Namespace) -> dict[str, Any]:
    """Options of all trainings."""
    on_gpu = training_device().type == "cuda"
    keys: dict[str, Any] = {
        "batch": given.batch,
        "length": given.length,
        "learning_rate": given.learning_rate,
        "compile": on_gpu,
    }
    keys |= {"log_every": 50, "validate_every": 1000, "checkpoint_every": given.checkpoint_every}
    return {key: value for key, value in keys.items() if value is not None}


def microbatches(rows: int, processes: int) -> int:
    """`train.accumulate` for so many rows per step."""
    return max(1, rows // (processes * MICROBATCH))


def space_of(given: argparse.Namespace, name: str = "main") -> SearchSpace:
    """A proxy's space."""
    return load_space(given.spaces[name == "narrow"])


def length(given: argparse.Namespace) -> int:
    """Tokens of a window."""
    return given.length or space_of(given).shape.max_position_embeddings


def finished(stage: str, name: str) -> bool:
    """Whether a run of the study is complete."""
    return (Path("runs") / stage / f"decilm-{name}" / "complete.json").is_file()


def trained(name: str) -> FinishedRun:
    """The run of a proxy's supernet."""
    return FinishedRun(Path("runs/train") / f"decilm-{name}", "train")


def tokens(given: argparse.Namespace, name: str) -> TokenData:
    """The text as a proxy reads it."""
    return prepare_tokens(TextCorpus(given.text), None, space_of(given, name).shape.vocab_size, Path("runs/cache"))


def loss_of(given: argparse.Namespace, name: str) -> InheritedLoss:
    """The inherited loss of a proxy."""
    return inherited_loss(trained(name), tokens(given, name), given.windows, Path("runs"))


def nas(given: argparse.Namespace, stage: str, name: str, *words: str, gpus: int = 1) -> None:
    """Runs a command of the product for one of the proxies, or goes on with it, unless it is finished."""
    if not finished(stage, name):
        space = given.spaces[name == "narrow"]
        launch = ["torch.distributed.run", "--nproc-per-node", str(gpus), "-m"] if gpus > 1 else []
        run = [f"name=decilm-{name}", f"space={space}", "data=text", f"data.path={given.text}", *words]
        wait(subprocess.Popen([sys.executable, "-m", *launch, "nas", stage, *run]))


def on_gpu(index: int) -> dict[str, str]:
    """The environment of a process that has one of this one's GPUs to itself."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return {**os.environ, "CUDA_VISIBLE_DEVICES": visible.split(",")[index] if visible else str(index)}


def wait(*processes: "subprocess.Popen[bytes]") -> None:
    """Waits for processes, and ends them when this one's time is up: each can be started again to go on."""
    try:
        codes = [process.wait() for process in processes]
    except OutOfTimeError:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
        raise
    if any(codes):
        sys.exit(max(codes, key=abs))


def stop(*_: object) -> None:
    """What becomes of an alarm."""
    raise OutOfTimeError


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parts = {part.__name__: part for part in (supernet, search, equal_cost, alone, transfer, tau, predicted, figures)}
    parser.add_argument("part", choices=parts)
    parser.add_argument("--text", default="runs/text", help="data.path")
    parser.add_argument("--out", type=Path, default=Path("docs/decilm"), help="folder of the CSVs and figures")
    parser.add_argument("--seconds", type=float, default=1e6, help="time after which the part stops")
    parser.add_argument("--gpus", type=int, default=1, help="as many as before, where a supernet's training goes on")
    parser.add_argument("--spaces", nargs=2, default=["decilm-proxy", "decilm-proxy-narrow"], help="main and narrow")
    parser.add_argument("--serve", default="decilm-6b")
    parser.add_argument("--devices", nargs="*", default=list(DEVICES), choices=DEVICES, help="to search for, in order")
    parser.add_argument("--words", nargs="*", help="what replaces a device's words, for a trial")
    parser.add_argument("--context", type=int, default=2048, help="of the served workload")
    proxies = ["main", "narrow", "half", "double"]
    parser.add_argument("--supernets", nargs="*", default=proxies, choices=SUPERNETS, help="to train, in order")
    parser.add_argument("--steps", type=int, default=2400, help="of a supernet")
    parser.add_argument("--batch", type=int, default=64, help="rows per step")
    parser.add_argument("--length", type=int, help="tokens per row; default: the proxy's context")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--checkpoint-every", type=int, default=200)
    parser.add_argument("--windows", type=int, default=256, help="of validation")
    parser.add_argument("--budget", default="500", help="evaluations of each search")
    parser.add_argument("--orders", type=int, default=60, help="random orders of DeciLM-6B's groups")
    parser.add_argument("--rounds", type=int, default=12, help="in which better orders are looked for")
    parser.add_argument("--seeds", type=int, default=4, help="of models trained alone")
    parser.add_argument("--alone-steps", type=int, default=2000)
    parser.add_argument("--alone-batch", type=int, default=16)
    parser.add_argument("--compared", type=int, default=60, help="whole vectors in transfer")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, given.seconds)
    try:
        parts[given.part](given)
    except OutOfTimeError:
        sys.exit("Stopped by --seconds; the same command goes on")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
