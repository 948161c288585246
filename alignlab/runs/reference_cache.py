"""Cache on disk of log-probs under a reference model, for all runs on the same model and data."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from alignlab.data.preferences import CompletionGroup
from alignlab.files.atomic_files import make_folder, replacing
from alignlab.files.digests import fast_digest
from alignlab.files.file_lock import one_at_a_time
from alignlab.files.library_errors import writing
from alignlab.files.paths import reference_cache_folder
from alignlab.models.fingerprints import model_digest, tensor_digest
from alignlab.types import Completion

logger = logging.getLogger(__name__)
_FILE_FORMAT = "2"
_LOGPROBS, _DIGEST = "logprobs", "digest"
Scores = list[tuple[float, ...]]


class ReferenceCache:
    """Files in `reference_cache_folder()`, named by a digest of the model and the examples.

    Each file holds a digest of its content; a damaged file is computed again.

    Args:
        model: the reference; of a model with an adapter, the base is the reference.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model_digest(model)
        self._folder = reference_cache_folder()

    def get_or_make(
        self, examples: Sequence[CompletionGroup], make: Callable[[Sequence[CompletionGroup]], Scores]
    ) -> Scores:
        """Return the log-probs of all completions of each example, end to end: from the cache, or by `make`."""
        path = self.path(examples)
        make_folder(self._folder)
        with one_at_a_time(path, "scores the examples by the reference"):
            flat = self._read(path, _num_tokens(examples))
            if flat is None:
                flat = _score_all(examples, make)
                self._write(path, flat)
        return _of_examples(flat, examples)

    def get_or_make_together(
        self, examples: Sequence[CompletionGroup], make: Callable[[Sequence[CompletionGroup]], Scores],
        *, any_rank: Callable[[bool], bool], writes: bool,
    ) -> Scores:
        """Return what `get_or_make` returns, where `make` needs every rank; every rank calls this together.

        Args:
            any_rank: whether a flag is set on any rank.
            writes: whether this rank writes the file.
        """
        path = self.path(examples)
        make_folder(self._folder)
        flat = self._read(path, _num_tokens(examples))
        if any_rank(flat is None):
            flat = _score_all(examples, make)
            if writes:
                self._write(path, flat)
        assert flat is not None
        return _of_examples(flat, examples)

    @staticmethod
    def _write(path: Path, flat: Tensor) -> None:
        with writing(path, "the reference's log-probs"), replacing(path) as temporary:
            save_file({_LOGPROBS: flat}, temporary, {_DIGEST: tensor_digest(flat)})

    @staticmethod
    def _read(path: Path, num_tokens: int) -> Tensor | None:
        """Return the log-probs [num_tokens] of a file; None if there is none or it is damaged, with a warning."""
        if not path.exists():
            return None
        try:
            if not path.is_file():
                raise OSError("it is no file")  # such as a pipe, which a reader would wait for without an end
            with safe_open(path, "pt") as file:
                flat: Tensor = file.get_tensor(_LOGPROBS)
                intact = (file.metadata() or {}).get(_DIGEST) == tensor_digest(flat) and flat.shape == (num_tokens,)
        except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, KeyError):
            intact = False
        if intact:
            return flat
        logger.warning("the reference's log-probs in %s are damaged, and are made again", path)
        return None

    def path(self, examples: Sequence[CompletionGroup]) -> Path:
        """Return the file of the log-probs of these examples."""
        groups = (example.as_group() for example in examples)
        tokens = json.dumps([[group.prompt.token_ids, *map(_scored, group.completions)] for group in groups])
        return self._folder / f"{fast_digest([_FILE_FORMAT, self._model, tokens])}.safetensors"


def _scored(completion: Completion) -> object:
    """Return the part of a completion that its log-probs depend on, as JSON; only the policy's tokens have some."""
    if completion.writers is None:
        return completion.token_ids
    return [completion.token_ids, completion.policy_tokens]


def _num_tokens(examples: Sequence[CompletionGroup]) -> int:
    return sum(example.num_tokens for example in examples)


def _score_all(
    examples: Sequence[CompletionGroup], make: Callable[[Sequence[CompletionGroup]], Scores]
) -> Tensor:
    print(f"alignlab: scoring {len(examples)} examples by the reference, once", file=sys.stderr, flush=True)
    return torch.tensor([x for scores in make(examples) for x in scores], dtype=torch.float32)


def _of_examples(flat: Tensor, examples: Sequence[CompletionGroup]) -> Scores:
    """Divide the log-probs of all completions, end to end, among the examples."""
    return [tuple(part.tolist()) for part in flat.split([example.num_tokens for example in examples])]
