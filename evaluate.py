"""Evaluation, pictures, comparison and export of trained networks (students and teachers alike).

    python evaluate.py --checkpoint runs/shapes/c2vkd-mit_nano-seed0/last.pt              # mIoU, per-class IoU
    python evaluate.py --checkpoint FILE --image a.jpg DIR --pictures OUT                  # overlays, no labels needed
    python evaluate.py --checkpoint FILE --export student.pt2                              # the bare network
    python evaluate.py --compare runs/shapes runs/camvid                                   # gains of all methods

mIoU: one int64 confusion matrix over all labelled pixels of the split at the labels' original resolution,
IoU = TP / (TP + FP + FN), mean over the classes that occur in labels or predictions.
"""
import csv
import io
import itertools
import json
import math
import os
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader

from data import (DATASETS, IGNORE, SUFFIXES, EvalImages, InputError, Parser, at_least, command, data_folder,
                  load_checkpoint, load_strictly, normalise, open_dataset, progress, quiet_worker, read_image,
                  resize_short_side, spread, write_atomically)
from losses import METHODS
from student import VARIANTS, Student, count_parameters
from teacher import TEACHERS, Teacher


# ---------------------------------------------------------------- metric

def confusion_matrix(prediction, label, classes):
    """Counts (K,K) int64, row = label, column = prediction; pixels labelled 255 are left out."""
    valid = label != IGNORE
    pairs = label[valid].long() * classes + prediction[valid].long()
    return torch.bincount(pairs, minlength=classes ** 2).view(classes, classes)


def scores(matrix):
    """mIoU, per-class IoU (None for a class in neither labels nor predictions) and pixel accuracy, all in percent."""
    hit = matrix.diag().double()
    iou = (100 * hit / (matrix.sum(0) + matrix.sum(1) - hit)).tolist()
    present = [v for v in iou if v == v]
    return {"miou": sum(present) / max(1, len(present)), "iou": [v if v == v else None for v in iou],
            "pixel_accuracy": (100 * hit.sum() / matrix.sum().clamp(min=1)).item()}


def commonest(matrix):
    """mIoU in percent of always answering the commonest class of the labels: no network worth using has less."""
    labelled = matrix.sum(1)
    answers = torch.zeros_like(matrix)
    answers[:, labelled.argmax()] = labelled
    return scores(answers)["miou"]


@torch.no_grad()
def predict(model, image, size, window=None, stride=None, flip=False, batch=8):
    """Class map (H,W) int64 at `size` of one uint8 image (3,h,w).

    The window slides over the image in steps of at most `stride` (default: two thirds of it), `batch` windows at a
    time; logits are averaged where windows overlap, then resized bilinearly. window=None: the whole image at once.
    Images smaller than the window are padded with the mean colour. flip: averaged with the mirror image.
    On a GPU the network runs in bf16.
    """
    image = normalise(image[None])
    if flip:
        image = torch.cat([image, image.flip(3)])
    h, w = image.shape[2:]
    win_h, win_w = (window, window) if window else (max(h, 32), max(w, 32))
    image = F.pad(image, (0, max(0, win_w - w), 0, max(0, win_h - h)))
    # differs: paper 512 windows, overlap not stated, release one centre crop of a resized image with resized labels,
    # here windows that overlap by a third, at the labels' own size
    tops, lefts = (_starts(side, win, min(stride or 2 * win // 3, win))
                   for side, win in zip(image.shape[2:], (win_h, win_w)))
    corners = [(y, x) for y in tops for x in lefts]
    total = weight = 0
    for i in range(0, len(corners), batch):
        some = corners[i:i + batch]
        crops = torch.cat([image[:, :, y:y + win_h, x:x + win_w] for y, x in some])
        with torch.autocast("cuda", torch.bfloat16, enabled=image.is_cuda):
            logits = model(crops)[0].float()
        if i == 0:
            total = logits.new_zeros(len(image), logits.shape[1], *image.shape[2:])
            weight = logits.new_zeros(image.shape[2:])
        for (y, x), part in zip(some, logits.split(len(image))):
            total[:, :, y:y + win_h, x:x + win_w] += F.interpolate(part, (win_h, win_w), mode="bilinear")
            weight[y:y + win_h, x:x + win_w] += 1
    logits = (total / weight)[:, :, :h, :w]
    if flip:
        logits = (logits[:1] + logits[1:].flip(3)) / 2
    return class_map(logits[0], tuple(size))


def _starts(side, window, stride):
    """Where windows begin along one side: every `stride`, the last one flush with the end."""
    return list(range(0, side - window, stride)) + [side - window]


def class_map(logits, size):
    """argmax (H,W) int64 over the classes of logits (K,h,w) resized bilinearly to `size`.

    Class by class, because K x H x W numbers of a large picture are gigabytes. Ties go to the lower class.
    """
    best = torch.full(size, -torch.inf, device=logits.device)
    classes = torch.zeros(size, dtype=torch.int64, device=logits.device)
    for k, z in enumerate(logits):
        value = F.interpolate(z[None, None], size, mode="bilinear")[0, 0]
        classes = torch.where(value > best, k, classes)
        best = torch.maximum(value, best)
    return classes


def evaluate(model, data, split, base, window, device, stride=None, flip=False, batch=8, images=None,
             desc="evaluating", workers=0):
    """Confusion matrix (K,K) of `model`, in eval mode, on `images` (default: all) images of a split.

    `workers` processes decode. With several processes each takes every n-th image, once; the counts are added up.
    """
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    dataset = EvalImages(data, split, base, spread(len(data.pairs[split]), images)[rank::processes])
    # a generator of its own: the loader would draw from the one that training continues with
    loader = DataLoader(dataset, batch_size=None, num_workers=workers, worker_init_fn=quiet_worker,
                        generator=torch.Generator())
    matrix = torch.zeros(len(data.classes), len(data.classes), dtype=torch.int64, device=device)
    assert not model.training, "call model.eval() first"
    for image, label in progress(loader, desc=desc, unit="images", disable=rank > 0, leave=False):
        label = label.to(device)
        prediction = predict(model, image.to(device), label.shape, window, stride, flip, batch)
        matrix += confusion_matrix(prediction, label, len(data.classes))
    if processes > 1:
        dist.all_reduce(matrix)
    return matrix


@torch.no_grad()
def milliseconds(network, height, width, device):
    """Milliseconds of a forward pass of one image as in `predict`: the fastest of 20, the least disturbed one."""
    image, times = torch.randn(1, 3, height, width, device=device), []
    for _ in range(20):
        begin = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16, enabled=image.is_cuda):
            network(image)
        if image.is_cuda:
            torch.cuda.synchronize(image.device)
        times.append(1000 * (time.perf_counter() - begin))
    return min(times)


# ---------------------------------------------------------------- pictures

def paint(classes, palette):
    """RGB picture (PIL) of a map (H,W) of class indices, each in its colour; 255 is white, which few palettes have."""
    colours = np.full((256, 3), 255, np.uint8)
    colours[:len(palette)] = palette
    return Image.fromarray(colours[classes.numpy()])


def legend(present, classes, palette, width):
    """Picture `width` pixels wide that names the class indices in `present`; 255 is called ignored."""
    size = max(12, width // 60)
    font, names = ImageFont.load_default(size=size), dict(enumerate(classes)) | {IGNORE: "ignored"}
    present = sorted(present)
    colours = paint(torch.tensor([present]), palette)
    step = 3 * size + max(round(font.getlength(names[k])) for k in present)
    columns = max(1, width // step)
    sheet = Image.new("RGB", (width, 2 * size * -(-len(present) // columns)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, k in enumerate(present):
        x, y = i % columns * step, i // columns * 2 * size + size // 2
        draw.rectangle((x, y, x + size, y + size), fill=colours.getpixel((i, 0)), outline="grey")
        draw.text((x + 3 * size // 2, y + size // 2), names[k], fill="black", font=font, anchor="lm")
    return sheet


def overlay(image, prediction, classes, palette):
    """PIL image blended with its prediction (H,W), above a legend of the classes that occur."""
    below = legend(prediction.unique().tolist(), classes, palette, image.width)
    return Image.fromarray(np.vstack([Image.blend(image, paint(prediction, palette), 0.7), below]))


def comparison(data, split, base, window, models, device, images=4):
    """Picture to project: a row for each of `images` images spread over the split, above a legend.

    Columns: image | label | one for each network in `models` (name -> network in eval mode; None is left out).
    """
    models = {name: model for name, model in models.items() if model is not None}
    rows, present = [], set()
    for index in spread(len(data.pairs[split]), images):
        image, label = EvalImages(data, split, base, [index])[0]
        maps = [label]
        for model in models.values():
            maps.append(predict(model, image.to(device), label.shape, window).cpu())
        rows.append([Image.fromarray(image.permute(1, 2, 0).numpy()), *(paint(m, data.palette) for m in maps)])
        present.update(*(m.unique().tolist() for m in maps))
    width = min(max(256, *(row[0].width for row in rows)), 512)
    tiles = [[_title(name, width) for name in ("image", "label", *models)]]
    for row in rows:
        size = width, round(width * row[0].height / row[0].width)
        tiles.append([ImageOps.expand(p.resize(size, Image.Resampling.NEAREST), 3, "white") for p in row])
    sheet = np.vstack([np.hstack(row) for row in tiles])
    return Image.fromarray(np.vstack([sheet, legend(present, data.classes, data.palette, sheet.shape[1])]))


def _title(name, width):
    sheet = Image.new("RGB", (width + 6, width // 8), "white")
    font = ImageFont.load_default(size=width // 12)
    ImageDraw.Draw(sheet).text((4, width // 16), name, fill="black", font=font, anchor="lm")
    return sheet


COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "black")  # for the colour-blind, too
FONT = ImageFont.load_default(size=18)


def _ticks(low, high):
    """Three to six round numbers at equal distances that enclose low..high."""
    high = high if high > low else low + 1
    power = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= (high - low) / 4)
    return [i * step for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


def chart(curves, xlabel, ylabel, width=800, height=480):
    """Line chart (PIL) of curves: name -> [(x, y), ...], each with at least one point."""
    xs, ys = (_ticks(min(values), max(values)) for values in zip(*itertools.chain(*curves.values())))
    left, right, top, bottom = 60, width - 30, 70, height - 60

    def at(x, y):
        return left + (right - left) * (x - xs[0]) / (xs[-1] - xs[0]), \
            bottom - (bottom - top) * (y - ys[0]) / (ys[-1] - ys[0])

    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for x in xs:
        draw.line((at(x, ys[0]), at(x, ys[-1])), fill="lightgrey")
        draw.text((at(x, ys[0])[0], bottom + 6), f"{x:g}", fill="black", font=FONT, anchor="ma")
    for y in ys:
        draw.line((at(xs[0], y), at(xs[-1], y)), fill="lightgrey")
        draw.text((left - 8, at(xs[0], y)[1]), f"{y:g}", fill="black", font=FONT, anchor="rm")
    draw.text((right, height - 6), xlabel, fill="black", font=FONT, anchor="rd")
    draw.text((8, top - 12), ylabel, fill="black", font=FONT, anchor="ld")
    x = left
    for (name, points), colour in zip(curves.items(), itertools.cycle(COLOURS)):
        corners = [at(*point) for point in points]
        draw.line(corners, fill=colour, width=3)
        for u, v in corners:
            draw.ellipse((u - 5, v - 5, u + 5, v + 5), fill=colour)
        draw.line((x, 18, x + 24, 18), fill=colour, width=5)
        draw.text((x + 32, 18), name, fill="black", font=FONT, anchor="lm")
        x += 60 + FONT.getlength(name)
    return sheet


def gain_chart(rows, width=800):
    """Picture (PIL) of the rows of `compare`: a method's gain over `ce` as a bar, its 95% interval as a line."""
    rows = [r for r in rows if r["gain"] is not None]
    ends = [0, 1, *(v for r in rows for v in (r["gain"], r["low"], r["high"]) if v is not None)]

    def at(gain):
        return 170 + (width - 270) * (gain - min(ends)) / (max(ends) - min(ends))

    groups = itertools.groupby(rows, lambda r: f"{r['group']}: {r['split']}, {r['steps']} steps")
    groups = [(name, list(members)) for name, members in groups]
    sheet = Image.new("RGB", (width, 60 + 40 * len(groups) + 30 * len(rows)), "white")
    draw, y = ImageDraw.Draw(sheet), -10
    for name, members in groups:
        y += 40
        draw.text((8, y), name, fill="black", font=FONT, anchor="lm")
        draw.line((at(0), y + 16, at(0), y + 30 * len(members) + 12), fill="black", width=2)
        for row in members:
            y += 30
            first, last = sorted((at(0), at(row["gain"])))
            draw.rectangle((first, y - 9, last, y + 9), fill=COLOURS[row["method"] == "c2vkd"])
            if row["low"] is not None:
                draw.line((at(row["low"]), y, at(row["high"]), y), fill="black", width=3)
            draw.text((160, y), row["method"], fill="black", font=FONT, anchor="rm")
            draw.text((width - 8, y), f"{row['gain']:+.1f}", fill="black", font=FONT, anchor="rm")
    draw.text((8, y + 40), "bar: gain over ce, points of mIoU; line: its 95% interval, if there are several seeds",
              fill="black", font=FONT, anchor="lm")
    return sheet


# ---------------------------------------------------------------- tables and the comparison of runs

def columns(rows):
    """Text table of rows of str, the first row its head: first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))])
                     for row in rows)


def number(value, form=".2f"):
    return "-" if value is None else format(value, form)


def table(rows, classes):
    """Text table of networks, each row (label, parameters, milliseconds an image or None, scores)."""
    head = [["", "parameters", "ms an image", "mIoU", "pixel acc."]]
    head += [[label, f"{count:,}", number(ms, ".1f"), number(s["miou"]), number(s["pixel_accuracy"])]
             for label, count, ms, s in rows]
    each = [["IoU of each class, %", *(row[0] for row in rows)]]
    each += [[name, *(number(row[-1]["iou"][k]) for row in rows)] for k, name in enumerate(classes)]
    return f"{columns(head)}\n\n{columns(each)}"


def read_runs(folder, split):
    """Results of all students below `folder`: label or method -> seed -> result, with "val", its mIoU on val.

    Raises InputError where two runs differ in a condition that both have (`ce` has none that concern a teacher), where
    seeds of one name differ in their options, and where a result cannot be read.
    """
    runs, seen = {}, {}
    for path in sorted(Path(folder).rglob(f"results-{split}.json")):
        result = read_scores(path)
        if result.get("method") in (None, "teacher"):
            continue
        name = result.get("label") or result["method"]
        options = {f"{k} of {name}": value for k, value in (result.get("options") or {}).items()}
        conditions = result["conditions"] | {"step": result["step"]} | options
        differing = [k for k, value in conditions.items() if seen.setdefault(k, (value, path))[0] != value]
        if differing:
            raise InputError(f"{path}: differs from {seen[differing[0]][1]} in {', '.join(differing)}; "
                             "compare runs of the same conditions, and give those of other options another --name")
        if result["seed"] in runs.setdefault(name, {}):
            raise InputError(f"{path}: a second run of {name}, seed {result['seed']}; keep one")
        val = path.with_name("results-val.json")
        on_val = read_scores(val) if val.exists() else {}
        if on_val.get("step") != result["step"]:
            raise InputError(f"{val}: missing or of another step than {path.name}, and the best baseline is chosen on "
                             "val; run evaluate.py on the last.pt beside it")
        runs[name][result["seed"]] = result | {"val": on_val["miou"]}
    if not runs:
        raise InputError(f"{folder}: no results-{split}.json below it; run train.py, or evaluate.py --split {split}")
    return runs


# two-sided 95% quantiles of Student's t with 1, 2, ... degrees of freedom
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)


def interval(values):
    """(low, high): Student's 95% interval of the mean; (None, None) for fewer than two values."""
    if len(values) < 2:
        return None, None
    half = T95[min(len(values) - 2, len(T95) - 1)] * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values) - half, statistics.mean(values) + half


def _signed(values):
    """Mean and interval of numbers, each as text."""
    low, high = interval(values)
    return f"{statistics.mean(values):+.2f}", "(one seed)" if low is None else f"[{low:+.2f}, {high:+.2f}]"


def compare(folder, split):
    """One group of runs, all below `folder` -> (text, rows).

    The text: mIoU mean and deviation of each method, gain over `ce` paired by seed, the paper's claim, IoU of each
    class. rows: what stands in its first table as dicts, None where there is nothing. Raises InputError (read_runs).
    """
    runs = read_runs(folder, split)
    alone, some = runs.get("ce", {}), next(iter(next(iter(runs.values())).values()))
    gains = {name: {s: r["miou"] - alone[s]["miou"] for s, r in seeds.items() if s in alone}
             for name, seeds in runs.items() if name != "ce"}
    rows = []
    for name, seeds in runs.items():
        values, gain = [r["miou"] for r in seeds.values()], list(gains.get(name, {}).values())
        low, high = interval(gain)
        rows.append({"group": str(folder), "split": split, "steps": some["step"], "method": name, "seeds": len(values),
                     "mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else None,
                     "gain": statistics.mean(gain) if gain else None, "low": low, "high": high})
    overview = [["method", "seeds", "mIoU", "std", "gain over ce", "95% interval"]]
    overview += [[r["method"], str(r["seeds"]), number(r["mean"]), number(r["std"]),
                  *(_signed(gains[r["method"]].values()) if gains.get(r["method"]) else ("-", "-"))] for r in rows]
    each = [["IoU of each class, %", *runs]]
    for k, name in enumerate(some["classes"]):
        cells = [[r["iou"][k] for r in seeds.values() if r["iou"][k] is not None] for seeds in runs.values()]
        each.append([name, *(number(statistics.mean(c) if c else None) for c in cells)])
    parts = f"{folder}: {split}, {some['step']} steps\n{columns(overview)}", _claims(runs, gains), columns(each)
    return "\n\n".join(filter(None, parts)), rows


def _claims(runs, gains):
    """Lines that hold c2vkd against the best baseline without A_v, chosen on val, and against all methods with A_v."""
    ours, on_val, lines, hints = gains.get("c2vkd", {}), {}, [], []
    for name, gain in gains.items():
        shared, method = gain.keys() & ours.keys(), next(iter(runs[name].values()))["method"]
        if not shared or method in ("ce", "c2vkd"):
            continue
        if method in METHODS and "A_v" in METHODS[method].needs:
            lead = [ours[s] - gain[s] for s in shared]
            hints.append(f"gain(c2vkd) - gain({name}) = " + "   ".join(_signed(lead)))
        else:
            on_val[name] = statistics.mean(runs[name][s]["val"] - runs["ce"][s]["val"] for s in shared)
    if on_val:
        best = max(on_val, key=on_val.get)  # never chosen on test
        mine, theirs = zip(*((ours[s], gain) for s, gain in gains[best].items() if s in ours))
        claim = [a - 2 * b for a, b in zip(mine, theirs)]
        lost = f"   but {best} loses: this is no gain" if statistics.mean(theirs) < 0 < statistics.mean(claim) else ""
        low, _ = interval(theirs)
        ratio = f"{statistics.mean(mine) / statistics.mean(theirs):.0%}" if low is not None and low > 0 else \
            f"undefined: the interval of the gain of {best} is not above 0"
        lines += [f"gain(c2vkd) - 2 gain({best}) = " + "   ".join(_signed(claim)) + lost,
                  f"gain(c2vkd) / gain({best}): {ratio}"]
    return "\n".join(lines + hints)


def report(folder, entries, data, base, window, device):
    """Print the table of networks and draw comparison.png and curves.png into `folder`.

    entries: label -> (network, its scores on val, its log.csv or None).
    """
    folder.mkdir(parents=True, exist_ok=True)  # of a teacher that was given
    rows, curves = [], {}
    for label, (network, result, log) in entries.items():
        rows.append((label, count_parameters(network), milliseconds(network, window, window, device), result))
        if log:
            with open(log, newline="") as f:
                curves[label] = [(int(r["step"]), float(r["val_miou"])) for r in csv.DictReader(f) if r["val_miou"]]
    print("\n" + table(rows, data.classes))
    miou = {label: result["miou"] for label, (_, result, _) in entries.items()}
    for label in miou:
        if label not in ("teacher", "student alone") and "student alone" in miou:
            gain = miou[label] - miou["student alone"]
            print(f"\ngain of {label} over student alone: {gain:+.2f} mIoU on val, one seed")
        if label != "teacher" and miou[label] > miou.get("teacher", 100):
            print(f"WARNING: {label} has passed its teacher and can learn little more from it; "
                  "train the teacher longer")
    networks = {label: network for label, (network, _, _) in entries.items()}
    comparison(data, "val", base, window, networks, device).save(folder / "comparison.png")
    if curves:
        chart(curves, "step", "val mIoU, %").save(folder / "curves.png")
    print(f"\nrun folder: {folder}; look at comparison.png and curves.png in it")


def report_terms(folder, weights):
    """Print each term of the last measured step and its share of the gradient in the student's encoder."""
    with open(folder / "log.csv", newline="") as f:
        measured = [r for r in csv.DictReader(f) if any(v for k, v in r.items() if k.startswith("grad_"))]
    if not measured:
        return
    row = measured[-1]
    pull = {n: abs(w) * float(row[f"grad_{n}"]) for n, w in weights.items()}
    lines = [[f"terms at step {row['step']}", "raw", "weight", "weighted", "gradient in the encoder", "share"]]
    lines += [[f"  {n}", f"{float(row[f'raw_{n}']):.4g}", f"{w:g}", f"{float(row[f'weighted_{n}']):.4g}",
               f"{pull[n]:.4g}", f"{pull[n] / (sum(pull.values()) or 1):.0%}"] for n, w in weights.items()]
    print("\n" + columns(lines))


# ---------------------------------------------------------------- checkpoints

def load_network(path, device="cpu"):
    """The network of a checkpoint written by train.py, in eval mode, and the checkpoint's description.

    Raises InputError for files that are not such checkpoints or whose tensors do not fit.
    """
    state = load_checkpoint(path, ("module", "name", "classes", "palette", "base", "window", "dataset", "step"))
    name, weights = state["name"], state["module"]
    if name in VARIANTS:  # A_v and A_l, the heads, serve training alone
        model = Student(name, len(state["classes"]))
        weights = {k.removeprefix("student."): v for k, v in weights.items() if not k.startswith("heads.")}
    elif name in TEACHERS:
        model = Teacher(name, len(state["classes"]))
    else:
        raise InputError(f"{path}: holds a network called {name!r}, which this version does not know")
    load_strictly(model, weights, path, name, "it was written by another version or altered: train again")
    return model.to(device).eval(), state


def write_json(path, value):
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def write_scores(folder, split, result, state):
    """results-SPLIT.json, which `compare` reads: `scores` and what it has to know of their network."""
    keys = ("label", "method", "seed", "conditions", "options", "classes", "step")
    write_json(folder / f"results-{split}.json", result | {k: state.get(k) for k in keys})


def read_scores(path):
    """What `write_scores` wrote. Raises InputError where it cannot be read."""
    try:
        result = json.loads(path.read_text())
        float(result["miou"])
        return result
    except (OSError, ValueError, TypeError, KeyError):
        raise InputError(f"{path}: missing or not readable; run evaluate.py on the last.pt beside it") from None


# ---------------------------------------------------------------- commands

def _evaluate_checkpoint(args, model, state):
    data = open_dataset(args.dataset or state["dataset"], args.data or state.get("data"))
    if data.classes != state["classes"]:
        raise InputError(f"{args.checkpoint}: trained on {len(state['classes'])} classes that are not those of the "
                         "data; give its own --data")
    if not data.pairs.get(args.split):
        raise InputError(f"the data has no {args.split} split; choose another --split")
    matrix = evaluate(model, data, args.split, state["base"], args.window, args.device, args.stride, args.flip,
                      args.batch_size, workers=args.workers)
    result = scores(matrix)
    print(table([(state["name"], count_parameters(model), None, result)], data.classes))
    # only the standard protocol on the run's own data is compared
    its = state.get("data")
    own, here = (os.path.abspath(data_folder(data.name, root)) for root in (its, args.data or its))
    standard = args.window == state["window"] and not (args.stride or args.flip)
    if data.name == state["dataset"] and own == here and standard:
        write_scores(Path(args.checkpoint).parent, args.split, result, state)
    else:
        print("not kept for --compare: other data, window, --stride or --flip than the run's own")
    if args.pictures:
        Path(args.pictures).mkdir(parents=True, exist_ok=True)
        path = Path(args.pictures) / f"{args.split}.png"
        comparison(data, args.split, state["base"], state["window"], {state["name"]: model}, args.device, 8).save(path)
        print(f"pictures: {path}")


def _overlays(args, model, state):
    files = []
    for item in map(Path, args.image):
        files += sorted(p for p in item.iterdir() if p.suffix.lower() in SUFFIXES) if item.is_dir() else [item]
    if not files:
        raise InputError(f"{args.image[0]}: no .jpg or .png in it")
    for path in files:
        if not path.is_file():
            raise InputError(f"{path}: no such file; give another --image")
    if len({p.stem for p in files}) < len(files):
        raise InputError("two --image files share their name but for folder or ending, and so their picture; "
                         "colour them apart")
    out = Path(args.pictures or "pictures")
    if out.resolve() in {p.resolve().parent for p in files}:
        raise InputError(f"{out}: holds the images themselves, which would be overwritten; give another --pictures")
    out.mkdir(parents=True, exist_ok=True)
    for path in progress(files, desc=f"overlays to {out}", unit="images"):
        image = read_image(path)
        small = torch.from_numpy(np.array(resize_short_side(image, state["base"]))).permute(2, 0, 1)
        prediction = predict(model, small.to(args.device), image.size[::-1], args.window, args.stride, args.flip,
                             args.batch_size).cpu()
        overlay(image, prediction, state["classes"], state["palette"]).save(out / f"{path.stem}.png")
    print(f"{len(files)} pictures in {out}")


class _Bare(torch.nn.Module):
    """Normalised image (B,3,H,W) -> logits (B,K,H,W)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return F.interpolate(self.model(x)[0], x.shape[2:], mode="bilinear")


def _export(args, model, state):
    # from 128 pixels: at 64 the last stage's 2x2 and the batch of 2 would be taken for the same unknown
    bare, side = _Bare(model.cpu()).eval(), max(128, state["window"] // 32 * 32)
    h, w = (32 * torch.export.Dim(n, min=2, max=128) for n in "hw")
    program = torch.export.export(bare, (torch.randn(2, 3, side, side),),
                                  dynamic_shapes=({0: torch.export.Dim("b", min=1, max=64), 2: h, 3: w},))
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={"classes.json": json.dumps(state["classes"])})
    write_atomically(args.export, content.getvalue())
    again = torch.export.load(args.export).module()
    x = torch.randn(1, 3, side + 32, side)
    with torch.no_grad():
        difference = (again(x) - bare(x)).abs().max().item()
    print(f"{args.export}: {len(content.getvalue()) / 1e6:.1f} MB, largest difference to the original {difference:.1e}")
    print(f"{state['name']}: {count_parameters(model):,} parameters, {milliseconds(model, *x.shape[2:], 'cpu'):.0f} ms "
          f"for one {x.shape[2]}x{x.shape[3]} image on this CPU")


def _compare(args):
    out, rows = Path(args.pictures or args.compare[0]), []
    for folder in args.compare:
        text, more = compare(folder, args.split)
        print(f"{text}\n")
        rows += more
    out.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    write_atomically(out / "compare.csv", text.getvalue().encode())
    gain_chart(rows).save(out / "compare.png")
    print(f"{out / 'compare.csv'}, {out / 'compare.png'}")


def main():
    gpu = torch.cuda.is_available()
    parser = Parser(description="Evaluate, apply, export or compare trained networks.")
    what = parser.add_argument_group("what to do")
    what.add_argument("--checkpoint", metavar="FILE", help="a last.pt: print its mIoU")
    what.add_argument("--image", nargs="+", metavar="PATH", help="pictures or folders to colour instead")
    what.add_argument("--export", metavar="FILE", help="write the bare network through torch.export instead")
    what.add_argument("--compare", nargs="+", metavar="DIR", help="gains of the runs below each (no checkpoint needed)")
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", choices=DATASETS, help="default: the checkpoint's")
    data.add_argument("--data", metavar="DIR", help="its folder; default: the checkpoint's")
    data.add_argument("--split", default="val", choices=("train", "val", "test"), help="images to score (default val)")
    how = parser.add_argument_group("how")
    how.add_argument("--window", type=at_least(32), metavar="PIXELS",
                     help="side of the sliding window; default: the training crop")
    how.add_argument("--stride", type=at_least(1), metavar="PIXELS", help="its step; default: 2/3 of the window")
    how.add_argument("--whole", action="store_true", help="whole images instead of windows")
    how.add_argument("--flip", action="store_true", help="average with the mirror image")
    how.add_argument("--batch-size", type=at_least(1), default=8, metavar="N", help="windows at a time (default 8)")
    how.add_argument("--workers", type=at_least(0), default=8 if gpu else 0, metavar="N",
                     help="processes that decode images (default 8 with a GPU, else 0)")
    how.add_argument("--pictures", metavar="DIR", help="where pictures go")
    how.add_argument("--device", default="cuda" if gpu else "cpu", help="cuda or cpu (default: cuda if there is one)")
    args = parser.parse_args()
    if args.compare:
        return _compare(args)
    if not args.checkpoint:
        parser.error("--checkpoint FILE or --compare DIR is needed")
    if args.device != "cpu" and not gpu:
        raise InputError(f"--device {args.device}: no such device found; use --device cpu")
    model, state = load_network(args.checkpoint, args.device)
    args.window = None if args.whole else args.window or state["window"]
    act = _export if args.export else _overlays if args.image else _evaluate_checkpoint
    act(args, model, state)


if __name__ == "__main__":
    command(main)
