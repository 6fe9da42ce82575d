"""The config.yaml of an OUTPUT_DIR, which tells how the weights beside it were trained.

Detectron2 writes it whenever a program starts. Here an evaluation leaves it as it is, and a
training replaces it once there is a step to do.
"""

import logging
import os
from contextlib import contextmanager
from typing import Iterator
from unittest import mock

from detectron2.engine import defaults
from detectron2.utils import comm

logger = logging.getLogger(__name__)

# Beside a config.yaml that is there: of an evaluation; of a training that has not begun.
EVALUATED, NEXT = "config_eval.yaml", "config_next.yaml"


@contextmanager
def kept_config(folder: str, other: str) -> Iterator[None]:
    """Let Detectron2 write its configuration to another file where there is a config.yaml.

    Args:
        folder: OUTPUT_DIR.
        other: EVALUATED or NEXT.
    """
    path = os.path.join(folder, "config.yaml")
    if not os.path.isfile(path):
        yield
        return
    original = defaults.PathManager.open

    def beside(name, *args, **kwargs):
        return original(os.path.join(folder, other) if name == path else name, *args, **kwargs)

    with mock.patch.object(defaults.PathManager, "open", beside):
        yield


def replace_config(trainer) -> None:
    """Let config.yaml tell of a training that is about to begin, if it has a step to do."""
    if trainer.start_iter >= trainer.max_iter:
        logger.warning(
            f"Nothing is left to train: the checkpoint is that of iteration "
            f"{trainer.start_iter - 1}, and SOLVER.MAX_ITER is {trainer.max_iter}."
        )
        return
    path = os.path.join(trainer.cfg.OUTPUT_DIR, NEXT)
    if comm.is_main_process() and os.path.isfile(path):
        os.replace(path, os.path.join(trainer.cfg.OUTPUT_DIR, "config.yaml"))
