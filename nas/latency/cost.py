"""What tokens cost: money by the hour of the card, and the carbon dioxide of its electricity."""

from nas.config import CostConfig

_JOULES_PER_KWH = 3.6e6
_HOURS_PER_YEAR = 365 * 24


def costs(
    tokens_per_s: float, joules_per_token: float | None, config: CostConfig, idle_watts: float | None
) -> dict[str, float]:
    """Cost and emissions of decoding; whatever lacks an input is left out.

    With ``kg = pue · grid_kg_per_kwh``, the emissions of a kWh of the card:

    - ``cost_per_million_tokens`` = price_per_hour / (3600 · tokens_per_s) · 10⁶
    - ``kg_co2e_per_million_tokens`` = joules_per_token · 10⁶ / (3.6 · 10⁶) · kg
    - ``kg_co2e_per_year`` = (utilisation · joules_per_token · tokens_per_s + (1 − utilisation) · idle_watts) / 1000
      · 8760 · kg; idle_watts must be known unless the utilisation is 1

    The first two are of a card that decodes all the time it is paid for.

    Args:
        tokens_per_s: Decode throughput of the card, over all sequences of the batch.
        joules_per_token: Of the card while it decodes; None is unknown.
        config: Price, grid and usage.
        idle_watts: Power of the card between requests; None is unknown.

    Example:
        1,000 tokens/s at 0.3 J a token is 300 W. At 3.60 an hour and 0.5 kg a kWh, a million tokens cost 1.00 and
        emit 0.0417 kg, and a year emits 1,314 kg.
    """
    result = {}
    if config.price_per_hour is not None:
        result["cost_per_million_tokens"] = config.price_per_hour / 3600 / tokens_per_s * 1e6
    if joules_per_token is None:
        return result
    kg_per_kwh = config.pue * config.grid_kg_per_kwh
    result["kg_co2e_per_million_tokens"] = joules_per_token * 1e6 / _JOULES_PER_KWH * kg_per_kwh
    idle_share = 1 - config.utilisation
    if idle_share == 0 or idle_watts is not None:
        watts = config.utilisation * joules_per_token * tokens_per_s + idle_share * (idle_watts or 0.0)
        result["kg_co2e_per_year"] = watts / 1e3 * _HOURS_PER_YEAR * kg_per_kwh
    return result
