"""Routers one token at a time: groups, capacity, expert choice, sequence balance, transport plans, drawn choices."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor


def in_groups(ranked: Tensor, num_groups: int, max_groups: int, num_best: int, num_chosen: int) -> list[set[int]]:
    """The experts of each token, of its best groups alone."""
    size, result = ranked.shape[1] // num_groups, []
    for row in ranked.tolist():
        groups = [row[start : start + size] for start in range(0, len(row), size)]
        strength = [sum(sorted(group, reverse=True)[:num_best]) for group in groups]
        best = sorted(range(num_groups), key=lambda g: -strength[g])[:max_groups]
        candidates = [g * size + i for g in best for i in range(size)]
        result.append(set(sorted(candidates, key=lambda e: -row[e])[:num_chosen]))
    return result


def with_room(experts: Tensor, scores: Tensor, capacity: int, *, by_score: bool) -> Tensor:
    """Which choices [N, K] have room at their expert, asked one after the other."""
    load: dict[int, int] = {}
    result = torch.zeros_like(experts, dtype=torch.bool)
    for rank in range(experts.shape[1]):
        tokens = list(range(len(experts)))
        if by_score:
            tokens.sort(key=lambda n: -scores[n, rank].item())
        for token in tokens:
            expert = int(experts[token, rank])
            if load.get(expert, 0) < capacity:
                load[expert] = load.get(expert, 0) + 1
                result[token, rank] = True
    return result


def taken_by_experts(scores: Tensor, num_tokens: int) -> Tensor:
    """Which tokens each expert takes, [N, E]: its best ones."""
    result = torch.zeros_like(scores, dtype=torch.bool)
    for expert in range(scores.shape[1]):
        for token in sorted(range(len(scores)), key=lambda n: -scores[n, expert].item())[:num_tokens]:
            result[token, expert] = True
    return result


def best_assignment(scores: Tensor, capacity: int) -> float:
    """The highest total score of tokens to experts of a capacity, by trying all."""
    num_tokens, num_experts = scores.shape
    totals = [
        sum(scores[n, e].item() for n, e in enumerate(experts))
        for experts in itertools.product(range(num_experts), repeat=num_tokens)
        if all(experts.count(e) <= capacity for e in range(num_experts))
    ]
    return max(totals)


def transport_plan(logits: Tensor, num_rounds: int) -> Tensor:
    """exp(logits), columns scaled to N / E and rows to 1 in turn."""
    plan = logits.double().exp()
    for _ in range(num_rounds):
        plan = plan / plan.sum(0) * (len(plan) / plan.shape[1])
        plan = plan / plan.sum(1, keepdim=True)
    return plan


def sequence_balance(probs: Tensor, sequences: list[list[int]], num_chosen: int) -> Tensor:
    """The sequence-wise loss of each token, from the counts of its sequence; 0 for tokens in none."""
    losses = torch.zeros(len(probs))
    for tokens in sequences:
        counts = [0] * probs.shape[1]
        for token in tokens:
            for expert in sorted(range(probs.shape[1]), key=lambda e: -probs[token, e].item())[:num_chosen]:
                counts[expert] += 1
        for token in tokens:
            losses[token] = sum(
                probs.shape[1] * counts[e] / (num_chosen * len(tokens)) * probs[token, e].item()
                for e in range(probs.shape[1])
            )
    return losses


def drawing_logprob(logits: Tensor, experts: list[int]) -> float:
    """Log-probability of drawing these experts in turn, each from a softmax over those that are left."""
    weights = [math.exp(x) for x in logits.tolist()]
    total, logprob = sum(weights), 0.0
    for expert in experts:
        logprob += math.log(weights[expert] / total)
        total -= weights[expert]
    return logprob
