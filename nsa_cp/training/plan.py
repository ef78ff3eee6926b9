"""Checks a run's configuration, data, folder and checkpoint before any process waits for another; the result is a ``Plan``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nsa_cp.megatron import check_apex
from nsa_cp.training.config import RunConfig
from nsa_cp.training.config_checks import check_world
from nsa_cp.training.data import SampleSource, load_text
from nsa_cp.training.device import choose_device
from nsa_cp.training.errors import UserError, as_user_error
from nsa_cp.training.indexed import IndexedSource
from nsa_cp.training.manifest import check_compatible, check_initial, find_initial, find_latest, read_manifest
from nsa_cp.training.run_folder import RunFolder
from nsa_cp.training.setup import Launch


@dataclass
class Plan:
    """A checked run: all that is known of it before any process waits for another.

    Attributes:
        config: the run, with its vocabulary size filled in.
        launch: this process's place among the others.
        device: this process's device.
        source: the data.
        folder: the run's folder.
        checkpoint: the checkpoint to resume from and its manifest, or None.
        initial: the checkpoint whose weights a new run begins with (``train.init_from``) and its manifest, or None.
    """

    config: RunConfig
    launch: Launch
    device: torch.device
    source: SampleSource
    folder: RunFolder
    checkpoint: tuple[Path, dict[str, Any]] | None = None
    initial: tuple[Path, dict[str, Any]] | None = None


def prepare(config: RunConfig, *, resume: bool = False, overwrite: bool = False, for_training: bool = True) -> Plan:
    """Check everything that can be wrong with the input. Local: no process group, no model, nothing written to disk.

    Args:
        config: a resolved run.
        resume: the run is to go on from its newest checkpoint.
        overwrite: the run may replace one of the same name.
        for_training: False for evaluation, which starts no run.

    Raises:
        UserError: what is wrong, in one sentence.
    """
    launch = Launch.from_environment()
    with as_user_error():
        check_apex()
    check_world(config, launch.world_size, for_training=for_training)
    device = choose_device(config.train.device, launch.local_rank)
    source = open_source(config)
    if config.data.vocab_size is None:
        config = config.model_copy(update={"data": config.data.model_copy(update={"vocab_size": source.vocab_size})})
    folder = RunFolder(config.run_dir)
    plan = Plan(config, launch, device, source, folder)
    if for_training:
        folder.check_start(resume=resume, overwrite=overwrite)
    if resume:
        path = find_latest(folder.checkpoints)
        manifest = read_manifest(path)
        check_compatible(manifest, config, path)
        plan.checkpoint = (path, manifest)
    elif for_training and config.train.init_from is not None:
        path = find_initial(config.train.init_from, folder.path)
        manifest = read_manifest(path)
        check_initial(manifest, config, path)
        plan.initial = (path, manifest)
    return plan


def open_source(config: RunConfig) -> SampleSource:
    """The run's data, checked but not yet indexed.

    Raises:
        UserError: missing, unreadable or insufficient data.
    """
    if config.data.kind == "indexed":
        source = IndexedSource(config.data, config.seed)
        if source.vocab_size % config.parallel.tensor:
            raise UserError(
                f"the vocabulary of {source.vocab_size} tokens is not divisible by parallel.tensor = {config.parallel.tensor}; "
                f"pad data.vocab_file or give data.vocab_size instead"
            )
        return source
    return load_text(config.data, config.seed)
