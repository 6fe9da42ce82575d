"""The instances chosen as prototypes, as pictures, with what each adds.

For each level and class: the crops in the order of choice; the gain of each, the share of the
class's energy |F_t|^2 + |F_s|^2 by which it lowered Eq. (2) (pursuit only); and how much of the
class they explain, the share of the second moment of its unit features that lies in the span of the
prototypes so far. The prototypes are made anew with the checkpoint's student. Writes gallery.html,
gallery.csv and a picture for each level.
"""

import argparse
from pathlib import Path
from typing import Dict, List, Optional, Sequence

import cv2
import numpy as np
from detectron2.data import MetadataCatalog
from PIL import Image
from torch import nn
from tqdm import tqdm

from ..prototypes.sparse_coding import unit_rows
from ..prototypes.structures import PairedFeatures, PrototypeSet
from .annotations import CORNERS, corners, crop, make_prototypes, training_instances
from .explained_share import explained_shares
from .html import Page
from .runs import add_run_arguments, load_run, output_folder, read_config
from .tables import write_csv

TILE = 64
#: Widest column of class names in a level's picture, in pixels.
MAX_NAME_WIDTH = 4 * TILE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser, "gallery", dataset=False)
    parser.add_argument("--levels", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="default: all")


def main(args: argparse.Namespace) -> None:
    model = load_run(args.run, args.checkpoint, distiller=True, opts=args.opts)
    names = MetadataCatalog.get(read_config(args.run, args.opts).DATASETS.TRAIN[0]).thing_classes
    folder = output_folder(args)
    prototype_gallery(model, names, folder, levels=args.levels, classes=args.classes)
    print(f"{folder / 'gallery.html'}")


def prototype_gallery(
    model: nn.Module,
    class_names: Sequence[str],
    output: Path,
    *,
    levels: Optional[Sequence[str]] = None,
    classes: Optional[Sequence[str]] = None,
) -> List[dict]:
    """Make the prototypes of a run anew and show them.

    Args:
        model: a distilling meta-architecture; its bank holds the new prototypes afterwards.
        class_names: of all classes, in their order.
        output: an existing folder.
        levels: the levels to show; default: all.
        classes: names of the classes to show; default: all.

    Returns:
        One dict for each prototype shown: "level", "class", "rank" from 1 on, "gain",
        "explained_teacher" and "explained_student" by it and those before it, "file" and its
        box: "x1", "y1", "x2", "y2".

    Raises:
        ValueError: a level or class that is not there.
    """
    levels = _choose("--levels", levels, [p.student for p in model.distiller.levels])
    classes = _choose("--classes", classes, class_names)
    files, features = training_instances(model)
    prototypes = make_prototypes(model, features)
    page = Page("Prototype gallery")
    page.paragraph(
        "Crops in the order of choice. Gain: share of the class's energy by which the prototype "
        "lowered Eq. (2). Explained: share of the second moment of the class's unit features, in "
        "the teacher's and in the student's space, within the span of the prototypes so far."
    )
    names = [_shortened(name, MAX_NAME_WIDTH) for name in classes]
    rows, width = [], max(TILE, *map(_text_width, names))
    with tqdm(desc="gallery", total=len(levels) * len(classes), disable=None) as bar:
        for level in levels:
            page.heading(f"Level {level}")
            sheet = []
            for name, shown in zip(classes, names):
                k = class_names.index(name)
                found = _describe(features, prototypes, files, level, k)
                crops = [
                    crop(row["file"], [row[name] for name in CORNERS], size=2 * TILE)
                    for row in found
                ]
                rows += [{"level": level, "class": name, **row} for row in found]
                sheet.append(_strip(shown, width, crops, prototypes.rows[level].shape[1]))
                _add_class(page, name, found, crops, int(prototypes.counts[k]))
                bar.update()
            Image.fromarray(np.vstack(sheet)).save(output / f"gallery_{level}.jpg", quality=85)
    write_csv(output / "gallery.csv", rows)
    page.write(output / "gallery.html")
    return rows


def _choose(option: str, wanted: Sequence[str], known: Sequence[str]) -> List[str]:
    unknown = [name for name in wanted or [] if name not in known]
    if unknown:
        raise ValueError(f"{option} names {unknown}; there are {list(known)}.")
    return list(wanted or known)


def _describe(
    features: PairedFeatures, prototypes: PrototypeSet, files: Dict[int, str], level: str, k: int
) -> List[dict]:
    """One dict for each prototype of a class on a level."""
    valid = prototypes.valid[level][k]
    chosen = prototypes.rows[level][k][valid].tolist()
    own = features.classes == k
    explained = {
        space: explained_shares(
            unit_rows(getattr(features, space)[level][own]),
            getattr(prototypes, space)[level][k][valid],
        ).mean(dim=0)
        for space in ("teacher", "student")
    }
    return [
        {
            "rank": i + 1,
            "gain": float(prototypes.gain[level][k, i]),
            "explained_teacher": float(explained["teacher"][i]),
            "explained_student": float(explained["student"][i]),
            "file": files[int(features.image_ids[row])],
            **corners(features.boxes[row]),
        }
        for i, row in enumerate(chosen)
    ]


def _add_class(page: Page, name: str, found: List[dict], crops: List[np.ndarray], count: int):
    page.heading(name, level=3)
    if not found:
        page.paragraph("No prototype.")
        return
    last = found[-1]
    page.paragraph(
        f"{len(found)} of {count} instances explain {100 * last['explained_teacher']:.1f} % in the "
        f"teacher's space and {100 * last['explained_student']:.1f} % in the student's."
    )
    page.gallery(
        (
            picture,
            f"{row['rank']}. gain {row['gain']:.3f}, explained "
            f"{row['explained_teacher']:.2f} / {row['explained_student']:.2f}",
        )
        for picture, row in zip(crops, found)
    )


def _strip(name: str, width: int, crops: List[np.ndarray], count: int) -> np.ndarray:
    """(TILE, width + TILE * count, 3): the class's name, its crops, and white."""
    strip = np.full((TILE, width + TILE * count, 3), 255, np.uint8)
    cv2.putText(strip, name, (4, TILE // 2 + 5), 0, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
    for i, picture in enumerate(crops):
        tile = cv2.resize(picture, (TILE - 2, TILE - 2), interpolation=cv2.INTER_AREA)
        left = width + TILE * i
        strip[1 : TILE - 1, left + 1 : left + TILE - 1] = tile
    return strip


def _text_width(text: str) -> int:
    """Pixels that a name takes, with a margin on both sides."""
    return cv2.getTextSize(text, 0, 0.4, 1)[0][0] + 8


def _shortened(name: str, width: int) -> str:
    """The name, or as much of it as fits into so many pixels, and three dots."""
    kept, shown = name, name
    while _text_width(shown) > width:
        kept = kept[:-1]
        shown = kept + "..."
    return shown
