"""A small build that is watched, shared and killed by tests, and what it must come out as."""

from dataclasses import dataclass
from pathlib import Path

from tests.builders import all_files, run_command
from tests.pipelines import write_pipeline
from tests.teacher_checkpoints import make_model

NUM_TASKS, NUM_VIEWS = 12, 2


@dataclass(frozen=True)
class BuildGround:
    """A premasked set of 2 views, a config, and the files of an undisturbed build."""

    folder: Path
    files: dict[str, bytes]

    @property
    def config(self) -> Path:
        return self.folder / "pipeline.yaml"

    @property
    def premasked(self) -> Path:
        return self.folder / "premasked"

    def arguments(
        self, output: Path | str, *, premasked: Path | str | None = None
    ) -> tuple[str | Path, ...]:
        """The command line of a build into `output`, after `tide-cache`."""
        return ("build", self.config, "-p", premasked or self.premasked, "-o", output)


def write_build_ground(
    folder: Path, *, num_tasks: int = NUM_TASKS, **overrides: int
) -> BuildGround:
    """Prepare the set and build it once, in one process and undisturbed.

    `overrides` make the teacher larger, where a test needs a build that takes its time.
    """
    config = write_pipeline(
        folder,
        make_model("qwen3", vocab_size=448, max_position_embeddings=512, **overrides),
        num_rows=num_tasks * 8,
        prepare={"num_views": NUM_VIEWS},
        build={
            "payloads": ["candidates"],
            "candidates": {"k": 8, "mean_logits_positions": 64},
            "fidelity_positions": 0,
            "samples_per_batch": 3,
        },
    )
    for arguments in (
        ("prepare", config, "-o", folder / "premasked", "--workers", "1"),
        ("build", config, "-p", folder / "premasked", "-o", folder / "cache", "--workers", "1"),
    ):
        done = run_command(*arguments)
        assert done.returncode == 0, done.stderr
    return BuildGround(folder=folder, files=all_files(folder / "cache"))
