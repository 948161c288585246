"""What models and trainers may be set to, on a pretended GPU: results equal to the CPU's, and no more waits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alignlab.models.pruning.calibration import CalibrationText
from alignlab.models.pruning.masks import choice
from alignlab.models.pruning.sparsity import prune_by_magnitude, prune_by_wanda
from alignlab.models.upcycling import upcycled
from alignlab.types import Segments
from tests.gpu.on_gpu_decoding import CACHES, make_model
from tests.gpu.on_gpu_trainers import MAX_UPDATE_WAITS, train_on_both
from tests.gpu.on_gpu_zoo import make_preset
from tests.trainers.tiny import make_case

Context = Callable[..., Any]
HALF = choice(dropped=0.5, pattern=None, by_row=False)
SMALL: dict[str, Any] = {"num_prompts": 2, "group_size": 2, "num_steps": 1}
BLOCKS = {"block_size": 16}
"""A GPU has larger ones, and sums over the masked keys of a gathered one round otherwise."""


def pruned(tokenizer: Any) -> Any:
    model = make_preset("gqa", tokenizer)
    prune_by_magnitude(model, HALF)
    return model


OPTIONS: dict[str, tuple[str, Callable[[Any], Any], dict[str, Any]]] = {
    **{
        f"replay of a cache in {name}": (
            "grpo", lambda t: make_model("mixture", t), SMALL | {"rollout": {"kv_cache": cache} | BLOCKS},
        )
        for name, cache in CACHES.items()
    },
    "a cache in int8 and a reference": (
        "ppo", lambda t: make_model("dense", t),
        SMALL | {"rollout": {"kv_cache": CACHES["int8"]} | BLOCKS, "kl": {"coef": 0.1}},
    ),
    "an average of the weights": ("sft", lambda t: make_preset("kda", t), {"num_steps": 1, "ema": {"decay": 0.5}}),
    "zeros that stay": ("sft", pruned, {"num_steps": 1, "optim": {"keep_zeros": True}}),
    "dropout of the residual stream": ("sft", lambda t: make_preset("gqa", t, residual_dropout=0.25), {"num_steps": 1}),
    "recomputed activations": (
        "grpo", lambda t: make_preset("qwen3_next", t), SMALL | {"memory": {"gradient_checkpointing": True}},
    ),
    "drafts": (
        "grpo", lambda t: make_preset("mtp", t),
        SMALL | {"rollout": {"speculation": {"type": "mtp", "always": True}, "cuda_graphs": False}},
    ),
    "experts chosen before the update": (
        "grpo", lambda t: make_preset("moe", t), SMALL | {"routing_replay": "trainer", "num_minibatches": 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_a_training_with_an_option_is_that_of_a_cpu(
    option: str, gpu: Context, cpu: Context, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, model, settings = OPTIONS[option]

    def make(folder: str) -> Any:
        torch.manual_seed(0)
        return make_case(kind, tmp_path / folder / "run", model(tokenizer), tokenizer, **settings)

    waits = train_on_both(make, gpu, cpu, monkeypatch, max_step_waits=2 if option == "drafts" else 1)
    # Which completions have a record of dropped tokens is read once a pack, of which an update has one here.
    most = MAX_UPDATE_WAITS + (option == "replay of a cache in evict")
    assert max(waits)[0] <= most, max(waits)[1]


def test_a_model_is_pruned_and_upcycled_where_it_is(gpu: Context, cpu: Context, tokenizer: Any) -> None:
    def results(device: str) -> dict[str, torch.Tensor]:
        model = make_preset("gqa", tokenizer).to(device)
        tokens = torch.arange(40).to(device)
        prune_by_wanda(model, HALF, CalibrationText(tokens, Segments.single(40, tokens.device)))
        torch.manual_seed(0)
        mixture = upcycled(model, num_experts=4, num_experts_per_tok=2)
        assert {weight.device for weight in mixture.parameters()} == {tokens.device}
        with torch.no_grad():
            logits = mixture(input_ids=tokens[None]).logits
        return {"logits": logits.cpu(), **{name: weight.detach().cpu() for name, weight in mixture.named_parameters()}}

    with cpu():
        expected = results("cpu")
    with gpu():
        found = results("cuda:0")
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
