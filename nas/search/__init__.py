"""The search for Pareto-optimal vectors: an Optuna study, and what is computed from its trials."""

from nas.search.pareto import Objectives, on_front, reference_point
from nas.search.problem import Problem
from nas.search.storage import Storage
from nas.search.study import search

__all__ = ["Objectives", "Problem", "Storage", "on_front", "reference_point", "search"]
