"""Checkpoints are whole or not there, and say what is wrong with them."""

import contextlib
import errno
import logging
import os
import signal
import stat
from types import SimpleNamespace

import pytest
import torch
from detectron2.engine import HookBase, TrainerBase
from detectron2.utils import comm
from torch import nn

from globalkd.engine.checkpoint import AtomicCheckpointer
from globalkd.engine.hooks import CheckpointSaver, StopSignals
from globalkd.engine.run_state import RunState


@pytest.fixture
def saver(tmp_path):
    """A checkpointer of a small model with one checkpoint, "good"."""
    saver = AtomicCheckpointer(nn.Linear(300, 300), str(tmp_path))
    saver.save("good", iteration=4)
    return saver


def resume(saver):
    return AtomicCheckpointer(nn.Linear(300, 300), saver.save_dir).resume_or_load("", resume=True)


def test_only_the_checkpoint_and_its_name_are_left(saver, tmp_path):
    assert sorted(os.listdir(tmp_path)) == ["good.pth", "last_checkpoint"]
    assert (tmp_path / "last_checkpoint").read_text() == "good.pth"
    assert resume(saver) == {"iteration": 4}


def test_what_a_killed_save_left_is_overwritten(saver, tmp_path):
    (tmp_path / "checkpoint.partial").write_bytes(b"half")
    saver.save("better")
    names = ["better.pth", "good.pth", "last_checkpoint"]
    assert sorted(os.listdir(tmp_path)) == names


@pytest.mark.faults
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_told_and_the_older_checkpoint_stays(saver, tmp_path):
    (tmp_path / "checkpoint.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"new\.pth could not be written: .*MiB are free.*--resume"):
        saver.save("new")
    assert sorted(os.listdir(tmp_path)) == ["good.pth", "last_checkpoint"]
    assert resume(saver) == {"iteration": 4}


@pytest.mark.faults
@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_a_folder_that_cannot_be_synchronised_is_no_full_disk(saver, monkeypatch, number):
    """Some network file systems refuse it; an error of the disk is one."""
    synchronise = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        synchronise(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    refused = pytest.raises(OSError, match="could not be written")
    with refused if number == errno.EIO else contextlib.nullcontext():
        saver.save("better", iteration=7)
    assert resume(saver)["iteration"] == (4 if number == errno.EIO else 7)


@pytest.mark.faults
@pytest.mark.parametrize("error", [OSError("No space left"), RuntimeError("unexpected pos 64")])
def test_an_error_in_the_middle_leaves_no_file(saver, tmp_path, monkeypatch, error):
    def save(data, file):
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match=str(error)):
        saver.save("new")
    assert sorted(os.listdir(tmp_path)) == ["good.pth", "last_checkpoint"]


@pytest.mark.faults
@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "missing"])
def test_a_damaged_checkpoint_is_named_with_the_others(saver, tmp_path, damage):
    saver.save("newer")
    path = tmp_path / "newer.pth"
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes({"truncated": content[:5000], "empty": b"", "flipped": content}[damage])
    with pytest.raises(ValueError, match=r"newer\.pth, which .*not a whole.*\['good\.pth'\]"):
        resume(saver)


@pytest.mark.faults
def test_a_distiller_of_another_shape_says_what_to_do(tmp_path):
    parts = {"model": nn.Linear(3, 3), "save_dir": str(tmp_path)}
    AtomicCheckpointer(**parts, distiller=nn.Conv2d(4, 4, 3)).save("old")
    with pytest.raises(
        ValueError, match=r"old\.pth was written with other keys(?s:.*)weight.*3, 3"
    ):
        AtomicCheckpointer(**parts, distiller=nn.Conv2d(4, 4, 1)).resume_or_load("", resume=True)


class Toy(TrainerBase):
    """A trainer of nothing, whose steps are functions."""

    def __init__(self, saver, steps, *, eval_period=0):
        super().__init__()
        self.steps = steps
        self.checkpointer = saver
        self.run_state = RunState(saver.model, 0)
        self.signals = StopSignals()
        self.data_loader = SimpleNamespace(drawn=0)
        self.register_hooks([CheckpointSaver(2, self.signals, eval_period=eval_period)])

    def train(self, *args):
        with self.signals:
            super().train(*args)

    def run_step(self):
        self.steps.get((self.iter, "reading"), lambda: None)()
        self.data_loader.drawn += 1
        self.steps.get(self.iter, lambda: None)()


def test_saved_every_period_and_at_the_end(saver, tmp_path):
    Toy(saver, {}).train(0, 5)
    names = ["good.pth", "last_checkpoint", "model_0000001.pth", "model_0000003.pth"]
    assert sorted(os.listdir(tmp_path)) == [*names, "model_final.pth"]


class FailingEvaluation(HookBase):
    """After the step of one iteration."""

    def __init__(self, iteration):
        self.iteration = iteration

    def after_step(self):
        if self.trainer.iter == self.iteration:
            raise ValueError("evaluation")


@pytest.mark.faults
def test_what_an_evaluation_would_lose_is_saved_before_it_under_one_name(saver, tmp_path, caplog):
    trainer = Toy(saver, {}, eval_period=5)
    trainer.register_hooks([FailingEvaluation(4)])
    with caplog.at_level(logging.ERROR, logger="globalkd"), pytest.raises(ValueError):
        trainer.train(0, 9)
    assert resume(saver) == {"iteration": 4}
    assert (tmp_path / "last_checkpoint").read_text() == "model_last.pth"
    assert "model_last.pth is its last checkpoint: go on with --resume" in caplog.text
    Toy(saver, {}, eval_period=5).train(5, 9)  # the next one takes its place
    assert not (tmp_path / "model_last.pth").exists()


@pytest.mark.faults
def test_an_error_behind_a_step_loses_nothing_of_it(saver):
    """Such as of a hook that writes a log."""
    trainer = Toy(saver, {})
    trainer.register_hooks([FailingEvaluation(2)])
    with pytest.raises(ValueError):
        trainer.train(0, 9)
    assert resume(saver) == {"iteration": 2}


def fail():
    raise ValueError("an image")


@pytest.mark.faults
@pytest.mark.parametrize(
    ("place", "saved"), [((3, "reading"), 2), (3, 1), ((2, "reading"), 1), ((0, "reading"), 4)]
)
def test_an_error_before_anything_of_a_step_is_done_loses_no_step(saver, place, saved):
    """One in the middle of it leaves a state that is none: the last checkpoint counts."""
    with pytest.raises(ValueError, match="an image"):
        Toy(saver, {place: fail}).train(0, 9)
    assert resume(saver) == {"iteration": saved}  # 4: of the checkpoint that was there


@pytest.mark.faults
def test_with_several_processes_an_error_saves_nothing(saver, monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(comm, "_get_global_gloo_group", lambda: None)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda *_, **__: None)
    monkeypatch.setattr(comm, "gather", lambda x: [x])
    with pytest.raises(ValueError, match="an image"):
        Toy(saver, {(3, "reading"): fail}).train(0, 9)
    assert resume(saver) == {"iteration": 1}


@pytest.mark.faults
def test_a_full_disk_does_not_hide_the_error_before_it(saver, monkeypatch, caplog):
    def break_disk():
        monkeypatch.setattr(saver, "_write", lambda *_: (_ for _ in ()).throw(OSError("full")))
        fail()

    with pytest.raises(ValueError, match="an image"):
        Toy(saver, {(3, "reading"): break_disk}).train(0, 9)
    assert "full" in caplog.text and "model_0000001.pth is its last" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_after_the_step_and_ends_with_its_code(saver, tmp_path, number):
    before = signal.getsignal(number)
    done = []
    toy = Toy(saver, {2: lambda: (os.kill(os.getpid(), number), done.append(2))})
    with pytest.raises(SystemExit) as ended:
        toy.train(0, 9)
    assert ended.value.code == 128 + number
    assert done == [2]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000002.pth"
    assert signal.getsignal(number) == before


def test_a_signal_in_what_follows_the_last_step_lets_the_run_end(saver, tmp_path):
    """The last evaluation."""
    ended = []

    class Evaluation(HookBase):
        def after_train(self):
            os.kill(os.getpid(), signal.SIGTERM)
            ended.append(True)

    before = signal.getsignal(signal.SIGTERM)
    trainer = Toy(saver, {})
    trainer.register_hooks([Evaluation()])
    trainer.train(0, 3)
    assert ended and signal.getsignal(signal.SIGTERM) is before


def test_a_signal_in_the_last_step_lets_the_run_end(saver, tmp_path):
    Toy(saver, {4: lambda: os.kill(os.getpid(), signal.SIGTERM)}).train(0, 5)
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
