#!/usr/bin/env bash
# Proves on a GPU what a CPU cannot: kernels, waits, memory, engines, whole steps.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/gpu_check.sh [PART ...] [--device cpu]

Prints a table of checks (ok, failed, skipped) and figures of this machine's GPU, in under ten minutes on one card. The
environment is the one that launch/setup_env.sh made, or the one that ALIGNLAB_PYTHON names, such as a machine's own
with its torch. Parts: machine limits attention paged experts head waits decoding layers caches engine grpo determinism
vllm; all by default. What the machine cannot run is skipped by name. The exit status is 1 where a check has failed.

example: bash launch/gpu_check.sh machine attention waits
TEXT
}

main() {
    case "${1:-}" in -h | --help) usage && return ;; esac
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
    exec "${ALIGNLAB_PYTHON:-${ALIGNLAB_VENV:-.venv}/bin/python}" -m tests.gpu_job "$@"
}

main "$@"
