"""Reward functions looked up by name (an installed plug-in, a dotted path, a file), and checks of their signatures.

This module imports nothing heavy, because every process of an isolated reward imports it.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable, Collection, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, cast

from alignlab.errors import ConfigError
from alignlab.files.digests import sha256_of

ENTRY_POINT_GROUP = "alignlab.rewards"
CALL_ARGUMENTS = ("prompts", "completions", "prompt_ids", "completion_ids")
"""Arguments that every call has, whatever the dataset."""


def installed_rewards() -> dict[str, EntryPoint]:
    """Return the installed plug-ins, by name."""
    return {entry.name: entry for entry in sorted(entry_points(group=ENTRY_POINT_GROUP))}


def parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    """Return a function's parameters; None where Python does not know them, as for some built-in functions."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None


def required(signature: Mapping[str, inspect.Parameter]) -> list[str]:
    """Return the names of the parameters without a default."""
    return [
        name
        for name, parameter in signature.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]


def accepts_any(signature: Mapping[str, inspect.Parameter]) -> bool:
    """Return whether there is a `**columns` among the parameters."""
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in signature.values())


def accepted_arguments(
    signature: Mapping[str, inspect.Parameter] | None, available: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments that a function accepts by name: all where it has a `**columns` or an unknown signature."""
    if signature is None or accepts_any(signature):
        return dict(available)
    return {name: available[name] for name in signature if name in available}


def find_function(name: str) -> Any:
    """Return the function or class that a reward's name stands for.

    Raises:
        ConfigError: the name stands for nothing, or the import fails.
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
    raise ConfigError(_unknown_name(name, installed))


def _unknown_name(name: str, installed: Collection[str]) -> str:
    near = difflib.get_close_matches(name, installed, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(repr(n) for n in near)}? " if near else ""
    return (
        f"a reward must be an installed plug-in, package.module.function or file.py:function, and {name!r} is none; "
        f"{hint}Installed: {', '.join(installed) or 'none'}"
    )


def check_options(name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raise if an option is not among the parameters that a function names; `**columns` takes dataset columns only.

    Raises:
        ConfigError: an option is unknown; the message has the nearest name.
    """
    signature = parameters(function)
    if signature is None:
        return
    option_names = [
        key
        for key, parameter in signature.items()
        if key not in CALL_ARGUMENTS
        and parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    ]
    for option in options:
        if option not in option_names:
            near = difflib.get_close_matches(option, option_names, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(
                f"reward {name!r} has no option {option!r}; {hint}"
                f"Its options, and the columns it reads: {', '.join(option_names) or 'none'}"
            )


def check_call(name: str, function: Callable[..., Any]) -> None:
    """Raise if a function cannot be called as a reward, which is called with keyword arguments only.

    Raises:
        ConfigError: the function takes no keyword argument, or requires a positional-only one.
    """
    signature = parameters(function)
    if signature is None:
        return
    positional = [p for p in signature.values() if p.kind is inspect.Parameter.POSITIONAL_ONLY]
    required_positional = [parameter.name for parameter in positional if parameter.default is parameter.empty]
    not_variadic = [p for p in signature.values() if p.kind is not inspect.Parameter.VAR_POSITIONAL]
    form = "def reward(prompts, completions, **columns)"
    if required_positional:
        raise ConfigError(
            f"reward {name!r} takes {required_positional[0]} by position alone, and rewards are called with names; "
            f"write it as {form}"
        )
    if len(not_variadic) == len(positional):
        raise ConfigError(
            f"reward {name!r} takes no argument by name, so that it would see no completion; write it as {form}"
        )


def instantiate(name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """Return an instance of a reward that is a class, made with its options; any other function as it is.

    Raises:
        ConfigError: an option is missing, the constructor raises an error, or the instance cannot be called.
    """
    if not inspect.isclass(function):
        return function
    missing = [key for key in required(parameters(function) or {}) if key not in options]
    if missing:
        raise ConfigError(f"reward {name!r} needs the option {missing[0]!r}; add it to its options")
    try:
        instance: Any = function(**options)
    except ConfigError:
        raise
    except Exception as error:  # the constructor is the reward author's code
        raise ConfigError(
            f"reward {name!r} is a class, and could not be made with its options {dict(options)}: "
            f"{type(error).__name__}: {error}; correct them"
        ) from error
    if not callable(instance):
        raise ConfigError(
            f"reward {name!r} is a class whose objects cannot be called; give it a method __call__(self, "
            "prompts, completions, **columns)"
        )
    return cast("Callable[..., Any]", instance)


def short_name(name: str) -> str:
    """Return the name of a reward in metrics and reports: the last part of the name by which it is looked up."""
    return name.rpartition(":")[2].rpartition(".")[2]


def _imported(name: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (Exception, SystemExit) as error:  # an import may raise anything, and even end the process
        raise ConfigError(
            f"reward {name!r} must be importable, and is not: {type(error).__name__}: {error}; "
            "correct the name, install its package, or give file.py:function"
        ) from error


def _from_file(path: str, attribute: str) -> Any:
    """Return an object of a Python file, which is executed once a process."""
    file = Path(path).resolve()
    if not file.is_file():
        raise ConfigError(f"the file of a reward must exist, and {path} does not (working directory: {Path.cwd()})")
    module_name = f"{file.stem}_{sha256_of(str(file))[:12]}"
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
    module_names = vars(sys.modules[module_name])
    if attribute not in module_names:
        functions = [name for name, value in module_names.items() if inspect.isfunction(value)]
        raise ConfigError(f"{path} must hold the reward {attribute!r}, and does not; it has: {', '.join(functions)}")
    return module_names[attribute]
