"""A backbone whose kernels are recorded once for each shape of its input, and then replayed.

A GPU runs a batch of two images through a ResNet-101 in less time than the host needs to launch its
kernels one by one. A CUDA graph launches all of them at once.
"""

import logging
from contextlib import nullcontext
from typing import Callable, Dict, Set, Tuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

#: Shapes that are recorded at most; inputs of any further shape are launched kernel by kernel.
MAX_GRAPHS = 256

Maps = Dict[str, Tensor]


class GraphedBackbone:
    """Calls a frozen backbone on a GPU; from the second input of a shape on, as a graph.

    All graphs share one input, one output a level and the memory in between. A shape that is larger
    than all before it gets new memory, and those before it keep theirs.
    """

    def __init__(self, backbone: Callable[[Tensor], Maps]):
        """
        Args:
            backbone: launches the same kernels for inputs of one shape, and never waits for them.
        """
        self._backbone = backbone
        self._seen: Set[tuple] = set()
        self._graphs: Dict[tuple, Tuple[Callable, Tensor, Maps]] = {}
        self._buffers: Maps = {}
        # PyTorch shares a pool's memory only between recordings on one stream.
        self._stream = self._pool = None

    def __call__(self, images: Tensor) -> Maps:
        """
        Args:
            images: (N, 3, H, W), NCHW or channels_last.

        Returns:
            The backbone's maps. They hold until the next call.
        """
        with torch.cuda.device(images.device) if images.is_cuda else nullcontext():
            return self._call(images)

    def _call(self, images: Tensor) -> Maps:
        key = images.shape, images.stride()
        if key not in self._graphs:
            if key not in self._seen:  # a shape that comes but once is not worth a recording
                self._seen.add(key)
                return self._backbone(images)
            if len(self._graphs) == MAX_GRAPHS:
                return self._backbone(images)
            self._graphs[key] = self._record(images)
            if len(self._graphs) == MAX_GRAPHS:
                logger.warning(
                    f"TEACHER.CUDA_GRAPHS: {MAX_GRAPHS} shapes of input are recorded, and no more "
                    "will be: batches of other shapes run as without it."
                )
        replay, images_in, maps = self._graphs[key]
        images_in.copy_(images)
        replay()
        return maps

    def _record(self, images: Tensor) -> Tuple[Callable, Tensor, Maps]:
        """How to replay, what it reads, what it writes."""
        images_in = self._buffer("images", images)
        images_in.copy_(images)
        stream = torch.cuda.current_stream()
        aside = self._stream = self._stream or torch.cuda.Stream()
        aside.wait_stream(stream)
        with torch.cuda.stream(aside):  # what is made at a first call must not be recorded
            first = self._backbone(images_in)
        stream.wait_stream(aside)
        maps = {name: self._buffer(name, x) for name, x in first.items()}
        del first

        def run() -> None:
            for name, x in self._backbone(images_in).items():
                maps[name].copy_(x)

        try:
            replay, self._pool = record(run, aside, self._pool)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                "MODEL.GLOBALKD.TEACHER.CUDA_GRAPHS: the teacher's backbone cannot be recorded, as "
                f"one that makes the host wait cannot. Set it to False. {error}"
            ) from error
        return replay, images_in, maps

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        """Memory of a dense tensor's shape and strides, shared by all graphs."""
        memory = self._buffers.get(name)
        if memory is None or memory.numel() < like.numel():  # earlier graphs keep the smaller one
            memory = self._buffers[name] = like.new_empty(like.numel())
        return memory[: like.numel()].as_strided(like.shape, like.stride())


def record(run: Callable[[], None], stream, pool) -> Tuple[Callable, object]:
    """Record what a function launches.

    Args:
        run: the function.
        stream: where to record; none that is in use, and the same for all of a pool.
        pool: whose temporary memory to share; None for a new one.

    Returns:
        What replays it, and the pool.
    """
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as a loader's that pins memory, may use the GPU meanwhile.
    mode = "thread_local"
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode=mode):
        run()
    return graph.replay, graph.pool()
