"""A dataset's annotations with their features in both spaces, and crops of their images.

What discrepancy, gallery, audit and reliability start from. Images are resized as in prototype
generation.
"""

from dataclasses import dataclass, replace
from typing import Dict, List, Sequence, Tuple, Union

import cv2
import numpy as np
from detectron2.data import DatasetCatalog
from detectron2.data import detection_utils as utils
from torch import nn

from ..prototypes.extraction import (
    ExtractionMapper,
    choose_images,
    extract_features,
    extraction_records,
    usable_boxes,
)
from ..prototypes.generation import generate_prototypes
from ..prototypes.structures import PairedFeatures, PrototypeSet

#: Columns of a box in tables: XYXY_ABS in pixels of the original image.
CORNERS = ("x1", "y1", "x2", "y2")
#: Context around a box in a crop, in units of its longer side.
CROP_MARGIN = 0.3


@dataclass
class Annotations:
    """The usable annotations of a dataset.

    Attributes:
        records: the dataset's dicts; `features.image_ids` are positions in it.
        rows: (R,) the annotations' own dicts.
        features: their features and where each row comes from.
    """

    records: List[dict]
    rows: List[dict]
    features: PairedFeatures

    def __len__(self) -> int:
        return len(self.rows)

    def field(self, name: str, default) -> np.ndarray:
        """(R,) values of a field of the annotations; `default` where it is absent."""
        return np.array([row.get(name, default) for row in self.rows])

    def file(self, row: int) -> str:
        """The image that a row lies in."""
        return self.records[int(self.features.image_ids[row])]["file_name"]

    def number(self, row: int) -> Union[int, str]:
        """A row's id in a COCO JSON, else its place in the annotations of its image."""
        return self.rows[row].get("id", int(self.features.annotation_ids[row]))


def dataset_annotations(model: nn.Module, dataset: str) -> Annotations:
    """All annotations of a registered dataset, but for crowds and boxes marked difficult.

    Args:
        model: a distilling meta-architecture.
        dataset: a registered name.

    Raises:
        ValueError: the name is not registered, or the dataset has no usable annotation.
    """
    if dataset not in DatasetCatalog:
        raise ValueError(
            f"There is no dataset {dataset!r}; list it under DATASETS.COCO or DATASETS.VOC."
        )
    dicts = DatasetCatalog.get(dataset)
    table = usable_boxes(dicts, 1.0)
    images = choose_images(table, max_images_per_class=0, seed=0)
    if len(images) == 0:
        raise ValueError(f"The dataset {dataset!r} has no usable annotation.")
    features = _extract(model, extraction_records(dicts, table, images))
    ids = zip(features.image_ids.tolist(), features.annotation_ids.tolist())
    return Annotations(
        records=dicts,
        rows=[dicts[i]["annotations"][a] for i, a in ids],
        features=features,
    )


def training_instances(model: nn.Module) -> Tuple[Dict[int, str], PairedFeatures]:
    """The instances that prototypes are made from, with the present student.

    Returns:
        Image id -> file, and the features.
    """
    records = model.distiller.refresher.records
    return {r["image_index"]: r["file_name"] for r in records}, _extract(model, records)


def make_prototypes(
    model: nn.Module, features: PairedFeatures, generator: str = ""
) -> PrototypeSet:
    """Choose prototypes as the run did and put them into the model's bank.

    Args:
        features: of `training_instances`.
        generator: another generator than the run's.

    Raises:
        ValueError: the run's losses read no prototypes.
    """
    distiller = model.distiller
    if distiller.bank is None:
        raise ValueError(
            f"The run has no prototypes: none of its losses {list(distiller.losses)} "
            "(MODEL.GLOBALKD.LOSSES) reads them."
        )
    settings = distiller.refresher.generation
    settings = replace(settings, generator=generator or settings.generator)
    prototypes = generate_prototypes(
        features,
        settings,
        num_classes=distiller.bank.num_classes,
        device=next(model.parameters()).device,
    )
    distiller.bank.update(prototypes)
    return prototypes


def _extract(model: nn.Module, records: List[dict]) -> PairedFeatures:
    distiller = model.distiller
    source = distiller.refresher.source
    return extract_features(
        model,
        distiller.teacher,
        records,
        levels=distiller.levels,
        pooler=distiller.pooler,
        mapper=ExtractionMapper(source.augmentations, model.input_format),
    )


def corners(box: Sequence[float]) -> Dict[str, float]:
    """The columns of a box in a table."""
    return {name: round(float(value), 1) for name, value in zip(CORNERS, box)}


def crop(
    file_name: str,
    box: Sequence[float],
    *,
    size: int = 128,
    outlines: Sequence[Tuple[Sequence[float], Sequence[int]]] = (),
) -> np.ndarray:
    """A square crop around a box, with some context.

    Args:
        file_name: the image.
        box: XYXY_ABS in its pixels.
        size: side of the crop in pixels of the result.
        outlines: boxes to draw, each with its RGB colour; the last one lies on top.

    Returns:
        (size, size, 3) uint8, RGB; grey where the crop reaches beyond the image.
    """
    image = utils.read_image(file_name, format="RGB")
    x1, y1, x2, y2 = (float(v) for v in box)
    side = max(x2 - x1, y2 - y1, 1.0) * (1 + 2 * CROP_MARGIN)
    left, top = (x1 + x2 - side) / 2, (y1 + y2 - side) / 2
    scale = size / side
    to_crop = np.array([[scale, 0, -left * scale], [0, scale, -top * scale]])
    result = cv2.warpAffine(
        image, to_crop, (size, size), flags=cv2.INTER_LINEAR, borderValue=(128, 128, 128)
    )
    for outline, colour in outlines:
        corners = np.reshape(outline, (2, 2)) * scale + to_crop[:, 2]
        first, second = (tuple(int(round(v)) for v in corner) for corner in corners)
        cv2.rectangle(result, first, second, tuple(colour), 2)
    return result
