"""Interrupting a training, in every way, and going on: equal to a run that was not interrupted."""

import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import KINDS, NARROW, ROOT
from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer
from detectron2.utils import comm
from processes import run_alone, run_in_processes, run_unsupervised

import globalkd.prototypes.refresh
from globalkd import add_globalkd_config
from globalkd.data import register_datasets
from globalkd.data.resumable_loader import _SeededDataset
from globalkd.engine.coco_evaluation import FastCOCOEvaluator
from globalkd.engine.trainer import DistillTrainer
from globalkd.prototypes import extraction
from globalkd.random_state import seed_all

pytestmark = pytest.mark.slow
both = pytest.mark.parametrize("kind", list(KINDS))

#: Steps 0 to 5, a checkpoint after every second one, new prototypes before 0, 3 and 5, random
#: augmentation, images that wait in groups, and BatchNorm, whose statistics are state.
OPTS = [
    "SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 2, "DATASETS.TEST", (),
    "MODEL.GLOBALKD.PROTOTYPES.REFRESH_EPOCHS", 0.4,
    "INPUT.MIN_SIZE_TRAIN", (48, 56, 64),
    "DATALOADER.ASPECT_RATIO_GROUPING", True,
]  # fmt: skip


@pytest.fixture
def config(tiny_cfg, tmp_path):
    """Writes a configuration: `config("rcnn", "name of the run", "KEY", value, ...)`."""

    def write(kind, name, *opts, **kwargs):
        folder = tmp_path / name
        folder.mkdir()
        cfg = tiny_cfg(kind, *OPTS, *NARROW, *opts, "OUTPUT_DIR", str(folder), **kwargs)
        cfg.MODEL.GLOBALKD.TEACHER.OPTS = [*NARROW, "MODEL.FPN.OUT_CHANNELS", 64]
        path = tmp_path / f"{name}.yaml"
        path.write_text(cfg.dump())
        return path

    return write


def read(path):
    cfg = get_cfg()
    add_globalkd_config(cfg)
    cfg.merge_from_file(str(path))
    register_datasets(cfg)
    return cfg


def train(path, interrupt=None, step=None):
    """What train_net.py does; `interrupt(trainer, step)` arranges how the training is cut short."""
    cfg = read(path)
    torch.manual_seed(cfg.SEED)
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=True)
    if interrupt:
        interrupt(trainer, step)
    trainer.train()


def train_on_many(rank, path, interrupt=None, step=None):
    """`train` in one of several processes; returns the exit code."""
    try:
        train(path, interrupt if rank == 1 else None, step)
    except SystemExit as ended:
        return ended.code
    return 0


def kill(number=signal.SIGKILL):
    os.kill(os.getpid(), number)


def before_step(trainer, step, action=kill):
    original = trainer._trainer.run_step

    def run_step():
        if trainer.iter == step:
            action()
        original()

    trainer._trainer.run_step = run_step


def during_refresh(trainer, step):
    def generate(*args, **kwargs):
        if trainer.iter == step:
            kill()
        return original(*args, **kwargs)

    original = globalkd.prototypes.refresh.generate_prototypes
    globalkd.prototypes.refresh.generate_prototypes = generate


def while_saving(trainer, step):
    """Killed with half of the checkpoint in the file."""

    def save(data, file, **kwargs):
        if "iteration" in data and trainer.iter == step:
            file.write(b"half of it")
            file.flush()
            kill()
        original(data, file, **kwargs)

    original, torch.save = torch.save, save


def after_saving(trainer, step):
    """Killed when the checkpoint is there and last_checkpoint does not name it yet."""

    def tag(name):
        if trainer.iter == step:
            kill()
        original(name)

    original = trainer.checkpointer.tag_last_checkpoint
    trainer.checkpointer.tag_last_checkpoint = tag


def image_lost(trainer, step):
    """An image that cannot be read."""

    def get(dataset, item):
        if trainer.iter == step:
            raise OSError("lost.png")
        return original(dataset, item)

    original, _SeededDataset.__getitem__ = _SeededDataset.__getitem__, get


def evaluation_broken(trainer, step):
    def process(*args, **kwargs):
        raise OSError("lost.png")

    FastCOCOEvaluator.process = process


def sigterm_to_all(trainer, step):
    """SIGTERM from elsewhere to this process and its loader workers, as clusters send it."""
    os.setpgrp()
    before_step(trainer, step, terminate_group)


def terminate_group():
    command = ["kill", "-TERM", "--", f"-{os.getpid()}"]
    subprocess.run(command, start_new_session=True, check=True)


def _while_workers_read(owner, name, trainer, step):
    """SIGTERM to all the first time that `owner.name` is called at a step."""
    os.setpgrp()
    original, sent = getattr(owner, name), []

    def called(*args, **kwargs):
        if trainer.iter == step and not sent:
            sent.append(True)
            terminate_group()
            time.sleep(0.5)  # for whoever does not bear it
        return original(*args, **kwargs)

    setattr(owner, name, called)


def sigterm_in_a_pass(trainer, step):
    _while_workers_read(extraction, "_extract_batch", trainer, step)


def sigterm_in_an_evaluation(trainer, step):
    _while_workers_read(FastCOCOEvaluator, "process", trainer, step)


def sigterm(trainer, step):
    before_step(trainer, step, lambda: kill(signal.SIGTERM))


def last_checkpoint(path):
    return (path.with_suffix("") / "last_checkpoint").read_text()


def final_state(path):
    assert last_checkpoint(path) == "model_final.pth"
    return torch.load(path.with_suffix("") / "model_final.pth")


def differences(a, b, name=""):
    """Names of what differs between two checkpoints, down to the bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        if list(a) != list(b):
            return [f"{name}: {set(a) ^ set(b)}"]
        return [x for k in a for x in differences(a[k], b[k], f"{name}/{k}")]
    if isinstance(a, (list, tuple)) and len(a) == len(b):
        return [x for i in range(len(a)) for x in differences(a[i], b[i], f"{name}/{i}")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if same else [name]


@both
def test_killed_anywhere_and_resumed_equals_uninterrupted(kind, config):
    whole = config(kind, "whole")
    assert run_alone(train, whole) == (0, "")
    part = config(kind, "part", "DATALOADER.NUM_WORKERS", 2)
    some_step = random.Random(kind).choice([2, 3])
    for interrupt, step, checkpoint in [
        (while_saving, 1, None),
        (before_step, some_step, "model_0000001.pth"),
        (during_refresh, 3, "model_0000001.pth"),
        (after_saving, 3, "model_0000001.pth"),
    ]:
        code, error = run_alone(train, part, interrupt, step)
        assert code == -signal.SIGKILL, error
        assert checkpoint is None or last_checkpoint(part) == checkpoint
    code, error = run_alone(train, part, sigterm_to_all, 4)
    assert code == 128 + signal.SIGTERM, error
    assert last_checkpoint(part) == "model_0000004.pth"
    assert run_alone(train, part) == (0, "")
    assert differences(final_state(whole), final_state(part)) == []


@pytest.mark.faults
@both
@pytest.mark.parametrize(("interrupt", "saved"), [(image_lost, 2), (evaluation_broken, 3)])
def test_an_error_of_an_image_or_an_evaluation_loses_no_step(kind, config, interrupt, saved):
    """The state is whole and saved, though no checkpoint is due: the end is the same to the bit."""
    whole = config(kind, "whole")
    assert run_alone(train, whole) == (0, "")
    part = config(kind, "part", "SOLVER.CHECKPOINT_PERIOD", 100, "TEST.EVAL_PERIOD", 4)
    cfg = read(part)
    cfg.DATASETS.TEST = (cfg.DATASETS.COCO[1][0],)
    part.write_text(cfg.dump())
    code, error = run_alone(train, part, interrupt, 3)
    assert code == 1 and "lost.png" in error
    assert last_checkpoint(part) == "model_last.pth"
    assert torch.load(part.with_suffix("") / "model_last.pth")["iteration"] == saved
    assert run_alone(train, part) == (0, "")
    expected, found = final_state(whole), final_state(part)
    for state in (expected, found):
        del state["run"]["settings"]  # the periods
    assert differences(expected, found) == []


@pytest.mark.parametrize(
    ("interrupt", "saved"), [(sigterm_in_a_pass, 3), (sigterm_in_an_evaluation, 4)]
)
def test_a_signal_to_all_while_other_loaders_read_is_none_to_their_workers(
    interrupt, saved, config
):
    """What was begun is finished, the step after it as well, and saved."""
    path = config("rcnn", "run", "DATALOADER.NUM_WORKERS", 2, "TEST.EVAL_PERIOD", 4)
    cfg = read(path)
    cfg.DATASETS.TEST = (cfg.DATASETS.COCO[1][0],)
    cfg.SOLVER.CHECKPOINT_PERIOD = 100
    path.write_text(cfg.dump())
    code, error = run_alone(train, path, interrupt, 3)
    assert code == 128 + signal.SIGTERM, error
    assert last_checkpoint(path) == f"model_{saved:07d}.pth"


def train_on_two_machines(rank, path, folder):
    """The second process sees another folder: OUTPUT_DIR lies on a local disk."""
    cfg = read(path)
    cfg.OUTPUT_DIR = folder if rank == 1 else cfg.OUTPUT_DIR
    DistillTrainer(cfg).resume_or_load(resume=True)


@pytest.mark.faults
@pytest.mark.parametrize("distilled", [False, True])
def test_machines_that_do_not_all_have_the_checkpoint_do_not_begin(config, tmp_path, distilled):
    opts = ("MODEL.GLOBALKD.ENABLED", distilled, "SOLVER.IMS_PER_BATCH", 4)
    path = config("rcnn", "run", *opts, "SOLVER.MAX_ITER", 2)
    assert run_in_processes(train_on_many, tmp_path, path) == [0, 0]
    (tmp_path / "local").mkdir()
    ends = run_unsupervised(train_on_two_machines, tmp_path, path, str(tmp_path / "local"))
    for code, error in ends:
        assert code == 1 and "would begin at the iterations [2, 0]" in error


def test_a_plain_student_without_a_seed_resumes_too(config):
    """Its seed is drawn, and stands in the checkpoint."""
    whole = config("retinanet", "whole", "SEED", -1, "MODEL.GLOBALKD.ENABLED", False)
    assert run_alone(train, whole)[0] == 0
    folder = whole.with_suffix("")
    expected = final_state(whole)
    (folder / "last_checkpoint").write_text("model_0000001.pth")
    assert run_alone(train, whole) == (0, "")
    assert differences(expected, final_state(whole)) == []


def test_two_processes_resume_to_the_bit_and_stop_where_one_was_asked(config, tmp_path):
    """Each has its own BatchNorm statistics, loss normaliser and reservoir."""
    opts = ("MODEL.GLOBALKD.PROTOTYPES.REFRESH", "harvest", "SOLVER.IMS_PER_BATCH", 4)
    whole = config("retinanet", "whole", *opts)
    assert run_in_processes(train_on_many, tmp_path, whole) == [0, 0]
    part = config("retinanet", "part", *opts)
    stopped = run_in_processes(train_on_many, tmp_path, part, sigterm, 2)
    assert stopped == [128 + signal.SIGTERM] * 2
    assert last_checkpoint(part) == "model_0000002.pth"
    assert run_in_processes(train_on_many, tmp_path, part) == [0, 0]
    assert differences(final_state(whole), final_state(part)) == []


@pytest.mark.faults
def test_the_other_process_ends_when_one_is_killed(config, tmp_path):
    path = config("rcnn", "run", "MODEL.GLOBALKD.ENABLED", False)
    other, killed = run_unsupervised(train_on_many, tmp_path, path, before_step, 2)
    assert killed == (-signal.SIGKILL, "")
    assert other[0] == 1
    assert "Process 0 lost the connection to another process of this training" in other[1]


def test_train_net_on_two_processes_stops_and_says_how(config, tmp_path):
    opts = ("MODEL.GLOBALKD.ENABLED", False, "SOLVER.MAX_ITER", 10**5)
    path = config("rcnn", "run", *opts, "SOLVER.CHECKPOINT_PERIOD", 1)
    command = [sys.executable, str(ROOT / "train_net.py"), "--config-file", str(path)]
    command += ["--num-gpus", "2", "--dist-url", f"file://{tmp_path}/store"]
    output = tmp_path / "output"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    with output.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        while not (path.with_suffix("") / "last_checkpoint").exists():
            assert process.poll() is None, output.read_text()[-3000:]
            time.sleep(0.2)
        process.terminate()
        assert process.wait() == 128 + signal.SIGTERM, output.read_text()[-3000:]
    finally:
        process.kill()
    assert "SIGTERM: training ends after iteration" in output.read_text()
    torch.load(path.with_suffix("") / last_checkpoint(path))


@pytest.mark.parametrize("exact", [False, True])
def test_exact_or_not_is_for_each_part_of_a_run(config, exact, caplog):
    """A checkpoint that does not say how its data were drawn cannot be resumed exactly."""
    path = config("rcnn", "run", "MODEL.GLOBALKD.ENABLED", False)
    for part, value in enumerate((exact, not exact, True)):
        cfg = read(path)
        cfg.merge_from_list(["DATALOADER.EXACT_RESUME", value, "SOLVER.MAX_ITER", 1 + part])
        path.write_text(cfg.dump())
        with caplog.at_level(logging.INFO, logger="globalkd"):
            train(path)
    said = [r.message for r in caplog.records if "Resumed at iteration" in r.message]
    assert ["starts anew" in x for x in said] == [True, exact]


def test_a_resumed_run_is_told_what_has_changed(config, caplog):
    path = config("rcnn", "run", "MODEL.GLOBALKD.ENABLED", False, "SOLVER.MAX_ITER", 1)
    train(path)
    cfg = read(path)
    changed = ["SOLVER.IMS_PER_BATCH", 1, "SOLVER.BASE_LR", 0.5, "SOLVER.MAX_ITER", 2]
    cfg.merge_from_list(changed)
    path.write_text(cfg.dump())
    with caplog.at_level(logging.INFO, logger="globalkd"):
        train(path)
    assert "SOLVER.IMS_PER_BATCH is 1; it was 2 when the checkpoint was written." in caplog.text
    assert "SOLVER.BASE_LR is 0.5; it was " in caplog.text
    assert "and the optimizer keeps that" in caplog.text
    assert "SOLVER.MAX_ITER is 2; it was 1 " in caplog.text
    assert "it is not the run that it would have been uninterrupted" in caplog.text


def test_a_resumed_run_is_told_of_another_distillation(config, caplog):
    path = config("rcnn", "run", "SOLVER.MAX_ITER", 1)
    train(path)
    text = path.read_text()
    cfg = read(path)
    cfg.MODEL.GLOBALKD.FEATURE.WEIGHT = 3.5
    cfg.MODEL.GLOBALKD.TEACHER.OPTS = [*cfg.MODEL.GLOBALKD.TEACHER.OPTS, "SEED", 1]
    cfg.INPUT.MIN_SIZE_TRAIN = (48,)
    cfg.DATALOADER.NUM_WORKERS = 1  # changes nothing
    path.write_text(cfg.dump())
    with caplog.at_level(logging.INFO, logger="globalkd"):
        DistillTrainer(read(path)).resume_or_load(resume=True)
    told = [r.message for r in caplog.records if "when the checkpoint was written" in r.message]
    assert len(told) == 3 and "INPUT.MIN_SIZE_TRAIN is [48]; it was [48, 56, 64] " in told[0]
    assert any(x.startswith("MODEL.GLOBALKD.FEATURE.WEIGHT is 3.5; it was ") for x in told)
    assert "as if the run had not been interrupted" not in caplog.text
    caplog.clear()
    for name in ("GLOBAL", "RESPONSE", "HINTON", "FITNET", "FGFI", "PFI", "ICD", "CWD", "PKD"):
        cfg.MODEL.GLOBALKD[name].WEIGHT = 0.125
    path.write_text(cfg.dump())
    DistillTrainer(read(path)).resume_or_load(resume=True)
    told = [r.message for r in caplog.records if "when the checkpoint was written" in r.message]
    assert len(told) == 10 and "2 more settings have changed" in caplog.text
    caplog.clear()
    path.write_text(text)
    with caplog.at_level(logging.INFO, logger="globalkd"):
        DistillTrainer(read(path)).resume_or_load(resume=True)
    assert "as if the run had not been interrupted" in caplog.text


def test_detectron2s_own_order_is_there_by_key(config):
    """Without distillation and EXACT_RESUME it is Detectron2's trainer, to the bit."""
    opts = ("DATALOADER.EXACT_RESUME", False, "SOLVER.MAX_ITER", 2)
    results = []
    for name, trainer_class in (("ours", DistillTrainer), ("theirs", DefaultTrainer)):
        cfg = read(config("rcnn", name, *opts, distill=False))
        with mock.patch.object(comm, "shared_random_seed", lambda: 5):
            trainer = trainer_class(cfg)
        seed_all(0)
        for parameter in trainer.model.parameters():
            parameter.data.normal_(std=0.01)
        trainer.train()
        results.append(final_state(Path(f"{cfg.OUTPUT_DIR}.yaml")))
    assert differences(results[0]["model"], results[1]["model"]) == []
