"""The one registry of metrics: the columns of trials.csv and front.csv, what can be an objective, what can be limited.

A new metric is one entry here: its column, objective, limit (``constraints.max_…`` or ``min_…``) and label follow. Its
value comes from `nas.latency.cost`; the loss alone is evaluated.
"""

from collections.abc import Mapping
from dataclasses import dataclass

Metrics = Mapping[str, float | int | str]  # values by column


@dataclass(frozen=True)
class Metric:
    name: str  # of the column and the objective
    title: str  # in words, for figures
    unit: str  # empty for a plain number
    maximise: bool = False  # larger is better
    objective: bool = False  # can be optimised
    limit: bool = False  # can be limited

    @property
    def label(self) -> str:
        """Title and unit."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    @property
    def limit_key(self) -> str:
        """Its key in ``constraints``."""
        return f"{'min' if self.maximise else 'max'}_{self.name}"


_ALWAYS = (  # in the order of the columns, which other programs rely on
    Metric("loss_nats", "inherited validation loss", "nats/token", objective=True),
    Metric("decode_ms", "decode step", "ms", objective=True, limit=True),
    Metric("prefill_ms", "prefill", "ms", objective=True, limit=True),
    Metric("tokens_per_s", "decode throughput", "tokens/s", maximise=True, objective=True, limit=True),
    Metric("batch", "batch", "sequences", maximise=True),
    Metric("kv_bytes_per_token", "KV cache", "bytes/token", objective=True, limit=True),
    Metric("parameters", "parameters", "", objective=True, limit=True),
)
_WHERE_KNOWN = (
    Metric("memory_gib", "memory", "GiB", limit=True),
    Metric("ttft_ms", "time to first token of one prompt", "ms", objective=True, limit=True),
    Metric("decode_ms_low", "decode step, at least", "ms"),
    Metric("decode_ms_high", "decode step, at most", "ms"),
    Metric("joules_per_token", "energy", "J/token"),
    Metric("cost_per_million_tokens", "cost", "per million tokens"),
    Metric("kg_co2e_per_million_tokens", "emissions", "kg CO2e per million tokens"),
    Metric("kg_co2e_per_year", "emissions", "kg CO2e per year"),
)

METRICS = {metric.name: metric for metric in (*_ALWAYS, *_WHERE_KNOWN)}
OBJECTIVES = [name for name, metric in METRICS.items() if metric.objective]
LIMITS = {metric.limit_key: metric for metric in METRICS.values() if metric.limit}  # by their keys in ``constraints``

# What every trials.csv has, also of earlier versions (no reader may need more), and what follows where it is known.
COLUMNS = ["vector", *(metric.name for metric in _ALWAYS), "on_front", "latency_source"]
OPTIONAL_COLUMNS = [metric.name for metric in _WHERE_KNOWN]
