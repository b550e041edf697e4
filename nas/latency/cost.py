"""What a vector costs on a device: time, memory, energy, money and emissions; `nas.quality` has its loss."""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, cached_property

from nas.config import CostConfig
from nas.errors import UserError
from nas.latency.device import Device
from nas.latency.energy import EnergyTable
from nas.latency.memory import MemoryModel
from nas.latency.predictor import DTYPE_BYTES, Predictor, Workload
from nas.metrics import METRICS, Metrics
from nas.space import SearchSpace, Vector

_JOULES_PER_KWH, _HOURS_PER_YEAR = 3.6e6, 365 * 24


def money_and_emissions(
    tokens_per_s: float, joules_per_token: float | None, config: CostConfig, idle_watts: float | None
) -> dict[str, float]:
    """Cost and emissions of decoding by the formulas in docs/energy.md; whatever lacks an input is left out.

    Figures per million tokens are of a card that decodes all the time. The yearly one needs its power between requests,
    ``idle_watts``, unless the utilisation is 1.
    """
    result = {}
    if config.price_per_hour is not None:
        result["cost_per_million_tokens"] = config.price_per_hour / 3600 / tokens_per_s * 1e6
    if joules_per_token is not None:
        kg_per_kwh, idle_share = config.pue * config.grid_kg_per_kwh, 1 - config.utilisation
        result["kg_co2e_per_million_tokens"] = joules_per_token * 1e6 / _JOULES_PER_KWH * kg_per_kwh
        if idle_share == 0 or idle_watts is not None:
            watts = config.utilisation * joules_per_token * tokens_per_s + idle_share * (idle_watts or 0.0)
            result["kg_co2e_per_year"] = watts / 1e3 * _HOURS_PER_YEAR * kg_per_kwh
    return result


@dataclass(frozen=True)
class Prediction:
    """All that is predicted of one vector at a workload; `nas.metrics` picks its columns from it."""

    vector: Vector  # sorted: nothing here depends on the order of the layers
    batch: int  # the workload's, or the largest that fits
    memory: MemoryModel
    predictor: Predictor
    energy: EnergyTable | None  # the power of decode steps; None is unknown
    cost: CostConfig

    @cached_property
    def decode_ms(self) -> float:
        return self.predictor.decode_ms(self.vector, self.batch, self.memory.workload.context)

    def prefill_ms(self, batch: int) -> float:
        return self.predictor.prefill_ms(self.vector, batch, self.memory.workload.prompt)

    @property
    def ttft_ms(self) -> float | None:
        """Time to first token: the prefill of a single prompt. Unknown where a table has no such small batch."""
        try:
            return self.prefill_ms(1)
        except UserError:
            return None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Between which milliseconds a decode step is to be expected; None if measured."""
        return self.predictor.interval(self.decode_ms)

    @property
    def tokens_per_s(self) -> float:
        """Decode throughput over all sequences of the batch."""
        return 1e3 * self.batch / self.decode_ms

    @property
    def kv_bytes_per_token(self) -> int:
        """Of one sequence, over all layers."""
        return self.memory.shape.kv_bytes_per_token(self.vector, DTYPE_BYTES[self.memory.workload.dtype])

    @cached_property
    def joules_per_token(self) -> float | None:
        """Energy of the card while it decodes.

        Each layer draws the power of its uniform model for its own time and its share of embedding and head.
        """
        if self.energy is None:
            return None
        watts, share_ms = self.energy.watts, self.predictor.layer_share_ms
        batch, context, layers = self.batch, self.memory.workload.context, len(self.vector)
        counts = Counter(self.vector).items()
        millijoules = math.fsum(n * watts(g, batch) * share_ms(g, batch, context, layers) for g, n in counts)
        return millijoules / 1e3 / batch

    @property
    def money_and_emissions(self) -> dict[str, float]:
        return money_and_emissions(self.tokens_per_s, self.joules_per_token, self.cost, self.predictor.idle_watts)


def cost_function(
    space: SearchSpace,
    device: Device,
    predictor: Predictor,
    workload: Workload,
    cost: CostConfig,
    needed: Iterable[str] = (),
) -> Callable[[Vector], Metrics]:
    """A function of a vector that gives all of `nas.metrics` that is known on a device, apart from the loss.

    Vectors with the same counts per choice share their metrics. A needed metric that is not known is an error.
    """
    memory = MemoryModel(space.shape, workload, device.is_gpu)
    energy = predictor.energy if predictor.energy and predictor.energy.knows(space.levels) else None

    @cache
    def metrics(vector: Vector) -> Metrics:
        predicted = Prediction(vector, memory.batch(vector), memory, predictor, energy, cost)
        values = {name: metric.derive(predicted) for name, metric in METRICS.items() if metric.derive}
        known: Metrics = {name: value for name, value in values.items() if value is not None}
        return {**known, "latency_source": predictor.source}

    smallest = tuple(sorted(space.smallest))
    if unknown := [name for name in needed if METRICS[name].derive and name not in metrics(smallest)]:
        what = f"{unknown[0]} is wanted, but {predictor.folder or device.slug} does not tell it for {workload}"
        raise UserError(f"{what}; measure that workload on this machine with nas measure, or leave the metric out")
    return lambda vector: metrics(tuple(sorted(vector)))
