"""The layer for multi-token prediction in files of DeepSeek-V3: computed as by `transformers`, and written back."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import MtpModel

from alignlab.config.model import ModelSettings
from alignlab.config.rollout import RolloutSettings
from alignlab.config.trainers import GRPOConfig
from alignlab.errors import CheckpointError, ConfigError
from alignlab.models.config import PolicyConfig
from alignlab.models.hub.checkpoints import empty_model, load_model, new_model, save_model
from alignlab.models.hub.export import checkpoint_shapes, streamed_tensors
from alignlab.models.moe import expert_counts
from alignlab.models.mtp import mtp_losses
from alignlab.models.policy import Policy
from alignlab.models.router_state import is_router_state
from alignlab.models.served_attention import check_served
from alignlab.rollout.embedded.engine import EmbeddedEngine
from alignlab.trainers.grpo import GRPOTrainer
from alignlab.types import Prompt, SamplingParams
from tests.models.conftest import make_segments, sequences_of
from tests.models.test_parity import HUB, SIZES, randomize
from tests.reference.float64 import grouped_product, really_float64
from tests.trainers.conftest import even_ids
from tests.trainers.conftest import rows as rows
from tests.trainers.conftest import tokenizer as tokenizer

LAYERS = SIZES["num_hidden_layers"]
PREFIX = f"model.layers.{LAYERS}"


def tensors_of(layer: Any, theirs: Any) -> dict[str, Tensor]:
    """The tensors of a layer under the names of the published files."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in layer.state_dict().items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            block = name.removeprefix("mtp_block.").rpartition(".")[0]
            for expert, matrix in enumerate(tensor):
                keys = ("down_proj",) if "down" in name else ("gate_proj", "up_proj")
                parts = dict(zip(keys, matrix.chunk(len(keys)), strict=True))
                tensors |= {f"{PREFIX}.{block}.{expert}.{key}.weight": part for key, part in parts.items()}
        else:
            own = name if "mtp_block" in name else name.replace("post_norm", "shared_head.norm")
            own = own.removeprefix("mtp_block.")
            tensors[f"{PREFIX}.{own}"] = tensor
    tensors[f"{PREFIX}.embed_tokens.weight"] = theirs.model.embed_tokens.weight
    tensors[f"{PREFIX}.shared_head.head.weight"] = theirs.lm_head.weight
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


@pytest.fixture
def published(tmp_path: Path) -> tuple[Path, Any, Any]:
    """A folder as DeepSeek publishes them, and the models of `transformers` that it holds."""
    torch.manual_seed(0)
    config: Any = HUB["deepseek-v3"]()
    config.vocab_size = 262  # of the tokenizer that trains it
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    mtp = MtpModel(theirs, 1).eval()
    for matrix in mtp.layers.parameters():
        if matrix.ndim > 1:
            torch.nn.init.normal_(matrix, std=0.2)
    for model in (theirs, mtp):
        randomize(model)
    folder = tmp_path / "hub"
    theirs.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors") | tensors_of(mtp.layers[0], theirs)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder, theirs, mtp


def test_predictions_are_those_of_transformers(published: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", grouped_product)
    folder, theirs, mtp = published
    ours: Any = load_model(str(folder), dtype=torch.float64, mtp=True)
    segments = make_segments([(5, [3, 1, 6]), (7, []), (2, [4, 4])])
    tokens = torch.randint(3, 61, (segments.num_tokens,), generator=torch.Generator().manual_seed(1))
    mask = segments.predecessors >= 0
    for model in (theirs, mtp):
        model.double()
        model.config._experts_implementation = "eager"
    by_token = torch.zeros(segments.num_tokens, dtype=torch.float64)
    with really_float64(), torch.no_grad():
        states = Policy(ours).states(tokens, segments, counted=mask)[0]
        found = mtp_losses(ours, states, tokens, segments, mask, chunk_tokens=None, num_ids=None)
        assert found is not None
        by_token[mask] = found
        for index in sequences_of(segments):
            own, length = tokens[index], len(index) - 1
            hidden = theirs.model(own[None]).last_hidden_state
            causal = torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)[None, None]
            positions = torch.arange(1, length + 1)[None]
            rotation = theirs.model.rotary_emb(hidden, positions)
            embedded = theirs.model.embed_tokens(own[1:])[None]
            predicted = mtp.layers[0](embedded, hidden[:, :-1], rotation, causal, positions, None)
            logprobs = theirs.lm_head(predicted)[0, :-1].log_softmax(-1)
            expected = -0.1 * logprobs.gather(1, own[2:, None])[:, 0]
            torch.testing.assert_close(by_token[index[2:]], expected, rtol=1e-10, atol=1e-12)


def test_every_tensor_is_written_back_and_streamed(published: Any, tmp_path: Path) -> None:
    folder, *_ = published
    ours: Any = load_model(str(folder), dtype=torch.float32, mtp=True)
    save_model(ours, tmp_path / "back", weights=False)
    save_model(ours, tmp_path / "back")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "back"))
    streamed = dict(streamed_tensors(ours))
    assert before.keys() == after.keys() == streamed.keys() == checkpoint_shapes(ours).keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) and torch.equal(streamed[name], tensor), name
    configs = [json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "back")]
    assert configs[0] | {"scoring_func": "sigmoid", "topk_method": "noaux_tc"} == configs[1]  # which vLLM reads
    again: Any = load_model(str(tmp_path / "back"), dtype=torch.float32, mtp=True)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in ours.state_dict().items())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager")
    tokens = torch.arange(3, 21).view(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, plain(tokens).logits)


def test_the_layer_is_left_out_unless_it_is_asked_for(published: Any, caplog: pytest.LogCaptureFixture) -> None:
    folder, theirs, _ = published
    with caplog.at_level(logging.WARNING, logger="alignlab.models.hub.streaming"):
        ours: Any = load_model(str(folder), dtype=torch.float32)
    assert ours.config.num_mtp_layers == 0 and ours.mtp is None
    assert "is left out, as model.mtp says, and will not be written back" in caplog.text
    empty: Any = empty_model(str(folder))
    assert empty.config.num_mtp_layers == 0
    tokens = torch.arange(3, 21).view(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits)


def test_grpo_trains_the_layer_by_itself_beside_the_policy(
    published: Any, tokenizer: Any, tmp_path: Path, rows: Any
) -> None:
    """The policy's weights are those of a run without the layer, whose router is not counted or balanced."""
    ends, gaps = [], []
    for mtp in (True, False):
        model: Any = load_model(str(published[0]), dtype=torch.float32, mtp=mtp)
        start = {name: weight.clone() for name, weight in model.state_dict().items()}
        config = GRPOConfig(
            output_dir=tmp_path / str(mtp), num_steps=2, num_prompts=2, group_size=4, trackers=(),
            optim={"learning_rate": 1e-2, "max_grad_norm": 1e9}, sampling={"max_new_tokens": 6},
        )  # type: ignore[arg-type]  # pydantic reads the sections
        trainer = GRPOTrainer(
            model, even_ids, config, rows, tokenizer=tokenizer,
            callbacks=[lambda _, __, metrics: gaps.append(metrics["rollout_gap"])],
        )
        trainer.train()
        assert len(expert_counts(model)) == len(model.config.sparse_layers) == 2
        ends.append({name: weight for name, weight in model.state_dict().items() if not is_router_state(name)})
        moved = {name for name, weight in ends[-1].items() if (weight - start[name]).abs().max() > 0}
        assert any(name.startswith("mtp.mtp_block.mlp.experts") for name in moved) == mtp
        assert not any(name.startswith("mtp.") and name.endswith("correction_bias") for name in moved)
    assert max(gaps) < 1e-5
    assert all(torch.equal(ends[0][name], weight) for name, weight in ends[1].items())


def test_the_engine_drafts_by_the_layer_and_changes_no_token(published: Any, tokenizer: Any) -> None:
    model = load_model(str(published[0]), dtype=torch.float32, mtp=True)
    prompts = [Prompt(tuple(range(3, 3 + length)), "", index, {}) for index, length in enumerate((4, 19))]
    texts = []
    for speculation in (None, {"type": "mtp", "num_drafts": 2, "always": True}):
        engine = EmbeddedEngine(model, tokenizer, RolloutSettings(speculation=speculation))  # type: ignore[arg-type]
        rollouts = engine.generate(prompts, SamplingParams(temperature=0.0, max_new_tokens=12, ignore_eos=True))
        texts.append([rollout.completions[0].token_ids for rollout in rollouts])
    assert texts[0] == texts[1]


def test_copies_that_differ_are_refused(published: Any) -> None:
    folder, *_ = published
    weights = load_file(folder / "model.safetensors")
    weights[f"{PREFIX}.shared_head.head.weight"] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"shared_head\.head\.weight must be a copy of lm_head\.weight"):
        load_model(str(folder), dtype=torch.float32, mtp=True)
    load_model(str(folder), dtype=torch.float32)


def test_a_checkpoint_without_the_layer_is_refused(published: Any, tmp_path: Path) -> None:
    _, theirs, _ = published
    theirs.save_pretrained(tmp_path / "without")
    with pytest.raises(CheckpointError, match=rf"model.mtp is true, and .* in its files \({PREFIX}.eh_proj.weight\)"):
        load_model(str(tmp_path / "without"), dtype=torch.float32, mtp=True)
    save_model(new_model({"hidden_size": 16, "num_hidden_layers": 1}, vocab_size=30), tmp_path / "llama")
    with pytest.raises(CheckpointError, match="must be of deepseek_v3, with num_nextn_predict_layers 1"):
        load_model(str(tmp_path / "llama"), dtype=torch.float32, mtp=True)


def test_a_new_model_with_the_layer_is_written_as_its_family(tmp_path: Path) -> None:
    torch.manual_seed(0)
    fields = {"preset": "deepseek_v3", "num_mtp_layers": 1, "mtp_mlp_layer_type": "sparse", "num_hidden_layers": 2}
    model = new_model(fields, vocab_size=50)
    save_model(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "deepseek_v3"
    again: Any = load_model(str(tmp_path), dtype=torch.float32, mtp=True)
    state = model.state_dict()
    assert all(torch.equal(weight, state[name]) for name, weight in again.state_dict().items() if "load" not in name)
    with pytest.raises(ConfigError, match="num_mtp_layers is 1, and vLLM holds no such layer"):
        check_served(again.config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": {"hidden_size": 8}, "tokenizer": "x"}, "be false for a new model"),
        ({"name": "x", "student": {"num_layers": 1}}, "be false with student"),
        ({"name": "x", "lora": {"rank": 2}}, "be false with lora"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_with_it(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"mtp is True, and must {message}"):
        ModelSettings(**settings, mtp=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_mtp_layers": 1, "mtp_mlp_layer_type": "sparse"}, "mtp_mlp_layer_type is sparse, and must be dense"),
        ({"num_mtp_layers": 1, "mtp_mlp_layer_type": "both"}, "mtp_mlp_layer_type is 'both', and must be dense or sp"),
        ({"num_experts": 4, "moe_intermediate_size": 8, "mtp_mlp_layer_type": "sparse"}, "and num_mtp_layers is 0"),
    ],
)  # fmt: skip
def test_fields_that_do_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PolicyConfig(**changes)
