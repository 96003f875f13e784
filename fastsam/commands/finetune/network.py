"""The user's own network: ``--model module:function``, where ``function(classes)`` returns an ``nn.Module``."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from typing import Any

import torch
from torch import Tensor, nn

from fastsam.commands.finetune.settings import nearest
from fastsam.commands.training import pretrained


def build(name: str, classes: int) -> nn.Module:
    """What ``function(classes)`` of ``module:function`` returns; the module may lie in the current folder.

    Raises ``ValueError`` for a module that does not import, a function that is not there or fails, and for what is
    no ``nn.Module``.
    """
    module_name, function_name = name.split(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as python -m has it, and the console script has not
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"--model {name}: {module_name} does not import ({error}): run in the folder that holds it, or set "
            "PYTHONPATH"
        ) from error
    if not hasattr(module, function_name):
        own = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise ValueError(f"--model {name}: {module_name} has no {function_name}{nearest(function_name, own)}")
    function = getattr(module, function_name)
    try:
        network = function(classes)
    except Exception as error:
        raise ValueError(
            f"--model {name}: {function_name}({classes}) failed: {error}. It is given the number of classes"
        ) from error
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"--model {name}: {function_name}({classes}) returned a {type(network).__name__}: it must return an "
            "nn.Module"
        )
    if isinstance(network, torch.jit.ScriptModule):
        raise ValueError(
            f"--model {name}: {function_name}({classes}) returned a ScriptModule, which the Trainer cannot look into: "
            "return the network that it was made of, and say --compile"
        )
    if not any(p.requires_grad for p in network.parameters()):
        raise ValueError(f"--model {name}: {function_name}({classes}) has no parameters to train")
    return network


def processor(example: Any, image_size: int | None) -> Any:
    """Scales images to ``image_size``, or to the size of ``example`` (PIL), with mean and deviation 0.5."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    width, height = (image_size, image_size) if image_size else example.size
    half = [0.5] * channels(example)
    return ViTImageProcessorPil(size={"height": height, "width": width}, image_mean=half, image_std=half)


def efficientnet_processor(image_size: int | None) -> Any:
    """Scales images to ``image_size``, or to the 224 pixels of EfficientNet-Lite0's weights, with their mean."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    size = {"height": image_size or 224, "width": image_size or 224}
    return ViTImageProcessorPil(size=size, image_mean=list(pretrained.MEAN), image_std=list(pretrained.STD))


def channels(example: Any) -> int:
    """1 for a grey image, else 3."""
    return 1 if example.mode in ("1", "L") else 3


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """The outputs of a network of one's own or of a model of Transformers, wrapped or not."""
    inner = getattr(model, "module", model)  # what DistributedDataParallel wraps
    outputs = model(pixel_values=images) if hasattr(inner, "save_pretrained") else model(images)
    return outputs.logits if hasattr(outputs, "logits") else outputs


@torch.no_grad()
def check_outputs(name: str, model: nn.Module, images: Tensor, classes: int) -> None:
    """Raises ``ValueError`` unless the network makes logits, (N, classes), of images, in eval mode."""
    model.eval()
    try:
        found = logits(model, images)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        raise ValueError(
            f"--model {name}: the network fails on images of shape {tuple(images.shape)} ({error}): build it for them, "
            "or say --image-size"
        ) from error
    finally:
        model.train()
    wanted = (len(images), classes)
    if not isinstance(found, Tensor) or tuple(found.shape) != wanted or not found.is_floating_point():
        kind = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise ValueError(
            f"--model {name}: the network's output is {kind}, no logits: it must be a tensor of shape {wanted}, one "
            "number for each image and class"
        )
