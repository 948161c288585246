"""Versions of the policy's weights: their order, and the detection of weights that changed without a new version."""

from __future__ import annotations

from collections.abc import Iterable

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from alignlab.errors import RolloutError
from alignlab.models.pieces import version_of


def weights_stamp(parameters: Iterable[Tensor], modules: Iterable[nn.Module]) -> tuple[int, ...]:
    """Return a value that changes when a parameter is written to, or an adapter is switched on or off.

    torch's fused optimizers write without a mark; `loop.optim.make_optimizer` sets it after each step.
    """
    disabled = sum(module.disable_adapters for module in modules if isinstance(module, BaseTunerLayer))
    return (*(version_of(parameter) for parameter in parameters), disabled)


def changed_weights(policy_version: int) -> RolloutError:
    """Return the error of an engine whose weights are no longer the policy's."""
    return RolloutError(
        f"the policy's weights were changed since version {policy_version}, and the engine's cache and copies are of "
        "the old weights; call update_weights with a new version before generating"
    )


def check_advances(policy_version: int, present: int) -> None:
    """Raise if `policy_version` cannot follow the version `present`.

    Raises:
        RolloutError: it is not higher.
    """
    if policy_version <= present:
        raise RolloutError(
            f"policy_version is {policy_version}, and must be over the present one ({present}), because cached "
            "entries and sampled tokens are told apart by it; count versions up"
        )
