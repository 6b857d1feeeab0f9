"""What a training step, each loss and the loader cost on this machine: python -m tests.benchmark

ADE20K's sizes on a GPU, small ones on a CPU. Times are medians, memory is the peak above what was allocated before.
"""
import argparse
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F

import losses
import train
from data import DataSet, draw_shapes
from student import Student, WithHeads
from teacher import CHANNELS, AttentionPool, Teacher

K = 150  # classes
SIZES = {"full": dict(teacher="deeplabv3_resnet101", student="mit_b0", crop=512, batch_size=16, images=16, repeats=20),
         "small": dict(teacher="deeplabv3_mobilenet_v3_large", student="mit_nano", crop=128, batch_size=4, images=2, repeats=3)}


def measure(name, function, args):
    """Print and return the median milliseconds and, on CUDA, the peak MB of a call; NaN where memory is too short."""
    cuda, times, peak = torch.cuda, [], torch.nan
    try:
        for _ in range(args.repeats + 3 * args.gpus + 1):
            if args.gpus:
                cuda.reset_peak_memory_stats()
                before = cuda.memory_allocated()
            begin = time.perf_counter()
            function()
            if args.gpus:
                cuda.synchronize()
                peak = (cuda.max_memory_allocated() - before) / 2 ** 20
            times.append(1000 * (time.perf_counter() - begin))
    except cuda.OutOfMemoryError:
        times, peak = [torch.nan], torch.nan
    cost = statistics.median(times[-args.repeats:]), peak  # the first ones warm up
    print(f"  {name:60s}{cost[0]:10.2f} ms" + (f"{cost[1]:10.0f} MB" if args.gpus else ""), flush=True)
    return cost


def steps(args):
    """The parts of a step and the whole; returns its time over that of the teacher and the student alone."""
    teacher = train.parallel(Teacher(args.teacher, K), args)[0].freeze()
    pool = AttentionPool(teacher.channels, args.crop // 32).to(args.device).requires_grad_(False)
    alone, taught = (train.parallel(WithHeads(Student(args.student, K), c), args)[0] for c in (None, teacher.channels))
    optimizer, optimizer_taught = (torch.optim.AdamW(m.parameters(), 6e-5, fused=bool(args.gpus)) for m in (alone, taught))
    shape = args.batch_size, args.crop, args.crop
    images, labels = train.to_device(torch.randint(0, 256, (shape[0], 3, *shape[1:])), torch.randint(0, K, shape), args)
    precise = train.precision(args)  # as a decorator
    teach = torch.no_grad()(precise(lambda: teacher(images)))
    cross_entropy = precise(lambda: train.baseline_terms(alone, None, images, labels, {"ce": 1.0}, K)["ce"])
    terms = precise(lambda: train.c2vkd_terms(taught, teacher, pool, images, labels, "forward", losses.METHODS["c2vkd"]))

    def learn_alone():
        alone.zero_grad()
        cross_entropy().backward()

    def whole_step():
        taught.zero_grad()
        losses.total_loss(terms(), losses.METHODS["c2vkd"]).backward()
        optimizer_taught.step()

    print(f"\none step: {args.teacher} -> {args.student}, {' x '.join(map(str, shape))}, {K} classes")
    parts = {"teacher, forward": teach, "student, cross-entropy, forward and backward": learn_alone, "student, AdamW": optimizer.step}
    floor = sum(measure(name, part, args)[0] for name, part in parts.items())
    return measure("C2VKD: teacher, student, losses, backward, optimiser", whole_step, args)[0] / floor


def single_losses(args):
    """Each loss, forward and backward, beside the equations as they are written; returns the lines of ratios."""
    lines, c_teacher = [], CHANNELS[args.teacher]

    def compare(name, shape, ours, **others):
        S, T = torch.randn(shape, device=args.device).requires_grad_(), torch.randn(shape, device=args.device)
        cost = measure(f"{name}: ours", lambda: torch.autograd.grad(ours(S, T), S), args)
        for form, function in others.items():
            other = measure(f"{name}: {form}", lambda: torch.autograd.grad(function(S, T), S), args)
            lines.append((f"{name}: {form} / ours", *(o / c for o, c in zip(other, cost))))
            assert form != "literal" or other[0] != other[0] or torch.allclose(function(S, T), ours(S, T), rtol=1e-3)

    def literal_patch(V_S, V_T):
        X, Y = losses.patch_rows(V_S), losses.patch_rows(V_T)
        return (X @ X.T - Y @ Y.T).square().mean()  # N x N

    def literal_pdd(z_S, z_T):
        onehot = F.one_hot(labels, K).movedim(-1, 1)  # B,K,H,W; every pixel is labelled here
        (p_t, p_nt), (q_t, q_nt) = (((p * onehot).sum(1), (p * (1 - onehot)).sum(1)) for p in (z_S.softmax(1), z_T.softmax(1)))
        q_t, q_nt = (q_t + 1) / 2, q_nt / 2
        return 0.5 * (q_t * (q_t / p_t).log() + q_nt * (q_nt / p_nt).log()).mean()

    print(f"\nlosses alone, forward and backward, float32; features {args.images} x C x 32 x 32")
    for C in (256, c_teacher):
        compare(f"patch, C = {C}", (args.images, C, 32, 32), losses.patch_loss, literal=literal_patch)
    compare(f"global visual, C = {c_teacher}", (args.images, c_teacher, 32, 32), losses.global_visual_loss)
    compare(f"linguistic, {args.batch_size} x 512", (args.batch_size, 512), losses.linguistic_loss)
    labels = torch.randint(0, K, (args.batch_size, args.crop, args.crop), device=args.device)
    pdd = lambda z_S, z_T: losses.pdd_loss(losses.margin(z_S, labels), losses.margin(z_T, labels), labels)
    compare("PDD of full-size logits", (args.batch_size, K, args.crop, args.crop), pdd, literal=literal_pdd,
            cross_entropy=lambda z_S, _: F.cross_entropy(z_S, labels))
    return lines


def loading(args):
    """Images a second of the training stream, JPEG and PNG decoding included."""
    print("\nloader, JPEG 512 x 512, resized by 0.5-2.0, crops of 512")
    with tempfile.TemporaryDirectory() as folder:
        files = f"{folder}/image.jpg", f"{folder}/label.png"
        for picture, file in zip(draw_shapes(0, 0, 512), files):
            picture.save(file)
        data = DataSet("", range(K), [], {"train": [files]}, np.arange(256))
        for workers in (0, torch.multiprocessing.cpu_count()):
            stream = argparse.Namespace(**vars(args) | dict(base=512, crop=512, scale=(0.5, 2.0), batch_size=4, workers=workers))
            batches = iter(train.loader(stream, data, 0, 0, 5 + 10 * workers))
            next(batches)  # the workers run
            begin = time.perf_counter()
            rate = sum(4 for _ in batches) / (time.perf_counter() - begin)
            print(f"  {f'{workers} workers':60s}{rate:10.1f} images a second", flush=True)


def first_step():
    """One C2VKD step at the size of `shapes`, on the CPU."""
    student, teacher, pool = WithHeads(Student("mit_nano", 8), 512), Teacher("deeplabv3_resnet10", 8).freeze(), AttentionPool(512, 2)
    terms = train.c2vkd_terms(student, teacher, pool, torch.randn(8, 3, 64, 64), torch.randint(0, 8, (8, 64, 64)), "forward", losses.METHODS["c2vkd"])
    losses.total_loss(terms, losses.METHODS["c2vkd"]).backward()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage="python -m tests.benchmark [options]")
    parser.add_argument("--size", choices=SIZES, help="default: full on a GPU, small on a CPU")
    size, gpus = parser.parse_args().size, min(1, torch.cuda.device_count())
    args = argparse.Namespace(**SIZES[size or ("full" if gpus else "small")], device=torch.device("cuda" if gpus else "cpu"),
                              gpus=gpus, rank=0, processes=1, compile=False)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, networks in bf16 autocast" if gpus else
          f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}, float32; memory: not measured on a CPU")
    ratios = [("C2VKD step / (teacher forward + student alone)", steps(args))] + single_losses(args)
    loading(args)
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", "from tests.benchmark import first_step; first_step()"], check=True)
    print(f"\nimport, build and first step in a fresh process, sizes of shapes, CPU: {time.perf_counter() - begin:.1f} s")
    print("\nratios: time" + ", memory" * gpus)
    for name, *values in ratios:
        print(f"  {name:60s}" + "".join(f"{v:10.2f}" for v in values if v == v))
