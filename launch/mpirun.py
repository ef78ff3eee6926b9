"""Usage: mpirun -n 2 python launch/mpirun.py train configs/quickstart.yaml [key=value ...]

MPI starts the processes and tells them rank, world size, local rank and the rendezvous address; torch.distributed does the
rest. All arguments are the command line of `nsa-cp`. Needs mpi4py (`pip install "nsa-cp[mpi]"`).
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
    """The environment variables that torch.distributed's ``env://`` reads, for this process of ``comm``. Collective.

    Returns:
        RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR (the host of rank 0) and MASTER_PORT (a port free there).
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
    """Run ``nsa-cp`` with ``arguments`` on this rank of ``MPI.COMM_WORLD``; returns its exit status."""
    from mpi4py import MPI

    os.environ.update(torch_environment(MPI.COMM_WORLD))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        from nsa_cp.cli.main import main as nsa_cp_main

        status = nsa_cp_main(arguments)
        if status:
            # The other ranks may not have noticed the bad input, for example a file missing on one machine.
            _abort(status)
        return status
    except Exception:
        # The other ranks may wait for this one in a collective forever, so MPI must end the job.
        sys.stderr.write(traceback.format_exc())
        _abort(1)
        raise


def _abort(status: int) -> None:
    """End all ranks, once this one's output has been forwarded."""
    from mpi4py import MPI

    sys.stdout.flush()
    sys.stderr.flush()
    # The launcher forwards the ranks' output, and drops what it has not read by the time it is told to abort.
    time.sleep(_SECONDS_TO_FORWARD)
    MPI.COMM_WORLD.Abort(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
