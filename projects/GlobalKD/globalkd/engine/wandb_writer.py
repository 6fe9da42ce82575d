"""What Detectron2's EventStorage holds, sent to Weights & Biases.

Off by default (WANDB.ENABLED); the package `wandb` is imported only when a writer is made.
"""

import os

import numpy as np
from detectron2.config import CfgNode
from detectron2.utils.events import EventWriter, get_event_storage

#: Iterations over which scalars are median-smoothed.
_SMOOTHED = 20


class WandbWriter(EventWriter):
    """Sends scalars, smoothed as Detectron2's other writers do, and images.

    It must stand before `TensorboardXWriter` among a trainer's writers: that one empties the
    storage of its images.
    """

    def __init__(self, cfg: CfgNode):
        """
        Args:
            cfg: WANDB and OUTPUT_DIR are read; all of it is stored with the run.

        Raises:
            ModuleNotFoundError: the package `wandb` is not installed.
        """
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "WANDB.ENABLED is True, but the package `wandb` is not installed: "
                "`pip install wandb`, or set WANDB.ENABLED False."
            ) from error
        self._image = wandb.Image
        self._run = wandb.init(
            project=cfg.WANDB.PROJECT,
            name=os.path.basename(os.path.normpath(cfg.OUTPUT_DIR)),
            dir=cfg.OUTPUT_DIR,
            config=_plain(cfg),
        )
        self._last_write = -1

    def write(self) -> None:
        """Send what is new since the last call."""
        storage = get_event_storage()
        by_iteration = {}
        scalars = storage.latest_with_smoothing_hint(_SMOOTHED)
        for name, (value, iteration) in scalars.items():
            if iteration > self._last_write:
                by_iteration.setdefault(iteration, {})[name] = value
        for name, image, iteration in storage._vis_data:
            pixels = np.asarray(image).transpose(1, 2, 0)
            by_iteration.setdefault(iteration, {})[name] = self._image(pixels)
        for iteration in sorted(by_iteration):
            self._run.log(by_iteration[iteration], step=iteration)
        self._last_write = max([self._last_write, *by_iteration])

    def close(self) -> None:
        self._run.finish()


def _plain(node: CfgNode) -> dict:
    return {k: _plain(v) if isinstance(v, CfgNode) else v for k, v in node.items()}
