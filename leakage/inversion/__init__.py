"""What follows from linear equations, nearly in closed form: no gradient is matched."""

from leakage.inversion.chain import Chain, find_chain
from leakage.inversion.features import SeparatedFeatures, check_separable, separate_features
from leakage.inversion.layer_by_layer import LayerByLayer, invert_layers

__all__ = [
    "Chain",
    "LayerByLayer",
    "SeparatedFeatures",
    "check_separable",
    "find_chain",
    "invert_layers",
    "separate_features",
]
