"""A model that DeepSpeed trains, with all roles that share it, in one engine.

An engine can be made once for a model, and must know what every role trains. It is made when training begins, after
the learners of all roles have joined. Weights that are shared out (stage 3) are from the start: they are read on the
host, and go to the device one by one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from alignlab.config.trainer import ShardingSettings
from alignlab.loop.zero.engine_config import engine_config
from alignlab.loop.zero.installation import load_deepspeed
from alignlab.loop.zero.role_optimizers import RoleOptimizers
from alignlab.models.decoder import causal_lm
from alignlab.models.moe import SparseFeedForward
from alignlab.models.pieces import whole_shape
from alignlab.models.shards import empty_copy

_log = logging.getLogger(__name__)


class _Roles(nn.Module):
    """What an engine is made of: the modules of all roles, which may hold one model."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.roles = nn.ModuleList(modules)

    def forward(self, function: Callable[[], Any]) -> Any:
        """Return what a function computes with the roles; it takes no tensors."""
        return function()


class ZeroRoot:
    """What a model is computed within that DeepSpeed trains; a `Root`.

    Args:
        model: the model, or a PeftModel around it.
        settings: with a ZeRO strategy.
        mesh: of the ranks.
        max_grad_norm: of the first role; each role clips at its own, see `Zero.clip`.
    """

    def __init__(self, model: nn.Module, settings: ShardingSettings, mesh: DeviceMesh, max_grad_norm: float) -> None:
        self.blueprint = empty_copy(model)
        self.mesh, self._model = mesh, model
        self.settings, self._max_grad_norm = settings, max_grad_norm
        self.spreads_weights = settings.zero_stage == 3
        self._modules: list[nn.Module] = []
        self._trained: dict[torch.optim.Optimizer, list[nn.Parameter]] = {}
        self._roles: RoleOptimizers | None = None
        self._engine: Any = None
        if self.spreads_weights:
            self._share_out(model)

    def join(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Add a role: a module on the model, and the optimizer of what the role trains."""
        assert self._engine is None, "a role joins before the engine is made"
        self._modules.append(module)
        self._trained[optimizer] = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def __call__(self, function: Callable[[], Any]) -> Any:
        """Return what a function computes with the model's weights.

        The engine has a part in it where weights are spread, or gradients follow.
        """
        if self.spreads_weights and not self.is_made:
            return self._before_training(function)
        is_needed = self.is_made and (self.spreads_weights or torch.is_grad_enabled())
        return self._engine(function) if is_needed else function()

    def _before_training(self, function: Callable[[], Any]) -> Any:
        """Return what a function computes without an engine, such as the log-probs that a rollout engine is compared
        with: the weights of a layer are gathered while it computes, and those outside of layers all the while."""
        assert not torch.is_grad_enabled(), "training has not begun"
        gathered: Any = self._deepspeed().zero.GatheredParameters
        layers = causal_lm(self._model).get_decoder().layers
        in_layers = {id(parameter) for parameter in layers.parameters()}
        open_layers: list[Any] = []

        def gather(layer: nn.Module, _: Any) -> None:
            open_layers.append(gathered(list(layer.parameters())))
            open_layers[-1].__enter__()

        def release(*_: Any) -> None:
            open_layers.pop().__exit__(None, None, None)

        with ExitStack() as stack:
            outside = [parameter for parameter in self._model.parameters() if id(parameter) not in in_layers]
            stack.enter_context(gathered(outside))
            for layer in layers:
                stack.callback(layer.register_forward_pre_hook(gather).remove)
                stack.callback(layer.register_forward_hook(release).remove)
            return function()

    @property
    def is_made(self) -> bool:
        """Return whether there is an engine."""
        return self._engine is not None

    def begin(self) -> None:
        """Make the engine, unless there is one; every rank calls this together."""
        if self._engine is None:
            self._engine = self._made()

    @property
    def engine(self) -> Any:
        """DeepSpeed's engine."""
        assert self._engine is not None, "training has not begun"
        return self._engine

    @property
    def optimizer(self) -> Any:
        """DeepSpeed's optimizer, around those of the roles."""
        return self.engine.optimizer

    @property
    def state(self) -> Any:
        """The state of the roles' optimizers, by DeepSpeed's flat tensors."""
        assert self._roles is not None
        return self._roles.state

    @contextmanager
    def active(self, optimizer: torch.optim.Optimizer) -> Iterator[Any]:
        """Yield the engine in a context in which one role trains: its optimizer steps, no other role has a gradient.

        Of a parameter that requires a gradient and gets none, stage 3 would take the last one again.
        """
        engine = self.engine
        assert self._roles is not None
        self._roles.active = optimizer
        others = [parameter for other in self._trained if other is not optimizer for parameter in self._trained[other]]
        with _requiring_gradients(others, False):
            yield engine

    def _share_out(self, model: nn.Module) -> None:
        """Leave each rank its piece of each weight, on its device."""
        config = self._config([parameter for parameter in model.parameters() if parameter.requires_grad])
        self._deepspeed().zero.Init(module=model, config_dict_or_path=config, dtype=torch.float32)

    def _deepspeed(self) -> Any:
        """Return the package, which knows the ranks."""
        deepspeed = load_deepspeed(self.mesh.device_type)
        backend = "nccl" if self.mesh.device_type == "cuda" else "gloo"
        deepspeed.init_distributed(dist_backend=backend, verbose=False, auto_mpi_discovery=False)
        return deepspeed

    def _config(self, trained: Sequence[nn.Parameter]) -> dict[str, Any]:
        largest = max((whole_shape(parameter).numel() for parameter in trained), default=1)
        return engine_config(self.settings, max_grad_norm=self._max_grad_norm, largest=largest)

    def _made(self) -> Any:
        roles = RoleOptimizers(list(self._trained))
        trained = [parameter for of_role in self._trained.values() for parameter in of_role]
        deepspeed, config = self._deepspeed(), self._config(trained)
        module = _Roles(self._modules)
        if self.spreads_weights and any(isinstance(part, SparseFeedForward) for part in module.modules()):
            deepspeed.utils.set_z3_leaf_modules(module, [SparseFeedForward])  # its experts are gathered together
        with _requiring_gradients(trained, True):  # the engine follows gradients of what trains now, in whichever role
            engine, *_ = deepspeed.initialize(model=module, optimizer=roles, config=config)
        self._roles = roles
        return engine


@contextmanager
def _requiring_gradients(parameters: Sequence[nn.Parameter], do: bool) -> Iterator[None]:
    """Let parameters require a gradient, or not, within this context."""
    before = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(do)
    try:
        yield
    finally:
        for parameter, was_trained in zip(parameters, before, strict=True):
            parameter.requires_grad_(was_trained)
