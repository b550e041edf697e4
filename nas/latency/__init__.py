"""What a vector costs on a device: timing, tables, the predictor that sums layers, and analytic estimates."""

from nas.latency.device import Device, find_device, this_device
from nas.latency.predictor import Predictor, Workload, resolve_workload

__all__ = ["Device", "Predictor", "Workload", "find_device", "resolve_workload", "this_device"]
