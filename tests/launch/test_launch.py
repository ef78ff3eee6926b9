"""The launchers: shell syntax, the commands they build, and training and parity under a real mpirun."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SHELL_FILES = [LAUNCH / "torchrun.sh", LAUNCH / "slurm.sbatch", ROOT / ".ci" / "run", ROOT / ".ci" / "setup"]
SHORT_RUN = ("name=short", "data.sequence_length=512", "train.steps=2", "train.warmup_steps=1", "train.eval_sequences=1",
             "sample.tokens=4")  # fmt: skip
RENDEZVOUS = ("NNODES", "MASTER_ADDR", "MASTER_PORT", "NPROC_PER_NODE", "JOB_ID", "PYTHON", "RANK", "WORLD_SIZE", "LOCAL_RANK")


def run(command, *, env=None, timeout=60, cwd=ROOT):
    """The finished process of ``command`` with ``env`` on top of an environment without rendezvous variables."""
    clean = {name: value for name, value in os.environ.items() if name not in RENDEZVOUS and not name.startswith("SLURM_")}
    return subprocess.run(
        [str(part) for part in command],
        env={**clean, **(env or {})}, cwd=cwd, timeout=timeout, stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def echo(tmp_path) -> Path:
    """A stand-in for the interpreter that prints its arguments, one a line."""
    return script(tmp_path / "echo_arguments", '#!/bin/sh\nprintf "%s\\n" "$@"\n')


@pytest.mark.parametrize("path", SHELL_FILES, ids=lambda path: path.name)
def test_shell_syntax(path):
    checked = run(["bash", "-n", path])
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("path", sorted(p for p in LAUNCH.iterdir() if p.is_file()), ids=lambda path: path.name)
def test_every_launcher_opens_with_its_usage(path):
    assert "Usage" in "".join(path.read_text().splitlines(keepends=True)[:3])


def test_torchrun_on_one_node_keeps_to_this_machine(echo):
    done = run(["bash", LAUNCH / "torchrun.sh", "train", "a b.yaml", "x=1"], env={"PYTHON": str(echo), "NPROC_PER_NODE": "2"})
    assert done.returncode == 0, done.stderr
    arguments = done.stdout.splitlines()
    assert arguments[:2] == ["-m", "torch.distributed.run"]
    assert arguments[arguments.index("--nnodes") + 1] == "1"
    assert arguments[arguments.index("--nproc-per-node") + 1] == "2"
    assert arguments[arguments.index("--rdzv-endpoint") + 1] == "127.0.0.1:0"
    assert arguments[-5:] == ["-m", "nsa_cp.cli.main", "train", "a b.yaml", "x=1"]


def test_torchrun_on_many_nodes_meets_at_the_named_one(echo):
    env = {"PYTHON": str(echo), "NNODES": "4", "MASTER_ADDR": "node7", "MASTER_PORT": "31000", "JOB_ID": "42"}
    arguments = run(["bash", LAUNCH / "torchrun.sh", "train", "c.yaml"], env=env).stdout.splitlines()
    assert arguments[arguments.index("--nnodes") + 1] == "4"
    assert arguments[arguments.index("--rdzv-endpoint") + 1] == "node7:31000"
    assert arguments[arguments.index("--rdzv-id") + 1] == "42"
    assert "--local-addr" not in arguments


def test_torchrun_on_many_nodes_needs_an_address(echo):
    done = run(["bash", LAUNCH / "torchrun.sh", "train"], env={"PYTHON": str(echo), "NNODES": "2"})
    assert done.returncode != 0
    assert "MASTER_ADDR" in done.stderr and "all nodes can reach" in done.stderr


def test_slurm_takes_the_rendezvous_from_the_node_list(tmp_path, echo):
    tools = tmp_path / "bin"
    tools.mkdir()
    script(tools / "scontrol", '#!/bin/sh\n[ "$*" = "show hostnames gpu[3-5]" ] && printf "gpu3\\ngpu4\\ngpu5\\n"\n')
    script(tools / "srun", '#!/bin/sh\n[ "$1" = --kill-on-bad-exit=1 ] || exit 3\nshift\nexec "$@"\n')
    spooled = shutil.copy(LAUNCH / "slurm.sbatch", tmp_path / "slurm_script")  # where sbatch runs its copy is not the checkout
    env = {
        "PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": str(echo), "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "gpu[3-5]", "SLURM_JOB_NUM_NODES": "3", "SLURM_GPUS_ON_NODE": "8",
    }  # fmt: skip
    done = run(["bash", spooled, "train", "c.yaml", "train.steps=7"], env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    arguments = done.stdout.splitlines()
    assert arguments[arguments.index("--nnodes") + 1] == "3"
    assert arguments[arguments.index("--nproc-per-node") + 1] == "8"
    assert arguments[arguments.index("--rdzv-endpoint") + 1] == "gpu3:23456"
    assert arguments[-2:] == ["c.yaml", "train.steps=7"]


def mpirun(*arguments, timeout=120, env=None):
    """``mpirun -n 2 python ...`` with this environment's MPI, else the machine's."""
    beside = Path(sys.executable).with_name("mpirun")
    command = str(beside) if beside.exists() else shutil.which("mpirun")
    if command is None or importlib.util.find_spec("mpi4py") is None:
        pytest.skip("no mpirun or no mpi4py here: pip install 'nsa-cp[mpi]'")
    env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(env or {})}
    return run([command, "-n", "2", sys.executable, *arguments], timeout=timeout, env=env)


@pytest.mark.distributed
def test_parity_under_mpirun():
    done = mpirun(ROOT / "tests" / "launch" / "mpi_parity.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(re.findall(r"rank (\d) of 2 agrees on \d+ of 131 rows", done.stdout)) == ["0", "1"]


@pytest.mark.distributed
def test_training_two_steps_under_mpirun(tmp_path):
    config = ROOT / "configs" / "quickstart.yaml"
    done = mpirun(LAUNCH / "mpirun.py", "train", config, *SHORT_RUN, f"runs_dir={tmp_path}", timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "short" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines][-1] == 2


@pytest.mark.distributed
@pytest.mark.parametrize(
    "fault",
    [
        "raise RuntimeError(f'rank 1 had enough of {arguments}')",
        "print(f'rank 1 had enough of {arguments}', file=sys.stderr); return 2",
    ],
    ids=["raises", "refuses"],
)
def test_one_failing_rank_ends_the_job(tmp_path, fault):
    program = tmp_path / "nsa_cp" / "cli"
    program.mkdir(parents=True)
    (program.parent / "__init__.py").touch()
    (program / "__init__.py").touch()
    (program / "main.py").write_text(
        "import os, sys, time\n"
        "def main(arguments):\n"
        "    if os.environ['RANK'] == '1':\n"
        f"        {fault}\n"
        "    time.sleep(600)\n"
    )
    done = mpirun(LAUNCH / "mpirun.py", "train", env={"PYTHONPATH": str(tmp_path)}, timeout=60)
    assert done.returncode != 0
    assert "rank 1 had enough of ['train']" in done.stderr
