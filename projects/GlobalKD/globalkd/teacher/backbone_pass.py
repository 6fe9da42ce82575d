"""How a frozen backbone runs: its layout, its precision, compiled or not, launched or replayed.

Whatever is chosen here, the maps are the same up to the rounding of the precision.
"""

import copy
from typing import Callable, Dict, Optional

import torch
from detectron2.layers import Conv2d
from detectron2.modeling.backbone import FPN, ResNet
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
        self._calls: Dict[Optional[torch.dtype], Callable] = {}

    def __getstate__(self):
        return {**self.__dict__, "_calls": {}}  # a copy makes its own

    def __call__(self, images: Tensor) -> Dict[str, Tensor]:
        """
        Args:
            images: (N, 3, H, W) float32.

        Returns:
            level -> map, in any memory format. With CUDA graphs they hold until the next call.
        """
        device = images.device
        on = device.type
        dtype = torch.get_autocast_dtype(on) if torch.is_autocast_enabled(on) else None
        if dtype not in self._calls:
            self._calls[dtype] = self._prepare(dtype, device)
        return self._calls[dtype](images)

    def _prepare(self, dtype: Optional[torch.dtype], device: torch.device) -> Callable:
        backbone, is_resnet = self.backbone, _is_resnet(self.backbone)
        in_16_bits = dtype is not None
        # Where convolutions run faster on it.
        channels_last = device.type == "cpu" or in_16_bits or (is_resnet and has_tf32(device))
        if in_16_bits and is_resnet:
            backbone = copy.deepcopy(backbone)
        for module in backbone.modules() if channels_last and is_resnet else ():
            if type(module) in (Conv2d, nn.Conv2d):
                weight, bias = module.weight, module.bias  # not those of its norm
                weight.data = weight.data.to(dtype=dtype, memory_format=torch.channels_last)
                if bias is not None:
                    bias.data = bias.data.to(dtype=dtype)
        call = torch.compile(backbone) if self.compile else backbone
        if self.cuda_graphs and device.type == "cuda":
            call = GraphedBackbone(call)
        if not channels_last:
            return call
        return lambda images: call(images.contiguous(memory_format=torch.channels_last))


def has_tf32(device: torch.device) -> bool:
    """Whether float32 convolutions run on tensor cores, as PyTorch lets them on recent GPUs."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    if hasattr(torch.backends.cudnn, "conv"):  # PyTorch 2.9; it may refuse to tell the older flag
        return torch.backends.cudnn.conv.fp32_precision == "tf32"
    return torch.backends.cudnn.allow_tf32


def _is_resnet(backbone: nn.Module) -> bool:
    if type(backbone) is FPN:
        backbone = backbone.bottom_up
    return type(backbone) is ResNet
