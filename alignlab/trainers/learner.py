"""The learner: three verbs over packs of tokens. `score` (no gradient), `update` (forward, backward, step), `state`.

Loops decide what to train on and which loss; the learner knows micro-batches, ranks, the optimizer and MoE routers.
"""

from __future__ import annotations

import contextlib
import logging
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
from alignlab.errors import CheckpointError, NumericsError
from alignlab.models.adapters import adapters_disabled, has_adapters, is_of_adapter
from alignlab.models.attention import causal_lm
from alignlab.models.critic import Critic
from alignlab.models.dropout import switch_off_dropout
from alignlab.models.finite import TAKE_ANOTHER, check_finite
from alignlab.models.moe import expert_counts, move_biases, routers, take_loads
from alignlab.models.policy import Policy, PolicyOutput
from alignlab.trainers.reduction import StepTotals, Weigh, count_step, token_mean
from alignlab.training.checkpoint import fingerprint, load_optimizer_tensors, optimizer_tensors
from alignlab.training.optim import load_schedule_state, make_optimizer, make_schedule, schedule_state
from alignlab.types import Experience

_log = logging.getLogger(__name__)
_COUNTERS = ("empty_updates", "skipped_updates")

# (output of what is trained, pack) -> loss of each token [N], and metrics of each [N], averaged over trained tokens.
TokenLoss = Callable[[Any, Experience], tuple[Tensor, Mapping[str, Tensor]]]


class Learner:
    """Owns the policy in training and its optimizer.

    Args:
        policy: the policy; its parameters that require a gradient are trained.
        config: optimizer, schedule and micro-batch settings.
        accelerator: devices and ranks.
        total_updates: optimizer steps of the whole run, for the schedule.
        updates_per_step: of a step that updates it, for the schedule's warm-up.
        temperature: that the policy is sampled at; log-probs are of the policy at this temperature.
        entropy_grad: whether the loss uses the entropy with a gradient.

    Attributes:
        num_skipped: updates left out because a gradient was not finite.
        num_empty: updates left out because there was no token to train on.
        num_changes: how often a change of the weights, or of what the routers count, was begun.
    """

    def __init__(
        self,
        policy: Policy,
        config: TrainerConfig,
        accelerator: Accelerator,
        *,
        total_updates: int,
        updates_per_step: int = 1,
        temperature: float = 1.0,
        entropy_grad: bool = False,
    ) -> None:
        self.config, self.accelerator = config, accelerator
        self.policy = policy
        self.temperature, self.entropy_grad = temperature, entropy_grad
        self.has_routers = bool(routers(policy.model))
        _without_dropout(policy.model)
        if config.gradient_checkpointing:
            exact = {"use_reentrant": False}
            causal_lm(policy.model).gradient_checkpointing_enable(gradient_checkpointing_kwargs=exact)
        with policy.in_use():
            optimizer = make_optimizer(policy, config)
            self.prepared, self.optimizer = accelerator.prepare(policy, optimizer)
        # The schedule is stepped by hand, once an update: accelerate would step it once a rank.
        self.schedule = make_schedule(optimizer, config, total_updates, updates_per_step)
        self.num_skipped = 0
        self.num_empty = 0
        self.num_changes = 0
        self._frozen: str | None = None

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
        model: PreTrainedModel | PeftModel = self.policy.model  # type: ignore[assignment]  # a Module to torch
        return model

    def reduce_sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all ranks."""
        reduced: Tensor = self.accelerator.reduce(value.to(self.device), reduction="sum")
        return reduced

    def sum_over_ranks(self, value: float) -> float:
        """The sum of a number over all ranks."""
        return float(self.reduce_sum(torch.tensor(value, dtype=torch.float64)))

    @property
    def has_adapters(self) -> bool:
        """Whether adapters are trained, and not the model's own weights."""
        return has_adapters(self.policy.model)

    @property
    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The parameters in training, by name."""
        with self.policy.in_use():
            return {name: p for name, p in self.policy.named_parameters() if p.requires_grad}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint keeps of the policy and its optimizer; frozen weights are left out."""
        buffers = {name: b for name, b in self.policy.named_buffers() if name in self.policy.state_dict()}
        policy = {name: p.detach() for name, p in self.trained.items()} | buffers
        return {"policy": policy, "optimizer": optimizer_tensors(self.optimizer, self.trained)}

    def progress(self) -> dict[str, Any]:
        """How far the training is, as JSON."""
        return {
            "schedule": schedule_state(self.schedule), "num_skipped": self.num_skipped, "num_empty": self.num_empty,
        }

    def frozen_fingerprint(self) -> str:
        """Of the weights that are not trained and so in no checkpoint, such as an adapter's base; computed once."""
        if self._frozen is None:
            trained = self.trained
            self._frozen = fingerprint(
                (name, p)
                for name, p in self.policy.named_parameters()
                if name not in trained and not is_of_adapter(self.policy.model, name)
            )
        return self._frozen

    def load(self, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Take back what `tensors`, `progress` and `frozen_fingerprint` (as `frozen`) gave.

        Raises:
            CheckpointError: the checkpoint holds other parameters than are trained now, or the frozen ones are others.
        """
        missing = sorted(set(self.trained) ^ (set(tensors["policy"]) - {n for n, _ in self.policy.named_buffers()}))
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
        try:
            self.policy.load_state_dict(dict(tensors["policy"]), strict=False)
        except RuntimeError as error:
            raise CheckpointError(
                f"the checkpoint's weights do not fit the model: {error}; resume with the model and LoRA settings that "
                "the run was started with"
            ) from error
        load_optimizer_tensors(self.optimizer, self.trained, tensors["optimizer"])
        self._forget_unfinished_step()
        load_schedule_state(self.schedule, state["schedule"])
        self.num_skipped, self.num_empty = state["num_skipped"], state["num_empty"]

    def _forget_unfinished_step(self) -> None:
        """Drop the gradients and counts that a step has left which failed half way, in this process."""
        self.optimizer.zero_grad(set_to_none=True)
        for router in routers(self.policy.model):
            router.expert_counts = None

    def score(
        self, packs: Sequence[Experience], policy: Policy | None = None, *, of: str | None = None
    ) -> list[Tensor]:
        """Log-probs [N] of each pack's trained tokens, without a gradient.

        Args:
            policy: that is asked; default: the one in training.
            of: what a frozen model is called, whose log-probs must be finite; None for one that may recover.

        Raises:
            NumericsError: a log-prob of a frozen model is not finite.
        """
        scores = [output.logprobs for output in self.outputs(packs, policy)]
        if of is not None:
            named = ((f"pack {number}", each) for number, each in enumerate(scores))
            check_finite(named, f"the log-probs of {of}", fix=TAKE_ANOTHER)
        return scores

    def outputs(self, packs: Sequence[Experience], policy: Policy | None = None) -> list[PolicyOutput]:
        """All that a forward pass says of each pack, without a gradient; see `score`."""
        policy = policy or self.policy
        was_training = policy.training
        policy.eval()
        try:
            with torch.no_grad(), policy.in_use():
                return [self._forward(policy, pack) for pack in self._paced(packs)]
        finally:
            policy.train(was_training)

    def score_reference(self, packs: Sequence[Experience], reference: Policy | None) -> list[Tensor]:
        """The same under the reference: a frozen copy or, where there is none, the base of the adapter."""
        return self.score_base(packs) if reference is None else self.score(packs, reference, of="the reference")

    def score_base(self, packs: Sequence[Experience]) -> list[Tensor]:
        """The same under the frozen base: the policy with its adapters off."""
        with adapters_disabled(self.policy.model):
            return self.score(packs, of="the reference")

    def update(
        self, packs: Sequence[Experience], loss: TokenLoss, weigh: Weigh, *, measure: Weigh = token_mean
    ) -> dict[str, float]:
        """One optimizer step on all of `packs`; every rank must call it together. Metrics are summed by `measure`.

        The loss is `sum(token_loss * weights)` over all packs and ranks, with denominators of the whole step. A step
        without a trained token on any rank changes nothing, is counted, and has no loss and no metrics of tokens.

        Raises:
            NumericsError: a gradient is not finite and the config says stop.
        """
        assert packs, "an update needs at least one pack on every rank"
        with self.policy.in_use():
            return self._update(packs, loss, weigh, measure)

    def _update(
        self, packs: Sequence[Experience], loss: TokenLoss, weigh: Weigh, measure: Weigh
    ) -> dict[str, float]:
        self.policy.train()
        packs = [pack.to(self.device) for pack in packs]
        totals = count_step(packs, self.reduce_sum)
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.device))
        for i, pack in enumerate(self._paced(packs)):
            with self._synchronised(last=i == len(packs) - 1):
                self._backward(pack, loss, weigh(pack, totals), measure(pack, totals), totals, sums)
        # The ranks wait for each other before the weights change: from then on no other rank can stop this one.
        measured = {} if totals.is_empty else self._summed(sums)
        return self._step(packs, totals) | measured

    def _summed(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Metrics over all ranks."""
        names = sorted(sums)
        values = self.reduce_sum(torch.stack([sums[name] for name in names])).tolist()
        return dict(zip(names, values, strict=True))

    def _paced(self, packs: Sequence[Experience]) -> Iterator[Experience]:
        """The packs one by one, each computed with as many threads as there are free cores then."""
        for pack in packs:
            if self.device.type == "cpu":
                follow_free_cores()
            yield pack

    def _forward(self, policy: torch.nn.Module, pack: Experience) -> PolicyOutput:
        output: PolicyOutput = policy(
            pack.tokens,
            pack.segments,
            pack.completion_mask,
            temperature=self.temperature,
            entropy_grad=self.entropy_grad,
            routing=pack.routing,
        )
        return output

    def _backward(
        self, pack: Experience, loss: TokenLoss, weights: Tensor, measured: Tensor, totals: StepTotals,
        sums: dict[str, Tensor],
    ) -> None:
        output = self._forward(self.prepared, pack)
        token_loss, metrics = loss(output, pack)
        total = (token_loss * weights).sum()
        sums["loss"] += total.detach()
        if output.router_loss is not None:
            router = (output.router_loss * token_mean(pack, totals)).sum()
            sums["router_loss"] += router.detach()
            total = total + router
        for name, values in metrics.items():
            sums[name] += (values.detach() * measured).sum()
        # DDP averages gradients over ranks; the loss is divided by counts over all ranks already. Undone here only.
        self.accelerator.backward(total * self.accelerator.num_processes)

    def _synchronised(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Gradients cross ranks in the last backward pass only; ranks may hold different numbers of packs."""
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.prepared)

    def _step(self, packs: Sequence[Experience], totals: StepTotals) -> dict[str, float]:
        trained = list(self.trained.values())
        grad_norm = float(self.accelerator.clip_grad_norm_(trained, self.config.max_grad_norm))
        learning_rate = float(self.schedule.get_last_lr()[0])
        counts = self.reduce_sum(expert_counts(self.policy.model)) if self.has_routers else None
        if not totals.is_empty and not math.isfinite(grad_norm):
            self._nonfinite(packs)
        self.num_changes += 1  # before the first change: a failure in the middle leaves the weights of no step
        if totals.is_empty:
            self.num_empty += 1  # an optimizer would go on by its momentum
        elif math.isfinite(grad_norm):
            self.optimizer.step()
            self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        metrics = {"grad_norm": grad_norm, "learning_rate": learning_rate}
        if self.num_empty:
            metrics["empty_updates"] = float(self.num_empty)
        if self.config.on_nonfinite == "skip":
            metrics["skipped_updates"] = float(self.num_skipped)
        return metrics if counts is None else metrics | self._finish_routers(counts)

    def _nonfinite(self, packs: Sequence[Experience]) -> None:
        self.num_skipped += 1
        if self.config.on_nonfinite == "skip":
            return
        bad = [n for n, p in self.policy.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        where = [
            f"sequence {int(pack.segments.sequence_of_token[i])} of pack {number}"
            for number, (pack, output) in enumerate(zip(packs, self.outputs(packs), strict=True))
            for i in _not_finite(output).nonzero()[:1].flatten().tolist()
        ]
        raise NumericsError(
            f"the gradient is not finite: first in {bad[0] if bad else 'its norm'} ({len(bad)} tensors), "
            f"outputs not finite in {where or 'no sequence'}; lower learning_rate, or set on_nonfinite: skip"
        )

    def _finish_routers(self, counts: Tensor) -> dict[str, float]:
        take_loads(self.policy.model, counts)
        if not self.has_adapters:  # a bias is the base's, which an adapter leaves as it is
            move_biases(self.policy.model, counts)
        load = counts / counts.sum(dim=-1, keepdim=True).clamp(min=1)
        mean_load = load.mean(dim=0)
        return {
            "expert_load_min": float(load.min()) * load.shape[-1],
            "expert_load_max": float(load.max()) * load.shape[-1],
            **{f"expert_load/{i}": float(value) for i, value in enumerate(mean_load)},
        }


def mean_over_updates(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Each metric's mean over the updates that have it; of what is counted from the run's begin on, the last count."""
    found: dict[str, float] = {}
    for name in dict.fromkeys(name for update in updates for name in update):
        values = [update[name] for update in updates if name in update]
        found[name] = values[-1] if name.rpartition("/")[2] in _COUNTERS else sum(values) / len(values)
    return found


def _not_finite(output: Sequence[Tensor | None]) -> Tensor:
    """Tokens [N] at which any number of the output is not finite."""
    known = [each for each in output if each is not None and each.is_floating_point() and each.dim() == 1]
    return torch.stack([~each.isfinite() for each in known]).any(dim=0)


def _without_dropout(model: torch.nn.Module) -> None:
    """Switch the model's own dropout off, and say so."""
    values = switch_off_dropout(model)
    if values:
        _log.warning(
            "dropout of the model is switched off (%s): rollouts and the reference have none, and log-probs with it "
            "would be of another policy; for dropout in an adapter use lora.dropout",
            ", ".join(f"{name} {value:g}" for name, value in values.items()),
        )


class CriticLearner(Learner):
    """Owns a critic and its optimizer; arguments are `Learner`'s."""

    policy: Critic  # type: ignore[assignment]  # what is trained

    def __init__(
        self, critic: Critic, config: TrainerConfig, accelerator: Accelerator, *, total_updates: int,
        updates_per_step: int,
    ) -> None:
        super().__init__(
            critic, config, accelerator,  # type: ignore[arg-type]
            total_updates=total_updates, updates_per_step=updates_per_step,
        )
        self.has_routers = False  # they are the policy's

    def values(self, packs: Sequence[Experience]) -> list[Tensor]:
        """Values [N] of each pack's masked tokens, without a gradient."""
        return [output.values for output in self.outputs(packs)]  # type: ignore[attr-defined]

    def _forward(self, policy: torch.nn.Module, pack: Experience) -> Any:
        return policy(pack.tokens, pack.segments, pack.completion_mask, routing=pack.routing)
