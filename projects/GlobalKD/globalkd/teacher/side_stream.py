"""A CUDA stream of the teacher's own, so that its pass may overlap the student's forward.

A two-stage student often leaves a GPU idle: while the host waits for a number of boxes, nothing new
is launched. The teacher's pass, launched before, fills these gaps.
"""

from typing import Callable, Dict

import torch
from torch import Tensor

Maps = Dict[str, Tensor]


class SideStream:
    """Computes maps on its own stream and hands them over to the stream that asks for them."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def begin(self, compute: Callable[[], Maps]) -> Callable[[], Maps]:
        """Launch `compute` on the side stream.

        Args:
            compute: launches kernels that read what the present stream has launched so far.

        Returns:
            A function that gives the maps, ready for the stream that is current when it is called.
            The host does not wait in either call.
        """
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            maps = compute()

        def finish() -> Maps:
            reader = torch.cuda.current_stream(self.device)
            reader.wait_stream(self.stream)
            for x in maps.values():
                x.record_stream(reader)  # their memory is not reused before it has read them
            return maps

        return finish
