"""The figures of each step: combined over all processes, then written to the terminal, metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterator
from typing import Any, TextIO

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from tqdm import tqdm

from nsa_cp.attention import NativeSparseAttention
from nsa_cp.context_parallel import Traffic
from nsa_cp.training.run_folder import RunFolder
from nsa_cp.training.setup import Trainer

ATTENTION_METRICS = ("remote_block_fraction", "remote_blocks_needed", "gate_compressed", "gate_selected", "gate_window")
_GIB = 2**30


def attention_modules(trainer: Trainer) -> Iterator[NativeSparseAttention]:
    """The NSA modules of this process's layers, in order."""
    for chunk in trainer.chunks:
        for module in chunk.modules():
            if isinstance(module, NativeSparseAttention):
                yield module


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: of PyTorch's allocator on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def agree(trainer: Trainer, losses: Tensor, traffic: Traffic, *, stop: bool) -> dict[str, float]:
    """Combine one step's figures over all processes, by one sum and one maximum. Collective.

    Args:
        losses: [2] float64, this process's sum of token losses and token count (see ``run_schedule``).
        traffic: bytes that context parallelism moved on this process in the step.
        stop: whether this process was asked to stop.

    Returns:
        ``loss`` (nats a token), ``tokens``, ``stop`` (number of processes that were asked to stop), ``peak_memory_bytes``,
        ``attention_bytes_sent`` and ``attention_bytes_received`` (each the largest over processes), and, if there are NSA
        layers, the mean of each of ``ATTENTION_METRICS`` over layers and processes.
    """
    tensor_parallel = parallel_state.get_tensor_model_parallel_world_size()
    modules = [module.last_metrics for module in attention_modules(trainer) if module.last_metrics]
    parts = [losses.to(trainer.device) / tensor_parallel]  # tensor-parallel processes hold the same tokens
    parts.append(torch.tensor([float(stop), float(len(modules))], dtype=torch.float64, device=trainer.device))
    for name in ATTENTION_METRICS:
        values = [metrics[name].double().reshape(1) for metrics in modules]
        parts.append(
            torch.cat(values).sum(0, keepdim=True) if values else torch.zeros(1, dtype=torch.float64, device=trainer.device)
        )
    vector = torch.cat(parts)
    largest = [float(peak_memory_bytes(trainer.device)), float(traffic.sent), float(traffic.received)]
    most = torch.tensor(largest, dtype=torch.float64, device=trainer.device)
    dist.all_reduce(vector)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    total, tokens, stops, layers, *attention = vector.tolist()
    row = {"loss": total / max(tokens, 1.0), "tokens": tokens, "stop": stops}
    row.update(zip(("peak_memory_bytes", "attention_bytes_sent", "attention_bytes_received"), most.tolist(), strict=True))
    if layers:
        row.update({name: value / layers for name, value in zip(ATTENTION_METRICS, attention, strict=True)})
    return row


class Reporter:
    """Writes a run's metrics, one row a step, and messages; on processes other than the first it does nothing.

    Args:
        folder: the run's folder, which must exist.
        active: whether this is the first process.
        first_step: steps done before, for the progress bar and TensorBoard.
        num_steps: steps of the whole run.
        log_interval: steps between printed lines.
        stream: where lines and the bar go; a bar is shown only when it is a terminal.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        active: bool,
        first_step: int,
        num_steps: int,
        log_interval: int,
        stream: TextIO | None = None,
    ) -> None:
        self.active, self.num_steps, self.log_interval = active, num_steps, log_interval
        self.stream = sys.stdout if stream is None else stream
        self._bar: Any = None
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and of use to one process only

        self._file = open(folder.metrics, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self._board = SummaryWriter(str(folder.tensorboard), purge_step=first_step + 1)
        if self.stream.isatty():
            self._bar = tqdm(total=num_steps, initial=first_step, file=self.stream, unit="step", dynamic_ncols=True)

    def say(self, text: str) -> None:
        """Print a line without tearing the progress bar."""
        if not self.active:
            return
        if self._bar is not None:
            self._bar.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)

    def write(self, row: dict[str, Any]) -> None:
        """Record one step: a line of metrics.jsonl, TensorBoard scalars, and every ``log_interval`` steps a printed line."""
        if not self.active:
            return
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name != "step" and not isinstance(value, str):
                self._board.add_scalar(name, value, row["step"])
        if self._bar is not None:
            self._bar.update(row["step"] - self._bar.n)
        if row["step"] % self.log_interval == 0 or row["step"] == self.num_steps or "val_bits_per_byte" in row:
            self.say(format_row(row, self.num_steps))

    def close(self) -> None:
        """Flush and close the files."""
        if not self.active:
            return
        self._file.close()
        self._board.close()
        if self._bar is not None:
            self._bar.close()


def format_row(row: dict[str, Any], num_steps: int) -> str:
    """One step's metrics as a line for the terminal."""
    parts = [
        f"step {row['step']:>{len(str(num_steps))}}/{num_steps}",
        f"loss {row['loss']:.4f}",
        f"grad norm {row['grad_norm']:.3f}",
        f"lr {row['lr']:.2e}",
        f"{row['tokens_per_second']:,.0f} tokens/s",
        f"peak {row['peak_memory_bytes'] / _GIB:.2f} GiB",
    ]
    if "remote_block_fraction" in row:
        parts.append(f"remote blocks {100 * row['remote_block_fraction']:.1f}%")
    if "val_bits_per_byte" in row:
        parts.append(f"validation {row['val_bits_per_byte']:.4f} bits/byte")
    return " | ".join(parts)
