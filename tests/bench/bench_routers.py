"""One small task from nothing, the same budget for every router: loss, load, dropped choices, speed.

    python -m tests.bench.bench_routers [--steps 300] [--routers NAME ...]

8 sources, each a table that maps a token to the next one, 10 % of the tokens drawn at random instead; a sequence names
its source in its first token. A decoder of 2 layers with 8 experts, 2 a token unless the router takes one, 64 wide, is
trained by AdamW on 512 tokens a step, in two micro-batches. For each router: the held-out loss in nats a token, with
the experts that it chooses in inference; the load of the busiest expert over the mean, in the last tenth of training
and held out; the fraction of dropped choices held out; tokens trained on in a second of the process's time on one core.
`dense` has the width of two experts. Prints a table, and JSON last.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from typing import Any

import torch
from torch import Tensor

from alignlab.functional.moe_losses import routing_policy_loss
from alignlab.models.config import PolicyConfig
from alignlab.models.moe import expert_counts, move_biases, of_experts, take_loads
from alignlab.models.policy import Policy, PolicyOutput
from alignlab.models.transformer import PolicyForCausalLM
from alignlab.types import Segments

NUM_SOURCES, NUM_TOKENS, LENGTH, ROWS, NOISE = 8, 24, 64, 4, 0.1
SHAPE: dict[str, Any] = {
    "vocab_size": NUM_SOURCES + NUM_TOKENS, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
    "router_aux_loss_coef": 0.01,
}
GROUPS = {"n_group": 4, "topk_group": 2}
ROUTERS: dict[str, dict[str, Any]] = {
    "dense": {"num_experts": 0, "router_aux_loss_coef": 0.0, "moe_intermediate_size": None},
    "top-k, no balance": {"router_aux_loss_coef": 0.0},
    "top-k, Switch": {},
    "top-k, bias": {"router_aux_loss_coef": 0.0, "scoring_func": "sigmoid", "router_bias_update_rate": 0.01},
    "top-k, per sequence": {"router_aux_loss_coef": 0.0, "router_seq_aux_loss_coef": 0.01},
    "groups, V2 losses": {
        "topk_method": "group_limited_greedy", "norm_topk_prob": False, "router_device_aux_loss_coef": 0.01,
        "router_comm_aux_loss_coef": 0.01, **GROUPS,
    },
    "groups, V3": {
        "topk_method": "noaux_tc", "scoring_func": "sigmoid", "router_bias_update_rate": 0.01,
        "router_aux_loss_coef": 0.0, **GROUPS,
    },
    "capacity 1.0, by order": {"capacity_factor": 1.0},
    "capacity 1.0, by score": {"capacity_factor": 1.0, "capacity_priority": "score"},
    "capacity 1.25, by order": {"capacity_factor": 1.25},
    "noisy top-k": {
        "router_type": "noisy_topk", "router_aux_loss_coef": 0.0, "router_importance_loss_coef": 0.01,
        "router_load_loss_coef": 0.01,
    },
    "hash": {"router_type": "hash", "router_aux_loss_coef": 0.0},
    "BASE, 1 expert": {
        "router_type": "base", "scoring_func": "sigmoid", "norm_topk_prob": False, "num_experts_per_tok": 1,
        "router_aux_loss_coef": 0.0,
    },
    "sinkhorn": {"router_type": "sinkhorn", "router_aux_loss_coef": 0.0},
    "expert choice": {"router_type": "expert_choice", "norm_topk_prob": False, "router_aux_loss_coef": 0.0},
    "REINFORCE": {"router_type": "reinforce", "router_reinforce_coef": 0.01},
    "REINFORCE alone, 1 expert": {
        "router_type": "reinforce", "router_reinforce_coef": 0.1, "num_experts_per_tok": 1,
    },
}


COLUMNS = {"held-out loss": 14, "load, training": 16, "load, held out": 16, "dropped": 9, "tokens/s": 10}


def tables() -> Tensor:
    """The next token of each source and token, [sources, tokens]."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(NUM_TOKENS, generator=generator) for _ in range(NUM_SOURCES)])


def batch(rows: int, seed: int, next_token: Tensor) -> Tensor:
    """Sequences [rows, LENGTH]."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(NUM_SOURCES, (rows,), generator=generator)
    current = torch.randint(NUM_TOKENS, (rows,), generator=generator)
    columns = [source, current + NUM_SOURCES]
    while len(columns) < LENGTH:
        is_noise = torch.rand(rows, generator=generator) < NOISE
        drawn = torch.randint(NUM_TOKENS, (rows,), generator=generator)
        current = torch.where(is_noise, drawn, next_token[source, current])
        columns.append(current + NUM_SOURCES)
    return torch.stack(columns, dim=1)


def forward(policy: Policy, rows: Tensor) -> PolicyOutput:
    """Log-probs of all tokens behind the second of each sequence."""
    count = len(rows)
    segments = Segments((LENGTH,) * count, (-1,) * count, tuple(range(count)), tuple(range(count)))
    mask = (torch.arange(LENGTH) > 1).repeat(count)
    return policy(rows.flatten(), segments, mask)


def train_step(policy: Policy, optimizer: torch.optim.Optimizer, rows: Tensor) -> tuple[Tensor, int]:
    """One step; returns the expert counts and the number of trained tokens."""
    total = len(rows) * (LENGTH - 2)
    for piece in rows.split(ROWS):
        output = forward(policy, piece)
        losses = -output.logprobs
        loss = losses.sum()
        if output.router_loss is not None:
            loss = loss + output.router_loss.sum()
        if output.routing_policy is not None:
            learnt = routing_policy_loss(losses, output.routing_policy.logprobs, output.routing_policy.baselines)
            loss = loss + policy.model.config.router_reinforce_coef * learnt.sum()
        (loss / total).backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    counts = expert_counts(policy.model)
    take_loads(policy.model, counts)
    move_biases(policy.model, counts)
    return counts, total


def busiest(counts: Tensor) -> float:
    """Largest load over the mean, the worst layer's; nan for a dense model."""
    return float((counts.float().amax(-1) / counts.float().mean(-1)).max()) if counts.numel() else math.nan


@torch.no_grad()
def held_out(policy: Policy, rows: Tensor) -> dict[str, float]:
    """Loss, load and dropped choices of held-out sequences."""
    losses, dropped, counts = [], [], 0
    num_experts = policy.model.config.num_experts
    for piece in rows.split(ROWS):
        output = forward(policy, piece)
        losses.append(-output.logprobs.sum() / (len(piece) * (LENGTH - 2)))
        if output.routing is not None:
            dropped.append((output.routing < 0).float().mean())
            counts = counts + torch.stack([
                layer[layer >= 0].long().bincount(minlength=num_experts) for layer in output.routing.unbind(1)
            ])  # fmt: skip
    is_choice = policy.model.config.router_type == "expert_choice"
    return {
        "loss": float(torch.stack(losses).mean()),
        "load": busiest(counts) if isinstance(counts, Tensor) else math.nan,
        "dropped": math.nan if is_choice or not dropped else float(torch.stack(dropped).mean()),
    }


def measure(changes: dict[str, Any], steps: int) -> dict[str, float]:
    """Train a router's model and measure it."""
    torch.manual_seed(0)
    next_token = tables()
    policy = Policy(PolicyForCausalLM(PolicyConfig(**{**SHAPE, **changes})))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2, weight_decay=0.0)
    policy.train()
    counts: list[Tensor] = []
    start, num_tokens = time.process_time(), 0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
        of_step, of_tokens = train_step(policy, optimizer, batch(2 * ROWS, step, next_token))
        counts.append(of_experts(policy.model, of_step))
        num_tokens += of_tokens
    seconds = time.process_time() - start
    policy.eval()
    last = torch.stack(counts[-max(steps // 10, 1) :]).sum(0)
    found = held_out(policy, batch(64, 10**6, next_token))
    return {**found, "training_load": busiest(last), "tokens_per_s": num_tokens / seconds}


def floor() -> float:
    """Entropy of the task, nats a token."""
    likely, other = 1 - NOISE + NOISE / NUM_TOKENS, NOISE / NUM_TOKENS
    return -likely * math.log(likely) - (NUM_TOKENS - 1) * other * math.log(other)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--routers", nargs="+", choices=list(ROUTERS), default=list(ROUTERS))
    options = parser.parse_args()
    print(f"entropy of the task: {floor():.3f} nats a token")
    titles = "".join(f"{title:>{width}}" for title, width in COLUMNS.items())
    print(f"{'router':28}{titles}")
    results = {}
    for name in options.routers:
        found = results[name] = measure(ROUTERS[name], options.steps)
        print(
            f"{name:28}{found['loss']:14.3f}{found['training_load']:16.2f}{found['load']:16.2f}"
            f"{found['dropped']:9.1%}{found['tokens_per_s']:10,.0f}", flush=True,
        )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
