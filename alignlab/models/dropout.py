"""Dropout of a model's own layers, which training here does without.

Rollouts are sampled without dropout, so log-probs with it would be those of another policy; packed attention has none;
and a frozen base under an adapter is regularised by the adapter's own dropout (`lora.dropout`).
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from alignlab.models.attention import causal_lm

# attention_dropout, attn_pdrop, resid_pdrop, layerdrop, drop_path_rate; not those of heads that a policy has not
_NAME = re.compile(r"^(?!classifier|summary).*drop")
_ADAPTERS = re.compile(r"(^|\.)lora_dropout(\.|$)")


def switch_off_dropout(model: nn.Module) -> dict[str, float]:
    """Set every dropout of a language model to 0, except those of its adapters.

    Modules hold dropout as a layer or as a number, and some read it from the config in each forward pass.

    Returns:
        The values that were above 0, by the names that the modules and the config have for them.
    """
    lm = causal_lm(model)
    found: dict[str, float] = {}
    for name, module in lm.named_modules():
        if _ADAPTERS.search(name):
            continue
        if isinstance(module, _DropoutNd):
            _switch_off(module, ["p"], name.rpartition(".")[2], found)
        _switch_off(module, [key for key in vars(module) if _NAME.search(key)], None, found)
    for config in {id(part): part for part in (lm.config, lm.config.get_text_config())}.values():
        names = [key for key in vars(config) if _NAME.search(key)]
        _switch_off(config, names, None, found)
    return found


def _switch_off(holder: Any, names: list[str], called: str | None, found: dict[str, float]) -> None:
    for name in names:
        value = vars(holder)[name]
        if isinstance(value, float) and 0 < value <= 1:
            found[called or name] = max(value, found.get(called or name, 0.0))
            setattr(holder, name, 0.0)
