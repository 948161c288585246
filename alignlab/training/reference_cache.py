"""Log-probs of a reference, computed once and kept on disk for every run on the same model and data."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import xxhash
from filelock import FileLock
from safetensors.torch import load_file, save_file

from alignlab.data.preferences import Preference
from alignlab.models.packaged import cache_folder
from alignlab.training.files import publish

Scores = list[tuple[float, ...]]


class ReferenceCache:
    """Files by what they depend on, in `reference/` of the folder of converted models.

    Args:
        model: fingerprint of the reference's weights.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._folder = cache_folder() / "reference"

    def get_or_make(self, examples: Sequence[Preference], make: Callable[[Sequence[Preference]], Scores]) -> Scores:
        """Log-probs of both completions, end to end, of each pair: as kept, or made now and kept."""
        path = self.path(examples)
        self._folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):  # ranks, and runs beside this one, wait for the first
            if not path.exists():
                print(f"alignlab: scoring {len(examples)} pairs by the reference, once", file=sys.stderr, flush=True)
                flat = torch.tensor([x for scores in make(examples) for x in scores], dtype=torch.float32)
                temporary = path.with_name(f".{path.name}.tmp")
                save_file({"logprobs": flat}, temporary)
                publish(temporary, path)
        flat = load_file(path)["logprobs"]
        return [tuple(part.tolist()) for part in flat.split([pair.num_tokens for pair in examples])]

    def path(self, examples: Sequence[Preference]) -> Path:
        """Where the scores of these examples are kept."""
        tokens = json.dumps([[pair.prompt, pair.chosen, pair.rejected] for pair in examples])
        return self._folder / f"{xxhash.xxh3_128_hexdigest((self._model + tokens).encode())}.safetensors"
