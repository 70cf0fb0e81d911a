"""GPUs by name: what their vendors say they multiply and hold.

Peaks are for bfloat16 (float16 is the same), dense, with float32 accumulation: half of the figures
that data sheets print with 2:4 sparsity. No program reaches them; `tide-cache plan` takes a share
of them (`--mfu`). Memory is in units of 1e9 bytes, as printed.
"""

import dataclasses

from tide_cache.errors import ConfigError, did_you_mean


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One model of GPU; `peak_flops`: dense bfloat16, per second."""

    name: str
    peak_flops: float
    memory_bytes: float
    source: str


GPUS: dict[str, Gpu] = {
    key: Gpu(name=name, peak_flops=tflops * 1e12, memory_bytes=gigabytes * 1e9, source=source)
    for key, name, tflops, gigabytes, source in (
        ("a100", "A100 80 GB SXM", 312, 80, "NVIDIA A100 80GB data sheet"),
        ("h100", "H100 SXM", 989.5, 80, "NVIDIA H100 data sheet: 1,979 with sparsity"),
        ("h200", "H200 SXM", 989.5, 141, "NVIDIA H200 data sheet: 1,979 with sparsity"),
        ("b200", "B200 (HGX)", 2250, 180, "NVIDIA HGX B200 data sheet: 4,500 with sparsity"),
        ("l40s", "L40S", 362, 48, "NVIDIA L40S data sheet: 362.05, 733 with sparsity"),
        ("rtx4090", "RTX 4090", 165.2, 24, "NVIDIA Ada GPU architecture whitepaper"),
        ("mi300x", "MI300X", 1307.4, 192, "AMD Instinct MI300X data sheet"),
    )
}


def find_gpu(name: str) -> Gpu:
    """Return a GPU by its name in the table. Raises ConfigError."""
    key = name.lower().replace("-", "").replace(" ", "").replace("_", "")
    if key not in GPUS:
        raise ConfigError(
            f"--gpu: expected one of {', '.join(GPUS)}, got {name!r}{did_you_mean(key, GPUS)}"
        )
    return GPUS[key]
