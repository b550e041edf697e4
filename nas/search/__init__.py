"""The search for Pareto-optimal vectors: an Optuna study, and what is computed from its trials."""

from nas.search.front import Objectives, on_front, reference_point
from nas.search.metrics import COLUMNS, METRICS
from nas.search.study import search

__all__ = ["COLUMNS", "METRICS", "Objectives", "on_front", "reference_point", "search"]
