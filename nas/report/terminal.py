"""The front as a table in the terminal."""

import pandas as pd
from rich.table import Table


def front_table(front: pd.DataFrame, names: dict[str, str] | None = None) -> Table:
    """Formats front.csv.

    Args:
        front: The front, in the order to show.
        names: Names of vectors that have one.
    """
    table = Table()
    table.add_column("vector", overflow="fold", min_width=12)
    for heading in ("loss\nnats", "tokens\n/s", "decode\nms", "prefill\nms", "KV B\n/token"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("latency", no_wrap=True)
    for row in front.to_dict("records"):
        name = (names or {}).get(row["vector"])
        table.add_row(
            f"{row['vector']} ({name})" if name else row["vector"],
            f"{row['loss_nats']:.4f}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['decode_ms']:.3f}",
            f"{row['prefill_ms']:.2f}",
            f"{row['kv_bytes_per_token']:,}",
            row["latency_source"],
        )
    return table


def gain_sentence(gains: pd.DataFrame) -> str:
    """What the variable vectors gain over the uniform one over which they gain most bytes, or loss where none is saved.

    Args:
        gains: What `nas.search.pareto.gains_over_uniform` returns.
    """
    ordered = gains.sort_values(["bytes_saved", "loss_gain_nats"]).to_dict("records")
    if not ordered or not (ordered[-1]["bytes_saved"] > 0 or ordered[-1]["loss_gain_nats"] > 0):
        return "No evaluated vector is better than a uniform one at its KV bytes, or smaller at its loss."
    best = ordered[-1]
    return (
        f"Beside uniform {best['vector'].split('-')[0]}: at its KV bytes the best evaluated vector's loss is "
        f"{best['loss_gain_nats']:.4f} nats lower, and a loss as low takes {best['bytes_saved']:.1%} fewer KV bytes."
    )
