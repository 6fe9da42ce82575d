"""tools/check.py: what it reports of a good configuration, and that it lists every problem."""

import importlib.util
import json
import logging
import shutil
import sys
from collections import Counter

import cv2
import pytest
import torch
from conftest import ROOT
from detectron2.modeling import build_model
from PIL import Image

from globalkd.checks.check import check_run, check_settings
from globalkd.checks.components import list_components
from globalkd.checks.data import check_datasets
from globalkd.checks.report import CheckReport
from globalkd.checks.step import Forecast, forecast
from globalkd.checks.terms import measure_terms
from globalkd.data import register_datasets
from globalkd.losses import DISTILL_LOSS_REGISTRY


@pytest.fixture
def checked():
    """Runs a check and gives its report and all that it said."""

    def run(cfg, **settings):
        said = []
        report = check_run(cfg, steps=1, prototype_images=4, echo=said.append, **settings)
        return report, "\n".join(said)

    return run


@pytest.mark.parametrize("kind", ["rcnn", "retinanet"])
def test_a_good_configuration_has_no_problem_and_is_not_changed(tiny_cfg, checked, kind):
    cfg = tiny_cfg(kind, "MODEL.RETINANET.NORM", "BN")
    before = cfg.dump()
    report, text = checked(cfg)
    assert report.problems == []
    assert cfg.dump() == before
    for expected in ("12 images", "FeatureKnowledge", "loss_kd_global", "the whole run"):
        assert expected in text
    assert any("random weights" in warning for warning in report.warnings)


def test_a_plain_configuration_can_be_checked(tiny_cfg, checked):
    report, text = checked(tiny_cfg("rcnn", distill=False))
    assert report.problems == [] and "the whole run" in text
    assert "nothing is distilled by GeneralizedRCNN" in text


@pytest.mark.parametrize("distill", [True, False])
def test_classes_with_few_prototypes_concern_a_distilled_run_alone(distill, tiny_cfg, checked):
    cfg = tiny_cfg("rcnn", "MODEL.GLOBALKD.PROTOTYPES.NUM", 50, distill=distill)
    assert ("and so with fewer prototypes" in checked(cfg)[1]) == distill


def test_no_gpu_is_one_process(tiny_cfg, checked):
    """With a GPU or without, train_net.py takes --num-gpus 0."""
    report, text = checked(tiny_cfg("rcnn", "MODEL.RETINANET.NORM", "BN"), num_gpus=0)
    assert report.problems == [] and "the whole run" in text


def test_a_run_is_forecast_as_its_processes_run_it(tiny_cfg, checked):
    opts = ["SOLVER.IMS_PER_BATCH", 8, "SOLVER.REFERENCE_WORLD_SIZE", 4, "SOLVER.MAX_ITER", 12]
    report, text = checked(tiny_cfg("rcnn", *opts))
    assert report.problems == [] and "48 steps of 2 images" in text
    report, text = checked(tiny_cfg("rcnn", "SOLVER.IMS_PER_BATCH", 3), num_gpus=2)
    assert any("IMS_PER_BATCH is 3; it must be a multiple" in p for p in report.problems)


def test_images_of_more_than_eight_bits_are_warned_of(tiny_cfg, checked, scenes, tmp_path):
    folder = tmp_path / "deep"
    folder.mkdir()
    for path in (scenes / "train").iterdir():
        deep = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE).astype("uint16") * 257
        cv2.imwrite(str(folder / path.name), deep)
    cfg = tiny_cfg("rcnn", "DATASETS.TRAIN", ("deep",))
    cfg.DATASETS.COCO = [*cfg.DATASETS.COCO, ["deep", str(scenes / "train.json"), str(folder)]]
    report, _ = checked(cfg)
    assert any("12 images of a sample have more than 8 bits" in w for w in report.warnings)


def copy_of_train(cfg, scenes, folder):
    """Let DATASETS.TRAIN be a copy of the training scenes; the paths of its images."""
    shutil.copytree(scenes / "train", folder)
    name = f"copy_{folder.parent.name}"
    cfg.DATASETS.COCO = [*cfg.DATASETS.COCO, [name, str(scenes / "train.json"), str(folder)]]
    cfg.DATASETS.TRAIN = (name,)
    return sorted(folder.iterdir())


def data_report(cfg):
    """What is reported of the datasets of a configuration."""
    report = CheckReport(lambda text: None)
    register_datasets(cfg)
    check_datasets(cfg, report, num_gpus=1)
    return report


@pytest.mark.faults
@pytest.mark.parametrize("key", ["TRAIN", "TEST"])
def test_missing_images_are_one_problem_that_hides_none(tiny_cfg, checked, scenes, tmp_path, key):
    cfg = tiny_cfg("rcnn", "MODEL.WEIGHTS", "nowhere/student.pth", distill=False)
    json_file = str(scenes / ("train.json" if key == "TRAIN" else "val.json"))
    name = f"lost_{tmp_path.name}"
    cfg.DATASETS.COCO = [*cfg.DATASETS.COCO, [name, json_file, str(tmp_path)]]
    cfg.DATASETS[key] = (name,)
    report, text = checked(cfg)
    lost, weights = report.problems
    assert "image files are missing" in lost and "nowhere/student.pth" in weights
    assert ("the whole run" in text) == (key == "TEST")


@pytest.mark.faults
@pytest.mark.parametrize("most", [2, 3])
def test_images_that_training_cannot_use_are_a_problem(tiny_cfg, scenes, tmp_path, catalogs, most):
    """Or a warning, where the run is to pass over so many."""
    cfg = tiny_cfg("rcnn", "DATALOADER.MAX_UNREADABLE_IMAGES", most)
    first, second, third, *_ = copy_of_train(cfg, scenes, tmp_path / "x")
    first.write_bytes(first.read_bytes()[:-30])
    Image.new("RGB", (9, 9)).save(second)
    third.write_text("hello")
    report = data_report(cfg)
    (text,) = report.problems if most == 2 else [w for w in report.warnings if "opened" in w]
    assert "3 of 12 images opened cannot be used, such as" in text and str(first) in text
    assert not report.problems or most == 2


@pytest.mark.faults
def test_images_with_an_orientation_are_warned_of(tiny_cfg, scenes, tmp_path, catalogs):
    cfg = tiny_cfg("rcnn")
    files = copy_of_train(cfg, scenes, tmp_path / "x")
    for path, orientation in zip(files, (1, 3, 6)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.open(path).save(path, exif=exif)
    report = data_report(cfg)
    assert report.problems == []
    (text,) = [w for w in report.warnings if "EXIF" in w]
    assert "2 images of a sample have an EXIF orientation" in text and str(files[1]) in text


@pytest.mark.faults
def test_a_turned_image_of_another_size_is_a_problem_that_names_its_tag(
    tiny_cfg, scenes, tmp_path, catalogs
):
    cfg = tiny_cfg("rcnn")
    exif = Image.Exif()
    exif[0x0112] = 6
    path = copy_of_train(cfg, scenes, tmp_path / "x")[0]
    Image.new("RGB", (64, 48)).save(path, exif=exif)
    (problem,) = data_report(cfg).problems
    assert "1 of 12 images opened" in problem and "EXIF orientation is 6" in problem


@pytest.mark.faults
@pytest.mark.parametrize("same_name", [True, False])
def test_a_test_set_of_the_training_annotations_is_warned_of(
    tiny_cfg, scenes, tmp_path, catalogs, same_name
):
    cfg = tiny_cfg("rcnn")
    name, json_file, folder = cfg.DATASETS.COCO[0]
    (tmp_path / "link.json").symlink_to(json_file)
    cfg.DATASETS.COCO = [*cfg.DATASETS.COCO, ["other", str(tmp_path / "link.json"), folder]]
    assert not any("same data" in w for w in data_report(cfg).warnings)
    cfg.DATASETS.TEST = (name if same_name else "other",)
    (text,) = [w for w in data_report(cfg).warnings if "same data" in w]
    assert f"DATASETS.TRAIN '{name}' and DATASETS.TEST" in text


@pytest.mark.faults
def test_every_problem_is_listed(tiny_cfg, checked, scenes):
    """Of data, teacher, student and levels: none hides another."""
    cfg = tiny_cfg("rcnn", "MODEL.WEIGHTS", "nowhere/student.pth")
    cfg.MODEL.GLOBALKD.TEACHER.ALLOW_RANDOM_WEIGHTS = False
    cfg.MODEL.GLOBALKD.TEACHER.WEIGHTS = "nowhere/teacher.pth"
    cfg.DATASETS.COCO = [*cfg.DATASETS.COCO, ["gone", str(scenes / "gone.json"), str(scenes)]]
    cfg.DATASETS.TEST = ("never_registered",)
    report, _ = checked(cfg)
    problems = "\n".join(report.problems)
    for expected in ("gone.json", "never_registered", "nowhere/teacher.pth", "nowhere/student.pth"):
        assert problems.count(expected) >= 1, expected
    cfg.MODEL.GLOBALKD.IN_FEATURES = ["p9"]
    assert any("p9" in problem for problem in checked(cfg)[0].problems)


@pytest.mark.faults
def test_data_that_cannot_be_trained_on_are_problems(tiny_cfg, checked, scenes, tmp_path):
    content = json.loads((scenes / "train.json").read_text())
    content["images"][0]["file_name"] = "lost.png"
    content["annotations"][0]["bbox"] = [0, 0, 0, 0]
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(content))
    cfg = tiny_cfg("rcnn", "MODEL.ROI_HEADS.NUM_CLASSES", 7)
    name = f"broken_{tmp_path.name}"
    cfg.DATASETS.COCO = [*cfg.DATASETS.COCO, [name, str(path), str(scenes / "train")]]
    cfg.DATASETS.TRAIN = (name,)
    report, _ = checked(cfg)
    problems, warnings = "\n".join(report.problems), "\n".join(report.warnings)
    assert "10 classes, but MODEL.ROI_HEADS.NUM_CLASSES is 7" in problems
    assert "1 of 12 image files are missing" in problems and "lost.png" in problems
    assert "dropped 1 boxes" in warnings


@pytest.mark.faults
def test_what_detectron2_warns_of_is_a_warning(tiny_cfg, checked, scenes, tmp_path):
    """But for what the report says itself: the entries of weights, and late SOLVER.STEPS."""
    content = json.loads((scenes / "train.json").read_text())
    lost = content["images"].pop()["id"]
    count = sum(a["image_id"] != lost for a in content["annotations"])
    (tmp_path / "x.json").write_text(json.dumps(content))
    cfg = tiny_cfg("rcnn", "SOLVER.STEPS", (99,), distill=False)
    name = f"lost_{tmp_path.name}"
    entry = [name, str(tmp_path / "x.json"), str(scenes / "train")]
    cfg.DATASETS.COCO = [*cfg.DATASETS.COCO, entry]
    cfg.DATASETS.TRAIN = (name,)
    state = build_model(cfg).backbone.state_dict()
    torch.save({"model": {f"backbone.{k}": v for k, v in state.items()}}, tmp_path / "start.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "start.pth")
    report, text = checked(cfg)
    total = len(content["annotations"])
    found = [w for w in report.warnings if f"{total} annotations, but only {count} of them" in w]
    assert len(found) == 1 and "entries filled from" in text and report.problems == []
    assert not any("checkpoint" in w for w in report.warnings)
    assert sum("SOLVER.STEPS" in w for w in report.warnings) == 1


def test_a_report_leaves_the_loggers_as_they_were():
    loggers = [logging.getLogger(name) for name in ("globalkd", "detectron2", "fvcore")]
    before = [(x.propagate, list(x.handlers)) for x in loggers]
    report = CheckReport(lambda text: None)
    with report.log_warnings():
        logging.getLogger("fvcore.nn").warning("something")
        for name in ("detectron2", "d2"):  # as it is after a handler of Detectron2's
            record = logging.LogRecord(f"{name}.solver.build", 30, "", 0, "late", (), None)
            logging.getLogger("detectron2").handle(record)
    assert report.warnings == ["something"]
    assert [(x.propagate, list(x.handlers)) for x in loggers] == before


@pytest.mark.faults
def test_a_test_set_that_is_not_there_hides_nothing_of_the_training(tiny_cfg, checked):
    cfg = tiny_cfg("rcnn", "MODEL.GLOBALKD.PROTOTYPES.MIN_BOX_SIZE", 100.0)
    cfg.DATASETS.TEST = ("never_registered",)
    problems = "\n".join(checked(cfg)[0].problems)
    assert "never_registered" in problems and "MIN_BOX_SIZE = 100 pixels" in problems


def add_test_set(cfg, scenes, path, change):
    """Let DATASETS.TEST be a changed copy of the validation scenes."""
    content = json.loads((scenes / "val.json").read_text())
    change(content)
    path.write_text(json.dumps(content))
    name = f"changed_{path.parent.name}"
    cfg.DATASETS.COCO = [*cfg.DATASETS.COCO, [name, str(path), str(scenes / "val")]]
    cfg.DATASETS.TEST = (name,)
    return name


@pytest.mark.faults
def test_other_classes_in_the_test_set_are_a_problem_that_hides_none(
    tiny_cfg, checked, scenes, tmp_path
):
    def change(content):
        content["categories"] = content["categories"][:8]  # a shorter list, in another order
        content["categories"][0]["name"], content["categories"][1]["name"] = "1", "0"
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] <= 7]

    cfg = tiny_cfg("rcnn", "MODEL.ROI_HEADS.NUM_CLASSES", 9, distill=False)
    name = add_test_set(cfg, scenes, tmp_path / "x.json", change)
    cfg.MODEL.WEIGHTS = "nowhere/student.pth"
    report, text = checked(cfg)
    problems = "\n".join(report.problems)
    assert "DATASETS.TRAIN and DATASETS.TEST differ" in problems and f"{name} has 8" in problems
    assert "has 10 classes, but MODEL.ROI_HEADS.NUM_CLASSES is 9" in problems
    assert "nowhere/student.pth" in problems and len(report.problems) == 3
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
    count = Counter(
        str(a["category_id"]) for a in json.loads((scenes / "val.json").read_text())["annotations"]
    )
    assert rows["1"][2] == str(count["0"])  # the row of a name, not of a place
    assert rows["9"][2:] == ["-", "-"]


@pytest.mark.faults
def test_an_empty_test_set_is_named_by_its_own_name(tiny_cfg, checked, scenes, tmp_path):
    cfg = tiny_cfg("rcnn")
    name = add_test_set(
        cfg, scenes, tmp_path / "x.json", lambda content: content.update(images=[], annotations=[])
    )
    report, text = checked(cfg)
    assert report.problems == [f"Datasets: DATASETS.TEST: '{name}' has no images to evaluate on"]
    assert "_first_" not in text and "== Levels" in text


@pytest.mark.faults
def test_a_misspelt_dataset_is_told_as_in_training(tiny_cfg):
    cfg = tiny_cfg("rcnn")
    register_datasets(cfg)
    name = cfg.DATASETS.TRAIN[0]
    cfg.DATASETS.TRAIN = (name + "s",)
    report = CheckReport(lambda text: None)
    assert not check_datasets(cfg, report, num_gpus=1)
    (problem,) = report.problems
    assert (
        problem.startswith(f"Datasets: DATASETS.TRAIN names '{name}s'") and f"'{name}'?" in problem
    )


def test_schedules_that_contradict_themselves_are_told(tiny_cfg):
    cfg = tiny_cfg(
        "rcnn",
        *("SOLVER.MAX_ITER", 100, "SOLVER.STEPS", (50, 200)),
        *("MODEL.GLOBALKD.STOP_ITER", 300, "MODEL.GLOBALKD.WARMUP_ITERS", 100),
    )
    report = CheckReport()
    check_settings(cfg, report)
    assert len(report.warnings) == 3
    for text, key in zip(report.warnings, ("STOP_ITER", "WARMUP_ITERS", "STEPS")):
        assert key in text


def step_of(tiny_cfg, batch, *opts):
    cfg = tiny_cfg("rcnn", *opts)
    register_datasets(cfg)
    model = build_model(cfg)
    if model.distiller.bank is not None:
        model.distiller.refresh(model, num_images=4)
    return measure_terms(model, batch)


def test_sizes_are_those_at_full_weight(tiny_cfg, batch):
    loss = ("MODEL.GLOBALKD.LOSSES", ["FitNet"], "SEED", 1)
    plain, warming = (
        step_of(tiny_cfg, batch, *loss, "MODEL.FPN.NORM", "", "MODEL.GLOBALKD.WARMUP_ITERS", n)
        for n in (0, 9)
    )
    # Weights are random in each: of the same order, not a tenth.
    assert warming.values["loss_kd_fitnet"] > 0.3 * plain.values["loss_kd_fitnet"]
    assert plain.instances == 4 and plain.unread == []


def test_levels_that_no_loss_reads_are_found(tiny_cfg, batch):
    key = "MODEL.GLOBALKD.INSTANCE_FEATURE.NUM_LEVELS"
    step = step_of(tiny_cfg, batch, "MODEL.GLOBALKD.LOSSES", ["InstanceFeature"], key, 2)
    assert step.unread == ["p4", "p5", "p6"]
    assert list(step.values) == ["loss_kd_instance_feature"]
    assert step.share(step.values)[1] > 0


def test_a_loss_is_judged_past_its_own_start(tiny_cfg, checked):
    """ICD's student learns from iteration START_ITER on; two of its terms train its decoder."""
    cfg = tiny_cfg("rcnn", "MODEL.GLOBALKD.LOSSES", ["ICD"], "MODEL.GLOBALKD.ICD.HIDDEN_DIM", 16)
    cfg.SOLVER.MAX_ITER = 2000
    cfg.MODEL.GLOBALKD.DECAY, cfg.MODEL.GLOBALKD.STOP_ITER = "linear", 1500
    report, _ = checked(cfg)
    warned = "\n".join(report.warnings)
    assert report.problems == [] and "ICD" not in warned
    assert "hardly teaches" not in warned and "no loss reads" not in warned
    cfg.MODEL.GLOBALKD.STOP_ITER = 1000
    check_settings(cfg, report)
    assert "ICD.START_ITER (1000) is not below the 1000 iterations" in "\n".join(report.warnings)


def test_a_measured_step_leaves_no_trace(tiny_cfg, batch):
    """Neither of a refresh of the prototypes, due in every iteration here, nor of the schedule."""
    cfg = tiny_cfg("rcnn", "MODEL.GLOBALKD.DECAY", "cosine")
    cfg.MODEL.GLOBALKD.PROTOTYPES.REFRESH_EPOCHS = 0.01
    register_datasets(cfg)
    model = build_model(cfg)
    model.distiller.refresh(model, num_images=4)
    before = {name: x.clone() for name, x in model.distiller.bank.state_dict().items()}
    schedule = model.distiller.schedule
    measure_terms(model, batch)
    after = model.distiller.bank.state_dict()
    assert all((x == after[name]).all() for name, x in before.items())
    assert model.distiller.schedule == schedule
    assert model.distiller.refresher.refresh_epochs == 0.01


def test_an_epoch_shorter_than_a_step_is_told(tiny_cfg, checked):
    report, text = checked(tiny_cfg("rcnn", "SOLVER.IMS_PER_BATCH", 24, "SOLVER.MAX_ITER", 3))
    (warning,) = [w for w in report.warnings if "REFRESH_EPOCHS (1)" in w]
    assert "an epoch is 0.5 steps long" in warning and "made before every step" in text
    (refreshes,) = [x for x in text.splitlines() if x.startswith("prototype refreshes")]
    assert refreshes.split()[2] == "3"


def test_a_forecast_adds_up(tiny_cfg):
    cfg = tiny_cfg("rcnn", "SOLVER.MAX_ITER", 100, "TEST.EVAL_PERIOD", 50)
    register_datasets(cfg)
    known = {"step": 2.0, "refresh": 10.0, "image": 0.5, "num_gpus": 1}
    cost = forecast(cfg, period=30, **known)
    assert cost == Forecast(
        steps=200.0, refreshes=40.0, evaluations=4.0, num_refreshes=4, num_evaluations=2
    )
    assert cost.total == 244.0
    assert forecast(cfg, period=0, **known).num_refreshes == 1
    assert forecast(cfg, period=0.3, **known).num_refreshes == 100  # one a step, not more
    assert forecast(cfg, period=30, **{**known, "num_gpus": 2}).refreshes == 20.0
    cfg.MODEL.GLOBALKD.STOP_ITER = 30
    assert forecast(cfg, period=30, **known).num_refreshes == 1


def test_everything_that_can_be_named_is_listed_with_a_line():
    listed = list_components()
    assert len(listed) == 4
    of_tests = {n for n, x in DISTILL_LOSS_REGISTRY if not x.__module__.startswith("globalkd.")}
    for rows in listed.values():
        assert all(name and line for name, line in rows if name not in of_tests)
    assert "GlobalKnowledge" in dict(listed["MODEL.GLOBALKD.LOSSES"])


@pytest.mark.faults
def test_the_tool_fails_with_the_configuration(tmp_path, monkeypatch, capsys):
    path = tmp_path / "config.yaml"
    path.write_text("MODEL: {GLOBALKD: {TEACHR: 1}}\nVERSION: 2\n")
    spec = importlib.util.spec_from_file_location("check_tool", ROOT / "tools" / "check.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(sys, "argv", ["check.py", "--config-file", str(path)])
    assert tool.main() == 1 and "TEACHR" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["check.py", "--list"])
    assert tool.main() == 0 and "GlobalKnowledge" in capsys.readouterr().out
