"""Checks a config's keys, and its values by the names of their fields: a name means the same in every command."""

import dataclasses
from collections.abc import Callable
from typing import Any

from nas.errors import UserError
from nas.metrics import LIMITS

_POSITIVE = """
    accumulate batch batches checkpoint_every clip_norm context contexts distillation_temperature drift energy_batches
    heartbeat_s learning_rate length log_every memory_gib new_tokens price_per_hour prompt prompts rounds segment spread
    steps validate_every validation_windows vectors_per_text workers
"""
_NOT_NEGATIVE = "check energy_s equal_total grid_kg_per_kwh seeds temperature vectors weight_decay"
_SHARES = "distillation_weight final_share largest_first largest_share smallest_share utilisation warmup_share"
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {  # what each number of a field must fulfil
    **dict.fromkeys([*_POSITIVE.split(), *LIMITS], (lambda number: number > 0, "be positive")),
    **dict.fromkeys(_NOT_NEGATIVE.split(), (lambda number: number >= 0, "be 0 or more")),
    **dict.fromkeys(_SHARES.split(), (lambda number: 0 <= number <= 1, "lie between 0 and 1")),
    "pue": (lambda number: number >= 1, "be 1 or more"),
    "seed": (lambda number: 0 <= number < 2**32, f"lie between 0 and {2**32 - 1}"),
}
_OPTIONS = {
    "precision": ("auto", "fp32", "bf16"),
    "parallel": ("ddp", "fsdp"),
    "dtype": ("auto", "fp32", "bf16"),
    "runtime": ("auto", "eager", "graph", "compiled"),
}


def validate(config: Any, prefix: str = "") -> None:
    """Refuses a tree of config dataclasses with a value out of range, or a key that Hydra was told to add."""
    fields = {item.name for item in dataclasses.fields(config)}
    if unknown := sorted(vars(config).keys() - fields):
        raise UserError(f"there is no key {prefix}{unknown[0]}; --help lists the keys")
    for name, value in vars(config).items():
        if dataclasses.is_dataclass(value):
            validate(value, f"{prefix}{name}.")
        elif broken := _broken_rule(prefix + name, name, value):
            shown = f"'{value}'" if isinstance(value, str) else value
            raise UserError(f"{prefix}{name} is {shown}{broken}")


def _broken_rule(key: str, name: str, value: Any) -> str | None:
    """How the sentence about a value goes on, if it breaks a rule."""
    if key == "workload.batch":
        good = value == "max" or (type(value) is int and value > 0)
        return None if good else " but must be a positive number of sequences, or max"
    if name == "check_at" and not all(len(pair) == 2 and min(pair) > 0 for pair in value or ()):
        return "; give pairs of batch and context, such as [[64,1024],[96,1500]]"
    if name == "name" and not value.strip("./ "):
        return ", which names no run directory; give another name="
    if name in _OPTIONS and value not in _OPTIONS[name]:
        return f"; use {', '.join(_OPTIONS[name])}"
    if name in _RANGES and isinstance(value, int | float | list):
        keeps, rule = _RANGES[name]
        numbers = value if isinstance(value, list) else [value]
        return None if all(map(keeps, numbers)) and (numbers or name == "seeds") else f" but must {rule}"
    return None
