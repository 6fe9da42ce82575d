"""What a GPU would see of a step, on a machine without one.

PyTorch's fake tensors have a device, and compute nothing: an operation on tensors of two devices
fails, and so does one whose result's size or value the host would have to wait for.
"""

import pytest
import torch
from conftest import make_batch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from test_comparison_losses import LOSSES
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from toy_step import attach, moved, toy_bank, toy_step

from globalkd.data import register_datasets
from globalkd.losses import (
    FeatureKnowledge,
    GlobalKnowledge,
    InstanceFeature,
    InstanceRelation,
    PixelRelation,
    ResponseKnowledge,
)

WAITS = (DataDependentOutputException, DynamicOutputShapeException)
OURS = {
    "global": lambda: GlobalKnowledge(),
    "global_all": lambda: GlobalKnowledge(scope="all"),
    "feature": lambda: FeatureKnowledge(),
    "feature_background": lambda: FeatureKnowledge(background_weight=1.0),
    "response": lambda: ResponseKnowledge(),
    "pixel_relation": lambda: PixelRelation(),
    "instance_relation": lambda: InstanceRelation(),
    "instance_feature": lambda: InstanceFeature(),
}
CASES = [(n, make, one_stage) for n, make in OURS.items() for one_stage in (True, False)]
CASES += [(n, make, one_stage) for n, (make, kinds) in LOSSES.items() for one_stage in kinds]


class NoWaitingCopy(TorchDispatchMode):
    """Fails where a copy to another device makes the host wait, which fake tensors do not tell."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function is torch.ops.aten._to_copy.default and args[0].device != result.device:
            assert kwargs.get("non_blocking"), "a copy between devices makes the host wait"
        return result


def fake(device):
    """Makes of a tensor a fake one of that device."""
    return lambda x: torch.empty(x.shape, dtype=x.dtype, device=device)


@pytest.mark.parametrize(
    ("name", "make", "one_stage"),
    CASES,
    ids=[f"{n}-{'retinanet' if one else 'rcnn'}" for n, _, one in CASES],
)
def test_a_loss_stays_on_the_gpu_and_does_not_wait_for_it(name, make, one_stage):
    if name == "gid":
        pytest.skip("how many instances it finds, only its non-maximum suppression can tell")
    context = toy_step(one_stage=one_stage, bank=toy_bank())
    loss = attach(make(), context)
    with FakeTensorMode():
        loss, context = moved(loss, fake("cuda")), moved(context, fake("cuda"))
        with NoWaitingCopy():
            terms = loss(context)
    for term in terms.values():
        assert term.device.type == "cuda" and term.shape == () and term.requires_grad


def test_the_simulation_notices_a_mixture_of_devices_and_a_wait():
    with FakeTensorMode():
        x = torch.ones(3, device="cuda")
        with pytest.raises(RuntimeError, match="cpu"):
            x + torch.ones(3)
        for wait in (lambda: x.sum().item(), lambda: x[x > 0], lambda: x.nonzero()):
            with pytest.raises(WAITS):
                wait()
        with NoWaitingCopy():
            torch.ones(3).to("cuda", non_blocking=True)
            with pytest.raises(AssertionError, match="makes the host wait"):
                torch.ones(3).to("cuda")


@pytest.mark.parametrize("kind", ["rcnn", "retinanet"])
def test_a_whole_distillation_step_stays_on_the_gpu(tiny_cfg, kind):
    """GlobalKD and DRKD, the teacher's pass among them, from what a student's own step left."""
    drkd = ["PixelRelation", "InstanceRelation", "InstanceFeature"]
    globalkd = ["GlobalKnowledge", "FeatureKnowledge", "ResponseKnowledge"]
    cfg = tiny_cfg(kind, "MODEL.GLOBALKD.LOSSES", [*globalkd, *drkd])
    register_datasets(cfg)
    model = build_model(cfg).train()
    taken = {}
    model.distiller.forward = lambda *args: taken.update(args=args) or {}
    batch = make_batch([4, 2])
    with EventStorage():
        model(batch)
    distiller = model.distiller
    del distiller.forward
    images = distiller.teacher.model.preprocess_image(batch)  # asks tensors of the host for values
    seen = {}
    with EventStorage(), FakeTensorMode():
        moved(distiller.teacher.model, fake("cuda"), seen)
        images.tensor = moved(images.tensor, fake("cuda"))
        distiller.teacher.model.preprocess_image = lambda _: images
        batch, outputs, losses, _ = taken["args"]
        cuda = fake("cuda")
        distiller = moved(distiller, cuda, seen)
        step = moved(batch, fake("cpu")), moved(outputs, cuda, seen), moved(losses, cuda, seen)
        with NoWaitingCopy():
            terms = distiller(*step)
    assert len(terms) == len(globalkd) + len(drkd)
    assert all(x.device.type == "cuda" and x.requires_grad for x in terms.values())
