"""One worker of a search: claims a slot, proposes its vector, evaluates it, tells the study, and claims the next.

Whatever kills it, at any moment, leaves a claim from which another worker, or the next run, goes on:

    claimed, no vector yet       the proposal is made anew: it depends on the slot and on what was evaluated before
    vector, no finished trial    the vector is evaluated; the trial that was running is set FAIL
    vector and finished trial    nothing is left to do but to mark the claim as done
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from nas.console import Bar
from nas.metrics import Metrics
from nas.search.claims import Claim, ClaimLostError, Claims
from nas.search.problem import Problem
from nas.search.sampler import DistinctSampler, parameter_names, vector_of
from nas.space import SearchSpace, Vector, format_vector

_POLL_S = 0.5  # between looks at what the others still evaluate


@dataclass(frozen=True)
class Allowance:
    """What a search may spend: so many slots in all, within so many seconds if that is not None."""

    slots: int
    seconds: float | None


class Worker:
    """Works on a study until nothing is left to do, for it or for any other worker.

    Args:
        study: The study; its sampler is ``sampler``.
        sampler: Proposes the vectors.
        claims: The worker's claims.
        problem: What is searched.
        allowance: What all workers may spend together.
    """

    def __init__(
        self,
        study: optuna.Study,
        sampler: DistinctSampler,
        claims: Claims,
        problem: Problem,
        allowance: Allowance,
    ) -> None:
        self._study, self._sampler, self._claims = study, sampler, claims
        self._problem, self._allowance = problem, allowance
        self._begun = time.monotonic() - seconds_worked(finished_trials(study))

    def spent(self) -> float:
        """Evaluations that all workers have finished, or seconds, whichever is counted."""
        return self._claims.count_done() if self._allowance.seconds is None else time.monotonic() - self._begun

    def work(self, bar: Bar) -> None:
        """Evaluates vector after vector."""
        while claim := self._next(bar):
            with suppress(ClaimLostError):  # whoever took it over sees to it
                self._carry_out(claim, bar)
        left = running_trials(self._study)  # before the claims are seen: nobody works on a trial without one
        if self._claims.under_way() == (0, 0):
            for trial in left:  # of workers that were killed before they wrote the vector into their claim
                fail(self._study, trial.number)

    def _next(self, bar: Bar) -> Claim | None:
        """What to do now: what a worker that is gone left behind, or a new slot; waits as long as either may come."""
        while True:
            in_time = self._allowance.seconds is None or self.spent() < self._allowance.seconds
            if in_time:
                claim = self._claims.adopt() or self._claims.take(self._allowance.slots)
            else:
                claim = self._claims.adopt(self._finished())  # which takes no time
            if claim:
                return claim
            live, gone = self._claims.under_way()
            if not live and not (gone and in_time):
                return None
            bar.update(self.spent())
            time.sleep(_POLL_S)

    def _carry_out(self, claim: Claim, bar: Bar) -> None:
        if claim.vector is None or claim.vector not in self._finished():
            trial = self._ask(claim)
            vector = tuple(trial.params[name] for name in self._sampler.distributions)
            metrics = self._problem.evaluate(vector)
            self._tell(trial, {"vector": format_vector(vector), **metrics})
            bar.update(self.spent(), f"{format_vector(vector)} {metrics['loss_nats']:.4f}")
        self._claims.finish(claim)

    def _finished(self) -> set[Vector]:
        return set(vectors_of(finished_trials(self._study), self._problem.space))

    def _ask(self, claim: Claim) -> optuna.Trial:
        """A trial of the claim's vector, or of one that the sampler proposes and no other worker has."""
        if claim.vector is not None:
            fail_running(self._study, dict(zip(parameter_names(self._problem.space), claim.vector, strict=True)))
        self._sampler.turn_to(claim.slot, claim.vector)
        while True:
            trial = self._study.ask(self._sampler.distributions)
            vector = tuple(trial.params[name] for name in self._sampler.distributions)
            try:
                if self._claims.assign(claim, vector):
                    return trial
            except ClaimLostError:
                fail(self._study, trial.number)
                raise
            fail(self._study, trial.number)  # another worker proposed the same a moment before
            self._sampler.give_way()

    def _tell(self, trial: optuna.Trial, attributes: Metrics) -> None:
        with suppress(UpdateFinishedTrialError):  # this worker was taken for gone, and the trial ended without it
            for name, value in attributes.items():
                trial.set_user_attr(name, value)
            values = [float(attributes[name]) for name in self._problem.objectives.names]
            self._study.tell(trial, values, TrialState.COMPLETE, skip_if_finished=True)


def finished_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The trials with metrics, in the order in which they were begun."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def running_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that somebody works on, or that a killed worker left half-done."""
    return study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))


def vectors_of(trials: Sequence[FrozenTrial], space: SearchSpace) -> dict[Vector, FrozenTrial]:
    """Finished trials by their vectors; of two with the same vector the first counts."""
    return {vector_of(trial, space): trial for trial in reversed(trials)}


def fail_running(study: optuna.Study, params: Mapping[str, Any] | None = None) -> None:
    """Sets aside the trials that a killed worker left half-done: all that run, or those with some parameters."""
    for trial in running_trials(study):
        if params is None or trial.params == params:
            fail(study, trial.number)


def fail(study: optuna.Study, number: int) -> None:
    """Sets a trial FAIL, unless it is finished."""
    with suppress(UpdateFinishedTrialError):  # it ended at this very moment
        study.tell(number, state=TrialState.FAIL, skip_if_finished=True)


def seconds_worked(trials: Sequence[FrozenTrial]) -> float:
    """Seconds in which at least one of some finished trials ran."""
    total, until = 0.0, datetime.min
    for start, end in sorted((trial.datetime_start, trial.datetime_complete) for trial in trials):
        assert start is not None and end is not None, "a finished trial has both times"
        total += max(0.0, (end - max(start, until)).total_seconds())
        until = max(until, end)
    return total
