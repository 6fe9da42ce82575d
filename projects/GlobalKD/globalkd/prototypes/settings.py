"""What prototypes are made from and how, read from a config."""

from dataclasses import dataclass, field
from typing import Sequence

from detectron2.config import CfgNode
from detectron2.data import transforms as T


@dataclass
class GenerationSettings:
    """How prototypes are chosen; the keys of MODEL.GLOBALKD.PROTOTYPES.

    Attributes:
        generator: a name in PROTOTYPE_GENERATOR_REGISTRY.
        num_prototypes: P. A class with fewer candidates gets as many prototypes as it has.
        lam: weight of the agreement between the two spaces in Eq. (2), >= 0.
        normalize: choose among features of unit length. The result is raw in any case.
        density_percentile: only instances above this percentile of the density in both spaces are
            candidates, see `dense_instances`; where that leaves none, all are. 0: no such filter.
        space: the space in which "kmeans" and "dbscan" cluster: "teacher" or "student".
        dbscan_eps: radius of "dbscan", in units of the median nearest-neighbour distance.
        seed: of the generators that draw random numbers.
    """

    generator: str = "pursuit"
    num_prototypes: int = 10
    lam: float = 10.0
    normalize: bool = True
    density_percentile: float = 0.0
    space: str = "teacher"
    dbscan_eps: float = 2.0
    seed: int = 1

    @staticmethod
    def from_config(cfg: CfgNode) -> "GenerationSettings":
        node = cfg.MODEL.GLOBALKD.PROTOTYPES
        return GenerationSettings(
            generator=node.GENERATOR,
            num_prototypes=node.NUM,
            lam=node.LAMBDA,
            normalize=node.NORMALIZE,
            density_percentile=node.DENSITY_PERCENTILE,
            space=node.SPACE,
            dbscan_eps=node.DBSCAN_EPS,
            seed=node.SEED,
        )


@dataclass
class ImageSource:
    """Where the instances come from, and how images are read.

    Attributes:
        datasets: registered names.
        filter_empty: leave out images without annotations, as training does.
        min_keypoints: leave out images with fewer visible keypoints; 0 for no such filter.
        min_box_size: boxes with a side below it, in pixels of the original image, are left out.
        max_images_per_class: 0 for no limit.
        seed: of the choice of images.
        augmentations: without chance, such as the resizing of evaluation.
        num_workers: processes that read images.
        feature_dir: folder for features in memory-mapped files; empty: in memory.
        max_unreadable: images that may be unreadable and are passed over.
    """

    datasets: Sequence[str]
    filter_empty: bool = True
    min_keypoints: int = 0
    min_box_size: float = 30.0
    max_images_per_class: int = 800
    seed: int = 1
    augmentations: Sequence[T.Augmentation] = field(default_factory=list)
    num_workers: int = 0
    feature_dir: str = ""
    max_unreadable: int = 0

    @property
    def images(self) -> tuple:
        """What decides which images there are, in which order."""
        return tuple(self.datasets), self.filter_empty, self.min_keypoints

    @staticmethod
    def from_config(cfg: CfgNode) -> "ImageSource":
        node = cfg.MODEL.GLOBALKD.PROTOTYPES
        resize = T.ResizeShortestEdge(
            [cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST], cfg.INPUT.MAX_SIZE_TEST
        )
        return ImageSource(
            datasets=cfg.DATASETS.TRAIN,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=min_keypoints(cfg),
            min_box_size=node.MIN_BOX_SIZE,
            max_images_per_class=node.MAX_IMAGES_PER_CLASS,
            seed=node.SEED,
            augmentations=[resize] if cfg.INPUT.MIN_SIZE_TEST > 0 else [],
            num_workers=cfg.DATALOADER.NUM_WORKERS,
            feature_dir=node.FEATURE_DIR,
            max_unreadable=cfg.DATALOADER.MAX_UNREADABLE_IMAGES,
        )


def min_keypoints(cfg: CfgNode) -> int:
    """The number of visible keypoints that an image needs to be trained on."""
    return cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
