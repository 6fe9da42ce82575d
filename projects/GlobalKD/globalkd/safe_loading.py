"""Reading a checkpoint without running what it may carry.

Detectron2's checkpoints are pickles, and a pickle can call any function. `SafeCheckpointer` reads
`.pkl` files by an unpickler that knows arrays and plain containers alone, which is all that the
model zoo's hold, and `.pth` files by PyTorch's loader of tensors. Anything else is refused, unless
MODEL.GLOBALKD.ALLOW_PICKLE says that the files are trusted. Not here: which weights must be there
(`teacher/building.py`).
"""

import collections
import logging
import os
import pickle
import re
from types import SimpleNamespace
from typing import Any, BinaryIO, Iterable, List
from unittest import mock
from urllib.error import URLError

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer, detection_checkpoint

logger = logging.getLogger(__name__)

_load_anything = torch.load  # `_load_file` exchanges torch.load while it runs


class SafeCheckpointer(DetectionCheckpointer):
    """`DetectionCheckpointer` for files that nobody has to trust.

    It keeps what Detectron2's only logs: the entries that a file did not fill.
    """

    incompatible = None  # nothing was loaded yet

    def __init__(self, model, save_dir: str = "", *, allow_pickle: bool = False, **kwargs):
        """
        Args:
            allow_pickle: MODEL.GLOBALKD.ALLOW_PICKLE; read files of other content, too, which runs
                the code that is in them.
            kwargs: as in Detectron2.
        """
        super().__init__(model, save_dir, **kwargs)
        self.allow_pickle = allow_pickle

    def load(self, path: str, *args, **kwargs):
        try:
            return super().load(path, *args, **kwargs)
        except URLError as error:
            raise OSError(
                f"{path} could not be downloaded ({error.reason}). Without network, download it "
                "elsewhere and give the path of the file in its place."
            ) from error

    def _load_file(self, filename: str) -> dict:
        loaded = self._read_file(filename)
        nested = [k for k, v in loaded["model"].items() if isinstance(v, dict)]
        if nested:
            raise ValueError(
                f'{filename} has no entry "model" with the weights of a detector; it has {nested}. '
                'Save the one to use as {"model": ...}.'
            )
        return loaded

    def _read_file(self, filename: str) -> dict:
        try:
            # What the parent makes of the content, by file ending, stays as it is.
            with (
                mock.patch.object(torch, "load", load_tensors),
                mock.patch.object(
                    detection_checkpoint, "pickle", SimpleNamespace(load=load_arrays)
                ),
            ):
                return super()._load_file(filename)
        except pickle.UnpicklingError as error:
            if not self.allow_pickle:
                raise ValueError(
                    f"{filename} holds more than tensors, arrays and plain values, or is damaged: "
                    f"{_reason(error)}. Reading it could run code that is in it. Where you trust "
                    "its origin, set MODEL.GLOBALKD.ALLOW_PICKLE True."
                ) from error
            logger.warning(f"{filename} is read as any pickle: ALLOW_PICKLE is True.")
        except (RuntimeError, EOFError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{filename} is not a complete checkpoint: {_reason(error)}. Copy or write it "
                "again."
            ) from error
        with mock.patch.object(torch, "load", _load_unsafely):
            return super()._load_file(filename)

    def _load_model(self, checkpoint):
        self.incompatible = super()._load_model(checkpoint)
        return self.incompatible

    @property
    def unfilled(self) -> List[str]:
        """The model's entries that the last `load` left as they were, sorted."""
        if self.incompatible is None:
            return []
        wrong_shape = [key for key, *_ in self.incompatible.incorrect_shapes]
        return _that_count({*self.incompatible.missing_keys, *wrong_shape})

    @property
    def unused_of_backbone(self) -> List[str]:
        """Entries of a backbone in the file for which the model has no place, sorted."""
        unexpected = self.incompatible.unexpected_keys if self.incompatible else []
        return _that_count(key for key in unexpected if key.startswith("backbone."))

    def describe_unfilled(self, owner: str) -> str:
        """How much of `owner` ("the teacher") the file fills, and what it does not."""
        unfilled, total = self.unfilled, len(self.model.state_dict())
        shown = ", ".join(unfilled[:8]) + (", ..." if len(unfilled) > 8 else "")
        text = (
            f"fills {total - len(unfilled)} of {total} entries of {owner}. Missing, or of another "
            f"shape: {shown}"
        )
        for key, saved, needed in self.incompatible.incorrect_shapes[:1]:
            text += (
                f". {key} has the shape {tuple(saved)} in the file and {tuple(needed)} by the "
                f"config of {owner}"
            )
        return text

    def describe_unused(self, owner: str) -> str:
        """How many entries of a backbone `owner` ("the teacher") has no place for, and one."""
        unused = self.unused_of_backbone
        return (
            f"holds {len(unused)} entries of a backbone for which {owner} has no place, such as "
            f"{unused[0]}: those of a deeper one?"
        )


def _that_count(keys: Iterable[str]) -> List[str]:
    # Without a counter that old checkpoints lack and that evaluation does not read.
    return sorted(key for key in keys if not key.endswith("num_batches_tracked"))


def require_weights(key: str, weights: str, hint: str = "") -> None:
    """Raise a FileNotFoundError where a key names weights by a path, and no file is there.

    Args:
        key: such as "MODEL.WEIGHTS".
        weights: its value; a URL is not looked up.
        hint: what to do, for the message.
    """
    if "://" not in weights and not os.path.isfile(weights):
        raise FileNotFoundError(
            f"{key}: there is no file {weights!r} (seen from {os.getcwd()}).{hint}"
        )


def load_tensors(file: Any, **kwargs) -> Any:
    """`torch.load` on the CPU for tensors and plain values alone.

    Raises:
        pickle.UnpicklingError: the file holds something else.
    """
    return _load_anything(file, **{"map_location": "cpu", **kwargs, "weights_only": True})


def _load_unsafely(file: Any, **kwargs) -> Any:
    return _load_anything(file, **{"map_location": "cpu", **kwargs, "weights_only": False})


def load_arrays(file: BinaryIO, **kwargs) -> Any:
    """`pickle.load` for NumPy arrays, numbers, text and their containers alone.

    Raises:
        pickle.UnpicklingError: the file holds something else.
    """
    return _ArrayUnpickler(file, **kwargs).load()


class _ArrayUnpickler(pickle.Unpickler):
    """Resolves the few names by which arrays are pickled, and no other; nothing is imported."""

    def find_class(self, module: str, name: str) -> Any:
        # NumPy 2 calls numpy.core numpy._core; files of both are read by both.
        found = _ARRAY_NAMES.get((module.replace("numpy._core", "numpy.core"), name))
        if found is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return found


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Bytes as Python 3 pickles them in protocol 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding!r}")
    return text.encode("latin1")


_ARRAY_NAMES = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    # The functions that pickle names, taken from where this NumPy has them.
    ("numpy.core.multiarray", "_reconstruct"): np.zeros(1).__reduce__()[0],
    ("numpy.core.multiarray", "scalar"): np.float32(0).__reduce__()[0],
    ("numpy.core.numeric", "_frombuffer"): np.zeros(1).__reduce_ex__(5)[0],
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): _encode,
}


def _reason(error: Exception) -> str:
    """What was met, in one line; PyTorch wraps it in pages of advice."""
    asked = re.search(r"GLOBAL ([\w.]+)|it asks for (.*)", str(error))
    if asked:
        return f"it asks for {asked[1] or asked[2]}"
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
