"""The teacher: a DeepLabV3 of torchvision, the feature F^T of its backbone, the attention pool P.

The teacher is trained on the data set in stage 1. P is fitted on the frozen teacher in stage 2, or
read from a CLIP file. Both are frozen while the student learns in stage 3.

In the shapes below B is the batch, H and W are the image's height and width, h and w those of F^T,
C_T its channels and K classes.
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
EMBEDDING = 512  # coordinates of e^T and e^S, as CLIP RN101 has them
HEAD_CHANNELS = 64  # of each head of the attention pool, as in CLIP


# ---------------------------------------------------------------- the kinds of teacher

@dataclass(frozen=True)
class Kind:
    """One row of TEACHERS. Raises ValueError for channels that nothing here can use.

    build: a function from the number of classes to a network with two parts. Its `backbone` turns
    an image into a dict of maps, with F^T as "out". Its `classifier` is a Sequential from F^T to
    the logits, whose last layer classifies.
    channels: C_T, a multiple of 64.
    imagenet: torchvision's ImageNet weights of the backbone, None where there are none.
    ignore_prefixes: of the names of tensors in that file that the backbone lacks.
    earlier: channels of the dict's other maps, which are those of earlier depths, from the first to
    the last. At most three, because a student has three stages before F^S, else ValueError. With
    (), other maps are not used, and the methods of several depths compare F^T alone.
    """
    build: Callable
    channels: int
    imagenet: object = None
    ignore_prefixes: tuple = ("fc.", "classifier.")
    earlier: tuple = ()

    def __post_init__(self):
        if self.channels < HEAD_CHANNELS or self.channels % HEAD_CHANNELS:
            raise ValueError(f"channels={self.channels}: the heads of the attention pool have "
                             f"{HEAD_CHANNELS} channels each, so that a teacher needs a multiple "
                             f"of {HEAD_CHANNELS}")
        if len(self.earlier) > 3:
            raise ValueError(f"earlier={self.earlier}: a student has three stages before its last")


def torchvision_net(name, *earlier):
    """A builder of torchvision's segmentation network `name`, with random weights.

    earlier: names of the backbone's layers that give the maps of earlier depths.
    """
    def build(classes):
        net = segmentation.__dict__[name](weights=None, weights_backbone=None,
                                          num_classes=classes)
        net.backbone.return_layers |= {layer: layer for layer in earlier}
        return net
    return build


def _mobilenet_v2(classes):
    """DeepLabV3 on MobileNetV2. F^T is the output of features.17, at stride 16.

    That is the last linear bottleneck, with 320 channels and no activation behind it.
    """
    # stopping before features.18, which has 1,280 channels, gives 40.5 instead of 40.9 mIoU on
    # CamVid, but takes 0.47 s instead of 0.69 s per step. That was at base 160 and crop 128,
    # for 1,000 steps and on 60 held-out frames
    features = models.mobilenet_v2(weights=None).features[:18]
    for index in range(14, 18):  # the last stage is dilated instead of strided
        depthwise = features[index].conv[1][0]
        if index == 14:
            depthwise.stride = (1, 1)
        else:
            depthwise.dilation = depthwise.padding = (2, 2)
    backbone = IntermediateLayerGetter(features, {"3": "3", "6": "6", "13": "13", "17": "out"})
    return DeepLabV3(backbone, DeepLabHead(320, classes, (3, 6, 9)))


def _resnet10(classes):
    """DeepLabV3 on a ResNet with one block per stage, without max-pooling, at stride 8.

    It is ours, for small images on a CPU.
    """
    net = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1])
    net.maxpool = nn.Identity()
    net.layer4[0].conv1.stride = net.layer4[0].downsample[0].stride = (1, 1)
    layers = {"layer1": "layer1", "layer2": "layer2", "layer3": "layer3", "layer4": "out"}
    backbone = IntermediateLayerGetter(net, layers)
    # the usual rates 12, 24 and 36 reach beyond the 8x8 map of a 64x64 image
    return DeepLabV3(backbone, DeepLabHead(512, classes, (2, 4)))


TEACHERS = {
    "deeplabv3_resnet101": Kind(
        torchvision_net("deeplabv3_resnet101", "layer1", "layer2", "layer3"), channels=2048,
        imagenet=models.ResNet101_Weights.IMAGENET1K_V2, earlier=(256, 512, 1024)),
    "deeplabv3_resnet50": Kind(
        torchvision_net("deeplabv3_resnet50", "layer1", "layer2", "layer3"), channels=2048,
        imagenet=models.ResNet50_Weights.IMAGENET1K_V2, earlier=(256, 512, 1024)),
    "deeplabv3_mobilenet_v3_large": Kind(
        torchvision_net("deeplabv3_mobilenet_v3_large", "3", "6", "12"), channels=960,
        imagenet=models.MobileNet_V3_Large_Weights.IMAGENET1K_V2, earlier=(24, 40, 112)),
    "deeplabv3_mobilenet_v2": Kind(
        _mobilenet_v2, channels=320,
        imagenet=models.MobileNet_V2_Weights.IMAGENET1K_V1,
        ignore_prefixes=("18.", "classifier."),  # 18 is the convolution after F^T
        earlier=(24, 32, 96)),
    "deeplabv3_resnet10": Kind(_resnet10, channels=512, earlier=(64, 128, 256)),
}


# ---------------------------------------------------------------- the teacher

class Teacher(nn.Module):
    """(B,3,H,W) -> Outputs, with the teacher's logits, its maps and the map before_classifier.

    The logits z^T have shape (B,K,h,w), the feature F^T (B,C_T,h,w), the earlier maps F^T_i
    (B,C_T,i,h_i,w_i) and the map before the classifier (B,D,h,w). On a ResNet h and w are H/8 and
    W/8, on a MobileNet H/16 and W/16.
    name: a row of TEACHERS. ValueError for earlier maps that are not those of its row.
    """
    # differs: the paper and the release have DeepLabV3+ of stride 16. Here it is torchvision's
    # DeepLabV3, which lacks the low-level branch

    def __init__(self, name, classes):
        super().__init__()
        kind = TEACHERS[name]
        net = kind.build(classes)
        self.backbone, self.classifier = net.backbone, net.classifier
        self.channels, self.earlier = kind.channels, kind.earlier  # C_T, C_T,i
        if "mobilenet" in name:
            # torchvision's momentum of 0.01 makes the running statistics lag for hundreds of steps
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = 0.1

    def forward(self, x):
        # differs: the paper takes the last encoder feature. The release takes this in one file and
        # the ASPP's map in another. Here it is the paper's, which is layer4 of a ResNet
        maps = self.backbone(x)
        feature = before_classifier = maps.pop("out")  # B,C_T,h,w
        *head, classify = self.classifier
        for layer in head:
            before_classifier = layer(before_classifier)
        earlier = tuple(maps.values()) if self.earlier else ()  # B,C_T,i,h_i,w_i
        if tuple(x.shape[1] for x in earlier) != tuple(self.earlier):
            raise ValueError(f"earlier={self.earlier}: the backbone's other maps have "
                             f"{[x.shape[1] for x in earlier]} channels")
        return Outputs(classify(before_classifier), feature, before_classifier, earlier=earlier)

    def freeze(self):
        """Fix it for distillation. eval() makes BatchNorm use its running statistics."""
        self.zero_grad()  # frees the memory of the gradients it was trained with
        return self.requires_grad_(False).eval()


def initialise(teacher, name, source):
    """Fill a teacher strictly.

    source: "none" keeps the random weights, "imagenet" takes torchvision's file of the backbone and
    "voc" torchvision's finished teacher. Anything else is the path of a plain state dict with
    torchvision's names, of a backbone alone or of a finished teacher.

    Prints what is left aside, such as ImageNet's classifier. Raises InputError for a file of
    another network or of another number of classes.
    """
    if source == "none":
        return
    if source in ("imagenet", "voc"):
        source = published(name, source)
    state = read_weights(source, "--teacher-weights")
    remedy = "give --teacher the network of the file"
    if is_backbone(state):
        # torchvision's MobileNet files call layer 0 "features.0", their backbones "0"
        if "features" not in dict(teacher.backbone.named_children()):
            state = {key.removeprefix("features."): value for key, value in state.items()}
        left = load_strictly(teacher.backbone, state, source, f"the backbone of {name}", remedy,
                             aside=TEACHERS[name].ignore_prefixes)
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
    """Whether a state dict is a backbone's alone, without the "backbone." of a finished teacher."""
    return not any(str(key).startswith("backbone.") for key in state)


# ---------------------------------------------------------------- the attention pool

class AttentionPool(nn.Module):
    """P: F^T (B,C_T,h,w) -> e^T (B,512), one attention step whose only query is the mean.

    The tokens are the mean of all positions and the positions themselves, plus a learned
    positional embedding. There are C_T/64 heads and a projection to 512 coordinates. F^T is first
    resized bilinearly to `grid` x `grid` positions. Structure and names of the parameters are those
    of CLIP's `AttentionPool2d`, as DenseCLIP uses it.
    """
    # differs: the release has 32 heads, of 64 channels each with a ResNet. Here all have 64

    def __init__(self, channels, grid, embedding=EMBEDDING):
        super().__init__()
        self.grid, self.heads = grid, channels // HEAD_CHANNELS
        tokens = 1 + grid * grid
        positions = torch.randn(tokens, channels) / channels ** 0.5
        self.positional_embedding = nn.Parameter(positions)
        self.q_proj = nn.Linear(channels, channels)
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.c_proj = nn.Linear(channels, embedding)

    def forward(self, feature):
        x = F.interpolate(feature, (self.grid, self.grid), mode="bilinear")
        x = x.flatten(2).transpose(1, 2)  # B,g*g,C_T
        mean = x.mean(1, keepdim=True)  # B,1,C_T
        x = torch.cat([mean, x], 1) + self.positional_embedding  # B,1+g*g,C_T
        q = self.split(self.q_proj(x[:, :1]))
        k, v = self.split(self.k_proj(x)), self.split(self.v_proj(x))
        x = F.scaled_dot_product_attention(q, k, v)  # B,heads,1,64
        return self.c_proj(x.transpose(1, 2).flatten(1))  # B,512

    def split(self, x):
        """(B,n,C_T) -> (B,heads,n,64)."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


def pool_grid(teacher, crop, device):
    """Side of P's grid for this frozen teacher and square crops of `crop` pixels."""
    # differs: the paper states no grid, the release has 16x16. Here it is 16x16, at most F^T's
    image = torch.zeros(1, 3, crop, crop, device=device)
    return min(16, teacher(image).feature.shape[-1])


class PoolFitter(nn.Module):
    """Stage 2: F^T (B,C_T,h,w) -> logits (B,K) of "class k is in this crop".

    CLIP's pool names what a picture shows in the space of its sentences. Ours does so in the space
    of K learned word vectors, one per class. It is fitted by multi-label binary cross-entropy on
    the frozen teacher's features.
    """
    # differs: the paper has a pool as in DenseCLIP, and the release lacks its weights. Here it is
    # fitted on the teacher or read from CLIP RN101

    def __init__(self, channels, grid, classes):
        super().__init__()
        self.pool = AttentionPool(channels, grid)
        self.words = nn.Linear(EMBEDDING, classes)  # a row is a word vector

    def forward(self, feature):
        return self.words(self.pool(feature))


def presence(labels, classes):
    """Which classes occur in labels (B,H,W), where 255 is ignored -> float (B,K) of 0 and 1."""
    column = labels.clamp(max=classes).flatten(1)  # ignored pixels go into an extra column
    present = torch.zeros(len(labels), classes + 1, device=labels.device)
    return present.scatter_(1, column, 1)[:, :classes]


# ---------------------------------------------------------------- CLIP's pool

def load_clip_pool(path, channels, grid):
    """The frozen P of a user's CLIP RN101 file, its 7x7 positions resized to `grid` x `grid`.

    Raises InputError for any other file, and unless `channels` is 2048.
    """
    if channels != 2048:
        raise InputError("--clip needs a ResNet teacher: CLIP RN101's pool reads 2048 channels")
    prefix = "visual.attnpool."
    state = {name.removeprefix(prefix): tensor.float()
             for name, tensor in read_clip(path).items() if str(name).startswith(prefix)}
    pool = AttentionPool(channels, grid=7)
    load_strictly(pool, state, path, f"CLIP RN101, {prefix}*",
                   "give RN101's file: RN50's tensors have other sizes")
    mean, places = pool.positional_embedding.detach().split([1, 49])
    places = places.T.reshape(1, channels, 7, 7)
    places = F.interpolate(places, (grid, grid), mode="bilinear").flatten(2)[0].T  # g*g,C_T
    pool.grid, pool.positional_embedding = grid, nn.Parameter(torch.cat([mean, places]))
    return pool.requires_grad_(False).eval()


def read_clip(path):
    """The state dict in a CLIP file, empty where the file holds something else.

    A plain state dict is read as such. The original RN101.pt is a TorchScript archive, which can
    run code, and is therefore opened only if its sha256 is OpenAI's.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give --clip the path of CLIP's RN101.pt") from None
    except Exception:
        with open(path, "rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest()
        if digest != CLIP_RN101_SHA256:
            raise InputError(f"{path}: neither a plain state dict nor OpenAI's RN101.pt (sha256 "
                             f"{digest[:12]}...); save its visual.attnpool.* tensors with "
                             "torch.save as a dict") from None
        state = torch.jit.load(path, map_location="cpu").state_dict()
    return state if isinstance(state, dict) else {}
