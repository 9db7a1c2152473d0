"""Networks of timm and torchvision that can only be made small by their classes."""

from functools import partial

import torch
from timm.layers import BatchNormAct2d, StdConv2d
from timm.models.levit import Levit
from timm.models.mlp_mixer import MlpMixer
from timm.models.resnetv2 import ResNetV2
from torch import nn
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer


def vit(num_classes, num_layers=2):
    """Of torchvision, with torch.nn.MultiheadAttention, for images of 32×32."""
    sizes = {"hidden_dim": 12, "mlp_dim": 20, "num_classes": num_classes}
    network = VisionTransformer(32, 8, num_layers, 3, **sizes)
    nn.init.normal_(network.heads.head.weight)  # 0 in torchvision, so that all logits were 0
    return network


def swin(num_classes):
    """Of torchvision, whose attention takes its weights past forward."""
    return SwinTransformer([4, 4], 8, [1, 1], [2, 2], [4, 4], num_classes=num_classes)


def mixer(num_classes, in_channels):
    return MlpMixer(
        num_classes, img_size=32, in_chans=in_channels, patch_size=8, num_blocks=2, embed_dim=16
    )


def levit(num_classes):
    """For images of 64×64."""
    sizes = {"embed_dim": (16, 24, 32), "key_dim": 8, "depth": (1, 1, 1), "num_heads": (2, 3, 4)}
    return Levit(img_size=64, num_classes=num_classes, **sizes)


def resnet_v2(num_classes):
    """Its convolutions standardise their weights."""
    conv = partial(StdConv2d, eps=1e-8)
    how = {"stem_chs": 8, "conv_layer": conv, "norm_layer": BatchNormAct2d}
    return ResNetV2((1, 1), (16, 32), num_classes=num_classes, **how)


class TokensFirst(nn.Module):
    """Attention over tokens in the first dimension, rows in the second."""

    def __init__(self, num_classes):
        super().__init__()
        self.proj, self.head = nn.Linear(12, 8), nn.Linear(8, num_classes)

    def forward(self, x):
        tokens = self.proj(x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).permute(2, 4, 0, 1, 3, 5)
                           .flatten(3).flatten(0, 1))  # fmt: skip
        weights = (tokens @ tokens.mT).softmax(-1)
        return self.head((weights @ tokens).mean(0))


class OverRows(nn.Module):
    """Divides by the standard deviation over the rows."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, num_classes)
        nn.init.zeros_(self.head.weight)

    def forward(self, x):
        x = self.conv(x)
        return self.head((x / x.std(0, keepdim=True)).square().mean((2, 3)))


def tokens_first(num_classes):
    return TokensFirst(num_classes)


def over_rows(num_classes):
    return OverRows(num_classes)


class Inner(nn.Module):
    """Takes the weight of a module's layer, behind a gain that is 0 at first."""

    def __init__(self, num_classes):
        super().__init__()
        self.inner, self.head = nn.Sequential(nn.Linear(3, 3)), nn.Linear(3, num_classes)
        self.gain = nn.Parameter(torch.zeros(3))
        self.r = nn.Parameter(torch.tensor([3.0, 4.0, 5.0]))  # no factor

    def forward(self, x):
        x = x.mean((2, 3)) * self.r
        return self.head(x + self.gain * (x @ self.inner[0].weight))


def inner(num_classes):
    return Inner(num_classes)


class Reads(nn.Module):
    """Takes a layer's weight past its forward, in a method that forward calls."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(3, 3)

    def forward(self, x):
        return self.project(x)

    def project(self, x):
        return torch.nn.functional.linear(x, self.proj.weight)
