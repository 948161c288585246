"""Slow, obvious twins of `alignlab.functional`: loops over Python floats, one formula a line."""

import math


def softmax(logits: list[float]) -> list[float]:
    largest = max(logits)
    weights = [math.exp(z - largest) for z in logits]
    return [w / sum(weights) for w in weights]


def logprob_and_entropy(
    hidden: list[float],
    weight: list[list[float]],
    target: int,
    bias: list[float] | None,
    temperature: float,
    softcap: float | None,
) -> tuple[float, float]:
    logits = []
    for v, row in enumerate(weight):
        z = sum(h * w for h, w in zip(hidden, row, strict=True)) + (bias[v] if bias is not None else 0.0)
        if softcap is not None:
            z = softcap * math.tanh(z / softcap)
        logits.append(z / temperature)
    probs = softmax(logits)
    return math.log(probs[target]), -sum(p * math.log(p) for p in probs)


def group_advantages(rewards: list[float], kind: str, eps: float = 1e-4) -> list[float]:
    """One group; `kind` is normalized, centered or leave_one_out."""
    present = [r for r in rewards if not math.isnan(r)]
    if len(present) < 2:
        return [0.0] * len(rewards)
    mean = sum(present) / len(present)
    std = math.sqrt(sum((r - mean) ** 2 for r in present) / (len(present) - 1))
    out = []
    for i, r in enumerate(rewards):
        others = [o for j, o in enumerate(rewards) if j != i and not math.isnan(o)]
        if math.isnan(r):
            out.append(0.0)
        elif kind == "normalized":
            out.append((r - mean) / (std + eps))
        elif kind == "centered":
            out.append(r - mean)
        else:
            out.append(r - sum(others) / len(others))
    return out


def ppo_clip(
    logprob: float, old: float, advantage: float, low: float, high: float, dual_clip: float | None = None
) -> float:
    ratio = math.exp(logprob - old)
    objective = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    if dual_clip is not None and advantage < 0:
        objective = max(objective, dual_clip * advantage)
    return -objective


def sequence_ratio(logprobs: list[float], old: list[float], mask: list[bool], ids: list[int], sequence: int) -> float:
    logs = [a - b for a, b, m, s in zip(logprobs, old, mask, ids, strict=True) if m and s == sequence]
    return math.exp(sum(logs) / len(logs))


def kl(probs: list[float], ref_probs: list[float]) -> float:
    return sum(p * math.log(p / q) for p, q in zip(probs, ref_probs, strict=True))


def pass_at_k(outcomes: list[bool], k: int) -> float:
    """By trying every choice of k samples."""
    from itertools import combinations

    choices = list(combinations(outcomes, k))
    return sum(any(choice) for choice in choices) / len(choices)


def overlong_penalty(length: int, max_tokens: int, buffer_tokens: int, factor: float) -> float:
    soft = max_tokens - buffer_tokens
    if length <= soft:
        return 0.0
    return -min(length - soft, buffer_tokens) / buffer_tokens * factor


def gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """One sequence, from the definition: A[i] is the sum over k of (gamma lam)^k delta[i + k]."""
    following = [*values[1:], 0.0][: len(values)]
    deltas = [r + gamma * n - v for r, n, v in zip(rewards, following, values, strict=True)]
    return [
        sum((gamma * lam) ** (k - i) * deltas[k] for k in range(i, len(deltas)))
        for i in range(len(deltas))
    ]


def generalized_jsd(teacher: list[float], student: list[float], beta: float) -> float:
    def kl(p: list[float], q: list[float]) -> float:
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))

    if beta == 0:
        return kl(teacher, student)
    if beta == 1:
        return kl(student, teacher)
    mixture = [beta * p + (1 - beta) * q for p, q in zip(teacher, student, strict=True)]
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def mismatch_weight(name: str, gaps: list[float], t: int, low: float, high: float) -> float:
    """Weight of token t of one sequence whose trained tokens have the log-ratios `gaps`; `high` caps the tis forms."""
    ratio = {
        "token": math.exp(gaps[t]),
        "sequence": math.prod(math.exp(gap) for gap in gaps),
        "geometric": math.prod(math.exp(gap) for gap in gaps) ** (1 / len(gaps)),
    }[name.split("_")[0]]
    if name.endswith("tis"):
        return min(ratio, high)
    if not low <= ratio <= high:
        return 0.0
    return ratio if name.endswith("mis") else 1.0


def rewards_to_go(reward: float, kl: list[float], coef: float) -> list[float]:
    """One sequence: its reward less the price of the KL from each token to the last."""
    return [reward - coef * sum(kl[t:]) for t in range(len(kl))]


def whitened(sequences: list[list[float]], eps: float) -> list[list[float]]:
    """All tokens of all sequences to mean 0 and (unbiased) variance 1."""
    tokens = [value for sequence in sequences for value in sequence]
    mean = sum(tokens) / len(tokens)
    variance = sum((value - mean) ** 2 for value in tokens) / max(len(tokens) - 1, 1)
    return [[(value - mean) / math.sqrt(variance + eps) for value in sequence] for sequence in sequences]


def label_loss(
    logits: list[float], target: int, label_weight: float, label_smoothing: float, z_loss_coef: float
) -> float:
    probs = softmax(logits)
    label = [label_smoothing / len(logits) + (1 - label_smoothing) * (v == target) for v in range(len(logits))]
    cross_entropy = -sum(q * math.log(p) for q, p in zip(label, probs, strict=True))
    return label_weight * cross_entropy + z_loss_coef * math.log(sum(math.exp(z) for z in logits)) ** 2
