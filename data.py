"""Data sets and their label maps, the stream of training crops, downloads, and what every script shares.

    python data.py --check --dataset folder --data path/to/data     # read everything, list every fault

Every label leaves this file as uint8 class indices with 255 = ignore, every image as uint8 RGB.
"""
import argparse
import colorsys
import errno
import hashlib
import http.client
import io
import math
import os
import shutil
import signal
import sys
import urllib.request
from collections import Counter
from contextlib import suppress
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
SUFFIXES = (".jpg", ".jpeg", ".png")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of RGB in 0..1
# differs: paper not stated, release pads crops with black, here with the mean colour, zero after normalising
MEAN_COLOUR = tuple(round(255 * m) for m in MEAN)

# name: (URL, hash, digest, folder inside the archive)
DOWNLOADS = {
    "ade20k": ("http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip", "sha1",
               "219e1696abb36c8ba3a3afe7fb2f4b4606a897c7", "ADEChallengeData2016"),
    "voc": (DATASET_YEAR_DICT["2012"]["url"], "md5", DATASET_YEAR_DICT["2012"]["md5"], "VOCdevkit"),
}
# labelIds value, name, colour; the row is the trainId
CITYSCAPES = tuple((c.id, c.name, c.color) for c in Cityscapes.classes if not c.ignore_in_eval)
VOC = ("background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
       "person pottedplant sheep sofa train tvmonitor").split()
SHAPES = ("ground disc square triangle ring cross rod star").split()
SHAPES_COUNT = {"train": 1600, "val": 100, "test": 400}
SHAPES_SIZE = 64


@dataclass
class DataSet:
    """Where a data set's files are and what its label values mean.

    pairs: split -> [(image path, label path or None for an image without)];  palette: one RGB triple a class;
    lut: 256 entries, label value on disk -> class index, 255 = ignore, -1 = a value that must not occur.
    """
    name: str
    classes: list
    palette: list
    pairs: dict
    lut: np.ndarray = field(repr=False)

    def read(self, split, index):
        """Image (PIL, RGB) and label (uint8 array, H,W) at their size on disk. Raises InputError naming the file."""
        image_path, label_path = self.pairs[split][index]
        image = read_image(image_path)
        if label_path is None:
            return image, np.full(image.size[::-1], IGNORE, np.uint8)
        raw = _open(label_path)
        if raw.mode not in ("L", "P", "1"):
            raise LabelInputError(f"{label_path}: mode {raw.mode}, but a label has one index byte a pixel; "
                                  "convert it to class indices")
        if self.name == "folder" and raw.mode == "P":
            self._refuse_other_palette(raw, label_path)
        raw = np.array(raw, dtype=np.uint8)
        if raw.shape != image.size[::-1]:
            raise InputError(f"{label_path}: {raw.shape[1]}x{raw.shape[0]}, but its image is {image.width}x"
                             f"{image.height} (a turn in its EXIF data is obeyed); make the two the same size")
        label = self.lut[raw]
        if (label < 0).any():
            values, counts = np.unique(raw[label < 0], return_counts=True)
            found = ", ".join(f"{v} ({c} pixels)" for v, c in zip(values[:3], counts))
            raise LabelInputError(f"{label_path}: label values outside the {len(self.classes)} classes: {found}; "
                                  "correct the label or add the class (255 = ignore)")
        return image, label.astype(np.uint8)

    def _refuse_other_palette(self, raw, path):
        """Raises LabelInputError for colours that a program has numbered as it likes: half or more are of classes.txt,
        not all with their own index. Another palette, VOC's for instance, may lie over class indices."""
        flat = raw.getpalette("RGB")
        shown = {index: tuple(flat[3 * index:3 * index + 3]) for _, index in raw.getcolors() if index != IGNORE}
        known = {index: colour for index, colour in shown.items() if colour in self.palette}
        wrong = [index for index, colour in known.items() if [colour] != self.palette[index:index + 1]]
        if wrong and 2 * len(known) >= len(shown):
            name = self.classes[self.palette.index(known[wrong[0]])]
            raise LabelInputError(f"{path}: index {wrong[0]} has the colour of {name}, in classes.txt another class; "
                                  "convert it to class indices, or give it another palette")


def read_image(path):
    """A picture (PIL, RGB), turned as its EXIF tag says. Raises InputError naming the file."""
    image = _open(path)
    if image.mode[0] in "IF":  # PIL would clip to 255
        raise InputError(f"{path}: mode {image.mode}, more than 8 bits a channel; save it with 8")
    with suppress(Exception):  # damaged EXIF data are no fault of the pixels
        ImageOps.exif_transpose(image, in_place=True)
    return image.convert("RGB")


def _open(path):
    try:
        image = Image.open(path)
        image.load()
        return image
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; restore it or remove its partner") from None
    except Image.DecompressionBombError:
        raise InputError(f"{path}: more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels; cut it into tiles") from None
    except (OSError, SyntaxError, ValueError) as e:
        raise InputError(f"{path}: truncated or not an image ({e}); get it again") from None


def open_dataset(name, root=None, missing_ok=False):
    """The DataSet `name` under `root` (default data/NAME), made or downloaded where that is possible.

    name: shapes, ade20k, cityscapes, voc or folder. Raises InputError where files are missing; missing_ok leaves
    single files to `read`.
    """
    root = data_folder(name, root)
    if name == "shapes" and not root.is_dir():
        make_shapes(root)
    if name == "folder" and not root.is_dir():
        raise InputError(f"{root}: no such folder; give --data a folder with images/, labels/ and classes.txt")
    layouts = {"shapes": _folder, "ade20k": _ade20k, "cityscapes": _cityscapes, "voc": _voc, "folder": _folder}
    data = DataSet(name, *layouts[name](root))
    for split in ("train", "val"):
        if not data.pairs[split]:
            raise InputError(f"{root}: no image of the {split} split found; README shows the layout of {name}")
    if not missing_ok:
        for path in (path for pairs in data.pairs.values() for pair in pairs for path in pair if path):
            if not path.is_file():
                raise InputError(f"{path}: no such file; restore it or remove its partner")
    return data


def data_folder(name, root=None):
    """--data, by default data/NAME."""
    return Path(root or Path("data") / name)


def _pair_up(images, labels):
    """Every image of a folder with the label of the same stem, or with None where `labels` is None."""
    paths = sorted(p for p in images.glob("*") if p.suffix.lower() in SUFFIXES)
    stems = Counter(p.stem for p in paths).most_common(1)
    if labels and stems and stems[0][1] > 1:
        raise InputError(f"{images}: two images are called {stems[0][0]} but for the ending; rename one and its label")
    return [(p, labels and labels / f"{p.stem}.png") for p in paths]


def _lut(values):
    """Table in which values[k] -> k, 255 -> 255 and everything else -> -1 (not allowed)."""
    lut = np.full(256, -1, np.int16)
    lut[IGNORE] = IGNORE
    lut[list(values)] = np.arange(len(values))
    return lut


def voc_palette(n):
    """The PASCAL VOC colour map: the bits of the index, three at a time, fill R, G, B from the top."""
    return [tuple(sum((i >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3)) for channel in range(3))
            for i in range(n)]


def _folder(root):
    path = root / "classes.txt"
    if not path.is_file():
        raise InputError(f"{path}: no such file; write one line a class: name R G B")
    classes, palette = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").splitlines(), 1):
        words = line.split()
        name, colour = " ".join(words[:-3]), words[-3:]
        if not name or not all(c.isdecimal() and int(c) < 256 for c in colour):
            raise InputError(f"{path}, line {number}: {line!r} is not 'name R G B' with three numbers 0..255")
        classes.append(name)
        palette.append(tuple(int(c) for c in colour))
    if not 2 <= len(set(classes)) == len(classes) <= 255:
        raise InputError(f"{path}: {len(classes)} classes, {len(set(classes))} names; 2 to 255, all different, are "
                         "possible")
    pairs = {s: _pair_up(root / "images" / s, root / "labels" / s) for s in ("train", "val", "test")}
    pairs["unlabelled"] = _pair_up(root / "images" / "unlabelled", None)
    return classes, palette, pairs, _lut(range(len(classes)))


def _ade20k(root):
    folder = root / DOWNLOADS["ade20k"][3]
    if not folder.is_dir():
        download("ade20k", root)
    info = folder / "objectInfo150.txt"
    names = [line.split("\t")[-1].split(",")[0].strip() for line in info.read_text().splitlines()[1:]]
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
        raise InputError(f"{root}: no leftImg8bit/ and gtFine/ in it; register at https://www.cityscapes-dataset.com/"
                         "downloads, get leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip, unpack both there")
    pairs = {}
    for split in ("train", "val"):  # the test split's labels are void: never scored
        images = sorted((root / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
        labels = (root / "gtFine" / split / p.parent.name / p.name.replace("_leftImg8bit", "_gtFine_labelIds")
                  for p in images)
        pairs[split] = list(zip(images, labels))
    values, names, palette = zip(*CITYSCAPES)
    lut = np.full(256, -1, np.int16)
    lut[:34] = IGNORE
    lut[list(values)] = np.arange(len(values))
    return list(names), list(palette), pairs, lut


def _voc(root):
    folder = root / DATASET_YEAR_DICT["2012"]["base_dir"]
    if not folder.is_dir():
        download("voc", root)
    lists = folder / "ImageSets" / "Segmentation"
    pairs = {}
    for split in ("train", "val"):
        source, labels = f"{split}.txt", "SegmentationClass"
        if split == "train" and (lists / "trainaug.txt").is_file() and (folder / "SegmentationClassAug").is_dir():
            source, labels = "trainaug.txt", "SegmentationClassAug"
        ids = (lists / source).read_text().split() if (lists / source).is_file() else []
        ids = dict.fromkeys(Path(i).stem for i in ids)  # some lists in circulation name both files of a pair
        pairs[split] = [(folder / "JPEGImages" / f"{i}.jpg", folder / labels / f"{i}.png") for i in ids]
    return VOC, voc_palette(21), pairs, _lut(range(21))


@lru_cache(maxsize=4)
def _order(seed, epoch, kind, n):
    """The images of one epoch; kind: 0 labelled, 2 unlabelled, as 1 seeds the crops."""
    return np.random.default_rng([seed, epoch, kind]).permutation(n)


class TrainStream(torch.utils.data.Dataset):
    """The endless stream of training crops; item `position` is a pure function of (seed, position).

    The last `unlabelled` of every `batch_size` positions hold images without labels, the others those of train;
    either kind runs through its own epochs, each a permutation of all its images. An image is resized so that its
    short side is base * u, u uniform in `scale`, cropped at random to crop x crop (smaller ones are padded on the
    right and at the bottom), and flipped with probability 1/2.
    Returns image (3,crop,crop) uint8, label (crop,crop) uint8.
    """

    def __init__(self, data, seed, base, crop, scale, length, batch_size=1, unlabelled=0):
        self.data, self.seed, self.base, self.crop, self.scale, self.length = data, seed, base, crop, scale, length
        self.batch_size, self.unlabelled = batch_size, unlabelled

    def __len__(self):
        return self.length

    def source(self, position):
        """Which image stands at `position`: its split and its index there."""
        batch, slot = divmod(position, self.batch_size)
        labelled = self.batch_size - self.unlabelled
        if slot < labelled:
            split, kind, count = "train", 0, batch * labelled + slot
        else:
            split, kind, count = "unlabelled", 2, batch * self.unlabelled + slot - labelled
        n = len(self.data.pairs[split])
        return split, int(_order(self.seed, count // n, kind, n)[count % n])

    def __getitem__(self, position):
        image, label = self.data.read(*self.source(position))
        rng = np.random.default_rng([self.seed, position, 1])
        # differs: paper not stated, release draws the LONG side from 0.5-2.0 x 520 (its Cityscapes crops are mostly
        # padding), here the short side is drawn, around the size that evaluation uses
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
        target[:h, :w] = np.asarray(Image.fromarray(label).resize((w, h), Image.Resampling.NEAREST, box))
        if rng.random() < 0.5:
            out, target = out[:, ::-1], target[:, ::-1]
        return torch.from_numpy(out.transpose(2, 0, 1).copy()), torch.from_numpy(target.copy())


def unlabelled_slots(data, batch_size):
    """How many slots of a batch of two or more hold images without labels; at least one slot keeps its label."""
    labelled, unlabelled = (len(data.pairs.get(split, ())) for split in ("train", "unlabelled"))
    if not unlabelled:
        return 0
    # unstated: images without labels are ours: half of each batch, or their share of all images where that is less
    return max(1, min(batch_size // 2, batch_size * unlabelled // (labelled + unlabelled)))


class EvalImages(torch.utils.data.Dataset):
    """The images of a split at evaluation scale, uint8 (3,h,w), with labels at their own, uint8 (H,W)."""

    def __init__(self, data, split, base, indices=None):
        self.data, self.split, self.base = data, split, base
        self.indices = list(range(len(data.pairs[split])) if indices is None else indices)

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        image, label = self.data.read(self.split, self.indices[i])
        image = np.array(resize_short_side(image, self.base)).transpose(2, 0, 1)
        return torch.from_numpy(image.copy()), torch.from_numpy(label)


def resize_short_side(image, base):
    """PIL image with its short side at `base` pixels, the size at which networks see it in evaluation."""
    s = base / min(image.size)
    return image.resize([max(1, round(s * side)) for side in image.size], Image.Resampling.BILINEAR)


def spread(total, count):
    """`count` indices (all if there are fewer) spread evenly over `total` images: neighbours show the same scene."""
    count = min(count or total, total)
    return [i * total // count for i in range(count)]


def normalise(images):
    """uint8 RGB (B,3,H,W) -> float32, ImageNet mean 0 and deviation 1, on the images' device."""
    # plain numbers: a tensor made here would make the host wait for the GPU in every step
    channels = zip(images.unbind(1), MEAN, STD)
    return torch.stack([(x.float() / 255 - mean) / std for x, mean, std in channels], 1)


def make_shapes(root, seed=0):
    """Draw the embedded data set once, in the layout of `folder`; picture i of a split depends on (seed, i) alone."""
    part = root.with_name(root.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    for number, (split, count) in enumerate(SHAPES_COUNT.items()):
        for kind in ("images", "labels"):
            (part / kind / split).mkdir(parents=True)
        for index in progress(range(count), desc=f"drawing {root}, {split}", unit="pictures"):
            image, label = draw_shapes(seed, 1_000_000 * number + index)
            image.save(part / "images" / split / f"{index:04d}.png", compress_level=1)
            label.save(part / "labels" / split / f"{index:04d}.png")
    colours = voc_palette(len(SHAPES))
    (part / "classes.txt").write_text("".join(f"{n} {r} {g} {b}\n" for n, (r, g, b) in zip(SHAPES, colours)))
    os.replace(part, root)


def draw_shapes(seed, index, size=SHAPES_SIZE):
    """One scene of `shapes` -> (RGB image, index label), both PIL, size x size.

    Seven kinds of object lie on a mottled ground and hide one another: disc (plain), square (checks),
    triangle (stripes across), ring (grain), cross (stripes along), rod (thin), star (rare). Their outlines turn
    and their colours vary: hue is a weak hint, texture a strong one. A one-pixel border round objects is ignored.
    """
    rng = np.random.default_rng([seed, index])
    yy, xx = np.mgrid[:size, :size]
    canvas = _colour(rng, rng.random()) + rng.normal(0, 8, (size // 8, size // 8, 3)).repeat(8, 0).repeat(8, 1)
    label = np.zeros((size, size), np.uint8)
    weights = np.array([1, 1, 1, 1, 1, 1, 0.4])
    for _ in range(rng.integers(4, 7)):
        kind = int(rng.choice(np.arange(1, 8), p=weights / weights.sum()))
        name = SHAPES[kind]
        mask = _outline(name, rng, size)
        solid = np.asarray(mask) > 0
        colours = [_colour(rng, kind / 7 + rng.normal(0, 0.08)) for _ in range(2)]
        period, phase = rng.uniform(3.5, 5), rng.uniform(0, 2 * np.pi, 2)
        u, v = (np.sin(2 * np.pi * t / period + p) for t, p in zip((xx, yy), phase))
        waves = {"square": u * v, "triangle": v, "cross": u, "ring": rng.normal(0, 1, (size, size))}
        wave = waves.get(name, np.ones((size, size)))
        canvas = np.where(solid[..., None], np.where(wave[..., None] > 0, *colours), canvas)
        border = np.asarray(mask.filter(ImageFilter.MaxFilter(3))) != np.asarray(mask)
        label = np.where(solid, kind, np.where(border, IGNORE, label)).astype(np.uint8)
    canvas = canvas * rng.uniform(0.8, 1.1) + rng.normal(0, 10, canvas.shape)
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8)), Image.fromarray(label)


def _colour(rng, hue):
    return 255 * np.array(colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.3, 0.9), rng.uniform(0.4, 0.95)))


def _outline(kind, rng, size):
    """A mask (PIL, 0 or 255) of one object at a random place, size and rotation."""
    mask = Image.new("L", (size, size))
    draw = ImageDraw.Draw(mask)
    x, y, r, turn = *rng.uniform(0, size, 2), rng.uniform(0.13, 0.25) * size, rng.uniform(0, 2 * np.pi)
    if kind in ("disc", "ring"):
        draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
        if kind == "ring":
            draw.ellipse((x - r / 2, y - r / 2, x + r / 2, y + r / 2), fill=0)
        return mask
    if kind == "rod":
        dx, dy = 2 * r * np.cos(turn), 2 * r * np.sin(turn)
        draw.line((x - dx, y - dy, x + dx, y + dy), fill=255, width=3)
        return mask
    corners, radii = {"square": (4, (r,)), "triangle": (3, (1.2 * r,)), "star": (10, (1.2 * r, 0.5 * r)),
                      "cross": (12, (1.1 * r, 1.1 * r, 0.45 * r))}[kind]
    angles = turn + np.arange(corners) * 2 * np.pi / corners
    if kind == "cross":  # arms: two outer corners close together, then one inner corner
        angles = turn + np.repeat(np.arange(4), 3) * np.pi / 2 + np.tile((-0.3, 0.3, np.pi / 4), 4)
    radii = np.resize(radii, corners)
    draw.polygon([(x + a * np.cos(t), y + a * np.sin(t)) for a, t in zip(radii, angles)], fill=255)
    return mask


def download(name, root):
    """Fetch, verify and unpack DOWNLOADS[name] under `root`, all beside the target and renamed when complete.

    Raises InputError when it cannot be had or its hash is wrong; nothing partial is left.
    """
    url, algorithm, digest, folder = DOWNLOADS[name]
    root.mkdir(parents=True, exist_ok=True)
    archive = root / Path(url).name
    if not archive.exists():
        _fetch(url, archive)
    with open(archive, "rb") as f:
        found = hashlib.file_digest(f, algorithm).hexdigest()
    if found != digest:  # a truncated or altered transfer
        archive.unlink()
        raise InputError(f"{archive}: {algorithm} {found} instead of {digest}: deleted; run the same command again, or "
                         f"get {url} elsewhere and unpack it in {root}")
    print(f"unpacking {archive}", flush=True)
    part = root / "unpacking.part"
    shutil.rmtree(part, ignore_errors=True)
    # neither form writes outside `part`: a zip's members that lead there are left out, a tar's are refused
    shutil.unpack_archive(archive, part, **({} if archive.suffix == ".zip" else {"filter": "data"}))
    os.replace(part / folder, root / folder)
    shutil.rmtree(part)
    archive.unlink()


def _fetch(url, archive):
    try:
        with urllib.request.urlopen(url, timeout=60) as reply:
            size = int(reply.headers.get("Content-Length") or 0) / 1e9
        free = shutil.disk_usage(archive.parent).free / 1e9
        print(f"downloading {url} to {archive.parent}: {size:.2f} GB, with the unpacked files about "
              f"{2.5 * size:.2f} GB of disk ({free:.1f} GB are free)", flush=True)
        if free < 2.5 * size:
            raise InputError(f"{archive.parent}: {free:.1f} GB free, {2.5 * size:.1f} GB needed; "
                             "give --data a larger disk")
        torch.hub.download_url_to_file(url, str(archive), progress=sys.stderr.isatty())
    except (OSError, ValueError, http.client.HTTPException) as e:
        raise InputError(f"{url}: cannot download it ({e}); "
                         f"get it elsewhere and unpack it in {archive.parent}") from None


CONVERT = """If their colours are those of classes.txt, this converts them in place (other colours become 255, ignored).
Keep a copy of labels/ and run it beside data.py:

    import numpy as np
    from PIL import Image
    from data import InputError, LabelInputError, open_dataset
    data = open_dataset("folder", {root!r}, missing_ok=True)
    index = np.full((256, 256, 256), 255, np.uint8)  # of each colour
    for k, colour in enumerate(data.palette):
        index[colour] = k
    for split in ("train", "val", "test"):
        for i, (_, path) in enumerate(data.pairs[split]):
            try:
                data.read(split, i)
            except InputError as e:  # sound labels stay as they are
                if isinstance(e, LabelInputError) and (image := Image.open(path)).mode != "L":
                    red, green, blue = np.array(image.convert("RGB")).T
                    Image.fromarray(index[red, green, blue].T).save(path)
"""


def check(data):
    """Read every file of every split and print each fault as one line.

    Returns how many pairs are faulty, a Counter of the colours in labels that hold no class indices, and how many
    pixels of the sound labels have each of the values 0..255 (255: ignored).
    """
    faults, colours, pixels = 0, Counter(), np.zeros(256, np.int64)
    for split, pairs in data.pairs.items():
        for index in progress(range(len(pairs)), desc=f"checking {split}", unit="images"):
            try:
                label = data.read(split, index)[1]
                if pairs[index][1]:
                    pixels += np.bincount(label.ravel(), minlength=256)
            except InputError as e:
                faults += 1
                print(e)
                if isinstance(e, LabelInputError):
                    colours += _colours(pairs[index][1])
    return faults, colours, pixels


def _colours(path):
    """How often each colour (red, green, blue) occurs in a file; each value, if it is grey."""
    image = Image.open(path)
    if image.mode.startswith("I"):  # 16 or 32 bits a pixel
        return Counter()
    if image.mode != "L":
        image = image.convert("RGB")
    return Counter({colour: count for count, colour in image.getcolors(image.width * image.height)})


def main():
    parser = Parser(description="Check a data set before hours are spent on it.")
    parser.add_argument("--check", action="store_true", required=True, help="read every file and list every fault")
    parser.add_argument("--dataset", required=True, choices=DATASETS)
    parser.add_argument("--data", help="its folder (default: data/NAME)")
    args = parser.parse_args()
    data = open_dataset(args.dataset, args.data, missing_ok=True)
    faults, colours, pixels = check(data)
    if colours and args.dataset == "folder":
        known = dict(enumerate(data.classes)) | {IGNORE: "ignored"} | dict(zip(data.palette, data.classes))
        print(f"{len(colours)} colours or values in labels that hold no class indices, the commonest and their share:")
        for colour, count in colours.most_common(12):
            print(f"  {colour}  {count / colours.total():.1%}  {known.get(colour, 'not in classes.txt')}")
        if any(isinstance(colour, tuple) for colour in colours):
            print(CONVERT.format(root=args.data or "data/folder"))
    counts = ", ".join(f"{s}: {len(p)} images" for s, p in data.pairs.items())
    if not faults:
        missing = [name for name, count in zip(data.classes, pixels) if not count]
        print(f"ignored: {pixels[IGNORE] / pixels.sum():.1%} of the labels' pixels; classes without a pixel: "
              f"{', '.join(missing) or 'none'}")
    print(f"{counts}, {len(data.classes)} classes, {faults} faulty")
    if faults:
        raise InputError(f"{faults} faulty files are listed above; mend or remove them")


# ---------------------------------------------------------------- what every script shares: errors, options, files

class InputError(Exception):
    """A mistake in what the user gave: shown as one line that names the file and the remedy, exit code 2."""


class LabelInputError(InputError):
    """A label file that holds something else than the classes' indices, colours for instance."""


def command(main):
    """Run a script's `main`, turning what a user can mend into one line on stderr and an exit code."""
    message, code = "", 2
    try:
        main()
        code = 0
    except InputError as e:
        message = f"error: {str(e).rpartition('InputError: ')[2]}"  # a loader process puts its traceback in front
    except torch.cuda.OutOfMemoryError as e:
        message = f"error: out of GPU memory ({str(e).splitlines()[0]}): lower --batch-size or --crop"
    except BrokenPipeError:
        code = 1
    except OSError as e:
        if e.filename is None and e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise  # nothing to mend in a path or on the disk: the traceback says more
        message = f"error: {e.filename or 'output'}: {e.strerror}; check the path, its permissions and the free space"
    except KeyboardInterrupt as e:
        message, code = str(e) or "interrupted; run the same command again to continue", 130
    try:
        sys.stdout.flush()  # so that the message comes last, where both go to one file
    except BrokenPipeError:  # the reader of a pipe, as in `| head`, has what it wants
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if message:
        print(" ".join(message.split()), file=sys.stderr)
    if code:
        sys.exit(code)


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


def quiet_worker(_):
    """For loader processes: Ctrl-C reaches the whole group, but is the main process's, which saves and ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # not SIGTERM, with which the main process ends them


def write_atomically(path, content):
    """Write bytes beside `path`, sync, rename: a kill at any moment leaves the old file or the new one."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        with suppress(OSError):
            part.unlink()
        raise InputError(f"{path}: cannot write it ({e}); free some space or choose another place") from None


def save_tensors(path, content):
    """torch.save of a dict, by write_atomically."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getbuffer())


def load_checkpoint(path, keys=()):
    """Our own checkpoint as a dict, tensors and plain values only. Raises InputError if it is not one."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give the path of a last.pt") from None
    except Exception as e:
        reason = str(e)[:80] or "empty"
        raise InputError(f"{path}: not a readable checkpoint ({reason}); train again or give another") from None
    missing = [k for k in keys if k not in state] if isinstance(state, dict) else ["dictionary"]
    if missing:
        raise InputError(f"{path}: not a checkpoint of this project: no {', '.join(missing)} in it; give a last.pt")
    return state


def load_strictly(module, state, source, wanted, remedy, aside=()):
    """Fill `module` from a state dict of its own names and shapes; what begins with one of `aside` is left aside.

    Returns the names left aside. Raises InputError, that `source` does not hold what is `wanted`, before anything is
    changed.
    """
    left = sorted(k for k in state if k.startswith(tuple(aside)))
    own = module.state_dict()
    # old files lack num_batches_tracked
    state = {k: v for k, v in own.items() if k.endswith("num_batches_tracked")} | \
        {k: v for k, v in state.items() if k not in left}
    bad = [k for k in own if getattr(state.get(k), "shape", None) != own[k].shape] + sorted(set(state) - set(own))
    if bad:
        there, here = (tuple(getattr(d.get(bad[0]), "shape", ())) or "nothing" for d in (state, own))
        raise InputError(f"{source}: not {wanted}: {len(bad)} tensors differ, the first is {bad[0]} (there {there}, "
                         f"here {here}); {remedy}")
    module.load_state_dict(state)
    return left


def read_weights(source, option):
    """A plain state dict from a file or an URL (downloaded once into torch.hub's cache, with a bar)."""
    if "://" not in str(source):
        state = load_checkpoint(source)
        if not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
            raise InputError(f"{source}: not a plain state dict of tensors; {option} takes one")
        return state
    # Hugging Face calls every model's file pytorch_model.bin, so the cache needs the model's name too
    name = Path(source).name
    if "/resolve/" in source:
        name = source.split("://")[1].split("/resolve/")[0].replace("/", "-") + ".bin"
    try:
        return torch.hub.load_state_dict_from_url(source, map_location="cpu", weights_only=True, file_name=name,
                                                  check_hash="download.pytorch.org" in source)
    except Exception as e:
        raise InputError(f"{source}: cannot download it ({e}); fetch it elsewhere and save it as {torch.hub.get_dir()}/"
                         f"checkpoints/{name}, or start from random weights with {option} none") from None


if __name__ == "__main__":
    command(main)
