"""A converted torchvision ResNet computes in Detectron2 what it computes in torchvision."""

import pickle
import sys

import pytest
import torch
from conftest import ROOT
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone
from torchvision.models import resnet18, resnet50

sys.path.insert(0, str(ROOT / "tools"))
import convert_torchvision
from convert_torchvision import convert


@pytest.mark.parametrize("depth, source", [(18, resnet18), (50, resnet50)])
def test_outputs_are_torchvisions(depth, source, tmp_path):
    torch.manual_seed(0)
    theirs = source(weights=None).eval()
    path = tmp_path / "backbone.pkl"
    path.write_bytes(pickle.dumps(convert(theirs.state_dict())))
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res4", "res5"]
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    if depth == 18:
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    ours = build_backbone(cfg).eval()
    DetectionCheckpointer(ours).load(str(path))
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(image))))
        for layer in (theirs.layer1, theirs.layer2, theirs.layer3):
            expected = layer(expected)
        torch.testing.assert_close(ours(image)["res4"], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            ours(image)["res5"], theirs.layer4(expected), rtol=1e-4, atol=1e-4
        )


@pytest.mark.faults
@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no such file"),
        (b"", "cannot read it"),
        (b"PK\x03\x04 half of a file", "cannot read it"),
        ({"model": {"conv1.weight": torch.ones(1)}, "iteration": 9}, "holds model, iteration"),
        ({"features.0.weight": torch.ones(1)}, "no state dict of a torchvision ResNet"),
        ([1, 2], "holds a list"),
    ],
)
def test_what_is_no_resnet_of_torchvision_is_told_in_a_sentence(
    content, message, tmp_path, monkeypatch, capsys
):
    source, output = tmp_path / "source.pth", tmp_path / "new" / "R.pkl"
    if isinstance(content, bytes):
        source.write_bytes(content)
    elif content is not None:
        torch.save(content, source)
    monkeypatch.setattr(sys, "argv", ["convert_torchvision.py", str(source), str(output)])
    with pytest.raises(SystemExit) as ended:
        convert_torchvision.main()
    (said,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and message in said.replace("No such", "no such")
    assert str(source) in said and not output.parent.exists()
