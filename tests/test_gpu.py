"""What runs on a GPU, run on one. Skipped elsewhere: see test_gpu_simulated.py."""

import copy

import pytest
import torch
from conftest import KINDS, make_batch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from test_gpu_simulated import CASES
from test_training import run
from torch import nn
from toy_step import attach, in_half, leaves, moved, toy_bank, toy_step

from globalkd.analysis.runs import load_run, read_metrics
from globalkd.data import register_datasets
from globalkd.prototypes.sparse_coding import select_atoms
from globalkd.teacher.cuda_graphs import GraphedBackbone

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
both = pytest.mark.parametrize("kind", list(KINDS))
DRKD = ["PixelRelation", "InstanceRelation", "InstanceFeature"]
GLOBALKD = ["GlobalKnowledge", "FeatureKnowledge", "ResponseKnowledge"]


@pytest.fixture(autouse=True)
def no_tf32():
    """Convolutions in full float32, so that both devices compute the same."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def same_draws(monkeypatch):
    """Random numbers are drawn on the CPU, whichever device asks."""

    def on_the_cpu(draw):
        return lambda *args, device=None, **kwargs: draw(*args, **kwargs).to(device)

    for name in ("rand", "randn", "randint"):
        monkeypatch.setattr(torch, name, on_the_cpu(getattr(torch, name)))
    monkeypatch.setattr(
        torch, "rand_like", lambda x, dtype=None: torch.rand(x.shape).to(x.device, dtype or x.dtype)
    )


@pytest.mark.parametrize(
    ("name", "make", "one_stage"),
    CASES,
    ids=[f"{n}-{'retinanet' if one else 'rcnn'}" for n, _, one in CASES],
)
def test_a_loss_and_its_gradient_are_those_of_the_cpu(name, make, one_stage, same_draws):
    def terms_and_gradients(move):
        context = toy_step(one_stage=one_stage, bank=toy_bank())
        torch.manual_seed(0)
        loss = attach(make(), context)
        loss, context = moved(loss, move), moved(context, move)
        torch.manual_seed(0)
        terms = loss(context)
        torch.stack(list(terms.values())).sum().backward()
        gradients = [None if x.grad is None else x.grad.cpu() for x in leaves(context)]
        return {k: x.detach().cpu() for k, x in terms.items()}, gradients

    expected, found = (
        terms_and_gradients(lambda x, d=d: x.detach().to(d)) for d in ("cpu", "cuda")
    )
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-6)
    for a, b in zip(found[1], expected[1]):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("counts", [(3, 1), (0, 0)])
@pytest.mark.parametrize(
    ("name", "make", "one_stage"),
    CASES,
    ids=[f"{n}-{'retinanet' if one else 'rcnn'}" for n, _, one in CASES],
)
def test_a_loss_is_finite_in_half_precision(name, make, one_stage, counts):
    context = in_half(toy_step(counts, one_stage=one_stage, bank=toy_bank()), torch.float16)
    loss = attach(make(), context)
    loss, context = (moved(x, lambda x: x.detach().cuda()) for x in (loss, context))
    with torch.autocast("cuda", torch.float16):
        total = torch.stack(list(loss(context).values())).sum()
    (total * 1024).backward()  # as a GradScaler would
    gradients = [x.grad for x in leaves(context) if x.grad is not None]
    assert total.isfinite() and all(x.isfinite().all() for x in gradients)


@both
def test_a_step_is_that_of_the_cpu(kind, tiny_cfg):
    """The whole model: detection losses, the teacher's pass, GlobalKD's and DRKD's terms."""
    # All proposals and all anchors count: which ones are drawn differs between devices.
    cfg = tiny_cfg(kind, "MODEL.GLOBALKD.LOSSES", [*GLOBALKD, *DRKD])
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = 4096
    cfg.MODEL.ROI_HEADS.POSITIVE_FRACTION = cfg.MODEL.RPN.POSITIVE_FRACTION = 1.0
    register_datasets(cfg)
    torch.manual_seed(0)
    model = build_model(cfg).train()
    with EventStorage():
        model(make_batch([4, 2]))  # prototypes, made once and of the CPU
    expected, found = (
        losses_of(copy.deepcopy(model).to(device), device) for device in ("cpu", "cuda")
    )
    assert set(found) == set(expected) and len(found) > 6
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-4)


def losses_of(model, device):
    model.distiller.teacher.model.to(device)
    with EventStorage(1):
        losses = model(make_batch([3, 2], seed=1))
    sum(losses.values()).backward()
    assert all(x.grad.isfinite().all() for x in model.parameters() if x.grad is not None)
    return {k: x.detach().cpu() for k, x in losses.items()}


@both
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("refresh", ["pass", "harvest"])
def test_training_resuming_and_evaluating(kind, amp, refresh, tiny_cfg):
    cfg = tiny_cfg(
        kind,
        *("MODEL.GLOBALKD.LOSSES", [*GLOBALKD, *DRKD], "SOLVER.AMP.ENABLED", amp),
        *("MODEL.GLOBALKD.PROTOTYPES.REFRESH", refresh, "SOLVER.MAX_ITER", 12),
        *("MODEL.GLOBALKD.PROTOTYPES.REFRESH_EPOCHS", 0.5, "MODEL.DEVICE", "cuda"),
    )
    trainer = run(cfg)
    assert next(trainer.model.parameters()).is_cuda
    cfg.SOLVER.MAX_ITER = 16
    trainer = run(cfg, resume=True)
    assert trainer.start_iter == 12
    records = read_metrics(cfg.OUTPUT_DIR)
    assert "bbox/AP" in records[-1]
    assert all(x == x for r in records for k, x in r.items() if "loss" in k), "a loss is NaN"
    assert load_run(cfg.OUTPUT_DIR, distiller=True).distiller.bank.is_ready


@both
@pytest.mark.parametrize("precision", ["student", "fp16"])
@pytest.mark.parametrize("side_stream", [False, True])
def test_graphs_give_the_maps_of_the_same_kernels(kind, precision, side_stream, tiny_cfg):
    """Shapes that come in turn, and maps that must outlive the passes after theirs."""
    found = []
    for graphs in (False, True):
        cfg = tiny_cfg(kind, "MODEL.DEVICE", "cuda", "MODEL.GLOBALKD.TEACHER.CUDA_GRAPHS", graphs)
        cfg.MODEL.GLOBALKD.TEACHER.PRECISION = precision
        cfg.MODEL.GLOBALKD.TEACHER.SIDE_STREAM = side_stream
        register_datasets(cfg)
        torch.manual_seed(0)
        teacher = build_model(cfg).distiller.teacher
        maps = []
        for seed in range(12):
            batch = make_batch([2] * (1 + seed % 2), size=64 + 32 * (seed % 3), seed=seed)
            maps += teacher.begin(batch, "BGR")().values()
        assert len(teacher._backbone._calls) == 1
        found.append(maps)
    recorded = next(iter(teacher._backbone._calls.values()))
    assert len(recorded._graphs) == 6
    for a, b in zip(*found):
        assert a.is_contiguous() and b.is_contiguous()
        torch.testing.assert_close(a, b)


def test_graphs_of_many_shapes_share_their_memory():
    def growth(count):
        layers = [nn.Conv2d(16, 16, 3, padding=1) for _ in range(8)]
        backbone = nn.Sequential(*layers).cuda().eval().requires_grad_(False)
        graphed = GraphedBackbone(lambda x: {"p2": backbone(x)})
        for width in range(count):
            x = torch.zeros(1, 16, 512, 1024 - 32 * width, device="cuda")
            graphed(x), graphed(x)
        assert len(graphed._graphs) == count
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved() - before

    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    assert growth(8) < 1.5 * growth(1)


@both
def test_with_tf32_a_teacher_has_channels_last(kind, tiny_cfg):
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("has no TF32")
    found = []
    for tf32 in (False, True):
        torch.backends.cudnn.allow_tf32 = tf32
        cfg = tiny_cfg(kind, "MODEL.DEVICE", "cuda")
        register_datasets(cfg)
        torch.manual_seed(0)
        teacher = build_model(cfg).distiller.teacher
        weight = teacher.model.backbone.bottom_up.stem.conv1.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == tf32
        found.append(teacher.begin(make_batch([2, 3]), "BGR")())
    assert all(x.is_contiguous() for x in found[1].values())
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-2)


@both
@pytest.mark.parametrize("graphs", [False, True])
def test_training_with_mixed_precision_and_every_faster_teacher(kind, graphs, tiny_cfg):
    cfg = tiny_cfg(kind, "MODEL.DEVICE", "cuda", "SOLVER.AMP.ENABLED", True, "SOLVER.MAX_ITER", 8)
    cfg.MODEL.GLOBALKD.TEACHER.CUDA_GRAPHS = graphs
    cfg.MODEL.GLOBALKD.TEACHER.SIDE_STREAM = True
    run(cfg)
    records = read_metrics(cfg.OUTPUT_DIR)
    assert all(x == x for r in records for k, x in r.items() if "loss" in k), "a loss is NaN"


@both
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("side_stream", [False, True])
def test_a_faster_teacher_gives_the_same_losses_roughly(kind, precision, side_stream, tiny_cfg):
    found = []
    for setting in ("fp32", precision):
        cfg = tiny_cfg(kind, "MODEL.DEVICE", "cuda", "MODEL.GLOBALKD.TEACHER.PRECISION", setting)
        cfg.MODEL.GLOBALKD.TEACHER.SIDE_STREAM = side_stream
        register_datasets(cfg)
        torch.manual_seed(0)
        model = build_model(cfg).train()
        with EventStorage():
            torch.manual_seed(0)
            losses = model(make_batch([4, 2]))
        found.append({k: x.detach() for k, x in losses.items() if "kd" in k})
    torch.testing.assert_close(found[0], found[1], rtol=0.1, atol=1e-3)


def test_the_same_prototypes_are_chosen():
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(500, d, generator=generator) for d in (24, 16))
    expected, _ = select_atoms(teacher, student, 12, 10.0)
    found, _ = select_atoms(teacher.cuda(), student.cuda(), 12, 10.0)
    assert found.tolist() == expected.tolist()
