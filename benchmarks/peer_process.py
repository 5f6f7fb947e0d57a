"""A peer in a process of its own, by an interpreter of its own where its pins are not ours. It works when it is asked,
so that it can be timed in turn with ours.

It imports nothing that draws: the Triton that comes with PyTorch's CUDA build crashes in a process into which Mesa has
loaded its own LLVM.

The process writes a line of JSON that says what it is, or why it cannot be used. Then it reads lines, each a number of
calls, and answers each with what they took.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

import torch

from benchmarks.decision import published_peer
from benchmarks.peers import Peer, PeerUnavailable, stable_worldmodel_update
from benchmarks.peers_sheeprl import Size, sheeprl_update
from benchmarks.stopwatch import Cost, cost_of
from worldmodels.lewm import PAPER

_ROOT = Path(__file__).parents[1]
_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""What ``runners.session.configure_torch`` tells glibc in our process."""


@dataclass(frozen=True)
class PeerTask:
    """What a peer is to do, so that it is what ours does."""

    work: Size | Literal["lewm_update", "lewm_decision"]
    """An update by sheeprl's DreamerV3 of that size, or stable-worldmodel's training step or decision."""
    device: str = "cpu"
    threads: int = 1
    """CPU threads that PyTorch uses."""
    bf16: bool = False
    """Updates run the networks in bfloat16 autocast, else in float32. The decision is float32, as it ships."""
    batch: int = 16
    """Sequences in an update, B."""
    length: int = 64
    """Rows of a sequence, T."""
    horizon: int = 15
    """Imagined steps, H."""
    actions: int = 6
    """Size of an action, A."""


class PeerProcess:
    """A running peer, a context that ends it.

    Raises:
        PeerUnavailable: the interpreter cannot be started, or the peer cannot be used there.
    """

    def __init__(self, python: Path, task: PeerTask) -> None:
        self._task = task
        command = [str(python.absolute()), "-m", "benchmarks.peer_process", json.dumps(asdict(task))]
        with ExitStack() as opened:
            self._said = opened.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace"))
            try:
                process = subprocess.Popen(
                    command,
                    cwd=_ROOT,
                    env=os.environ | _MALLOC,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._said,
                    text=True,
                )
            except OSError as error:
                raise PeerUnavailable(f"{python} cannot be started: {error.strerror}; name a Python") from error
            self._process = opened.enter_context(process)  # leaving it closes its input, which ends it
            about = self._answer()
            self._opened = opened.pop_all()
        self.name: str = about["name"]
        """With versions."""
        self.parameters: int = about["parameters"]
        """Those that it learns."""

    def __call__(self, calls: int) -> Cost:
        """What ``calls`` calls took. Raises PeerUnavailable: it ended."""
        assert self._process.stdin is not None
        try:
            print(calls, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            pass  # it ended: the answer that is missing says so
        return Cost(**self._answer())

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._said.seek(0)
            last = next((said for said in reversed(self._said.read().splitlines()) if said.strip()), "it said nothing")
            raise PeerUnavailable(f"{self._task.work} ended with exit status {status}: {last.strip()}")
        answer = json.loads(line)
        if "unavailable" in answer:
            raise PeerUnavailable(answer["unavailable"])
        return answer

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with suppress(BrokenPipeError):  # a question that it did not live to read
            self._opened.close()


def build_peer(task: PeerTask) -> Peer:
    """Raises PeerUnavailable."""
    device = torch.device(task.device)
    sizes = {"batch": task.batch, "length": task.length, "actions": task.actions}
    if task.work == "lewm_decision":
        return published_peer(device)
    if task.work == "lewm_update":
        return stable_worldmodel_update(PAPER, **sizes, bf16=task.bf16, device=device)
    assert task.work in get_args(Size)
    return sheeprl_update(task.work, **sizes, horizon=task.horizon, bf16=task.bf16, device=device)


def main(args: Sequence[str]) -> int:
    task = PeerTask(**json.loads(args[0]))
    # What a peer prints is no answer.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1, encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    torch.set_num_threads(task.threads)
    torch.manual_seed(0)
    try:
        peer = build_peer(task)
    except PeerUnavailable as error:
        print(json.dumps({"unavailable": str(error)}), file=answers)
        return 0
    about = {"name": f"{peer.name}, torch {torch.__version__}", "parameters": peer.parameters}
    print(json.dumps(about), file=answers)
    for line in sys.stdin:
        print(json.dumps(cost_of(peer.work, int(line), torch.device(task.device))._asdict()), file=answers)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
