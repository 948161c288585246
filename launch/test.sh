#!/usr/bin/env bash
# Makes what the tests need, and runs them all.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/test.sh [pytest's arguments]

Sets up .venv with what the tests need (see launch/setup_env.sh) and runs pytest on tests/, or as its arguments say.

example: bash launch/test.sh tests/functional -k kl
TEXT
}

main() {
    case "${1:-}" in -h | --help) usage && return ;; esac
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
    bash launch/setup_env.sh tasks,dev >&2
    # Two processes with one thread each are quicker than one with two: most tests are too small for a second thread.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
    exec "${ALIGNLAB_VENV:-.venv}/bin/python" -m pytest "$@"
}

main "$@"
