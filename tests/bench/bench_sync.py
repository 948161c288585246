"""What a weight update of vLLM costs: all weights merged against the adapter alone, and what its proof adds.

    python tests/bench/bench_sync.py [--model smollm2-135m-instruct] [--rounds 10]

In process, LoRA on all linear layers, bfloat16. Each way runs in a process of its own. Prints a table, and JSON last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

WAYS = ("merged", "adapter")


def measure(model_name: str, sync: str, rounds: int) -> dict[str, Any]:
    """Median seconds of an update without its proof, and of the proof's parts."""
    import torch

    from alignlab.config.model import LoraSettings
    from alignlab.config.rollout import VLLMSettings
    from alignlab.models.adapters import add_lora
    from alignlab.models.checkpoints import load_model, load_tokenizer
    from alignlab.rollout.engines import make_engine

    model = add_lora(load_model(model_name, dtype=torch.bfloat16), LoraSettings(rank=16))
    settings = VLLMSettings(
        sync=sync, cache_gib=1, block_size=32, digests_every_updates=2, canary_every_updates=2
    )  # every other update has no proof
    engine: Any = make_engine(model, load_tokenizer(model_name), settings)
    bare: list[float] = []
    parts: dict[str, list[float]] = {"digests": [], "canary": []}
    check, canary = engine._sync.check, engine._canary

    def timed(name: str, function: Any) -> Any:
        def run(*args: Any) -> Any:
            start = time.perf_counter()
            result = function(*args)
            parts[name].append(time.perf_counter() - start)
            return result

        return run

    engine._sync.check, engine._canary = timed("digests", check), timed("canary", canary)
    for version in range(1, 2 * rounds + 1):
        start = time.perf_counter()
        engine.update_weights(version)
        if engine.proof.gap is None:
            bare.append(time.perf_counter() - start)
    update, digests, canary_s = (statistics.median(each) for each in (bare, parts["digests"], parts["canary"]))
    every = VLLMSettings().canary_every_updates
    return {
        "update_s": round(update, 4), "digests_s": round(digests, 4), "canary_s": round(canary_s, 4),
        "proof_frac": round((digests + canary_s / every) / update, 3),
        "bytes": engine.proof.num_bytes, "tensors": engine.proof.num_tensors,
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
        command = [sys.executable, __file__, "--model", options.model, "--rounds", str(options.rounds), "--only", way]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{way} failed:\n{done.stderr[-4000:]}")
        results[way] = json.loads(done.stdout.splitlines()[-1])
        print(f"{way:9s} {results[way]}", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
