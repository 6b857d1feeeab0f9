"""Data sets and their classes, the stream of training crops, and what every script shares.

    python data.py --check --dataset folder --data DIR          # read everything, list every fault
    python data.py --convert OUT --dataset folder --data DIR    # other labels to class indices

Every label leaves this file as uint8 class indices with 255 = ignore, every image as uint8 RGB.
The data sets and what networks see of them come first, then the reading of files, the labels and
the two commands above. The last third is no longer about data: downloads, errors, options, files
and weights, as all scripts use them.
"""
import argparse
import colorsys
import errno
import hashlib
import http.client
import io
import json
import math
import os
import re
import secrets
import shutil
import signal
import sys
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torchvision.datasets import Cityscapes
from torchvision.datasets.voc import DATASET_YEAR_DICT
from tqdm import tqdm

DATASETS = ("shapes", "ade20k", "cityscapes", "voc", "folder")
IGNORE = 255
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of RGB in 0..1
# differs: The paper does not state the padding. The release pads crops with black. Here it is the
# mean colour, which becomes zero by normalising.
MEAN_COLOUR = tuple(round(255 * m) for m in MEAN)


# ---------------------------------------------------------------- data sets

@dataclass
class DataSet:
    """Where a data set's files are and what its label values mean.

    palette: one RGB triple per class, 0..255.
    pairs: split -> [(image path, label path)], with None as the label of an image without one.
    class_of_value: 256 entries, value on disk -> class index. 255 = ignore, -1 = must not occur.
    """
    name: str
    classes: list
    palette: list
    pairs: dict
    class_of_value: np.ndarray = field(repr=False)
    root: Path = Path(".")

    def read(self, split, index):
        """Image (PIL, RGB) and label (uint8, H,W) at their size on disk.

        Without a label every pixel is 255. Raises InputError naming the file.
        """
        image_path, label_path = self.pairs[split][index]
        image = read_image(image_path)
        if label_path is None:
            return image, np.full(image.size[::-1], IGNORE, np.uint8)
        label = self.read_label(label_path)
        if label.shape != image.size[::-1]:
            raise InputError(
                f"{label_path}: {label.shape[1]}x{label.shape[0]}, but its image is "
                f"{image.width}x{image.height} (size after its EXIF rotation); "
                "make the two the same size")
        return image, label

    def read_label(self, path):
        """Class indices (H,W) uint8. Raises InputError for a file that holds something else."""
        remedy = "get it again"
        if self.name == "folder":
            remedy = "convert it to class indices with python data.py --convert"
        raw = open_label(path)
        if raw.mode not in ("L", "P", "1"):
            raise InputError(f"{path}: mode {raw.mode}, but a label has one index byte per "
                             f"pixel; {remedy}")
        misplaced = misplaced_class(self, raw)
        if misplaced:
            index, k = misplaced
            raise InputError(f"{path}: its palette gives index {index} to class {k}, "
                             f"{self.classes[k]}; {remedy}")
        values = np.array(raw, dtype=np.uint8)
        label = self.class_of_value[values]
        if (label < 0).any():
            wrong = Counter(values[label < 0].tolist())
            listed = [f"{value} ({count} pixels)" for value, count in sorted(wrong.items())]
            raise InputError(f"{path}: label values outside the {len(self.classes)} classes: "
                             f"{first_three(listed)}; {remedy}")
        return label.astype(np.uint8)


def open_dataset(name, root=None, missing_ok=False):
    """The DataSet `name` under `root` (default data/NAME), made or downloaded where possible.

    name: one of DATASETS. Raises InputError where files are missing. With missing_ok, a single
    missing file is left for `read` to name.
    """
    root = data_folder(name, root)
    if name == "shapes" and not root.is_dir():
        make_shapes(root)
    if name == "folder" and not root.is_dir():
        raise InputError(f"{root}: no such folder; "
                         "give --data a folder with images/, labels/ and classes.txt")
    layouts = {"shapes": _folder, "ade20k": _ade20k, "cityscapes": _cityscapes, "voc": _voc,
               "folder": _folder}
    data = DataSet(name, *layouts[name](root), root)
    for split in ("train", "val"):
        if not data.pairs[split]:
            raise InputError(f"{root}: no image of the {split} split found; "
                             f"README shows the layout of {name}")
    if not missing_ok:
        _refuse_missing(data)
    return data


def _refuse_missing(data):
    paths = [path for pairs in data.pairs.values() for pair in pairs for path in pair if path]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        more = f" ({len(missing) - 1} more are missing)" if missing[1:] else ""
        raise InputError(f"{missing[0]}: no such file; restore it or remove its partner{more}")


def data_folder(name, root=None):
    """--data, by default data/NAME."""
    return Path(root or Path("data") / name)


# ---------------------------------------------------------------- what networks see

class TrainStream(torch.utils.data.Dataset):
    """The stream of training crops. Item `position` depends on (seed, position) alone.

    The stream runs through epochs, each a permutation of all images. An image is resized so that
    its short side is base * u pixels, with u uniform in `scale`. It is cropped at random to
    crop x crop, padded on the right and at the bottom where it is smaller, and flipped with
    probability 1/2.
    With `unlabelled`, images without labels take part. The labelled ones are then repeated, all
    equally often, until there are at least as many of them.
    Returns image (3,crop,crop) uint8, label (crop,crop) uint8.
    """

    def __init__(self, data, seed, base, crop, scale, length, unlabelled=False):
        self.data, self.seed, self.length = data, seed, length
        self.base, self.crop, self.scale = base, crop, scale
        images = len(data.pairs["train"])
        self.unlabelled = len(data.pairs.get("unlabelled", ())) if unlabelled else 0
        self.labelled = images * max(1, math.ceil(self.unlabelled / images))

    def __len__(self):
        return self.length

    def source(self, position):
        """Which image stands at `position`: its split and its index there."""
        epoch, place = divmod(position, self.labelled + self.unlabelled)
        index = int(_order(self.seed, epoch, self.labelled + self.unlabelled)[place])
        if index < self.labelled:
            return "train", index % len(self.data.pairs["train"])
        return "unlabelled", index - self.labelled

    def __getitem__(self, position):
        image, label = self.data.read(*self.source(position))
        rng = np.random.default_rng([self.seed, position, 1])
        # differs: The paper does not state the scale. The release draws the LONG side from
        # 0.5-2.0 x 520, so that its Cityscapes crops are mostly padding. Here the short side is
        # drawn, around the size that evaluation uses.
        scale = self.base * rng.uniform(*self.scale) / min(image.size)
        width, height = (max(1, round(scale * side)) for side in image.size)
        w, h = min(self.crop, width), min(self.crop, height)
        x = rng.integers(0, width - w + 1)
        y = rng.integers(0, height - h + 1)
        # The crop in coordinates of the original image: only the crop is resized.
        sx, sy = image.width / width, image.height / height
        box = (x * sx, y * sy, min((x + w) * sx, image.width), min((y + h) * sy, image.height))

        out = np.empty((self.crop, self.crop, 3), np.uint8)
        out[:] = MEAN_COLOUR
        out[:h, :w] = np.asarray(image.resize((w, h), Image.Resampling.BILINEAR, box))
        target = np.full((self.crop, self.crop), IGNORE, np.uint8)
        target[:h, :w] = Image.fromarray(label).resize((w, h), Image.Resampling.NEAREST, box)
        if rng.random() < 0.5:
            out, target = out[:, ::-1], target[:, ::-1]
        return torch.from_numpy(out.transpose(2, 0, 1).copy()), torch.from_numpy(target.copy())


@lru_cache(maxsize=4)
def _order(seed, epoch, n):
    """The images of one epoch, as indices."""
    return np.random.default_rng([seed, epoch]).permutation(n)


class EvalImages(torch.utils.data.Dataset):
    """The images of a split, uint8 (3,h,w) at evaluation scale, and their labels, uint8 (H,W)."""

    def __init__(self, data, split, base, indices=None):
        self.data, self.split, self.base = data, split, base
        self.indices = list(range(len(data.pairs[split])) if indices is None else indices)

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        image, label = self.data.read(self.split, self.indices[i])
        image = np.array(resize_short_side(image, self.base)).transpose(2, 0, 1)
        item = torch.from_numpy(image.copy()), torch.from_numpy(label)
        if torch.utils.data.get_worker_info():
            # Fail here if shared memory is full: in the loader's own thread the run would hang.
            for tensor in item:
                tensor.share_memory_()
        return item


def normalise(images):
    """uint8 RGB (B,3,H,W) -> float32, ImageNet mean 0 and deviation 1, on the images' device."""
    # plain numbers: a tensor made here would make the host wait for the GPU in every step
    channels = zip(images.unbind(1), MEAN, STD)
    return torch.stack([(x.float() / 255 - mean) / std for x, mean, std in channels], 1)


def resize_short_side(image, base):
    """PIL image with its short side at `base` pixels, as networks see it in evaluation."""
    scale = base / min(image.size)
    size = [max(1, round(scale * side)) for side in image.size]
    return image.resize(size, Image.Resampling.BILINEAR)


def evenly_spaced(total, count):
    """`count` of the indices below `total`, or all if there are fewer.

    They are evenly spaced, because neighbours often show the same scene.
    """
    count = min(count or total, total)
    return [i * total // count for i in range(count)]


# ---------------------------------------------------------------- the layouts on disk
# Each function below takes the root and returns the classes, palette, pairs and class_of_value of
# a DataSet.

# labelIds value, name, colour; the row is the trainId
CITYSCAPES = tuple((c.id, c.name, c.color) for c in Cityscapes.classes if not c.ignore_in_eval)
VOC = ("background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
       "motorbike person pottedplant sheep sofa train tvmonitor").split()


def _ade20k(root):
    folder = root / DOWNLOADS["ade20k"].folder
    if not folder.is_dir():
        download("ade20k", root)
    info = folder / "objectInfo150.txt"
    rows = info.read_text().splitlines()[1:]
    names = [row.split("\t")[-1].split(",")[0].strip() for row in rows]
    if len(names) != 150:
        raise InputError(f"{info}: {len(names)} classes instead of 150; unpack the archive again")
    pairs = {short: _pair_up(folder / "images" / split, folder / "annotations" / split)
             for short, split in (("train", "training"), ("val", "validation"))}
    # 0 is "other objects", which are not evaluated
    return names, voc_palette(151)[1:], pairs, value_table(range(1, 151), ignored=[0])


def _cityscapes(root):
    if not (root / "gtFine").is_dir() or not (root / "leftImg8bit").is_dir():
        raise InputError(
            f"{root}: no leftImg8bit/ and gtFine/ in it; register at "
            "https://www.cityscapes-dataset.com/downloads, get leftImg8bit_trainvaltest.zip and "
            "gtFine_trainvaltest.zip, unpack both there")
    pairs = {}
    for split in ("train", "val"):  # the test split's labels are void: never scored
        images = sorted((root / "leftImg8bit" / split).glob("*/[!.]*_leftImg8bit.png"))
        pairs[split] = [(p, root / "gtFine" / split / p.parent.name
                         / p.name.replace("_leftImg8bit", "_gtFine_labelIds")) for p in images]
    values, names, palette = zip(*CITYSCAPES)
    return list(names), list(palette), pairs, value_table(values, ignored=range(34))


def _voc(root):
    folder = root / DATASET_YEAR_DICT["2012"]["base_dir"]
    if not folder.is_dir():
        download("voc", root)
    lists = folder / "ImageSets" / "Segmentation"
    train, labels = lists / "train.txt", "SegmentationClass"
    if (lists / "trainaug.txt").is_file() and (folder / "SegmentationClassAug").is_dir():
        train, labels = lists / "trainaug.txt", "SegmentationClassAug"
    pairs = {"train": _voc_pairs(folder, train, labels),
             "val": _voc_pairs(folder, lists / "val.txt", "SegmentationClass")}
    return VOC, voc_palette(21), pairs, value_table(range(21))


def _voc_pairs(folder, source, labels):
    words = source.read_text().split() if source.is_file() else []
    # some lists in circulation name both files of a pair
    ids = dict.fromkeys(Path(word).stem for word in words)
    return [(folder / "JPEGImages" / f"{i}.jpg", folder / labels / f"{i}.png") for i in ids]


def _folder(root):
    classes, palette = _read_classes(root)
    pairs = {split: _pair_up(root / "images" / split, root / "labels" / split)
             for split in ("train", "val", "test")}
    pairs["unlabelled"] = [(path, None) for path in pictures(root / "images" / "unlabelled")]
    return classes, palette, pairs, value_table(range(len(classes)))


def value_table(values, ignored=(IGNORE,)):
    """For `class_of_value`: values[k] -> k, `ignored` -> 255, everything else -> -1."""
    table = np.full(256, -1, np.int16)
    table[list(ignored)] = IGNORE
    table[list(values)] = np.arange(len(values))
    return table


def voc_palette(n):
    """The PASCAL VOC colour map: the index's bits, three at a time, fill R, G, B from the top."""
    def channel(index, number):
        return sum((index >> (3 * bit + number) & 1) << (7 - bit) for bit in range(3))
    return [tuple(channel(index, number) for number in range(3)) for index in range(n)]


# ---------------------------------------------------------------- classes.txt

def _read_classes(root):
    """Names and colours of classes.txt or, where there is none, of CVAT's labelmap.txt."""
    path, labelmap = root / "classes.txt", root / "labelmap.txt"
    form, pattern = "name R G B", r"(.+?)\s+(\d+)\s+(\d+)\s+(\d+)"
    if path.is_file() and labelmap.is_file():
        print(f"NOTE: {root}: the classes are those of classes.txt, labelmap.txt is not read")
    elif labelmap.is_file():
        path = labelmap
        form, pattern = "name:R,G,B::", r"([^:]+):(\d+),(\d+),(\d+)(?::.*)?"
    if not path.is_file():
        raise InputError(f"{path}: no such file; write one line per class: name R G B")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path}: not in UTF-8; save it as UTF-8") from None

    classes, palette = [], []
    for number, line in enumerate(map(str.strip, lines), 1):
        found = re.fullmatch(pattern, line)
        if not line or line.startswith("# ") and not found:  # CVAT's first line is a comment
            continue
        where = f"{path}, line {number}"
        colour = tuple(map(int, found.groups()[1:])) if found else ()
        if not colour or max(colour) > 255:
            raise InputError(f"{where}: {line!r} is not '{form}' with three numbers 0..255")
        if re.search(r"\s\d+$", found[1]):  # of four numbers one would join the name
            raise InputError(f"{where}: {line!r} has a number before its colour; leave three "
                             "numbers per line, and write a name like lane 2 as lane-2")
        if colour in palette:  # colour labels and pictures could not tell the two apart
            raise InputError(f"{where}: {found[1]} has the colour of "
                             f"{classes[palette.index(colour)]}; give each class its own")
        classes.append(" ".join(found[1].split()))
        palette.append(colour)
    if not 2 <= len(set(classes)) == len(classes) <= 255:
        raise InputError(f"{path}: {len(classes)} classes, {len(set(classes))} names; "
                         "2 to 255, all different, are possible")
    return classes, palette


def _write_classes(path, classes, palette):
    lines = (f"{name} {r} {g} {b}\n" for name, (r, g, b) in zip(classes, palette))
    path.write_text("".join(lines), encoding="utf-8")


# ---------------------------------------------------------------- shapes, the embedded data set

SHAPES = "ground disc square triangle ring cross rod star".split()
SHAPES_COUNT = {"train": 1600, "val": 100, "test": 400}
SHAPES_SIZE = 64


def make_shapes(root, seed=0):
    """Draw `shapes`, in the layout of `folder`; picture i depends on (seed, split, i) alone."""
    with scratch(root) as part:
        for number, (split, count) in enumerate(SHAPES_COUNT.items()):
            for kind in ("images", "labels"):
                (part / kind / split).mkdir(parents=True)
            for i in progress(range(count), desc=f"drawing {root}, {split}", unit="pictures"):
                image, label = draw_shapes(seed, 1_000_000 * number + i)
                image.save(part / "images" / split / f"{i:04d}.png", compress_level=1)
                label.save(part / "labels" / split / f"{i:04d}.png")
        _write_classes(part / "classes.txt", SHAPES, voc_palette(len(SHAPES)))
        publish(part, root)


def draw_shapes(seed, index, size=SHAPES_SIZE):
    """One scene of `shapes` -> (RGB image, index label), both PIL, size x size.

    Seven kinds of object lie on a mottled ground and hide one another: disc (plain), square
    (checks), triangle (stripes across), ring (grain), cross (stripes along), rod (thin), star
    (rare). Their outlines turn and their colours vary: hue is a weak hint, texture a strong one.
    A one-pixel border round objects is ignored.
    """
    rng = np.random.default_rng([seed, index])
    yy, xx = np.mgrid[:size, :size]
    ground = _random_colour(rng, rng.random())
    canvas = ground + rng.normal(0, 8, (size // 8, size // 8, 3)).repeat(8, 0).repeat(8, 1)
    label = np.zeros((size, size), np.uint8)
    weights = np.array([1, 1, 1, 1, 1, 1, 0.4])
    for _ in range(rng.integers(4, 7)):
        kind = int(rng.choice(np.arange(1, 8), p=weights / weights.sum()))
        name = SHAPES[kind]
        mask = _outline(name, rng, size)
        solid = np.asarray(mask) > 0
        colours = [_random_colour(rng, kind / 7 + rng.normal(0, 0.08)) for _ in range(2)]
        period, phase = rng.uniform(3.5, 5), rng.uniform(0, 2 * np.pi, 2)
        u, v = (np.sin(2 * np.pi * t / period + p) for t, p in zip((xx, yy), phase))
        grain = rng.normal(0, 1, (size, size))
        waves = {"square": u * v, "triangle": v, "cross": u, "ring": grain}
        wave = waves.get(name, np.ones((size, size)))
        pattern = np.where(wave[..., None] > 0, *colours)
        canvas = np.where(solid[..., None], pattern, canvas)
        border = np.asarray(mask.filter(ImageFilter.MaxFilter(3))) != np.asarray(mask)
        label = np.where(solid, kind, np.where(border, IGNORE, label)).astype(np.uint8)
    canvas = canvas * rng.uniform(0.8, 1.1) + rng.normal(0, 10, canvas.shape)
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8)), Image.fromarray(label)


def _random_colour(rng, hue):
    colour = colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.3, 0.9), rng.uniform(0.4, 0.95))
    return 255 * np.array(colour)


def _outline(kind, rng, size):
    """A mask (PIL, 0 or 255) of one object at a random place, size and rotation."""
    mask = Image.new("L", (size, size))
    draw = ImageDraw.Draw(mask)
    x, y = rng.uniform(0, size, 2)
    r, turn = rng.uniform(0.13, 0.25) * size, rng.uniform(0, 2 * np.pi)
    if kind in ("disc", "ring"):
        draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
        if kind == "ring":
            draw.ellipse((x - r / 2, y - r / 2, x + r / 2, y + r / 2), fill=0)
        return mask
    if kind == "rod":
        dx, dy = 2 * r * np.cos(turn), 2 * r * np.sin(turn)
        draw.line((x - dx, y - dy, x + dx, y + dy), fill=255, width=3)
        return mask
    corners, radii = {"square": (4, (r,)), "triangle": (3, (1.2 * r,)),
                      "star": (10, (1.2 * r, 0.5 * r)),
                      "cross": (12, (1.1 * r, 1.1 * r, 0.45 * r))}[kind]
    angles = turn + np.arange(corners) * 2 * np.pi / corners
    if kind == "cross":  # arms: two outer corners close together, then one inner corner
        arms = np.tile((-0.3, 0.3, np.pi / 4), 4)
        angles = turn + np.repeat(np.arange(4), 3) * np.pi / 2 + arms
    radii = np.resize(radii, corners)
    edge = [(x + a * np.cos(t), y + a * np.sin(t)) for a, t in zip(radii, angles)]
    draw.polygon(edge, fill=255)
    return mask


# ---------------------------------------------------------------- finding pictures and labels

# the endings that Pillow reads without further packages
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".tif", ".tiff", ".webp", ".bmp", ".gif", ".ppm",
            ".pgm")


def pictures(folder):
    """The pictures of a folder, sorted. Prints what else lies there.

    Hidden files are passed over, because macOS leaves ._NAME beside NAME on other disks.
    """
    entries = sorted(p for p in folder.glob("*") if not p.name.startswith("."))
    found = [p for p in entries if p.suffix.lower() in SUFFIXES and not p.is_dir()]
    if others := sorted(p.name for p in set(entries) - set(found)):
        print(f"NOTE: {folder}: {len(others)} left out, no picture that can be read here: "
              f"{first_three(others)}")
    return found


def _pair_up(images, labels):
    """Every image of a folder with the label of its name, which may be missing."""
    images, found = _by_name(images), _by_name(labels)
    if alone := [path.name for name, path in found.items() if name not in images]:
        print(f"NOTE: {labels}: {len(alone)} labels without a picture, not used: "
              f"{first_three(alone)}")
    return [(path, found.get(name, labels / f"{path.stem}.png")) for name, path in images.items()]


def _by_name(folder):
    """The pictures of a folder by name. Raises InputError where two share one."""
    found = {}
    for path in pictures(folder):
        other = found.setdefault(_stem(path), path)
        if other is not path:
            raise InputError(f"{folder}: {other.name} and {path.name} have the same name "
                             "before the ending; rename one and its partner")
    return found


def _stem(path):
    """The name without its ending, in the one form of Unicode in which names are compared."""
    return unicodedata.normalize("NFC", path.stem)


def first_three(words):
    """The first three words with commas, and dots for any others. For messages."""
    return ", ".join(words[:3]) + (" ..." if words[3:] else "")


# ---------------------------------------------------------------- reading pictures and labels

# formats whose compression can change the value of a pixel
LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF")
# Pillow multiplies 2- and 4-bit greys by these factors
STRETCH = {"L;2": 85, "L;4": 17}


def read_image(path):
    """A picture (PIL, RGB), turned as its EXIF tag says. Raises InputError naming the file."""
    image, _ = _open(path)
    if image.mode[0] in "IF":  # Pillow would clip to 255
        raise InputError(f"{path}: mode {image.mode}, more than 8 bits per channel; save it with 8")
    with suppress(Exception):  # damaged EXIF data are no fault of the pixels
        ImageOps.exif_transpose(image, in_place=True)
    return image.convert("RGB")


def open_label(path):
    """A label as Pillow opens it, in any mode, with the values of the file.

    Raises InputError for formats that change values.
    """
    raw, packing = _open(path)
    if raw.format in LOSSY or raw.info.get("compression") == "jpeg":
        raise InputError(f"{path}: holds {raw.format} data, whose compression changes colours and "
                         "indices; export the label again, as PNG")
    if raw.mode in ("L", "1") and ";" in packing:
        if packing not in STRETCH:
            raise InputError(f"{path}: grey values packed as {packing}, which readers change; "
                             "save it with 8 bits per pixel")
        raw = raw.point(lambda value: value // STRETCH[packing])
    return raw


def _open(path):
    """A picture as Pillow reads it, and how the file packs its pixels: "L;4" is 4 bits of grey."""
    try:
        image = Image.open(path)
        packing = image.tile[0][3] if image.tile else ""  # gone after loading
        image.load()
    except Image.DecompressionBombError:
        limit = 2 * Image.MAX_IMAGE_PIXELS
        raise InputError(f"{path}: more than {limit:,} pixels; cut it into tiles") from None
    except (OSError, SyntaxError, ValueError) as e:
        message = what_to_do(e) or f"{path}: truncated or not an image ({e}); get it again"
        raise InputError(message) from None
    if not isinstance(packing, str):  # some formats give a tuple, whose first entry is the packing
        packing = str((*packing, "")[0])
    return image, packing


def misplaced_class(data, raw):
    """The first index of a label to which its palette gives another class, and that class, or None.

    Some programs renumber palettes. A colour stands for its class in classes.txt. In a palette of
    greys alone, (2, 2, 2) stands for class 2. Other colours stand for none, and their index counts.
    """
    if raw.mode != "P" or data.name != "folder":
        return None
    flat = raw.getpalette("RGB")
    shown = {index: tuple(flat[3 * index:3 * index + 3])
             for _, index in raw.getcolors() if index != IGNORE}
    class_of = {}
    if all(map(is_grey, shown.values())):
        class_of = {(k, k, k): k for k in range(len(data.classes))}
    class_of |= {colour: k for k, colour in enumerate(data.palette)}
    for index, colour in shown.items():
        if class_of.get(colour, index) != index:
            return index, class_of[colour]
    return None


def is_grey(colour):
    """Whether red, green and blue are equal."""
    return len(set(colour)) == 1


# ---------------------------------------------------------------- what the labels hold

@dataclass
class LabelScan:
    """What all labels hold.

    pixels: split -> Counter, class index -> pixel count. Ignored pixels are counted at 255.
    binary: split -> number of its labels that hold the values 0 and 255 and no other.
    digest: sha256 of the names and bytes of train's and val's labels, in whatever folder.
    """
    pixels: dict
    binary: dict
    digest: str


def scan_labels(data, cache=None):
    """Read every label of every split once, with a bar -> LabelScan.

    cache: a json file, valid while paths, sizes, times and classes stay the same. Raises
    InputError for the first label that cannot be used.
    """
    files = [(split, label) for split, pairs in data.pairs.items() for _, label in pairs if label]
    state = _state_of_labels(data, files)
    known = {}
    if cache:
        with suppress(OSError, ValueError):
            known = json.loads(Path(cache).read_text())
    if known.get("state") != state:
        known = {"state": state, **_count_labels(data, files)}
        if cache:
            Path(cache).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(cache, json.dumps(known).encode(), shared=True)
    pixels = {split: Counter({int(value): count for value, count in counts.items()})
              for split, counts in known["pixels"].items()}
    return LabelScan(pixels, known["binary"], known["digest"])


def _state_of_labels(data, files):
    """A hash that changes if any label or the classes may have changed. No label is read."""
    meaning = data.name, data.classes, data.palette, data.class_of_value.tolist()
    state = hashlib.sha256(repr(meaning).encode())
    for split, path in files:
        status = path.stat()
        # copying tools can restore mtime, not ctime
        times = f"{status.st_mtime_ns} {status.st_ctime_ns}"
        state.update(f"{split} {path.absolute()} {status.st_size} {times}\n".encode())
    return state.hexdigest()


def _count_labels(data, files):
    """The fields of a LabelScan as a dict."""
    def look(file):
        _, path = file
        counts = np.bincount(data.read_label(path).ravel(), minlength=256)
        held = {int(value): int(counts[value]) for value in counts.nonzero()[0]}
        return held, hashlib.sha256(path.read_bytes()).hexdigest()

    found = in_threads(look, files, desc="reading labels", unit="labels")
    pixels, binary, digest = {}, Counter(), hashlib.sha256()
    for (split, path), (held, of_file) in zip(files, found):
        pixels.setdefault(split, Counter()).update(held)
        binary[split] += held.keys() == {0, IGNORE}
        if split != "test":  # test labels do not affect training
            digest.update(f"{split}/{_stem(path)} {of_file}\n".encode())
    return {"pixels": pixels, "binary": binary, "digest": digest.hexdigest()}


def judge_labels(data, scan):
    """Lines to print about labels that are readable and yet may not be what was meant.

    Raises InputError where train has fewer than two classes or val has nothing to score.
    """
    lines = []
    about_255 = ("255 means ignored. To make it a class: python data.py --convert OUT --dataset "
                 f'folder --data {data.root} --map "255={data.classes[1]}"')
    for split, pixels in scan.pixels.items():
        present = [name for k, name in enumerate(data.classes) if pixels[k]]
        absent = [name for name in data.classes if name not in present]
        binary = scan.binary[split]
        if not present and split != "test":
            raise InputError(f"{data.root}: no label of {split} has a labelled pixel: all are 255, "
                             "which means ignored; export the labels as class indices")
        if split == "train" and len(present) == 1:
            hint = about_255 if binary else "export them as class indices"
            raise InputError(f"{data.root}: the labels of train hold one class, {present[0]}, and "
                             f"two are needed; {hint}")
        if absent:
            effect = "they cannot be learned" if split == "train" else "they are not scored"
            lines.append(f"NOTE: classes without a pixel in {split}, {effect}: {', '.join(absent)}")
        if binary and data.name == "folder":
            lines.append(f"NOTE: {binary} of the {len(data.pairs[split])} labels of {split} hold "
                         f"only the values 0 and 255. {about_255}")
    return lines


# ---------------------------------------------------------------- data.py --check

def check(name, root):
    """Read every file of a data set, print each fault as one line, and what the labels hold.

    Raises InputError where there are faults.
    """
    data = open_dataset(name, root, missing_ok=True)

    def fault(item):
        try:
            data.read(*item)
        except InputError as e:
            return str(e)

    items = [(split, index) for split, pairs in data.pairs.items() for index in range(len(pairs))]
    found = in_threads(fault, items, desc="checking", unit="images")
    faults = [line for line in found if line]
    for line in faults:
        print(line)
    counts = ", ".join(f"{split}: {len(pairs)} images" for split, pairs in data.pairs.items())
    print(f"{counts}, {len(data.classes)} classes, {len(faults)} faulty")
    if faults:
        raise InputError(f"{len(faults)} faulty files are listed above; mend or remove them")
    scan = scan_labels(data)
    for split, pixels in scan.pixels.items():
        share = pixels[IGNORE] / pixels.total()
        print(f"{split}: {share:.1%} of the labels' pixels are ignored")
    for line in judge_labels(data, scan) or ["every class has a pixel in every split"]:
        print(line)
    for line in pictures_in_two_splits(data):
        print(line)


def pictures_in_two_splits(data):
    """One line, with an example, where two splits hold the same picture, byte for byte."""
    files = [(split, image) for split, pairs in data.pairs.items()
             for image, label in pairs if label]

    def digest(item):
        return hashlib.sha256(item[1].read_bytes()).digest()

    first, twice = {}, []
    for file, found in zip(files, in_threads(digest, files, desc="comparing", unit="images")):
        split, image = first.setdefault(found, file)
        if split != file[0]:
            twice.append((image, file[1]))
    if not twice:
        return []
    return [f"WARNING: pictures that are in two splits: {len(twice)}, for instance {twice[0][0]} "
            f"and {twice[0][1]}; scores will be too good, so keep each in one split"]


# ---------------------------------------------------------------- data.py --convert
# A code is what a pixel of a label holds: a value (int) or a colour (red, green, blue).

def convert(data, out, mapping):
    """Write a `folder` data set with index labels into the new folder `out`, all of it or nothing.

    mapping: code -> class index, as the user gave it. Pictures are copied. Raises InputError for
    codes without a class, and for labels that training could not use.
    """
    out = Path(out)
    if out.exists():
        raise InputError(f"{out}: exists already; give --convert the name of a new folder")
    triples = [(split, *pair) for split, pairs in data.pairs.items() for pair in pairs]
    labels = [label for _, _, label in triples if label]

    def count(label):
        codes, inverse = label_codes(data, label)
        return dict(zip(codes, np.bincount(inverse.ravel()).tolist()))

    seen = Counter()
    for counts in in_threads(count, labels, desc="reading labels", unit="labels"):
        seen.update(counts)
    class_of = class_of_code(data, seen, mapping)

    def write(triple):
        split, image, label = triple
        copy = part / "images" / split / image.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(image, copy)
        if label:
            codes, inverse = label_codes(data, label)
            indices = np.array([class_of[code] for code in codes], np.uint8)[inverse]
            target = part / "labels" / split / f"{image.stem}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(indices).save(target)

    with scratch(out) as part:
        in_threads(write, triples, desc=f"writing {out}", unit="pictures")
        _write_classes(part / "classes.txt", data.classes, data.palette)
        # what was written must be what training can use
        lines = judge_labels(data, scan_labels(open_dataset("folder", part)))
        os.rename(part, out)
    for line in lines:
        print(line)
    print(f"{out}: {len(labels)} labels as class indices, {len(triples)} pictures copied, "
          "classes.txt; use it as --dataset folder --data")


def label_codes(data, path):
    """The list of codes in a label, and for each pixel its index in that list (H,W).

    A palette is read by its colours only where its indices are not class indices. Raises
    InputError for what cannot be told without loss.
    """
    image = open_label(path)
    grey = image.mode in ("L", "1") or image.mode[0] == "I"
    if grey or image.mode == "P" and not misplaced_class(data, image):
        values = np.array(image).astype(np.int64)
        found, inverse = np.unique(values, return_inverse=True)
        return found.tolist(), inverse.reshape(values.shape)
    if image.mode not in ("RGB", "RGBA", "LA", "P"):
        raise InputError(f"{path}: mode {image.mode}, neither colours nor whole numbers; "
                         "export the label again, as PNG")
    if "A" in image.mode and image.getchannel("A").getextrema()[0] < 255:
        raise InputError(f"{path}: has transparent pixels, which are of no class; "
                         "export it without transparency")
    packed = np.array(image.convert("RGB")).astype(np.int64) @ (65536, 256, 1)
    found, inverse = np.unique(packed, return_inverse=True)
    colours = [(number >> 16, number >> 8 & 255, number & 255) for number in found.tolist()]
    return colours, inverse.reshape(packed.shape)


def class_of_code(data, seen, mapping):
    """A dict, code -> class index, of every code in `seen`.

    The class is that of `mapping`, else the colour's in classes.txt, else the value itself.
    seen: Counter, code -> pixels. mapping: code -> class index, as the user gave it. Raises
    InputError for what has no class or could have two, and for a code of `mapping` not in `seen`.
    """
    value_of = values_of_greys(data, seen, mapping)
    counts = Counter()
    for code, pixels in seen.items():
        counts[value_of.get(code, code)] += pixels

    class_of = {value: int(k) for value, k in enumerate(data.class_of_value) if k >= 0}
    class_of |= {colour: k for k, colour in enumerate(data.palette)}
    class_of |= mapping
    unknown = Counter({code: pixels for code, pixels in counts.items() if code not in class_of})
    if unknown:
        print("without a class, and their share of the pixels:")
        for code, pixels in unknown.most_common(12):
            print(f"  {code}  {pixels / counts.total():.1%}")
        raise InputError(
            f"{data.root}: {len(unknown)} values or colours without a class, the commonest are "
            "listed above; nothing was written; correct classes.txt, or name the classes of values "
            "with --map VALUE=CLASS, colours to be ignored with --ignore-colour R,G,B")
    if unused := [str(code) for code in mapping if code not in counts]:
        held = sorted(map(str, counts))
        raise InputError(f"{data.root}: no label holds {first_three(unused)}, found: "
                         f"{first_three(held)}; nothing was written; use --map for values, "
                         "--ignore-colour for colours")
    for value, k in mapping.items():
        others = [code for code in counts if isinstance(code, int) and code not in mapping
                  and class_of[code] == k != IGNORE]
        if others:
            raise InputError(f"--map {value}={k}: value {others[0]} is also {data.classes[k]}; "
                             f"add {others[0]}={k} if so, else choose another class")
    return {code: class_of[value_of.get(code, code)] for code in seen}


def values_of_greys(data, seen, mapping):
    """A dict, (v, v, v) -> v, where labels have no other colour than greys, else an empty one.

    Some programs write a value into three equal channels. Raises InputError where such a grey is
    the colour of another class, unless `mapping` says what the value means.
    """
    colours = [code for code in seen if isinstance(code, tuple)]
    if not all(map(is_grey, colours)):
        return {}
    value_of = {colour: colour[0] for colour in colours}
    for k, colour in enumerate(data.palette):
        value = value_of.get(colour, k)
        if value != k and value not in mapping:
            raise InputError(
                f"{data.root}: labels hold only greys, which are read as values, but the grey "
                f"{value} is the colour of {data.classes[k]}; if it means this class, add "
                f"--map {value}={k}")
    return value_of


def main():
    parser = Parser(description="Check a data set before hours are spent on it, or convert labels.")
    verb = parser.add_mutually_exclusive_group(required=True)
    verb.add_argument("--check", action="store_true", help="read every file, list every fault")
    verb.add_argument("--convert", metavar="OUT", help="write index labels into this new folder")
    parser.add_argument("--dataset", required=True, choices=DATASETS)
    parser.add_argument("--data", metavar="DIR", help="its folder (default: data/NAME)")
    parser.add_argument("--map", nargs="+", default=[], metavar="VALUE=CLASS",
                        help="of grey labels: name or index of the class, or ignore")
    parser.add_argument("--ignore-colour", nargs="+", default=[], metavar="R,G,B", type=_colour,
                        help="colours that become 255")
    args = parser.parse_args()
    if args.check and (args.map or args.ignore_colour):
        parser.error("--map and --ignore-colour go with --convert")
    if args.check:
        return check(args.dataset, args.data)
    if args.dataset != "folder":
        parser.error(f"--dataset {args.dataset}: its labels need no conversion; "
                     "--convert goes with --dataset folder")
    data = open_dataset("folder", args.data)
    ignored = dict.fromkeys(args.ignore_colour, IGNORE)
    convert(data, args.convert, _mapping(args.map, data.classes) | ignored)


def _colour(text):
    """A `type` for argparse: R,G,B as three numbers."""
    found = re.fullmatch(r"(\d+),(\d+),(\d+)", text)
    if not found or max(map(int, found.groups())) > 255:
        raise argparse.ArgumentTypeError(f"must be R,G,B with three numbers 0..255, not {text}")
    return tuple(map(int, found.groups()))


def _mapping(items, classes):
    """--map as a dict, value -> class index. Raises InputError."""
    mapping = {}
    for item in items:
        value, _, text = item.partition("=")
        meanings = {k for k, name in enumerate(classes) if text in (name, str(k))}
        if text in ("ignore", str(IGNORE)):
            meanings.add(IGNORE)
        if not value.isdecimal() or not meanings or int(value) in mapping:
            raise InputError(f"--map {item}: takes VALUE=CLASS once per value, with the class's "
                             f"name, its index 0 to {len(classes) - 1}, or ignore")
        if len(meanings) > 1:
            raise InputError(f"--map {item}: {text} is the name of a class and means something "
                             "else, too; give that class another name in classes.txt")
        mapping[int(value)] = meanings.pop()
    return mapping


# ---------------------------------------------------------------- downloads

@dataclass(frozen=True)
class Download:
    """An archive, its hash, and the folder in it that holds the data set."""
    url: str
    algorithm: str
    digest: str
    folder: str


DOWNLOADS = {
    "ade20k": Download("http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
                       "sha1", "219e1696abb36c8ba3a3afe7fb2f4b4606a897c7", "ADEChallengeData2016"),
    "voc": Download(DATASET_YEAR_DICT["2012"]["url"],
                    "md5", DATASET_YEAR_DICT["2012"]["md5"], "VOCdevkit"),
}


def download(name, root):
    """Fetch, verify and unpack DOWNLOADS[name] under `root`.

    Works beside the target and renames at the end, so that nothing partial is left. Raises
    InputError if the archive cannot be downloaded or unpacked, or its hash is wrong.
    """
    wanted = DOWNLOADS[name]
    root.mkdir(parents=True, exist_ok=True)
    archive = root / Path(wanted.url).name
    if not archive.exists():
        _fetch(wanted.url, archive)
    try:
        _verify(archive, wanted)
        print(f"unpacking {archive}", flush=True)
        with scratch(root / "unpacking") as part:
            # paths that leave `part` are skipped in a zip and refused in a tar
            safe = "data" if archive.suffix == ".tar" else None
            shutil.unpack_archive(archive, part, filter=safe)
            publish(part / wanted.folder, root / wanted.folder)
    except OSError as e:
        # where the folder is there, another process was first and has removed the archive
        if not (root / wanted.folder).is_dir():
            raise InputError(f"{archive}: cannot unpack it ({e}); "
                             "free some space or give --data a larger disk") from None
    archive.unlink(missing_ok=True)


def _fetch(url, archive):
    print(f"downloading {url} to {archive.parent}", flush=True)
    try:
        torch.hub.download_url_to_file(url, archive, progress=sys.stderr.isatty())
    except (OSError, ValueError, http.client.HTTPException) as e:
        raise InputError(f"{url}: cannot download it ({e}); "
                         f"get it elsewhere and unpack it in {archive.parent}") from None


def _verify(archive, wanted):
    """Delete a truncated or altered archive and raise InputError."""
    with open(archive, "rb") as f:
        found = hashlib.file_digest(f, wanted.algorithm).hexdigest()
    if found != wanted.digest:
        archive.unlink(missing_ok=True)
        raise InputError(
            f"{archive}: {wanted.algorithm} {found} instead of {wanted.digest}: deleted; run the "
            f"same command again, or get {wanted.url} elsewhere and unpack it in {archive.parent}")


# ---------------------------------------------------------------- errors and the console

class InputError(Exception):
    """A mistake in what the user gave: one line that names the file and the remedy, exit code 2."""


def command(main):
    """Run a script's `main`. What a user can mend is one line on stderr and an exit code."""
    # pythonw, for one, has no such streams: print to nowhere
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
        return
    except InputError as e:
        # errors from loader processes begin with a traceback
        code, message = 2, f"error: {str(e).rpartition('InputError: ')[2]}"
    except KeyboardInterrupt as e:
        code, message = 130, str(e) or "interrupted; run the same command again to continue"
    except BrokenPipeError:  # whoever read the output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as e:
        advice = what_to_do(e)
        if not advice:  # errors that no user can mend keep their traceback
            raise
        code, message = 2, f"error: {advice}"
    sys.stdout.flush()  # so that the message comes last, where both go to one file
    print(" ".join(message.split()), file=sys.stderr)
    sys.exit(code)


# Errors of the machine: phrases that identify them, and the advice.
LIMITS = (
    (("CUDA out of memory",), "out of GPU memory: lower --batch-size or --crop"),
    (("Too many open files", "ancdata"),
     "too many open files: take fewer --workers, --workers 0 for none, "
     "or raise the limit (ulimit -n)"),
    # whole phrases, because other libraries have limits called "shared memory", too
    (("Bus error", "unable to mmap", "unable to open shared memory object <",
      "unable to allocate shared memory", "unable to resize file <", "unable to write to file <"),
     "too little shared memory (/dev/shm) for the loader processes: take --workers 0, "
     "or start the container with more of it, as with --shm-size 8g"),
    (("DataLoader worker (pid", "ConnectionResetError", "EOFError"),
     "a loader process died (out of memory?): run the same command again with fewer --workers"),
)


def what_to_do(error):
    """One line about an error of the machine or its file system, "" for other errors."""
    text = f"{type(error).__name__}: {error}"
    for words, advice in LIMITS:
        if any(word in text for word in words):
            return advice
    name = getattr(error, "filename", None)
    if not name and getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        name = "the disk or /dev/shm (see --workers)"
    if name:
        return f"{name}: {error.strerror}; check the path, its permissions and the free space"
    return ""


# ---------------------------------------------------------------- options, bars, processes

class Parser(argparse.ArgumentParser):
    """argparse whose complaints are InputErrors."""

    def error(self, message):
        raise InputError(message)


def at_least(least, kind=int, below=math.inf):
    """A `type` for argparse: finite numbers from `least` up, less than `below`."""
    def number(text):
        value = kind(text)
        if not least <= value < below:  # NaN fails every comparison
            limit = "finite" if below == math.inf else f"below {below}"
            raise argparse.ArgumentTypeError(f"must be at least {least} and {limit}, not {text}")
        return value
    return number


def progress(iterable=None, disable=False, **kwargs):
    """tqdm's bar; none where stderr is no terminal."""
    return tqdm(iterable, disable=disable or None, dynamic_ncols=True, **kwargs)


def in_threads(function, items, **bar):
    """[function(item) for item in items] by several threads, with a bar. The first error is raised.

    It is faster for functions that read and decode files, because these let other threads run.
    """
    with ThreadPoolExecutor(min(32, 2 * (os.cpu_count() or 1))) as pool:
        return list(progress(pool.map(function, items), total=len(items), **bar))


def quiet_worker(_):
    """Workers ignore Ctrl-C: the main process saves, then ends them with SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def locked(folder):
    """Lock `folder`, which is created if missing. The lock also ends with the process.

    Raises InputError where another process holds it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as lock:
        try:
            _lock(lock)
        except OSError as e:
            if e.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                raise InputError(f"{folder}: another run is at work here; wait until it has ended, "
                                 "or choose another --out or --name") from None
            print(f"NOTE: {folder}: its file system has no locks ({e.strerror}), so that a second "
                  "run here would go unnoticed")
        yield


def _lock(file):
    if sys.platform == "win32":
        import msvcrt
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


# ---------------------------------------------------------------- files

def temporary_path(path):
    """A path beside `path` that no other process uses."""
    return path.with_name(f"{path.name}.part-{secrets.token_hex(4)}")


@contextmanager
def scratch(path):
    """A new folder beside `path`. It is deleted on exit, unless it was renamed."""
    part = temporary_path(path)
    part.mkdir(parents=True)
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)


def publish(part, folder):
    """Rename a complete folder to its place, unless another process was first."""
    try:
        os.rename(part, folder)
    except OSError:
        if not folder.is_dir():
            raise


def write_atomically(path, content, shared=False):
    """Write bytes beside `path`, sync, rename: a kill leaves the old file or the new one.

    shared: several processes may write it at once. Raises InputError where that fails.
    """
    path = Path(path)
    # With one writer the name is always the same, so that the next one overwrites what a kill left.
    part = temporary_path(path) if shared else path.with_name(f"{path.name}.part")
    try:
        with open(part, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        raise InputError(f"{path}: cannot write it ({e}); "
                         "free some space or choose another place") from None
    finally:
        with suppress(OSError):
            part.unlink()


def save_tensors(path, content):
    """torch.save of a dict, by write_atomically."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getbuffer())


# ---------------------------------------------------------------- weights

def load_checkpoint(path, keys=()):
    """The dict that torch.save wrote, if it holds tensors and plain values alone.

    Raises InputError if it is not one, or lacks one of `keys`.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: a folder; give the file in it, {path / 'last.pt'} for a run")
    try:
        # torchvision's training scripts save their options beside the weights
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give the path of a last.pt") from None
    except Exception as e:
        # other objects are not opened, because they can run code
        objects = re.search(r"GLOBAL (\S+)", str(e))
        reason = f"it holds objects of Python, {objects[1]}" if objects else str(e)[:80]
        raise InputError(f"{path}: not a readable checkpoint ({reason or 'empty'}); make it or get "
                         "it again, or save the network's state_dict() alone") from None
    missing = [k for k in keys if k not in state] if isinstance(state, dict) else ["dictionary"]
    if missing:
        raise InputError(f"{path}: not a checkpoint of this project: "
                         f"no {', '.join(missing)} in it; give a last.pt")
    return state


def read_weights(source, option):
    """A plain state dict from a file or a URL, downloaded once into torch.hub's cache, with a bar.

    The wrappers of training scripts are removed, and a printed line names them.
    """
    if "://" in str(source):
        saved = _download_weights(source, option)
    else:
        saved = load_checkpoint(source)
    state, left_out = unwrap(saved)
    if not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise InputError(f"{source}: not a plain state dict of tensors; {option} takes one")
    if left_out:
        print(f"{source}: unwrapped, leaving out {' and '.join(left_out)}")
    return state


def unwrap(state):
    """The state dict inside what was saved, and a list in words of what was left out."""
    left_out = []
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(state.get(key), dict):
            state = state[key]
            left_out.append(f"everything outside {key!r}")
    wrappers = ("module.", "_orig_mod.", "model.")  # DataParallel, torch.compile, Lightning
    while state:
        prefix = str(next(iter(state))).partition(".")[0] + "."
        if prefix not in wrappers or not all(str(k).startswith(prefix) for k in state):
            break
        state = {k.removeprefix(prefix): v for k, v in state.items()}
        left_out.append(f"the prefix {prefix!r}")
    return state, left_out


def _download_weights(source, option):
    # Hugging Face calls every model's file pytorch_model.bin: the cache needs the model's name, too
    name = Path(source).name
    if "/resolve/" in source:
        name = source.split("://")[1].split("/resolve/")[0].replace("/", "-") + ".bin"
    try:
        return torch.hub.load_state_dict_from_url(
            source, map_location="cpu", weights_only=True, file_name=name,
            check_hash="download.pytorch.org" in source)
    except Exception as e:
        raise InputError(f"{source}: cannot download it ({e}); fetch it elsewhere and save it as "
                         f"{torch.hub.get_dir()}/checkpoints/{name}, or start from random weights "
                         f"with {option} none") from None


def load_strictly(module, state, source, wanted, remedy, aside=()):
    """Fill `module` from a state dict of its own names and shapes.

    Tensors whose names begin with one of `aside` are left out, and their names are returned.
    Raises InputError, before changing anything, if `source` is not `wanted`.
    """
    left = sorted(k for k in state if k.startswith(tuple(aside)))
    needed = module.state_dict()
    # Old files lack BatchNorm's counters, which change no result.
    counters = {k: v for k, v in needed.items() if k.endswith("num_batches_tracked")}
    state = counters | {k: v for k, v in state.items() if k not in left}
    bad = [k for k in needed if _shape(state.get(k)) != _shape(needed[k])]
    bad += sorted(set(state) - set(needed))
    if bad:
        there, here = _shape(state.get(bad[0])), _shape(needed.get(bad[0]))
        raise InputError(f"{source}: not {wanted}: {len(bad)} tensors differ, the first is "
                         f"{bad[0]} (there {there}, here {here}); {remedy}")
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise InputError(f"{source}: {name} holds NaN or infinity; "
                             "give a file saved before its training went wrong")
    module.load_state_dict(state)
    return left


def _shape(tensor):
    return tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else "nothing"


if __name__ == "__main__":
    command(main)
