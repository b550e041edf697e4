"""What a vector costs on a device: time, memory, energy, money and emissions; `nas.quality` has its loss."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache, partial

from nas.config import CostConfig
from nas.errors import UserError
from nas.latency.device import Device
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
    shape, memory, context = space.shape, MemoryModel(space.shape, workload, device.is_gpu), workload.context
    energy = predictor.energy if predictor.energy and predictor.energy.knows(set().union(*space.choices)) else None

    @cache
    def costs(vector: Vector) -> Metrics:
        batch = memory.batch(vector)
        decode_ms = predictor.decode_ms(vector, batch, context)
        low_ms, high_ms = predictor.interval(decode_ms) or (None, None)
        tokens_per_s, joules = 1e3 * batch / decode_ms, None
        if energy:
            share_ms = partial(predictor.layer_share_ms, batch=batch, context=context, layers=len(vector))
            joules = energy.joules_per_step(vector, batch, share_ms) / batch
        values = {
            "decode_ms": decode_ms,
            "prefill_ms": predictor.prefill_ms(vector, batch, workload.prompt),
            "tokens_per_s": tokens_per_s,
            "batch": batch,
            "kv_bytes_per_token": shape.kv_bytes_per_token(vector, DTYPE_BYTES[workload.dtype]),
            "parameters": shape.parameters(vector),
            "memory_gib": memory.at(vector, batch).total / 2**30,
            "decode_ms_low": low_ms,
            "decode_ms_high": high_ms,
            "joules_per_token": joules,
            **money_and_emissions(tokens_per_s, joules, cost, predictor.idle_watts),
        }
        with suppress(UserError):  # a table may not reach down to one prompt
            values["ttft_ms"] = predictor.prefill_ms(vector, 1, workload.prompt)
        known: Metrics = {name: value for name in METRICS if (value := values.get(name)) is not None}
        return {**known, "latency_source": predictor.source}

    smallest = tuple(sorted(space.smallest))
    if unknown := [name for name in needed if name not in ("loss_nats", *costs(smallest))]:
        raise UserError(
            f"{unknown[0]} is wanted, but {predictor.folder or device.slug} does not tell it for {workload}; measure "
            "that workload on this machine with nas measure, or leave the metric out"
        )
    return lambda vector: costs(tuple(sorted(vector)))
