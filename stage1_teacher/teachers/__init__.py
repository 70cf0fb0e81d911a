"""Teachers: a common question (`base`), the layouts they are asked in, and the engines that answer.

`load_teacher` picks the engine by `backend`. Importing this package needs no torch.
"""

import logging
from typing import TYPE_CHECKING

from stage1_teacher.teachers.base import Teacher, TeacherConfig, TeacherIdentity

if TYPE_CHECKING:
    from stage1_teacher.teachers.hf import HfTeacher

logger = logging.getLogger(__name__)


def load_teacher(config: TeacherConfig, identity: TeacherIdentity | None = None) -> Teacher:
    """Load the teacher that `config` names; `identity` spares hashing its weights again.

    Raises ConfigError, CompatibilityError, FormatError.
    """
    if config.backend == "vllm":
        from stage1_teacher.teachers.vllm import load_vllm_teacher

        return load_vllm_teacher(config, identity)
    from stage1_teacher.teachers.hf import load_hf_teacher

    return load_hf_teacher(config, identity)


def load_open_teacher(
    config: TeacherConfig, identity: TeacherIdentity | None = None
) -> "HfTeacher":
    """Load the same teacher where its hidden states can be had: with transformers.

    Under another backend this is a second copy of the checkpoint, for calibration alone. Raises as
    `load_teacher`.
    """
    from stage1_teacher.teachers.hf import load_hf_teacher

    if config.backend != "hf":
        logger.info(
            "calibration asks %s through transformers: backend %s gives no hidden states",
            config.model,
            config.backend,
        )
    return load_hf_teacher(open_config(config), identity)


def open_config(config: TeacherConfig) -> TeacherConfig:
    """Return the config of the same teacher under transformers.

    Where an engine spans several GPUs, its layers are spread over them.
    """
    if config.backend == "hf":
        return config
    spread = "auto" if config.spans_devices and config.device != "cpu" else None
    return config.model_copy(update={"backend": "hf", "vllm": None, "device_map": spread})
