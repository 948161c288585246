"""Multi-token prediction: against `transformers`, by hand, and what its loss trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from transformers import LlamaConfig
from transformers.modeling_layers import MtpLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from alignlab.errors import ConfigError
from alignlab.models.cache_spec import cache_specs
from alignlab.models.config import PolicyConfig
from alignlab.models.mtp import check_trains, mtp_losses, stream_of
from alignlab.models.policy import Policy
from alignlab.models.transformer import PolicyForCausalLM
from alignlab.types import Segments
from tests.models.attention_kinds import KINDS, SHAPE, make_model
from tests.models.conftest import make_segments, packs, sequences_of
from tests.reference.float64 import really_float64


def make_policy(**changes: Any) -> PolicyForCausalLM:
    torch.manual_seed(0)
    config = PolicyConfig(**SHAPE, vocab_size=50, num_mtp_layers=1, **changes)
    return PolicyForCausalLM(config).double()


def losses(model: Any, tokens: Any, segments: Segments, mask: Any) -> Any:
    states = Policy(model).states(tokens, segments, counted=mask)[0]
    return mtp_losses(model, states, tokens, segments, mask, chunk_tokens=None, num_ids=None)


@settings(max_examples=10, deadline=None)
@given(packs())
def test_packed_predictions_are_those_of_transformers_for_each_sequence_alone(groups: Any) -> None:
    segments = make_segments(groups)
    tokens = torch.randint(0, 50, (segments.num_tokens,), generator=torch.Generator().manual_seed(1))
    mask = segments.predecessors >= 0
    with really_float64():
        ours = make_policy()
        fields = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
        hub = LlamaConfig(**{name: SHAPE[name] for name in fields}, num_hidden_layers=1, vocab_size=50)
        hub._attn_implementation = "eager"
        theirs = MtpLayer(hub, LlamaDecoderLayer, LlamaRMSNorm, 0).double()
        assert ours.mtp is not None
        theirs.load_state_dict(ours.mtp.state_dict())
        ours_by_token = torch.zeros(segments.num_tokens, dtype=torch.float64)
        found = losses(ours, tokens, segments, mask)
        if found is not None:
            ours_by_token[mask] = found
        rotary = LlamaRotaryEmbedding(hub)
        for index in sequences_of(segments):
            own, length = tokens[index], len(index) - 1
            if length < 1:
                continue
            states = ours.model(own[None]).last_hidden_state
            causal = torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)[None, None]
            positions = torch.arange(1, length + 1)[None]
            embedded = ours.model.embed_tokens(own[1:])[None]
            hidden = theirs(embedded, states[:, :-1], rotary(states, positions), causal, positions, None)
            logprobs = ours.lm_head(hidden)[0, :-1].log_softmax(-1)  # at t: of the token after t
            expected = -0.1 * logprobs.gather(1, own[2:, None])[:, 0]
            torch.testing.assert_close(ours_by_token[index[2:]], expected, rtol=1e-10, atol=1e-12)
            assert ours_by_token[index[:2]].eq(0).all(), "no token has two before it"


def test_a_stream_leaves_out_the_first_token_of_each_root() -> None:
    segments = make_segments([(1, [2, 1]), (3, [2])])  # a prompt of one token vanishes
    stream = stream_of(segments)
    assert stream is not None
    assert stream.tokens.tolist() == [1, 2, 3, 5, 6, 7, 8] and stream.predecessors.tolist() == [0, 1, 0, 4, 5, 6, 7]
    assert stream.segments.lengths == (2, 1, 2, 2) and stream.segments.prefixes == (-1, -1, -1, 2)
    assert stream.position_ids.tolist() == [1, 2, 1, 1, 2, 3, 4]
    assert stream_of(make_segments([(1, []), (1, [])])) is None


@pytest.mark.parametrize("detach", [False, True])
def test_what_the_loss_trains(detach: bool) -> None:
    model = make_policy(mtp_detach=detach)
    segments = make_segments([(5, [3, 1, 6]), (7, [])])
    tokens = torch.randint(0, 50, (segments.num_tokens,))
    losses(model, tokens, segments, segments.predecessors >= 0).sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    everything = {name for name, _ in model.named_parameters()}
    assert trained == ({name for name in everything if name.startswith("mtp.")} if detach else everything)


def test_a_policy_has_the_loss_where_it_trains_alone() -> None:
    policy = Policy(make_policy(mtp_loss_coef=0.25).float()).train()
    segments = make_segments([(5, [3, 1])])
    tokens, mask = torch.randint(0, 50, (9,)), torch.tensor([False] * 5 + [True] * 4)
    output = policy(tokens, segments, mask)
    assert output.mtp_loss is not None and output.mtp_loss[:5].eq(0).all() and (output.mtp_loss[5:] > 0).all()
    with torch.no_grad():
        assert policy(tokens, segments, mask).mtp_loss is None
    assert policy.eval()(tokens, segments, mask).mtp_loss is None


@pytest.mark.parametrize("kind", ["qwen3-next", "kimi-linear", "all", "latent-sinks-soft-cap"])
def test_the_layer_is_of_the_last_layers_kind_and_is_not_cached(kind: str) -> None:
    plain, model = make_model(kind), make_model(kind, num_mtp_layers=1).double()
    assert KINDS[kind] and cache_specs(plain) == cache_specs(model)
    segments = make_segments([(5, [3, 1, 6]), (7, [])])
    tokens = torch.randint(0, 50, (segments.num_tokens,))
    assert losses(model, tokens, segments, segments.predecessors >= 0).isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_mtp_layers": 2}, "num_mtp_layers is 2, and must be 0 or 1"),
        ({"num_mtp_layers": 1, "mtp_loss_coef": 0}, "mtp_loss_coef is 0, and must be positive"),
        ({"mtp_detach": True}, "mtp_detach is True, and num_mtp_layers is 0; use num_mtp_layers: 1"),
    ],
    ids=str,
)  # fmt: skip
def test_impossible_fields_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PolicyConfig(**SHAPE, **changes)


def test_trainers_that_do_not_train_the_layer_refuse_it() -> None:
    with pytest.raises(ConfigError, match="num_mtp_layers is 1, and DPO does not train multi-token prediction; use"):
        check_trains(make_policy(), "DPO", trains_mtp=False)
    check_trains(make_policy(), "SFT", trains_mtp=True)
    check_trains(make_model("sinks"), "DPO", trains_mtp=False)
