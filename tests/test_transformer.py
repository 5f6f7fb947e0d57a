"""Windows over sequences, with an exact toy; the transformer predictor: causality, masking, AdaLN-zero, equality."""

import pytest
import torch
from torch import Tensor

from worldmodels.transformer import TransformerConfig, TransformerPredictor
from worldmodels.windows import rows_since_start, unfold_windows

SMALL = TransformerConfig(history=3, depth=2, heads=2, head_dim=8, mlp=32, projector=40)


def stream(rows: int, starts: tuple[int, ...], batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    z, action = torch.randn(batch, rows, 6), torch.rand(batch, rows, 2) * 2 - 1
    is_first = torch.zeros(batch, rows, dtype=torch.bool)
    for b in range(batch):
        for start in starts:
            # Each sequence has its starts elsewhere.
            is_first[b, (start + b) % rows] = True
    return z, action, is_first


def awake(predictor: TransformerPredictor) -> TransformerPredictor:
    """In eval mode, and with gates that are no longer zero, so that every path is seen."""
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return predictor.eval()


# -- windows -----------------------------------------------------------------------------------------------------------


def test_rows_since_start() -> None:
    is_first = torch.tensor([[0, 0, 1, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0, 1]], dtype=torch.bool)
    assert rows_since_start(is_first).tolist() == [[0, 1, 0, 1, 0, 0, 1], [0, 1, 2, 3, 4, 5, 0]]


def test_windows_written_out() -> None:
    """Row t's latent is t + 1, its action 10·(t + 1); an episode starts at row 2."""
    z = torch.arange(1.0, 5.0).view(1, 4, 1)
    is_first = torch.tensor([[False, False, True, False]])
    windows, actions, valid = unfold_windows(z, 10 * z, is_first, 3)
    assert valid.tolist() == [[False, False, True], [False, True, True], [False, False, True], [False, True, True]]
    masked = torch.where(valid, windows[..., 0], -1.0)
    assert masked.tolist() == [[-1, -1, 1], [-1, 1, 2], [-1, -1, 3], [-1, 3, 4]]
    assert torch.where(valid, actions[..., 0], -1.0).tolist() == [
        [-1, -1, 10],
        [-1, 10, 20],
        [-1, -1, 30],
        [-1, 30, 40],
    ]


@pytest.mark.parametrize("history", [1, 2, 3, 5, 12])
def test_a_cumulative_sum_pairs_every_window_with_its_actions(history: int) -> None:
    """A world whose latent is the sum of the actions so far, weighted by slot, is predicted exactly by its own rule."""
    _, action, is_first = stream(9, (0, 4, 5))
    powers = 10.0 ** torch.arange(history)
    z = torch.zeros(2, 9, 2)
    expected = torch.zeros(2, 9)
    for b in range(2):
        for t in range(9):
            begins = bool(is_first[b, t]) or t == 0
            z[b, t] = torch.randn(2) if begins else z[b, t - 1] + action[b, t - 1]
            start = t
            while start > 0 and not is_first[b, start]:
                start -= 1
            memory = range(max(start, t - history + 1), t + 1)
            expected[b, t] = sum(powers[t - s] * (z[b, s, 0] + action[b, s, 1]) for s in memory)
    windows, actions, valid = unfold_windows(z, action, is_first, history)
    assert valid[:, -1].all()
    assert not (valid[:, :-1] & ~valid[:, 1:]).any(), "what is not valid is a prefix"
    # The next latent is the newest latent plus the newest action.
    following = (windows[:, -1] + actions[:, -1]).view(2, 9, 2)
    torch.testing.assert_close(
        torch.where(is_first[:, 1:, None], 0.0, following[:, :-1]), torch.where(is_first[:, 1:, None], 0.0, z[:, 1:])
    )
    # And the whole window: slot by slot weights, older slots heavier, nothing from before the start.
    terms = torch.where(valid, windows[..., 0] + actions[..., 1], 0.0)
    torch.testing.assert_close((terms * powers.flip(0)).sum(1).view(2, 9), expected)


def test_window_gradients_return_to_their_rows() -> None:
    z, action, is_first = stream(5, ())
    z.requires_grad_()
    windows, _, valid = unfold_windows(z, action, is_first, 3)
    torch.where(valid[..., None], windows, 0.0).sum().backward()
    assert z.grad is not None
    # Row t is seen by the windows that end at t, t + 1 and t + 2; from its start on only, and rows run out at the end.
    for b in range(2):
        starts = [t for t in range(5) if t == 0 or is_first[b, t]]
        for t in range(5):
            seen = sum(1 for end in range(t, min(t + 3, 5)) if not any(t < s <= end for s in starts))
            assert z.grad[b, t].tolist() == [seen] * 6


def test_an_empty_history_is_refused() -> None:
    z, action, is_first = stream(5, ())
    with pytest.raises(ValueError, match="at least 1 row"):
        unfold_windows(z, action, is_first, 0)
    with pytest.raises(ValueError, match="history must be at least 1"):
        TransformerPredictor(6, 2, TransformerConfig(history=0))


# -- the transformer ---------------------------------------------------------------------------------------------------


def test_published_size() -> None:
    predictor = TransformerPredictor(192, 10, TransformerConfig())
    block = 192 * 6 * 192 + 6 * 192 + 192 * 3 * 1024 + 1024 * 192 + 192 + 192 * 2048 + 2048 + 2048 * 192 + 192
    actions = 10 * 768 + 768 + 768 * 192 + 192
    projector = 192 * 2048 + 2048 + 2 * 2048 + 2048 * 192 + 192
    assert sum(p.numel() for p in predictor.parameters()) == 6 * block + actions + 3 * 192 + 2 * 192 + projector
    z, hidden = predictor.eval()(torch.randn(2, 3, 192), torch.randn(2, 3, 10), torch.ones(2, 3, dtype=torch.bool))
    assert z.shape == hidden.shape == (2, 192)
    assert (predictor.history, predictor.hidden_dim) == (3, 192)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("starts", [(), (0,), (1,), (2, 3, 6)])
def test_sequence_equals_forward_on_every_window(rows: int, starts: tuple[int, ...]) -> None:
    predictor = awake(TransformerPredictor(6, 2, SMALL))
    z, action, is_first = stream(rows, starts)
    predicted, hidden = predictor.sequence(z, action, is_first)
    for b in range(2):
        for t in range(rows):
            start = max((s for s in range(t + 1) if is_first[b, s]), default=0)
            slots = range(max(start, t - 2), t + 1)
            window, actions = torch.full((1, 3, 6), 7.0), torch.full((1, 3, 2), 7.0)
            valid = torch.zeros(1, 3, dtype=torch.bool)
            for i, s in enumerate(slots, 3 - len(slots)):
                window[0, i], actions[0, i], valid[0, i] = z[b, s], action[b, s], True
            alone, features = predictor(window, actions, valid)
            torch.testing.assert_close(predicted[b, t], alone[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(hidden[b, t], features[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [3, 8])
def test_later_inputs_change_no_earlier_prediction(rows: int) -> None:
    predictor = awake(TransformerPredictor(6, 2, SMALL))
    z, action, is_first = stream(rows, ())
    before, _ = predictor.sequence(z, action, is_first)
    for t in range(1, rows):
        other_z, other_action = z.clone(), action.clone()
        other_z[:, t:] = torch.randn_like(other_z[:, t:])
        other_action[:, t:] *= -1
        after, _ = predictor.sequence(other_z, other_action, is_first)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.allclose(after[:, t], before[:, t])


@pytest.mark.parametrize("content", [1e6, -3.0, float("nan"), float("inf")])
def test_what_an_invalid_slot_holds_has_no_effect(content: float) -> None:
    predictor = awake(TransformerPredictor(6, 2, SMALL))
    z, action = torch.randn(3, 3, 6), torch.randn(3, 3, 2)
    valid = torch.tensor([[False, False, True], [False, True, True], [True, True, True]])
    before = predictor(z, action, valid)
    filled = torch.where(valid[..., None], z, content).requires_grad_()
    after = predictor(filled, torch.where(valid[..., None], action, content), valid)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    after[0].sum().backward()
    assert filled.grad is not None
    assert bool(filled.grad[~valid].eq(0).all())
    assert bool(filled.grad[valid].ne(0).any(-1).all())


def test_an_empty_memory_gives_finite_numbers() -> None:
    predictor = awake(TransformerPredictor(6, 2, SMALL))
    z, hidden = predictor(torch.zeros(1, 3, 6), torch.zeros(1, 3, 2), torch.zeros(1, 3, dtype=torch.bool))
    assert bool(torch.cat([z, hidden]).isfinite().all())


def test_each_valid_slot_and_its_place_matter() -> None:
    predictor = awake(TransformerPredictor(6, 2, SMALL))
    z, action, valid = torch.randn(1, 3, 6), torch.randn(1, 3, 2), torch.ones(1, 3, dtype=torch.bool)
    before, _ = predictor(z, action, valid)
    for slot in range(3):
        moved, acted = z.clone(), action.clone()
        moved[:, slot] = torch.randn(6)
        acted[:, slot] *= -1
        assert not torch.allclose(predictor(moved, action, valid)[0], before)
        assert not torch.allclose(predictor(z, acted, valid)[0], before)
    order = torch.tensor([1, 0, 2])
    assert not torch.allclose(predictor(z[:, order], action[:, order], valid)[0], before)


def test_at_the_start_blocks_are_the_identity_whatever_the_action() -> None:
    predictor = TransformerPredictor(6, 2, SMALL).eval()
    z, valid = torch.randn(4, 3, 6), torch.ones(4, 3, dtype=torch.bool)
    predicted, hidden = predictor(z, torch.randn(4, 3, 2), valid)
    assert torch.equal(predicted, predictor(z, torch.randn(4, 3, 2), valid)[0])
    assert torch.equal(hidden, predictor.norm(z[:, -1] + predictor.position[2]))


def test_gradients_reach_every_parameter_once_the_gates_have_opened() -> None:
    predictor = TransformerPredictor(6, 2, SMALL).train()
    z, action, is_first = stream(3, (), batch=16)
    optimiser = torch.optim.Adam(predictor.parameters(), 1e-3)
    # At first the zero gates stop the gradient to the branches behind them; a step opens them.
    for _ in range(2):
        optimiser.zero_grad()
        predictor.sequence(z, action, is_first)[0].square().sum().backward()
        optimiser.step()
    for name, parameter in predictor.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.abs().sum() > 0), name


def test_dropout_acts_in_train_mode_only() -> None:
    predictor = awake(TransformerPredictor(6, 2, SMALL))
    inputs = torch.randn(8, 3, 6), torch.randn(8, 3, 2), torch.ones(8, 3, dtype=torch.bool)
    assert torch.equal(predictor(*inputs)[1], predictor(*inputs)[1])
    predictor.train()
    assert not torch.equal(predictor(*inputs)[1], predictor(*inputs)[1])


def test_it_learns_a_world_that_needs_memory_and_action() -> None:
    """A state s_{t+1} = s_t + (s_t − s_{t−1})/2 + a_t seen in 24 dimensions. Leaving out the past costs at least 1/4 of
    the state's variance, the action 1/3, and copying the last latent 1/2 + 1/3."""
    config = TransformerConfig(depth=1, heads=2, head_dim=16, mlp=64, dropout=0.0, projector=128)
    predictor = TransformerPredictor(24, 2, config)
    optimiser = torch.optim.Adam(predictor.parameters(), 3e-3)
    valid = torch.ones(256, 3, dtype=torch.bool)
    view = torch.linalg.qr(torch.randn(24, 2))[0].T * 24**0.5 / 2**0.5
    for step in range(300):
        state, action = torch.randn(256, 3, 2), torch.rand(256, 3, 2) * 2 - 1
        target = state[:, -1] + (state[:, -1] - state[:, -2]) / 2 + action[:, -1]
        if step == 299:
            predictor.eval()
        loss = (predictor(state @ view, action, valid)[0] - target @ view).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.2
