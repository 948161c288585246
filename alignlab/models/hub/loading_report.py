"""The report of `transformers` on the weights that it has loaded: which are missing, left over, or of other shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from alignlab.errors import CheckpointError
from alignlab.models.hub.mtp_files import FAMILY, is_behind_layers
from alignlab.models.router_state import is_router_state


def check_loaded(report: Mapping[str, Iterable[Any]], config: Any, name: str, *, headless: bool) -> None:
    """Raise unless every weight of a model was present, and every one of its files used.

    States of routers, layers for multi-token prediction and, without its own head, the score may differ.

    Args:
        report: of `from_pretrained` with `output_loading_info`.
        config: of the model.
        name: of the model, for the message.
        headless: the checkpoint has another head than a language model's.

    Raises:
        CheckpointError: with the first weights that do not fit.
    """

    def may_differ(key: str) -> bool:
        is_mtp = config.model_type == FAMILY and is_behind_layers(key, config.num_hidden_layers)
        return is_mtp or is_router_state(key) or (headless and key == "score.weight")

    problems = []
    for kind in ("missing", "unexpected", "mismatched"):
        keys = sorted(key for key in map(str, report[f"{kind}_keys"]) if not may_differ(key))
        if keys:
            problems.append(f"{kind} {', '.join(keys[:3])} ({len(keys)} in all)")
    if problems:
        raise CheckpointError(
            f"the weights of {name} do not fit its config: {'; '.join(problems)}; "
            "the checkpoint is damaged, or of another architecture"
        )
