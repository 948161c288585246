"""Layers that share weights against a model whose layers hold copies of them; what they take, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.config.model import LoraSettings
from alignlab.errors import ConfigError
from alignlab.loop.memory import kept_bytes
from alignlab.models.adapters import add_lora
from alignlab.models.cache_spec import cache_specs
from alignlab.models.config import PolicyConfig
from alignlab.models.decoder import hidden_states
from alignlab.models.hub.checkpoints import load_model, new_model, save_model
from alignlab.models.layer_pruning import student_from
from alignlab.models.merging import merged_module
from alignlab.models.model_sizes import model_sizes
from alignlab.models.served_attention import check_served
from alignlab.models.transformer import PolicyForCausalLM
from alignlab.models.upcycling import upcycled
from tests.models.attention_kinds import LATENT, RECURRENT, SHAPE, make_model
from tests.models.conftest import make_segments

KINDS = ("shared-layers", "shared-recurrent-and-latent")
TOKENS = torch.arange(3, 21).view(2, 9)


def copied(shared: Any) -> tuple[PolicyForCausalLM, dict[str, list[str]]]:
    """A model with a copy of the block in each layer, and the copies' names by the name of the shared weight."""
    config = PolicyConfig(**{**shared.config.to_dict(), "shared_layers": None, "attn_implementation": "alignlab"})
    model, names, weights = PolicyForCausalLM(config).eval(), {}, shared.state_dict()
    for name in model.state_dict():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(shared.config.shared_layers[int(parts[2])])
        names.setdefault(".".join(parts), []).append(name)
    model.load_state_dict({copy: weights[name] for name, copies in names.items() for copy in copies})
    return model, names


@pytest.mark.parametrize("checkpoints", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("kind", KINDS)
def test_shared_layers_are_copies_whose_gradients_are_summed(kind: str, checkpoints: bool) -> None:
    shared = make_model(kind).double()
    twin, names = copied(shared)
    segments = make_segments([(5, [3, 1, 6]), (7, []), (2, [4, 4])])
    tokens = torch.randint(0, 50, (segments.num_tokens,))
    states: list[Tensor] = []
    for model in (shared.train(), twin.double().train()):
        if checkpoints:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        states.append(hidden_states(model, tokens, segments.position_ids, segments))
        states[-1].sin().sum().backward()
    torch.testing.assert_close(*states, rtol=1e-12, atol=1e-12)
    gradients = {name: parameter.grad for name, parameter in twin.named_parameters()}
    for name, parameter in shared.named_parameters():
        if name != "lm_head.weight":
            expected = torch.stack([gradients[copy] for copy in names[name]]).sum(0)
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_each_layer_has_a_cache_of_its_own(kind: str) -> None:
    shared = make_model(kind)
    twin, _ = copied(shared)
    assert cache_specs(shared) == cache_specs(twin) and list(cache_specs(shared)) == [0, 1, 2, 3]
    shared(TOKENS)  # a pass leaves the number of its last layer
    assert cache_specs(shared) == cache_specs(twin)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(shared.generate(TOKENS, **options), twin.generate(TOKENS, **options))


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_is_saved_once(kind: str, tmp_path: Path) -> None:
    shared = make_model(kind)
    assert {name.split(".")[2] for name in shared.state_dict() if ".layers." in name} == {"0", "1"}
    save_model(shared, tmp_path)
    again: Any = load_model(str(tmp_path), dtype=torch.float32)
    assert again.config.shared_layers == shared.config.shared_layers
    torch.testing.assert_close(again(TOKENS).logits, shared(TOKENS).logits)


def test_an_adapter_is_of_the_block_and_is_merged_once() -> None:
    model = make_model("shared-layers")
    adapted = add_lora(model, LoraSettings(rank=2))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    assert len([name for name, _ in adapted.named_parameters() if "q_proj.lora_A" in name]) == 2
    with torch.no_grad():
        logits, base = adapted(TOKENS).logits, None
        with adapted.disable_adapter():
            base = adapted(TOKENS).logits
        for layer in model.model.layers:
            for part in (layer.self_attn, layer.mlp):
                for name, child in list(part.named_children()):
                    if hasattr(child, "lora_A"):
                        setattr(part, name, merged_module(child))
        torch.testing.assert_close(adapted(TOKENS).logits, logits, rtol=1e-4, atol=1e-4)
    assert (logits - base).abs().max() > 0.1


def test_sizes_by_hand() -> None:
    """Weights count once, products and caches as often as they are computed: 3 layers of 2 blocks."""
    sizes = model_sizes(PolicyConfig(**{**SHAPE, "num_hidden_layers": 3}, vocab_size=50, shared_layers=[0, 1, 1]))
    attention, mlp, head = 32 * (32 + 16 + 16 + 32), 3 * 32 * 40, 50 * 32
    assert sizes.parameters == 2 * (attention + mlp + 2 * 32) + 32 + 2 * head
    assert sizes.active_parameters == 2 * (attention + mlp) + head
    assert sizes.flops_per_token == 2 * (3 * (attention + mlp) + head)
    assert sizes.cache_bytes_per_token == 2 * 3 * 2 * 16


def test_activations_are_predicted_of_every_layer_that_is_computed() -> None:
    shared = make_model("shared-layers")
    twin, _ = copied(shared)
    assert kept_bytes(shared.to("meta"), 64) == kept_bytes(twin.to("meta"), 64)


def test_blocks_of_one_layer_each_are_no_sharing() -> None:
    assert PolicyConfig(num_hidden_layers=3, shared_layers=[0, 1, 2]).shared_layers is None


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
HEADS = {"layer_types": ["mixture_of_heads"] * 4, "num_attention_experts": 8, "num_key_value_heads": 1}
SHARED = {**SHAPE, "num_hidden_layers": 4, "shared_layers": [0, 0, 1, 1]}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"shared_layers": [0, 0, 1]}, "must hold a block of weights for each of the 4 layers, counted from 0; use "
     "\\[0, 0, 1, 1\\]"),
    ({"shared_layers": [0, -1, 1, 1]}, "must hold a block of weights for each of the 4 layers"),
    ({"shared_layers": [1, 1, 0, 2]}, "in the order in which they first appear; use \\[0, 0, 1, 2\\]"),
    ({"shared_layers": [0, 0, 2, 2]}, "in the order in which they first appear; use \\[0, 0, 1, 1\\]"),
    ({"no_rope_layers": [1, 0, 1, 1]}, "layers 0 and 1 the same weights, and no_rope_layers is 1 for one and 0"),
    ({"layer_types": ["full_attention", "gated_deltanet"] * 2, **RECURRENT}, "layers 0 and 1 .* layer_types is full_a"),
    ({"layer_types": ["full_attention"] * 3 + ["latent_attention"], **LATENT}, "layers 2 and 3 .* layer_types"),
    ({**EXPERTS, "mlp_layer_types": ["dense", "dense", "sparse", "sparse"]}, "layer 2 the weights of another, and it"),
    ({**HEADS, "shared_layers": [0, 1, 2, 0]}, "layer 0 the weights of another, and it has a router"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_layers_that_cannot_share_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PolicyConfig(**{**SHARED, **changes})


def test_experts_of_a_layer_with_a_block_of_its_own_are_beside_shared_layers() -> None:
    kinds = ["dense", "dense", "dense", "sparse"]
    config = PolicyConfig(**{**SHARED, **EXPERTS, "shared_layers": [0, 0, 0, 1]}, mlp_layer_types=kinds, vocab_size=50)
    assert PolicyForCausalLM(config)(TOKENS).logits.isfinite().all()


def test_what_needs_layers_of_their_own_refuses_by_name() -> None:
    model = new_model(SHARED, vocab_size=50)
    with pytest.raises(ConfigError, match="shared_layers is \\[0, 0, 1, 1\\], and a student is made of single layers"):
        student_from(model, [0, 3])
    with pytest.raises(ConfigError, match=r"shared_layers is .* experts of a layer are made of its own feed-forward"):
        upcycled(model, num_experts=4, num_experts_per_tok=2)
    with pytest.raises(ConfigError, match=r"shared_layers is .*, which vLLM serves .* use rollout.engine: embedded"):
        check_served(model.config)
