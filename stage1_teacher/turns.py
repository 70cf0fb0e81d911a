"""Work that one of several processes should do for all, on whatever machines they run.

Who works or waits says so by files of ever new names in a folder that all see; who hears nothing
new of another for a while takes it for dead, and one of the same machine that is gone at once. No
clocks are compared: each listener times what it hears by its own. Two may still begin at the same
moment, so the work must be safe to do twice.
"""

import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tide_cache.store import TEMPORARY_SUFFIX, Store

logger = logging.getLogger(__name__)
BEAT_S, PATIENCE_S = 10.0, 60.0
_LOOK_S = 0.5
_SEPARATOR = "~"
_WAITING, _WORKING = "waiting", "working"


@contextmanager
def one_for_all(
    store: Store,
    folder: str,
    is_done: Callable[[], bool],
    *,
    beat_s: float = BEAT_S,
    patience_s: float = PATIENCE_S,
) -> Iterator[bool]:
    """Wait until it is this process's turn, or another has done the work.

    Yields whether to work. Others wait until `is_done()`, or until nothing was heard of this
    process for `patience_s`.
    """
    if is_done():
        yield False
        return
    me = _Speaker(store, folder, beat_s)
    try:
        listener = _Listener(store, folder, me.name, patience_s)
        while not is_done():
            if listener.is_my_turn():
                me.say(_WORKING)
                yield True
                return
            time.sleep(_LOOK_S)
        yield False
    finally:
        me.stop()


class _Speaker:
    """Says every `beat_s` what this process does: `NAME.STATE.NUMBER`, one file at a time."""

    def __init__(self, store: Store, folder: str, beat_s: float) -> None:
        self.name = _SEPARATOR.join((uuid.uuid4().hex, str(os.getpid()), _host()))
        self._store, self._folder, self._beat_s = store, folder, beat_s
        self._state = _WAITING
        self._number = 0
        self._last: str | None = None
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._run, name="turn", daemon=True)
        self._thread.start()

    def say(self, state: str) -> None:
        """Change the state, at once."""
        self._state = state
        self._beat()

    def stop(self) -> None:
        """Say no more."""
        self._stopped.set()
        self._thread.join()
        with self._lock:
            if self._last is not None:
                self._store.remove(self._last)

    def _run(self) -> None:
        while not self._stopped.wait(self._beat_s):
            self._beat()

    def _beat(self) -> None:
        with self._lock:
            self._number += 1
            path = f"{self._folder}/{self.name}.{self._state}.{self._number}"
            self._store.publish(path, b"")
            if self._last is not None:
                self._store.remove(self._last)
            self._last = path


class _Listener:
    """Knows who else is alive."""

    def __init__(self, store: Store, folder: str, me: str, patience_s: float) -> None:
        self._store, self._folder, self._me, self._patience_s = store, folder, me, patience_s
        self._heard: dict[str, tuple[str, float]] = {}
        self._has_told = False

    def is_my_turn(self) -> bool:
        """Say whether nobody works and nobody with a lower name waits."""
        now_s = time.monotonic()
        said: dict[str, str] = {}
        for path in self._store.list_files(self._folder):
            name, _, rest = path.rpartition("/")[2].partition(".")
            if not rest or name.count(_SEPARATOR) != 2 or path.endswith(TEMPORARY_SUFFIX):
                continue
            if name != self._me and not _is_gone(name):
                said[name] = max(said.get(name, ""), rest)
        for name, rest in said.items():
            if self._heard.get(name, ("", 0.0))[0] != rest:
                self._heard[name] = (rest, now_s)
        alive = {
            name: rest.partition(".")[0]
            for name, rest in said.items()
            if now_s - self._heard[name][1] < self._patience_s
        }
        before_me = [n for n, state in alive.items() if state == _WORKING or n < self._me]
        if before_me and not self._has_told:
            logger.warning("waiting for %s, which calibrates for all", before_me[0])
            self._has_told = True
        return not before_me


def _host() -> str:
    return re.sub(r"[^\w-]", "-", socket.gethostname())


def _is_gone(name: str) -> bool:
    """Say whether a process of this machine has ended."""
    _, process, host = name.split(_SEPARATOR)
    if host != _host() or not process.isdecimal():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
