"""Networks of the published attacks and of dataset condensation."""

from torch import nn

from leakage.models.convolutional import VGG11, AlexNet, ConvNet
from leakage.models.draw import draw_state
from leakage.models.generator import Generator
from leakage.models.lenet import LeNet
from leakage.models.mlp import MLP
from leakage.models.resnet import ResNet18, ResNet20
from leakage.models.vit import ViT

NETWORKS: dict[str, type[nn.Module]] = {
    "convnet": ConvNet,
    "mlp": MLP,
    "lenet": LeNet,
    "alexnet": AlexNet,
    "vgg11": VGG11,
    "resnet18": ResNet18,
    "resnet20": ResNet20,
    "vit": ViT,
}
"""Networks by name; each is called as ``Network(channels, image_size, num_classes)``."""

__all__ = [
    "MLP",
    "NETWORKS",
    "VGG11",
    "AlexNet",
    "ConvNet",
    "Generator",
    "LeNet",
    "ResNet18",
    "ResNet20",
    "ViT",
    "draw_state",
]
