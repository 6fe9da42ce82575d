"""Digit scenes: a small detection dataset with instances that are known to be ambiguous.

Real handwritten digits (scikit-learn's 1,797 scans of 8 x 8 pixels) are enlarged and pasted on
darker textures, several a scene. A given share of them is made hard to read: blurred, tiny, faint
or overlapped. Each annotation says how hard ("ambiguity", 0 for a clean digit, up to 1) and why
("ambiguity_kind"). Here: the files. Not here: what a scene holds (`scene_composition.py`) and how
it is drawn (`scene_drawing.py`).
"""

import json
import os
import shutil
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Tuple, Union

import numpy as np
from tqdm import tqdm

from .scene_composition import Digit, SceneComposer
from .scene_drawing import encode_png

# To be raised when the same settings give other scenes: stale files are then made anew.
VERSION = 2
SPLITS = ("train", "val", "test")
VAL_SHARE_OF_SAMPLES = 0.25


def make_digit_scenes(
    root: Union[str, os.PathLike],
    *,
    num_train: int,
    num_val: int,
    num_test: int = 0,
    image_size: int = 128,
    seed: int = 0,
    ambiguous_share: float = 0.3,
    digits_per_scene: Tuple[int, int] = (3, 7),
) -> Path:
    """Write digit scenes as COCO JSON and PNG: train.json, val.json, train/*.png, val/*.png.

    The same arguments give the same bytes. Scene i of a split does not depend on how many scenes
    there are. "train" is drawn from other handwritten samples than "val" and "test", which show the
    same samples in other scenes: tune on "val", report "test". Files appear all at once when they
    are complete; scenes with the same settings on disk are kept.

    Args:
        root: the dataset's folder. One that holds digit scenes of other settings is replaced.
        num_train: scenes in "train".
        num_val: scenes in "val".
        num_test: scenes in "test"; 0 writes no such split.
        image_size: side of a scene in pixels, at least 64.
        seed: of every random choice.
        ambiguous_share: expected share of ambiguous digits, in [0, 1].
        digits_per_scene: fewest and most digits in a scene.

    Returns:
        `root`.

    Raises:
        ValueError: an argument is out of range.
        FileExistsError: `root` holds something other than digit scenes.
    """
    _check_arguments(num_train, num_val, num_test, image_size, ambiguous_share, digits_per_scene)
    settings = {
        "version": VERSION,
        "scenes": {"train": num_train, "val": num_val, **({"test": num_test} if num_test else {})},
        "image_size": image_size,
        "seed": seed,
        "ambiguous_share": ambiguous_share,
        "digits_per_scene": list(digits_per_scene),
    }
    target = Path(root).resolve()
    found = _settings_on_disk(target)
    if found == settings:
        return Path(root)
    if found is None and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{root} exists and holds no digit scenes; choose another folder")
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for split in settings["scenes"]:
            _write_split(partial, split, settings)
        _publish(partial, target, settings)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Path(root)


def _check_arguments(
    num_train, num_val, num_test, image_size, ambiguous_share, digits_per_scene
) -> None:
    if min(num_train, num_val, num_test) < 0 or image_size < 64 or not 0 <= ambiguous_share <= 1:
        raise ValueError(
            "digit scenes need num_train, num_val, num_test >= 0, image_size >= 64 and "
            f"ambiguous_share in [0, 1]; got {num_train}, {num_val}, {num_test}, {image_size} and "
            f"{ambiguous_share}"
        )
    if not 1 <= digits_per_scene[0] <= digits_per_scene[1]:
        raise ValueError(f"digits_per_scene should be (fewest, most), not {digits_per_scene}")


def _publish(partial: Path, target: Path, settings: Dict) -> None:
    """Move the finished folder to its place; another process may have done the same before."""
    if target.exists():
        shutil.rmtree(target)
    try:
        partial.rename(target)
    except OSError:
        if _settings_on_disk(target) != settings:
            raise


def _settings_on_disk(root: Path) -> Optional[Dict]:
    """Settings of the digit scenes in `root`; None where there are none, or not every split."""
    try:
        settings = _settings_of_split(root, "train")
        complete = all(_settings_of_split(root, s) == settings for s in settings["scenes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return settings if complete else None


def _settings_of_split(root: Path, split: str) -> Dict:
    return json.loads((root / f"{split}.json").read_bytes())["info"]["digit_scenes"]


def _write_split(folder: Path, split: str, settings: Dict) -> None:
    (folder / split).mkdir(parents=True)
    images, annotations = [], []
    total, size = settings["scenes"][split], settings["image_size"]
    # disable=None: silent where standard error is no terminal.
    bar = tqdm(_scenes(split, settings), f"digit scenes, {split}", total, disable=None)
    for index, (picture, digits) in enumerate(bar):
        name = f"{index:06d}.png"
        (folder / split / name).write_bytes(encode_png(picture))
        images.append({"id": index + 1, "file_name": name, "width": size, "height": size})
        annotations += [{"image_id": index + 1, **digit.as_annotation()} for digit in digits]
    content = {
        "info": {"description": "Digit scenes", "split": split, "digit_scenes": settings},
        "images": images,
        "annotations": [{"id": index + 1, **a} for index, a in enumerate(annotations)],
        "categories": [{"id": label + 1, "name": str(label)} for label in range(10)],
    }
    (folder / f"{split}.json").write_text(json.dumps(content))


def _scenes(split: str, settings: Dict) -> Iterator[Tuple[np.ndarray, List[Digit]]]:
    from sklearn.datasets import load_digits  # takes a second to import

    scans = load_digits()
    order = np.random.default_rng(settings["seed"]).permutation(len(scans.target))
    first_train = int(VAL_SHARE_OF_SAMPLES * len(order))
    composer = SceneComposer(
        scans=scans.images / 16,
        labels=scans.target,
        samples=order[first_train:] if split == "train" else order[:first_train],
        size=settings["image_size"],
        ambiguous_share=settings["ambiguous_share"],
        digits_per_scene=settings["digits_per_scene"],
    )
    for index in range(settings["scenes"][split]):
        yield composer(np.random.default_rng([settings["seed"], SPLITS.index(split), index]))
