"""The file format of prototypes: safetensors with a fingerprint, checked on reading.

The header's metadata hold the format's name and version, the fingerprint (what the prototypes were
made with) and the instances per class as JSON, and a SHA-256 of all of it and the tensors. Not
here: what the tensors mean (`bank`).
"""

import hashlib
import json
import os
from typing import Dict, List, Tuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FILE_FORMAT = "globalkd-prototypes"
FILE_VERSION = "1"
_REMEDY = "Give a file that tools/generate_prototypes.py wrote, or write it again."


def write(path: str, tensors: Dict[str, Tensor], *, fingerprint: dict, counts: List[int]) -> None:
    """Write tensors and what they were made with; a reader never sees half a file.

    Args:
        path: the file; its folder is made if need be.
        tensors: contiguous tensors on the CPU.
        fingerprint: JSON values.
        counts: instances of each class that took part.
    """
    metadata = {
        "format": FILE_FORMAT,
        "version": FILE_VERSION,
        "fingerprint": json.dumps(fingerprint, sort_keys=True),
        "counts": json.dumps(counts),
    }
    metadata["sha256"] = _digest(tensors, metadata)
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    temporary = f"{path}.{os.getpid()}.tmp"
    save_file(tensors, temporary, metadata=metadata)
    os.replace(temporary, path)


def read(path: str) -> Tuple[Dict[str, Tensor], dict]:
    """Read what `write` wrote.

    Returns:
        The tensors, on the CPU, and {"fingerprint": dict, "counts": list of int}.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a prototype file, of another version, incomplete or altered.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no prototype file {path}. {_REMEDY}")
    try:
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata() or {}
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({error}). {_REMEDY}"
        ) from error
    for key, right in (
        ("format", FILE_FORMAT),
        ("version", FILE_VERSION),
        ("sha256", _digest(tensors, metadata)),
    ):
        if metadata.get(key) != right:
            raise ValueError(
                f"{path} is not an intact prototype file: its {key} is {metadata.get(key)!r}; it "
                f"must be {right!r}. {_REMEDY}"
            )
    return tensors, {key: json.loads(metadata[key]) for key in ("fingerprint", "counts")}


def check_tensors(path: str, tensors: Dict[str, Tensor], needed: Dict[str, Tensor]) -> None:
    """Compare names, shapes and types with what the model needs.

    Raises:
        ValueError: some differ; the message lists them.
    """

    def describe(x: Dict[str, Tensor], name: str) -> str:
        return f"{tuple(x[name].shape)} {x[name].dtype}" if name in x else "nothing"

    differing = [
        f"{name}: {describe(tensors, name)} in the file, {describe(needed, name)} needed"
        for name in sorted({*tensors, *needed})
        if describe(tensors, name) != describe(needed, name)
    ]
    if differing:
        raise ValueError(
            f"{path} holds prototypes of another model: {'; '.join(differing)}. The shapes are "
            "(classes, prototypes a class, channels) of each level."
        )


def check_fingerprint(path: str, found: dict, expected: dict) -> None:
    """Compare two fingerprints as JSON, so that a tuple equals a list.

    Raises:
        ValueError: they differ; the message lists the keys with both values.
    """
    expected = json.loads(json.dumps(expected))
    differing = [
        f"{key}: {found.get(key, 'nothing')!r} in the file, {expected.get(key, 'nothing')!r} here"
        for key in sorted({*found, *expected})
        if (key in found) != (key in expected) or found[key] != expected[key]
    ]
    if differing:
        raise ValueError(
            f"{path} was made with other settings: {'; '.join(differing)}. Use the settings of the "
            "file, or generate prototypes with these."
        )


def _digest(tensors: Dict[str, Tensor], metadata: Dict[str, str]) -> str:
    """SHA-256 of fingerprint, counts, and every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256()
    for key in ("fingerprint", "counts"):
        digest.update(f"{key}={metadata.get(key)}\n".encode())
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}\n".encode())
        digest.update(x.numpy().tobytes())
    return digest.hexdigest()
