"""Symlog, the two-hot code and the heads against known answers."""

import math

import pytest
import torch
from torch import Tensor, nn

from worldmodels.heads import ContinueHead, ScalarHead, TwoHot, mlp, mlp_trunk, symexp, symlog


def two_hot(code: TwoHot, target: float) -> Tensor:
    """The code of ``target``, found by looking for the two bins around it."""
    bins = code.bins.double()
    probs = torch.zeros_like(bins)
    right = int((bins > target).nonzero()[0])
    probs[right] = (target - bins[right - 1]) / (bins[right] - bins[right - 1])
    probs[right - 1] = 1 - probs[right]
    return probs


# -- symlog ------------------------------------------------------------------------------------------------------------


def test_symlog_known_values() -> None:
    x = torch.tensor([0.0, math.e - 1, 1 - math.e, 999.0])
    torch.testing.assert_close(symlog(x), torch.tensor([0.0, 1.0, -1.0, math.log(1000)]))
    torch.testing.assert_close(symexp(torch.tensor([0.0, 1.0, -2.0])), torch.tensor([0, math.e - 1, 1 - math.e**2]))


def test_symexp_is_the_inverse() -> None:
    x = torch.cat([torch.linspace(-300, 300, 1001), torch.tensor([1e-6, -1e-6, 1e4])])
    torch.testing.assert_close(symexp(symlog(x)), x, rtol=1e-5, atol=1e-9)


# -- the two-hot code --------------------------------------------------------------------------------------------------


def test_uniform_logits_mean_exactly_zero() -> None:
    assert TwoHot(101, 6.0).mean(torch.full((3, 101), 7.25)).tolist() == [0.0, 0.0, 0.0]


def test_one_bin_alone_means_its_value() -> None:
    code = TwoHot(5, 4.0)  # at ±4, ±2 and 0 in symlog space
    known = [1 - math.exp(4), 1 - math.exp(2), 0.0, math.exp(2) - 1, math.exp(4) - 1]
    assert code.mean(200 * torch.eye(5)).tolist() == pytest.approx(known, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("target", [-402.0, -7.77, -1.0, -0.03, 0.0, 1e-4, 0.5, 1.0, 3.21, 400.0])
def test_the_two_bins_around_a_target_minimise_the_loss_and_mean_it(target: float) -> None:
    code, y = TwoHot(101, 6.0), torch.tensor([target])
    probs = two_hot(code, target)
    entropy = float(torch.special.entr(probs).sum())
    logits = probs.clamp(min=1e-30).log().float()[None].requires_grad_()
    loss = code.loss(logits, y)
    loss.sum().backward()
    # A cross entropy equals the code's entropy, and has no gradient, at the code alone.
    assert float(loss.detach()) == pytest.approx(entropy, abs=1e-4)
    assert logits.grad is not None
    assert float(logits.grad.abs().max()) < 1e-4
    assert float(code.mean(logits.detach())) == pytest.approx(target, rel=1e-4, abs=1e-5)


def test_loss_is_the_cross_entropy_with_the_code() -> None:
    code, target = TwoHot(41, 3.0), 10 * torch.randn(64)
    target = target.clamp(-15, 15)
    logits = torch.randn(64, 41)
    expected = torch.stack(
        [-(two_hot(code, float(y)) * row.double().log_softmax(0)).sum() for y, row in zip(target, logits, strict=True)]
    )
    torch.testing.assert_close(code.loss(logits, target), expected.float(), rtol=1e-4, atol=1e-4)


def test_descent_on_mixed_targets_finds_their_mean() -> None:
    """The mean in the target's own space: one in four is 8, the others 0, so 2 and not symexp of a mean of symlogs."""
    code, logits = TwoHot(101, 6.0), torch.zeros(101, requires_grad=True)
    target = torch.tensor([0.0, 0.0, 0.0, 8.0])
    optimiser = torch.optim.Adam([logits], 0.3)
    for _ in range(200):
        optimiser.zero_grad()
        code.loss(logits.expand(4, 101), target).mean().backward()
        optimiser.step()
    assert float(code.mean(logits.detach())) == pytest.approx(2.0, abs=0.05)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_targets_beyond_the_limit_are_clamped_to_the_last_bin(sign: float) -> None:
    code, logits = TwoHot(11, 2.0), torch.randn(1, 11)
    edge = math.expm1(2.0)
    last = -logits.log_softmax(-1)[0, -1 if sign > 0 else 0]
    for size in (edge, 1.001 * edge, 1e6, math.inf):
        assert float(code.loss(logits, torch.tensor([sign * size]))) == pytest.approx(float(last), rel=1e-5)
    assert float(code.loss(logits, torch.tensor([sign * 0.9 * edge]))) != pytest.approx(float(last), rel=1e-3)


def test_a_nan_target_gives_a_nan_loss() -> None:
    """What stops the training is the agent's look at the losses, which has to see it."""
    loss = TwoHot(11, 2.0).loss(torch.zeros(2, 11), torch.tensor([math.nan, 1.0]))
    assert bool(loss[0].isnan())
    assert bool(loss[1].isfinite())


def test_no_gradient_reaches_the_target() -> None:
    target = torch.ones(3, requires_grad=True)
    logits = torch.zeros(3, 11, requires_grad=True)
    TwoHot(11, 2.0).loss(logits, target).sum().backward()
    assert target.grad is None
    assert bool(logits.grad.abs().sum() > 0)


def test_autocast_changes_neither_mean_nor_loss() -> None:
    code, logits, target = TwoHot(101, 6.0), 3 * torch.randn(256, 101), 20 * torch.randn(256)
    mean, loss = code.mean(logits), code.loss(logits, target)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(code.mean(logits), mean)
        assert torch.equal(code.loss(logits, target), loss)
        rounded = code.mean(logits.bfloat16())
    assert mean.dtype == loss.dtype == rounded.dtype == torch.float32
    # The logits of a layer under autocast are bfloat16; what is computed from them is not rounded again.
    exact = (logits.bfloat16().double().softmax(-1) * code.bins.double()).sum(-1)
    torch.testing.assert_close(rounded.double(), exact, rtol=1e-4, atol=1e-4)


def test_bins_are_derived_and_not_saved() -> None:
    assert not TwoHot(11, 2.0).state_dict()


@pytest.mark.parametrize("bins", [1, 2, 100])
def test_a_code_without_a_middle_bin_is_refused(bins: int) -> None:
    with pytest.raises(ValueError, match=f"odd number of at least 3 .*got {bins}"):
        TwoHot(bins)


# -- the MLPs and the heads --------------------------------------------------------------------------------------------


def test_mlp_layers() -> None:
    names = [type(layer).__name__ for layer in mlp([3, 5, 7, 2]) if not isinstance(layer, nn.Sequential)]
    assert names == ["Linear", "LayerNorm", "SiLU"] * 2 + ["Linear"]
    assert [type(layer).__name__ for layer in mlp_trunk([3, 5])] == ["Linear", "LayerNorm", "SiLU"]
    assert mlp([3, 5, 7, 2])(torch.randn(4, 6, 3)).shape == (4, 6, 2)


def test_last_scale_scales_the_last_layer_alone() -> None:
    torch.manual_seed(1)
    plain = mlp([3, 8, 2])
    torch.manual_seed(1)
    scaled = mlp([3, 8, 2], last_scale=0.25)
    assert torch.equal(plain[0].weight, scaled[0].weight)
    assert torch.equal(plain[-1].weight * 0.25, scaled[-1].weight)
    assert not scaled[-1].bias.any()
    assert plain[-1].bias.any()


def test_heads_start_at_zero_and_at_one_half() -> None:
    feat = 5 * torch.randn(4, 7, 6)
    scalar, cont = ScalarHead(6, 16), ContinueHead(6, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(scalar(feat), torch.zeros(4, 7))
        assert torch.equal(cont(feat), torch.full((4, 7), 0.5))
        losses = scalar.loss(feat, torch.randn(4, 7)), cont.loss(feat, torch.ones(4, 7))
    torch.testing.assert_close(losses[0], torch.full((4, 7), math.log(101)))
    torch.testing.assert_close(losses[1], torch.full((4, 7), math.log(2)))


def test_the_scalar_head_learns_a_function() -> None:
    head = ScalarHead(1, 32)
    optimiser = torch.optim.Adam(head.parameters(), 1e-2)
    x = torch.linspace(-1, 1, 64)[:, None]
    target = 30 * x[:, 0] ** 2 - 10
    for _ in range(200):
        optimiser.zero_grad()
        head.loss(x, target).mean().backward()
        optimiser.step()
    assert float((head(x) - target).abs().mean().detach()) < 1.0


def test_the_continue_head_learns_probabilities() -> None:
    """Three of four go on at x = 1, none at x = −1."""
    head = ContinueHead(1, 16)
    optimiser = torch.optim.Adam(head.parameters(), 1e-2)
    x = torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0, -1.0])[:, None]
    target = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    for _ in range(200):
        optimiser.zero_grad()
        head.loss(x, target).mean().backward()
        optimiser.step()
    assert head(torch.tensor([[1.0], [-1.0]])).tolist() == pytest.approx([0.75, 0.0], abs=0.05)
