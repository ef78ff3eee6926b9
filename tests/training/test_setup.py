"""What joining the processes asks of torch.distributed and Megatron."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from megatron.core import parallel_state
from training_harness import tiny_config

from nsa_cp.training import setup


@pytest.mark.parametrize(("device", "groups"), [("cuda", ["cp"]), ("cpu", None)])
def test_context_parallel_transfers_have_streams_of_high_priority(tmp_path: Path, device: str, groups: list[str] | None) -> None:
    """On GPUs; gloo has no streams."""
    with (
        mock.patch.multiple(setup, dist=mock.DEFAULT, torch=mock.DEFAULT, enable=mock.DEFAULT),
        mock.patch.object(parallel_state, "initialize_model_parallel", autospec=True) as initialize,
    ):
        setup.init_processes(tiny_config(tmp_path), setup.Launch(), torch.device(device))
    assert initialize.call_args.kwargs["high_priority_stream_groups"] == groups


@pytest.mark.parametrize("variables", [{}, {"MASTER_ADDR": "here"}, {"RANK": "0", "WORLD_SIZE": "1"}])
def test_a_process_alone_needs_no_place_to_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    """Some clusters export MASTER_ADDR to every process."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with (
        mock.patch.multiple(setup, dist=mock.DEFAULT, torch=mock.DEFAULT, enable=mock.DEFAULT) as patched,
        mock.patch.object(parallel_state, "initialize_model_parallel", autospec=True),
    ):
        patched["dist"].is_initialized.return_value = False
        setup.init_processes(tiny_config(tmp_path), setup.Launch.from_environment(), torch.device("cpu"))
    assert "store" in patched["dist"].init_process_group.call_args.kwargs
