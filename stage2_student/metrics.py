"""What a run reports: one JSON object a line, always; TensorBoard, W&B or trackio by name.

`metrics.jsonl` is the record. Everything in it but `MEASURED_KEYS` is a pure function of config and
cache (on the CPU to the bit), so a resumed run cuts the lines behind its checkpoint and writes them
again. Trackers are imported when a config asks for them, before the model is loaded.
"""

import json
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field

from tide_cache.config import StrictModel
from tide_cache.errors import TideError

METRICS_FILE = "metrics.jsonl"
MEASURED_KEYS = frozenset({"tokens_per_s", "seconds", "stall_s", "peak_memory_gb"})
TrackerName = Literal["tensorboard", "wandb", "trackio"]
Metrics = Mapping[str, Any]


class MetricsConfig(StrictModel):
    """How often a run reports, and where to besides `metrics.jsonl`."""

    every: int = Field(10, ge=1, description="steps between two lines")
    report_to: tuple[TrackerName, ...] = ()
    project: str = "tide-cache"
    run_name: str | None = Field(None, description="default: the name of the output folder")


class MetricsFile:
    """Appends metrics to a JSON-lines file, one flushed line at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def keep_until(self, step: int) -> None:
        """Drop the lines behind `step`, and a line that a killed run did not finish."""
        if not self._path.exists():
            return
        text = "".join(_line(line) for line in self.read() if line["step"] <= step)
        if text == self._path.read_text(encoding="utf-8"):
            return
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self._path)

    def read(self) -> list[dict[str, Any]]:
        """Return the lines written so far."""
        return read_metrics(self._path) if self._path.exists() else []

    def write(self, metrics: Metrics) -> None:
        """Append one line."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line(metrics))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the whole lines of a metrics file."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if text.endswith("\n"):
            lines.append(json.loads(text))
    return lines


class Tracker(Protocol):
    """A place that metrics are sent to."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Send the numbers of one step."""

    def close(self) -> None:
        """Send what is left."""


def require_trackers(names: tuple[TrackerName, ...]) -> None:
    """Raise TideError with the install command when a tracker's package is missing."""
    for name in names:
        try:
            import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
        except ImportError as error:
            raise TideError(
                f"metrics.report_to: {name} is not installed",
                hint=f"pip install 'tide-cache[{name}]'",
            ) from error


def open_trackers(config: MetricsConfig, output: Path, run_config: Metrics) -> list[Tracker]:
    """Open the trackers that the config names."""
    run_name = config.run_name or output.name
    return [
        _TRACKERS[name](config.project, run_name, output, run_config) for name in config.report_to
    ]


class _TensorBoard:
    def __init__(self, _project: str, _run_name: str, output: Path, run_config: Metrics) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(output / "tensorboard"))
        self._writer.add_text("config", f"```json\n{json.dumps(run_config, indent=2)}\n```", 0)

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in _numbers(metrics).items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """W&B, and trackio, which answers to the same calls."""

    module = "wandb"

    def __init__(self, project: str, run_name: str, _output: Path, run_config: Metrics) -> None:
        self._api = import_module(self.module)
        self._api.init(project=project, name=run_name, config=dict(run_config))

    def log(self, step: int, metrics: Metrics) -> None:
        self._api.log(_numbers(metrics), step=step)

    def close(self) -> None:
        self._api.finish()


class _Trackio(_Wandb):
    module = "trackio"


_TRACKERS: dict[TrackerName, Callable[[str, str, Path, Metrics], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "trackio": _Trackio,
}


def _numbers(metrics: Metrics) -> dict[str, float]:
    return {
        name: value
        for name, value in metrics.items()
        if isinstance(value, int | float) and name != "step"
    }


def _line(metrics: Metrics) -> str:
    return json.dumps(metrics, allow_nan=True) + "\n"
