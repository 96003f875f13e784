"""The classifier: a checkpoint of Transformers with a head for these classes, or a small new vision transformer.

A checkpoint is opened from safetensors only. A pickle (``pytorch_model.bin``, ``.pt``) runs whatever code is in it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from fastsam.commands.finetune import network, timm_models
from fastsam.commands.finetune.settings import EFFICIENTNET, OWN_NETWORK, SMALL_VIT
from fastsam.commands.training import pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
CONVERT = (
    "a pickle can run code when it is opened. Where you trust it, convert it once: "
    "AutoModelForImageClassification.from_pretrained(folder).save_pretrained(new_folder) writes safetensors"
)


def load(
    name: str, classes: list[str], example: Any, say: Callable[[str], None], image_size: int | None = None
) -> tuple[nn.Module, Preparation]:
    """The model in float32 on the CPU, and what makes images its inputs.

    Args:
        name: ``small-vit``, ``efficientnet-lite0`` with its weights of ImageNet, a folder that ``save_pretrained``
            wrote, a name on the hub, or ``module:function``.
        classes: their names; a head for another number of classes is replaced by a new one.
        example: a PIL image of the data, which a new model is made to fit.
        say: is told what is not taken from the checkpoint.
        image_size: side of the images in pixels, if not the checkpoint's: position embeddings are interpolated.

    Raises ``ValueError`` for a checkpoint that is missing, no image classifier, a pickle, or not for that image size,
    and ``ImportError`` for a model of timm where timm is not installed, and for weights that are a package.
    """
    labels = {"id2label": dict(enumerate(classes)), "label2id": {c: i for i, c in enumerate(classes)}}
    if name == EFFICIENTNET:
        return pretrained.efficientnet_lite0(len(classes)), Preparation(network.efficientnet_processor(image_size), 3)
    if OWN_NETWORK.fullmatch(name):
        own = network.build(name, len(classes))
        preparation = Preparation(network.processor(example, image_size), network.channels(example))
        dtype = next(p.dtype for p in own.parameters() if p.is_floating_point())
        pixels = torch.stack([preparation(example)] * 2)
        network.check_outputs(name, own, preparation.normalised(pixels).to(dtype), len(classes))
        return own, preparation
    if name == SMALL_VIT:
        model, processor = _small_vit(example, labels, image_size)
    else:
        _refuse_pickles(name)
        model = _from_checkpoint(name, classes, labels, say)
        if image_size is not None:
            model = _resized(name, model, image_size, say)
        processor = _processor(name, model.config, say)
    of_timm = timm_models.is_timm(model.config)
    channels = timm_models.channels(model.config) if of_timm else getattr(model.config, "num_channels", 3)
    preparation = Preparation(processor, channels)
    if image_size is not None:
        preparation.resize(image_size)
        _check_size(name, model, preparation, image_size)
    elif of_timm:  # the size of the model and that of its images are two entries of its config
        _check_size(name, model, preparation, None)
    return model, preparation


class Preparation:
    """What the image processor does, in two halves.

    ``preparation(image)`` gives the uint8 tensor (C, H, W) that is kept in memory or comes from a worker: converted to
    the model's channels, resized, cropped. :meth:`normalised` does the arithmetic, for a batch on its device.
    """

    def __init__(self, processor, channels: int) -> None:
        from PIL import Image

        self.processor = processor
        self._mode = "L" if channels == 1 else "RGB"
        self._channels = channels
        self._bytes = {"do_rescale": False, "do_normalize": False}
        if hasattr(processor, "include_top"):  # EfficientNet's second normalisation
            self._bytes["include_top"] = False
        # Whatever names a processor has for its arithmetic, it is a x + b for each channel: seen from black and white.
        plain = [Image.new(self._mode, (64, 64), color) for color in ("black", "white")]
        if [self(image).float().mean() for image in plain] != [0, 255]:
            raise ValueError(f"{type(processor).__name__} does more to images than resize, crop and scale them")
        black, white = (processor(x, return_tensors="pt")["pixel_values"][0].mean(dim=(1, 2)) for x in plain)
        self._factor = ((white - black) / 255).reshape(-1, 1, 1)
        self._offset = black.reshape(-1, 1, 1)

    def __call__(self, image) -> Tensor:
        pixels = self.processor(image.convert(self._mode), **self._bytes, return_tensors="pt")["pixel_values"][0]
        if pixels.ndim != 3 or pixels.shape[0] != self._channels:
            raise ValueError(
                f"{type(self.processor).__name__} makes inputs of shape {tuple(pixels.shape)}; the model wants "
                f"{self._channels} channels, height and width"
            )
        return pixels if pixels.dtype == torch.uint8 else pixels.round().clamp(0, 255).to(torch.uint8)

    def resize(self, side: int) -> None:
        """Has the processor, as it is and as it is saved, make images of ``side`` x ``side`` pixels.

        All its sizes change by one factor, so that a crop keeps its share.
        """
        from PIL import Image

        before = self(Image.new(self._mode, (64, 64))).shape[-1]
        for name in ("size", "crop_size"):
            size = getattr(self.processor, name, None)
            if size is not None:
                scaled = {edge: round(pixels * side / before) for edge, pixels in dict(size).items()}
                setattr(self.processor, name, type(size)(**scaled))

    def normalised(self, images: Tensor) -> Tensor:
        """The inputs of the model in float32, on the device of the images."""
        self._factor, self._offset = self._factor.to(images.device), self._offset.to(images.device)
        return images.float() * self._factor + self._offset


def _small_vit(example, labels: dict, image_size: int | None) -> tuple[nn.Module, Any]:
    """Some 110,000 parameters: 3 blocks of width 64, on patches of 2 pixels, or of 4 for images above 16 pixels."""
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    side = image_size or min(32, max(8, -(-max(example.size) // 4) * 4))
    channels = network.channels(example)
    config = ViTConfig(
        image_size=side,
        patch_size=2 if side <= 16 else 4,
        num_channels=channels,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        initializer_range=0.1,  # about 1 / sqrt(64); the 0.02 of width 768 learns nothing for many epochs here
        **labels,
    )
    half = [0.5] * channels
    processor = ViTImageProcessorPil(size={"height": side, "width": side}, image_mean=half, image_std=half)
    return ViTForImageClassification(config), processor


def _refuse_pickles(name: str) -> None:
    path = Path(name)
    if path.is_file():
        if path.suffix in PICKLES:
            raise ValueError(f"--model {path} is refused: {CONVERT}")
        raise ValueError(f"--model {path} is a file: name the folder that save_pretrained wrote")
    if not path.is_dir():
        if path.is_absolute() or name.startswith("."):
            raise ValueError(f"--model {name}: there is no such folder")
        return  # a name on the hub
    if any(path.glob("*.safetensors")):
        return
    pickles = [file.name for file in sorted(path.iterdir()) if file.suffix in PICKLES]
    if pickles:
        raise ValueError(f"--model {path} is refused: it has {pickles[0]} and no safetensors; {CONVERT}")
    raise ValueError(f"--model {path} has no *.safetensors: it is not what save_pretrained wrote, or not all of it")


def _from_checkpoint(name: str, classes: list[str], labels: dict, say: Callable[[str], None]) -> nn.Module:
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig

    try:
        if PreTrainedConfig.get_config_dict(name)[0].get("model_type") == timm_models.MODEL_TYPE:
            timm_models.check_packages(name)
            labels = {"num_labels": len(classes), **labels}  # without it this config keeps its own number
        before = AutoConfig.from_pretrained(name, trust_remote_code=False)
        model, found = AutoModelForImageClassification.from_pretrained(
            name,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            dtype=torch.float32,
            trust_remote_code=False,
            **labels,
        )
    except SafetensorError as error:
        raise ValueError(f"--model {name}: its safetensors are damaged, or not all there ({error})") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--model {name}: {_reason(name, error)}") from error
    if timm_models.is_timm(model.config):
        model.config.label_names = classes  # which it writes in the place of id2label
    replaced = _replaced(found)
    foreign = [key for key, old, new in replaced if not (len(classes) in new and before.num_labels in old)]
    if foreign:
        raise ValueError(f"--model {name}: {foreign[0]} in its weights does not have the shape that its config says")
    if replaced:
        say(f"{name} has {before.num_labels} classes, the data {len(classes)}: its head is replaced by a new one")
    missing = sorted(found["missing_keys"])
    if missing:
        say(f"{name} has no {', '.join(missing[:4])}{' ...' if len(missing) > 4 else ''}: started anew")
    if not replaced and not missing and list((before.id2label or {}).values()) != classes:
        say(f"the head of {name} is kept: it has {len(classes)} classes as well, under other names")
    return model


@torch.no_grad()
def _resized(name: str, module: nn.Module, side: int, say: Callable[[str], None]) -> nn.Module:
    """The model for images of ``side`` x ``side`` pixels: its position embeddings as it interpolates them itself.

    ``from_pretrained`` with another ``image_size`` would draw them anew, and ``interpolate_pos_encoding=True`` would
    have to be said wherever the model is used.
    """
    model = cast("PreTrainedModel", module)
    if timm_models.is_timm(model.config):
        return timm_models.resized(name, model, side, say)
    config = copy.deepcopy(model.config)
    vision = getattr(config, "vision_config", config)
    before = getattr(vision, "image_size", side)
    after = side if isinstance(before, int) else type(before)([side, side])
    if before == after:
        return model
    say(f"{name} is for images of {before} pixels: made one for {after}")
    vision.image_size = after
    state = model.state_dict()
    with torch.device("meta"):  # for its shapes
        resized = type(model)(config)
    for key, wanted in resized.state_dict().items():
        if state[key].shape != wanted.shape:
            state[key] = _interpolated(model, key, wanted, side)
        if state[key] is None:
            raise ValueError(
                f"--image-size {side}: {type(model).__name__} has no way to resize its {key}: take a checkpoint made "
                "for this size"
            )
    return type(model).from_pretrained(None, config=config, state_dict=state)


def _interpolated(model: nn.Module, key: str, wanted: Tensor, side: int) -> Tensor | None:
    """The position embeddings ``key`` for images of this side, or None if the model cannot interpolate them.

    The methods want embeddings of the image, and take the number of patches from them: ``wanted``, on the meta device,
    has nothing else to give.
    """
    parts = key.split(".")
    owners = (model.get_submodule(".".join(parts[:i])) for i in range(len(parts) - 1, -1, -1))
    owner: Any = next((owner for owner in owners if hasattr(owner, "interpolate_pos_encoding")), None)
    try:
        return owner.interpolate_pos_encoding(wanted.reshape(1, *wanted.shape[-2:]), side, side).reshape(wanted.shape)
    except (AttributeError, TypeError, RuntimeError):  # it has no such method, one of other arguments, or not for these
        return None


@torch.no_grad()
def _check_size(name: str, model: nn.Module, preparation: Preparation, side: int | None) -> None:
    """Raises ``ValueError`` unless images become this size, if any, and pass through the model (in eval mode)."""
    from PIL import Image

    pixels = preparation(Image.new("RGB", (64, 64)))
    try:
        if side is not None and pixels.shape[1:] != (side, side):
            raise ValueError(f"{type(preparation.processor).__name__} makes them {tuple(pixels.shape[1:])}")
        model(pixel_values=preparation.normalised(pixels[None]))
    except (ValueError, RuntimeError, AssertionError) as error:  # the models check in their own ways
        if side is not None:
            raise ValueError(f"--image-size {side}: {name} cannot have images of that size: {error}") from error
        size = " x ".join(map(str, pixels.shape[:0:-1]))
        raise ValueError(
            f"--model {name}: the pretrained_cfg in its config.json is for images of {size} pixels, which the model "
            f"cannot have ({error}): say --image-size"
        ) from error


def _replaced(found: dict) -> list[tuple[str, tuple, tuple]]:
    return [(key, tuple(old), tuple(new)) for key, old, new in found["mismatched_keys"]]


def _processor(name: str, config, say: Callable[[str], None]):
    from transformers import AutoImageProcessor
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    if timm_models.is_timm(config):
        return timm_models.TimmProcessor(name, config)
    files = ("preprocessor_config.json", "processor_config.json")
    if Path(name).is_dir() and not any((Path(name) / file).exists() for file in files):
        size = getattr(config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        say(f"{name} has no preprocessor_config.json: images become {width} x {height}, with mean and deviation 0.5")
        half = [0.5] * getattr(config, "num_channels", 3)
        return ViTImageProcessorPil(size={"height": height, "width": width}, image_mean=half, image_std=half)
    try:
        return AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {name}: its image processor does not open: {_reason(name, error)}") from error


def _reason(name: str, error: Exception) -> str:
    """The sentence of Transformers' message that says what is wrong, and what to do."""
    text = " ".join(str(error).split())
    if "safetensors" in text:
        return f"no safetensors there; {CONVERT}"
    if "Unrecognized configuration class" in text:
        return "AutoModelForImageClassification knows no classifier of this kind"
    if Path(name).is_dir():
        return text[:300]
    return (
        "not a folder here, and not found on the hub or in its cache. Without a network, give a folder that "
        f"save_pretrained wrote. ({text.split('. ')[0]})"
    )
