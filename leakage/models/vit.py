"""A small vision transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakage.errors import check_count, check_image_size
from leakage.models.draw import reset


class ViT(nn.Module):
    """A small vision transformer: patches, blocks of attention, and a linear layer on the mean over patches.

    Blocks normalise first, as in the paper; their MLPs have ``4 * width`` hidden units and GELU. There is no class
    token: the mean over patches works as well in small networks, and leaves one kind of token. Attention is written out
    in basic operations, because attacks differentiate twice, and fused kernels do not support that. (Torchvision's
    transformer has weights that no module draws anew.) Images of any size are accepted, padded with zeros to whole
    patches. The network has 809,098 parameters for images of 3 x 32 x 32 and 10 classes.

    Shapes: images ``(N, channels, *image_size)``, normalised; logits ``(N, num_classes)``.

    Args:
        channels, image_size, num_classes: as for :class:`ConvNet`.
        patch_size: side of the square patches in pixels.
        width: length of a token.
        depth: number of blocks.
        heads: number of attention heads in each block; must divide ``width``.

    Raises:
        ValueError: a size or count is not a whole number of at least 1, or ``heads`` does not divide ``width``.

    References:
        Dosovitskiy et al., *An Image is Worth 16x16 Words*, ICLR 2021, https://arxiv.org/abs/2010.11929.

    Example:
        >>> ViT(channels=3, image_size=32)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        channels: int = 1,
        image_size: int | tuple[int, int] = 28,
        num_classes: int = 10,
        *,
        patch_size: int = 4,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
    ) -> None:
        super().__init__()
        check_count(channels=channels, num_classes=num_classes, patch_size=patch_size, width=width)
        check_count(depth=depth, heads=heads)
        height, across = check_image_size(image_size)
        if width % heads:
            raise ValueError(f"Expected `heads` to divide `width` {width}, but got {heads}.")
        self.missing = -across % patch_size, -height % patch_size
        self.patches = nn.Conv2d(channels, width, patch_size, patch_size)
        self.position = _Position(-(-height // patch_size) * -(-across // patch_size), width)
        self.blocks = nn.Sequential(*[_Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, num_classes)
        self.apply(reset)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``(N, num_classes)`` of images ``(N, channels, *image_size)``."""
        whole = F.pad(images, (0, self.missing[0], 0, self.missing[1]))
        tokens = self.patches(whole).flatten(2).transpose(1, 2)
        logits: Tensor = self.classifier(self.norm(self.blocks(self.position(tokens))).mean(1))
        return logits


class _Position(nn.Module):
    """Adds a learned embedding of each position."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width))

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.weight


class _Block(nn.Module):
    """A transformer block: attention, then an MLP on each token, both with a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.projection(self._attend(self.attention(self.norm1(tokens))))
        mixed: Tensor = tokens + self.mlp(self.norm2(tokens))
        return mixed

    def _attend(self, tokens: Tensor) -> Tensor:
        """Apply attention to queries, keys and values ``(N, T, 3 * width)``; returns ``(N, T, width)``."""
        query, key, value = tokens.view(*tokens.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5).softmax(-1)
        mixed: Tensor = (weights @ value).transpose(1, 2).flatten(-2)
        return mixed
