"""Train a CNN teacher, fit its attention pool, distil a Vision Transformer student.

    python train.py                                   # embedded data set: teacher, student alone, student distilled
    python train.py --dataset ade20k --gpus 1
    python train.py --dataset folder --data path/to/data --method ce
    torchrun --nnodes 2 --nproc-per-node 8 ... train.py --dataset cityscapes

Stage 1 trains the teacher (`train_teacher`), stage 2 fits the pool P (`fit_pool`), stage 3 distils (`distil`). The same
command again continues where it stopped; a finished run prints its table.
"""
import argparse
import csv
import math
import os
import signal
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import losses
from data import (DATASETS, InputError, Parser, TrainStream, at_least, command, data_folder, load_checkpoint,
                  load_strictly, normalise, open_dataset, progress, quiet_worker, save_tensors, unlabelled_slots,
                  write_atomically)
from evaluate import (commonest, comparison, evaluate, load_network, read_scores, report, report_terms, scores, table,
                      write_json, write_scores)
from student import VARIANTS, Student, StudentWithHeads, count_parameters, load_encoder
from teacher import (TEACHERS, PoolFitter, Teacher, average_precision, initialise, load_clip_pool, pool_grid,
                     is_backbone, presence)


# ---------------------------------------------------------------- the three stages

def distil(args, data, teacher, pool):
    """Stage 3: the student learns from the labels and, unless the method is `ce`, from the frozen teacher.

    teacher, pool: frozen, None where the method needs none. Returns the student.
    """
    method = losses.METHODS[args.method]
    torch.manual_seed(args.seed)
    student = Student(args.student, len(data.classes))
    load_encoder(student.encoder, args.student, args.student_weights)
    module = StudentWithHeads(student, teacher.channels if teacher else None, args.seed, method.needs)
    module, net = on_device(module, args)  # module: what is trained and saved; net: the same for several processes
    # one rate for all parameters; biases and norms are not spared weight decay
    optimizer = torch.optim.AdamW(module.parameters(), args.lr, weight_decay=0.01, fused=bool(args.gpus))
    run = Run(args, data, "student", module, optimizer, network=student, shown={"teacher": teacher, "student": student})
    unlabelled = unlabelled_slots(data, args.batch_size) if "A_v" in method.needs else 0  # V^S, V^T need no label

    for step, images, labels in run.batches(unlabelled):
        run.set_rate(schedule(step, args.steps, args.warmup, power=1))
        with precision(args):
            with torch.no_grad():
                T = teacher(images) if teacher else None  # z^T, F^T
                if pool:
                    T = T._replace(embedding=pool(T.feature))  # e^T = P(F^T)
            S = net(images)  # z^S, F^S, A_v(F^S), e^S
            terms = method.terms(S, T, labels, args.kl)
            loss = losses.total_loss(terms, args.term_weights)  # Eq. 10
        measured = step % args.report_every == 0 or step == args.steps - 1
        norms = gradient_norms(terms, student.encoder, args) if measured else {}
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(terms, norms)
    return student.eval()


def train_teacher(args, data):
    """Stage 1: DeepLabV3 learns from the labels, with cross-entropy. Returns it frozen."""
    torch.manual_seed(args.seed)
    teacher = Teacher(args.teacher, len(data.classes))
    initialise(teacher, args.teacher, args.teacher_weights)
    teacher, net = on_device(teacher, args)
    if args.teacher_weights == "none":
        optimizer = torch.optim.AdamW(teacher.parameters(), args.teacher_lr, weight_decay=0.01)
    else:  # ours: the field's usual recipe, the fresh head ten times faster
        optimizer = torch.optim.SGD([{"params": teacher.backbone.parameters()},
                                     {"params": teacher.classifier.parameters(), "lr": 10 * args.teacher_lr}],
                                    args.teacher_lr, momentum=0.9, weight_decay=5e-4)
    run = Run(args, data, "teacher", teacher, optimizer, network=teacher, shown={"teacher": teacher})

    for step, images, labels in run.batches():
        run.set_rate(schedule(step, args.teacher_steps, args.warmup, power=0.9))
        with precision(args):
            terms = {"ce": losses.cross_entropy(net(images).logits, labels)}
        optimizer.zero_grad()
        terms["ce"].backward()
        optimizer.step()
        run.log(terms)
    return teacher.freeze()


def fit_pool(args, data, teacher):
    """Stage 2: the pool P learns to name what the frozen teacher sees. Returns it frozen."""
    torch.manual_seed(args.seed)
    grid = pool_grid(teacher, args.crop, args.device)
    fitter, net = on_device(PoolFitter(teacher.channels, grid, len(data.classes)), args)
    optimizer = torch.optim.AdamW(fitter.parameters(), 3e-4, weight_decay=0.01)  # ours
    run = Run(args, data, "pool", fitter, optimizer)

    for step, images, labels in run.batches():
        run.set_rate(schedule(step, args.pool_steps, args.warmup, power=1))
        with precision(args):
            with torch.no_grad():
                F_T = teacher(images).feature
            present = net(F_T).float()  # B,K: logits of "class k is in this crop"
        terms = {"bce": F.binary_cross_entropy_with_logits(present, presence(labels, len(data.classes)))}
        optimizer.zero_grad()
        terms["bce"].backward()
        optimizer.step()
        run.log(terms)
    if args.rank == 0:
        report_pool(fitter, teacher, args, data)
    return fitter.pool.requires_grad_(False).eval()


# ---------------------------------------------------------------- what the loops share

def schedule(step, steps, warmup, power):
    """Factor on the rate at `step` = 0 ... steps - 1: linear warm-up, then (1 - progress)^power, down to zero."""
    # differs: paper polynomial of power 1, release's ends at 0.41 of the rate, here at zero
    warmup = min(warmup, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return (1 - (step - warmup) / (steps - warmup)) ** power


def precision(args):
    """bf16 autocast on CUDA, float32 on a CPU."""
    return torch.autocast(args.device.type, torch.bfloat16, enabled=bool(args.gpus))


def on_device(module, args):
    """The module on its device, and the same wrapped for several processes."""
    module = module.to(args.device, memory_format=torch.channels_last)
    if not dist.is_initialized():
        return module, module
    if args.gpus:
        module = torch.nn.SyncBatchNorm.convert_sync_batchnorm(module)
    return module, DistributedDataParallel(module, device_ids=[args.device] if args.gpus else None)


def gradient_norms(terms, encoder, args):
    """L2 norm of each unweighted term's gradient in the student's encoder; gradients are averaged over processes."""
    parameters = list(encoder.parameters())
    norms = {}
    for name, term in terms.items():
        grads = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        flat = torch.cat([losses.at_least_float32(g).flatten() for g in grads if g is not None])
        norms[name] = losses.all_sum(flat).double().norm().item() / args.processes
    return norms


class Run:
    """Folder, log and checkpoint of one stage; where the folder holds its last.pt, the stage continues from there.

    stage: "teacher", "pool" or "student"; network: the deployed part of `module`, validated (None: no validation);
    shown: name -> network, the columns of the validation pictures.
    """
    SAVE_SECONDS = 900  # between checkpoints where validations are rarer
    stop = False  # a signal came: end after the next row of the log

    def __init__(self, args, data, stage, module, optimizer, network=None, shown=None):
        self.args, self.data, self.stage, self.module, self.optimizer = args, data, stage, module, optimizer
        self.network, self.shown = network, shown
        self.folder, self.steps, self.weights, self.conditions, self.description = experiment(args, data, stage)
        self.val_every = args.val_every or -(-self.steps // 4)
        kinds = ("raw", "weighted", "grad") if stage == "student" else ("raw", "weighted")
        self.fields = ["step", "lr", "seconds_per_step", "total", *(f"{k}_{n}" for k in kinds for n in self.weights)]
        self.fields += ["val_miou"] if network is not None else []
        self.step, self.seed, self.values, self.norms = 0, args.seed, [], {}
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.folder.mkdir(parents=True, exist_ok=True)
        if agreed((self.folder / "last.pt").exists()):
            self.resume()
        if args.rank == 0 and self.step < self.steps:
            write_json(self.folder / "options.json", {k: v for k, v in vars(args).items() if k != "device"})
            self.shorten_log()

    def resume(self):
        """Continue from last.pt. Raises InputError where it belongs to another experiment."""
        path = self.folder / "last.pt"
        state = load_checkpoint(path, ("step", "run_seed", "optimizer", "module", "stage_conditions"))
        found = state["stage_conditions"]
        differing = [f"{k} (there {found.get(k)}, here {v})" for k, v in self.conditions.items() if found.get(k) != v]
        if state.get("classes", self.data.classes) != self.data.classes:
            differing.append("names or order of the classes")
        other = "choose another --out or --name" if self.stage == "student" else "choose another --out"
        if differing:
            raise InputError(f"{path}: from a different experiment: {'; '.join(differing)}; {other}, or give its "
                             "options and classes.txt")
        there, here = (os.path.abspath(data_folder(self.args.dataset, of.get("data")))
                       for of in (state, self.description))
        if there != here:
            print(f"NOTE: {path} was trained on --data {there}: if that held other images, {other}")
        load_strictly(self.module, state["module"], path, f"this {self.stage}", other)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seed = state["step"], state["run_seed"]

    def batches(self, unlabelled=0):
        """(step, images, labels) from here to the last step, on the device; images normalised (B,3,crop,crop) float32,
        labels (B,crop,crop) int64. `unlabelled` images of each batch have no labels."""
        args = self.args
        share = args.batch_size // args.processes
        stream = TrainStream(self.data, self.seed, args.base, args.crop, args.scale, self.steps * args.batch_size,
                             args.batch_size, unlabelled)
        mine = [step * args.batch_size + args.rank * share + i
                for step in range(self.step, self.steps) for i in range(share)]
        loader = DataLoader(stream, batch_size=share, sampler=mine, num_workers=args.workers,
                            worker_init_fn=quiet_worker, pin_memory=bool(args.gpus), generator=torch.Generator())
        if self.step == 0 and self.stage == "student":
            self.write_row(self.validate())
        self.module.train()
        self.bar = progress(loader, desc=self.stage, total=self.steps, initial=self.step, unit="step",
                            disable=args.rank > 0)
        self.saved = self.began = time.monotonic()
        for images, labels in self.bar:
            # dropout and stochastic depth are a function of (seed, step), so nothing random has to be saved
            torch.manual_seed(self.seed + 1_000_003 * (self.step * args.processes + args.rank + 1))
            images = normalise(images.to(args.device, non_blocking=True)).contiguous(memory_format=torch.channels_last)
            yield self.step, images, labels.to(args.device, non_blocking=True).long()
        barrier()

    def set_rate(self, factor):
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def log(self, terms, norms={}):
        """After a step: count it, keep its terms; where a row of the log is due, validate if due, write it, save."""
        self.step += 1
        self.values.append(torch.stack([terms[n].detach().float() for n in self.weights]))
        self.norms |= norms
        validation_due = self.step % self.val_every == 0 or self.step == self.steps
        if not (validation_due or self.step % self.args.log_every == 0):
            return
        values = losses.all_sum(torch.stack(self.values)).double().cpu() / self.args.processes  # steps, terms
        self.check_finite(values)
        seconds = (time.monotonic() - self.began) / len(self.values)
        miou = self.validate() if validation_due and self.network is not None else None
        self.write_row(miou, values, seconds)
        if validation_due or self.stop or time.monotonic() - self.saved > self.SAVE_SECONDS:
            self.save()
        if self.stop:
            self.bar.close()
            raise KeyboardInterrupt(f"{self.stage}: stopped and saved at step {self.step}; "
                                    "run the same command again to continue")
        self.values, self.norms, self.began = [], {}, time.monotonic()

    def check_finite(self, values):
        """Stop before a non-finite step reaches a checkpoint, with every term; (seed, step) identifies the batch."""
        bad = (~values.isfinite().all(1)).nonzero().flatten().tolist()
        if not bad and not torch.stack([p.isfinite().all() for p in self.module.parameters()]).all():
            bad = [len(values) - 1]
        if bad:
            listed = ", ".join(f"{n} {v:.4g}" for n, v in zip(self.weights, values[bad[0]].tolist()))
            step = self.step - len(values) + bad[0] + 1
            raise InputError(f"{self.stage}, step {step} of seed {self.seed}: a loss or its gradient is not finite "
                             f"({listed}); nothing of it was saved in {self.folder}; lower --lr or --teacher-lr")

    def write_row(self, miou=None, values=None, seconds=0.0):
        """Append a row to log.csv: means over the steps since the last one."""
        row = {"step": self.step} | ({} if miou is None else {"val_miou": f"{miou:.3f}"})
        weighted = {}
        if values is not None:
            means = dict(zip(self.weights, values.mean(0).tolist()))
            weighted = {n: self.weights[n] * v for n, v in means.items()}
            row |= {"lr": f"{self.optimizer.param_groups[0]['lr']:.4g}", "seconds_per_step": f"{seconds:.3f}",
                    "total": f"{sum(weighted.values()):.6g}"}
            for kind, found in (("raw", means), ("weighted", weighted), ("grad", self.norms)):
                row |= {f"{kind}_{n}": f"{v:.6g}" for n, v in found.items()}
        if self.args.rank == 0:
            with open(self.folder / "log.csv", "a", newline="") as f:
                csv.DictWriter(f, self.fields, lineterminator="\n").writerow(row)
            shown = " ".join(f"{n} {v:.3f}" for n, v in weighted.items())
            if miou is not None or not sys.stderr.isatty():  # on a terminal the bar shows the terms
                scored = f" val mIoU {miou:.2f}" if miou is not None else ""
                tqdm.write(f"{self.stage} {self.step}/{self.steps}: {shown}{scored}")
            if values is not None:
                self.bar.set_postfix_str(shown)

    def shorten_log(self):
        """Drop the rows of log.csv that were written after the checkpoint from which the run continues."""
        path, rows = self.folder / "log.csv", []
        if self.step and path.exists():
            rows = [r for r in path.read_text().splitlines()[1:]  # a killed run may have left half a row
                    if r.count(",") == len(self.fields) - 1 and int(r.split(",")[0]) <= self.step]
        write_atomically(path, "".join(f"{r}\n" for r in [",".join(self.fields), *rows]).encode())

    def validate(self):
        """mIoU in percent on val, at the last step on all of it (then into results-val.json); draws a picture."""
        args, last = self.args, self.step == self.steps
        if dist.is_initialized():  # without SyncBatchNorm, on CPUs, each process has running statistics of its own
            for buffer in self.module.buffers():
                dist.broadcast(buffer, 0)
        self.module.eval()
        matrix = evaluate(self.network, self.data, "val", args.base, args.crop, args.device, workers=args.workers,
                          images=None if last else args.val_images, desc=f"{self.stage}: validation")
        result = scores(matrix.cpu())
        if args.rank == 0:
            (self.folder / "pictures").mkdir(exist_ok=True)
            picture = comparison(self.data, "val", args.base, args.crop, self.shown, args.device)
            picture.save(self.folder / f"pictures/step{self.step:06d}.png")
            if last:
                write_scores(self.folder, "val", result, self.description | {"step": self.step})
        self.module.train()
        return result["miou"]

    def save(self):
        """last.pt: all that continues the stage, and what evaluate.py has to know of the network in it."""
        if self.args.rank == 0:
            save_tensors(self.folder / "last.pt", self.description | {
                "step": self.step, "run_seed": self.seed, "stage_conditions": self.conditions,
                "module": self.module.state_dict(), "optimizer": self.optimizer.state_dict()})
        self.saved = time.monotonic()


def experiment(args, data, stage):
    """Folder, steps, weights of the terms, conditions and description of a stage.

    A folder made under other conditions is refused; the description is for readers of its checkpoint.
    """
    conditions = {n: getattr(args, n) for n in ("dataset", "base", "crop", "scale", "batch_size", "warmup")}
    conditions |= {"classes": len(data.classes), "train_images": len(data.pairs["train"])}
    of_teacher = {n: getattr(args, n) for n in ("teacher", "teacher_weights", "teacher_steps", "teacher_lr")}
    description = {"name": args.teacher, "dataset": args.dataset, "data": args.data and os.path.abspath(args.data),
                   "classes": list(data.classes), "palette": [list(c) for c in data.palette],
                   "base": args.base, "window": args.crop}
    folder = Path(args.out) / args.dataset
    if stage == "teacher":
        return folder / f"teacher-{args.teacher}", args.teacher_steps, {"ce": 1.0}, conditions | of_teacher, description
    if stage == "pool":
        conditions |= of_teacher | {"pool_steps": args.pool_steps}
        return folder / f"teacher-{args.teacher}" / "pool", args.pool_steps, {"bce": 1.0}, conditions, {}
    if "teacher" in losses.METHODS[args.method].needs:
        conditions |= of_teacher
    conditions |= {n: getattr(args, n) for n in ("student", "student_weights", "steps", "lr")}
    own = {n: getattr(args, n) for n in ("method", "seed", "kl")} | {"weights": args.term_weights}
    if "A_l" in losses.METHODS[args.method].needs:
        own |= {"pool_steps": args.pool_steps, "clip": args.clip}
    if "A_v" in losses.METHODS[args.method].needs:
        own |= {"unlabelled_images": len(data.pairs.get("unlabelled", ()))}
    description |= {"name": args.student, "method": args.method, "seed": args.seed, "conditions": conditions,
                    "options": {k: v for k, v in own.items() if k not in ("method", "seed")},
                    "label": args.name and args.name.removesuffix(f"-seed{args.seed}")}
    name = args.name or f"{args.method}-{args.student}-seed{args.seed}"
    return folder / name, args.steps, args.term_weights, conditions | own, description


def agreed(flag):
    """What process 0 found, told to all, so that none waits for the others where a network file system lags."""
    found = [flag]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    return found[0]


def barrier():
    if dist.is_initialized():
        dist.barrier()


# ---------------------------------------------------------------- the stages in a row, and the report

def train(args):
    """Stages 1 to 3 as far as the method needs them, then the table."""
    if args.rank == 0:
        open_dataset(args.dataset, args.data)  # one process draws or downloads
    barrier()
    data = open_dataset(args.dataset, args.data)
    if args.batch_size % args.processes:
        raise InputError(f"--batch-size {args.batch_size}: must be a multiple of the {args.processes} processes")
    needs = {"teacher", "A_l"} if args.method == "teacher" else losses.METHODS[args.method].needs
    # a wrong or missing file shows now, not after hours of stage 1
    given = given_teacher(args, data) if needs else None
    if args.clip:
        load_clip_pool(args.clip, TEACHERS[args.teacher].channels, grid=16)
    aside = [] if args.method == "teacher" else \
        load_encoder(Student(args.student, len(data.classes)).encoder, args.student, args.student_weights)
    if needs and not given and not args.gpus and args.batch_size == args.processes:
        raise InputError(f"--batch-size {args.batch_size}: the teacher's BatchNorm needs two images a process on CPUs; "
                         f"take {2 * args.processes} or more")
    announce(args, data, needs, given, aside)

    teacher = pool = student = None
    given_scores = scores_of_given(given, args, data) if given else None
    if needs:
        teacher = given or train_teacher(args, data)
    if "A_l" in needs:
        pool = fit_pool(args, data, teacher) if not args.clip else load_clip_pool(
            args.clip, teacher.channels, pool_grid(teacher, args.crop, args.device)).to(args.device)
    if args.both:
        distil(alone(args), data, None, None)
    if args.method != "teacher":
        student = distil(args, data, teacher, pool)
    if args.rank == 0:
        report_run(args, data, teacher, given_scores, student)


def alone(args):
    """The options of the same student's run without a teacher."""
    return argparse.Namespace(**vars(args) | dict(method="ce", term_weights=losses.METHODS["ce"].weights, name=None,
                                                  kl="forward", clip=None))


def announce(args, data, needs, given, aside):
    """Print the data, the recipe and the stages before they begin."""
    print(f"{args.dataset}: {len(data.pairs['train'])} training and {len(data.pairs['val'])} validation images, "
          f"{len(data.classes)} classes; recipe {args.recipe}; seed {args.seed}; device {args.device}")
    if data.pairs.get("unlabelled"):
        used = unlabelled_slots(data, args.batch_size)
        print(f"{len(data.pairs['unlabelled'])} images without labels: {used} of the {args.batch_size} in a batch, "
              "for methods with A_v")
    if aside:
        print(f"student encoder: {args.student_weights}; not loaded: {', '.join(aside)}")
    stages = {f"teacher {args.teacher}": args.teacher_steps if needs and not given else 0,
              "pool": args.pool_steps if "A_l" in needs and not args.clip else 0,
              f"student {args.student}, alone": args.steps if args.both else 0,
              f"student {args.student}, {args.method}": args.steps if args.method != "teacher" else 0}
    print("stages: " + "; ".join(f"{name}: {steps:,} steps" for name, steps in stages.items() if steps), flush=True)


def given_teacher(args, data):
    """The frozen teacher of --teacher-weights FILE or voc; None where stage 1 must train it.

    FILE: a finished last.pt of this project or a plain torchvision state dict. Raises InputError for another network,
    other classes or a last.pt of an unfinished stage.
    """
    source = args.teacher_weights
    if source in ("imagenet", "none"):
        return None
    if source != "voc":
        state = load_checkpoint(source)
        if "module" not in state and is_backbone(state):
            return None
    if source == "voc" or "module" not in state:
        teacher = Teacher(args.teacher, len(data.classes))
        initialise(teacher, args.teacher, source)
    else:
        teacher, state = load_network(source)
        if state["name"] != args.teacher or state["classes"] != data.classes:
            raise InputError(f"{source}: holds {state['name']} with {len(state['classes'])} classes, wanted "
                             f"{args.teacher} with these {len(data.classes)}; give --teacher, or the right checkpoint")
        planned = state["stage_conditions"]["teacher_steps"]
        if state["step"] < planned:
            raise InputError(f"{source}: trained for {state['step']} of its {planned} steps; "
                             "finish it with the command that began it")
    return teacher.to(args.device, memory_format=torch.channels_last).freeze()


def scores_of_given(teacher, args, data):
    """The scores on val of a teacher that was given, measured and printed."""
    matrix = evaluate(teacher, data, "val", args.base, args.crop, args.device, workers=args.workers).cpu()
    result = scores(matrix)
    print(table([(f"teacher {args.teacher}", count_parameters(teacher), None, result)], data.classes))
    if result["miou"] <= commonest(matrix):
        print("WARNING: this teacher is no better than always answering the commonest class: are its classes in this "
              "order, its pictures RGB with ImageNet's mean and deviation?")
    return result


@torch.no_grad()
def report_pool(fitter, teacher, args, data):
    """Print the fitted pool's mean average precision on val crops beside the class-frequency baseline."""
    count = min(args.val_images, len(data.pairs["val"]))
    val = TrainStream(replace(data, pairs={"train": data.pairs["val"]}), args.seed, args.base, args.crop, (1, 1), count)
    fitter.eval()
    found, truth = [], []
    for image, label in (val[i] for i in range(count)):
        found.append(fitter(teacher(normalise(image[None].to(args.device))).feature).cpu())
        truth.append(presence(label[None].long(), len(data.classes)))
    truth = torch.cat(truth)
    frequency = truth.mean(0)
    some = (frequency > 0) & (frequency < 1)
    if not some.any():
        return print(f"pool: no class is in some of the {count} val crops and not in others: nothing to measure")
    mean_precision = average_precision(torch.cat(found), truth)[some].mean()
    every = [name for name, f in zip(data.classes, frequency) if f == 1]
    print(f"pool: mean average precision on {count} val crops {100 * mean_precision:.1f}, class frequency alone "
          f"{100 * frequency[some].mean():.1f}; in every crop, so that they teach nothing: {', '.join(every) or '-'}")


def report_run(args, data, teacher, given_scores, student):
    """Print the table of the teacher, the student alone (where its run is at hand) and this student; draw them."""
    entries = {}

    def add(label, network, folder):
        result = read_scores(folder / "results-val.json")
        entries[label] = network, result, folder / "log.csv"

    if given_scores:
        entries["teacher"] = teacher, given_scores, None
    elif teacher:
        add("teacher", teacher, experiment(args, data, "teacher")[0])
    if student and args.method != "ce":
        other, steps, _, conditions, _ = experiment(alone(args), data, "student")
        if (other / "results-val.json").exists() and (other / "last.pt").exists():
            network, state = load_network(other / "last.pt", args.device)
            if state["stage_conditions"] == conditions and state["step"] == steps:
                add("student alone", network.to(memory_format=torch.channels_last), other)
    folder = experiment(args, data, "student" if student else "teacher")[0]
    if student:
        add("student alone" if args.method == "ce" else f"student {args.method}", student, folder)
        report_terms(folder, args.term_weights)
    report(folder, entries, data, args.base, args.crop, args.device)


# ---------------------------------------------------------------- recipes

# base: short side at scale 1, training and evaluation alike; scale: range of the random resizing.
# differs: paper's schedule known for Cityscapes alone, release's VOC script 6 a GPU and 3,670 steps, here: student's
# AdamW 6e-5 and decay the paper's, weight decay 0.01, warm-up 1,500 and scale 0.5-2.0 the release's; crop, batch and
# steps the paper's for Cityscapes, the field's for VOC and ADE20K
# unstated: how the teacher was trained; its steps are ours, and the CPU recipes throughout
FULL = dict(base=512, crop=512, scale=(0.5, 2.0), batch_size=16, warmup=1500, teacher="deeplabv3_resnet101",
            teacher_weights="imagenet", pool_steps=2000, student="mit_b0", student_weights="imagenet")
SMALL = dict(batch_size=8, teacher="deeplabv3_resnet10", teacher_weights="none",
             student="mit_nano", student_weights="none")
RECIPES = {
    "cityscapes": FULL | dict(base=1024, batch_size=24, steps=50_000, teacher_steps=40_000),
    "voc": FULL | dict(steps=40_000, teacher_steps=30_000, teacher_weights="voc"),
    "ade20k": FULL | dict(steps=80_000, teacher_steps=80_000),
    "full": FULL | dict(steps=20_000, teacher_steps=20_000, warmup=1000),  # of your own data, --dataset folder
    "small": SMALL | dict(base=96, crop=96, scale=(0.75, 1.5), steps=800, warmup=80,
                          teacher_steps=1500, pool_steps=100),
    "shapes": SMALL | dict(base=64, crop=64, scale=(1.0, 1.0), steps=400, teacher_steps=600, pool_steps=60, warmup=40),
}


def parse_options(argv=None):
    """The command line, with the recipe's values filled in. Raises InputError for values out of range."""
    p = Parser(usage="%(prog)s [options]", description="Distil a CNN teacher into a Vision Transformer student "
               "(C2VKD). Defaults marked * come from the data set's recipe.")
    steps, pixels = dict(type=at_least(1), metavar="N"), dict(type=at_least(32), metavar="PIXELS")
    rate = dict(type=at_least(1e-12, float), metavar="X")
    g = p.add_argument_group("what")
    g.add_argument("--dataset", default="shapes", choices=DATASETS, help="default shapes")
    g.add_argument("--data", metavar="DIR", help="its folder (default data/NAME)")
    g.add_argument("--method", choices=("teacher", *losses.METHODS), help="default c2vkd, on shapes ce and c2vkd; "
                   "teacher: stop after stage 2")
    g.add_argument("--recipe", choices=("small", "full"),
                   help="of folder: default full with a GPU, else small")
    g.add_argument("--out", default="runs", metavar="DIR", help="output folder (default runs)")
    g.add_argument("--name", metavar="NAME", help="folder, table row (default METHOD-STUDENT-seedN)")
    g = p.add_argument_group("teacher")
    g.add_argument("--teacher", choices=TEACHERS, help="*")
    g.add_argument("--teacher-weights", metavar="W", help="* imagenet | none | voc (finished) | FILE (a "
                   "finished last.pt, or torchvision's own state dict)")
    g.add_argument("--teacher-steps", **steps, help="*")
    g.add_argument("--teacher-lr", **rate, help="default 0.01 (SGD) from ImageNet, 0.001 (AdamW) from random weights")
    g.add_argument("--pool-steps", **steps, help="* steps that fit the attention pool")
    g.add_argument("--clip", metavar="FILE", help="take the pool of this CLIP RN101.pt, do not fit one")
    g = p.add_argument_group("student")
    g.add_argument("--student", choices=VARIANTS, help="*")
    g.add_argument("--student-weights", metavar="W", help="* imagenet | none | FILE")
    g.add_argument("--steps", **steps, help="*")
    g.add_argument("--lr", **rate, help="default 6e-5 from ImageNet, 0.001 from random weights")
    g.add_argument("--kl", default="forward", choices=("forward", "reverse"),
                   help="direction in Eq. 3, 4 and 9 (default forward)")
    g.add_argument("--weights", nargs="+", default=[], metavar="T=X",
                   help="of terms, as gb=0.1 lc=0.5, or summed | released")
    g = p.add_argument_group("batches")
    g.add_argument("--batch-size", type=at_least(2), metavar="N", help="* images, all GPUs together")
    g.add_argument("--crop", **pixels, help="* side of the square crop and of the evaluation window")
    g.add_argument("--base", **pixels, help="* short side of the images at scale 1")
    g.add_argument("--warmup", type=at_least(0), metavar="N",
                   help="* steps of linear warm-up (a tenth of a shorter stage)")
    g = p.add_argument_group("machine")
    g.add_argument("--gpus", type=at_least(0), metavar="N", help="default 1 if there is one, else 0: the CPU")
    g.add_argument("--workers", type=at_least(0), metavar="N", help="loader processes (default 8 a GPU, 0 on a CPU)")
    g.add_argument("--seed", type=at_least(0, below=2**32), default=0, metavar="N", help="default 0")
    g.add_argument("--deterministic", action="store_true", help="bitwise repeatable on CUDA, slower")
    g = p.add_argument_group("reports")
    g.add_argument("--log-every", default=20, **steps, help="steps a row of log.csv (default 20)")
    g.add_argument("--report-every", default=200, **steps, help="steps between gradient norms (default 200)")
    g.add_argument("--val-every", **steps, help="steps between validations (default a quarter of all)")
    g.add_argument("--val-images", default=200, **steps, help="images of those (default 200; the last one takes all)")
    args = p.parse_args(argv)

    found = torch.cuda.device_count()
    args.gpus = min(1, found) if args.gpus is None else args.gpus
    if args.gpus > found and "RANK" not in os.environ:
        remedy = f"--gpus {found}" if found else "--gpus 0 to run on the CPU"
        raise InputError(f"--gpus {args.gpus}: {found} CUDA devices found; use {remedy}")
    if args.recipe and args.dataset != "folder":
        raise InputError(f"--recipe {args.recipe}: {args.dataset} has one recipe; it goes with --dataset folder")
    args.recipe = args.recipe or (args.dataset if args.dataset != "folder" else "full" if args.gpus else "small")
    for key, value in RECIPES[args.recipe].items():
        if getattr(args, key, None) is None:
            setattr(args, key, list(value) if key == "scale" else value)
    # unstated: training from random weights, for which AdamW at 1e-3 does better than the paper's 6e-5 from ImageNet
    # weights (student) and the usual SGD 0.01 (teacher)
    args.lr = args.lr or (1e-3 if args.student_weights == "none" else 6e-5)
    args.teacher_lr = args.teacher_lr or (1e-3 if args.teacher_weights == "none" else 0.01)
    args.workers = (8 if args.gpus else 0) if args.workers is None else args.workers
    args.both = args.method is None and args.dataset == "shapes"
    args.method = args.method or "c2vkd"
    directed = args.method != "teacher" and losses.METHODS[args.method].has_direction
    if args.kl == "reverse" and not directed:
        raise InputError(f"--kl reverse: {args.method} has no direction to choose; it goes with --method c2vkd")
    if args.clip and args.method != "teacher" and "A_l" not in losses.METHODS[args.method].needs:
        raise InputError(f"--clip: {args.method} uses no attention pool; it goes with --method c2vkd")
    if args.teacher_weights == "voc" and args.dataset != "voc":
        raise InputError("--teacher-weights voc: that model knows VOC's classes only; use imagenet, none or a FILE")
    folder = Path(args.name or "default")
    if folder.is_absolute() or ".." in folder.parts or not folder.name:
        raise InputError(f"--name {args.name}: leaves the folder of the runs; --out chooses that")
    args.term_weights = term_weights(args)
    return args


def term_weights(args):
    """Weight of each term of the method after --weights. Raises InputError for a term it does not have."""
    if args.method == "teacher":
        if args.weights:
            raise InputError("--weights: the teacher's training has no terms to weigh; it goes with a method")
        return {}
    weights = dict(losses.METHODS[args.method].weights)
    if args.method == "c2vkd" and args.weights in (["summed"], ["released"]):
        return losses.c2vkd_weights(args.weights[0], TEACHERS[args.teacher].channels)
    for item in args.weights:
        name, _, value = item.partition("=")
        try:
            if name not in weights or not math.isfinite(float(value)):
                raise ValueError
            weights[name] = float(value)
        except ValueError:
            raise InputError(f"--weights {item}: {args.method} takes {' '.join(f'{n}=NUMBER' for n in weights)}"
                             + (" or one word, summed or released" if args.method == "c2vkd" else "")) from None
    return weights


# ---------------------------------------------------------------- processes

def listen():
    """SIGINT or SIGTERM ends the run after the next row of the log, with its state saved; a second one at once."""
    def ask(*_):
        if Run.stop:
            raise KeyboardInterrupt
        Run.stop = True
        print("stopping after the next row of the log; once more to stop at once", file=sys.stderr)

    signal.signal(signal.SIGINT, ask)
    signal.signal(signal.SIGTERM, ask)


def main():
    args = parse_options()
    if args.gpus > 1 and "RANK" not in os.environ:  # this script again, one process a GPU
        os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                  "--nproc-per-node", str(args.gpus), *sys.argv])
    args.rank, args.processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.rank:
        sys.stdout = open(os.devnull, "w")  # one process speaks
    args.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if args.gpus else torch.device("cpu")
    if args.gpus:
        torch.cuda.set_device(args.device)
        torch.backends.cudnn.benchmark = not args.deterministic
        # TF32 for the float32 products left under autocast, the Grams of the patch loss above all: they hardly amplify
        # the rounding of their inputs (gradient within 1%; within 3% where N < C and the student is near its teacher)
        torch.set_float32_matmul_precision("high")
    if args.processes > 1:
        # the others wait while one process draws, downloads or scores
        dist.init_process_group("nccl" if args.gpus else "gloo", timeout=timedelta(hours=6))
    else:
        listen()  # several processes rely on their checkpoints
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        train(args)
    except (RuntimeError, ConnectionError, EOFError) as e:  # the last two: from what a dead process left half sent
        if isinstance(e, BrokenPipeError) or isinstance(e, RuntimeError) and "DataLoader worker (pid" not in str(e):
            raise
        if Run.stop:  # the signal reached them, too
            raise KeyboardInterrupt from None
        raise InputError("a loader process died (out of memory?): "
                         "run the same command again with fewer --workers") from None
    if dist.is_initialized():  # not after an error in one process, while the others wait in a collective
        dist.destroy_process_group()


if __name__ == "__main__":
    command(main)
