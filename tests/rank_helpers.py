"""What two processes compute between them, and what one computes alone by the very same lines."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from agents.actor_critic import CriticConfig, Pathwise, PolicyConfig
from agents.dreamer import DreamerAgent, DreamerConfig
from agents.interface import NonFiniteLoss
from runners import train as program
from runners.config import ConfigError
from runners.run import Run
from tests.loop_helpers import TINY, config, signal_at_row
from tests.test_lewm import SMALL, random_batch
from worldmodels import ranks
from worldmodels.interface import Batch, State
from worldmodels.lewm import build_world_model
from worldmodels.sigreg import sigreg

MODEL = replace(SMALL, cut_windows=False, inverse_weight=0.5)
AGENT = DreamerConfig(
    policy=PolicyConfig(units=16),
    critic=CriticConfig(units=16, rows="split"),
    horizon=3,
    starts=32,
    precision="float32",
)
ALL_ROWS = replace(AGENT, critic=CriticConfig(units=16))
RUN = TINY | {"num-envs": 2, "env-steps": 560, "loop.eval-every": 280, "loop.eval-episodes": 1}
"""Two environments, of which two ranks have one each, in their own process: 35 rows of each, 20 of them random."""

Answer = dict[str, Tensor]


def own(whole: Tensor) -> Tensor:
    """This rank's rows of what all have together."""
    n = ranks.part(len(whole))
    return whole[ranks.rank() * n : (ranks.rank() + 1) * n]


def uneven_batch() -> Batch:
    """State sequences (4, 8) of which only the second half ends within, so that the ranks' masks differ."""
    batch = random_batch((5,), 8)
    for row, column in ((2, 3), (2, 6), (3, 2), (3, 5), (3, 7)):
        batch.is_first[row, column] = batch.is_last[row, column - 1] = True
        batch.is_terminal[row, column - 1] = column < 6
    return batch._replace(action=torch.where(batch.is_last[..., None], 0.0, batch.action))


def awake(module: nn.Module) -> None:
    """Heads begin at zero; this opens every path."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def of_sigreg(*sample: int) -> Answer:
    """Of latents far from normal, the later the farther. The rows of a sample are its last axis but one."""
    torch.manual_seed(0)
    rows = torch.randn(8, *sample, 6) * torch.linspace(0.2, 3, 8).view(8, *[1] * len(sample), 1)
    directions = torch.nn.functional.normalize(torch.randn(6, 16), dim=0)
    z = own(rows).requires_grad_()
    statistic = sigreg(z.movedim(0, -2), directions, over_ranks=True)
    statistic.backward()
    return {"statistic": ranks.sum_over_ranks(statistic), "gradient": ranks.all_rows(z.grad)}


def of_losses() -> Answer:
    """Every loss of the world model, and the gradients of their sum. Each rank's own directions would be others."""
    torch.manual_seed(1)
    model, batch = build_world_model((5,), 2, MODEL), uneven_batch()
    awake(model)
    torch.manual_seed(2 + ranks.rank())
    loss, _, metrics = model.loss(Batch(*map(own, batch)))
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    ranks.sum_in_place(list(gradients.values()))
    return gradients | {name: ranks.sum_over_ranks(value) for name, value in metrics.items()}


class FromEverywhere(DreamerAgent):
    """Imagines from every row, where ``DreamerAgent`` draws some, which are others on other ranks."""

    def _choose_starts(self, states: State, ended: Tensor) -> State:
        return type(states)(*(x.detach() for x in states))


def learner(settings: DreamerConfig = AGENT) -> DreamerAgent:
    torch.manual_seed(3)
    agent = FromEverywhere(build_world_model((5,), 2, MODEL), 2, Pathwise(), settings)
    for module in (agent.model, agent.policy, agent.critic):
        awake(module)
    agent.start(own(3 * torch.randn(32, 5) + 1))
    return agent


def of_updates(settings: DreamerConfig = AGENT) -> Answer:
    """Three updates: all metrics, and of the last all gradients; the weights after them."""
    agent = learner(settings)
    found: Answer = {}
    noise = iter(torch.randn(3 * AGENT.horizon, AGENT.starts, 2))
    for i in range(3):
        batch = uneven_batch()
        with mock.patch.object(torch, "randn_like", side_effect=lambda like: own(next(noise))):
            metrics = agent.update(Batch(*map(own, batch)))
        found |= {f"{name}, update {i}": value for name, value in metrics.items()}
    for name, group in agent.groups.items():
        found |= {f"gradient of {name} {i}": p.grad for i, p in enumerate(group) if p.grad is not None}
    return found | weights(agent)


def weights(agent: DreamerAgent) -> Answer:
    modules = {"model": agent.model, "policy": agent.policy, "critic": agent.critic, "scale": agent.scale}
    return {f"{m}.{n}": x.clone() for m, module in modules.items() for n, x in module.state_dict().items()}


def of_a_nan_in_one_row() -> Answer:
    """Whether the update is refused and leaves the weights alone, where one rank of two has the NaN."""
    agent, batch = learner(), uneven_batch()
    batch.reward[3, 4] = torch.nan
    before = weights(agent)
    try:
        agent.update(Batch(*map(own, batch)))
    except NonFiniteLoss as refused:
        same = [torch.equal(value, before[name]) for name, value in weights(agent).items()]
        return {"reward_loss named": torch.tensor("reward_loss" in str(refused)), "same": torch.tensor(same)}
    raise AssertionError("a NaN was learned from")


ANSWERS: dict[str, Callable[[], Answer]] = {
    "SIGReg of one sample": of_sigreg,
    "SIGReg of a sample for each time step": lambda: of_sigreg(3),
    "the world model's losses": of_losses,
    "updates": of_updates,
    "updates where every row teaches every critic": lambda: of_updates(ALL_ROWS),
    "a NaN": of_a_nan_in_one_row,
}


# -- two processes -----------------------------------------------------------------------------------------------------


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextmanager
def as_torchrun(rank: int, port: int) -> Iterator[None]:
    """The environment variables of one of two processes that torchrun starts."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    with mock.patch.dict(os.environ, {name: str(value) for name, value in told.items()}, MASTER_ADDR="127.0.0.1"):
        yield


def work(rank: int, ports: list[int], folder: Path) -> None:
    """What one of two processes does in this module's tests; what it found goes into the folder."""
    torch.set_num_threads(1)
    with as_torchrun(rank, ports[0]), ranks.together(torch.device("cpu")):
        found = {name: answer() for name, answer in ANSWERS.items()}
        told: dict[str, Any] = {"BatchNorm": refusal(transformer_agent)}
    told |= {"stopped": stop(rank, ports[1], folder / "run")}
    with as_torchrun(rank, ports[2]), mock.patch.object(program, "finish", keeping_weights(found)):
        result = program.train(config(folder / "run", RUN), quiet=True)
    told |= {"result": None if result is None else result.returns}
    with as_torchrun(rank, ports[3]):
        told |= {
            "baseline": refusal(lambda: program.train(config(folder / "baseline", RUN, agent="sac", env__obs="state")))
        }
        torch.distributed.destroy_process_group()
    with as_torchrun(rank, ports[4]):
        told |= {"lost": lose(rank)}
    torch.save(found, folder / f"answers-{rank}.pt")
    (folder / f"told-{rank}.json").write_text(json.dumps(told))


def refusal(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except (ranks.RanksError, ConfigError) as error:
        return str(error)
    return ""


def transformer_agent() -> DreamerAgent:
    return DreamerAgent(build_world_model((5,), 2, replace(MODEL, predictor="transformer")), 2, Pathwise(), AGENT)


def stop(rank: int, port: int, path: Path) -> bool:
    """Whether the run stopped when the second process, and it alone, got SIGTERM."""
    signalled = signal_at_row(signal.SIGTERM, 28) if rank == 1 else nullcontext()
    with as_torchrun(rank, port), signalled:
        return program.train(config(path, RUN), quiet=True) is None


def keeping_weights(found: dict[str, Answer]) -> Callable:
    real = program.finish

    def finish(run: Run, *rest: object) -> object:
        result = real(run, *rest)  # type: ignore[arg-type]
        assert isinstance(run.agent, DreamerAgent)
        found["weights of a run"] = weights(run.agent)
        return result

    return finish


def lose(rank: int) -> str:
    """What the first process hears when the second dies."""
    joined = ranks.together(torch.device("cpu"))
    joined.__enter__()
    return refusal(lambda: ranks.total(1)) if rank == 0 else "died"
