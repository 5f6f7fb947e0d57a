"""Two computations at the same time on a processor's cores.

An update of these sizes is thousands of operators of a few microseconds each: two threads that share every operator
spend their time waiting for each other (and while another process has one of the cores, all of it). Two threads that
have whole computations to themselves do not.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

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
