"""The search itself: an Optuna study that asks for vectors and is told their metrics.

It gets a function from vector to metrics and knows nothing of supernets or GPUs. Any number of workers, processes of
one machine or of many, can call `search` for the same study: they share its budget, and no vector is evaluated twice.
Whatever kills one of them costs at most the evaluation that it was at, and another worker makes that again.
"""

from collections.abc import Callable, Mapping, Sequence

import optuna
import pandas as pd
from optuna.samplers import BaseSampler

from nas import console
from nas.budget import Budget
from nas.errors import UserError
from nas.metrics import COLUMNS, OPTIONAL_COLUMNS
from nas.search.claims import Claims, Membership
from nas.search.pareto import on_front
from nas.search.problem import Problem
from nas.search.sampler import DistinctSampler
from nas.search.storage import Storage
from nas.search.worker import Allowance, Worker, fail_running, finished_trials, vectors_of
from nas.space import Vector, format_vector


def search(
    problem: Problem,
    make_sampler: Callable[..., BaseSampler],
    budget: Budget,
    seed: int,
    storage: Storage,
    *,
    membership: Membership = Membership(),  # noqa: B008  (it is frozen)
    known: Sequence[Vector] = (),
    proposed: Sequence[Vector] = (),
    facts: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """Evaluates vectors until the budget or the space is used up; goes on with what ``storage`` holds.

    ``known`` vectors come first, then the space's reference vectors, then ``proposed`` ones, then what the sampler
    proposes; no vector is evaluated twice, and none that breaks a limit. Returns when the evaluations of all
    other workers are finished too.

    Args:
        problem: What is searched.
        make_sampler: Makes the Optuna sampler from a ``seed``.
        budget: When to stop; the reference vectors count. A duration is that in which any worker was at work.
        seed: Seeds the sampler.
        storage: Where the study lives.
        membership: The standing among the study's workers; by default there is no other.
        known: Vectors whose loss is known from an earlier search; they are no part of the budget.
        proposed: Vectors to evaluate early.
        facts: What else all workers must have in common.

    Returns:
        All evaluated vectors in the order of their slots, with `COLUMNS` and what is known of `OPTIONAL_COLUMNS`.

    Raises:
        UserError: The study cannot be reached, read or written, or was begun with other facts.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space, limits = problem.space, problem.constraints
    known = list(filter(limits.keep, dict.fromkeys(known)))
    everything = limits.vectors() if budget.is_everything else ()
    first = filter(limits.keep, [*known, *space.reference_vectors().values(), *proposed, *everything])
    slots = len(known) + min(budget.evaluations or limits.size, limits.size - len(known))
    with storage.in_reach():
        claims = Claims(storage, membership)
        claims.agree(facts or {})
        sampler = DistinctSampler(
            make_sampler,
            space,
            seed,
            first=list(dict.fromkeys(first)),
            claimed=claims.vectors,
            permitted=limits.permits,
            costs=problem.known_objectives,
        )
        study = storage.open(problem.objectives, sampler)
        _describe(study, facts or {})
        if membership.dead is not None:
            claims.release(membership.dead)
        if membership.dead == "":
            fail_running(study)
        worker = Worker(study, sampler, claims, problem, Allowance(slots, budget.seconds))
        with (
            claims.beating(),
            console.progress_bar("Evaluating vectors", budget.seconds or slots, worker.spent()) as bar,
        ):
            worker.work(bar)
        return trials_frame(study, claims, problem, storage)


def _describe(study: optuna.Study, facts: Mapping[str, str]) -> None:
    """Lets whoever opens the study with Optuna's own tools see what it is."""
    known = study.user_attrs
    for name, fact in facts.items():
        if known.get(name) != fact:
            study.set_user_attr(name, fact)


def trials_frame(study: optuna.Study, claims: Claims, problem: Problem, storage: Storage) -> pd.DataFrame:
    """The evaluated vectors of a study in the order of their slots, as trials.csv has them.

    Raises:
        UserError: Trials are missing.
    """
    trials, done = vectors_of(finished_trials(study), problem.space), claims.done()
    if lost := [format_vector(vector) for vector in done.values() if vector not in trials]:
        raise UserError(f"{storage} has lost the trials of {', '.join(lost[:3])}; restore it, or give another name=")
    frame = pd.DataFrame([trials[vector].user_attrs for vector in done.values()])
    frame["on_front"] = on_front(frame, problem.objectives)
    return frame[COLUMNS + [column for column in OPTIONAL_COLUMNS if column in frame]]
