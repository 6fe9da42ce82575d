"""Whole runs on tiny detectors: training, checkpoints, resuming, evaluation, export, embedding."""

import copy
import errno
import logging
import os
import subprocess
import sys
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import KINDS, ROOT, scene_datasets
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.data import DatasetCatalog
from detectron2.engine import DefaultPredictor, defaults
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from globalkd import Distiller, add_globalkd_config
from globalkd.analysis.runs import load_run, load_whole, read_config, read_metrics
from globalkd.data import register_datasets
from globalkd.engine.disk import full_disk_told
from globalkd.engine.run_config import EVALUATED, kept_config
from globalkd.engine.trainer import DistillTrainer
from globalkd.export.student import export_student, stock_config
from globalkd.meta_arch import is_distilled
from globalkd.prototypes.refresh import PrototypeRefresher

sys.path.insert(0, str(ROOT))
import train_net

pytestmark = pytest.mark.slow
both = pytest.mark.parametrize("kind", list(KINDS))


def run(cfg, *, resume=False):
    """What train_net.py does, in this process."""
    Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
    Path(cfg.OUTPUT_DIR, "config.yaml").write_text(cfg.dump())
    register_datasets(cfg)
    torch.manual_seed(cfg.SEED)
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


@pytest.fixture(params=list(KINDS))
def finished(request, tiny_cfg):
    """A finished run of each detector: (cfg, trainer)."""
    cfg = tiny_cfg(request.param, "SOLVER.MAX_ITER", 2)
    return cfg, run(cfg)


def test_a_checkpoint_holds_the_stock_detector_and_the_rest_beside_it(finished, caplog):
    cfg, trainer = finished
    saved = torch.load(Path(cfg.OUTPUT_DIR, "model_final.pth"))
    stock = build_model(stock_config(cfg))
    assert list(saved["model"]) == list(stock.state_dict())
    assert any("adapters" in key for key in saved["distiller"])
    assert any("bank" in key for key in saved["distiller"])
    assert not any("teacher.backbone" in key for key in saved["distiller"])
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        DetectionCheckpointer(stock).load(str(Path(cfg.OUTPUT_DIR, "model_final.pth")))
    assert not caplog.records


def test_the_stock_predictor_reads_it_and_detects_the_same(finished, scenes):
    cfg, trainer = finished
    stock = stock_config(cfg)
    stock.MODEL.WEIGHTS = str(Path(cfg.OUTPUT_DIR, "model_final.pth"))
    image = cv2.imread(str(next(Path(scenes, "val").glob("*.png"))))
    theirs = DefaultPredictor(stock)(image)["instances"]
    model = trainer.model.eval()
    pixels = torch.as_tensor(image.transpose(2, 0, 1).copy())
    with torch.no_grad():
        ours = model([{"image": pixels, "height": 64, "width": 64}])[0]["instances"]
    torch.testing.assert_close(ours.scores, theirs.scores)


def test_export_writes_what_stock_detectron2_reads(finished, tmp_path):
    cfg, _ = finished
    for name in ("student.pth", "student.safetensors"):
        export_student(cfg.OUTPUT_DIR, str(tmp_path / name), num_images=2)
        assert (tmp_path / name).stat().st_size > 0
    with pytest.raises(ValueError, match=r"must end in .pth, .safetensors"):
        export_student(cfg.OUTPUT_DIR, str(tmp_path / "student.pkl"))


def test_a_loaded_run_has_its_prototypes_and_adapters(finished):
    cfg, trainer = finished
    model = load_run(cfg.OUTPUT_DIR, distiller=True)
    assert model.distiller.bank.is_ready
    expected = trainer.distiller.state_dict()
    assert all(torch.equal(expected[k], v) for k, v in model.distiller.state_dict().items())


def test_observations_are_logged(tiny_cfg):
    cfg = tiny_cfg("rcnn", "SOLVER.MAX_ITER", 21)
    run(cfg)
    names = {name for record in read_metrics(cfg.OUTPUT_DIR) for name in record}
    terms = {"loss_kd_global", "loss_kd_feature", "loss_kd_response"}
    assert terms <= names and {f"kd/ratio_{t}" for t in terms} <= names
    assert {"kd/reliability", "kd/discrepancy", "kd/num_instances", "bbox/AP"} <= names
    assert {"kd/classes_covered", "kd/refresh_seconds"} <= names


@both
def test_resuming_goes_on_with_adapters_prototypes_and_optimizer(kind, tiny_cfg):
    cfg = tiny_cfg(kind, "SOLVER.MAX_ITER", 2, "MODEL.GLOBALKD.PROTOTYPES.REFRESH_EPOCHS", 0.0)
    first = run(cfg)
    before = copy.deepcopy(first.distiller.bank.state_dict())
    cfg.SOLVER.MAX_ITER = 3
    second = run(cfg, resume=True)
    assert second.start_iter == 2
    after = second.distiller.bank.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before), "prototypes were made again"
    momentum = first.optimizer.state_dict()["state"]
    assert len(second.optimizer.state_dict()["state"]) == len(momentum) > 0


def test_prototypes_are_refreshed_every_fraction_of_an_epoch(tiny_cfg):
    cfg = tiny_cfg(
        "rcnn", "MODEL.GLOBALKD.PROTOTYPES.REFRESH_EPOCHS", 0.5, "SOLVER.MAX_ITER", 7
    )  # 12 images, 2 a step: an epoch is 6 steps
    register_datasets(cfg)
    trainer = DistillTrainer(cfg)
    calls = []
    refresher = trainer.distiller.refresher
    original = refresher.refresh
    refresher.refresh = lambda *a, **k: (calls.append(trainer.iter), original(*a, **k))[1]
    trainer.train()
    assert calls == [0, 3, 6]


def test_annotations_are_read_once_in_a_start_or_a_resume(tiny_cfg, monkeypatch):
    """They may be gigabytes: neither the pass for prototypes nor the right seed repeats it."""
    read = []

    def load(entry):
        read.append(entry)
        return load_coco(entry)

    load_coco = DatasetCatalog.get
    monkeypatch.setattr(DatasetCatalog, "get", load)
    cfg = tiny_cfg("rcnn", "SEED", -1, "DATASETS.TEST", ())
    trainer = run(cfg)
    once = list(cfg.DATASETS.TRAIN)
    assert read == once
    own = trainer.distiller.refresher
    cfg.SOLVER.MAX_ITER = 24  # of six an epoch: with refreshes
    resumed = run(cfg, resume=True)
    assert resumed.start_iter == 4 and resumed.data_loader.seed == trainer.data_loader.seed
    assert read == 2 * once
    by_itself = PrototypeRefresher(cfg)
    assert by_itself.epoch_iters == own.epoch_iters
    for expected, found in zip(by_itself.records, own.records, strict=True):
        np.testing.assert_equal(found, expected)


@pytest.mark.parametrize("case", ["none", "of other images"])
def test_a_refresher_of_ones_own_stays_as_it_was_built(case, scenes, tiny_cfg):
    """A trainer with a model of its own: the training loader's images are not its refresher's."""
    cfg = tiny_cfg("rcnn", "MODEL.GLOBALKD.LOSSES", ["PixelRelation"])
    register_datasets(cfg)
    own = None if case == "none" else PrototypeRefresher(cfg)
    if own is not None:
        own.source.datasets = [scene_datasets(scenes)[1][0]]

    class Trainer(DistillTrainer):
        @classmethod
        def build_model(cls, cfg):
            model = super().build_model(cfg)
            model.distiller.refresher = own
            return model

    refresher = Trainer(cfg).distiller.refresher
    assert refresher is own
    if own is not None:
        assert len(refresher.records) == 4  # of the validation scenes


def test_the_teacher_is_evaluated_before_the_first_step_if_asked(tiny_cfg, caplog):
    cfg = tiny_cfg("rcnn", "SOLVER.MAX_ITER", 1, "MODEL.GLOBALKD.TEACHER.EVAL_IMAGES", 2)
    with caplog.at_level(logging.INFO, logger="globalkd"):
        run(cfg)
    assert "Teacher before the first step" in caplog.text


def test_train_net_trains_resumes_and_evaluates(tiny_cfg, tmp_path):
    cfg = tiny_cfg("rcnn", "SOLVER.MAX_ITER", 2)
    config = tmp_path / "config.yaml"
    config.write_text(cfg.dump())
    _train_net(config)
    assert (
        "resumed at iteration 2" in _train_net(config, "--resume", "SOLVER.MAX_ITER", "3").lower()
    )
    weights = str(Path(cfg.OUTPUT_DIR, "model_final.pth"))
    written = Path(cfg.OUTPUT_DIR, "config.yaml").read_bytes()
    output = _train_net(config, "--eval-only", "MODEL.WEIGHTS", weights)
    assert "copypaste" in output and "Teacher" not in output
    # Of the run, with what its last command overrode; not of the evaluation.
    assert Path(cfg.OUTPUT_DIR, "config.yaml").read_bytes() == written
    assert read_config(cfg.OUTPUT_DIR).SOLVER.MAX_ITER == 3
    assert Path(cfg.OUTPUT_DIR, "config_eval.yaml").is_file()
    start = tmp_path / "start.pth"
    start.write_bytes(Path(weights).read_bytes())
    named = tmp_path / "named.yaml"
    named.write_text(f'_BASE_: "config.yaml"\nMODEL: {{WEIGHTS: "{start}"}}\n')
    assert f"add MODEL.WEIGHTS {weights}" in _train_net(named, "--eval-only")
    # Where there is no run the evaluation writes one, and keeps that it was a distilled student.
    elsewhere = str(tmp_path / "elsewhere")
    said = _refused(config, "--eval-only", "--resume", "OUTPUT_DIR", elsewhere)
    assert f"--resume: OUTPUT_DIR ({elsewhere}) has no checkpoint; give MODEL.WEIGHTS" in said
    assert "copypaste" in _train_net(config, "--eval-only", "--resume")
    _train_net(config, "--eval-only", "MODEL.WEIGHTS", weights, "OUTPUT_DIR", elsewhere)
    assert is_distilled(read_config(elsewhere))


@pytest.mark.faults
def test_an_evaluation_checks_its_data_before_it_builds_anything(tiny_cfg, monkeypatch):
    cfg = tiny_cfg("rcnn")
    register_datasets(cfg)
    cfg.DATASETS.TEST = (f"{cfg.DATASETS.TEST[0]}2",)
    monkeypatch.setattr(DistillTrainer, "build_model", None)
    with pytest.raises(ValueError, match="DATASETS.TEST names .* which is not registered"):
        train_net.evaluate(cfg, None)
    cfg.DATASETS.TEST = ()
    with pytest.raises(ValueError, match="DATASETS.TEST is empty: --eval-only has nothing"):
        train_net.evaluate(cfg, None)


@pytest.mark.faults
def test_weights_of_a_deeper_backbone_are_told(tiny_cfg, tmp_path, caplog, monkeypatch):
    deeper = ["MODEL.RESNETS.DEPTH", 34, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
    deep, cfg = (tiny_cfg("rcnn", *more, distill=False) for more in (deeper, []))
    assert cfg.MODEL.RESNETS.DEPTH == 18
    register_datasets(cfg)
    cfg.MODEL.WEIGHTS = str(tmp_path / "deep.pth")
    torch.save({"model": build_model(deep).state_dict()}, cfg.MODEL.WEIGHTS)
    with pytest.raises(ValueError, match=r"deep.pth holds \d+ entries of a backbone .* deeper one"):
        load_whole(build_model(cfg), cfg.MODEL.WEIGHTS)
    monkeypatch.setattr(DistillTrainer, "test", lambda cfg, model: {})
    train_net.evaluate(cfg, SimpleNamespace(resume=False, opts=[]))
    assert "entries of a backbone for which the detector has no place" in caplog.text


def _run_train_net(*args):
    command = [sys.executable, str(ROOT / "train_net.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def _train_net(config, *args):
    result = _run_train_net("--config-file", str(config), *args)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def _refused(config, *args):
    """The last line of a run that does not begin."""
    result = _run_train_net("--config-file", str(config), *args)
    assert result.returncode == 2 and "Traceback" not in result.stdout + result.stderr
    return result.stderr.splitlines()[-1]


@pytest.mark.faults
def test_a_mistake_ends_train_net_in_a_sentence(tiny_cfg, tmp_path):
    cfg = tiny_cfg("rcnn", distill=False)
    config = tmp_path / "x.yaml"
    config.write_text(cfg.dump())
    said = _refused(config, "DATASETS.TEST", "('nowhere',)")
    assert said.startswith("train_net.py: DATASETS.TEST names 'nowhere', which is not registered")
    log = Path(cfg.OUTPUT_DIR, "log.txt").read_text()
    assert "Traceback" in log and "names 'nowhere'" in log.splitlines()[-1]
    assert "OUTPUT_DIR is empty; it must name" in _refused(config, "OUTPUT_DIR", "")
    assert "--config-file is missing" in _run_train_net().stderr.splitlines()[-1]


@pytest.mark.faults
def test_a_full_disk_is_told_with_its_folder(tmp_path):
    with (
        pytest.raises(OSError, match=r"No space left.*OUTPUT_DIR \(.*/run\) \d+ MiB are free"),
        full_disk_told(str(tmp_path / "run")),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(RuntimeError, match="else$"), full_disk_told(str(tmp_path)):
        raise RuntimeError("something else")


FOREIGN = """
import sys, torch
from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer
from globalkd import add_globalkd_config, register_datasets

cfg = get_cfg()
add_globalkd_config(cfg)
cfg.merge_from_file(sys.argv[1])
register_datasets(cfg)
torch.manual_seed(0)
trainer = DefaultTrainer(cfg)  # somebody else's trainer: it knows nothing of distillation
trainer.checkpointer.add_checkpointable("distiller", trainer.model.distiller)
trainer.resume_or_load(resume=len(sys.argv) > 2)
distiller = trainer.model.distiller
print("embedded", distiller.bank.is_ready, sum(float(p.sum()) for p in distiller.parameters()))
trainer.train()
assert distiller.bank.is_ready
assert any("loss_kd_global" in name for name in trainer.storage.histories())
print("trained", distiller.bank.is_ready, sum(float(p.sum()) for p in distiller.parameters()))
"""


def test_a_foreign_project_needs_one_import_and_two_lines(tiny_cfg, tmp_path):
    """One line of Python is for `--resume`: it brings adapters and prototypes back."""
    cfg = tiny_cfg("rcnn", "SOLVER.MAX_ITER", 1, "DATASETS.TEST", ())
    (tmp_path / "foreign.py").write_text(FOREIGN)
    (tmp_path / "config.yaml").write_text(cfg.dump())

    def run(*args):
        command = [sys.executable, "foreign.py", "config.yaml", *args]
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 0, result.stderr[-3000:]
        lines = (x.split() for x in result.stdout.splitlines())
        return {x[0]: x[1:] for x in lines if x and x[0] in ("embedded", "trained")}

    first = run()
    assert first["embedded"][0] == "False" and first["trained"][0] == "True"
    cfg.SOLVER.MAX_ITER = 2
    (tmp_path / "config.yaml").write_text(cfg.dump())
    assert run("--resume")["embedded"] == first["trained"]


@pytest.mark.parametrize("name", ["gkd_R101_R50", "gkd_retinanet_R101_R50"])
def test_lazy_configs_build_and_train_a_step(name, scenes, tiny_cfg, batch):
    kind = "retinanet" if "retinanet" in name else "rcnn"
    cfg = tiny_cfg(kind)
    register_datasets(cfg)
    lazy = LazyConfig.load(str(ROOT / f"configs/lazy/{name}.py")).model
    teacher = lazy.distiller.teacher
    teacher.allow_random_weights = True
    teacher.config_file = cfg.MODEL.GLOBALKD.TEACHER.CONFIG_FILE
    teacher.opts = ["MODEL.DEVICE", "cpu"]
    lazy.distiller.refresher.source.datasets = [scene_datasets(scenes)[0][0]]
    lazy.distiller.refresher.source.augmentations = []
    lazy.distiller.refresher.source.min_box_size = 2.0
    lazy.distiller.refresher.source.num_workers = 0
    _ten_classes(lazy, kind)
    model = instantiate(lazy).train()
    with EventStorage():
        losses = model(batch)
    assert losses["loss_kd_global"] > 0
    sum(losses.values()).backward()


@pytest.mark.parametrize("name", ["gkd_R101_R50", "gkd_retinanet_R101_R50"])
def test_lazy_configs_distil_as_the_yaml_of_their_name(name):
    cfg = get_cfg()
    add_globalkd_config(cfg)
    cfg.merge_from_file(str(ROOT / f"configs/{name}.yaml"))
    cfg.MODEL.GLOBALKD.TEACHER.ALLOW_RANDOM_WEIGHTS = True
    cfg.MODEL.DEVICE = "cpu"
    expected = Distiller.from_config(cfg)
    given = LazyConfig.load(str(ROOT / f"configs/lazy/{name}.py")).model.distiller
    parameters = signature(Distiller.__init__).parameters.values()
    settings = {**{p.name: p.default for p in parameters}, **given}
    plain = [k for k, value in expected.items() if isinstance(value, (str, int, float))]
    assert {k: settings[k] for k in plain} == {k: expected[k] for k in plain}

    losses = [instantiate(loss) for loss in given.losses], expected["losses"]
    ours, theirs = ([(type(x), x.weights, x.use_reliability) for x in each] for each in losses)
    assert ours == theirs
    ours, theirs = instantiate(given.refresher), expected["refresher"]
    for part in ("generation", "images_per_batch", "refresh_epochs", "mode", "reservoir_size"):
        assert getattr(ours, part) == getattr(theirs, part), part
    for part in ("min_box_size", "max_images_per_class", "filter_empty", "seed"):
        assert getattr(ours.source, part) == getattr(theirs.source, part), part


@pytest.mark.parametrize("name", ["gkd_R101_R50", "gkd_retinanet_R101_R50"])
def test_lazy_configs_are_saved_as_a_start_does_and_follow_their_overrides(name, tmp_path):
    cfg = LazyConfig.load(str(ROOT / f"configs/lazy/{name}.py"))
    overrides = ["train.max_iter=70", "dataloader.train.total_batch_size=3"]
    cfg = LazyConfig.apply_overrides(cfg, overrides)
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    distiller = LazyConfig.load(str(tmp_path / "config.yaml")).model.distiller
    assert distiller.max_iter == 70 and distiller.refresher.images_per_batch == 3


def _ten_classes(lazy, kind):
    """As many classes as the scenes have."""
    if kind == "rcnn":
        lazy.roi_heads.num_classes = 10
    else:
        lazy.num_classes = 10
        lazy.distiller.losses = lazy.distiller.losses[:2]  # the quick teacher has other anchors


def test_resuming_with_other_losses_names_them(tiny_cfg):
    cfg = tiny_cfg("rcnn", "SOLVER.MAX_ITER", 1)
    run(cfg)
    cfg.MODEL.GLOBALKD.LOSSES = ["PixelRelation"]
    with pytest.raises(ValueError, match=r"other keys .*such as LOSSES.* Missing key") as error:
        run(cfg, resume=True)
    assert len(str(error.value)) < 1000


@pytest.mark.faults
def test_a_plain_run_cannot_be_resumed_as_a_distilled_one(tiny_cfg):
    cfg = tiny_cfg("rcnn", "SOLVER.MAX_ITER", 1, "MODEL.GLOBALKD.ENABLED", False)
    run(cfg)
    cfg.MODEL.GLOBALKD.ENABLED = True
    with pytest.raises(ValueError, match="other parameters than this run's.*plain student"):
        run(cfg, resume=True)


@pytest.mark.faults
def test_a_teacher_is_not_replaced_by_its_student(tiny_cfg):
    cfg = tiny_cfg("rcnn", "SOLVER.MAX_ITER", 1)
    mine = str(Path(cfg.OUTPUT_DIR, "model_final.pth"))
    teacher = cfg.MODEL.GLOBALKD.TEACHER
    teacher.WEIGHTS = mine
    with pytest.raises(ValueError, match="OUTPUT_DIR .*is where the teacher's weights lie"):
        run(cfg)
    # The same where the teacher's own configuration names them.
    teacher.WEIGHTS, teacher.ALLOW_RANDOM_WEIGHTS = "", False
    teacher.OPTS = [*teacher.OPTS, "MODEL.WEIGHTS", mine]
    with pytest.raises(ValueError, match="OUTPUT_DIR .*is where the teacher's weights lie"):
        run(cfg)


@pytest.mark.faults
@pytest.mark.parametrize("distill", [False, True])
def test_another_detector_does_not_resume(tiny_cfg, distill):
    """Its shapes are told, and config.yaml stays that of the weights that are there."""
    losses = ["MODEL.GLOBALKD.LOSSES", ["FitNet"]] if distill else []
    cfg = tiny_cfg("rcnn", "SOLVER.MAX_ITER", 1, *losses, distill=distill)
    run(cfg)
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 24
    cfg.SOLVER.MAX_ITER = 2
    with pytest.raises(ValueError, match=r"cannot be resumed: another detector.*box_head.*shape"):
        run(cfg, resume=True)


@pytest.mark.faults
def test_what_a_start_would_do_is_said(tiny_cfg, caplog):
    """To a run that is there; and what it lacks."""
    cfg = tiny_cfg("rcnn", "SOLVER.MAX_ITER", 1, "MODEL.GLOBALKD.ENABLED", False)
    run(cfg)
    assert "holds a run already" not in caplog.text
    run(cfg)
    assert "holds a run already" in caplog.text
    cfg.MODEL.WEIGHTS = "nowhere/model.pth"
    with pytest.raises(FileNotFoundError, match="MODEL.WEIGHTS: there is no file 'nowhere"):
        run(cfg)


@pytest.mark.faults
def test_a_refused_start_leaves_a_runs_config_as_it_is(tiny_cfg, tmp_path):
    cfg = tiny_cfg("rcnn", "SOLVER.MAX_ITER", 1, "MODEL.GLOBALKD.ENABLED", False)
    config = tmp_path / "x.yaml"
    config.write_text(cfg.dump())
    _train_net(config)
    written = Path(cfg.OUTPUT_DIR, "config.yaml")
    before = written.read_bytes()
    with pytest.raises(AssertionError, match="NUM_CLASSES is 9"):
        _train_net(config, "MODEL.ROI_HEADS.NUM_CLASSES", "9")
    assert written.read_bytes() == before
    assert "MAX_ITER is 0; it must be 1" in _refused(config, "SOLVER.MAX_ITER", "0")
    _train_net(config, "SOLVER.BASE_LR", "0.001", "SOLVER.MAX_ITER", "2")
    assert read_config(cfg.OUTPUT_DIR).SOLVER.BASE_LR == 0.001
    assert not Path(cfg.OUTPUT_DIR, "config_next.yaml").exists()
    # Nor does a resume that trains nothing replace it.
    assert "Nothing is left to train: " in _train_net(config, "--resume", "SOLVER.MAX_ITER", "1")
    assert read_config(cfg.OUTPUT_DIR).SOLVER.MAX_ITER == 2


def test_resuming_from_nothing_is_said(tiny_cfg, caplog):
    cfg = tiny_cfg("rcnn", "MODEL.GLOBALKD.ENABLED", False, distill=False)
    register_datasets(cfg)
    with caplog.at_level(logging.WARNING):
        DistillTrainer(cfg).resume_or_load(resume=True)
    assert f"OUTPUT_DIR ({cfg.OUTPUT_DIR}) has no checkpoint" in caplog.text


@pytest.mark.parametrize("forgotten", [False, True])
def test_resuming_without_the_distillers_state_is_said(forgotten, tiny_cfg, caplog):
    cfg = tiny_cfg("rcnn", "SOLVER.MAX_ITER", 1, "DATASETS.TEST", ())
    trainer = run(cfg)
    path = Path(cfg.OUTPUT_DIR, "model_final.pth")
    checkpoint = torch.load(path)
    assert checkpoint["distiller"]
    if forgotten:
        del checkpoint["distiller"]
        torch.save(checkpoint, path)
    cfg.SOLVER.MAX_ITER = 2
    caplog.clear()
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()
    said = "goes on at iteration 1 without the distiller's own state" in caplog.text
    assert said == forgotten


def test_evaluations_side_by_side_leave_the_runs_configuration(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("of the run")
    kept = (str(tmp_path), EVALUATED)
    with kept_config(*kept), kept_config(*kept):
        with defaults.PathManager.open(str(path), "w") as file:
            file.write("of the evaluation")
        assert path.read_text() == "of the run"
    assert (tmp_path / "config_eval.yaml").read_text() == "of the evaluation"
