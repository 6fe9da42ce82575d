"""What the benchmarks of a training step share: detectors, batches, prototypes and the clock.

Weights are random, images are noise: what a step costs does not depend on them. What it does
depend on is like a COCO training under way: 80 classes, seven boxes an image (COCO: 7.3), their
sides spread log-uniformly over 5 to 70 % of the image's, and a two-stage student with nine sampled
positives for each of them.
"""

import ctypes
import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Dict, List

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling.backbone.resnet import BottleneckBlock
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from globalkd import add_globalkd_config
from globalkd.prototypes.structures import PrototypeSet

ROOT = Path(__file__).resolve().parent.parent
BOXES_PER_IMAGE = 7

#: (pair, detector) -> configuration.
CONFIGS = {
    ("R101-R50", "rcnn"): "configs/gkd_R101_R50.yaml",
    ("R101-R50", "retinanet"): "configs/gkd_retinanet_R101_R50.yaml",
    ("R34-R18", "rcnn"): "configs/quick/gkd_R34_R18.yaml",
    ("R34-R18", "retinanet"): "configs/quick/gkd_retinanet_R34_R18.yaml",
}


def load_config(pair: str, detector: str, device: str, opts=()) -> CfgNode:
    """The pair's own configuration, with random weights and without a refresh of prototypes."""
    cfg = get_cfg()
    add_globalkd_config(cfg)
    cfg.merge_from_file(str(ROOT / CONFIGS[pair, detector]))
    teacher = cfg.MODEL.GLOBALKD.TEACHER
    if (ROOT / teacher.CONFIG_FILE).is_file():
        teacher.CONFIG_FILE = str(ROOT / teacher.CONFIG_FILE)
    cfg.MODEL.DEVICE = device
    cfg.MODEL.WEIGHTS = teacher.WEIGHTS = ""
    teacher.ALLOW_RANDOM_WEIGHTS = True
    cfg.MODEL.GLOBALKD.PROTOTYPES.REFRESH_EPOCHS = 0.0
    cfg.MODEL.GLOBALKD.ICD.START_ITER = 0
    cfg.SOLVER.MAX_ITER = 1_000_000
    cfg.merge_from_list(list(opts))
    return cfg


def calm(model: nn.Module) -> None:
    """Keep a random ResNet's activations small: with frozen norms of 1 each block doubles them."""
    for block in model.modules():
        if not isinstance(block, BottleneckBlock):
            continue
        if isinstance(block.conv3.norm, FrozenBatchNorm2d):
            block.conv3.norm.weight.fill_(0.1)
        elif block.conv3.norm is None:  # folded into the convolution
            block.conv3.weight.mul_(0.1)


def propose_near_boxes(_rpn, inputs, outputs):
    """Forward hook of an RPN: eight more proposals near each box, as a trained one would find."""
    proposals, losses = outputs
    more = []
    for found, truth in zip(proposals, inputs[2]):
        boxes = truth.gt_boxes.tensor.repeat_interleave(8, dim=0)
        side = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
        near = Instances(found.image_size)
        near.proposal_boxes = Boxes(boxes + (torch.rand_like(boxes) - 0.5) * 0.2 * side)
        near.objectness_logits = boxes.new_ones(len(boxes))
        more.append(Instances.cat([found, near]))
    return more, losses


def make_batch(num_images: int, size: int, num_classes: int, seed: int = 0) -> List[dict]:
    """Square images of noise with `BOXES_PER_IMAGE` boxes each."""
    generator = torch.Generator().manual_seed(seed)
    batch = []
    for _ in range(num_images):
        image = torch.randint(0, 255, (3, size, size), generator=generator, dtype=torch.uint8)
        log_side = torch.empty(BOXES_PER_IMAGE, 2).uniform_(
            math.log(0.05), math.log(0.7), generator=generator
        )
        side = log_side.exp() * size
        corner = torch.rand(BOXES_PER_IMAGE, 2, generator=generator) * (size - side)
        instances = Instances((size, size))
        instances.gt_boxes = Boxes(torch.cat([corner, corner + side], dim=1))
        instances.gt_classes = torch.randint(
            0, num_classes, (BOXES_PER_IMAGE,), generator=generator
        )
        batch.append({"image": image, "instances": instances, "height": size, "width": size})
    return batch


def fill_bank(bank) -> None:
    """Random prototypes in every slot."""
    teacher, student, valid, rows, gain = {}, {}, {}, {}, {}
    for name, level in bank.levels.items():
        teacher[name] = torch.randn(level.teacher_prototypes.shape)
        student[name] = torch.randn(level.student_prototypes.shape)
        valid[name] = torch.ones(level.valid.shape, dtype=torch.bool)
        rows[name] = torch.zeros(level.valid.shape, dtype=torch.int64)
        gain[name] = torch.zeros(level.valid.shape)
    counts = torch.full((bank.num_classes,), bank.num_prototypes)
    bank.update(PrototypeSet(teacher, student, valid, rows, gain, counts))


def autocast(device: str, precision: str):
    """ "fp32" or "amp": bfloat16 on a CPU, float16 on a GPU."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device, torch.bfloat16 if device == "cpu" else torch.float16)


class Stepper:
    """Whole training steps of one model: forward, losses, backward, optimizer."""

    def __init__(self, model: nn.Module, device: str, precision: str):
        self.model, self.device, self.precision = model, device, precision
        # A rate so small that nothing drifts: every round has the same work.
        self.optimizer = torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad], lr=1e-9, momentum=0.9
        )
        for parameter in self.optimizer.param_groups[0]["params"]:  # as after the first step
            state = self.optimizer.state[parameter]
            state["momentum_buffer"] = torch.zeros_like(parameter)
        self.scaler = torch.amp.GradScaler(device, enabled=device == "cuda" and precision == "amp")

    def __call__(self, batch: List[dict]) -> Dict[str, float]:
        """One step; its losses."""
        with EventStorage(1), autocast(self.device, self.precision):
            losses = self.model(batch)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(sum(losses.values())).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return losses


def seconds(call, device: str) -> float:
    """What a call costs: wall time to its end, or CPU time where one thread does the work.

    CPU time leaves out what else the machine was doing meanwhile. With several threads it would
    count their waiting, so that the machine must be free for a measurement.
    """
    if device == "cpu":
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        start = clock()
        call()
        return clock() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


class PeakMemory:
    """Context in which memory is watched; `bytes`: by how much its use rose, at its highest.

    CPU: resident memory as Linux counts it; 0 where that cannot be read.
    """

    def __init__(self, device: str):
        self.device, self.bytes = device, 0

    def __enter__(self):
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return self
        try:
            ctypes.CDLL(None).malloc_trim(0)  # give back what the allocator keeps
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
            self.before = _status_bytes("VmRSS")
        except (OSError, AttributeError):  # not Linux, not glibc
            self.before = None
        return self

    def __exit__(self, *_):
        if self.device == "cuda":
            self.bytes = torch.cuda.max_memory_allocated() - self.before
        elif self.before is not None:
            self.bytes = max(_status_bytes("VmHWM") - self.before, 0)


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
