"""The front as a table in the terminal."""

import pandas as pd
from rich.table import Table


def front_table(front: pd.DataFrame) -> Table:
    """The rows of front.csv, whose vectors may have a ``name``."""
    table = Table()
    table.add_column("vector", overflow="fold", min_width=12)
    for heading in ("loss\nnats", "tokens\n/s", "decode\nms", "prefill\nms", "KV B\n/token"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("latency", no_wrap=True)
    for row in front.to_dict("records"):
        table.add_row(
            f"{row['vector']} ({row['name']})" if row.get("name") else row["vector"],
            f"{row['loss_nats']:.4f}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['decode_ms']:.3f}",
            f"{row['prefill_ms']:.2f}",
            f"{row['kv_bytes_per_token']:,}",
            row["latency_source"],
        )
    return table


def gain_sentence(gains: pd.DataFrame) -> str:
    """`gains_over_uniform` for the uniform vector over which most bytes are saved, or most loss if none are."""
    better = gains[(gains["bytes_saved"] > 0) | (gains["loss_gain_nats"] > 0)]
    if better.empty:
        return "No evaluated vector is better than a uniform one at its KV bytes, or smaller at its loss."
    best = better.sort_values(["bytes_saved", "loss_gain_nats"]).iloc[-1]
    return (
        f"Beside uniform {best['vector'].split('-')[0]}: at its KV bytes the best evaluated vector's loss is "
        f"{best['loss_gain_nats']:.4f} nats lower, and a loss as low takes {best['bytes_saved']:.1%} fewer KV bytes."
    )
