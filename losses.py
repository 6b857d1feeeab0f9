"""The C2VKD objective (arXiv 2310.07265), equation by equation, then the baselines it is compared with.

Pure functions: tensors in, one unweighted scalar out. Student tensors carry gradients, teacher tensors do not.

    paper     here              meaning                                                    shape
    --------  ----------------  ---------------------------------------------------------  ------------
    x, y      labels            label map, 255 = ignore                                    B,H,W
    z^S, z^T  z_S, z_T          logits, upsampled bilinearly to the label's size           B,K,H,W
    F^S, F^T  feature, F_T      last encoder features                                      B,C,h,w
    V^S, V^T  V_S, V_T          A_v(F^S) and F^T, both resized bilinearly to crop/16       B,C_T,h,w
    e^S, e^T  e_S, e_T          A_l(F^S) and P(F^T), visual-linguistic embeddings          B,512
    p_t       log_p_t           log of the target's probability, p[y]                      B,H,W
    p_nt      log_p_nt          log of all other classes' probability together             B,H,W
    m         m_S, m_T          margin: the logit of p_t, so p_t = sigmoid(m)              B,H,W
    q         log_q_t, ...      teacher's pair mixed with the label's                      B,H,W
    M         (never formed)    N x N affinity of all patches of the batch                 N,N

Every KL divergence is summed over its distribution (channels, coordinates, the pair) and averaged over
positions. `kl` is its direction, for Eq. 3, 4 and 9 alike: "forward" is KL(teacher || student), what the
release computes; "reverse" is KL(student || teacher), what the paper writes. Everything is float32 under
autocast. With several processes each of them holds an equal share of the batch.
"""
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F

IGNORE = 255  # data.IGNORE; this file imports torch only


def full(x):
    """At least float32: autocast's half precisions are raised, float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def upsample(x, size):
    """Bilinear resizing of a map (B,C,h,w) to `size`, in float32."""
    return F.interpolate(full(x), size, mode="bilinear", align_corners=False)


def all_sum(x):
    """Sum over processes, x itself where there is one.

    Its gradient in a process's own x is that of all processes together, for what is computed from the sum is the
    same in each of them; DistributedDataParallel then averages.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total + dist.get_world_size() * (x - x.detach())


def masked_mean(values, mask):
    """Mean of `values` where `mask` is set, over the pixels of all processes; 0 where none is set.

    DistributedDataParallel averages gradients over processes, hence the factor on a process's own sum.
    """
    processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    count = all_sum(mask.sum().float()).clamp(min=1)
    return processes * values.masked_fill(~mask, 0).sum() / count


def divergence(log_S, log_T, dim, kl):
    """KL(teacher || student) if kl is "forward", KL(student || teacher) if "reverse", summed over `dim`."""
    # paper: unstated; Eq. 3, 4 and 9 write KL(student, teacher), the released code computes the forward one
    log_p, log_q = {"forward": (log_T, log_S), "reverse": (log_S, log_T)}[kl]
    return (log_p.exp() * (log_p - log_q)).sum(dim)


# ---------------------------------------------------------------- VLFD, Eq. 3-7

def linguistic_loss(e_S, e_T, kl="forward"):
    """Eq. 3: L_lc = 1/B sum_b KL over the 512 coordinates of softmax(e^S_b) and softmax(e^T_b), temperature 1.

    e_S, e_T: (B,512). Summed over coordinates, averaged over images.
    """
    # paper: unstated; the release averages over the coordinates too, which makes the term 512 times smaller
    return divergence(F.log_softmax(full(e_S), 1), F.log_softmax(full(e_T), 1), 1, kl).mean()


def global_visual_loss(V_S, V_T, kl="forward"):
    """Eq. 4: L_gb = 1/(B h w) sum_p KL over the C channels of softmax(V^S_p) and softmax(V^T_p), temperature 1.

    V_S, V_T: (B,C,h,w). Summed over channels, averaged over images and positions.
    """
    # paper: unstated; the release averages over channels too, which makes the term C times smaller
    return divergence(F.log_softmax(full(V_S), 1), F.log_softmax(full(V_T), 1), 1, kl).mean()


def patch_rows(V):
    """Eq. 5: V (B,C,h,w) -> N = B h w rows of C channels, each divided by its L2 norm, then centred."""
    rows = full(V).flatten(2).transpose(1, 2).flatten(0, 1)  # N,C
    rows = F.normalize(rows, dim=1)
    return rows - rows.mean(1, keepdim=True)


def patch_loss(V_S, V_T):
    """Eq. 6-7: L_pc = 1/N^2 sum_ij (M^S_ij - M^T_ij)^2, M = X X^T of the rows of Eq. 5. V_S, V_T: (B,C,h,w).

    Averaged over all N^2 pairs of patches of the batch, pairs across images included. With X, Y the rows of
    student and teacher, D = X - Y and S = X + Y: M^S - M^T = 1/2 (D S^T + S D^T), so that exactly
        || X X^T - Y Y^T ||^2 = 1/2 [ <D^T D, S^T S> + tr((S^T D)^2) ],
    which needs C x C matrices instead of N x N and does not cancel where X is close to Y.
    """
    # paper: unstated; M is the plain cosine affinity: the paper's 1/(C-1) would make the term 1/(C-1)^2 of this
    with torch.autocast(V_S.device.type, enabled=False):
        X, Y = patch_rows(V_S), patch_rows(V_T)
        N, C = X.shape
        alone = not (dist.is_available() and dist.is_initialized())
        if alone and N < C:  # then the matrices as they are defined are the smaller ones
            return (X @ X.T - Y @ Y.T).square().mean()
        D, S = X - Y, X + Y
        DD, SS, SD = all_sum(torch.stack([D.T @ D, S.T @ S, S.T @ D]))  # C,C each, sums over all patches
        N = N * (1 if alone else dist.get_world_size())
        return 0.5 * ((DD * SS).sum() + (SD * SD.T).sum()) / N ** 2


# ---------------------------------------------------------------- PDD, Eq. 8-9

def margin(z, labels):
    """Eq. 8: m = z_y - log sum_{k != y} exp z_k, the logit of the target's probability p_t.

    z: (B,K,H,W), labels: (B,H,W) with 255 = ignore (there m is computed for class 0 and must not be used).
    log p_t = logsigmoid(m) and log p_nt = logsigmoid(-m): exact where 1 - p_t would round to 0.
    """
    # paper: unstated; all non-target classes are one probability, so their structure is given up (no DKD-like NCKD)
    target = labels.where(labels != IGNORE, 0)[:, None]  # B,1,H,W
    z = full(z)
    z_t = z.gather(1, target)
    z_nt = z.scatter(1, target, -torch.inf).logsumexp(1, keepdim=True)
    return (z_t - z_nt)[:, 0]


def full_size_margin(z, labels):
    """Margins (B,H,W) of logits (B,K,h,w) upsampled to the labels' size.

    An image at a time: the K full-size channels are the largest tensors of a step.
    """
    return torch.cat([margin(upsample(a, labels.shape[1:]), y) for a, y in zip(z.split(1), labels.split(1))])


def pdd_loss(m_S, m_T, labels, kl="forward"):
    """Eq. 9: L_PDD = mean over labelled pixels of  alpha KL-term(t) + beta KL-term(nt),  alpha = beta = 1/2.

    m_S, m_T: margins (B,H,W). q_t = (p_t^T + 1)/2 and q_nt = (p_nt^T + 0)/2: the teacher's pair mixed with
    the label's pair (1, 0). Forward, this is 1/2 (BCE-with-logits(m_S, q_t) - H(q_t)), whose gradient in the
    target's logit, 1/2 (p_t^S - q_t), never vanishes at a wrong pixel; the reverse one's does.
    """
    # paper: unstated; Eq. 9 adds p^T and y without the 1/2 that makes q a distribution
    log_p_t, log_p_nt = F.logsigmoid(m_S), F.logsigmoid(-m_S)
    log_q_t = torch.log1p(-torch.sigmoid(-m_T) / 2)
    log_q_nt = F.logsigmoid(-m_T) - math.log(2)
    # paper: unstated; ignored pixels are left out and the mean is over the labelled ones
    loss = 0.5 * divergence(torch.stack([log_p_t, log_p_nt]), torch.stack([log_q_t, log_q_nt]), 0, kl)
    return masked_mean(loss, labels != IGNORE)


# ---------------------------------------------------------------- total, Eq. 10

def total_loss(terms, weights):
    """Eq. 10: L = L_PDD + l_gb L_gb + l_pc L_pc + l_lc L_lc, and likewise for every other method's terms."""
    return sum(weights[name] * term for name, term in terms.items())


def released_weights(c_teacher, embedding=512):
    """The release's 0.1, 0.1, 0.5 in its own units: KL averaged over every element, affinity divided by C-1."""
    return {"pdd": 1.0, "gb": 0.1 / c_teacher, "pc": 0.1 / (c_teacher - 1) ** 2, "lc": 0.5 / embedding}


# ---------------------------------------------------------------- the student alone, and the baselines
# Logits, features (the maps before the classifiers) and labels on one common grid, ignored pixels masked out
# alike. Published weights belong to the reduction given with each function.

def cross_entropy(z_S, labels):
    """Pixel-wise cross-entropy, mean over labelled pixels. z_S: (B,K,H,W) at the labels' size."""
    # pixels x K: deterministic CUDA has no two-dimensional nll_loss
    flat, target = full(z_S).movedim(1, -1).flatten(0, -2), labels.flatten()
    loss = F.cross_entropy(flat, target, ignore_index=IGNORE, reduction="none")
    return masked_mean(loss, target != IGNORE)


def kd_loss(z_S, z_T, labels, T=1.0):
    """Hinton et al., 1503.02531, pixel-wise: T^2 KL(softmax(z_T/T) || softmax(z_S/T)).

    Summed over classes, averaged over labelled pixels.
    """
    loss = divergence(F.log_softmax(full(z_S) / T, 1), F.log_softmax(full(z_T) / T, 1), 1, "forward")
    return T ** 2 * masked_mean(loss, labels != IGNORE)


def cwd_loss(z_S, z_T, labels, T=4.0):
    """CWD, 2011.13256, on logits: T^2/(B K) sum over images and classes of the KL between softmaxes over positions."""
    def over_positions(z):
        return F.log_softmax((full(z) / T).masked_fill(labels[:, None] == IGNORE, -1e9).flatten(2), 2)  # B,K,n

    log_S, log_T = over_positions(z_S), over_positions(z_T)
    return T ** 2 * divergence(log_S, log_T, 2, "forward").mean()


def skd_loss(D_S, D_T, labels):
    """SKD, 1903.04197, pair-wise: mean squared difference of the cosines of all pairs of 2x2 max-pooled positions.

    D_S, D_T: (B,C,h,w), the channels may differ. Mean over images and pairs; the adversarial part is left out.
    """
    valid = (labels != IGNORE)[:, None]
    mask = F.max_pool2d(valid.float(), 2, 2, ceil_mode=True).flatten(2) > 0  # B,1,n

    def cosines(D):
        D = F.max_pool2d(full(D).masked_fill(~valid, -torch.inf), 2, 2, ceil_mode=True).flatten(2)  # B,C,n
        A = F.normalize(D.masked_fill(~mask, 0), dim=1)
        return A.transpose(1, 2) @ A  # B,n,n

    with torch.autocast(D_S.device.type, enabled=False):
        loss = (cosines(D_S) - cosines(D_T)).square()
    return masked_mean(loss, mask & mask.transpose(1, 2))


def ifvd_loss(D_S, D_T, labels, classes):
    """IFVD, ECCV 2020: each position's cosine to the mean feature of its class in its image, mean squared difference.

    D_S, D_T: (B,C,h,w), the channels may differ. Mean over labelled positions.
    """
    onehot = F.one_hot(labels.where(labels != IGNORE, classes).flatten(1), classes + 1)[..., :classes]  # B,n,K

    def variation(D):
        D = full(D).flatten(2)  # B,C,n
        member = onehot.to(D.dtype)
        prototypes = D @ member / member.sum(1, keepdim=True).clamp(min=1)  # B,C,K
        return F.cosine_similarity(D, prototypes @ member.transpose(1, 2), dim=1)  # B,n

    with torch.autocast(D_S.device.type, enabled=False):
        loss = (variation(D_S) - variation(D_T)).square()
    return masked_mean(loss, labels.flatten(1) != IGNORE)


def at_loss(D_S, D_T, labels):
    """Attention transfer, 1612.03928: a = mean_C D^2, L2-normalised over an image's positions; mean squared difference.

    D_S, D_T: (B,C,h,w), the channels may differ. Mean over labelled positions.
    """
    mask = (labels != IGNORE).flatten(1)
    a_S, a_T = (F.normalize(full(D).square().mean(1).flatten(1).masked_fill(~mask, 0), dim=1) for D in (D_S, D_T))
    return masked_mean((a_S - a_T).square(), mask)


def dist_loss(z_S, z_T, labels):
    """DIST, 2205.10536: 1 - Pearson correlation of the two softmaxes, of each pixel over classes and of each class over pixels.

    The mean over labelled pixels plus the mean over classes; per process where there are several.
    """
    valid = (labels != IGNORE).flatten()
    P, Q = (full(z).softmax(1).movedim(1, -1).flatten(0, -2)[valid] for z in (z_S, z_T))  # pixels,K
    if not len(P):
        return full(z_S).sum() * 0

    def distance(a, b):  # rows
        return 1 - F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1).mean()

    return distance(P, Q) + distance(P.T, Q.T)


def fitnet_loss(V_S, V_T):
    """FitNet, 1412.6550: mean squared difference of A_v(F^S) and F^T, the plainest hint, on C2VKD's own maps. V_S, V_T: (B,C,h,w)."""
    return (full(V_S) - full(V_T)).square().mean()


def dkd_loss(z_S, z_T, labels, alpha=1.0, beta=8.0, T=4.0):
    """DKD, 2203.08679, pixel-wise: T^2 mean over pixels of alpha TCKD + beta NCKD (mdistiller's alpha, beta, T)."""
    z_S, z_T = full(z_S) / T, full(z_T) / T
    m_S, m_T = margin(z_S, labels), margin(z_T, labels)
    pair_S, pair_T = (torch.stack([F.logsigmoid(m), F.logsigmoid(-m)]) for m in (m_S, m_T))
    target = labels.where(labels != IGNORE, 0)[:, None]
    rest_S, rest_T = (F.log_softmax(z.scatter(1, target, -1e9), 1) for z in (z_S, z_T))
    loss = alpha * divergence(pair_S, pair_T, 0, "forward") + beta * divergence(rest_S, rest_T, 1, "forward")
    return T ** 2 * masked_mean(loss, labels != IGNORE)


def deit_loss(z_S, z_T, labels):
    """DeiT, 2012.12877, hard distillation: cross-entropy with the teacher's argmax on labelled pixels (one head)."""
    return cross_entropy(z_S, z_T.argmax(1).where(labels != IGNORE, IGNORE))


# method: its terms and their default weights. Baselines: CIRKD's scripts (cwd: its SegFormer script) and the papers'
# code. dkd is ours, chosen on CamVid val: at mdistiller's 1.0 its gradient in the encoder was 8 times cross-entropy's
METHODS = {
    "ce": {"ce": 1.0},
    "kd": {"ce": 1.0, "kd": 1.0},
    "cwd": {"ce": 1.0, "kd": 1.0, "cwd": 0.3},
    "skd": {"ce": 1.0, "kd": 1.0, "skd": 10.0},
    "ifvd": {"ce": 1.0, "kd": 1.0, "ifvd": 20.0},
    "at": {"ce": 1.0, "kd": 1.0, "at": 10000.0},
    "dist": {"ce": 1.0, "dist": 1.0},
    "dkd": {"ce": 1.0, "dkd": 0.03},
    "deit": {"ce": 0.5, "deit": 0.5},
    "fitnet": {"ce": 1.0, "fitnet": 10.0},
    "pdd_fitnet": {"pdd": 1.0, "fitnet": 10.0},
    "vlfd": {"ce": 1.0, "gb": 0.1, "pc": 0.1, "lc": 0.5},
    # paper: unstated; the release's numbers, in our units (true KLs, cosine affinity)
    "c2vkd": {"pdd": 1.0, "gb": 0.1, "pc": 0.1, "lc": 0.5},
}
