"""Models of timm, which Transformers opens as ``TimmWrapperForImageClassification``.

Their ``config.json`` holds all there is: ``model_args`` for ``timm.create_model``, and ``pretrained_cfg`` with mean,
deviation, size, interpolation and crop of the images. timm and torchvision are imported only where such a model is
opened.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch

MODEL_TYPE = "timm_wrapper"


def check_packages(name: str) -> None:
    """Raises ``ImportError`` if timm or torchvision is not installed."""
    missing = [package for package in ("timm", "torchvision") if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(
            f"--model {name} is a model of timm, and {' and '.join(missing)} not installed: "
            "pip install 'fastsam-optim[timm]'"
        )


def is_timm(config: Any) -> bool:
    """Whether this is the config of a model of timm."""
    return getattr(config, "model_type", None) == MODEL_TYPE


def channels(config: Any) -> int:
    """The number of channels that the model's images have."""
    return (config.model_args or {}).get("in_chans", 3)


class TimmProcessor:
    """timm's transform for evaluation, called as an image processor of Transformers is.

    Raises ``ValueError`` if ``pretrained_cfg`` is for another number of channels than the model has.
    """

    def __init__(self, name: str, config: Any) -> None:
        from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

        its, cfg = channels(config), _pretrained_cfg(config)
        if its not in (1, 3):
            raise ValueError(f"--model {name}: it wants images of {its} channels; here they have 1 or 3")
        for key, count in (("input_size", cfg["input_size"][0]), ("mean", len(cfg["mean"])), ("std", len(cfg["std"]))):
            if count != its and (key == "input_size" or count != 1):
                raise ValueError(
                    f"--model {name}: it wants images of {its} channels, and {key} of the pretrained_cfg in its "
                    f"config.json is {tuple(cfg[key])}: correct that, or in_chans in its model_args"
                )
        self._timm = TimmWrapperImageProcessor(cfg, config.architecture)
        self.image_mean, self.image_std = self._timm.data_config["mean"], self._timm.data_config["std"]

    def __call__(
        self, image: Any, *, do_rescale: bool = True, do_normalize: bool = True, return_tensors: str = "pt"
    ) -> Mapping[str, Any]:
        """The inputs of the model, or without ``do_rescale`` and ``do_normalize`` pixels from 0 to 255."""
        if do_rescale and do_normalize:
            return self._timm(image, return_tensors=return_tensors)
        for transform in self._timm.val_transforms.transforms:
            if type(transform).__name__ != "Normalize":
                image = transform(image)
        return {"pixel_values": image[None] * 255}

    def save_pretrained(self, folder: Any) -> None:
        """Writes nothing: ``AutoImageProcessor`` reads the model's ``config.json``."""


@torch.no_grad()
def resized(name: str, model: Any, side: int, say: Callable[[str], None]) -> Any:
    """The model, changed in place by its own ``set_input_size`` if it has one, for images of ``side`` x ``side``."""
    config, network = model.config, model.timm_model
    cfg = _pretrained_cfg(config)
    before = tuple(cfg["input_size"][1:])
    if hasattr(network, "set_input_size"):
        try:
            network.set_input_size(img_size=(side, side))
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"--image-size {side}: {name} cannot have images of that size: {error}") from error
        config.model_args = {**(config.model_args or {}), "img_size": side}
    config.pretrained_cfg = {**cfg, "input_size": [channels(config), side, side]}
    if before != (side, side):
        say(f"{name} is for images of {before[1]} x {before[0]} pixels: made one for {side} x {side}")
    return model


def layer_depths(model: Any) -> dict[str, int]:
    """The depth of every parameter as timm's own layer-wise decay counts it: the model's ``group_matcher``.

    Raises ``ValueError`` if the model has none.
    """
    from timm.models import group_parameters

    network = model.timm_model
    if not hasattr(network, "group_matcher"):
        raise ValueError(
            f"--layer-decay: timm's {type(network).__name__} does not say what its layers are; leave it out"
        )
    depths = group_parameters(network, network.group_matcher(coarse=False), reverse=True)
    return {f"timm_model.{name}": depth for name, depth in depths.items()}


def _pretrained_cfg(config: Any) -> dict[str, Any]:
    """``config.pretrained_cfg``, which gets what timm has for the architecture where it says nothing."""
    import timm

    cfg = getattr(config, "pretrained_cfg", None)
    if not cfg:
        known = timm.get_pretrained_cfg(config.architecture)
        cfg = known.to_dict(remove_source=True) if known else {}
    mean, std = timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD
    defaults = {"input_size": (channels(config), 224, 224), "mean": mean, "std": std}
    config.pretrained_cfg = {**cfg, **{key: value for key, value in defaults.items() if cfg.get(key) is None}}
    return config.pretrained_cfg
