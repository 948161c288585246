"""Which part may import which; what is light; what is public."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import alignlab

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "alignlab").rglob("*.py"), *(ROOT / "rewards").rglob("*.py")])

# Each part imports parts that come before it, and none that come after it.
ORDER = (
    "errors", "transfer", "masked_tokens", "types", "files", "network", "cpu_threads", "native", "functional", "config",
    "models", "data", "rollout", "runs", "scoring", "evaluation", "synthesis", "loop", "starting_model", "trainers",
    "run_from_config", "__init__", "cli", "__main__",
)
PUBLIC = {
    "AlignlabError",
    "CheckpointSettings",
    "Completion",
    "CriticSettings",
    "DPOConfig",
    "DPOTrainer",
    "DataSettings",
    "DistillConfig",
    "DistillTrainer",
    "EmbeddedEngine",
    "EvaluationSettings",
    "GKDConfig",
    "GKDTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "KLSettings",
    "KTOConfig",
    "KTOTrainer",
    "LoraSettings",
    "MemorySettings",
    "OnPolicyDistillConfig",
    "OnPolicyDistillTrainer",
    "OnlineDPOConfig",
    "OnlineDPOTrainer",
    "OptimSettings",
    "PPOConfig",
    "PPOTrainer",
    "Prompt",
    "RLAIFConfig",
    "RLAIFTrainer",
    "RenderSettings",
    "RewardConfig",
    "RewardModel",
    "RewardSettings",
    "RewardTrainer",
    "Rollout",
    "RolloutSettings",
    "RunConfig",
    "SFTConfig",
    "SFTTrainer",
    "SamplingParams",
    "SamplingSettings",
    "TeacherSettings",
    "__version__",
    "load_config",
    "load_reward_model",
    "run",
}
HEAVY = ("torch", "transformers", "pydantic", "numpy", "peft", "accelerate", "datasets", "vllm", "deepspeed", "rich")


def part_of(path: Path) -> str:
    """The first folder or file below the package: "models", "types", "rewards"."""
    inside = path.relative_to(ROOT)
    return "rewards" if inside.parts[0] == "rewards" else inside.with_suffix("").parts[1]


def imported_modules(path: Path) -> set[str]:
    """Full names of all modules that a file imports, at its top or inside functions."""
    names = set()
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            # `from alignlab import errors` names the part in its alias.
            names |= {f"{module}.{alias.name}" for alias in node.names} if module == "alignlab" else {module}
    return names


def imported_parts(path: Path) -> set[str]:
    parts = {name.split(".")[1] for name in imported_modules(path) if name.startswith("alignlab.")}
    return parts - {part_of(path), "__version__"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    part = part_of(path)
    earlier = {"types"} if part == "rewards" else set(ORDER[: ORDER.index(part)])
    wrong = imported_parts(path) - earlier
    assert not wrong, f"{path.relative_to(ROOT)} may not import {sorted(wrong)}"


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if part_of(path) in ("functional", "types", "errors")], ids=lambda path: path.name
)
def test_the_pure_parts_import_torch_and_jaxtyping_alone(path):
    top = {name.split(".")[0] for name in imported_modules(path)}
    assert top <= {"torch", "jaxtyping", "alignlab"} | sys.stdlib_module_names


def test_rewards_know_nothing_of_alignlab_but_its_types():
    rewards = [path for path in SOURCES if part_of(path) == "rewards"]
    assert rewards
    for path in rewards:
        assert {n for n in imported_modules(path) if n.startswith("alignlab.")} <= {"alignlab.types"}, path.name


def test_no_file_has_a_name_that_says_nothing_or_hides_a_standard_module():
    vague = {"utils", "util", "helpers", "helper", "common", "misc", "tools"}
    # Modules inside packages are never imported as top-level modules; these two have the field's own names.
    hiding = sys.stdlib_module_names - {"types", "statistics"}
    for path in SOURCES:
        if path.name not in ("__init__.py", "__main__.py"):
            assert path.stem not in vague | hiding, path.relative_to(ROOT)


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_alignlab_and_its_command_line_is_light():
    loaded = run_python("import sys, alignlab, alignlab.cli; print(*sys.modules)").split()
    assert "alignlab.cli" in loaded
    assert not {name.split(".")[0] for name in loaded} & set(HEAVY)


def test_trainers_load_no_vllm_and_no_deepspeed():
    loaded = run_python("import sys; from alignlab import GRPOTrainer; print(*sys.modules)").split()
    assert "torch" in loaded
    assert not {name.split(".")[0] for name in loaded} & {"vllm", "deepspeed"}


def test_public_names_are_these_and_all_can_be_had():
    assert set(alignlab.__all__) == PUBLIC == set(dir(alignlab))
    for name in PUBLIC - {"__version__"}:
        assert getattr(alignlab, name).__name__ == name


def test_a_name_that_is_not_public_is_refused():
    with pytest.raises(AttributeError, match="no attribute 'GRPOTrainr'"):
        _ = alignlab.GRPOTrainr


def test_type_checkers_see_the_public_names():
    """Each as a re-export (`import X as X`), which is public in a stub."""
    stub = ast.parse((ROOT / "alignlab" / "__init__.pyi").read_text(encoding="utf-8"))
    aliases = [alias for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert all(alias.name == alias.asname for alias in aliases)
    assert {alias.name for alias in aliases} == PUBLIC - {"__version__"}


def test_every_package_is_installed_and_every_plugin_exists():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "alignlab").rglob("__init__.py")}
    assert set(project["tool"]["setuptools"]["packages"]) == folders | {"alignlab_rewards", "alignlab_rewards.answers"}
    for target in project["project"]["entry-points"]["alignlab.rewards"].values():
        module, function = target.split(":")
        file = module.replace("alignlab_rewards.", "rewards.").replace(".", "/")
        tree = ast.parse((ROOT / f"{file}.py").read_text("utf-8"))
        kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        names = {node.name for node in tree.body if isinstance(node, kinds)}
        assert function in names, target
