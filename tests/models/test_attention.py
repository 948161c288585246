"""The attention function in models of `transformers`: packed, paged and padded tokens, and refusals."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from alignlab.errors import ConfigError
from alignlab.models.decoder import hidden_states, output_head, require_paging
from alignlab.models.layout import attention
from alignlab.types import Segments
from tests.models.conftest import SIZES, VOCAB, make_segments, sequences_of


def mistral(**options):
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4, **options))


def gemma2(**options):
    caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, sliding_window=4, **caps, **options))


def gpt2(**options):
    config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1, **options)
    return GPT2LMHeadModel(config)


def bloom(**options):
    return BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, **options))


def error_against_each_alone(model, twin, pack, tokens) -> float:
    """Largest difference of outputs and gradients from those of each sequence computed alone by `twin`."""
    packed = hidden_states(model, tokens, pack.position_ids, pack)
    weights = torch.randn(packed.shape, generator=torch.Generator().manual_seed(2))
    loss, reference, errors = (packed * weights)[pack.sequence_of_token >= 0].sum(), torch.zeros(()), []
    for index in sequences_of(pack):
        alone = twin.get_decoder()(input_ids=tokens[index][None]).last_hidden_state[0]
        own = pack.sequence_of_token[index] >= 0
        errors.append((packed[index][own] - alone[own]).detach().abs().max())
        reference = reference + (alone * weights[index])[own].sum()
    loss.backward()
    reference.backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        if theirs.grad is not None:
            errors.append((ours.grad - theirs.grad).abs().max() / theirs.grad.abs().max().clamp_min(1))
    return max(float(error) for error in errors)


def twin_of(model, implementation="eager"):
    copy = type(model)(type(model.config)(**model.config.to_dict(), attn_implementation=implementation))
    copy.load_state_dict(model.state_dict())
    return copy.eval()


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_packed_equals_each_sequence_alone(name, pack, tokens, request):
    model = request.getfixturevalue(name)
    assert error_against_each_alone(model, twin_of(model), pack, tokens) < 1e-5


@pytest.mark.parametrize("make", [mistral, gemma2], ids=lambda make: make.__name__)
def test_window_and_soft_cap_reach_across_the_prompt(make, pack, tokens):
    torch.manual_seed(0)
    model = make(attn_implementation="alignlab").eval()
    assert error_against_each_alone(model, twin_of(model), pack, tokens) < 1e-5


@pytest.mark.parametrize("make", [gpt2, bloom], ids=lambda make: make.__name__)
def test_any_other_model_is_computed_on_padded_sequences(make, pack, tokens):
    torch.manual_seed(0)
    model = make(attn_implementation="eager").eval()
    assert error_against_each_alone(model, twin_of(model), pack, tokens) < 1e-5


def test_padded_path_equals_the_packed_one_for_prompts_too(llama, pack, tokens):
    packed = hidden_states(llama, tokens, pack.position_ids, pack)
    llama.set_attn_implementation("sdpa")
    padded = hidden_states(llama, tokens, pack.position_ids, pack)
    torch.testing.assert_close(padded, packed, rtol=1e-4, atol=1e-5)


def test_adapters_around_the_model_change_nothing_in_the_path(llama, pack, tokens):
    before = hidden_states(llama, tokens, pack.position_ids, pack)
    model = get_peft_model(llama, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    assert torch.equal(hidden_states(model, tokens, pack.position_ids, pack), before)


@pytest.mark.parametrize("make", [mistral, gemma2], ids=lambda make: make.__name__)
def test_generate_on_a_padded_batch_is_unchanged(make):
    torch.manual_seed(0)
    model = make(attn_implementation="alignlab").eval()
    ids = torch.randint(2, VOCAB, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    ours = model.generate(ids, **options)
    assert torch.equal(ours, twin_of(model).generate(ids, **options))


def test_a_paged_layout_attends_layer_by_layer(llama, tokens):
    seen = []

    class Recorder:
        def attend(self, layer_idx, query, key, value, *, scaling, sliding_window, softcap, sinks):
            seen.append((layer_idx, query.shape, key.shape, round(scaling, 4), sliding_window, softcap))
            return torch.zeros_like(query).transpose(1, 2)

    count = len(tokens)
    out = hidden_states(llama, tokens, torch.arange(count), Recorder())
    assert out.shape == (count, 32)
    assert seen == [(i, (1, 4, count, 8), (1, 2, count, 8), 0.3536, None, None) for i in (0, 1)]


def test_a_paged_layout_needs_our_attention(llama, tokens):
    llama.set_attn_implementation("sdpa")
    with pytest.raises(ConfigError, match=r"'sdpa'; call model.set_attn_implementation\('alignlab'\)"):
        hidden_states(llama, tokens, torch.arange(len(tokens)), SimpleNamespace(attend=None))
    assert llama.config._attn_implementation == "sdpa", "trying the advice leaves the model as it was"
    with pytest.raises(ConfigError, match=r"BloomForCausalLM was loaded with 'eager', for .* use rollout.engine: vllm"):
        require_paging(bloom(attn_implementation="eager"))
    llama.set_attn_implementation("alignlab")
    require_paging(llama)


def test_a_model_that_drops_the_layout_is_refused(llama, pack, tokens):
    layer = llama.model.layers[1]
    forward = layer.forward
    layer.forward = lambda *args, layout=None, **kwargs: forward(*args, **kwargs)
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM 1 of 2 did, so it cannot be packed"):
        hidden_states(llama, tokens, pack.position_ids, pack)


def test_a_model_with_its_own_attention_is_refused(pack, tokens):
    with pytest.raises(ConfigError, match=r"BloomForCausalLM has an attention of its own.*'eager'"):
        hidden_states(bloom(attn_implementation="alignlab"), tokens, pack.position_ids, pack)


def test_other_kinds_of_layers_are_refused(llama, pack, tokens):
    llama.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(ConfigError, match="chunked_attention, which cannot be packed"):
        hidden_states(llama, tokens, pack.position_ids, pack)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"position_bias": torch.ones(2)}, "position biases"),
        ({"layout": Segments.single(3), "dropout": 0.1}, "attention_dropout is 0.1"),
    ],
)
def test_what_packed_attention_lacks_is_refused(options, message):
    x = torch.randn(1, 2, 3, 4)
    with pytest.raises(ConfigError, match=message):
        attention(torch.nn.Module(), x, x, x, None, scaling=0.5, **options)


def test_output_head_gives_bias_and_soft_cap(llama):
    weight, bias, softcap = output_head(llama)
    assert weight is llama.model.embed_tokens.weight and bias is None and softcap is None
    assert output_head(gemma2())[2] == 3.0
    biased = torch.nn.Linear(32, VOCAB)
    llama.set_output_embeddings(biased)
    assert output_head(llama)[1] is biased.bias


def test_an_adapted_or_scaled_head_is_refused(llama):
    with pytest.raises(ConfigError, match=r"logits_scaling is 4.0"):
        output_head(GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)))
    untied = LlamaForCausalLM(llama.config.__class__(**SIZES))
    adapted = get_peft_model(untied, LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ConfigError, match="an adapter is on the output head"):
        output_head(adapted)
    with pytest.raises(ConfigError, match="LlamaModel has no output head"):
        output_head(llama.model)


def test_deep_packs_keep_to_their_own_prompt(llama):
    """Changing one prompt changes its completions and no others."""
    pack = make_segments([(4, [3, 3]), (4, [3])])
    tokens = torch.full((pack.num_tokens,), 5)
    other = tokens.clone()
    other[0] = 9
    before, after = (hidden_states(llama, t, pack.position_ids, pack) for t in (tokens, other))
    changed = (before != after).any(-1)
    assert changed[:10].all() and not changed[10:].any()
