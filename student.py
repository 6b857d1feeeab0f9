"""The student: a small hierarchical Vision Transformer for semantic segmentation.

Encoder: MiT (SegFormer, arXiv 2105.15203) or PVTv2 (arXiv 2106.13797). Their blocks are the same
(overlapping patch embedding, attention with spatially reduced keys and values, Mix-FFN with a
depth-wise convolution); only the MLP ratios differ. Parameters carry the names of the official files,
so that those load strictly. Decoder: SegFormer's all-MLP head, for both families.

    B batch, H W image height and width, N = h * w tokens of a stage, C channels, K classes
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
    """One row of VARIANTS. Tuples have one entry a stage."""
    dims: tuple  # channels
    strides: tuple = (4, 2, 2, 2)  # of the patch embeddings
    depths: tuple = (2, 2, 2, 2)  # blocks
    heads: tuple = (1, 2, 5, 8)
    reductions: tuple = (8, 4, 2, 1)  # of keys and values, a side
    mlp_ratios: tuple = (4, 4, 4, 4)
    width: int = 256  # of the decoder
    drop: float = 0.1  # stochastic depth of the last block


B0, B1 = (32, 64, 160, 256), (64, 128, 320, 512)
VARIANTS = {
    "mit_b0": Variant(B0),
    "mit_b1": Variant(B1),
    "pvt_v2_b0": Variant(B0, mlp_ratios=(8, 8, 4, 4)),
    "pvt_v2_b1": Variant(B1, mlp_ratios=(8, 8, 4, 4)),
    # ours, for small pictures on a CPU, without published weights. Its stride of 8 leaves 8x8 tokens
    # of a 64-pixel crop to the feature losses, where the stride of 32 of the others leaves 2x2
    "mit_nano": Variant((32, 64, 128, 192), strides=(2, 2, 2, 1), depths=(1, 1, 2, 1),
                        heads=(1, 2, 4, 6), width=128, drop=0.0),
}
IMAGENET = {  # the official files; MiT's lives in its authors' Hugging Face repository
    "mit_b0": "https://huggingface.co/nvidia/mit-b0/resolve/main/pytorch_model.bin",
    "mit_b1": "https://huggingface.co/nvidia/mit-b1/resolve/main/pytorch_model.bin",
    "pvt_v2_b0": "https://github.com/whai362/PVT/releases/download/v2/pvt_v2_b0.pth",
    "pvt_v2_b1": "https://github.com/whai362/PVT/releases/download/v2/pvt_v2_b1.pth",
}


class OverlapPatchEmbed(nn.Module):
    """Strided convolution whose patches overlap, then LayerNorm: (B,C_in,H,W) -> tokens (B,N,C), h, w."""

    def __init__(self, c_in, dim, kernel, stride):
        super().__init__()
        self.proj = nn.Conv2d(c_in, dim, kernel, stride, padding=kernel // 2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x):
        x = self.proj(x)  # B,C,h,w
        h, w = x.shape[2:]
        return self.norm(x.flatten(2).transpose(1, 2)), h, w  # B,N,C


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d)) v, where keys and values come from a map reduced `sr` times a side (PVT)."""

    def __init__(self, dim, heads, sr):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        if sr > 1:
            self.sr = nn.Conv2d(dim, dim, sr, sr)
            self.norm = nn.LayerNorm(dim)

    def forward(self, x, h, w):
        B, N, C = x.shape
        q = self.q(x).view(B, N, self.heads, -1).transpose(1, 2)  # B,heads,N,d
        if hasattr(self, "sr"):
            x = self.sr(x.transpose(1, 2).reshape(B, C, h, w))  # B,C,h/sr,w/sr
            x = self.norm(x.flatten(2).transpose(1, 2))  # B,N/sr^2,C
        k, v = self.kv(x).view(B, -1, 2, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)  # B,heads,N,d
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class DWConv(nn.Module):
    """3x3 depth-wise convolution over the token map: it gives the network its sense of position."""

    def __init__(self, dim):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x, h, w):
        B, N, C = x.shape
        return self.dwconv(x.transpose(1, 2).reshape(B, C, h, w)).flatten(2).transpose(1, 2)


class MixFFN(nn.Module):
    """fc2(GELU(dwconv(fc1(x)))) (SegFormer, Eq. 3, without its outer residual)."""

    def __init__(self, dim, ratio):
        super().__init__()
        self.fc1 = nn.Linear(dim, dim * ratio)
        self.dwconv = DWConv(dim * ratio)
        self.fc2 = nn.Linear(dim * ratio, dim)

    def forward(self, x, h, w):
        return self.fc2(F.gelu(self.dwconv(self.fc1(x), h, w)))


class Block(nn.Module):
    """x + attention(norm1(x)), then x + MixFFN(norm2(x)), each branch dropped with probability `drop`."""

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
    """(B,3,H,W) -> maps of four stages (B,C_i,h_i,w_i), post-norm; published variants: h_i = H/4, H/8, H/16, H/32."""

    def __init__(self, variant):
        super().__init__()
        v, blocks = VARIANTS[variant], sum(VARIANTS[variant].depths)
        drops = (v.drop * i / (blocks - 1) for i in range(blocks))  # from 0 up, linearly
        c_in = 3
        for i, dim in enumerate(v.dims):
            stage = [Block(dim, v.heads[i], v.reductions[i], v.mlp_ratios[i], next(drops))
                     for _ in range(v.depths[i])]
            kernel = 7 if i == 0 else 3
            self.add_module(f"patch_embed{i + 1}",
                            OverlapPatchEmbed(c_in, dim, kernel, v.strides[i]))
            self.add_module(f"block{i + 1}", nn.ModuleList(stage))
            self.add_module(f"norm{i + 1}", nn.LayerNorm(dim, eps=1e-6))
            c_in = dim

    def forward(self, x):
        maps = []
        for i in (1, 2, 3, 4):
            x, h, w = getattr(self, f"patch_embed{i}")(x)
            for block in getattr(self, f"block{i}"):
                x = block(x, h, w)
            x = getattr(self, f"norm{i}")(x)
            x = x.transpose(1, 2).reshape(x.shape[0], -1, h, w)  # B,C_i,h,w; len(x) would fix B in an export
            maps.append(x)
        return maps


class Decoder(nn.Module):
    """SegFormer's all-MLP head: each stage to `width` channels, fused at the first stage's size.

    The official head interpolates all stages, concatenates them and fuses with a 1x1 convolution.
    Such a convolution and bilinear interpolation commute, so here each stage meets its block of the
    fusing weights at its own size: the same function and state dict, for 0.6 of the arithmetic.
    """
    # differs: paper and release put an FPN behind PVT, here all students have this head

    def __init__(self, dims, width, classes):
        super().__init__()
        self.linears = nn.ModuleList(nn.Conv2d(c, width, 1) for c in dims)
        self.fuse = nn.Conv2d(4 * width, width, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout2d(0.1)
        self.classifier = nn.Conv2d(width, classes, 1)

    def forward(self, maps):
        blocks = self.fuse.weight.chunk(4, dim=1)[::-1]  # the official order: last stage first
        parts = [F.conv2d(linear(x), block)
                 for x, linear, block in zip(maps, self.linears, blocks)]  # B,width,h_i,w_i
        fused = parts[0]
        for part in parts[1:]:
            fused = fused + F.interpolate(part, fused.shape[2:], mode="bilinear")
        fused = F.relu(self.norm(fused))  # B,width,h_1,w_1
        return self.classifier(self.dropout(fused)), fused


class Student(nn.Module):
    """(B,3,H,W) -> Outputs: logits z^S (B,K,h_1,w_1), feature F^S (B,C_S,h_4,w_4), before_classifier (B,D,h_1,w_1)."""

    def __init__(self, variant, classes):
        super().__init__()
        dims = VARIANTS[variant].dims
        self.channels = dims[-1]  # C_S
        self.encoder = Encoder(variant)
        self.decoder = Decoder(dims, VARIANTS[variant].width, classes)
        self.apply(_init)

    def forward(self, x):
        maps = self.encoder(x)
        logits, fused = self.decoder(maps)
        return Outputs(logits, maps[-1], fused)


class StudentWithHeads(nn.Module):
    """What is trained: (B,3,H,W) -> the student's Outputs, and in them what the losses alone need.

    projected: A_v(F^S) (B,C_T,h_4,w_4), a 1x1 convolution without bias; embedding: e^S = A_l(F^S) (B,512), the mean
    over positions, then a 1x1 convolution. needs: the words A_v, A_l, whichever the method reads. Neither is deployed.
    """

    def __init__(self, student, c_teacher=None, seed=0, needs=("A_v", "A_l")):
        super().__init__()
        self.student, self.heads = student, nn.ModuleDict()
        if c_teacher is None:
            return
        with torch.random.fork_rng(devices=[]):  # apart, so that all methods' students start from the same weights
            torch.manual_seed(seed)
            # differs: paper not stated, release P itself in one file and GAP + 1x1 in another, here GAP + 1x1, trained
            heads = nn.ModuleDict({"A_v": nn.Conv2d(student.channels, c_teacher, 1, bias=False),
                                   "A_l": nn.Conv2d(student.channels, 512, 1, bias=False)}).apply(_init)
        # both are drawn even where one is needed: A_v then starts alike in all methods
        self.heads.update({name: head for name, head in heads.items() if name in needs})

    def forward(self, x):
        S = self.student(x)
        if "A_v" in self.heads:
            S = S._replace(projected=self.heads["A_v"](S.feature))
        if "A_l" in self.heads:
            S = S._replace(embedding=self.heads["A_l"](S.feature.mean((2, 3), keepdim=True)).flatten(1))
        return S


def _init(m):
    """The official MiT / PVTv2 initialisation."""
    if isinstance(m, nn.Linear):
        nn.init.trunc_normal_(m.weight, std=0.02)
        nn.init.zeros_(m.bias)
    elif isinstance(m, nn.Conv2d):
        fan_out = m.kernel_size[0] * m.kernel_size[1] * m.out_channels // m.groups
        nn.init.normal_(m.weight, 0, math.sqrt(2 / fan_out))
        if m.bias is not None:
            nn.init.zeros_(m.bias)


def load_encoder(encoder, variant, source):
    """Load ImageNet weights strictly into `encoder`.

    source: "imagenet" (downloads the official file of `variant`), "none" (keeps the random start), or the
    path of a plain state dict in the official PVTv2 / MiT naming or in Hugging Face's `nvidia/mit-b*`
    naming. Returns the names in the file that were left aside (the ImageNet classifier).
    Raises InputError for a file that does not fit.
    """
    if source == "none":
        return []
    if source == "imagenet" and variant not in IMAGENET:
        raise InputError(f"{variant} has no published ImageNet weights: use --student-weights none or a FILE")
    state = _official_names(read_weights(IMAGENET[variant] if source == "imagenet" else source, "--student-weights"))
    return load_strictly(encoder, state, source, f"the encoder of {variant}", "give --student the network of the file",
                         aside=("head.", "classifier."))


def _official_names(state):
    """Rename Hugging Face's MiT keys to the official ones; official keys pass unchanged."""
    renames = (("patch_embeddings", "patch_embed"), (".layer_norm.", ".norm."), ("layer_norm_", "norm"),
               ("attention.self.", "attn."), ("attention.output.dense", "attn.proj"),
               ("mlp.dense", "mlp.fc"), ("query", "q"))
    out = {}
    for key, value in state.items():
        if not key.startswith("segformer.encoder."):
            out[key] = value
            continue
        part, stage, *rest = key.removeprefix("segformer.encoder.").split(".")
        new = f"{part}{int(stage) + 1}." + ".".join(rest)  # stages count from 0 there, from 1 here
        new = new.replace("layer_norm", "norm", 1) if part == "layer_norm" else new
        for old, official in renames:
            new = new.replace(old, official)
        out[new] = value
    # kv = rows of key, then rows of value
    for key in [k for k in out if ".key." in k and k.replace(".key.", ".value.") in out]:
        out[key.replace(".key.", ".kv.")] = torch.cat([out.pop(key), out.pop(key.replace(".key.", ".value."))])
    return out


def count_parameters(module):
    """Number of parameters (buffers not counted)."""
    return sum(p.numel() for p in module.parameters())
