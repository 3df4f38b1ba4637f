"""Which layers train a model."""

from collections.abc import Callable

from parts import device, joined_layers, numpy_training  # device before MLX, for its BLAS
from parts.separate_layers import SeparateLayers

import mlx.nn as nn


def layers_in_training(model: nn.Module, loss: Callable) -> SeparateLayers:
    """Return the layers that train the model the fastest. Where they are `JoinedLayers`, the
    weights of the model's own become views of theirs.
    """
    if not device.ON_CPU and joined_layers.fits(model):
        return joined_layers.JoinedLayers(model, loss)
    return layers_in_evaluation(model, loss)


def layers_in_evaluation(model: nn.Module, loss: Callable) -> SeparateLayers:
    """Return the layers that compute losses the fastest."""
    if device.ON_CPU and numpy_training.fits(model):
        return numpy_training.NumpyLayers(model, loss)
    return SeparateLayers(model, loss)
