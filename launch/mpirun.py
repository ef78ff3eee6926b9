"""Usage: mpirun -n 2 python launch/mpirun.py train configs/quickstart.yaml [key=value ...]

MPI starts the processes and hands out rank, world size, local rank and the rendezvous address; torch.distributed does the
rest. What follows the script's name is the command line of `nsa-cp`. Needs mpi4py (`pip install "nsa-cp[mpi]"`).
"""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpi4py import MPI

_SECONDS_TO_FORWARD = 1.0


def torch_environment(comm: MPI.Comm) -> dict[str, str]:
    """The variables that torch.distributed's ``env://`` reads, for this process of ``comm`` (a collective call).

    Returns:
        RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, and rank 0's MASTER_ADDR and a port free there as MASTER_PORT.
    """
    from mpi4py import MPI

    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    local_rank, local_size = node.Get_rank(), node.Get_size()
    node.Free()
    address = None
    if comm.Get_rank() == 0:
        host = "127.0.0.1" if local_size == comm.Get_size() else socket.getfqdn()
        with socket.socket() as listener:
            listener.bind(("", 0))
            address = host, listener.getsockname()[1]
    host, port = comm.bcast(address)
    return {
        "RANK": str(comm.Get_rank()),
        "WORLD_SIZE": str(comm.Get_size()),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_size),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
    }


def main(arguments: list[str]) -> int:
    """Run ``nsa-cp`` with ``arguments`` in this process of ``MPI.COMM_WORLD``; returns its exit status."""
    from mpi4py import MPI

    os.environ.update(torch_environment(MPI.COMM_WORLD))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        from nsa_cp.cli.main import main as nsa_cp_main

        status = nsa_cp_main(arguments)
        if status:
            # Bad input may be seen by some ranks only, a file missing on one machine for example.
            _abort(status)
        return status
    except Exception:
        # The other ranks wait for this one in a collective and would never end: MPI ends the job.
        sys.stderr.write(traceback.format_exc())
        _abort(1)
        raise


def _abort(status: int) -> None:
    """End all ranks, after what this one has said."""
    from mpi4py import MPI

    sys.stdout.flush()
    sys.stderr.flush()
    # The launcher forwards what ranks write, and drops what it has not read when it is told to abort.
    time.sleep(_SECONDS_TO_FORWARD)
    MPI.COMM_WORLD.Abort(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
