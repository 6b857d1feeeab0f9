"""Train a CNN teacher, fit its attention pool, distil a Vision Transformer student.

    python train.py                                  # embedded data set: teacher, two students
    python train.py --dataset ade20k --gpus 1
    python train.py --dataset folder --data path/to/data --method ce
    torchrun --nnodes 2 --nproc-per-node 8 ... train.py --dataset cityscapes

Stage 1 trains the teacher (`train_teacher`), stage 2 fits the pool P (`fit_pool`), stage 3 distils
(`distil`). The same command again continues where it stopped. A finished run prints its table.
"""
import os

# Idle OpenMP threads spin and slow a busy machine. This makes them sleep soon. It is read when
# torch is imported
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import csv
import hashlib
import io
import math
import multiprocessing
import signal
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import losses
from data import (DATASETS, InputError, Parser, TrainStream, at_least, check, command,
                  first_difference, labels_digest, load_checkpoint, load_strictly, locked,
                  normalise, open_dataset, pictures_digest, progress, quiet_worker, save_tensors,
                  sizes_of_pictures, unwrap, write_atomically)
from evaluate import (default_workers, evaluate, miou_of_commonest_class, read_scores, report,
                      report_terms, scores, table, write_scores)
from losses import METHODS, cross_entropy, total_loss
from student import VARIANTS, Student, StudentWithHeads, count_parameters, load_encoder
from teacher import (TEACHERS, PoolFitter, Teacher, initialise, is_backbone, load_clip_pool,
                     pool_grid, presence)


# ---------------------------------------------------------------- the three stages

def distil(run, teacher=None, pool=None):
    """Stage 3: the student learns from the labels and, unless the method is `ce`, from the teacher.

    run: the Run of the student. teacher, pool: frozen, None where the method needs none.
    Returns the student.
    """
    stage, method = run.stage, METHODS[run.stage.method]
    torch.manual_seed(stage.seed)
    student = Student(stage.network, len(stage.classes))
    if run.start:
        student.encoder.load_state_dict(run.start)
    channels, earlier = (teacher.channels, teacher.earlier) if teacher else (None, ())
    trained = StudentWithHeads(student, channels, stage.seed, method.needs, earlier)
    trained = run.to_device(trained)
    # weight decay for all parameters, also biases and norms
    optimizer = torch.optim.AdamW(trained.parameters(), stage.rate, weight_decay=0.01,
                                  fused=run.cuda)
    run.resume(trained, optimizer)
    parallel = run.parallel(trained)  # the same network, with gradients averaged over processes
    log = Log(run)
    if log.lacks_scores():
        log.write(run.step, run.validate(run.step, student))

    for step, images, labels in run.batches(unlabelled="A_v" in method.needs):
        set_rate(optimizer, schedule(step, stage.steps, stage.warmup, power=1))
        with precision(run.device):
            with torch.no_grad():
                T = teacher(images) if teacher else None  # z^T, F^T, F^T_i
                if pool:
                    T = T._replace(embedding=pool(T.feature))  # e^T = P(F^T)
            S = parallel(images)  # z^S, F^S, A_v(F^S), A_v,i(F^S_i), e^S
            terms = method.function(S, T, labels)
            loss = total_loss(terms, stage.weights)  # Eq. 10
        if run.validation_due(step):
            log.add_gradients(terms, student.encoder)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        log.add(terms, loss)
        if run.row_due(step):
            log.average(step, optimizer, trained)
            run.save_if_due(step)
            log.write(step, run.validate(step, student))
    return student.eval()


def train_teacher(run):
    """Stage 1: DeepLabV3 learns from the labels, with cross-entropy. Returns it frozen."""
    stage = run.stage
    torch.manual_seed(stage.seed)
    teacher = Teacher(stage.network, len(stage.classes))
    if run.start:
        teacher.backbone.load_state_dict(run.start)
    teacher = run.to_device(teacher)
    optimizer = teacher_optimizer(teacher, stage)
    run.resume(teacher, optimizer)
    parallel = run.parallel(teacher)
    log = Log(run)
    if log.lacks_scores():
        log.write(run.step, run.validate(run.step, teacher))

    for step, images, labels in run.batches():
        set_rate(optimizer, schedule(step, stage.steps, stage.warmup, power=0.9))
        with precision(run.device):
            loss = cross_entropy(parallel(images).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        log.add({"ce": loss}, loss)
        if run.row_due(step):
            log.average(step, optimizer, teacher)
            run.save_if_due(step)
            log.write(step, run.validate(step, teacher))
    return teacher.freeze()


def fit_pool(run, teacher):
    """Stage 2: the pool P learns to name what the frozen teacher sees. Returns it frozen."""
    stage, classes = run.stage, len(run.stage.classes)
    torch.manual_seed(stage.seed)
    grid = pool_grid(teacher, stage.crop, run.device)
    fitter = run.to_device(PoolFitter(teacher.channels, grid, classes))
    optimizer = torch.optim.AdamW(fitter.parameters(), stage.rate, weight_decay=0.01)
    run.resume(fitter, optimizer)
    parallel = run.parallel(fitter)
    log = Log(run)

    for step, images, labels in run.batches():
        set_rate(optimizer, schedule(step, stage.steps, stage.warmup, power=1))
        with precision(run.device):
            with torch.no_grad():
                F_T = teacher(images).feature
            z_P = parallel(F_T).float()  # B,K: logits of "class k is in this crop"
        loss = F.binary_cross_entropy_with_logits(z_P, presence(labels, classes))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        log.add({"bce": loss}, loss)
        if run.row_due(step):
            log.average(step, optimizer, fitter)
            log.write(step)
            run.save_if_due(step)
    fitter.zero_grad()
    return fitter.pool.requires_grad_(False).eval()


# ---------------------------------------------------------------- what the loops call

def precision(device):
    """bf16 autocast on CUDA, float32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def schedule(step, steps, warmup, power):
    """Factor on the rate: linear warm-up, then (1 - progress)^power, towards zero.

    step: 1 ... steps.
    """
    # differs: the paper's schedule is a polynomial of power 1, the release's ends at 0.41 of the
    # rate, ours at zero
    warmup = min(warmup, steps // 10)
    done = step - 1
    if done < warmup:
        return step / warmup
    return (1 - (done - warmup) / (steps - warmup)) ** power


def set_rate(optimizer, factor):
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor


def teacher_optimizer(teacher, stage):
    """AdamW if it starts from random weights, else the usual SGD."""
    # unstated: how the teacher was trained. Here the fresh head has ten times the backbone's rate
    if stage.initial == "none":
        return torch.optim.AdamW(teacher.parameters(), stage.rate, weight_decay=0.01)
    return torch.optim.SGD([{"params": teacher.backbone.parameters()},
                            {"params": teacher.classifier.parameters(), "lr": 10 * stage.rate}],
                           stage.rate, momentum=0.9, weight_decay=5e-4)


def gradient_norms(terms, encoder):
    """L2 norm of each unweighted term's gradient in the encoder, averaged over processes first."""
    parameters = list(encoder.parameters())
    norms = []
    for term in terms.values():
        found = torch.autograd.grad(term, parameters, retain_graph=True, materialize_grads=True)
        flat = torch.cat([losses.at_least_float32(g).flatten() for g in found])
        flat = losses.all_sum(flat).double() / losses.process_count()
        norms.append(flat.norm().item())
    return norms


# ---------------------------------------------------------------- a stage: what it is, its run

@dataclass(frozen=True)
class Stage:
    """The identity of a stage: what its result depends on. Kept in its last.pt as a dict.

    A run continues only from a last.pt of an equal Stage.
    """
    stage: str  # its kind: teacher, pool or student
    network: str  # a row of TEACHERS or VARIANTS, or attention_pool
    initial: str  # what it starts from: none, imagenet, or a file's digest
    steps: int
    rate: float  # of the optimizer, at its highest
    warmup: int  # steps of linear warm-up
    batch_size: int  # of all processes together
    base: int  # short side of the images at scale 1, in pixels
    crop: int  # side of the square crops, in pixels
    scale: list  # range of the random resizing
    seed: int
    dataset: str
    classes: list  # names
    labels: str  # digest of the label files of train and val
    pictures: str  # digest of the names of their pictures
    weights: dict  # of the terms
    method: str | None = None
    unlabelled: str | int = 0  # digest of the names of the pictures without labels, if used
    teacher: dict | None = None  # the teacher's Stage, or network and digest of a given file
    pool: dict | None = None  # the pool's Stage, or the digest of CLIP's file


class Run:
    """A stage at work: what it is, on which data, where its files go, how it saves and resumes.

    The device, the number of processes and how often a run reports are no part of its Stage: it may
    go on elsewhere.

    label: what the tables call it, None for the name of its method.
    """
    SAVE_SECONDS = 900  # after these, save at the next row of the log

    def __init__(self, args, stage, data, folder, label=None):
        self.stage, self.data, self.folder = stage, data, folder
        self.identity = asdict(stage)
        self.device, self.cuda = args.device, args.device.type == "cuda"
        self.workers, self.log_every = args.workers, args.log_every
        self.val_every = args.val_every or -(-stage.steps // 4)  # a quarter, rounded up
        self.start = None  # state dict that the encoder or backbone starts from
        self.step, self.rows = 0, []  # rows: those of log.csv
        self.description = {
            "name": stage.network, "dataset": stage.dataset, "classes": stage.classes,
            "palette": [list(colour) for colour in data.palette],
            "data": os.path.abspath(data.root), "base": stage.base, "window": stage.crop,
            "stage": self.identity, "method": stage.method, "seed": stage.seed, "label": label,
            "picture_sizes": sizes_of_pictures(data)}

    def read(self):
        """last.pt as a dict, None where there is none.

        Raises InputError for another experiment, and for scores whose last.pt is gone.
        """
        path, self.step = self.folder / "last.pt", 0
        if not path.exists():
            if alone := sorted(self.folder.glob("results-*.json")):
                raise InputError(f"{alone[0]}: scores whose last.pt is gone; move them away, or "
                                 "choose another --out")
            return None
        state = load_checkpoint(path, ("step", "module", "optimizer"))
        saved = state.get("stage")
        whole = {"rows", "picture_sizes"} <= state.keys()
        if not whole or not isinstance(saved, dict) or saved.keys() != self.identity.keys():
            raise InputError(f"{path}: written by an older version, which cannot be continued; "
                             "choose another --out")
        if found := differing_fields(saved, self.identity):
            remedy = {"teacher": f"choose another --out, or take it with --teacher-weights {path}",
                      "pool": "delete its folder",
                      "student": "choose another --out or --name"}[self.stage.stage]
            raise InputError(f"{path}: from a different experiment: {'; '.join(found)}; repeat "
                             f"that run's options, or {remedy}")
        self.step = state["step"]
        self.description["picture_sizes"] = state["picture_sizes"]  # as when it began
        return state

    def resume(self, module, optimizer):
        """Continue from last.pt, if there is one."""
        self.module, self.optimizer = module, optimizer
        self.folder.mkdir(parents=True, exist_ok=True)
        state = self.read()  # again: hours may lie between `check_early` and this
        if state:
            path = self.folder / "last.pt"
            if state.get("teacher_tensors") != self.description.get("teacher_tensors"):
                raise InputError(f"{path}: learned from a teacher with other tensors, though of an "
                                 "equal training; put that teacher back, or choose another --out")
            load_strictly(module, state["module"], path, "this stage", "choose another --out")
            optimizer.load_state_dict(state["optimizer"])
            self.rows = state["rows"]
        elif self.stage.initial != "none" and not self.start:
            raise InputError(f"{self.folder}: its last.pt is gone; run the same command again")
        self.saved_at = time.monotonic()
        if len(set(of_all_processes(self.step))) > 1:
            raise InputError(f"{self.folder}/last.pt: not the same for all processes; they need "
                             "one disk")

    def save_if_due(self, step):
        """Save before a validation, where SAVE_SECONDS are over, or where a signal asks for it."""
        late = time.monotonic() - self.saved_at > self.SAVE_SECONDS
        if self.validation_due(step) or any_process(late or Stop.asked):
            self.save(step)

    def save(self, step):
        """Write last.pt. Raises KeyboardInterrupt where a signal asked for the end."""
        if rank() == 0:
            save_tensors(self.folder / "last.pt", self.description | {
                "step": step, "rows": self.rows, "module": self.module.state_dict(),
                "optimizer": self.optimizer.state_dict()})
        self.saved_at = time.monotonic()
        if any_process(Stop.asked):
            raise KeyboardInterrupt(f"{self.stage.stage}: stopped and saved at step {step}; "
                                    "run the same command again to continue")

    def finished(self):
        """Whether the stage is trained and, but for the pool, has scores of its own."""
        path, trained = self.folder / "results-val.json", self.step == self.stage.steps
        if self.stage.stage == "pool" or not trained:
            return trained
        return path.exists() and read_scores(path)["stage"] == self.identity

    @contextmanager
    def at_work(self):
        """Lock the folder while the stage trains. A finished one is only read."""
        with nullcontext() if rank() or self.finished() else locked(self.folder):
            yield
        self.module = self.optimizer = None  # their memory is for the next stage

    def to_device(self, module):
        """The module on the run's device. On CUDA, BatchNorm statistics span all processes."""
        module = module.to(self.device, memory_format=torch.channels_last)
        if processes() > 1 and self.cuda:
            return torch.nn.SyncBatchNorm.convert_sync_batchnorm(module)
        return module

    def parallel(self, module):
        """The module itself, or one whose gradients are averaged over several processes."""
        if processes() == 1:
            return module
        return DistributedDataParallel(module, device_ids=[self.device] if self.cuda else None)

    def batches(self, unlabelled=False):
        """(step, images, labels) from the step after the last saved one, on the run's device.

        images: (B,3,crop,crop) float32, normalised. labels: (B,crop,crop) int64. B is this
        process's share of the batch. unlabelled: whether pictures without labels take part.
        """
        stage, share = self.stage, self.stage.batch_size // processes()
        if self.step == stage.steps:
            return
        stream = TrainStream(self.data, stage.seed, stage.base, stage.crop, stage.scale,
                             stage.steps * stage.batch_size, unlabelled=unlabelled)
        positions = [step * stage.batch_size + rank() * share + i
                     for step in range(self.step, stage.steps) for i in range(share)]
        loader = DataLoader(stream, batch_size=share, sampler=positions, num_workers=self.workers,
                            worker_init_fn=quiet_worker, pin_memory=self.cuda,
                            generator=torch.Generator())
        bar = progress(loader, desc=stage.stage, total=stage.steps, initial=self.step, unit="step",
                       disable=rank() > 0)
        done = self.step
        try:
            for images, labels in bar:
                # seeded by step and process, so that a resumed run draws the same dropout and needs
                # no saved state
                draw = done * processes() + rank()
                torch.manual_seed(stage.seed + 1_000_003 * (draw + 1))
                images = normalise(images.to(self.device, non_blocking=True))
                yield (done + 1, images.contiguous(memory_format=torch.channels_last),
                       labels.to(self.device, non_blocking=True).long())
                done += 1
        except (RuntimeError, OSError, EOFError, InputError) as e:
            # of the loader: a file is at fault, or it died, which breaks the pipe from it, too
            finite = all(p.isfinite().all() for p in self.module.parameters())
            mendable = Stop.asked or isinstance(e, InputError)
            if mendable and done > self.step and finite and processes() == 1:
                self.save(done)  # nothing of the training is lost
            raise

    def row_due(self, step):
        """Whether a row of the log is due after `step` steps. A signal waits 20 steps at most."""
        asked = step % 20 == 0 and any_process(Stop.asked)
        return asked or step % self.log_every == 0 or self.validation_due(step)

    def validation_due(self, step):
        return step % self.val_every == 0 or step == self.stage.steps

    def validate(self, step, network):
        """The scores of `network` on val. None where no validation is due."""
        if not self.validation_due(step):
            return None
        stage = self.stage
        if processes() > 1:
            # on CPUs, without SyncBatchNorm, each process has running statistics of its own
            for buffer in network.buffers():
                dist.broadcast(buffer, 0)
        modes = {module: module.training for module in network.modules()}
        network.eval()
        matrix = evaluate(network, self.data, "val", stage.base, stage.crop, self.device,
                          workers=self.workers, desc=f"{stage.stage}: validation")
        for module, training in modes.items():
            module.training = training
        return scores(matrix.cpu())

    def write_scores(self, result):
        labels, sizes = labels_digest(self.data, "train", "val"), sizes_of_pictures(self.data)
        if labels != self.stage.labels or sizes != self.description["picture_sizes"]:
            print(f"NOTE: {self.data.root}: labels or pictures have changed since this run began, "
                  f"which {self.folder} partly saw; begin anew with another --out")
        about = {"step": self.stage.steps, "scored": labels, "picture_sizes": sizes}
        write_scores(self.folder, "val", result, self.description | about)


class Log:
    """log.csv of a stage: a row holds means over the steps since the row before.

    The rows are the run's own, kept in last.pt, and the file is written from them.
    """

    def __init__(self, run):
        self.run, self.path = run, run.folder / "log.csv"
        self.names = list(run.stage.weights)
        kinds = ["raw", "grad"] if run.stage.stage == "student" else ["raw"]
        self.fields = ["step", "lr", "seconds_per_step", "total"]
        self.fields += [f"{kind}_{name}" for kind in kinds for name in self.names]
        self.fields += ["val_miou"] if run.stage.stage != "pool" else []
        self.values, self.gradients, self.began = [], {}, time.monotonic()
        if not run.finished():  # a finished log is only read
            self.write_file()

    def lacks_scores(self):
        """Whether a validation is due at once: of a new student, or where the run was killed."""
        run = self.run
        if run.step == 0:
            return run.stage.stage == "student"
        unscored = any(row["step"] == run.step and "val_miou" not in row for row in run.rows)
        return unscored and run.validation_due(run.step) and not run.finished()

    def add(self, terms, loss):
        """Keep a step's unweighted terms and the loss, on their device."""
        values = [*(terms[name] for name in self.names), loss]
        self.values.append(torch.stack([value.detach().float() for value in values]))

    def add_gradients(self, terms, encoder):
        """Keep each term's gradient norm in the encoder for the row."""
        norms = gradient_norms(terms, encoder)
        self.gradients = {f"grad_{name}": f"{norm:.6g}" for name, norm in zip(terms, norms)}

    def average(self, step, optimizer, module):
        """Begin a row with the means of what was added.

        Raises InputError where a loss or a parameter is not finite. Call it before saving and
        validating: what is not finite must be neither kept nor scored, and validation time is not
        counted.
        """
        values = losses.all_sum(torch.stack(self.values)).double().cpu()  # steps, terms and loss
        values /= processes()
        self.check_finite(step, values, module)
        seconds = (time.monotonic() - self.began) / len(values)
        *terms, total = values.mean(0).tolist()
        row = {"step": step, "lr": f"{optimizer.param_groups[0]['lr']:.4g}",
               "seconds_per_step": f"{seconds:.3f}", "total": f"{total:.6g}"}
        row |= {f"raw_{name}": f"{value:.6g}" for name, value in zip(self.names, terms)}
        self.run.rows.append(row | self.gradients)
        self.values, self.gradients = [], {}

    def write(self, step, result=None):
        """Write and print the last row, with the mIoU of a validation.

        After the last row the scores are written: a run that has them lacks nothing.
        """
        stage, rows, words = self.run.stage, self.run.rows or [{"step": 0}], []
        for name in self.names:
            if value := rows[-1].get(f"raw_{name}"):
                words.append(f"{name} {stage.weights[name] * float(value):.3f}")
        if result:
            rows[-1]["val_miou"] = f"{result['miou']:.3f}"
            words.append(f"val mIoU {result['miou']:.2f}")
        self.run.rows = rows
        self.write_file()
        if rank() == 0 and result and step == stage.steps:
            self.run.write_scores(result)
        if result or not (sys.stderr and sys.stderr.isatty()):  # on a terminal the bar suffices
            with suppress(OSError):  # whoever read the output may have gone
                tqdm.write(f"{stage.stage} {step}/{stage.steps}: {' '.join(words)}")
        self.began = time.monotonic()

    def write_file(self):
        if rank() == 0:
            text = io.StringIO()
            writer = csv.DictWriter(text, self.fields, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.run.rows)
            write_atomically(self.path, text.getvalue().encode())

    def check_finite(self, step, values, module):
        """A non-finite step must not reach a checkpoint. Seed and step identify the batch."""
        bad = (~values.isfinite().all(1)).nonzero().flatten().tolist()
        if not bad and not torch.stack([p.isfinite().all() for p in module.parameters()]).all():
            bad = [len(values) - 1]
        if bad:
            listed = ", ".join(f"{n} {v:.4g}" for n, v in zip(self.names, values[bad[0]].tolist()))
            first, stage = step - len(values) + bad[0] + 1, self.run.stage
            remedy = {"teacher": "lower --teacher-lr", "student": "lower --lr",
                      "pool": "check the teacher's mIoU on val, or change --batch-size"}
            raise InputError(f"{stage.stage}, step {first} of seed {stage.seed}: a loss or its "
                             f"gradient is not finite ({listed}); nothing of it was saved in "
                             f"{self.run.folder}; {remedy[stage.stage]}")


def differing_fields(there, here, prefix=""):
    """The fields in which two saved Stages differ, as text with both values."""
    differences = []
    for name in here | there:
        value, other = here.get(name), there.get(name)
        if isinstance(value, dict) and isinstance(other, dict):
            differences += differing_fields(other, value, f"{prefix}{name}.")
        elif value != other and isinstance(value, list) and isinstance(other, list):
            differences.append(f"{prefix}{name} ({first_difference(other, value)})")
        elif value != other:
            differences.append(f"{prefix}{name} (there {other!s:.60}, here {value!s:.60})")
    return differences


# ---------------------------------------------------------------- the stages in a row

def train(args):
    """Make the Runs, check them, run them as far as the method needs them, print the table."""
    with process_0_first():  # it draws, downloads and checks
        data = open_dataset(args.dataset, args.data)
        teacher, pool, students = make_runs(args, data)
        runs = [run for run in (teacher, pool, *students) if isinstance(run, Run)]
        check_early(args, data, runs)
    announce(args, data, runs)

    entries, T, P = {}, None, None  # entries: rows of the table
    if isinstance(teacher, GivenTeacher):
        T = teacher.network
        entries["teacher"] = T, scores_of_given(args, data, T)
    elif teacher:
        with teacher.at_work():
            T = train_teacher(teacher)
        add_entry(entries, "teacher", T, teacher)
    tensors = digest_of_tensors(T) if T else None
    for run in runs:  # two teachers of one Stage differ, if they are from two machines
        if run.stage.teacher:
            run.description["teacher_tensors"] = tensors
    if args.clip:
        P = load_clip_pool(args.clip, T.channels, pool_grid(T, args.crop, args.device))
        P = P.to(args.device)
    elif pool:
        with pool.at_work():
            P = fit_pool(pool, T)
    for run in students:
        needs = METHODS[run.stage.method].needs
        with run.at_work():
            student = distil(run, T if "teacher" in needs else None, P if "A_l" in needs else None)
        name = "alone" if run.stage.method == "ce" else run.stage.method
        add_entry(entries, f"student {name}", student, run)

    if rank() == 0:
        folder = (students or [teacher])[-1].folder
        folder.mkdir(parents=True, exist_ok=True)
        if students:
            report_terms(students[-1].rows, students[-1].stage.weights)
        report(folder, entries, data, args.base, args.crop, args.device)


def make_runs(args, data):
    """The teacher, the pool and the students that the command line asks for, as Runs.

    A finished teacher from a file is a GivenTeacher. None stands for what no method needs.
    """
    needs = set().union(*(METHODS[method].needs for method in args.methods))
    if args.method == "teacher":
        needs = {"teacher", "A_l"}
    root, teacher, pool, pool_identity = Path(args.out) / args.dataset, None, None, None
    common = dict(
        warmup=args.warmup, batch_size=args.batch_size, base=args.base, crop=args.crop,
        scale=list(args.scale), dataset=args.dataset, classes=list(data.classes),
        labels=labels_digest(data, "train", "val"), pictures=pictures_digest(data, "train", "val"))

    if "teacher" in needs:
        teacher = given_teacher(args, data, root)
    if "teacher" in needs and not teacher:
        stage = Stage(
            stage="teacher", network=args.teacher,
            initial=identity_of_weights(args.teacher_weights), steps=args.teacher_steps,
            rate=args.teacher_lr, seed=args.teacher_seed, weights={"ce": 1.0}, **common)
        seed = f"-seed{args.teacher_seed}" if args.teacher_seed else ""
        teacher = Run(args, stage, data, root / f"teacher-{args.teacher}{seed}")
    if "A_l" in needs and args.clip:
        pool_identity = {"clip": digest_of(args.clip)}
    elif "A_l" in needs:
        stage = Stage(
            stage="pool", network="attention_pool", initial="none", steps=args.pool_steps,
            rate=3e-4, seed=args.teacher_seed, weights={"bce": 1.0}, teacher=teacher.identity,
            **common)
        pool = Run(args, stage, data, teacher.folder / "pool")
        pool_identity = pool.identity

    students = []
    for method in args.methods:
        needs = METHODS[method].needs
        asked = method == args.method  # the other one is the student alone, beside it
        stage = Stage(
            stage="student", network=args.student,
            initial=identity_of_weights(args.student_weights), steps=args.steps, rate=args.lr,
            seed=args.seed, method=method,
            weights=args.term_weights if asked else dict(METHODS[method].weights),
            unlabelled=pictures_digest(data, "unlabelled") if "A_v" in needs else 0,
            teacher=teacher.identity if "teacher" in needs else None,
            pool=pool_identity if "A_l" in needs else None, **common)
        name, label = f"{method}-{args.student}-seed{args.seed}", None
        if asked and args.name:
            name, label = args.name, args.name.removesuffix(f"-seed{args.seed}")
        students.append(Run(args, stage, data, root / name, label))
    return teacher, pool, students


def check_early(args, data, runs):
    """Raise InputError now for what would stop the command after hours, and read start weights."""
    if args.batch_size % processes():
        raise InputError(f"--batch-size {args.batch_size}: must be a multiple of the "
                         f"{processes()} processes")
    trains_teacher = any(run.stage.stage == "teacher" for run in runs)
    if trains_teacher and args.batch_size == processes() and not args.gpus:
        raise InputError(f"--batch-size {args.batch_size}: the teacher's BatchNorm needs two "
                         f"images per process on CPUs; take {2 * processes()} or more")
    if args.clip:  # only to see whether it fits
        load_clip_pool(args.clip, TEACHERS[args.teacher].channels, grid=16)
    sizes, today = set(), {sizes_of_pictures(data)}  # of pictures, when these runs began, and now
    for run in runs:
        if state := run.read():
            sizes.add(state["picture_sizes"])
        elif run.stage.initial != "none":
            run.start = start_of(args, run.stage)
    if sizes - today:
        print(f"NOTE: {data.root}: pictures were changed, added or removed since this run began: "
              "their sizes in bytes are others")
    if sizes != today and rank() == 0:
        check(data, ("train", "val", "unlabelled"))


def announce(args, data, runs):
    """Print the data, the recipe and the stages before they begin."""
    print(f"{args.dataset}: {len(data.pairs['train'])} training and {len(data.pairs['val'])} "
          f"validation images, {len(data.classes)} classes; recipe {args.recipe}; seed "
          f"{args.seed}; device {args.device}")
    if data.pairs.get("unlabelled"):
        used = [run.stage.method for run in runs if run.stage.unlabelled]
        print(f"{len(data.pairs['unlabelled'])} images without labels, used by "
              f"{' and '.join(used) or 'none of these methods'}")
    stages = []
    for run in runs:
        method = f", {run.stage.method}" if run.stage.method else ""
        done = f", {run.step:,} done" if run.step else ""
        stages.append(f"{run.stage.stage} {run.stage.network}{method}: {run.stage.steps:,} steps"
                      + done)
    print("stages: " + "; ".join(stages), flush=True)


def add_entry(entries, name, network, run):
    """A row of the table: the network and its scores on val."""
    if rank() == 0:
        entries[name] = network, read_scores(run.folder / "results-val.json")


# ---------------------------------------------------------------- weights that the user gives

def identity_of_weights(source):
    """none, imagenet or voc as they are. A file's digest, whatever its name."""
    return source if source in ("none", "imagenet", "voc") else f"sha256 {digest_of(source)}"


def digest_of(path):
    try:
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()[:16]
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}; give the path of a weights file") from None


def digest_of_tensors(module):
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def start_of(args, stage):
    """State dict of the student's encoder or the teacher's backbone, from the user's weights."""
    if stage.stage == "student":
        student = Student(stage.network, len(stage.classes))
        left = load_encoder(student.encoder, stage.network, args.student_weights)
        if left:
            print(f"student encoder: {args.student_weights}; not loaded: {', '.join(left)}")
        return student.encoder.state_dict()
    teacher = Teacher(stage.network, len(stage.classes))
    initialise(teacher, stage.network, args.teacher_weights)
    return teacher.backbone.state_dict()


@dataclass(frozen=True)
class GivenTeacher:
    """A finished teacher from a file: frozen, what it is, and the folder of its pool."""
    network: Teacher
    identity: dict
    folder: Path


def given_teacher(args, data, root):
    """The GivenTeacher of --teacher-weights, None where these only start the training of one.

    A file is a last.pt of this project or a plain torchvision state dict. Raises InputError for
    another network, other classes or a last.pt of an unfinished stage.
    """
    source, classes = args.teacher_weights, data.classes
    if source in ("none", "imagenet"):
        return None
    state = {} if source == "voc" else load_checkpoint(source)
    if source != "voc" and "module" not in state and is_backbone(unwrap(state)[0]):
        return None
    teacher = Teacher(args.teacher, len(classes))
    identity = {"network": args.teacher, "weights": identity_of_weights(source)}
    if "module" in state:
        refuse_unfit(args, source, state, classes)
        load_strictly(teacher, state["module"], source, args.teacher, "train it again")
        identity = state["stage"]  # so that its students stand beside those of its own run
        seen = identity.get("labels"), state.get("picture_sizes")
        if seen != (labels_digest(data, "train", "val"), sizes_of_pictures(data)):
            print(f"NOTE: {source}: learned from other labels or pictures; if it saw some of val, "
                  "scores are too good")
    else:
        initialise(teacher, args.teacher, source)
    teacher = teacher.to(args.device, memory_format=torch.channels_last).freeze()
    name = "voc" if source == "voc" else digest_of(source)
    return GivenTeacher(teacher, identity, root / f"teacher-{args.teacher}-{name}")


def refuse_unfit(args, source, state, classes):
    """Raise InputError for a last.pt that is no finished teacher of these classes."""
    if not state.keys() >= {"name", "classes", "stage", "step"}:
        raise InputError(f"{source}: not a last.pt of this project; give one, or a state_dict()")
    if state["name"] != args.teacher:
        raise InputError(f"{source}: holds {state['name']}, wanted {args.teacher}; give "
                         "--teacher, or the right checkpoint")
    if difference := first_difference(state["classes"], classes):
        raise InputError(f"{source}: its classes are not those of the data: {difference}; give "
                         "the right checkpoint")
    planned = state["stage"]["steps"]
    if state["step"] < planned:
        raise InputError(f"{source}: trained for {state['step']} of its {planned} steps; "
                         "finish it with the command that began it")


def scores_of_given(args, data, network):
    """Scores on val of a given teacher, measured and printed at each start."""
    matrix = evaluate(network, data, "val", args.base, args.crop, args.device,
                      workers=args.workers).cpu()
    result = scores(matrix)
    row = f"teacher {args.teacher}", count_parameters(network), None, result
    print(table([row], data.classes))
    if result["miou"] <= miou_of_commonest_class(matrix):
        print("WARNING: this teacher is no better than always answering the commonest class: are "
              "its classes in this order, its pictures RGB with ImageNet's mean and deviation?")
    return result


# ---------------------------------------------------------------- several processes, signals

# torchrun sets all of these. One alone may be a cluster's own
TORCHRUN = "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"


def launched():
    """Whether torchrun started this process as one of several."""
    count = os.environ.get("WORLD_SIZE", "")
    return all(map(os.environ.get, TORCHRUN)) and count.isdecimal() and int(count) > 1


def rank():
    """The number of this process. Process 0 speaks and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


processes = losses.process_count


def of_all_processes(value):
    """The values of all processes, in a list."""
    values = [value] * processes()
    if processes() > 1:
        dist.all_gather_object(values, value)
    return values


def any_process(flag):
    """Whether the flag is set in any process."""
    return any(of_all_processes(flag))


@contextmanager
def process_0_first():
    """Process 0 does what follows first and alone, a download for instance, then the others."""
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and processes() > 1:
        dist.barrier()


class Stop:
    """asked: a signal came, so that the run ends after the next row of the log."""
    asked, interrupted = False, math.inf

    @classmethod
    def listen(cls):
        """SIGINT, SIGTERM and SIGHUP end the run with its state saved, however often they come.

        Only a second Ctrl-C ends it at once. torchrun passes the first one on, within a second.
        """
        def ask(number, _):
            if number == signal.SIGINT:
                if time.monotonic() > cls.interrupted + 1:
                    raise KeyboardInterrupt
                cls.interrupted = min(cls.interrupted, time.monotonic())
            asked, cls.asked = cls.asked, True
            if hasattr(signal, "SIGCHLD"):  # torch's handler ends a step where a loader dies
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            if not asked:
                with suppress(OSError):  # the terminal may be gone
                    os.write(2, b"stopping after the next row of the log; Ctrl-C once more to "
                                b"stop at once\n")

        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number and signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
                signal.signal(number, ask)


def set_torch_flags(cuda, deterministic=False):
    """What both training and tests/benchmark.py set before anything runs."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if not cuda:
        return
    torch.backends.cudnn.benchmark = not deterministic
    # allow TF32 in what stays float32 under autocast, above all the products X^T X of the patch
    # loss. Its gradient is within 1% of float32's
    torch.set_float32_matmul_precision("high")
    # on Hopper torch prefers cuDNN's attention. It plans anew for each shape, 0.4 s every time, and
    # is reported to give NaN for a single query, which the pool has
    torch.backends.cuda.enable_cudnn_sdp(False)


def start_process(args):
    """Set up the device of this process and its place among several."""
    local = int(os.environ["LOCAL_RANK"]) if launched() else 0
    args.device = torch.device("cuda", local) if args.gpus else torch.device("cpu")
    if args.gpus:
        torch.cuda.set_device(args.device)
    set_torch_flags(bool(args.gpus), args.deterministic)
    if launched():
        join_processes(args)
    # without fork, each loader process would otherwise import torch anew
    multiprocessing.set_forkserver_preload(["torch"])
    Stop.listen()


def join_processes(args):
    """Meet the other processes. Raises InputError where they do not come within minutes."""
    backend, device = ("nccl", args.device) if args.gpus else ("gloo", None)
    try:
        store, number, count = next(dist.rendezvous("env://", timeout=timedelta(minutes=5)))
        # later the others wait for hours while one draws, downloads or checks
        dist.init_process_group(backend, store=store, rank=number, world_size=count,
                                timeout=timedelta(hours=6), device_id=device)
    except (RuntimeError, ValueError) as e:
        raise InputError(f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} cannot meet "
                         f"the others at {os.environ['MASTER_ADDR']}: {e}") from None
    if number:
        sys.stdout = open(os.devnull, "w")  # one process speaks


# ---------------------------------------------------------------- recipes

# base: short side of the images at scale 1, for training and evaluation alike.
# scale: range of the random resizing.
# differs: the paper states its schedule for Cityscapes alone, and the release's VOC script takes 6
# images per GPU and 3,670 steps. Here crop, batch and steps are the paper's for Cityscapes and the
# usual ones for the other data sets
# unstated: how long the teacher was trained. Its steps and the CPU recipes are ours
FULL = dict(
    base=512, crop=512, scale=(0.5, 2.0), batch_size=16, warmup=1500,
    teacher="deeplabv3_resnet101", teacher_weights="imagenet", pool_steps=2000,
    student="mit_b0", student_weights="imagenet")
RECIPES = {
    "cityscapes": FULL | dict(base=1024, batch_size=24, steps=50_000, teacher_steps=40_000),
    "voc": FULL | dict(steps=40_000, teacher_steps=30_000, teacher_weights="voc"),
    "ade20k": FULL | dict(steps=80_000, teacher_steps=80_000),
    # for your own data, --dataset folder, with a GPU
    "full": FULL | dict(steps=20_000, teacher_steps=20_000, warmup=1000),
    # for your own data on a CPU: the teacher starts from ImageNet weights, the student from random
    "small": dict(
        base=240, crop=192, scale=(0.75, 1.5), batch_size=8, warmup=80,
        teacher="deeplabv3_mobilenet_v2", teacher_weights="imagenet", teacher_steps=1000,
        pool_steps=100, student="mit_b0", student_weights="none", steps=1600),
    # for the embedded data set: everything from random weights, in five minutes
    "shapes": dict(
        base=64, crop=64, scale=(1.0, 1.0), batch_size=8, warmup=40,
        teacher="deeplabv3_resnet10", teacher_weights="none", teacher_steps=600,
        pool_steps=60, student="mit_nano", student_weights="none", steps=400,
        # ten times those of losses.py. They did best in short training here, and harm under a
        # teacher from ImageNet weights
        vlfd={"gb": 10.0, "pc": 20.0, "lc": 2.0}),
}


def parse_options(argv=None):
    """The command line, with the recipe's values filled in. Raises InputError for bad values."""
    args = parser().parse_args(argv)
    if args.data and not args.dataset:
        raise InputError(f"--data {args.data}: say what it holds, with --dataset folder for your "
                         "own data")
    args.dataset = args.dataset or "shapes"
    found = torch.cuda.device_count()
    args.gpus = min(1, found) if args.gpus is None else args.gpus
    if args.gpus > found and not launched():
        remedy = f"--gpus {found}" if found else "--gpus 0 to run on the CPU"
        raise InputError(f"--gpus {args.gpus}: {found} CUDA devices found; use {remedy}")
    fill_from_recipe(args)
    # unstated: training from random weights. There the student does better at 1e-3 than at the
    # paper's 6e-5, and the teacher with AdamW at 1e-3 than with SGD at 0.01
    args.lr = args.lr or (1e-3 if args.student_weights == "none" else 6e-5)
    args.teacher_lr = args.teacher_lr or (1e-3 if args.teacher_weights == "none" else 0.01)
    args.workers = default_workers(args.gpus) if args.workers is None else args.workers
    args.methods = ["ce", "c2vkd"] if args.dataset == "shapes" else ["c2vkd"]
    if args.method:
        args.methods = [] if args.method == "teacher" else [args.method]
    args.method = args.method or "c2vkd"
    refuse_useless(args)
    args.term_weights = term_weights(args)
    return args


def parser():
    p = Parser(usage="%(prog)s [options]", description="Distil a CNN teacher into a Vision "
               "Transformer student (C2VKD). Defaults marked * come from the data set's recipe.")
    steps, pixels = dict(type=at_least(1), metavar="N"), dict(type=at_least(32), metavar="PIXELS")
    rate = dict(type=at_least(1e-12, float), metavar="X")
    seed = dict(type=at_least(0, below=2**32), default=0, metavar="N")
    g = p.add_argument_group("what")
    g.add_argument("--dataset", choices=DATASETS, help="default shapes; folder: your own data")
    g.add_argument("--data", metavar="DIR", help="its folder (default data/NAME)")
    g.add_argument("--method", choices=("teacher", *METHODS),
                   help="default c2vkd, on shapes ce and c2vkd; teacher: stop after stage 2")
    g.add_argument("--recipe", choices=("small", "full"),
                   help="only with --dataset folder: default full with a GPU, else small")
    g.add_argument("--out", default="runs", metavar="DIR", help="output folder (default runs)")
    g.add_argument("--name", metavar="NAME",
                   help="folder, table row (default METHOD-STUDENT-seedN)")
    g = p.add_argument_group("teacher")
    g.add_argument("--teacher", choices=TEACHERS, help="*")
    g.add_argument("--teacher-weights", metavar="W",
                   help="* imagenet | none | voc (finished) | FILE: a finished last.pt or "
                   "torchvision state dict, or a backbone's ImageNet weights for stage 1")
    g.add_argument("--teacher-steps", **steps, help="*")
    g.add_argument("--teacher-lr", **rate,
                   help="default 0.01 (SGD) from ImageNet, 0.001 (AdamW) from random weights")
    g.add_argument("--teacher-seed", **seed, help="of stages 1 and 2 (default 0)")
    g.add_argument("--pool-steps", **steps, help="* steps that fit the attention pool")
    g.add_argument("--clip", metavar="FILE",
                   help="take the pool of this CLIP RN101.pt, do not fit one")
    g = p.add_argument_group("student")
    g.add_argument("--student", choices=VARIANTS, help="*")
    g.add_argument("--student-weights", metavar="W", help="* imagenet | none | FILE")
    g.add_argument("--steps", **steps, help="*")
    g.add_argument("--lr", **rate, help="default 6e-5 from ImageNet, 0.001 from random weights")
    g.add_argument("--seed", **seed, help="of stage 3 (default 0)")
    g.add_argument("--weights", nargs="+", action="extend", default=[], metavar="T=X",
                   help="of terms, e.g. gb=0.1 lc=0.5")
    g = p.add_argument_group("batches")
    g.add_argument("--batch-size", type=at_least(2), metavar="N",
                   help="* images, all GPUs together")
    g.add_argument("--crop", **pixels,
                   help="* side of the square crop and of the evaluation window")
    g.add_argument("--base", **pixels, help="* short side of the images at scale 1")
    g.add_argument("--warmup", type=at_least(0), metavar="N",
                   help="* steps of linear warm-up, at most a tenth of the stage")
    g = p.add_argument_group("machine")
    g.add_argument("--gpus", type=at_least(0), metavar="N",
                   help="default 1 if there is one, else 0: the CPU")
    g.add_argument("--workers", type=at_least(0), metavar="N",
                   help="loader processes (default: CPU cores per GPU, at most 16; 0 without a "
                   "GPU)")
    g.add_argument("--deterministic", action="store_true",
                   help="bitwise repeatable on CUDA, slower")
    g = p.add_argument_group("reports")
    g.add_argument("--log-every", default=20, **steps, help="steps per row of log.csv (default 20)")
    g.add_argument("--val-every", **steps,
                   help="steps between validations (default a quarter of all)")
    return p


def fill_from_recipe(args):
    if args.recipe and args.dataset != "folder":
        raise InputError(f"--recipe {args.recipe}: {args.dataset} has one recipe; it goes with "
                         "--dataset folder")
    own_data = "full" if args.gpus else "small"
    args.recipe = args.recipe or (own_data if args.dataset == "folder" else args.dataset)
    for name, value in RECIPES[args.recipe].items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)


def refuse_useless(args):
    """Raise InputError for options that would be ignored and may be meant to matter."""
    method = METHODS.get(args.method)  # None: teacher
    if args.clip and method and "A_l" not in method.needs:
        raise InputError(f"--clip: {args.method} uses no attention pool; it goes with --method "
                         "c2vkd")
    if args.teacher_weights == "voc" and args.dataset != "voc":
        raise InputError("--teacher-weights voc: that model knows VOC's classes only; use "
                         "imagenet, none or a FILE")
    if not method and (args.name or args.seed or args.weights):
        raise InputError("--method teacher: trains no student, so that --name, --seed and "
                         "--weights do nothing; use --teacher-seed")
    label = (args.name or "").removesuffix(f"-seed{args.seed}")
    if label != args.method and label in METHODS or label.startswith("teacher-"):
        raise InputError(f"--name {args.name}: reserved for a method or a teacher; choose another")
    folder = Path(args.name or "default")
    if folder.is_absolute() or ".." in folder.parts or not folder.name:
        raise InputError(f"--name {args.name}: leaves the folder of the runs; --out chooses that")


def term_weights(args):
    """Weight of each term of the method after --weights. Raises InputError for other terms."""
    if args.method == "teacher":
        return {}
    weights = dict(METHODS[args.method].weights)
    if losses.VLFD_WEIGHTS.items() <= weights.items():
        weights |= getattr(args, "vlfd", {})
    for item in args.weights:
        name, _, value = item.partition("=")
        try:
            if name not in weights or not math.isfinite(float(value)):
                raise ValueError
            weights[name] = float(value)
        except ValueError:
            taken = " ".join(f"{n}=NUMBER" for n in weights)
            raise InputError(f"--weights {item}: {args.method} takes {taken}") from None
    return weights


def main():
    args = parse_options()
    if args.gpus > 1 and not launched():  # this script again, one process per GPU
        os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                  "--nproc-per-node", str(args.gpus), *sys.argv])
    start_process(args)
    try:
        train(args)
    except InputError:
        if rank():
            time.sleep(5)  # process 0 has the same error: let it print and stop the others
        raise
    except RuntimeError:
        if Stop.asked and processes() > 1:  # the signal ended other processes, too
            raise KeyboardInterrupt from None
        raise
    if dist.is_initialized():  # not after an error, while others wait in a collective
        dist.destroy_process_group()


if __name__ == "__main__":
    command(main)
