"""Run a generated program against its tests, in a process of its own with limits.

This is no sandbox. The limits (CPU seconds, memory, file size, open files, an empty temporary
folder, an environment without our variables, a process group that is killed at the end) stop
accidents: endless loops, memory leaks, stray files. They do not stop a program that means harm: it
can read what this user can read and reach the network. Run code benchmarks in a container or a
virtual machine without network; that is why they need a flag.

A program passes if it reaches its end: only then does the launcher leave with an exit code that the
program cannot know, so that `exit(0)` inside it does not count. CPU time bounds it rather than a
stopwatch, so that a busy machine does not lower a score; the metric that lm-eval loads from the hub
gives 3 s of wall-clock time.
"""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

_LAUNCHER = Path(__file__).with_name("program_launcher.py")
_EXIT_CODES = range(100, 250)


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one program may use."""

    cpu_s: int = 5
    wall_s: float = 30.0
    memory_bytes: int = 4 * 2**30
    file_bytes: int = 16 * 2**20
    num_open_files: int = 64


def passes(program: str, tests: str, limits: Limits | None = None) -> bool:
    """Return whether `program` followed by `tests` runs to its end within `limits`."""
    limits = limits or Limits()
    exit_code = secrets.choice(_EXIT_CODES)
    with tempfile.TemporaryDirectory(
        prefix="generated-code-", ignore_cleanup_errors=True
    ) as folder:
        script = Path(folder, "program.py")
        script.write_text(f"{program}\n{tests}\n", encoding="utf-8", errors="surrogatepass")
        # -I: no user site-packages, no PYTHON* variables, no folder of ours on the path.
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(_LAUNCHER), str(script), json.dumps(asdict(limits))],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            process.communicate(str(exit_code).encode(), timeout=limits.wall_s)
        except subprocess.TimeoutExpired:
            return False
        finally:
            _kill_group(process)
    return process.returncode == exit_code


def _kill_group(process: "subprocess.Popen[bytes]") -> None:
    """End the program and whatever it started, also after it ended by itself."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
