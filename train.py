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
import math
import multiprocessing
import signal
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import losses
from data import (DATASETS, DataSet, InputError, Parser, TrainStream, at_least, command,
                  judge_labels, load_checkpoint, load_strictly, locked, normalise, open_dataset,
                  progress, quiet_worker, save_tensors, scan_labels, unwrap, write_atomically)
from evaluate import (comparison, default_workers, evaluate, load_network,
                      miou_of_commonest_class, read_scores, report, report_terms, scores, table,
                      write_scores)
from losses import METHODS, cross_entropy, total_loss
from student import VARIANTS, Student, StudentWithHeads, count_parameters, load_encoder
from teacher import (TEACHERS, PoolFitter, Teacher, average_precision, initialise, is_backbone,
                     load_clip_pool, pool_grid, presence)


# ---------------------------------------------------------------- the three stages

def distil(run, weights, teacher=None, pool=None, to_beat=None):
    """Stage 3: the student learns from the labels and, unless the method is `ce`, from the teacher.

    run: the Run of the student. weights: what its encoder starts from, see `load_encoder`.
    teacher, pool: frozen, None where the method needs none. to_beat: the teacher's mIoU on val.
    Once a validation of the student exceeds it, only the labels count. With None the teacher counts
    to the end. Returns the student.
    """
    stage, method = run.stage, METHODS[run.stage.method]
    torch.manual_seed(stage.seed)
    student = Student(stage.network, len(stage.classes))
    trained = StudentWithHeads(student, teacher and teacher.channels, stage.seed, method.needs,
                               teacher.earlier if teacher else ())
    trained = run.to_device(trained)
    # weight decay for all parameters, also biases and norms
    optimizer = torch.optim.AdamW(trained.parameters(), stage.rate, weight_decay=0.01,
                                  fused=run.machine.cuda)
    checkpoint = Checkpoint(run, trained, optimizer)
    with one_process_first():
        if not checkpoint.resumed:
            load_encoder(student.encoder, stage.network, weights)
    parallel = run.parallel(trained)  # the same network, with gradients averaged over processes
    drawn = {"teacher": teacher, "student": student}
    log = Log(run, checkpoint.step, measured=measured_steps(stage.steps))
    if checkpoint.step == 0:
        log.write(0, validate(run, 0, student, drawn))

    unlabelled = "A_v" in method.needs  # V^S and V^T need no labels
    for step, images, labels in batches(run, checkpoint.step, unlabelled):
        set_rate(optimizer, schedule(step, stage.steps, stage.warmup, power=1))
        with run.machine.precision():
            with torch.no_grad():
                T = teacher(images) if teacher else None  # z^T, F^T
                if pool:
                    T = T._replace(embedding=pool(T.feature))  # e^T = P(F^T)
            S = parallel(images)  # z^S, F^S, A_v(F^S), e^S
            terms = method.terms(S, T, labels, kl=stage.kl, everywhere=stage.teach != "right")
            loss = total_loss(terms, stage.weights)  # Eq. 10
            # differs: in the paper and the release the student learns from the teacher to the end,
            # here only until it beats the teacher on val
            if checkpoint.outgrown:
                # + 0 * loss: where processes average gradients, every parameter needs one
                loss = cross_entropy(S.logits, labels) + 0 * loss
        if step in log.measured and not checkpoint.outgrown:
            log.add_gradients(terms, cross_entropy(S.logits, labels), student.encoder)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        log.add(terms, loss)
        if run.log_due(step):
            log.average_row(step, optimizer, trained)
            miou = validate(run, step, student, drawn) if run.validation_due(step) else None
            log.write(step, miou)
            if step < stage.steps:  # after the last step there is nothing left to learn
                checkpoint.note_if_outgrown(miou, to_beat)
            checkpoint.save_if_due(step)
    return student.eval()


def train_teacher(run, weights):
    """Stage 1: DeepLabV3 learns from the labels, with cross-entropy. Returns it frozen.

    run: the Run of the teacher. weights: what it starts from, see `initialise`.
    """
    stage = run.stage
    torch.manual_seed(stage.seed)
    teacher = run.to_device(Teacher(stage.network, len(stage.classes)))
    optimizer = teacher_optimizer(teacher, stage)
    checkpoint = Checkpoint(run, teacher, optimizer)
    with one_process_first():
        if not checkpoint.resumed:
            initialise(teacher, stage.network, weights)
    parallel = run.parallel(teacher)
    log = Log(run, checkpoint.step)

    for step, images, labels in batches(run, checkpoint.step):
        set_rate(optimizer, schedule(step, stage.steps, stage.warmup, power=0.9))
        with run.machine.precision():
            terms = {"ce": cross_entropy(parallel(images).logits, labels)}
        optimizer.zero_grad()
        terms["ce"].backward()
        optimizer.step()

        log.add(terms, terms["ce"])
        if run.log_due(step):
            log.average_row(step, optimizer, teacher)
            drawn = {"teacher": teacher}
            miou = validate(run, step, teacher, drawn) if run.validation_due(step) else None
            log.write(step, miou)
            checkpoint.save_if_due(step)
    return teacher.freeze()


def fit_pool(run, teacher):
    """Stage 2: the pool P learns to name what the frozen teacher sees. Returns it frozen."""
    stage, classes = run.stage, len(run.stage.classes)
    torch.manual_seed(stage.seed)
    grid = pool_grid(teacher, stage.crop, run.machine.device)
    fitter = run.to_device(PoolFitter(teacher.channels, grid, classes))
    optimizer = torch.optim.AdamW(fitter.parameters(), stage.rate, weight_decay=0.01)
    checkpoint = Checkpoint(run, fitter, optimizer)
    parallel = run.parallel(fitter)
    log = Log(run, checkpoint.step)

    for step, images, labels in batches(run, checkpoint.step):
        set_rate(optimizer, schedule(step, stage.steps, stage.warmup, power=1))
        with run.machine.precision():
            with torch.no_grad():
                F_T = teacher(images).feature
            present = parallel(F_T).float()  # B,K: logits of "class k is in this crop"
        wanted = presence(labels, classes)
        terms = {"bce": F.binary_cross_entropy_with_logits(present, wanted)}
        optimizer.zero_grad()
        terms["bce"].backward()
        optimizer.step()

        log.add(terms, terms["bce"])
        if run.log_due(step):
            log.average_row(step, optimizer, fitter)
            log.write(step)
            checkpoint.save_if_due(step)
    if run.machine.rank == 0 and not (run.folder / "report.txt").exists():
        report_pool(run, fitter, teacher)
    return fitter.pool.requires_grad_(False).eval()


# ---------------------------------------------------------------- what a stage is

@dataclass(frozen=True)
class Stage:
    """The identity of a stage: what its result depends on. Kept in its last.pt as a dict.

    A run continues only from a last.pt of an equal Stage. A finished teacher or pool is also used
    where it differs in MAY_DIFFER alone, see `adopt`.
    """
    stage: str  # its kind: teacher, pool or student
    network: str  # a row of TEACHERS or VARIANTS, or attention_pool
    initial: str  # what it starts from: none, imagenet, or a file's name and digest
    steps: int
    rate: float  # of the optimizer, at its highest
    warmup: int  # steps of linear warm-up
    batch_size: int  # of all processes together
    base: int  # short side of the images at scale 1, in pixels
    crop: int  # side of the square crops, in pixels
    scale: tuple  # range of the random resizing
    seed: int
    dataset: str
    classes: tuple  # names
    labels: str  # digest of the label files of train and val
    pictures: str  # digest of the names and sizes of the picture files
    weights: dict  # of the terms
    method: str | None = None
    kl: str | None = None
    teach: str | None = None  # where and until when the teacher counts: right, outgrown or end
    val_every: int | None = None  # steps between validations, where they can end the teaching
    unlabelled: str | int = 0  # digest of the pictures without labels that the method uses
    teacher: dict | None = None  # the teacher's Stage, or name and digest of a given one
    pool: dict | None = None  # the pool's Stage, or the digest of CLIP's file

    def differences(self, saved):
        """The fields in which a saved Stage's dict differs, as text with both values."""
        return differing_fields(saved, as_saved(self))


def differing_fields(there, here, prefix=""):
    differences = []
    for name, value in here.items():
        other = there.get(name)
        if isinstance(value, dict) and isinstance(other, dict):
            differences += differing_fields(other, value, f"{prefix}{name}.")
        elif value != other:
            differences.append(f"{prefix}{name} (there {shorten(other)}, here {shorten(value)})")
    return differences


def as_saved(stage):
    """A Stage as the dict that comes back from a file: with lists instead of tuples."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(stage).items()}


def shorten(value):
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass(frozen=True)
class Machine:
    """Where a stage runs and how often it reports.

    The number of processes and the kind of device change the random numbers of dropout, the
    precision and the batches of some losses. Still they are not part of a stage's identity: a run
    may go on elsewhere.
    """
    device: torch.device
    rank: int = 0
    processes: int = 1
    workers: int = 0  # loader processes
    log_every: int = 20  # steps per row of log.csv
    val_every: int | None = None  # steps between validations, None: a quarter of all

    @property
    def cuda(self):
        return self.device.type == "cuda"

    def precision(self):
        """bf16 autocast on CUDA, float32 on a CPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.cuda)


@dataclass(frozen=True)
class Run:
    """A stage at work: what it is, on which data, where its files go, on which machine."""
    stage: Stage
    data: DataSet
    folder: Path
    machine: Machine
    description: dict  # what evaluate.py must know, saved in last.pt and in the results

    @property
    def identity(self):
        """The Stage as it stands in last.pt."""
        return as_saved(self.stage)

    def to_device(self, module):
        """The module on the run's device. On CUDA, BatchNorm statistics span all processes."""
        module = module.to(self.machine.device, memory_format=torch.channels_last)
        if self.machine.processes > 1 and self.machine.cuda:
            return torch.nn.SyncBatchNorm.convert_sync_batchnorm(module)
        return module

    def parallel(self, module):
        """The module itself, or one whose gradients are averaged over several processes."""
        if self.machine.processes == 1:
            return module
        ids = [self.machine.device] if self.machine.cuda else None
        return DistributedDataParallel(module, device_ids=ids)

    def validation_due(self, step):
        """Whether the networks are validated after `step` steps."""
        every = self.machine.val_every or quarter(self.stage.steps)
        return step % every == 0 or step == self.stage.steps

    def log_due(self, step):
        """Whether a row of the log is due after `step` steps."""
        measured = self.stage.stage == "student" and step in measured_at(self.stage.steps)
        return step % self.machine.log_every == 0 or measured or self.validation_due(step)


def quarter(steps):
    """The default number of steps between validations: a quarter of the stage, rounded up."""
    return -(-steps // 4)


def measured_at(steps):
    """A row of the log with gradients is due after these steps: a tenth of all, and the last."""
    return {max(1, steps // 10), steps}


def measured_steps(steps):
    """The steps whose gradients are measured: each of `measured_at` and the four before it."""
    return {end - i for end in measured_at(steps) for i in range(5) if end > i}


# ---------------------------------------------------------------- what the loops call

def batches(run, begin, unlabelled=False):
    """(step, images, labels) from the step after `begin` to the last, on the run's device.

    images: (B,3,crop,crop) float32, normalised. labels: (B,crop,crop) int64. B is this process's
    share of the batch. unlabelled: whether pictures without labels take part.
    """
    stage, machine = run.stage, run.machine
    share = stage.batch_size // machine.processes
    stream = TrainStream(run.data, stage.seed, stage.base, stage.crop, stage.scale,
                         stage.steps * stage.batch_size, unlabelled=unlabelled)
    positions = [step * stage.batch_size + machine.rank * share + i
                 for step in range(begin, stage.steps) for i in range(share)]
    loader = DataLoader(stream, batch_size=share, sampler=positions, num_workers=machine.workers,
                        worker_init_fn=quiet_worker, pin_memory=machine.cuda,
                        generator=torch.Generator())
    bar = progress(loader, desc=stage.stage, total=stage.steps, initial=begin, unit="step",
                   disable=machine.rank > 0)
    for step, (images, labels) in enumerate(bar, begin + 1):
        # seeded by step and process, so that a resumed run draws the same dropout and needs no
        # saved state
        draw = (step - 1) * machine.processes + machine.rank
        torch.manual_seed(stage.seed + 1_000_003 * (draw + 1))
        images = normalise(images.to(machine.device, non_blocking=True))
        yield (step, images.contiguous(memory_format=torch.channels_last),
               labels.to(machine.device, non_blocking=True).long())
    barrier()


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


def validate(run, step, network, drawn):
    """Returns the mIoU of `network` on val, in percent. Saves a picture of the networks in `drawn`.

    At the last step it also saves the scores as results-val.json.
    """
    stage, machine, last = run.stage, run.machine, step == run.stage.steps
    if machine.processes > 1:
        # on CPUs, without SyncBatchNorm, each process has running statistics of its own
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)
    modes = {module: module.training for module in network.modules()}
    network.eval()
    matrix = evaluate(network, run.data, "val", stage.base, stage.crop, machine.device,
                      workers=machine.workers, desc=f"{stage.stage}: validation")
    result = scores(matrix.cpu())
    if machine.rank == 0:
        if last:
            write_scores(run.folder, "val", result, run.description | {"step": step})
        (run.folder / "pictures").mkdir(exist_ok=True)
        picture = comparison(run.data, "val", stage.base, stage.crop, drawn, machine.device)
        picture.save(run.folder / f"pictures/step{step:06d}.png")
    for module, training in modes.items():
        module.training = training
    return result["miou"]


class Log:
    """log.csv of a stage: a row holds means over the steps since the row before.

    Its `total` is the loss that was trained on. Once a teacher is outgrown, it is no longer the sum
    of the weighted terms. measured: the steps whose gradients are given to `add_gradients`.
    """

    def __init__(self, run, begin, measured=()):
        self.run, self.measured = run, measured
        self.path, self.names = run.folder / "log.csv", list(run.stage.weights)
        kinds = ["raw", "weighted", *(["grad", "cos"] if measured else [])]
        self.fields = ["step", "lr", "seconds_per_step", "total"]
        self.fields += [f"{kind}_{name}" for kind in kinds for name in self.names]
        self.fields += ["val_miou"] if run.stage.stage != "pool" else []
        if run.machine.rank == 0 and begin < run.stage.steps:  # a finished log is only read
            self.drop_rows_after(begin)
        self.values, self.gradients, self.row, self.shown = [], [], {}, ""
        self.began = time.monotonic()

    def drop_rows_after(self, begin):
        """Drop the rows that a killed run wrote after its last checkpoint."""
        rows = []
        if begin and self.path.exists():
            with open(self.path, newline="") as f:
                # a killed run can leave half a row
                rows = [row for row in csv.DictReader(f) if None not in row.values()]
            if rows and list(rows[0]) != self.fields:
                raise InputError(f"{self.path}: its columns are not those of this run; restore it "
                                 "or move it away")
            rows = [row for row in rows if int(row["step"]) <= begin]
        lines = [",".join(self.fields), *(",".join(row.values()) for row in rows)]
        write_atomically(self.path, "".join(f"{line}\n" for line in lines).encode())

    def add(self, terms, loss):
        """Keep a step's unweighted terms and the loss, on their device."""
        values = [*(terms[name] for name in self.names), loss]
        self.values.append(torch.stack([value.detach().float() for value in values]))

    def add_gradients(self, terms, ce, encoder):
        """Keep each term's gradient norm in the encoder and its cosine with cross-entropy's."""
        self.gradients.append(gradient_norms_and_cosines(terms, ce, encoder))

    def average_row(self, step, optimizer, module):
        """Average what was added. Raises InputError where a loss or a parameter is not finite.

        Call it before validating: validation time is not counted, and a network that is not finite
        must not be scored.
        """
        values = losses.all_sum(torch.stack(self.values)).double().cpu()  # steps, terms and loss
        values /= self.run.machine.processes
        self.check_finite(step, values, module)
        seconds = (time.monotonic() - self.began) / len(values)
        *terms, total = values.mean(0).tolist()
        raw = dict(zip(self.names, terms))
        weighted = {n: self.run.stage.weights[n] * v for n, v in raw.items()}
        self.row = {"lr": f"{optimizer.param_groups[0]['lr']:.4g}",
                    "seconds_per_step": f"{seconds:.3f}", "total": f"{total:.6g}"}
        self.row |= {f"raw_{n}": f"{v:.6g}" for n, v in raw.items()}
        self.row |= {f"weighted_{n}": f"{v:.6g}" for n, v in weighted.items()}
        if self.gradients:
            norms, cosines = torch.tensor(self.gradients).mean(0).unbind(1)  # terms
            self.row |= {f"grad_{n}": f"{v:.6g}" for n, v in zip(self.names, norms.tolist())}
            self.row |= {f"cos_{n}": f"{v:.4f}" for n, v in zip(self.names, cosines.tolist())}
            self.gradients = []
        self.shown = " ".join(f"{n} {v:.3f}" for n, v in weighted.items())

    def write(self, step, miou=None):
        """Append the row, with the score of a validation, and begin the next one."""
        if self.run.machine.rank == 0:
            scored = {} if miou is None else {"val_miou": f"{miou:.3f}"}
            with open(self.path, "a", newline="") as f:
                writer = csv.DictWriter(f, self.fields, lineterminator="\n")
                writer.writerow({"step": step} | self.row | scored)
            self.show(step, miou)
        self.values, self.row, self.began = [], {}, time.monotonic()

    def show(self, step, miou):
        stage = self.run.stage
        scored = "" if miou is None else f" val mIoU {miou:.2f}"
        if scored or not (sys.stderr and sys.stderr.isatty()):  # on a terminal the bar suffices
            tqdm.write(f"{stage.stage} {step}/{stage.steps}: {self.shown}{scored}")

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


def gradient_norms_and_cosines(terms, ce, encoder):
    """[L2 norm, cosine] of each unweighted term's gradient in the encoder.

    The cosine is that with the gradient of `ce`. Gradients are averaged over processes.
    """
    parameters = list(encoder.parameters())

    def gradient(term):
        found = torch.autograd.grad(term, parameters, retain_graph=True, materialize_grads=True)
        flat = torch.cat([losses.at_least_float32(g).flatten() for g in found])
        return losses.all_sum(flat).double() / losses.process_count()

    ce_gradient = gradient(ce)
    return [[g.norm().item(), F.cosine_similarity(g, ce_gradient, dim=0).item()]
            for g in map(gradient, terms.values())]


class Checkpoint:
    """last.pt of a stage. Where the folder holds one, the stage continues from it.

    resumed: whether a last.pt was found. step: how many steps are done. outgrown: whether the
    student was better than its teacher in a validation. Raises InputError where the last.pt belongs
    to another experiment.
    """
    SAVE_SECONDS = 900  # after these, save at the next row of the log

    def __init__(self, run, module, optimizer):
        self.run, self.module, self.optimizer = run, module, optimizer
        self.path, self.step, self.saved = run.folder / "last.pt", 0, time.monotonic()
        self.outgrown = False
        run.folder.mkdir(parents=True, exist_ok=True)
        self.resumed = from_process_0(self.path.exists())
        if self.resumed:
            self.load()

    def load(self):
        state = read_last(self.path)
        refuse_another_stage(self.path, self.run.stage, state["stage"])
        remedy = "choose another --out"
        load_strictly(self.module, state["module"], self.path, "this stage", remedy)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.outgrown = state["step"], state.get("outgrown", False)

    def note_if_outgrown(self, miou, to_beat):
        """Note, and print, that a validation shows the student to be better than its teacher."""
        judged = not self.outgrown and miou is not None and to_beat is not None
        if judged and from_process_0(miou > to_beat):
            self.outgrown = True
            if self.run.machine.rank == 0:
                tqdm.write(f"student: val mIoU {miou:.2f} beats its teacher's {to_beat:.2f}; from "
                           "here on it learns from the labels alone")

    def save(self, step):
        """Write last.pt. Raises KeyboardInterrupt where a signal asked for the end."""
        if self.run.machine.rank == 0:
            save_tensors(self.path, self.run.description | {
                "step": step, "stage": self.run.identity, "module": self.module.state_dict(),
                "optimizer": self.optimizer.state_dict(), "outgrown": self.outgrown})
        self.saved = time.monotonic()
        if any_process(Stop.asked):
            raise KeyboardInterrupt(f"{self.run.stage.stage}: stopped and saved at step {step}; "
                                    "run the same command again to continue")

    def save_if_due(self, step):
        """Save after a validation, where SAVE_SECONDS are over, or where a signal asks for it."""
        late = time.monotonic() - self.saved > self.SAVE_SECONDS
        if self.run.validation_due(step) or any_process(late or Stop.asked):
            self.save(step)


def read_last(path):
    """A last.pt as a dict. Raises InputError for other files, and for older versions' files."""
    state = load_checkpoint(path, ("step", "module", "optimizer"))
    if not isinstance(state.get("stage"), dict):
        raise InputError(f"{path}: written by an older version, which cannot be continued; "
                         "choose another --out")
    return state


def refuse_another_stage(path, stage, saved):
    found = stage.differences(saved)
    if found:
        remedy = {"teacher": "choose another --out", "pool": "delete its folder",
                  "student": "choose another --out or --name"}[stage.stage]
        raise InputError(f"{path}: from a different experiment: {'; '.join(found)}; repeat that "
                         f"run's options, or {remedy}")


# ---------------------------------------------------------------- several processes

def barrier():
    if dist.is_initialized():
        dist.barrier()


def from_process_0(value):
    """Process 0's value for all, so that none waits alone where a network disk lags."""
    found = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    return found[0]


def any_process(flag):
    """Whether the flag is set in any process."""
    if not dist.is_initialized():
        return flag
    flags = [None] * dist.get_world_size()
    dist.all_gather_object(flags, flag)
    return any(flags)


@contextmanager
def one_process_first():
    """Process 0 does what follows first and alone, a download for instance, then the others."""
    if dist.is_initialized() and dist.get_rank() > 0:
        barrier()
    yield
    if dist.is_initialized() and dist.get_rank() == 0:
        barrier()


class Stop:
    """asked: a signal came, so that the run ends after the next row of the log."""
    asked = False

    @classmethod
    def listen(cls):
        """SIGINT or SIGTERM ends the run with its state saved. A second one ends it at once."""
        def ask(*_):
            if cls.asked:
                raise KeyboardInterrupt
            cls.asked = True
            print("stopping after the next row of the log; once more to stop at once",
                  file=sys.stderr)

        signal.signal(signal.SIGINT, ask)
        signal.signal(signal.SIGTERM, ask)


# ---------------------------------------------------------------- the stages in a row

def train(args, machine):
    """Stages 1 to 3 as far as the method needs them, then the table."""
    plan = Plan(args, machine, *open_labelled(args))
    check_early(plan, args)
    announce(plan, args)

    entries = {}  # rows of the table: name -> (network, its scores, its log)
    teacher = pool = teacher_run = pool_identity = None
    if "teacher" in plan.needs:
        teacher, teacher_run = get_teacher(plan, args, entries)
    if "A_l" in plan.needs:
        pool, pool_identity = get_pool(plan, args, teacher, teacher_run)
    for method in plan.methods:
        needs = METHODS[method].needs
        run = plan.student_run(method, teacher_run if "teacher" in needs else None,
                           pool_identity if "A_l" in needs else None)
        to_beat = None
        if run.stage.teach in ("right", "outgrown"):
            to_beat = from_process_0(score_to_beat(plan, teacher, teacher_run, entries))
        with locked_unless_finished(run):
            student = distil(run, args.student_weights, teacher if "teacher" in needs else None,
                             pool if "A_l" in needs else None, to_beat)
        add_entry(entries, "student alone" if method == "ce" else f"student {method}", student, run)
    if machine.rank == 0:
        if plan.methods and "student alone" not in entries:
            add_student_alone(entries, plan.student_run("ce"))
        report_run(plan, run if plan.methods else teacher_run, entries)


class Plan:
    """What the command line asks for, as Runs. The stages know nothing of the command line."""

    def __init__(self, args, machine, data, digests):
        self.args, self.machine, self.data = args, machine, data
        self.root = Path(args.out) / args.dataset
        self.val_every = args.val_every or quarter(args.steps)
        self.methods = [args.method]
        if args.student_alone_too:
            self.methods = ["ce", "c2vkd"]
        if args.method == "teacher":
            self.methods = []
        self.needs = set().union(*(METHODS[method].needs for method in self.methods))
        if args.method == "teacher":
            self.needs = {"teacher", "A_l"}
        self.unlabelled = digests["unlabelled"]
        self.common = dict(
            warmup=args.warmup, batch_size=args.batch_size, base=args.base, crop=args.crop,
            scale=tuple(args.scale), dataset=args.dataset, classes=tuple(data.classes),
            labels=digests["labels"], pictures=digests["pictures"])

    def run(self, stage, folder, **more):
        """A Run. `more` goes into the description that evaluate.py reads."""
        description = {
            "name": stage.network, "dataset": stage.dataset, "classes": list(stage.classes),
            "data": self.args.data and os.path.abspath(self.args.data),
            "palette": [list(colour) for colour in self.data.palette],
            "base": stage.base, "window": stage.crop, **more}
        return Run(stage, self.data, folder, self.machine, description)

    def teacher_run(self):
        args = self.args
        stage = Stage(
            stage="teacher", network=args.teacher,
            initial=identity_of_weights(args.teacher_weights), steps=args.teacher_steps,
            rate=args.teacher_lr, seed=args.teacher_seed, weights={"ce": 1.0}, **self.common)
        seed = f"-seed{args.teacher_seed}" if args.teacher_seed else ""
        return self.run(stage, self.root / f"teacher-{args.teacher}{seed}")

    def pool_run(self, teacher):
        """teacher: the Run of a trained one, or the GivenTeacher."""
        args = self.args
        stage = Stage(
            stage="pool", network="attention_pool", initial="none", steps=args.pool_steps,
            rate=3e-4, seed=args.teacher_seed, weights={"bce": 1.0}, teacher=teacher.identity,
            **self.common)
        return self.run(stage, teacher.folder / "pool")

    def teach(self, method):
        """The value of --teach, or the method's default. None where it needs no teacher."""
        if "teacher" not in METHODS[method].needs:
            return None
        return self.args.teach or ("right" if METHODS[method].takes("everywhere") else "outgrown")

    def student_run(self, method, teacher=None, pool=None):
        """teacher: a Run or a GivenTeacher. pool: identity of the pool. None where not needed."""
        args, needs = self.args, METHODS[method].needs
        asked = method == args.method
        teach = self.teach(method)
        stage = Stage(
            stage="student", network=args.student,
            initial=identity_of_weights(args.student_weights), steps=args.steps, rate=args.lr,
            seed=args.seed, method=method,
            weights=args.term_weights if asked else dict(METHODS[method].weights),
            kl=args.kl if METHODS[method].takes("kl") else None, teach=teach,
            val_every=self.val_every if teach in ("right", "outgrown") else None,
            unlabelled=self.unlabelled if "A_v" in needs else 0,
            teacher=teacher and teacher.identity, pool=pool, **self.common)
        name = f"{method}-{args.student}-seed{args.seed}"
        label = None
        if asked and args.name:
            name, label = args.name, args.name.removesuffix(f"-seed{args.seed}")
        # in a comparison, options may differ between names, conditions must be equal in all runs
        option_names = "weights", "kl", "teach", "val_every", "unlabelled", "pool"
        conditions = as_saved(stage)
        options = {name: conditions.pop(name) for name in option_names}
        conditions["teacher_identity"] = conditions.pop("teacher")  # one comparison per teacher
        del conditions["method"], conditions["seed"]
        return self.run(stage, self.root / name, label=label, method=method, seed=args.seed,
                        conditions=conditions, options=options)


def open_labelled(args):
    """The DataSet, and the three digests that a Stage keeps.

    Raises InputError for data that cannot train.
    """
    cache = Path(args.out) / args.dataset / "labels.json"
    with one_process_first():  # process 0 draws or downloads, and reads all labels
        data = open_dataset(args.dataset, args.data)
        cache.parent.mkdir(parents=True, exist_ok=True)
        scan = scan_labels(data, cache)
    for line in judge_labels(data, scan):
        print(line)
    return data, {"labels": scan.digest, "pictures": digest_of_pictures(data, "train", "val"),
                  "unlabelled": digest_of_pictures(data, "unlabelled")}


def digest_of_pictures(data, *splits):
    """Digest of the names and sizes of the pictures in these splits, 0 without any."""
    digest = hashlib.sha256()
    for split in splits:
        for picture, _ in data.pairs.get(split, ()):
            digest.update(f"{split}/{picture.name} {picture.stat().st_size}\n".encode())
    return digest.hexdigest() if any(data.pairs.get(split) for split in splits) else 0


def check_early(plan, args):
    """Raise InputError now for what would stop the run after hours of stage 1."""
    machine = plan.machine
    if args.batch_size % machine.processes:
        raise InputError(f"--batch-size {args.batch_size}: must be a multiple of the "
                         f"{machine.processes} processes")
    one_image_per_process = args.batch_size == machine.processes
    if "teacher" in plan.needs and one_image_per_process and not machine.cuda:
        raise InputError(f"--batch-size {args.batch_size}: the teacher's BatchNorm needs two "
                         f"images per process on CPUs; take {2 * machine.processes} or more")
    if args.clip:  # only to see whether it fits
        load_clip_pool(args.clip, TEACHERS[args.teacher].channels, grid=16)
    for method in plan.methods:
        refuse_early(plan, method)
    checkpoints = [plan.student_run(method).folder / "last.pt" for method in plan.methods]
    if not from_process_0(all(path.exists() for path in checkpoints)):
        with one_process_first():
            student = Student(args.student, len(plan.data.classes))
            left = load_encoder(student.encoder, args.student, args.student_weights)
        if left:
            print(f"student encoder: {args.student_weights}; not loaded: {', '.join(left)}")


def refuse_early(plan, method):
    """Raise InputError where the student's folder holds another experiment than planned."""
    run, needs = plan.student_run(method), METHODS[method].needs
    last = run.folder / "last.pt"
    if not from_process_0(last.exists()):
        return
    saved = read_last(last)["stage"]
    # the pool and a given teacher are not known yet, so take the saved ones
    known = replace(run.stage, teacher=saved["teacher"], pool=saved["pool"])
    if "teacher" in needs and not is_finished_teacher(plan.args.teacher_weights):
        known = replace(known, teacher=adopt(plan.teacher_run(), quiet=True).identity)
    refuse_another_stage(last, known, saved)


def announce(plan, args):
    """Print the data, the recipe and the stages before they begin."""
    pairs = plan.data.pairs
    print(f"{args.dataset}: {len(pairs['train'])} training and {len(pairs['val'])} validation "
          f"images, {len(plan.data.classes)} classes; recipe {args.recipe}; seed {args.seed}; "
          f"device {plan.machine.device}")
    if pairs.get("unlabelled"):
        used = [method for method in plan.methods if "A_v" in METHODS[method].needs]
        print(f"{len(pairs['unlabelled'])} images without labels, used by "
              f"{' and '.join(used) or 'none of these methods'}")
    stages = [f"student {args.student}, {method}: {args.steps:,} steps" for method in plan.methods]
    if "A_l" in plan.needs and not args.clip:
        stages.insert(0, f"pool: {args.pool_steps:,} steps")
    if "teacher" in plan.needs and not is_finished_teacher(args.teacher_weights):
        stages.insert(0, f"teacher {args.teacher}: {args.teacher_steps:,} steps")
    print("stages: " + "; ".join(stages), flush=True)


@contextmanager
def locked_unless_finished(run):
    """Lock the folder while a stage trains. A finished stage is only read and needs no lock."""
    last = run.folder / "last.pt"
    finished = last.exists() and read_last(last)["step"] == run.stage.steps
    if run.machine.rank > 0 or finished:
        yield
    else:
        with locked(run.folder):
            yield


# Fields in which a finished teacher or pool may differ from what the command line asks for
MAY_DIFFER = ("batch_size", "base", "crop", "scale", "rate", "warmup")


def adopt(run, quiet=False):
    """Returns the Run of the finished stage in the folder, if only MAY_DIFFER fields differ.

    Else it returns `run`. A NOTE tells of the differences, unless quiet.
    """
    path = run.folder / "last.pt"
    if not from_process_0(path.exists()):
        return run
    last = read_last(path)
    saved = {k: last["stage"].get(k) for k in MAY_DIFFER}
    saved_fields = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
    adopted = replace(run.stage, **saved_fields)
    finished = last["step"] == last["stage"].get("steps")
    if adopted == run.stage or not finished or adopted.differences(last["stage"]):
        return run
    if not quiet:
        others = "; ".join(run.stage.differences(last["stage"]))
        print(f"NOTE: {run.folder}: this {run.stage.stage} is finished and is used as it is, "
              f"though trained and scored with other settings: {others}")
    return replace(run, stage=adopted)


# ---------------------------------------------------------------- the teacher and the pool

def identity_of_weights(source):
    """none, imagenet or voc as they are. A file's name and digest, wherever it lies."""
    if source in ("none", "imagenet", "voc"):
        return source
    return f"{Path(source).name}, sha256 {digest_of(source)}"


def digest_of(path):
    try:
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()[:16]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give the path of a weights file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: a folder; give the path of a weights file in it") from None


@dataclass(frozen=True)
class GivenTeacher:
    """A finished teacher from a file: what it is, and the folder of its scores and its pool."""
    identity: dict
    folder: Path


def is_finished_teacher(source):
    """Whether --teacher-weights names a finished teacher, not what stage 1 starts from."""
    if source in ("none", "imagenet", "voc"):
        return source == "voc"
    state = load_checkpoint(source)
    return "module" in state or not is_backbone(unwrap(state)[0])


def get_teacher(plan, args, entries):
    """Train the teacher or read the given one. Returns it, frozen, and its Run or GivenTeacher."""
    if is_finished_teacher(args.teacher_weights):
        return given_teacher(plan, args, entries)
    run = adopt(plan.teacher_run())
    with locked_unless_finished(run):
        teacher = train_teacher(run, args.teacher_weights)
    add_entry(entries, "teacher", teacher, run)
    return teacher, run


def given_teacher(plan, args, entries):
    """The finished teacher of --teacher-weights, scored on val once.

    A file is a last.pt of this project or a plain torchvision state dict. Raises InputError for
    another network, other classes or a last.pt of an unfinished stage.
    """
    source, classes = args.teacher_weights, plan.data.classes
    if source != "voc" and "module" in load_checkpoint(source):
        teacher, state = load_network(source)
        if state["name"] != args.teacher or state["classes"] != classes:
            raise InputError(f"{source}: holds {state['name']} with {len(state['classes'])} "
                             f"classes, wanted {args.teacher} with these {len(classes)}; give "
                             "--teacher, or the right checkpoint")
        planned = read_last(source)["stage"]["steps"]
        if state["step"] < planned:
            raise InputError(f"{source}: trained for {state['step']} of its {planned} steps; "
                             "finish it with the command that began it")
    else:
        teacher = Teacher(args.teacher, len(classes))
        with one_process_first():
            initialise(teacher, args.teacher, source)
    teacher = teacher.to(plan.machine.device, memory_format=torch.channels_last).freeze()
    weights = identity_of_weights(source)
    digest_or_voc = weights.split()[-1]
    given = GivenTeacher({"network": args.teacher, "weights": weights},
                         plan.root / f"teacher-{args.teacher}-{digest_or_voc}")
    entries["teacher"] = teacher, scores_of_given(plan, args, teacher, given), None
    return teacher, given


def scores_of_given(plan, args, teacher, given):
    """Scores on val of a given teacher. They are measured and printed once, then read."""
    path = given.folder / "results-val.json"
    scored_with = {name: plan.common[name] for name in ("labels", "pictures", "base", "crop")}
    if from_process_0(path.exists()):
        with suppress(InputError):  # what cannot be read is measured again
            known = read_scores(path)
            if known["conditions"] == scored_with:
                return known
    machine = plan.machine
    matrix = evaluate(teacher, plan.data, "val", args.base, args.crop, machine.device,
                      workers=machine.workers).cpu()
    result = scores(matrix)
    if machine.rank == 0:
        given.folder.mkdir(parents=True, exist_ok=True)
        write_scores(given.folder, "val", result, {"conditions": scored_with})
    row = f"teacher {args.teacher}", count_parameters(teacher), None, result
    print(table([row], plan.data.classes))
    if result["miou"] <= miou_of_commonest_class(matrix):
        print("WARNING: this teacher is no better than always answering the commonest class: are "
              "its classes in this order, its pictures RGB with ImageNet's mean and deviation?")
    return result


def get_pool(plan, args, teacher, teacher_run):
    """Fit the pool on the teacher or read CLIP's. Returns it, frozen, and its identity."""
    if args.clip:
        grid = pool_grid(teacher, args.crop, plan.machine.device)
        pool = load_clip_pool(args.clip, teacher.channels, grid)
        return pool.to(plan.machine.device), {"clip": digest_of(args.clip)}
    run = adopt(plan.pool_run(teacher_run))
    with locked_unless_finished(run):
        return fit_pool(run, teacher), run.identity


def score_to_beat(plan, teacher, teacher_run, entries):
    """mIoU of the teacher on val, at the size at which the student is validated."""
    base, crop = plan.common["base"], plan.common["crop"]
    # an adopted teacher was scored at its own size, a given one at this
    trained_here = isinstance(teacher_run, Run)
    if trained_here and (teacher_run.stage.base, teacher_run.stage.crop) != (base, crop):
        matrix = evaluate(teacher, plan.data, "val", base, crop, plan.machine.device,
                          workers=plan.machine.workers)
        return scores(matrix.cpu())["miou"]
    return entries["teacher"][1]["miou"] if plan.machine.rank == 0 else None


@torch.no_grad()
def report_pool(run, fitter, teacher):
    """Print the pool's mean average precision on val crops beside the class-frequency baseline.

    The text also goes into report.txt and is not made again.
    """
    stage, classes, pairs = run.stage, run.stage.classes, run.data.pairs["val"]
    val = replace(run.data, pairs={"train": pairs})  # posing as train, to be cropped
    crops = TrainStream(val, stage.seed, stage.base, stage.crop, (1, 1), len(pairs))
    fitter.eval()
    answers, truth = [], []
    for i in range(min(200, len(pairs))):
        image, label = crops[i]
        with run.machine.precision():
            feature = teacher(normalise(image[None].to(run.machine.device))).feature
            answers.append(fitter(feature).float().cpu())
        truth.append(presence(label[None].long(), len(classes)))
    text = pool_report_text(torch.cat(answers), torch.cat(truth), classes)
    write_atomically(run.folder / "report.txt", f"{text}\n".encode())
    print(text)


def pool_report_text(answers, truth, classes):
    """The report as text. answers: logits of M crops (M,K). truth: their classes, 0 or 1 (M,K)."""
    frequency = truth.mean(0)
    some = (frequency > 0) & (frequency < 1)
    if not some.any():
        return (f"pool: not measured, because each class is in all of the {len(truth)} val crops "
                "or in none")
    precision = average_precision(answers, truth)[some].mean()
    always = ", ".join(name for name, f in zip(classes, frequency) if f == 1)
    return (f"pool: mean average precision on {len(truth)} val crops {100 * precision:.1f}, class "
            f"frequency alone {100 * frequency[some].mean():.1f}; in every crop (nothing to "
            f"learn): {always or 'none'}")


# ---------------------------------------------------------------- the report

def add_entry(entries, name, network, run):
    """A row of the table: the network, its scores on val and its log."""
    if run.machine.rank == 0:
        path = run.folder / "results-val.json"
        result = read_scores(path)
        if result["step"] != run.stage.steps:
            raise InputError(f"{path}: of step {result['step']}, not of the last one; run "
                             "evaluate.py on the last.pt beside it")
        entries[name] = network, result, run.folder / "log.csv"


def add_student_alone(entries, alone):
    """The same student's finished run without a teacher, if it is at hand."""
    last = alone.folder / "last.pt"
    if not last.exists() or not (alone.folder / "results-val.json").exists():
        return
    state = load_checkpoint(last)
    if alone.stage.differences(state.get("stage", {})) or state["step"] < alone.stage.steps:
        return
    network, _ = load_network(last, alone.machine.device)
    add_entry(entries, "student alone", network.to(memory_format=torch.channels_last), alone)


def report_run(plan, run, entries):
    """Print the table of all networks and draw them. run: of the student, else of the teacher."""
    if plan.methods:
        report_terms(run.folder, run.stage.weights)
    first = {"teacher": 0, "student alone": 1}
    rows = dict(sorted(entries.items(), key=lambda item: first.get(item[0], 2)))
    report(run.folder, rows, plan.data, plan.common["base"], plan.common["crop"],
           plan.machine.device)


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
    # for the embedded data set: everything from random weights, in six minutes
    "shapes": dict(
        base=64, crop=64, scale=(1.0, 1.0), batch_size=8, warmup=40,
        teacher="deeplabv3_resnet10", teacher_weights="none", teacher_steps=600,
        pool_steps=60, student="mit_nano", student_weights="none", steps=400),
}

# They are ten times VLFD_WEIGHTS of losses.py. They did best in short training on shapes, and harm
# under a teacher from ImageNet weights
VLFD_OF_SHAPES = {"gb": 10.0, "pc": 20.0, "lc": 2.0}


def parse_options(argv=None):
    """The command line, with the recipe's values filled in. Raises InputError for bad values."""
    args = parser().parse_args(argv)
    found = torch.cuda.device_count()
    args.gpus = min(1, found) if args.gpus is None else args.gpus
    if args.gpus > found and "RANK" not in os.environ:
        remedy = f"--gpus {found}" if found else "--gpus 0 to run on the CPU"
        raise InputError(f"--gpus {args.gpus}: {found} CUDA devices found; use {remedy}")
    fill_from_recipe(args)
    # unstated: training from random weights. There the student does better at 1e-3 than at the
    # paper's 6e-5, and the teacher with AdamW at 1e-3 than with SGD at 0.01
    args.lr = args.lr or (1e-3 if args.student_weights == "none" else 6e-5)
    args.teacher_lr = args.teacher_lr or (1e-3 if args.teacher_weights == "none" else 0.01)
    args.workers = default_workers(args.gpus) if args.workers is None else args.workers
    args.student_alone_too = args.method is None and args.dataset == "shapes"
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
    g.add_argument("--dataset", default="shapes", choices=DATASETS, help="default shapes")
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
    g.add_argument("--kl", default="forward", choices=("forward", "reverse"),
                   help="direction in Eq. 3, 4 and 9 (default forward)")
    g.add_argument("--teach", choices=("right", "outgrown", "end"),
                   help="right: the teacher counts until the student is better on val, and in PDD "
                   "only where it gives the label's class more than 1/2 (default of methods with "
                   "PDD) | outgrown: everywhere until then (default of the others) | end: "
                   "everywhere to the end, as in the paper")
    g.add_argument("--weights", nargs="+", default=[], metavar="T=X",
                   help="of terms, e.g. gb=0.1 lc=0.5. Or the release's numbers: summed (in our "
                   "units) | released (in its units)")
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
    """Raise InputError for options that the rest of the command line would ignore."""
    method = METHODS.get(args.method)  # None: teacher
    if args.kl == "reverse" and not (method and method.takes("kl")):
        raise InputError(f"--kl reverse: {args.method} has no direction to choose; it goes with "
                         "--method c2vkd")
    if args.teach and not (method and "teacher" in method.needs):
        raise InputError(f"--teach {args.teach}: {args.method} has no teacher; it goes with "
                         "--method c2vkd, for instance")
    if args.teach == "right" and not method.takes("everywhere"):
        raise InputError(f"--teach right: {args.method} has no PDD; use outgrown or end")
    if args.clip and method and "A_l" not in method.needs:
        raise InputError(f"--clip: {args.method} uses no attention pool; it goes with --method "
                         "c2vkd")
    if args.teacher_weights == "voc" and args.dataset != "voc":
        raise InputError("--teacher-weights voc: that model knows VOC's classes only; use "
                         "imagenet, none or a FILE")
    if not method and (args.name or args.seed):
        raise InputError("--method teacher: trains no student, so that --name and --seed do "
                         "nothing; use --teacher-seed")
    label = (args.name or "").removesuffix(f"-seed{args.seed}")
    if label != args.method and label in METHODS or label.startswith("teacher-"):
        raise InputError(f"--name {args.name}: reserved for a method or a teacher; choose another")
    folder = Path(args.name or "default")
    if folder.is_absolute() or ".." in folder.parts or not folder.name:
        raise InputError(f"--name {args.name}: leaves the folder of the runs; --out chooses that")


def term_weights(args):
    """Weight of each term of the method after --weights. Raises InputError for other terms."""
    if args.method == "teacher":
        if args.weights:
            raise InputError("--weights: the teacher's training has no terms to weigh; it goes "
                             "with a method")
        return {}
    weights = dict(METHODS[args.method].weights)
    if args.dataset == "shapes" and args.method in ("c2vkd", "vlfd"):
        weights |= {n: weight for n, weight in VLFD_OF_SHAPES.items() if n in weights}
    if args.method == "c2vkd" and args.weights in (["summed"], ["released"]):
        return losses.c2vkd_weights(args.weights[0], TEACHERS[args.teacher].channels)
    for item in args.weights:
        name, _, value = item.partition("=")
        try:
            if name not in weights or not math.isfinite(float(value)):
                raise ValueError
            weights[name] = float(value)
        except ValueError:
            taken = " ".join(f"{n}=NUMBER" for n in weights)
            words = " or one word, summed or released" if args.method == "c2vkd" else ""
            raise InputError(f"--weights {item}: {args.method} takes {taken}{words}") from None
    return weights


# ---------------------------------------------------------------- processes and devices

def set_torch_flags(cuda, deterministic=False):
    """What both training and tests/benchmark.py set before anything runs."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if not cuda:
        return
    torch.backends.cudnn.benchmark = not deterministic
    # allow TF32 in what stays float32 under autocast, above all the products X^T X of the patch
    # loss. Its gradient is within 1% of float32's, or within 3% where N < C and the student is near
    # its teacher
    torch.set_float32_matmul_precision("high")
    # on Hopper torch prefers cuDNN's attention. It plans anew for each shape, 0.4 s every time, and
    # is reported to give NaN for a single query, which the pool has
    torch.backends.cuda.enable_cudnn_sdp(False)


def start_machine(args):
    """The Machine of this process, with its device and its place among several set up."""
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if args.gpus else torch.device("cpu")
    if rank:
        sys.stdout = open(os.devnull, "w")  # one process speaks
    if args.gpus:
        torch.cuda.set_device(device)
    set_torch_flags(bool(args.gpus), args.deterministic)
    if processes > 1:
        backend, bound = ("nccl", device) if args.gpus else ("gloo", None)
        # the others wait while one process draws, downloads or scores
        dist.init_process_group(backend, timeout=timedelta(hours=6), device_id=bound)
    # without fork, each loader process would otherwise import torch anew
    multiprocessing.set_forkserver_preload(["torch"])
    Stop.listen()
    return Machine(device, rank, processes, args.workers, args.log_every, args.val_every)


def main():
    args = parse_options()
    if args.gpus > 1 and "RANK" not in os.environ:  # this script again, one process per GPU
        os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                  "--nproc-per-node", str(args.gpus), *sys.argv])
    machine = start_machine(args)
    try:
        train(args, machine)
    except InputError:
        if machine.rank:
            time.sleep(5)  # process 0 has the same error: let it print and stop the others
        raise
    except Exception:
        if Stop.asked:  # the signal reached loader processes, too
            raise KeyboardInterrupt from None
        raise
    if dist.is_initialized():  # not after an error, while others wait in a collective
        dist.destroy_process_group()


if __name__ == "__main__":
    command(main)
