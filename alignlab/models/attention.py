"""The one seam between a model and how its tokens are laid out: the attention function "alignlab".

`transformers` looks attention up by name, and hands keyword arguments of a model's forward down to it. A model whose
`config._attn_implementation` is "alignlab" is told the layout of its flat tokens by the keyword `layout`:

    Segments        packed sequences, some of which share a prompt: training          -> `packed_attention`
    another object  its method `attend`: the rollout engine's paged batch             -> the engine
    None            an ordinary padded batch, as in `model.generate()`                -> torch's own attention

Shapes: N tokens, H heads, K kv heads, D head size, V vocabulary; the model's hidden size is D in `hidden_states`.
"""

from __future__ import annotations

import math
import numbers
import threading
from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from alignlab.errors import ConfigError
from alignlab.models.packed_attention import packed_attention
from alignlab.types import Segments

ATTENTION = "alignlab"
_OWN_ATTENTION = (
    "load it with alignlab.models.checkpoints.load_model or attn_implementation='eager', which train it on padded "
    "batches, and generate with vLLM (rollout.engine)"
)


class PagedLayout(Protocol):
    """A layout that keeps keys and values of earlier tokens itself."""

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor,
        *, scaling: float, sliding_window: int | None, softcap: float | None,
    ) -> Tensor:
        """Attention of `query` [1,H,N,D] to `key`, `value` [1,K,N,D] and to what is cached -> [1,N,H,D]."""
        ...


Layout = Segments | PagedLayout
_calls = threading.local()


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    *, scaling: float, dropout: float = 0.0, sliding_window: int | None = None, softcap: float | None = None,
    layout: Layout | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as `transformers` calls it.

    Args:
        module: the attention module; `layer_idx` tells a paged layout which layer's cache to use.
        query, key, value: [1,H,N,D], [1,K,N,D], [1,K,N,D], positions already applied.
        attention_mask: read only where there is no layout.
        scaling: factor of the scores, before the cap.
        sliding_window: a token sees this many tokens, itself included; None sees all.
        softcap: scores become cap * tanh(score / cap).
        layout: see the top of this module.

    Returns:
        ([1,N,H,D], None)
    """
    if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise ConfigError(
            f"attention 'alignlab' knows neither attention sinks nor position biases, which {type(module).__name__} "
            f"uses; {_OWN_ATTENTION}"
        )
    if layout is None:
        return _padded(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, softcap=softcap, **kwargs
        ), None
    if dropout:
        raise ConfigError(
            f"attention_dropout is {dropout}, and packed attention has none; set it to 0, or call "
            "alignlab.models.dropout.switch_off_dropout(model), as every trainer does"
        )
    _calls.count = getattr(_calls, "count", 0) + 1
    if isinstance(layout, Segments):
        return packed_attention(
            query, key, value, layout, scaling=scaling, sliding_window=sliding_window, softcap=softcap
        ), None
    layer_idx = cast(int, module.layer_idx)
    return layout.attend(
        layer_idx, query, key, value, scaling=scaling, sliding_window=sliding_window, softcap=softcap
    ), None


def _padded(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
    *, scaling: float, dropout: float, softcap: float | None, **kwargs: Any,
) -> Tensor:
    """Attention of an ordinary batch; the mask, which holds any window, is the one that `transformers` made."""
    if softcap is None:
        kwargs.pop("output_attentions", None)
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)[0]
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = softcap * torch.tanh(query.float() @ key.float().transpose(-1, -2) * scaling / softcap)
    if mask is None and query.shape[2] > 1:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        lowest = torch.finfo(scores.dtype).min  # and not -inf: padded queries see nothing
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    weights = nn.functional.dropout(scores.softmax(-1).to(value.dtype), dropout, module.training)
    return (weights @ value).transpose(1, 2)


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The causal language model itself, whether or not adapters are wrapped around it."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def num_positions(model: nn.Module) -> float:
    """Tokens that a sequence of the model's may have; without an end where its config names none."""
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
    found: set[int] = set()
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
            found.add(int(index))
    return found


def hidden_states(
    model: nn.Module, tokens: Tensor, position_ids: Tensor, layout: Layout, **kwargs: Any
) -> Tensor:
    """Output of the final norm of the decoder under a causal language model.

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
    before = getattr(_calls, "count", 0)
    output = lm.get_decoder()(
        input_ids=tokens[None], position_ids=position_ids[None], attention_mask=unused_mask, use_cache=False,
        layout=layout, **kwargs,
    )
    _require_layout_used(lm, getattr(_calls, "count", 0) - before)
    return output.last_hidden_state[0]


def _padded_hidden_states(lm: PreTrainedModel, tokens: Tensor, layout: Layout, **kwargs: Any) -> Tensor:
    """The same through a model's own attention. A prompt's states are those of its first completion's copy."""
    if not isinstance(layout, Segments):
        raise _unpaged(lm)
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
    """Attention of a class's own would not see the layout; masks of other kinds of layers would be lost to it."""
    if not lm._supports_attention_backend:
        raise ConfigError(
            f"{type(lm).__name__} has an attention of its own, which cannot be packed; {_OWN_ATTENTION}"
        )
    kinds = set(getattr(lm.config.get_text_config(), "layer_types", None) or ())
    unknown = sorted(kinds - {"full_attention", "sliding_attention"})
    if unknown:
        raise ConfigError(
            f"{type(lm).__name__} has layers of type {', '.join(unknown)}, which cannot be packed; {_OWN_ATTENTION}"
        )


def _require_layout_used(lm: PreTrainedModel, calls: int) -> None:
    """A model that drops `layout`, or has layers without attention, would mix the packed sequences in silence."""
    layers = lm.config.get_text_config().num_hidden_layers
    if calls != layers:
        raise ConfigError(
            f"every layer must attend through attention 'alignlab' with its layout; in {type(lm).__name__} "
            f"{calls} of {layers} did, so it cannot be packed; {_OWN_ATTENTION}"
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
    """Why the tokens of a model cannot be computed as they are packed, by trying two of them; None where they can."""
    before, training = lm.config._attn_implementation, lm.training
    tokens = torch.zeros(2, dtype=torch.int64, device=lm.device)
    try:
        if lm._supports_attention_backend:
            lm.set_attn_implementation(ATTENTION)
            hidden_states(lm.eval(), tokens, torch.arange(2, device=lm.device), Segments.single(2, lm.device))
        else:
            _check_architecture(lm)
    except ConfigError as error:
        return str(error)
    finally:
        lm.train(training)
        lm.set_attn_implementation(before)
    return None


@torch.no_grad()
def sees_later_tokens(lm: PreTrainedModel) -> bool:
    """Whether a token's state depends on the tokens after it, as in an encoder, by trying two pairs of tokens."""
    before, training = lm.config._attn_implementation, lm.training
    pairs = torch.tensor([[0, 0], [0, 1]], device=lm.device)
    try:
        if before == ATTENTION:  # which would hide it
            lm.set_attn_implementation("eager")
        first, second = lm.eval().get_decoder()(input_ids=pairs, use_cache=False).last_hidden_state[:, 0]
    finally:
        lm.train(training)
        lm.set_attn_implementation(before)
    tolerance = (1e-4 if first.dtype == torch.float32 else 1e-2) * float(first.abs().max())
    return bool((first - second).abs().max() > tolerance)


def _unpaged(lm: PreTrainedModel) -> ConfigError:
    """The embedded engine's refusal of a model whose attention is another, with what can be done about it."""
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
    """Weight [V, hidden size], bias [V] and soft-cap of the layer that gives the logits.

    Raises:
        ConfigError: the logits are more than that: adapted, or scaled; or the model gives none.
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
