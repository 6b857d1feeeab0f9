"""The teacher: torchvision's DeepLabV3, its last encoder feature F^T, and the attention pool P.

The teacher is trained on the data set (stage 1), P is fitted on the frozen teacher (stage 2) or read
from a CLIP file; both are frozen while the student learns (stage 3).

    B batch, H W image size, K classes
    C_T channels of F^T: 2048 for ResNet-50 and -101, 960 for MobileNetV3-Large, 512 for ResNet-10
"""
import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3

from data import InputError, read_weights

CHANNELS = {"deeplabv3_resnet101": 2048, "deeplabv3_resnet50": 2048, "deeplabv3_mobilenet_v3_large": 960,
            "deeplabv3_resnet10": 512}
STRIDES = {"deeplabv3_mobilenet_v3_large": 16}  # of F^T, else 8
BACKBONES = {"deeplabv3_resnet101": models.ResNet101_Weights.IMAGENET1K_V2,
             "deeplabv3_resnet50": models.ResNet50_Weights.IMAGENET1K_V2,
             "deeplabv3_mobilenet_v3_large": models.MobileNet_V3_Large_Weights.IMAGENET1K_V2}
CLIP_RN101_SHA256 = "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599"
EMBEDDING = 512  # coordinates of e^T and e^S: CLIP RN101's


class Teacher(nn.Module):
    """(B,3,H,W) -> logits z^T (B,K,h,w), encoder feature F^T (B,C_T,h,w), map before the classifier (B,256,h,w).

    h, w: H/8, W/8 with a ResNet, H/16, W/16 with MobileNetV3. The paper's teacher is DeepLabV3+; torchvision has
    DeepLabV3, without the low-level branch.
    """

    def __init__(self, name, classes):
        super().__init__()
        # paper: unstated; F^T is layer4, before ASPP: the release's 256-channel ASPP map cannot enter its own pool
        net = _resnet10(classes) if name == "deeplabv3_resnet10" else \
            getattr(models.segmentation, name)(weights=None, weights_backbone=None, num_classes=classes)
        self.backbone, self.classifier = net.backbone, net.classifier
        self.channels = CHANNELS[name]
        if "mobilenet" in name:
            # torchvision's 0.01 makes the running statistics lag for hundreds of steps
            for m in self.modules():
                if isinstance(m, nn.BatchNorm2d):
                    m.momentum = 0.1

    def forward(self, x):
        feature = self.backbone(x)["out"]  # B,C_T,h,w
        before = feature
        *head, classify = self.classifier
        for layer in head:
            before = layer(before)
        return classify(before), feature, before

    def freeze(self):
        """No gradients, BatchNorm on its running statistics: how the teacher stands during distillation."""
        return self.requires_grad_(False).eval()


def _resnet10(classes):
    """DeepLabV3 on one ResNet block a stage, no max-pool, stride 8 (ours: for small images on a CPU)."""
    net = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1])
    net.maxpool = nn.Identity()
    net.layer4[0].conv1.stride = net.layer4[0].downsample[0].stride = (1, 1)
    # the usual rates 12, 24, 36 reach beyond the 8x8 map of a 64x64 image
    return DeepLabV3(IntermediateLayerGetter(net, {"layer4": "out"}), DeepLabHead(512, classes, (2, 4)))


def initialise(teacher, name, source):
    """Starting weights for stage 1: "imagenet" (torchvision's backbone file) or "none" (random).

    "voc" loads torchvision's finished COCO_WITH_VOC_LABELS_V1 model (21 classes), which needs no stage 1.
    """
    if source in ("imagenet", "voc") and name not in BACKBONES:
        raise InputError(f"{name} has no published weights: use --teacher-weights none or a FILE")
    if source == "imagenet":
        state = read_weights(BACKBONES[name].url, "--teacher-weights")
        wanted = teacher.backbone.state_dict()
        # torchvision's MobileNetV3 file calls layer 0 "features.0", its segmentation backbone "0"
        state = {k.removeprefix("features."): v for k, v in state.items()}
        aside = sorted(set(state) - set(wanted))
        # strict; num_batches_tracked, which old files lack, BatchNorm supplies itself
        teacher.backbone.load_state_dict({k: v for k, v in state.items() if k in wanted})
        print(f"teacher backbone: ImageNet; not loaded: {', '.join(aside)}")
    elif source == "voc":
        weights = models.get_model_weights(name)["COCO_WITH_VOC_LABELS_V1"]
        state = read_weights(weights.url, "--teacher-weights")
        aside = sorted(k for k in state if k.startswith("aux_classifier."))
        teacher.load_state_dict({k: v for k, v in state.items() if k not in aside})
        print(f"teacher: COCO_WITH_VOC_LABELS_V1; not loaded: {len(aside)} tensors of the auxiliary head")


class AttentionPool(nn.Module):
    """P: one attention step whose only query is the mean of all positions; F^T (B,C,h,w) -> e^T (B,512).

    tokens = [mean; positions] + positional_embedding, C/64 heads, projection to 512. Structure and
    parameter names of CLIP's `AttentionPool2d`, as DenseCLIP uses it. F^T is first resized bilinearly to
    `grid` x `grid` positions.
    """

    def __init__(self, channels, grid, embedding=EMBEDDING):
        super().__init__()
        self.grid, self.heads = grid, channels // 64
        self.positional_embedding = nn.Parameter(torch.randn(grid * grid + 1, channels) / channels ** 0.5)
        self.q_proj = nn.Linear(channels, channels)
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.c_proj = nn.Linear(channels, embedding)

    def forward(self, feature):
        # paper: unstated; the release has 16x16 positions, where F^T has fewer we keep its own
        x = F.interpolate(feature, (self.grid, self.grid), mode="bilinear")
        x = x.flatten(2).transpose(1, 2)  # B,g*g,C
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.positional_embedding  # B,1+g*g,C
        split = lambda t: t.unflatten(2, (self.heads, -1)).transpose(1, 2)  # B,heads,n,64
        q, k, v = split(self.q_proj(x[:, :1])), split(self.k_proj(x)), split(self.v_proj(x))
        x = F.scaled_dot_product_attention(q, k, v)  # B,heads,1,64
        return self.c_proj(x.transpose(1, 2).flatten(1))  # B,512


def pool_grid(name, crop):
    """Positions a side of P for crops of `crop` pixels: 16, at most F^T's own."""
    return min(16, -(-crop // STRIDES.get(name, 8)))


class PoolFitter(nn.Module):
    """Stage 2: P with one learned word vector a class; forward: F^T -> logits (B,K) of "class k is in this crop".

    paper: unstated; the authors' pool weights are missing. CLIP's pool names what a picture shows in the
    space of its sentences; ours does so in the space of K learned words, fitted by multi-label
    binary cross-entropy on the frozen teacher's features.
    """

    def __init__(self, channels, grid, classes):
        super().__init__()
        self.pool = AttentionPool(channels, grid)
        self.words = nn.Linear(EMBEDDING, classes)  # rows: the word vectors

    def forward(self, feature):
        return self.words(self.pool(feature))


def presence(labels, classes):
    """Which classes occur: labels (B,H,W) with 255 = ignore -> float (B,K) of zeros and ones."""
    return torch.stack([torch.bincount(y[y < classes].flatten(), minlength=classes) > 0 for y in labels]).float()


def average_precision(scores, truth):
    """Mean precision at the positives of each class, crops sorted by score: (M,K), (M,K) -> (K,), NaN without a positive."""
    order = scores.argsort(0, descending=True)
    hits = truth.gather(0, order)
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1, device=hits.device)[:, None]
    return (precision * hits).sum(0) / hits.sum(0).where(hits.sum(0) > 0, torch.nan)


def load_clip_pool(pool, path):
    """Fill P from a user's CLIP RN101 file (2048 channels: ResNet teachers only).

    A plain state dict is read as such. The original RN101.pt is a TorchScript archive, which can run code:
    it is opened only if its sha256 is OpenAI's. The 7x7 positions are resized bilinearly to P's grid.
    Raises InputError for any other file.
    """
    path = Path(path)
    if pool.c_proj.in_features != 2048:
        raise InputError("--clip needs a ResNet teacher: CLIP RN101's pool reads 2048 channels")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give --clip the path of CLIP's RN101.pt") from None
    except Exception:
        with open(path, "rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest()
        if digest != CLIP_RN101_SHA256:
            raise InputError(f"{path}: neither a plain state dict nor OpenAI's RN101.pt (sha256 {digest[:12]}...); "
                             "save its visual.attnpool.* tensors with torch.save as a dict") from None
        state = torch.jit.load(path, map_location="cpu").state_dict()
    prefix = "visual.attnpool."
    state = {k.removeprefix(prefix): v.float() for k, v in state.items() if str(k).startswith(prefix)} \
        if isinstance(state, dict) else {}
    wanted = {k: v.shape for k, v in pool.state_dict().items() if k != "positional_embedding"}
    if {k: v.shape for k, v in state.items() if k != "positional_embedding"} != wanted \
            or state.get("positional_embedding", torch.empty(0)).shape != (50, 2048):
        raise InputError(f"{path}: its visual.attnpool.* tensors are not those of CLIP RN101 (RN50 has another size)")
    mean, grid = state["positional_embedding"].split([1, 49])
    grid = F.interpolate(grid.T.reshape(1, 2048, 7, 7), (pool.grid, pool.grid), mode="bilinear")
    state["positional_embedding"] = torch.cat([mean, grid.flatten(2)[0].T])
    pool.load_state_dict(state)
