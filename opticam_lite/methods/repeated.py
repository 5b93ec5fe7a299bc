"""A step of an optimisation, done over and over; a GPU needs to be told only once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

WARM_UP = 2  # done as usual: libraries make their preparations


class Repeated:
    """A step that works in place: called again, it does to the same tensors the same again.

    On a GPU the third step is recorded (a CUDA graph), and from then on replayed at one command.
    With a small network or few images, to give its hundreds of commands one by one takes longer
    than to follow them.

    Args:
        step: Takes and returns nothing, reads and changes tensors that stay where they are, and
            never asks for a value. A step that can't be recorded is done as usual every time.
        device: Where it computes.
    """

    def __init__(self, step: Callable[[], None], device: torch.device) -> None:
        self.step, self.device = step, device
        self.done = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Do the step once."""
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
            # Other threads, such as a widget's, may go on meanwhile.
            with (
                torch.cuda.device(self.device),
                torch.cuda.graph(graph, capture_error_mode="thread_local"),
            ):
                self.step()
        except RuntimeError:  # the network asks for a value, or does what can't be recorded
            return None
        return graph


@dataclass
class Found:
    """Where an optimisation of saliency maps is, and the best that it has seen."""

    S: Tensor
    """The present maps `(N, 1, h, w)`."""
    F: Tensor
    """Their objectives `(N,)`."""
    S_best: Tensor
    F_best: Tensor

    @classmethod
    def at(cls, S: Tensor) -> Found:
        """Begin with maps whose objectives are not known."""
        F = S.new_full((len(S),), -math.inf)
        return cls(S.clone(), F, S.clone(), F.clone())

    def keep(self, S: Tensor, F: Tensor) -> None:
        """Take the next maps and their objectives, in place."""
        better = self.F_best < F
        self.F_best.copy_(F.where(better, self.F_best))
        self.S_best.copy_(S.where(better[:, None, None, None], self.S_best))
        self.F.copy_(F)
        self.S.copy_(S)
