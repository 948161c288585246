"""Of the optimizers of several roles the active one alone steps, at the rate of its own schedule."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from alignlab.loop.zero.role_optimizers import RoleOptimizers


def test_the_active_role_alone_moves() -> None:
    policy, critic = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizers = [torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.0) for parameter in (policy, critic)]
    roles = RoleOptimizers(optimizers)
    for parameter in (policy, critic):
        parameter.grad = torch.ones(3)
    roles.active = optimizers[1]
    roles.step()
    assert policy.tolist() == [1.0] * 3
    torch.testing.assert_close(critic.detach(), torch.full((3,), 0.9))  # Adam's first step is its learning rate
    assert set(roles.state) == {critic}, "one dictionary of states"
    assert roles.state is optimizers[0].state


def test_one_group_at_a_time_is_stepped_once() -> None:
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.AdamW([{"params": [parameter]} for parameter in parameters], lr=0.1, weight_decay=0.0)
    roles = RoleOptimizers([optimizer])
    groups = roles.param_groups
    for parameter in parameters:
        parameter.grad = torch.ones(2)  # stays, as under offload
    for group in groups:
        roles.param_groups = [group]
        roles.step()
    assert [float(roles.state[parameter]["step"]) for parameter in parameters] == [1, 1]
    assert len(optimizer.param_groups) == 2


def test_a_flat_tensor_in_a_shared_group_is_stepped_at_the_schedule_s_rate() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter], lr=0.4, weight_decay=0.0)
    schedule = LambdaLR(optimizer, lambda update: 0.5**update)
    roles = RoleOptimizers([optimizer])
    flat = nn.Parameter(torch.ones(5))
    roles.param_groups[0]["params"] = [flat]  # as DeepSpeed does
    for _ in range(2):
        flat.grad = torch.ones(5)
        roles.step()
        schedule.step()
    torch.testing.assert_close(flat.detach(), torch.full((5,), 1 - 0.4 - 0.2))
