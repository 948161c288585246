"""Rendering of chat templates within limits: a template is a program, and may never end.

A rendering that computes for too long, or fills memory, is stopped between two of its steps (`interruption`). A single
step cannot be stopped, so one that could be endless is refused beforehand (`check_template`, `template_sandbox`).
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jinja2
from transformers import PreTrainedTokenizerBase

from alignlab.errors import DataError
from alignlab.models.hub.interruption import Interruption
from alignlab.models.hub.template_sandbox import limit_chat_templates
from alignlab.models.hub.template_sizes import FIX as _FIX

CPU_LIMIT_S = 10.0
"""CPU time of one rendering. A long chat takes a hundredth of a second."""
MEMORY_LIMIT_BYTES = 2**30
"""Growth of this process that is allowed while one chat is rendered."""
MAX_TEMPLATE_CHARS = 2**20
LARGEST_LITERAL = 10**6
_LOOK_S = 0.02
_Result = TypeVar("_Result")
limit_chat_templates()


def render_template(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """Return the text of `tokenizer.apply_chat_template`, rendered within the limits of this module.

    Args:
        options: of `apply_chat_template`.

    Raises:
        DataError: the template is too long, computes for too long, or writes too much.
        Exception: whatever the template raises.
    """
    check_template(tokenizer.get_chat_template(options.get("chat_template"), options.get("tools")))
    chat = [dict(message) for message in messages]
    return str(within_limits(lambda: tokenizer.apply_chat_template(chat, tokenize=False, **options)))


@functools.lru_cache
def check_template(template: str) -> None:
    """Raise if a template is too long to compile, or has a step that may never end.

    Raises:
        DataError: with the line.
    """
    if len(template) > MAX_TEMPLATE_CHARS:
        raise DataError(
            f"a chat template must have at most {MAX_TEMPLATE_CHARS} characters, and has {len(template)}; {_FIX}"
        )
    try:
        tokens = list(jinja2.Environment().lex(template))
    except jinja2.TemplateError:  # rendering raises it, with its line
        return
    for line, kind, text in tokens:
        if kind == "operator" and text == "**":
            raise DataError(f"line {line} of the chat template raises to a power (**), which may never end; {_FIX}")
        if kind in ("integer", "float") and _is_large(text, int if kind == "integer" else float):
            raise DataError(
                f"line {line} of the chat template holds the number {text[:40]}, and numbers must be at most "
                f"{LARGEST_LITERAL}, because one may be a number of repetitions; {_FIX}"
            )


def _is_large(literal: str, kind: type[int] | type[float]) -> bool:
    digits = literal.replace("_", "")
    if len(digits) > 40:  # Python refuses to read numbers of thousands of digits
        return True
    return (int(digits, 0) if kind is int else float(digits)) > LARGEST_LITERAL


def within_limits(render: Callable[[], _Result]) -> _Result:
    """Return the result of a function; stop it if it computes for too long, or fills memory.

    Raises:
        DataError: the function was stopped.
    """
    rendering = _Rendering()
    _watcher().add(rendering)
    try:
        return rendering.interruption.run(render)
    except Interruption.Interrupted:
        raise DataError(
            f"a chat must be rendered within {rendering.limit}, and the chat template has not ended by then; {_FIX}"
        ) from None
    finally:
        _watcher().remove(rendering)


class _Rendering:
    """A rendering in the present thread."""

    def __init__(self) -> None:
        self.interruption = Interruption()
        self.limit = ""
        thread = threading.get_ident()
        self._clock = time.pthread_getcpuclockid(thread) if hasattr(time, "pthread_getcpuclockid") else None
        self._held_bytes: int | None = None
        self._start = self._now()

    def _now(self) -> float:
        return time.monotonic() if self._clock is None else time.clock_gettime(self._clock)

    def look(self, resident_bytes: int) -> None:
        """Stop the rendering if it is beyond a limit."""
        self._held_bytes = resident_bytes if self._held_bytes is None else self._held_bytes
        try:
            seconds = self._now() - self._start
        except OSError:  # the thread has ended, and the rendering with it
            return
        if seconds > CPU_LIMIT_S:
            self.limit = f"{CPU_LIMIT_S:g} s"
        elif resident_bytes - self._held_bytes > MEMORY_LIMIT_BYTES:
            self.limit = f"{MEMORY_LIMIT_BYTES / 2**30:g} GiB of memory"
        if self.limit:
            self.interruption.raise_now()


class _Watcher:
    """Checks all renderings of this process, from its own thread, which sleeps while there is none."""

    def __init__(self) -> None:
        self._renderings: set[_Rendering] = set()
        self._is_needed = threading.Event()
        threading.Thread(target=self._work, name="alignlab-template", daemon=True).start()

    def add(self, rendering: _Rendering) -> None:
        self._renderings.add(rendering)
        self._is_needed.set()

    def remove(self, rendering: _Rendering) -> None:
        self._renderings.discard(rendering)

    def _work(self) -> None:
        while self._is_needed.wait():
            time.sleep(_LOOK_S)
            renderings = self._renderings.copy()
            if not renderings:
                self._is_needed.clear()
                renderings = self._renderings.copy()  # one may have begun meanwhile
                if renderings:
                    self._is_needed.set()
            resident = _resident_bytes() if renderings else 0
            for rendering in renderings:
                rendering.look(resident)


@functools.cache
def _watcher_of(process: int) -> _Watcher:
    return _Watcher()


def _watcher() -> _Watcher:
    """Return the watcher of this process; a forked process starts its own."""
    return _watcher_of(os.getpid())


def _resident_bytes() -> int:
    """Return the memory that this process has in use; 0 if the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
