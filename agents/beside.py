"""Two computations at the same time on a processor's cores.

An update of these sizes is thousands of operators of a few microseconds each: two threads that share every operator
spend their time waiting for each other (and while another process has one of the cores, all of it). Two threads that
have whole computations to themselves do not. Where operators are large it is the other way round: shared, they keep all
cores busy to the end, while one of two computations is always the first to be done.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

SHARED = 40_000_000
"""Floating-point operations of the largest operator from which on it is better shared: found on two cores, with
imagined starts and layers of many sizes."""

A = TypeVar("A")
B = TypeVar("B")


def one_after_the_other(first: Callable[[], A], second: Callable[[], B]) -> tuple[A, B]:
    """For a GPU, whose queue is filled by one thread, and for a single core."""
    return first(), second()


def side_by_side(first: Callable[[], A], second: Callable[[], B]) -> tuple[A, B]:
    """``second`` in a thread of its own, each on half of the cores; an error in either is raised here."""
    threads = torch.get_num_threads()
    if threads < 2:
        return one_after_the_other(first, second)
    own = threads // 2

    def of_second() -> B:
        torch.get_num_threads()  # a thread's first call takes over the number that was set last, in any thread
        torch.set_num_threads(own)
        return second()

    running = _helper().submit(of_second)
    torch.set_num_threads(threads - own)
    try:
        done = first()
    finally:
        torch.set_num_threads(threads)
        running.exception()  # waits: what it reads must not change under it
    return done, running.result()


@cache
def _helper() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="beside")
