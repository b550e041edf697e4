"""The metrics of a vector: the columns of trials.csv and front.csv that can be objectives."""

from collections.abc import Mapping
from dataclasses import dataclass

Metrics = Mapping[str, float | int | str]
"""Values by column."""


@dataclass(frozen=True)
class Metric:
    """A column: its label with unit, and which way is better."""

    label: str
    maximise: bool = False


METRICS = {
    "loss_nats": Metric("inherited validation loss (nats/token)"),
    "decode_ms": Metric("decode step (ms)"),
    "prefill_ms": Metric("prefill (ms)"),
    "tokens_per_s": Metric("decode throughput (tokens/s)", maximise=True),
    "batch": Metric("batch (sequences)", maximise=True),
    "kv_bytes_per_token": Metric("KV cache (bytes/token)"),
    "parameters": Metric("parameters"),
}

COLUMNS = ["vector", *METRICS, "on_front", "latency_source"]

OPTIONAL_COLUMNS = [
    "memory_gib",
    "decode_ms_low",
    "decode_ms_high",
    "joules_per_token",
    "cost_per_million_tokens",
    "kg_co2e_per_million_tokens",
    "kg_co2e_per_year",
]
"""Columns that follow where they are known; an estimate's interval is ``decode_ms_low`` to ``decode_ms_high``."""
