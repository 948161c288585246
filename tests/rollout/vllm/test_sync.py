"""Weight updates of the real vLLM are exact and verified, and an update that goes wrong stops the engine."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from alignlab.config.model import LoraSettings
from alignlab.errors import ConfigError, RolloutError
from alignlab.models.adapters import add_lora
from alignlab.models.hub.checkpoints import save_model
from alignlab.types import SamplingParams
from tests.rollout.conftest import flat, full_logprobs, make_prompts
from tests.rollout.vllm.conftest import DENSE, OWN_ATTENTION, OWN_DENSE, OWN_MOE, QWEN3_MOE, TIED, make_model

pytestmark = pytest.mark.vllm
Make = Callable[..., Any]
LIVE: list[Any] = []  # to the end of the process: vLLM's groups of ranks would go with the first engine that goes
SHAPES = {
    "dense": DENSE, "tied": TIED, "moe": QWEN3_MOE, "own-dense": OWN_DENSE, "own-moe": OWN_MOE,
    "own-attention": OWN_ATTENTION,
}


def shake(model: torch.nn.Module, std: float = 0.1) -> None:
    """Add noise to every trained weight and to every router's bias."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * std)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.5)


@pytest.fixture(scope="module")
def engines(make_vllm: Make) -> Callable[[str], tuple[Any, Any]]:
    """Return a function from the name of a shape to its (engine, model), made once."""
    experts = make_model(QWEN3_MOE)
    # First: vLLM makes the groups of ranks that experts need for the first model of a process, or never.
    by_shape: dict[str, tuple[Any, Any]] = {"moe": (make_vllm(experts), experts)}

    def of(shape: str) -> tuple[Any, Any]:
        if shape not in by_shape:
            if shape == "adapter":
                model: Any = add_lora(make_model(DENSE), LoraSettings(rank=4, alpha=12))
                by_shape[shape] = make_vllm(model, sync="adapter"), model
            else:
                model = make_model(SHAPES[shape])
                by_shape[shape] = make_vllm(model), model
        return by_shape[shape]

    return of


@pytest.mark.parametrize("shape", [*SHAPES, "adapter"])
def test_repeated_updates_stay_exact(shape: str, engines: Any) -> None:
    engine, model = engines(shape)
    for _ in range(3):
        shake(model)
        engine.update_weights(engine.policy_version + 1)
        assert engine.last_sync.gap.largest < 5e-5
        assert engine.last_sync.gap.num_tokens == 32
        assert engine.last_sync.transfer.num_tensors > 10


def test_a_checkpoint_of_a_shape_of_our_own_is_served_by_plain_vllm(
    engines: Any, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """No option names our code: vLLM finds the plug-in, and the plug-in registers the architecture."""
    from vllm import LLM
    from vllm import SamplingParams as Plain

    engines("own-moe")  # makes vLLM's groups of ranks, for experts too
    model = make_model(OWN_MOE, seed=5)
    shake(model)
    save_model(model, tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        llm = LLM(
            str(tmp_path), dtype="float32", enforce_eager=True, kv_cache_memory_bytes=10**8, block_size=32,
            max_model_len=64, logprobs_mode="raw_logprobs",
        )
    prompt = list(make_prompts(9)[0].token_ids)
    [request] = llm.generate([{"prompt_token_ids": prompt}], Plain(max_tokens=8, logprobs=0, ignore_eos=True))
    ids = list(request.outputs[0].token_ids)
    rows = full_logprobs(model, [*prompt, *ids])[len(prompt) - 1 : -1]
    for row, step, token in zip(rows, request.outputs[0].logprobs, ids, strict=True):
        assert step[token].logprob == pytest.approx(float(row[token]), abs=5e-5)
    LIVE.append(llm)


def test_an_adapter_synced_alone_is_small_and_gets_a_new_name(engines: Any) -> None:
    (alone, model), (merged, _) = engines("adapter"), engines("dense")
    assert alone.last_sync.transfer.num_tensors == 2 * len([n for n, _ in model.named_parameters() if "lora_A" in n])
    assert alone.last_sync.transfer.num_bytes * 3 < merged.last_sync.transfer.num_bytes
    name = alone._backend._sync.lora_request.lora_name
    alone.update_weights(alone.policy_version + 1)
    assert alone._backend._sync.lora_request.lora_name != name
    assert len(alone._backend._llm.llm_engine.list_loras()) == 1


def test_a_merged_adapter_gives_the_live_adapters_logprobs(make_vllm: Make) -> None:
    model = add_lora(make_model(TIED), LoraSettings(rank=4))
    shake(model, 0.3)
    assert make_vllm(model, sync="merged").last_sync.gap.largest < 5e-5


def test_bfloat16_stays_close(make_vllm: Make) -> None:
    engine = make_vllm(make_model(DENSE, dtype=torch.bfloat16))
    assert engine.last_sync.gap.mean < 0.05


def sent_wrongly(monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], None]) -> None:
    """Change tensors between the trainer's digests and vLLM's loader."""
    from alignlab.rollout.vllm.inside import transfer

    offered = transfer.offered

    def tampered(key: str) -> Any:
        tensors, config = offered(key)
        copy = {name: tensor.clone() for name, tensor in tensors}
        change(copy)
        return copy.items(), config

    monkeypatch.setattr(transfer, "offered", tampered)
    monkeypatch.setattr("alignlab.rollout.vllm.inside.worker.offered", tampered)


def assert_stopped(engine: Any, message: str) -> None:
    """Assert that the update raises, and that the engine then refuses to generate."""
    version = engine.policy_version
    with pytest.raises(RolloutError, match=message):
        engine.update_weights(version + 1)
    assert engine.policy_version == version
    with pytest.raises(RolloutError, match="in doubt since an update that failed"):
        engine.generate(make_prompts(3), SamplingParams())


def recovers(engine: Any) -> None:
    engine.update_weights(engine.policy_version + 1)
    assert flat(engine.generate(make_prompts(3), SamplingParams(max_new_tokens=2)))


def swap_experts(tensors: dict[str, Any]) -> None:
    first, second = (f"model.layers.1.mlp.experts.{i}.down_proj.weight" for i in (0, 2))
    tensors[first], tensors[second] = tensors[second], tensors[first]


def transpose(tensors: dict[str, Any]) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].T.contiguous()


def skip(tensors: dict[str, Any]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def stale(tensors: dict[str, Any]) -> None:
    tensors["model.layers.1.input_layernorm.weight"].sub_(1e-6)


@pytest.mark.parametrize(
    ("shape", "change", "message"),
    [
        ("dense", skip, r"tensor model.layers.1.mlp.up_proj.weight did not arrive \(1 of"),
        ("dense", transpose, r"tensor model.layers.0.self_attn.q_proj.weight arrived with another content \(1 of"),
        ("dense", stale, "tensor model.layers.1.input_layernorm.weight arrived with another content"),
        ("moe", swap_experts, r"model.layers.1.mlp.experts.0.down_proj.weight arrived with another content \(2 of"),
    ],
)
def test_a_tensor_changed_on_the_way_is_named(
    shape: str, change: Any, message: str, engines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, model = engines(shape)
    shake(model, 0.01)
    with monkeypatch.context() as patch:
        sent_wrongly(patch, change)
        assert_stopped(engine, message)
    recovers(engine)


@pytest.mark.parametrize(("shape", "patch_name"), [("tied", "after_update"), ("moe", "before_update")])
def test_vllms_silent_faults_are_caught_by_the_canary(
    shape: str, patch_name: str, engines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor arrives whole, but without our patch vLLM uses a stale or a misread one."""
    engine, model = engines(shape)
    shake(model)
    with monkeypatch.context() as patch:
        patch.setattr(f"alignlab.rollout.vllm.inside.patches.{patch_name}", lambda model: None)
        assert_stopped(engine, r"log-probs differ from the trainer's by up to .* nats .* every tensor arrived intact")
    recovers(engine)


def test_a_prefix_cache_that_outlives_an_update_is_caught(engines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A third fault of vLLM: an update does not drop the keys of the old weights."""
    engine, model = engines("dense")
    shake(model)
    with monkeypatch.context() as patch:
        patch.setattr(engine._backend._llm, "reset_prefix_cache", lambda: True)
        patch.setattr(engine, "_settings", engine._settings.model_copy(update={"canary_prompt_tokens": 40}))
        recovers(engine)  # caches the canary's prompts, which are longer than a block of 32
        shake(model)
        assert_stopped(engine, "log-probs differ from the trainer's")
    recovers(engine)


def test_a_stale_adapter_is_caught(engines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, model = engines("adapter")
    shake(model)
    engine.update_weights(engine.policy_version + 1)
    shake(model, 1e-4)
    with monkeypatch.context() as patch:
        name = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
        sent_wrongly(patch, lambda tensors: tensors[name].zero_())
        assert_stopped(engine, r"tensor model.layers.0.mlp.up_proj.lora_B arrived with another content \(1 of")
    recovers(engine)


def test_a_reused_adapter_name_is_caught(engines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM silently goes on with the adapter that it has under the name."""
    engine, model = engines("adapter")
    shake(model)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_num_attempts", engine._num_attempts - 1)
        patch.setattr(engine._backend._llm.llm_engine, "remove_lora", lambda number: True)
        assert_stopped(engine, "arrived with another content")
    engine._num_attempts += 1  # the name that was used twice
    recovers(engine)


def test_an_update_that_dies_half_way(engines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from alignlab.rollout.vllm.inside.transfer import OwnTransferEngine

    engine, _ = engines("dense")

    def dies(self: Any, tensors: Any) -> Any:
        for number, item in enumerate(tensors):
            if number == 7:
                raise OSError("connection lost")
            yield item

    with monkeypatch.context() as patch:
        patch.setattr(OwnTransferEngine, "_with_digests", dies)
        with pytest.raises(OSError, match="connection lost"):
            engine.update_weights(engine.policy_version + 1)
        with pytest.raises(RolloutError, match="in doubt since an update that failed: connection lost"):
            engine.generate(make_prompts(3), SamplingParams())
    recovers(engine)
    assert engine.last_sync.gap.largest < 5e-5


def test_syncing_an_adapter_alone_without_one_is_refused(make_vllm: Make) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.sync is adapter, and the policy has none"):
        make_vllm(make_model(DENSE), sync="adapter")


@pytest.fixture
def awake(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[str]]:
    """Return a function that lets an engine sleep, with vLLM's calls replaced, and returns the calls in their order.

    A CPU's vLLM refuses to sleep. What level 2 drops is overwritten with zeros.
    """

    def prepare(engine: Any) -> list[str]:
        from alignlab.rollout.vllm.sleep import Sleep

        backend, calls = engine._backend, []
        llm, sync = backend._llm, backend._sync

        def sleep(level: int) -> None:
            calls.append(f"sleep {level}")
            if level == 2:
                llm.apply_model(lambda model: [weight.data.zero_() for weight in model.parameters()] and None)

        def noted(owner: Any, name: str) -> None:
            call = getattr(owner, name)

            def note_and_call(*args: Any, **options: Any) -> Any:
                calls.append(name)
                return call(*args, **options)

            monkeypatch.setattr(owner, name, note_and_call)

        monkeypatch.setattr(llm, "sleep", sleep)
        monkeypatch.setattr(llm, "wake_up", lambda tags: calls.append(f"wake {tags}"))
        for owner, name in ((sync, "load"), (llm, "reset_prefix_cache"), (llm, "generate")):
            noted(owner, name)
        monkeypatch.setattr(backend, "_sleep", Sleep(llm, level=sync.sleep_level, is_enabled=True))
        return calls

    return prepare


WAKE = ["wake ['weights']", "load", "wake ['kv_cache']", "reset_prefix_cache"]


def test_weights_that_an_update_replaces_are_dropped_in_sleep_and_the_cache_comes_after_them(
    engines: Any, awake: Any
) -> None:
    engine, model = engines("dense")
    calls = awake(engine)
    engine.rest()
    engine.rest()
    assert calls == ["sleep 2"]
    shake(model)
    engine.update_weights(engine.policy_version + 1)
    assert calls == ["sleep 2", *WAKE, "generate"], "the canary generates"
    assert engine.last_sync.gap.largest < 5e-5
    engine.generate(make_prompts(3), SamplingParams(max_new_tokens=2))
    assert calls[-1] == "generate" and len(calls) == 7


def test_dropped_weights_are_sent_again_if_no_update_comes_before_the_next_call(engines: Any, awake: Any) -> None:
    engine, _ = engines("dense")
    sampling = SamplingParams(max_new_tokens=6, ignore_eos=True, seed=1)
    before = flat(engine.generate(make_prompts(9), sampling))
    calls = awake(engine)
    engine.rest()
    assert flat(engine.generate(make_prompts(9), sampling)) == before
    assert calls == ["sleep 2", *WAKE, "generate"]


def test_an_adapters_base_moves_to_the_host_in_sleep(engines: Any, awake: Any) -> None:
    engine, _ = engines("adapter")
    calls = awake(engine)
    engine.rest()
    engine.update_weights(engine.policy_version + 1)
    assert calls == ["sleep 1", *WAKE, "generate"]
    engine.rest()
    engine.generate(make_prompts(3), SamplingParams(max_new_tokens=2))
    assert calls[6:] == ["sleep 1", "wake ['weights']", "wake ['kv_cache']", "generate"]


def test_the_merged_copy_is_gone_before_the_cache_is_allocated(
    make_vllm: Make, awake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = add_lora(make_model(DENSE), LoraSettings(rank=4))
    engine = make_vllm(model, sync="merged")
    calls = awake(engine)
    merged: list[Any] = []
    load = engine._backend._sync.load

    def load_and_watch(llm: Any, weights: Any, *args: Any) -> None:
        policy = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        stream = weights._stream

        def watched() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in stream:
                if tensor.untyped_storage().data_ptr() not in policy:
                    merged.append(weakref.ref(tensor))
                yield name, tensor

        weights._stream = watched()
        load(llm, weights, *args)

    def wake_up(tags: list[str]) -> None:
        calls.append(f"wake {tags}")
        if tags == ["kv_cache"]:
            gc.collect()
            assert len(merged) == 7 * 2 and not any(tensor() is not None for tensor in merged)

    monkeypatch.setattr(engine._backend._sync, "load", load_and_watch)
    monkeypatch.setattr(engine._backend._llm, "wake_up", wake_up)
    engine.rest()
    engine.update_weights(engine.policy_version + 1)
    assert calls == ["sleep 2", *WAKE, "generate"]


def test_a_cpu_refuses_sleep(engines: Any, make_vllm: Make) -> None:
    _, model = engines("dense")
    with pytest.raises(ConfigError, match=r"(?s)vLLM cannot run .*[Ss]leep mode"):
        make_vllm(model, sleep=True)


def test_an_abandoned_call_raises_and_leaves_no_request_in_vllm(engines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = engines("dense")
    sampling = SamplingParams(n=3, max_new_tokens=20, ignore_eos=True, seed=1)
    expected = flat(engine.generate(make_prompts(9), sampling))
    core = engine._backend._llm.llm_engine
    step = core.step

    def abandon_after_a_step() -> Any:
        outputs = step()
        engine.abandon()
        return outputs

    with monkeypatch.context() as patch:
        patch.setattr(core, "step", abandon_after_a_step)
        with pytest.raises(RolloutError, match="generation was abandoned"):
            engine.generate(make_prompts(9), sampling)
    assert not core.has_unfinished_requests()
    engine.abandon()  # without a call in flight, nothing happens
    assert flat(engine.generate(make_prompts(9), sampling)) == expected
