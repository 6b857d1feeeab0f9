"""Train a CNN teacher, fit its attention pool, distil a Vision Transformer student.

    python train.py                                            # everything on the embedded data set, CPU, 5 minutes
    python train.py --dataset ade20k --gpus 1
    python train.py --dataset folder --data path/to/data --method ce
    torchrun --nnodes 2 --nproc-per-node 8 ... train.py --dataset cityscapes

Stage 1 trains the teacher, stage 2 fits the pool P, stage 3 distils. All three go through `run_stage`, the
training loop. The same command again continues where it stopped; a finished run prints its table.
"""
import argparse
import csv
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import losses
from data import (DATASETS, EvalImages, InputError, Interrupted, TrainStream, command, load_checkpoint, normalise, open_dataset,
                  progress, spread, write_atomically)
from evaluate import evaluate, load_network, scores, strip, table, write_json
from student import VARIANTS, Student, WithHeads, count_parameters, load_encoder
from teacher import CHANNELS, AttentionPool, PoolFitter, Teacher, average_precision, initialise, load_clip_pool, pool_grid, presence

# ---------------------------------------------------------------- recipes

HEADS = ("c2vkd", "vlfd", "pdd_fitnet", "fitnet")  # the methods that use A_v

RECIPES = {
    # base: short side at scale 1, training and evaluation alike; scale: range of the random resizing.
    # paper: unstated; how its teacher was trained, and every schedule but that of Cityscapes
    # Student: AdamW 6e-5 and polynomial decay are the paper's, weight decay 0.01, warm-up 1,500 steps and
    # scale 0.5-2.0 the release's. Crop, batch, steps: the paper's for Cityscapes, the field's for VOC (the
    # release's 6 a GPU and 3,670 steps are a script's defaults) and ADE20K.
    # Teacher: steps ours. The two CPU recipes are ours throughout.
    "cityscapes": dict(base=1024, crop=512, scale=(0.5, 2.0), batch_size=24, steps=50_000, warmup=1500,
                       teacher="deeplabv3_resnet101", teacher_weights="imagenet", teacher_steps=40_000, pool_steps=2000,
                       student="mit_b0", student_weights="imagenet"),
    "voc": dict(base=512, crop=512, scale=(0.5, 2.0), batch_size=16, steps=40_000, warmup=1500,
                teacher="deeplabv3_resnet101", teacher_weights="voc", teacher_steps=30_000, pool_steps=2000,
                student="mit_b0", student_weights="imagenet"),
    "ade20k": dict(base=512, crop=512, scale=(0.5, 2.0), batch_size=16, steps=80_000, warmup=1500,
                   teacher="deeplabv3_resnet101", teacher_weights="imagenet", teacher_steps=80_000, pool_steps=2000,
                   student="mit_b0", student_weights="imagenet"),
    "folder": dict(base=512, crop=512, scale=(0.5, 2.0), batch_size=16, steps=20_000, warmup=1000,
                   teacher="deeplabv3_resnet101", teacher_weights="imagenet", teacher_steps=20_000, pool_steps=2000,
                   student="mit_b0", student_weights="imagenet"),
    "folder, no GPU": dict(base=150, crop=128, scale=(0.75, 1.5), batch_size=8, steps=800, warmup=80,
                           teacher="deeplabv3_mobilenet_v3_large", teacher_weights="none", teacher_steps=800,
                           pool_steps=100, student="mit_nano", student_weights="none"),
    "shapes": dict(base=64, crop=64, scale=(1.0, 1.0), batch_size=8, steps=400, warmup=40,
                   teacher="deeplabv3_resnet10", teacher_weights="none", teacher_steps=600,
                   pool_steps=60, student="mit_nano", student_weights="none"),
}
# paper: unstated; training from random weights, for which AdamW at 1e-3 does better than the paper's 6e-5 from
# ImageNet weights (student) and the usual SGD 0.01 (teacher)
STUDENT_LR = {"pretrained": 6e-5, "random": 1e-3}
TEACHER_LR = {"pretrained": 0.01, "random": 1e-3}


def parse_options(argv=None):
    """The command line, with the recipe's values filled in. Raises InputError for values out of range."""
    p = argparse.ArgumentParser(usage="%(prog)s [options]", description="Distil a CNN teacher into a Vision Transformer student "
                                "(C2VKD). Defaults marked * come from the data set's recipe.")
    g = p.add_argument_group("what")
    g.add_argument("--dataset", default="shapes", choices=DATASETS, help="default shapes")
    g.add_argument("--data", metavar="DIR", help="its folder (default data/NAME)")
    g.add_argument("--method", default="c2vkd", choices=("teacher", *losses.METHODS), help="default c2vkd; teacher: stop after stage 2")
    g.add_argument("--out", default="runs", metavar="DIR", help="output folder (default runs)")
    g.add_argument("--name", metavar="NAME", help="folder, table row (default METHOD-STUDENT-seedN)")
    g = p.add_argument_group("teacher")
    g.add_argument("--teacher", choices=CHANNELS, help="*")
    g.add_argument("--teacher-weights", metavar="W", help="* imagenet | none | voc (finished: COCO, VOC's classes) | FILE (our finished last.pt)")
    g.add_argument("--teacher-steps", type=int, metavar="N", help="*")
    g.add_argument("--teacher-lr", type=float, metavar="X", help="default 0.01 (SGD) from ImageNet, 0.001 (AdamW) from random weights")
    g.add_argument("--pool-steps", type=int, metavar="N", help="* steps that fit the attention pool")
    g.add_argument("--clip", metavar="FILE", help="take the pool of this CLIP RN101.pt, do not fit one")
    g = p.add_argument_group("student")
    g.add_argument("--student", choices=VARIANTS, help="*")
    g.add_argument("--student-weights", metavar="W", help="* imagenet | none | FILE")
    g.add_argument("--steps", type=int, metavar="N", help="*")
    g.add_argument("--lr", type=float, metavar="X", help="default 6e-5 from ImageNet, 0.001 from random weights")
    g.add_argument("--kl", default="forward", choices=("forward", "reverse"), help="direction of Eq. 3, 4 and 9 (default forward)")
    g.add_argument("--weights", nargs="+", default=[], metavar="T=X",
                   help="weights of terms, as gb=0.1 pc=0.1 lc=0.5, or the one word released")
    g = p.add_argument_group("batches")
    g.add_argument("--batch-size", type=int, metavar="N", help="* images, all GPUs together")
    g.add_argument("--crop", type=int, metavar="PIXELS", help="* side of the square crop and of the evaluation window")
    g.add_argument("--base", type=int, metavar="PIXELS", help="* short side of the images at scale 1")
    g.add_argument("--warmup", type=int, metavar="N", help="* steps of linear warm-up (a tenth of a shorter stage)")
    g = p.add_argument_group("machine")
    g.add_argument("--gpus", type=int, metavar="N", help="default 1 if there is one, else 0: the CPU")
    g.add_argument("--workers", type=int, metavar="N", help="loader processes (default 8 a GPU, 0 on a CPU)")
    g.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")
    g.add_argument("--deterministic", action="store_true", help="bitwise repeatable on CUDA, slower")
    g.add_argument("--compile", action="store_true", help="torch.compile both networks")
    g = p.add_argument_group("reports")
    g.add_argument("--log-every", type=int, default=20, metavar="N", help="steps a row of log.csv (default 20)")
    g.add_argument("--report-every", type=int, default=200, metavar="N", help="steps between gradient norms (default 200)")
    g.add_argument("--val-every", type=int, metavar="N", help="steps between validations (default a quarter of all)")
    g.add_argument("--val-images", type=int, default=200, metavar="N", help="images of those (default 200; the last one takes all)")
    args = p.parse_args(argv)

    if args.gpus is None:
        args.gpus = min(1, torch.cuda.device_count())
    if args.gpus > torch.cuda.device_count() and "RANK" not in os.environ:
        found = torch.cuda.device_count()
        raise InputError(f"--gpus {args.gpus}: {found} CUDA devices found; use --gpus {found}{'' if found else ' to run on the CPU'}")
    recipe = RECIPES["folder, no GPU" if args.dataset == "folder" and not args.gpus else args.dataset]
    for key, value in recipe.items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    if args.lr is None:
        args.lr = STUDENT_LR["random" if args.student_weights == "none" else "pretrained"]
    if args.teacher_lr is None:
        args.teacher_lr = TEACHER_LR["random" if args.teacher_weights == "none" else "pretrained"]
    args.workers = (8 if args.gpus else 0) if args.workers is None else args.workers

    for name, least in dict(teacher_steps=1, pool_steps=1, steps=1, batch_size=2, crop=32, base=32, warmup=0, gpus=0, workers=0,
                            seed=0, log_every=1, report_every=1, val_images=1).items():
        if getattr(args, name) < least:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {least}")
    if not (args.lr > 0 and args.teacher_lr > 0):
        raise InputError("--lr and --teacher-lr must be above 0")
    if args.val_every is not None and args.val_every < 1:
        raise InputError(f"--val-every {args.val_every}: must be at least 1")
    if args.kl == "reverse" and args.method != "c2vkd":
        raise InputError(f"--kl reverse: {args.method} has no direction to choose; it goes with --method c2vkd")
    if args.clip and args.method not in ("c2vkd", "teacher"):
        raise InputError(f"--clip: {args.method} uses no attention pool; it goes with --method c2vkd")
    if args.teacher_weights == "voc" and args.dataset != "voc":
        raise InputError("--teacher-weights voc: that model knows VOC's classes only; use imagenet, none or a FILE")
    args.term_weights = term_weights(args)
    return args


def term_weights(args):
    """Weight of each term of the method after --weights. Raises InputError for a term it does not have."""
    weights = dict(losses.METHODS.get(args.method, {}))
    if args.weights == ["released"] and args.method == "c2vkd":
        return losses.released_weights(CHANNELS[args.teacher])
    for item in args.weights:
        name, _, value = item.partition("=")
        try:
            if name not in weights or not math.isfinite(float(value)):
                raise ValueError
            weights[name] = float(value)
        except ValueError:
            raise InputError(f"--weights {item}: {args.method} takes {' '.join(f'{n}=NUMBER' for n in weights)}"
                             + (" or the word released" if args.method == "c2vkd" else "")) from None
    return weights


# ---------------------------------------------------------------- stages

@dataclass
class Stage:
    """What `run_stage` needs to know. terms: (images, labels) -> named unweighted losses."""
    name: str
    folder: Path
    module: torch.nn.Module
    terms: Callable
    weights: dict
    optimizer: torch.optim.Optimizer
    steps: int
    power: float
    conditions: dict  # the options that define the result; a folder made with others is refused
    describe: dict = field(default_factory=dict)  # what a reader of the checkpoint needs besides
    network: torch.nn.Module = None  # the deployed part of `module`
    encoder: torch.nn.Module = None  # where the term report takes its gradient norms
    strip_models: dict = field(default_factory=dict)


def teacher_folder(args):
    return Path(args.out) / args.dataset / f"teacher-{args.teacher}"


def common_conditions(args, data):
    """The options that a teacher's result depends on, and every student's with it."""
    names = ("dataset", "base", "crop", "batch_size", "warmup", "teacher", "teacher_weights", "teacher_steps", "teacher_lr")
    return {"classes": len(data.classes), "train_images": len(data.pairs["train"])} | {n: getattr(args, n) for n in names}


def description(args, data, name):
    """What evaluate.py has to know of a checkpoint: the network's variant, its classes and how it sees images."""
    return {"name": name, "dataset": args.dataset, "data": args.data and os.path.abspath(args.data),
            "classes": list(data.classes), "palette": [list(c) for c in data.palette], "base": args.base, "window": args.crop}


def parallel(module, args):
    """The module on its device, and the same wrapped for several processes."""
    module = module.to(args.device, memory_format=torch.channels_last)
    if not dist.is_initialized():
        return module, module
    if args.gpus:
        module = torch.nn.SyncBatchNorm.convert_sync_batchnorm(module)
    return module, DistributedDataParallel(module, device_ids=[args.device] if args.gpus else None)


def build_teacher_stage(args, data):
    """Stage 1: DeepLabV3 with cross-entropy."""
    torch.manual_seed(args.seed)
    teacher = Teacher(args.teacher, len(data.classes))
    initialise(teacher, args.teacher, args.teacher_weights)
    teacher, net = parallel(teacher, args)
    if args.teacher_weights == "none":
        optimizer = torch.optim.AdamW(teacher.parameters(), args.teacher_lr, weight_decay=0.01)
    else:  # ours: the recipe torchvision and CIRKD train DeepLab with, the fresh head ten times faster
        optimizer = torch.optim.SGD([{"params": teacher.backbone.parameters()},
                                     {"params": teacher.classifier.parameters(), "lr": 10 * args.teacher_lr}],
                                    args.teacher_lr, momentum=0.9, weight_decay=5e-4)

    def terms(images, labels):
        z_T, _, _ = net(images)
        return {"ce": losses.cross_entropy(losses.upsample(z_T, labels.shape[1:]), labels)}

    return Stage("teacher", teacher_folder(args), teacher, terms, {"ce": 1.0}, optimizer, args.teacher_steps, 0.9,
                 common_conditions(args, data), description(args, data, args.teacher), teacher,
                 strip_models={"teacher": teacher})


def build_pool_stage(args, data, teacher):
    """Stage 2: the attention pool on the frozen teacher's features."""
    torch.manual_seed(args.seed)
    fitter, net = parallel(PoolFitter(teacher.channels, pool_grid(args.teacher, args.crop), len(data.classes)), args)

    def terms(images, labels):
        with torch.no_grad():
            _, F_T, _ = teacher(images)
        return {"bce": F.binary_cross_entropy_with_logits(net(F_T).float(), presence(labels, len(data.classes)))}

    optimizer = torch.optim.AdamW(fitter.parameters(), 3e-4, weight_decay=0.01)  # ours
    return Stage("pool", teacher_folder(args) / "pool", fitter, terms, {"bce": 1.0}, optimizer, args.pool_steps, 1.0,
                 common_conditions(args, data) | {"pool_steps": args.pool_steps})


def build_student_stage(args, data, teacher, pool):
    """Stage 3: the student, alone (ce) or taught."""
    torch.manual_seed(args.seed)
    student = Student(args.student, len(data.classes))
    aside = load_encoder(student.encoder, args.student, args.student_weights)
    if aside:
        print(f"student encoder: {args.student_weights}; not loaded: {', '.join(aside)}")
    module, net = parallel(WithHeads(student, teacher.channels if args.method in HEADS else None, args.seed), args)

    def terms(images, labels):
        if args.method in HEADS:
            return c2vkd_terms(net, teacher, pool, images, labels, args.kl, args.term_weights)
        return baseline_terms(net, teacher, images, labels, args.term_weights, len(data.classes))

    # 6e-5 on everything: the release's; biases and norms are not spared weight decay
    optimizer = torch.optim.AdamW(module.parameters(), args.lr, weight_decay=0.01, fused=bool(args.gpus))
    conditions = common_conditions(args, data) | {"student": args.student, "student_weights": args.student_weights,
                                                  "steps": args.steps, "lr": args.lr}
    own = {"method": args.method, "seed": args.seed, "kl": args.kl, "weights": args.term_weights,
           "pool_steps": args.pool_steps, "clip": args.clip}
    folder = Path(args.out) / args.dataset / (args.name or f"{args.method}-{args.student}-seed{args.seed}")
    described = {"label": args.name and args.name.removesuffix(f"-seed{args.seed}"), "method": args.method,
                 "seed": args.seed, "conditions": conditions}
    return Stage("student", folder, module, terms, args.term_weights, optimizer, args.steps, 1.0, conditions | own,
                 description(args, data, args.student) | described, student, student.encoder,
                 {"teacher": teacher, "student": student})


def c2vkd_terms(net, teacher, pool, images, labels, kl, wanted):
    """The unweighted terms of Eq. 10 for one batch, and those of the controls that share its maps: the ones in `wanted`."""
    with torch.no_grad():
        z_T, F_T, _ = teacher(images)
        m_T = losses.full_size_margin(z_T, labels)  # B,H,W: all that PDD needs of the teacher
        e_T = pool(F_T) if pool else None
    z_S, F_S, _, projected, e_S = net(images)
    # paper: unstated; twice F^S's grid, which is the release's 32x32 at 512, and at most F^T's
    grid = [min(2 * s, t) for s, t in zip(F_S.shape[2:], F_T.shape[2:])]
    V_S, V_T = losses.upsample(projected, grid), losses.upsample(F_T, grid)
    terms = {"pdd": lambda: losses.pdd_loss(losses.full_size_margin(z_S, labels), m_T, labels, kl),
             "gb": lambda: losses.global_visual_loss(V_S, V_T, kl),
             "pc": lambda: losses.patch_loss(V_S, V_T),
             "lc": lambda: losses.linguistic_loss(e_S, e_T, kl),
             "fitnet": lambda: losses.fitnet_loss(V_S, V_T),
             "ce": lambda: losses.cross_entropy(losses.upsample(z_S, labels.shape[1:]), labels)}
    return {name: terms[name]() for name in wanted}


def baseline_terms(net, teacher, images, labels, weights, classes):
    """The unweighted terms of a method other than C2VKD: cross-entropy at full size, the others at crop/8."""
    grid = tuple(-(-side // 8) for side in labels.shape[1:])
    few = F.interpolate(labels[:, None].float(), grid, mode="nearest-exact")[:, 0].long()
    z_S, _, D_S, _, _ = net(images)
    terms = {"ce": losses.cross_entropy(losses.upsample(z_S, labels.shape[1:]), labels)}
    if len(weights) > 1:
        with torch.no_grad():
            z_T, _, D_T = (losses.upsample(t, grid) for t in teacher(images))
        z_S, D_S = losses.upsample(z_S, grid), losses.upsample(D_S, grid)
    for name in list(weights)[1:]:
        function = getattr(losses, f"{name}_loss")
        terms[name] = function(D_S, D_T, few, classes) if name == "ifvd" else \
            function(D_S, D_T, few) if name in ("skd", "at") else function(z_S, z_T, few)
    return terms


# ---------------------------------------------------------------- the training loop

def run_stage(stage, args, data):
    """Train a stage to its end, continuing from its last.pt if there is one."""
    step, seed, best, pending = resume(stage, args)
    if step < stage.steps and args.rank == 0:
        write_json(stage.folder / "options.json", {k: v for k, v in vars(args).items() if k != "device"})
    log = Log(stage, args, step)
    saved = time.monotonic()
    if step == 0 and stage.encoder is not None:
        log.write(0, [], [], stage, validation(stage, args, data, 0))
    stage.module.train()
    bar = progress(loader(args, data, seed, step, stage.steps), desc=stage.name, total=stage.steps, initial=step,
                   unit="step", disable=args.rank > 0)
    for images, labels, names in bar:
        # dropout and stochastic depth are a function of (seed, step), so nothing random has to be saved
        torch.manual_seed(seed + 1_000_003 * (step * args.processes + args.rank + 1))
        for group in stage.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * schedule(step, stage.steps, args.warmup, stage.power)

        images, labels = to_device(images, labels, args)
        report = stage.encoder is not None and (step % args.report_every == 0 or step == stage.steps - 1)
        if args.compile:  # compiled graphs free what a second backward pass, the report's, would need
            torch.compiler.set_stance("force_eager" if report else "default")
        with precision(args):
            terms = stage.terms(images, labels)  # teacher, student, losses
            loss = losses.total_loss(terms, stage.weights)
        norms = gradient_norms(terms, stage.encoder, args.processes) if report else {}
        stage.optimizer.zero_grad()
        loss.backward()
        stage.optimizer.step()

        step += 1
        values = losses.all_sum(torch.stack([t.detach().float() for t in terms.values()])) / args.processes
        pending.append((step, list(names), values, norms))
        stop = Stop.agreed(step, args)
        validate = step % (args.val_every or -(-stage.steps // 4)) == 0 or step == stage.steps
        keep = validate or stop or time.monotonic() - saved > 60
        if keep or step % args.log_every == 0:
            check_finite(pending, stage, list(terms))  # before anything is saved
        miou = validation(stage, args, data, step) if validate and stage.network is not None else None
        if miou is not None and miou > best:
            best = miou
            save_best(stage, args, step)
        if validate or step % args.log_every == 0:
            bar.set_postfix(log.write(step, pending, list(terms), stage, miou))
            pending.clear()
        if keep:
            save(stage, args, step, seed, best, pending)
            saved = time.monotonic()
        if stop:
            bar.close()
            raise Interrupted(f"{stage.name}: stopped and saved at step {step}; run the same command again to continue")
    barrier()


def schedule(step, steps, warmup, power):
    """Factor on the rate at `step` = 0 ... steps - 1: linear warm-up, then (1 - progress)^power, down to zero."""
    # paper: unstated; the release's decay ends at 0.41 of the rate, ours at zero
    warmup = min(warmup, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return (1 - (step - warmup) / (steps - warmup)) ** power


def loader(args, data, seed, start, stop):
    """Batches start ... stop - 1 of the sample stream; a process takes its share of every batch."""
    share = args.batch_size // args.processes
    stream = TrainStream(data, seed, args.base, args.crop, args.scale, stop * args.batch_size)
    positions = [step * args.batch_size + args.rank * share + i for step in range(start, stop) for i in range(share)]
    return torch.utils.data.DataLoader(
        stream, batch_size=share, sampler=positions, num_workers=args.workers, pin_memory=bool(args.gpus),
        worker_init_fn=_quiet_worker, generator=torch.Generator())


def _quiet_worker(_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process saves and ends the workers
    torch.set_num_threads(1)


def to_device(images, labels, args):
    """uint8 images (B,3,H,W) and labels (B,H,W) -> normalised float32 images, int64 labels, on the device."""
    images = normalise(images.to(args.device, non_blocking=True)).contiguous(memory_format=torch.channels_last)
    return images, labels.to(args.device, non_blocking=True).long()


def precision(args):
    """bf16 autocast on CUDA, float32 on a CPU."""
    return torch.autocast(args.device.type, torch.bfloat16, enabled=bool(args.gpus))


def gradient_norms(terms, encoder, processes=1):
    """L2 norm of each unweighted term's gradient in the student's encoder; gradients are averaged over processes."""
    parameters = list(encoder.parameters())
    norms = {}
    for name, term in terms.items():
        grads = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        flat = torch.cat([losses.full(g).flatten() for g in grads if g is not None])
        norms[name] = losses.all_sum(flat).double().norm().item() / processes
    return norms


def check_finite(pending, stage, names):
    """Stop before a non-finite step reaches a checkpoint, with every term and the files of its batch."""
    bad = [p for p in pending if not p[2].isfinite().all()]
    if not bad and not all(p.isfinite().all() for p in stage.module.parameters()):
        bad = pending[-1:]
    for step, files, values, _ in bad:
        listed = ", ".join(f"{n} {v:.4g}" for n, v in zip(names, values.tolist()))
        raise InputError(f"{stage.name}, step {step}: a loss or its gradient is not finite ({listed}); "
                         f"batch: {' '.join(files)}; {stage.folder / 'last.pt'} is intact; lower --lr or --teacher-lr, or look at these files")


class Log:
    """log.csv: a row every --log-every steps, means over them; a continued run drops the rows after its checkpoint."""

    def __init__(self, stage, args, step):
        self.path, self.began, self.rank = stage.folder / "log.csv", time.monotonic(), args.rank
        self.fields = ["step", "lr", "seconds_per_step", "total"]
        for kind in ("raw", "weighted", "grad"):
            self.fields += [f"{kind}_{n}" for n in stage.weights if kind != "grad" or stage.encoder is not None]
        self.fields += ["val_miou"] if stage.network is not None else []
        kept = []
        if step and self.path.exists():
            with open(self.path, newline="") as f:  # a killed run may have left half a row
                kept = [r for r in csv.DictReader(f) if None not in r.values() and int(r["step"]) <= step]
        if self.rank == 0:
            write_atomically(self.path, lambda p: self._append(p, kept, "w"))

    def _append(self, path, rows, mode="a"):
        with open(path, mode, newline="") as f:
            writer = csv.DictWriter(f, self.fields)
            if mode == "w":
                writer.writeheader()
            writer.writerows(rows)

    def write(self, step, pending, names, stage, miou=None):
        """Append a row from the pending steps; returns the weighted means, for the progress bar."""
        row = {"step": step, "val_miou": f"{miou:.3f}"} if miou is not None else {"step": step}
        weighted = {}
        if pending:
            means = dict(zip(names, torch.stack([v for _, _, v, _ in pending]).double().mean(0).tolist()))
            weighted = {n: stage.weights[n] * v for n, v in means.items()}
            row |= {"lr": f"{stage.optimizer.param_groups[0]['lr']:.4g}", "total": f"{sum(weighted.values()):.6g}",
                    "seconds_per_step": f"{(time.monotonic() - self.began) / len(pending):.3f}"}
            row |= {f"raw_{n}": f"{v:.6g}" for n, v in means.items()}
            row |= {f"weighted_{n}": f"{v:.6g}" for n, v in weighted.items()}
            row |= {f"grad_{n}": f"{v:.6g}" for *_, norms in pending for n, v in norms.items()}
        self.began = time.monotonic()
        if self.rank == 0:
            self._append(self.path, [row])
        return {n: f"{v:.3f}" for n, v in weighted.items()}


def validation(stage, args, data, step):
    """mIoU on val (at the last step on all of it), with a picture. Returns the mIoU in percent."""
    matrix = evaluate(stage.network, data, "val", args.base, args.crop, args.device, desc=f"{stage.name}: validation",
                      images=None if step == stage.steps else args.val_images)
    result = scores(matrix.cpu())
    if args.rank == 0:
        tqdm.write(f"{stage.name}, step {step}: val mIoU {result['miou']:.2f}")
        pictures = stage.folder / "pictures"
        pictures.mkdir(exist_ok=True)
        strip(data, "val", args.base, args.crop, stage.strip_models, args.device).save(pictures / f"step{step:06d}.png")
        if step == stage.steps:
            write_json(stage.folder / "results-val.json", result | {"step": step} | {
                k: stage.describe.get(k) for k in ("label", "method", "seed", "conditions", "classes")})
    return result["miou"]


def save_best(stage, args, step):
    """best.pt: the deployed network alone."""
    if args.rank == 0:
        content = stage.describe | {"network": _plain(stage.network.state_dict()), "step": step}
        write_atomically(stage.folder / "best.pt", lambda p: torch.save(content, p))


def _plain(state):
    """Tensors in the ordinary memory format on the CPU, so that files do not depend on where they were made."""
    return {k: v.cpu().contiguous() for k, v in state.items()}


def save(stage, args, step, seed, best, pending):
    """last.pt: everything that continues the stage, and the deployed network for evaluate.py."""
    if args.rank:
        return
    content = stage.describe | {"step": step, "run_seed": seed, "best": best, "pending": [tuple(p) for p in pending],
                                "optimizer": stage.optimizer.state_dict(), "module": stage.module.state_dict(),
                                "stage_conditions": stage.conditions}
    if stage.network is not None:
        content["network"] = _plain(stage.network.state_dict())
    write_atomically(stage.folder / "last.pt", lambda p: torch.save(content, p))


def resume(stage, args):
    """Load last.pt into the stage if there is one: step, seed, best mIoU, steps not yet logged.

    Raises InputError where it belongs to another experiment.
    """
    stage.folder.mkdir(parents=True, exist_ok=True)
    for group in stage.optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    path = stage.folder / "last.pt"
    if not path.exists():
        return 0, args.seed, -1.0, []
    state = load_checkpoint(path, ("step", "run_seed", "best", "pending", "optimizer", "module", "stage_conditions"))
    refuse_other_conditions(stage, state["stage_conditions"], path)
    stage.module.load_state_dict(state["module"])
    stage.optimizer.load_state_dict(state["optimizer"])
    pending = [(step, files, values.to(args.device), norms) for step, files, values, norms in state["pending"]]
    return state["step"], state["run_seed"], state["best"], pending


def leave():
    """End the process group; not after an error in one process, while the others wait in a collective."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier():
    if dist.is_initialized():
        dist.barrier()


def refuse_other_conditions(stage, found, path):
    """Raise InputError naming the options in which the checkpoint at `path` differs from this stage."""
    differing = [f"{k} (there {found.get(k)}, here {v})" for k, v in stage.conditions.items() if found.get(k) != v]
    if differing:
        raise InputError(f"{path}: from a different experiment: {'; '.join(differing)}; "
                         "choose another --out or --name, or give its options")


class Stop:
    """SIGINT or SIGTERM ends the run after the current step, with its state saved."""
    asked = False

    @classmethod
    def listen(cls):
        def ask(*_):
            if cls.asked:
                raise KeyboardInterrupt
            cls.asked = True
            print("stopping after this step; once more to stop at once", file=sys.stderr)
        signal.signal(signal.SIGINT, ask)
        signal.signal(signal.SIGTERM, ask)

    @classmethod
    def agreed(cls, step, args):
        """Whether any process was asked; several processes compare notes every ten steps."""
        if args.processes == 1:
            return cls.asked
        if step % 10:
            return False
        flag = torch.tensor(float(cls.asked), device=args.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag.item())


# ---------------------------------------------------------------- the three stages in a row

def finished_teacher(args, data):
    """The frozen teacher of --teacher-weights FILE or voc; None where stage 1 must train it.

    Raises InputError for another network, other classes or a last.pt of an unfinished stage (a best.pt does not say).
    """
    if args.teacher_weights == "voc":
        teacher = Teacher(args.teacher, len(data.classes))
        initialise(teacher, args.teacher, "voc")
    elif args.teacher_weights not in ("imagenet", "none"):
        teacher, state = load_network(args.teacher_weights)
        if state["name"] != args.teacher or state["classes"] != data.classes:
            raise InputError(f"{args.teacher_weights}: holds {state['name']} with {len(state['classes'])} classes, "
                             f"wanted {args.teacher} with these {len(data.classes)}; give --teacher, or the right checkpoint")
        planned = state.get("stage_conditions", {}).get("teacher_steps", 0)
        if state["step"] < planned:
            raise InputError(f"{args.teacher_weights}: trained for {state['step']} of its {planned} steps; "
                             "finish it with the command that began it")
    else:
        return None
    return teacher.to(args.device, memory_format=torch.channels_last).freeze()


def report_pool(fitter, teacher, args, data):
    """Print the fitted pool's mean average precision on val crops beside the class-frequency baseline."""
    outputs, truth = [], []
    fitter.eval()
    with torch.no_grad():
        for i in spread(len(data.pairs["val"]), args.val_images):
            image, label, _ = EvalImages(data, "val", args.base, [i])[0]
            label = F.interpolate(label[None, None].float(), image.shape[1:], mode="nearest-exact")[0].long()
            y, x = (max(0, side - args.crop) // 2 for side in image.shape[1:])
            image, label = (t[:, y:y + args.crop, x:x + args.crop] for t in (image, label))
            pad = (0, args.crop - image.shape[2], 0, args.crop - image.shape[1])
            image = F.pad(normalise(image[None].to(args.device)), pad)
            outputs.append(fitter(teacher(image)[1]))
            truth.append(presence(label.to(args.device), len(data.classes)))
    outputs, truth = torch.cat(outputs), torch.cat(truth)
    frequency = truth.mean(0)
    some = (frequency > 0) & (frequency < 1)
    every = [c for c, f in zip(data.classes, frequency.tolist()) if f == 1]
    found = 100 * average_precision(outputs, truth)[some].mean()
    print(f"pool: mean average precision on {len(truth)} val crops {found:.1f}, class frequency alone {100 * frequency[some].mean():.1f}"
          + (f"; in every crop, so teaching nothing: {', '.join(every)}" if every else ""))


def seconds_per_step(stage, args, data):
    """Median of three real steps of a throw-away stage, after one to warm up."""
    images, labels, _ = next(iter(loader(argparse.Namespace(**vars(args) | {"workers": 0}), data, args.seed, 0, 1)))
    times = []
    stage.module.train()
    for _ in range(4):
        begin = time.monotonic()
        x, y = to_device(images, labels, args)
        with precision(args):
            loss = losses.total_loss(stage.terms(x, y), stage.weights)
        stage.optimizer.zero_grad()
        loss.backward()
        stage.optimizer.step()
        if args.gpus:
            torch.cuda.synchronize()
        times.append(time.monotonic() - begin)
    return sorted(times[1:])[1]


def announce(args, data, given):
    """Print the stages that are left: steps, measured seconds a step, expected time."""
    draft = argparse.Namespace(**vars(args) | {"teacher_weights": "none", "student_weights": "none"})
    teacher = build_teacher_stage(draft, data)
    pool = build_pool_stage(draft, data, teacher.module)
    student = build_student_stage(draft, data, teacher.module, pool.module.pool) if args.method != "teacher" else None
    lines, total = [], 0
    for stage, folder in ((None if given else teacher, teacher_folder(args)),
                          (pool if args.method in ("c2vkd", "teacher") and not args.clip else None, pool.folder),
                          (student, student and student.folder)):
        if stage is None:
            continue
        path = folder / "last.pt"
        left = stage.steps - (load_checkpoint(path, ("step",))["step"] if path.exists() else 0)
        if left > 0:
            seconds = seconds_per_step(stage, args, data)
            total += left * seconds
            lines.append(f"  {stage.name:8s}{left:7,d} steps x {seconds:.2f} s = {duration(left * seconds)}")
    if lines and args.rank == 0:
        print(f"{args.dataset}: {len(data.pairs['train'])} training and {len(data.pairs['val'])} validation images, "
              f"{len(data.classes)} classes; seed {args.seed}; device {args.device}")
        print("\n".join(lines) + f"\n  expected: about {duration(total)}, validation not counted", flush=True)


def duration(seconds):
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def train(args):
    """Stages 1 to 3, then the table."""
    if args.rank == 0:
        open_dataset(args.dataset, args.data)  # one process draws or downloads
    barrier()
    data = open_dataset(args.dataset, args.data)
    if args.batch_size % args.processes:
        raise InputError(f"--batch-size {args.batch_size}: must be a multiple of the {args.processes} processes")
    given = finished_teacher(args, data)
    if args.method != "teacher":  # a wrong or missing file shows now, not after hours of stage 1
        load_encoder(Student(args.student, len(data.classes)).encoder, args.student, args.student_weights)
    if args.clip:
        load_clip_pool(AttentionPool(CHANNELS[args.teacher], pool_grid(args.teacher, args.crop)), args.clip)
    announce(args, data, given is not None)
    Stop.listen()

    if given is None:
        stage = build_teacher_stage(args, data)
        run_stage(stage, args, data)
        teacher = stage.module.freeze()
    else:
        teacher = given
    teacher_result = teacher_scores(teacher, args, data)
    print_main(args, f"teacher {args.teacher}: val mIoU {teacher_result['miou']:.2f}")

    pool = finished_pool(args, data, teacher) if args.method in ("c2vkd", "vlfd", "teacher") else None
    rows = [(f"teacher {args.teacher}", count_parameters(teacher), teacher_result)]
    folder = teacher_folder(args)

    if args.method != "teacher":
        stage = build_student_stage(args, data, teacher, pool)
        folder = stage.folder
        if args.compile:
            teacher.compile()
            stage.module.compile()
        run_stage(stage, args, data)
        rows.append((f"student {args.method} {args.student}", count_parameters(stage.network),
                     json.loads((folder / "results-val.json").read_text())))
    if args.rank == 0:
        print("\n" + table(rows, data.classes))
        if (folder / "log.csv").exists():  # a teacher that was given has none
            summary(folder, args)


def finished_pool(args, data, teacher):
    """Stage 2: the frozen pool P, from --clip or fitted."""
    stage = build_pool_stage(args, data, teacher)
    if args.clip:
        load_clip_pool(stage.module.pool, args.clip)
    else:
        run_stage(stage, args, data)
        if args.rank == 0:
            report_pool(stage.module, teacher, args, data)
    return stage.module.pool.requires_grad_(False).eval()


def teacher_scores(teacher, args, data):
    """The teacher's scores on all of val: read from its folder, else measured."""
    path = teacher_folder(args) / "results-val.json"
    if path.exists() and args.teacher_weights in ("imagenet", "none"):
        return json.loads(path.read_text())
    return scores(evaluate(teacher, data, "val", args.base, args.crop, args.device, desc="teacher: validation").cpu())


def print_main(args, text):
    """Print once, however many processes there are."""
    if args.rank == 0:
        print(text, flush=True)


def summary(folder, args):
    """The term report, curves.png where matplotlib is installed, and where everything lies."""
    with open(folder / "log.csv", newline="") as f:
        log = list(csv.DictReader(f))
    last = [r for r in log if any(v for k, v in r.items() if k.startswith("grad_"))][-1:]
    for row in last:
        print(f"\nterms at step {row['step']}     raw      weighted   gradient norm in the encoder (raw, weighted)")
        for name, weight in args.term_weights.items():
            norm = float(row[f"grad_{name}"])
            raw, weighted = float(row[f"raw_{name}"]), float(row[f"weighted_{name}"])
            print(f"  {name:8s}{raw:14.4g}{weighted:12.4g}{norm:14.4g}{weight * norm:14.4g}")
    curves(log, folder)
    pictures = sorted((folder / "pictures").glob("*.png"))
    print(f"\nrun folder: {folder}\npicture: {pictures[-1]}")


def curves(log, folder):
    """curves.png: val mIoU and the weighted terms over steps; skipped without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    for axis, wanted in zip(axes, ("val_miou", "weighted_")):
        for key in (k for k in log[0] if k.startswith(wanted)):
            points = [(int(r["step"]), float(r[key])) for r in log if r[key]]
            axis.plot(*zip(*points), marker="." if wanted == "val_miou" else "", label=key)
        axis.set_xlabel("step")
        axis.legend()
    figure.savefig(folder / "curves.png", dpi=100)
    pyplot.close(figure)


def launch(args):
    """--gpus N > 1: this script again under torch.distributed.run, one process a GPU."""
    os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", "--standalone",
                              "--nproc-per-node", str(args.gpus), *sys.argv])


def main():
    args = parse_options()
    if args.gpus > 1 and "RANK" not in os.environ:
        launch(args)
    args.rank, args.processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    args.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if args.gpus else torch.device("cpu")
    if args.gpus:
        torch.cuda.set_device(args.device)
    if args.processes > 1:
        # the others wait while one process draws, downloads or scores
        dist.init_process_group("nccl" if args.gpus else "gloo", timeout=timedelta(hours=6))
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        train(args)
        leave()
    except Interrupted:
        leave()
        raise
    except RuntimeError as e:
        if "DataLoader worker" in str(e):
            raise InputError("a loader process died (out of memory?): "
                             "run the same command again with fewer --workers") from None
        raise


if __name__ == "__main__":
    command(main)
