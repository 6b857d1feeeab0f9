"""The losses against their definitions, loops over pixels and pairs.

An oracle takes float64 tensors and returns its summands, so that an error is measured against what
was added up, not against a sum in which terms may have cancelled.
"""
import ast
import itertools
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import losses
from losses import Method, Outputs
from student import VARIANTS, Student, StudentWithHeads
from teacher import TEACHERS, AttentionPool, Teacher, pool_grid

IGNORE = 255


# ---------------------------------------------------------------- oracles
# Each takes student, teacher and labels, and returns the summands.

def at_places(V):
    """The vectors of a map, image by image, row by row."""
    B, _, h, w = V.shape
    return [V[b, :, i, j] for b, i, j in itertools.product(range(B), range(h), range(w))]


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
    pairs = zip(S[:, :, 0, 0], T[:, :, 0, 0])
    return torch.cat([kl_summands(probabilities(s), probabilities(t), kl) / len(S)
                      for s, t in pairs])


def global_visual(S, T, labels, kl):
    pairs = list(zip(at_places(S), at_places(T)))
    found = [kl_summands(probabilities(s), probabilities(t), kl) for s, t in pairs]
    return torch.cat(found) / len(pairs)


def patch(S, T, _):
    def rows(V):
        unit = [v / v.square().sum().sqrt() for v in at_places(V)]
        return [u - u.mean() for u in unit]
    X, Y = rows(S), rows(T)
    every = itertools.product(range(len(X)), repeat=2)
    return torch.stack([(X[i].dot(X[j]) - Y[i].dot(Y[j])) ** 2 for i, j in every]) / len(X) ** 2


def fitnet(S, T, _):
    every = [(s - t) ** 2 for s, t in zip(S.flatten(), T.flatten())]
    return torch.stack(every) / len(every)


def pdd(S, T, labels, kl, everywhere=True):
    out = []
    for b, i, j in pixels(labels):
        p, t = (folded(probabilities(z[b, :, i, j]), labels[b, i, j]) for z in (S, T))
        label = torch.tensor([1.0, 0.0])
        if t[0] > 0.5 or everywhere:
            out.append(0.5 * kl_summands(p, (t + label) / 2, kl))
        else:
            out.append(-0.5 * p[:1].log())
    return torch.cat(out) / len(out)


def cross_entropy(S, T, labels):
    found = [-probabilities(S[b, :, i, j])[labels[b, i, j]].log() for b, i, j in pixels(labels)]
    return torch.stack(found) / len(found)


def kd(S, T, labels, temperature=1):
    at = [(b, slice(None), i, j) for b, i, j in pixels(labels)]
    pairs = [(probabilities(S[p] / temperature), probabilities(T[p] / temperature)) for p in at]
    found = [kl_summands(s, t, "forward") for s, t in pairs]
    return temperature ** 2 / len(at) * torch.cat(found)


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
        windows = [[(i, j) for i in (y, y + 1) for j in (x, x + 1)
                    if i < H and j < W and labels[b, i, j] != IGNORE]
                   for y in range(0, H, 2) for x in range(0, W, 2)]
        pooled = [[torch.stack([D[b, :, i, j] for i, j in window]).amax(0)
                   for window in windows if window] for D in (S, T)]
        X, Y = ([v / v.square().sum().sqrt() for v in vectors] for vectors in pooled)
        every = itertools.product(range(len(X)), repeat=2)
        out += [(X[i].dot(X[j]) - Y[i].dot(Y[j])) ** 2 for i, j in every]
    return torch.stack(out) / len(out)


def ifvd(S, T, labels):
    def variation(D, b, i, j):
        same = [D[c, :, k, l] for c, k, l in pixels(labels)
                if c == b and labels[c, k, l] == labels[b, i, j]]
        centre, f = sum(same) / len(same), D[b, :, i, j]
        return f.dot(centre) / (f.dot(f) * centre.dot(centre)).sqrt()
    found = [(variation(S, *p) - variation(T, *p)) ** 2 for p in pixels(labels)]
    return torch.stack(found) / len(found)


def cirkd(S, T, labels, temperature=0.1):
    """KL of the affinity rows of every labelled pixel to the labelled pixels of each image."""
    images = [[p for p in pixels(labels) if p[0] == b] for b in range(len(labels))]
    out = []
    for mine, other in itertools.product([i for i in images if i], repeat=2):
        for b, i, j in mine:
            rows = []
            for D in (S, T):
                f = D[b, :, i, j]
                cosines = [f.dot(g) / (f.dot(f) * g.dot(g)).sqrt()
                           for g in (D[c, :, k, l] for c, k, l in other)]
                rows.append(probabilities(torch.stack(cosines) / temperature))
            out.append(kl_summands(*rows, "forward"))
    return torch.cat(out) / (len(pixels(labels)) * len([i for i in images if i]))


def dist(S, T, labels):
    P, Q = (torch.stack([probabilities(z[b, :, i, j]) for b, i, j in pixels(labels)])
            for z in (S, T))

    def pearson(a, b):
        a, b = a - a.mean(), b - b.mean()
        return (a * b).sum() / (a.norm() * b.norm() + 1e-8)

    pixel, classwise = ([1 - pearson(a, b) for a, b in zip(*pair)] for pair in ((P, Q), (P.T, Q.T)))
    return torch.cat([torch.stack(pixel) / len(pixel), torch.stack(classwise) / len(classwise)])


def dkd(S, T, labels, alpha=1, beta=8, temperature=4):
    out = []
    for b, i, j in pixels(labels):
        y = labels[b, i, j]
        others = [k for k in range(S.shape[1]) if k != y]
        p, t = (probabilities(z[b, :, i, j] / temperature) for z in (S, T))
        rest_p, rest_t = (v[others] / v[others].sum() for v in (p, t))
        out += [alpha * kl_summands(folded(p, y), folded(t, y), "forward"),
                beta * kl_summands(rest_p, rest_t, "forward")]
    return temperature ** 2 / len(pixels(labels)) * torch.cat(out)


# ---------------------------------------------------------------- every term as (S, T, labels)

def lc_of_maps(S, T, labels, kl):
    return losses.linguistic_loss(S[:, :, 0, 0], T[:, :, 0, 0], kl)


def gb_of_maps(S, T, labels, kl):
    return losses.global_visual_loss(S, T, kl)


K = 5
CLASSES = 4  # of the labels of feature losses, whose maps have channels instead of classes
FEATURES = {  # no labels
    "lc forward": (partial(lc_of_maps, kl="forward"), partial(linguistic, kl="forward")),
    "lc reverse": (partial(lc_of_maps, kl="reverse"), partial(linguistic, kl="reverse")),
    "gb forward": (partial(gb_of_maps, kl="forward"), partial(global_visual, kl="forward")),
    "gb reverse": (partial(gb_of_maps, kl="reverse"), partial(global_visual, kl="reverse")),
    "pc": (lambda S, T, labels: losses.patch_loss(S, T), patch),
    "fitnet": (lambda S, T, labels: losses.fitnet_loss(S, T), fitnet),
}
MASKED_FEATURES = {
    "skd": (losses.skd_loss, skd),
    "ifvd": (lambda S, T, labels: losses.ifvd_loss(S, T, labels, CLASSES), ifvd),
    "cirkd": (losses.cirkd_loss, cirkd),
}
LOGITS = {
    "pdd forward": (partial(losses.pdd_loss, kl="forward"), partial(pdd, kl="forward")),
    "pdd reverse": (partial(losses.pdd_loss, kl="reverse"), partial(pdd, kl="reverse")),
    "pdd where right": (losses.pdd_where_right, partial(pdd, kl="forward", everywhere=False)),
    "ce": (lambda S, T, labels: losses.cross_entropy(S, labels), cross_entropy),
    "kd": (losses.kd_loss, kd),
    "kd T=2": (partial(losses.kd_loss, temperature=2.0), partial(kd, temperature=2)),
    "cwd": (losses.cwd_loss, cwd),
    "dist": (losses.dist_loss, dist),
    "dkd": (losses.dkd_loss, dkd),
}
MASKED = MASKED_FEATURES | LOGITS
TERMS = FEATURES | MASKED
# N > C, batch of one, K = 2, N < C
SHAPES = [(2, 5, 3, 4), (1, 7, 2, 3), (3, 2, 3, 2), (2, 9, 1, 4)]


def inputs(name, shape=(2, 5, 3, 4), dtype=torch.float64):
    """Random maps, and labels of which one is ignored and two classes occur twice."""
    torch.manual_seed(0)
    B, C, H, W = shape
    S = 2 * torch.randn(shape, dtype=dtype)
    more = 3 * (name in MASKED_FEATURES)  # these do not need equal channels
    T = 2 * torch.randn(B, C + more, H, W, dtype=dtype)
    labels = torch.randint(C if name in LOGITS else CLASSES, (B, H, W))
    labels[torch.rand(B, H, W) < 0.2] = IGNORE
    labels.view(-1)[:5] = torch.tensor([IGNORE, 0, 1, 0, 1])
    return S, T, labels


resize = partial(F.interpolate, mode="bilinear", align_corners=False)


def value_and_gradient(loss, S, *rest):
    S = S.detach().requires_grad_()
    value = loss(S, *rest)
    return value.detach(), torch.autograd.grad(value, S)[0]


def close(a, b, tolerance, scale=None):
    return bool((a - b).abs().max() <= tolerance * (b.abs().max() if scale is None else scale))


# ---------------------------------------------------------------- values and gradients

def check(name, S, T, labels, tolerance):
    loss, oracle = TERMS[name]
    value, gradient = value_and_gradient(loss, S, T, labels)
    exact = S.double().requires_grad_()
    summands = oracle(*(resize(x, labels.shape[1:]) for x in (exact, T.double())), labels)
    wanted, = torch.autograd.grad(summands.sum(), exact)
    assert value.dtype == S.dtype and value.shape == ()
    assert close(value, summands.sum(), tolerance, summands.abs().sum())
    assert wanted.any() and close(gradient, wanted, tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", TERMS)
def test_value_and_gradient_are_those_of_the_definition(name, shape):
    check(name, *inputs(name, shape), 1e-10)
    check(name, *inputs(name, shape, torch.float32), 1e-5)


@pytest.mark.parametrize("name", LOGITS)
def test_logits_of_100_lose_no_digits(name):
    S, T, labels = inputs(name, dtype=torch.float32)
    check(name, 100 * S.sign(), 100 * T.sign(), labels, 1e-5)  # exp(100) is no float32


@pytest.mark.parametrize("name", MASKED)
def test_an_image_without_a_labelled_pixel_adds_nothing(name):
    S, T, labels = inputs(name)
    labels[1] = IGNORE
    check(name, S, T, labels, 1e-10)


@pytest.mark.parametrize("name", MASKED)
def test_a_batch_without_a_labelled_pixel_gives_zero_and_a_zero_gradient(name):
    S, T, labels = inputs(name)
    value, gradient = value_and_gradient(MASKED[name][0], S, T, torch.full_like(labels, IGNORE))
    assert value == 0 and torch.equal(gradient, torch.zeros_like(S))


@pytest.mark.parametrize("name", TERMS)
def test_bfloat16_under_autocast_is_computed_in_float32(name):
    loss, _ = TERMS[name]
    S, T, labels = inputs(name, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(S.requires_grad_(), T, labels)
        nothing = loss(S, T, torch.full_like(labels, IGNORE))
    gradient, = torch.autograd.grad(value, S)
    wanted, wanted_gradient = value_and_gradient(loss, S.float(), T.float(), labels)
    assert value.dtype == nothing.dtype == torch.float32 and value == wanted
    assert close(gradient.float(), wanted_gradient, 2 ** -8)


def test_a_teacher_that_is_just_not_right_leaves_its_pixels_to_the_labels():
    z_S, z_T, labels = torch.randn(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), torch.ones(1, 3, 4).long()
    wanted = losses.cross_entropy(z_S, labels) / 2
    assert close(losses.pdd_where_right(z_S, z_T, labels), wanted, 1e-6)


# ---------------------------------------------------------------- arithmetic

class TF32(TorchDispatchMode):
    """Cuts what enters a matrix product to TF32's 10 mantissa bits, forwards and backwards."""
    products = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.overloadpacket == torch.ops.aten.mm:
            self.products += 1
            bits = [x.contiguous().view(torch.int32) for x in args]
            args = [(x & ~0x1FFF).view(torch.float32) for x in bits]
        return op(*args, **(kwargs or {}))


def test_the_patch_loss_does_not_amplify_the_rounding_of_tf32():
    torch.manual_seed(0)
    S, T = torch.randn(2, 2, 64, 8, 8)
    S = T + 0.1 * S  # forms that subtract large products lose their digits here
    wanted, wanted_gradient = value_and_gradient(losses.patch_loss, S.double(), T.double())
    with TF32() as mode:
        value, gradient = value_and_gradient(losses.patch_loss, S, T)
    assert mode.products == 9  # three, and two for the gradient of each
    # measured at C = 64 ... 512 and 128 ... 8192 patches: 1.4e-3 and 1.8e-3
    assert abs(value - wanted) < 4.2e-3 * wanted
    assert (gradient - wanted_gradient).norm() < 5.4e-3 * wanted_gradient.norm()


@pytest.mark.parametrize("name", ["pdd forward", "pdd where right", "ce"])
def test_coarse_logits_are_resized_to_the_labels(name):
    S, T, _ = inputs(name, (3, 5, 3, 4))
    labels = inputs(name, (3, 5, 11, 16))[2]
    check(name, S, T, labels, 1e-10)


@pytest.mark.parametrize("value, derivative", [
    (losses.margin_of_rows, losses.derivative_of_margin),
    (losses.cross_entropy_of_rows, losses.derivative_of_cross_entropy)], ids=["margin", "ce"])
def test_the_derivative_of_each_pixel_is_that_of_its_value(value, derivative):
    S, labels = inputs("ce", (2, 3, 2, 3))[0], inputs("ce", (2, 3, 3, 4))[2]
    assert torch.autograd.gradcheck(
        lambda z: losses.FullSize.apply(z, labels, value, derivative), S.requires_grad_())


def test_networks_of_unequal_batches_are_refused():
    z, labels = torch.randn(3, 5, 2, 2), torch.randint(5, (2, 4, 4))
    with pytest.raises(ValueError, match="zip"):
        losses.margin(z, labels)


# ---------------------------------------------------------------- total and weights

def test_total_is_the_weighted_sum_of_equation_10():
    terms = {"pdd": 0.7, "gb": 3.0, "pc": 0.2, "lc": 1.1}
    total = losses.total_loss(terms, losses.METHODS["c2vkd"].weights)
    assert total == pytest.approx(0.7 + 1 * 3.0 + 2 * 0.2 + 0.2 * 1.1)
    with pytest.raises(ValueError, match=r"the terms are \['ce'\], but the weights \['ce', 'kd'\]"):
        losses.total_loss({"ce": 1.0}, {"ce": 1.0, "kd": 1.0})


@pytest.mark.filterwarnings("ignore:reduction")  # the mean over elements is what the release takes
def test_weights_that_reproduce_the_released_objective():
    C, embedding = 6, 8
    V_S, V_T, _ = inputs("gb", (2, C, 3, 4))
    e_S, e_T = torch.randn(2, 2, embedding, dtype=torch.float64)
    mean = torch.nn.KLDivLoss(reduction="mean", log_target=True)

    def affinity(V):
        rows = F.normalize(V.permute(0, 2, 3, 1).reshape(-1, C), dim=1)
        rows = rows - rows.mean(1, keepdim=True)
        return rows @ rows.T / (C - 1)

    pairs = {"gb": (losses.global_visual_loss(V_S, V_T) / C,
                    mean(V_S.log_softmax(1), V_T.log_softmax(1))),
             "pc": (losses.patch_loss(V_S, V_T) / (C - 1) ** 2,
                    F.mse_loss(affinity(V_S), affinity(V_T))),
             "lc": (losses.linguistic_loss(e_S, e_T) / embedding,
                    mean(e_S.log_softmax(1), e_T.log_softmax(1)))}
    assert all(close(ours, released, 1e-12) for ours, released in pairs.values())


# ---------------------------------------------------------------- what each method reads

def made_up_outputs(needs):
    """S, T and labels (32x32, in cells of 8x8), without the maps that are not needed.

    F^S is never read, but for its size.
    """
    torch.manual_seed(0)
    z_S = torch.randn(2, CLASSES, 16, 16, dtype=torch.float64)  # fine, as mit_nano's
    z_T = torch.randn(2, CLASSES, 2, 2, dtype=torch.float64)
    D_S = torch.randn(2, 6, 16, 16, dtype=torch.float64)
    D_T = torch.randn(2, 6, 2, 2, dtype=torch.float64)
    A_v = torch.randn(2, 6, 2, 3, dtype=torch.float64)
    F_T = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    e_S, e_T = torch.randn(2, 2, 8, dtype=torch.float64)
    S = Outputs(z_S, torch.full((2, 1, 2, 3), torch.nan), D_S, A_v if "A_v" in needs else None,
                e_S if "A_l" in needs else None)
    T = Outputs(z_T, F_T if "A_v" in needs else None, D_T, None, e_T if "A_l" in needs else None)
    if "earlier" in needs:
        S = S._replace(earlier=(torch.randn(2, 3, 4, 5, dtype=torch.float64),))
        T = T._replace(earlier=(3 + 2 * torch.randn(2, 3, 9, 8, dtype=torch.float64),))
    few = inputs("pdd forward", (2, CLASSES, 4, 4))[2]
    labels = few.repeat_interleave(8, 1).repeat_interleave(8, 2)
    return S, T if "teacher" in needs else None, labels, few


def visual_pairs(S, T):
    """V^S and V^T of each depth by definition: twice the student's grid, at most the teacher's."""
    if not S.earlier:
        return [(resize(S.projected, (4, 5)), resize(T.feature, (4, 5)))]
    maps = zip((S.earlier[0], S.projected), (T.earlier[0], T.feature), ((8, 8), (4, 5)))
    pairs = []
    for map_S, map_T, grid in maps:
        deviation = (map_T.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
        standardised = (map_T - map_T.mean((0, 2, 3), keepdim=True)) / deviation
        pairs.append((resize(map_S, grid), resize(standardised, grid)))
    return pairs


def terms_by_definition(method, S, T, labels, few):
    """Eq. 9 and cross-entropy at full size, Eq. 4 and 7 on V's grid, others' terms at crop/8."""
    kl = "reverse" if method == "c2vkd_reverse" else "forward"
    wanted = {}
    for name in losses.METHODS[method].weights:
        if name == "ce":
            wanted[name] = cross_entropy(resize(S.logits, (32, 32)), None, labels)
        elif name == "pdd":
            wanted[name] = pdd(resize(S.logits, (32, 32)), resize(T.logits, (32, 32)), labels, kl,
                               everywhere=method != "c2vkd_right")
        elif name == "lc":
            e_S, e_T = (x.embedding[:, :, None, None] for x in (S, T))
            wanted[name] = linguistic(e_S, e_T, None, kl)
        elif name in ("gb", "pc", "fitnet"):
            oracle = partial(global_visual, kl=kl) if name == "gb" else TERMS[name][1]
            pairs = visual_pairs(S, T)
            wanted[name] = torch.cat([oracle(*pair, None) for pair in pairs]) / len(pairs)
        else:
            maps = S.logits, T.logits
            if name in MASKED_FEATURES:
                maps = S.before_classifier, T.before_classifier
            # or most places of the fine maps would have no part in it
            maps = [resize(x, (4, 4), antialias=x.shape[-1] > 8) for x in maps]
            wanted[name] = TERMS[name][1](*maps, few)
    return wanted


DEFINED = {"pdd", "lc", "gb", *TERMS}
TRIED = [name for name, row in losses.METHODS.items() if row.weights.keys() <= DEFINED]


@pytest.mark.parametrize("method", TRIED)
def test_each_method_reads_the_maps_of_its_terms_and_nothing_else(method):
    row = losses.METHODS[method]
    S, T, labels, few = made_up_outputs(row.needs)
    terms = row.function(S, T, labels)
    wanted = terms_by_definition(method, S, T, labels, few)
    assert set(terms) == set(wanted)
    for name, summands in wanted.items():
        assert close(terms[name], summands.sum(), 1e-10, summands.abs().sum()), name


@pytest.mark.parametrize("needs", [{"teacher", "A_w"}, "teacher A_v", {nn.Identity, nn.ReLU}])
def test_needs_that_nobody_fills_are_refused(needs):
    with pytest.raises(ValueError, match="a method can need"):
        Method(losses.ce, {"ce": 1.0}, needs)


@pytest.mark.parametrize("name", TEACHERS)
def test_maps_meet_at_every_depth_of_every_teacher_and_student(name):
    found = []

    def loss(V_S, V_T):
        found.append((V_S.shape, V_T.shape))
        return V_S.mean()

    with torch.device("meta"):  # shapes without values
        frozen, image = Teacher(name, K).freeze(), torch.empty(2, 3, 192, 192)
        T = frozen(image)
        for variant in VARIANTS:
            net = StudentWithHeads(Student(variant, K), frozen.channels, 0, losses.NEEDS_ALL,
                                   frozen.earlier)
            losses.mean_over_depths(loss, net.eval()(image), T)
    assert all(of_student == of_teacher for of_student, of_teacher in found)
    channels = *TEACHERS[name].earlier, TEACHERS[name].channels
    assert [C for (_, C, _, _), _ in found] == [*channels] * len(VARIANTS)
    side = 12 if "mobilenet" in name else 24
    assert [x.shape for x in T[:3]] == [(2, C, side, side) for C in (K, channels[-1], 256)]
    assert pool_grid(frozen, 192, "meta") == min(side, 16)


def test_depths_that_have_no_partner_are_refused():
    S, T, *_ = made_up_outputs({"teacher", "A_v", "earlier"})
    for lame in ((S._replace(earlier=()), T), (S, T._replace(earlier=()))):
        with pytest.raises(ValueError, match="zip"):
            losses.mean_over_depths(losses.patch_loss, *lame)


REACHED = {"ce": {"encoder", "decoder"}, "gb": {"encoder", "A_v", "earlier"},
           "pc": {"encoder", "A_v", "earlier"}, "lc": {"encoder", "A_l"}}


@pytest.mark.parametrize("depths", [0, 2, 3])
def test_each_term_reaches_exactly_its_parameters(depths):
    """A teacher of fewer depths meets the student's last stages."""
    torch.manual_seed(0)
    teacher = Teacher("deeplabv3_resnet10", K).freeze()
    pool = AttentionPool(teacher.channels, grid=8).requires_grad_(False)
    net = StudentWithHeads(Student("mit_nano", K), teacher.channels, 0, losses.NEEDS_ALL,
                           teacher.earlier[3 - depths:]).train()
    images, labels = torch.randn(2, 3, 64, 64), torch.randint(K, (2, 64, 64))
    T = teacher(images)
    T = T._replace(embedding=pool(T.feature), earlier=T.earlier[3 - depths:])
    terms = losses.c2vkd_multi(net(images), T, labels)
    assert not any(p.requires_grad for p in teacher.parameters())
    dims = [head.in_channels for head in net.heads["earlier"]]
    assert dims == list(net.student.dims[3 - depths:3])
    parts = {"encoder": net.student.encoder, "decoder": net.student.decoder, **net.heads}
    if not depths:
        del parts["earlier"]  # it has no parameters
    for (name, term), (part, module) in itertools.product(terms.items(), parts.items()):
        gradients = torch.autograd.grad(term, list(module.parameters()), retain_graph=True,
                                        allow_unused=True)
        if part not in REACHED[name]:
            assert all(g is None for g in gradients), (name, part)
        elif part in net.heads:
            assert all(g.any() for g in gradients), (name, part)
        else:
            assert all(g is not None for g in gradients), (name, part)
            assert any(g.any() for g in gradients), (name, part)


# ---------------------------------------------------------------- the differences

ROOT = Path(losses.__file__).parent
DETAILS = ROOT / ".github/DETAILS.md"


@pytest.mark.skipif(not DETAILS.exists(), reason="no .github/DETAILS.md here")
def test_every_difference_marked_in_the_code_is_listed_and_conversely():
    marked = set()
    for path in ROOT.glob("*.py"):
        text = path.read_text()
        kinds = ast.FunctionDef, ast.ClassDef, ast.Assign
        named = [s for s in ast.parse(text).body if isinstance(s, kinds)]
        for number, line in enumerate(text.splitlines(), 1):
            if "# unstated: " in line or "# differs: " in line:
                around = next(s for s in named if number <= s.end_lineno)  # or right after it
                name = around.targets[0].id if isinstance(around, ast.Assign) else around.name
                marked.add(f"{path.name}:{name}")
    assert marked and marked == set(re.findall(r"`(\w+\.py:\w+)`", DETAILS.read_text()))
