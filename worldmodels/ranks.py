"""The processes ("ranks") that learn one agent together, each on its part of every batch; ``torchrun`` starts them.

What makes N ranks learn as one would on the whole batch:

- Every loss is a rank's *share*. Shares add up over the ranks to the loss of the whole batch, and so do their
  gradients: a sum over rows is divided by the whole batch's count, and gradients are added, not averaged.
- What is no sum over rows (SIGReg, percentiles, the normaliser's fit) is computed from all ranks' rows.
- What must be equal everywhere (SIGReg's directions) is the first rank's.

In one process every function is the identity, to the bit. In several, all ranks have to call the same functions in the
same order, from one thread, with tensors of the same shapes; a tensor on the CPU takes no part in what a GPU does.

A rank that waits for one that has died is not left hanging: with gloo the call fails, as :class:`RanksError`, and
torchrun ends all others as soon as one has failed, those that wait on a GPU for good included.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor

T = TypeVar("T")

PATIENCE = timedelta(days=1)
"""How long ranks wait for each other. While the first evaluates, by planning for instance, that can be an hour."""


class RanksError(RuntimeError):
    """The processes of a run cannot work together, or not any longer. The message says why."""


@contextmanager
def together(device: torch.device) -> Iterator[None]:
    """While entered, the processes that ``torchrun`` started side by side are ranks; one alone stays as it is.

    On CUDA, rank i has the i-th GPU, and what is on the CPU still goes through gloo: counters need no GPU to stop.
    Leaving it waits for the others, so that none ends while the first is still writing; an error does not wait.

    Raises:
        RanksError: more processes than GPUs; processes on several machines.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield
        return
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    if here != count:
        raise RanksError(
            f"{count} processes were started, {here} of them on this machine; start all of them here, as by "
            f"torchrun --nproc-per-node {count}"
        )
    backend = "gloo"
    if device.type == "cuda":
        gpus = torch.cuda.device_count()
        if count > gpus:
            raise RanksError(f"{count} processes need a GPU each, but there are {gpus}; use --nproc-per-node {gpus}")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    with _meeting():
        dist.init_process_group(backend, timeout=PATIENCE)
    yield
    total(0)
    dist.destroy_process_group()


def size() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this rank is the one that writes, evaluates and reports."""
    return rank() == 0


def part(whole: int) -> int:
    """How many of ``whole`` things (rows, environments) are a rank's."""
    return whole // size()


def share(mean: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
    """A rank's share of the mean over all rows, from the mean over its own, of which every rank has as many."""
    return mean if size() == 1 else mean / size()


def sum_over_ranks(x: Shaped[Tensor, "*N"]) -> Shaped[Tensor, "*N"]:
    """The sum of every rank's ``x``, without a gradient."""
    if size() == 1:
        return x
    x = x.detach().clone()
    with _meeting():
        dist.all_reduce(x)
    return x


def sum_in_place(tensors: Sequence[Tensor]) -> None:
    """Every tensor becomes its sum over the ranks; all of them travel as one."""
    if size() == 1:
        return
    flat = sum_over_ranks(torch.cat([x.flatten() for x in tensors]))
    parts = flat.split([x.numel() for x in tensors])
    torch._foreach_copy_(list(tensors), [part.view_as(x) for part, x in zip(parts, tensors, strict=True)])


def all_rows(x: Shaped[Tensor, "N *X"]) -> Shaped[Tensor, "M *X"]:
    """Every rank's rows one after the other, by rank; without a gradient."""
    if size() == 1:
        return x
    rows = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(size())]
    with _meeting():
        dist.all_gather(rows, x.detach().contiguous())
    return torch.cat(rows)


def of_first(x: Shaped[Tensor, "*N"]) -> Shaped[Tensor, "*N"]:
    """The first rank's ``x``, without a gradient."""
    if size() == 1:
        return x
    x = x.detach().clone()
    with _meeting():
        dist.broadcast(x, 0)
    return x


def total(count: int) -> int:
    """The sum of every rank's ``count``; it does not wait for a GPU."""
    return count if size() == 1 else int(sum_over_ranks(torch.tensor(int(count))))


def done_by_first(work: Callable[[], T]) -> T:
    """What ``work`` answers in the first rank, which alone does it; the others wait and get a copy.

    Objects travel pickled, from process to process of one run; none is read from a disk.
    """
    if size() == 1:
        return work()
    answer: list[Any] = [work() if is_first() else None]
    with _meeting():
        dist.broadcast_object_list(answer, 0)
    return answer[0]


def of_each(value: T) -> list[T]:
    """Every rank's ``value``, by rank."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    with _meeting():
        dist.all_gather_object(values, value)
    return values


@contextmanager
def _meeting() -> Iterator[None]:
    """Around every call that waits for the others."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise RanksError(
            f"another process of this run has ended or failed, so this one ends, too; look for its message ({reason})"
        ) from error
