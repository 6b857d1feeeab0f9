"""Scores, pictures, export and comparison of trained networks, students and teachers alike.

    # mIoU and the IoU of each class
    python evaluate.py --checkpoint runs/shapes/c2vkd-mit_nano-seed0/last.pt
    # overlays of pictures without labels, or masks of class indices
    python evaluate.py --checkpoint FILE --image a.jpg DIR --pictures OUT
    python evaluate.py --checkpoint FILE --image DIR --masks
    # the network alone, for torch.export or ONNX
    python evaluate.py --checkpoint FILE --export student.pt2
    # gains of all methods over the student alone
    python evaluate.py --compare runs/shapes --against fitnet

mIoU: one int64 confusion matrix over all labelled pixels of the split at the labels' original
resolution, IoU = TP / (TP + FP + FN), mean over the classes that occur in labels or predictions.
"""
import csv
import importlib.util
import io
import itertools
import json
import math
import os
import statistics
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch.utils.data import DataLoader

from data import (DATASETS, IGNORE, EvalImages, InputError, Parser, at_least, command,
                  data_folder, evenly_spaced, load_checkpoint, load_strictly, normalise,
                  open_dataset, pictures, progress, quiet_worker, read_image, resize_short_side,
                  scan_labels, write_atomically)
from student import VARIANTS, Student, count_parameters
from teacher import TEACHERS, Teacher


# ---------------------------------------------------------------- mIoU

def confusion_matrix(prediction, label, classes):
    """Counts (K,K) int64, row = label, column = prediction. Pixels labelled 255 are left out."""
    valid = label != IGNORE
    pairs = label[valid].long() * classes + prediction[valid].long()
    return torch.bincount(pairs, minlength=classes ** 2).view(classes, classes)


def scores(matrix):
    """What a confusion matrix (K,K) says, in percent: miou, pixel_accuracy, iou of each class.

    The iou of a class in neither labels nor predictions is None. The mean leaves it out.
    """
    hit = matrix.diag().double()
    iou = (100 * hit / (matrix.sum(0) + matrix.sum(1) - hit)).tolist()
    present = [v for v in iou if not math.isnan(v)]
    return {"miou": sum(present) / max(1, len(present)),
            "iou": [None if math.isnan(v) else v for v in iou],
            "pixel_accuracy": (100 * hit.sum() / matrix.sum().clamp(min=1)).item()}


def miou_of_commonest_class(matrix):
    """mIoU of always answering the commonest class: no network worth using has less."""
    labelled = matrix.sum(1)
    answers = torch.zeros_like(matrix)
    answers[:, labelled.argmax()] = labelled
    return scores(answers)["miou"]


# ---------------------------------------------------------------- the sliding window

def evaluate(model, data, split, base, window, device, stride=None, batch=8,
             desc="evaluating", workers=0):
    """Confusion matrix (K,K) of `model`, in eval mode, on a split.

    base: pixels of the short side at which the network sees the images.
    window, stride, batch: see `predict`. workers: processes that decode.
    With several processes each takes every n-th image, and the counts are added up.
    """
    assert not model.training, "call model.eval() first"
    several = dist.is_initialized()
    rank, processes = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    chosen = range(len(data.pairs[split]))[rank::processes]
    # its own generator: the default one would advance the training's random state
    loader = DataLoader(EvalImages(data, split, base, chosen), batch_size=None,
                        num_workers=workers, worker_init_fn=quiet_worker,
                        generator=torch.Generator())
    classes = len(data.classes)
    matrix = torch.zeros(classes, classes, dtype=torch.int64, device=device)
    for image, label in progress(loader, desc=desc, unit="images", disable=rank > 0, leave=False):
        label = label.to(device)
        prediction = predict(model, image.to(device), label.shape, window, stride, batch)
        matrix += confusion_matrix(prediction, label, classes)
    if several:
        dist.all_reduce(matrix)
    return matrix


@torch.no_grad()
def predict(model, image, size, window=None, stride=None, batch=8):
    """Class map (H,W) int64 at `size` of one uint8 image (3,h,w).

    A square with sides of `window` pixels slides over the image in steps of at most `stride`
    pixels, by default two thirds of it. Logits are averaged where windows overlap, then resized
    bilinearly to `size`. window=None: one window, as large as the image.
    Images smaller than the window are padded with the mean colour. batch: windows at a time.
    """
    h, w = image.shape[1:]
    # networks halve an image up to five times
    height, width = (window, window) if window else (max(h, 32), max(w, 32))
    image = normalise(image[None])[0]  # the mean colour is 0 now
    image = F.pad(image, (0, max(0, width - w), 0, max(0, height - h)))
    logits = _slide(model, image, height, width, stride, batch)[:, :h, :w]
    return class_map(logits, tuple(size))


def _slide(model, image, height, width, stride, batch):
    """Logits (K,H,W) of a normalised image (3,H,W) from windows of height x width."""
    # differs: the paper's windows have 512 pixels and an overlap that is not stated. The release
    # scores one centre crop of a resized image with resized labels. Here windows overlap by a
    # third, and predictions are scored at the labels' own size.
    tops = _window_starts(image.shape[1], height, stride)
    lefts = _window_starts(image.shape[2], width, stride)
    corners = list(itertools.product(tops, lefts))
    total, window_count = None, image.new_zeros(image.shape[1:])
    for first in range(0, len(corners), batch):
        chosen = corners[first:first + batch]
        crops = torch.stack([image[:, y:y + height, x:x + width] for y, x in chosen])
        for (y, x), part in zip(chosen, logits_of(model, crops)):
            if total is None:
                total = part.new_zeros(len(part), *image.shape[1:])
            part = F.interpolate(part[None], (height, width), mode="bilinear")[0]
            total[:, y:y + height, x:x + width] += part
            window_count[y:y + height, x:x + width] += 1
    return total / window_count


def _window_starts(side, window, stride):
    """Where windows begin along one side. The last one lies flush with the end."""
    stride = min(stride or 2 * window // 3, window)
    return [*range(0, side - window, stride), side - window]


def logits_of(model, images):
    """Logits (B,K,h,w) float32 of normalised images (B,3,H,W). A GPU computes them in bf16."""
    if images.is_cuda:
        images = images.contiguous(memory_format=torch.channels_last)
    with torch.autocast("cuda", torch.bfloat16, enabled=images.is_cuda):
        return model(images).logits.float()


def class_map(logits, size):
    """argmax (H,W) int64 over the classes of logits (K,h,w) resized bilinearly to `size`.

    Ties go to the lower class.
    """
    # Logits of all classes at the size of a large picture are gigabytes. So a few classes are
    # resized at a time, as many as fit in 32 MB and at most 16.
    group = max(1, min(16, 2 ** 23 // math.prod(size)))
    best = torch.full(size, -torch.inf, device=logits.device)
    classes = torch.zeros(size, dtype=torch.int64, device=logits.device)
    for first in range(0, len(logits), group):
        part = logits[None, first:first + group]
        value, index = F.interpolate(part, size, mode="bilinear")[0].max(0)
        classes = torch.where(value > best, first + index, classes)
        best = torch.maximum(value, best)
    return classes


# ---------------------------------------------------------------- comparison of runs

def compare(folder, split, against=()):
    """Text on all runs below `folder`, a part for each teacher.

    A part has a table of mIoU and of gains over `ce`, paired by seed. For each name in `against`
    follows a table of the other methods' gains minus that one's. The last table has the IoU of
    each class.
    Raises InputError as `read_runs` does, and for a name in `against` without a gain.
    """
    groups = read_runs(folder, split)
    gains = [gains_over_ce(runs) for _, runs in groups]
    known = sorted({name for gain in gains for name in gain})
    for name in against:
        if name not in known:
            raise InputError(f"--against {name}: no gain of that name below {folder}; "
                             f"there are {', '.join(known) or 'none'}")
    teachers = _what_differs([teacher for teacher, _ in groups])
    parts = []
    for teacher, (_, runs), gain in zip(teachers, groups, gains):
        example = next(result for seeds in runs.values() for result in seeds.values())
        head = f"{folder}: {split}, {example['step']} steps{teacher}"
        parts.append(f"{head}\n{_overview(runs, gain)}")
        parts += [_against(gain, name) for name in against if name in gain]
        parts.append(_each_class(runs, example["classes"]))
    return "\n\n".join(parts)


def gains_over_ce(runs):
    """name -> seed -> points of mIoU over `ce` on the same seed. runs: name -> seed -> result."""
    alone, gains = runs.get("ce", {}), {}
    for name, seeds in runs.items():
        gain = {seed: result["miou"] - alone[seed]["miou"]
                for seed, result in seeds.items() if seed in alone}
        if gain and name != "ce":
            gains[name] = gain
    return gains


# Two-sided 95% quantiles of Student's t with 1, 2, ... degrees of freedom. The last one serves
# all larger numbers, which makes their intervals slightly too wide.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
       2.145)


def _mean_and_interval(gains):
    """Mean of a list of gains and Student's 95% interval of that mean, each as text."""
    if not gains:
        return "-", "-"
    mean = statistics.mean(gains)
    if len(gains) == 1:
        return f"{mean:+.2f}", "(one seed)"
    quantile = T95[min(len(gains) - 2, len(T95) - 1)]
    half = quantile * statistics.stdev(gains) / len(gains) ** 0.5
    return f"{mean:+.2f}", f"[{mean - half:+.2f}, {mean + half:+.2f}]"


def _overview(runs, gains):
    """Table of each method's mIoU and gain, with the mean over its seeds."""
    rows = [["method", "seeds", "mIoU", "std", "gain over ce", "95% interval"]]
    for name, seeds in runs.items():
        values = [result["miou"] for result in seeds.values()]
        deviation = statistics.stdev(values) if len(values) > 1 else None
        gain = _mean_and_interval(list(gains.get(name, {}).values()))
        mean = statistics.mean(values)
        rows.append([name, str(len(values)), formatted(mean), formatted(deviation), *gain])
    return columns(rows)


def _against(gains, other):
    """Table of the gains minus that of `other`, paired by seed.

    The paper claims more than twice the gain of other methods. So twice the gain of `other` is
    subtracted, too.
    """
    rows = [[f"against {other}", "seeds", f"gain - 2 gain({other})", "95% interval",
             f"gain - gain({other})", "95% interval"]]
    for name, gain in gains.items():
        if name == other:
            continue
        pairs = [(gain[seed], gains[other][seed]) for seed in gain if seed in gains[other]]
        twice = _mean_and_interval([mine - 2 * others for mine, others in pairs])
        once = _mean_and_interval([mine - others for mine, others in pairs])
        rows.append([name, str(len(pairs)), *twice, *once])
    return columns(rows)


def _each_class(runs, classes):
    """Table of the IoU of each class, the mean over the seeds in which it occurs."""
    rows = [["IoU of each class, %", *runs]]
    for k, name in enumerate(classes):
        cells = []
        for seeds in runs.values():
            found = [r["iou"][k] for r in seeds.values() if r["iou"][k] is not None]
            cells.append(formatted(statistics.mean(found) if found else None))
        rows.append([name, *cells])
    return columns(rows)


def read_runs(folder, split):
    """Results of all students below `folder`, a group for each teacher.

    [(the teacher's identity or None, label or method -> seed -> result), ...]. Each group also
    holds the `ce` runs. Raises InputError for results that cannot be read, for runs whose
    conditions differ, and for one name with two methods, or with two options under one teacher.
    """
    students = {}
    for path in sorted(Path(folder).rglob(f"results-{split}.json")):
        result = read_scores(path)
        if result["method"] not in (None, "teacher"):
            students[path] = result
    if not students:
        raise InputError(f"{folder}: no results-{split}.json of a student below it; "
                         f"run train.py, or evaluate.py --split {split}")
    _refuse_differences({path: _conditions(result) for path, result in students.items()},
                        "compare runs of the same conditions, and train others with another --out")
    alone, taught = {}, {}
    for path, result in students.items():
        teacher = json.dumps(result["conditions"].get("teacher_identity"), sort_keys=True)
        group = alone if result["method"] == "ce" else taught.setdefault(teacher, {})
        group[path] = result
    groups = taught or {"null": {}}
    return [(json.loads(teacher), _by_name_and_seed(alone | group))
            for teacher, group in groups.items()]


def not_scored(folder, split):
    """Names of the students' folders below `folder` that have no scores on `split`."""
    lasts = sorted(path.relative_to(folder) for path in folder.rglob("last.pt"))
    students = [last for last in lasts
                if not any(part.startswith("teacher-") for part in last.parts)]
    return [last.parent.name for last in students
            if not (folder / last).with_name(f"results-{split}.json").exists()]


def _conditions(result):
    """What must agree in all runs of a comparison. Their teachers may differ."""
    conditions = dict(result["conditions"])
    conditions.pop("teacher_identity", None)
    conditions["step"] = result["step"]
    conditions["names of the classes"] = result["classes"]
    conditions[f"method of {_label(result)}"] = result["method"]
    if "labels" in result:  # present only where evaluate.py scored the run
        conditions["labels that were scored"] = result["labels"]
    return conditions


def _by_name_and_seed(results):
    """label or method -> seed -> result. results: path -> result, of one teacher and of `ce`."""
    _refuse_differences({path: _options(result) for path, result in results.items()},
                        "train runs of other options with another --name")
    runs = {}
    for path, result in results.items():
        seeds = runs.setdefault(_label(result), {})
        if result["seed"] in seeds:
            raise InputError(f"{path}: a second run of {_label(result)}, seed {result['seed']}; "
                             "keep one")
        seeds[result["seed"]] = result
    return runs


def _label(result):
    return result.get("label") or result["method"]


def _options(result):
    """What must agree in all runs of one name and one teacher."""
    options = result.get("options") or {}
    return {f"{key} of {_label(result)}": value for key, value in options.items()}


def _refuse_differences(results, remedy):
    """Raises InputError where a result differs from one before it in a value that both have.

    results: path -> what to compare, name -> value. remedy: how to keep such runs apart.
    """
    seen = {}
    for path, values in results.items():
        differing = [name for name, value in values.items()
                     if seen.setdefault(name, (value, path))[0] != value]
        if differing:
            other = seen[differing[0]][1]
            raise InputError(f"{path}: differs from {other} in {', '.join(differing)}; {remedy}")


def _what_differs(teachers):
    """For each teacher, what tells it from the others. Empty if there is only one.

    A teacher that was given as a file has a short identity, without steps.
    """
    if len(teachers) == 1:
        return [""]
    trained = [teacher for teacher in teachers if teacher and "steps" in teacher]
    differing_keys = [key for key in (trained or [{}])[0]
                      if any(teacher.get(key) != trained[0][key] for teacher in trained)]

    def text(teacher):
        if teacher not in trained:
            return f"given, {teacher['network']}, {teacher['weights']}" if teacher else "none"
        return ", ".join(f"{key} {teacher.get(key)}" for key in differing_keys) or "trained here"

    return [f", teacher: {text(teacher)}" for teacher in teachers]


# ---------------------------------------------------------------- tables of one run

def columns(rows):
    """Text table of rows of str: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def formatted(value, form=".2f"):
    return "-" if value is None else format(value, form)


def table(rows, classes):
    """Text table of networks, each row (label, parameters, milliseconds or None, scores)."""
    head = [["", "parameters", "ms per image", "mIoU", "pixel acc."]]
    for label, count, ms, result in rows:
        head.append([label, f"{count:,}", formatted(ms, ".1f"), formatted(result["miou"]),
                     formatted(result["pixel_accuracy"])])
    each = [["IoU of each class, %", *(label for label, *_ in rows)]]
    for k, name in enumerate(classes):
        each.append([name, *(formatted(result["iou"][k]) for *_, result in rows)])
    notes = []
    for label, *_, result in rows:
        scored = sum(v is not None for v in result["iou"])
        if scored < len(classes):
            notes.append(f"{label}: mean over {scored} of {len(classes)} classes: "
                         "the others are in neither labels nor predictions")
    return "\n\n".join([columns(head), *notes, columns(each)])


def report(folder, entries, data, base, window, device):
    """Draw comparison.png and curves.png into `folder`, then print the table of networks.

    entries: label -> (network, its scores on val, its log.csv or None).
    """
    folder.mkdir(parents=True, exist_ok=True)  # a teacher that was given has none yet
    networks = {label: network for label, (network, _, _) in entries.items()}
    comparison(data, "val", base, window, networks, device).save(folder / "comparison.png")
    curves = {label: _curve(log) for label, (_, _, log) in entries.items() if log}
    curves = {label: points for label, points in curves.items() if points}
    if curves:
        chart(curves, "step", "val mIoU, %").save(folder / "curves.png")

    image = torch.randn(1, 3, window, window, device=device)
    rows = []
    for label, (network, result, _) in entries.items():
        ms = milliseconds(partial(logits_of, network), image)
        rows.append((label, count_parameters(network), ms, result))
    print("\n" + table(rows, data.classes))
    _report_gains({label: result["miou"] for label, (_, result, _) in entries.items()})
    print(f"\nrun folder: {folder}; look at comparison.png and curves.png in it")


def _curve(log):
    """[(step, mIoU on val), ...] of a log.csv."""
    with open(log, newline="") as f:
        reader = csv.DictReader(f)
        if "val_miou" not in (reader.fieldnames or ()):
            raise InputError(f"{log}: has no column val_miou; restore it, or move it away")
        return [(int(row["step"]), float(row["val_miou"])) for row in reader if row["val_miou"]]


def _report_gains(miou):
    """Print each student's gain over the student alone. miou: label -> mIoU on val."""
    for label in miou:
        if label not in ("teacher", "student alone") and "student alone" in miou:
            gain = miou[label] - miou["student alone"]
            print(f"\ngain of {label} over student alone: {gain:+.2f} mIoU on val, one seed")
        if label != "teacher" and miou[label] > miou.get("teacher", 100):
            print(f"WARNING: {label} is better than its teacher and can learn little from it; "
                  "train the teacher longer")


@torch.no_grad()
def milliseconds(function, image):
    """Milliseconds of function(image): the fastest of 20 calls, the least disturbed one."""
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        function(image)
        if image.is_cuda:
            torch.cuda.synchronize(image.device)
        times.append(1000 * (time.perf_counter() - begin))
    return min(times)


# Cosine of a term's gradient with that of cross-entropy, below which the term gets a warning.
# Over five batches the cosines of unrelated gradients were measured between -0.15 and 0.15.
WARN_COSINE = -0.2
SMALL_SHARE = 0.05  # a term with less of the gradient than this gets no warning


def report_terms(folder, weights):
    """Print the terms at each measured step of `folder`'s log.csv. weights: term -> weight.

    gradient: norm of the weighted term's gradient in the student's encoder.
    share: its part of the sum of these norms.
    cosine: between the term's gradient and that of cross-entropy.
    """
    with open(folder / "log.csv", newline="") as f:
        for row in csv.DictReader(f):
            if all(row.get(f"cos_{term}") for term in weights):
                print("\n" + _terms_at(row, weights))


def _terms_at(row, weights):
    """Table of the terms at one row of log.csv, and a warning for each that pulls against ce."""
    value = {column: float(text) for column, text in row.items() if text}
    gradient = {term: abs(weight) * value[f"grad_{term}"] for term, weight in weights.items()}
    total = sum(gradient.values()) or 1
    lines = [[f"terms at step {row['step']}", "raw", "weight", "weighted", "gradient", "share",
              "cosine with cross-entropy"]]
    warnings = []
    for term, weight in weights.items():
        share, cosine = gradient[term] / total, value[f"cos_{term}"]
        lines.append([f"  {term}", f"{value[f'raw_{term}']:.4g}", f"{weight:g}",
                      f"{value[f'weighted_{term}']:.4g}", f"{gradient[term]:.4g}",
                      f"{share:.0%}", f"{cosine:.2f}"])
        if cosine < WARN_COSINE and share > SMALL_SHARE:
            warnings.append(f"WARNING: {term} pulls against cross-entropy with {share:.0%} of the "
                            f"gradient (cosine {cosine:.2f}); give it a smaller weight")
    return "\n".join([columns(lines), *warnings])


# ---------------------------------------------------------------- export

class Deployed(torch.nn.Module):
    """Pictures (B,3,H,W) uint8 RGB -> logits (B,K,H,W) float32.

    Normalisation is part of it, so that nothing can be fed in another scale.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        logits = self.model(normalise(images)).logits
        return F.interpolate(logits, images.shape[2:], mode="bilinear")


def export(model, classes, path):
    """Write the network for deployment, in the format of `path`'s ending, with classes.json in it.

    Returns the largest difference between what the file computes and what the network does.
    Raises InputError for another ending, missing packages, or an existing file that this program
    did not write.
    """
    if path.suffix not in EXPORTS:
        raise InputError(f"--export {path}: give it the ending {' or '.join(EXPORTS)}")
    missing = [name for name in ("onnx", "onnxscript") if not importlib.util.find_spec(name)]
    if path.suffix == ".onnx" and missing:
        raise InputError(f"--export {path}: pip install {' '.join(missing)} first")
    refuse_foreign(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"classes.json": json.dumps(classes), "software": SIGNATURE}
    deployed = Deployed(model).eval()
    exported = EXPORTS[path.suffix](export_program(deployed), about, path)
    differences = []
    for batch, height, width in ((1, 64, 64), (2, 70, 90)):
        images = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8)
        with torch.no_grad():
            differences.append((exported(images) - deployed(images)).abs().max().item())
    return max(differences)


def export_program(deployed):
    """The torch.export program of a Deployed network, for any batch, height and width."""
    anything = torch.export.Dim.DYNAMIC
    # The sides differ at every scale: torch.export would merge equal ones into one symbol.
    example = torch.zeros(2, 3, 160, 192, dtype=torch.uint8)
    shapes = ({0: anything, 2: anything, 3: anything},)
    return torch.export.export(deployed, (example,), dynamic_shapes=shapes)


def write_pt2(program, about, path):
    """Write for torch.export.load. Returns what the file computes, as a function."""
    content = io.BytesIO()
    torch.export.save(program, content, extra_files=about)
    write_atomically(path, content.getvalue())
    return torch.export.load(path).module()


def write_onnx(program, about, path):
    """Write as ONNX. Returns what the file computes, as a function."""
    import onnx
    from onnx.reference import ReferenceEvaluator
    converted = torch.onnx.export(program, dynamo=True, verbose=False,
                                  input_names=["images"], output_names=["logits"])
    converted.model.metadata_props.update(about)
    write_atomically(path, converted.model_proto.SerializeToString())
    evaluator = ReferenceEvaluator(onnx.load(path))
    return lambda images: torch.from_numpy(evaluator.run(None, {"images": images.numpy()})[0])


EXPORTS = {".pt2": write_pt2, ".onnx": write_onnx}


# ---------------------------------------------------------------- checkpoints, results, own files

def load_network(path, device="cpu"):
    """The network of a checkpoint written by train.py, in eval mode, and the checkpoint's dict.

    Raises InputError for files that are not such checkpoints or whose tensors do not fit.
    """
    state = load_checkpoint(path, ("module", "name", "classes", "palette", "base", "window",
                                   "dataset", "step"))
    name, weights = state["name"], state["module"]
    if name in VARIANTS:
        model = Student(name, len(state["classes"]))
        # the heads serve training alone
        weights = {k.removeprefix("student."): v for k, v in weights.items()
                   if not k.startswith("heads.")}
    elif name in TEACHERS:
        model = Teacher(name, len(state["classes"]))
    else:
        raise InputError(f"{path}: holds a network called {name!r}, "
                         "which this version does not know")
    load_strictly(model, weights, path, name,
                  "it was written by another version or altered: train again")
    layout = torch.channels_last if torch.device(device).type == "cuda" else torch.preserve_format
    return model.to(device, memory_format=layout).eval(), state


# Keys copied from last.pt.
RESULT_KEYS = ("label", "method", "seed", "conditions", "options", "classes", "step")


def write_scores(folder, split, result, state):
    """results-SPLIT.json: `scores` and the description in a checkpoint's dict."""
    content = json.dumps(result | {key: state.get(key) for key in RESULT_KEYS}, indent=1)
    write_atomically(folder / f"results-{split}.json", f"{content}\n".encode())


def read_scores(path):
    """What `write_scores` wrote. Raises InputError where it cannot be read."""
    needed = {"miou", "iou", "pixel_accuracy", *RESULT_KEYS} - {"options", "label"}
    try:
        result = json.loads(path.read_text())
        complete = result.keys() >= needed
    except (OSError, ValueError, AttributeError):
        complete = False
    if not complete:
        raise InputError(f"{path}: missing or not readable; "
                         "run evaluate.py on the last.pt beside it")
    return result


# Marker in files that this program wrote.
SIGNATURE = "C2VKD evaluate.py"


def refuse_foreign(path):
    """Raises InputError before something is written over a file that this program did not write."""
    if path.exists() and SIGNATURE.encode() not in path.read_bytes():
        raise InputError(f"{path}: is there and was not written by this command; "
                         "move it away or choose another name")


def save_picture(picture, path):
    """Write a PIL picture as a signed PNG."""
    about, content = PngInfo(), io.BytesIO()
    about.add_text("Software", SIGNATURE)
    picture.save(content, "png", pnginfo=about)
    write_atomically(path, content.getvalue())


# ---------------------------------------------------------------- pictures

# A method has one colour in all figures. The colour-blind can tell these apart, too.
COLOURS = {"teacher": "black", "alone": "#0072b2", "ce": "#0072b2", "c2vkd": "#d55e00",
           "fitnet": "#009e73", "dist": "#cc79a7", "kd": "#e69f00", "dkd": "#56b4e9"}
SPARE = ("#7f7f7f", "#8c564b", "#9467bd", "#bcbd22", "#17becf")
FONT = ImageFont.load_default(size=18)


def colours_of(labels):
    """A colour for each label of a figure: its method's, or a spare one for other names."""
    spare = itertools.cycle(SPARE)
    return [COLOURS.get(label.removeprefix("student ")) or next(spare) for label in labels]


def paint(classes, palette):
    """RGB picture (PIL) of a map (H,W) of class indices. 255 is white, which few palettes have."""
    colours = np.full((256, 3), 255, np.uint8)
    colours[:len(palette)] = palette
    return Image.fromarray(colours[classes.numpy()])


def legend(present, classes, palette, width):
    """Picture `width` pixels wide that names the class indices in `present`. 255: ignored."""
    size = max(12, width // 60)
    font = ImageFont.load_default(size=size)
    names = dict(enumerate(classes)) | {IGNORE: "ignored"}
    present = sorted(present)
    colours = paint(torch.tensor([present]), palette)
    step = 3 * size + max(round(font.getlength(names[k])) for k in present)
    per_row = max(1, width // step)
    rows = math.ceil(len(present) / per_row)
    sheet = Image.new("RGB", (width, 2 * size * rows), "white")
    draw = ImageDraw.Draw(sheet)
    for i, k in enumerate(present):
        row, column = divmod(i, per_row)
        x, y = column * step, row * 2 * size + size // 2
        draw.rectangle((x, y, x + size, y + size), fill=colours.getpixel((i, 0)), outline="grey")
        draw.text((x + 3 * size // 2, y + size // 2), names[k], "black", font, anchor="lm")
    return sheet


def overlay(image, prediction, classes, palette):
    """PIL image blended with its prediction (H,W), above a legend of the classes that occur."""
    below = legend(prediction.unique().tolist(), classes, palette, image.width)
    return Image.fromarray(np.vstack([Image.blend(image, paint(prediction, palette), 0.7), below]))


def comparison(data, split, base, window, models, device, images=3):
    """Picture (PIL) of predictions beside labels.

    It has a row for each of `images` evenly spaced images of the split, and a legend. The columns
    are image, label, and one for each network. models: name -> network in eval mode, or None.
    """
    models = {name: model for name, model in models.items() if model is not None}
    rows, present = [], set()
    for index in evenly_spaced(len(data.pairs[split]), images):
        image, label = EvalImages(data, split, base, [index])[0]
        maps = [label]
        for model in models.values():
            maps.append(predict(model, image.to(device), label.shape, window).cpu())
        present.update(*(m.unique().tolist() for m in maps))
        photo = Image.fromarray(image.permute(1, 2, 0).numpy())
        rows.append([photo, *(paint(m, data.palette) for m in maps)])
    width = min(max(256, *(row[0].width for row in rows)), 512)
    titles = np.hstack([_title(name, width) for name in ("image", "label", *models)])
    sheet = np.vstack([titles, *(_tiles(row, width) for row in rows)])
    below = legend(present, data.classes, data.palette, sheet.shape[1])
    return Image.fromarray(np.vstack([sheet, below]))


def _title(name, width):
    sheet = Image.new("RGB", (width + 6, width // 8), "white")
    font = ImageFont.load_default(size=width // 12)
    ImageDraw.Draw(sheet).text((4, width // 16), name, "black", font, anchor="lm")
    return sheet


def _tiles(row, width):
    """Pictures beside each other, each `width` wide and as high as the first one needs."""
    size = width, round(width * row[0].height / row[0].width)
    tiles = [picture.resize(size, Image.Resampling.NEAREST) for picture in row]
    return np.hstack([ImageOps.expand(tile, 3, "white") for tile in tiles])


def chart(curves, xlabel, ylabel, width=800, height=480):
    """Line chart (PIL) of curves: name -> [(x, y), ...], each with at least one point."""
    points = list(itertools.chain(*curves.values()))
    xs, ys = (_ticks(min(values), max(values)) for values in zip(*points))
    left, right, top, bottom = 60, width - 30, 70, height - 60

    def across(x):
        return left + (right - left) * (x - xs[0]) / (xs[-1] - xs[0])

    def down(y):
        return bottom - (bottom - top) * (y - ys[0]) / (ys[-1] - ys[0])

    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    text = partial(draw.text, fill="black", font=FONT)
    for x in xs:
        draw.line((across(x), top, across(x), bottom), fill="lightgrey")
        text((across(x), bottom + 6), f"{x:g}", anchor="ma")
    for y in ys:
        draw.line((left, down(y), right, down(y)), fill="lightgrey")
        text((left - 8, down(y)), f"{y:g}", anchor="rm")
    text((right, height - 6), xlabel, anchor="rd")
    text((8, top - 12), ylabel, anchor="ld")

    key = left  # where the next name in the line above the chart begins
    for (name, curve), colour in zip(curves.items(), colours_of(curves)):
        dots = [(across(x), down(y)) for x, y in curve]
        draw.line(dots, fill=colour, width=3)
        for x, y in dots:
            draw.ellipse((x - 5, y - 5, x + 5, y + 5), fill=colour)
        draw.line((key, 18, key + 24, 18), fill=colour, width=5)
        text((key + 32, 18), name, anchor="lm")
        key += 60 + FONT.getlength(name)
    return sheet


def _ticks(low, high):
    """Three to six round numbers at equal distances that enclose low..high."""
    high = high if high > low else low + 1
    power = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= (high - low) / 4)
    return [i * step for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


# ---------------------------------------------------------------- the command line

def _score(args):
    """What --checkpoint does alone: print the scores on a split, and keep them for --compare."""
    device = _device(args.device)
    model, state = load_network(args.checkpoint, device)
    windows, split = _window_options(args, state), args.split or "val"
    workers = default_workers(device.type == "cuda") if args.workers is None else args.workers
    data = open_dataset(args.dataset or state["dataset"], args.data or state.get("data"))
    if data.classes != state["classes"]:
        raise InputError(f"{args.checkpoint}: trained on {len(state['classes'])} classes that are "
                         "not those of the data; give its own --data")
    if not data.pairs.get(split):
        raise InputError(f"the data has no {split} split; choose another --split")
    picture = args.pictures and Path(args.pictures) / f"{split}-comparison.png"
    if picture:
        refuse_foreign(picture)
        picture.parent.mkdir(parents=True, exist_ok=True)

    matrix = evaluate(model, data, split, state["base"], device=device, workers=workers, **windows)
    result = scores(matrix.cpu())
    print(table([(state["name"], count_parameters(model), None, result)], data.classes))
    if why := _why_not_kept(args, state, data, split, windows):
        print(f"not kept for --compare: {why}")
    else:
        # scan_labels leaves the split called test out of its digest, so call it val here.
        scored = replace(data, pairs={"val": data.pairs[split]})
        result["labels"] = scan_labels(scored).digest
        write_scores(Path(args.checkpoint).parent, split, result, state)
    if picture:
        networks = {state["name"]: model}
        sheet = comparison(data, split, state["base"], state["window"], networks, device, images=8)
        save_picture(sheet, picture)
        print(f"pictures: {picture}")


def _why_not_kept(args, state, data, split, windows):
    """Why a score cannot stand beside those of other runs in `compare`. Empty if it can."""
    own = data_folder(state["dataset"], state.get("data"))
    scored = data_folder(data.name, args.data or state.get("data"))
    if data.name != state["dataset"] or scored.resolve() != own.resolve():
        return "other data than the run's own"
    if args.whole:
        return "--whole, but training validates with windows"
    if windows["window"] != state["window"] or args.stride:
        return "another window or --stride than in training"
    if Path(args.checkpoint).name != "last.pt":
        return "the file is not the last.pt of its folder"
    trained = state.get("stage", {}).get("labels")
    if trained and split != "test" and scan_labels(data).digest != trained:
        return "the labels have changed since training"
    return ""


def _label_pictures(args):
    """What --image does: overlays or masks of pictures, which need no labels."""
    device = _device(args.device)
    model, state = load_network(args.checkpoint, device)
    windows = _window_options(args, state)
    files = _pictures_of(args.image)
    out, kind = Path(args.pictures or "pictures"), "mask" if args.masks else "overlay"
    if out.resolve() in {path.resolve().parent for path in files}:
        raise InputError(f"{out}: holds the pictures themselves; give another --pictures")
    targets = {path: out / f"{path.stem}-{kind}.png" for path in files}
    if len(set(targets.values())) < len(files):
        raise InputError("two --image files have the same name before the ending; "
                         "run them separately")
    for target in targets.values():
        refuse_foreign(target)
    out.mkdir(parents=True, exist_ok=True)
    for path, target in progress(targets.items(), desc=f"{kind}s to {out}", unit="images"):
        image = read_image(path)
        small = np.array(resize_short_side(image, state["base"]))
        small = torch.from_numpy(small).permute(2, 0, 1).to(device)
        prediction = predict(model, small, image.size[::-1], **windows).cpu()
        if args.masks:
            picture = Image.fromarray(prediction.numpy().astype(np.uint8))
        else:
            picture = overlay(image, prediction, state["classes"], state["palette"])
        save_picture(picture, target)
    print(f"{len(files)} pictures, {files[0].name} to {files[-1].name}: their {kind}s are in {out}")


def _pictures_of(paths):
    """The picture files that --image names, those of its folders among them."""
    files = []
    for path in map(Path, paths):
        files += pictures(path) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{paths[0]}: no picture in it; give another --image")
    for path in files:
        if not path.is_file():
            raise InputError(f"{path}: no such file; give another --image")
    return files


def _export(args):
    """What --export does."""
    path = Path(args.export)
    model, state = load_network(args.checkpoint)
    difference = export(model, state["classes"], path)
    side = state["base"]
    ms = milliseconds(Deployed(model), torch.zeros(1, 3, side, side, dtype=torch.uint8))
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, "
          f"largest difference to the original {difference:.1e}")
    print(f"{state['name']}: {count_parameters(model):,} parameters, "
          f"{ms:.0f} ms for one {side}x{side} image on this CPU")
    print(f"give it uint8 RGB pictures whose short side is near {side} pixels, as in training")


def _compare(args):
    """What --compare does."""
    split = args.split or "val"
    print(compare(args.compare, split, args.against or ()))
    if missing := not_scored(Path(args.compare), split):
        print(f"\nNOTE: no {split} scores of {', '.join(missing)}: finish them, or score them with "
              f"evaluate.py --checkpoint FOLDER/last.pt --split {split}")


def _window_options(args, state):
    """How windows slide, as keyword arguments of `predict` and `evaluate`."""
    if args.whole and (args.window or args.stride):
        raise InputError("--whole: takes no windows; leave out --window and --stride")
    window = None if args.whole else args.window or state["window"]
    return dict(window=window, stride=args.stride, batch=args.batch_size or 8)


def _device(name):
    """The torch.device of --device. Raises InputError for one that this machine lacks."""
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        device = torch.device(name or ("cuda" if cards else "cpu"))
    except RuntimeError:
        raise InputError(f"--device {name}: no name of a device; use cuda or cpu") from None
    if device.type != "cpu" and not (device.type == "cuda" and (device.index or 0) < cards):
        raise InputError(f"--device {name}: no such device found; use --device cpu")
    return device


def default_workers(gpus):
    """Loader processes per GPU: its share of the cores, at most 16.

    0 without a GPU, where the network itself keeps the cores busy.
    """
    # Linux tells which cores this process may use, and torch warns about more loaders than these
    usable = getattr(os, "sched_getaffinity", None)
    cores = len(usable(0)) if usable else os.cpu_count()
    processes = max(gpus, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    return min(16, cores // processes) if gpus else 0


PREDICT_OPTIONS = {"window", "stride", "whole", "batch_size", "device"}
# What can be done, and the options that each reads. The first one given decides.
ACTIONS = {
    "compare": (_compare, {"against", "split"}),
    "export": (_export, {"checkpoint"}),
    "image": (_label_pictures, {"checkpoint", "masks", "pictures"} | PREDICT_OPTIONS),
    "checkpoint": (_score, {"dataset", "data", "split", "pictures", "workers"} | PREDICT_OPTIONS),
}


def _choose(args):
    """The function that does what the options ask for.

    Raises InputError for options that it would ignore.
    """
    given = [name for name, value in vars(args).items() if value not in (None, False)]
    action = next((name for name in ACTIONS if name in given), None)
    if action is None or action != "compare" and "checkpoint" not in given:
        raise InputError("--checkpoint FILE or --compare DIR is needed")
    function, reads = ACTIONS[action]
    for name in given:
        if name != action and name not in reads:
            actions = [f"--{other}" for other, (_, options) in ACTIONS.items() if name in options]
            remedy = f"it goes with {' or '.join(actions)}" if actions else "run them one by one"
            raise InputError(f"--{name.replace('_', '-')}: has no effect with --{action}; {remedy}")
    return function


def main():
    parser = Parser(description="Evaluate, apply, export or compare trained networks.")
    add = parser.add_argument_group("what to do").add_argument
    add("--checkpoint", metavar="FILE", help="a last.pt: print its mIoU")
    add("--image", nargs="+", metavar="PATH", help="pictures or folders to colour instead")
    add("--masks", action="store_true", help="masks of class indices instead of overlays")
    add("--export", metavar="FILE",
        help="write the bare network instead: .pt2 (torch.export) or .onnx")
    add("--compare", metavar="DIR", help="gains of the runs below it (no checkpoint needed)")
    add("--against", nargs="+", metavar="NAME", help="also the gains minus those of these runs")
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=DATASETS, help="default: the checkpoint's")
    add("--data", metavar="DIR", help="its folder; default: the checkpoint's")
    add("--split", choices=("train", "val", "test"), help="images to score (default val)")
    add = parser.add_argument_group("how").add_argument
    add("--window", type=at_least(32), metavar="PIXELS",
        help="side of the sliding window; default: the training crop")
    add("--stride", type=at_least(1), metavar="PIXELS",
        help="its step; default: 2/3 of the window")
    add("--whole", action="store_true", help="whole images instead of windows")
    add("--batch-size", type=at_least(1), metavar="N", help="windows at a time (default 8)")
    add("--workers", type=at_least(0), metavar="N", help="processes that decode images "
        "(default: the cores, at most 16, with a GPU, else 0)")
    add("--pictures", metavar="DIR", help="where pictures go")
    add("--device", help="cuda or cpu (default: cuda if there is one)")
    args = parser.parse_args()
    # On Hopper cards torch prefers cuDNN's attention. It plans anew for every shape, 0.4 s each,
    # and has been reported to give NaN for a single query.
    torch.backends.cuda.enable_cudnn_sdp(False)
    _choose(args)(args)


if __name__ == "__main__":
    command(main)
