"""What a training step costs, in time and in memory.

    python -m tests.benchmark          # measured on this machine
    python -m tests.benchmark --dry    # memory of every recipe on a GPU, computed on any machine

A measurement runs its variants in turns, so that whatever else the machine does slows all of them
alike. Times are medians of several rounds, and ratios are medians of the rounds' ratios. On a CPU
one thread runs and its processor time counts, on CUDA the time on the clock.

What --dry computes comes from one step of every stage and method on fake tensors, which have shape,
dtype and device but no values.
"""
import argparse
import copy
import statistics
import sys
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

import losses
import train
from student import VARIANTS, Decoder, Student, StudentWithHeads
from teacher import AttentionPool, PoolFitter, Teacher, pool_grid, presence

MIB, GIB = 2 ** 20, 2 ** 30


# ---------------------------------------------------------------- measured

CLASSES = 150  # as ADE20K has
CPU = SimpleNamespace(teacher="deeplabv3_mobilenet_v2", batch_size=4, crop=192, rounds=5)
GPU = SimpleNamespace(teacher="deeplabv3_resnet101", batch_size=16, crop=512, rounds=20)
WARM_UP = 1  # rounds that do not count


@dataclass
class Cost:
    """Milliseconds of each round of one function, and at most how many MiB of tensors on CUDA."""
    times: list
    peak: float = 0.0


def measure(machine, rounds, **functions):
    """Print and return the Cost of each function: name -> Cost."""
    costs = {name: Cost([]) for name in functions}
    for round_ in range(WARM_UP + rounds):
        for name, function in functions.items():
            milliseconds, peak = once(machine, function)
            if round_ >= WARM_UP:
                costs[name].times.append(milliseconds)
                costs[name].peak = max(costs[name].peak, peak)
    for name, cost in costs.items():
        peak = f"{cost.peak:10,.0f} MiB" if machine.cuda else ""
        words = name.replace("_", " ")
        print(f"    {words:44s}{statistics.median(cost.times):10,.1f} ms{peak}", flush=True)
    return costs


def once(machine, function):
    """Milliseconds and MiB of one call. The MiB are those above what was allocated before."""
    if not machine.cuda:
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


def report(title, above, below, target=None):
    """Print how many times the Costs `below` together the Cost `above` takes."""
    ratios = [whole / sum(parts)
              for whole, *parts in zip(above.times, *(cost.times for cost in below))]
    wanted = f"   (target: at most {target})" if target else ""
    print(f"  {title}: {statistics.median(ratios):.2f}{wanted}", flush=True)


def picture(machine, batch, side):
    """Images and labels of a batch, as train.py hands them to the networks."""
    images = torch.randn(batch, 3, side, side, device=machine.device)
    labels = torch.randint(0, CLASSES, (batch, side, side), device=machine.device)
    return images.contiguous(memory_format=torch.channels_last), labels


def to_device(machine, module):
    """The module where and how train.py puts it."""
    return train.Run(None, None, None, machine, {}).to_device(module)


def plain_cross_entropy(logits, labels):
    """Cross-entropy at full size as everybody writes it."""
    full = F.interpolate(logits.float(), labels.shape[1:], mode="bilinear")
    return F.cross_entropy(full, labels, ignore_index=losses.IGNORE)


def training_step(machine, size, variant):
    """A C2VKD step of train.py over its floor: teacher's forward pass, student's own learning."""
    print(f"\nC2VKD step: {size.teacher} -> {variant}, {size.batch_size} x {size.crop} x "
          f"{size.crop}, {CLASSES} classes")
    teacher = to_device(machine, Teacher(size.teacher, CLASSES)).freeze()
    pool = AttentionPool(teacher.channels, pool_grid(teacher, size.crop, machine.device))
    pool = to_device(machine, pool).requires_grad_(False)
    alone = to_device(machine, StudentWithHeads(Student(variant, CLASSES)))
    taught = to_device(machine, StudentWithHeads(Student(variant, CLASSES), teacher.channels))
    optimizer = torch.optim.AdamW(taught.parameters(), 6e-5, weight_decay=0.01,
                                  fused=machine.cuda)
    images, labels = picture(machine, size.batch_size, size.crop)
    method = losses.METHODS["c2vkd"]

    def teacher_forward():
        with machine.precision(), torch.no_grad():
            return teacher(images)

    def learn_alone(loss_of):
        alone.zero_grad()
        with machine.precision():
            loss = loss_of(alone(images).logits, labels)
        loss.backward()

    def c2vkd_step():
        with machine.precision():
            with torch.no_grad():
                T = teacher(images)
                T = T._replace(embedding=pool(T.feature))
            terms = method.terms(taught(images), T, labels)
            loss = losses.total_loss(terms, method.weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    costs = measure(machine, size.rounds, teacher_forward=teacher_forward,
                    student_with_our_cross_entropy=lambda: learn_alone(losses.cross_entropy),
                    student_with_plain_cross_entropy=lambda: learn_alone(plain_cross_entropy),
                    c2vkd_step=c2vkd_step)
    forward, ours, plain, step = costs.values()
    report("step / floor with our cross-entropy", step, [forward, ours],
           1.15 if variant == "mit_b0" else None)
    report("step / floor with plain cross-entropy", step, [forward, plain])


def full_size_losses(machine, size):
    """PDD with the teacher's margin, and our cross-entropy, over plain cross-entropy."""
    print(f"\nlosses, forward and backward: logits 2 x {CLASSES} x 64 x 64, labels 2 x 256 x 256")
    _, labels = picture(machine, 2, 256)
    z_S, z_T = torch.randn(2, 2, CLASSES, 64, 64, device=machine.device)
    z_S = z_S.contiguous(memory_format=torch.channels_last).requires_grad_()
    z_T = z_T.contiguous(memory_format=torch.channels_last)

    def gradient(loss_of):
        return lambda: torch.autograd.grad(loss_of(), z_S)

    costs = measure(machine, size.rounds,
                    pdd=gradient(lambda: losses.pdd_loss(z_S, z_T, labels)),
                    our_cross_entropy=gradient(lambda: losses.cross_entropy(z_S, labels)),
                    plain_cross_entropy=gradient(lambda: plain_cross_entropy(z_S, labels)))
    report("PDD / plain cross-entropy", costs["pdd"], [costs["plain_cross_entropy"]], 1.7)
    report("our cross-entropy / plain cross-entropy", costs["our_cross_entropy"],
           [costs["plain_cross_entropy"]])


class OfficialDecoder(Decoder):
    """The same head as SegFormer's authors compute it: interpolate, concatenate, fuse."""

    def forward(self, maps):
        parts = [F.interpolate(linear(x), maps[0].shape[2:], mode="bilinear")
                 for x, linear in zip(maps, self.linears)]  # B,D,h_1,w_1
        fused = F.relu(self.norm(self.fuse(torch.cat(parts[::-1], 1))))
        return self.classifier(self.dropout(fused)), fused


def official_form(student, variant):
    """A student with the weights of the given one and the official form of its head."""
    v = VARIANTS[variant]
    official = copy.deepcopy(student)
    official.decoder = OfficialDecoder(v.dims, v.width, CLASSES)
    official.load_state_dict(student.state_dict())
    return official


def transformers_segformer():
    """transformers' SegFormer-B0 as a function of images, None where it is not installed."""
    try:
        import transformers
    except ImportError:
        print("  transformers is not installed, so its SegFormer is not measured")
        return None
    if int(transformers.__version__.split(".")[0]) >= 5:
        print(f"  transformers {transformers.__version__}: its SegFormer is measured below "
              "version 5 alone")
        return None
    config = transformers.SegformerConfig(num_labels=CLASSES)  # its defaults are B0's
    return transformers.SegformerForSemanticSegmentation(config)


def student_forms(machine, size):
    """Our student over the official form of its head and over transformers' SegFormer."""
    variant = "mit_b0"
    print(f"\nstudent {variant}, {CLASSES} classes: forward pass of 1 x 512 x 512, training step "
          "of 4 x 256 x 256 with our cross-entropy")
    student = Student(variant, CLASSES)
    networks = {"ours": student, "official_form": official_form(student, variant)}
    segformer = transformers_segformer()
    if segformer:
        networks["transformers"] = segformer
    networks = {name: to_device(machine, network) for name, network in networks.items()}

    def forward(network):
        with machine.precision(), torch.no_grad():
            return network(image).logits

    def training(network):
        network.zero_grad()
        with machine.precision():
            loss = losses.cross_entropy(network(images).logits, labels)
        loss.backward()

    image, _ = picture(machine, 1, 512)
    images, labels = picture(machine, 4, 256)
    for title, function, mode in (("forward", forward, False), ("training", training, True)):
        calls = {}
        for name, network in networks.items():
            network.train(mode)
            calls[f"{title}_{name}"] = lambda network=network: function(network)
        costs = measure(machine, size.rounds, **calls)
        ours, *others = costs.values()
        for name, other in zip(list(networks)[1:], others):
            report(f"{title}, {name.replace('_', ' ')} / ours", other, [ours])


def process_peak():
    """MiB of memory that this process had at the most, None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == "darwin" else peak / 1024


def measured(rounds=None):
    """Run and print all measurements. rounds: of each, None for the machine's default."""
    cuda = torch.cuda.is_available()
    machine = train.Machine(torch.device("cuda" if cuda else "cpu"))
    train.set_torch_flags(cuda)
    torch.manual_seed(0)
    if cuda:
        size, where = GPU, f"{torch.cuda.get_device_name()}, networks in bf16 autocast"
    else:
        torch.set_num_threads(1)
        size, where = CPU, "CPU, one thread, float32"
    size.rounds = rounds or size.rounds
    print(f"{where}, torch {torch.__version__}, {size.rounds} rounds")
    # the losses come first, because memory left by networks would spare them page faults
    full_size_losses(machine, size)
    for variant in ("mit_b0", "mit_nano"):
        training_step(machine, size, variant)
    student_forms(machine, size)
    if not cuda and process_peak():
        print(f"\npeak memory of this process: {process_peak():,.0f} MiB")


# ---------------------------------------------------------------- computed

RECIPES = {"cityscapes": 19, "voc": 21, "ade20k": 150, "full": 19}  # classes, of own data assumed
SKIPPED = {"dist"}  # its shapes depend on the labels
EXPLAINED = """
saved: what autograd keeps for the backward pass
held: what else is alive between the passes, such as the batch and the outputs
weights: parameters, gradients and optimizer of what is trained, parameters of what is frozen
passing: the most that either pass holds beyond all that for a moment, as the backward pass does on
a CPU"""


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

    with Alive() as memory:
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
                {name: term.dtype for name, term in terms.items()})


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
        return (S, T), method.terms(S, T, labels)

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
            module = StudentWithHeads(Student(recipe.student, classes), teacher.channels,
                                      needs=method.needs)
            frozen = [teacher] if "teacher" in method.needs else []
            frozen += [pool] if "A_l" in method.needs else []
            # a step that reports norms of gradients keeps its graph
            yield name, dry_step(device, module, frozen, 2, distil, recipe, keep_graph=True)


def dry(name, classes):
    """Print what each stage and method of a recipe needs on a GPU."""
    recipe = SimpleNamespace(**train.RECIPES[name])
    print(f"\n{name}: {recipe.teacher} -> {recipe.student}, {recipe.batch_size} x {recipe.crop} x "
          f"{recipe.crop}, {classes} classes")
    columns = "saved", "held", "weights", "passing", "sum"
    print("GiB        " + "".join(f"{column:>8s}" for column in columns))
    on_cpu = dict(dry_steps("cpu", recipe, classes))
    for stage, step in dry_steps("cuda", recipe, classes):
        passing = max(step.forward, on_cpu[stage].backward)
        sizes = (step.saved, step.alive - step.saved, step.weights, passing,
                 step.alive + step.weights + passing)
        print(f"{stage:11s}" + "".join(f"{size / GIB:8.2f}" for size in sizes), flush=True)


def computed():
    print("computed on fake CUDA tensors under bf16 autocast, nothing was measured; torch "
          f"{torch.__version__}; without {', '.join(SKIPPED)}, whose shapes depend on the labels"
          f"{EXPLAINED}")
    for name, classes in RECIPES.items():
        dry(name, classes)


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
