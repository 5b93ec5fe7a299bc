"""A step that is repeated many times, recorded once on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch

WARM_UP = 2  # steps run as usual first: libraries initialise themselves in them


class RecordedStep:
    """A step that works in place: called again, it does the same to the same tensors.

    On a GPU the third step is recorded (a CUDA graph) and replayed from then on. For small networks
    or few images, to launch its hundreds of kernels one by one takes longer than to run them.

    Args:
        step: Takes and returns nothing; reads and changes tensors that stay where they are, and
            never asks for a value. A step that can't be recorded is run as usual every time.
        device: Where it computes.
    """

    def __init__(self, step: Callable[[], None], device: torch.device) -> None:
        self.step, self.device = step, device
        self.done = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Run the step once."""
        if self.device.type == "cuda" and self.done == WARM_UP:
            self._graph = self._recorded()
        self.done += 1
        if self._graph is None:
            self.step()
        else:
            self._graph.replay()

    def _recorded(self) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads, such as a widget's, may use the GPU meanwhile.
            with (
                torch.cuda.device(self.device),
                torch.cuda.graph(graph, capture_error_mode="thread_local"),
            ):
                self.step()
        except RuntimeError:  # the network asks for a value, or does what can't be recorded
            return None
        return graph
