"""Cost of a weight update of vLLM: all weights merged against the adapter alone, and the share of its verification.

    python -m tests.bench.bench_sync [--model smollm2-135m-instruct] [--rounds 10]

LoRA on all linear layers, bfloat16; vLLM in process, and in a server of this machine. Each way runs in a
process of its own. Prints a table, and JSON last.
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

WAYS = ("merged", "adapter", "server-merged", "server-broadcast", "server-adapter")


def measure(model_name: str, way: str, rounds: int) -> dict[str, Any]:
    """Return what `timings` returns, for SmolLM2 with LoRA."""
    import torch

    from alignlab.config.model import LoraSettings
    from alignlab.config.rollout import VLLMSettings
    from alignlab.models.adapters import add_lora
    from alignlab.models.hub.checkpoints import load_model, load_tokenizer
    from alignlab.rollout.engine import make_engine

    model = add_lora(load_model(model_name, dtype=torch.bfloat16), LoraSettings(rank=16))
    tokenizer, sync = load_tokenizer(model_name), "adapter" if way.endswith("adapter") else "merged"
    # Every other update is not verified.
    verification = {"cache_gib": 1, "block_size": 32, "canary_every_updates": 2}
    if way.startswith("server"):
        transfer = "broadcast" if way == "server-broadcast" else "file"
        options = verification | {"lora_rank": 16 if sync == "adapter" else 0, "transfer": transfer}
        with served(model, tokenizer, sync=sync, **options) as engine:
            return timings(engine, rounds)
    settings = VLLMSettings(sync=sync, digests_every_updates=2, **verification)
    return timings(make_engine(model, tokenizer, settings), rounds)


def timings(engine: Any, rounds: int) -> dict[str, Any]:
    """Return median seconds of an update without its verification, and of digests on both sides and the canary."""
    from alignlab.config.rollout import VLLMSettings
    from alignlab.rollout.vllm.policy_weights import PolicyWeights

    seconds: dict[str, list[float]] = {"update": [], "digests": [], "canary": []}

    def timed(name: str, function: Any) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **options)
            seconds[name].append(time.perf_counter() - start)
            return result

        return run

    engine._backend.put_weights = timed("update", engine._backend.put_weights)
    engine._verify = timed("canary", engine._verify)
    PolicyWeights.digests = timed("digests", PolicyWeights.digests)  # type: ignore[method-assign]
    is_server = hasattr(engine._backend, "_pool")
    for version in range(1, 2 * rounds + 1):
        engine.update_weights(version)
    one_side, canary_s = (statistics.median(seconds[name]) for name in ("digests", "canary"))
    # vLLM digests what it loads at every update. In process, the trainer's digests belong to every other update.
    without_trainers = seconds["update"] if is_server else seconds["update"][::2]
    bare = statistics.median(without_trainers) - one_side * (2 if is_server else 1)
    verification = 2 * one_side + canary_s / VLLMSettings().canary_every_updates
    transfer = engine.last_sync.transfer
    return {
        "update_s": round(bare, 4), "digests_s": round(2 * one_side, 4), "canary_s": round(canary_s, 4),
        "verification_frac": round(verification / bare, 3), "bytes": transfer.num_bytes,
        "tensors": transfer.num_tensors,
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
