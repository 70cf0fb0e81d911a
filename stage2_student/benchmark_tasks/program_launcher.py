"""Run as a script: set limits on this process, then execute the program that argument 1 names.

A separate file, started afresh for each program, so that the process that holds the model never
forks. It leaves with the exit code that it read from standard input if the program reaches its end.
The program is not `__main__`, as in HumanEval's own harness.
"""

import json
import os
import resource
import sys


def main() -> None:
    """Set the limits of argument 2, run the program, leave with the agreed exit code."""
    path, limits = sys.argv[1], json.loads(sys.argv[2])
    exit_code = int(sys.stdin.read())
    with open(path, encoding="utf-8", errors="surrogatepass") as file:  # noqa: PTH123
        source = file.read()
    for kind, value in (
        (resource.RLIMIT_CPU, limits["cpu_s"]),
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, limits["num_open_files"]),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (most, most))
    exec(compile(source, "program.py", "exec"), {"__name__": "program"})
    os._exit(exit_code)


if __name__ == "__main__":
    main()
