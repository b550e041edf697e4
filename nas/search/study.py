"""The search itself: an Optuna study that asks for vectors and is told their metrics.

It gets a function from vector to metrics and knows nothing of supernets or GPUs. The study lives in SQLite, one
finished trial an evaluation; whatever kills the process costs at most the evaluation that was under way.
"""

import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import optuna
import pandas as pd
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.samplers import BaseSampler
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError

from nas.config import Budget
from nas.console import progress_bar
from nas.errors import UserError
from nas.search.front import Objectives, on_front
from nas.search.metrics import COLUMNS
from nas.search.sampler import DistinctSampler, parameter_names, vector_of
from nas.space import SearchSpace, Vector, format_vector

Metrics = Mapping[str, float | int | str]
_METRICS = "metrics"


def search(
    space: SearchSpace,
    objectives: Objectives,
    make_sampler: Callable[..., BaseSampler],
    evaluate: Callable[[Vector], Metrics],
    budget: Budget,
    seed: int,
    database: Path,
) -> pd.DataFrame:
    """Evaluates vectors until the budget or the space is used up; goes on with what ``database`` holds.

    The space's landmarks come first, then what the sampler proposes; no vector is evaluated twice.

    Args:
        space: The search space.
        objectives: What to optimise.
        make_sampler: Makes the Optuna sampler from a ``seed``.
        evaluate: Maps a vector to all its metrics.
        budget: When to stop; the landmarks count.
        seed: Seeds the sampler.
        database: SQLite file of the study.

    Returns:
        All evaluated vectors in order, with `COLUMNS`.

    Raises:
        UserError: The database is corrupt or cannot be written.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = DistinctSampler(make_sampler, space, seed)
    try:
        study = optuna.create_study(
            storage=f"sqlite:///{database}",
            study_name="search",
            directions=objectives.directions,
            sampler=sampler,
            load_if_exists=True,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            study.set_metric_names(list(objectives.names))  # what optuna-dashboard shows
        _fail_unfinished(study)
        _spend(study, space, objectives, evaluate, budget, sampler)
        return trials_frame(study, space, objectives)
    except (StorageInternalError, SQLAlchemyError) as error:
        cause = str(error.__cause__ or error).splitlines()[0]
        raise UserError(
            f"study {database} cannot be read or written ({cause}); free disk space or restore it, and run again"
        ) from None


def _fail_unfinished(study: optuna.Study) -> None:
    """Sets aside what a killed process left half-done; its vector is proposed again."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)


def _spend(
    study: optuna.Study,
    space: SearchSpace,
    objectives: Objectives,
    evaluate: Callable[[Vector], Metrics],
    budget: Budget,
    sampler: DistinctSampler,
) -> None:
    names = parameter_names(space)
    landmarks = list(dict.fromkeys(space.landmarks().values()))
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    count, spent = len(finished), sum(trial.duration.total_seconds() for trial in finished if trial.duration)
    most = min(budget.evaluations or space.size, space.size)
    begun = time.monotonic() - spent
    total, done = (
        (most, lambda: count) if budget.seconds is None else (budget.seconds, lambda: time.monotonic() - begun)
    )
    with progress_bar("Evaluating vectors", total, done()) as bar:
        while count < most and (budget.seconds is None or time.monotonic() - begun < budget.seconds):
            waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))  # enqueued just before a kill
            if count < len(landmarks) and not waiting:
                study.enqueue_trial(dict(zip(names, landmarks[count], strict=True)))
            trial = study.ask(sampler.distributions)
            vector = tuple(trial.params[name] for name in names)
            metrics = evaluate(vector)
            trial.set_user_attr("vector", format_vector(vector))
            trial.set_user_attr(_METRICS, dict(metrics))
            study.tell(trial, [float(metrics[name]) for name in objectives.names])
            count += 1
            bar.update(done(), f"{format_vector(vector)} {metrics['loss_nats']:.4f}")


def trials_frame(study: optuna.Study, space: SearchSpace, objectives: Objectives) -> pd.DataFrame:
    """The finished trials of a study in order, as trials.csv has them."""
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    rows = [{"vector": format_vector(vector_of(trial, space)), **trial.user_attrs[_METRICS]} for trial in finished]
    frame = pd.DataFrame(rows)
    frame["on_front"] = on_front(frame, objectives)
    return frame[COLUMNS]
