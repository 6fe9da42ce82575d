"""Detectron2 training hooks of the distillation.

The distiller prepares itself in the first forward of an iteration, also under a foreign trainer.
These hooks do it earlier, outside the timed step, and add what only a trainer can do.
"""

import logging
from typing import Callable

from detectron2.engine import HookBase

logger = logging.getLogger(__name__)


class PrototypeRefresh(HookBase):
    """Refresh the prototypes when they are due, before the step and before its clock starts."""

    def before_step(self):
        model = getattr(self.trainer.model, "module", self.trainer.model)
        model.distiller.prepare(model, self.trainer.iter)


class TeacherEvaluation(HookBase):
    """Evaluate the teacher once, before the first step of a run that is not resumed."""

    def __init__(self, evaluate: Callable[[], dict]):
        """
        Args:
            evaluate: returns Detectron2's results dict of the teacher.
        """
        self.evaluate = evaluate

    def before_train(self):
        if self.trainer.start_iter == 0:
            results = self.evaluate()
            logger.info(f"Teacher before the first step: {results}")
