"""The published algorithm, step by step, in the most literal PyTorch: what ours is timed against.

As the authors' code does it (github.com/cs-giung/giung2, projects/Diversity-Matters): float32,
contiguous tensors, PIL images through a DataLoader without workers, BatchEnsemble factors that
scale activations, teachers one after the other, an ODS gradient with a graph of its own, and a
measurement that waits for every step. Parameters have the names of `ensdistill.networks`, so that
both can start from the same weights.
"""

from collections.abc import Iterator

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms


class BatchEnsembleConv2d(nn.Module):
    """s_j ∘ (W ∗ (r_j ∘ x)) + b_j [Wen et al. 2020, eq. 5]."""

    def __init__(self, in_channels, out_channels, kernel_size, members, stride=1, padding=0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
        self.r = nn.Parameter(torch.empty(members, in_channels))
        self.s = nn.Parameter(torch.empty(members, out_channels))
        self.bias = nn.Parameter(torch.empty(members, out_channels))
        self.stride, self.padding = stride, padding

    def forward(self, x: Tensor) -> Tensor:
        rows = len(x) // len(self.r)
        r, s, bias = (
            factors.repeat_interleave(rows, 0)[:, :, None, None]
            for factors in (self.r, self.s, self.bias)
        )
        return s * F.conv2d(r * x, self.weight, None, self.stride, self.padding) + bias


class BatchEnsembleLinear(nn.Module):
    """s_j ∘ (W (r_j ∘ x)) + b_j [Wen et al. 2020, eq. 5]."""

    def __init__(self, in_features, out_features, members):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.r = nn.Parameter(torch.empty(members, in_features))
        self.s = nn.Parameter(torch.empty(members, out_features))
        self.bias = nn.Parameter(torch.empty(members, out_features))

    def forward(self, x: Tensor) -> Tensor:
        rows = len(x) // len(self.r)
        r, s, bias = (factors.repeat_interleave(rows, 0) for factors in (self.r, self.s, self.bias))
        return s * F.linear(r * x, self.weight) + bias


def conv(in_channels, out_channels, kernel_size, members, stride=1, padding=0) -> nn.Module:
    if members > 1:
        return BatchEnsembleConv2d(in_channels, out_channels, kernel_size, members, stride, padding)
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)


class BasicBlock(nn.Module):
    def __init__(self, in_channels, out_channels, stride, members):
        super().__init__()
        self.conv1 = conv(in_channels, out_channels, 3, members, stride, 1)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3, members, 1, 1)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.stride, self.padding = stride, out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        if self.stride != 1 or self.padding:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.padding))
        return F.relu(out + x)


class PreActivationBlock(nn.Module):
    def __init__(self, in_channels, out_channels, stride, members):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv(in_channels, out_channels, 3, members, stride, 1)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3, members, 1, 1)
        self.shortcut = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = conv(in_channels, out_channels, 1, members, stride)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        out = self.conv2(F.relu(self.norm2(self.conv1(active))))
        return out + (x if self.shortcut is None else self.shortcut(active))


class Normalize(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Network(nn.Module):
    """ResNet-n [He et al. 2016] or, with `widen`, WRN-n-k [Zagoruyko & Komodakis 2016]."""

    def __init__(self, depth, classes, in_channels=3, members=1, widen=None):
        super().__init__()
        block = PreActivationBlock if widen else BasicBlock
        width = 16 * (widen or 1)
        self.normalize = Normalize(in_channels)
        self.stem = conv(in_channels, 16, 3, members, 1, 1)
        self.stem_norm = nn.Identity() if widen else nn.BatchNorm2d(16)
        blocks, channels = [], 16
        for stage in range(3):
            for index in range(depth // 6):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(block(channels, width * 2**stage, stride, members))
                channels = width * 2**stage
        self.blocks = nn.Sequential(*blocks)
        self.final_norm = nn.BatchNorm2d(channels) if widen else nn.Identity()
        self.widen = widen
        self.head = (
            BatchEnsembleLinear(channels, classes, members)
            if members > 1
            else nn.Linear(channels, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(self.normalize(x)))
        if not self.widen:
            x = F.relu(x)
        x = self.blocks(x)
        if self.widen:
            x = F.relu(self.final_norm(x))
        return self.head(x.mean((2, 3)))


class Images(Dataset):
    """Images (N, H, W, C) uint8 that are decoded and transformed one by one."""

    def __init__(self, images, labels, transform):
        self.images, self.labels, self.transform = images, labels, transform
        self.grey = images.shape[-1] == 1

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index):
        # A grey image has two axes.
        pixels = self.images[index].squeeze(-1) if self.grey else self.images[index]
        return self.transform(Image.fromarray(pixels)), self.labels[index]


def batches(images, labels, batch_size: int, crop_padding: int, flip: bool) -> Iterator:
    """Augmented batches without end: x (B, C, H, W) in [0, 1], y (B,)."""
    steps = [transforms.ToTensor()]
    if flip:
        steps.insert(0, transforms.RandomHorizontalFlip())
    if crop_padding:
        steps.insert(0, transforms.RandomCrop(images.shape[1:3], padding=crop_padding))
    dataset = Images(images, labels, transforms.Compose(steps))
    loader = DataLoader(dataset, batch_size, shuffle=True, drop_last=True)
    while True:
        yield from loader


def ods_noise(teacher, x, temperature, w, confidence):
    """ε of ODS, or of ConfODS with `confidence`."""
    x = x.detach().clone().requires_grad_()
    probs = F.softmax(teacher(x) / temperature, 1)
    gradient = torch.autograd.grad((w * probs).sum(), x, create_graph=True)[0].detach()
    epsilon = F.normalize(gradient.flatten(1), dim=1).view_as(x) * x[0].numel() ** 0.5
    return epsilon * probs.detach().amax(1)[:, None, None, None] if confidence else epsilon


def student_loss(student, teachers, source, w, x, y, *, alpha, temperature, eta):
    """One-to-one distillation at ConfODS inputs, and the logits at the clean ones (M·B, K)."""
    members = len(teachers)
    epsilon = ods_noise(teachers[source], x, temperature, w, confidence=True)
    perturbed = (x + eta * epsilon).clamp(0, 1)
    with torch.no_grad():
        targets = torch.cat([teacher(perturbed) for teacher in teachers])
    logits = student(x.repeat(members, 1, 1, 1))
    logits_met = student(perturbed.repeat(members, 1, 1, 1))
    from_labels = F.cross_entropy(logits, y.repeat(members))
    from_teachers = temperature**2 * F.kl_div(
        F.log_softmax(logits_met / temperature, 1),
        F.softmax(targets / temperature, 1),
        reduction="batchmean",
    )
    return (1 - alpha) * from_labels + alpha * from_teachers, logits


def train_step(loss, logits, y, optimizer) -> tuple[float, float]:
    """Backward pass, update, and what is logged: loss and accuracy."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    correct = logits.argmax(1) == y.repeat(len(logits) // len(y))
    return loss.item(), correct.float().mean().item()
