"""Chat templates rendered within limits: a template is a program of its author's, and need not end.

A rendering that computes for too long, or fills memory, is stopped by an exception that another thread raises in it,
which works between any two of its steps. A single step that never ends is no loop and cannot be stopped: the operators
that could be one are refused.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import jinja2
from transformers import PreTrainedTokenizerBase

from alignlab.errors import DataError

CPU_LIMIT_S = 10.0
"""Of one rendering: time of its thread on a core. A long chat takes a hundredth of a second."""
MEMORY_LIMIT_BYTES = 2**30
"""By which this process may grow while one chat is rendered."""
MAX_CHARS = 2**24
MAX_TEMPLATE_CHARS = 2**20
LARGEST_LITERAL = 10**6
_LOOK_S, _AGAIN_S = 0.02, 2.0
_FIX = "use a tokenizer with another chat template, or correct this one"
_Result = TypeVar("_Result")


class _Stopped(BaseException):
    """Ends a rendering from another thread; no template catches it."""


def render_template(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """Return the text of `tokenizer.apply_chat_template`, rendered within the limits of this module.

    Args:
        options: as `apply_chat_template` takes them.

    Raises:
        DataError: the template is, computes or writes more than a limit allows.
        Exception: whatever the template raises.
    """
    check_template(tokenizer.get_chat_template(options.get("chat_template"), options.get("tools")))
    given = [dict(message) for message in messages]
    text = str(within_limits(lambda: tokenizer.apply_chat_template(given, tokenize=False, **options)))
    if len(text) > MAX_CHARS:
        raise DataError(
            f"a chat must be rendered to at most {MAX_CHARS} characters, and the chat template has written "
            f"{len(text)}; {_FIX}"
        )
    return text


@functools.lru_cache
def check_template(template: str) -> None:
    """Refuse a template that is too long to be compiled, or in which one step may never end.

    Raises:
        DataError: with what it holds.
    """
    if len(template) > MAX_TEMPLATE_CHARS:
        raise DataError(
            f"a chat template must have at most {MAX_TEMPLATE_CHARS} characters, and has {len(template)}; {_FIX}"
        )
    try:
        tokens = list(jinja2.Environment().lex(template))
    except jinja2.TemplateError:  # said, with its line, when it is rendered
        return
    for line, kind, text in tokens:
        if kind == "operator" and text == "**":
            raise DataError(f"line {line} of the chat template raises to a power (**), which need not end; {_FIX}")
        if kind in ("integer", "float") and _is_large(text, int if kind == "integer" else float):
            raise DataError(
                f"line {line} of the chat template holds the number {text[:40]}, and numbers must be at most "
                f"{LARGEST_LITERAL}: it may be how often something is done; {_FIX}"
            )


def _is_large(literal: str, kind: type[int] | type[float]) -> bool:
    digits = literal.replace("_", "")
    if len(digits) > 40:  # Python reads no number of thousands of digits
        return True
    return (int(digits, 0) if kind is int else float(digits)) > LARGEST_LITERAL


def within_limits(render: Callable[[], _Result]) -> _Result:
    """Return what a function returns; stop it where it computes for too long, or fills memory.

    Raises:
        DataError: it was stopped.
    """
    rendering = _Rendering()
    try:
        try:
            _watcher().add(rendering)
            return render()
        finally:
            rendering.close()
    except _Stopped:
        rendering.close()  # where it was stopped on the way out
        raise DataError(
            f"a chat must be rendered within {rendering.limit}, and the chat template has not ended by then; {_FIX}"
        ) from None


class _Rendering:
    """One rendering of this thread, under watch until it is closed."""

    def __init__(self) -> None:
        self.limit = ""
        self.held_bytes: int | None = None
        self._thread = threading.get_ident()
        self._clock = time.pthread_getcpuclockid(self._thread) if hasattr(time, "pthread_getcpuclockid") else None
        self._lock = threading.Lock()
        self._is_over = False
        self._raised = -math.inf
        self._start = self._now()

    def close(self) -> None:
        """End the watch: nothing is raised in this thread any more."""
        while not self._is_over:
            with suppress(_Stopped), self._lock:
                self._is_over = True
                _raise_in(self._thread, None)  # what was raised after the last step
        _watcher().remove(self)

    def _now(self) -> float:
        return time.monotonic() if self._clock is None else time.clock_gettime(self._clock)

    def look(self, resident_bytes: int) -> None:
        """Stop it if it is beyond a limit; again after a while, should a step of it have lost the exception."""
        with self._lock:
            if self._is_over or time.monotonic() < self._raised + _AGAIN_S:
                return
            self.held_bytes = resident_bytes if self.held_bytes is None else self.held_bytes
            if self._now() - self._start > CPU_LIMIT_S:
                self.limit = f"{CPU_LIMIT_S:g} s"
            elif resident_bytes - self.held_bytes > MEMORY_LIMIT_BYTES:
                self.limit = f"{MEMORY_LIMIT_BYTES / 2**30:g} GiB of memory"
            if self.limit:
                self._raised = time.monotonic()
                _raise_in(self._thread, _Stopped)


class _Watcher:
    """Looks at all renderings of this process from a thread of its own, which sleeps while there is none."""

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
    """The watcher of this process, which may be the fork of another."""
    return _watcher_of(os.getpid())


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Let a thread raise before its next step; with None, take back what it has not raised yet."""
    given = ctypes.py_object(error) if error is not None else None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), given)


def _resident_bytes() -> int:
    """Memory that this process has in use; 0 where that is not known."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
