"""The tiny runs that are attacked: every trainer, from a config file as a user has it; and all that they start from.

A run is in a folder of its own, always the same one for a worker, so that paths that a run writes down are the same:

    inputs/     models, data, rewards, a constitution, and a config for each run
    cache/      what alignlab keeps for later runs
    run/        the run's folder

A name such as `grpo@2` is the run `grpo` on two ranks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

MODEL = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
JUDGE_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"
REWARDS = '''
"""A reward that a random policy gets some of."""


def even(*, completion_ids, **_):
    return [sum(token % 2 == 0 for token in ids) / max(len(ids), 1) for ids in completion_ids]


def is_even(*, completion_ids, **_):
    return [float(bool(ids) and ids[0] % 2 == 0) for ids in completion_ids]
'''
_STEPS = {"num_steps": 3, "optim": {"learning_rate": 1e-2}, "checkpoints": {"every_steps": 1}, "trackers": []}
_SAMPLED = {"num_prompts": 2, "sampling": {"max_new_tokens": 4}}
_POLICY = {"name": "inputs/policy"}
_ADAPTER = {"name": "inputs/policy", "lora": {"rank": 2}, "dtype": "float32"}
_TEACHER = {"teacher": {"name": "inputs/teacher"}}
_REWARD = [{"name": "inputs/rewards.py:even"}]
_HELD_OUT = {"eval_data": {"path": "inputs/held_out.jsonl"}, "evaluation": {"num_samples": 1}}
_SCORED = _HELD_OUT | {"evaluation": {"num_samples": 1, "scorer": "inputs/rewards.py:is_even"}}


def _online(trainer: dict[str, Any], **sections: Any) -> dict[str, Any]:
    return {
        "model": _POLICY, "data": {"path": "inputs/prompts.jsonl"}, "rewards": _REWARD,
        "trainer": _STEPS | _SAMPLED | trainer, **sections,
    }  # fmt: skip


def _offline(data: str, trainer: dict[str, Any], **sections: Any) -> dict[str, Any]:
    return {"model": _POLICY, "data": {"path": f"inputs/{data}.jsonl"}, "trainer": _STEPS | trainer, **sections}


def _rlaif(path: str, trainer: dict[str, Any]) -> dict[str, Any]:
    settings = {"type": "rlaif", "constitution": "inputs/constitution.yaml", "judge": {"name": "inputs/judge"}}
    return {
        "model": _ADAPTER, "data": {"path": "inputs/prompts.jsonl"}, "trainer": settings | {"path": path} | trainer,
        **_SCORED,
    }  # fmt: skip


_LABELS = {"labels": {"sampling": {"max_new_tokens": 4}, "prompts_per_batch": 3}}
RUNS: dict[str, dict[str, Any]] = {
    "sft": _offline(
        "examples",
        {
            "type": "sft", "num_sequences": 2, "trackers": ["tensorboard"], "eval_every_steps": 1,
            "checkpoints": {"every_steps": 1, "with_model": True},
        },
        eval_data={"path": "inputs/examples.jsonl"},
    ),
    "dpo": _offline("pairs", {"type": "dpo", "num_pairs": 2}, model=_ADAPTER, eval_data={"path": "inputs/pairs.jsonl"}),
    "kto": _offline("labelled", {"type": "kto", "num_sequences": 4}),
    "reward": _offline("pairs", {"type": "reward", "num_pairs": 2}, model=_ADAPTER),
    "distill": _offline("examples", {"type": "distill", "num_sequences": 2, "top_k": 4} | _TEACHER),
    "grpo": _online({"type": "grpo", "group_size": 2, "kl": {"coef": 0.1}}, **_HELD_OUT),
    "ppo": _online({"type": "ppo"}, model=_ADAPTER),
    "online_dpo": _online({"type": "online_dpo"}, model=_ADAPTER),
    "gkd": _online({"type": "gkd", "student_frac": 0.5} | _TEACHER),
    "on_policy_distill": _online({"type": "on_policy_distill", "group_size": 2} | _TEACHER),
    "rlaif": _rlaif("dpo", {"policy": {"type": "dpo", "num_pairs": 2} | _STEPS} | _LABELS),
    "rlaif_reward": _rlaif(
        "reward_model",
        {"policy": {"type": "grpo", "group_size": 2} | _STEPS | _SAMPLED, "reward": {"num_pairs": 2} | _STEPS}
        | _LABELS,
    ),
    "rlaif_direct": _rlaif("direct", {"policy": {"type": "grpo", "group_size": 2} | _STEPS | _SAMPLED}),
    "warm": _online(
        {"type": "grpo", "group_size": 2, "num_steps": 2},
        model={"architecture": MODEL, "tokenizer": {"vocab_size": 262}},
        warm_start={
            "trainer": _STEPS | {"num_steps": 2, "num_sequences": 2}, "data": {"path": "inputs/examples.jsonl"},
        },
    ),
    "ahead": _online(
        {"type": "grpo", "group_size": 2, "rollout": {"engine": "vllm_server", "max_staleness": 2}, "num_steps": 4}
    ),
}
"""By name, what a config file says. `ahead` collects rollouts while it learns, from an engine that `tasks` gives it."""
_SHARDED = {
    "fsdp2": ("sft", "grpo", "ppo"), "zero1": ("grpo",), "zero2": ("sft", "ppo"), "zero3": ("dpo", "grpo", "ppo"),
}
SPREAD: dict[str, dict[str, Any]] = {
    f"{name}_{strategy}": RUNS[name] | {"trainer": RUNS[name]["trainer"] | {"sharding": {"strategy": strategy}}}
    for strategy, names in _SHARDED.items() for name in names
}
"""Runs whose weights are spread over ranks, of which there are two at least."""
_ON_TWO = ("sft", "dpo", "grpo", "ppo", "online_dpo", "distill", "rlaif", "ahead", *SPREAD)
TWO_RANKS = tuple(f"{name}@2" for name in _ON_TWO)
ALL = (*RUNS, *TWO_RANKS)


def split_name(name: str) -> tuple[str, int]:
    """The run and its number of ranks."""
    run, _, ranks = name.partition("@")
    return run, int(ranks or 1)


def make_inputs(folder: Path) -> None:
    """Write what all runs start from. Called in a child: it imports torch."""
    import torch

    from alignlab.data.tokenizer_training import train_tokenizer
    from alignlab.models.hub.checkpoints import new_model, save_model
    from alignlab.models.hub.saving import published

    folder.mkdir()
    tokenizer = train_tokenizer(["abc abd ab ba 123"], vocab_size=262)
    models = {"policy": (0, MODEL), "teacher": (7, MODEL | {"hidden_size": 24}), "judge": (3, MODEL)}
    for name, (seed, architecture) in models.items():
        torch.manual_seed(seed)
        model = new_model(architecture, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1)
        tokenizer.chat_template = JUDGE_TEMPLATE if name == "judge" else None
        with published(folder / name) as place:
            save_model(model, place)
            tokenizer.save_pretrained(place)
    write_texts(folder)


def write_texts(folder: Path) -> None:
    """Write the data, the rewards, the constitution and the configs."""
    words = ["abc", "abd", "ab ba", "123", "ba", "3 1 2", "ab 3", "cba"]
    rows: dict[str, list[dict[str, Any]]] = {
        "prompts": [{"prompt": f"ab{i}", "answer": words[i]} for i in range(8)],
        "held_out": [{"prompt": f"ba{i}", "answer": words[i]} for i in range(3)],
        "examples": [{"prompt": f"ab{i}", "completion": words[i]} for i in range(8)],
        "pairs": [{"prompt": f"ab{i}", "chosen": words[i], "rejected": words[7 - i]} for i in range(8)],
        "labelled": [{"prompt": f"ab{i}", "completion": words[i], "label": i % 3 > 0} for i in range(8)],
    }
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (folder / "rewards.py").write_text(REWARDS)
    principle = {"name": "long", "prefer": "Which?", "rate": "How?", "critique": "Where?", "revise": "Better!"}
    (folder / "constitution.yaml").write_text(yaml.safe_dump({"name": "test", "principles": [principle]}))
    for name, said in (RUNS | SPREAD).items():
        config = said | {"trainer": {"output_dir": "run"} | said["trainer"]}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
