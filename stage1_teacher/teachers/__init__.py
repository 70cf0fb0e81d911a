"""Teachers: a common question (`base`), the layouts they are asked in, and the engines that answer.

`load_teacher` picks the engine by `backend`. Importing this package needs no torch.
"""

from stage1_teacher.teachers.base import Teacher, TeacherConfig, TeacherIdentity


def load_teacher(config: TeacherConfig, identity: TeacherIdentity | None = None) -> Teacher:
    """Load the teacher that `config` names; `identity` spares hashing its weights again.

    Raises ConfigError, CompatibilityError, FormatError.
    """
    from stage1_teacher.teachers.hf import load_hf_teacher

    return load_hf_teacher(config, identity)
