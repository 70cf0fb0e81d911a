"""What other libraries say that helps nobody."""

import logging


def quiet_libraries() -> None:
    """Keep torchao's warnings on import away, unless somebody has asked for them.

    Where it is installed transformers imports it, and it warns of each of its kernels that this
    build of torch has no use for.
    """
    for name in ("torchao", "torch.utils._pytree"):
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.ERROR)
