"""Memory of a rank and seconds of an update, by where the weights in training live: SmolLM2-135M, all weights, float32.

    python tests/bench/bench_sharding.py [WAY ...]

Two gloo ranks of one thread each, in processes of their own for each way: our strategies, FSDP2 by hand, and ZeRO-3 as
accelerate sets DeepSpeed up. The last two put the same tokens through `transformers`' model in a padded batch without
anything else. Each prints the bytes of the tensors that live on after an update, the growth of the process beyond its
start, and the median and the least of the updates: what else the machine does only adds to them.
"""

from __future__ import annotations

import gc
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

WAYS = ("ddp", "zero1", "zero2", "zero3", "accelerate's zero3", "fsdp2", "fsdp2 by hand")
NUM_UPDATES, NUM_TOKENS, NUM_SEQUENCES = 5, 128, 4
ROOT = Path(__file__).parents[2]


def tokens_of(rank: int) -> torch.Tensor:
    """Random tokens [sequences, tokens] of one rank."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(0, 49_000, (NUM_SEQUENCES, NUM_TOKENS), generator=generator)


def ours(strategy: str) -> Any:
    """An update by our learner."""
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

    return update


def fsdp2_by_hand() -> Any:
    """An update of `transformers`' model under `fully_shard`."""
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

    return update


def zero3_of_accelerate() -> Any:
    """An update of `transformers`' model by accelerate and DeepSpeed."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs

    from alignlab.loop.zero.installation import load_deepspeed
    from alignlab.models.hub.checkpoints import load_model

    model: Any = load_model("smollm2-135m-instruct", dtype=torch.float32)
    model.set_attn_implementation("sdpa")
    model.train()
    load_deepspeed("cpu")
    settings = {
        "train_micro_batch_size_per_gpu": NUM_SEQUENCES, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 3}, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings),
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
    )
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True))
    rows = tokens_of(accelerator.process_index)

    def update() -> None:
        accelerator.backward(model(input_ids=rows, labels=rows, use_cache=False).loss)
        optimizer.step()
        optimizer.zero_grad()

    return update


def live_mib() -> float:
    """Memory of all tensors, each storage once."""
    found = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            held = getattr(thing, "_local_tensor", thing)
            for tensor in (held, held.grad):
                if tensor is not None and not tensor.is_meta:
                    found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(found.values()) / 2**20


def measure(way: str) -> dict[str, float]:
    """Figures of one rank."""
    torch.set_num_threads(1)
    import alignlab  # noqa: F401  # what is imported counts as the start

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    by_hand = {"fsdp2 by hand": fsdp2_by_hand, "accelerate's zero3": zero3_of_accelerate}
    update = by_hand[way]() if way in by_hand else ours(way)
    seconds = []
    for _ in range(NUM_UPDATES):
        start = time.perf_counter()
        update()
        seconds.append(time.perf_counter() - start)
    return {
        "tensors_mib": live_mib(),
        "peak_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10,
        "update_s": median(seconds[1:]),
        "least_s": min(seconds[1:]),
    }


def main() -> None:
    if "RANK" in os.environ:
        figures = measure(sys.argv[1])
        if os.environ["RANK"] == "0":
            print(json.dumps(figures))
        return
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    print("| | tensors a rank, MiB | peak growth, MiB | seconds an update | the least |\n|---|---|---|---|---|")
    for way in sys.argv[1:] or WAYS:
        done = subprocess.run([*command, way], env=environment, capture_output=True, text=True, check=True)
        line = json.loads(done.stdout.strip().splitlines()[-1])
        figures = f"{line['tensors_mib']:.0f} | {line['peak_mib']:.0f} | {line['update_s']:.2f} | {line['least_s']:.2f}"
        print(f"| {way} | {figures} |")


if __name__ == "__main__":
    main()
