"""What a resumed run needs and Detectron2's checkpoints do not hold.

Model, optimizer, schedule and the distiller are saved elsewhere. Left are the run's seed, from
which the data and the random numbers of every step follow, and what each process has for itself.
"""

import logging
from typing import List, Optional

import torch
from detectron2.utils import comm
from torch import nn

logger = logging.getLogger(__name__)

#: Buffers that are equal in all processes: those of the first one are enough.
_SHARED = "distiller.bank."


class RunState:
    """The checkpoint's entry "run".

    Of each process: the running mean by which RetinaNet and FCOS divide their losses, which is no
    buffer, and (from the second process on) its buffers: BatchNorm's statistics and the reservoir.
    """

    def __init__(self, model: nn.Module, seed: Optional[int]):
        """
        Args:
            model: the detector, without a wrapper.
            seed: None where steps do not follow from a seed.
        """
        self.model = model
        self.seed = seed
        self._collected: List[dict] = []

    def collect(self) -> None:
        """Bring every process's part to the first one. All processes must call it before a save."""
        self._collected = comm.gather(self._own())

    def state_dict(self) -> dict:
        collected, self._collected = self._collected, []
        return {"seed": self.seed, "processes": collected or [self._own()]}

    def load_state_dict(self, state: dict) -> None:
        self.seed = state["seed"]
        processes, rank = state["processes"], comm.get_rank()
        if len(processes) != comm.get_world_size():
            logger.warning(
                f"The checkpoint was saved by {len(processes)} processes and is resumed by "
                f"{comm.get_world_size()}: the run goes on, but not to the bit."
            )
            rank = 0
        own = processes[rank]
        if own["loss_normalizer"] is not None:
            self.model.loss_normalizer = own["loss_normalizer"]
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                if name in own["buffers"]:
                    buffer.copy_(own["buffers"][name])

    def _own(self) -> dict:
        buffers = {}
        if not comm.is_main_process():  # the first one's are in the entries model and distiller
            named = self.model.named_buffers()
            buffers = {n: b.cpu() for n, b in named if not n.startswith(_SHARED)}
        normalizer = getattr(self.model, "loss_normalizer", None)
        return {"loss_normalizer": normalizer, "buffers": buffers}
