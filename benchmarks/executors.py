"""Where the runs of a grid are trained: in processes here, on a Ray cluster, or by Slurm."""

from __future__ import annotations

import importlib
import os
import socket
import time
from collections import deque
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from benchmarks.grid import GridError
from benchmarks.training import POLL_S, Job, Resubmitted, Training, execute, last_lines

CONNECT_S = 5.0
"""How long an address of a cluster may take to answer."""
RETRIES_OF_RAY = 3
"""How often Ray starts a run again whose worker or machine was lost. That is not the run's failure."""


class Executor(Protocol):
    """Takes jobs and says when they ended. Nothing it is asked for waits for a job, but :meth:`stop`."""

    def has_room(self) -> bool:
        """Whether it takes one more job now."""
        ...

    def start(self, job: Job) -> None: ...

    def ended(self) -> list[tuple[Job, str | None]]:
        """The jobs that ended since the last call, each with what went wrong."""
        ...

    def stop(self) -> None:
        """Let all jobs save, and return when they have ended. A KeyboardInterrupt ends them at once."""
        ...


class LocalProcesses:
    """Processes on this machine, at most ``jobs`` at once."""

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        self._trainings: list[Training] = []

    def has_room(self) -> bool:
        return len(self._trainings) < self._jobs

    def start(self, job: Job) -> None:
        self._trainings.append(Training(job))

    def ended(self) -> list[tuple[Job, str | None]]:
        over = [one for one in self._trainings if one.ended()]
        self._trainings = [one for one in self._trainings if one not in over]
        return [(one.job, one.error()) for one in over]

    def stop(self) -> None:
        for one in self._trainings:
            one.terminate()
        try:
            for one in self._trainings:
                one.wait()
        except KeyboardInterrupt:
            for one in self._trainings:
                one.kill()
            raise


class RayCluster:
    """Tasks of a Ray cluster, each holding its CPUs and its part of a GPU; Ray decides how many run at once.

    Args:
        address: ``host:port`` of the cluster that this machine belongs to, or ``ray://host:port`` of any other. None:
            RAY_ADDRESS, or the cluster that runs on this machine, or a new one of this machine alone.
        cpus, gpus: of each run.

    Raises:
        GridError: Ray is not installed; nothing answers there; what answers is no cluster that can be joined.
    """

    def __init__(self, address: str | None, cpus: float, gpus: float) -> None:
        self._ray: Any = _extra("ray")
        address = address or os.environ.get("RAY_ADDRESS")
        if address is not None and address not in ("auto", "local"):
            _check_answer(address)
        try:
            self._ray.init(address=address, log_to_driver=False)
        except Exception as error:  # of many kinds, bare ones among them
            raise GridError(f"Ray cannot be reached{f' at {address}' if address else ''}: {error}") from error
        options = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": RETRIES_OF_RAY}
        self._task = self._ray.remote(**options)(execute)
        self._jobs: dict[Any, Job] = {}

    def has_room(self) -> bool:
        return True

    def start(self, job: Job) -> None:
        self._jobs[self._task.options(name=job.name).remote(job)] = job

    def ended(self) -> list[tuple[Job, str | None]]:
        if not self._jobs:
            return []
        over, _ = self._ray.wait(list(self._jobs), num_returns=len(self._jobs), timeout=0)
        return [(self._jobs.pop(one), self._error(one)) for one in over]

    def _error(self, reference: Any) -> str | None:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            return str(error)

    def stop(self) -> None:
        try:
            for one in self._jobs:
                self._ray.cancel(one, force=False)  # raises KeyboardInterrupt in the task
            while self._jobs:
                self.ended()
                time.sleep(POLL_S)
        finally:
            self._ray.shutdown()


class Slurm:
    """Jobs of Slurm, through submitit. Before its time limit, and when it is preempted, a job saves and queues again.

    submitit hands functions over as pickles, in ``folder``; nothing of them is read back here.

    Args:
        folder: for submitit's scripts and logs; seen by every machine.
        cpus, gpus: of each run.
        hours: after which Slurm ends a job, which then queues again.
        partition: of the cluster; None: its default.
        cluster: of submitit: ``slurm``, or ``local`` for processes here.

    Raises:
        GridError: submitit is not installed, or there is no Slurm here.
    """

    def __init__(
        self, folder: Path, *, cpus: int, gpus: int, hours: float, partition: str | None = None, cluster: str = "slurm"
    ) -> None:
        submitit = _import_submitit()
        try:
            self._executor = submitit.AutoExecutor(folder=folder, cluster=cluster, slurm_max_num_timeout=1000)
        except RuntimeError as error:
            raise GridError(f"--slurm: {error}") from error
        self._executor.update_parameters(
            name="ledream",
            timeout_min=round(60 * hours),
            cpus_per_task=cpus,
            gpus_per_node=gpus,
            slurm_signal_delay_s=120,
            slurm_partition=partition,
        )
        self._jobs: deque[tuple[Any, Job]] = deque()

    def has_room(self) -> bool:
        return True

    def start(self, job: Job) -> None:
        self._jobs.append((self._executor.submit(Resubmitted(job)), job))

    def ended(self) -> list[tuple[Job, str | None]]:
        over = [(submitted, job) for submitted, job in self._jobs if submitted.done()]
        self._jobs = deque(pair for pair in self._jobs if pair not in over)
        return [(job, _told(submitted)) for submitted, job in over]

    def stop(self) -> None:
        for submitted, _ in self._jobs:
            submitted.cancel()
        while self._jobs:
            self.ended()
            time.sleep(POLL_S)


def _told(submitted: Any) -> str:
    file = Path(submitted.paths.stderr)
    told = last_lines(file) if file.exists() else []
    return "\n".join(told or [f"job {submitted.job_id} of Slurm ended as {submitted.state} and printed nothing"])


def _import_submitit() -> ModuleType:
    """Without its own set-up of logging, which closes every handler that there is, and what absl's writes to."""
    before = os.environ.get("SUBMITIT_LOG_LEVEL")
    os.environ["SUBMITIT_LOG_LEVEL"] = "NOCONFIG"
    try:
        return _extra("submitit")
    finally:
        del os.environ["SUBMITIT_LOG_LEVEL"]
        if before is not None:
            os.environ["SUBMITIT_LOG_LEVEL"] = before


def _extra(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise GridError(
            f"{module} is not installed ({error}); install it with pip install -e '.[cluster]', then run this again"
        ) from error


def _check_answer(address: str) -> None:
    """Raises GridError if nothing speaks gRPC there. Ray itself would try for minutes."""
    grpc: Any = _extra("grpc")
    target = address.removeprefix("ray://")
    host, colon, port = target.rpartition(":")
    if not (colon and host and port.isdigit()):
        raise GridError(f"--ray {address} is not an address; give host:port or ray://host:port")
    try:
        socket.create_connection((host, int(port)), CONNECT_S).close()  # says at once why not
        with grpc.insecure_channel(target) as channel:
            grpc.channel_ready_future(channel).result(timeout=CONNECT_S)
    except (OSError, OverflowError, grpc.FutureTimeoutError) as error:
        why = "what listens there is no Ray" if isinstance(error, grpc.FutureTimeoutError) else error
        raise GridError(
            f"no Ray cluster answers at {address}: {why}. Start one there (ray start --head) or give its address"
        ) from error
