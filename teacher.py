"""The teacher: torchvision's DeepLabV3, its last encoder feature F^T, and the attention pool P.

The teacher is trained on the data set (stage 1), P is fitted on the frozen teacher (stage 2) or read
from a CLIP file; both are frozen while the student learns (stage 3).

    B batch, H W image size, K classes, C_T channels of F^T
"""
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models
from torchvision.models import segmentation
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3

from data import InputError, load_strictly, read_weights
from losses import Outputs

CLIP_RN101_SHA256 = "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599"
EMBEDDING = 512  # coordinates of e^T and e^S: CLIP RN101's


class Teacher(nn.Module):
    """(B,3,H,W) -> Outputs: logits z^T (B,K,h,w), encoder feature F^T (B,C_T,h,w), before_classifier (B,D,h,w).

    h, w: H/8, W/8 with a ResNet, H/16, W/16 with a MobileNet. name: a row of TEACHERS.
    """
    # differs: paper and release DeepLabV3+ of stride 16, here torchvision's DeepLabV3, without the low-level branch

    def __init__(self, name, classes):
        super().__init__()
        kind = TEACHERS[name]
        net = kind.build(classes)
        self.backbone, self.classifier, self.channels = net.backbone, net.classifier, kind.channels
        if "mobilenet" in name:
            # torchvision's 0.01 makes the running statistics lag for hundreds of steps
            for m in self.modules():
                if isinstance(m, nn.BatchNorm2d):
                    m.momentum = 0.1

    def forward(self, x):
        # differs: paper last encoder feature, release layer4 in one file and the ASPP map in another, here layer4
        feature = self.backbone(x)["out"]  # B,C_T,h,w
        before = feature
        *head, classify = self.classifier
        for layer in head:
            before = layer(before)
        return Outputs(classify(before), feature, before)

    def freeze(self):
        """No gradients, BatchNorm on its running statistics: how the teacher stands during distillation."""
        self.zero_grad()
        return self.requires_grad_(False).eval()


def torchvision_net(name):
    """A builder: classes -> torchvision's network `name` with random weights."""
    return lambda classes: segmentation.__dict__[name](weights=None, weights_backbone=None, num_classes=classes)


def _resnet10(classes):
    """DeepLabV3 on one ResNet block a stage, no max-pool, stride 8 (ours: for small images on a CPU)."""
    net = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1])
    net.maxpool = nn.Identity()
    net.layer4[0].conv1.stride = net.layer4[0].downsample[0].stride = (1, 1)
    # the usual rates 12, 24, 36 reach beyond the 8x8 map of a 64x64 image
    return DeepLabV3(IntermediateLayerGetter(net, {"layer4": "out"}), DeepLabHead(512, classes, (2, 4)))


def _mobilenet_v2(classes):
    """DeepLabV3 on MobileNetV2's convolutions up to features.17, output stride 16."""
    features = models.mobilenet_v2(weights=None).features[:18]
    for index in range(14, 18):  # the last stage is dilated instead of strided
        depthwise = features[index].conv[1][0]
        if index == 14:
            depthwise.stride = (1, 1)
        else:
            depthwise.dilation = depthwise.padding = (2, 2)
    backbone = IntermediateLayerGetter(features, {"17": "out"})
    return DeepLabV3(backbone, DeepLabHead(320, classes, (3, 6, 9)))


@dataclass(frozen=True)
class Kind:
    """A kind of teacher, one row of TEACHERS.

    build: classes -> a network with .backbone, x -> {"out": F^T}, and .classifier, a Sequential
    from F^T to logits whose last layer classifies.
    channels: C_T, a multiple of 64.
    imagenet: torchvision's weights of the backbone.
    """
    build: Callable
    channels: int
    imagenet: object = None

    def __post_init__(self):
        if self.channels < 64 or self.channels % 64:
            raise ValueError(f"channels={self.channels}: the heads of the attention pool have 64 "
                             "channels each, so that a teacher needs a multiple of 64")


TEACHERS = {
    "deeplabv3_resnet101": Kind(torchvision_net("deeplabv3_resnet101"), 2048, models.ResNet101_Weights.IMAGENET1K_V2),
    "deeplabv3_resnet50": Kind(torchvision_net("deeplabv3_resnet50"), 2048, models.ResNet50_Weights.IMAGENET1K_V2),
    "deeplabv3_mobilenet_v3_large": Kind(torchvision_net("deeplabv3_mobilenet_v3_large"), 960,
                                         models.MobileNet_V3_Large_Weights.IMAGENET1K_V2),
    "deeplabv3_mobilenet_v2": Kind(_mobilenet_v2, 320, models.MobileNet_V2_Weights.IMAGENET1K_V1),
    "deeplabv3_resnet10": Kind(_resnet10, 512),
}


def initialise(teacher, name, source):
    """Fill a teacher strictly.

    source: "none" (random weights), "imagenet" (torchvision's file of the backbone), "voc"
    (torchvision's finished teacher), or the path of a plain state dict in torchvision's names,
    either of a backbone or of a finished teacher. Prints what is left aside: ImageNet's
    classifier, an auxiliary head. Raises InputError for a file of another network or of another
    number of classes.
    """
    if source == "none":
        return
    if source in ("imagenet", "voc"):
        source = published(name, source)
    state = read_weights(source, "--teacher-weights")
    remedy = "give --teacher the network of the file"
    if is_backbone(state):
        # torchvision's MobileNet files call layer 0 "features.0", their backbones "0"
        state = {key.removeprefix("features."): value for key, value in state.items()}
        # MobileNetV2's last convolution lies behind F^T
        aside = ("fc.", "classifier.", "18.") if "mobilenet_v2" in name else ("fc.", "classifier.")
        left = load_strictly(teacher.backbone, state, source, f"the backbone of {name}", remedy,
                             aside)
    else:
        wanted = f"{name} with the classes of this data set"
        left = load_strictly(teacher, state, source, wanted, remedy, aside=("aux_classifier.",))
    names = ", ".join(sorted({key.split(".")[0] for key in left}))
    aside = f"; not loaded: {len(left)} tensors of {names}" if left else ""
    print(f"teacher: {source}{aside}")


def published(name, source):
    """URL of torchvision's file, for "imagenet" or "voc". Raises InputError where there is none."""
    if source == "imagenet" and TEACHERS[name].imagenet:
        return TEACHERS[name].imagenet.url
    if source == "voc" and name in models.list_models(segmentation):
        return models.get_model_weights(name)["COCO_WITH_VOC_LABELS_V1"].url
    raise InputError(f"{name} has no published {source} weights: "
                     "use --teacher-weights none or a FILE")


def is_backbone(state):
    """Whether a state dict is a backbone's alone: a finished teacher's names begin with backbone."""
    return not any(key.startswith("backbone.") for key in state)


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
        x = F.interpolate(feature, (self.grid, self.grid), mode="bilinear")
        x = x.flatten(2).transpose(1, 2)  # B,g*g,C
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.positional_embedding  # B,1+g*g,C
        split = lambda t: t.unflatten(2, (self.heads, -1)).transpose(1, 2)  # B,heads,n,64
        q, k, v = split(self.q_proj(x[:, :1])), split(self.k_proj(x)), split(self.v_proj(x))
        x = F.scaled_dot_product_attention(q, k, v)  # B,heads,1,64
        return self.c_proj(x.transpose(1, 2).flatten(1))  # B,512


def pool_grid(teacher, crop, device):
    """Positions a side of P for this frozen teacher and square crops of `crop` pixels."""
    # differs: paper not stated, release 16x16, here 16x16 and at most F^T's own positions
    return min(16, teacher(torch.zeros(1, 3, crop, crop, device=device)).feature.shape[-1])


class PoolFitter(nn.Module):
    """Stage 2: P with one learned word vector a class; forward: F^T -> logits (B,K) of "class k is in this crop".

    CLIP's pool names what a picture shows in the space of its sentences; ours does so in the space of K learned
    words, fitted by multi-label binary cross-entropy on the frozen teacher's features.
    """
    # differs: paper a pool as in DenseCLIP, release's weights missing, here fitted on the teacher, or CLIP RN101's

    def __init__(self, channels, grid, classes):
        super().__init__()
        self.pool = AttentionPool(channels, grid)
        self.words = nn.Linear(EMBEDDING, classes)  # rows: the word vectors

    def forward(self, feature):
        return self.words(self.pool(feature))


def presence(labels, classes):
    """Which classes occur: labels (B,H,W) with 255 = ignore -> float (B,K) of zeros and ones."""
    column = labels.clamp(max=classes).flatten(1)  # ignored pixels: one column more
    return torch.zeros(len(labels), classes + 1, device=labels.device).scatter_(1, column, 1)[:, :classes]


def average_precision(scores, truth):
    """Mean precision at the positives of each class, crops sorted by score: (M,K), (M,K) -> (K,), NaN without any."""
    order = scores.argsort(0, descending=True)
    hits = truth.gather(0, order)
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1, device=hits.device)[:, None]
    return (precision * hits).sum(0) / hits.sum(0).where(hits.sum(0) > 0, torch.nan)


def load_clip_pool(path, channels, grid):
    """The frozen P of a user's CLIP RN101 file, its 7x7 positions resized bilinearly to grid x grid.

    A plain state dict is read as such. The original RN101.pt is a TorchScript archive, which can run code:
    it is opened only if its sha256 is OpenAI's. Raises InputError for any other file, and unless channels = 2048.
    """
    if channels != 2048:
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
    pool = AttentionPool(channels, grid=7)
    load_strictly(pool, state, path, f"CLIP RN101, {prefix}*", "RN50's have another size")
    mean, places = pool.positional_embedding.detach().split([1, 49])
    places = F.interpolate(places.T.reshape(1, channels, 7, 7), (grid, grid), mode="bilinear")
    pool.grid, pool.positional_embedding = grid, nn.Parameter(torch.cat([mean, places.flatten(2)[0].T]))
    return pool.requires_grad_(False).eval()
