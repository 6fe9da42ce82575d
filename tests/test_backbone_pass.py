"""The teacher's backbone in another precision and as a recording: the same maps."""

import copy

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.fpn import build_resnet_fpn_backbone
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from toy_step import moved

from globalkd.teacher import cuda_graphs
from globalkd.teacher.backbone_pass import BackbonePass, has_tf32
from globalkd.teacher.cuda_graphs import GraphedBackbone


def resnet(norm):
    """A small ResNet with an FPN whose norms stay."""
    torch.manual_seed(0)
    cfg = get_cfg()
    stages = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = stages
    cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.FPN.NORM = 32, norm
    backbone = build_resnet_fpn_backbone(cfg, ShapeSpec(channels=3)).eval().requires_grad_(False)
    for module in backbone.modules():
        if isinstance(module, (nn.GroupNorm, nn.BatchNorm2d)):  # with weights that no 16 bits hold
            module.weight.add_(0.1 * torch.rand_like(module.weight))
    return backbone


class Simple(nn.Module):
    """For the recordings, which take any backbone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 6, 1)

    def forward(self, x):
        x = self.first(x).relu()
        return {"p2": x, "p3": self.second(x)}


class OwnPrecision(nn.Module):
    """A backbone with a part that refuses to be in lower precision."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return {"p2": self.conv(x.float())}


@pytest.fixture
def backbone():
    return Simple().eval().requires_grad_(False)


def images(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("norm", ["", "GN", "BN"])
def test_converted_weights_give_what_autocast_gives(norm):
    backbone, x = resnet(norm), images(2, 3, 64, 96)
    backbone.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        expected = backbone(x.contiguous(memory_format=torch.channels_last))
        found = BackbonePass(backbone)(x)
    assert all(x.isfinite().all() for x in expected.values())
    assert {n: m.dtype for n, m in found.items()} == {n: m.dtype for n, m in expected.items()}
    assert all(torch.equal(found[name], m) for name, m in expected.items())
    assert all(x.dtype == torch.float32 for x in backbone.parameters()), "itself it is converted"


def test_other_backbones_run_under_autocast_as_they_are():
    backbone, x = OwnPrecision().eval().requires_grad_(False), images(1, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(BackbonePass(backbone)(x), backbone(x))


def test_each_precision_has_its_own_weights_until_they_change():
    backbone, x = resnet(""), images(1, 3, 64, 64)
    run = BackbonePass(backbone)
    exact = run(x)
    with torch.autocast("cpu", torch.bfloat16):
        before = run(x)
    assert all(torch.equal(run(x)[name], m) for name, m in exact.items())
    backbone.fpn_output3.weight.mul_(2)
    run.forget()
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(run(x)["p3"], before["p3"])


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_on_a_gpu_float32_images_have_the_layout_of_the_weights(layout):
    backbone, seen = resnet(""), []
    backbone.bottom_up.stem.register_forward_hook(lambda _, x, y: seen.extend([x[0], y]))
    layouts = {4: layout}

    def fake(x):
        chosen = layouts.get(x.dim(), torch.contiguous_format)
        return torch.empty(x.shape, device="cuda", memory_format=chosen)

    with FakeTensorMode():
        moved(backbone, fake)
        maps = BackbonePass(backbone)(torch.empty(2, 3, 64, 64, device="cuda"))
    assert all(x.is_contiguous(memory_format=layout) for x in [*seen, maps["p2"]])
    assert {m.dtype for m in maps.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("capability", "precision", "expected"),
    [((9, 0), "tf32", True), ((8, 0), "ieee", False), ((7, 5), "tf32", False)],
)
def test_tf32_is_of_the_gpu_and_of_pytorchs_flag(capability, precision, expected, monkeypatch):
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: capability)
    flags = type("Flags", (), {"fp32_precision": precision})
    monkeypatch.setattr(torch.backends.cudnn, "conv", flags, raising=False)
    assert has_tf32(torch.device("cuda")) == expected
    assert not has_tf32(torch.device("cpu"))


@pytest.fixture
def graphed(backbone, monkeypatch):
    """A recording that launches its kernels anew: as a graph, it reads and writes fixed memory."""
    recordings, streams = [], set()

    def record(run, stream, pool):
        assert pool == ("pool" if recordings else None)
        recordings.append(run)
        streams.add(stream)
        return run, "pool"

    class Stream:
        def wait_stream(self, _):
            pass

    monkeypatch.setattr(cuda_graphs, "record", record)
    monkeypatch.setattr("torch.cuda.Stream", Stream)
    monkeypatch.setattr("torch.cuda.current_stream", Stream)
    monkeypatch.setattr("torch.cuda.stream", lambda _: torch.no_grad())
    graphed = GraphedBackbone(backbone)
    graphed.recordings, graphed.streams = recordings, streams
    return graphed


def test_shapes_in_turn_give_the_backbones_maps(backbone, graphed):
    sizes = [(2, 3, 16, 24), (1, 3, 8, 8), (2, 3, 32, 32)]
    for seed in range(9):
        x = images(*sizes[seed % 3], seed=seed)
        x = x.contiguous(memory_format=torch.channels_last) if seed > 4 else x
        found, expected = graphed(x), backbone(x)
        assert all(torch.equal(found[name], m) for name, m in expected.items())


def test_a_shape_is_recorded_when_it_comes_again(graphed):
    for _ in range(3):
        graphed(images(1, 3, 8, 8))
    assert len(graphed.recordings) == 1
    graphed(images(1, 3, 8, 16))
    assert len(graphed.recordings) == 1


def test_recordings_share_their_memory(graphed):
    for size in ((2, 3, 32, 32), (1, 3, 8, 8)):
        for _ in range(2):
            graphed(images(*size))
    large, small = graphed._graphs.values()
    assert large[1].data_ptr() == small[1].data_ptr()
    assert large[2]["p2"].data_ptr() == small[2]["p2"].data_ptr()
    assert len(graphed.streams) == 1, "PyTorch shares a pool between recordings on one stream alone"


def test_a_batch_of_no_training_step_is_not_compiled(backbone, monkeypatch):
    def compiled(module):
        made.append(module)
        return module

    made = []
    monkeypatch.setattr(torch, "compile", compiled)
    run = BackbonePass(backbone, compile=True)
    x = images(1, 3, 8, 8)
    torch.testing.assert_close(run(x, once=True), backbone(x))
    assert not made
    run(x)
    assert made == [backbone]


def test_recordings_are_limited_and_it_is_said(backbone, graphed, monkeypatch, caplog):
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 2)
    for width in (8, 16, 24, 32):
        for seed in range(2):
            x = images(1, 3, 8, width, seed=seed)
            assert torch.equal(graphed(x)["p3"], backbone(x)["p3"])
    assert len(graphed.recordings) == 2
    assert caplog.text.count("2 shapes of input are recorded") == 1


def test_a_copy_of_a_pass_is_its_own(backbone):
    run, x = BackbonePass(backbone), images(1, 3, 8, 8)
    before = run(x)
    other = copy.deepcopy(run)
    backbone.second.weight.zero_()
    assert torch.equal(other(x)["p3"], before["p3"]) and not torch.equal(run(x)["p3"], before["p3"])
