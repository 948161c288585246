#!/usr/bin/env bash
# Runs one training in several processes, on the GPUs or CPU cores of one machine or of several.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/torchrun.sh [--gpus LIST] PROCESSES CONFIG [key=value ...]

Starts PROCESSES ranks of `alignlab train CONFIG` on this machine: one for each GPU; on CPUs the cores are divided among
them. For several machines, run it on each with the same NNODES and RDZV_ENDPOINT.

  --gpus LIST           the GPUs of this machine, such as 4,5,6,7: one for each process, and none that vLLM servers run
                        on; default: the first in view

environment:
  NNODES                machines (default 1)
  RDZV_ENDPOINT         host:port of one of them; needed if NNODES > 1
  RDZV_ID               a name that this run's machines share (default alignlab)
  CUDA_VISIBLE_DEVICES  the GPUs in view; --gpus sets it

example: bash launch/torchrun.sh 2 configs/grpo_tiny_moe_cpu.yaml trainer.num_steps=10
TEXT
}

choose_gpus() {
    local list="$1" processes="$2" gpu='([0-9]+|(GPU|MIG)-[0-9A-Za-z/-]+)' gpus
    if ! [[ "$list" =~ ^$gpu(,$gpu)*$ ]]; then
        echo "torchrun.sh: --gpus is '$list', and must be numbers or UUIDs of GPUs with commas, such as 4,5,6,7" >&2
        exit 2
    fi
    IFS=, read -ra gpus <<<"$list"
    if [[ "$processes" =~ ^[1-9][0-9]*$ ]] && ((${#gpus[@]} < processes)); then
        echo "torchrun.sh: --gpus names ${#gpus[@]} GPUs, and $processes processes need one each; name more, or start" \
            "${#gpus[@]} processes" >&2
        exit 2
    fi
    export CUDA_VISIBLE_DEVICES="$list"
}

main() {
    case "${1:-}" in -h | --help) usage && return ;; esac
    if [[ "${1:-}" == --gpus ]]; then
        choose_gpus "${2:-}" "${3:-}"
        shift 2
    fi
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
