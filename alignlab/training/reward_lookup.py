"""Functions found by name: an installed plug-in, a dotted path, a file.

Nothing heavy is imported here: a process of a reward's own begins with this module.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, cast

from alignlab.errors import ConfigError

ENTRY_POINT_GROUP = "alignlab.rewards"
_GIVEN = ("prompts", "completions", "prompt_ids", "completion_ids")


def installed_rewards() -> dict[str, EntryPoint]:
    """The plug-ins that are installed, by name."""
    return {entry.name: entry for entry in sorted(entry_points(group=ENTRY_POINT_GROUP))}


def parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    """Named parameters of a function; None where Python cannot know them, as of some built-in functions."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None


def required(known: Mapping[str, inspect.Parameter]) -> list[str]:
    """Names of the parameters that a call must give."""
    return [
        name
        for name, parameter in known.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]


def accepts_any(known: Mapping[str, inspect.Parameter]) -> bool:
    """Whether there is a `**columns` among the parameters."""
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values())


def find_function(name: str) -> Any:
    """Return what a reward's name stands for.

    Raises:
        ConfigError: there is none, or it cannot be imported.
    """
    path, separator, attribute = name.rpartition(":")
    if separator and path.endswith(".py"):
        return _from_file(path, attribute)
    installed = installed_rewards()
    if name in installed:
        return _imported(name, installed[name].load)
    if Path(name).is_dir() or "/" in name:
        raise ConfigError(
            f"the reward model {name!r} must be a local folder of a reward model, and is none; train one with "
            "trainer.type reward, or download a sequence-classification model of one label (hf download) and give its "
            "folder"
        )
    if "." in name or separator:
        return _imported(name, lambda: pkgutil.resolve_name(name))
    near = difflib.get_close_matches(name, installed, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(repr(n) for n in near)}? " if near else ""
    raise ConfigError(
        f"a reward must be an installed plug-in, package.module.function or file.py:function, and {name!r} is none; "
        f"{hint}Installed: {', '.join(installed) or 'none'}"
    )


def check_options(name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Refuse an option that is no parameter which the function names: `**columns` takes the dataset's columns alone.

    Raises:
        ConfigError: with the nearest name.
    """
    known = parameters(function)
    if known is None:
        return
    named = [
        key
        for key, parameter in known.items()
        if key not in _GIVEN
        and parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    ]
    for option in options:
        if option not in named:
            near = difflib.get_close_matches(option, named, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(
                f"reward {name!r} has no option {option!r}; {hint}"
                f"Its options, and the columns it reads: {', '.join(named) or 'none'}"
            )


def made_function(name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """Return the object of a reward that is a class, made with its options; any other function as it is.

    Raises:
        ConfigError: an option is missing.
    """
    if not inspect.isclass(function):
        return function
    missing = [key for key in required(parameters(function) or {}) if key not in options]
    if missing:
        raise ConfigError(f"reward {name!r} needs the option {missing[0]!r}; add it to its options")
    made: Any = function(**options)
    return cast("Callable[..., Any]", made)


def short_name(name: str) -> str:
    """Return what a reward that is found by `name` is called in metrics and reports."""
    return name.rpartition(":")[2].rpartition(".")[2]


def _imported(name: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (Exception, SystemExit) as error:  # a module may raise anything, and even end the process
        raise ConfigError(
            f"reward {name!r} must be importable, and is not: {type(error).__name__}: {error}; "
            "correct the name, install its package, or give file.py:function"
        ) from error


def _from_file(path: str, attribute: str) -> Any:
    """A function of a Python file, which is run once a process."""
    file = Path(path).resolve()
    if not file.is_file():
        raise ConfigError(f"the file of a reward must exist, and {path} does not (working directory: {Path.cwd()})")
    module_name = f"{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[module_name]
            raise ConfigError(
                f"the file of a reward must run, and {path} raised {error!r}; correct the file"
            ) from error
    found = vars(sys.modules[module_name])
    if attribute not in found:
        functions = [name for name, value in found.items() if inspect.isfunction(value)]
        raise ConfigError(f"{path} must hold the reward {attribute!r}, and does not; it has: {', '.join(functions)}")
    return found[attribute]
