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
from typing import Any, TypeVar

import filelock

from nas import console
from nas.distributed import IS_MAIN
from nas.errors import AlreadyFinishedError, InUseError, UserError
from nas.files import end_cut_line, file_hash, read_json, without_passwords, write_json
from nas.provenance import now, provenance

_RUN, _METRICS, _COMPLETE, _LOCK = "run.json", "metrics.jsonl", "complete.json", ".lock"
_POLL_S = 2.0

Found = TypeVar("Found")


class FinishedRun:
    """A finished run that another stage builds on.

    Args:
        path: The run directory.
        stage: The stage that must have written it, or None for any.

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
        parts = (self._hashes, self.info.get("config"), self.info.get("parents"))
        if not all(isinstance(part, dict) for part in parts):
            raise UserError(f"{path} is corrupt: {_RUN} or {_COMPLETE} lacks a part; restore it or run its stage again")

    @property
    def config(self) -> dict[str, Any]:
        """The resolved config of the run."""
        return dict(self.info["config"])

    @property
    def artifacts(self) -> set[str]:
        """Names of all that it made."""
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
        fact = self.info["parents"][role]
        path = Path(os.path.normpath(self.path / fact["path"]))
        parent = FinishedRun(path)
        if parent.digest() != fact["hash"]:
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
        """Writes the completion mark. Nothing may be written to the run afterwards.

        Args:
            scaffold: A file that was needed only until here, such as a checkpoint; removed once the mark is there.
        """
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
) -> Iterator[Run]:
    """Begins a run, or goes on with an unfinished one of the same name and config.

    Of several processes under torchrun the first one keeps the run; to the others it is write-protected.

    Args:
        path: The run directory, made if needed.
        stage: Name of the stage.
        config: The resolved config as plain values; a resumed run must have the same.
        seeds: Every seed that the stage draws from.
        parents: The finished runs that the stage builds on, by role.

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
        config = json.loads(json.dumps(config, default=str))
        parent_facts = {
            role: {"path": os.path.relpath(run.path, path), "hash": run.digest()}
            for role, run in (parents or {}).items()
        }
        if (path / _RUN).is_file():
            _check_resumable(path, stage, config, parent_facts)
            end_cut_line(path / _METRICS)
        else:
            argv = [without_passwords(word) for word in sys.orig_argv]
            facts: dict[str, Any] = {"stage": stage, "id": uuid.uuid4().hex, "started": now(), "argv": argv}
            facts["config"] = config
            facts |= {"seeds": dict(seeds or {}), "parents": parent_facts} | provenance()
            write_json(path / _RUN, facts)
        yield Run(path)
    finally:
        lock.release()


def _check_resumable(path: Path, stage: str, config: Mapping[str, Any], parents: Mapping[str, Any]) -> None:
    before = read_json(path / _RUN)
    if before.get("stage") != stage:
        raise UserError(f"{path} belongs to 'nas {before.get('stage')}'; give another name=")
    if changed := _differences(before.get("config", {}), config):
        raise begun_otherwise(path, f"config ({'; '.join(changed[:3])})")
    if before.get("parents") != parents:
        raise UserError(f"{path} was begun from other parent runs; give another name=")
    if (path / _COMPLETE).is_file():
        raise AlreadyFinishedError(f"{path} is already finished; give another name= or remove it")


def begun_otherwise(path: Path, what: str) -> UserError:
    """The refusal to resume a run with another ``what`` than it was begun with."""
    return UserError(
        f"{path} was begun with another {what}; repeat the first command to resume it, or give another name="
    )


def _differences(before: Any, after: Any, prefix: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        keys = list(before | after)
        return [d for key in keys for d in _differences(before.get(key), after.get(key), f"{prefix}{key}.")]
    return [] if before == after else [f"{prefix[:-1]} was {before}, now {after}"]


def find_runs(runs_dir: Path, stage: str) -> Iterator[FinishedRun]:
    """Finished runs of a stage under ``runs_dir``, newest first; corrupt ones are passed over with a warning."""
    marks = (runs_dir / stage).glob(f"**/{_COMPLETE}")
    for mark in sorted(marks, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            yield FinishedRun(mark.parent, stage)
        except UserError as error:
            console.warn(f"Passing over {mark.parent}: {error}")


def found_or_made(find: Callable[[], Found | None], make: Callable[[], Found]) -> Found:
    """What another process has made, or is making at this moment, else what this one makes.

    Args:
        find: Looks for it.
        make: Makes it, or raises `InUseError` while another process does.
    """
    waiting = False
    while (found := find()) is None:
        try:
            return make()
        except InUseError as error:
            if not waiting:
                console.print(f"Waiting: {error}")
            waiting = True
            time.sleep(_POLL_S)
    return found


def recorded_parent(path: Path, role: str) -> FinishedRun | None:
    """The parent that an earlier attempt at the run ``path`` was built on, if there was one."""
    parents = (read_json(path / _RUN).get("parents") or {}) if is_run(path) else {}
    return FinishedRun(Path(os.path.normpath(path / parents[role]["path"]))) if role in parents else None


def identity(path: Path) -> str:
    """What no other run is called, and the run ``path`` also when it is moved or goes on."""
    return str(read_json(path / _RUN).get("id", path.name))


def recorded_config(path: Path) -> dict[str, Any]:
    """The config of an earlier attempt at the run ``path``; empty if there was none."""
    return (read_json(path / _RUN).get("config") or {}) if is_run(path) else {}


def runs_in(folder: Path) -> list[Path]:
    """The run directories below ``folder``, finished or not; a sweep's may be nested."""
    return sorted(file.parent for file in folder.rglob(_RUN))


def is_run(path: Path) -> bool:
    """Whether ``path`` is a run directory, finished or not."""
    return (path / _RUN).is_file()
