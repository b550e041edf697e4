"""The one registry of metrics: the columns of trials.csv and front.csv, what can be an objective, what can be limited.

A new metric is one entry here: its column, objective, limit (``constraints.max_…`` or ``min_…``) and label follow.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nas.latency.cost import Prediction  # which imports the config, whose limits are made from this registry

Metrics = Mapping[str, float | int | str]  # values by column
LOSS, PAIRED_SE = "loss_nats", "paired_se_nats"


@dataclass(frozen=True)
class Metric:
    name: str  # of the column and the objective
    title: str  # in words, for figures
    unit: str  # empty for a plain number
    # Its value from what is predicted of a vector, None where that is unknown; None for what is evaluated
    derive: "Callable[[Prediction], float | int | None] | None"
    maximise: bool = False  # larger is better
    objective: bool = False  # can be optimised
    limit: bool = False  # can be limited

    @property
    def label(self) -> str:
        """Title and unit."""
        return f"{self.title} ({self.unit})" if self.unit else self.title


def _money(name: str, title: str, unit: str) -> Metric:
    return Metric(name, title, unit, lambda p: p.money_and_emissions.get(name))


_ALWAYS = (  # in the order of the columns, which other programs rely on
    Metric(LOSS, "inherited validation loss", "nats/token", None, objective=True),
    Metric("decode_ms", "decode step", "ms", lambda p: p.decode_ms, objective=True, limit=True),
    Metric("prefill_ms", "prefill", "ms", lambda p: p.prefill_ms(p.batch), objective=True, limit=True),
    Metric(
        "tokens_per_s",
        "decode throughput",
        "tokens/s",
        lambda p: p.tokens_per_s,
        maximise=True,
        objective=True,
        limit=True,
    ),
    Metric("batch", "batch", "sequences", lambda p: p.batch, maximise=True),
    Metric("kv_bytes_per_token", "KV cache", "bytes/token", lambda p: p.kv_bytes_per_token, objective=True, limit=True),
    Metric("parameters", "parameters", "", lambda p: p.memory.shape.parameters(p.vector), objective=True, limit=True),
)
_WHERE_KNOWN = (
    Metric("memory_gib", "memory", "GiB", lambda p: p.memory.at(p.vector, p.batch).total / 2**30, limit=True),
    Metric("ttft_ms", "time to first token of one prompt", "ms", lambda p: p.ttft_ms, objective=True, limit=True),
    Metric("decode_ms_low", "decode step, at least", "ms", lambda p: p.interval and p.interval[0]),
    Metric("decode_ms_high", "decode step, at most", "ms", lambda p: p.interval and p.interval[1]),
    Metric("joules_per_token", "energy", "J/token", lambda p: p.joules_per_token),
    _money("cost_per_million_tokens", "cost", "per million tokens"),
    _money("kg_co2e_per_million_tokens", "emissions", "kg CO2e per million tokens"),
    _money("kg_co2e_per_year", "emissions", "kg CO2e per year"),
    Metric(PAIRED_SE, "standard error beside the largest vector", "nats/token", None),
)

METRICS = {metric.name: metric for metric in (*_ALWAYS, *_WHERE_KNOWN)}
OBJECTIVES = [name for name, metric in METRICS.items() if metric.objective]
LIMITS = {  # by their keys in ``constraints``
    f"{'min' if metric.maximise else 'max'}_{name}": metric for name, metric in METRICS.items() if metric.limit
}

# What every trials.csv has, also of earlier versions (no reader may need more), and what follows where it is known.
COLUMNS = ["vector", *(metric.name for metric in _ALWAYS), "on_front", "latency_source"]
OPTIONAL_COLUMNS = [metric.name for metric in _WHERE_KNOWN]
