"""How a frozen backbone runs: its layout, its precision, compiled or not, launched or replayed.

Whatever is chosen here, the maps are the same up to the rounding of the precision.
"""

import copy
import logging
from typing import Callable, Dict, Optional

import torch
from detectron2.layers import Conv2d
from detectron2.modeling.backbone import FPN, ResNet
from detectron2.utils.logger import log_first_n
from torch import Tensor, nn

from .cuda_graphs import GraphedBackbone


class BackbonePass:
    """Calls a backbone in the precision of the autocast that surrounds the call.

    Autocast by itself converts a frozen weight again in each pass. Of a ResNet, with an FPN or
    without, a second copy here holds its convolutions converted: the same products, without the
    conversion. Other backbones may compute on their weights, and stay with autocast.
    """

    def __init__(self, backbone: nn.Module, *, compile: bool = False, cuda_graphs: bool = False):
        """
        Args:
            backbone: in evaluation mode, without trainable parameters. What it has as weights at a
                first call in a lower precision counts until `forget`.
            compile: run it through `torch.compile`.
            cuda_graphs: on a GPU, replay it; see `GraphedBackbone`.
        """
        self.backbone = backbone
        self.compile = compile
        self.cuda_graphs = cuda_graphs
        self.forget()

    def forget(self) -> None:
        """Take the backbone's parameters anew: they were moved or changed."""
        self._modules: Dict[Optional[torch.dtype], nn.Module] = {}
        self._calls: Dict[Optional[torch.dtype], Callable] = {}
        self._channels_last = _is_channels_last(self.backbone)

    def __getstate__(self):
        return {**self.__dict__, "_modules": {}, "_calls": {}}  # a copy makes its own

    def __call__(self, images: Tensor, *, once: bool = False) -> Dict[str, Tensor]:
        """
        Args:
            images: (N, 3, H, W) float32.
            once: of a shape that hardly comes again: nothing is compiled or recorded for it.

        Returns:
            level -> map, in any memory format. With CUDA graphs they hold until the next call.
        """
        device = images.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        if dtype not in self._modules:
            self._modules[dtype] = self._converted(dtype)
        # Where convolutions run faster on it: on a CPU, in 16 bits, and where the weights have it.
        if device == "cpu" or dtype is not None or self._channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if once:
            return self._modules[dtype](images)
        if dtype not in self._calls:
            self._calls[dtype] = self._launcher(self._modules[dtype], device)
        return self._calls[dtype](images)

    def _converted(self, dtype: Optional[torch.dtype]) -> nn.Module:
        backbone = self.backbone
        if dtype is not None and is_resnet(backbone):
            backbone = copy.deepcopy(backbone).to(memory_format=torch.channels_last)
            for module in backbone.modules():
                if type(module) in (Conv2d, nn.Conv2d):
                    for parameter in module.parameters(recurse=False):  # not those of its norm
                        parameter.data = parameter.data.to(dtype)
        return backbone

    def _launcher(self, backbone: nn.Module, device: str) -> Callable:
        call = torch.compile(backbone) if self.compile else backbone
        return GraphedBackbone(call) if self.cuda_graphs and device == "cuda" else call


def has_tf32(device: torch.device) -> bool:
    """Whether float32 convolutions run on tensor cores, as PyTorch lets them on recent GPUs."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    if hasattr(torch.backends.cudnn, "conv"):  # PyTorch 2.9; it may refuse to tell the older flag
        return torch.backends.cudnn.conv.fp32_precision == "tf32"
    return torch.backends.cudnn.allow_tf32


def _is_channels_last(backbone: nn.Module) -> bool:
    """Whether weights lie in memory so that they are not NCHW, too."""
    weights = [x for x in backbone.parameters() if x.dim() == 4]
    return any(
        x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        for x in weights
    )


def is_resnet(backbone: nn.Module) -> bool:
    """Whether it is Detectron2's ResNet, with an FPN or without."""
    if type(backbone) is FPN:
        backbone = backbone.bottom_up
    return type(backbone) is ResNet


def is_safe_in_bf16(images: Tensor, coarsest_stride: int) -> bool:
    """Whether a backbone may run in bf16 on images of this size; a warning says if not.

    On a CPU, PyTorch's 3x3 convolutions of stride 2 are wrong in bf16 on maps of one or two columns
    (seen in 2.15.0, with AMX): what they return depends on what the memory held before.

    Args:
        images: (N, 3, H, W), padded.
        coarsest_stride: of the backbone's levels.
    """
    if images.device.type != "cpu" or images.shape[-1] > coarsest_stride:
        return True
    log_first_n(
        logging.WARNING,
        f"TEACHER.PRECISION bf16: images of {coarsest_stride} columns or less go through the "
        "teacher's backbone in float32; PyTorch is wrong in bf16 on such small maps.",
        key="message",
        name=__name__,
    )
    return False
