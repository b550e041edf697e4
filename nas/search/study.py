"""The search itself: an Optuna study that asks for vectors and is told their metrics.

It gets a function from vector to metrics and knows nothing of supernets or GPUs. Any number of workers, processes of
one machine or of many, can call `search` for the same study: they share its budget, and no vector is evaluated twice.
Whatever kills one of them costs at most the evaluation that it was at, and another worker makes that again.
"""

from collections.abc import Callable, Mapping, Sequence

import optuna
import pandas as pd
from optuna.samplers import BaseSampler

from nas.config import Budget
from nas.console import progress_bar
from nas.errors import UserError
from nas.search.claims import Claims, Membership
from nas.search.front import Objectives, on_front
from nas.search.metrics import COLUMNS
from nas.search.sampler import DistinctSampler
from nas.search.storage import Storage
from nas.search.worker import Allowance, Metrics, Worker, fail_running, finished_trials, vectors_of
from nas.space import SearchSpace, Vector, format_vector


def search(
    space: SearchSpace,
    objectives: Objectives,
    make_sampler: Callable[..., BaseSampler],
    evaluate: Callable[[Vector], Metrics],
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

    ``known`` vectors come first, then the space's landmarks, then ``proposed`` ones, then what the sampler proposes;
    no vector is evaluated twice. Returns when the evaluations of all other workers are finished too.

    Args:
        space: The search space.
        objectives: What to optimise.
        make_sampler: Makes the Optuna sampler from a ``seed``.
        evaluate: Maps a vector to all its metrics.
        budget: When to stop; the landmarks count. A duration is that in which any worker was at work.
        seed: Seeds the sampler.
        storage: Where the study lives.
        membership: The standing among the study's workers; by default there is no other.
        known: Vectors that ``evaluate`` knows from an earlier search; they cost nothing.
        proposed: Vectors to evaluate early.
        facts: What else all workers must have in common.

    Returns:
        All evaluated vectors in the order of their slots, with `COLUMNS`.

    Raises:
        UserError: The study cannot be reached, read or written, or was begun with other facts.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    known = list(dict.fromkeys(known))
    first = list(dict.fromkeys([*known, *space.landmarks().values(), *proposed]))
    slots = len(known) + min(budget.evaluations or space.size, space.size - len(known))
    with storage.in_reach():
        claims = Claims(storage, membership)
        claims.agree(facts or {})
        sampler = DistinctSampler(make_sampler, space, seed, first, claims.vectors)
        study = storage.open(objectives, sampler)
        _describe(study, facts or {})
        if membership.dead is not None:
            claims.release(membership.dead)
        if membership.dead == "":
            fail_running(study)
        worker = Worker(study, sampler, claims, space, objectives, evaluate, Allowance(slots, budget.seconds))
        with claims.beating(), progress_bar("Evaluating vectors", budget.seconds or slots, worker.spent()) as bar:
            worker.work(bar)
        return trials_frame(study, claims, space, objectives, storage)


def _describe(study: optuna.Study, facts: Mapping[str, str]) -> None:
    """Lets whoever opens the study with Optuna's own tools see what it is."""
    known = study.user_attrs
    for name, fact in facts.items():
        if known.get(name) != fact:
            study.set_user_attr(name, fact)


def trials_frame(
    study: optuna.Study, claims: Claims, space: SearchSpace, objectives: Objectives, storage: Storage
) -> pd.DataFrame:
    """The evaluated vectors of a study in the order of their slots, as trials.csv has them.

    Raises:
        UserError: Trials are missing.
    """
    trials, done = vectors_of(finished_trials(study), space), claims.done()
    if lost := [format_vector(vector) for vector in done.values() if vector not in trials]:
        raise UserError(f"{storage} has lost the trials of {', '.join(lost[:3])}; restore it, or give another name=")
    frame = pd.DataFrame([trials[vector].user_attrs for vector in done.values()])
    frame["on_front"] = on_front(frame, objectives)
    return frame[COLUMNS]
