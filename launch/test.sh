#!/usr/bin/env bash
# Sets up what the tests need, and runs all tests or a fast subset.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/test.sh [--fast] [pytest's arguments]

Sets up .venv with what the tests need (see launch/setup_env.sh) and runs all tests, a process for each core; or pytest
with the given arguments. --fast runs a subset in under two minutes: the mathematics, data, settings, rewards, the
embedded engine, and the conformance of every trainer; no vLLM, no second rank, nothing slow. --full, of pytest, runs
the whole product of trainers, models and precisions on a pretended GPU: bash launch/test.sh tests/gpu --full

example: bash launch/test.sh tests/functional -k kl
TEXT
}

FAST=(
    tests/config tests/data tests/functional tests/models/test_attention.py tests/models/test_moe.py
    tests/models/test_policy.py tests/models/test_transformer.py tests/rewards tests/rollout/embedded tests/runs
    tests/trainers/test_conformance.py
)

main() {
    case "${1:-}" in -h | --help) usage && return ;; esac
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
    bash launch/setup_env.sh tasks,dev,vllm,deepspeed >&2
    # Processes of one thread each: most tests are too small for a second thread.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
    # Whole files, in the order of tests/conftest.py: those with long tests first.
    local spread=(-n logical --maxprocesses 8 --dist loadscope --no-loadscope-reorder)
    # Compiled once, not in each of the processes that tests start.
    unset PYTHONDONTWRITEBYTECODE
    if [[ "${1:-}" == --fast ]]; then
        set -- "${spread[@]}" -m "not slow and not distributed and not vllm" "${FAST[@]}" "${@:2}"
    fi
    (($#)) || set -- "${spread[@]}"
    exec "${ALIGNLAB_VENV:-.venv}/bin/python" -m pytest "$@"
}

main "$@"
