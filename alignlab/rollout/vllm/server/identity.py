"""What trainer and server must have alike, and how a difference reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import xxhash
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from alignlab.errors import ConfigError

_SHAPE = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def model_identity(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, dtype: str) -> dict[str, Any]:
    """Sizes, dtype and vocabulary of a model and its tokenizer, as JSON."""
    text = config.get_text_config()
    vocabulary = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id])
    tokens = f"{len(tokenizer)} tokens, digest {xxhash.xxh3_64_hexdigest(vocabulary.encode())}"
    return {name: getattr(text, name, None) for name in _SHAPE} | {"dtype": dtype, "vocabulary": tokens}


def digest_of_all(digests: Mapping[str, str]) -> str:
    """One digest for those of all tensors."""
    return xxhash.xxh3_128_hexdigest(json.dumps(sorted(digests.items())).encode())


def check_identity(own: Mapping[str, Any], served: Mapping[str, Any], address: str) -> None:
    """See that a server runs the trainer's model.

    Raises:
        ConfigError: with the first thing that differs.
    """
    for name, value in own.items():
        if served.get(name) != value:
            what = "tokenizer's vocabulary" if name == "vocabulary" else name
            raise ConfigError(
                f"the server {address} has {what} {served.get(name)!s:.80}, and must have the trainer's ({value}); "
                "start it from the trainer's config: bash launch/serve_vllm.sh CONFIG"
            )
