"""One optimizer for DeepSpeed, several for the roles of a model: policy and critic may train adapters of one base.

An engine steps one optimizer, with all of its groups: a zero gradient would still move another role's weights by
Adam's momentum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


class RoleOptimizers(torch.optim.Optimizer):
    """The groups of several optimizers, of which the active one alone steps.

    DeepSpeed puts its own flat tensors into the groups. They are the very dictionaries of the optimizers, so that a
    learning rate set by a schedule holds here too; the states are kept in one dictionary.

    Args:
        optimizers: each role's.

    Attributes:
        active: the optimizer of the role in training.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        for optimizer in optimizers:
            optimizer.state = self.state
        self.active = optimizers[0]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take the active optimizer's step on those of its groups that are in `param_groups`.

        DeepSpeed puts one group at a time there.
        """
        assert closure is None, "a closure would compute the loss again"
        groups = self.active.param_groups
        self.active.param_groups = [group for group in groups if any(group is asked for asked in self.param_groups)]
        try:
            if self.active.param_groups:
                self.active.step()
        finally:
            self.active.param_groups = groups
