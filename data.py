"""Data sets and their classes, the stream of training crops, and what every script shares.

    python data.py --dataset folder --data DIR    # read everything, name every fault

Every label leaves this file as uint8 class indices with 255 = ignore, every image as uint8 RGB.
The data sets and what networks see of them come first, then layouts, reading and the check. The
last quarter is no longer about data: errors, options, files and weights, as all scripts use them.
"""
import argparse
import colorsys
import errno
import hashlib
import http.client
import io
import math
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torchvision.datasets import Cityscapes
from torchvision.datasets.utils import (check_integrity, download_and_extract_archive,
                                        extract_archive)
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
    class_of_colour: RGB triple -> class index or 255. Empty where labels hold indices alone.
    read_as: "colours" or "numbers" -> the first label that was read so.
    """
    name: str
    classes: list
    palette: list
    pairs: dict
    class_of_value: np.ndarray = field(repr=False)
    class_of_colour: dict = field(repr=False)
    root: Path = Path(".")
    read_as: dict = field(default_factory=dict, repr=False)

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
        """Class indices (H,W) uint8. Raises InputError for a file that holds something else.

        Values and indices are class numbers. In RGB, and in a palette that gives a class's colour
        to another index, the colours decide.
        """
        raw = open_label(path)
        if self.class_of_colour:
            if raw.mode in ("RGB", "RGBA") or raw.mode == "P" and self._is_renumbered(raw):
                self.read_as.setdefault("colours", path)
                return self._classes_of_colours(path, raw)
            if raw.mode != "P" or not self._is_in_order(raw):
                self.read_as.setdefault("numbers", path)
        if raw.mode not in ("L", "P", "1"):
            raise InputError(f"{path}: mode {raw.mode}, which names no classes; "
                             "export the label again, as PNG with 8 bits")
        values = np.array(raw, dtype=np.uint8)
        label = self.class_of_value[values]
        if (label < 0).any():
            wrong = Counter(values[label < 0].tolist())
            listed = [f"{value} ({count} pixels)" for value, count in sorted(wrong.items())]
            remedy = "get it again"
            if self.class_of_colour:
                remedy = "for numbers from 1 see .github/DETAILS.md, own data that needs work"
            raise InputError(f"{path}: label values outside the {len(self.classes)} classes: "
                             f"{first_three(listed)}; {remedy}")
        return label.astype(np.uint8)

    def two_ways(self):
        """A NOTE in a list where some labels were read by colours and others as numbers."""
        if len(self.read_as) < 2:
            return []
        return [f"NOTE: labels are read in two ways: by their colours, as {self.read_as['colours']}"
                f", and as class numbers, as {self.read_as['numbers']}; are both so meant?"]

    def _is_renumbered(self, raw):
        """Whether a palette gives the colour of a class to another index than the class's.

        Some programs renumber palettes. In a palette of greys alone, (2, 2, 2) is class 2.
        """
        colours, used = _used_colours(raw)
        class_of = self.class_of_colour
        if all(len(set(colours[index])) == 1 for index in used if index != IGNORE):
            class_of = {(k, k, k): k for k in range(len(self.classes))} | class_of
        for index in used:
            k = class_of.get(colours[index], index)
            # Unused entries are filled with a used colour. Where entry k has it, this is filling.
            padding = k != IGNORE and colours[k:k + 1] == [colours[index]]
            if k != index and not padding:
                return True
        # where a colour is that of a class, an unknown one is a mistake. Black may be filling
        shown = {colours[index] for index in used if index != IGNORE} - {(0, 0, 0)}
        known = shown & self.class_of_colour.keys()
        return bool(known) and known != shown

    def _is_in_order(self, raw):
        """Whether a palette gives each index the colour of its class, so that both ways agree."""
        colours, used = _used_colours(raw)
        return all(self.class_of_colour.get(colours[k]) == k for k in used if k != IGNORE)

    def _classes_of_colours(self, path, raw):
        if raw.mode == "RGBA" and raw.getchannel("A").getextrema()[0] < 255:
            raise InputError(f"{path}: has transparent pixels, which are of no class; "
                             "export it without transparency")
        red, green, blue = (np.array(band, np.int32) for band in raw.convert("RGB").split())
        codes = 65536 * red + 256 * green + blue  # H,W
        label = np.full(codes.shape, -1, np.int16)
        for (r, g, b), k in self.class_of_colour.items():
            label[codes == 65536 * r + 256 * g + b] = k
        if raw.mode == "P":  # 255 is ignored where its colour means nothing else, or is filling
            colours, _ = _used_colours(raw)
            filling = colours[-2:-1] == colours[-1:]  # unused entries have a used one's colour
            label[((label < 0) | filling) & (np.array(raw) == IGNORE)] = IGNORE
        unknown = Counter(codes[label < 0].tolist())
        if unknown:
            (code, count), *others = unknown.most_common()
            colour = code >> 16, code >> 8 & 255, code & 255
            more = f", as are {len(others)} others" if others else ""
            remedy = ("give it a line in classes.txt (labelmap.txt), as ignore R G B "
                      "(ignore:R,G,B::) to leave it out")
            if len(set(colour)) == 1:
                remedy += ", or save the label as greys of one channel if they are class numbers"
            if len(others) > 50:
                remedy = "is it a picture, not a label?"
            raise InputError(f"{path}: the colour {colour}, {count / codes.size:.1%} of the "
                             f"pixels, is of no class{more}; {remedy}")
        return label.astype(np.uint8)


def _used_colours(raw):
    """Of a label with a palette: the colour of each index, and the indices that occur."""
    flat = raw.getpalette("RGB")
    colours = list(zip(flat[::3], flat[1::3], flat[2::3]))
    return colours, [index for _, index in raw.getcolors() if index < len(colours)]


def open_dataset(name, root=None, missing_ok=False):
    """The DataSet `name` under `root` (default data/NAME), made or downloaded where possible.

    name: one of DATASETS. Raises InputError where files are missing. With missing_ok,
    those are left for `read` to name.
    """
    root = Path(root or Path("data") / name)
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
    paths = [path for pairs in data.pairs.values() for pair in pairs for path in pair if path]
    missing = [path for path in paths if not path.is_file()]
    if missing and not missing_ok:
        more = f" ({len(missing) - 1} more are missing)" if missing[1:] else ""
        raise InputError(f"{missing[0]}: no such file; restore it or remove its partner{more}")
    return data


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


# ---------------------------------------------------------------- the layouts on disk
# Each function below takes the root and returns the classes, palette, pairs, class_of_value and
# class_of_colour of a DataSet.

# labelIds value, name, colour; the row is the trainId
CITYSCAPES = tuple((c.id, c.name, c.color) for c in Cityscapes.classes if not c.ignore_in_eval)
VOC = ("background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
       "motorbike person pottedplant sheep sofa train tvmonitor").split()


def _ade20k(root):
    folder = root / "ADEChallengeData2016"
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
    return names, voc_palette(151)[1:], pairs, value_table(range(1, 151), ignored=[0]), {}


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
        labels = root / "gtFine" / split
        expected = {label for _, label in pairs[split]}
        found = sorted(labels.glob("*/[!.]*_gtFine_labelIds.png"))
        _note_alone(labels, [path.name for path in found if path not in expected])
    values, names, palette = zip(*CITYSCAPES)
    return list(names), list(palette), pairs, value_table(values, ignored=range(34)), {}


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
    return VOC, voc_palette(21), pairs, value_table(range(21)), {}


def _voc_pairs(folder, source, labels):
    words = source.read_text().split() if source.is_file() else []
    # some lists in circulation name both files of a pair
    ids = dict.fromkeys(Path(word).stem for word in words)
    return [(folder / "JPEGImages" / f"{i}.jpg", folder / labels / f"{i}.png") for i in ids]


def _folder(root):
    classes, palette, ignored = _read_classes(root)
    pairs = {split: _pair_up(root / "images" / split, root / "labels" / split)
             for split in ("train", "val", "test")}
    pairs["unlabelled"] = [(path, None) for path in pictures(root / "images" / "unlabelled")]
    if others := sorted(p.name for p in root.glob("images/[!.]*") if p.name not in pairs):
        print(f"NOTE: {root / 'images'}: {first_three(others)} not used; the splits are "
              f"{', '.join(pairs)}")
    class_of_colour = {colour: k for k, colour in enumerate(palette)}
    class_of_colour |= dict.fromkeys(ignored, IGNORE)
    return classes, palette, pairs, value_table(range(len(classes))), class_of_colour


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
    """Names, colours and ignored colours of classes.txt or, where it is missing, labelmap.txt.

    The latter is CVAT's. The name "ignore" is that of colours without a class.
    """
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

    classes, palette, ignored = [], [], []
    for number, line in enumerate(map(str.strip, lines), 1):
        found = re.fullmatch(pattern, line)
        if not line or line.startswith("#") and not found:  # CVAT's first line is a comment
            continue
        where = f"{path}, line {number}"
        if line.startswith("#"):
            raise InputError(f"{where}: {line!r} is a class behind a comment sign; remove the "
                             "line, or name its colour ignore: class numbers count the lines")
        colour = tuple(map(int, found.groups()[1:])) if found else ()
        if not colour or max(colour) > 255:
            raise InputError(f"{where}: {line!r} is not '{form}' with three numbers 0..255")
        if path != labelmap and re.search(r"^\d+\s|\s\d+$", found[1]):
            raise InputError(f"{where}: {line!r} has a fourth number; leave out a class number, "
                             "which is the line's, and write lane 2 as lane-2")
        if colour in palette + ignored:  # colour labels and pictures could not tell the two apart
            other = "ignore" if colour in ignored else classes[palette.index(colour)]
            raise InputError(f"{where}: {found[1]} has the colour of {other}; "
                             "give each class its own")
        if found[1] == "ignore":
            ignored.append(colour)
            continue
        if found[1].lower() in ("ignore", "ignored"):
            raise InputError(f"{where}: {found[1]} would be a class; write ignore")
        classes.append(" ".join(found[1].split()))
        palette.append(colour)
    if not 2 <= len(set(classes)) == len(classes) <= 255:
        raise InputError(f"{path}: {len(classes)} classes, {len(set(classes))} names; "
                         "2 to 255, all different, are possible")
    return classes, palette, ignored


# the endings that Pillow reads without further packages
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".tif", ".tiff", ".webp", ".bmp", ".gif", ".ppm",
            ".pgm")


def pictures(folder):
    """The pictures of a folder, sorted. Prints what else lies there.

    Hidden files are passed over, because macOS leaves ._NAME beside NAME on other disks.
    """
    entries = folder.iterdir() if os.path.lexists(folder) else ()
    entries = sorted(p for p in entries if not p.name.startswith("."))
    found = [p for p in entries if p.suffix.lower() in SUFFIXES and not p.is_dir()]
    if others := sorted(p.name for p in set(entries) - set(found)):
        print(f"NOTE: {folder}: {len(others)} left out, no picture that can be read here: "
              f"{first_three(others)}")
    return found


def _pair_up(images, labels):
    """Every image of a folder with the label of its name, which may be missing."""
    images, found = _by_name(images), _by_name(labels)
    _note_alone(labels, [path.name for name, path in found.items() if name not in images])
    return [(path, found.get(name, labels / f"{path.stem}.png")) for name, path in images.items()]


def _note_alone(labels, names):
    if names:
        print(f"NOTE: {labels}: {len(names)} labels without a picture, not used: "
              f"{first_three(names)}")


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


ARCHIVES = {  # URL, MD5, the folder in it
    "ade20k": ("http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
               "7328b3957e407ddae1d3cbf487f149ef", "ADEChallengeData2016"),
    "voc": (DATASET_YEAR_DICT["2012"]["url"], DATASET_YEAR_DICT["2012"]["md5"], "VOCdevkit"),
}


def download(name, root):
    """Unpack ARCHIVES[name] under `root`, from the archive that lies there or a new download.

    Raises InputError where that fails, and where `root` holds something else: gigabytes go only
    where nothing is. What the user put there is neither changed nor deleted.
    """
    url, md5, folder = ARCHIVES[name]
    archive = root / Path(url).name
    visible = sorted(path.name for path in root.glob("[!.]*")
                     if path != archive and ".part-" not in path.name)
    if visible:
        remedy = "give --data an empty folder"
        parts = Path(os.path.abspath(root)).parts
        if folder in parts:
            remedy = f"give --data {Path(*parts[:parts.index(folder)])}"
        raise InputError(f"{root}: no {folder} in it, but {first_three(visible)}; {remedy}")
    if archive.exists() and not check_integrity(archive, md5):
        raise InputError(f"{archive}: not the file of {url}, whose MD5 is {md5}; "
                         "unpack it there if it is to be used, else move it away")
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder}.part-", dir=root) as part:
        try:
            if archive.exists():
                print(f"unpacking {archive}", flush=True)
                extract_archive(archive, part)
            else:
                print(f"downloading {url} to {root}", flush=True)
                download_and_extract_archive(url, part, md5=md5)
        except (OSError, ValueError, RuntimeError, http.client.HTTPException) as e:
            raise InputError(f"{url}: cannot download and unpack it ({e}); "
                             f"get it elsewhere and put it into {root}") from None
        if not (root / folder).is_dir():  # another process may have been first
            os.rename(Path(part, folder), root / folder)


# ---------------------------------------------------------------- shapes, the embedded data set

SHAPES = "ground disc square triangle ring cross rod star".split()
SHAPES_COUNT = {"train": 1600, "val": 100, "test": 400}
SHAPES_SIZE = 64


def make_shapes(root, seed=0):
    """Draw `shapes`, in the layout of `folder`; picture i depends on (seed, split, i) alone."""
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{root.name}.part-", dir=root.parent) as scratch:
        part = Path(scratch, root.name)
        for number, (split, count) in enumerate(SHAPES_COUNT.items()):
            for kind in ("images", "labels"):
                (part / kind / split).mkdir(parents=True)
            for i in progress(range(count), desc=f"drawing {root}, {split}", unit="pictures"):
                image, label = draw_shapes(seed, 1_000_000 * number + i)
                image.save(part / "images" / split / f"{i:04d}.png", compress_level=1)
                label.save(part / "labels" / split / f"{i:04d}.png")
        colours = zip(SHAPES, voc_palette(len(SHAPES)))
        lines = [f"{name} {r} {g} {b}\n" for name, (r, g, b) in colours]
        (part / "classes.txt").write_text("".join(lines))
        if not root.is_dir():  # another process may have been first
            os.rename(part, root)


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


# ---------------------------------------------------------------- reading pictures and labels

# formats whose compression can change the value of a pixel
LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF")
# Pillow multiplies 2- and 4-bit greys by these factors
STRETCH = {"L;2": 85, "L;4": 17}
ORIENTATION, BITS_PER_SAMPLE = 274, 258  # tags of EXIF and of TIFF


def read_image(path):
    """A picture (PIL, RGB), turned as its EXIF tag says. Raises InputError naming the file."""
    with _opened(path) as image:
        _refuse_deep(path, image)
        image.load()
        with suppress(Exception):  # damaged EXIF data are no fault of the pixels
            ImageOps.exif_transpose(image, in_place=True)
        return image.convert("RGB")


def open_label(path):
    """A label as Pillow opens it, in any mode, with the values of the file.

    Raises InputError for what Pillow would change.
    """
    with _opened(path) as raw:
        if raw.format in LOSSY or raw.info.get("compression") == "jpeg":
            raise InputError(f"{path}: holds {raw.format} data, whose compression changes colours "
                             "and indices; export the label again, as PNG")
        _refuse_deep(path, raw)
        packing = _packing(raw)
        raw.load()
    if raw.mode in ("L", "1") and ";" in packing:
        if packing not in STRETCH:
            raise InputError(f"{path}: grey values packed as {packing}, which readers change; "
                             "save it with 8 bits per pixel")
        raw = raw.point(lambda value: value // STRETCH[packing])
    return raw


@contextmanager
def _opened(path):
    """Image.open. What fails in it or in its block is an InputError, as are several pages."""
    try:
        with Image.open(path) as image:
            pages = getattr(image, "n_frames", 1)
            if pages > 1 and image.format != "MPO":  # a phone's JPEG with a preview behind it
                raise InputError(f"{path}: {pages} pages, but one is read; save what is meant "
                                 "as one PNG")
            yield image
    except InputError:
        raise
    except Image.DecompressionBombError:
        limit = 2 * Image.MAX_IMAGE_PIXELS
        raise InputError(f"{path}: more than {limit:,} pixels; cut it into tiles") from None
    except Exception as e:  # damaged files raise what their readers did not expect
        if getattr(e, "errno", None):
            raise InputError(f"{path}: {e.strerror}; check the path and its permissions") from None
        raise InputError(f"{path}: truncated or not an image ({e}); get it again") from None


def _refuse_deep(path, image):
    """Of more than 8 bits Pillow clips some or drops the lower: dark pictures would be black."""
    deep = image.mode[0] in "IF" or re.search(r";16[BLN]|max \d{4}", _packing(image))
    if image.format == "TIFF":
        deep = deep or max(image.tag_v2.get(BITS_PER_SAMPLE, (1,))) > 8
    if deep:
        raise InputError(f"{path}: mode {image.mode}, more than 8 bits per channel; save it with 8")


def _packing(image):
    """How a file packs its pixels, before it is loaded: "L;4" is 4 bits of grey."""
    form = image.tile[0][3] if image.tile else ""
    if isinstance(form, str):
        return form
    if image.format == "PPM" and form[1] != 255:  # the largest value, which is stretched to 255
        return f"{form[0]};max {form[1]}"
    return str((*(form or ()), "")[0])


# ---------------------------------------------------------------- what the files hold

def labels_digest(data, *splits):
    """sha256 of the names and bytes of these splits' labels, in whatever folder they lie.

    The colours of the classes belong to it, because colour labels are read by them.
    """
    files = [(split, label) for split in splits
             for _, label in data.pairs.get(split, ()) if label]

    def line(file):
        split, path = file
        return f"{split}/{_stem(path)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n"

    lines = in_threads(line, files, desc="reading labels", unit="labels")
    return _short_digest([f"{sorted(data.class_of_colour.items())}\n", *lines])


def pictures_digest(data, *splits):
    """sha256 of the names of these splits' pictures, 0 without any."""
    names = [f"{split}/{_stem(path)}\n" for split in splits
             for path, _ in data.pairs.get(split, ())]
    return _short_digest(names) if names else 0


def _short_digest(lines):
    # names of files need not be in UTF-8
    text = "".join(lines).encode(errors="surrogateescape")
    return hashlib.sha256(text).hexdigest()[:16]


def sizes_of_pictures(data, splits=("train", "val", "unlabelled")):
    """sha256 of the sizes in bytes of these splits' pictures."""
    return _short_digest(f"{path.stat().st_size}\n" for split in splits
                         for path, _ in data.pairs.get(split, ()))


def check(data, splits):
    """Read every file of these splits. Print each fault as one line or, without any, what is odd.

    Returns split -> how many pixels of its labels have each value, 256 entries.
    Raises InputError where there are faults, and for labels that nothing can be learned from.
    """
    faults, pixels, odd, places = [], {}, {}, {}
    for split in splits:
        pairs = data.pairs.get(split, ())
        look = partial(_look, data, split)
        found = in_threads(look, range(len(pairs)), desc=f"checking {split}", unit="images")
        for (picture, label), result in zip(pairs, found):
            if isinstance(result, str):
                faults.append(result)
                continue
            counts, digest, oddities = result
            if label:
                pixels[split] = pixels.get(split, 0) + counts
            places.setdefault(digest, {})[split] = picture
            for what in oddities:
                odd.setdefault(what, []).append(picture)
    if faults:
        print("\n".join(faults))
        raise InputError(f"{faults[0]} ({len(faults)} faulty in all, listed above)")

    for split, counts in pixels.items():
        print(f"{split}: {counts[IGNORE] / counts.sum():.1%} of the labels' pixels are ignored")
    for line in _judge(data, pixels):
        print(line)
    for what, those in odd.items():
        print(f"NOTE: pictures that {what}: {len(those)}, for instance {those[0]}")
    twice = [list(found.values()) for found in places.values()
             if len(found) > 1 and found.keys() != {"train", "unlabelled"}]
    if twice:
        print(f"NOTE: pictures that are in two splits: {len(twice)}, for instance {twice[0][0]} "
              f"and {twice[0][-1]}; scores will be too good, so keep each in one split")
    return pixels


def _look(data, split, index):
    """A fault, or the label's pixels by value, the picture's digest and what is odd in it."""
    picture, label_path = data.pairs[split][index]
    oddities = []
    try:
        image, label = data.read(split, index)
        digest = hashlib.sha256(repr(image.size).encode())
        digest.update(image.tobytes())
        if label_path and picture.read_bytes() == label_path.read_bytes():
            oddities.append("are their own labels, byte by byte")
        with _opened(picture) as raw:
            with suppress(Exception):  # damaged EXIF data are no fault of the pixels
                if raw.getexif().get(ORIENTATION, 1) > 1:
                    oddities.append("are turned as their EXIF data say, which their labels must "
                                    "be, too")
            if raw.has_transparency_data:
                if raw.convert("RGBA").getchannel("A").getextrema()[0] < 255:
                    oddities.append("have transparent pixels, whose colours are seen as they are")
    except InputError as e:
        return str(e)
    return np.bincount(label.ravel(), minlength=256), digest.digest(), oddities


def _judge(data, pixels):
    """Lines to print about labels that are readable and yet may not be what was meant.

    pixels: as `check` returns them. Raises InputError as it does.
    """
    lines = data.two_ways()
    if data.read_as.keys() == {"numbers"} and IGNORE in data.class_of_colour.values():
        raise InputError(f"{data.read_as['numbers']}: holds class numbers, where 255 is ignored, "
                         "but classes.txt ignores colours; remove these lines, or save the labels "
                         "in colours")
    for split, counts in pixels.items():
        present = [name for k, name in enumerate(data.classes) if counts[k]]
        absent = [name for name in data.classes if name not in present]
        if not present and split != "test":
            raise InputError(f"{data.root}: no label of {split} has a labelled pixel: all are 255, "
                             "which means ignored; export the labels as class indices")
        if split == "train" and len(present) == 1:
            hint = "export them as class indices"
            if counts[0] and counts[IGNORE]:
                hint = ("255 means ignored; for masks of 0 and 255 see .github/DETAILS.md, own "
                        "data that needs work")
            raise InputError(f"{data.root}: the labels of train hold one class, {present[0]}, and "
                             f"two are needed; {hint}")
        if absent:
            effect = "they cannot be learned" if split == "train" else "they are not scored"
            lines.append(f"NOTE: classes without a pixel in {split}, {effect}: {', '.join(absent)}")
        white = data.class_of_colour.get((255, 255, 255), IGNORE)
        if white != IGNORE and counts[IGNORE]:
            lines.append(f"NOTE: {split}: 255 in grey labels is ignored, though white is the "
                         f"colour of {data.classes[white]}")
    return lines


def main():
    parser = Parser(description="Read a whole data set and name every fault in it.")
    parser.add_argument("--dataset", required=True, choices=DATASETS)
    parser.add_argument("--data", metavar="DIR", help="its folder (default: data/NAME)")
    args = parser.parse_args()
    data = open_dataset(args.dataset, args.data, missing_ok=True)
    pixels = check(data, data.pairs)
    print("share of the labels' pixels:")
    for k, name in (*enumerate(data.classes), (IGNORE, "ignored")):
        shares = [f"{split} {counts[k] / counts.sum():.1%}" for split, counts in pixels.items()]
        print(f"  {name}: {', '.join(shares)}")
    sizes = [f"{split}: {len(pairs)} images" for split, pairs in data.pairs.items()]
    print(f"{', '.join(sizes)}, {len(data.classes)} classes, 0 faulty")


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
    finally:
        children = multiprocessing.active_children()  # loaders, which ignore SIGTERM
        if children and hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's own reports an accident
        for child in children:
            child.kill()
    sys.stdout.flush()  # so that the message comes last, where both go to one file
    print(" ".join(message.split()), file=sys.stderr)
    sys.exit(code)


# Errors of the machine: phrases that identify them, and the advice.
LIMITS = (
    (("CUDA out of memory",), "out of GPU memory: lower --batch-size or --crop"),
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
    # errors from loader processes begin with a traceback
    return text.strip().splitlines()[-1] if isinstance(error, OSError) else ""


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
        results = pool.map(function, items)
        return list(progress(results, disable=not items, total=len(items), **bar))


def quiet_worker(_):
    """Loader processes leave signals to the main process, which saves, then ends them."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


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

def write_atomically(path, content):
    """Write bytes beside `path`, sync, rename: a kill leaves the old file or the new one.

    Raises InputError where that fails.
    """
    path = Path(path)
    # always the same name, so that the next one overwrites what a kill left
    part = path.with_name(f"{path.name}.part")
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
        if objects := re.search(r"GLOBAL (\S+)", str(e)):  # not opened, because they can run code
            raise InputError(f"{path}: not a readable checkpoint (it holds objects of Python, "
                             f"{objects[1]}); save the network's state_dict() alone") from None
        with open(path, "rb") as f:  # a pointer of Git LFS, say, or a page that says "log in"
            begin = f.read(20)
        raise InputError(f"{path}: not a readable checkpoint ({path.stat().st_size:,} bytes, the "
                         f"first {begin!r}); get it again or, if a run left it, delete it and the "
                         "results-*.json beside it") from None
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
    plain = all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items())
    if not state or not plain:
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
    Raises InputError if `source` is not `wanted`.
    """
    left = sorted(k for k in state if k.startswith(tuple(aside)))
    # Old files lack BatchNorm's counters, which change no result.
    counters = {k: v for k, v in module.state_dict().items() if k.endswith("num_batches_tracked")}
    state = counters | {k: v for k, v in state.items() if k not in left}
    try:
        module.load_state_dict(state)
    except RuntimeError as e:
        first, *others = str(e).splitlines()
        names = re.findall(r'"(\S+?)"|size mismatch for (\S+):', "".join(others))
        names = first_three([quoted or unquoted for quoted, unquoted in names])
        raise InputError(f"{source}: not {wanted}: {first} {names}; {remedy}") from None
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise InputError(f"{source}: {name} holds NaN or infinity; "
                             "give a file saved before its training went wrong")
    return left


def first_difference(there, here):
    """The first entry in which two lists differ, in words, "" if they are equal."""
    for k, (one, other) in enumerate(zip_longest(there, here, fillvalue="nothing")):
        if one != other:
            return f"entry {k} is {one} there, {other} here"
    return ""


if __name__ == "__main__":
    command(main)
