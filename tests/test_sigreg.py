"""SIGReg against known answers, its gradient, its precision, and the collapse monitors."""

import math

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from worldmodels.sigreg import effective_rank, expected_sigreg, per_dimension_variance, random_directions, sigreg


def reference(z: Tensor, directions: Tensor, knots: int = 17, t_max: float = 3.0) -> Float[Tensor, ""]:
    """The formula in float64, term by term, by autograd."""
    x = z.double() @ directions.double()
    dt = t_max / (knots - 1)
    total = torch.zeros((), dtype=torch.float64)
    for k in range(knots):
        t = k * dt
        phi = math.exp(-t * t / 2)
        trapezoid = dt if k in (0, knots - 1) else 2 * dt
        distance = ((t * x).cos().mean(-2) - phi).square() + (t * x).sin().mean(-2).square()
        total = total + trapezoid * phi * distance.mean()
    return total * z.shape[-2]


def directions(dim: int, num: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return random_directions(dim, num, generator=torch.Generator().manual_seed(1), device="cpu", dtype=dtype)


def test_expectation_is_the_integral() -> None:
    # ∫_{-3}^{3} (1 − e^{−t²}) e^{−t²/2} dt = √(2π)·erf(3/√2) − √(2π/3)·erf(3·√1.5), and the trapezoid is close to it.
    integral = math.sqrt(2 * math.pi) * math.erf(3 / math.sqrt(2)) - math.sqrt(2 * math.pi / 3) * math.erf(3 * 1.5**0.5)
    assert expected_sigreg(knots=2001) == pytest.approx(integral, rel=1e-6)
    assert expected_sigreg() == pytest.approx(integral, rel=2e-3)


@pytest.mark.parametrize("n", [64, 1024])
def test_near_its_expectation_on_a_standard_normal(n: int) -> None:
    """4,000 independent samples of one dimension: their mean lies within 4 standard errors, whatever N."""
    groups = torch.randn(40, 100, n, 1)
    values = torch.stack([sigreg(z, torch.ones(1, 1)) for z in groups])
    error = values.std() / math.sqrt(len(values))
    assert abs(values.mean() - expected_sigreg()) < 4 * error
    assert error < 0.03


def test_collapsed_batch_has_its_closed_form() -> None:
    n, dt = 256, 3 / 16
    ts = [k * dt for k in range(17)]
    terms = [2 * dt * math.exp(-t * t / 2) * (1 - math.exp(-t * t / 2)) ** 2 for t in ts]
    known = n * (sum(terms) - terms[0] / 2 - terms[-1] / 2)
    assert float(sigreg(torch.zeros(n, 8), directions(8, 32))) == pytest.approx(known, rel=1e-5)
    assert known > 50 * expected_sigreg()


@pytest.mark.parametrize(
    "z",
    [
        torch.full((256, 16), 2.0),
        (torch.rand(1024, 1, generator=torch.Generator().manual_seed(0)) - 0.5) * math.sqrt(12),
        torch.rand(1024, 16, generator=torch.Generator().manual_seed(0)),
    ],
    ids=["all equal", "uniform of unit variance", "uniform on [0, 1]"],
)
def test_large_on_what_is_not_a_standard_normal(z: Tensor) -> None:
    assert float(sigreg(z, directions(z.shape[1], 64))) > 5 * expected_sigreg()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 10.0])
@pytest.mark.parametrize("shape", [(256, 64), (3, 64, 16)])
def test_equals_the_float64_reference_in_value_and_gradient(shape: tuple[int, ...], scale: float) -> None:
    a = directions(shape[-1], 48)
    z = (scale * torch.randn(shape)).requires_grad_()
    exact = z.detach().double().requires_grad_()
    value, known = sigreg(z, a), reference(exact, a)
    value.backward()
    known.backward()
    assert z.grad is not None
    assert exact.grad is not None
    assert value.item() == pytest.approx(known.item(), rel=1e-5)
    assert (z.grad.double() - exact.grad).norm() < 1e-5 * exact.grad.norm()


@pytest.mark.parametrize(("knots", "t_max"), [(2, 1.0), (17, 3.0), (33, 5.0)])
def test_other_quadratures_equal_the_reference_too(knots: int, t_max: float) -> None:
    z, a = torch.randn(128, 8), directions(8, 16)
    assert float(sigreg(z, a, knots, t_max)) == pytest.approx(float(reference(z, a, knots, t_max)), rel=1e-5)


def test_gradcheck() -> None:
    a = directions(4, 6, torch.float64)
    z = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: sigreg(z, a), z)
    assert torch.autograd.gradcheck(
        lambda z: 3 * sigreg(z, a), z.detach().view(7, 1, 4).repeat(1, 2, 1).requires_grad_()
    )


def test_leading_axes_are_samples_of_their_own() -> None:
    z, a = torch.randn(5, 64, 8), directions(8, 16)
    assert float(sigreg(z, a)) == pytest.approx(sum(float(sigreg(x, a)) for x in z) / 5, rel=1e-5)


def test_bfloat16_and_autocast_are_computed_in_float32() -> None:
    a = directions(16, 64)
    z = torch.randn(256, 16).bfloat16().requires_grad_()
    known = reference(z.detach(), a).item()
    with torch.autocast("cpu", torch.bfloat16):
        value = sigreg(z, a)
    value.backward()
    assert value.dtype == torch.float32
    assert z.grad is not None
    assert value.item() == pytest.approx(known, rel=1e-5)
    assert z.grad.dtype == torch.bfloat16
    assert bool(z.grad.isfinite().all())


def test_descent_turns_a_uniform_batch_into_a_normal_one() -> None:
    z = torch.rand(256, 4).requires_grad_()
    optimiser = torch.optim.Adam([z], 0.05)
    before = sigreg(z, directions(4, 256)).item()
    for _ in range(200):
        loss = sigreg(z, random_directions(4, 32, device="cpu"))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    after = sigreg(z, directions(4, 256)).item()
    assert before > 20 * expected_sigreg()
    assert after < 1.5 * expected_sigreg()
    assert bool((per_dimension_variance(z) - 1).abs().max() < 0.3)


def test_directions_are_unit_columns_drawn_from_the_generator() -> None:
    a, b = directions(12, 40), directions(12, 40)
    assert a.shape == (12, 40)
    torch.testing.assert_close(a.norm(dim=0), torch.ones(40))
    assert torch.equal(a, b)
    assert not torch.equal(a, random_directions(12, 40, device="cpu"))


@pytest.mark.parametrize(("knots", "t_max"), [(1, 3.0), (17, 0.0)])
def test_an_impossible_quadrature_is_refused(knots: int, t_max: float) -> None:
    with pytest.raises(ValueError, match="at least 2 knots"):
        sigreg(torch.zeros(4, 2), directions(2, 3), knots, t_max)


def test_effective_rank_of_known_spectra() -> None:
    isotropic = torch.linalg.qr(torch.randn(64, 8))[0]
    isotropic = torch.cat([isotropic, -isotropic])
    assert float(effective_rank(isotropic)) == pytest.approx(8, rel=1e-4)
    assert float(effective_rank(isotropic * torch.tensor([1.0, 1.0, 1.0] + [0.0] * 5))) == pytest.approx(3, rel=1e-4)
    line = torch.randn(64, 1) @ torch.randn(1, 8)
    assert float(effective_rank(line + 5)) == pytest.approx(1, abs=1e-3)


def test_effective_rank_of_a_collapsed_batch_is_one() -> None:
    assert float(effective_rank(torch.randn(1, 8).expand(64, 8).contiguous())) == 1
    assert float(effective_rank(torch.zeros(64, 8))) == 1


def test_variance_of_each_dimension() -> None:
    z = torch.tensor([[0.0, 1.0, 5.0], [2.0, 1.0, -5.0]])
    assert per_dimension_variance(z.bfloat16()).tolist() == [1.0, 0.0, 25.0]
