"""Evaluation, pictures, export and comparison of trained networks (students and teachers alike).

    python evaluate.py --checkpoint runs/shapes/c2vkd-mit_nano-seed0/last.pt                  # mIoU, per-class IoU
    python evaluate.py --checkpoint FILE --image a.jpg DIR --pictures OUT                      # overlays, no labels needed
    python evaluate.py --checkpoint FILE --export student.pt2                                  # the bare network
    python evaluate.py --compare runs/shapes                                                   # table of all methods

mIoU: one int64 confusion matrix over all labelled pixels of the split at the labels' original resolution,
IoU = TP / (TP + FP + FN), mean over the classes that occur in labels or predictions.
"""
import argparse
import json
import os
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torchvision.utils import draw_segmentation_masks

from data import (DATASETS, IGNORE, SUFFIXES, EvalImages, InputError, command, load_checkpoint, normalise, open_dataset, progress,
                  resize_short_side, spread, write_atomically)
from student import VARIANTS, Student, count_parameters
from teacher import CHANNELS, Teacher


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


@torch.no_grad()
def predict(model, image, size, window=None, stride=None, flip=False, batch=8):
    """Logits (K,H,W) at `size` of one uint8 image (3,h,w).

    The window slides over the image in steps of at most `stride`; logits are averaged where windows
    overlap, then resized bilinearly. window=None: the whole image at once. Images smaller than the window are
    padded with the mean colour. flip: averaged with the mirror image.
    """
    image = normalise(image[None])
    if flip:
        image = torch.cat([image, image.flip(3)])
    h, w = image.shape[2:]
    win_h, win_w = (window, window) if window else (max(h, 32), max(w, 32))
    image = F.pad(image, (0, max(0, win_w - w), 0, max(0, win_h - h)))
    tops, lefts = (_starts(side, win, min(stride or win, win)) for side, win in zip(image.shape[2:], (win_h, win_w)))
    corners = [(y, x) for y in tops for x in lefts]
    total = weight = 0
    for i in range(0, len(corners), batch):
        some = corners[i:i + batch]
        crops = torch.cat([image[:, :, y:y + win_h, x:x + win_w] for y, x in some])
        logits = F.interpolate(model(crops)[0].float(), (win_h, win_w), mode="bilinear")
        if i == 0:
            total = logits.new_zeros(len(image), logits.shape[1], *image.shape[2:])
            weight = logits.new_zeros(image.shape[2:])
        for (y, x), part in zip(some, logits.split(len(image))):
            total[:, :, y:y + win_h, x:x + win_w] += part
            weight[y:y + win_h, x:x + win_w] += 1
    logits = (total / weight)[:, :, :h, :w]
    if flip:
        logits = (logits[:1] + logits[1:].flip(3)) / 2
    return F.interpolate(logits, tuple(size), mode="bilinear")[0]


def _starts(side, window, stride):
    """Where windows begin along one side: every `stride`, the last one flush with the end."""
    return list(range(0, side - window, stride)) + [side - window]


def default_stride(window):
    """Two thirds of the window; None, like the window, for whole images."""
    # paper: unstated; how far its 512 windows overlap
    return 2 * window // 3 if window else None


def evaluate(model, data, split, base, window, device, stride=None, flip=False, batch=8, images=None,
             desc="evaluating"):
    """Confusion matrix (K,K) of `model` on `images` (default: all) images of a split.

    With several processes each takes every n-th image, once, and the counts are added up.
    """
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    dataset = EvalImages(data, split, base, spread(len(data.pairs[split]), images)[rank::processes])
    matrix = torch.zeros(len(data.classes), len(data.classes), dtype=torch.int64, device=device)
    was_training = model.training
    model.eval()
    for i in progress(range(len(dataset)), desc=desc, unit="images", disable=rank > 0, leave=False):
        image, label, _ = dataset[i]
        label = label.to(device)
        logits = predict(model, image.to(device), label.shape, window, stride or default_stride(window), flip, batch)
        matrix += confusion_matrix(logits.argmax(0), label, len(data.classes))
    model.train(was_training)
    if processes > 1:
        dist.all_reduce(matrix)
    return matrix


# ---------------------------------------------------------------- pictures

def colourise(image, classes_map, palette):
    """Blend uint8 image (3,H,W) with the class colours of classes_map (H,W); 255 stays uncoloured."""
    present = [k for k in classes_map.unique().tolist() if k != IGNORE]
    if not present:
        return image
    masks = torch.stack([classes_map == k for k in present])
    return draw_segmentation_masks(image, masks, alpha=0.7, colors=[tuple(palette[k]) for k in present])


def strip(data, split, base, window, models, device, images=4):
    """Picture: a row for each of `images` images spread over the split; columns image | label | `models` (name -> network)."""
    rows = []
    for index in spread(len(data.pairs[split]), images):
        image, label, _ = EvalImages(data, split, base, [index])[0]
        columns = {"image": image, "label": colourise(image, _to_size(label, image), data.palette)}
        for name, model in models.items():
            was_training = model.training
            logits = predict(model.eval(), image.to(device), image.shape[1:], window, default_stride(window))
            columns[name] = colourise(image, logits.argmax(0).cpu(), data.palette)
            model.train(was_training)
        rows.append(columns)
    width = max(160, max(r["image"].shape[2] for r in rows))
    pictures = [[_fit(p, width) for p in r.values()] for r in rows]
    height = sum(r[0].height + 4 for r in pictures)
    sheet = Image.new("RGB", (len(rows[0]) * (width + 4) - 4, height + 16), "white")
    draw, y = ImageDraw.Draw(sheet), 16
    for column, name in enumerate(rows[0]):
        draw.text((column * (width + 4) + 2, 2), name, fill="black")
    for row in pictures:
        for column, picture in enumerate(row):
            sheet.paste(picture, (column * (width + 4), y))
        y += row[0].height + 4
    return sheet


def _to_size(label, image):
    return F.interpolate(label[None, None].float(), image.shape[1:], mode="nearest-exact")[0, 0].long()


def _fit(tensor, width):
    picture = Image.fromarray(tensor.permute(1, 2, 0).numpy())
    return picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.NEAREST)


def overlay(image, prediction, classes, palette):
    """PIL image at its size blended with its prediction (H,W), over a legend of the classes that occur."""
    picture = colourise(torch.from_numpy(np.array(image)).permute(2, 0, 1), prediction, palette)
    picture = Image.fromarray(picture.permute(1, 2, 0).numpy())
    present = prediction.unique().tolist()
    columns = max(1, picture.width // 120)
    sheet = Image.new("RGB", (picture.width, picture.height + 16 * -(-len(present) // columns)), "white")
    sheet.paste(picture)
    draw = ImageDraw.Draw(sheet)
    for i, k in enumerate(present):
        x, y = i % columns * 120, picture.height + i // columns * 16
        draw.rectangle((x + 2, y + 3, x + 12, y + 13), fill=tuple(palette[k]))
        draw.text((x + 16, y + 2), classes[k], fill="black")
    return sheet


# ---------------------------------------------------------------- checkpoints

def load_network(path, device="cpu"):
    """The network of a checkpoint written by train.py, in eval mode, and the checkpoint's description.

    Raises InputError for files that are not such checkpoints or whose tensors do not fit.
    """
    state = load_checkpoint(path, ("network", "name", "classes", "palette", "base", "window", "dataset", "step"))
    if state["name"] not in VARIANTS and state["name"] not in CHANNELS:
        raise InputError(f"{path}: holds a network called {state['name']!r}, which this version does not know")
    model = (Student if state["name"] in VARIANTS else Teacher)(state["name"], len(state["classes"]))
    try:
        model.load_state_dict(state["network"])
    except RuntimeError as e:
        raise InputError(f"{path}: its tensors do not fit {state['name']} ({str(e).splitlines()[1].strip()[:100]})") from None
    return model.to(device).eval(), state


def table(rows, classes):
    """Text table: rows of (label, parameters, scores)."""
    wide = 2 + max(len(text) for text in [*classes, *(row[0] for row in rows), "IoU of each class, %"])
    lines = [f"{'':{wide}}{'parameters':>12}{'mIoU':>8}{'pixel acc.':>12}"]
    lines += [f"{name:{wide}}{count:12,d}{s['miou']:8.2f}{s['pixel_accuracy']:12.2f}" for name, count, s in rows]
    lines += ["", f"{'IoU of each class, %':{wide}}" + "".join(f"{name.split()[0]:>12}" for name, *_ in rows)]
    for k, name in enumerate(classes):
        cells = [s["iou"][k] for *_, s in rows]
        lines.append(f"{name:{wide}}" + "".join(f"{'absent':>12}" if v is None else f"{v:12.2f}" for v in cells))
    return "\n".join(lines)


def write_json(path, value):
    write_atomically(path, lambda p: p.write_text(json.dumps(value, indent=1) + "\n"))


# ---------------------------------------------------------------- commands

def _evaluate_checkpoint(args, model, state, device):
    data = open_dataset(args.dataset or state["dataset"], args.data or state.get("data"))
    if data.classes != state["classes"]:
        raise InputError(f"{args.checkpoint}: trained on {len(state['classes'])} classes that are not those of the data; "
                         "give its own --data")
    if not data.pairs.get(args.split):
        raise InputError(f"the data has no {args.split} split; choose another --split")
    window = None if args.whole else args.window or state["window"]
    matrix = evaluate(model, data, args.split, state["base"], window, device, args.stride, args.flip, args.batch_size)
    result = scores(matrix)
    print(table([(state["name"], count_parameters(model), result)], data.classes))
    # only the standard protocol on the run's own data is compared, and never the step that was chosen on val
    own = data.name == state["dataset"] and (not args.data or os.path.abspath(args.data) == state.get("data"))
    if own and window == state["window"] and not (args.stride or args.flip) and Path(args.checkpoint).name != "best.pt":
        write_json(Path(args.checkpoint).with_name(f"results-{args.split}.json"),
                   result | {k: state.get(k) for k in ("label", "method", "seed", "conditions", "classes", "step")})
    if args.pictures:
        Path(args.pictures).mkdir(parents=True, exist_ok=True)
        path = Path(args.pictures) / f"{args.split}.png"
        strip(data, args.split, state["base"], state["window"], {state["name"]: model}, device, images=8).save(path)
        print(f"pictures: {path}")


def _overlays(args, model, state, device):
    files = []
    for item in map(Path, args.image):
        files += sorted(p for p in item.iterdir() if p.suffix.lower() in SUFFIXES) if item.is_dir() else [item]
    if not files:
        raise InputError(f"{args.image[0]}: no .jpg or .png in it")
    if len({p.stem for p in files}) < len(files):
        raise InputError("two --image files share their name but for folder or ending, and so their picture; colour them apart")
    out = Path(args.pictures or "pictures")
    if out.resolve() in {p.resolve().parent for p in files}:
        raise InputError(f"{out}: holds the images themselves, which would be overwritten; give another --pictures")
    out.mkdir(parents=True, exist_ok=True)
    for path in progress(files, desc=f"overlays to {out}", unit="images"):
        try:
            image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        except OSError as e:
            raise InputError(f"{path}: not a readable image ({e.strerror or e}); give another --image") from None
        small = torch.from_numpy(np.array(resize_short_side(image, state["base"]))).permute(2, 0, 1)
        window = None if args.whole else args.window or state["window"]
        logits = predict(model, small.to(device), image.size[::-1], window, args.stride or default_stride(window),
                         args.flip, args.batch_size)
        overlay(image, logits.argmax(0).cpu(), state["classes"], state["palette"]).save(out / f"{path.stem}.png")
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
    write_atomically(args.export, lambda p: torch.export.save(program, p.open("wb")))
    again = torch.export.load(args.export).module()
    x = torch.randn(1, 3, side + 32, side)
    with torch.no_grad():
        difference = (again(x) - bare(x)).abs().max().item()
    print(f"{args.export}: {Path(args.export).stat().st_size / 1e6:.1f} MB, largest difference to the original {difference:.1e}")
    networks = {state["name"]: model}
    teacher = (state.get("conditions") or {}).get("teacher")
    if teacher:  # it costs the same whatever its weights are
        networks[teacher] = Teacher(teacher, len(state["classes"])).eval()
    for name, network in networks.items():
        print(f"{name}: {count_parameters(network):,} parameters, {_milliseconds(network, x):.0f} ms for one "
              f"{x.shape[2]}x{x.shape[3]} image on this CPU")


@torch.no_grad()
def _milliseconds(network, x):
    times = []
    for _ in range(6):
        begin = time.perf_counter()
        network(x)
        times.append(time.perf_counter() - begin)
    return 1000 * statistics.median(times[1:])


def compare(folder, split):
    """Text table of all runs below `folder`: mIoU mean and deviation, gain over `ce` paired by seed, the paper's claim.

    The baseline of the claim is the one that gains most on val.
    Raises InputError where runs differ in data, schedule or initialisation.
    """
    runs = {}
    for path in sorted(Path(folder).rglob(f"results-{split}.json")):
        result = json.loads(path.read_text())
        if result.get("method") and result["method"] != "teacher":
            runs[path] = result
    if not runs:
        raise InputError(f"{folder}: no results-{split}.json below it; run train.py, or evaluate.py --split {split}, first")
    first, reference = next(iter(runs.items()))
    for path, result in runs.items():
        differing = [k for k in reference["conditions"] if result["conditions"].get(k) != reference["conditions"][k]]
        differing += ["step"] * (result["step"] != reference["step"])
        if differing:
            raise InputError(f"{path}: differs from {first} in {', '.join(differing)}; compare runs of the same conditions")
    by_method = {}
    for path, result in runs.items():
        name = result.get("label") or result["method"]
        if result["seed"] in by_method.setdefault(name, {}):
            raise InputError(f"{path}: a second run of {name}, seed {result['seed']}; keep one")
        by_method[name][result["seed"]] = result | {"val": _val_miou(path, result)}
    alone = by_method.get("ce", {})
    lines = [f"{split}, {reference['step']} steps",
             f"{'method':16s}{'seeds':>6s}{'mIoU':>8s}{'std':>7s}{'gain over ce':>14s}   95% interval"]
    gains = {}
    for method, seeds in by_method.items():
        values = [r["miou"] for r in seeds.values()]
        line = f"{method:16s}{len(values):6d}{statistics.mean(values):8.2f}" + \
            (f"{statistics.stdev(values):7.2f}" if len(values) > 1 else f"{'-':>7s}")
        if method != "ce" and set(seeds) & set(alone):
            gains[method] = {s: seeds[s]["miou"] - alone[s]["miou"] for s in seeds if s in alone}
            line += f"{statistics.mean(gains[method].values()):+14.2f}   {_interval(list(gains[method].values()))}"
        lines.append(line)
    ours = gains.get("c2vkd", {})
    shared = {m: {s: g[s] for s in g if s in ours} for m, g in gains.items()  # the baselines' gains, on the seeds of c2vkd
              if all(r["method"] != "c2vkd" for r in by_method[m].values())}
    on_val = {m: statistics.mean(by_method[m][s]["val"] - alone[s]["val"] for s in g) for m, g in shared.items() if g}
    if on_val:
        best = max(on_val, key=on_val.get)  # never chosen on test
        gain = statistics.mean(shared[best].values())
        difference = [ours[s] - 2 * g for s, g in shared[best].items()]
        lines.append(f"\ngain(c2vkd) - 2 gain({best}) = {statistics.mean(difference):+.2f}   {_interval(difference)}"
                     + (f"   but {best} loses: this is no gain" if gain < 0 < statistics.mean(difference) else ""))
        low = _bounds(list(shared[best].values()))[0]
        ratio = f"{statistics.mean(ours[s] for s in shared[best]) / gain:.0%}" if low > 0 else \
            f"undefined: the interval of the gain of {best} is not above 0"
        lines.append(f"gain(c2vkd) / gain({best}): {ratio}")
    lines += ["", f"{'IoU of each class':20s}" + "".join(f"{m[:11]:>12s}" for m in by_method)]
    for k, name in enumerate(reference["classes"]):
        cells = [[r["iou"][k] for r in seeds.values() if r["iou"][k] is not None] for seeds in by_method.values()]
        lines.append(f"{name[:19]:20s}" + "".join(f"{statistics.mean(c):12.2f}" if c else f"{'absent':>12s}" for c in cells))
    return "\n".join(lines)


def _val_miou(path, result):
    """mIoU on val, at the same step, of the run whose results lie at `path`."""
    val = path.with_name("results-val.json")
    found = json.loads(val.read_text()) if val.exists() else {}
    if found.get("step") != result["step"]:
        raise InputError(f"{val}: missing or of another step than {path.name}, and the best baseline is chosen on val; "
                         "run evaluate.py on the last.pt beside it")
    return found["miou"]


# two-sided 95% quantiles of Student's t with 1, 2, ... degrees of freedom
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)


def _bounds(values):
    """Student's t interval of a mean; infinite for fewer than two values."""
    if len(values) < 2:
        return -float("inf"), float("inf")
    half = T95[min(len(values) - 2, len(T95) - 1)] * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values) - half, statistics.mean(values) + half


def _interval(values):
    return "(one seed)" if len(values) < 2 else "[{:+.2f}, {:+.2f}]".format(*_bounds(values))


def main():
    parser = argparse.ArgumentParser(description="Evaluate, apply, export or compare trained networks.")
    what = parser.add_argument_group("what to do")
    what.add_argument("--checkpoint", metavar="FILE", help="a last.pt or best.pt: print its mIoU")
    what.add_argument("--image", nargs="+", metavar="PATH", help="pictures or folders to colour instead")
    what.add_argument("--export", metavar="FILE", help="write the bare network through torch.export instead")
    what.add_argument("--compare", metavar="DIR", help="table of all runs below DIR (no checkpoint needed)")
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", choices=DATASETS, help="default: the checkpoint's")
    data.add_argument("--data", metavar="DIR", help="its folder; default: the checkpoint's")
    data.add_argument("--split", default="val", choices=("train", "val", "test"), help="images to score (default val)")
    how = parser.add_argument_group("how")
    how.add_argument("--window", type=int, metavar="PIXELS", help="side of the sliding window; default: the training crop")
    how.add_argument("--stride", type=int, metavar="PIXELS", help="its step; default: 2/3 of the window")
    how.add_argument("--whole", action="store_true", help="whole images instead of windows")
    how.add_argument("--flip", action="store_true", help="average with the mirror image")
    how.add_argument("--batch-size", type=int, default=8, metavar="N", help="windows at a time (default 8)")
    how.add_argument("--pictures", metavar="DIR", help="where pictures go")
    how.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu (default: cuda if there is one)")
    args = parser.parse_args()
    for name in ("window", "stride", "batch_size"):
        least = 32 if name == "window" else 1
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {least}")
    if args.compare:
        return print(compare(args.compare, args.split))
    if not args.checkpoint:
        parser.error("--checkpoint FILE or --compare DIR is needed")
    if args.device != "cpu" and not torch.cuda.is_available():
        raise InputError(f"--device {args.device}: no such device found; use --device cpu")
    model, state = load_network(args.checkpoint, args.device)
    if args.export:
        _export(args, model, state)
    elif args.image:
        _overlays(args, model, state, args.device)
    else:
        _evaluate_checkpoint(args, model, state, args.device)


if __name__ == "__main__":
    command(main)
