"""Models of images, most of them from torchvision and timm."""

import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import MBConvConfig
from torchvision.models.resnet import BasicBlock
from zoo_base import Classifier, Pictures, Zoo, normal


class _LeNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 5, padding=2), nn.Conv2d(4, 8, 5)
        self.fc1, self.fc2 = nn.Linear(32, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = F.max_pool2d(self.conv1(x).relu(), 2)
        x = F.max_pool2d(self.conv2(x).relu(), 2)
        x = x.view(len(x), -1)
        return self.fc2(self.fc1(x).relu())


class LeNet(Pictures):
    shape = (1, 16, 16)

    def model(self):
        return _LeNet()


class MLP(Pictures):
    shape = (1, 8, 8)

    def model(self):
        layers = [nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(16, 3))


class _NarrowResNet(torchvision.models.ResNet):
    """ResNet-18 with an eighth of the channels, and the stem that small images need."""

    def __init__(self):
        super().__init__(BasicBlock, [1, 1, 1, 1], num_classes=3)
        self.inplanes = 8
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.maxpool = nn.Identity()
        for i, width in enumerate((8, 16, 32, 64)):
            layer = self._make_layer(BasicBlock, width, 2, stride=1 if i == 0 else 2)
            setattr(self, f"layer{i + 1}", layer)
        self.fc = nn.Linear(64, 3)


class ResNet18Narrow(Pictures):
    def model(self):
        return _NarrowResNet()


class MobileNetV3(Pictures):
    shape = (3, 32, 32)

    def model(self):
        return torchvision.models.mobilenet_v3_small(num_classes=3, width_mult=0.1)


class EfficientNet(Pictures):
    shape = (3, 32, 32)

    def model(self):
        blocks = [
            MBConvConfig(1, 3, 1, 8, 8, 1),
            MBConvConfig(4, 3, 2, 8, 12, 1),
            MBConvConfig(4, 5, 2, 12, 16, 1),
        ]
        return torchvision.models.EfficientNet(blocks, dropout=0.1, num_classes=3)


class ConvNeXt(Pictures):
    shape = (3, 32, 32)

    def model(self):
        blocks = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)]
        # Larger than the usual 1e-6, so that gradients reach the blocks.
        return torchvision.models.ConvNeXt(blocks, num_classes=3, layer_scale=0.1)


class Swin(Pictures):
    def model(self):
        return torchvision.models.SwinTransformer(
            [2, 2], 8, [1, 1], [2, 2], [2, 2], mlp_ratio=2.0, num_classes=3
        )


class ViT(Pictures):
    def model(self):
        return torchvision.models.VisionTransformer(16, 4, 1, 2, 16, 32, num_classes=3)


class TimmViT(Pictures):
    def model(self):
        from timm.models.vision_transformer import VisionTransformer

        return VisionTransformer(
            img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3
        )


class TimmMixer(Pictures):
    def model(self):
        from timm.models.mlp_mixer import MlpMixer

        return MlpMixer(img_size=16, patch_size=4, embed_dim=16, num_blocks=2, num_classes=3)


class DenseNet(Pictures):
    def model(self):
        return torchvision.models.DenseNet(4, (2, 2), 8, num_classes=3)


class _UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down1 = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU())
        self.down2 = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.ReLU())
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        fine = self.down1(x)
        return self.head(torch.cat([fine, self.up(self.down2(fine)).relu()], 1))


class UNet(Zoo):
    """Segmentation: two classes a pixel; a sample's loss is its mean pixel's."""

    output_loss = "cross-entropy"

    def data(self, rows, seed):
        x = normal(rows, (1, 8, 8), seed)
        return TensorDataset(x, (F.avg_pool2d(x, 3, 1, 1)[:, 0] > 0).long())

    def model(self):
        return _UNet()

    def test_size(self, test):
        return 8, 8

    def losses(self, model, batch):
        losses = F.cross_entropy(self.outputs(model, batch), batch[1], reduction="none")
        return losses.flatten(1).mean(1)


class Denoiser(Zoo):
    """Image to image, of any size; a sample's loss is the mean squared error."""

    output_loss = "mse"

    def data(self, rows, seed):
        clean = F.avg_pool2d(normal(rows, (1, 8, 8), seed), 3, 1, 1)
        return TensorDataset(clean + 0.1 * normal(rows, (1, 8, 8), seed + 2), clean)

    def model(self):
        return nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1, padding_mode="reflect"),
            nn.InstanceNorm2d(6, affine=True),
            nn.PReLU(6),
            nn.Conv2d(6, 8, 3, padding=1),
            nn.PixelShuffle(2),
            nn.AvgPool2d(2),
            nn.Conv2d(2, 1, 1),
        )

    def losses(self, model, batch):
        return (self.outputs(model, batch) - batch[1]).square().flatten(1).mean(1)


class Conv3d(Classifier):
    shape = (1, 4, 6, 6)

    def model(self):
        return nn.Sequential(
            nn.Conv3d(1, 4, 3, padding=1),
            nn.BatchNorm3d(4),
            nn.ReLU(),
            nn.MaxPool3d(2),
            nn.Conv3d(4, 6, 2),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(24, 3),
        )
