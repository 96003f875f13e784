"""``fastsam finetune`` with models of timm: their own images, their own layers, and folders that open again."""

from __future__ import annotations

import importlib.util
import json
import random
import re

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, TimmWrapperConfig

from fastsam.commands.cli import app
from fastsam.commands.finetune import folders, groups, job, model
from fastsam.commands.finetune.settings import Settings

MISSING = [name for name in ("timm", "torchvision") if importlib.util.find_spec(name) is None]
needs_timm = pytest.mark.skipif(bool(MISSING), reason=f"{' and '.join(MISSING)} not installed")

VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
OWN = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "input_size": [3, 16, 16]}
CLASSES = ["finch", "gull", "jay"]


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    """A folder of 24 colour images of 20 x 24 pixels in 3 classes, which differ by their colour, and 9 for testing."""
    folder = tmp_path_factory.mktemp("birds")
    noise = random.Random(0)
    for split, count in (("train", 8), ("test", 3)):
        for channel, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                speckled(noise, channel).save(folder / split / name / f"{i}.png")
    return folder


def speckled(noise, channel):
    image = Image.new("RGB", (20, 24))
    for x in range(20):
        for y in range(24):
            image.putpixel((x, y), tuple(noise.randrange(90) + 150 * (c == channel) for c in range(3)))
    return image


def wrapped(folder, architecture="vit_tiny_patch16_224", classes=5, model_args=VIT, **cfg):
    """A new model in ``folder``, as ``save_pretrained`` of Transformers' wrapper writes it."""
    from transformers import TimmWrapperForImageClassification

    torch.manual_seed(0)
    named = {"pretrained_cfg": cfg} if cfg else {}
    config = TimmWrapperConfig(architecture=architecture, num_labels=classes, model_args=model_args, **named)
    TimmWrapperForImageClassification(config).save_pretrained(folder)
    return str(folder)


def of_timm(folder, architecture="vit_tiny_patch16_224", classes=5, model_args=VIT, **cfg):
    """The same as timm writes it, and as its repositories on the hub have it: no prefixes, no names of classes."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    network = timm.create_model(architecture, num_classes=classes, **model_args)
    folder.mkdir(exist_ok=True)
    save_file(network.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    config = {"architecture": architecture, "num_classes": classes, "model_args": model_args, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def load(name, size=None, say=lambda _: None, classes=CLASSES):
    return model.load(name, classes, None, say, size)


@needs_timm
@pytest.mark.parametrize("save", [wrapped, of_timm])
@pytest.mark.parametrize(
    "cfg",
    [
        {"crop_pct": 0.9, "interpolation": "bicubic"},
        {"crop_pct": 0.7, "interpolation": "bilinear"},
        {"crop_pct": 1.0, "crop_mode": "squash", "interpolation": "nearest"},
        {"crop_pct": 1.0, "crop_mode": "border", "interpolation": "bicubic"},
        {"crop_pct": 0.9, "interpolation": "bicubic", "input_size": [3, 16, 12]},
    ],
    ids=["cropped", "bilinear", "squashed", "padded", "not square"],
)
def test_images_become_what_timm_makes_of_them(tmp_path, save, cfg):
    """Mean, deviation, size, crop and interpolation: the inputs are those of timm's own transform."""
    import timm

    cfg = {**OWN, **cfg}
    name = save(tmp_path, model_args={**VIT, "img_size": cfg["input_size"][1:]}, **cfg)
    preparation = load(name)[1]
    assert preparation.processor.image_mean == (0.4, 0.5, 0.6)
    image = speckled(random.Random(1), 0)
    expected = timm.data.create_transform(**timm.data.resolve_data_config(cfg), is_training=False)(image)
    kept = preparation(image)
    assert kept.dtype == torch.uint8
    torch.testing.assert_close(preparation.normalised(kept), expected, rtol=0, atol=2e-6)


@needs_timm
@pytest.mark.parametrize("save", [wrapped, of_timm])
@pytest.mark.parametrize(
    "architecture, model_args, side", [("vit_tiny_patch16_224", VIT, 16), ("test_convnext", {}, 32)]
)
def test_a_run_trains_and_what_it_saves_opens_again(birds, tmp_path, save, architecture, model_args, side):
    folder, output = tmp_path / "checkpoint", tmp_path / "run"
    cfg = {**OWN, "input_size": [3, side, side], "crop_pct": 0.9, "interpolation": "bicubic"}
    name = save(folder, architecture, model_args=model_args, **cfg)
    options = {
        "epochs": 12,
        "batch_size": 8,
        "lr": 3e-3,
        "device": "cpu",
        "method": "fsam",
        "gradient_checkpointing": True,
    }
    seen = []

    def watched(job_, trainer, progress):
        seen.append((trainer.model.eval(), job_.preparation))
        return made(job_, trainer, progress)

    made = job._result
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "_result", watched)
        result = job.run(Settings(model=name, data=str(birds), output=output, **options))
    assert result["best_accuracy"] > 0.9
    (trained, preparation), image = seen[0], speckled(random.Random(2), 1)
    reopened = AutoModelForImageClassification.from_pretrained(output / "model").eval()
    processor = AutoImageProcessor.from_pretrained(output / "model")
    assert tuple(processor.data_config["mean"]) == (0.4, 0.5, 0.6)
    assert reopened.config.id2label == dict(enumerate(CLASSES))
    pixels = processor(image)["pixel_values"]
    torch.testing.assert_close(preparation.normalised(preparation(image))[None], pixels, rtol=0, atol=2e-6)
    with torch.no_grad():
        logits = reopened(pixels).logits
        torch.testing.assert_close(logits, trained(pixels).logits)
    again, _ = load(str(output / "model"))
    for opened in (reopened, again):
        weights = opened.state_dict()
        assert all(torch.equal(weights[key], value) for key, value in trained.state_dict().items())


@needs_timm
def test_weights_are_timms_and_a_head_of_other_classes_is_replaced(tmp_path):
    import timm
    from safetensors.torch import load_file

    name = of_timm(tmp_path, **OWN)
    said = []
    classifier = load(name, say=said.append)[0]
    assert said == [f"{name} has 5 classes, the data 3: its head is replaced by a new one"]
    reference = timm.create_model("vit_tiny_patch16_224", num_classes=5, **VIT).eval()
    reference.load_state_dict(load_file(tmp_path / "model.safetensors"))
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        features = classifier.timm_model.eval().forward_features(images)
        torch.testing.assert_close(features, reference.forward_features(images))
    assert classifier(images).logits.shape == (2, 3)


@needs_timm
def test_a_config_that_says_nothing_of_images_gets_what_timm_has_for_its_architecture(tmp_path):
    classifier, preparation = load(wrapped(tmp_path / "bare", "test_efficientnet", model_args=None))
    assert preparation.processor.image_mean == (0.485, 0.456, 0.406)
    assert preparation(Image.new("RGB", (30, 20))).shape == (3, 160, 160)
    folders.save(classifier, preparation.processor, tmp_path / "saved", 0)
    reopened = AutoImageProcessor.from_pretrained(tmp_path / "saved").data_config
    assert (tuple(reopened["input_size"]), reopened["crop_pct"]) == ((3, 160, 160), 0.95)
    weights = AutoModelForImageClassification.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(weights[key], value) for key, value in classifier.state_dict().items())


@needs_timm
def test_another_size_is_saved_with_its_position_embeddings(tmp_path):
    from timm.layers import resample_abs_pos_embed

    name = wrapped(tmp_path / "small", classes=3, **OWN)
    before = load(name)[0].timm_model.pos_embed
    classifier, preparation = load(name, 24)
    expected = resample_abs_pos_embed(before, new_size=(6, 6), num_prefix_tokens=1)
    torch.testing.assert_close(classifier.timm_model.pos_embed, expected)
    folders.save(classifier, preparation.processor, tmp_path / "large", 0)
    image = speckled(random.Random(3), 2)
    pixels = AutoImageProcessor.from_pretrained(tmp_path / "large")(image)["pixel_values"]
    assert pixels.shape == (1, 3, 24, 24)
    torch.testing.assert_close(preparation.normalised(preparation(image))[None], pixels, rtol=0, atol=2e-6)
    reopened = AutoModelForImageClassification.from_pretrained(tmp_path / "large").eval()
    with torch.no_grad():
        torch.testing.assert_close(reopened(pixels).logits, classifier(pixels).logits)


@needs_timm
def test_grey_images_for_a_model_of_one_channel(tmp_path):
    cfg = {"mean": [0.1307], "std": [0.3081], "input_size": [1, 16, 16]}
    _, preparation = load(wrapped(tmp_path, model_args={**VIT, "in_chans": 1}, **cfg))
    grey = preparation.normalised(preparation(Image.new("RGB", (20, 20), (51, 51, 51))))
    torch.testing.assert_close(grey, torch.full((1, 16, 16), (0.2 - 0.1307) / 0.3081))


@needs_timm
def test_layers_get_the_learning_rates_that_timm_counts_and_positions_no_decay(tmp_path):
    """timm keeps its blocks in a ``Sequential``; its last norm belongs to the last block."""
    vit = load(wrapped(tmp_path, **OWN))[0]
    found = groups.parameter_groups(vit, lr=1.0, weight_decay=0.1, layer_decay=0.5)
    of = {id(p): (group["lr"], group["weight_decay"]) for group in found for p in group["params"]}
    named = {name.removeprefix("timm_model."): of[id(p)] for name, p in vit.named_parameters()}
    assert named["pos_embed"] == named["cls_token"] == (0.125, 0.0)
    assert named["patch_embed.proj.weight"] == (0.125, 0.1)
    assert named["blocks.0.attn.qkv.weight"] == (0.25, 0.1)
    assert named["blocks.1.attn.qkv.bias"] == named["norm.weight"] == (0.5, 0.0)
    assert named["head.weight"] == (1.0, 0.1)


@needs_timm
@pytest.mark.parametrize(
    "model_args, cfg, size, says",
    [
        ({"in_chans": 1}, {}, None, r"images of 1 channels, and input_size of the pretrained_cfg .* is \(3, 16, 16\)"),
        ({"in_chans": 1}, {"input_size": [1, 16, 16]}, None, "images of 1 channels, and mean of the pretrained_cfg"),
        ({"in_chans": 4}, {}, None, "wants images of 4 channels; here they have 1 or 3"),
        (
            {},
            {"input_size": [3, 20, 12]},
            None,
            "is for images of 12 x 20 pixels, which the model cannot .* --image-size",
        ),
        ({}, {}, 2, "--image-size 2: .* cannot have images of that size"),
        ({"embed_dimm": 8}, {}, None, "embed_dimm"),
    ],
)
def test_a_model_that_does_not_fit_its_images_is_one_sentence(birds, tmp_path, model_args, cfg, size, says):
    name = wrapped(
        tmp_path / "checkpoint", model_args={**VIT, **{k: v for k, v in model_args.items() if k == "in_chans"}}
    )
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    config |= {"model_args": {**VIT, **model_args}, "pretrained_cfg": {**OWN, **cfg}}
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps(config))
    options = ["--image-size", str(size)] if size else []
    assert_refused(name, birds, tmp_path, says, *options)


def test_without_timm_the_message_says_what_to_install(birds, tmp_path, monkeypatch):
    from safetensors.torch import save_file

    find_spec = importlib.util.find_spec
    absent = ("timm", "torchvision")
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n in absent else find_spec(n, *a))
    # Without names of classes, for which the config asks timm.
    config = {"architecture": "resnet18", "num_classes": 1000, "pretrained_cfg": {"input_size": [3, 224, 224]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"fc.bias": torch.zeros(3)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_refused(
        tmp_path,
        birds,
        tmp_path,
        r"is a model of timm, and timm and torchvision not installed: pip install 'fastsam-optim\[timm\]'",
    )


def assert_refused(name, birds, folder, says, *options):
    arguments = [
        "--model",
        name,
        "--data",
        birds,
        "--batch-size",
        8,
        "--epochs",
        1,
        "--output",
        folder / "run",
        *options,
    ]
    run = CliRunner().invoke(app, ["finetune", *map(str, arguments)], env={"COLUMNS": "400"})
    assert run.exit_code == 1, run.output
    message = run.stderr.strip()
    assert message.startswith("fastsam finetune: --") and "\n" not in message and "Traceback" not in run.output
    assert re.search(says, message), message
    assert not (folder / "run" / "checkpoint.pt").exists()
