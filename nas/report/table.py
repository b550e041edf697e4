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
    table.add_column("vector", overflow="fold", min_width=15)
    for heading in ("loss nats", "tokens/s", "decode ms", "prefill ms", "KV B/token"):
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
