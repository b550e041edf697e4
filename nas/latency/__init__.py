"""How long a vector takes on a device: timing, tables, the predictor that sums layers, and analytic estimates."""

from nas.latency.device import Device, find_device, this_device
from nas.latency.predictor import LatencyModel, Workload, decode_ms, prefill_ms, resolve_workload

__all__ = [
    "Device",
    "LatencyModel",
    "Workload",
    "decode_ms",
    "find_device",
    "prefill_ms",
    "resolve_workload",
    "this_device",
]
