"""A step that is repeated many times, recorded once as a CUDA graph on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch

WARM_UP = 2  # steps run eagerly first: libraries are initialised in them


class RecordedStep:
    """A step that works in place: each call does the same to the same tensors.

    On a GPU the third step is recorded as a CUDA graph and replayed from then on. For small
    networks or few images, launching its hundreds of kernels one by one takes longer than running
    them.

    Args:
        step: Takes and returns nothing; reads and changes fixed tensors in place, and never copies
            a value to the CPU. A step that can't be recorded runs eagerly every time.
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
            # Other threads, such as those of a widget, may use the GPU at the same time.
            with (
                torch.cuda.device(self.device),
                torch.cuda.graph(graph, capture_error_mode="thread_local"),
            ):
                self.step()
        except RuntimeError:  # the network synchronises with the CPU, or can't be recorded
            return None
        return graph
