"""What a resumed run needs and Detectron2's checkpoints do not hold.

Model, optimizer, schedule and the distiller are saved elsewhere. Left are the run's seed, from
which the data and the random numbers of every step follow, and what each process has for itself.
"""

import logging
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import Tensor, nn

from ..config_reading import leaves
from ..data.resumable_loader import ResumableLoader

logger = logging.getLogger(__name__)

#: Buffers that are equal in all processes: those of the first one are enough.
_SHARED = "distiller.bank."

#: The groups of a config from which a run's result follows, and the keys in them that it does not.
_SETTINGS = ("SOLVER", "INPUT", "DATALOADER", "MODEL")
_NO_MATTER = {"SOLVER.CHECKPOINT_PERIOD", "DATALOADER.NUM_WORKERS", "MODEL.WEIGHTS"}


def settings_of(cfg: CfgNode) -> Dict[str, Any]:
    """What a resumed run is told of if it has changed: values by their whole keys."""
    settings = {"DATASETS.TRAIN": cfg.DATASETS.TRAIN}
    for group in _SETTINGS:
        settings.update(leaves(cfg[group], f"{group}."))
    # A tuple is a list where it comes from a file.
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
    return {key: value for key, value in plain.items() if key not in _NO_MATTER}


class RunState:
    """The checkpoint's entry "run".

    Of each process: the running mean by which RetinaNet and FCOS divide their losses, which is no
    buffer, and (from the second process on) its buffers: BatchNorm's statistics and the reservoir.

    Attributes:
        seed: of the run; once loaded, that of the checkpoint.
        batches: once loaded, how many batches each process had drawn; None where that is not known.
        goes_on: whether a checkpoint was loaded from whose seed the data and random numbers follow.
        changed: of the settings, those that were others when it was written: key -> value then.
    """

    def __init__(
        self,
        model: nn.Module,
        seed: Optional[int],
        settings: Optional[Dict[str, Any]] = None,
        loader: Optional[ResumableLoader] = None,
    ):
        """
        Args:
            model: the detector, without a wrapper.
            seed: None where steps do not follow from a seed.
            settings: plain values by their keys, to compare at a resume.
            loader: of the training, whose batches are counted; None where it starts anew.
        """
        self.model = model
        self.loader = loader
        self.seed = seed
        self.batches: Optional[int] = None
        self.settings = settings or {}
        self.changed: Dict[str, Any] = {}
        self.goes_on = False
        self._collected: List[dict] = []

    @property
    def is_whole(self) -> bool:
        """Whether `state_dict` gives every process's part now."""
        return bool(self._collected) or comm.get_world_size() == 1

    def collect(self) -> None:
        """Bring every process's part to the first one. All processes must call it before a save."""
        collected = comm.gather(self._own())
        # Buffer by buffer: a reservoir may be gigabytes, and what is sent is copied more than once.
        for name, buffer in self._own_buffers():
            parts = comm.gather(None if comm.is_main_process() else buffer.cpu())
            for state, part in zip(collected, parts):
                if part is not None:
                    state["buffers"][name] = part
        self._collected = collected

    def state_dict(self) -> dict:
        collected, self._collected = self._collected, []
        return {
            "seed": self.seed,
            "batches": self.loader.drawn if self.loader else None,
            "settings": self.settings,
            "processes": collected or [self._own()],
        }

    def load_state_dict(self, state: dict) -> None:
        if self.seed is not None and state["seed"] is not None:
            self.seed, self.goes_on = state["seed"], True
            self.batches = state["batches"]
        before = state["settings"]
        self.changed = {k: before[k] for k, v in self.settings.items() if before.get(k, v) != v}
        processes, rank = state["processes"], comm.get_rank()
        if len(processes) != comm.get_world_size():
            logger.warning(
                f"The checkpoint was saved by {len(processes)} processes and is resumed by "
                f"{comm.get_world_size()}: the run goes on, but not to the bit."
            )
        own = processes[rank if rank < len(processes) else 0]
        if own["loss_normalizer"] is not None:
            self.model.loss_normalizer = own["loss_normalizer"]
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                if name in own["buffers"]:
                    buffer.copy_(own["buffers"][name])
            reservoir = getattr(getattr(self.model, "distiller", None), "reservoir", None)
            if rank >= len(processes) and reservoir is not None:
                reservoir.clear()  # what it has is the first process's: nothing is kept twice

    def _own(self) -> dict:
        # The first process's buffers are in the entries model and distiller.
        return {"loss_normalizer": getattr(self.model, "loss_normalizer", None), "buffers": {}}

    def _own_buffers(self) -> Iterator[Tuple[str, Tensor]]:
        return ((n, b) for n, b in self.model.named_buffers() if not n.startswith(_SHARED))
