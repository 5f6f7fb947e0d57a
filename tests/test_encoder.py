"""The input normaliser, the encoders, and the random shift."""

import pytest
import torch
from torch import nn

from worldmodels.encoder import (
    ConvConfig,
    ConvEncoder,
    KeypointConfig,
    KeypointEncoder,
    Normaliser,
    StateEncoder,
    expected_positions,
    random_shift,
    strided_convolution,
)

SMALL = ConvConfig(channels=(4, 6, 8), hidden=16)


# -- the normaliser ----------------------------------------------------------------------------------------------------


def test_pixels_lose_their_mean_image_and_take_one_scale() -> None:
    """Two pixels of spread 4 and 1 around 100 and 20: together a spread of √8.5, which becomes 1/2."""
    obs = torch.tensor([[104, 21], [96, 19]] * 50, dtype=torch.uint8).view(100, 1, 1, 2)
    normaliser = Normaliser((1, 1, 2), per_feature=False)
    assert not normaliser.fitted
    normaliser.fit(obs)
    assert normaliser.fitted
    assert normaliser.mean.flatten().tolist() == [100.0, 20.0]
    x = normaliser(obs)
    assert x.dtype == torch.float32
    expected = torch.tensor([4.0, 1.0]) * 0.5 / 8.5**0.5
    torch.testing.assert_close(x[0].flatten(), expected, rtol=1e-2, atol=0.0)
    torch.testing.assert_close(x[1], -x[0])
    assert float(x.std()) == pytest.approx(0.5, rel=1e-5)


def test_state_features_are_scaled_each() -> None:
    obs = torch.randn(500, 3) * torch.tensor([0.01, 1.0, 300.0]) + torch.tensor([5.0, -2.0, 1000.0])
    normaliser = Normaliser((3,), per_feature=True)
    normaliser.fit(obs, std=0.7)
    x = normaliser(obs)
    torch.testing.assert_close(x.mean(0), torch.zeros(3), atol=1e-3, rtol=0.0)
    torch.testing.assert_close(x.std(0), torch.full((3,), 0.7), rtol=1e-3, atol=0.0)


def test_what_never_moved_keeps_its_own_units() -> None:
    obs = torch.stack([torch.full((50,), 3.0), torch.randn(50)], 1)
    normaliser = Normaliser((2,), per_feature=True)
    normaliser.fit(obs)
    assert normaliser(torch.tensor([[5.0, 0.0]]))[0, 0] == 2.0
    still = Normaliser((1, 2, 2), per_feature=False)
    still.fit(torch.full((4, 1, 2, 2), 9, dtype=torch.uint8))
    assert torch.equal(still(torch.full((1, 1, 2, 2), 10, dtype=torch.uint8)), torch.ones(1, 1, 2, 2))


@pytest.mark.filterwarnings("ignore:std")
@pytest.mark.parametrize("per_feature", [False, True])
def test_one_observation_is_enough_for_a_finite_fit(per_feature: bool) -> None:
    normaliser = Normaliser((3,), per_feature=per_feature)
    normaliser.fit(torch.randn(1, 3))
    assert bool(normaliser(torch.randn(5, 3)).isfinite().all())


def test_unfitted_it_changes_nothing() -> None:
    obs = torch.randn(4, 3)
    assert torch.equal(Normaliser((3,), per_feature=True)(obs.clone()), obs)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_observation_itself_stays_as_it_was(dtype: torch.dtype) -> None:
    """The batch and the replay hold the same memory."""
    obs = (torch.rand(20, 3) * 100).to(dtype)
    before = obs.clone()
    normaliser = Normaliser((3,), per_feature=True)
    normaliser.fit(obs)
    once = normaliser(obs)
    assert torch.equal(obs, before)
    assert torch.equal(normaliser(obs), once)


def test_the_fit_is_saved_and_restored() -> None:
    one, other = Normaliser((3,), per_feature=True), Normaliser((3,), per_feature=True)
    one.fit(torch.randn(50, 3) * 4 + 2)
    other.load_state_dict(one.state_dict())
    x = torch.randn(5, 3)
    assert other.fitted
    assert torch.equal(one(x.clone()), other(x.clone()))
    assert not list(one.parameters()), "no optimiser moves the fit"


# -- the encoders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projector", [False, True])
@pytest.mark.parametrize(("size", "left"), [(48, 3), (64, 4), (84, 5)])
def test_conv_encoder_sizes(size: int, left: int, projector: bool) -> None:
    config = ConvConfig(channels=SMALL.channels, hidden=16, projector=projector)
    encoder = ConvEncoder((3, size, size), 10, config)
    assert encoder.out[0].in_features == 8 * left * left
    assert encoder(torch.randn(2, 3, size, size)).shape == (2, 10)
    kinds = {type(module) for module in encoder.out}
    assert (nn.BatchNorm1d in kinds) == projector
    assert (nn.LayerNorm in kinds) != projector


def test_conv_encoder_of_images_that_are_not_square() -> None:
    assert ConvEncoder((1, 32, 64), 5, SMALL)(torch.randn(3, 1, 32, 64)).shape == (3, 5)


@pytest.mark.parametrize("size", [4, 8, 12])
def test_images_too_small_for_the_stages_are_refused(size: int) -> None:
    with pytest.raises((RuntimeError, ValueError), match=r"Kernel size|too small"):
        ConvEncoder((3, size, size), 10, SMALL)


def test_conv_encoder_is_free_in_scale_and_independent_of_memory_layout() -> None:
    """SIGReg needs latents whose norm is not fixed, so nothing normalises the last layer."""
    encoder = ConvEncoder((3, 16, 16), 10, SMALL)
    x = torch.randn(6, 3, 16, 16)
    z = encoder(x)
    assert float(z.norm(dim=1).std().detach()) > 1e-3
    torch.testing.assert_close(z, encoder(x.to(memory_format=torch.channels_last)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(z[2:3], encoder(x[2:3]), rtol=1e-4, atol=1e-5)


def test_the_whole_image_matters() -> None:
    encoder = ConvEncoder((3, 16, 16), 10, SMALL)
    x = torch.randn(4, 3, 16, 16, requires_grad=True)
    encoder(x).square().sum().backward()
    assert x.grad is not None
    # The stages' strides reach every pixel but for padding that an inactive ReLU may hide.
    assert float((x.grad.abs().sum((0, 1)) > 0).float().mean()) > 0.9


def dot_finder(contrast: float = 40.0, kernel: int = 3) -> KeypointEncoder:
    """One keypoint that follows what is bright in the first channel."""
    config = KeypointConfig(stem=1, keypoints=1, kernel=kernel, hidden=8, sharpness=1.0)
    encoder = KeypointEncoder((1, 64, 64), 5, config)
    with torch.no_grad():
        encoder.stem.weight.fill_(1 / 64)
        encoder.maps.weight.zero_()
        encoder.maps.weight[0, 0, kernel // 2, kernel // 2] = contrast
        encoder.stem.bias.zero_()
    return encoder


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize(("row", "column"), [(32, 32), (20, 44), (44, 12)])
def test_a_keypoint_is_where_its_map_is_bright(row: int, column: int, kernel: int) -> None:
    """A bright square of 8 pixels centred between rows ``row`` − 1 and ``row``, in a grid of 15 over 64 pixels."""
    image = torch.zeros(1, 1, 64, 64)
    image[..., row - 4 : row + 4, column - 4 : column + 4] = 1.0
    across, down = dot_finder(kernel=kernel).positions(image)[0, :, 0].tolist()
    # Cell i of the grid is centred on pixel 4·i + 3.5 and lies at −3 + 6·i/14.
    place = lambda pixel: -3 + 6 * ((pixel - 0.5 - 3.5) / 4) / 14  # noqa: E731
    assert across == pytest.approx(place(column), abs=0.02)
    assert down == pytest.approx(place(row), abs=0.02)


def test_a_keypoint_moves_by_less_than_a_cell() -> None:
    """One pixel is a quarter of a cell, which is 0.4 wide: no jumps from cell to cell, and onwards with every cell."""
    images = torch.zeros(17, 1, 64, 64)
    for i in range(17):
        images[i, 0, 28:36, 20 + i : 28 + i] = 1.0
    across = dot_finder(contrast=8.0).positions(images)[:, 0, 0].detach()
    assert float(across.diff().abs().max()) < 0.2
    assert bool((across[4:] - across[:-4] > 0.2).all())


def test_keypoint_encoder_is_free_in_scale_and_reads_every_image_alone() -> None:
    encoder = KeypointEncoder((3, 32, 48), 10, KeypointConfig(stem=4, keypoints=6, hidden=16))
    x = torch.randn(6, 3, 32, 48)
    z = encoder(x)
    assert z.shape == (6, 10)
    assert float(z.norm(dim=1).std().detach()) > 1e-3
    torch.testing.assert_close(z, encoder(x.to(memory_format=torch.channels_last)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(z[2:3], encoder(x[2:3]), rtol=1e-4, atol=1e-5)


def test_positions_stay_exact_under_autocast() -> None:
    """bfloat16 keeps 8 bits: rounded positions near 3 would be off by up to 0.008, a tenth of a pixel and more."""
    encoder = dot_finder()
    image = torch.zeros(1, 1, 64, 64)
    image[..., 4:12, 52:60] = 1.0
    exact = encoder.positions(image)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = encoder.positions(image)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.0, atol=2e-3)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (70, 33), (8, 11)])
def test_a_convolution_over_gathered_rows_is_the_convolution(height: int, width: int) -> None:
    conv = nn.Conv2d(3, 5, 8, 4)
    image = torch.randn(2, 3, height, width, requires_grad=True)
    wanted, got = conv(image), strided_convolution(image, conv)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    inputs, grad = [image, *conv.parameters()], torch.randn_like(wanted)
    gradients = (torch.autograd.grad(y, inputs, grad) for y in (got, wanted))
    for mine, right in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-4)


def test_positions_are_the_softmaxs_means_and_so_are_their_gradients() -> None:
    maps = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    places = torch.randn(2, 20, dtype=torch.float64)
    grid = torch.cat([torch.ones_like(places[:1]), places])
    means = torch.einsum("npi,ci->ncp", maps.flatten(2).softmax(-1), places)
    torch.testing.assert_close(expected_positions(maps, grid), means)
    assert torch.autograd.gradcheck(lambda x: expected_positions(x, grid), maps)


def test_the_sharpest_maps_give_places_and_no_denormal_gradients() -> None:
    maps = (100 * torch.randn(2, 3, 4, 5)).requires_grad_()
    grid = torch.cat([torch.ones(1, 20), torch.randn(2, 20)])
    positions = expected_positions(maps, grid)
    torch.testing.assert_close(positions[..., 0], grid[1:, maps[:, 0].flatten(1).argmax(1)].t(), atol=1e-3, rtol=0)
    positions.backward(1e-6 * torch.randn_like(positions))
    assert maps.grad is not None
    sizes = maps.grad.abs()
    assert not ((sizes > 0) & (sizes < torch.finfo(torch.float32).tiny)).any()


def test_state_encoder() -> None:
    encoder = StateEncoder(5, 7, 16)
    x = torch.randn(4, 5)
    assert encoder(x).shape == (4, 7)
    torch.testing.assert_close(encoder(x)[1:2], encoder(x[1:2]))


# -- the random shift --------------------------------------------------------------------------------------------------


def test_every_shift_is_a_window_of_the_image_with_replicated_edges() -> None:
    """Pixel (i, j) holds (10·i + j); the shifted image holds the pixel at (i + dy, j + dx), clamped to the frame."""
    h, w, pixels = 5, 7, 2
    image = (10 * torch.arange(h)[:, None] + torch.arange(w)).float()
    x = torch.stack([image, -image]).expand(400, 2, h, w)
    known = {}
    for dy in range(-pixels, pixels + 1):
        for dx in range(-pixels, pixels + 1):
            rows = (torch.arange(h) + dy).clamp(0, h - 1)
            cols = (torch.arange(w) + dx).clamp(0, w - 1)
            known[(dy, dx)] = image[rows][:, cols]
    out = random_shift(x, pixels)
    assert out.shape == x.shape
    assert torch.equal(out[:, 1], -out[:, 0]), "channels move together"
    seen = set()
    for moved in out[:, 0]:
        matches = [shift for shift, expected in known.items() if torch.equal(moved, expected)]
        assert len(matches) == 1
        seen.add(matches[0])
    assert seen == set(known), "400 draws of 25 shifts see them all"


def test_no_shift_changes_nothing() -> None:
    x = torch.randn(3, 2, 4, 4)
    assert torch.equal(random_shift(x, 0), x)


def test_a_shift_comes_from_the_global_generator() -> None:
    x = torch.randn(16, 1, 8, 8)
    torch.manual_seed(5)
    first = random_shift(x, 3)
    torch.manual_seed(5)
    assert torch.equal(first, random_shift(x, 3))
    assert not torch.equal(first, random_shift(x, 3))
