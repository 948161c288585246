"""Dropout in a model's own layers is switched off for training.

Rollouts are sampled without dropout, so log-probs with dropout would be those of another policy. Packed attention has
none. An adapter's own dropout (`lora.dropout`) stays, and regularises the adapter. So does `residual_dropout` of our
models (Vaswani et al. 2017, arXiv:1706.03762, Sec. 5.4) where a trainer compares no log-probs: SFT, and distillation on
fixed texts.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from alignlab.models.config import PolicyConfig
from alignlab.models.decoder import causal_lm

_log = logging.getLogger(__name__)
# attention_dropout, attn_pdrop, resid_pdrop, layerdrop, drop_path_rate; not those of heads that a policy lacks
_NAME = re.compile(r"^(?!classifier|summary).*drop")
_RESIDUAL = "residual_dropout"
_ADAPTERS = re.compile(r"(^|\.)lora_dropout(\.|$)")


def without_dropout(model: nn.Module, *, keeps_residual: bool = False) -> None:
    """Switch a model's own dropout off for training, with a warning if it had any.

    Args:
        keeps_residual: `residual_dropout` of our models stays.
    """
    rates = switch_off_dropout(model, keeps_residual=keeps_residual)
    if rates:
        _log.warning(
            "dropout of the model is switched off (%s): rollouts and the reference have none, and log-probs with it "
            "would belong to another policy; for dropout in an adapter use lora.dropout",
            ", ".join(f"{name} {rate:g}" for name, rate in rates.items()),
        )


def switch_off_dropout(model: nn.Module, *, keeps_residual: bool = False) -> dict[str, float]:
    """Set every dropout of a language model to 0, except those of its adapters.

    Modules hold dropout as a layer or as a number, and some read it from the config in each forward pass.

    Args:
        keeps_residual: `residual_dropout` of our models stays.

    Returns:
        The rates that were above 0, by their names in the modules and the config.
    """
    lm = causal_lm(model)
    kept = {_RESIDUAL} if keeps_residual and isinstance(lm.config, PolicyConfig) else set()
    rates: dict[str, float] = {}
    for name, module in lm.named_modules():
        if _ADAPTERS.search(name):
            continue
        if isinstance(module, _DropoutNd):
            _switch_off(module, ["p"], name.rpartition(".")[2], rates)
        _switch_off(module, _dropouts(module, kept), None, rates)
    text_config = lm.config.get_text_config()
    for config in (lm.config,) if text_config is lm.config else (lm.config, text_config):
        _switch_off(config, _dropouts(config, kept), None, rates)
    return rates


def _dropouts(holder: Any, kept: set[str]) -> list[str]:
    """Return the names of the dropouts that a module or a config has, but for those that stay."""
    return [key for key in vars(holder) if _NAME.search(key) and key not in kept]


def _switch_off(holder: Any, names: list[str], label: str | None, rates: dict[str, float]) -> None:
    """Set attributes to 0, and note their rates under `label` or their own names."""
    for name in names:
        rate = vars(holder)[name]
        if isinstance(rate, float) and 0 < rate <= 1:
            rates[label or name] = max(rate, rates.get(label or name, 0.0))
            setattr(holder, name, 0.0)
