"""The networks are those of the papers: their sizes, and that every parameter takes part."""

import pytest
import torch

from fastsam import models


@pytest.mark.parametrize(
    ("build", "parameters", "tensors"),
    [
        (lambda: models.resnet18(1000, stem="imagenet"), 11_689_512, 62),
        (lambda: models.resnet50(1000, stem="imagenet"), 25_557_032, 161),
        (models.resnet18, 11_173_962, 62),
        (models.resnet50, 23_520_842, 161),
        (models.wrn28_10, 36_479_194, 80),
        (models.vgg16_bn, 15_253_578, 58),
        (models.pyramidnet, 18_323_787, 403),
        (lambda: models.pyramidnet(bottleneck=False), 28_485_477, 439),
        (models.vit_b16, 86_567_656, 152),
        (models.vit_l16, 304_326_632, 296),
    ],
)
def test_published_sizes(build, parameters, tensors):
    with torch.device("meta"):
        found = list(build().parameters())
    assert (sum(p.numel() for p in found), len(found)) == (parameters, tensors)


SMALL = {
    "resnet18": lambda **k: models.resnet18(7, width=4, **k),
    "resnet18, ImageNet's stem": lambda **k: models.resnet18(7, width=4, stem="imagenet", **k),
    "resnet50": lambda **k: models.resnet50(7, width=4, **k),
    "wrn28_10": lambda **k: models.wrn28_10(7, depth=10, width=1, **k),
    "vgg16_bn": lambda **k: models.vgg16_bn(7, width=4, **k),
    "pyramidnet": lambda **k: models.pyramidnet(7, depth=20, alpha=12, **k),
    "pyramidnet, basic": lambda **k: models.pyramidnet(7, depth=14, alpha=12, bottleneck=False, **k),
    "vit": lambda **k: models.vit(7, image=32, patch=8, dim=16, heads=2, depth=2, **k),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", list(SMALL))
def test_small_versions_train_every_parameter(name, channels):
    torch.manual_seed(0)
    network = SMALL[name](channels=channels)
    if name == "wrn28_10":  # its head starts at zero, which stops the first gradients
        torch.nn.init.normal_(network[-1].weight)
    logits = network(torch.randn(4, channels, 32, 32))
    assert logits.shape == (4, 7)
    torch.nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    for parameter_name, p in network.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), parameter_name
    assert sum(p.grad.abs().sum() > 0 for p in network.parameters()) >= 0.9 * len(list(network.parameters()))


def test_images_of_the_demo_and_larger_ones_fit_the_residual_networks():
    for network in (models.resnet18(7, width=4), models.wrn28_10(7, depth=10, width=1), models.pyramidnet(7, depth=11)):
        for side in (8, 40):
            assert network.eval()(torch.randn(2, 3, side, side)).shape == (2, 7)


def _without_residual(block):
    """The block in eval mode, its residual branch silenced by zeros in the last layer."""
    last = [m for m in block.residual.modules() if getattr(m, "weight", None) is not None][-1]
    for p in last.parameters():
        torch.nn.init.zeros_(p)
    return block.eval()


def test_a_block_whose_residual_is_zero_is_its_shortcut():
    x = torch.randn(2, 8, 6, 6)
    for block in (models._BasicBlock(8, 8, 1), models._Bottleneck(8, 2, 1)):
        torch.testing.assert_close(_without_residual(block)(x), x.relu())
    torch.testing.assert_close(_without_residual(models._WideBlock(8, 8, 1))(x), x)
    narrow = _without_residual(models._WideBlock(8, 16, 2))
    activated = (x / (1 + 1e-5) ** 0.5).relu()  # BatchNorm that has seen nothing yet
    expected = torch.nn.functional.conv2d(activated, narrow.shortcut.weight, stride=2)
    torch.testing.assert_close(narrow(x), expected)
    for expansion in (1, 4):
        widened = _without_residual(models._PyramidBlock(8, 10, expansion, 2))(x)
        torch.testing.assert_close(widened[:, :8], x.view(2, 8, 3, 2, 3, 2).mean((3, 5)))
        assert widened.shape == (2, 10 * expansion, 3, 3) and not widened[:, 8:].any()


def test_attention_is_torchs_own():
    ours, theirs = models._Attention(16, 4), torch.nn.MultiheadAttention(16, 4, batch_first=True)
    theirs.load_state_dict(
        {
            "in_proj_weight": ours.query_key_value.weight, "in_proj_bias": ours.query_key_value.bias,
            "out_proj.weight": ours.out.weight, "out_proj.bias": ours.out.bias,
        }
    )  # fmt: skip
    x = torch.randn(3, 5, 16)
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: models.resnet18(stem="mnist"), "stem='mnist'.*cifar or imagenet"),
        (lambda: models.wrn28_10(depth=27), "depth=27.*28"),
        (lambda: models.pyramidnet(depth=100), "depth=100.*110"),
        (lambda: models.vit(image=30), "image=30.*patch=16"),
        (lambda: models.vit(heads=7), "dim=768.*heads=7"),
    ],
)
def test_sizes_that_cannot_be_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
