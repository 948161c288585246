"""Memory of a rank and seconds of an update, by where the weights in training live: SmolLM2-135M, all weights, float32.

    python tests/bench/bench_sharding.py

Two gloo ranks of one thread each, in processes of their own for each way: our DDP, our FSDP2, and FSDP2 by hand, which
puts the same tokens through `transformers`' model in a padded batch without anything else. Each prints the bytes of
the tensors that live on after an update, the growth of the process beyond its start, and the median of the updates.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

WAYS = ("ddp", "fsdp2", "by hand")
NUM_UPDATES, NUM_TOKENS, NUM_SEQUENCES = 5, 128, 4
ROOT = Path(__file__).parents[2]


def tokens_of(rank: int) -> torch.Tensor:
    """Random tokens [sequences, tokens] of one rank."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(0, 49_000, (NUM_SEQUENCES, NUM_TOKENS), generator=generator)


def ours(strategy: str) -> tuple[Any, Any]:
    """An update by our learner, and the module and the optimizer that it holds."""
    from alignlab.config.trainers import SFTConfig
    from alignlab.data.examples import Example
    from alignlab.data.packing import pack_examples
    from alignlab.loop.accelerator import make_accelerator
    from alignlab.loop.learner import Learner
    from alignlab.loop.loss_weights import token_mean
    from alignlab.models.hub.checkpoints import load_model
    from alignlab.models.policy import Policy

    accelerator = make_accelerator(600.0)
    config = SFTConfig(sharding={"strategy": strategy})  # type: ignore[arg-type]
    learner = Learner(
        Policy(load_model("smollm2-135m-instruct", dtype=torch.float32)), config, accelerator, total_updates=100
    )
    rows = tokens_of(accelerator.process_index).tolist()
    packs = pack_examples([Example(tuple(row), (False,) + (True,) * (len(row) - 1)) for row in rows], budget=4096)

    def update() -> None:
        learner.update(packs, lambda output, pack: (-output.logprobs, {}), token_mean)

    return update, (learner.module, learner.optimizer)


def by_hand() -> tuple[Any, Any]:
    """An update of `transformers`' model under `fully_shard`, and what it holds."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    from alignlab.models.hub.checkpoints import load_model

    dist.init_process_group("gloo")
    model: Any = load_model("smollm2-135m-instruct", dtype=torch.float32)
    model.set_attn_implementation("sdpa")
    model.train()
    for layer in model.get_decoder().layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    rows = tokens_of(dist.get_rank())

    def update() -> None:
        model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return update, (model, optimizer)


def measure(way: str) -> dict[str, float]:
    """Figures of one rank."""
    from alignlab.models.shards import rows_of

    torch.set_num_threads(1)
    import alignlab  # noqa: F401  # what is imported counts as the start

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    update, (module, optimizer) = by_hand() if way == "by hand" else ours(way)
    seconds = []
    for _ in range(NUM_UPDATES):
        start = time.perf_counter()
        update()
        seconds.append(time.perf_counter() - start)
    tensors = [*module.parameters(), *(value for state in optimizer.state.values() for value in state.values())]
    return {
        "tensors_mib": sum(rows_of(tensor)[0].nbytes for tensor in tensors) / 2**20,
        "peak_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10,
        "update_s": median(seconds[1:]),
    }


def main() -> None:
    if len(sys.argv) > 1:
        figures = measure(sys.argv[1])
        if os.environ["RANK"] == "0":
            print(json.dumps(figures))
        return
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    print("| | tensors a rank, MiB | peak growth, MiB | seconds an update |\n|---|---|---|---|")
    for way in WAYS:
        done = subprocess.run([*command, way], env=environment, capture_output=True, text=True, check=True)
        line = json.loads(done.stdout.strip().splitlines()[-1])
        print(f"| {way} | {line['tensors_mib']:.0f} | {line['peak_mib']:.0f} | {line['update_s']:.2f} |")


if __name__ == "__main__":
    main()
