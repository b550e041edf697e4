"""How long a search may go on."""

import re
from dataclasses import dataclass

from nas.errors import UserError

_SECONDS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class Budget:
    """So many evaluations, or so many seconds; None is no limit."""

    evaluations: int | None = None
    seconds: float | None = None

    @property
    def is_everything(self) -> bool:
        """Whether every vector is to be evaluated."""
        return self == Budget()


def parse_budget(text: str) -> Budget:
    """``200`` is evaluations; ``90s``, ``30m`` and ``2h`` are durations; ``all`` is every vector of the space."""
    if text == "all":
        return Budget()
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])|(\d+)", text.strip())
    if match and float(match[1] or match[3]) > 0:
        return Budget(int(match[3])) if match[3] else Budget(seconds=float(match[1]) * _SECONDS[match[2]])
    raise UserError(
        f"budget is '{text}'; give a number of evaluations (200) or a duration (90s, 30m, 2h) above zero, or all"
    )
