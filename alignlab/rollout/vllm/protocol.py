"""Names, HTTP paths, versions of weights and identities of models, on which trainer and vLLM must agree.

Both sides import this module, so it knows neither the trainer nor vLLM.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from alignlab.errors import RolloutError
from alignlab.files.digests import fast_digest

TOKEN_VARIABLE = "ALIGNLAB_SERVER_TOKEN"
"""Environment variable of the token that every request to a server must carry."""
SERVED_NAME = "policy"
"""Model name under which a server exposes fully synced weights; an adapter is exposed under its weights' version."""
TRANSFER_BACKEND = "alignlab"
"""Name under which vLLM finds our weight transfer engine."""

HEALTH_PATH = "/health"
GENERATE_PATH = "/inference/v1/generate"
ABOUT_PATH = "/alignlab/about"
WEIGHTS_PATH = "/alignlab/weights"
BROADCAST_PATH = "/alignlab/broadcast"
RELEASE_PATH = "/alignlab/release"
ROUTING_PATH = "/alignlab/routing"
BROKE_OFF_STATUS = 424
"""HTTP status of a server that could not receive weights because another process of the group failed."""

_WEIGHTS_VERSION = re.compile(r"[0-9A-Za-z]{1,64}-\d{1,18}-\d{1,18}")
SLOWEST_BYTES_PER_S = 2**20
"""The slowest network for which deadlines of transfers are made."""
_UPLOAD_GRACE_S = 60.0
_SHAPE = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def weights_version(run: str, policy_version: int, attempt: int) -> str:
    """Return the name of weights on a server, RUN-POLICY_VERSION-ATTEMPT.

    Args:
        run: random name of a run's engine.
        attempt: number of the attempt to send weights; no cache of a failed attempt is taken for the next one's.
    """
    return f"{run}-{policy_version}-{attempt}"


def is_weights_version(text: str) -> bool:
    """Return True if `text` has the form of a `weights_version`."""
    return _WEIGHTS_VERSION.fullmatch(text) is not None


def run_of(version: str) -> str:
    """Return the run in a `weights_version`."""
    return version.partition("-")[0]


def policy_version_of(version: str) -> int:
    """Return the policy's version in a `weights_version`."""
    return int(version.split("-")[1])


def upload_deadline_s(num_bytes: int) -> float:
    """Return the seconds that an upload of weights may take: a minute, and one second for each MiB."""
    return _UPLOAD_GRACE_S + num_bytes / SLOWEST_BYTES_PER_S


def model_identity(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, dtype: str) -> dict[str, Any]:
    """Return sizes, dtype and vocabulary of a model and its tokenizer, as JSON has them."""
    text_config = config.get_text_config()
    vocabulary = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id])
    tokens = f"{len(tokenizer)} tokens, digest {fast_digest([vocabulary])}"
    return {name: getattr(text_config, name, None) for name in _SHAPE} | {"dtype": dtype, "vocabulary": tokens}


def digests_of_workers(workers: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return the digests of the tensors that all of vLLM's workers loaded.

    Each worker is given every tensor whole, and keeps its part.

    Args:
        workers: digests by tensor's name, of each worker.

    Raises:
        RolloutError: with the first worker that loaded other tensors than the one before it.
    """
    first = dict(workers[0])
    for number, digests in enumerate(workers[1:], start=1):
        differing = sorted(name for name, _ in first.items() ^ digests.items())
        if differing:
            raise RolloutError(
                f"the rollout engine's weights are not the policy's: of vLLM's {len(workers)} workers, worker {number} "
                f"loaded another tensor {differing[0]} than worker 0; no step was taken with it"
            )
    return first


def digest_of_all(digests: Mapping[str, str]) -> str:
    """Return one digest for the digests of all tensors."""
    return fast_digest([json.dumps(sorted(digests.items()))])
