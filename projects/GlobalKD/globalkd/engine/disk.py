"""Files that cannot be written, told with their place and the space that is left there.

Not here: that a file is whole or not there (`checkpoint`).
"""

import errno
import os
import shutil
from contextlib import contextmanager
from typing import Iterator

#: Of the disk, and of the user's share of it (which not every system has).
_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
#: How PyTorch says that it could not write on.
_UNWRITTEN = ("inline_container.cc", "PytorchStreamWriter")


@contextmanager
def writing(path: str, advice: str = "Make room, or write elsewhere.") -> Iterator[None]:
    """A context in which one file is written.

    Raises:
        OSError: it could not be; the message names it, the free space and what to do.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as either
        folder = os.path.dirname(os.path.abspath(path))
        raise OSError(
            f"{path} could not be written: {error}. {_free_space(folder)} free there. {advice}"
        ) from error


@contextmanager
def full_disk_told(folder: str) -> Iterator[None]:
    """A context in which whatever a run writes may find the disk full.

    Args:
        folder: OUTPUT_DIR.

    Raises:
        OSError: it was full; other errors are passed on as they are.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not _is_full(error):
            raise
        raise OSError(
            f"A disk is full, so that a file of this run could not be written: {error}. In "
            f"OUTPUT_DIR ({folder}) {_free_space(folder)} free. Make room; a training goes on "
            "with --resume."
        ) from error


def _is_full(error: Exception) -> bool:
    unwritten = isinstance(error, RuntimeError) and any(x in str(error) for x in _UNWRITTEN)
    return unwritten or getattr(error, "errno", None) in _FULL


def _free_space(folder: str) -> str:
    while not os.path.exists(folder):
        folder = os.path.dirname(os.path.abspath(folder))
    return f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB are"
