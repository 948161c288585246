"""What a child asks a hostile peer."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


def ask_judge(port: int, *, writes: bool) -> dict[str, Any]:
    """Ask a judge one question, with the patience of a second."""
    from alignlab.config.judge import EndpointJudge
    from alignlab.errors import AlignlabError
    from alignlab.scoring.judges.chat_model import Failure
    from alignlab.scoring.judges.endpoint import EndpointChatModel

    settings = EndpointJudge(
        url=f"http://127.0.0.1:{port}/v1", model="m", request_timeout_s=1.0, max_attempts=2, retry_wait_s=0.1
    )
    question = [[{"role": "user", "content": "1 or 2?"}]]
    try:
        model = EndpointChatModel(settings)
        told: Any
        if writes:
            [told] = model.write(question, max_new_tokens=4, temperature=1.0, seed=0)
        else:
            [told] = model.choose(question, ["1", "2"])
    except AlignlabError as error:
        return {"named": str(error)}
    if isinstance(told, Failure):
        return {"named": f"{told.kind}: {told.message}"}
    return {"answer": told, "believable": _is_text(told) if writes else all(map(_is_logprob, told))}


def ask_pool(port: int) -> dict[str, Any]:
    """Open a pool of one server, give it weights, and ask for one completion of at most four tokens."""
    from alignlab.config.rollout import VLLMServerSettings
    from alignlab.errors import AlignlabError
    from alignlab.rollout.vllm.completions import Request
    from alignlab.rollout.vllm.pool import ServerPool
    from alignlab.rollout.vllm.weight_delivery import SentWeights

    os.environ["ALIGNLAB_SERVER_TOKEN"] = "a-token-of-some-length-0123456789"
    address = f"http://127.0.0.1:{port}"
    settings = VLLMServerSettings(servers=(address,), request_timeout_s=1.0, reconnect_s=0.5, health_every_s=0.2)
    weights = Path("weights.safetensors")
    weights.write_bytes(b"weights")
    try:
        pool = ServerPool(settings, lambda address, about: None, [], run="run", rank=0)
        try:
            pool.open()
            pool.put(SentWeights("run-1-1", weights, {}, False))
            [answer] = pool.answers([Request((1, 2), {"max_tokens": 4})])
        finally:
            pool.close()
    except AlignlabError as error:
        return {"named": str(error)}
    ids = all(type(token) is int and 0 <= token < 262 for token in answer.token_ids)
    believable = ids and len(answer.token_ids) <= 4 and all(map(_is_logprob, answer.logprobs))
    believable = believable and len(answer.logprobs) == len(answer.token_ids) and answer.policy_versions == (1,)
    return {"answer": repr(answer)[:300], "believable": believable}


def _is_logprob(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value <= 1e-3


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(json.dumps(value))
