"""Run by test_captured, and on a GPU by hand: every way of running an update against the one operator by operator.

python -m tests.compiled_updates
"""

from dataclasses import replace

import torch
from torch import Tensor

from agents.dreamer import Compilation
from tests.test_dreamer import MODEL, flat, pixel_agent, pixel_batch

UPDATES = 12
"""Those of the model alone and those of behaviour too, in turn; a GPU replays the last of each."""
SMALL = replace(MODEL, rollout=2)
"""Every step more takes the compiler seconds."""


def learned(compilation: Compilation, device: str) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """The metrics of each update, and the state after them."""
    torch.manual_seed(0)
    agent = pixel_agent(compilation=compilation, device=device, model=SMALL, behaviour_every=2, horizon=1)
    batch = type(pixel_batch())(*(x.to(device) for x in pixel_batch()))
    agent.start(batch.obs.flatten(0, 1))
    torch.manual_seed(1)
    metrics = []
    for k in range(UPDATES):
        agent.anneal(k / 100)
        metrics.append({name: float(value) for name, value in agent.update(batch).items()})
    return metrics, flat(agent.state_dict())


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    expected, weights = learned("false", device)
    ways: tuple[Compilation, ...] = ("true",) if device == "cpu" else ("graph", "true")
    for way in ways:
        metrics, state = learned(way, device)
        for k, (found, wanted) in enumerate(zip(metrics, expected, strict=True)):
            for name, value in wanted.items():
                assert abs(found[name] - value) <= 1e-3 + 1e-3 * abs(value), (way, k, name, found[name], value)
        for name, weight in weights.items():
            torch.testing.assert_close(state[name], weight, atol=2e-3, rtol=1e-2)
        print(f"{way}: {len(metrics)} updates as operator by operator")


if __name__ == "__main__":
    main()
