#!/usr/bin/env bash
# Makes what the tests need, and runs them all.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/test.sh [pytest's arguments]

Sets up .venv with what the tests need (see launch/setup_env.sh) and runs all tests, a process for each core; or pytest
as its arguments say.

example: bash launch/test.sh tests/functional -k kl
TEXT
}

main() {
    case "${1:-}" in -h | --help) usage && return ;; esac
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
    bash launch/setup_env.sh tasks,dev,vllm >&2
    # Processes of one thread each: most tests are too small for a second thread.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
    (($#)) || set -- -n logical --maxprocesses 8 --dist loadscope
    exec "${ALIGNLAB_VENV:-.venv}/bin/python" -m pytest "$@"
}

main "$@"
