"""The student: a small hierarchical Vision Transformer for semantic segmentation.

The encoder is MiT (SegFormer, arXiv 2105.15203) or PVTv2 (arXiv 2106.13797). Their blocks are the
same, and only the ratios of their MLPs differ. A block has attention whose keys and values come
from a smaller map, and a feed-forward part with a depth-wise convolution. The parameters have the
names of the official files, so that those load strictly. The decoder is SegFormer's all-MLP head
for both families.

In the shapes below B is the batch, H and W are the image's height and width, h and w those of a
map, N = h * w counts its tokens, C channels and K classes.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from data import InputError, load_strictly, read_weights
from losses import Outputs


@dataclass(frozen=True)
class Variant:
    """One row of VARIANTS. A tuple has one entry for each of the four stages."""
    dims: tuple  # channels
    strides: tuple = (4, 2, 2, 2)  # of the patch embeddings
    depths: tuple = (2, 2, 2, 2)  # blocks
    heads: tuple = (1, 2, 5, 8)
    reductions: tuple = (8, 4, 2, 1)  # how many times smaller the key/value map is per side
    mlp_ratios: tuple = (4, 4, 4, 4)
    width: int = 256  # channels of the decoder
    drop: float = 0.1  # stochastic depth: rate of the last block, rising linearly from 0


B0, B1 = (32, 64, 160, 256), (64, 128, 320, 512)
VARIANTS = {
    "mit_b0": Variant(B0),
    "mit_b1": Variant(B1),
    "pvt_v2_b0": Variant(B0, mlp_ratios=(8, 8, 4, 4)),
    "pvt_v2_b1": Variant(B1, mlp_ratios=(8, 8, 4, 4)),
    # ours, for small pictures on a CPU, without published weights. Its stride of 8 leaves the
    # feature losses 8x8 tokens of a 64-pixel crop, where the others' stride of 32 leaves 2x2
    "mit_nano": Variant((32, 64, 128, 192), strides=(2, 2, 2, 1), depths=(1, 1, 2, 1),
                        heads=(1, 2, 4, 6), width=128, drop=0.0),
}
IMAGENET = {  # the official files. Those of MiT lie in its authors' Hugging Face repository
    "mit_b0": "https://huggingface.co/nvidia/mit-b0/resolve/main/pytorch_model.bin",
    "mit_b1": "https://huggingface.co/nvidia/mit-b1/resolve/main/pytorch_model.bin",
    "pvt_v2_b0": "https://github.com/whai362/PVT/releases/download/v2/pvt_v2_b0.pth",
    "pvt_v2_b1": "https://github.com/whai362/PVT/releases/download/v2/pvt_v2_b1.pth",
}


# ---------------------------------------------------------------- encoder

class OverlapPatchEmbed(nn.Module):
    """(B,C_in,H,W) -> tokens (B,N,C), h, w: a strided convolution whose patches overlap."""

    def __init__(self, c_in, dim, kernel, stride):
        super().__init__()
        self.proj = nn.Conv2d(c_in, dim, kernel, stride, padding=kernel // 2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x):
        x = self.proj(x)  # B,C,h,w
        h, w = x.shape[2:]
        return self.norm(to_tokens(x)), h, w


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d)) v, where d is the number of channels of a head.

    Keys and values come from a map that a convolution makes `sr` times smaller per side. The
    official name sr means spatial reduction.
    """

    def __init__(self, dim, heads, sr):
        super().__init__()
        self.heads, self.reduced = heads, sr > 1
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        if self.reduced:
            self.sr = nn.Conv2d(dim, dim, sr, sr)
            self.norm = nn.LayerNorm(dim)

    def forward(self, x, h, w):
        B, N, C = x.shape
        q = self.q(x).view(B, N, self.heads, -1).transpose(1, 2)  # B,heads,N,d
        if self.reduced:
            x = self.norm(to_tokens(self.sr(to_map(x, h, w))))  # B,N/sr^2,C
        kv = self.kv(x).view(B, -1, 2, self.heads, C // self.heads)  # B,N/sr^2,2,heads,d
        k, v = kv.permute(2, 0, 3, 1, 4)  # B,heads,N/sr^2,d each
        x = F.scaled_dot_product_attention(q, k, v)  # B,heads,N,d
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class DWConv(nn.Module):
    """A 3x3 depth-wise convolution of the token map. It gives the network its sense of position."""

    def __init__(self, dim):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x, h, w):
        return to_tokens(self.dwconv(to_map(x, h, w)))


class MixFFN(nn.Module):
    """fc2(GELU(dwconv(fc1(x)))), which is SegFormer's Eq. 3 without its outer residual."""

    def __init__(self, dim, ratio):
        super().__init__()
        self.fc1 = nn.Linear(dim, dim * ratio)
        self.dwconv = DWConv(dim * ratio)
        self.fc2 = nn.Linear(dim * ratio, dim)

    def forward(self, x, h, w):
        return self.fc2(F.gelu(self.dwconv(self.fc1(x), h, w)))


class Block(nn.Module):
    """x + attention(norm1(x)), then x + MixFFN(norm2(x)).

    Each branch is dropped with probability `drop` while the network is trained.
    """

    def __init__(self, dim, heads, sr, ratio, drop):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, sr)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MixFFN(dim, ratio)
        self.drop = drop

    def stochastic_depth(self, branch):
        if not self.training or self.drop == 0:
            return branch
        keep = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop
        return branch * keep / (1 - self.drop)

    def forward(self, x, h, w):
        x = x + self.stochastic_depth(self.attn(self.norm1(x), h, w))
        return x + self.stochastic_depth(self.mlp(self.norm2(x), h, w))


class Encoder(nn.Module):
    """(B,3,H,W) -> the normalised maps (B,C_i,h_i,w_i) of the four stages.

    The published variants have h_i = H/4, H/8, H/16 and H/32. variant: a row of VARIANTS.
    """

    def __init__(self, variant):
        super().__init__()
        v = VARIANTS[variant]
        last = sum(v.depths) - 1
        c_in, index = 3, 0  # index: of the block, through all stages
        for i, dim in enumerate(v.dims):
            blocks = nn.ModuleList()
            for _ in range(v.depths[i]):
                drop = v.drop * index / last  # from 0 up, linearly
                blocks.append(Block(dim, v.heads[i], v.reductions[i], v.mlp_ratios[i], drop))
                index += 1
            kernel = 7 if i == 0 else 3
            embed = OverlapPatchEmbed(c_in, dim, kernel, v.strides[i])
            self.add_module(f"patch_embed{i + 1}", embed)
            self.add_module(f"block{i + 1}", blocks)
            self.add_module(f"norm{i + 1}", nn.LayerNorm(dim, eps=1e-6))
            c_in = dim

    def forward(self, x):
        maps = []
        for i in (1, 2, 3, 4):
            x, h, w = getattr(self, f"patch_embed{i}")(x)
            for block in getattr(self, f"block{i}"):
                x = block(x, h, w)
            x = to_map(getattr(self, f"norm{i}")(x), h, w)  # B,C_i,h,w
            maps.append(x)
        return maps


def to_tokens(x):
    """(B,C,h,w) -> (B,N,C)."""
    return x.flatten(2).transpose(1, 2)


def to_map(x, h, w):
    """(B,N,C) -> (B,C,h,w)."""
    B, N, C = x.shape
    return x.transpose(1, 2).reshape(B, C, h, w)


# ---------------------------------------------------------------- decoder and student

class Decoder(nn.Module):
    """SegFormer's all-MLP head: maps of four stages -> logits (B,K,h_1,w_1), fused (B,D,h_1,w_1).

    D is `width`. The official head brings each stage to D channels with a 1x1 convolution, resizes
    all to the first one's size, concatenates them and fuses them with another 1x1 convolution. Such
    convolutions and bilinear interpolation commute. So here a stage's two convolutions are merged
    into one, which runs before the resizing. Same function, other parameter names.
    """
    # differs: the paper and the release put an FPN behind PVT. Here all students have this head

    def __init__(self, dims, width, classes):
        super().__init__()
        self.linears = nn.ModuleList(nn.Conv2d(dim, width, 1) for dim in dims)
        self.fuse = nn.Conv2d(4 * width, width, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout2d(0.1)
        self.classifier = nn.Conv2d(width, classes, 1)

    def forward(self, maps):
        # the official fusing weights begin with the last stage
        fuse_weights = self.fuse.weight.flatten(1).chunk(4, dim=1)[::-1]  # D,D each
        parts = []  # B,D,h_i,w_i
        for x, linear, fuse_weight in zip(maps, self.linears, fuse_weights):
            weight = fuse_weight @ linear.weight.flatten(1)  # D,C_i
            parts.append(F.conv2d(x, weight[:, :, None, None], fuse_weight @ linear.bias))
        fused = parts[0]
        for part in parts[1:]:
            fused = fused + F.interpolate(part, fused.shape[2:], mode="bilinear")
        fused = F.relu(self.norm(fused))  # B,D,h_1,w_1
        return self.classifier(self.dropout(fused)), fused


class Student(nn.Module):
    """(B,3,H,W) -> Outputs, with the student's logits, its feature and the map before_classifier.

    The logits z^S have shape (B,K,h_1,w_1), the feature F^S (B,C_S,h_4,w_4), the earlier maps F^S_i
    (B,C_i,h_i,w_i) and the map before the classifier (B,D,h_1,w_1). variant: a row of VARIANTS.
    """

    def __init__(self, variant, classes):
        super().__init__()
        v = VARIANTS[variant]
        self.dims = v.dims
        self.channels = v.dims[-1]  # C_S
        self.encoder = Encoder(variant)
        self.decoder = Decoder(v.dims, v.width, classes)
        self.apply(initialise_layer)

    def forward(self, x):
        maps = self.encoder(x)
        logits, fused = self.decoder(maps)
        return Outputs(logits, maps[-1], fused, earlier=tuple(maps[:-1]))


class StudentWithHeads(nn.Module):
    """What is trained: the student and the heads that the losses need and nobody deploys.

    (B,3,H,W) -> the student's Outputs, with these fields filled where a head was built.
    projected: A_v(F^S) (B,C_T,h_4,w_4). A_v is a 1x1 convolution.
    embedding: e^S = A_l(F^S) (B,512). A_l is a mean over positions, then a 1x1 convolution.
    earlier: A_v,i(F^S_i), the maps of the stages before F^S, each by a 1x1 convolution of its own.

    c_teacher: C_T, None without a teacher. seed: draws the heads. needs: see losses.Method.
    earlier: channels of the teacher's maps before F^T. The last one meets stage 3, the one before
    it stage 2. With (), F^S alone has a partner. ValueError for more than three.
    """

    def __init__(self, student, c_teacher=None, seed=0, needs=("A_v", "A_l"), earlier=()):
        super().__init__()
        self.student, self.heads = student, nn.ModuleDict()
        # a random state of its own: dropout stays the same with and without heads
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if c_teacher is not None:
                self.build_heads(c_teacher, needs, earlier)
            for build in filter(callable, needs):
                self.heads["own"] = build(student, c_teacher)

    def build_heads(self, c_teacher, needs, earlier):
        A_v = nn.Conv2d(self.student.channels, c_teacher, 1, bias=False)
        # differs: the paper states no A_l. The release has P itself in one file, and a mean and a
        # 1x1 convolution in another. Here it is the latter, and it is trained
        A_l = nn.Conv2d(self.student.channels, 512, 1, bias=False)
        # both are drawn even if only one is needed: A_v then starts equal in all methods
        heads = nn.ModuleDict({"A_v": A_v, "A_l": A_l}).apply(initialise_layer)
        dims = self.student.dims[-1 - len(earlier):-1]
        pairs = zip(dims, earlier, strict=True)
        # as PyTorch initialises: with MiT's way a hint learned little in hundreds of steps
        heads["earlier"] = nn.ModuleList(nn.Conv2d(c_S, c_T, 1, bias=False) for c_S, c_T in pairs)
        self.heads.update({name: head for name, head in heads.items() if name in needs})

    def forward(self, x):
        S, heads = self.student(x), self.heads
        filled = {"earlier": ()}
        if "A_v" in heads:
            filled["projected"] = heads["A_v"](S.feature)
        if "A_l" in heads:
            mean = S.feature.mean((2, 3), keepdim=True)  # B,C_S,1,1
            filled["embedding"] = heads["A_l"](mean).flatten(1)
        if "earlier" in heads:
            maps = S.earlier[len(S.earlier) - len(heads["earlier"]):]
            filled["earlier"] = tuple(A_v_i(x_i) for A_v_i, x_i in zip(heads["earlier"], maps))
        if "own" in heads:
            filled["own"] = heads["own"](S)
        return S._replace(**filled)


def initialise_layer(layer):
    """The official initialisation of MiT and PVTv2."""
    if isinstance(layer, nn.Linear):
        nn.init.trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
    elif isinstance(layer, nn.Conv2d):
        height, width = layer.kernel_size
        fan_out = height * width * layer.out_channels // layer.groups
        nn.init.normal_(layer.weight, 0, math.sqrt(2 / fan_out))
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def count_parameters(module):
    """Number of parameters. Buffers are not counted."""
    return sum(p.numel() for p in module.parameters())


# ---------------------------------------------------------------- weights of the encoder

def load_encoder(encoder, variant, source):
    """Load ImageNet weights strictly into `encoder`.

    source: "none" keeps the random start, and "imagenet" downloads the official file of `variant`.
    Anything else is the path of a plain state dict, with the names of the official PVTv2 and MiT
    files or with those of Hugging Face's `nvidia/mit-b*`.
    Returns the names in the file that were left aside, which are those of the ImageNet classifier.
    Raises InputError for a file that does not fit.
    """
    if source == "none":
        return []
    path = source
    if source == "imagenet":
        if variant not in IMAGENET:
            raise InputError(f"{variant} has no published ImageNet weights: use --student-weights "
                             "none or a FILE")
        path = IMAGENET[variant]
    state = official_names(read_weights(path, "--student-weights"))
    return load_strictly(encoder, state, source, f"the encoder of {variant}",
                         "give --student the network of the file", aside=("head.", "classifier."))


HUGGING_FACE = "segformer.encoder."
RENAMES = {  # parts of Hugging Face's names -> of the official ones, in this order
    "patch_embeddings": "patch_embed",
    ".layer_norm.": ".norm.",
    "layer_norm_": "norm",
    "attention.self.": "attn.",
    "attention.output.dense": "attn.proj",
    "mlp.dense": "mlp.fc",
    "query": "q",
}


def official_names(state):
    """A state dict of MiT with Hugging Face's or official names -> with the official ones."""
    renamed = {official_name(name): tensor for name, tensor in state.items()}
    # the official kv has the rows of the key, then those of the value
    for key in [name for name in renamed if ".key." in name]:
        value = key.replace(".key.", ".value.")
        if value in renamed:
            rows = torch.cat([renamed.pop(key), renamed.pop(value)])
            renamed[key.replace(".key.", ".kv.")] = rows
    return renamed


def official_name(name):
    if not name.startswith(HUGGING_FACE):
        return name
    part, _, rest = name.removeprefix(HUGGING_FACE).partition(".")
    stage, _, rest = rest.partition(".")
    if not stage.isdecimal():
        return name  # unknown name: kept, so that load_strictly refuses the file
    if part == "layer_norm":
        part = "norm"
    official = f"{part}{int(stage) + 1}.{rest}"  # stages count from 0 there, from 1 here
    for old, new in RENAMES.items():
        official = official.replace(old, new)
    return official
