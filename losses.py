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
    p_t, p_nt log_p_t, ...      probability of the label's class, of all others          B,H,W
    m         m_S, m_T          margin: the logit of p_t, so p_t = sigmoid(m)            B,H,W
    q         log_q_t, ...      the teacher's (p_t, p_nt) mixed with the label's (1, 0)  B,H,W
    F^T_i     T.earlier         ours: the teacher's maps of the depths i before F^T      B,C_T,i,h,w
    A_v,i ... S.earlier         ours: the student's F^S_i, each by a 1x1 convolution     B,C_T,i,h,w
    V^S_i ... V_S, V_T          ours: V^S and V^T at depth i, see mean_over_depths       B,C_T,i,h,w

S and T are the two networks' Outputs. K counts classes, C channels. H,W is the size of the labels
and h,w the tensor's own grid. On the matrices X, Y, Z and D the ^T means transposed. Everywhere
else it means teacher.

Each KL of C2VKD sums over one distribution: the channels in Eq. 4, the coordinates in Eq. 3, the
pair in Eq. 9. It is then averaged over images and places, in Eq. 9 over labelled pixels. `kl` is
the direction: "forward" is KL(teacher || student), "reverse" is KL(student || teacher). Everything
is computed in at least float32, but train.py lets a GPU round what enters matrix products to TF32.
Comments that begin with "differs" mark what is not as in the paper or in the authors' released
code, "unstated" what the paper leaves open.
"""
import itertools
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as distributed
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute

IGNORE = 255  # as in data.py. This file imports no other of ours


class Outputs(NamedTuple):
    """What a network hands to the losses, by the table above. None or () where nothing fills it."""
    logits: torch.Tensor  # z
    feature: torch.Tensor  # F
    before_classifier: torch.Tensor  # B,C,h,w: what the last 1x1 convolution turns into logits
    projected: torch.Tensor | None = None  # A_v(F^S)
    embedding: torch.Tensor | None = None  # e
    earlier: tuple = ()  # F^T_i, or A_v,i(F^S_i), from the first depth to the last but one
    own: Any = None  # what a method's own module makes of the student's Outputs, see Method


# ---------------------------------------------------------------- Eq. 10

def total_loss(terms, weights):
    """Eq. 10: L = L_PDD + l_gb L_gb + l_pc L_pc + l_lc L_lc. Every other method is summed alike.

    Raises ValueError where terms and weights have other names: a term would be left out.
    """
    if terms.keys() != weights.keys():
        raise ValueError(f"the terms are {sorted(terms)}, but the weights {sorted(weights)}")
    return sum(weights[name] * term for name, term in terms.items())


def c2vkd(S, T, labels):
    """The four losses of Eq. 10, unweighted. No separate cross-entropy: PDD contains the label."""
    return {"pdd": pdd_loss(S.logits, T.logits, labels), **vlfd_losses(S, T)}  # Eq. 8-9, 3-7


def vlfd_losses(S, T, kl="forward"):
    """The three feature losses of Eq. 10, unweighted."""
    V_S, V_T = visual_maps(S, T)  # B,C_T,h,w
    return {"gb": global_visual_loss(V_S, V_T, kl),  # Eq. 4
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
    # unstated: positions without labels. Here they take part in Eq. 3-7, as in the release
    grid = [min(2 * s, t) for s, t in zip(S.projected.shape[2:], T.feature.shape[2:])]
    return resize(S.projected, grid), resize(T.feature, grid)


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
    """
    # differs: the paper states no reduction. The release averages over the channels too, which
    # makes the term C times smaller. Here it is a true KL
    return divergence(log_softmax(V_S), log_softmax(V_T), dim=1, kl=kl).mean()


def patch_rows(V):
    """Eq. 5: V (B,C,h,w) -> X (N,C), a row of channels for each of the N = B h w patches.

    Each row is divided by its L2 norm, then its own mean is subtracted, as in the release.
    """
    rows = at_least_float32(V).flatten(2).transpose(1, 2).flatten(0, 1)  # N,C
    rows = F.normalize(rows, dim=1)
    return rows - rows.mean(1, keepdim=True)


def patch_loss(V_S, V_T):
    """Eq. 6-7: L_pc = 1/N^2 sum_ij (M^S_ij - M^T_ij)^2, with M^S = X X^T and M^T = Y Y^T.

    X and Y are the rows of Eq. 5, of student and teacher.

    V_S, V_T: (B,C,h,w). i and j run over all patches of the batch, across images too.
    """
    # differs: the paper has M = X X^T / (C-1). The release uses this formula, but its rows are
    # first normalised and then centred. Here the rows are the release's, but the factor 1/(C-1) is
    # left out, because it would make the term (C-1)^2 times smaller.
    # Centring shortens the rows, so M holds no cosines: behind a ReLU M_ii is 0.3 to 0.7
    with torch.autocast(V_S.device.type, enabled=False):  # half precision would round the products
        X, Y = patch_rows(V_S), patch_rows(V_T)
        # the same number as (X @ X.T - Y @ Y.T).square().mean(), without N x N matrices
        return mean_squared_difference_of_affinities(X, Y)


# ---------------------------------------------------------------- PDD, Eq. 8-9

def pdd_loss(z_S, z_T, labels, kl="forward"):
    """Eq. 9: L_PDD = mean over labelled pixels of 1/2 sum_{t, nt} q_i (log q_i - log p_i).

    This is the forward direction. In "reverse", the paper's direction, p and q swap places.
    z_S, z_T: (B,K,h,w), resized to labels (B,H,W). i runs over t and nt. p is the student's pair
    (p_t, p_nt) and q_t = (p_t^T + 1)/2 = 1 - p_nt^T/2, q_nt = p_nt^T/2. The temperature is 1. The
    paper weights the summands by alpha and beta. Here both are 1/2: the paper finds 1:1 best, the
    release passes 0.5 each. Unequal ones would move the minimum away from p = q.

    Forward, Eq. 9 is 1/2 (BCE-with-logits(m_S, q_t) - H(q)), and H(q) does not depend on the
    student. So it is cross-entropy whose target the teacher softens. A pixel's derivative with
    respect to z_y is 1/2 (p_t - q_t), at least 1/4 in size where p_t = 0: a class that the student
    does not predict yet keeps its gradient. The reverse form has 1/2 p_t p_nt (m_S - logit q_t),
    which vanishes there.
    """
    m_S, m_T = margin(z_S, labels), margin(z_T, labels)  # B,H,W, Eq. 8
    # unstated: what becomes of ignored pixels. Here the mean runs over the labelled ones
    return masked_mean(pdd_of_pixels(m_S, m_T, kl), labels != IGNORE)


def pdd_of_pixels(m_S, m_T, kl="forward"):
    """The summand of Eq. 9 at each pixel. m_S, m_T: the margins (B,H,W)."""
    log_p_t, log_p_nt = F.logsigmoid(m_S), F.logsigmoid(-m_S)
    # differs: the paper adds p^T + y, the release lacks this code. Here it is (p^T + y)/2, which is
    # a distribution. In the forward direction this halves the gradient
    log_q_t = torch.log1p(-torch.sigmoid(-m_T) / 2)
    log_q_nt = F.logsigmoid(-m_T) - math.log(2)
    pair_S, pair_q = torch.stack([log_p_t, log_p_nt]), torch.stack([log_q_t, log_q_nt])  # 2,B,H,W
    return 0.5 * divergence(pair_S, pair_q, dim=0, kl=kl)


def margin(z, labels):
    """Eq. 8 as a margin m (B,H,W), with p_t = sigmoid(m) and p_nt = sigmoid(-m).

        m = z_y - log sum_{k != y} exp z_k

    So log p_t = logsigmoid(m) and log p_nt = logsigmoid(-m), exact where 1 - p_t would round to 0.
    z (B,K,h,w) is first resized to the labels (B,H,W), see FullSize. At ignored pixels m is that of
    class 0 and must not be used.
    """
    return FullSize.apply(z, labels, margin_of_rows, derivative_of_margin)


def margin_of_rows(z, y):
    """Eq. 8 for the logits z (pixels,K), which are overwritten, and classes y (pixels,1)."""
    z_y = z.gather(1, y)
    others = z.scatter_(1, y, -torch.inf)
    # logsumexp by hand, in place, takes half the time of torch's
    top = others.amax(1, keepdim=True)
    return z_y - top - others.sub_(top).exp_().sum(1, keepdim=True).log()


def derivative_of_margin(z, y, upstream):
    """dm/dz_y = 1 and dm/dz_k = -exp z_k / sum_{j != y} exp z_j, times upstream (pixels,1)."""
    others = z.scatter_(1, y, -torch.inf).softmax(1)
    return others.mul_(-upstream).scatter_(1, y, upstream)


# ---------------------------------------------------------------- ours, beside the paper's C2VKD

def c2vkd_reverse(S, T, labels):
    """C2VKD with the KL of Eq. 3, 4 and 9 as the paper writes it, KL(student || teacher)."""
    pdd = pdd_loss(S.logits, T.logits, labels, kl="reverse")
    return {"pdd": pdd, **vlfd_losses(S, T, kl="reverse")}


def c2vkd_right(S, T, labels):
    """C2VKD whose PDD hears the teacher only where the teacher is right."""
    return {"pdd": pdd_where_right(S.logits, T.logits, labels), **vlfd_losses(S, T)}


def pdd_where_right(z_S, z_T, labels):
    """Eq. 9, with q_t = 1, which is the label alone, wherever p_t^T is at most 1/2.

    In Eq. 9, q_t falls towards 1/2 where the teacher is wrong, and the student loses the classes
    that the teacher does not find. This is the rule of conditional teacher-student learning,
    1904.12399. Right means p_t > p_nt: the label wins in the pair of Eq. 8.
    """
    m_S, m_T = margin(z_S, labels), margin(z_T, labels)
    pixels = pdd_of_pixels(m_S, m_T).where(m_T > 0, -0.5 * F.logsigmoid(m_S))
    return masked_mean(pixels, labels != IGNORE)


def vlfd(S, T, labels):
    """Without PDD. A control: would cross-entropy do as well?"""
    return {"ce": cross_entropy(S.logits, labels), **vlfd_losses(S, T)}


def pdd_fitnet(S, T, labels):
    """Without VLFD. A control: would any hint do as well?"""
    return {"pdd": pdd_loss(S.logits, T.logits, labels), "fitnet": fitnet_loss(*visual_maps(S, T))}


def c2vkd_multi(S, T, labels):
    """Eq. 4-7 at every depth, on standardised V^T_i, beside cross-entropy and Eq. 3."""
    return {"ce": cross_entropy(S.logits, labels),
            "gb": mean_over_depths(global_visual_loss, S, T),
            "pc": mean_over_depths(patch_loss, S, T),
            "lc": linguistic_loss(S.embedding, T.embedding)}


def fitnet_multi(S, T, labels):
    """A plain hint at every depth. A control for c2vkd_multi."""
    return {"ce": cross_entropy(S.logits, labels),
            "fitnet": mean_over_depths(fitnet_loss, S, T)}


def mean_over_depths(loss, S, T):
    """Mean of loss(V^S_i, V^T_i) over the teacher's depths i, of which F^T is the last.

    Each channel of the teacher's map first gets mean 0 and variance 1 over the batch and its
    places, so that all depths have one scale. With several processes each takes its own images.
    Raises ValueError where S and T differ in depths: the method then lacks the need "earlier".
    """
    def at_depth(map_S, map_T):
        map_T = F.batch_norm(at_least_float32(map_T), None, None, training=True)
        return loss(*visual_maps(S._replace(projected=map_S), T._replace(feature=map_T)))

    pairs = list(zip((*S.earlier, S.projected), (*T.earlier, T.feature), strict=True))
    # early maps are large: keep nothing of a depth's loss, compute it again in the backward pass
    terms = [recompute(at_depth, *pair, use_reentrant=False) for pair in pairs]
    return sum(terms) / len(terms)


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
    Unlike ||X^T X||^2 + ||Y^T Y||^2 - 2 ||X^T Y||^2, this loses no digits where X is close to Y.
    """
    D, Z = X - Y, X + Y
    DD, ZZ, ZD = all_sum(torch.stack([D.T @ D, Z.T @ Z, Z.T @ D]))  # C,C each
    trace = (ZD * ZD.T).sum()  # tr(A A) = sum_ij A_ij A_ji
    return 0.5 * ((DD * ZZ).sum() + trace) / (len(X) * process_count()) ** 2


class FullSize(torch.autograd.Function):
    """Resizes z (B,K,h,w) to the labels (B,H,W) and applies `value` to each pixel's logits.

    value(z, y) gets one resized image's logits (pixels,K) and labels (pixels,1), 0 if ignored, and
    returns (pixels,1). derivative(z, y, upstream) returns the gradient with respect to z, given the
    one with respect to the values, `upstream` (pixels,1). Both may overwrite z.

    Full-size logits are the largest tensors of a step. So this works on one image at a time, keeps
    no tensors but z and the labels, and resizes again in the backward pass.
    """

    @staticmethod
    def rows(full, labels):
        z = full.movedim(1, -1).flatten(0, -2)  # pixels,K
        return z, labels.where(labels != IGNORE, 0).flatten()[:, None]

    @staticmethod
    def forward(ctx, z, labels, value, derivative):
        # channels_last makes `rows` a view. Otherwise each full-size image would be copied
        z = z.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(z, labels)
        ctx.derivative = derivative
        maps = [value(*FullSize.rows(resize(z_b, y_b.shape[1:]), y_b)).view_as(y_b)
                for z_b, y_b in zip(z.split(1), labels.split(1), strict=True)]
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

    Backwards, x gets the gradient times the number of processes. The mean that
    DistributedDataParallel takes then divides it again.
    """
    if process_count() == 1:
        return x
    total = x.detach().clone()
    distributed.all_reduce(total)
    return total + process_count() * (x - x.detach())


# ---------------------------------------------------------------- the losses of other methods
# Logits z, maps before the classifiers (B,C,h,w), whose channels may differ, and labels lie on one
# grid. tau is the temperature. Ignored pixels are left out, except by fitnet_loss. The reductions
# are those of the sources named in METHODS, because a published weight only holds with its own
# reduction. Of several processes each computes dist_loss and cirkd_loss on its own images.

def cross_entropy(z_S, labels):
    """Mean over labelled pixels of -log softmax(z)_y. z_S: (B,K,h,w), resized to labels (B,H,W)."""
    pixels = FullSize.apply(z_S, labels, cross_entropy_of_rows, derivative_of_cross_entropy)
    return masked_mean(pixels, labels != IGNORE)


def cross_entropy_of_rows(z, y):
    """-log softmax(z)_y for the logits z (pixels,K) and classes y (pixels,1)."""
    return -z.log_softmax(1).gather(1, y)


def derivative_of_cross_entropy(z, y, upstream):
    """softmax(z)_k, less 1 for k = y, times upstream (pixels,1)."""
    return z.softmax(1).mul_(upstream).scatter_add_(1, y, -upstream)


def kd_loss(z_S, z_T, labels, temperature=1.0):
    """Hinton et al., 1503.02531: tau^2 KL(softmax(z_T/tau) || softmax(z_S/tau)) of each pixel.

    Summed over classes, averaged over labelled pixels.
    """
    log_S, log_T = (log_softmax(at_least_float32(z) / temperature) for z in (z_S, z_T))
    pixels = divergence(log_S, log_T, dim=1, kl="forward")
    return temperature ** 2 * masked_mean(pixels, labels != IGNORE)


def cwd_loss(z_S, z_T, labels, temperature=4.0):
    """CWD, 2011.13256, on logits: tau^2 KL(teacher || student) of each class's softmax over places.

    Summed over positions, averaged over images and classes.
    """
    def over_positions(z):
        # -1e9, not -inf, which would give 0 * (inf - inf) in the divergence
        z = (at_least_float32(z) / temperature).masked_fill(labels[:, None] == IGNORE, -1e9)
        return F.log_softmax(z.flatten(2), 2)  # B,K,n

    maps = divergence(over_positions(z_S), over_positions(z_T), dim=2, kl="forward")  # B,K
    return temperature ** 2 * maps.mean()


def dist_loss(z_S, z_T, labels):
    """DIST, 2205.10536: 1 - Pearson correlation, mean over pixels plus mean over classes."""
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
    classes. The defaults are those of mdistiller for CIFAR-100.
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

    The maps are first max-pooled 2x2, as CIRKD does. SKD's authors pool windows of half the map.
    Windows without labels and the adversarial part are left out.
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

    The mean feature is that of the class in the image. Mean over labelled positions.
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
    divided by tau and go through a softmax. Mean over labelled pixels and over pairs.
    """
    valid = (labels != IGNORE).flatten(1)  # B,n
    rows_S, rows_T = (F.normalize(at_least_float32(x).flatten(2), dim=1).transpose(1, 2)
                      for x in (map_S, map_T))  # B,n,C

    def pair(S_i, S_j, T_i, T_j, valid_j):
        def affinities(x_i, x_j):
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
    """FitNet, 1412.6550, a plain hint: mean squared difference of V^S and V^T (B,C,h,w)."""
    return (at_least_float32(V_S) - at_least_float32(V_T)).square().mean()


# ---------------------------------------------------------------- the methods

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
    classes = S.logits.shape[1]
    return kd(S, T, labels) | {"ifvd": ifvd_loss(map_S, map_T, small_labels, classes)}


def cirkd(S, T, labels):
    map_S, map_T, small_labels = on_one_grid(labels, S.before_classifier, T.before_classifier)
    return kd(S, T, labels) | {"cirkd": cirkd_loss(map_S, map_T, small_labels)}


def fitnet(S, T, labels):
    return {"ce": cross_entropy(S.logits, labels), "fitnet": fitnet_loss(*visual_maps(S, T))}


@dataclass(frozen=True)
class Method:
    """One row of METHODS, and all that a loss of one's own needs. ValueError for unknown needs.

    function: from the networks' Outputs S, T and labels (B,H,W) to name -> unweighted term.
    weights: of those terms.
    needs: what the function reads besides the student's own outputs. "teacher" fills T. "A_v" fills
    S.projected and lets pictures without labels take part. "A_l" fills both embeddings, by the
    pool P. "earlier" fills S.earlier. They need the teacher, and "earlier" needs "A_v".
    One may be a function (student, C_T) -> module, for parameters of the loss itself: the module
    is trained with the student, and S.own is what it makes of the student's Outputs.
    """
    function: Callable
    weights: dict
    needs: Collection = frozenset({"teacher"})

    def __post_init__(self):
        named = {need for need in self.needs if not callable(need)}
        if named - NEEDS_ALL or len(self.needs) - len(named) > 1:
            raise ValueError(f"needs {self.needs}: a method can need {sorted(NEEDS_ALL)} and one "
                             "function that builds a module")
        if named and "teacher" not in named or "earlier" in named and "A_v" not in named:
            raise ValueError(f"needs {named}: A_v, A_l and earlier need the teacher, and earlier "
                             "needs A_v")


NEEDS_MAPS = {"teacher", "A_v"}
NEEDS_VLFD = NEEDS_MAPS | {"A_l"}
NEEDS_ALL = NEEDS_VLFD | {"earlier"}
KD_WEIGHTS = {"ce": 1.0, "kd": 1.0}
# differs: we do not know the paper's weights. The release has 0.1, 0.1, 0.5 in its own units. Here
# they are 1, 2, 0.2 in this file's units. The data set shapes has others, in its recipe in train.py
VLFD_WEIGHTS = {"gb": 1.0, "pc": 2.0, "lc": 0.2}
METHODS = {  # at the end of each row: where its weights come from
    "c2vkd": Method(c2vkd, {"pdd": 1.0} | VLFD_WEIGHTS, NEEDS_VLFD),  # ours
    "c2vkd_right": Method(c2vkd_right, {"pdd": 1.0} | VLFD_WEIGHTS, NEEDS_VLFD),  # ours
    "c2vkd_reverse": Method(c2vkd_reverse, {"pdd": 1.0} | VLFD_WEIGHTS, NEEDS_VLFD),  # ours
    "c2vkd_multi": Method(c2vkd_multi, {"ce": 1.0, "gb": 20.0, "pc": 40.0, "lc": 0.2},
                          NEEDS_ALL),  # ours, chosen on CamVid val
    "fitnet_multi": Method(fitnet_multi, {"ce": 1.0, "fitnet": 20.0},
                           NEEDS_MAPS | {"earlier"}),  # ours, chosen on CamVid val
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
    "vlfd": Method(vlfd, {"ce": 1.0} | VLFD_WEIGHTS, NEEDS_VLFD),  # ours, a control
}
