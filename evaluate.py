"""Scores, comparison, pictures and export of trained networks, students and teachers alike.

    # mIoU and the IoU of each class
    python evaluate.py score runs/shapes/c2vkd-mit_nano-seed0/last.pt --split test
    # overlays of pictures without labels, or masks of class indices
    python evaluate.py draw FILE a.jpg DIR --masks --out OUT
    # the network alone, for torch.export or ONNX
    python evaluate.py export FILE student.pt2
    # gains of all methods over the student alone
    python evaluate.py compare runs/shapes --against fitnet

mIoU: one int64 confusion matrix over all labelled pixels of the split at the labels' original
resolution, IoU = TP / (TP + FP + FN), mean over the classes that the split's labels hold.
"""
import glob
import importlib.util
import io
import itertools
import json
import math
import os
import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader

from data import (IGNORE, EvalImages, InputError, Parser, command, first_difference,
                  labels_digest, load_checkpoint, load_strictly, normalise, open_dataset, pictures,
                  progress, quiet_worker, read_image, resize_short_side, sizes_of_pictures,
                  write_atomically)
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

    The iou of a class without a labelled pixel is None, and the mean leaves it out, whatever was
    predicted: so all networks have their mean over the same classes.
    """
    hit, labelled = matrix.diag().double(), matrix.sum(1)
    iou = (100 * hit / (matrix.sum(0) + labelled - hit)).tolist()
    iou = [value if count else None for value, count in zip(iou, labelled.tolist())]
    present = [value for value in iou if value is not None]
    return {"miou": sum(present) / max(1, len(present)),
            "iou": iou,
            "pixel_accuracy": (100 * hit.sum() / matrix.sum().clamp(min=1)).item()}


def miou_of_commonest_class(matrix):
    """mIoU of always answering the commonest class: no network worth using has less."""
    labelled = matrix.sum(1)
    answers = torch.zeros_like(matrix)
    answers[:, labelled.argmax()] = labelled
    return scores(answers)["miou"]


# ---------------------------------------------------------------- the sliding window

def evaluate(model, data, split, base, window, device, desc="evaluating", workers=0):
    """Confusion matrix (K,K) of `model`, in eval mode, on a split.

    base: pixels of the short side at which the network sees the images. window: see `predict`.
    workers: processes that decode. Several training processes take every n-th image each, and
    their counts are added up.
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
        prediction = predict(model, image.to(device), label.shape, window)
        matrix += confusion_matrix(prediction, label, classes)
    if several:
        dist.all_reduce(matrix)
    return matrix


@torch.no_grad()
def predict(model, image, size, window=None):
    """Class map (H,W) int64 at `size` of one uint8 image (3,h,w).

    A square with sides of `window` pixels slides over the image in steps of at most two thirds of
    it. Logits are averaged where windows overlap, then resized bilinearly to `size`.
    window=None: one window, as large as the image.
    Images smaller than the window are padded with the mean colour.
    """
    h, w = image.shape[1:]
    # networks halve an image up to five times
    height, width = (window, window) if window else (max(h, 32), max(w, 32))
    image = normalise(image[None])[0]  # the mean colour is 0 now
    image = F.pad(image, (0, max(0, width - w), 0, max(0, height - h)))
    logits = _slide(model, image, height, width)[:, :h, :w]
    return class_map(logits, tuple(size))


AT_A_TIME = 8  # windows that a network sees at once


def _slide(model, image, height, width):
    """Logits (K,H,W) of a normalised image (3,H,W) from windows of height x width."""
    # differs: the paper's windows have 512 pixels and an overlap that is not stated. The release
    # scores one centre crop of a resized image with resized labels. Here windows overlap by a
    # third, and predictions are scored at the labels' own size.
    tops, lefts = map(_window_starts, image.shape[1:], (height, width))
    corners = list(itertools.product(tops, lefts))
    total, window_count = None, image.new_zeros(image.shape[1:])
    for first in range(0, len(corners), AT_A_TIME):
        chosen = corners[first:first + AT_A_TIME]
        crops = torch.stack([image[:, y:y + height, x:x + width] for y, x in chosen])
        for (y, x), part in zip(chosen, logits_of(model, crops), strict=True):
            if total is None:
                total = part.new_zeros(len(part), *image.shape[1:])
            part = F.interpolate(part[None], (height, width), mode="bilinear")[0]
            total[:, y:y + height, x:x + width] += part
            window_count[y:y + height, x:x + width] += 1
    return total / window_count


def _window_starts(side, window):
    """Where windows begin along one side. The last one lies flush with the end."""
    return [*range(0, side - window, 2 * window // 3), side - window]


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

@dataclass(eq=False)
class Row:
    """Runs that differ in the seed alone."""
    called: str  # the label, else the method
    own: dict  # what may differ between the rows of a table: label, method, weights, ...
    shared: dict  # what may not: the rest of the stage, and what was scored
    results: dict  # seed -> what `read_scores` gives
    name: str = ""  # with what tells it from another row of the table


def compare(folder, split, against=()):
    """Text on all students below `folder`, a table for each teacher and set of conditions.

    The table has each row's mIoU and its gain over the row `ce`, paired by seed. For each name in
    `against` follows a table of the other rows' gains minus that one's, then the IoU of each
    class. What is in no table is listed at the end.
    Raises InputError for results that cannot be read, and for a name in `against` without a row.
    """
    rows, left_out = read_rows(folder, split)
    if not rows:
        raise InputError(f"{folder}: no results-{split}.json of a student below it; run train.py, "
                         "and for test evaluate.py score FILE --split test")
    names = {row.called for row in rows} - {"ce"}
    for name in against:
        if name not in names:
            raise InputError(f"--against {name}: no gain of that name below {folder}; "
                             f"there are {', '.join(sorted(names)) or 'none'}")
    tables = tables_of(rows)
    shared = [table[0].shared for table in tables]
    parts = []
    for table in tables:
        differing = f", {_told(table[0].shared, shared)}" if len(tables) > 1 else ""
        for row in table:
            twins = [other.own for other in table if other.called == row.called]
            apart = f" ({_told(row.own, twins)})" if len(twins) > 1 else ""
            row.name = row.called + apart
        table.sort(key=lambda row: row.name)
        ce = next((row for row in table if row.called == row.own["method"] == "ce"), None)
        parts.append(f"{folder}: {split}, {table[0].shared['step']} steps{differing}\n"
                     f"{_overview(table, ce)}")
        for name in against:
            parts += [_against(table, ce, other) for other in table if other.called == name]
        parts.append(_each_class(table))
        results = [result for row in table for result in row.results.values()]
        others = [result["folder"].name for result in results
                  if result["picture_sizes"] != results[0]["picture_sizes"]]
        if others:
            parts.append(f"NOTE: the files of pictures had other sizes in {', '.join(others)} than "
                         f"in {results[0]['folder'].name}")
    for row in rows:
        if not any(row in table for table in tables):
            seeds = ", ".join(map(str, row.results))
            left_out.append(f"{row.called}, seed {seeds}: it differs from the first table in "
                            f"{_told(row.shared, shared[:1])}")
    if left_out:
        parts.append("\n  ".join(["in no table:", *left_out]))
    return "\n\n".join(parts)


def read_rows(folder, split):
    """Rows of all students below `folder`, and a line for each second run of a row and seed.

    Raises InputError for results that cannot be read.
    """
    rows, second = {}, []
    for path in files_below(folder, f"results-{split}.json"):
        result = read_scores(path)
        if result["method"] in (None, "teacher"):
            continue
        shared = result["stage"] | {key: result[key] for key in ("step", "classes", "scored")}
        if shared["teacher"]:
            shared["teacher"] = shared["teacher"] | {"tensors": result["teacher_tensors"]}
        shared.pop("seed")
        own = {key: shared.pop(key) for key in ("method", "weights", "unlabelled", "pool")}
        own["label"] = result.get("label")
        row = Row(own["label"] or own["method"], own, shared, {})
        row = rows.setdefault(json.dumps([own, shared], sort_keys=True), row)
        first = row.results.setdefault(result["seed"], result | {"folder": path.parent})
        if first["folder"] != path.parent:
            second.append(f"{path.parent}: {row.called} with seed {result['seed']}, "
                          f"which is that of {first['folder']}")
    return list(rows.values()), second


def files_below(folder, name):
    """Paths of all files of that name, also behind symbolic links."""
    found = glob.glob(f"**/{name}", root_dir=folder, recursive=True, include_hidden=True)
    return [Path(folder, path) for path in sorted(found)]


def tables_of(rows):
    """Lists of the rows that may stand beside each other. Rows without a partner are left out.

    Those without a teacher, as `ce`, stand in every table whose other conditions are theirs.
    """
    tables = []
    for row in sorted(rows, key=lambda row: not row.shared["teacher"]):
        fitting = [table for table in tables if row.shared == table[0].shared
                   or row.shared == table[0].shared | {"teacher": None}]
        for table in fitting:
            table.append(row)
        if not fitting:
            tables.append([row])
    return [table for table in tables if len(table) > 1] or tables[:1]


def _told(value, others):
    """A value of a stage as text. Of a dict or a list, what tells it from `others`."""
    if isinstance(value, list):
        differing = [o for o in others if isinstance(o, list) and o != value]
        return first_difference(differing[0], value) if differing else str(value)
    if not isinstance(value, dict):
        return str(value) if len(str(value)) <= 40 else f"{str(value)[:16]}..."
    alike = [o for o in others if isinstance(o, dict) and o.keys() == value.keys()]
    differing = [key for key in value if any(other[key] != value[key] for other in alike)]
    # a teacher that was given has other keys than one that was trained: any of them tell
    return ", ".join(f"{key} {_told(value[key], [other[key] for other in alike])}"
                     for key in differing or list(value)[:4])


# Two-sided 95% quantiles of Student's t with 1, 2, ... degrees of freedom. The last one serves
# all larger numbers, which makes their intervals slightly too wide.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
       2.145)


def _gain(*terms):
    """Mean over seeds of a sum of mIoU, Student's 95% interval, number of seeds, all as text.

    terms: (factor, row or None). The seeds are those that all rows have.
    """
    if any(row is None for _, row in terms):
        return "-", "-", "-"
    seeds = set.intersection(*(set(row.results) for _, row in terms))
    gains = [sum(factor * row.results[seed]["miou"] for factor, row in terms) for seed in seeds]
    if not gains:
        return "-", "-", "0"
    mean = statistics.mean(gains)
    if len(gains) == 1:
        return f"{mean:+.2f}", "(one seed)", "1"
    quantile = T95[min(len(gains) - 2, len(T95) - 1)]
    half = quantile * statistics.stdev(gains) / len(gains) ** 0.5
    return f"{mean:+.2f}", f"[{mean - half:+.2f}, {mean + half:+.2f}]", str(len(gains))


def _overview(table, ce):
    """Table of each row's mIoU and gain, with the mean over its seeds."""
    lines = [["method", "seeds", "mIoU", "std", f"gain over {ce.name if ce else 'ce'}",
              "95% interval", "pairs"]]
    for row in table:
        values = [result["miou"] for result in row.results.values()]
        deviation = statistics.stdev(values) if len(values) > 1 else None
        gain = _gain((1, row), (-1, ce if row is not ce else None))
        lines.append([row.name, str(len(values)), formatted(statistics.mean(values)),
                      formatted(deviation), *gain])
    return columns(lines)


def _against(table, ce, other):
    """Table of the gains minus that of the row `other`, paired by seed.

    The paper claims more than twice the gain of other methods. So twice the gain of `other` is
    subtracted, too. The difference of two gains needs no run of `ce`.
    """
    lines = [[f"against {other.name}", f"gain - 2 gain({other.name})", "95% interval", "pairs",
              f"gain - gain({other.name})", "95% interval", "pairs"]]
    for row in table:
        if row not in (ce, other):
            twice = _gain((1, row), (-2, other), (1, ce))
            lines.append([row.name, *twice, *_gain((1, row), (-1, other))])
    return columns(lines)


def _each_class(table):
    """Table of the IoU of each class, the mean over the seeds."""
    ious = []
    for row in table:
        of_seeds = [result["iou"] for result in row.results.values()]
        ious.append([None if None in values else statistics.mean(values)
                     for values in zip(*of_seeds)])
    return class_table([row.name for row in table], ious, table[0].shared["classes"])


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


def class_table(names, ious, classes):
    """Text table of the IoU of each class, a column for each name. Says what the means are over."""
    lines = [["IoU of each class, %", *names]]
    for name, *values in zip(classes, *ious):
        lines.append([name, *map(formatted, values)])
    scored = sum(value is not None for value in ious[0])  # all are scored on the same labels
    if scored == len(classes):
        return columns(lines)
    return (f"mIoU: mean over {scored} of {len(classes)} classes: the others have no labelled "
            f"pixel\n\n{columns(lines)}")


def table(rows, classes):
    """Text table of networks, each row (label, parameters, milliseconds or None, scores)."""
    head = [["", "parameters", "ms per image", "mIoU", "pixel acc."]]
    for label, count, ms, result in rows:
        head.append([label, f"{count:,}", formatted(ms, ".1f"), formatted(result["miou"]),
                     formatted(result["pixel_accuracy"])])
    ious = [result["iou"] for *_, result in rows]
    return f"{columns(head)}\n\n{class_table([label for label, *_ in rows], ious, classes)}"


def report(folder, entries, data, base, window, device):
    """Draw comparison.png into `folder`, then print the table of networks.

    entries: label -> (network, its scores on val).
    The networks are finished: a picture that fails costs a NOTE.
    """
    rows, networks = [], {label: network for label, (network, _) in entries.items()}
    try:
        picture = comparison(data, "val", base, window, networks, device)
        save_picture(picture, folder / "comparison.png")
    except (InputError, OSError) as e:
        print(f"NOTE: {e}")
    image = torch.randn(1, 3, window, window, device=device)
    for label, (network, result) in entries.items():
        ms = milliseconds(partial(logits_of, network), image)
        rows.append((label, count_parameters(network), ms, result))
    print("\n" + table(rows, data.classes))
    _report_gains({label: result["miou"] for label, (_, result) in entries.items()})
    print(f"\nrun folder: {folder}; look at comparison.png in it")


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


def report_terms(rows, weights):
    """Print the table of the terms of a student's log. weights: term -> weight.

    gradient: norm of the weighted term's gradient in the student's encoder.
    share: its part of the sum of these norms. One batch alone is too noisy: both are means over
    all validations but that of step 0.
    """
    rows = [row for row in rows if f"grad_{next(iter(weights))}" in row]
    norms = {term: [abs(weight) * float(row[f"grad_{term}"]) for row in rows]
             for term, weight in weights.items()}
    totals = [sum(of_row) or 1 for of_row in zip(*norms.values())]
    lines = [["term", "raw (last)", "weight", "weighted (last)", "gradient (mean)", "share (mean)"]]
    for term, weight in weights.items():
        raw = float(rows[-1][f"raw_{term}"])
        share = statistics.mean(norm / total for norm, total in zip(norms[term], totals))
        lines.append([term, f"{raw:.4g}", f"{weight:g}", f"{weight * raw:.4g}",
                      f"{statistics.mean(norms[term]):.4g}", f"{share:.0%}"])
    print("\n" + columns(lines))


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


# ---------------------------------------------------------------- checkpoints and results

def load_network(path, device="cpu"):
    """The network of a checkpoint written by train.py, in eval mode, and the checkpoint's dict.

    Raises InputError for files that are not such checkpoints or whose tensors do not fit.
    """
    state = load_checkpoint(path, ("module", "name", "classes", "palette", "base", "window",
                                   "dataset", "step", "stage"))
    name, weights = state["name"], state["module"]
    if name in VARIANTS:
        model = Student(name, len(state["classes"]))
        # the heads serve training alone
        weights = {k.removeprefix("student."): v for k, v in weights.items()
                   if not k.startswith("heads.")}
    elif name in TEACHERS:
        model = Teacher(name, len(state["classes"]))
    else:
        raise InputError(f"{path}: holds {name!r}, no segmentation network of this version; give "
                         "the last.pt of a teacher or a student")
    load_strictly(model, weights, path, name,
                  "it was written by another version or altered: train again")
    layout = torch.channels_last if torch.device(device).type == "cuda" else torch.preserve_format
    return model.to(device, memory_format=layout).eval(), state


# Keys of a last.pt, and scored: labels_digest of the split, for val with train
RESULT_KEYS = ("label", "method", "seed", "stage", "classes", "step", "scored", "picture_sizes",
               "teacher_tensors")
STAGE_KEYS = {"seed", "method", "weights", "unlabelled", "pool", "teacher"}  # that compare reads


def write_scores(folder, split, result, state):
    """results-SPLIT.json: `scores` and the description in a checkpoint's dict."""
    content = json.dumps(result | {key: state.get(key) for key in RESULT_KEYS}, indent=1)
    write_atomically(folder / f"results-{split}.json", f"{content}\n".encode())


def read_scores(path):
    """What `write_scores` wrote. Raises InputError where it cannot be read."""
    needed = {"miou", "iou", "pixel_accuracy", *RESULT_KEYS}
    try:
        result = json.loads(path.read_text())
        complete = result.keys() >= needed and result["stage"].keys() >= STAGE_KEYS
    except (OSError, ValueError, AttributeError):
        complete = False
    if not complete:
        raise InputError(f"{path}: missing or not readable; move it away, then train.py writes it "
                         "again for val, evaluate.py score for test")
    return result


def save_picture(picture, path):
    """Write a PIL picture as PNG. Raises InputError where that fails."""
    content = io.BytesIO()
    picture.save(content, "png")
    write_atomically(path, content.getvalue())


# ---------------------------------------------------------------- pictures

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


def comparison(data, split, base, window, models, device):
    """Picture (PIL) of predictions beside labels, with a row for each of three images of the split.

    The columns are image, label, and one for each network.
    models: name -> network in eval mode, or None.
    """
    models = {name: model for name, model in models.items() if model is not None}
    rows, present = [], set()
    total = len(data.pairs[split])
    # evenly spaced, because neighbours often show the same scene
    for index in sorted({i * total // 3 for i in range(3)}):
        image, label = EvalImages(data, split, base, [index])[0]
        maps = [label]
        for model in models.values():
            maps.append(predict(model, image.to(device), label.shape, window).cpu())
        present.update(*(m.unique().tolist() for m in maps))
        photo = Image.fromarray(image.permute(1, 2, 0).numpy())
        rows.append([photo, *(paint(m, data.palette) for m in maps)])

    width = min(max(256, *(row[0].width for row in rows)), 512)
    titles = Image.new("RGB", ((2 + len(models)) * (width + 6), width // 8), "white")
    font = ImageFont.load_default(size=width // 12)
    for i, name in enumerate(("image", "label", *models)):
        place = 4 + i * (width + 6), width // 16
        ImageDraw.Draw(titles).text(place, name, "black", font, anchor="lm")
    strips = [titles]
    for row in rows:
        size = width, max(1, round(width * row[0].height / row[0].width))
        tiles = [picture.resize(size, Image.Resampling.NEAREST) for picture in row]
        strips.append(np.hstack([ImageOps.expand(tile, 3, "white") for tile in tiles]))
    strips.append(legend(present, data.classes, data.palette, titles.width))
    return Image.fromarray(np.vstack(strips))


# ---------------------------------------------------------------- four commands

def _score(args):
    """Print the scores on a split. Those of test are kept for `compare`; train.py keeps val's."""
    path, split = Path(args.checkpoint), args.split
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, state = load_network(path, device)
    stage = state["stage"]
    data = open_dataset(state["dataset"], args.data or state.get("data"))
    if difference := first_difference(state["classes"], data.classes):
        raise InputError(f"{path}: its classes are not those of the data: {difference}; "
                         "give its own --data")
    if not data.pairs.get(split):
        raise InputError(f"the data has no {split} split; choose another --split")
    if sizes_of_pictures(data) != state.get("picture_sizes"):
        print("NOTE: pictures were changed, added or removed since training: their sizes in bytes "
              "are others")

    for one in ("train", split):
        data.read(one, 0)
    for line in data.two_ways():
        print(line)

    window = None if args.whole else state["window"]
    # labels count by their bytes, wherever they lie
    same_labels = labels_digest(data, "train", "val") == stage.get("labels")
    reasons = {"other data than the run's own, by the labels of train and val": not same_labels,
               "--whole, but training validates with windows": args.whole,
               "the file is not the last.pt of its folder": path.name != "last.pt",
               "its training is not finished": state["step"] != stage.get("steps")}
    why = [reason for reason, holds in reasons.items() if holds]
    matrix = evaluate(model, data, split, state["base"], window, device,
                      workers=default_workers(device.type == "cuda"))
    if not matrix.sum():
        raise InputError(f"{data.root}: no label of {split} has a labelled pixel")
    result = scores(matrix.cpu())
    try:  # first the file, because whoever reads the table may close the pipe
        if split == "test" and not why:
            kept = path.with_name("results-test.json")
            sizes = f"{state.get('picture_sizes')} {sizes_of_pictures(data, [split])}"
            scored = {"scored": labels_digest(data, split), "picture_sizes": sizes}
            old = kept.read_bytes() if kept.is_file() else b""
            if old and any(digest.encode() not in old for digest in scored.values()):
                print(f"NOTE: {kept}: scores of other test data are replaced")
            write_scores(path.parent, split, result, state | scored)
    finally:
        print(table([(state["name"], count_parameters(model), None, result)], data.classes))
    if why:
        print(f"not kept for compare: {'; '.join(why)}")


def note_unfinished(path, state):
    """Print a NOTE where a checkpoint is one from the middle of a training."""
    if state["step"] < state["stage"]["steps"]:
        print(f"NOTE: {path}: trained for {state['step']} of {state['stage']['steps']} steps")


def _draw(args):
    """Write overlays or masks of pictures, which need no labels.

    Nothing that exists is overwritten. What could not be done is named at the end.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, state = load_network(args.checkpoint, device)
    note_unfinished(args.checkpoint, state)
    window = None if args.whole else state["window"]
    files = []
    for path in map(Path, args.pictures):
        files += pictures(path) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{args.pictures[0]}: no picture in it; give another")
    out, kind = Path(args.out), "mask" if args.masks else "overlay"
    if out.resolve() in {path.resolve().parent for path in files}:
        raise InputError(f"{out}: holds the pictures themselves; give another --out")
    out.mkdir(parents=True, exist_ok=True)
    left_out = []
    for path in progress(files, desc=f"{kind}s to {out}", unit="images"):
        target = out / f"{path.stem}-{kind}.png"
        try:
            if os.path.lexists(target):
                raise InputError(f"{target}: is there already, so {path} is not drawn; move it "
                                 "away or give another --out")
            image = read_image(path)
            small = np.array(resize_short_side(image, state["base"]))
            small = torch.from_numpy(small).permute(2, 0, 1).to(device)
            prediction = predict(model, small, image.size[::-1], window).cpu()
            if args.masks:
                picture = Image.fromarray(prediction.numpy().astype(np.uint8))
            else:
                picture = overlay(image, prediction, state["classes"], state["palette"])
            save_picture(picture, target)
        except InputError as e:
            left_out.append(str(e))
    done = len(files) - len(left_out)
    print(f"{done} pictures, {files[0].name} to {files[-1].name}: their {kind}s are in {out}")
    if left_out:
        raise InputError(f"{len(left_out)} of {len(files)} left out: {' | '.join(left_out)}")


def _export(args):
    """Write the network for deployment, and print its size, its error and its time."""
    path = Path(args.file)
    if path.suffix not in EXPORTS:
        raise InputError(f"{path}: give it the ending {' or '.join(EXPORTS)}")
    missing = [name for name in ("onnx", "onnxscript") if not importlib.util.find_spec(name)]
    if path.suffix == ".onnx" and missing:
        raise InputError(f"{path}: pip install {' '.join(missing)} first")
    if os.path.lexists(path):
        raise InputError(f"{path}: is there already; move it away or choose another name")
    model, state = load_network(args.checkpoint)
    note_unfinished(args.checkpoint, state)
    deployed = Deployed(model).eval()
    # The sides differ at every scale: torch.export would merge equal ones into one symbol.
    example = torch.zeros(2, 3, 160, 192, dtype=torch.uint8)
    anything = torch.export.Dim.DYNAMIC
    program = torch.export.export(deployed, (example,),
                                  dynamic_shapes=({0: anything, 2: anything, 3: anything},))
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"classes.json": json.dumps(state["classes"])}
    exported = EXPORTS[path.suffix](program, about, path)
    differences = []
    for batch, height, width in ((1, 64, 64), (2, 70, 90)):
        images = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8)
        with torch.no_grad():
            differences.append((exported(images) - deployed(images)).abs().max().item())
    side = state["base"]
    ms = milliseconds(deployed, torch.zeros(1, 3, side, side, dtype=torch.uint8))
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, "
          f"largest difference to the original {max(differences):.1e}")
    print(f"{state['name']}: {count_parameters(model):,} parameters, "
          f"{ms:.0f} ms for one {side}x{side} image on this CPU")
    print(f"give it uint8 RGB pictures whose short side is near {side} pixels, as in training")


def _compare(args):
    """Print `compare`, and name the students without scores on the split."""
    folder, split = Path(args.folder), args.split
    print(compare(folder, split, args.against))
    missing = []
    for last in files_below(folder, "last.pt"):
        of_teacher = any(part.startswith("teacher-") for part in last.relative_to(folder).parts)
        if not of_teacher and not last.with_name(f"results-{split}.json").exists():
            missing.append(last.parent.name)
    if missing:
        print(f"\nNOTE: no {split} scores of {', '.join(missing)}: finish them, and for test "
              "score them with evaluate.py score FOLDER/last.pt --split test")


def default_workers(gpus):
    """Loader processes per GPU: its share of the cores, at most 16. On a CPU 0: it is busy."""
    # Linux tells which cores this process may use, and torch warns about more loaders than these
    usable = getattr(os, "sched_getaffinity", None)
    cores = len(usable(0)) if usable else os.cpu_count()
    local = os.environ.get("LOCAL_WORLD_SIZE", "")  # torchrun's
    processes = max(gpus, int(local) if local.isdecimal() else 1)
    return min(16, cores // processes) if gpus else 0


def main():
    parser = Parser(description="Score, apply, export or compare trained networks.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    score = commands.add_parser("score", help="mIoU and the IoU of each class")
    draw = commands.add_parser("draw", help="overlays of pictures, or masks")
    export = commands.add_parser("export", help="the bare network, with classes.json in it")
    gains = commands.add_parser("compare", help="gains of the runs below a folder")
    for one in (score, draw, export):
        one.add_argument("checkpoint", metavar="CHECKPOINT", help="a last.pt")
    for one in (score, draw):
        one.add_argument("--whole", action="store_true", help="whole images instead of windows")
    score.add_argument("--split", choices=("train", "val", "test"), default="val")
    score.add_argument("--data", metavar="DIR", help="default: the checkpoint's")
    draw.add_argument("pictures", nargs="+", metavar="PICTURE", help="pictures, folders of them")
    draw.add_argument("--masks", action="store_true", help="class indices instead of overlays")
    draw.add_argument("--out", metavar="DIR", default="pictures", help="default: pictures")
    export.add_argument("file", metavar="FILE", help="ends in .pt2 (torch.export) or .onnx")
    gains.add_argument("folder", metavar="DIR")
    gains.add_argument("--split", choices=("val", "test"), default="val")
    gains.add_argument("--against", nargs="+", action="extend", metavar="NAME", default=[],
                       help="also the gains minus those of these runs")
    args = parser.parse_args()
    # On Hopper cards torch prefers cuDNN's attention. It plans anew for every shape, 0.4 s each,
    # and has been reported to give NaN for a single query.
    torch.backends.cuda.enable_cudnn_sdp(False)
    {"score": _score, "draw": _draw, "export": _export, "compare": _compare}[args.command](args)


if __name__ == "__main__":
    command(main)
