"""configs/: every file loads, says nothing in vain, and names teachers and starts that exist."""

from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from globalkd import add_globalkd_config

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
FILES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml"))
LEAVES = [name for name in FILES if not Path(name).name.startswith("Base-")]
ZOO = model_zoo.model_zoo._ModelZooUrls
#: ImageNet weights that Detectron2's MODEL_ZOO.md lists.
IMAGENET = {
    "detectron2://ImageNetPretrained/MSRA/R-50.pkl",
    "detectron2://ImageNetPretrained/MSRA/R-101.pkl",
    "detectron2://ImageNetPretrained/FAIR/X-101-32x8d.pkl",
}
#: Made by hand, as the comment of the config that names it says.
CONVERTED = {"output/ImageNet/R-152.pkl"}


@pytest.fixture(autouse=True)
def in_repository_root(monkeypatch):
    """Paths in the configs are seen from there."""
    monkeypatch.chdir(ROOT)


@pytest.fixture
def build(monkeypatch):
    """Builds a detector in no time: without random weights, and without reading the teacher's."""
    for name in ("normal_", "uniform_", "kaiming_normal_", "kaiming_uniform_"):
        monkeypatch.setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor)
    monkeypatch.setattr("globalkd.teacher.building.load_teacher_weights", lambda *_, **__: None)

    def build_on_cpu(cfg):
        cfg.MODEL.DEVICE = "cpu"
        return build_model(cfg)

    return build_on_cpu


@cache
def frozen(name):
    cfg = get_cfg()
    add_globalkd_config(cfg)
    cfg.merge_from_file(str(CONFIGS / name))
    cfg.freeze()
    return cfg


def load(name):
    cfg = frozen(name).clone()
    cfg.defrost()
    return cfg


def own_keys(name):
    """What a file itself sets: the nested dictionary, without its _BASE_."""
    with open(CONFIGS / name) as f:
        keys = yaml.safe_load(f)
    return keys.pop("_BASE_", None), keys


def base_of(name):
    """The config file that a file stands on, relative to configs/; None for a root."""
    base, _ = own_keys(name)
    if base is None:
        return None
    return str((CONFIGS / name).parent.joinpath(base).resolve().relative_to(CONFIGS))


def flatten(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def at(cfg, key):
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def is_distilled(name):
    return frozen(name).MODEL.META_ARCHITECTURE.startswith("Distill")


DISTILLED = [name for name in LEAVES if is_distilled(name)]


def may_equal_its_base(name, key):
    """A released or ablated setting is stated whatever the default is; nothing else is."""
    path = Path(name)
    stated = path.stem.endswith("_released") or path.parts[0] == "ablation"
    return stated and key.startswith("MODEL.GLOBALKD.")


@pytest.mark.parametrize("name", FILES)
def test_loads_with_a_schedule_in_order(name):
    solver = frozen(name).SOLVER
    assert list(solver.STEPS) == sorted(solver.STEPS)
    assert max(solver.STEPS, default=0) < solver.MAX_ITER


@pytest.mark.parametrize("name", FILES)
def test_begins_with_a_comment_that_says_what_it_is(name):
    first = (CONFIGS / name).read_text().splitlines()[0]
    assert first.startswith("# ") and first.endswith(".")


@pytest.mark.parametrize("name", LEAVES)
def test_no_line_repeats_what_the_base_says(name):
    cfg, base = frozen(name), frozen(base_of(name))
    dead = [
        key
        for key, _ in flatten(own_keys(name)[1])
        if at(cfg, key) == at(base, key) and not may_equal_its_base(name, key)
    ]
    assert not dead, f"{name} sets {dead} to what {base_of(name)} sets them to already"


@pytest.mark.parametrize("name", LEAVES)
def test_leaf_is_short_and_stands_on_a_file_of_ours(name):
    lines = [x.strip() for x in (CONFIGS / name).read_text().splitlines()]
    assert len([x for x in lines if x and not x.startswith("#")]) <= 20
    assert base_of(name) in FILES


def test_no_two_leaves_write_to_one_folder():
    folders = {}
    for name in LEAVES:
        folders.setdefault(str(Path(frozen(name).OUTPUT_DIR)), []).append(name)
    assert {k: v for k, v in folders.items() if len(v) > 1} == {}


def is_made_by_one_of(weights):
    """Whether a config of ours writes this checkpoint."""
    return any(Path(frozen(x).OUTPUT_DIR, "model_final.pth") == Path(weights) for x in LEAVES)


def is_in_zoo(weights):
    prefix, _, path = weights.partition("://")
    urls = {f"{name}/{suffix}" for name, suffix in ZOO.CONFIG_PATH_TO_URL_SUFFIX.items()}
    return prefix == "detectron2" and path in urls


@pytest.mark.parametrize("name", LEAVES)
def test_start_weights_are_known(name):
    weights = frozen(name).MODEL.WEIGHTS
    known = IMAGENET | CONVERTED | {""}
    assert weights in known or is_in_zoo(weights) or is_made_by_one_of(weights), weights


@pytest.mark.parametrize("name", DISTILLED)
def test_teacher_resolves(name):
    """To a config of ours and the checkpoint that it writes, or to a zoo name with weights."""
    teacher = frozen(name).MODEL.GLOBALKD.TEACHER
    if Path(teacher.CONFIG_FILE).is_file():
        made = str(Path(teacher.CONFIG_FILE).relative_to("configs"))
        assert not is_distilled(made)
        assert Path(teacher.WEIGHTS) == Path(frozen(made).OUTPUT_DIR, "model_final.pth")
    else:
        assert Path(model_zoo.get_config_file(teacher.CONFIG_FILE)).is_file()
        assert teacher.WEIGHTS or ZOO.query(teacher.CONFIG_FILE)


@pytest.mark.parametrize("name", DISTILLED)
def test_control_differs_in_distillation_alone(name):
    """Below a distilled leaf stands its control: same detector, start, data and schedule."""
    control = base_of(name)
    while is_distilled(control):
        control = base_of(control)
    assert not Path(control).name.startswith("Base-"), f"{name} stands on no control"
    distilled, plain = dict(flatten(frozen(name))), dict(flatten(frozen(control)))
    differing = {key for key, value in distilled.items() if value != plain[key]}
    allowed = ("MODEL.GLOBALKD.", "MODEL.META_ARCHITECTURE", "OUTPUT_DIR")
    assert {key for key in differing if not key.startswith(allowed)} == set()
    assert distilled["MODEL.META_ARCHITECTURE"] == f"Distill{plain['MODEL.META_ARCHITECTURE']}"


@pytest.mark.parametrize(
    ("name", "zoo_name"),
    [
        ("student_R50.yaml", "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"),
        ("teacher_R101.yaml", "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml"),
        ("student_retinanet_R50.yaml", "COCO-Detection/retinanet_R_50_FPN_1x.yaml"),
        ("teacher_retinanet_R101.yaml", "COCO-Detection/retinanet_R_101_FPN_3x.yaml"),
    ],
)
def test_detector_is_the_zoos_so_that_its_checkpoint_fits(name, zoo_name):
    ours, theirs = frozen(name).MODEL, model_zoo.get_config(zoo_name).MODEL
    ignored = ("GLOBALKD.", "WEIGHTS", "DEVICE")
    ours = {k: v for k, v in flatten(ours) if not k.startswith(ignored)}
    theirs = {k: v for k, v in flatten(theirs) if not k.startswith(ignored)}
    assert ours == theirs


@pytest.mark.parametrize("name", LEAVES)
def test_stock_detector_builds_with_the_classes_of_its_data(name, build):
    cfg = load(name)
    cfg.MODEL.META_ARCHITECTURE = cfg.MODEL.META_ARCHITECTURE.removeprefix("Distill")
    model = build(cfg)
    classes = getattr(model, "roi_heads", model).num_classes
    known = {"coco_2017_train": 80, "voc_2007_trainval": 20, "digit_scenes_train": 10}
    assert classes == {**known, "bccd_train": 3}[cfg.DATASETS.TRAIN[0]]


@pytest.mark.parametrize("name", DISTILLED)
def test_distilling_detector_builds_with_its_teacher(name, build):
    """Levels match, losses and prototypes fit the pair; weights are not read."""
    cfg = load(name)
    distiller = build(cfg).distiller
    own = range(3, 8) if "RetinaNet" in cfg.MODEL.META_ARCHITECTURE else range(2, 7)
    levels = cfg.MODEL.GLOBALKD.IN_FEATURES or [f"p{i}" for i in own]
    assert [pair.student for pair in distiller.levels] == levels
    assert [f"p{pair.stride.bit_length() - 1}" for pair in distiller.levels] == levels
    assert list(distiller.losses) == cfg.MODEL.GLOBALKD.LOSSES
