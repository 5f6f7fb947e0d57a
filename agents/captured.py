"""A function of tensors as a CUDA graph, and a look at its figures that does not make the host wait.

An update is thousands of kernels of a few microseconds each. Launched one by one they take the host longer than the
GPU; recorded once and replayed, they take it one launch, and the GPU goes from one to the next without a pause.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from agents.interface import NonFiniteLoss

WARM_UP = 3
"""Calls before the recording: they allocate what stays (optimiser states), choose kernels, compile."""


class NotRecordable(RuntimeError):
    """Something in the function cannot be part of a CUDA graph. The message says what and how to do without."""


class _Recording(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    answer: Any


class Captured:
    """Calls ``function``, on a GPU by replaying a graph of its kernels.

    The first ``WARM_UP`` calls with arguments of the same shapes (and the same other values) run as they are, the next
    one is recorded. What the function reads beside its arguments has to stay where it was then, changed in place only:
    whoever puts another tensor there calls :meth:`forget`. It must not make the host wait for the device.

    Args:
        function: of nested tuples of tensors, bools and numbers; answers nested tuples of tensors.
        enabled: False calls the function, always.
        generators: of the device, which the function draws from beside PyTorch's own. Seed them outside of it.

    Raises:
        NotRecordable: at the call that is recorded.
    """

    def __init__(
        self, function: Callable[..., Any], *, enabled: bool, generators: Sequence[torch.Generator] = ()
    ) -> None:
        self.function = function
        self.enabled = enabled
        self.generators = generators
        self.forget()

    def forget(self) -> None:
        """Record anew, after another warm-up."""
        self._calls: dict[Any, int] = {}
        self._recorded: dict[Any, _Recording] = {}

    def __call__(self, *args: Any) -> Any:
        if not self.enabled:
            return self.function(*args)
        leaves, form = tree_flatten(args)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        key = (form, tuple((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in leaves))
        if key not in self._recorded:
            calls = self._calls[key] = self._calls.get(key, 0) + 1
            if calls <= WARM_UP:
                return self._beside(args)
            self._recorded[key] = self._record(leaves, form)
        graph, inputs, answer = self._recorded[key]
        torch._foreach_copy_(inputs, tensors)
        graph.replay()
        # The graph writes to the same place at the next replay.
        answers, form = tree_flatten(answer)
        return tree_unflatten([x.clone() for x in answers], form)

    def _beside(self, args: tuple[Any, ...]) -> Any:
        """On a stream of its own, as recording wants the calls before it."""
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            answer = self.function(*args)
        current.wait_stream(stream)
        return answer

    def _record(self, leaves: list[Any], form: TreeSpec) -> _Recording:
        own = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        try:
            with torch.cuda.graph(graph):
                answer = self.function(*tree_unflatten(own, form))
        except RuntimeError as error:
            # What is half recorded leaves the stream, the allocator and the random numbers in a state that nothing in
            # PyTorch's interface puts back, so that the process cannot go on without the graph.
            raise NotRecordable(
                f"this step cannot be recorded as a CUDA graph: add --compile false ({error})"
            ) from error
        return _Recording(graph, [x for x in own if isinstance(x, Tensor)], answer)


class Watch:
    """Refuses figures that are not finite: on the CPU at once, on a GPU up to ``AHEAD`` looks later, so that the host
    can prepare what comes next. It also keeps the host from running further ahead than that."""

    AHEAD = 2

    def __init__(self, device: torch.device) -> None:
        self.ahead = self.AHEAD if device.type == "cuda" else 0
        self._on_gpu = device.type == "cuda"
        self._waiting: deque[tuple[Sequence[str], Tensor, torch.cuda.Event | None]] = deque()

    def look(self, names: Sequence[str], values: Float[Tensor, " M"]) -> None:
        """Take in the figures of one more update. Raises NonFiniteLoss."""
        arrived = None
        if self._on_gpu:
            values = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._waiting.append((names, values, arrived))
        self.settle(self.ahead)

    def settle(self, left: int = 0) -> None:
        """Look at all but the newest ``left``.

        Raises:
            NonFiniteLoss: a figure is NaN or inf; says which.
        """
        while len(self._waiting) > left:
            names, values, arrived = self._waiting.popleft()
            if arrived is not None:
                arrived.synchronize()
            if not torch.isfinite(values.sum()):
                bad = [name for name, value in zip(names, values.tolist(), strict=True) if not np.isfinite(value)]
                raise NonFiniteLoss(
                    f"{', '.join(bad)} became NaN or inf; training stopped before the weights were changed, and the "
                    "last checkpoint is good. Lower the learning rates or look at the rewards' size."
                )


def send(array: Shaped[np.ndarray | Tensor, "*X"], device: torch.device) -> Shaped[Tensor, "*X"]:
    """The array on the device, without making the host wait. Its pinned memory may be dropped while it is being copied:
    PyTorch hands it out again only afterwards."""
    tensor = torch.as_tensor(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
