"""Adam, without the seconds that PyTorch's own takes to begin."""

from __future__ import annotations

from inspect import unwrap

import torch


class Adam(torch.optim.Adam):
    """``torch.optim.Adam``. What PyTorch wraps around its methods keeps torch.compile out of them, and imports the
    whole compiler to do so: 2 seconds and 70 MB of every program that learns, whether or not it compiles anything. Here
    no optimiser's step is ever compiled."""

    add_param_group = unwrap(torch.optim.Adam.add_param_group)
    zero_grad = unwrap(torch.optim.Adam.zero_grad)
    state_dict = unwrap(torch.optim.Adam.state_dict)
    load_state_dict = unwrap(torch.optim.Adam.load_state_dict)
    step = torch.no_grad()(unwrap(torch.optim.Adam.step))
