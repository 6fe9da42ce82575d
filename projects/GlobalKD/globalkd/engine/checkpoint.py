"""Checkpoints that are whole or not there: written aside, then renamed; checked when read.

Not here: what goes into them (`DistillTrainer`) and when they are written (`hooks`).
"""

import contextlib
import errno
import os
import zipfile
from textwrap import shorten
from typing import Callable, List, Optional

import torch

from ..safe_loading import SafeCheckpointer
from .disk import writing

#: What is being written has this name until it is complete. One name: a killed run leaves at most
#: one such file, and the next save overwrites it.
_PARTIAL = "checkpoint.partial"
_ADVICE = (
    "The checkpoints that were complete before are as they were: make room and go on with --resume."
)


class AtomicCheckpointer(SafeCheckpointer):
    """`SafeCheckpointer` whose files are complete at every moment, and whole where it resumes.

    A run may be killed while it saves: `last_checkpoint` then still names the checkpoint before.
    """

    _resumed = ""  # the file from which the run goes on, while it is loaded

    def save(self, name: str, **kwargs) -> None:
        """Write the model and the checkpointables to `{name}.pth`, then name it in last_checkpoint.

        It is not named there if a checkpointable has an `is_whole` that is False: a run could not
        go on from it as it was. So it is where a hook of the first process alone saves.

        Args:
            name: of the file, without its ending.
            kwargs: extra data to save.

        Raises:
            OSError: it could not be written; the files that were there are as they were.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        whole = all(getattr(v, "is_whole", True) for v in self.checkpointables.values())
        state = {k: v.state_dict() for k, v in self.checkpointables.items()}
        data = {"model": self.model.state_dict(), **state, **kwargs}
        self.logger.info(f"Saving checkpoint to {os.path.join(self.save_dir, name)}.pth")
        self._write(f"{name}.pth", lambda file: torch.save(data, file))
        if whole:
            self.tag_last_checkpoint(f"{name}.pth")

    def forget_last(self) -> None:
        """Name no checkpoint as the last one any more; the files stay."""
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(self.save_dir, "last_checkpoint"))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        content = last_filename_basename.encode()
        self._write("last_checkpoint", lambda file: file.write(content))

    def _write(self, name: str, write: Callable) -> None:
        path, partial = (os.path.join(self.save_dir, x) for x in (name, _PARTIAL))
        try:
            with writing(path, _ADVICE):
                with open(partial, "wb") as file:
                    write(file)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(partial, path)
                _sync_folder(self.save_dir)
        except OSError:
            with contextlib.suppress(OSError):
                os.remove(partial)
            raise

    def load(self, path: str, checkpointables: Optional[List[str]] = None):
        """As in Detectron2; `checkpointables` is [] where a run starts from a file.

        Raises:
            ValueError: a checkpoint that is resumed is damaged, or of another detector or run.
        """
        last = bool(path) and path == self.get_checkpoint_file()
        if last:
            _check_whole(path)
        self._resumed = path if last and checkpointables is None else ""
        try:
            return super().load(path, checkpointables)
        except ValueError as error:
            if "parameter group" not in str(error):
                raise
            raise ValueError(
                f"{path} cannot be resumed: its optimizer has other parameters than this run's. "
                "Another detector wrote it, or a plain student where this one is distilled (or the "
                "other way round). Train into another OUTPUT_DIR."
            ) from error
        except RuntimeError as error:
            if "Error(s) in loading state_dict" not in str(error):
                raise
            raise ValueError(
                f"{path} was written with other keys of MODEL.GLOBALKD than those of this run, "
                "such as LOSSES. Resume it with its own keys, or train into another OUTPUT_DIR. "
                f"{shorten(str(error), 500)}"
            ) from error

    def _load_model(self, checkpoint):
        incompatible = super()._load_model(checkpoint)
        if self._resumed and self.unfilled:  # before anything else of the checkpoint is loaded
            raise ValueError(
                f"{self._resumed} cannot be resumed: another detector wrote it. It "
                f"{self.describe_unfilled('this detector')}. Resume with the configuration that it "
                "was trained with, or train into another OUTPUT_DIR."
            )
        return incompatible


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems cannot, and need not
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _check_whole(path: str) -> None:
    """Raise ValueError unless the checkpoint is there and every part has its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except FileNotFoundError:
        problem = "it does not exist"
    except (zipfile.BadZipFile, OSError) as error:
        problem = f"{type(error).__name__}: {error}"
    else:
        if damaged is None:
            return
        problem = f"the part {damaged} is damaged"
    folder, name = os.path.split(path)
    others = sorted(x for x in os.listdir(folder) if x.endswith(".pth") and x != name)
    raise ValueError(
        f"{path}, which {os.path.join(folder, 'last_checkpoint')} names, is not a whole "
        f"checkpoint: {problem}. To resume from another one, write its name into last_checkpoint; "
        f"here are {others or 'none'}."
    )
