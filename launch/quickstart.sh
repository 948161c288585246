#!/usr/bin/env bash
# Sets up the environment and trains a small language model by reinforcement learning on a CPU.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/quickstart.sh [key=value ...]

Sets up .venv (see launch/setup_env.sh) and trains SmolLM2-135M-Instruct with GRPO and LoRA by
configs/grpo_smollm2_cpu.yaml; key=value replaces settings. Started again, it goes on with a run that was interrupted,
and begins a new one beside a run that is finished: no result is overwritten. The last line of standard output is the
result as JSON.

example: bash launch/quickstart.sh trainer.num_steps=10
TEXT
}

CONFIG=configs/grpo_smollm2_cpu.yaml
RUNS=runs/grpo_smollm2_cpu

taken() { # Succeeds if a folder holds a run that is finished, or that has no checkpoint to resume from.
    [[ -e "$1/report.json" ]] || { [[ -e "$1/starts.jsonl" ]] && [[ -z "$(ls "$1/checkpoints" 2>/dev/null)" ]]; }
}

main() {
    case "${1:-}" in -h | --help) usage && return ;; esac
    local here python number=1 folder="$RUNS" word options=()
    here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    bash "$here/launch/setup_env.sh" tasks >&2
    cd "$here"
    python="${ALIGNLAB_VENV:-.venv}/bin/python"
    export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" # The model comes in a package: nothing is fetched from the Hub.

    for word in "$@"; do
        if [[ "$word" == trainer.output_dir=* || "$word" == --resume ]]; then # The user chooses the folder.
            exec "$python" -m alignlab train "$CONFIG" "$@"
        fi
    done
    while taken "$folder"; do
        number=$((number + 1))
        folder="$RUNS-$number"
    done
    if [[ -e "$folder/starts.jsonl" ]]; then
        printf 'quickstart: going on with the interrupted run in %s\n' "$folder" >&2
        options=(--resume)
    elif ((number > 1)); then
        printf 'quickstart: earlier results stay; this run goes to %s\n' "$folder" >&2
    fi
    exec "$python" -m alignlab train "$CONFIG" "trainer.output_dir=$folder" ${options[@]+"${options[@]}"} "$@"
}

main "$@"
