"""What a weight update of vLLM costs: all weights merged against the adapter alone, and what its proof adds.

    python -m tests.bench.bench_sync [--model smollm2-135m-instruct] [--rounds 10]

LoRA on all linear layers, bfloat16; vLLM in process, and in a server of this machine. Each way runs in a process of its
own. Prints a table, and JSON last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

from tests.bench.servers import served

WAYS = ("merged", "adapter", "server-merged", "server-adapter")


def measure(model_name: str, way: str, rounds: int) -> dict[str, Any]:
    """Median seconds of an update without its proof, and of the proof's parts."""
    import torch

    from alignlab.config.model import LoraSettings
    from alignlab.config.rollout import VLLMSettings
    from alignlab.models.adapters import add_lora
    from alignlab.models.checkpoints import load_model, load_tokenizer
    from alignlab.rollout.engines import make_engine

    model = add_lora(load_model(model_name, dtype=torch.bfloat16), LoraSettings(rank=16))
    tokenizer, sync = load_tokenizer(model_name), way.removeprefix("server-")
    # Every other update has no proof.
    proving = {"cache_gib": 1, "block_size": 32, "canary_every_updates": 2}
    if way != sync:
        with served(model, tokenizer, lora_rank=16 if sync == "adapter" else 0, sync=sync, **proving) as engine:
            return timings(engine, rounds)
    return timings(make_engine(model, tokenizer, VLLMSettings(sync=sync, digests_every_updates=2, **proving)), rounds)


def timings(engine: Any, rounds: int) -> dict[str, Any]:
    """Median seconds of an update without its proof, and of the proof's parts: digests on both sides, the canary."""
    from alignlab.config.rollout import VLLMSettings
    from alignlab.rollout.weight_proof import digests

    taken: dict[str, list[float]] = {"update": [], "digests": [], "canary": []}

    def timed(name: str, function: Any) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **options)
            taken[name].append(time.perf_counter() - start)
            return result

        return run

    replace = engine._replace_weights

    def replace_and_digest(version: int) -> Any:
        sent = replace(version)
        timed("digests", digests)(sent)
        return sent

    engine._canary = timed("canary", engine._canary)
    for version in range(1, 2 * rounds + 1):
        engine._replace_weights = timed("update", replace)
        if version % 2:
            engine._replace_weights = replace_and_digest
        engine.update_weights(version)
    update, one_side, canary_s = (statistics.median(taken[name]) for name in ("update", "digests", "canary"))
    # What is loaded is digested at every update; by a server's trainer too.
    bare = update - one_side * (2 if hasattr(engine, "_pool") else 1)
    proof = 2 * one_side + canary_s / VLLMSettings().canary_every_updates
    return {
        "update_s": round(bare, 4), "digests_s": round(2 * one_side, 4), "canary_s": round(canary_s, 4),
        "proof_frac": round(proof / bare, 3), "bytes": engine.proof.num_bytes, "tensors": engine.proof.num_tensors,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="packaged name, Hub id or folder")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.model, options.only, options.rounds)))
        return
    results = {}
    for way in WAYS:
        command = [sys.executable, "-m", "tests.bench.bench_sync", "--model", options.model]
        command += ["--rounds", str(options.rounds), "--only", way]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{way} failed:\n{done.stderr[-4000:]}")
        results[way] = json.loads(done.stdout.splitlines()[-1])
        print(f"{way:15s} {results[way]}", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
