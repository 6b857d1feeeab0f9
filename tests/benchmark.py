"""What a training step costs.

    python -m tests.benchmark          # measured on this machine: the step, its losses, the loader
    python -m tests.benchmark --dry    # computed on any machine: memory and arithmetic of every recipe on a GPU

Measured: ADE20K's sizes on a GPU, small ones on a CPU. Times are medians, memory is the peak above what was allocated
before. Computed: one step of every stage and method on fake tensors, which have shape, dtype and device but no values.
"""
import argparse
import statistics
import tempfile
import time
import weakref
from contextlib import ExitStack, contextmanager
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import losses
import train
from data import DataSet, TrainStream, draw_shapes
from student import Student, StudentWithHeads
from teacher import AttentionPool, PoolFitter, Teacher, pool_grid, presence

# ---------------------------------------------------------------- computed

CLASSES = {"cityscapes": 19, "voc": 21, "ade20k": 150, "full": 19}  # of each recipe; full, own data: an example
SKIPPED = {"dist"}  # its shapes depend on the labels
EXPLAINED = """
saved: what autograd keeps for the backward pass; held: what else is alive between the passes (batch, outputs);
weights: parameters, gradients and optimizer of what is trained, parameters of what is frozen; passing: the most that
either pass holds beyond all that for a moment, recomputed full-size logits included (backward pass: as on a CPU)"""


@contextmanager
def fake(device):
    """New tensors are fake ones on `device`, "cuda" even where there is none."""
    def flash(q, k, v):  # CUDA's choice in bf16; without a GPU it would be the unfused form, which saves N x N matrices
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]

    stand_ins = {"torch.cuda.amp.common.amp_definitely_not_available": lambda: False,  # or autocast turns itself off
                 "torch.cuda.is_bf16_supported": lambda *_, **__: True,
                 "torch.nn.init.trunc_normal_": lambda x, **_: x}  # it looks at values
    if device == "cuda":
        stand_ins["torch.nn.functional.scaled_dot_product_attention"] = flash
    with ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(patch(name, stand_in))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(torch.device(device))
        yield


class Alive(TorchDispatchMode):
    """Bytes of the storages made under it: all that are alive now, the most at any moment, the largest one."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.largest = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for storage in (x.untyped_storage() for x in tree_leaves(out) if isinstance(x, torch.Tensor)):
            if storage not in self.known:
                self.known.add(storage)
                self.count(storage.nbytes())
                weakref.finalize(storage, self.count, -storage.nbytes())
        return out

    def count(self, size):
        self.now += size
        self.peak, self.largest = max(self.peak, self.now), max(self.largest, size)


class Step(NamedTuple):
    """What one step costs, in bytes."""
    saved: int  # storages that autograd keeps for the backward pass, parameters aside
    after: int  # alive after the forward pass: these, the batch, the networks' outputs
    forward: int  # the most alive during the forward pass
    backward: int  # and during the backward pass
    largest: int  # storage
    weights: int  # parameters, gradients, optimizer
    terms: dict  # name -> dtype


def dry_step(device, module, frozen, copies, forward, batch, crop, again):
    """The Step of `forward`: images, labels -> (what the loop holds, terms). Its backward pass runs on "cpu" only.

    copies: of the parameters, kept by the optimizer; again: the graph is kept for a second backward pass.
    """
    own, saved = {p.untyped_storage()._cdata for p in module.parameters()}, weakref.WeakSet()

    def keep(x):
        if x.untyped_storage()._cdata not in own:
            saved.add(x.untyped_storage())
        return x

    with Alive() as alive:
        images, labels = torch.empty(batch, 3, crop, crop), torch.zeros(batch, crop, crop, dtype=torch.long)
        with torch.autocast(device, torch.bfloat16), saved_tensors_hooks(keep, lambda x: x):
            held, terms = forward(images, labels)
            loss = sum(terms.values())
        after, peak, kept = alive.now, alive.peak, sum(storage.nbytes() for storage in saved)
        alive.peak = alive.now
        if device == "cpu":
            loss.backward(retain_graph=again)
    numbers = [p.numel() for network in (module, *frozen) for p in network.parameters()]
    numbers += [(1 + copies) * p.numel() for p in module.parameters() if p.requires_grad]
    return Step(kept, after, peak, alive.peak, alive.largest, 4 * sum(numbers), {n: t.dtype for n, t in terms.items()})


def dry_steps(device, args, classes, methods=losses.METHODS):
    """(name, Step) of stage 1, stage 2 and each method, with the lines of train.py's loops."""
    def train_teacher(images, labels):
        T = teacher(images)
        return T, {"ce": losses.cross_entropy(T.logits, labels)}

    def fit_pool(images, labels):
        with torch.no_grad():
            F_T = teacher(images).feature
        present = fitter(F_T).float()
        return F_T, {"bce": F.binary_cross_entropy_with_logits(present, presence(labels, classes))}

    def distil(images, labels):
        with torch.no_grad():
            T = teacher(images) if "teacher" in method.needs else None
            if "A_l" in method.needs:
                T = T._replace(embedding=pool(T.feature))
        S = module(images)
        return (S, T), method.function(S, T, labels)

    with fake(device):
        size = args.batch_size, args.crop
        teacher = Teacher(args.teacher, classes)
        copies = 2 if args.teacher_weights == "none" else 1  # AdamW, SGD
        yield "teacher", dry_step(device, teacher, [], copies, train_teacher, *size, again=False)
        fitter = PoolFitter(teacher.freeze().channels, pool_grid(teacher, args.crop, device), classes)
        yield "pool", dry_step(device, fitter, [teacher], 2, fit_pool, *size, again=False)
        pool = fitter.pool.requires_grad_(False)
        for name, method in methods.items():
            if name not in SKIPPED:
                channels = teacher.channels if "A_v" in method.needs else None
                module = StudentWithHeads(Student(args.student, classes), channels)
                frozen = [n for n, word in ((teacher, "teacher"), (pool, "A_l")) if word in method.needs]
                # a step that reports gradient norms keeps its graph
                yield name, dry_step(device, module, frozen, 2, distil, *size, again=True)


def arithmetic(args, classes):
    """10^12 operations of a forward pass of each part: name -> number."""
    counts = {}

    def run(name, function, *inputs):
        with torch.no_grad(), FlopCounterMode(display=False) as counter, torch.autocast("cuda", torch.bfloat16):
            out = function(*inputs)
        counts[name] = counter.get_total_flops() / 1e12
        return out

    with fake("cuda"):
        images = torch.empty(args.batch_size, 3, args.crop, args.crop)
        teacher = Teacher(args.teacher, classes).freeze()
        T = run("teacher", teacher, images)
        e_T = run("pool", AttentionPool(teacher.channels, pool_grid(teacher, args.crop, "cuda")), T.feature)
        S = run("student", StudentWithHeads(Student(args.student, classes), teacher.channels), images)
        run("losses of C2VKD", losses.c2vkd, S, T._replace(embedding=e_T), images[:, 0].long())
    return counts


def dry(recipe, classes):
    """Print what each stage and method of a recipe needs on a GPU."""
    args = argparse.Namespace(**train.RECIPES[recipe])
    print(f"\n{recipe}: {args.teacher} -> {args.student}, {args.batch_size} x {args.crop} x {args.crop}, {classes} "
          "classes\nTFLOP forward: " + ", ".join(f"{n} {v:.2f}" for n, v in arithmetic(args, classes).items()))
    print("GiB           saved    held weights passing     sum   terms")
    on_cpu = dict(dry_steps("cpu", args, classes))
    for name, step in dry_steps("cuda", args, classes):
        passing = max(step.forward - step.after, on_cpu[name].backward - on_cpu[name].after)
        sizes = step.saved, step.after - step.saved, step.weights, passing, step.after + step.weights + passing
        print(f"{name:11s}" + "".join(f"{size / 2 ** 30:8.2f}" for size in sizes) + "   "
              + ", ".join(f"{n} {str(t).removeprefix('torch.')}" for n, t in step.terms.items()), flush=True)


# ---------------------------------------------------------------- measured

K = 150  # classes
SIZES = {"full": dict(teacher="deeplabv3_resnet101", student="mit_b0", crop=512, batch_size=16, images=16, repeats=20),
         "small": dict(teacher="deeplabv3_mobilenet_v3_large", student="mit_nano", crop=128, batch_size=4, images=2,
                       repeats=5)}


def measure(args, **functions):
    """Print and return the median milliseconds and, on CUDA, the peak MB of each function; NaN where memory is short.

    They run in turns: whatever else the machine does slows all of them alike.
    """
    cuda, times, peaks = torch.cuda, {name: [] for name in functions}, dict.fromkeys(functions, torch.nan)
    for _ in range(args.repeats + 3 * args.gpus + 1):
        for name, function in functions.items():
            try:
                if args.gpus:
                    cuda.reset_peak_memory_stats()
                    before = cuda.memory_allocated()
                begin = time.perf_counter()
                function()
                if args.gpus:
                    cuda.synchronize()
                    peaks[name] = (cuda.max_memory_allocated() - before) / 2 ** 20
                times[name].append(1000 * (time.perf_counter() - begin))
            except cuda.OutOfMemoryError:
                times[name].append(torch.nan)
    costs = {name: (statistics.median(times[name][-args.repeats:]), peaks[name]) for name in functions}  # warm
    for name, (milliseconds, peak) in costs.items():
        print(f"    {name:40s}{milliseconds:10.2f} ms" + (f"{peak:10.0f} MB" if args.gpus else ""), flush=True)
    return costs


def whole_step(args):
    """The parts of a step and the whole; returns its time over that of the teacher and the student alone."""
    teacher = train.on_device(Teacher(args.teacher, K), args)[0].freeze()
    pool = AttentionPool(teacher.channels, pool_grid(teacher, args.crop, args.device)).to(args.device)
    pool.requires_grad_(False)
    alone, taught = (train.on_device(StudentWithHeads(Student(args.student, K), channels), args)[0]
                     for channels in (None, teacher.channels))
    adamw, adamw_taught = (torch.optim.AdamW(m.parameters(), 6e-5, fused=bool(args.gpus)) for m in (alone, taught))
    images = torch.randn(args.batch_size, 3, args.crop, args.crop, device=args.device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, K, (args.batch_size, args.crop, args.crop), device=args.device)
    method = losses.METHODS["c2vkd"]

    def teach():
        with train.precision(args), torch.no_grad():
            T = teacher(images)
            return T._replace(embedding=pool(T.feature))

    def learn_alone():
        with train.precision(args):
            loss = losses.cross_entropy(alone(images).logits, labels)
        adamw.zero_grad()
        loss.backward()

    def distil():
        T = teach()
        with train.precision(args):
            loss = losses.total_loss(method.function(taught(images), T, labels), method.weights)
        adamw_taught.zero_grad()
        loss.backward()
        adamw_taught.step()

    print(f"\none step: {args.teacher} -> {args.student}, {' x '.join(map(str, images.shape))}, {K} classes")
    costs = measure(args, teacher_forward=teach, student_alone_forward_backward=learn_alone, student_adamw=adamw.step,
                    c2vkd_step=distil)
    *floor, whole = (milliseconds for milliseconds, _ in costs.values())
    return whole / sum(floor)


def single_losses(args):
    """Losses, forward and backward, beside the equations as they are written; returns the lines of ratios."""
    lines = []

    def compare(title, shape, **forms):
        print(f"  {title}")
        S, T = (torch.randn(shape, device=args.device).contiguous(memory_format=torch.channels_last) for _ in "ST")
        S.requires_grad_()
        costs = measure(args, **{n: lambda f=f: torch.autograd.grad(f(S, T), S) for n, f in forms.items()})
        lines.extend((f"{title}: {n} / ours", *(a / b for a, b in zip(cost, costs["ours"])))
                     for n, cost in costs.items() if n != "ours")
        if costs["literal"][0] > 0:  # there was memory for it
            assert torch.allclose(forms["literal"](S, T), forms["ours"](S, T), rtol=1e-3), title

    def literal_patch(V_S, V_T):
        X, Y = losses.patch_rows(V_S), losses.patch_rows(V_T)
        return (X @ X.T - Y @ Y.T).square().mean()  # N x N

    def literal_pdd(z_S, z_T):
        onehot = F.one_hot(labels, K).movedim(-1, 1)  # B,K,H,W; every pixel is labelled here
        probabilities = (losses.resize(z, labels.shape[1:]).softmax(1) for z in (z_S, z_T))
        (p_t, p_nt), (q_t, q_nt) = (((p * onehot).sum(1), (p * (1 - onehot)).sum(1)) for p in probabilities)
        q_t, q_nt = (q_t + 1) / 2, q_nt / 2
        return 0.5 * (q_t * (q_t / p_t).log() + q_nt * (q_nt / p_nt).log()).mean()

    def pdd(z_S, z_T):
        return losses.pdd_loss(z_S, z_T, labels)

    def kept(z_S, z_T):
        with patch.object(losses, "checkpoint", lambda function, *inputs, **_: function(*inputs)):
            return pdd(z_S, z_T)

    print("\nlosses alone, forward and backward, float32")
    labels = torch.randint(0, K, (args.batch_size, args.crop, args.crop), device=args.device)
    compare("PDD", (args.batch_size, K, args.crop // 4, args.crop // 4), ours=pdd, literal=literal_pdd,
            without_recomputation=kept, cross_entropy=lambda z_S, _: losses.cross_entropy(z_S, labels))
    for C in (256, 960):
        compare(f"patch, {args.images} x {C} x 32 x 32", (args.images, C, 32, 32), ours=losses.patch_loss,
                literal=literal_patch)
    return lines


def loading(args):
    """Images a second of the training stream, JPEG and PNG decoding included."""
    print("\nloader, JPEG 512 x 512, resized by 0.5-2.0, crops of 512")
    with tempfile.TemporaryDirectory() as folder:
        files = f"{folder}/image.jpg", f"{folder}/label.png"
        for picture, file in zip(draw_shapes(0, 0, 512), files):
            picture.save(file)
        data = DataSet("", list(range(K)), [], {"train": [files]}, np.arange(256))
        for workers in (0, torch.multiprocessing.cpu_count()):
            stream = TrainStream(data, 0, 512, 512, (0.5, 2.0), 4 * (5 + 10 * workers))
            batches = iter(DataLoader(stream, 4, num_workers=workers, pin_memory=bool(args.gpus)))
            next(batches)  # the workers run
            begin = time.perf_counter()
            rate = sum(len(images) for images, _ in batches) / (time.perf_counter() - begin)
            print(f"    {f'{workers} workers':40s}{rate:10.1f} images a second", flush=True)


def main():
    parser = argparse.ArgumentParser(usage="python -m tests.benchmark [options]")
    parser.add_argument("--size", choices=SIZES, help="default: full on a GPU, small on a CPU")
    parser.add_argument("--dry", action="store_true", help="compute what every recipe needs on a GPU instead")
    options, gpus = parser.parse_args(), min(1, torch.cuda.device_count())
    if options.dry:
        print(f"computed on fake CUDA tensors under bf16 autocast, torch {torch.__version__}; nothing was measured; "
              f"not computed: {', '.join(SKIPPED)}, whose shapes depend on the labels{EXPLAINED}")
        for recipe, classes in CLASSES.items():
            dry(recipe, classes)
        return
    args = argparse.Namespace(**SIZES[options.size or ("full" if gpus else "small")], gpus=gpus,
                              device=torch.device("cuda" if gpus else "cpu"))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, networks in bf16 autocast" if gpus else
          f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}, float32; memory: not measured on a CPU")
    ratios = [("C2VKD step / (teacher forward + student alone)", whole_step(args)), *single_losses(args)]
    loading(args)
    print("\nratios: time" + ", memory" * gpus)
    for name, *values in ratios:
        print(f"  {name:60s}" + "".join(f"{v:10.2f}" for v in values if v == v))


if __name__ == "__main__":
    main()
