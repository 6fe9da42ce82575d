"""Detectron2 training hooks: of the distillation, and of runs that can be interrupted.

The distiller prepares itself in the first forward of an iteration, also under a foreign trainer.
These hooks do it earlier, outside the timed step, and add what only a trainer can do.
"""

import logging
import os
import signal
import sys
import threading
from contextlib import suppress
from typing import Callable, Optional

import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.logger import create_small_table

from ..data.unreadable import readable_images
from ..distiller import LOG_PERIOD
from ..random_state import STEPS, seed_all
from .launching import STOP_SIGNALS

logger = logging.getLogger(__name__)

_ENDS_SOON = (
    "the running step (with a refresh or an evaluation, if one is due) is brought to its end and "
    "saved, then the training ends. Ctrl-\\ ends it at once."
)
#: The one checkpoint that is written out of turn; the next one in turn takes its place.
OUT_OF_TURN = "model_last"


class PrototypeRefresh(HookBase):
    """Refresh the prototypes when they are due, before the step and before its clock starts."""

    def before_step(self):
        model = getattr(self.trainer.model, "module", self.trainer.model)
        model.distiller.prepare(model, self.trainer.iter)


class StepSeed(HookBase):
    """Let the random numbers of a step follow from the run's seed, the step and the process."""

    def before_step(self):
        key = (self.trainer.run_state.seed, STEPS, self.trainer.iter, comm.get_rank())
        seed_all(*key)


class StopSignals:
    """A context in which SIGTERM and SIGINT (Ctrl-C) are noted instead of ending the process.

    Attributes:
        asked: the number of the first one that came; 0 for none.
    """

    def __init__(self):
        self.asked = 0
        self._handlers = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # others must not set handlers
            self._handlers = {n: signal.signal(n, self._ask) for n in STOP_SIGNALS}
        return self

    def __exit__(self, *_error):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _ask(self, number, frame):
        if not self.asked and comm.is_main_process():
            # By the system: printing is not safe in the middle of whatever runs.
            name = signal.Signals(number).name
            os.write(2, f"{name}: {_ENDS_SOON}\n".encode())
        self.asked = self.asked or number


class CheckpointSaver(HookBase):
    """Save periodically, before an evaluation, after the last step, and where a run is ended.

    A signal lets the running step end; then the state is saved and the process ends with code 128 +
    the signal's number. One process that got the signal is enough. Part of the work of saving is
    done by all processes: each one needs this hook.

    An error between two steps, such as of an image that cannot be read, leaves the state whole. It
    is saved, too, if there is one process alone: others would wait in the middle of a step.
    """

    def __init__(self, period: int, signals: StopSignals, *, eval_period: int = 0):
        """
        Args:
            period: iterations between two saves; SOLVER.CHECKPOINT_PERIOD.
            signals: the context of the training.
            eval_period: iterations between two evaluations; 0 for none before the last step.
        """
        self.period = period
        self.signals = signals
        self.eval_period = eval_period
        self._saved = self._done = -1  # the latest iteration that was saved, and that is complete
        self._drawn: Optional[int] = None  # batches that were drawn up to there

    def after_step(self):
        iteration = self.trainer.iter
        asked = self._asked_anywhere()
        evaluated = self.eval_period > 0 and (iteration + 1) % self.eval_period == 0
        if asked or (iteration + 1) % self.period == 0:
            self._save(f"model_{iteration:07d}")
        elif evaluated and iteration + 1 < self.trainer.max_iter:
            self._save(OUT_OF_TURN)
        self._done, self._drawn = iteration, self._batches()
        if iteration + 1 >= self.trainer.max_iter:
            self._save("model_final")
        elif asked:
            comm.synchronize()  # nobody leaves before the file is complete
            logger.info(
                f"{signal.Signals(asked).name}: training ends after iteration {iteration}, which "
                "is saved. Go on with --resume."
            )
            raise SystemExit(128 + asked)

    def _asked_anywhere(self) -> int:
        """The signal that a process got, 0 for none; the same in all processes."""
        asked = self.signals.asked
        if comm.get_world_size() == 1:
            return asked
        # In each step: a number, where `comm` would pickle objects and take five times as long.
        asked = torch.tensor(asked)
        dist.all_reduce(asked, dist.ReduceOp.MAX, group=comm._get_global_gloo_group())
        return int(asked)

    def after_train(self):
        # Called whichever way a training ends; `iter` is max_iter where it has ended by itself.
        failed = isinstance(sys.exc_info()[1], Exception)
        if not failed or self.trainer.iter >= self.trainer.max_iter:
            return
        untouched = self._drawn is not None and self._drawn == self._batches()
        if untouched and self._saved < self._done and comm.get_world_size() == 1:
            self._save_what_is_done()
        last = self.trainer.checkpointer.get_checkpoint_file()
        if comm.is_main_process():
            logger.error(
                f"Training has ended by an error at iteration {self.trainer.iter}. "
                + (f"{last} is its last checkpoint: go on with --resume." if last else "")
            )

    def _save_what_is_done(self):
        """Save as after the latest complete step, which the state is still that of."""
        failed, self.trainer.iter = self.trainer.iter, self._done
        try:
            self._save(OUT_OF_TURN)
        except OSError as error:  # the one that ended the training must not get lost
            logger.error(str(error))
        finally:
            self.trainer.iter = failed

    def _batches(self) -> Optional[int]:
        """How many batches the training has drawn; None where its loader does not count them."""
        return getattr(getattr(self.trainer, "data_loader", None), "drawn", None)

    def _save(self, name: str):
        checkpointer = self.trainer.checkpointer
        self.trainer.run_state.collect()
        checkpointer.save(name, iteration=self.trainer.iter)
        self._saved = self.trainer.iter
        if name != OUT_OF_TURN and comm.is_main_process():
            with suppress(FileNotFoundError):
                os.remove(os.path.join(checkpointer.save_dir, f"{OUT_OF_TURN}.pth"))


class NonFiniteCheck(HookBase):
    """End the run where a distillation loss is not finite, before the optimizer's step."""

    def after_backward(self):
        getattr(self.trainer.model, "module", self.trainer.model).distiller.non_finite.check()


class SkippedSteps(HookBase):
    """After training, name the skipped steps that the log (every LOG_PERIOD) did not name."""

    def after_train(self):
        self.trainer.distiller.non_finite.report()


class UnreadableImageCount(HookBase):
    """Write how many training images could not be read so far."""

    def after_step(self):
        images = readable_images(self.trainer.data_loader)
        if images is not None and (self.trainer.iter + 1) % LOG_PERIOD == 0:
            count = int(images.unreadable.sum())
            self.trainer.storage.put_scalar("data/unreadable_images", count, smoothing_hint=False)


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
            for task, metrics in results.items():
                table = create_small_table(metrics) if isinstance(metrics, dict) else metrics
                logger.info(f"Teacher before the first step, {task}:\n{table}")
