#!/usr/bin/env bash
# Runs one training in several processes, on the GPUs or CPU cores of one machine or of several.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/torchrun.sh PROCESSES CONFIG [key=value ...]

Starts PROCESSES ranks of `alignlab train CONFIG` on this machine: one for each GPU; on CPUs the cores are divided among
them. For several machines, run it on each with the same NNODES and RDZV_ENDPOINT.

environment:
  NNODES                machines (default 1)
  RDZV_ENDPOINT         host:port of one of them; needed if NNODES > 1
  RDZV_ID               a name that this run's machines share (default alignlab)
  CUDA_VISIBLE_DEVICES  the GPUs, one for each process; leave out those that vLLM servers run on

example: bash launch/torchrun.sh 2 configs/grpo_tiny_moe_cpu.yaml trainer.num_steps=10
TEXT
}

main() {
    case "${1:-}" in -h | --help) usage && return ;; esac
    if (($# < 2)) || ! [[ "$1" =~ ^[1-9][0-9]*$ ]]; then
        usage >&2
        exit 2
    fi
    local processes="$1" python cores rendezvous=(--standalone)
    shift
    python="${ALIGNLAB_VENV:-$(dirname "${BASH_SOURCE[0]}")/../.venv}/bin/python"
    cores="$(nproc 2>/dev/null || sysctl -n hw.ncpu)"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores / processes > 0 ? cores / processes : 1))}"
    if ((${NNODES:-1} > 1)); then
        : "${RDZV_ENDPOINT:?is needed if NNODES > 1, such as host0:29500}"
        rendezvous=(--nnodes "$NNODES" --rdzv_backend c10d --rdzv_endpoint "$RDZV_ENDPOINT")
        rendezvous+=(--rdzv_id "${RDZV_ID:-alignlab}")
    fi
    exec "$python" -m torch.distributed.run "${rendezvous[@]}" --nproc_per_node "$processes" -m alignlab train "$@"
}

main "$@"
