"""Many imagined futures of one memory: what the transformer predictor keeps between steps changes no answer."""

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from agents.goals import GoalSearchConfig, NearnessToGoal
from agents.planner import GradientConfig, GradientPlanner
from worldmodels import transformer
from worldmodels.encoder import ConvConfig
from worldmodels.interface import WorldModel
from worldmodels.lewm import LeWMConfig, LeWMFuture, LeWMState, LeWorldModel, build_world_model
from worldmodels.transformer import TransformerConfig, TransformerPredictor

B, N, A = 4, 3, 2
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
# Row b's episode starts at these observations of seven: memories of equal length, of unequal ones, of one observation.
STARTS = {"long": [[0]] * B, "unequal": [[0], [0, 6], [0, 2, 5], [3]], "short": [[0, 6]] * B}


def model_of(history: int) -> LeWorldModel:
    """In eval mode, and with open gates, so that every path counts."""
    transformer = TransformerConfig(history=history, depth=3, heads=2, head_dim=8, mlp=32, projector=40)
    config = LeWMConfig(latent_dim=6, predictor="transformer", transformer=transformer, conv=ConvConfig(hidden=8))
    model = build_world_model((4,), A, config)
    with torch.no_grad():
        for parameter in predictor_of(model).parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def predictor_of(model: LeWorldModel) -> TransformerPredictor:
    assert isinstance(model.predictor, TransformerPredictor)
    return model.predictor


def remembered(model: LeWorldModel, starts: list[list[int]]) -> LeWMState:
    state = model.initial(B)
    for t in range(7):
        first = torch.tensor([t == 0 or t in row for row in starts])
        with torch.no_grad():
            state = model.observe(state, actions(1, B)[0], torch.randn(B, 4), first)
    return state


def actions(steps: int, rows: int = B * N) -> Tensor:
    return torch.rand(steps, rows, A) * 2 - 1


def plain(model: LeWorldModel, state: LeWMState) -> LeWMState:
    """N copies of every memory, that nothing is kept for."""
    return WorldModel.futures(model, state)(N)


@pytest.mark.parametrize(
    ("history", "memory"), [(1, "unequal"), (2, "unequal"), (3, "long"), (3, "unequal"), (3, "short"), (5, "unequal")]
)
def test_what_is_kept_changes_no_answer(history: int, memory: str) -> None:
    """Until the window slides, while it slides past what was observed, and long after."""
    model, starts = model_of(history), STARTS[memory]
    state = remembered(model, starts)
    assert state.valid.sum(1).tolist() == [min(history, 7 - row[-1]) for row in starts]
    kept, whole = model.futures(state)(N), plain(model, state)
    assert isinstance(kept, LeWMFuture)
    for action in actions(2 * history + 1):
        kept, whole = model.imagine(kept, action), model.imagine(whole, action)
        torch.testing.assert_close(model.feat(kept), model.feat(whole), **CLOSE)
        torch.testing.assert_close(model.latent(kept), model.latent(whole), **CLOSE)
        assert model.settled(kept).equal(model.settled(whole))


def test_futures_are_numbered_by_stream_then_future() -> None:
    model = model_of(3)
    state, action = remembered(model, STARTS["unequal"]), actions(1)[0]
    together = model.latent(model.imagine(model.futures(state)(N), action)).view(B, N, -1)
    for b in range(B):
        alone = LeWMState(*(x[b : b + 1] for x in state))
        each = model.latent(model.imagine(model.futures(alone)(N), action.view(B, N, A)[b]))
        torch.testing.assert_close(together[b], each, **CLOSE)


@pytest.mark.parametrize(
    ("starts", "tokens"),
    # For each future and step, of a window of 3; and what was observed, once for all: two rows, then one.
    [("short", [1, 1, 1, 3, 3]), ("long", [1, 2, 3, 3, 3])],
)
def test_only_what_is_new_is_computed(starts: str, tokens: list[int]) -> None:
    model, counted = model_of(3), []
    state = remembered(model, STARTS[starts])
    # Every token that a block computes goes through its first norm, and then through its second.
    predictor_of(model).blocks[0].norm.register_forward_hook(lambda _, x, y: counted.append(y[..., 0].numel()))
    futures = model.futures(state)
    assert counted[::2] == ([] if starts == "short" else [B * 2, B])
    for n in (N, 1):
        counted.clear()
        future = futures(n)
        for action in actions(5, B * n):
            future = model.imagine(future, action)
        assert counted[::2] == [B * n * count for count in tokens]


def test_a_token_that_sees_itself_alone_needs_no_query() -> None:
    """The first of a window whose observed rows are gone, in every step that computes it."""
    model, asked = model_of(3), []
    state = remembered(model, STARTS["short"])
    future = model.futures(state)(N)
    with patch.object(transformer.F, "linear", side_effect=F.linear) as linear:
        for action in actions(5):
            linear.reset_mock()
            future = model.imagine(future, action)
            query = future.cache.projections[0].query
            asked.append(sum(call.args[0][..., 0].numel() for call in linear.call_args_list if call.args[1] is query))
    assert asked == [B * N * count for count in (0, 1, 1, 2, 2)]


def test_gradients_are_those_of_whole_windows() -> None:
    model = model_of(3)
    state, planned = remembered(model, STARTS["unequal"]), actions(6)
    gradients = []
    for start in (model.futures(state)(N), plain(model, state)):
        wanted = planned.clone().requires_grad_()
        for action in wanted:
            start = model.imagine(start, action)
        model.latent(start).square().sum().backward()
        gradients.append(wanted.grad)
    assert bool(gradients[1].abs().amax((1, 2)).gt(1e-3).all()), "every action counts"
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_the_gradient_planner_searches_through_it() -> None:
    model = model_of(3)
    state, goal = remembered(model, STARTS["unequal"]), torch.randn(B, 6)
    score = NearnessToGoal(model, state, goal, GoalSearchConfig())
    start = torch.zeros(B, 4, A)
    plans = []
    for futures in (score.futures, lambda n: WorldModel.futures(model, state)(n)):
        score.futures = futures
        generator = torch.Generator().manual_seed(0)
        found = GradientPlanner(GradientConfig(starts=2, iterations=2)).search(
            score, start, torch.ones_like(start), generator=generator
        )
        plans.append(found.action)
    torch.testing.assert_close(*plans, rtol=1e-3, atol=1e-3)
    assert bool((score(plans[0][:, None]) > score(start[:, None])).all())


def test_nothing_is_kept_where_dropout_draws_or_windows_are_cheap() -> None:
    model = model_of(3)
    state = remembered(model, STARTS["long"])
    assert isinstance(model.train().futures(state)(N), LeWMState)
    window = build_world_model((4,), A, LeWMConfig(latent_dim=6, conv=ConvConfig(hidden=8))).eval()
    state = remembered(window, STARTS["long"])
    copies = window.futures(state)(N)
    assert isinstance(copies, LeWMState)
    assert all(x.equal(y.repeat_interleave(N, 0)) for x, y in zip(copies, state, strict=True))
