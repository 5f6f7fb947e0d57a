"""λ-returns against numbers worked out by hand."""

import pytest
import torch
from torch import Tensor

from agents.returns import lambda_return


def row(*numbers: float) -> Tensor:
    return torch.tensor([numbers], dtype=torch.float32)


def test_by_hand() -> None:
    """R₂ = 3 + 0.5·10 = 8;  R₁ = 2 + 0.5·(0.2·20 + 0.8·8) = 7.2;  R₀ = 1 + 0.5·(0.2·30 + 0.8·7.2) = 6.88."""
    returns = lambda_return(row(1, 2, 3), row(0.5, 0.5, 0.5), row(30, 20, 10), 0.8)
    torch.testing.assert_close(returns, row(6.88, 7.2, 8.0))


def test_lambda_zero_looks_one_step_ahead() -> None:
    reward, discount, value = torch.randn(4, 6), torch.rand(4, 6), torch.randn(4, 6)
    torch.testing.assert_close(lambda_return(reward, discount, value, 0.0), reward + discount * value)


def test_lambda_one_sums_all_rewards_and_bootstraps_at_the_end() -> None:
    """1 + 0.5·(2 + 0.5·(4 + 0.5·8)) = 4."""
    returns = lambda_return(row(1, 2, 4), row(0.5, 0.5, 0.5), row(100, 100, 8), 1.0)
    torch.testing.assert_close(returns, row(4, 6, 8))


def test_nothing_counts_after_a_terminal_state() -> None:
    """The state after the second decision is terminal: R₁ = 2, R₀ = 1 + 0.5·(0.5·30 + 0.5·2) = 9."""
    discount = row(0.5, 0, 0.5)
    returns = lambda_return(row(1, 2, 1000), discount, row(30, 1000, 1000), 0.5)
    torch.testing.assert_close(returns[:, :2], row(9, 2))


def test_a_cut_bootstraps_from_its_own_value_whatever_lambda() -> None:
    """Truncated after the second decision: R₁ = 2 + 0.5·20 = 12, R₀ = 1 + 0.5·(0.2·30 + 0.8·12) = 8.8. The row after
    belongs to another episode and has no effect."""
    cut = torch.tensor([[False, True, False]])
    for beyond in (0.0, 1000.0):
        returns = lambda_return(row(1, 2, beyond), row(0.5, 0.5, 0.5), row(30, 20, beyond), 0.8, cut=cut)
        torch.testing.assert_close(returns[:, :2], row(8.8, 12))
    returns = lambda_return(row(1, 2, 1000), row(0.5, 0.5, 0.5), row(30, 20, 1000), 1.0, cut=cut)
    torch.testing.assert_close(returns[:, :2], row(7, 12))


def test_cut_and_terminal_differ_by_the_bootstrap() -> None:
    reward, value, cut = row(1, 2, 0), row(30, 20, 0), torch.tensor([[False, True, False]])
    terminal = lambda_return(reward, row(0.5, 0, 0.5), value, 0.8, cut=cut)
    truncated = lambda_return(reward, row(0.5, 0.5, 0.5), value, 0.8, cut=cut)
    torch.testing.assert_close(terminal[0, 1], torch.tensor(2.0))
    torch.testing.assert_close(truncated[0, 1], torch.tensor(12.0))


def test_cutting_nothing_or_the_last_column_changes_nothing() -> None:
    reward, discount, value = torch.randn(3, 5), torch.rand(3, 5), torch.randn(3, 5)
    plain = lambda_return(reward, discount, value, 0.9)
    cut = torch.zeros(3, 5, dtype=torch.bool)
    assert torch.equal(lambda_return(reward, discount, value, 0.9, cut=cut), plain)
    cut[:, -1] = True
    torch.testing.assert_close(lambda_return(reward, discount, value, 0.9, cut=cut), plain)


@pytest.mark.parametrize("lam", [0.0, 0.7, 0.95, 1.0])
def test_a_constant_reward_forever_is_worth_one_over_one_minus_gamma(lam: float) -> None:
    """The true value is a fixed point for every λ; and from a value of 0 the iteration arrives there."""
    ones = torch.ones(1, 40)
    worth = 1 / (1 - 0.98)
    torch.testing.assert_close(lambda_return(ones, 0.98 * ones, worth * ones, lam), worth * ones, rtol=1e-4, atol=0.0)
    value = torch.zeros(1, 1)
    for _ in range(600):
        value = lambda_return(ones[:, :5], 0.98 * ones[:, :5], value.expand(1, 5), lam)[:, :1]
    torch.testing.assert_close(value, torch.tensor([[worth]]), rtol=1e-4, atol=0.0)


def test_rows_are_independent() -> None:
    reward, discount, value = torch.randn(4, 6), torch.rand(4, 6), torch.randn(4, 6)
    cut = torch.rand(4, 6) < 0.3
    together = lambda_return(reward, discount, value, 0.9, cut=cut)
    for n in range(4):
        row_n = slice(n, n + 1)
        alone = lambda_return(reward[row_n], discount[row_n], value[row_n], 0.9, cut=cut[row_n])
        assert torch.equal(alone[0], together[n])


def test_gradients_have_their_closed_form() -> None:
    """∂R₀/∂reward_k = (γλ)^k, ∂R₀/∂value_k = γ(γλ)^k (1 − λ), and the last value takes what is left."""
    reward, value = torch.zeros(1, 4, requires_grad=True), torch.zeros(1, 4, requires_grad=True)
    gamma, lam = 0.9, 0.5
    lambda_return(reward, torch.full((1, 4), gamma), value, lam)[0, 0].backward()
    decay = torch.tensor([(gamma * lam) ** k for k in range(4)])
    torch.testing.assert_close(reward.grad[0], decay)
    torch.testing.assert_close(value.grad[0], gamma * decay * torch.tensor([0.5, 0.5, 0.5, 1.0]))
