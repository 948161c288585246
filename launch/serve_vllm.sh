#!/usr/bin/env bash
# Starts the vLLM servers of a run, and keeps them running until Ctrl-C.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/serve_vllm.sh CONFIG [key=value ...] [--only ADDRESS]

Starts a vLLM server at each address in CONFIG's trainer.rollout.servers, the first on the first GPU, and so on; then,
in another terminal, `alignlab train CONFIG` with the same key=value. Needs the extra vllm (launch/setup_env.sh vllm).
Servers listen where their addresses say, by default on this machine alone, and require a token, which
servers and training of one account on one file system share without any setting.

environment:
  ALIGNLAB_SERVER_TOKEN  the token, 16 characters or more, the same for servers and training; needed if they are
                         on several machines. The traffic is not encrypted
  CUDA_VISIBLE_DEVICES   the GPUs: one for each server, or as many as trainer.rollout.tensor_parallel; by default the
                         first of the machine. The script says which are left, and how to train on them
  OMP_NUM_THREADS        threads of each server (default: half of the cores, shared out to all servers; the training
                         needs the others)
  ALIGNLAB_VENV          another environment than .venv

On one GPU, servers and training share it: each server takes 45 % of its memory, unless trainer.rollout.memory_frac says
otherwise. On eight, with four servers in CONFIG: CUDA_VISIBLE_DEVICES=0,1,2,3 for this script, and
bash launch/torchrun.sh --gpus 4,5,6,7 4 CONFIG for the training.

example: bash launch/serve_vllm.sh configs/grpo_smollm2_vllm_server.yaml
TEXT
}

main() {
    case "${1:-}" in -h | --help) usage && return ;; esac
    if (($# < 1)); then
        usage >&2
        exit 2
    fi
    exec "${ALIGNLAB_VENV:-$(dirname "${BASH_SOURCE[0]}")/../.venv}/bin/python" -m alignlab serve "$@"
}

main "$@"
