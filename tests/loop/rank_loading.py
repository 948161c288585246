"""Run by a launcher: the folder of a mixture is loaded to be trained, with its weights spread over the ranks.

Usage: rank_loading.py FOLDER STRATEGY

Each rank writes what it has of the host's memory for itself, MiB: at first, with the model loaded, and with its part of
the weights; and all weights, gathered.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from alignlab.config.trainers import SFTConfig
from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.loop import offline
from alignlab.loop.inputs import resolve_model
from alignlab.trainers.sft import SFTTrainer
from tests.trainers.steps import weights_of


def own_mib() -> float:
    """Return this process's memory that no other has a part in, and that no file stands behind, MiB."""
    gc.collect()
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) / 1024


def main() -> None:
    folder, strategy = Path(sys.argv[1]), sys.argv[2]
    memory: dict[str, float] = {}

    def watched(*arguments: Any, **options: Any) -> Any:
        memory["before"] = own_mib()
        resolved = resolve_model(*arguments, **options)
        memory["loaded"] = own_mib()
        return resolved

    offline.resolve_model = watched
    tokenizer = train_tokenizer(["abc abd ab ba 123"], vocab_size=262)
    config = SFTConfig(
        output_dir=folder / strategy, num_sequences=2, num_steps=1, trackers=(), sharding={"strategy": strategy},
    )  # fmt: skip
    trainer = SFTTrainer(str(folder / "model"), config, [{"prompt": "ab", "completion": "c"}] * 2, tokenizer=tokenizer)
    memory["spread"] = own_mib()
    rank = os.environ.get("RANK", "0")
    weights = {name: weight.contiguous() for name, weight in weights_of(trainer).items()}
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    save_file(weights, folder / f"{strategy}.{rank}.safetensors")
    (folder / f"{strategy}.{rank}.json").write_text(json.dumps(memory))


if __name__ == "__main__":
    main()
