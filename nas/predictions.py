"""What a vector is predicted to take on a device: time, memory, energy and money; `nas.quality` has its loss."""

from collections.abc import Callable
from functools import cache, partial

from nas.config import CostConfig
from nas.latency import Device, LatencyModel, Workload, decode_ms, prefill_ms
from nas.latency.cost import costs as cost_metrics
from nas.latency.estimate import RooflineLatency
from nas.latency.memory import MemoryModel, batch_of
from nas.latency.predictor import DTYPE_BYTES
from nas.latency.table import TableLatency
from nas.metrics import Metrics
from nas.space import SearchSpace, Vector


def predictions(
    space: SearchSpace, device: Device, latency: LatencyModel, workload: Workload, cost: CostConfig
) -> Callable[[Vector], Metrics]:
    """What gives a vector's metrics on a device, apart from its loss: all that is known of `nas.metrics`.

    Args:
        space: The vectors are of it.
        device: Where they run.
        latency: Predicts their times on it.
        workload: What they serve.
        cost: Price and grid.

    Returns:
        A function of a vector, which may raise what `batch_of` and the latency model raise. Vectors with the same
        counts, in whatever order, share their metrics.
    """
    memory = MemoryModel(space.shape, workload, device.is_gpu)
    energy = latency.energy() if isinstance(latency, TableLatency) else None
    if energy and not energy.knows(set().union(*space.choices)):
        energy = None
    idle_watts = latency.meta.get("idle_watts") if isinstance(latency, TableLatency) else None
    context, dtype_bytes = workload.context, DTYPE_BYTES[workload.dtype]

    @cache
    def costs(counts: Vector) -> Metrics:
        batch = batch_of(workload, memory, counts)
        step_ms = decode_ms(latency, counts, batch, context)
        tokens_per_s = 1e3 * batch / step_ms
        metrics: dict[str, float | int | str] = {
            "decode_ms": step_ms,
            "prefill_ms": prefill_ms(latency, counts, batch, workload.prompt),
            "tokens_per_s": tokens_per_s,
            "batch": batch,
            "kv_bytes_per_token": space.shape.kv_bytes_per_token(counts, dtype_bytes),
            "parameters": space.shape.parameters(counts),
            "memory_gib": memory.at(counts, batch).total / 2**30,
            "latency_source": latency.source,
        }
        if isinstance(latency, RooflineLatency):
            metrics["decode_ms_low"], metrics["decode_ms_high"] = latency.interval(step_ms)
        joules_per_token = None
        if energy:
            layer_ms = partial(latency.layer_ms, "decode", batch=batch, length=context)
            step_joules = energy.joules_per_step(
                counts, batch, context, layer_ms, latency.embedding_and_head_ms("decode", batch, context)
            )
            metrics["joules_per_token"] = joules_per_token = step_joules / batch
        return metrics | cost_metrics(tokens_per_s, joules_per_token, cost, idle_watts)

    return lambda vector: costs(tuple(sorted(vector)))
