"""What a training step costs, in time, in arithmetic and in memory.

    python -m tests.benchmark          # measured on this machine
    python -m tests.benchmark --dry    # every recipe on a GPU, computed on any machine

A measurement runs its methods in turns, so that whatever else the machine does slows all of them
alike. Times are medians of several rounds, and ratios are medians of the rounds' ratios. On a CPU
one thread runs and its processor time counts, on CUDA the time on the clock.

What --dry computes comes from one step of every stage and method on fake tensors, which have shape,
dtype and device but no values.
"""
import argparse
import statistics
import time
import weakref
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import losses
from student import Student, StudentWithHeads
from teacher import AttentionPool, PoolFitter, Teacher, pool_grid, presence
from train import RECIPES, set_torch_flags

MIB, GIB, TERA = 2 ** 20, 2 ** 30, 10 ** 12


def distil(method, module, teacher, pool, images, labels):
    """What is held and the terms of a step, with the lines of train.py's third stage."""
    with torch.no_grad():
        T = teacher(images) if "teacher" in method.needs else None
        if "A_l" in method.needs:
            T = T._replace(embedding=pool(T.feature))
    S = module(images)
    return (S, T), method.function(S, T, labels)


# ---------------------------------------------------------------- measured

CLASSES = 150  # as ADE20K has
CPU = SimpleNamespace(device="cpu", rounds=5, **RECIPES["small"] | {"batch_size": 4})
GPU = SimpleNamespace(device="cuda", rounds=20, **RECIPES["ade20k"])


def once(device, function):
    """Milliseconds of one call, and on CUDA the MiB that it takes beyond what was there before."""
    if device == "cpu":
        begin = time.process_time()
        function()
        return 1000 * (time.process_time() - begin), 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, begin = torch.cuda.memory_allocated(), time.perf_counter()
    function()
    torch.cuda.synchronize()
    milliseconds = 1000 * (time.perf_counter() - begin)
    return milliseconds, (torch.cuda.max_memory_allocated() - before) / MIB


def steps(size):
    """name -> a function that makes a whole step of a method, or the teacher's forward pass."""
    def place(module):
        return module.to(size.device, memory_format=torch.channels_last)

    teacher = place(Teacher(size.teacher, CLASSES)).freeze()
    grid = pool_grid(teacher, size.crop, size.device)
    pool = place(AttentionPool(teacher.channels, grid)).requires_grad_(False)
    images = torch.randn(size.batch_size, 3, size.crop, size.crop, device=size.device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, CLASSES, (size.batch_size, size.crop, size.crop), device=size.device)
    precision = torch.autocast(size.device, torch.bfloat16, enabled=size.device == "cuda")

    def teacher_forward():
        with precision, torch.no_grad():
            pool(teacher(images).feature)

    def step_of(method):
        module = place(StudentWithHeads(Student(size.student, CLASSES), teacher.channels, 0,
                                        method.needs, teacher.earlier))
        optimizer = torch.optim.AdamW(module.parameters(), 6e-5, fused=size.device == "cuda")

        def step():
            with precision:
                _, terms = distil(method, module, teacher, pool, images, labels)
                loss = losses.total_loss(terms, method.weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step

    functions = {"the teacher's forward pass": teacher_forward}
    for name in ("ce", "c2vkd", "c2vkd_multi", "fitnet_multi"):
        functions[name] = step_of(losses.METHODS[name])
    return functions


def measured():
    torch.manual_seed(0)
    cuda = torch.cuda.is_available()
    set_torch_flags(cuda)
    if cuda:
        size, where = GPU, f"{torch.cuda.get_device_name()}, networks in bf16 autocast"
    else:
        size, where = CPU, "CPU, one thread, float32"
        torch.set_num_threads(1)
    print(f"{where}, torch {torch.__version__}, {size.rounds} rounds; {size.teacher} -> "
          f"{size.student}, {size.batch_size} x {size.crop} x {size.crop}, {CLASSES} classes")
    functions = steps(size)
    times, peaks = {name: [] for name in functions}, dict.fromkeys(functions, 0.0)
    for round_ in range(1 + size.rounds):
        for name, function in functions.items():
            milliseconds, peak = once(size.device, function)
            if round_ > 0:  # the first one warms up
                times[name].append(milliseconds)
                peaks[name] = max(peaks[name], peak)
    for name in functions:
        peak = f"{peaks[name]:10,.0f} MiB" if cuda else ""
        print(f"    {name:34s}{statistics.median(times[name]):10,.1f} ms{peak}")
    forward, c2vkd = times["the teacher's forward pass"], times["c2vkd"]
    ratio = statistics.median(a / (b + c) for a, b, c in zip(c2vkd, forward, times["ce"]))
    print(f"  c2vkd / (teacher's forward pass + ce): {ratio:.2f}")
    ratio = statistics.median(a / b for a, b in zip(times["c2vkd_multi"], c2vkd))
    print(f"  c2vkd_multi / c2vkd: {ratio:.2f}")


# ---------------------------------------------------------------- computed

COMPUTED = {"cityscapes": 19, "voc": 21, "ade20k": 150, "full": 19}  # classes, of own data assumed
SKIPPED = {"dist"}  # its shapes depend on the labels
EXPLAINED = """
weights: parameters, gradients and optimizer of what is trained, parameters of what is frozen
activations: the peak of everything else. That of the backward pass is computed as on a CPU
TFLOP: of the products of both passes, without the optimizer's step"""


@contextmanager
def fake(device):
    """New tensors are fake ones on `device`, "cuda" even where there is none."""
    # CUDA's choice in bf16. Without a GPU it would be the unfused form, which saves N x N matrices
    def flash(q, k, v):
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]

    stand_ins = {
        # or autocast turns itself off
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch.cuda.is_bf16_supported": lambda *_, **__: True,
        # it looks at values
        "torch.nn.init.trunc_normal_": lambda x, **_: x}
    if device == "cuda":
        stand_ins["torch.nn.functional.scaled_dot_product_attention"] = flash
    with ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(patch(name, stand_in))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(torch.device(device))
        yield


class Alive(TorchDispatchMode):
    """Bytes of the storages made under it.

    now: of all that are alive. peak: the most at any moment. largest: of the largest one.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.largest = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.meet(x.untyped_storage())
        return out

    def meet(self, storage):
        if storage not in self.known:
            self.known.add(storage)
            self.count(storage.nbytes())
            weakref.finalize(storage, self.count, -storage.nbytes())

    def count(self, size):
        self.now += size
        self.peak, self.largest = max(self.peak, self.now), max(self.largest, size)


@dataclass(frozen=True)
class Step:
    """What one step costs, in bytes."""
    saved: int  # storages that autograd keeps for the backward pass, parameters aside
    alive: int  # between the passes: these, the batch, the networks' outputs
    forward: int  # beyond those, the most during the forward pass
    backward: int  # and during the backward pass, 0 where it was not run
    largest: int  # storage
    weights: int  # parameters, gradients, optimizer
    terms: dict  # name -> dtype
    flops: int  # of both passes, of the forward pass alone where the other was not run


def dry_step(device, module, frozen, copies, forward, size, keep_graph=False):
    """The Step of a function `forward` from images and labels to what is held and to the terms.

    copies: how many numbers the optimizer keeps per parameter of `module`. frozen: the other
    networks. keep_graph: the graph is kept for a second backward pass. The backward pass runs on
    "cpu" alone, because a fake GPU cannot run it.
    """
    own = {p.untyped_storage()._cdata for p in module.parameters()}
    saved = weakref.WeakSet()

    def pack(x):
        if x.untyped_storage()._cdata not in own:
            saved.add(x.untyped_storage())
        return x

    with Alive() as memory, FlopCounterMode(display=False) as counter:
        images = torch.empty(size.batch_size, 3, size.crop, size.crop)
        labels = torch.zeros(size.batch_size, size.crop, size.crop, dtype=torch.long)
        with torch.autocast(device, torch.bfloat16), saved_tensors_hooks(pack, lambda x: x):
            held, terms = forward(images, labels)  # held lives on until this function ends
            loss = sum(terms.values())
        alive, most = memory.now, memory.peak
        kept = sum(storage.nbytes() for storage in saved)
        memory.peak = alive
        if device == "cpu":
            loss.backward(retain_graph=keep_graph)
    parameters = [p for network in (module, *frozen) for p in network.parameters()]
    numbers = sum(p.numel() * (2 + copies if p.requires_grad else 1) for p in parameters)
    return Step(kept, alive, most - alive, memory.peak - alive, memory.largest, 4 * numbers,
                {name: term.dtype for name, term in terms.items()}, counter.get_total_flops())


def dry_steps(device, recipe, classes, methods=losses.METHODS):
    """(name, Step) of stage 1, of stage 2 and of each method, with the lines of train.py's loops.

    recipe: an object with the fields teacher, teacher_weights, student, batch_size and crop.
    """
    def train_teacher(images, labels):
        T = teacher(images)
        return T, {"ce": losses.cross_entropy(T.logits, labels)}

    def fit_pool(images, labels):
        with torch.no_grad():
            F_T = teacher(images).feature
        present = fitter(F_T).float()
        wanted = presence(labels, classes)
        return F_T, {"bce": F.binary_cross_entropy_with_logits(present, wanted)}

    with fake(device):
        teacher = Teacher(recipe.teacher, classes)
        copies = 2 if recipe.teacher_weights == "none" else 1  # AdamW, SGD
        yield "teacher", dry_step(device, teacher, [], copies, train_teacher, recipe)

        teacher.freeze()
        grid = pool_grid(teacher, recipe.crop, device)
        fitter = PoolFitter(teacher.channels, grid, classes)
        yield "pool", dry_step(device, fitter, [teacher], 2, fit_pool, recipe)

        pool = fitter.pool.requires_grad_(False)
        for name, method in methods.items():
            if name in SKIPPED:
                continue
            module = StudentWithHeads(Student(recipe.student, classes), teacher.channels, 0,
                                      method.needs, teacher.earlier)
            forward = partial(distil, method, module, teacher, pool)
            frozen = [teacher] if "teacher" in method.needs else []
            frozen += [pool] if "A_l" in method.needs else []
            # a step that reports norms of gradients keeps its graph
            yield name, dry_step(device, module, frozen, 2, forward, recipe, keep_graph=True)


def dry(name, classes):
    """Print what each stage and method of a recipe needs on a GPU."""
    recipe = SimpleNamespace(**RECIPES[name])
    print(f"\n{name}: {recipe.teacher} -> {recipe.student}, {recipe.batch_size} x {recipe.crop} x "
          f"{recipe.crop}, {classes} classes")
    print("GiB           weights activations     sum   TFLOP")
    on_cpu = dict(dry_steps("cpu", recipe, classes))
    for stage, step in dry_steps("cuda", recipe, classes):
        weights = step.weights / GIB
        activations = (step.alive + max(step.forward, on_cpu[stage].backward)) / GIB
        print(f"{stage:13s}{weights:8.2f}{activations:12.2f}{weights + activations:8.2f}"
              f"{on_cpu[stage].flops / TERA:8.2f}", flush=True)


def main():
    parser = argparse.ArgumentParser(usage="python -m tests.benchmark [--dry]")
    parser.add_argument("--dry", action="store_true",
                        help="compute what every recipe needs on a GPU instead")
    if not parser.parse_args().dry:
        measured()
        return
    print("computed on fake CUDA tensors under bf16 autocast, nothing was measured; torch "
          f"{torch.__version__}; without {', '.join(SKIPPED)}, whose shapes depend on the labels"
          f"{EXPLAINED}")
    for name, classes in COMPUTED.items():
        dry(name, classes)


if __name__ == "__main__":
    main()
