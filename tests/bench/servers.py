"""A vLLM server of this machine, for as long as it is measured."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def served(
    model: Any, tokenizer: Any, *, lora_rank: int = 0, context_tokens: int = 2048, **settings: Any
) -> Iterator[Any]:
    """The rollout engine of a server that is started for it; `settings` are `VLLMServerSettings`'s.

    Args:
        lora_rank: of the adapters that it is to be given alone; 0 is given all weights.
    """
    from alignlab.config.rollout import VLLMServerSettings
    from alignlab.models.hub.export import write_base
    from alignlab.rollout.engine import make_engine
    from alignlab.rollout.vllm.launch import end_all, make_server
    from alignlab.rollout.vllm.options import engine_options
    from tests.rollout.vllm.conftest import wait_until_up

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    given = {"memory_frac": 0.4, "context_tokens": context_tokens} | settings
    asked = VLLMServerSettings(servers=(address,), **given)
    options = engine_options(asked, model, adapter_rank=lora_rank, on_cpu=True)
    with tempfile.TemporaryDirectory() as folder:
        write_base(model, Path(folder))
        tokenizer.save_pretrained(folder)
        server = make_server(address, Path(folder), options)
        try:
            server.start()
            wait_until_up(server)
            engine: Any = make_engine(model, tokenizer, asked)
            yield engine
            engine.close()
        finally:
            end_all([server])
