"""The run directory: what a stage was asked to do, where it came from, what it wrote, and whether it finished.

    run.json        argv, resolved config, git commit, package versions, device, seeds, parents with their hashes
                    (their paths are relative to the run's own, so runs/ can be moved)
    metrics.jsonl   one JSON object a line, append-only
    (artifacts)     whatever the stage makes
    complete.json   written last: the hash of every artifact. Its absence means unfinished

A run directory knows nothing of what a stage does. Reading an artifact of a finished run checks its hash.
"""

import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from nas import console
from nas.distributed import IS_MAIN
from nas.errors import AlreadyFinishedError, InUseError, UserError
from nas.files import end_cut_line, file_hash, read_json, without_passwords, write_json
from nas.provenance import now, provenance

_RUN, _METRICS, _COMPLETE, _LOCK = "run.json", "metrics.jsonl", "complete.json", ".lock"
_POLL_S = 2.0


class FinishedRun:
    """A finished run that another stage builds on; it must be of ``stage``, unless that is None.

    Raises:
        UserError: It is no run directory, another stage's, or unfinished.
    """

    def __init__(self, path: Path, stage: str | None = None) -> None:
        if not (path / _RUN).is_file():
            raise UserError(f"{path} is not a run directory (it has no {_RUN}); give the directory of a finished run")
        self.path = path
        self.info = read_json(path / _RUN)
        if stage is not None and self.info.get("stage") != stage:
            raise UserError(
                f"{path} was written by 'nas {self.info.get('stage')}', not by 'nas {stage}'; give a {stage} run"
            )
        if not (path / _COMPLETE).is_file():
            name = _name(path, str(self.info.get("stage")))
            raise UserError(f"{path} is unfinished; run its command again with name={name} to finish it")
        self._hashes: dict[str, str] = read_json(path / _COMPLETE).get("artifacts", {})
        if not all(
            isinstance(some, dict) for some in (self._hashes, self.info.get("config"), self.info.get("parents"))
        ):
            raise UserError(f"{path} is corrupt: {_RUN} or {_COMPLETE} lacks a key; restore it or run its stage again")

    @property
    def config(self) -> dict[str, Any]:
        """The resolved config of the run."""
        return dict(self.info["config"])

    @property
    def artifacts(self) -> set[str]:
        """Their names."""
        return set(self._hashes)

    def digest(self) -> str:
        """Hash over the completion mark, and so over every artifact."""
        return file_hash(self.path / _COMPLETE)

    def artifact(self, name: str) -> Path:
        """Path of an artifact, its content verified against the hash taken when the run finished.

        Raises:
            UserError: It is missing or was changed since.
        """
        path = self.path / name
        if not path.is_file():
            raise UserError(f"{path} is missing; run 'nas {self.info.get('stage')}' again under a new name")
        if file_hash(path) != self._hashes.get(name):
            raise UserError(
                f"{path} is corrupt: it changed after the run finished; restore it, or remove {self.path} and run "
                f"'nas {self.info.get('stage')}' again"
            )
        return path

    def parent(self, role: str) -> "FinishedRun":
        """The run that this one was built on, by its role.

        Raises:
            UserError: It is gone, or is not what it was.
        """
        recorded = self.info["parents"][role]
        path = Path(os.path.normpath(self.path / recorded["path"]))
        parent = FinishedRun(path)
        if parent.digest() != recorded["hash"]:
            raise UserError(f"{path} is not the {role} that {self.path} was made from; run that again")
        return parent


def _name(path: Path, stage: str) -> str:
    """What ``name=`` makes a run directory: the path below its stage's folder, with the sweep that it is of."""
    *folders, own = path.parts
    below = folders[len(folders) - folders[::-1].index(stage) :] if stage in folders else []
    return "/".join([*below, own])


class Run:
    """The run that is being written. Use `start_run`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def log(self, **values: object) -> None:
        """Appends one line to metrics.jsonl."""
        if not IS_MAIN:
            return
        with (self.path / _METRICS).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(values) + "\n")

    def finish(self, scaffold: Path | None = None) -> None:
        """Writes the completion mark, and only then removes the ``scaffold``, such as a checkpoint."""
        if not IS_MAIN:
            return
        artifacts = {
            str(path.relative_to(self.path)): file_hash(path)
            for path in sorted(self.path.rglob("*"))
            if path.is_file() and path.name not in (_RUN, _COMPLETE)
            if not any(part.startswith(".") for part in path.relative_to(self.path).parts)
            if path != scaffold
        }
        write_json(self.path / _COMPLETE, {"finished": now(), "artifacts": artifacts})
        if scaffold:
            scaffold.unlink(missing_ok=True)


@contextmanager
def start_run(
    path: Path,
    stage: str,
    config: Mapping[str, Any],
    seeds: Mapping[str, int] | None = None,
    parents: Mapping[str, FinishedRun] | None = None,
    decisive: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> Iterator[Run]:
    """Begins a run, or goes on with an unfinished one of the same name and config.

    Of several processes under torchrun the first one keeps the run; to the others it is write-protected.

    Args:
        path: The run directory, made if needed.
        stage: Name of the stage.
        config: The resolved config, recorded as plain values.
        seeds: Every seed that the stage draws from.
        parents: The finished runs that the stage builds on, by role.
        decisive: The part of a config in which a resumed run must not differ.

    Raises:
        UserError: The directory holds a finished run or a run of another config.
        InUseError: Another process is writing it.
    """
    if not IS_MAIN:
        yield Run(path)
        return
    path.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path / _LOCK)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise InUseError(f"{path} is in use by another process; wait for it or give another name=") from None
    try:
        plain: dict[str, Any] = json.loads(json.dumps(config, default=str))
        origins = {
            role: {"path": os.path.relpath(run.path, path), "hash": run.digest()}
            for role, run in (parents or {}).items()
        }
        if is_run(path):
            check_begun(path, stage, decisive(plain), decisive)
            if read_json(path / _RUN).get("parents") != origins:
                raise UserError(f"{path} was begun from other parent runs; give another name=")
            if (path / _COMPLETE).is_file():
                raise AlreadyFinishedError(f"{path} is already finished; give another name= or remove it")
            end_cut_line(path / _METRICS)
        else:
            argv = [without_passwords(word) for word in sys.orig_argv]
            info = {"stage": stage, "id": uuid.uuid4().hex, "started": now(), "argv": argv, "config": plain}
            write_json(path / _RUN, info | {"seeds": dict(seeds or {}), "parents": origins} | provenance())
        yield Run(path)
    finally:
        lock.release()


def check_begun(
    path: Path,
    stage: str,
    config: Mapping[str, Any],
    decisive: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> None:
    """Refuses to go on with the run ``path``, if there is one, in another way than it was begun.

    ``config`` has keys of the resolved config as they are now; it need not be all of them, so that a mistake is found
    before expensive work. ``decisive`` is as in `start_run`.

    Raises:
        UserError: The run is another stage's, or has another value of one of the keys.
    """
    if not is_run(path):
        return
    before = read_json(path / _RUN)
    if before.get("stage") != stage:
        raise UserError(f"{path} belongs to 'nas {before.get('stage')}'; give another name=")
    recorded, given = decisive(before.get("config", {})), json.loads(json.dumps(config, default=str))
    if changed := [line for key in given for line in _differences(recorded.get(key), given[key], key)]:
        raise begun_otherwise(path, f"config ({'; '.join(changed[:3])})")


def begun_otherwise(path: Path, what: str) -> UserError:
    """The refusal to resume a run with another ``what`` than it was begun with."""
    return UserError(
        f"{path} was begun with another {what}; repeat the first command to resume it, or give another name="
    )


def _differences(before: Any, after: Any, key: str) -> list[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        return [d for k in before | after for d in _differences(before.get(k), after.get(k), f"{key}.{k}")]
    return [] if before == after else [f"{key} was {before}, now {after}"]


def find_runs(runs_dir: Path, stage: str) -> Iterator[FinishedRun]:
    """Finished runs of a stage under ``runs_dir``, newest first; corrupt ones are passed over with a warning."""
    marks = (runs_dir / stage).glob(f"**/{_COMPLETE}")
    for mark in sorted(marks, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            yield FinishedRun(mark.parent, stage)
        except UserError as error:
            console.warn(f"Passing over {mark.parent}: {error}")


def find_or_make(path: Path, stage: str, make: Callable[[], object]) -> FinishedRun:
    """The finished run of ``stage`` at ``path``, made if it is not there, or awaited while another process makes it.

    The name of ``path`` is a hash of what decides the run: what is finished there is right, and ``make`` resumes an
    interrupted attempt.
    """
    waiting = False
    while not (path / _COMPLETE).is_file():
        try:
            make()
        except AlreadyFinishedError:
            break
        except InUseError as error:
            if not waiting:
                console.print(f"Waiting: {error}")
            waiting = True
            time.sleep(_POLL_S)
    return FinishedRun(path, stage)


def recorded_config(path: Path) -> dict[str, Any]:
    """The config of an earlier attempt at the run ``path``; empty if there was none."""
    return (read_json(path / _RUN).get("config") or {}) if is_run(path) else {}


def runs_in(folder: Path) -> list[Path]:
    """The run directories below ``folder``, finished or not; a sweep's may be nested."""
    return sorted(file.parent for file in folder.rglob(_RUN))


def is_run(path: Path) -> bool:
    """Whether ``path`` is a run directory, finished or not."""
    return (path / _RUN).is_file()
