"""Our Adam is PyTorch's, without the compiler that PyTorch's imports."""

import sys
from unittest import mock

import pytest
import torch

from agents.optimiser import Adam


def trained(kind: type[torch.optim.Adam], fused: bool) -> torch.Tensor:
    """Six steps of a small network, the last three with another rate and by an optimiser that took over the state."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    optimiser = kind(net.parameters(), lr=0.1, fused=fused)
    for step in range(6):
        if step == 3:
            state, optimiser = optimiser.state_dict(), kind(net.parameters(), lr=0.3, fused=fused)
            optimiser.load_state_dict(state)
            optimiser.param_groups[0]["lr"] = 0.03
        optimiser.zero_grad()
        net(torch.randn(5, 4)).square().mean().backward()
        optimiser.step()
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize("fused", [False, True])
def test_it_takes_pytorchs_steps_bit_for_bit(fused: bool) -> None:
    assert torch.equal(trained(Adam, fused), trained(torch.optim.Adam, fused))


def test_it_does_without_the_compiler() -> None:
    """``None`` makes an import fail; that PyTorch's own fails is what ours is for."""
    with mock.patch.dict(sys.modules, {"torch._dynamo": None}):
        trained(Adam, True)
        with pytest.raises(ModuleNotFoundError, match="_dynamo"):
            trained(torch.optim.Adam, True)
