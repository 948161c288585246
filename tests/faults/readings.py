"""What alignlab itself reads in a run's folder: damage that a run leaves there must not be taken as true."""

from __future__ import annotations

import io
import json
import logging
import re
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.faults.results import untimed

NAMED, UNNAMED = "NAMED: ", "UNNAMED: "
_TEXT = "ab1 <|endoftext|> 3"


def readings(run: Path) -> dict[str, str]:
    """By name, what is read; what is refused begins with `NAMED`, and what ends in another exception with `UNNAMED`."""
    from alignlab.errors import AlignlabError

    found = {}
    for name, read in _readers(run):
        try:
            found[name] = read()
        except AlignlabError as error:
            found[name] = f"{NAMED}{error}"
        except Exception:
            found[name] = f"{UNNAMED}{traceback.format_exc()}"
    return found


def _readers(run: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.name == "metrics.jsonl":
            yield name, lambda path=path: _metrics(path)  # type: ignore[misc]
        elif path.name == "rollouts" and path.is_dir():
            yield name, lambda path=path: _rollouts(path)  # type: ignore[misc]
        elif path.parent.name == "checkpoints" and re.fullmatch(r"step-\d{8}", path.name) and path.is_dir():
            yield name, lambda path=path: _checkpoint(path)  # type: ignore[misc]
        elif (path.name in ("model", "adapter") or path.parent.name == "models") and path.is_dir():
            yield name, lambda path=path: _model(path)  # type: ignore[misc]


def _metrics(path: Path) -> str:
    from alignlab.runs.metrics_file import read_metrics

    return untimed(list(read_metrics(path)))


def _rollouts(path: Path) -> str:
    from alignlab.runs import rollout_store

    said = io.StringIO()
    handler = logging.StreamHandler(said)
    rollout_store.logger.addHandler(handler)
    try:
        rows = untimed(rollout_store.read_rollouts(path).to_pylist())
    finally:
        rollout_store.logger.removeHandler(handler)
    return f"{NAMED}{said.getvalue()}" if said.getvalue() else rows


def _checkpoint(path: Path) -> str:
    """Of a folder of checkpoints that holds this one alone."""
    from alignlab.runs.checkpoint import load_latest
    from alignlab.runs.records import run_id_of

    with tempfile.TemporaryDirectory() as temporary:
        alone = Path(temporary) / "checkpoints"
        shutil.copytree(path, alone / path.name)
        ranks = len(list(path.glob("random-*.safetensors")))
        run_id = run_id_of(path.parents[1] / "starts.jsonl")
        checkpoint = load_latest(alone, world_size=max(ranks, 1), run_id=run_id)
        if checkpoint is None:
            return "no checkpoint"
        tensors = {name: digest_of_tensors(group) for name, group in checkpoint.tensors.items()}
    return untimed({"step": checkpoint.step, "tensors": tensors, "state": checkpoint.state})


def _model(path: Path) -> str:
    """Its weights, what its tokenizer makes of a text, and how it generates."""
    import torch

    from alignlab.models.hub.checkpoints import load_model, load_tokenizer
    from alignlab.models.hub.reward_checkpoints import is_reward_model, load_reward_model

    tokenizer: Any = load_tokenizer(str(path))
    backend = tokenizer.backend_tokenizer.to_str()
    told = [tokenizer(_TEXT)["input_ids"], tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template, backend]
    if is_reward_model(str(path)):
        reward = load_reward_model(str(path), dtype=torch.float32)
        return json.dumps([digest_of_tensors(reward.state_dict()), told])
    model: Any = load_model(str(path), dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        logits = model(ids).logits
    generation = {name: value for name, value in model.generation_config.to_dict().items() if "version" not in name}
    return json.dumps([digest_of_tensors(model.state_dict() | {"": logits}), told, generation], default=str)


def digest_of_tensors(tensors: Any) -> str:
    """One digest of names and bytes."""
    from alignlab.models.fingerprints import tensor_digests

    return json.dumps(sorted(tensor_digests(dict(tensors)).items()))
