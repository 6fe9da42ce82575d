"""Several processes on gloo: equal gradients, one bank, and nobody waits for nobody."""

import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, make_batch
from detectron2.config import get_cfg
from detectron2.engine import create_ddp_model
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from processes import run_in_processes

from globalkd import add_globalkd_config
from globalkd.data import register_datasets
from globalkd.engine.launching import bound_gathering
from globalkd.engine.trainer import DistillTrainer
from globalkd.prototypes import refresh as prototype_refresh
from globalkd.prototypes.class_sharding import ClassShard
from globalkd.prototypes.generation import generate_prototypes
from globalkd.prototypes.settings import GenerationSettings
from globalkd.prototypes.structures import PairedFeatures

pytestmark = pytest.mark.slow
GENERATORS = ["pursuit", "kmeans", "dbscan", "ambiguous", "random"]


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


def _bank_of_one_process(path, *, save=None):
    torch.manual_seed(0)
    model = build_model(read(path)).train()
    with EventStorage():
        model(make_batch([3, 2]))
    bank = model.distiller.bank
    if save:
        bank.save(str(save), model.distiller.refresher.fingerprint, torch.ones(bank.num_classes))
    return bank.state_dict()


@pytest.mark.parametrize("kind", ["rcnn", "retinanet"])
def test_gradients_and_prototypes_agree_though_a_rank_has_no_instance(kind, tiny_cfg, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(tiny_cfg(kind).dump())
    first, second = run_in_processes(_one_step, tmp_path, path, ([3, 2], [0, 0]))
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
    first, second = run_in_processes(_train, tmp_path, path)
    learned = [k for k in first if "running_" not in k and "num_batches" not in k]
    assert all(torch.equal(first[k], second[k]) for k in learned)


def _features(counts):
    """Instances of several classes, in mixed order."""
    g = torch.Generator().manual_seed(0)
    classes = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    rows = len(classes)
    corner = 50 * torch.rand(rows, 2, generator=g)
    return PairedFeatures(
        teacher={n: torch.randn(rows, 8, generator=g) for n in ("p2", "p3")},
        student={n: torch.randn(rows, 5, generator=g) for n in ("p2", "p3")},
        classes=classes[torch.randperm(rows, generator=g)],
        image_ids=torch.arange(rows),
        boxes=torch.cat([corner, corner + 1 + 50 * torch.rand(rows, 2, generator=g)], dim=1),
        annotation_ids=torch.zeros(rows, dtype=torch.int64),
    )


COUNTS = [30, 0, 7, 12]


def _generate(features, generator):
    settings = GenerationSettings(generator, num_prototypes=4)
    return generate_prototypes(features, settings, num_classes=len(COUNTS))


def _generate_sharded(rank, bounds):
    """Every generator on this process's slice of the instances, the classes dealt out."""
    features = _features(COUNTS).select(torch.arange(bounds[rank], bounds[rank + 1]))
    shard = ClassShard.exchange(features, len(COUNTS))
    held = shard.features.classes.unique().tolist()
    return held, {g: _fields(shard.collect(_generate(shard.features, g))) for g in GENERATORS}


def _fields(prototypes):
    return None if prototypes is None else vars(prototypes)


@pytest.mark.parametrize("bounds", [[0, 20, 49], [0, 25, 25, 30, 49]], ids=["2", "4"])
def test_classes_spread_over_processes_give_the_picks_of_one_process(bounds, tmp_path):
    """With four processes the second one brings no instance, and one works on no class."""
    world_size = len(bounds) - 1
    results = run_in_processes(_generate_sharded, tmp_path, bounds, world_size=world_size)
    held = [classes for classes, _ in results]
    assert sorted(sum(held, [])) == [0, 2, 3]
    assert min(map(len, held)) == (1 if world_size == 2 else 0)
    for generator in GENERATORS:
        expected, found = _generate(_features(COUNTS), generator), results[0][1][generator]
        assert torch.equal(found["counts"], expected.counts)
        for name in ("rows", "valid", "teacher", "student", "gain"):
            for level, value in getattr(expected, name).items():
                assert torch.equal(found[name][level], value), (generator, name)
        assert all(result[1][generator] is None for result in results[1:])


def _refresh(rank, path, num_images):
    torch.manual_seed(0)
    model = build_model(read(path)).train()
    prototypes = model.distiller.refresh(model, num_images=num_images)
    return _fields(prototypes), model.distiller.bank.state_dict()


def test_a_pass_on_four_processes_picks_what_one_process_picks(tiny_cfg, tmp_path):
    """Three images: the last process has none."""
    path = tmp_path / "config.yaml"
    path.write_text(tiny_cfg("rcnn").dump())
    expected, bank = _refresh(0, path, 3)
    results = run_in_processes(_refresh, tmp_path, path, 3, world_size=4)
    for level, rows in expected["rows"].items():
        assert torch.equal(results[0][0]["rows"][level], rows)
    for _, state in results:
        for name, value in bank.items():
            torch.testing.assert_close(state[name].float(), value.float())


def _harvest(rank, path, counts):
    torch.manual_seed(0)
    model = build_model(read(path)).train()
    with EventStorage(0):
        model(make_batch(counts[rank], seed=rank))
    distiller = model.distiller
    found = distiller.refresher.refresh_from(distiller.reservoir, distiller.bank, 1)
    return len(distiller.reservoir.features(0)), _fields(found), distiller.bank.state_dict()


def test_a_harvest_takes_the_instances_of_every_process(tiny_cfg, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(tiny_cfg("rcnn", "MODEL.GLOBALKD.PROTOTYPES.REFRESH", "harvest").dump())
    first, second = run_in_processes(_harvest, tmp_path, path, ([0, 0], [3, 2]))
    assert (first[0], second[0]) == (0, 5)
    assert first[1]["counts"].sum() == 5 and second[1] is None
    assert all(torch.equal(v, second[2][k]) for k, v in first[2].items())


def _fail(rank, path, function):
    """One step while the second process cannot extract features, or choose prototypes."""

    def broken(*args, **kwargs):
        raise ValueError("broken on purpose")

    if rank == 1:
        setattr(prototype_refresh, function, broken)
    try:
        _one_step(rank, path, ([1], [1]))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.faults
@pytest.mark.parametrize("function", ["extract_features", "generate_prototypes"])
def test_a_failure_on_one_process_ends_the_others_with_its_reason(function, tiny_cfg, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(tiny_cfg("rcnn").dump())
    errors = run_in_processes(_fail, tmp_path, path, function)
    assert errors[1] == "ValueError: broken on purpose"
    assert "failed on process 1 of 2: ValueError: broken on purpose" in errors[0]


def _step_from_file(rank, path, files):
    """One step with the prototypes of a file, which each process may have elsewhere."""
    own = path.with_name(f"config{rank}.yaml")
    cfg = read(path)
    cfg.MODEL.GLOBALKD.PROTOTYPES.FILE = str(files[rank])
    own.write_text(cfg.dump())
    try:
        return _one_step(rank, own, ([1], [1]))["bank"]
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def test_the_main_process_reads_prototypes_for_all(tiny_cfg, tmp_path):
    path, file, missing = (tmp_path / n for n in ("config.yaml", "p.safetensors", "missing"))
    path.write_text(tiny_cfg("rcnn").dump())
    saved = _bank_of_one_process(path, save=file)
    for bank in run_in_processes(_step_from_file, tmp_path, path, (file, missing)):
        assert all(torch.equal(saved[name], value) for name, value in bank.items())
    errors = run_in_processes(_step_from_file, tmp_path, path, (missing, file))
    assert errors[0].startswith("FileNotFoundError")
    assert "PROTOTYPES.FILE failed on process 0 of 2: FileNotFoundError" in errors[1]


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _launch(path, machine_rank, port):
    command = [sys.executable, str(ROOT / "train_net.py"), "--config-file", str(path)]
    command += ["--num-gpus", "1", "--num-machines", "2", "--machine-rank", str(machine_rank)]
    command += ["--dist-url", f"tcp://127.0.0.1:{port}"]
    return subprocess.Popen(
        [*command, "OUTPUT_DIR", str(path.parent / f"machine{machine_rank}")],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_launchers_on_loopback_train_as_two_machines(tiny_cfg, tmp_path):
    """Without a GPU they use gloo; only machine 0 writes checkpoints."""
    path = tmp_path / "config.yaml"
    path.write_text(tiny_cfg("rcnn", "SOLVER.MAX_ITER", 2, "DATASETS.TEST", ()).dump())
    for _ in range(3):  # another program may take the port in between
        port = _free_port()
        launchers = [_launch(path, rank, port) for rank in range(2)]
        outputs = [x.communicate(timeout=300)[0] for x in launchers]
        if not any("address already in use" in x.lower() for x in outputs):
            break
    assert [x.returncode for x in launchers] == [0, 0], outputs[0][-3000:]
    weights = torch.load(tmp_path / "machine0" / "model_final.pth", weights_only=False)
    assert weights["iteration"] == 1
    assert not (tmp_path / "machine1" / "model_final.pth").exists()


def test_the_timeout_holds_for_what_is_gathered_beside_nccl(tmp_path, monkeypatch):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    monkeypatch.setattr(comm, "_get_global_gloo_group", comm._get_global_gloo_group)
    try:
        before = comm._get_global_gloo_group
        bound_gathering(timedelta(minutes=7))
        assert comm._get_global_gloo_group is before  # gloo everywhere: the launcher has said it
        monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
        bound_gathering(timedelta(minutes=7))
        backend = comm._get_global_gloo_group()._get_backend(torch.device("cpu"))
        assert backend.options._timeout == timedelta(minutes=7)
    finally:
        dist.destroy_process_group()
