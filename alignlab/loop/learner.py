"""The learner: log-probs without a gradient, updates, and the state of the weights in training.

A loop chooses data and loss; the learner handles packs, the optimizer, its schedule and MoE routers. A `Strategy`
decides where the weights live.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from alignlab.config.trainers import TrainerConfig
from alignlab.cpu_threads import follow_free_cores
from alignlab.errors import CheckpointError
from alignlab.loop.averaging import GROUP, make_average
from alignlab.loop.forward import Forward, PolicyForward, model_losses
from alignlab.loop.loss_scale import LossScale
from alignlab.loop.loss_weights import LossWeights, StepTotals, count_step, token_mean
from alignlab.loop.nonfinite import gradient_error
from alignlab.loop.optim import load_schedule_state, make_optimizer, make_schedule, schedule_state
from alignlab.loop.ranks import Ranks
from alignlab.loop.sharding import make_strategy, shard_weights
from alignlab.loop.supervised import SupervisedOutput
from alignlab.loop.update_metrics import expert_load_metrics, numbers
from alignlab.masked_tokens import is_known, remember_count
from alignlab.models.adapters import has_adapters, is_of_adapter
from alignlab.models.decoder import causal_lm
from alignlab.models.dropout import without_dropout
from alignlab.models.evaluation_mode import evaluation_mode
from alignlab.models.exact_weights import held_part, model_dtype
from alignlab.models.fingerprints import weights_fingerprint
from alignlab.models.finite import TAKE_ANOTHER, check_finite
from alignlab.models.lora_layers import keep_casts
from alignlab.models.moe import expert_counts, forget_counts, move_biases, of_experts, routers, take_loads
from alignlab.models.pieces import Held, whole_shape
from alignlab.models.policy import PolicyOutput
from alignlab.models.routers.reinforce import policy_losses
from alignlab.models.shards import is_spread
from alignlab.models.weight_view import HeldWeights, WeightView, parameter_names, shapes_of, view_of, whole_tensors
from alignlab.runs.tensor_groups import load_held, shape_of
from alignlab.types import Experience

Loss = Callable[[Any, Experience], tuple[Tensor, Mapping[str, Tensor]]]
"""(output of the module in training, pack) -> losses [K] and metrics [K]; K tokens, sequences or pairs of the pack."""


class Learner:
    """Owns a module in training and its optimizer.

    Args:
        module: a `Policy`, a critic, a reward model or a student; its parameters that require a gradient are trained.
        config: optimizer, schedule and micro-batch settings.
        accelerator: device and ranks.
        forward: puts a pack through the module.
        total_updates: optimizer steps of the whole run, for the schedule.
        updates_per_step: optimizer steps of one step of the run, for the schedule's warm-up.
        counts_experts: whether the experts of the module's MoE routers are counted and balanced.
        compares_logprobs: whether log-probs of several passes are compared, which rules out all of the model's dropout.
        is_exported: whether it trains the run's model, and not a critic, of which no average is kept.

    Attributes:
        num_skipped: updates left out because a gradient was not finite.
        num_empty: updates left out because there was no token to train on.
        num_changes: number of changes begun, of the weights or of router counts.
        average: of the weights in training; None where the config asks for none, or nothing is exported.
    """

    def __init__(
        self,
        module: Any,
        config: TrainerConfig,
        accelerator: Accelerator,
        *,
        forward: Forward | None = None,
        total_updates: int,
        updates_per_step: int = 1,
        counts_experts: bool = True,
        compares_logprobs: bool = True,
        is_exported: bool = True,
    ) -> None:
        self.config, self.accelerator, self.ranks = config, accelerator, Ranks(accelerator)
        self.module = module
        self.forward = forward or PolicyForward()
        self.has_routers = counts_experts and bool(routers(module.model))
        without_dropout(module.model, keeps_residual=not compares_logprobs)
        if config.memory.gradient_checkpointing:
            options = {"use_reentrant": False}
            causal_lm(module.model).gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        with module.in_use():
            shard_weights(module, config, self.ranks)
            self.optimizer = make_optimizer(module, config)
            self.strategy = make_strategy(module, self.optimizer, accelerator)
        if not self.is_spread:  # gathered weights are new ones in each pass
            keep_casts(module)
        self.average = make_average(self.trained, self.optimizer, config) if is_exported else None
        self.loss_scale = LossScale(model_dtype(module.model))
        self.schedule = make_schedule(self.optimizer, config, total_updates, updates_per_step)
        self.num_skipped = self.num_empty = self.num_changes = 0
        self._frozen_fingerprint: str | None = None

    @property
    def num_updates(self) -> int:
        """Optimizer steps taken."""
        return int(self.schedule.last_epoch)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def model(self) -> PreTrainedModel | PeftModel:
        """The language model in training."""
        model: PreTrainedModel | PeftModel = self.module.model
        return model

    @property
    def is_spread(self) -> bool:
        """Return whether each rank holds a part of the model's weights alone."""
        return is_spread(self.module.model)

    @property
    def writes_parts(self) -> bool:
        """Return whether each rank writes a part of a checkpoint, of the weights or of the optimizer's state."""
        return self.strategy.writes_parts

    @property
    def has_adapters(self) -> bool:
        """Return whether adapters are trained rather than the model's own weights."""
        return has_adapters(self.module.model)

    @property
    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The parameters in training, by name."""
        with self.module.in_use():
            return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def tensors(self) -> dict[str, dict[str, Held]]:
        """Return the trained weights, their average and the optimizer's state, for a checkpoint, and no frozen weights.

        Of what is spread over ranks this rank has its piece alone.
        """
        trained = self.trained
        weights: dict[str, Held] = {name: held_part(weight) for name, weight in trained.items()}
        buffers = dict(whole_tensors(self.weights, self._saved_buffers()))
        groups = {"policy": weights | buffers, "optimizer": self.strategy.state(trained)}
        return groups if self.average is None else groups | self.average.groups(groups["policy"])

    @property
    def weights(self) -> WeightView:
        """The weights of the module, by the names of its parameters and saved buffers."""
        return view_of(self.module)

    def whole_weights(self) -> WeightView:
        """Return what is saved of the module at the end of a run, on rank 0; every rank calls this together.

        Weights that are spread over ranks are gathered one by one, and held on the host of rank 0.
        """
        if not self.is_spread:
            return self.weights
        kept = [name for name in self.weights.names() if not (self.has_adapters and self._is_of_base(name))]
        gathered = ((name, tensor.to("cpu", copy=True)) for name, tensor in whole_tensors(self.weights, kept))
        return HeldWeights({name: tensor for name, tensor in gathered if self.ranks.is_main})

    def _is_of_base(self, name: str) -> bool:
        """Return whether a weight is a frozen one beneath adapters."""
        return name.startswith("model.") and not is_of_adapter(self.module.model, name)

    def _saved_buffers(self) -> list[str]:
        saved = set(self.weights.names())
        return [name for name, _ in self.module.named_buffers() if name in saved]

    @property
    def shapes(self) -> WeightView | None:
        """Return a view of weights without numbers, which one rank can read; None where it holds the numbers itself."""
        return shapes_of(self.weights) if self.is_spread else None

    def progress(self) -> dict[str, Any]:
        """Return the position of the schedule and the counts of updates, as JSON."""
        return {
            "schedule": schedule_state(self.schedule), "num_skipped": self.num_skipped, "num_empty": self.num_empty,
            "loss_scale": self.loss_scale.state(),
        }

    def frozen_fingerprint(self) -> str:
        """Return the fingerprint of the weights that no checkpoint holds, such as an adapter's base; computed once."""
        if self._frozen_fingerprint is None:
            trained = self.trained
            names = (
                name
                for name in parameter_names(self.module)
                if name not in trained and not is_of_adapter(self.module.model, name)
            )
            self._frozen_fingerprint = weights_fingerprint(whole_tensors(self.weights, names))
        return self._frozen_fingerprint

    def load(self, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Load the outputs of `tensors`, `progress` and `frozen_fingerprint` (as `frozen`).

        Raises:
            CheckpointError: the checkpoint has other parameters than are trained now, or the frozen weights differ.
        """
        missing = sorted(set(self.trained) ^ (set(tensors["policy"]) - {n for n, _ in self.module.named_buffers()}))
        if missing:
            raise CheckpointError(
                f"the checkpoint and the model train different parameters, first {missing[0]} ({len(missing)} in all); "
                "resume with the model and LoRA settings that the run was started with"
            )
        if state["frozen"] != self.frozen_fingerprint():
            raise CheckpointError(
                "the weights that are not trained, such as an adapter's base, are not those that the run was started "
                "with; resume with the same model.name and model.dtype"
            )
        self._load_weights(tensors["policy"])
        self.strategy.load_state(self.trained, tensors["optimizer"])
        if self.average is not None:
            self.average.load(tensors.get(GROUP))
        self._forget_unfinished_step()
        load_schedule_state(self.schedule, state["schedule"])
        self.num_skipped, self.num_empty = state["num_skipped"], state["num_empty"]
        self.loss_scale.load_state(state.get("loss_scale", self.loss_scale.state()))  # not in earlier checkpoints

    def _load_weights(self, stored: Mapping[str, Tensor]) -> None:
        own = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        for name in stored:
            shape, expected = shape_of(stored, name), whole_shape(own[name])
            if shape != expected:
                raise CheckpointError(
                    f"the checkpoint's weights do not fit the model: {name} has shape {tuple(shape)} there and "
                    f"{tuple(expected)} here; resume with the model and LoRA settings that the run was started with"
                )
            load_held(stored, name, own[name])

    def _forget_unfinished_step(self) -> None:
        """Drop gradients and router counts of a step that failed half way in this process."""
        self.strategy.clear()
        forget_counts(self.module.model)

    def logprobs(
        self, packs: Sequence[Experience], module: Any = None, *, frozen_as: str | None = None
    ) -> list[Tensor]:
        """Return the log-probs [N] of each pack's masked tokens, without a gradient.

        Args:
            module: a policy; default: the one in training.
            frozen_as: name of a frozen model, whose log-probs must be finite; None for a module in training.

        Raises:
            NumericsError: a log-prob of a frozen model is not finite.
        """
        logprobs = [output.logprobs for output in self.outputs(packs, module)]
        if frozen_as is not None:
            named = ((f"pack {number}", values) for number, values in enumerate(logprobs))
            check_finite(named, f"the log-probs of {frozen_as}", fix=TAKE_ANOTHER)
        return logprobs

    def outputs(self, packs: Sequence[Experience], module: Any = None) -> list[Any]:
        """Return the module's outputs for each pack, without a gradient; see `logprobs`."""
        module = self.module if module is None else module
        with torch.no_grad(), evaluation_mode(module.modules()), module.in_use():
            computed = self.strategy.filled_up(packs) if is_spread(module.model) else packs
            return [self.forward(module, pack) for pack in self._paced(computed)][: len(packs)]

    def update(
        self, packs: Sequence[Experience], loss: Loss, weights: LossWeights, *, metric_weights: LossWeights = token_mean
    ) -> dict[str, float]:
        """Take one optimizer step on all of `packs`, and return its metrics; every rank calls this together.

        The step's loss is `sum(loss * weights)` over all packs and ranks, with denominators of the whole step; metrics
        are summed with `metric_weights`. A step without a trained token on any rank changes nothing, is counted, and
        has no loss and no metrics of tokens.

        Raises:
            NumericsError: a gradient is not finite and the config says stop.
        """
        assert packs, "an update needs at least one pack on every rank"
        self.strategy.begin()
        with self.module.in_use():
            return self._update(packs, loss, weights, metric_weights)

    def _update(
        self, packs: Sequence[Experience], loss: Loss, weights: LossWeights, metric_weights: LossWeights
    ) -> dict[str, float]:
        self.module.train()
        packs = [pack.to(self.device) for pack in self.strategy.filled_up(packs)]
        totals = count_step(packs, self.ranks.sum)
        for pack, count in zip(packs, totals.pack_tokens, strict=True):
            if not is_known(pack.completion_mask):
                remember_count(pack.completion_mask, pack.segments.predecessors, count)
        while True:
            sums = self._add_gradients(packs, totals, loss, weights, metric_weights)
            # Last exchange before the weights change: from here on no other rank can make this update fail.
            counts = self.ranks.sum(expert_counts(self.module.model)) if self.has_routers else None
            summed = {} if totals.is_empty else self._summed(sums)
            loads = {} if counts is None else expert_load_metrics(of_experts(self.module.model, counts))
            measured = numbers(summed | loads)
            changed = self._step(packs, totals, counts)
            if changed is not None:
                return changed | measured
            self._forget_unfinished_step()

    def _add_gradients(
        self, packs: Sequence[Experience], totals: StepTotals, loss: Loss, weights: LossWeights,
        metric_weights: LossWeights,
    ) -> dict[str, Tensor]:
        """Add the gradients of all packs, times the loss's scale, and return the sums of loss and metrics."""
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.device))
        for i, pack in enumerate(self._paced(packs)):
            with self.strategy.pack_context(is_last=i == len(packs) - 1):
                output = self.forward(self.strategy.module, pack)
                losses, metrics = loss(output, pack)
                total = (losses * weights(pack, totals)).sum()
                sums["loss"] += total.detach()
                for name, added in model_losses(output, token_mean(pack, totals)).items():
                    sums[name] += added.detach()
                    total = total + added
                if isinstance(output, PolicyOutput | SupervisedOutput) and output.routing_policy is not None:
                    policy_loss = policy_losses(output.routing_policy, losses, self.module.model)
                    total = total + (policy_loss * weights(pack, totals)).sum()
                self.strategy.backward(total * self.loss_scale.factor if self.loss_scale.is_needed else total)
            for name, values in metrics.items():
                sums[name] += (values.detach() * metric_weights(pack, totals)).sum()
        return sums

    def _summed(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the sums over all ranks, by name."""
        names = sorted(sums)
        return dict(zip(names, self.ranks.sum(torch.stack([sums[name] for name in names])), strict=True))

    def _paced(self, packs: Sequence[Experience]) -> Iterator[Experience]:
        """Yield the packs, setting the number of threads to the free cores before each."""
        for pack in packs:
            if self.device.type == "cpu":
                follow_free_cores()
            yield pack

    def _step(
        self, packs: Sequence[Experience], totals: StepTotals, counts: Tensor | None
    ) -> dict[str, float] | None:
        """Change the weights and the routers by the step's gradients and expert counts [L, E].

        Returns:
            Metrics; None where the scaled loss has overflowed, and the step is to be computed again under a smaller
            scale. Every rank has the same norm, and decides alike.
        """
        self.loss_scale.unscale(self.trained.values())
        grad_norm = self.strategy.clip(self.trained.values(), self.config.optim.max_grad_norm)
        learning_rate = float(self.schedule.get_last_lr()[0])
        if not totals.is_empty and not math.isfinite(grad_norm):
            if self.loss_scale.shrink():
                return None
            self.num_skipped += 1
            if self.config.optim.on_nonfinite == "stop":
                raise gradient_error(self.trained, packs, self.outputs(packs))
        self.num_changes += 1  # counted before the change: after a failure in the middle the weights belong to no step
        if totals.is_empty:
            self.num_empty += 1  # no optimizer step: its momentum would move the weights
        elif math.isfinite(grad_norm):
            self.strategy.step()
            self.schedule.step()
            self.loss_scale.finite()
        self.strategy.clear()
        if counts is not None:
            self._finish_routers(counts)
        return {"grad_norm": grad_norm, "learning_rate": learning_rate} | self._counters()

    def _counters(self) -> dict[str, float]:
        """Return the scale of the loss and the counts of updates that changed nothing, those that a run has."""
        counters = {
            "loss_scale": (self.loss_scale.factor, self.loss_scale.is_needed),
            "empty_updates": (float(self.num_empty), self.num_empty > 0),
            "skipped_updates": (float(self.num_skipped), self.config.optim.on_nonfinite == "skip"),
        }
        return {name: value for name, (value, is_shown) in counters.items() if is_shown}

    def _finish_routers(self, counts: Tensor) -> None:
        take_loads(self.module.model, counts)
        if not self.has_adapters:  # a router's bias belongs to the base model, which an adapter does not change
            move_biases(self.module.model, counts)
