"""Log-probs of a reference, computed once and kept on disk for every run on the same model and data."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from alignlab.atomic_files import make_folder, publish
from alignlab.data.preferences import CompletionGroup
from alignlab.file_lock import one_at_a_time
from alignlab.library_errors import writing
from alignlab.models.adapters import is_of_adapter
from alignlab.models.attention import causal_lm
from alignlab.models.packaged import cache_folder
from alignlab.rollout.weight_proof import digest, digests
from alignlab.types import Completion

logger = logging.getLogger(__name__)
_FORMAT = 2
_FILE_FORMAT = "2"
_LOGPROBS, _DIGEST = "logprobs", "digest"
Scores = list[tuple[float, ...]]


class ReferenceCache:
    """Files by all that they depend on, in `reference/` of the folder of converted models.

    Each holds a digest of its content; a damaged one is made again.

    Args:
        model: the reference; of one with an adapter, its base.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = digest_of_model(model)
        self._folder = cache_folder() / "reference"

    def get_or_make(
        self, examples: Sequence[CompletionGroup], make: Callable[[Sequence[CompletionGroup]], Scores]
    ) -> Scores:
        """Log-probs of all completions, end to end, of each example: as kept, or made now and kept."""
        path = self.path(examples)
        make_folder(self._folder)
        with one_at_a_time(path, "scores the examples by the reference"):
            flat = self._read(path, sum(example.num_tokens for example in examples))
            if flat is None:
                print(f"alignlab: scoring {len(examples)} examples by the reference, once", file=sys.stderr, flush=True)
                flat = torch.tensor([x for scores in make(examples) for x in scores], dtype=torch.float32)
                temporary = path.with_name(f".{path.name}.tmp")
                with writing(path, "the reference's log-probs"):
                    save_file({_LOGPROBS: flat}, temporary, {_DIGEST: digest(flat)})
                    publish(temporary, path)
        return [tuple(part.tolist()) for part in flat.split([example.num_tokens for example in examples])]

    @staticmethod
    def _read(path: Path, num_tokens: int) -> Tensor | None:
        """The log-probs [num_tokens] of a file; None where there is none, or it is damaged, which is said."""
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                flat: Tensor = file.get_tensor(_LOGPROBS)
                intact = (file.metadata() or {}).get(_DIGEST) == digest(flat) and flat.shape == (num_tokens,)
        except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, KeyError):
            intact = False
        if intact:
            return flat
        logger.warning("the reference's log-probs in %s are damaged, and are made again", path)
        return None

    def path(self, examples: Sequence[CompletionGroup]) -> Path:
        """Where the scores of these examples are kept."""
        groups = (example.as_group() for example in examples)
        tokens = json.dumps([[group.prompt.token_ids, *map(_scored, group.completions)] for group in groups])
        return self._folder / f"{xxhash.xxh3_128_hexdigest((_FILE_FORMAT + self._model + tokens).encode())}.safetensors"


def _scored(completion: Completion) -> object:
    """What the scores of a completion depend on; only the policy's own tokens are scored."""
    return completion.token_ids if completion.own is None else [completion.token_ids, completion.own]


def digest_of_model(model: nn.Module) -> str:
    """Of every byte of the weights, buffers and config that log-probs depend on, adapters left out.

    It is the same whichever layers have an adapter. Routers count their load as they train; log-probs do not see it.
    """
    state = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict().items()
        if not is_of_adapter(model, name) and not name.endswith(".expert_load")
    }
    told = [_FORMAT, causal_lm(model).config.to_json_string(), sorted(digests(state).items())]
    return xxhash.xxh3_128_hexdigest(json.dumps(told).encode())
