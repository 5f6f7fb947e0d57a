"""The Vision Transformer encoder and LeWorldModel's projector."""

import pytest
import torch
from torch import nn

from worldmodels.projector import BatchNormProjector
from worldmodels.vit import ViTConfig, ViTEncoder

SMALL = ViTConfig(patch=4, width=24, depth=2, heads=3, mlp=32, projector=40)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_default_is_vit_tiny() -> None:
    encoder = ViTEncoder((3, 224, 224), 192, ViTConfig())
    # By hand: per block 2 norms, qkv, out and the MLP; the patch embedding; 256 + 1 positions; [CLS]; the last norm.
    block = 2 * 2 * 192 + 192 * 576 + 576 + 192 * 192 + 192 + 192 * 768 + 768 + 768 * 192 + 192
    backbone = 12 * block + 3 * 14 * 14 * 192 + 192 + 257 * 192 + 192 + 2 * 192
    projector = 192 * 2048 + 2048 + 2 * 2048 + 2048 * 192 + 192
    assert count(encoder.project) == projector
    assert count(encoder) == backbone + projector == 6_294_144
    with torch.no_grad():
        assert encoder(torch.randn(2, 3, 224, 224)).shape == (2, 192)


@pytest.mark.parametrize("size", [(4, 4), (8, 8), (12, 20)])
def test_any_image_of_whole_patches(size: tuple[int, int]) -> None:
    encoder = ViTEncoder((2, *size), 10, SMALL)
    assert encoder(torch.randn(5, 2, *size)).shape == (5, 10)


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="10×8 cannot be cut into 4×4 patches"):
        ViTEncoder((3, 10, 8), 10, SMALL)
    with pytest.raises(ValueError, match="not a multiple of its 5 heads"):
        ViTEncoder((3, 8, 8), 10, ViTConfig(patch=4, width=24, heads=5))
    with pytest.raises(ValueError, match="a depth of at least 1 block, got 0"):
        ViTEncoder((3, 8, 8), 10, ViTConfig(patch=4, width=24, heads=3, depth=0))


def test_a_block_that_is_asked_for_some_tokens_gives_them_as_if_for_all() -> None:
    block, tokens = ViTEncoder((3, 8, 8), 10, SMALL).blocks[-1], torch.randn(2, 5, 24)
    for wanted in (1, 3, 5):
        torch.testing.assert_close(block(tokens, wanted=wanted), block(tokens)[:, :wanted])


def test_patches_are_cut_as_a_strided_convolution_would() -> None:
    encoder = ViTEncoder((3, 8, 12), 10, SMALL)
    x = torch.randn(2, 3, 8, 12)
    kernel = encoder.embed.weight.view(24, 3, 4, 4)
    known = nn.functional.conv2d(x, kernel, encoder.embed.bias, stride=4).flatten(2).transpose(1, 2)
    seen: list[torch.Tensor] = []
    encoder.embed.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    encoder(x)
    torch.testing.assert_close(seen[0], known)


def test_every_patch_and_its_place_reach_the_latent() -> None:
    encoder = ViTEncoder((1, 8, 8), 10, SMALL).eval()
    x = torch.randn(1, 1, 8, 8, requires_grad=True)
    encoder(x).square().sum().backward()
    assert x.grad is not None
    assert bool((x.grad.abs() > 0).all())
    swapped = torch.cat([x[..., 4:], x[..., :4]], -1).detach()
    assert not torch.allclose(encoder(swapped), encoder(x))


def test_images_do_not_touch_each_other_in_eval_mode() -> None:
    encoder = ViTEncoder((1, 8, 8), 10, SMALL).eval()
    x = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(encoder(x)[:1], encoder(x[:1]))


def test_latents_take_any_scale() -> None:
    """Nothing normalises the last Linear's output: its weights alone set the latent's scale."""
    projector = BatchNormProjector(6, 16, 4)
    x = torch.randn(64, 6)
    small = projector(x)
    with torch.no_grad():
        for parameter in list(projector.parameters())[-2:]:
            parameter.mul_(50)
    torch.testing.assert_close(projector(x), 50 * small)


def test_eval_mode_uses_running_statistics() -> None:
    """Train mode depends on the batch, eval mode does not; and the two meet when the statistics have settled."""
    projector = BatchNormProjector(6, 16, 4)
    x = 3 + 2 * torch.randn(512, 6)
    for _ in range(200):
        trained = projector(x)
    projector.eval()
    torch.testing.assert_close(projector(x), trained, rtol=0, atol=5e-3)
    torch.testing.assert_close(projector(x[:1]), projector(x)[:1])


def test_gradients_reach_every_parameter() -> None:
    encoder = ViTEncoder((3, 8, 8), 10, SMALL)
    encoder(torch.randn(8, 3, 8, 8)).square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.abs().sum() > 0), name
