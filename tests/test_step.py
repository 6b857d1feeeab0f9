"""One step of every stage and method, on fake CUDA tensors and in bf16.

Of the fake tensors only shapes, dtypes and bytes are real.
"""
import argparse

import pytest
import torch

import losses
from student import Student, StudentWithHeads
from teacher import AttentionPool, Teacher

benchmark = pytest.importorskip("benchmark")

TINY = argparse.Namespace(teacher="deeplabv3_resnet10", teacher_weights="none", student="mit_nano",
                          batch_size=2, crop=64)
FEW, MANY = 100, 400  # classes; full-size logits of the many are the largest of all tensors
COMPUTED = {n: method for n, method in losses.METHODS.items() if n not in benchmark.SKIPPED}
BACKWARD = {name: losses.METHODS[name] for name in ("ce", "c2vkd")}


@pytest.fixture(scope="module")
def fake_steps():
    """device, classes -> stage or method -> Step, with its backward pass on "cpu"."""
    return {(device, classes): dict(benchmark.dry_steps(device, TINY, classes, methods))
            for device, methods in (("cuda", COMPUTED), ("cpu", BACKWARD))
            for classes in (FEW, MANY)}


@pytest.mark.parametrize("name", ["teacher", "pool", *COMPUTED])
def test_a_step_runs_on_cuda_tensors_and_keeps_no_full_size_logits(fake_steps, name):
    few, many = fake_steps["cuda", FEW][name], fake_steps["cuda", MANY][name]
    assert set(many.terms.values()) == {torch.float32}
    if name in losses.METHODS:
        assert list(many.terms) == list(losses.METHODS[name].weights)
    floats = 4 * TINY.batch_size * TINY.crop ** 2  # one channel of a full-size map of the batch
    assert many.largest < floats * MANY
    assert many.saved - few.saved < 0.5 * floats * (MANY - FEW)  # in no number of pieces


@pytest.mark.parametrize("name", ["teacher", *BACKWARD])
def test_the_backward_pass_recomputes_full_size_logits_of_one_image_at_a_time(fake_steps, name):
    floats = 4 * TINY.batch_size * TINY.crop ** 2
    assert fake_steps["cpu", MANY][name].largest < floats * MANY


@pytest.mark.parametrize("name", losses.METHODS)
def test_every_term_is_finite_float32_under_bf16_autocast_and_close_to_float32(name):
    torch.manual_seed(0)
    method, classes = losses.METHODS[name], 5
    teacher = Teacher("deeplabv3_resnet10", classes).freeze()
    pool = AttentionPool(teacher.channels, 2).requires_grad_(False)
    net = StudentWithHeads(Student("mit_nano", classes), teacher.channels, 0, method.needs,
                           teacher.earlier).eval()
    images, labels = torch.randn(2, 3, 32, 32), torch.randint(0, classes, (2, 32, 32))
    labels[:, :8] = losses.IGNORE

    def terms_and_gradient(half):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            with torch.no_grad():
                T = teacher(images)
                T = T._replace(embedding=pool(T.feature))
            terms = method.function(net(images), T, labels)
            loss = losses.total_loss(terms, method.weights)
        gradients = torch.autograd.grad(loss, net.student.parameters())
        return terms, torch.cat([g.flatten() for g in gradients])

    exact, gradient = terms_and_gradient(False)
    rounded, rounded_gradient = terms_and_gradient(True)
    assert {t.dtype for t in rounded.values()} == {torch.float32}
    for term in exact:  # bf16 has 8 bits: 0.4% an operation
        wanted = pytest.approx(exact[term].item(), rel=0.05, abs=1e-4)
        assert rounded[term].item() == wanted, term
    assert rounded_gradient.isfinite().all()
    assert torch.cosine_similarity(gradient, rounded_gradient, dim=0) > 0.95
