"""Data sets and their label maps, the stream of training crops, and what every script shares.

    python data.py --check --dataset folder --data DIR          # read everything, list every fault
    python data.py --convert OUT --dataset folder --data DIR    # other labels to class indices

Every label leaves this file as uint8 class indices with 255 = ignore, every image as uint8 RGB.
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
import traceback
import unicodedata
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torchvision.datasets import Cityscapes
from torchvision.datasets.voc import DATASET_YEAR_DICT
from tqdm import tqdm

DATASETS = ("shapes", "ade20k", "cityscapes", "voc", "folder")
IGNORE = 255
# the endings that Pillow reads without further packages
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".tif", ".tiff", ".webp", ".bmp", ".gif", ".ppm",
            ".pgm")
LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF")  # formats that can change the value of a pixel
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of RGB in 0..1
# differs: paper not stated, release pads crops with black, here with the mean colour, which is zero
# after normalising
MEAN_COLOUR = tuple(round(255 * m) for m in MEAN)

# name: (URL, hash, digest, folder inside the archive)
DOWNLOADS = {
    "ade20k": ("http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip", "sha1",
               "219e1696abb36c8ba3a3afe7fb2f4b4606a897c7", "ADEChallengeData2016"),
    "voc": (DATASET_YEAR_DICT["2012"]["url"], "md5", DATASET_YEAR_DICT["2012"]["md5"],
            "VOCdevkit"),
}
# labelIds value, name, colour; the row is the trainId
CITYSCAPES = tuple((c.id, c.name, c.color) for c in Cityscapes.classes if not c.ignore_in_eval)
VOC = ("background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
       "motorbike person pottedplant sheep sofa train tvmonitor").split()
SHAPES = "ground disc square triangle ring cross rod star".split()
SHAPES_COUNT = {"train": 1600, "val": 100, "test": 400}
SHAPES_SIZE = 64


@dataclass
class DataSet:
    """Where a data set's files are and what its label values mean.

    pairs: split -> [(image path, label path)], with None as the label of an image without one.
    palette: one RGB triple a class.
    lut: 256 entries, value on disk -> class index, 255 = ignore, -1 = a value that must not occur.
    """
    name: str
    classes: list
    palette: list
    pairs: dict
    lut: np.ndarray = field(repr=False)
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
                f"{image.width}x{image.height} (a turn in its EXIF data is obeyed); "
                "make the two the same size")
        return image, label

    def read_label(self, path):
        """Class indices (H,W) uint8. Raises InputError for a file that holds something else."""
        raw = open_label(path)
        if raw.mode not in ("L", "P", "1"):
            equal = ", three equal channels" if _is_grey(raw) else ""
            raise LabelInputError(
                f"{path}: mode {raw.mode}{equal}, but a label has one index byte a pixel; "
                f"convert it to class indices{self._verb()}")
        if ";" in raw.info["packing"] and raw.mode != "P":
            raise LabelInputError(
                f"{path}: a grey picture of 2 or 4 bits or inverted, whose values readers change; "
                f"save it with 8 bits a pixel or convert it to class indices{self._verb()}")
        if self.name == "folder" and raw.mode == "P" and (wrong := self.other_palette(raw)):
            raise LabelInputError(f"{path}: {wrong}; convert it to class indices{self._verb()}, "
                                  "or give it another palette")
        values = np.array(raw, dtype=np.uint8)
        label = self.lut[values]
        if (label < 0).any():
            found = zip(*np.unique(values[label < 0], return_counts=True))
            listed = ", ".join(f"{v} ({count} pixels)" for v, count in list(found)[:3])
            raise LabelInputError(
                f"{path}: label values outside the {len(self.classes)} classes: {listed}; "
                f"correct the label or add the class (255 = ignore){self._verb()}")
        return label.astype(np.uint8)

    def other_palette(self, raw):
        """What is wrong with the palette of a label, "" if nothing is.

        A program may have numbered the colours as it likes. That is so where half of them or more
        are of classes.txt, and not all with their own index, or where they are the greys of other
        classes' indices. Another palette, VOC's for instance, may lie over class indices.
        """
        flat = raw.getpalette("RGB")
        shown = {index: tuple(flat[3 * index:3 * index + 3])
                 for _, index in raw.getcolors() if index != IGNORE}
        known = {i: colour for i, colour in shown.items() if colour in self.palette}
        wrong = [i for i, colour in known.items() if [colour] != self.palette[i:i + 1]]
        if wrong and 2 * len(known) >= len(shown):
            name = self.classes[self.palette.index(known[wrong[0]])]
            return f"index {wrong[0]} has the colour of {name}, in classes.txt another class"
        greys = {i: red for i, (red, green, blue) in shown.items() if red == green == blue}
        wrong = [i for i, grey in greys.items() if grey != i and grey < len(self.classes)]
        if wrong and len(greys) == len(shown) and all(self.lut[g] >= 0 for g in greys.values()):
            return f"index {wrong[0]} shows the grey {greys[wrong[0]]}, another class's index"
        return ""

    def _verb(self):
        return " (python data.py --convert)" if self.name == "folder" else ""


def read_image(path):
    """A picture (PIL, RGB), turned as its EXIF tag says. Raises InputError naming the file."""
    image = _open(path)
    if image.mode[0] in "IF":  # Pillow would clip to 255
        raise InputError(f"{path}: mode {image.mode}, more than 8 bits a channel; save it with 8")
    with suppress(Exception):  # damaged EXIF data are no fault of the pixels
        ImageOps.exif_transpose(image, in_place=True)
    return image.convert("RGB")


def open_label(path):
    """A label as Pillow opens it. Raises InputError for formats that change values."""
    raw = _open(path)
    if raw.format in LOSSY or raw.info.get("compression") == "jpeg":
        raise InputError(f"{path}: holds {raw.format} data, whose compression changes colours and "
                         "indices; export the label again, as PNG")
    return raw


def _is_grey(image):
    """Whether all channels of a colour picture are equal."""
    if image.mode not in ("RGB", "RGBA", "LA"):
        return False
    red, green, blue = image.convert("RGB").split()
    return red == green == blue


def _open(path):
    try:
        image = Image.open(path)
        # "L;4" for four bits of grey: Pillow stretches such values, and forgets it on loading
        packing = image.tile[0][3] if image.tile else ""
        image.info["packing"] = packing if isinstance(packing, str) else str(packing[:1])
        image.load()
        return image
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; restore it or remove its partner") from None
    except Image.DecompressionBombError:
        limit = 2 * Image.MAX_IMAGE_PIXELS
        raise InputError(f"{path}: more than {limit:,} pixels; cut it into tiles") from None
    except (OSError, SyntaxError, ValueError) as e:
        if limit := limit_of_the_machine(e):
            raise InputError(limit) from None
        if getattr(e, "errno", None):  # the system's, not Pillow's
            raise InputError(f"{path}: {e.strerror}; check the path and its permissions") from None
        raise InputError(f"{path}: truncated or not an image ({e}); get it again") from None


# ---------------------------------------------------------------- the layouts of the data sets

def open_dataset(name, root=None, missing_ok=False):
    """The DataSet `name` under `root` (default data/NAME), made or downloaded where possible.

    name: shapes, ade20k, cityscapes, voc or folder. Raises InputError where files are missing.
    missing_ok leaves single files to `read`.
    """
    root = data_folder(name, root)
    if name == "shapes" and not root.is_dir():
        make_shapes(root)
    if name == "folder" and not root.is_dir():
        raise InputError(f"{root}: no such folder; "
                         "give --data a folder with images/, labels/ and classes.txt")
    layouts = {"shapes": _folder, "ade20k": _ade20k, "cityscapes": _cityscapes, "voc": _voc,
               "folder": _folder}
    return _complete(DataSet(name, *layouts[name](root), root), missing_ok)


def data_folder(name, root=None):
    """--data, by default data/NAME."""
    return Path(root or Path("data") / name)


def _complete(data, missing_ok=False):
    """The data set itself. Raises InputError for a split without images, or for missing files."""
    for split in ("train", "val"):
        if not data.pairs[split]:
            raise InputError(f"{data.root}: no image of the {split} split found; "
                             f"README shows the layout of {data.name}")
    if missing_ok:
        return data
    paths = (path for pairs in data.pairs.values() for pair in pairs for path in pair if path)
    missing = [path for path in paths if not path.is_file()]
    if missing:
        more = f" ({len(missing) - 1} more are missing)" if missing[1:] else ""
        raise InputError(f"{missing[0]}: no such file; restore it or remove its partner{more}")
    return data


def pictures(folder):
    """The pictures of a folder, sorted. What else lies there is named in a printed line.

    Hidden files are passed over: macOS leaves ._NAME beside NAME on other disks.
    """
    entries = sorted(p for p in folder.glob("*") if not p.name.startswith("."))
    found = [p for p in entries if p.suffix.lower() in SUFFIXES and not p.is_dir()]
    if others := [p.name for p in entries if p not in set(found)]:
        note(f"{folder}: {len(others)} left out, no picture that can be read here: {_some(others)}")
    return found


def _stem(path):
    """The name without its ending, in the one form of Unicode in which names are compared."""
    return unicodedata.normalize("NFC", path.stem)


def _by_stem(folder):
    """The pictures of a folder by name. Raises InputError where two share one."""
    found = {}
    for path in pictures(folder):
        other = found.setdefault(_stem(path), path)
        if other is not path:
            raise InputError(f"{folder}: two images are called {path.stem} but for the ending "
                             f"({other.name}, {path.name}); rename one and its partner")
    return found


def _pair_up(images, labels):
    """Every image of a folder with the label of its name, or with None where `labels` is None."""
    if labels is None:
        return [(path, None) for path in pictures(images)]
    images, found = _by_stem(images), _by_stem(labels)
    if alone := [label.name for stem, label in found.items() if stem not in images]:
        note(f"{labels}: {len(alone)} labels without a picture, not used: {_some(alone)}")
    return [(path, found.get(stem, labels / f"{path.stem}.png")) for stem, path in images.items()]


def _some(names):
    return ", ".join(names[:3]) + (" ..." if names[3:] else "")


def _lut(values):
    """Table in which values[k] -> k, 255 -> 255 and everything else -> -1 (not allowed)."""
    lut = np.full(256, -1, np.int16)
    lut[IGNORE] = IGNORE
    lut[list(values)] = np.arange(len(values))
    return lut


def voc_palette(n):
    """The PASCAL VOC colour map: the index's bits, three at a time, fill R, G, B from the top."""
    def channel(index, number):
        return sum((index >> (3 * bit + number) & 1) << (7 - bit) for bit in range(3))
    return [tuple(channel(index, number) for number in range(3)) for index in range(n)]


def _folder(root, labelmap=False):
    if labelmap and not (root / "classes.txt").is_file():
        classes, palette = _read_labelmap(root / "labelmap.txt")
    else:
        classes, palette = _read_classes(root / "classes.txt")
    pairs = {split: _pair_up(root / "images" / split, root / "labels" / split)
             for split in ("train", "val", "test")}
    pairs["unlabelled"] = _pair_up(root / "images" / "unlabelled", None)
    return classes, palette, pairs, _lut(range(len(classes)))


def _read_classes(path):
    """Names and colours of classes.txt."""
    if not path.is_file():
        cvat = "; --convert reads CVAT's labelmap.txt" \
            if path.with_name("labelmap.txt").is_file() else ""
        raise InputError(f"{path}: no such file; write one line a class: name R G B{cvat}")
    classes, palette = [], []
    for number, line in enumerate(_lines(path), 1):
        words = line.split()
        name, colour = " ".join(words[:-3]), words[-3:]
        if not name or not _is_colour(colour):
            raise InputError(f"{path}, line {number}: {line!r} is not 'name R G B' "
                             "with three numbers 0..255")
        classes.append(name)
        palette.append(tuple(int(c) for c in colour))
    return _possible(path, classes, palette)


def _read_labelmap(path):
    """Names and colours of CVAT's labelmap.txt, lines of name:R,G,B:parts:actions."""
    if not path.is_file():
        raise InputError(f"{path.parent}: neither classes.txt nor CVAT's labelmap.txt in it; "
                         "write classes.txt, one line a class: name R G B")
    classes, palette = [], []
    for number, line in enumerate(_lines(path), 1):
        if line.startswith("#") or not line.strip():
            continue
        name, _, rest = line.partition(":")
        colour = rest.partition(":")[0].split(",")
        if not name or not _is_colour(colour):
            raise InputError(f"{path}, line {number}: {line!r} is not 'name:R,G,B::'")
        classes.append(" ".join(name.split()))
        palette.append(tuple(int(c) for c in colour))
    return _possible(path, classes, palette)


def _write_classes(path, classes, palette):
    lines = (f"{name} {r} {g} {b}\n" for name, (r, g, b) in zip(classes, palette))
    path.write_text("".join(lines), encoding="utf-8")


def _lines(path):
    return path.read_text(encoding="utf-8-sig", errors="replace").splitlines()


def _is_colour(words):
    return len(words) == 3 and all(w.strip().isdecimal() and int(w) < 256 for w in words)


def _possible(path, classes, palette):
    if not 2 <= len(set(classes)) == len(classes) <= 255:
        raise InputError(f"{path}: {len(classes)} classes, {len(set(classes))} names; "
                         "2 to 255, all different, are possible")
    return classes, palette


def _ade20k(root):
    folder = root / DOWNLOADS["ade20k"][3]
    if not folder.is_dir():
        download("ade20k", root)
    info = folder / "objectInfo150.txt"
    rows = info.read_text().splitlines()[1:]
    names = [row.split("\t")[-1].split(",")[0].strip() for row in rows]
    if len(names) != 150:
        raise InputError(f"{info}: {len(names)} classes instead of 150; unpack the archive again")
    pairs = {short: _pair_up(folder / "images" / split, folder / "annotations" / split)
             for short, split in (("train", "training"), ("val", "validation"))}
    lut = _lut(range(1, 151))
    lut[0] = IGNORE  # "other objects", not evaluated
    lut[IGNORE] = -1
    return names, voc_palette(151)[1:], pairs, lut


def _cityscapes(root):
    if not (root / "gtFine").is_dir() or not (root / "leftImg8bit").is_dir():
        raise InputError(
            f"{root}: no leftImg8bit/ and gtFine/ in it; register at "
            "https://www.cityscapes-dataset.com/downloads, get leftImg8bit_trainvaltest.zip and "
            "gtFine_trainvaltest.zip, unpack both there")
    pairs = {split: _cityscapes_pairs(root, split)
             for split in ("train", "val")}  # the test split's labels are void: never scored
    values, names, palette = zip(*CITYSCAPES)
    lut = np.full(256, -1, np.int16)
    lut[:34] = IGNORE
    lut[list(values)] = np.arange(len(values))
    return list(names), list(palette), pairs, lut


def _cityscapes_pairs(root, split):
    images = sorted(p for p in (root / "leftImg8bit" / split).glob("*/*_leftImg8bit.png")
                    if not p.name.startswith("."))
    labels = (root / "gtFine" / split / p.parent.name
              / p.name.replace("_leftImg8bit", "_gtFine_labelIds") for p in images)
    return list(zip(images, labels))


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
    return VOC, voc_palette(21), pairs, _lut(range(21))


def _voc_pairs(folder, source, labels):
    words = source.read_text().split() if source.is_file() else []
    # some lists in circulation name both files of a pair
    ids = dict.fromkeys(Path(word).stem for word in words)
    return [(folder / "JPEGImages" / f"{i}.jpg", folder / labels / f"{i}.png") for i in ids]


# ---------------------------------------------------------------- what networks see

@lru_cache(maxsize=4)
def _order(seed, epoch, n):
    """The images of one epoch."""
    return np.random.default_rng([seed, epoch]).permutation(n)


class TrainStream(torch.utils.data.Dataset):
    """The endless stream of training crops; item `position` is a function of (seed, position).

    The stream runs through epochs, each a permutation of all images. An image is resized so that
    its short side is base * u, with u uniform in `scale`. It is cropped at random to crop x crop,
    padded on the right and at the bottom where it is smaller, and flipped with probability 1/2.
    With `unlabelled`, images without labels take part. The labelled ones are then repeated, all
    equally often, until they are at least as many.
    Returns image (3,crop,crop) uint8, label (crop,crop) uint8.
    """

    def __init__(self, data, seed, base, crop, scale, length, unlabelled=False):
        self.data, self.seed, self.length = data, seed, length
        self.base, self.crop, self.scale = base, crop, scale
        train = len(data.pairs["train"])
        self.unlabelled = len(data.pairs.get("unlabelled", ())) if unlabelled else 0
        self.labelled = train * max(1, -(-self.unlabelled // train))

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
        # differs: paper not stated, release draws the LONG side from 0.5-2.0 x 520, so that its
        # Cityscapes crops are mostly padding. Here the short side is drawn, around the size that
        # evaluation uses.
        s = self.base * rng.uniform(*self.scale) / min(image.size)
        size = [max(1, round(s * side)) for side in image.size]
        w, h = (min(self.crop, side) for side in size)
        x, y = (rng.integers(0, side - cut + 1) for side, cut in zip(size, (w, h)))
        sx, sy = image.width / size[0], image.height / size[1]
        box = (x * sx, y * sy, min((x + w) * sx, image.width), min((y + h) * sy, image.height))

        out = np.empty((self.crop, self.crop, 3), np.uint8)
        out[:] = MEAN_COLOUR
        out[:h, :w] = np.asarray(image.resize((w, h), Image.Resampling.BILINEAR, box))
        target = np.full((self.crop, self.crop), IGNORE, np.uint8)
        target[:h, :w] = Image.fromarray(label).resize((w, h), Image.Resampling.NEAREST, box)
        if rng.random() < 0.5:
            out, target = out[:, ::-1], target[:, ::-1]
        return torch.from_numpy(out.transpose(2, 0, 1).copy()), torch.from_numpy(target.copy())


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
            # Without room in shared memory this fails here, with an error that reaches the main
            # process. Left to the loader's own thread, the main process would wait for ever.
            for tensor in item:
                tensor.share_memory_()
        return item


def resize_short_side(image, base):
    """PIL image with its short side at `base` pixels, as networks see it in evaluation."""
    s = base / min(image.size)
    size = [max(1, round(s * side)) for side in image.size]
    return image.resize(size, Image.Resampling.BILINEAR)


def spread(total, count):
    """`count` indices, all if there are fewer, spread evenly: neighbours show the same scene."""
    count = min(count or total, total)
    return [i * total // count for i in range(count)]


def normalise(images):
    """uint8 RGB (B,3,H,W) -> float32, ImageNet mean 0 and deviation 1, on the images' device."""
    # plain numbers: a tensor made here would make the host wait for the GPU in every step
    channels = zip(images.unbind(1), MEAN, STD)
    return torch.stack([(x.float() / 255 - mean) / std for x, mean, std in channels], 1)


# ---------------------------------------------------------------- what the labels hold

@dataclass
class LabelScan:
    """What all labels hold, one entry a split.

    counts: pixels of each class index, int64 (256,), with the ignored ones at 255.
    labels: how many there are; empty: how many have no labelled pixel.
    binary: how many hold the indices 0 and 255 and no other.
    digest: sha256 of the names and bytes of train's and val's labels, wherever they lie.
    """
    counts: dict
    labels: dict
    empty: dict
    binary: dict
    digest: str


def scan_labels(data, cache=None):
    """Read every label of every split once, with a bar -> LabelScan.

    cache: a json file that keeps what was read. Only labels whose path, size or time of change
    are not in it are read again. Raises InputError for the first label that cannot be used.
    """
    splits = {split: [label for _, label in pairs if label] for split, pairs in data.pairs.items()}
    splits = {split: labels for split, labels in splits.items() if labels}
    known = _read_cache(cache, data) if cache else {}

    def look(path):
        stamp = _stamp(path)
        old = known.get(os.path.abspath(path))
        return old if old and old["stamp"] == stamp else _look(data, path, stamp)

    paths = [label for labels in splits.values() for label in labels]
    found = dict(zip(paths, in_threads(look, paths, desc="reading labels", unit="labels")))
    entries = {os.path.abspath(path): entry for path, entry in found.items()}
    if cache and entries != known:
        Path(cache).parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"reading": _reading(data), "labels": entries})
        write_atomically(cache, text.encode(), shared=True)
    return _summary(splits, found)


def _look(data, path, stamp):
    """What one label holds, as it is kept in the cache."""
    counts = np.bincount(data.read_label(path).ravel(), minlength=256)
    return {"stamp": stamp, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "pixels": {str(value): int(counts[value]) for value in counts.nonzero()[0]}}


def _summary(splits, found):
    scan, digest = LabelScan({}, {}, {}, {}, ""), hashlib.sha256()
    for split, labels in splits.items():
        pixels = [found[path]["pixels"] for path in labels]
        total = sum(map(Counter, pixels), Counter())
        scan.counts[split] = np.array([total[str(value)] for value in range(256)])
        scan.labels[split] = len(labels)
        scan.empty[split] = sum(set(held) == {"255"} for held in pixels)
        scan.binary[split] = sum(set(held) == {"0", "255"} for held in pixels)
        if split != "test":  # new labels to test on change nothing that was trained
            lines = (f"{split}/{_stem(path)} {found[path]['sha256']}\n" for path in labels)
            digest.update("".join(lines).encode())
    scan.digest = digest.hexdigest()
    return scan


def _stamp(path):
    try:
        status = path.stat()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; restore it or remove its partner") from None
    return [status.st_size, status.st_mtime_ns]


def _reading(data):
    """What else decides how a label is read."""
    means = repr((1, data.name, data.classes, data.palette, data.lut.tolist()))
    return hashlib.sha256(means.encode()).hexdigest()


def _read_cache(path, data):
    try:
        content = json.loads(Path(path).read_text())
        return content["labels"] if content["reading"] == _reading(data) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def judge_labels(data, scan):
    """Lines to print about labels that are readable and yet may not be what was meant.

    Raises InputError where train has fewer than two classes or val has nothing to score.
    """
    lines = []
    for split, counts in scan.counts.items():
        present = [name for name, count in zip(data.classes, counts) if count]
        absent = [name for name in data.classes if name not in present]
        if not present and split != "test":
            raise InputError(f"{data.root}: no label of {split} has a labelled pixel: all are 255, "
                             "which means ignored; export the labels as class indices")
        if split == "train" and len(present) == 1:
            hint = _about_255(data) if scan.binary[split] else "export them as class indices"
            raise InputError(f"{data.root}: the labels of train hold one class, {present[0]}, and "
                             f"two are needed; {hint}")
        if absent:
            effect = "they cannot be learned" if split == "train" else "they are not scored"
            lines.append(f"NOTE: classes without a pixel in {split}, {effect}: {', '.join(absent)}")
        some = f"of the {scan.labels[split]} labels of {split}"
        if scan.empty[split]:
            lines.append(f"NOTE: {scan.empty[split]} {some} have no labelled pixel: all are 255, "
                         "which means ignored")
        if scan.binary[split] and data.name == "folder":
            lines.append(f"NOTE: {scan.binary[split]} {some} hold only the values 0 and 255. "
                         f"{_about_255(data)}")
    return lines


def _about_255(data):
    return ("255 means ignored. To make it a class: python data.py --convert OUT --dataset folder "
            f'--data {data.root} --map "255={data.classes[1]}"')


# ---------------------------------------------------------------- data.py --check

def check(data):
    """Read every file of every split and print each fault as one line.

    Returns how many pairs are faulty, and a Counter of what the labels among them hold instead of
    class indices: colours (red, green, blue), or values where they are grey.
    """
    def fault(pair):
        try:
            data.read(*pair)
        except InputError as e:
            return e

    faults, held = 0, Counter()
    for split, pairs in data.pairs.items():
        places = [(split, index) for index in range(len(pairs))]
        found = in_threads(fault, places, desc=f"checking {split}", unit="images")
        for (_, label), error in zip(pairs, found):
            if error:
                faults += 1
                print(error)
            if isinstance(error, LabelInputError):
                with suppress(InputError):  # the fault is printed already
                    held += _held(data, label)
    return faults, held


def _held(data, path):
    """How often each colour (red, green, blue) or grey value occurs in a label."""
    kind, codes = label_codes(data, path)
    codes = zip(*(part.tolist() for part in np.unique(codes, return_counts=True)))
    return Counter({_colour(code) if kind == "colour" else code: count for code, count in codes})


def _show(data, held, total, most=12):
    """Print the commonest colours or values, their share of all pixels and what they stand for."""
    known = dict(enumerate(data.classes)) | {IGNORE: "ignored"}
    for colour, name in zip(data.palette, data.classes):
        known[colour] = f"{known[colour]} and {name}" if colour in known else name
    for what, count in held.most_common(most):
        print(f"  {what}  {count / total:.1%}  {known.get(what, 'not in classes.txt')}")
    if len(held) > most:
        print(f"  and {len(held) - most} more")


def _shared_colours(data):
    """A sentence on classes that colours cannot tell apart, "" if there are none."""
    groups = [[name for name, own in zip(data.classes, data.palette) if own == colour]
              for colour in dict.fromkeys(data.palette)]
    groups = [" and ".join(names) for names in groups if len(names) > 1]
    return f"classes of one colour: {'; '.join(groups)}" if groups else ""


# ---------------------------------------------------------------- data.py --convert

def convert(data, out, mapping=None, ignored=()):
    """Write a `folder` data set with index labels into the new folder `out`, all of it or nothing.

    Colour pictures and palettes are read by the colours of the classes, grey ones by their values.
    Three equal channels are one value, unless all their colours are those of classes.
    mapping: value -> class index, for grey labels. ignored: colours (red, green, blue) that become
    255. Labels that hold class indices already stay as they are; pictures are copied.
    Raises InputError for colours or values without a class, which are listed first.
    """
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out}: exists already; give --convert the name of a new folder")
    pairs = [(split, *pair) for split, some in data.pairs.items() for pair in some]
    labels = [label for _, _, label in pairs if label]
    seen = {"value": Counter(), "colour": Counter()}
    survey = partial(_held, data)
    for held in in_threads(survey, labels, desc="reading labels", unit="labels"):
        for what, count in held.items():
            seen["colour" if isinstance(what, tuple) else "value"][what] += count
    table = _conversion(data, seen, mapping or {}, ignored)

    part = own_name(out)
    try:
        def write(item):
            split, image, label = item
            _copy(image, part / "images" / split / image.name)
            if label:
                target = part / "labels" / split / f"{image.stem}.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(_converted(data, label, table)).save(target)

        in_threads(write, pairs, desc=f"writing {out}", unit="pictures")
        _write_classes(part / "classes.txt", data.classes, data.palette)
        # what was written must be what training can use
        written = open_dataset("folder", part)
        lines = judge_labels(replace(written, root=data.root), scan_labels(written))
        if not publish(part, out):
            raise InputError(f"{out}: another process has made it; give another name")
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print("\n".join([*lines, f"{out}: {len(labels)} labels as class indices, {len(pairs)} pictures "
                     "copied, classes.txt; use it as --dataset folder --data"]))


def label_codes(data, path):
    """What a label file holds: "value" or "colour", and one number a pixel, int64 (H,W).

    A colour is 65536 red + 256 green + blue. A palette is read by its colours only where its
    indices are not class indices. Raises InputError for what cannot be told without loss.
    """
    image = open_label(path)
    packing = image.info["packing"]
    stretched = {"L;2": 85, "L;4": 17}  # undo what Pillow does to 2 or 4 bits
    inverted = image.mode in ("L", "1") and ";" in packing and packing not in stretched
    if image.mode == "F" or inverted:
        raise InputError(f"{path}: fractions or inverted values ({image.mode} {packing}), which "
                         "are no class indices; export the label again, as PNG")
    if image.mode in ("L", "1") or image.mode[0] == "I":
        stretch = stretched.get(packing, 1)
        return "value", np.array(image).astype(np.int64) // stretch
    if image.mode == "P" and not data.other_palette(image):
        return "value", np.array(image).astype(np.int64)
    if image.mode in ("LA", "RGBA") and image.getchannel("A").getextrema()[0] < 255:
        raise InputError(f"{path}: has transparent pixels, which are of no class; "
                         "export it without transparency")
    return "colour", np.array(image.convert("RGB")).astype(np.int64) @ (65536, 256, 1)


def _conversion(data, seen, mapping, ignored):
    """The class index of every value and colour in `seen`, each a dict. Raises InputError."""
    if both := [colour for colour in ignored if colour in data.palette]:
        name = data.classes[data.palette.index(both[0])]
        raise InputError(f"--ignore-colour {','.join(map(str, both[0]))}: the colour of {name}; "
                         "take that class out of classes.txt first")
    greys = {colour for colour in seen["colour"] if len(set(colour)) == 1}
    by_value = greys == set(seen["colour"]) and not ignored and (
        mapping or not greys <= set(data.palette))
    if greys == set(seen["colour"]) and not by_value and not mapping:
        _refuse_ambiguous(data, greys)
    values = seen["value"] + Counter(
        {colour[0]: seen["colour"][colour] for colour in greys if by_value})
    of_value = _map_values(data, values, mapping)
    if by_value:
        return {"value": of_value, "colour": {colour: of_value[colour[0]] for colour in greys}}

    if seen["colour"] and (shared := _shared_colours(data)):
        raise InputError(f"{data.root}: {shared}; give each class a colour of its own")
    of_colour = {colour: k for k, colour in enumerate(data.palette)}
    of_colour |= dict.fromkeys(ignored, IGNORE)
    _refuse_unknown(data, seen["colour"], of_colour, "colours that classes.txt lacks",
                    "correct classes.txt, or name those to be ignored with --ignore-colour R,G,B")
    return {"value": of_value, "colour": of_colour}


def _map_values(data, values, mapping):
    """The class index of every value: as `mapping` says, else the value itself."""
    if unused := [value for value in mapping if value not in values]:
        raise InputError(f"--map {unused[0]}=...: no label holds the value {unused[0]}; "
                         f"they hold {_some([str(v) for v in sorted(values)])}")
    of_value = {v: int(data.lut[v]) for v in values if v <= 255 and data.lut[v] >= 0} | mapping
    _refuse_unknown(data, values, of_value, f"values outside the {len(data.classes)} classes",
                    "name their classes with --map VALUE=CLASS, or VALUE=ignore")
    targets = {k: value for value, k in mapping.items() if k != IGNORE}
    for value in values.keys() - mapping.keys():
        if of_value[value] in targets:
            other = targets[of_value[value]]
            k = of_value[value]
            raise InputError(f"--map {other}={k}: the value {value} means this class, too; "
                             f"if so, add {value}={k}, else map it elsewhere")
    return of_value


def _refuse_unknown(data, found, known, what, remedy):
    unknown = Counter({k: count for k, count in found.items() if k not in known})
    if unknown:
        share = unknown.total() / found.total()
        print(f"{what}, and their share of the pixels:")
        _show(data, unknown, found.total())
        raise InputError(f"{data.root}: {len(unknown)} {what}, {share:.2%} of the pixels, are "
                         f"listed above; nothing was written; {remedy}")


def _refuse_ambiguous(data, greys):
    """Three equal channels may be colours of classes and indices of other ones."""
    for grey in sorted(greys):
        if grey[0] < len(data.classes) and data.palette.index(grey) != grey[0]:
            by_colour, by_value = data.classes[data.palette.index(grey)], data.classes[grey[0]]
            raise InputError(f"{data.root}: the grey {grey[0]} is the colour of {by_colour} and "
                             f"the index of {by_value}; say which with --map {grey[0]}=CLASS")


def _converted(data, path, table):
    """The class indices (H,W) uint8 of one label."""
    kind, codes = label_codes(data, path)
    values, places = np.unique(codes, return_inverse=True)
    values = map(_colour, values.tolist()) if kind == "colour" else values.tolist()
    return np.array([table[kind][v] for v in values], np.uint8)[places].reshape(codes.shape)


def _colour(code):
    return code >> 16, code >> 8 & 255, code & 255


def _copy(path, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)


# ---------------------------------------------------------------- the command line

def main():
    parser = Parser(description="Check a data set before hours are spent on it, or convert labels.")
    verb = parser.add_mutually_exclusive_group(required=True)
    verb.add_argument("--check", action="store_true", help="read every file, list every fault")
    verb.add_argument("--convert", metavar="OUT", help="write index labels into this new folder")
    parser.add_argument("--dataset", required=True, choices=DATASETS)
    parser.add_argument("--data", metavar="DIR", help="its folder (default: data/NAME)")
    parser.add_argument("--map", nargs="+", default=[], metavar="VALUE=CLASS",
                        help="of grey labels: name or index of the class, or ignore")
    parser.add_argument("--ignore-colour", nargs="+", default=[], metavar="R,G,B", type=_triple,
                        help="colours that become 255")
    args = parser.parse_args()
    if args.check and (args.map or args.ignore_colour):
        parser.error("--map and --ignore-colour go with --convert")
    if args.check:
        return _check_command(args.dataset, args.data)
    if args.dataset != "folder":
        raise InputError(f"--dataset {args.dataset}: its labels need no conversion; "
                         "--convert goes with --dataset folder")
    root = data_folder("folder", args.data)
    data = _complete(DataSet("folder", *_folder(root, labelmap=True), root))
    convert(data, args.convert, _mapping(args.map, data.classes), args.ignore_colour)


def _check_command(name, root):
    data = open_dataset(name, root, missing_ok=True)
    faults, held = check(data)
    if held and name == "folder":
        print(f"{len(held)} colours or values in labels that hold no class indices, "
              "the commonest and their share:")
        _show(data, held, held.total())
        print(f"python data.py --convert OUT --dataset folder --data {data.root}\n"
              "writes class indices into the new folder OUT")
    if shared := name == "folder" and _shared_colours(data):
        print(f"NOTE: {shared}; neither colour labels nor pictures can tell them apart")
    counts = ", ".join(f"{split}: {len(pairs)} images" for split, pairs in data.pairs.items())
    print(f"{counts}, {len(data.classes)} classes, {faults} faulty")
    if faults:
        raise InputError(f"{faults} faulty files are listed above; mend or remove them")
    scan = scan_labels(data)
    for split, counts in scan.counts.items():
        print(f"{split}: {counts[IGNORE] / counts.sum():.1%} of the labels' pixels are ignored")
    print("\n".join(judge_labels(data, scan) or ["every class has a pixel in every split"]))


def _triple(text):
    colour = text.split(",")
    if not _is_colour(colour):
        raise argparse.ArgumentTypeError(f"must be R,G,B with three numbers 0..255, not {text}")
    return tuple(map(int, colour))


def _mapping(items, classes):
    """--map as a dict, value -> class index. Raises InputError."""
    known = {str(k): k for k in range(len(classes))}
    known |= {name: k for k, name in enumerate(classes)} | {"ignore": IGNORE, "255": IGNORE}
    mapping = {}
    for item in items:
        value, _, name = item.partition("=")
        if not value.isdecimal() or name not in known or int(value) in mapping:
            raise InputError(f"--map {item}: takes VALUE=CLASS once a value, with the class's "
                             f"name, its index 0 to {len(classes) - 1}, or ignore")
        mapping[int(value)] = known[name]
    return mapping


# ---------------------------------------------------------------- shapes, the embedded data set

def make_shapes(root, seed=0):
    """Draw `shapes`, in the layout of `folder`; picture i depends on (seed, split, i) alone."""
    part = own_name(root)
    try:
        for number, (split, count) in enumerate(SHAPES_COUNT.items()):
            for kind in ("images", "labels"):
                (part / kind / split).mkdir(parents=True)
            for i in progress(range(count), desc=f"drawing {root}, {split}", unit="pictures"):
                image, label = draw_shapes(seed, 1_000_000 * number + i)
                image.save(part / "images" / split / f"{i:04d}.png", compress_level=1)
                label.save(part / "labels" / split / f"{i:04d}.png")
        _write_classes(part / "classes.txt", SHAPES, voc_palette(len(SHAPES)))
        publish(part, root)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def draw_shapes(seed, index, size=SHAPES_SIZE):
    """One scene of `shapes` -> (RGB image, index label), both PIL, size x size.

    Seven kinds of object lie on a mottled ground and hide one another: disc (plain), square
    (checks), triangle (stripes across), ring (grain), cross (stripes along), rod (thin), star
    (rare). Their outlines turn and their colours vary: hue is a weak hint, texture a strong one.
    A one-pixel border round objects is ignored.
    """
    rng = np.random.default_rng([seed, index])
    yy, xx = np.mgrid[:size, :size]
    ground = _paint(rng, rng.random())
    canvas = ground + rng.normal(0, 8, (size // 8, size // 8, 3)).repeat(8, 0).repeat(8, 1)
    label = np.zeros((size, size), np.uint8)
    weights = np.array([1, 1, 1, 1, 1, 1, 0.4])
    for _ in range(rng.integers(4, 7)):
        kind = int(rng.choice(np.arange(1, 8), p=weights / weights.sum()))
        name = SHAPES[kind]
        mask = _outline(name, rng, size)
        solid = np.asarray(mask) > 0
        colours = [_paint(rng, kind / 7 + rng.normal(0, 0.08)) for _ in range(2)]
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


def _paint(rng, hue):
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


# ---------------------------------------------------------------- downloads

def download(name, root):
    """Fetch, verify and unpack DOWNLOADS[name] under `root`.

    Everything is made beside its place and renamed when complete. Raises InputError when it cannot
    be had or its hash is wrong; nothing partial is left.
    """
    url, algorithm, digest, folder = DOWNLOADS[name]
    root.mkdir(parents=True, exist_ok=True)
    archive = root / Path(url).name
    if not archive.exists():
        _fetch(url, archive)
    try:
        with open(archive, "rb") as f:
            found = hashlib.file_digest(f, algorithm).hexdigest()
        if found != digest:  # a truncated or altered transfer
            archive.unlink(missing_ok=True)
            raise InputError(
                f"{archive}: {algorithm} {found} instead of {digest}: deleted; run the same "
                f"command again, or get {url} elsewhere and unpack it in {root}")
        _unpack(archive, folder)
    except OSError as e:
        if not (root / folder).is_dir():  # else another process was first, and removed the archive
            raise InputError(f"{archive}: cannot unpack it ({e}); "
                             "free some space or give --data a larger disk") from None
    archive.unlink(missing_ok=True)


def _unpack(archive, folder):
    print(f"unpacking {archive}", flush=True)
    part = own_name(archive.parent / "unpacking")
    # neither form writes outside `part`: of a zip, members that lead there are left out, a tar with
    # such members is refused
    how = {} if archive.suffix == ".zip" else {"filter": "data"}
    try:
        shutil.unpack_archive(archive, part, **how)
        publish(part / folder, archive.parent / folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _fetch(url, archive):
    print(f"downloading {url} to {archive.parent}", flush=True)
    part = own_name(archive)
    try:
        with urllib.request.urlopen(url, timeout=60) as reply, open(part, "wb") as f:
            size = int(reply.headers.get("Content-Length") or 0)
            with progress(total=size or None, unit="B", unit_scale=True) as bar:
                while block := reply.read(2 ** 20):
                    f.write(block)
                    bar.update(len(block))
        os.replace(part, archive)
    except (OSError, ValueError, http.client.HTTPException) as e:
        raise InputError(f"{url}: cannot download it ({e}); "
                         f"get it elsewhere and unpack it in {archive.parent}") from None
    finally:
        part.unlink(missing_ok=True)


# ---------------------------------------------------------------- errors and the console

class InputError(Exception):
    """A mistake in what the user gave: one line that names the file and the remedy, exit code 2."""


class LabelInputError(InputError):
    """A label file that holds something else than the classes' indices, colours for instance."""


class Console:
    """A text stream that ends no work: it replaces what it cannot show, drops what it cannot write.

    stream: sys.stdout or sys.stderr, None or closed where the program was started without.
    """

    def __init__(self, stream):
        usable = stream is not None and not stream.closed
        self.stream = stream if usable else open(os.devnull, "w")
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="backslashreplace")

    def write(self, text):
        with suppress(OSError, ValueError):  # a closed pipe, a lost terminal, a full disk
            self.stream.write(text)
        return len(text)

    def flush(self):
        with suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def command(main):
    """Run a script's `main`. What a user can mend is one line on stderr and an exit code."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(Console, streams)
    try:
        code, message = _run(main)
        sys.stdout.flush()  # so that the message comes last, where both go to one file
        if message:
            print(" ".join(message.split()), file=sys.stderr)
    finally:
        sys.stdout, sys.stderr = streams
        for stream in streams:
            _let_go(stream)
    if code:
        sys.exit(code)


def _run(main):
    """Exit code and message of `main`. Errors that nobody can mend keep their traceback."""
    try:
        main()
        return 0, ""
    except InputError as e:  # a loader process puts its traceback in front
        return 2, f"error: {str(e).rpartition('InputError: ')[2]}"
    except torch.cuda.OutOfMemoryError as e:
        reason = str(e).splitlines()[0]
        return 2, f"error: out of GPU memory ({reason}): lower --batch-size or --crop"
    except KeyboardInterrupt as e:
        return 130, str(e) or "interrupted; run the same command again to continue"
    except (OSError, RuntimeError, EOFError) as e:
        message = limit_of_the_machine(e) or _fault_of_the_system(e)
        if not message:
            raise
        return 2, f"error: {message}"


def _let_go(stream):
    """Leave nothing in a stream that Python would fail to write at its end."""
    try:
        if stream:
            stream.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# of torch's shared memory; other libraries have limits of that name, too
SHARED_MEMORY = ("Bus error", "unable to mmap", "unable to open shared memory object <",
                 "unable to allocate shared memory", "unable to resize file <",
                 "unable to write to file <")


def limit_of_the_machine(error):
    """What to do about an error that comes from a limit of the machine, "" for other errors."""
    text, number = str(error), getattr(error, "errno", None)
    if number in (errno.EMFILE, errno.ENFILE) or "Too many open files" in text or "ancdata" in text:
        return ("too many open files: take fewer --workers, --workers 0 for none, "
                "or raise the limit (ulimit -n)")
    loading = any("torch/utils/data" in frame.filename.replace(os.sep, "/")
                  for frame in traceback.extract_tb(error.__traceback__))
    if any(words in text for words in SHARED_MEMORY) or loading and number == errno.ENOSPC:
        return ("too little shared memory (/dev/shm) for the loader processes: take --workers 0, "
                "or start the container with more of it, as with --shm-size 8g")
    cut_off = loading and isinstance(error, (ConnectionError, EOFError))
    if cut_off or "DataLoader worker (pid" in text:
        return ("a loader process died (out of memory?): "
                "run the same command again with fewer --workers")
    return ""


def _fault_of_the_system(error):
    if not isinstance(error, OSError):
        return ""
    if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return ""  # nothing to mend in a path or on the disk: the traceback says more
    return (f"{error.filename or 'output'}: {error.strerror}; "
            "check the path, its permissions and the free space")


@lru_cache(maxsize=None)
def note(text):
    """Print a NOTE, once however often a data set is opened."""
    print(f"NOTE: {text}")


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
    disable = disable or sys.stderr is None
    return tqdm(iterable, disable=disable or None, dynamic_ncols=True, **kwargs)


def in_threads(function, items, **bar):
    """[function(item) for item in items] by several threads, with a bar. The first error is raised.

    Decoding and reading files let other threads run.
    """
    pool = ThreadPoolExecutor(min(32, 2 * (os.cpu_count() or 1)))
    try:
        return list(progress(pool.map(function, items), total=len(items), **bar))
    finally:
        pool.shutdown(cancel_futures=True)


LOCKS = set()  # the open files of `locked`


def quiet_worker(_):
    """For loader processes: Ctrl-C and the lock of a run are the main process's business.

    Ctrl-C reaches the whole group, but the main process saves and then ends the others. SIGTERM is
    what it ends them with. A lock that they held, too, would outlive the main process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for lock in LOCKS:
        lock.close()


@contextmanager
def locked(folder):
    """Within it no other process works in `folder`, which is made. The lock dies with the process.

    Raises InputError where another process is at work there.
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
            note(f"{folder}: its file system has no locks ({e.strerror}), so that a second run "
                 "here would go unnoticed")
        LOCKS.add(lock)
        try:
            yield
        finally:
            LOCKS.discard(lock)


def _lock(file):
    if sys.platform == "win32":
        import msvcrt
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


# ---------------------------------------------------------------- files

def own_name(path):
    """A name beside `path` that no other process uses."""
    return path.with_name(f"{path.name}.part-{secrets.token_hex(4)}")


def publish(part, folder):
    """Rename a complete folder to its place -> True; False where another process was first."""
    try:
        if os.name == "nt" and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()  # elsewhere an empty folder is replaced
        os.rename(part, folder)
        return True
    except OSError:
        if not folder.is_dir():
            raise
        return False


def write_atomically(path, content, shared=False):
    """Write bytes beside `path`, sync, rename: a kill leaves the old file or the new one.

    shared: several processes may write the file at once.
    """
    path = Path(path)
    part = own_name(path) if shared else path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        with suppress(OSError):
            part.unlink()
        raise InputError(f"{path}: cannot write it ({e}); "
                         "free some space or choose another place") from None


def save_tensors(path, content):
    """torch.save of a dict, by write_atomically."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getbuffer())


# ---------------------------------------------------------------- weights

def load_checkpoint(path, keys=()):
    """Our own checkpoint as a dict, tensors and plain values only.

    Raises InputError if it is not one, or lacks one of `keys`.
    """
    state = _load(path)
    missing = [k for k in keys if k not in state] if isinstance(state, dict) else ["dictionary"]
    if missing:
        raise InputError(f"{path}: not a checkpoint of this project: "
                         f"no {', '.join(missing)} in it; give a last.pt")
    return state


def _load(path):
    """What a file of torch.save holds. Raises InputError that names the cause."""
    path = Path(path)
    if path.is_dir():
        inside = path / "last.pt"
        example = f", {inside}" if inside.is_file() else ", for a run its last.pt"
        raise InputError(f"{path}: a folder; give the file in it{example}")
    try:
        # torchvision's training scripts save their options beside the weights
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give the path of a last.pt") from None
    except Exception as e:
        raise InputError(f"{path}: not a readable checkpoint {_why_unreadable(path, e)}") from None


def _why_unreadable(path, error):
    text = str(error)
    if found := re.search(r"GLOBAL (\S+)", text):
        return (f"(it holds objects of Python, {found[1]}, which are not opened here); "
                "save the network's state_dict() alone")
    if "TorchScript" in text:
        return "(it is a TorchScript program); save the network's state_dict()"
    again = "train again" if path.name == "last.pt" else "get it again"
    return f"({' '.join(text.split())[:80] or 'empty'}); {again} or give another"


def read_weights(source, option):
    """A plain state dict from a file or a URL, downloaded once into torch.hub's cache, with a bar.

    What training scripts and wrappers put round it is taken off, and a printed line says so.
    """
    state, taken_off = unwrap(_download_weights(source, option) if "://" in str(source)
                              else load_checkpoint(source))
    if not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise InputError(f"{source}: not a plain state dict of tensors; {option} takes one")
    if taken_off:
        print(f"{source}: read without {', '.join(taken_off)}")
    return state


def unwrap(state):
    """The state dict inside of what was saved, and words for what was round it."""
    taken_off = []
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(state.get(key), dict):
            state = state[key]
            taken_off.append(f"what surrounds its {key!r}")
    prefix = True
    while prefix:  # DataParallel, torch.compile, Lightning, in any order
        prefix = next((p for p in ("module.", "_orig_mod.", "model.")
                       if state and all(str(k).startswith(p) for k in state)), None)
        if prefix:
            state = {k.removeprefix(prefix): v for k, v in state.items()}
            taken_off.append(f"the prefix {prefix!r}")
    return state, taken_off


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

    What begins with one of `aside` is left aside, and the names of it are returned. Raises
    InputError, that `source` does not hold what is `wanted`, before anything is changed.
    """
    left = sorted(k for k in state if k.startswith(tuple(aside)))
    needed = module.state_dict()
    # old files lack num_batches_tracked
    counters = {k: v for k, v in needed.items() if k.endswith("num_batches_tracked")}
    state = counters | {k: v for k, v in state.items() if k not in left}
    bad = [k for k in needed if getattr(state.get(k), "shape", None) != needed[k].shape]
    bad += sorted(set(state) - set(needed))
    if bad:
        lacking = _parts(needed) - _parts(set(state) - set(counters))
        if lacking and {k.split(".")[0] for k in bad} == lacking:
            raise InputError(f"{source}: not {wanted}: no {', '.join(sorted(lacking))} in it, so "
                             "that it is not a finished network; give the file of a finished one")
        there, here = (tuple(getattr(d.get(bad[0]), "shape", ())) or "nothing"
                       for d in (state, needed))
        raise InputError(f"{source}: not {wanted}: {len(bad)} tensors differ, the first is "
                         f"{bad[0]} (there {there}, here {here}); {remedy}")
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise InputError(f"{source}: {name} holds NaN or infinity; "
                             "give a file saved before its training went wrong")
    module.load_state_dict(state)
    return left


def _parts(names):
    return {name.split(".")[0] for name in names}


if __name__ == "__main__":
    command(main)
