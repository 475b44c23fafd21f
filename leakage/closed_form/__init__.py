"""Attacks that solve equations, nearly in closed form, instead of matching gradients."""

from leakage.closed_form.features import SeparatedFeatures, check_separable, separate_features
from leakage.closed_form.inverses import find_chain
from leakage.closed_form.layer_by_layer import LayerByLayer, check_layers, images_by_layers, invert_layers

__all__ = [
    "LayerByLayer",
    "SeparatedFeatures",
    "check_layers",
    "check_separable",
    "find_chain",
    "images_by_layers",
    "invert_layers",
    "separate_features",
]
