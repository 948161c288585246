"""Compilation of the kernels, and what happens where they cannot be."""

from __future__ import annotations

import logging
import os
import stat
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from alignlab.config.rollout import RolloutSettings
from alignlab.errors import ConfigError
from alignlab.models.hub.checkpoints import new_model
from alignlab.native import build, processor
from alignlab.native.build import BuildError, load_library, native_folder
from alignlab.rollout.embedded.engine import EmbeddedEngine
from alignlab.rollout.embedded.native import choice, coverage
from alignlab.rollout.embedded.native.binding import SOURCE, kernels_of
from alignlab.rollout.embedded.native.runner import NativeRunner
from alignlab.types import SamplingParams
from tests.models.attention_kinds import make_model
from tests.rollout.conftest import SIZES, VOCAB, make_prompts
from tests.rollout.embedded.native.conftest import MIXTURE, model_of, needs_kernels
from tests.rollout.embedded.test_weights import adapted

FLOAT32 = torch.float32
MakeCompiler = Callable[..., Path]


@pytest.fixture
def compiled(tmp_path: Path) -> Path:
    """A library that was compiled before."""
    kernels_of(FLOAT32)
    return build.native_folder() / f"{build._digest(_compiler(), SOURCE, FLOAT32)}.so"


def _compiler() -> str:
    path = build.shutil.which(build.COMPILER)
    assert path is not None
    return path


@pytest.fixture
def fake_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeCompiler:
    """A compiler of this test on the PATH, and an empty cache; its runs are counted in the file that it returns."""

    def make(writes: Path | None, *, status: int = 0, version: str = "fake 1") -> Path:
        folder, runs = tmp_path / "bin", tmp_path / "runs"
        folder.mkdir(exist_ok=True)
        script = folder / build.COMPILER
        copying = "" if writes is None else f'cp "{writes}" "$out"'
        script.write_text(
            f'#!/bin/sh\nif [ "$1" = --version ]; then echo "{version}"; exit 0; fi\necho run >> "{runs}"\n'
            f'for a; do out="$a"; done\necho "no such instruction" >&2\n{copying}\nexit {status}\n'
        )
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))
        return runs

    return make


def count(runs: Path) -> int:
    return len(runs.read_text().splitlines()) if runs.exists() else 0


@needs_kernels
def test_one_compilation_serves_threads_that_need_it_together_and_later_calls(
    compiled: Path, fake_compiler: MakeCompiler
) -> None:
    runs, libraries = fake_compiler(compiled), []
    threads = [threading.Thread(target=lambda: libraries.append(load_library(SOURCE, FLOAT32))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(libraries) == 4 and count(runs) == 1
    load_library(SOURCE, FLOAT32)
    assert count(runs) == 1
    assert stat.S_IMODE(native_folder().stat().st_mode) == 0o700
    assert sorted(path.suffix for path in native_folder().iterdir()) == [".lock", ".so"]


@needs_kernels
def test_another_compiler_source_or_processor_compiles_again(
    compiled: Path, fake_compiler: MakeCompiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runs = fake_compiler(compiled)
    load_library(SOURCE, FLOAT32)
    fake_compiler(compiled, version="fake 2")
    load_library(SOURCE, FLOAT32)
    assert count(runs) == 2
    monkeypatch.setattr(build, "processor_flags", lambda: frozenset(["avx512f"]))
    load_library(SOURCE, FLOAT32)
    assert count(runs) == 3
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "kernels.cpp").write_text("int x;")
    load_library(tmp_path / "source" / "kernels.cpp", FLOAT32)
    assert count(runs) == 4


@needs_kernels
def test_half_a_file_is_compiled_again(compiled: Path, fake_compiler: MakeCompiler) -> None:
    runs = fake_compiler(compiled)
    native_folder().mkdir(mode=0o700, parents=True)
    library = native_folder() / f"{build._digest(_compiler(), SOURCE, FLOAT32)}.so"
    library.write_bytes(b"\x7fELF")
    load_library(SOURCE, FLOAT32)
    assert count(runs) == 1 and library.stat().st_size == compiled.stat().st_size


def test_a_compiler_that_fails_is_named_with_its_message_and_leaves_nothing(fake_compiler: MakeCompiler) -> None:
    fake_compiler(None, status=3)
    with pytest.raises(BuildError, match=r"g\+\+ fails with status 3: no such instruction"):
        load_library(SOURCE, FLOAT32)
    assert [path.suffix for path in native_folder().iterdir()] == [".lock"]


def test_a_result_that_is_no_library_is_refused(fake_compiler: MakeCompiler, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a library")
    fake_compiler(tmp_path / "text")
    with pytest.raises(BuildError, match="cannot be loaded"):
        load_library(SOURCE, FLOAT32)


@pytest.mark.parametrize("mode", [0o777, 0o720])
def test_a_folder_that_others_may_write_to_is_refused(mode: int, fake_compiler: MakeCompiler) -> None:
    runs = fake_compiler(None)
    native_folder().mkdir(parents=True)
    native_folder().chmod(mode)
    with pytest.raises(BuildError, match="writable by no other"):
        load_library(SOURCE, FLOAT32)
    assert count(runs) == 0


def test_a_folder_that_is_a_link_or_cannot_be_made_is_refused(fake_compiler: MakeCompiler, tmp_path: Path) -> None:
    fake_compiler(None)
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    native_folder().parent.mkdir(parents=True)
    native_folder().symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BuildError, match="cannot be used"):
        load_library(SOURCE, FLOAT32)
    native_folder().unlink()
    native_folder().write_text("a file")
    with pytest.raises(BuildError, match="cannot be used"):
        load_library(SOURCE, FLOAT32)


def test_without_a_compiler_the_python_step_decodes_and_the_log_says_why_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tokenizer: PreTrainedTokenizerFast
) -> None:
    monkeypatch.setattr(coverage, "missing_flags", lambda dtype: [])
    monkeypatch.setattr(choice, "kernels_of", partial(load_library, SOURCE))  # as in a process that has not loaded them
    monkeypatch.setenv("PATH", "/nowhere")
    choice._log_once.cache_clear()
    model = model_of("llama", dtype=torch.bfloat16)
    with caplog.at_level(logging.INFO):
        engines = [EmbeddedEngine(model, tokenizer, RolloutSettings()) for _ in range(2)]
    lines = [record.message for record in caplog.records if "native" in record.message]
    assert len(lines) == 1 and "there is no compiler g++ on the PATH" in lines[0]
    assert not isinstance(engines[0]._runner, NativeRunner)
    engines[0].generate(make_prompts(3), SamplingParams(max_new_tokens=2))
    with pytest.raises(ConfigError, match=r"rollout.native is required.*no compiler g\+\+.*native: auto"):
        EmbeddedEngine(model, tokenizer, RolloutSettings(native="required"))


def _own(**architecture: Any) -> PreTrainedModel:
    return new_model({**SIZES, **architecture}, vocab_size=VOCAB)


UNCOVERED: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "layers are of kind latent_attention": (lambda: make_model("latent", vocab_size=VOCAB), {}),
    "the config has shared_layers": (lambda: make_model("shared-layers", vocab_size=VOCAB), {}),
    "the config has (expert_bias|swiglu_|router_linear)": (lambda: make_model("biased-experts", vocab_size=VOCAB), {}),
    "norms are layernorm": (lambda: _own(norm_type="layernorm"), {}),
    "attention and feed-forward are parallel": (lambda: _own(parallel_attn=True), {}),
    "feed-forwards are not gated": (lambda: _own(mlp_gated=False), {}),
    "the activation is gelu": (lambda: _own(hidden_act="gelu"), {}),
    "the router is not a plain top-k": (lambda: _own(**MIXTURE, capacity_factor=1.5), {}),
    "the weights are torch.float64": (lambda: _own().double(), {}),
    "blocks of 5 tokens are odd": (lambda: _own().bfloat16(), {"block_size": 5}),
    "a size of the model, 51, is odd": (lambda: _own(intermediate_size=51).bfloat16(), {}),
    r"the cache approximates keys and values \(kv_cache: int8\)": (lambda: _own(), {"kv_cache": {"type": "int8"}}),
    "the adapter is applied as it is": (lambda: adapted(_own()), {"merge_lora": False}),
}


@pytest.mark.parametrize("reason", UNCOVERED)
def test_what_the_kernels_do_not_cover_is_named(
    reason: str, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    monkeypatch.setattr(coverage, "missing_flags", lambda dtype: [])
    make, settings = UNCOVERED[reason]
    with pytest.raises(ConfigError, match=reason):
        EmbeddedEngine(make(), tokenizer, RolloutSettings(native="required", **settings))


def test_models_of_transformers_float32_and_other_processors_keep_the_python_step(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reason(model: PreTrainedModel, mode: str = "auto", device: str = "cpu") -> str:
        settings = RolloutSettings(native=mode)  # type: ignore[arg-type]
        found = coverage.why_not_native(model, settings, torch.device(device), block_size=16, merges=True)
        assert found is not None
        return found

    assert reason(llama) == "LlamaForCausalLM is not one of our own models"
    assert "float32" in reason(_own())
    assert reason(_own().bfloat16(), "off") == "rollout.native is off"
    assert reason(_own(), device="cuda") == "the engine runs on cuda"
    monkeypatch.setattr("alignlab.native.processor.processor_flags", lambda: frozenset(["avx2"]))
    assert reason(_own().bfloat16()).startswith("the processor has no fma, avx512f")


_XEON = "avx2 fma avx512f avx512_bf16"


@pytest.mark.parametrize(
    ("vendor", "flags", "pairs", "bfloat16"),
    [
        ("AuthenticAMD", "avx2 avx512_bf16", True, True), ("AuthenticAMD", "avx2", False, False),
        ("GenuineIntel", _XEON, False, False), ("GenuineIntel", f"{_XEON} amx_bf16", False, True),
        ("GenuineIntel", "avx2 avx512f", False, False), (None, "", False, True),
    ],
)  # fmt: skip
def test_a_processors_faster_products_are_known_by_its_flags(
    vendor: str | None, flags: str, pairs: bool, bfloat16: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "cpuinfo"
    if vendor is not None:
        first = f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: {flags}\n"
        path.write_text(f"{first}\nprocessor\t: 1\nvendor_id\t: another\nflags\t\t: amx_bf16\n")
    for cached in (processor._facts, processor.processor_flags):
        cached.cache_clear()
    monkeypatch.setattr(processor, "_CPU_INFO", path)
    try:
        assert processor.has_fast_pairs() == pairs
        assert processor.has_fast_bfloat16() == bfloat16
    finally:
        for cached in (processor._facts, processor.processor_flags):
            cached.cache_clear()
