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
