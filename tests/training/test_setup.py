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
