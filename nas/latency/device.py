"""What is known of a device: the one we run on, or one that latency_models/ describes.

A device is named as NVML (or the CPU) names it, in lower case with dashes: ``nvidia-a10g``. Its folder in
latency_models/ holds device.json with the facts that an estimate needs, and any measured tables.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import psutil

from nas.errors import UserError
from nas.hardware import cpu_name, nvml_facts
from nas.resources import shipped
from nas.run import read_json


@dataclass(frozen=True)
class Device:
    """A device and its facts.

    Attributes:
        slug: Name of its folder, e.g. ``nvidia-a10g``.
        name: As the device names itself.
        is_gpu: Whether PyTorch reaches it through CUDA.
        memory_bytes: Usable memory.
        bandwidth_bytes_per_s: Memory bandwidth by data sheet, or None if unknown.
        flops: Dense matrix rate by dtype name (``bf16``, ``fp32``) by data sheet; empty if unknown.
        facts: Anything else worth recording: driver, clocks, power limit, source.
    """

    slug: str
    name: str
    is_gpu: bool
    memory_bytes: int
    bandwidth_bytes_per_s: float | None = None
    flops: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def this_device() -> Device:
    """The first GPU that PyTorch sees, else this machine's CPU."""
    import torch  # here, so that reading a named device needs no PyTorch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        name = properties.name
        return Device(_slug(name), name, True, properties.total_memory, facts=nvml_facts())
    name = cpu_name()
    cores = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else psutil.cpu_count()
    facts = {"cores": cores, "threads": torch.get_num_threads()}
    return Device(_slug(f"cpu {name} {cores} cores"), name, False, psutil.virtual_memory().total, facts=facts)


def find_device(reference: str) -> Device:
    """``this``, or a device described in latency_models/.

    Raises:
        UserError: There is no such device.
    """
    if reference == "this":
        return this_device()
    file = shipped("latency_models") / reference / "device.json"
    if not file.is_file():
        known = sorted(path.parent.name for path in shipped("latency_models").glob("*/device.json"))
        raise UserError(f"there is no device '{reference}'; use this, {', '.join(known)}")
    values = read_json(file)
    return Device(
        slug=reference,
        name=values["name"],
        is_gpu=True,
        memory_bytes=values["memory_bytes"],
        bandwidth_bytes_per_s=values["bandwidth_bytes_per_s"],
        flops=values["flops"],
        facts={"source": values["source"]},
    )


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
