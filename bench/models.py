"""The models of the benchmarks. build(name, n) → (model, inputs (n, …), labels (n,)); no dropout, no batch statistics."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F


class Block(nn.Module):
    """A pre-norm transformer block in plain linears, so that every peer can follow it."""

    def __init__(self, d: int, heads: int, causal: bool = False):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x):
        q, k, v = (z.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for z in self.qkv(self.norm1(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(attended.transpose(-3, -2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Encoder(nn.Module):
    """Embedded positions → blocks → mean → classes."""

    def __init__(self, d: int, heads: int, depth: int, classes: int = 10, causal: bool = False):
        super().__init__()
        self.blocks = nn.Sequential(*(Block(d, heads, causal) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, classes)

    def forward(self, x):
        return self.head(self.norm(self.blocks(x)).mean(-2))


class ViT(nn.Module):
    def __init__(self, d=192, heads=3, depth=12, patch=16, classes=100):
        super().__init__()
        self.patch = nn.Conv2d(3, d, patch, patch)
        self.encoder = Encoder(d, heads, depth, classes)

    def forward(self, x):
        return self.encoder(self.patch(x).flatten(2).transpose(1, 2))


class Residual(nn.Module):
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False), nn.BatchNorm2d(c_out)
        self.short = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.short = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.short(x))


def resnet18(widths=(64, 128, 256, 512), classes=10):
    c = widths[0]
    layers = [nn.Conv2d(3, c, 3, 1, 1, bias=False), nn.BatchNorm2d(c), nn.ReLU()]
    for i, k in enumerate(widths):
        layers += [Residual(c, k, 2 if i else 1), Residual(k, k, 1)]
        c = k
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, classes)).eval()


def cnn(widths=(32, 64, 128), classes=10):
    layers, c = [], 3
    for k in widths:
        for _ in range(2):
            layers += [nn.Conv2d(c, k, 3, 1, 1), nn.GroupNorm(8, k), nn.ReLU()]
            c = k
        layers += [nn.AvgPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, classes))


def mlp(d_in=784, width=1024, depth=3, classes=10):
    layers = []
    for i in range(depth):
        layers += [nn.Linear(width if i else d_in, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, classes))


MODELS = {
    "mlp": (mlp, (784,), 10),
    "cnn": (cnn, (3, 32, 32), 10),
    "resnet18": (resnet18, (3, 32, 32), 10),
    "encoder": (lambda: Encoder(256, 4, 2), (64, 256), 10),
    "vit_tiny": (ViT, (3, 224, 224), 100),
    "gpt2_small": (lambda: Encoder(768, 12, 12, causal=True), (128, 768), 10),
    # for slopes.py: samples by the thousand in seconds
    "small_mlp": (lambda: mlp(256, 256, 2), (256,), 10),
    "small_cnn": (lambda: cnn((8, 16)), (3, 8, 8), 10),
    # the same kinds, for tests/test_bench.py
    "mini_mlp": (lambda: mlp(12, 16, 2), (12,), 10),
    "mini_cnn": (lambda: cnn((8, 16)), (3, 8, 8), 10),
    "mini_resnet": (lambda: resnet18((4, 8)), (3, 8, 8), 10),
    "mini_encoder": (lambda: Encoder(16, 2, 1), (4, 16), 10),
    "mini_vit": (lambda: ViT(16, 2, 1, 4, 10), (3, 8, 8), 10),
    "mini_gpt2": (lambda: Encoder(16, 2, 1, causal=True), (4, 16), 10),
}


def parameters(name: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in MODELS[name][0]().parameters())


def build(name: str, n: int, dtype: torch.dtype = torch.float32):
    make, size, classes = MODELS[name]
    torch.manual_seed(0)
    model = make().to(dtype)
    return model, torch.randn(n, *size, dtype=dtype), torch.randint(0, classes, (n,))
