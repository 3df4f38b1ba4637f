"""Which layers train a model."""

from collections.abc import Callable

from parts import device, joined_layers, numpy_training  # device before MLX, for its BLAS
from parts.separate_layers import SeparateLayers

import mlx.nn as nn


def layers_in_training(model: nn.Module, loss: Callable) -> SeparateLayers:
    """Return the layers that train the model the fastest. Where they are `JoinedLayers`, the
    weights of the model's own become views of theirs.
    """
    if device.ON_CPU:
        fitting = numpy_training.fits(model) and numpy_training.NumpyLayers
    else:
        fitting = joined_layers.fits(model) and joined_layers.JoinedLayers
    return (fitting or SeparateLayers)(model, loss)


def layers_in_evaluation(model: nn.Module, loss: Callable) -> SeparateLayers:
    """Return the layers that compute losses the fastest. The model is not in training."""
    fitting = device.ON_CPU and numpy_training.fits(model) and numpy_training.NumpyLayers
    return (fitting or SeparateLayers)(model, loss)
