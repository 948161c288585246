"""Access to a language model's decoder and head, with or without adapters, whichever architecture it is.

Shapes: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignlab.errors import ConfigError
from alignlab.models.config import PolicyConfig
from alignlab.models.evaluation_mode import evaluation_mode
from alignlab.models.layout import ATTENTION, OTHER_ATTENTION, Layout, layout_calls
from alignlab.types import Segments


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """Return the causal language model itself, out of any adapters that are wrapped around it."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def lm_path(model: nn.Module) -> str:
    """Return the name of `causal_lm(model)` among the modules of `model`; empty for the model itself."""
    return "base_model.model" if isinstance(model, PeftModel) else ""


def num_positions(model: nn.Module) -> float:
    """Return how many tokens a sequence may have; infinity where the model's config names no limit."""
    return getattr(causal_lm(model).config.get_text_config(), "max_position_embeddings", None) or math.inf


def num_embeddings(model: nn.Module) -> int:
    """Return the rows of the model's embedding table: ids that it can read."""
    table: Any = causal_lm(model).get_input_embeddings()
    if isinstance(table, BaseTunerLayer):
        table = table.get_base_layer()
    rows = getattr(table, "num_embeddings", None)
    return int(table.weight.shape[0] if rows is None else rows)


def end_ids(model: nn.Module, places: Sequence[str] = ("config", "generation_config")) -> set[int]:
    """Return the ids that end a text by the model's config and its generation defaults, or by one of the two.

    Raises:
        ConfigError: one of the two holds something else for an id.
    """
    lm = causal_lm(model)
    result: set[int] = set()
    for name in places:
        ids = getattr(getattr(lm, name), "eos_token_id", None)
        for index in ids if isinstance(ids, list | tuple) else [ids]:
            if index is None:
                continue
            if isinstance(index, bool) or not isinstance(index, numbers.Integral):
                raise ConfigError(
                    f"the model's {name}.eos_token_id is {ids!r:.60}, and must be a token id or a list of them; "
                    f"correct {name}.json, or the field of a live model"
                )
            result.add(int(index))
    return result


def hidden_states(
    model: nn.Module, tokens: Tensor, position_ids: Tensor, layout: Layout, **kwargs: Any
) -> Tensor:
    """Return the output of the final norm of a causal language model's decoder.

    Args:
        model: ours, one of `transformers`', or a PeftModel around it. If its attention is "alignlab" the tokens are
            computed as they are packed; under any other, a slower path makes an ordinary padded batch of them, in
            which each sequence has its own copy of its prompt.
        tokens, position_ids: [N].
        layout: how the tokens divide into sequences.
        kwargs: handed to the decoder's forward.

    Returns:
        [N, hidden size]

    Raises:
        ConfigError: the model cannot be computed with this layout.
    """
    lm = causal_lm(model)
    if lm.config._attn_implementation != ATTENTION:
        return _padded_hidden_states(lm, tokens, layout, **kwargs)
    _check_architecture(lm)
    unused_mask = torch.empty((1, 1, 1, 1), device=tokens.device)  # 4-D masks are not touched by `transformers`
    before = layout_calls()
    output = lm.get_decoder()(
        input_ids=tokens[None], position_ids=position_ids[None], attention_mask=unused_mask, use_cache=False,
        layout=layout, **kwargs,
    )
    _require_layout_used(lm, layout_calls() - before)
    return output.last_hidden_state[0]


def _padded_hidden_states(lm: PreTrainedModel, tokens: Tensor, layout: Layout, **kwargs: Any) -> Tensor:
    """Return hidden states computed through a model's own attention, on a padded batch of whole sequences.

    A shared prompt is computed once for each of its completions; the states of the first copy are returned.
    """
    if not isinstance(layout, Segments):
        raise _unpaged(lm)
    assert kwargs.get("kv_replay") is None, "what the embedded engine samples is computed packed"
    if kwargs.get("routing") is not None:
        raise ConfigError(
            f"expert choices can only be recorded on packed tokens, and the attention of {type(lm).__name__} is "
            f"{lm.config._attn_implementation!r}; call model.set_attn_implementation('alignlab')"
        )
    runs = [torch.arange(a, a + n) for a, n in zip(layout.starts, layout.lengths, strict=True)]
    shared = set(layout.prefixes)
    sequences = [
        torch.cat([runs[prefix], run]) if prefix >= 0 else run
        for i, (run, prefix) in enumerate(zip(runs, layout.prefixes, strict=True)) if i not in shared
    ]
    index = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=-1).to(tokens.device)
    present = index >= 0
    output = lm.get_decoder()(
        input_ids=tokens[index.clamp_min(0)], attention_mask=present.long(), use_cache=False, **kwargs
    )
    slots = present.flatten().nonzero()[:, 0]
    where = torch.full_like(tokens, index.numel()).scatter_reduce_(0, index.flatten()[slots], slots, "amin")
    return output.last_hidden_state.flatten(0, 1)[where]


def _check_architecture(lm: PreTrainedModel) -> None:
    """Raise if a class computes attention by itself, or has layers whose masks a layout would replace."""
    if not lm._supports_attention_backend:
        raise ConfigError(
            f"{type(lm).__name__} has an attention of its own, which cannot be packed; {OTHER_ATTENTION}"
        )
    if isinstance(lm.config, PolicyConfig):
        return  # all its kinds of attention follow a layout
    kinds = set(getattr(lm.config.get_text_config(), "layer_types", None) or ())
    unknown = sorted(kinds - {"full_attention", "sliding_attention"})
    if unknown:
        raise ConfigError(
            f"{type(lm).__name__} has layers of type {', '.join(unknown)}, which cannot be packed; {OTHER_ATTENTION}"
        )


def _require_layout_used(lm: PreTrainedModel, calls: int) -> None:
    """Raise if a layer has not attended with the layout: packed sequences would be mixed in silence."""
    layers = lm.config.get_text_config().num_hidden_layers
    if calls != layers:
        raise ConfigError(
            f"every layer must attend through attention 'alignlab' with its layout; in {type(lm).__name__} "
            f"{calls} of {layers} did, so it cannot be packed; {OTHER_ATTENTION}"
        )


def require_paging(model: nn.Module) -> None:
    """Raise if the embedded engine cannot run a model.

    Raises:
        ConfigError: its attention is not "alignlab".
    """
    lm = causal_lm(model)
    if lm.config._attn_implementation != ATTENTION:
        raise _unpaged(lm)
    _check_architecture(lm)


@torch.no_grad()
def packing_problem(lm: PreTrainedModel) -> str | None:
    """Return why a model cannot be computed on packed tokens, found by trying two of them; None if it can."""
    before = lm.config._attn_implementation
    tokens = torch.zeros(2, dtype=torch.int64, device=lm.device)
    try:
        if lm._supports_attention_backend:
            lm.set_attn_implementation(ATTENTION)
            with evaluation_mode(lm.modules()):
                hidden_states(lm, tokens, torch.arange(2, device=lm.device), Segments.single(2, lm.device))
        else:
            _check_architecture(lm)
    except ConfigError as error:
        return str(error)
    finally:
        lm.set_attn_implementation(before)
    return None


@torch.no_grad()
def sees_later_tokens(lm: PreTrainedModel) -> bool:
    """Return True if a token's state depends on later tokens, as in an encoder; two pairs of tokens are tried."""
    before = lm.config._attn_implementation
    pairs = torch.tensor([[0, 0], [0, 1]], device=lm.device)
    try:
        if before == ATTENTION:  # its causal mask would hide an encoder
            lm.set_attn_implementation("eager")
        with evaluation_mode(lm.modules()):
            first, second = lm.get_decoder()(input_ids=pairs, use_cache=False).last_hidden_state[:, 0]
    finally:
        lm.set_attn_implementation(before)
    tolerance = (1e-4 if first.dtype == torch.float32 else 1e-2) * float(first.abs().max())
    return bool((first - second).abs().max() > tolerance)


def _unpaged(lm: PreTrainedModel) -> ConfigError:
    """Return the embedded engine's error for a model with another attention than "alignlab"."""
    impossible = not lm._supports_attention_backend or packing_problem(lm) is not None
    fix = (
        "use rollout.engine: vllm if vLLM knows this architecture, or train it without rollouts (SFT, DPO, KTO)"
        if impossible
        else "call model.set_attn_implementation('alignlab') after import alignlab"
    )
    return ConfigError(
        f"the embedded engine needs attention 'alignlab', and {type(lm).__name__} was loaded with "
        f"{lm.config._attn_implementation!r}{', for tokens of it cannot be packed' if impossible else ''}; {fix}"
    )


def output_head(model: nn.Module) -> tuple[Tensor, Tensor | None, float | None]:
    """Return weight [V, D], bias [V] and soft-cap of the layer that gives the logits.

    Raises:
        ConfigError: the logits are adapted or scaled besides, or the model has no output head.
    """
    lm = causal_lm(model)
    if lm.get_output_embeddings() is None:
        raise ConfigError(
            f"the model must be a causal language model, and {type(lm).__name__} has no output head; load it by "
            "AutoModelForCausalLM, or give its name or path"
        )
    head, config = lm.get_output_embeddings(), lm.config.get_text_config()
    if isinstance(head, BaseTunerLayer):
        raise ConfigError(
            "an adapter is on the output head (lm_head), which must be frozen: log-probs are computed from its weight "
            "chunk by chunk; take it out of target_modules, or merge the adapter first (alignlab merge)"
        )
    for name in ("logits_scaling", "logit_scale", "lm_head_multiplier"):
        if getattr(config, name, 1) not in (1, None):
            raise ConfigError(
                f"{name} is {getattr(config, name)}, and logits must not be scaled; use another model, or save a copy "
                f"of this one with tie_word_embeddings false, the scale in lm_head's weight, and {name} 1"
            )
    return head.weight, getattr(head, "bias", None), getattr(config, "final_logit_softcapping", None)
