"""A long training keeps nothing: memory, hooks, files, processes and events stay as they are.

A hundred steps by default. The long run that docs/robustness.md reports:

    GLOBALKD_SOAK_STEPS=2000 python -m pytest tests/test_soak.py -s
"""

import gc
import os
from pathlib import Path

import pytest
import torch
from conftest import NARROW
from detectron2.config import get_cfg
from detectron2.engine import HookBase
from processes import run_alone

from globalkd import add_globalkd_config
from globalkd.data import register_datasets
from globalkd.engine.trainer import DistillTrainer

pytestmark = pytest.mark.slow

STEPS = int(os.environ.get("GLOBALKD_SOAK_STEPS", 100))
SAMPLE_PERIOD = max(5, STEPS // 40)


class Sampler(HookBase):
    """Counts what could leak, every few steps."""

    def __init__(self):
        self.samples = []

    def after_step(self):
        if (self.trainer.iter + 1) % SAMPLE_PERIOD:
            return
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        storage, model = self.trainer.storage, self.trainer.model
        modules = [*model.modules(), *model.distiller.teacher.model.modules()]
        self.samples.append(
            {
                "RSS in MiB": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
                "tensors": sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects()),
                "hooks of modules": sum(
                    len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
                    for m in modules
                ),
                "open files": len(os.listdir("/proc/self/fd")),
                "child processes": len(
                    Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
                ),
                "scalars in EventStorage": len(storage.histories()),
                "pictures in EventStorage": len(storage._vis_data) + len(storage._histograms),
            }
        )


def train(path, result):
    cfg = get_cfg()
    add_globalkd_config(cfg)
    cfg.merge_from_file(str(path))
    register_datasets(cfg)
    trainer = DistillTrainer(cfg)
    sampler = Sampler()
    trainer.register_hooks([sampler])
    trainer.train()
    torch.save(sampler.samples, result)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="counts by Linux's /proc")
def test_nothing_grows(tiny_cfg, tmp_path):
    cfg = tiny_cfg(
        "rcnn",
        *NARROW,
        *("SOLVER.MAX_ITER", STEPS),
        *("SOLVER.BASE_LR", 0.0005),
        *("SOLVER.CHECKPOINT_PERIOD", 500),
        *("TEST.EVAL_PERIOD", 250),
        *("MODEL.GLOBALKD.PROTOTYPES.REFRESH_EPOCHS", 50 / 6),  # 12 images, 2 a step: 50 steps
        *("DATALOADER.NUM_WORKERS", 1),
        *("VIS_PERIOD", 50),
    )
    cfg.MODEL.GLOBALKD.TEACHER.OPTS = [*NARROW, "MODEL.FPN.OUT_CHANNELS", 64]
    Path(cfg.OUTPUT_DIR).mkdir()
    (tmp_path / "config.yaml").write_text(cfg.dump())
    result = tmp_path / "samples.pt"
    assert run_alone(train, tmp_path / "config.yaml", result) == (0, "")
    samples = torch.load(result)
    early, late = samples[len(samples) // 4 : len(samples) // 2], samples[-len(samples) // 4 :]
    grown = {}
    for name in samples[0]:
        before, after = (max(x[name] for x in part) for part in (early, late))
        print(f"{name}: at most {before:.0f} in the second quarter, {after:.0f} in the last")
        # A batch on its way from the worker holds a file for a moment; a file that leaks stays.
        if name == "open files":
            before, after = (min(x[name] for x in part) for part in (early, late))
        grown[name] = after - before
    # EventStorage keeps every scalar of every step, as Detectron2 made it: some 3 KiB a step.
    assert grown.pop("RSS in MiB") < 8 + STEPS * 4 / 1024
    assert grown.pop("tensors") <= 8, "instances differ from batch to batch"
    assert not any(value > 0 for value in grown.values()), grown
