"""The folder ``runs/<name>/``: what is in it, who may begin in it, and its files as they are written by the first process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from nsa_cp.training.config import RunConfig, differences
from nsa_cp.training.errors import UserError
from nsa_cp.training.files import write_atomically
from nsa_cp.training.manifest import CHECKPOINTS, LATEST


class RunFolder:
    """Paths of one run, and the few operations on them. Nothing is created by constructing it.

    Args:
        path: ``runs/<name>``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config, self.metrics, self.summary = path / "config.yaml", path / "metrics.jsonl", path / "summary.json"
        self.loss_plot, self.blocks_plot, self.sample = path / "loss.png", path / "blocks.png", path / "sample.txt"
        self.tensorboard, self.checkpoints, self.index_cache = path / "tensorboard", path / CHECKPOINTS, path / "index_cache"

    def exists(self) -> bool:
        """Whether a run has begun here."""
        return any(item.exists() for item in (self.config, self.metrics, self.checkpoints))

    def check_start(self, *, resume: bool, overwrite: bool) -> None:
        """Refuse to mix two runs. Reads only.

        Raises:
            UserError: the run exists and neither flag was given, or both were, or the path is not a folder.
        """
        if resume and overwrite:
            raise UserError("--resume and --overwrite exclude each other; give one of them")
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; choose another name= or runs_dir=")
        if self.exists() and not resume and not overwrite:
            go_on = "go on with --resume, " if (self.checkpoints / LATEST).is_file() else "it has no checkpoint yet; "
            raise UserError(f"run {self.path} exists; {go_on}begin again with --overwrite, or choose another name=")

    def begin(self, config: RunConfig, *, overwrite: bool) -> list[str]:
        """Create the folder with its config.yaml. For the first process only.

        Args:
            config: the resolved run.
            overwrite: remove what an earlier run left (only files that a run writes).

        Returns:
            Settings in which a run that goes on differs from its part before, each with both values. That part's file then stays
            as ``config_before_1.yaml``, 2 and so on.
        """
        if overwrite:
            self._remove()
        self.path.mkdir(parents=True, exist_ok=True)
        changes = []
        if self.config.is_file():
            before = self.config.read_text(encoding="utf-8")
            changes = list(differences(_settings(before), config.model_dump(mode="json")))
            if changes:
                write_atomically(self.path / f"config_before_{len(self._earlier_configs()) + 1}.yaml", before)
        write_atomically(self.config, config.to_yaml())
        return changes

    def _earlier_configs(self) -> list[Path]:
        return list(self.path.glob("config_before_*.yaml"))

    def keep_metrics_until(self, step: int) -> float:
        """Drop metrics of steps after ``step``: a resumed run writes them again. For the first process only.

        Returns:
            Seconds of training up to ``step`` over all earlier parts of the run.
        """
        rows = [row for row in read_metrics(self.metrics) if row["step"] <= step]
        write_atomically(self.metrics, "".join(json.dumps(row) + "\n" for row in rows))
        return float(rows[-1]["wall_seconds"]) if rows else 0.0

    def _remove(self) -> None:
        files = (self.config, self.metrics, self.summary, self.loss_plot, self.blocks_plot, self.sample)
        for item in (*files, *self._earlier_configs()):
            item.unlink(missing_ok=True)
        for item in (self.tensorboard, self.checkpoints, self.index_cache):
            if item.is_dir():
                shutil.rmtree(item)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; a last line that a crash cut short is left out."""
    rows: list[dict[str, Any]] = []
    if not path.is_file():
        return rows
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _settings(text: str) -> dict[str, Any]:
    """Of a config.yaml; none where somebody has made it something else."""
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        found = None
    return found if isinstance(found, dict) else {}
