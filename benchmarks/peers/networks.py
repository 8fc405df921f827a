"""The benchmark's networks once more, in Python, parameter by parameter in the same order."""

import torch
from torch import nn
from torch.nn import functional as F


def convolution(in_channels, out_channels, kernel, stride):
    return nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)


class BasicBlock(nn.Module):
    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.convolution1 = convolution(in_channels, out_channels, 3, stride)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.convolution2 = convolution(out_channels, out_channels, 3, 1)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(convolution(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))

    def forward(self, x):
        inner = F.relu(self.norm1(self.convolution1(x)))
        return F.relu(self.norm2(self.convolution2(inner)) + self.shortcut(x))


class ResNet18(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.stem = convolution(3, width, 3, 1)
        self.stem_norm = nn.BatchNorm2d(width)
        stages, channels = [], width
        for stage in range(4):
            out = width << stage
            stages += [BasicBlock(channels, out, 1 if stage == 0 else 2), BasicBlock(out, out, 1)]
            channels = out
        self.stages = nn.Sequential(*stages)
        self.classifier = nn.Linear(channels, 10)

    def forward(self, images):
        features = self.stages(F.relu(self.stem_norm(self.stem(images))))
        return self.classifier(features.mean((2, 3)))


class Vgg(nn.Module):
    def __init__(self, stages, batch_norm, width=64):
        super().__init__()
        layers, channels = [], 3
        for stage in stages:
            for multiple in stage:
                layers.append(nn.Conv2d(channels, multiple * width, 3, padding=1))
                channels = multiple * width
                layers += [nn.BatchNorm2d(channels)] if batch_norm else []
                layers.append(nn.ReLU())
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(channels, channels), nn.ReLU(),
                                        nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, 10))

    def forward(self, images):
        return self.classifier(self.features(images))


class Cnn(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(2 * width, 4 * width, 3, padding=1), nn.ReLU(), nn.Flatten(),
            nn.Linear(4 * width * 64, 10))

    def forward(self, images):
        return self.layers(images)


class VitBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.projections = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def attention(self, x):
        n, tokens, width = x.shape
        parts = self.projections(x).reshape(n, tokens, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        weights = ((query * (width // self.heads) ** -0.5) @ key.transpose(-2, -1)).softmax(-1)
        return self.output((weights @ value).transpose(1, 2).reshape(n, tokens, width))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.contract(F.gelu(self.expand(self.norm2(x))))


class Vit(nn.Module):
    def __init__(self, width=128, heads=4, depth=4, patch=4):
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(1, (32 // patch) ** 2, width))
        self.embed = nn.Conv2d(3, width, patch, patch)
        self.blocks = nn.Sequential(*[VitBlock(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, 10)

    def forward(self, images):
        embedded = self.embed(images).flatten(2).transpose(1, 2) + self.positions
        return self.classifier(self.norm(self.blocks(embedded)).mean(1))


class Perceptron(nn.Module):
    def __init__(self, *widths):
        super().__init__()
        layers = []
        for inputs, outputs in zip(widths, widths[1:]):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.inputs = widths[0]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, images):
        return self.layers(images.flatten(1)[:, : self.inputs])


# name: (constructor, whether it is convolutional)
NETWORKS = {
    "resnet18_w16": (lambda: ResNet18(16), True),
    "resnet18_w64": (lambda: ResNet18(64), True),
    "vgg11": (lambda: Vgg([[1], [2], [4, 4], [8, 8], [8, 8]], False), True),
    "vgg16_bn": (lambda: Vgg([[1, 1], [2, 2], [4, 4, 4], [8, 8, 8], [8, 8, 8]], True), True),
    "cnn": (Cnn, True),
    "vit": (Vit, False),
    "mlp": (lambda: Perceptron(784, 2048, 2048, 10), False),
    "mlp_small": (lambda: Perceptron(16, 32, 10), False),
}
