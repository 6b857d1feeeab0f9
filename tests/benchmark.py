"""What a training step costs, in time, in arithmetic and in memory.

    python -m tests.benchmark          # measured on this machine
    python -m tests.benchmark --dry    # every recipe on a GPU, computed on any machine

A measurement runs its variants in turns, so that whatever else the machine does slows all of them
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

MIB, GIB, TERA = 2 ** 20, 2 ** 30, 10 ** 12
AT_MOST = 1.25  # what c2vkd_multi may cost, as a multiple of c2vkd


# ---------------------------------------------------------------- measured

CLASSES = 150  # as ADE20K has
CPU = SimpleNamespace(device="cpu", teacher="deeplabv3_mobilenet_v2", student="mit_b0",
                      batch_size=4, crop=192, rounds=5)
GPU = SimpleNamespace(device="cuda", teacher="deeplabv3_resnet101", student="mit_b0",
                      batch_size=16, crop=512, rounds=20)


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


def measure(device, rounds, functions):
    """name -> milliseconds of each round and the most MiB, printed, after one round of warm-up."""
    times, peaks = {name: [] for name in functions}, dict.fromkeys(functions, 0.0)
    for round_ in range(1 + rounds):
        for name, function in functions.items():
            milliseconds, peak = once(device, function)
            if round_ > 0:
                times[name].append(milliseconds)
                peaks[name] = max(peaks[name], peak)
    for name in functions:
        peak = f"{peaks[name]:10,.0f} MiB" if device == "cuda" else ""
        print(f"    {name:34s}{statistics.median(times[name]):10,.1f} ms{peak}", flush=True)
    return times, peaks


def steps(size):
    """name -> a function that makes a whole step of train.py's third stage, and the two floors."""
    def place(module):
        return module.to(size.device, memory_format=torch.channels_last)

    teacher = place(Teacher(size.teacher, CLASSES)).freeze()
    grid = pool_grid(teacher, size.crop, size.device)
    pool = place(AttentionPool(teacher.channels, grid)).requires_grad_(False)
    images = torch.randn(size.batch_size, 3, size.crop, size.crop, device=size.device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, CLASSES, (size.batch_size, size.crop, size.crop), device=size.device)
    precision = torch.autocast(size.device, torch.bfloat16, enabled=size.device == "cuda")

    def taught():
        with torch.no_grad():
            T = teacher(images)
            return T._replace(embedding=pool(T.feature))

    def teacher_forward():
        with precision:
            taught()

    def step_of(method):
        module = place(StudentWithHeads(Student(size.student, CLASSES), teacher.channels, 0,
                                        method.needs, teacher.earlier))
        optimizer = torch.optim.AdamW(module.parameters(), 6e-5, fused=size.device == "cuda")

        def step():
            with precision:
                T = taught() if "teacher" in method.needs else None
                terms = method.function(module(images), T, labels)
                loss = losses.total_loss(terms, method.weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step

    functions = {"the teacher's forward pass": teacher_forward}
    for name in ("ce", "c2vkd", "c2vkd_multi", "fitnet_multi"):
        functions[name] = step_of(losses.METHODS[name])
    return functions


def report(title, numerators, *denominators, target=None):
    """Print how many times the denominators together a numerator is, the median over the rounds."""
    ratios = [above / sum(below) for above, *below in zip(numerators, *denominators, strict=True)]
    wanted = f"   (target: at most {target})" if target else ""
    print(f"  {title}: {statistics.median(ratios):.2f}{wanted}", flush=True)


def measured(rounds=None):
    """Run and print all measurements. rounds: of each, None for the machine's default."""
    torch.manual_seed(0)
    if torch.cuda.is_available():
        size, where = GPU, f"{torch.cuda.get_device_name()}, networks in bf16 autocast"
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
        torch.backends.cuda.enable_cudnn_sdp(False)  # as in train.py
    else:
        size, where = CPU, "CPU, one thread, float32"
        torch.set_num_threads(1)
    rounds = rounds or size.rounds
    print(f"{where}, torch {torch.__version__}, {rounds} rounds; {size.teacher} -> {size.student}, "
          f"{size.batch_size} x {size.crop} x {size.crop}, {CLASSES} classes")
    functions = steps(size)
    times, peaks = measure(size.device, rounds, functions)
    floor = times[next(iter(functions))], times["ce"]
    report("c2vkd / (teacher's forward pass + ce)", times["c2vkd"], *floor, target=1.15)
    report("c2vkd_multi / c2vkd", times["c2vkd_multi"], times["c2vkd"], target=AT_MOST)
    if size.device == "cuda":
        report("c2vkd_multi / c2vkd, MiB", [peaks["c2vkd_multi"]], [peaks["c2vkd"]],
               target=AT_MOST)


# ---------------------------------------------------------------- computed

PUBLISHED = dict(teacher="deeplabv3_resnet101", teacher_weights="imagenet", student="mit_b0",
                 batch_size=16, crop=512)
RECIPES = {  # as in train.py; of own data 19 classes are assumed
    "cityscapes": PUBLISHED | dict(batch_size=24, classes=19),
    "voc": PUBLISHED | dict(classes=21),
    "ade20k": PUBLISHED | dict(classes=150),
    "full": PUBLISHED | dict(classes=19),
}
SKIPPED = {"dist"}  # its shapes depend on the labels
EXPLAINED = """
saved: what autograd keeps for the backward pass
held: what else is alive between the passes, such as the batch and the outputs
weights: parameters, gradients and optimizer of what is trained, parameters of what is frozen
passing: the most that either pass holds beyond all that for a moment, as the backward pass does on
a CPU
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

    def distil(images, labels):
        with torch.no_grad():
            T = teacher(images) if "teacher" in method.needs else None
            if "A_l" in method.needs:
                T = T._replace(embedding=pool(T.feature))
        S = module(images)
        return (S, T), method.function(S, T, labels)

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
            frozen = [teacher] if "teacher" in method.needs else []
            frozen += [pool] if "A_l" in method.needs else []
            # a step that reports norms of gradients keeps its graph
            yield name, dry_step(device, module, frozen, 2, distil, recipe, keep_graph=True)


def dry(name):
    """Print what each stage and method of a recipe needs on a GPU."""
    recipe = SimpleNamespace(**RECIPES[name])
    print(f"\n{name}: {recipe.teacher} -> {recipe.student}, {recipe.batch_size} x {recipe.crop} x "
          f"{recipe.crop}, {recipe.classes} classes")
    columns = "saved", "held", "weights", "passing", "sum"
    print("GiB          " + "".join(f"{column:>8s}" for column in columns) + "   TFLOP")
    on_cpu, sums = dict(dry_steps("cpu", recipe, recipe.classes)), {}
    for stage, step in dry_steps("cuda", recipe, recipe.classes):
        passing = max(step.forward, on_cpu[stage].backward)
        sums[stage] = step.alive + step.weights + passing
        sizes = (step.saved, step.alive - step.saved, step.weights, passing, sums[stage])
        print(f"{stage:13s}" + "".join(f"{size / GIB:8.2f}" for size in sizes)
              + f"{on_cpu[stage].flops / TERA:8.2f}", flush=True)
    memory = sums["c2vkd_multi"] / sums["c2vkd"]
    flops = on_cpu["c2vkd_multi"].flops / on_cpu["c2vkd"].flops
    print(f"c2vkd_multi / c2vkd: memory {memory:.2f}, arithmetic {flops:.2f}   (target: at most "
          f"{AT_MOST})")


def computed():
    print("computed on fake CUDA tensors under bf16 autocast, nothing was measured; torch "
          f"{torch.__version__}; without {', '.join(SKIPPED)}, whose shapes depend on the labels"
          f"{EXPLAINED}")
    for name in RECIPES:
        dry(name)


def main():
    parser = argparse.ArgumentParser(usage="python -m tests.benchmark [options]")
    parser.add_argument("--rounds", type=int, help="default 5 on a CPU, 20 on a GPU")
    parser.add_argument("--dry", action="store_true",
                        help="compute what every recipe needs on a GPU instead")
    options = parser.parse_args()
    if options.dry:
        computed()
    else:
        measured(options.rounds)


if __name__ == "__main__":
    main()
