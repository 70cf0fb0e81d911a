"""The `tide-eval` command: what a student answers.

Torch is imported after the arguments are read, as in `tide-train`.
"""

from stage2_student.benchmark_tasks.command import benchmark
from stage2_student.sampling.command import generate
from tide_cache.cli import make_app, run

app = make_app("tide-eval", "Generate with a student, and run the paper's benchmarks.")


@app.callback()
def _commands() -> None:
    """Keep the names of commands in the command line, however few there are."""


app.command()(generate)
app.command("run")(benchmark)


def main() -> None:
    """Run the command; the process ends with its exit code."""
    run(app)
