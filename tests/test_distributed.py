"""Two processes on gloo: equal gradients, one bank, and nobody waits for nobody."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import make_batch
from detectron2.config import get_cfg
from detectron2.engine import create_ddp_model
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from globalkd import add_globalkd_config
from globalkd.data import register_datasets
from globalkd.trainer import DistillTrainer

pytestmark = pytest.mark.slow


def launch(worker, folder, *args):
    """Run `worker(rank, *args)` in two processes; their return values, by rank."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    mp.spawn(_main, args=(worker, str(folder), args), nprocs=2)
    return [torch.load(Path(folder, f"rank{i}.pt")) for i in range(2)]


def _main(rank, worker, folder, args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    comm.create_local_process_group(2)
    torch.save(worker(rank, *args), Path(folder, f"rank{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


def read(path):
    cfg = get_cfg()
    add_globalkd_config(cfg)
    cfg.merge_from_file(str(path))
    register_datasets(cfg)
    return cfg


def _one_step(rank, path, counts):
    cfg = read(path)
    torch.manual_seed(0)
    model = create_ddp_model(build_model(cfg).train(), broadcast_buffers=False, device_ids=None)
    torch.manual_seed(rank)
    with EventStorage():
        losses = model(make_batch(counts[rank], seed=rank))
    sum(losses.values()).backward()
    return {
        "gradients": {n: p.grad for n, p in model.module.named_parameters() if p.requires_grad},
        "bank": model.module.distiller.bank.state_dict(),
        "terms": {k: v.detach() for k, v in losses.items()},
    }


def _bank_of_one_process(path):
    torch.manual_seed(0)
    model = build_model(read(path)).train()
    with EventStorage():
        model(make_batch([3, 2]))
    return model.distiller.bank.state_dict()


@pytest.mark.parametrize("kind", ["rcnn", "retinanet"])
def test_gradients_and_prototypes_agree_though_a_rank_has_no_instance(kind, tiny_cfg, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(tiny_cfg(kind).dump())
    first, second = launch(_one_step, tmp_path, path, ([3, 2], [0, 0]))
    assert all(torch.equal(v, second["gradients"][k]) for k, v in first["gradients"].items())
    assert all(torch.equal(v, second["bank"][k]) for k, v in first["bank"].items())
    assert second["terms"]["loss_kd_global"] == 0 < first["terms"]["loss_kd_global"]
    for name, value in _bank_of_one_process(path).items():
        torch.testing.assert_close(value.float(), first["bank"][name].float())


def _train(rank, path):
    cfg = read(path)
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    return {k: v.clone() for k, v in trainer.model.module.state_dict().items()}


def test_the_trainer_trains_on_two_processes_without_gpu(tiny_cfg, tmp_path):
    cfg = tiny_cfg("rcnn", "SOLVER.MAX_ITER", 2, "DATASETS.TEST", ())
    Path(cfg.OUTPUT_DIR).mkdir(parents=True)
    path = tmp_path / "config.yaml"
    path.write_text(cfg.dump())
    first, second = launch(_train, tmp_path, path)
    learned = [k for k in first if "running_" not in k and "num_batches" not in k]
    assert all(torch.equal(first[k], second[k]) for k in learned)


def _fail_on_rank_0(rank, path):
    import globalkd.prototype_refresh as module

    def broken(*args, **kwargs):
        raise ValueError("broken on purpose")

    module.generate_prototypes = broken
    try:
        _one_step(rank, path, ([1], [1]))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.faults
def test_a_failure_on_the_main_process_ends_the_other_with_its_reason(tiny_cfg, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(tiny_cfg("rcnn").dump())
    errors = launch(_fail_on_rank_0, tmp_path, path)
    assert errors[0] == "ValueError: broken on purpose"
    assert "failed on the main process: ValueError: broken on purpose" in errors[1]
