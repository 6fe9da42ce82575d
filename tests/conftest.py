"""Shared fixtures: tiny digit scenes, tiny detectors and their configurations."""

from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from globalkd import add_globalkd_config
from globalkd.data import make_digit_scenes, register_datasets

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other

#: Overrides that make the quick configurations tiny.
TINY = [
    "MODEL.DEVICE", "cpu",
    "MODEL.FPN.OUT_CHANNELS", 32,
    "MODEL.RETINANET.NORM", "",  # GroupNorm needs more than 32 channels on a map of one cell
    "MODEL.ROI_BOX_HEAD.FC_DIM", 32,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 3,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16,
    "INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MAX_SIZE_TRAIN", 64,
    "INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 64,
    "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 4, "SOLVER.STEPS", (), "SOLVER.WARMUP_ITERS", 0,
    "SOLVER.BASE_LR", 0.005,
    "MODEL.GLOBALKD.TEACHER.ALLOW_RANDOM_WEIGHTS", True,
    "MODEL.GLOBALKD.TEACHER.WEIGHTS", "",
    "MODEL.GLOBALKD.PROTOTYPES.MIN_BOX_SIZE", 2.0,
    "MODEL.GLOBALKD.PROTOTYPES.NUM", 3,
    "DATALOADER.NUM_WORKERS", 0,
    "SEED", 7,
]  # fmt: skip
#: Further ones for a backbone of 0.2 million parameters, where many steps or checkpoints are made.
NARROW = [
    "MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16,
    "MODEL.RESNETS.STEM_OUT_CHANNELS", 16, "MODEL.RESNETS.WIDTH_PER_GROUP", 4,
]  # fmt: skip
KINDS = {"rcnn": "DistillGeneralizedRCNN", "retinanet": "DistillRetinaNet"}


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """Twelve training and four validation scenes of 64 pixels."""
    root = tmp_path_factory.mktemp("scenes")
    make_digit_scenes(root, num_train=12, num_val=4, image_size=64, seed=3)
    return root


def scene_datasets(scenes):
    return [
        [f"tiny_{scenes.name}_{split}", str(scenes / f"{split}.json"), str(scenes / split)]
        for split in ("train", "val")
    ]


@pytest.fixture
def tiny_cfg(scenes, tmp_path):
    """Builds a tiny configuration: `tiny_cfg("rcnn", "KEY", value, ..., distill=True)`."""

    def build(kind, *opts, distill=True, teacher=None):
        cfg = get_cfg()
        add_globalkd_config(cfg)
        cfg.merge_from_file(str(ROOT / f"configs/quick/Base-digits-{kind}.yaml"))
        cfg.merge_from_list(TINY)
        if distill:
            cfg.MODEL.META_ARCHITECTURE = KINDS[kind]
        teacher_file = ROOT / f"configs/quick/Base-digits-{teacher or kind}.yaml"
        cfg.MODEL.GLOBALKD.TEACHER.CONFIG_FILE = str(teacher_file)
        cfg.MODEL.GLOBALKD.TEACHER.OPTS = ["MODEL.FPN.OUT_CHANNELS", 64, "MODEL.RESNETS.DEPTH", 34]
        datasets = scene_datasets(scenes)
        cfg.DATASETS.COCO = datasets
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (datasets[0][0],), (datasets[1][0],)
        cfg.OUTPUT_DIR = str(tmp_path / "run")
        cfg.merge_from_list(list(opts))
        return cfg

    return build


@pytest.fixture
def batch():
    """Two images with four and no boxes."""
    return make_batch([4, 0])


def make_batch(counts, *, size=64, seed=0):
    """Images with the given numbers of random boxes, as the training loader gives them."""
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for count in counts:
        corner = torch.rand(count, 2, generator=generator) * (size / 2)
        side = torch.rand(count, 2, generator=generator) * (size / 3) + size / 8
        instances = Instances((size, size))
        instances.gt_boxes = Boxes(torch.cat([corner, corner + side], dim=1))
        instances.gt_classes = torch.randint(0, 10, (count,), generator=generator)
        image = torch.randint(0, 255, (3, size, size), generator=generator, dtype=torch.uint8)
        inputs.append({"image": image, "instances": instances, "height": size, "width": size})
    return inputs


@pytest.fixture
def untrained_run(tiny_cfg, tmp_path):
    """Output folder of a distilled run whose checkpoint holds random weights."""
    folder = tmp_path / "untrained"
    folder.mkdir()
    cfg = tiny_cfg("rcnn", "OUTPUT_DIR", str(folder))
    (folder / "config.yaml").write_text(cfg.dump())
    register_datasets(cfg)
    torch.manual_seed(0)
    model = build_model(cfg)
    checkpoint = {"model": model.state_dict(), "distiller": model.distiller.state_dict()}
    torch.save(checkpoint, folder / "model_final.pth")
    return folder


@pytest.fixture
def plain_run(tiny_cfg, untrained_run, tmp_path):
    """Output folder of a plain run with the weights of `untrained_run`."""
    folder = tmp_path / "plain"
    folder.mkdir()
    cfg = tiny_cfg("rcnn", "MODEL.GLOBALKD.ENABLED", False, distill=False)
    (folder / "config.yaml").write_text(cfg.dump())
    model = torch.load(untrained_run / "model_final.pth")["model"]
    torch.save({"model": model}, folder / "model_final.pth")
    return folder


@pytest.fixture
def catalogs():
    """Forget the datasets that a test registers."""
    before = set(DatasetCatalog)
    yield
    for name in set(DatasetCatalog) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
