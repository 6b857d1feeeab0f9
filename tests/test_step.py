"""One step of every stage and method, in bf16 on fake CUDA tensors.

Of the fake tensors only shapes, dtypes and bytes are real.
"""
import argparse

import pytest
import torch

import losses

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
