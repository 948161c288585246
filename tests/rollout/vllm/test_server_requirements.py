"""A server that cannot generate for a run is refused with what differs and what to do; these tests need no vLLM."""

from __future__ import annotations

from typing import Any

import pytest

from alignlab.errors import ConfigError
from alignlab.models.sync_digests import WORD_SUMS, XXH3
from alignlab.rollout.vllm.servers import ServerRequirements

ABOUT: dict[str, Any] = {
    "identity": {"dtype": "float32"}, "context_tokens": 64, "lora_rank": 0, "digest_algorithm": XXH3,
}


def test_a_server_with_all_properties_is_accepted() -> None:
    ServerRequirements({"dtype": "float32"}, 64, adapter_rank=0).check("http://here", ABOUT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"identity": {"dtype": "bfloat16"}}, r"has dtype bfloat16, and must have the trainer's \(float32\)"),
        ({"context_tokens": 63}, "takes 63 tokens of prompt and completion, and must take 64"),
        ({"lora_rank": 8}, "was started for adapters of rank 8, and must be ready for all weights"),
        ({"digest_algorithm": "crc"}, "digests weights by crc, and must by word-sums-1 or xxh3-128; start it with"),
        ({"quantization": "fp8"}, r"has the quantization fp8, and must have the config's \(None\)"),
        ({"kv_cache": "fp8"}, r"has the kv_cache fp8, and must have the config's \(None\)"),
        ({"digest_algorithm": None}, "digests weights by None"),
    ],
)
def test_the_property_that_differs_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"the server http://here {message}"):
        ServerRequirements({"dtype": "float32"}, 64, adapter_rank=0).check("http://here", ABOUT | change)


def test_servers_on_different_devices_are_refused_since_they_digest_differently() -> None:
    requirements = ServerRequirements({"dtype": "float32"}, 64, adapter_rank=0, digest_algorithm=XXH3)
    requirements.check("http://here", ABOUT)
    with pytest.raises(ConfigError, match="http://here digests weights by word-sums-1, and another server by xxh3-128"):
        requirements.check("http://here", ABOUT | {"digest_algorithm": WORD_SUMS})


def test_a_server_that_tells_no_sizes_is_refused() -> None:
    about = {name: value for name, value in ABOUT.items() if name != "lora_rank"}
    with pytest.raises(ConfigError, match="does not tell its sizes; start it with this version of alignlab"):
        ServerRequirements({"dtype": "float32"}, 64).check("http://here", about)
