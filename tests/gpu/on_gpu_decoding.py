"""Every way to decode gives the CPU's completions on a pretended GPU, and a step makes the host wait once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from alignlab.config.rollout import RolloutSettings
from alignlab.data.packing import pack_rollouts
from alignlab.evaluation.likelihood.measure import LikelihoodMeter
from alignlab.evaluation.likelihood.texts import ScoredText, windows_of
from alignlab.loop.forward import PolicyForward
from alignlab.models.hub.checkpoints import new_model
from alignlab.models.kv_approximation.choice import replayed_approximation
from alignlab.models.policy import Policy
from alignlab.rollout.embedded import sampling
from alignlab.rollout.embedded.beams import BeamParams
from alignlab.rollout.embedded.contrastive import ContrastiveParams
from alignlab.rollout.embedded.engine import EmbeddedEngine
from alignlab.types import Prompt, Rollout, SamplingParams
from tests.gpu.on_gpu_zoo import make_preset
from tests.gpu.pretended import PretendedGPU
from tests.gpu.steps import Steps, assert_same
from tests.trainers.conftest import DENSE, SPARSE
from tests.trainers.tiny import save_teacher

Context = Callable[..., Any]
MODELS: dict[str, dict[str, Any]] = {
    "dense": DENSE | {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "mixture": SPARSE | {"mlp_layer_types": None},
}
SCHEMA = json.dumps({"type": "object", "properties": {"n": {"enum": [1, 22]}}, "required": ["n"]})
CONTROLS: dict[str, dict[str, Any]] = {
    "typical": {"typical_p": 0.6, "top_k": 60},
    "bias and penalties": {
        "logit_bias": ((3, 4.0), (40, -2.0)), "presence_penalty": 0.5, "frequency_penalty": -0.3,
        "repetition_penalty": 1.2,
    },
    "bans and forced": {
        "banned_token_ids": tuple(range(0, 250, 2)), "banned_words": ("ab",), "forced_tokens": ((0, 7), (3, 251)),
    },
    "a regular expression": {"regex": "[a-c]{2,4}-(7|42)", "temperature": 1.5},
    "a JSON schema": {"json_schema": SCHEMA},
    "stop strings": {"stop": ("b", "9a"), "temperature": 0.7, "top_k": 40, "top_p": 0.9},
}
CACHES: dict[str, dict[str, Any]] = {
    "int8": {"type": "int8"}, "fp8": {"type": "fp8"}, "int4": {"type": "int4", "group": 4},
    "window": {"type": "window", "tokens": 9, "sinks": 2},
    "evict": {"type": "evict", "heavy": 4, "recent": 3, "sinks": 1, "interval": 4, "observed": 3},
    "top_k": {"type": "top_k", "tokens": 4, "recent": 2}, "threshold": {"type": "threshold", "part": 0.1},
    "low_rank": {"type": "low_rank", "rank": 3, "calibration_tokens": 24},
}
DRAFTS: dict[str, dict[str, Any]] = {
    "ngram": {"type": "ngram", "min_match": 1, "max_match": 3, "num_drafts": 3, "always": True},
    "model": {"type": "model", "num_drafts": 2, "always": True},
    "mtp": {"type": "mtp", "num_drafts": 2, "always": True},
}
SAMPLING = SamplingParams(n=3, max_new_tokens=12, seed=5)


def make_model(name: str, tokenizer: Any) -> Any:
    if name not in MODELS:
        return make_preset(name, tokenizer)
    torch.manual_seed(0)
    return new_model(
        MODELS[name], vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def make_engine(model: Any, tokenizer: Any, **settings: Any) -> EmbeddedEngine:
    return EmbeddedEngine(model, tokenizer, RolloutSettings(**{"block_size": 16, "prefill_tokens": 16} | settings))


def make_prompts() -> list[Prompt]:
    return [Prompt((*range(1, 7 + 9 * i), 1, 2, 3), "") for i in range(3)]


@pytest.mark.parametrize("controls", CONTROLS)
def test_controls_give_the_completions_of_a_cpu(
    controls: str, gpu: Context, cpu: Context, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "_NUCLEUS", 64)  # of this small vocabulary a part
    params = replace(SAMPLING, **CONTROLS[controls])
    with cpu():
        expected = make_engine(make_model("dense", tokenizer), tokenizer).generate(make_prompts(), params)
    with gpu() as mode:
        model = make_model("dense", tokenizer).to("cuda:0")
        wide: set[str] = set()

        def look(func: Any, tensors: list[Any], place: str) -> None:
            wide.update(place for x in tensors if x.dtype == torch.float64 and x.shape[-1:] == (len(tokenizer),))

        mode.watch, steps = look, Steps(mode)
        rollouts = make_engine(model, tokenizer).generate(make_prompts(), params, on_step=steps)
        assert_same(rollouts, expected)
        assert not wide, "numbers of 64 bits over the vocabulary"
        steps.check()


@pytest.mark.parametrize(("cache", "name"), [*zip(CACHES, ("mixture", "dense", "dense", "mixture") * 2, strict=True)])
def test_a_cache_that_approximates_has_the_completions_and_the_replay_of_a_cpu(
    cache: str, name: str, gpu: Context, cpu: Context, tokenizer: Any
) -> None:
    settings = {"kv_cache": CACHES[cache], "cache_tokens": 192}

    def results(device: str, **options: Any) -> tuple[list[Rollout], list[Any], dict[str, Any], int]:
        """Completions, the trainer's replay of them with its gradients, and the waits of that."""
        model = make_model(name, tokenizer).to(device)
        engine = make_engine(model, tokenizer, **settings)
        rollouts = engine.generate(make_prompts(), SAMPLING, **options)
        approximation = replayed_approximation(RolloutSettings(kv_cache=CACHES[cache]), model)
        policy = Policy(model, kv_approximation=approximation)
        [pack] = pack_rollouts(rollouts, budget=4096)
        waits = PretendedGPU.running().num_waits if device != "cpu" else 0
        output = PolicyForward()(policy.train(), pack.to(device))
        output.logprobs.sum().backward()
        waits = PretendedGPU.running().num_waits - waits if device != "cpu" else 0
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        scored = engine.logprobs(rollouts)
        return rollouts, [output.logprobs.detach().cpu(), *scored], {n: g.cpu() for n, g in gradients.items()}, waits

    with cpu():
        expected, expected_logprobs, expected_gradients, _ = results("cpu")
    with gpu() as mode:
        steps = Steps(mode)
        rollouts, logprobs, gradients, waits = results("cuda:0", on_step=steps)
        assert_same(rollouts, expected)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(logprobs, expected_logprobs, strict=True))
        assert gradients.keys() == expected_gradients.keys()
        assert [n for n, gradient in gradients.items() if not torch.equal(gradient, expected_gradients[n])] == []
        # Which completions have a record of dropped tokens is read once a pack.
        assert waits == (1 if cache == "evict" else 0), "neither of layers nor of a pack"
        steps.check()


@pytest.mark.parametrize(("drafts", "cache"), [*((drafts, "exact") for drafts in DRAFTS), ("ngram", "int8")])
def test_speculation_gives_the_completions_of_a_cpu(
    drafts: str, cache: str, gpu: Context, cpu: Context, tokenizer: Any, tmp_path: Path
) -> None:
    chosen = DRAFTS[drafts] | ({"model": save_teacher(tmp_path / "draft", tokenizer)} if drafts == "model" else {})
    params = replace(SAMPLING, temperature=0.5)

    def results(device: str, **options: Any) -> tuple[list[Rollout], int]:
        model = make_model("mtp" if drafts == "mtp" else "dense", tokenizer).to(device)
        engine = make_engine(model, tokenizer, speculation=chosen, cuda_graphs=False, kv_cache={"type": cache})
        return engine.generate(make_prompts(), params, **options), engine._speculation.num_drafted

    with cpu():
        expected, num_drafted = results("cpu")
    with gpu() as mode:
        steps = Steps(mode)
        rollouts, num_drafted_on_gpu = results("cuda:0", on_step=steps)
        assert_same(rollouts, expected)
        assert num_drafted == num_drafted_on_gpu > 0
        steps.check(1 + (0 if drafts == "ngram" else chosen["num_drafts"]))


SEARCHES: dict[str, Any] = {
    "beams": BeamParams(num_beams=4, num_best=2, max_new_tokens=7),
    "groups of beams": BeamParams(num_beams=6, num_best=3, num_groups=2, diversity=0.5, max_new_tokens=7),
    "contrastive": ContrastiveParams(num_candidates=3, max_new_tokens=7),
}


def count_steps(engine: EmbeddedEngine, mode: PretendedGPU, waits: list[tuple[int, str]]) -> None:
    """Have the waits before each step, since the one before it, added to a list."""
    hidden = engine._runner.hidden

    def counted(*args: Any) -> Any:
        waits.append((mode.num_waits, mode.report()))
        mode.reset()
        return hidden(*args)

    engine._runner.hidden = counted  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("search", "name"),
    [
        ("beams", "mixture"), ("beams", "gated_deltanet"), ("groups of beams", "dense"), ("groups of beams", "mla"),
        ("contrastive", "dense"), ("contrastive", "gated_deltanet"),
    ],
)
def test_searches_find_what_a_cpu_finds(
    search: str, name: str, gpu: Context, cpu: Context, tokenizer: Any
) -> None:
    params = SEARCHES[search]

    waits: list[tuple[int, str]] = []

    def results(device: str) -> tuple[list[Rollout], list[tuple[float, ...]]]:
        engine = make_engine(make_model(name, tokenizer).to(device), tokenizer)
        if device != "cpu":
            count_steps(engine, PretendedGPU.running(), waits)
        if isinstance(params, ContrastiveParams):
            return engine.contrastive_search(make_prompts(), params), []
        found = engine.beam_search(make_prompts(), params)
        return [result.rollout for result in found], [result.scores for result in found]

    with cpu():
        expected, scores = results("cpu")
    with gpu():
        rollouts, scores_on_gpu = results("cuda:0")
    assert_same(rollouts, expected)
    assert scores == scores_on_gpu
    if rollouts[0].completions[0].routing is None:  # which is read when a completion ends
        assert max(waits[1:])[0] == 1, max(waits[1:])[1]


def test_likelihoods_are_those_of_a_cpu(gpu: Context, cpu: Context, tokenizer: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    texts = []
    for length in range(3, 12):
        ids = torch.randint(0, 256, (length,), generator=generator).tolist()
        texts.append(ScoredText((1, *ids), (False, *[True] * length), length, 2))
    windows = list(windows_of(texts, width=8, stride=5))

    def results(meter: LikelihoodMeter) -> Any:
        temperature, _ = meter.fit_temperature(windows)
        if meter._device.type != "cpu":
            PretendedGPU.running().reset()
        return temperature, meter.measure(texts, windows, temperature=temperature).to_json()

    with cpu():
        expected = results(LikelihoodMeter(make_model("dense", tokenizer)))
    with gpu() as mode:
        assert results(LikelihoodMeter(make_model("dense", tokenizer).to("cuda:0"))) == expected
        assert mode.num_waits == 1, mode.report()
