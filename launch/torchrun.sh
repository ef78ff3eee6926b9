#!/usr/bin/env bash
# Usage, one node:    NPROC_PER_NODE=2 bash launch/torchrun.sh train configs/quickstart.yaml [key=value ...]
# Usage, many nodes:  NNODES=8 MASTER_ADDR=node0 NPROC_PER_NODE=8 bash launch/torchrun.sh train configs/multinode_1b.yaml    (on each)
#
# All arguments are the command line of `nsa-cp`, which every process runs. From the environment (defaults in brackets):
#   NPROC_PER_NODE   processes on this node (one per GPU; without a GPU one per CPU core)
#   NNODES           number of nodes (1); if more, MASTER_ADDR is a node that all can reach and MASTER_PORT (29500) a port there
#   JOB_ID           any name that tells concurrent jobs on the same nodes apart (nsa-cp)
#   PYTHON           interpreter (the checkout's .venv, else python3)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv_python=$here/../.venv/bin/python
[ -x "$venv_python" ] || venv_python=python3
if [ "${NNODES:-1}" = 1 ]; then
    rendezvous=(--rdzv-endpoint 127.0.0.1:0 --local-addr 127.0.0.1)
else
    rendezvous=(--rdzv-endpoint "${MASTER_ADDR:?set it to a node that all nodes can reach}:${MASTER_PORT:-29500}")
fi
# On SIGTERM the processes save a checkpoint; torchrun would kill them after 30 seconds. (Older PyTorch ignores this.)
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-170}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "${PYTHON:-$venv_python}" -m torch.distributed.run --nnodes "${NNODES:-1}" --nproc-per-node "${NPROC_PER_NODE:-auto}" \
    --rdzv-backend c10d --rdzv-id "${JOB_ID:-nsa-cp}" "${rendezvous[@]}" -m nsa_cp.cli.main "$@"
