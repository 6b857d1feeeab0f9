"""The C2VKD objective (arXiv 2310.07265) by its equations, then the methods it is compared with.

Tensors in, unweighted scalars out. `total_loss` weights them. The caller keeps gradients away from
the teacher's tensors.

    paper     here              meaning                                                  shape
    --------  ----------------  -------------------------------------------------------  ----------
    y         labels            label map, 255 = ignore                                  B,H,W
    z^S, z^T  S.logits, ...     logits of student and teacher                            B,K,h,w
    F^S, F^T  S.feature, ...    last map of the backbone                                 B,C,h,w
    A_v(F^S)  S.projected       F^S in C_T channels, by a 1x1 convolution                B,C_T,h,w
    e^S       S.embedding       A_l(F^S): mean over positions, 1x1 convolution           B,512
    e^T       T.embedding       P(F^T): attention pool                                   B,512
    V^S, V^T  V_S, V_T          A_v(F^S) and F^T, resized bilinearly to one grid         B,C_T,h,w
    N         N                 patches: the positions of V in all images of the batch   B h w
    M         M_S, M_T          affinity of all patches of the batch                     N,N
    p_t, p_nt log_p_t, ...      probability of the label's class, of all others          B,H,W
    m         m_S, m_T          margin: the logit of p_t, so p_t = sigmoid(m)            B,H,W
    q         log_q_t, ...      the teacher's (p_t, p_nt) mixed with the label's (1, 0)  B,H,W

S and T are the two networks' Outputs. K counts classes, C channels. H,W is the size of the labels
and h,w the tensor's own grid. On the matrices X, Y, Z and D the ^T means transposed. Everywhere
else it means teacher.

Each KL of C2VKD sums over one distribution: the channels in Eq. 4, the coordinates in Eq. 3, the
pair in Eq. 9. It is then averaged over images and places, in Eq. 9 over labelled pixels. `kl` is
the direction: "forward" is KL(teacher || student), "reverse" is KL(student || teacher). Everything
is computed in at least float32, but train.py lets a GPU round what enters matrix products to TF32.
Comments that begin with "differs" or "unstated" mark where this file departs from the paper or from
the authors' released code, and where the paper is silent.
"""
import inspect
import itertools
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as distributed
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute

IGNORE = 255  # as in data.py. This file imports no other of ours


class Outputs(NamedTuple):
    """What a network hands to the losses, by the table above. None if no loss needs it."""
    logits: torch.Tensor  # z
    feature: torch.Tensor  # F
    before_classifier: torch.Tensor  # B,C,h,w: what the last 1x1 convolution turns into logits
    projected: torch.Tensor | None = None  # A_v(F^S)
    embedding: torch.Tensor | None = None  # e
    earlier: tuple = ()  # maps of the stages before F. The student's in the teacher's channels


# ---------------------------------------------------------------- Eq. 10

def total_loss(terms, weights):
    """Eq. 10: L = L_PDD + l_gb L_gb + l_pc L_pc + l_lc L_lc. Every other method is summed alike."""
    return sum(weights[name] * term for name, term in terms.items())


def c2vkd(S, T, labels, kl="forward", everywhere=False):
    """The four losses of Eq. 10, unweighted. No separate cross-entropy: PDD contains the label."""
    V_S, V_T = visual_maps(S, T)  # B,C_T,h,w
    return {"pdd": pdd_loss(S.logits, T.logits, labels, kl, everywhere),  # Eq. 8-9
            "gb": global_visual_loss(V_S, V_T, kl),  # Eq. 4
            "pc": patch_loss(V_S, V_T),  # Eq. 5-7
            "lc": linguistic_loss(S.embedding, T.embedding, kl)}  # Eq. 3


def divergence(log_S, log_T, dim, kl):
    """KL(teacher || student) for "forward", KL(student || teacher) for "reverse", over `dim`."""
    # differs: the paper writes KL(student || teacher). The release's F.kl_div(student, teacher)
    # computes KL(teacher || student), which is the default here
    log_a, log_b = {"forward": (log_T, log_S), "reverse": (log_S, log_T)}[kl]  # KL(a || b)
    return (log_a.exp() * (log_a - log_b)).sum(dim)


# ---------------------------------------------------------------- VLFD, Eq. 3-7

def visual_maps(S, T):
    """V^S, V^T (B,C_T,h,w): A_v(F^S) and F^T on one grid."""
    # differs: the paper states no grid, the release uses 32x32. Here it is twice F^S's grid, but at
    # most F^T's. At crop 512 with a teacher of stride 8 or 16 that is 32x32 for published students
    return on_visual_grid(S.projected, T.feature)


def on_visual_grid(map_S, map_T):
    grid = [min(2 * s, t) for s, t in zip(map_S.shape[2:], map_T.shape[2:])]
    return resize(map_S, grid), resize(map_T, grid)


def visual_pairs(S, T):
    """Ours: [(V^S, V^T), ...], a pair for each depth of the teacher, from the first to the last.

    V^S comes from the student's map of that stage, by an A_v of its own. Each channel of V^T has
    mean 0 and variance 1 over the batch and its places, so that all depths have one scale.
    """
    maps_S, maps_T = (*S.earlier, S.projected), (*T.earlier, T.feature)
    standardised = [F.batch_norm(at_least_float32(x), None, None, training=True) for x in maps_T]
    return [on_visual_grid(x_S, x_T) for x_S, x_T in zip(maps_S, standardised, strict=True)]


def linguistic_loss(e_S, e_T, kl="forward"):
    """Eq. 3: L_lc = 1/B sum_b KL between softmax(e^S_b) and softmax(e^T_b), see `divergence`.

    e_S, e_T: (B,512). The softmax and the sum in the KL run over the 512 coordinates.
    """
    # differs: the paper states no reduction. The release averages over the coordinates too, which
    # makes the term 512 times smaller. Here it is a true KL
    return divergence(log_softmax(e_S), log_softmax(e_T), dim=1, kl=kl).mean()


def global_visual_loss(V_S, V_T, kl="forward"):
    """Eq. 4: L_gb = 1/(B h w) sum_p KL of softmax(V^S_p) and softmax(V^T_p), see `divergence`.

    V_S, V_T: (B,C,h,w). p runs over positions, the softmax and the sum in the KL over channels.
    Positions without labels take part, as in Eq. 5-7.
    """
    # differs: the paper states no reduction. The release averages over the channels too, which
    # makes the term C times smaller. Here it is a true KL
    return divergence(log_softmax(V_S), log_softmax(V_T), dim=1, kl=kl).mean()


def patch_rows(V):
    """Eq. 5: V (B,C,h,w) -> X (N,C), a row of channels for each of the N = B h w patches.

    Each row is divided by its L2 norm, then its own mean is subtracted. The order is the release's.
    """
    rows = at_least_float32(V).flatten(2).transpose(1, 2).flatten(0, 1)  # N,C
    rows = F.normalize(rows, dim=1)
    return rows - rows.mean(1, keepdim=True)


def patch_loss(V_S, V_T):
    """Eq. 6-7: L_pc = 1/N^2 sum_ij (M^S_ij - M^T_ij)^2, with M = X X^T and X the rows of Eq. 5.

    V_S, V_T: (B,C,h,w). i and j run over all patches of the batch, across images too.
    """
    # differs: the paper has M = X X^T / (C-1). The release uses this formula, but its rows are
    # first normalised and then centred. Here the rows are the release's, but the factor 1/(C-1) is
    # left out, because it would make the term (C-1)^2 times smaller.
    # Centring shortens the rows, so M holds no cosines: behind a ReLU M_ii is 0.3 to 0.7
    with torch.autocast(V_S.device.type, enabled=False):  # half precision would round the products
        X, Y = patch_rows(V_S), patch_rows(V_T)
        N, C = X.shape
        # the N x N matrices are cheaper where N < C, but need all rows in one process
        if N < C and process_count() == 1:
            M_S, M_T = X @ X.T, Y @ Y.T
            return (M_S - M_T).square().mean()
        return mean_squared_difference_of_affinities(X, Y)  # the same from C x C


# ---------------------------------------------------------------- PDD, Eq. 8-9

def pdd_loss(z_S, z_T, labels, kl="forward", everywhere=True):
    """Eq. 9: L_PDD = mean over labelled pixels of 1/2 sum_{t, nt} q_i (log q_i - log p_i).

    This is the forward direction. In "reverse", the paper's direction, p and q swap places.
    With everywhere=False the summand is -1/2 log p_t, in both directions, at a pixel where the
    teacher is wrong, with p_t^T at most 1/2. This is half of cross-entropy's, and the forward form
    with q_t = 1.

    z_S, z_T: (B,K,h,w), resized to labels (B,H,W). i runs over t and nt. p is the student's pair
    (p_t, p_nt) and q_t = (p_t^T + 1)/2 = 1 - p_nt^T/2, q_nt = p_nt^T/2. The temperature is 1. The
    paper weights the summands of t and nt by alpha and beta. Here both are 1/2: the paper finds 1:1
    best, the release passes 0.5 each. Unequal ones would move the minimum away from p = q. In the
    forward direction it would be at p_t = alpha q_t / (alpha q_t + beta q_nt).

    Forward, Eq. 9 is 1/2 (BCE-with-logits(m_S, q_t) - H(q)), and the entropy H(q) does not depend
    on the student. So it is cross-entropy whose target the teacher softens. The derivative of a
    pixel's summand with respect to z_y is 1/2 (p_t - q_t). Its size is at least 1/4 where p_t = 0,
    so a class that the student does not predict yet keeps its gradient. The reverse form of Eq. 9
    has 1/2 p_t p_nt (m_S - logit q_t), which vanishes there.
    """
    m_S, m_T = margin(z_S, labels), margin(z_T, labels)  # B,H,W, Eq. 8
    log_p_t, log_p_nt = F.logsigmoid(m_S), F.logsigmoid(-m_S)
    # differs: the paper adds p^T + y, the release lacks this code. Here it is (p^T + y)/2, which is
    # a distribution. In the forward direction this halves the gradient
    log_q_t = torch.log1p(-torch.sigmoid(-m_T) / 2)
    log_q_nt = F.logsigmoid(-m_T) - math.log(2)
    pair_S, pair_q = torch.stack([log_p_t, log_p_nt]), torch.stack([log_q_t, log_q_nt])  # 2,B,H,W
    pixels = 0.5 * divergence(pair_S, pair_q, dim=0, kl=kl)
    # differs: the paper listens to the teacher everywhere. Where the teacher is wrong, q_t falls
    # towards 1/2, and the student loses the classes that the teacher does not find. Here c2vkd goes
    # by the label alone at such a pixel, as in conditional teacher-student learning, 1904.12399.
    # Right means p_t > p_nt: the label wins in the pair of Eq. 8
    if not everywhere:
        pixels = pixels.where(m_T > 0, -0.5 * log_p_t)
    # unstated: what becomes of ignored pixels. Here the mean runs over the labelled ones
    return masked_mean(pixels, labels != IGNORE)


def margin(z, labels):
    """Eq. 8 as a margin m (B,H,W), with p_t = sigmoid(m) and p_nt = sigmoid(-m).

    z (B,K,h,w) is first resized to the labels (B,H,W).

        m = z_y - log sum_{k != y} exp z_k
        dm/dz_y = 1,   dm/dz_k = -exp z_k / sum_{j != y} exp z_j   for k != y

    So log p_t = logsigmoid(m) and log p_nt = logsigmoid(-m), exact where 1 - p_t would round to 0.
    At ignored pixels m is that of class 0 and must not be used.
    """
    def value(rows, target):  # pixels,K and pixels,1
        z_y = rows.gather(1, target)
        others = rows.scatter_(1, target, -torch.inf)
        # logsumexp by hand, in place, takes half the time of torch's
        top = others.amax(1, keepdim=True)
        return z_y - top - others.sub_(top).exp_().sum(1, keepdim=True).log()

    def derivative(rows, target, upstream):
        others = rows.scatter_(1, target, -torch.inf).softmax(1)
        return others.mul_(-upstream).scatter_(1, target, upstream)

    return FullSize.apply(z, labels, value, derivative)


def cross_entropy(z_S, labels):
    """Mean over labelled pixels of -log softmax(z)_y. z_S: (B,K,h,w), resized to labels (B,H,W).

    The derivative of a pixel's summand with respect to z_k is softmax(z)_k, less 1 for k = y.
    """
    def value(rows, target):
        return -rows.log_softmax(1).gather(1, target)

    def derivative(rows, target, upstream):
        gradient = rows.softmax(1).mul_(upstream)
        return gradient.scatter_add_(1, target, -upstream)

    return masked_mean(FullSize.apply(z_S, labels, value, derivative), labels != IGNORE)


class FullSize(torch.autograd.Function):
    """Resizes z (B,K,h,w) to the labels (B,H,W) and applies `value` to each pixel's logits.

    rows (pixels,K) are the logits of one resized image, target (pixels,1) its labels, with 0 for
    ignored pixels. value(rows, target) returns (pixels,1). derivative(rows, target, upstream)
    returns the gradient with respect to rows (pixels,K), given the gradient `upstream` (pixels,1)
    with respect to the values. Both functions may overwrite rows.

    Full-size logits are the largest tensors of a step. So this works on one image at a time, keeps
    no tensors but z and the labels, and resizes again in the backward pass.
    """

    @staticmethod
    def rows(full, labels):
        rows = full.movedim(1, -1).flatten(0, -2)  # pixels,K
        return rows, labels.where(labels != IGNORE, 0).flatten()[:, None]

    @staticmethod
    def forward(ctx, z, labels, value, derivative):
        # channels_last makes `rows` a view. Otherwise each full-size image would be copied
        z = z.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(z, labels)
        ctx.derivative = derivative
        maps = [value(*FullSize.rows(resize(z_b, y_b.shape[1:]), y_b)).view_as(y_b)
                for z_b, y_b in zip(z.split(1), labels.split(1))]
        return torch.cat(maps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        z, labels = ctx.saved_tensors
        gradients = []
        for z_b, y_b, upstream_b in zip(z.split(1), labels.split(1), upstream.split(1)):
            with torch.enable_grad():
                z_b = z_b.detach().requires_grad_()
                full = resize(z_b, y_b.shape[1:])
            rows, target = FullSize.rows(full.detach(), y_b)
            gradient = ctx.derivative(rows, target, upstream_b.reshape(-1, 1))
            gradient = gradient.view(1, *y_b.shape[1:], -1).movedim(-1, 1)  # 1,K,H,W
            gradients += torch.autograd.grad(full, z_b, gradient)
        return torch.cat(gradients), None, None, None


# ---------------------------------------------------------------- what the equations are made of
# Where several processes share a batch, the sums of Eq. 6-7 and 9 run over all of them. Eq. 3 and 4
# are plain means, which the averaging of gradients in DistributedDataParallel already gives.

def at_least_float32(x):
    """Half precisions are raised to float32, float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def log_softmax(x):
    """Over dimension 1, in at least float32."""
    return F.log_softmax(at_least_float32(x), dim=1)


def resize(x, size, antialias=False):
    """A map (B,C,h,w) resized bilinearly to `size`, in at least float32."""
    return F.interpolate(at_least_float32(x), size, mode="bilinear", align_corners=False,
                         antialias=antialias)


def mean_squared_difference_of_affinities(X, Y):
    """1/N^2 || X X^T - Y Y^T ||^2 from C x C matrices. X, Y (n,C): this process's n of N rows.

    With D = X - Y and Z = X + Y, X X^T - Y Y^T is 1/2 (D Z^T + Z D^T). So, exactly,
        || X X^T - Y Y^T ||^2 = 1/2 [ <D^T D, Z^T Z> + tr((Z^T D)^2) ].
    Unlike ||X^T X||^2 + ||Y^T Y||^2 - 2 ||X^T Y||^2, this loses no digits where X is close to Y
    row by row.
    """
    D, Z = X - Y, X + Y
    DD, ZZ, ZD = all_sum(torch.stack([D.T @ D, Z.T @ Z, Z.T @ D]))  # C,C each
    trace = (ZD * ZD.T).sum()  # tr(A A) = sum_ij A_ij A_ji
    return 0.5 * ((DD * ZZ).sum() + trace) / (len(X) * process_count()) ** 2


def masked_mean(values, mask):
    """Mean of `values` where `mask` is set, over the pixels of all processes. 0 where none is."""
    total = all_sum(values.masked_fill(~mask, 0).sum())
    return total / all_sum(mask.sum().float()).clamp(min=1)


def process_count():
    """The number of processes that share a batch."""
    started = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if started else 1


def all_sum(x):
    """Sum of x over all processes. With one process it is x itself.

    In the backward pass each process's x gets the gradient times the number of processes. The mean
    that DistributedDataParallel takes afterwards undoes this factor.
    """
    if process_count() == 1:
        return x
    total = x.detach().clone()
    distributed.all_reduce(total)
    return total + process_count() * (x - x.detach())


# ---------------------------------------------------------------- the losses of other methods
# Logits z, maps before the classifiers and labels lie on one grid. Ignored pixels are left out,
# except by fitnet_loss. The reductions are those of the sources named in METHODS, because a
# published weight only holds with its own reduction.

def kd_loss(z_S, z_T, labels, temperature=1.0):
    """Hinton et al., 1503.02531: tau^2 KL(softmax(z_T/tau) || softmax(z_S/tau)) of each pixel.

    tau is the temperature. Summed over classes, averaged over labelled pixels.
    """
    log_S, log_T = (log_softmax(at_least_float32(z) / temperature) for z in (z_S, z_T))
    pixels = divergence(log_S, log_T, dim=1, kl="forward")
    return temperature ** 2 * masked_mean(pixels, labels != IGNORE)


def cwd_loss(z_S, z_T, labels, temperature=4.0):
    """CWD, 2011.13256, on logits: tau^2 KL(teacher || student) of each class's softmax over places.

    tau is the temperature. Summed over positions, averaged over images and classes.
    """
    def over_positions(z):
        # not -inf, which would give 0 * (inf - inf) in the divergence
        z = (at_least_float32(z) / temperature).masked_fill(labels[:, None] == IGNORE, -1e9)
        return F.log_softmax(z.flatten(2), 2)  # B,K,n

    maps = divergence(over_positions(z_S), over_positions(z_T), dim=2, kl="forward")  # B,K
    return temperature ** 2 * maps.mean()


def dist_loss(z_S, z_T, labels):
    """DIST, 2205.10536: 1 - Pearson correlation of the two networks' softmaxes.

    It has two parts: per pixel over classes, and per class over labelled pixels. Each is averaged,
    then they are added. With several processes each computes it on its own images.
    """
    valid = (labels != IGNORE).flatten()
    p_S, p_T = (at_least_float32(z).softmax(1).movedim(1, -1).flatten(0, -2)[valid]
                for z in (z_S, z_T))  # pixels,K
    if not len(p_S):  # no labelled pixel: 0, but with a gradient for DistributedDataParallel
        return at_least_float32(z_S).sum() * 0

    def distance(a, b):  # rows
        a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
        # as in the authors' code, 1e-8 is added to the product of the norms. Absent classes have
        # tiny rows, which then lose almost all gradient. F.cosine_similarity would keep it
        return 1 - ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)).mean()

    return distance(p_S, p_T) + distance(p_S.T, p_T.T)


def dkd_loss(z_S, z_T, labels, alpha=1.0, beta=8.0, temperature=4.0):
    """DKD, 2203.08679, pixel-wise: tau^2 mean over labelled pixels of alpha TCKD + beta NCKD.

    TCKD is the KL of the pairs (target, all others), NCKD that of the softmaxes over the other
    classes. tau is the temperature. The defaults are those of mdistiller for CIFAR-100.
    """
    z_S, z_T = at_least_float32(z_S) / temperature, at_least_float32(z_T) / temperature
    m_S, m_T = margin(z_S, labels), margin(z_T, labels)
    pair_S, pair_T = (torch.stack([F.logsigmoid(m), F.logsigmoid(-m)]) for m in (m_S, m_T))
    target = labels.where(labels != IGNORE, 0)[:, None]
    rest_S, rest_T = (log_softmax(z.scatter(1, target, -1e9)) for z in (z_S, z_T))
    tckd = divergence(pair_S, pair_T, dim=0, kl="forward")
    nckd = divergence(rest_S, rest_T, dim=1, kl="forward")
    return temperature ** 2 * masked_mean(alpha * tckd + beta * nckd, labels != IGNORE)


def skd_loss(map_S, map_T, labels):
    """SKD, 1903.04197, pair-wise: mean squared difference of the cosines of an image's positions.

    map_S, map_T: (B,C,h,w), the channels may differ. They are first max-pooled 2x2, as CIRKD does.
    SKD's authors pool windows of half the map. Windows without labels are left out, and so is the
    adversarial part.
    """
    valid = (labels != IGNORE)[:, None]
    mask = F.max_pool2d(valid.float(), 2, 2, ceil_mode=True).flatten(2) > 0  # B,1,n

    def cosines(x):
        x = at_least_float32(x).masked_fill(~valid, -torch.inf)
        x = F.max_pool2d(x, 2, 2, ceil_mode=True).flatten(2)  # B,C,n
        x = F.normalize(x.masked_fill(~mask, 0), dim=1)
        return x.transpose(1, 2) @ x  # B,n,n

    with torch.autocast(map_S.device.type, enabled=False):
        loss = (cosines(map_S) - cosines(map_T)).square()
    return masked_mean(loss, mask & mask.transpose(1, 2))


def ifvd_loss(map_S, map_T, labels, classes):
    """IFVD, ECCV 2020: squared difference of each position's cosine to its class's mean feature.

    map_S, map_T: (B,C,h,w), the channels may differ. The mean feature is that of the class in the
    image. Mean over labelled positions.
    """
    labels_ignored_last = labels.where(labels != IGNORE, classes).flatten(1)
    onehot = F.one_hot(labels_ignored_last, classes + 1)[..., :classes]  # B,n,K

    def variation(x):
        x = at_least_float32(x).flatten(2)  # B,C,n
        member = onehot.to(x.dtype)
        prototypes = x @ member / member.sum(1, keepdim=True).clamp(min=1)  # B,C,K
        return F.cosine_similarity(x, prototypes @ member.transpose(1, 2), dim=1)  # B,n

    with torch.autocast(map_S.device.type, enabled=False):
        loss = (variation(map_S) - variation(map_T)).square()
    return masked_mean(loss, labels.flatten(1) != IGNORE)


def cirkd_loss(map_S, map_T, labels, temperature=0.1):
    """CIRKD, 2204.06986, mini-batch part: KL(teacher || student) of pixel-to-pixel affinities.

    For an ordered pair of images (i, j), a pixel of i has a cosine with each pixel of j. These are
    divided by the temperature, and their softmax over the pixels of j gives the affinities.
    map_S, map_T: (B,C,h,w), the channels may differ. Mean over labelled pixels of i and over the
    pairs. Ignored pixels of j are left out, and so are CIRKD's memory banks. With several processes
    each computes it on its own images. A control for L_pc, which compares all patches of a batch,
    too, but without softmaxes.
    """
    valid = (labels != IGNORE).flatten(1)  # B,n
    rows_S, rows_T = (F.normalize(at_least_float32(x).flatten(2), dim=1).transpose(1, 2)
                      for x in (map_S, map_T))  # B,n,C

    def pair(S_i, S_j, T_i, T_j, valid_j):
        def affinities(x_i, x_j):
            # not -inf, which would give 0 * (inf - inf) in the divergence
            return F.log_softmax((x_i @ x_j.T / temperature).masked_fill(~valid_j, -1e9), 1)  # n,n
        return divergence(affinities(S_i, S_j), affinities(T_i, T_j), dim=1, kl="forward")  # n

    with torch.autocast(map_S.device.type, enabled=False):
        # B^2 matrices of n x n would need tens of GB, so the backward pass recomputes them
        rows = [recompute(pair, rows_S[i], rows_S[j], rows_T[i], rows_T[j], valid[j],
                          use_reentrant=False)
                for i, j in itertools.product(range(len(valid)), repeat=2)]
    rows = torch.stack(rows).view(len(valid), len(valid), -1)  # B,B,n
    return masked_mean(rows, valid[:, None] & valid.any(1)[None, :, None])


def fitnet_loss(V_S, V_T):
    """FitNet, 1412.6550, a plain hint: mean squared difference of V^S and V^T (B,C,h,w).

    Ignored pixels take part.
    """
    return (at_least_float32(V_S) - at_least_float32(V_T)).square().mean()


# ---------------------------------------------------------------- the methods
# A method is a function and its row in METHODS. If it has no parameters to train, a new one needs
# nothing else. The function reads (S, T, labels), the two networks' Outputs and the labels (B,H,W),
# and returns named unweighted terms. If it has a parameter `kl`, it gets the value of --kl. If it
# has a parameter `everywhere`, it is told whether PDD hears the teacher where it is wrong, too, see
# --teach.

def on_one_grid(labels, *maps):
    """The maps, then the labels, at crop/8, rounded up. A teacher of stride 8 has this grid."""
    grid = [-(-side // 8) for side in labels.shape[1:]]
    nearest = F.interpolate(labels[:, None].float(), grid, mode="nearest-exact")[:, 0].long()
    # a map that shrinks by a factor above 2 is antialiased. Otherwise most of mit_nano's logits
    # would get no gradient. CUDA has no deterministic antialiased resize
    return *(resize(x, grid, antialias=x.shape[-1] > 2 * grid[-1]) for x in maps), nearest


def ce(S, T, labels):
    return {"ce": cross_entropy(S.logits, labels)}


def kd(S, T, labels):
    z_S, z_T, small_labels = on_one_grid(labels, S.logits, T.logits)
    return {"ce": cross_entropy(S.logits, labels), "kd": kd_loss(z_S, z_T, small_labels)}


def cwd(S, T, labels):
    z_S, z_T, small_labels = on_one_grid(labels, S.logits, T.logits)
    return {"ce": cross_entropy(S.logits, labels), "kd": kd_loss(z_S, z_T, small_labels),
            "cwd": cwd_loss(z_S, z_T, small_labels)}


def dist(S, T, labels):
    z_S, z_T, small_labels = on_one_grid(labels, S.logits, T.logits)
    return {"ce": cross_entropy(S.logits, labels), "dist": dist_loss(z_S, z_T, small_labels)}


def dkd(S, T, labels):
    z_S, z_T, small_labels = on_one_grid(labels, S.logits, T.logits)
    return {"ce": cross_entropy(S.logits, labels), "dkd": dkd_loss(z_S, z_T, small_labels)}


def skd(S, T, labels):
    map_S, map_T, small_labels = on_one_grid(labels, S.before_classifier, T.before_classifier)
    return kd(S, T, labels) | {"skd": skd_loss(map_S, map_T, small_labels)}


def ifvd(S, T, labels):
    map_S, map_T, small_labels = on_one_grid(labels, S.before_classifier, T.before_classifier)
    loss = ifvd_loss(map_S, map_T, small_labels, classes=S.logits.shape[1])
    return kd(S, T, labels) | {"ifvd": loss}


def cirkd(S, T, labels):
    map_S, map_T, small_labels = on_one_grid(labels, S.before_classifier, T.before_classifier)
    return kd(S, T, labels) | {"cirkd": cirkd_loss(map_S, map_T, small_labels)}


def fitnet(S, T, labels):
    return {"ce": cross_entropy(S.logits, labels), "fitnet": fitnet_loss(*visual_maps(S, T))}


# ours: Eq. 4-7 at every depth, beside cross-entropy
def c2vkd_multi(S, T, labels):
    pairs = visual_pairs(S, T)
    return {"ce": cross_entropy(S.logits, labels),
            "gb": sum(global_visual_loss(*pair) for pair in pairs) / len(pairs),
            "pc": sum(patch_loss(*pair) for pair in pairs) / len(pairs),
            "lc": linguistic_loss(S.embedding, T.embedding)}


# a control: a plain hint at every depth
def fitnet_multi(S, T, labels):
    pairs = visual_pairs(S, T)
    hint = sum(fitnet_loss(*pair) for pair in pairs) / len(pairs)
    return {"ce": cross_entropy(S.logits, labels), "fitnet": hint}


# a control: does VLFD help, or would any hint?
def pdd_fitnet(S, T, labels, kl="forward", everywhere=False):
    return {"pdd": pdd_loss(S.logits, T.logits, labels, kl, everywhere),
            "fitnet": fitnet_loss(*visual_maps(S, T))}


# a control: does PDD help, or would cross-entropy do as well?
def vlfd(S, T, labels, kl="forward"):
    V_S, V_T = visual_maps(S, T)
    return {"ce": cross_entropy(S.logits, labels),
            "gb": global_visual_loss(V_S, V_T, kl),
            "pc": patch_loss(V_S, V_T),
            "lc": linguistic_loss(S.embedding, T.embedding, kl)}


NEEDS_ALL = {"teacher", "A_v", "A_l"}
NEEDS_DEPTHS = {"teacher", "A_v", "earlier"}


@dataclass(frozen=True)
class Method:
    """One row of METHODS.

    function: (S, T, labels), and perhaps kl and everywhere -> name -> unweighted term.
    weights: of those terms.
    needs: what the function reads besides the student's own outputs. "teacher" fills T, "A_v" fills
    S.projected, "A_l" fills both embeddings and needs the pool P. "earlier" fills S.earlier.
    """
    function: Callable
    weights: dict
    needs: Collection = frozenset({"teacher"})

    def __post_init__(self):
        known = NEEDS_ALL | NEEDS_DEPTHS
        unknown = set(self.needs) - known
        if unknown:
            raise ValueError(f"needs {sorted(unknown)}: a method can need {sorted(known)}")

    def takes(self, option):
        """Whether the function has this parameter, "kl" or "everywhere"."""
        return option in inspect.signature(self.function).parameters

    def terms(self, S, T, labels, kl="forward", everywhere=False):
        """The method's unweighted terms, name -> scalar. It gets the options that it takes."""
        options = {"kl": kl, "everywhere": everywhere}
        taken = {name: value for name, value in options.items() if self.takes(name)}
        return self.function(S, T, labels, **taken)


NEEDS_MAPS = {"teacher", "A_v"}
KD_WEIGHTS = {"ce": 1.0, "kd": 1.0}
# differs: we do not know the paper's weights. The release has 0.1, 0.1, 0.5 in its own units. Here
# they are 1, 2, 0.2 in this file's units. Under a teacher from ImageNet weights they gained nothing
# and lost up to two points on val. The data set shapes has others, VLFD_OF_SHAPES in train.py
VLFD_WEIGHTS = {"gb": 1.0, "pc": 2.0, "lc": 0.2}
METHODS = {  # at the end of each row: where its weights come from
    "c2vkd": Method(c2vkd, {"pdd": 1.0} | VLFD_WEIGHTS, NEEDS_ALL),  # ours
    "ce": Method(ce, {"ce": 1.0}, needs=()),  # the student alone
    "kd": Method(kd, KD_WEIGHTS),  # CIRKD's scripts
    "cwd": Method(cwd, KD_WEIGHTS | {"cwd": 0.3}),  # CIRKD's SegFormer script, no adversary
    "skd": Method(skd, KD_WEIGHTS | {"skd": 10.0}),  # CIRKD's script, no adversary
    "ifvd": Method(ifvd, KD_WEIGHTS | {"ifvd": 20.0}),  # CIRKD's script, no adversary
    "cirkd": Method(cirkd, KD_WEIGHTS | {"cirkd": 1.0}),  # CIRKD's script, no memory banks
    "dist": Method(dist, {"ce": 1.0, "dist": 1.0}),  # its authors' segmentation script
    # at mdistiller's weight 1.0 its gradient in the encoder was 8 times cross-entropy's on CamVid
    "dkd": Method(dkd, {"ce": 1.0, "dkd": 0.03}),  # ours, chosen on CamVid val
    "fitnet": Method(fitnet, {"ce": 1.0, "fitnet": 10.0}, NEEDS_MAPS),  # CIRKD's script, no KD
    "pdd_fitnet": Method(pdd_fitnet, {"pdd": 1.0, "fitnet": 10.0}, NEEDS_MAPS),  # ours, a control
    "c2vkd_multi": Method(c2vkd_multi, {"ce": 1.0, "gb": 20.0, "pc": 40.0, "lc": 0.2},
                          NEEDS_ALL | NEEDS_DEPTHS),  # ours
    "fitnet_multi": Method(fitnet_multi, {"ce": 1.0, "fitnet": 20.0}, NEEDS_DEPTHS),  # a control
    "vlfd": Method(vlfd, {"ce": 1.0} | VLFD_WEIGHTS, NEEDS_ALL),  # ours, a control
}


def c2vkd_weights(units, c_teacher, embedding=512):
    """The release's weights 0.1, 0.1, 0.5 of C2VKD's feature terms.

    "summed" uses them as they stand. The KLs here are sums, so that the terms act. "released"
    reproduces the release's units, in which the KL is averaged over every element and the affinity
    divided by C - 1. In these units the terms are nearly inert.
    """
    summed = {"pdd": 1.0, "gb": 0.1, "pc": 0.1, "lc": 0.5}
    released = {"pdd": 1.0, "gb": 0.1 / c_teacher, "pc": 0.1 / (c_teacher - 1) ** 2,
                "lc": 0.5 / embedding}
    return {"summed": summed, "released": released}[units]
