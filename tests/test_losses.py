"""The losses against their definitions, written out with loops over pixels and pairs, and their properties.

An oracle takes float64 tensors and returns its summands, so that an error is measured against what was
added up, not against a sum in which terms may have cancelled.
"""
import ast
import itertools
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import losses
import train
from student import Student, WithHeads
from teacher import AttentionPool, Teacher

IGNORE = 255
KL = ("forward", "reverse")


# ---------------------------------------------------------------- oracles: student, teacher, labels -> summands

def pixels(labels):
    return [p for p in itertools.product(*map(range, labels.shape)) if labels[p] != IGNORE]


def probabilities(z):
    return z.exp() / z.exp().sum()


def folded(p, y):
    return torch.stack([p[y], sum(p[k] for k in range(len(p)) if k != y)])


def kl_summands(student, teacher, kl):
    p, q = (teacher, student) if kl == "forward" else (student, teacher)
    return p * (p.log() - q.log())


def linguistic(S, T, _, kl):
    return torch.cat([kl_summands(probabilities(s), probabilities(t), kl) / len(S) for s, t in zip(S[:, :, 0, 0], T[:, :, 0, 0])])


def global_visual(S, T, labels, kl):
    B, _, h, w = S.shape
    everywhere = itertools.product(range(B), range(h), range(w))
    return torch.cat([kl_summands(probabilities(S[b, :, i, j]), probabilities(T[b, :, i, j]), kl) for b, i, j in everywhere]) / (B * h * w)


def patch(S, T, _):
    def rows(V):
        B, _, h, w = V.shape
        unit = [V[b, :, i, j] / V[b, :, i, j].square().sum().sqrt() for b, i, j in itertools.product(range(B), range(h), range(w))]
        return [u - u.mean() for u in unit]
    X, Y = rows(S), rows(T)
    every = itertools.product(range(len(X)), repeat=2)
    return torch.stack([(X[i].dot(X[j]) - Y[i].dot(Y[j])) ** 2 for i, j in every]) / len(X) ** 2


def pdd(S, T, labels, kl):
    out = []
    for b, i, j in pixels(labels):
        p, t = (folded(probabilities(z[b, :, i, j]), labels[b, i, j]) for z in (S, T))
        label = torch.tensor([1.0, 0.0])
        out.append(0.5 * kl_summands(p, (t + label) / 2, kl))
    return torch.cat(out) / len(out)


def cross_entropy(S, T, labels):
    return torch.stack([-probabilities(S[b, :, i, j])[labels[b, i, j]].log() for b, i, j in pixels(labels)]) / len(pixels(labels))


def kd(S, T, labels, temperature=1):
    at = [(b, slice(None), i, j) for b, i, j in pixels(labels)]
    return temperature ** 2 / len(at) * torch.cat(
        [kl_summands(probabilities(S[p] / temperature), probabilities(T[p] / temperature), "forward") for p in at])


def cwd(S, T, labels, temperature=4):
    B, K = S.shape[:2]
    out = []
    for b, k in itertools.product(range(B), range(K)):
        at = [(b, k, i, j) for c, i, j in pixels(labels) if c == b]
        if at:
            s, t = (probabilities(torch.stack([z[p] for p in at]) / temperature) for z in (S, T))
            out.append(kl_summands(s, t, "forward"))
    return temperature ** 2 / (B * K) * torch.cat(out)


def skd(S, T, labels):
    B, H, W = labels.shape
    out = []
    for b in range(B):
        windows = [[(i, j) for i in (y, y + 1) for j in (x, x + 1) if i < H and j < W and labels[b, i, j] != IGNORE]
                   for y in range(0, H, 2) for x in range(0, W, 2)]
        pooled = [[torch.stack([D[b, :, i, j] for i, j in window]).amax(0) for window in windows if window] for D in (S, T)]
        unit_S, unit_T = ([v / v.square().sum().sqrt() for v in vectors] for vectors in pooled)
        out += [(unit_S[i].dot(unit_S[j]) - unit_T[i].dot(unit_T[j])) ** 2 for i, j in itertools.product(range(len(unit_S)), repeat=2)]
    return torch.stack(out) / len(out)


def ifvd(S, T, labels):
    def variation(D, b, i, j):
        same = [D[c, :, k, l] for c, k, l in pixels(labels) if c == b and labels[c, k, l] == labels[b, i, j]]
        centre, f = sum(same) / len(same), D[b, :, i, j]
        return f.dot(centre) / (f.dot(f) * centre.dot(centre)).sqrt()
    return torch.stack([(variation(S, *p) - variation(T, *p)) ** 2 for p in pixels(labels)]) / len(pixels(labels))


def at(S, T, labels):
    def attention(D, image):
        a = torch.stack([D[b, :, i, j].square().mean() for b, i, j in image])
        return a / a.square().sum().sqrt()
    images = [[p for p in pixels(labels) if p[0] == b] for b in range(len(labels))]
    return torch.cat([(attention(S, image) - attention(T, image)) ** 2 for image in images if image]) / len(pixels(labels))


def dist(S, T, labels):
    P, Q = (torch.stack([probabilities(z[b, :, i, j]) for b, i, j in pixels(labels)]) for z in (S, T))

    def pearson(a, b):
        a, b = a - a.mean(), b - b.mean()
        return (a * b).sum() / ((a * a).sum() * (b * b).sum()).sqrt()

    pixel, classwise = ([1 - pearson(a, b) for a, b in zip(*pair)] for pair in ((P, Q), (P.T, Q.T)))
    return torch.cat([torch.stack(pixel) / len(pixel), torch.stack(classwise) / len(classwise)])


def dkd(S, T, labels, alpha=1, beta=8, temperature=4):
    out = []
    for b, i, j in pixels(labels):
        y = labels[b, i, j]
        others = [k for k in range(S.shape[1]) if k != y]
        p, t = (probabilities(z[b, :, i, j] / temperature) for z in (S, T))
        rest_p, rest_t = (v[others] / v[others].sum() for v in (p, t))
        out += [alpha * kl_summands(folded(p, y), folded(t, y), "forward"), beta * kl_summands(rest_p, rest_t, "forward")]
    return temperature ** 2 / len(pixels(labels)) * torch.cat(out)


def deit(S, T, labels):
    believed = labels.clone()
    for b, i, j in pixels(labels):
        believed[b, i, j] = max(range(T.shape[1]), key=lambda k: T[b, k, i, j])
    return cross_entropy(S, T, believed)


# ---------------------------------------------------------------- every term under one signature: (S, T, labels)

def lc_of_maps(S, T, labels, kl):
    return losses.linguistic_loss(S[:, :, 0, 0], T[:, :, 0, 0], kl)


def gb_of_maps(S, T, labels, kl):
    return losses.global_visual_loss(S, T, kl)


def pc_of_maps(S, T, labels):
    return losses.patch_loss(S, T)


def pdd_of_logits(S, T, labels, kl):
    return losses.pdd_loss(losses.margin(S, labels), losses.margin(T, labels), labels, kl)


def ce_of_logits(S, T, labels):
    return losses.cross_entropy(S, labels)


def ifvd_of_maps(S, T, labels):
    return losses.ifvd_loss(S, T, labels, CLASSES)


CLASSES = 4  # of the labels of feature losses, whose maps have channels instead of classes
FEATURES = {  # no labels
    "lc forward": (partial(lc_of_maps, kl="forward"), partial(linguistic, kl="forward")),
    "lc reverse": (partial(lc_of_maps, kl="reverse"), partial(linguistic, kl="reverse")),
    "gb forward": (partial(gb_of_maps, kl="forward"), partial(global_visual, kl="forward")),
    "gb reverse": (partial(gb_of_maps, kl="reverse"), partial(global_visual, kl="reverse")),
    "pc": (pc_of_maps, patch),
}
MASKED_FEATURES = {"skd": (losses.skd_loss, skd), "ifvd": (ifvd_of_maps, ifvd), "at": (losses.at_loss, at)}
LOGITS = {
    "pdd forward": (partial(pdd_of_logits, kl="forward"), partial(pdd, kl="forward")),
    "pdd reverse": (partial(pdd_of_logits, kl="reverse"), partial(pdd, kl="reverse")),
    "ce": (ce_of_logits, cross_entropy),
    "kd": (losses.kd_loss, kd),
    "kd T=2": (partial(losses.kd_loss, T=2.0), partial(kd, temperature=2)),
    "cwd": (losses.cwd_loss, cwd),
    "dist": (losses.dist_loss, dist),
    "dkd": (losses.dkd_loss, dkd),
    "deit": (losses.deit_loss, deit),
}
MASKED = MASKED_FEATURES | LOGITS
TERMS = FEATURES | MASKED
SHAPES = [(2, 5, 3, 4), (1, 7, 2, 3), (3, 2, 3, 2), (2, 9, 1, 4)]  # N > C, batch of one, K = 2, N < C


def inputs(name, shape=(2, 5, 3, 4), dtype=torch.float64, seed=0):
    """Random student and teacher maps, and labels of which one is ignored and two classes occur twice."""
    torch.manual_seed(seed)
    B, C, H, W = shape
    S = 2 * torch.randn(shape, dtype=dtype)
    T = 2 * torch.randn(B, C + 3 * (name in MASKED_FEATURES), H, W, dtype=dtype)  # these do not need equal channels
    labels = torch.randint(C if name in LOGITS else CLASSES, (B, H, W))
    labels[torch.rand(B, H, W) < 0.2] = IGNORE
    labels.view(-1)[:5] = torch.tensor([IGNORE, 0, 1, 0, 1])
    return S, T, labels


def value_and_gradient(loss, S, *rest):
    S = S.detach().requires_grad_()
    value = loss(S, *rest)
    return value.detach(), torch.autograd.grad(value, S)[0]


def close(a, b, tolerance, scale=None):
    return bool((a - b).abs().max() <= tolerance * (b.abs().max() if scale is None else scale))


# ---------------------------------------------------------------- values and gradients

@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", TERMS)
def test_value_and_gradient_are_those_of_the_definition(name, shape, dtype, tolerance):
    loss, oracle = TERMS[name]
    S, T, labels = inputs(name, shape, dtype)
    value, gradient = value_and_gradient(loss, S, T, labels)
    exact = S.double().requires_grad_()
    summands = oracle(exact, T.double(), labels)
    wanted, = torch.autograd.grad(summands.sum(), exact)
    assert value.dtype == dtype and value.shape == ()
    assert close(value, summands.sum(), tolerance, summands.abs().sum())
    assert wanted.any() and close(gradient, wanted, tolerance)


@pytest.mark.parametrize("name", MASKED)
def test_an_image_without_a_labelled_pixel_adds_nothing_undefined(name):
    loss, oracle = TERMS[name]
    S, T, labels = inputs(name)
    labels[1] = IGNORE
    value, gradient = value_and_gradient(loss, S, T, labels)
    assert close(value, oracle(S, T, labels).sum(), 1e-10)
    assert gradient[0].any() and not gradient[1].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", MASKED)
def test_a_batch_without_a_labelled_pixel_gives_zero_and_a_zero_gradient(name, dtype):
    S, T, labels = inputs(name, dtype=dtype)
    value, gradient = value_and_gradient(MASKED[name][0], S, T, torch.full_like(labels, IGNORE))
    assert value == 0 and torch.equal(gradient, torch.zeros_like(S))


@pytest.mark.parametrize("name", LOGITS)
def test_logits_of_60_give_finite_losses_and_gradients(name):
    S, T, labels = inputs(name, dtype=torch.float32)
    value, gradient = value_and_gradient(LOGITS[name][0], 60 * S.sign(), 60 * T.sign(), labels)
    assert value.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("size", (1, 60), ids=("small logits", "logits of 60"))
@pytest.mark.parametrize("kl", KL)
def test_pdd_gradient_in_the_target_logit(kl, size):
    """forward 0.5 (s - q_t), reverse 0.5 s (1 - s) (logit s - logit q_t), which vanishes at a wrong pixel."""
    S, T, labels = inputs("pdd forward", dtype=torch.float32)
    S, T = (S, T) if size == 1 else (size * S.sign(), size * T.sign())
    _, gradient = value_and_gradient(pdd_of_logits, S, T, labels, kl)
    for b, i, j in pixels(labels):
        y = labels[b, i, j]
        (s, s_rest), (t, t_rest) = (folded(probabilities(z[b, :, i, j].double()), y) for z in (S, T))
        q, q_rest = (t + 1) / 2, t_rest / 2
        wanted = 0.5 * (s - q) if kl == "forward" else 0.5 * s * s_rest * ((s / s_rest).log() - (q / q_rest).log())
        assert abs(gradient[b, y, i, j] * len(pixels(labels)) - wanted) < 1e-6 * max(1, abs(wanted))


@pytest.mark.parametrize("name", TERMS)
def test_bfloat16_under_autocast_is_computed_in_float32(name):
    S, T, labels = inputs(name, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        value = TERMS[name][0](S, T, labels)
        nothing = TERMS[name][0](S, T, torch.full_like(labels, IGNORE))
    assert value.dtype == nothing.dtype == torch.float32
    assert value == TERMS[name][0](S.float(), T.float(), labels)


@pytest.mark.parametrize("dtype, wanted", [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)], ids=str)
def test_upsampling_raises_half_precision_and_keeps_float64(dtype, wanted):
    x = torch.randn(1, 2, 3, 3, dtype=dtype)
    assert torch.equal(losses.upsample(x, (5, 7)), F.interpolate(x.to(wanted), (5, 7), mode="bilinear", align_corners=False))


# ---------------------------------------------------------------- properties

@pytest.mark.parametrize("name", [n for n in TERMS if n.split()[0] not in ("pdd", "ce", "deit")])
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(name):
    S, _, labels = inputs(name)
    value, gradient = value_and_gradient(TERMS[name][0], S, S.clone(), labels)
    assert abs(value) < 1e-12 and gradient.abs().max() < 1e-12


@pytest.mark.parametrize("kl", KL)
def test_a_student_at_the_mixed_target_has_no_pdd_and_no_gradient(kl):
    _, T, labels = inputs("pdd forward")
    m_T = losses.margin(T, labels)
    q_t = (m_T.sigmoid() + 1) / 2
    value, gradient = value_and_gradient(losses.pdd_loss, q_t.logit(), m_T, labels, kl)
    assert abs(value) < 1e-12 and gradient.abs().max() < 1e-12


def test_forward_pdd_is_half_of_cross_entropy_with_the_mixed_target_less_its_entropy():
    S, T, labels = inputs("pdd forward")
    valid = labels != IGNORE
    m_S, m_T = losses.margin(S, labels), losses.margin(T, labels)
    q_t = (m_T[valid].sigmoid() + 1) / 2
    entropy = F.binary_cross_entropy(q_t, q_t)
    wanted = 0.5 * (F.binary_cross_entropy_with_logits(m_S[valid], q_t) - entropy)
    assert close(losses.pdd_loss(m_S, m_T, labels), wanted, 1e-12)


@pytest.mark.parametrize("name", [n for n in TERMS if n not in ("pc", *MASKED_FEATURES)])
def test_a_constant_added_to_all_logits_changes_nothing(name):
    S, T, labels = inputs(name)
    loss = TERMS[name][0]
    assert close(loss(S + 3.5, T - 7.25, labels), loss(S, T, labels), 1e-12)


@pytest.mark.parametrize("name", ["pc", *MASKED_FEATURES])
def test_a_factor_on_all_features_changes_nothing(name):
    S, T, labels = inputs(name)
    loss = TERMS[name][0]
    assert close(loss(3.5 * S, 7.25 * T, labels), loss(S, T, labels), 1e-12)


@pytest.mark.parametrize("name", TERMS)
def test_the_order_of_the_images_changes_nothing(name):
    S, T, labels = inputs(name, (3, 5, 3, 4))
    loss, order = TERMS[name][0], [2, 0, 1]
    assert close(loss(S[order], T[order], labels[order]), loss(S, T, labels), 1e-12)


@pytest.mark.parametrize("kl", KL)
def test_the_order_of_the_nontarget_classes_changes_nothing_even_for_one_model_alone(kl):
    S, T, labels = inputs("pdd forward")
    moved = S.clone()
    for b, i, j in pixels(labels):
        others = [k for k in range(S.shape[1]) if k != labels[b, i, j]]
        moved[b, others, i, j] = S[b, others[1:] + others[:1], i, j]
    assert not torch.equal(moved, S)
    assert close(pdd_of_logits(moved, T, labels, kl), pdd_of_logits(S, T, labels, kl), 1e-12)


@pytest.mark.parametrize("name", MASKED)
def test_ignored_pixels_have_no_influence_and_no_gradient(name):
    S, T, labels = inputs(name)
    ignored = (labels == IGNORE)[:, None]
    value, gradient = value_and_gradient(MASKED[name][0], S, T, labels)
    assert not gradient.masked_select(ignored).any() and gradient.any()
    other, _ = value_and_gradient(MASKED[name][0], S.masked_fill(ignored, 9), T.masked_fill(ignored, -9), labels)
    assert close(other, value, 1e-12)


def test_the_patch_loss_does_not_cancel_where_the_student_is_close_to_its_teacher():
    S, T, _ = inputs("pc", dtype=torch.float32)
    S = T + 1e-3 * S
    assert close(losses.patch_loss(S, T), patch(S.double(), T.double(), None).sum(), 1e-3)


# ---------------------------------------------------------------- total and weights

def test_total_is_the_weighted_sum_of_equation_10():
    terms = {"pdd": torch.tensor(0.7), "gb": torch.tensor(3.0), "pc": torch.tensor(0.2), "lc": torch.tensor(1.1)}
    total = losses.total_loss(terms, losses.METHODS["c2vkd"])
    assert total.item() == pytest.approx(0.7 + 0.1 * 3.0 + 0.1 * 0.2 + 0.5 * 1.1)


@pytest.mark.filterwarnings("ignore:reduction")  # the mean over elements is what the release takes
def test_released_weights_reproduce_the_released_objective():
    S, T, labels = inputs("pdd forward")
    V_S, V_T, _ = inputs("gb", (2, 6, 3, 4))
    e_S, e_T = torch.randn(2, 2, 8, dtype=torch.float64)
    terms = {"pdd": pdd_of_logits(S, T, labels, "forward"), "gb": losses.global_visual_loss(V_S, V_T),
             "pc": losses.patch_loss(V_S, V_T), "lc": losses.linguistic_loss(e_S, e_T)}
    mean = torch.nn.KLDivLoss(reduction="mean", log_target=True)

    def affinity(V):
        rows = F.normalize(V.permute(0, 2, 3, 1).reshape(-1, V.shape[1]), dim=1)
        rows = rows - rows.mean(1, keepdim=True)
        return rows @ rows.T / (V.shape[1] - 1)

    released = {"pdd": terms["pdd"],
                "gb": 0.1 * mean(V_S.log_softmax(1), V_T.log_softmax(1)),
                "pc": 0.1 * F.mse_loss(affinity(V_S), affinity(V_T)),
                "lc": 0.5 * mean(e_S.log_softmax(1), e_T.log_softmax(1))}
    weights = losses.released_weights(c_teacher=6, embedding=8)
    assert all(close(weights[name] * terms[name], released[name], 1e-12) for name in terms)
    assert close(losses.total_loss(terms, weights), sum(released.values()), 1e-12)


# ---------------------------------------------------------------- the terms in the networks

CROP, K = 64, 5


@pytest.fixture
def networks():
    torch.manual_seed(0)
    net = WithHeads(Student("mit_nano", K), Teacher("deeplabv3_resnet10", K).channels).train()
    teacher = Teacher("deeplabv3_resnet10", K)
    return net, teacher, AttentionPool(teacher.channels, CROP // 32)


def batch():
    labels = torch.randint(K, (2, CROP, CROP))
    labels[:, :5] = IGNORE
    return torch.randn(2, 3, CROP, CROP), labels


@pytest.mark.parametrize("kl", KL)
def test_each_term_reads_the_maps_of_its_equation(kl):
    S, T, labels = inputs("pdd forward", (2, 3, 2, 2))
    labels = labels.repeat_interleave(16, 1).repeat_interleave(16, 2)  # 32x32, hence V of 2x2
    A_v, F_T = torch.randn(2, 2, 6, 3, 3, dtype=torch.float64)
    e_S, e_T = torch.randn(2, 2, 8, dtype=torch.float64)
    unused = torch.full((2, 1, 1, 1), torch.nan)
    terms = train.c2vkd_terms(lambda x: (S, unused, unused, A_v, e_S), lambda x: (T, F_T, unused),
                              lambda f: e_T if f is F_T else unused, None, labels, kl)
    resize = partial(F.interpolate, mode="bilinear", align_corners=False)
    z_S, z_T, V_S, V_T = resize(S, (32, 32)), resize(T, (32, 32)), resize(A_v, (2, 2)), resize(F_T, (2, 2))
    wanted = {"gb": global_visual(V_S, V_T, None, kl), "pc": patch(V_S, V_T, None),
              "lc": linguistic(e_S[:, :, None, None], e_T[:, :, None, None], None, kl), "pdd": pdd(z_S, z_T, labels, kl)}
    assert set(terms) == set(wanted)
    for name, summands in wanted.items():
        assert close(terms[name], summands.sum(), 1e-10, summands.abs().sum()), name


@pytest.mark.parametrize("method", [m for m in losses.METHODS if m != "c2vkd"])
def test_each_baseline_reads_its_maps_on_the_grid_of_crop_over_8(method):
    torch.manual_seed(0)
    z_S, z_T = torch.randn(2, 2, CLASSES, 2, 2, dtype=torch.float64)
    D_S, D_T = torch.randn(2, 2, 6, 2, 2, dtype=torch.float64)
    few = inputs("pdd forward", (2, CLASSES, 4, 4))[2]
    labels = few.repeat_interleave(8, 1).repeat_interleave(8, 2)  # 32x32
    terms = train.baseline_terms(lambda x: (z_S, None, D_S, None, None), lambda x: (z_T, D_T * torch.nan, D_T), None, labels,
                                 losses.METHODS[method], CLASSES)
    resize = partial(F.interpolate, mode="bilinear", align_corners=False)
    wanted = {name: TERMS[name][1](*(resize(x, (4, 4)) for x in ((D_S, D_T) if name in MASKED_FEATURES else (z_S, z_T))), few)
              for name in losses.METHODS[method] if name != "ce"}
    wanted["ce"] = cross_entropy(resize(z_S, (32, 32)), None, labels)
    assert set(terms) == set(wanted)
    for name, summands in wanted.items():
        assert close(terms[name], summands.sum(), 1e-10, summands.abs().sum()), name


def test_each_term_reaches_exactly_its_parameters(networks):
    net, teacher, pool = networks  # not frozen: the terms themselves must keep gradients away from them
    terms = train.c2vkd_terms(net, teacher, pool, *batch(), "forward")
    parts = {"encoder": net.student.encoder, "decoder": net.student.decoder, "A_v": net.heads.A_v, "A_l": net.heads.A_l,
             "teacher": teacher, "pool": pool}
    wanted = {"pdd": {"encoder", "decoder"}, "gb": {"encoder", "A_v"}, "pc": {"encoder", "A_v"}, "lc": {"encoder", "A_l"}}
    assert set(terms) == set(wanted)
    for name, term in terms.items():
        for part, module in parts.items():
            gradients = torch.autograd.grad(term, list(module.parameters()), retain_graph=True, allow_unused=True)
            if part in wanted[name]:
                assert all(g is not None for g in gradients) and any(g.any() for g in gradients), (name, part)
            else:
                assert all(g is None for g in gradients), (name, part)


def test_training_leaves_teacher_and_pool_bitwise_unchanged(networks):
    net, teacher, pool = networks
    teacher.freeze(), pool.requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    before = {k: v.clone() for m in networks for k, v in m.state_dict(prefix=type(m).__name__ + ".").items()}
    for _ in range(3):
        loss = losses.total_loss(train.c2vkd_terms(net, teacher, pool, *batch(), "forward"), losses.METHODS["c2vkd"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    changed = {k.split(".")[0] for m in networks for k, v in m.state_dict(prefix=type(m).__name__ + ".").items()
               if not torch.equal(v, before[k])}
    assert changed == {"WithHeads"}


@pytest.mark.parametrize("method", [m for m in losses.METHODS if m != "ce"])
def test_students_of_all_methods_start_from_the_weights_of_the_student_alone(method, networks):
    data = SimpleNamespace(classes=["a"] * K, palette=[(0, 0, 0)] * K, pairs={"train": [], "val": []})

    def start(method):
        args = train.parse_options(["--method", method, "--gpus", "0", "--seed", "3"])
        args.device = torch.device("cpu")
        return train.build_student_stage(args, data, *networks[1:]).network.state_dict()

    alone, taught = start("ce"), start(method)
    assert alone.keys() == taught.keys() and all(torch.equal(alone[k], taught[k]) for k in alone)


def test_gradient_norms_are_those_of_a_backward_pass(networks):
    net, teacher, pool = networks
    terms = train.c2vkd_terms(net, teacher, pool, *batch(), "forward")
    norms = train.gradient_norms(terms, net.student.encoder)
    for name, term in terms.items():
        net.zero_grad()
        term.backward(retain_graph=True)
        wanted = torch.cat([p.grad.flatten() for p in net.student.encoder.parameters()]).double().norm().item()
        assert norms[name] == pytest.approx(wanted, rel=1e-3)  # float32 sums of a million squares


# ---------------------------------------------------------------- the ledger

def test_every_gap_marked_in_the_code_is_in_the_ledger_and_conversely():
    root = Path(losses.__file__).parent
    marked = set()
    for path in root.glob("*.py"):
        text = path.read_text()
        body = ast.parse(text).body
        for number, line in enumerate(text.splitlines(), 1):
            if "paper: unstated" in line:
                statement = next(s for s in body if number <= s.end_lineno)  # around the mark or right after it
                name = statement.targets[0].id if isinstance(statement, ast.Assign) else statement.name
                marked.add(f"{path.name}:{name}")
    ledger = (root / "README.md").read_text().split("\n## Ledger", 1)[1].split("\n## ", 1)[0]
    assert marked and marked == set(re.findall(r"`(\w+\.py:\w+)`", ledger))
