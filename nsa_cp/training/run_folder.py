"""The folder ``runs/<name>/`` of a run: paths of its files, who may start a run in it, and what the first process writes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import yaml

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

from nsa_cp.training.config import RunConfig, differences
from nsa_cp.training.config_load import load_config
from nsa_cp.training.errors import UserError
from nsa_cp.training.files import json_lines, write_atomically
from nsa_cp.training.manifest import CHECKPOINTS, LATEST, find_latest

_LONGEST_NAME = 255  # bytes, on the file systems of Linux and macOS


class RunFolder:
    """Paths of one run, and the few operations on them. Construction creates nothing on disk.

    Args:
        path: ``runs/<name>``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config, self.metrics, self.summary = path / "config.yaml", path / "metrics.jsonl", path / "summary.json"
        self.loss_plot, self.blocks_plot, self.sample = path / "loss.png", path / "blocks.png", path / "sample.txt"
        self.tensorboard, self.checkpoints, self.index_cache = path / "tensorboard", path / CHECKPOINTS, path / "index_cache"
        self._lock: int | None = None

    def exists(self) -> bool:
        """Whether a run has begun here."""
        return any(item.exists() for item in (self.config, self.metrics, self.checkpoints))

    def check_start(self, *, resume: bool, overwrite: bool) -> None:
        """Refuse to mix two runs. Changes nothing.

        Raises:
            UserError: the run exists and neither flag was given, both flags were given, or the path is not a folder or cannot be.
        """
        if resume and overwrite:
            raise UserError("--resume and --overwrite exclude each other; give one of them")
        if (length := len(os.fsencode(self.path.name))) > _LONGEST_NAME:
            raise UserError(f"name = {self.path.name[:20]}... has {length} bytes; a folder's name has at most {_LONGEST_NAME}")
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; choose another name= or runs_dir=")
        if self.exists() and not resume and not overwrite:
            go_on = "go on with --resume, " if (self.checkpoints / LATEST).is_file() else "it has no checkpoint yet; "
            raise UserError(f"run {self.path} exists; {go_on}begin again with --overwrite, or choose another name=")

    def hold(self, *, checkpoint: Path | None, overwrite: bool) -> None:
        """Lock the folder and check again what was checked without the lock: a run may have begun, gone on or ended here since.

        For the first process only.

        Args:
            checkpoint: the one that the run resumes from, None for a new run.
            overwrite: the run may replace one of the same name.

        Raises:
            UserError: another process is at work on this run, or was meanwhile; nothing has been changed then.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        self.check_start(resume=checkpoint is not None, overwrite=overwrite)
        if checkpoint is not None and (newest := find_latest(self.checkpoints)) != checkpoint:
            raise UserError(f"run {self.path} went on meanwhile, from {checkpoint.name} to {newest.name}; start again")

    def begin(self, config: RunConfig, *, overwrite: bool) -> list[str]:
        """Start or resume a run here: lock the folder, write config.yaml, and remove what an earlier end of the run wrote.

        For the first process only.

        Args:
            config: the resolved run.
            overwrite: remove what an earlier run left (only files that a run writes).

        Returns:
            Messages for the user: settings in which a resumed run differs from its earlier part, each with both values (the
            earlier file is then kept as ``config_before_1.yaml``, 2 and so on), and how many lines of metrics.jsonl are
            unreadable.

        Raises:
            UserError: another process is at work on this run; nothing has been changed then.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        if overwrite:
            self._remove()
        # If the run had ended before, a reader would take the files of that end for the resumed run's.
        for item in (self.summary, self.loss_plot, self.blocks_plot, self.sample):
            item.unlink(missing_ok=True)
        changes = []
        if self.config.is_file():
            changes = list(differences(_settings(self.config), config.model_dump(mode="json")))
            if changes:
                before = self.config.read_text(encoding="utf-8")
                write_atomically(self.path / f"config_before_{len(self._earlier_configs()) + 1}.yaml", before)
        write_atomically(self.config, config.to_yaml())
        if damaged := self._set_damaged_metrics_aside():
            changes.append(f"{damaged} lines of {self.metrics.name} cannot be read and are left out; the old file is beside it")
        return changes

    def close(self) -> None:
        """Release the lock, so that others may start a run in the folder; without effect before :meth:`begin`."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take_lock(self) -> None:
        """Lock the folder until :meth:`close` or the end of the process; where such locks do not exist, do nothing."""
        if fcntl is None or self._lock is not None:
            return
        self._lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise UserError(
                f"another process is at work on run {self.path}; wait for its end, or choose another name="
            ) from error
        except OSError:  # some network file systems
            self.close()

    def _set_damaged_metrics_aside(self) -> int:
        """Keep a copy of a metrics.jsonl that has unreadable lines; returns their number, not counting an incomplete last one."""
        if not self.metrics.is_file():
            return 0
        content = self.metrics.read_bytes()
        complete, _, _ = content.rpartition(b"\n")
        damaged = content.count(b"\n") - len(_rows(complete))
        if damaged:
            number = len(list(self.path.glob("metrics_damaged_*.jsonl"))) + 1
            shutil.copyfile(self.metrics, self.path / f"metrics_damaged_{number}.jsonl")
        return damaged

    def _earlier_configs(self) -> list[Path]:
        return list(self.path.glob("config_before_*.yaml"))

    def keep_metrics_until(self, step: int) -> float:
        """Drop the metrics of steps after ``step``, which a resumed run will write again. For the first process only.

        Returns:
            Seconds of training up to ``step``, over all earlier parts of the run.
        """
        rows = [row for row in read_metrics(self.metrics) if row["step"] <= step]
        write_atomically(self.metrics, "".join(json.dumps(row) + "\n" for row in rows))
        return float(rows[-1].get("wall_seconds", 0.0)) if rows else 0.0

    def _remove(self) -> None:
        for item in (self.config, self.metrics, *self._earlier_configs(), *self.path.glob("metrics_damaged_*.jsonl")):
            item.unlink(missing_ok=True)
        for item in (self.tensorboard, self.checkpoints, self.index_cache):
            if item.is_dir():
                shutil.rmtree(item)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl, one per step; unreadable lines are left out."""
    return _rows(path.read_bytes()) if path.is_file() else []


def _rows(content: bytes) -> list[dict[str, Any]]:
    return [row for row in json_lines(content) if isinstance(row.get("step"), int)]


def _settings(file: Path) -> dict[str, Any]:
    """Settings in a config.yaml: unchecked ones if this version refuses the file, and none if it is no mapping at all."""
    try:
        return load_config(file).model_dump(mode="json")
    except UserError:
        pass
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError):
        found = None
    return found if isinstance(found, dict) else {}
