"""Every layout on tiny files, labels of every kind, the training stream, `shapes`, downloads, the
check, and what every script shares: errors, files and weights."""
import argparse
import dataclasses
import errno
import functools
import hashlib
import http.server
import io
import multiprocessing
import os
import shutil
import signal
import struct
import sys
import threading
import time
import unicodedata
import zlib
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import data
from conftest import error_of
from data import IGNORE, EvalImages, InputError, TrainStream, draw_shapes, open_dataset, voc_palette


def put(path, pixels, palette=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(pixels, np.uint8))
    if palette:
        image.putpalette([c for rgb in palette for c in rgb])
    image.save(path)


def grey(label):
    return np.full((*np.shape(label), 3), 90)


CLASSES = "road 128 64 128\ntraffic light 250 170 30\nsky 70 130 180\n"
ROAD, LIGHT, SKY, OTHER = (128, 64, 128), (250, 170, 30), (70, 130, 180), (1, 2, 3)
COLOURS = np.array([ROAD, LIGHT, SKY, OTHER], np.uint8)


def put_folder(root, labels, classes=CLASSES, image=grey):
    """A `folder` data set: every split holds `labels`."""
    for split in ("train", "val"):
        for i, label in enumerate(labels):
            put(root / "images" / split / f"{i}.png", image(np.asarray(label)))
            put(root / "labels" / split / f"{i}.png", label)
    (root / "classes.txt").write_text(classes)
    return root


def check_all(root):
    folder = open_dataset("folder", root, missing_ok=True)
    data.check(folder, folder.pairs)


# ---------------------------------------------------------------- layouts and label maps

def test_ade20k_turns_0_into_ignore_and_k_into_k_minus_1(tmp_path):
    folder = tmp_path / "ADEChallengeData2016"
    for split, stem in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        # some pictures are grey: mode L
        put(folder / "images" / split / f"{stem}.jpg", np.full((1, 151), 90))
        put(folder / "annotations" / split / f"{stem}.png", [range(151)])
    rows = [f"{k} \t0.1\t9\t9\tthing {k} , second name, third\n" for k in range(1, 151)]
    (folder / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n" + "".join(rows))
    ade = open_dataset("ade20k", tmp_path)
    image, label = ade.read("val", 0)
    assert label[0].tolist() == [IGNORE, *range(150)]
    assert image.mode == "RGB"
    names = [p.name for p in ade.pairs["train"][0]]
    assert names == ["ADE_train_00000001.jpg", "ADE_train_00000001.png"]
    assert ade.classes == [f"thing {k}" for k in range(1, 151)]
    assert len(set(ade.palette)) == 150
    assert ade.class_of_value[151] == ade.class_of_value[255] == -1


def test_cityscapes_maps_the_34_label_ids_and_notes_labels_without_a_picture(tmp_path, capsys):
    for split, city in (("train", "aachen"), ("train", "ulm"), ("val", "munster")):
        stem = f"{city}_000001_000019"
        put(tmp_path / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png", grey([range(34)]))
        put(tmp_path / "gtFine" / split / city / f"{stem}_gtFine_labelIds.png", [range(34)])
        put(tmp_path / "gtFine" / split / city / f"{stem}_gtFine_instanceIds.png", [range(34)])
    city = open_dataset("cityscapes", tmp_path)
    i = IGNORE
    assert city.read("val", 0)[1][0].tolist() == [
        i, i, i, i, i, i, i, 0, 1, i, i, 2, 3, 4, i, i, i, 5, i, 6, 7, 8, 9, 10, 11, 12, 13, 14,
        15, i, i, 16, 17, 18]
    assert len(city.pairs["train"]) == 2
    assert len(city.classes) == 19
    assert [city.classes[k] for k in (0, 6, 18)] == ["road", "traffic light", "bicycle"]
    assert (city.palette[0], city.palette[13]) == ((128, 64, 128), (0, 0, 142))
    assert city.class_of_value[34] == city.class_of_value[255] == -1
    (tmp_path / "leftImg8bit/train/ulm/ulm_000001_000019_leftImg8bit.png").unlink()
    open_dataset("cityscapes", tmp_path)
    assert ("gtFine/train: 1 labels without a picture, not used: ulm_000001_000019_gtFine_labelIds"
            in capsys.readouterr().out)


def put_voc(root, augmented):
    folder = root / "VOCdevkit" / "VOC2012"
    lists = folder / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    indices = [[*range(21), 255]]
    stems = {"train": "2007_000001", "val": "2007_000002", "trainaug": "2008_000003"}
    for split, stem in stems.items():
        put(folder / "JPEGImages" / f"{stem}.jpg", grey(indices))
        if split != "trainaug":
            palette = voc_palette(256)[::-1]  # the numbers count
            put(folder / "SegmentationClass" / f"{stem}.png", indices, palette)
        if augmented:  # plain grey indices, as they are in circulation
            put(folder / "SegmentationClassAug" / f"{stem}.png", indices)
        (lists / f"{split}.txt").write_text(f"{stem}\n")
    if augmented:
        stems = ("2007_000001", "2008_000003")
        lines = (f"/JPEGImages/{stem}.jpg /SegmentationClassAug/{stem}.png\n" for stem in stems)
        (lists / "trainaug.txt").write_text("".join(lines))
    return root


@pytest.mark.parametrize("augmented", (False, True))
def test_voc_reads_palette_indices_and_takes_trainaug_where_it_is(tmp_path, augmented):
    voc = open_dataset("voc", put_voc(tmp_path, augmented))
    stems = [image.stem for image, _ in voc.pairs["train"]]
    assert stems == ["2007_000001", "2008_000003"][:1 + augmented]
    folders = {label.parent.name for _, label in voc.pairs["train"]}
    assert folders == {"SegmentationClass" + "Aug" * augmented}
    assert [label.parent.name for _, label in voc.pairs["val"]] == ["SegmentationClass"]
    for split in ("train", "val"):
        assert voc.read(split, 0)[1][0].tolist() == [*range(21), 255]
    assert (len(voc.classes), voc.classes[0], voc.classes[20]) == (21, "background", "tvmonitor")
    known = {0: (0, 0, 0), 1: (128, 0, 0), 6: (0, 128, 128), 8: (64, 0, 0), 20: (0, 64, 128)}
    assert {k: voc.palette[k] for k in known} == known


# ---------------------------------------------------------------- the training stream

PRIMARY = np.array([(250, 0, 0), (0, 250, 0), (0, 0, 250)], np.uint8)


@pytest.fixture
def blocks(tmp_path):
    """Five pictures of 40 x 56 whose colour tells the label: random blocks of 8 pixels."""
    labels = np.random.default_rng(0).integers(0, 3, (5, 5, 7)).repeat(8, 1).repeat(8, 2)
    return open_dataset("folder", put_folder(tmp_path, labels, image=lambda label: PRIMARY[label]))


def same(items, others):
    return all(torch.equal(a, b) for item, other in zip(items, others, strict=True)
               for a, b in zip(item, other))


def test_an_item_depends_on_seed_and_position_alone(blocks):
    stream = TrainStream(blocks, 3, 40, 32, (0.5, 2.0), 20)
    items = [stream[p] for p in range(12)]
    again = TrainStream(blocks, 3, 40, 32, (0.5, 2.0), 99)
    assert same([again[p] for p in reversed(range(12))], items[::-1])
    order = [np.random.default_rng([3, epoch]).permutation(5).tolist() for epoch in range(4)]
    assert [stream.source(p)[1] for p in range(20)] == sum(order, [])
    alone, two = (list(DataLoader(stream, 2, num_workers=n)) for n in (0, 2))
    assert same(two, alone)
    # one image, so that the order is no difference
    one = dataclasses.replace(blocks, pairs={"train": blocks.pairs["train"][:1]})
    for a, b in (((3, 0), (4, 0)), ((3, 0), (3, 1))):
        streams = (TrainStream(one, seed, 40, 32, (0.5, 2.0), 20)[p] for seed, p in (a, b))
        assert not same(*([item] for item in streams))


def test_images_without_labels_join_the_labelled_ones_in_one_order(blocks):
    unlabelled = [(image, None) for image, _ in blocks.pairs["train"] + blocks.pairs["val"][:2]]
    mixed = dataclasses.replace(blocks, pairs=blocks.pairs | {"unlabelled": unlabelled})
    stream = TrainStream(mixed, 3, 40, 32, (0.5, 2.0), 34, unlabelled=True)
    epochs = [[stream.source(p) for p in range(start, start + 17)] for start in (0, 17)]
    # five labelled images, twice, are at least as many as the seven others
    expected = 2 * [("train", i) for i in range(5)] + [("unlabelled", i) for i in range(7)]
    assert all(sorted(epoch) == sorted(expected) for epoch in epochs) and epochs[0] != epochs[1]
    for position, (split, _) in enumerate(epochs[0]):
        assert (stream[position][1] == IGNORE).all() == (split == "unlabelled")

    plain = TrainStream(blocks, 3, 40, 32, (0.5, 2.0), 12)
    for other in (TrainStream(mixed, 3, 40, 32, (0.5, 2.0), 12),
                  TrainStream(blocks, 3, 40, 32, (0.5, 2.0), 12, unlabelled=True)):
        assert same([plain[p] for p in range(12)], [other[p] for p in range(12)])


def test_evaluation_sees_images_at_its_scale_and_labels_at_theirs(blocks):
    images = EvalImages(blocks, "val", 20, [4, 1])
    image, label = images[1]
    assert len(images) == 2 and len(EvalImages(blocks, "val", 20)) == 5
    assert (image.shape, image.dtype, label.dtype) == ((3, 20, 28), torch.uint8, torch.uint8)
    assert np.array_equal(label, blocks.read("val", 1)[1])


def test_a_crop_larger_than_the_image_is_padded_with_ignore_and_the_mean_colour(blocks):
    image, label = TrainStream(blocks, 0, 40, 64, (1, 1), 1)[0]
    inside = torch.zeros(64, 64, dtype=torch.bool)
    mirrored = label[0, 0] == IGNORE
    inside[:40, 8:] = mirrored
    inside[:40, :56] |= ~mirrored
    assert torch.equal(label != IGNORE, inside)
    assert image[:, ~inside].unique(dim=1).flatten().tolist() == list(data.MEAN_COLOUR)


def test_image_and_label_are_cropped_flipped_and_scaled_together(blocks):
    orientations = set()
    stream = TrainStream(blocks, 0, 40, 40, (1, 1), 20)
    for position in range(20):
        image, label = stream[position]
        assert np.array_equal(image.numpy().transpose(1, 2, 0), PRIMARY[label])
        whole = blocks.read(*stream.source(position))[1]
        found = {turn for turn in (1, -1) for x in range(17)
                 if np.array_equal(whole[:, x:x + 40][:, ::turn], label)}
        assert len(found) == 1
        orientations |= found
    assert orientations == {1, -1}
    for image, label in (TrainStream(blocks, 0, 40, 48, (0.5, 2.0), 10)[p] for p in range(10)):
        inside = label != IGNORE  # scaled, they differ at edges between blocks alone
        assert (image.argmax(0) == label)[inside].float().mean() > 0.9


# ---------------------------------------------------------------- shapes

def test_shapes_are_a_function_of_seed_and_index_and_hold_every_class():
    keys = (0, 7), (0, 7), (0, 8), (1, 7)
    drawn = [[np.asarray(part).tobytes() for part in draw_shapes(*key)] for key in keys]
    assert drawn[0] == drawn[1]
    assert len({image for image, _ in drawn}) == 3
    assert hashlib.sha256(b"".join(drawn[0])).hexdigest().startswith("f6d1713db60c16fc")
    labels = np.stack([np.asarray(draw_shapes(0, i)[1]) for i in range(12)])
    assert set(np.unique(labels)) == {*range(len(data.SHAPES)), IGNORE}


def test_shapes_are_drawn_once_and_read_as_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHAPES_COUNT", {"train": 3, "val": 2, "test": 1})
    shapes = open_dataset("shapes", tmp_path / "a")
    found = {split: len(pairs) for split, pairs in shapes.pairs.items()}
    assert found == data.SHAPES_COUNT | {"unlabelled": 0}
    image, label = shapes.read("train", 2)
    drawn = draw_shapes(0, 2)
    assert np.array_equal(image, drawn[0]) and np.array_equal(label, drawn[1])
    monkeypatch.setattr(data, "draw_shapes", None)  # a second call would fail to draw
    assert open_dataset("shapes", tmp_path / "a").classes == data.SHAPES


def test_of_two_that_draw_at_once_one_result_stays_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHAPES_COUNT", {"train": 3, "val": 2, "test": 1})
    draw, inner = data.draw_shapes, []

    def overtaken(seed, index):
        if index == 1 and not inner:
            inner.append(True)
            data.make_shapes(tmp_path / "a")  # another process begins later and ends first
            (tmp_path / "a" / "mark").touch()
        return draw(seed, index)

    monkeypatch.setattr(data, "draw_shapes", overtaken)
    assert len(open_dataset("shapes", tmp_path / "a").pairs["train"]) == 3
    assert (tmp_path / "a" / "mark").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


# ---------------------------------------------------------------- downloads

@pytest.fixture
def published(tmp_path, monkeypatch):
    """A small VOC as an archive on a server of our own: its path there."""
    path = Path(shutil.make_archive(tmp_path / "site" / "voc", "zip",
                                    put_voc(tmp_path / "source", False)))
    site = functools.partial(http.server.SimpleHTTPRequestHandler, directory=path.parent)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/voc.zip"
        digest = hashlib.md5(path.read_bytes()).hexdigest()
        monkeypatch.setitem(data.ARCHIVES, "voc", (url, digest, "VOCdevkit"))
        yield path
        server.shutdown()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_download_leaves_nothing_where_it_fails_and_is_unpacked_once(tmp_path, published):
    whole, root = published.read_bytes(), tmp_path / "data"
    for content in (whole[:len(whole) // 2], None):
        published.write_bytes(content) if content else published.unlink()
        with pytest.raises(InputError, match=r"^http://127.*/voc.zip: cannot download and unpack"):
            open_dataset("voc", root)
        assert names(root) == []
    (root / ".DS_Store").touch()
    (root / "VOCdevkit.part-x").mkdir()  # as a kill leaves it
    published.write_bytes(whole)
    assert len(open_dataset("voc", root).pairs["train"]) == 1
    published.unlink()  # a second download would fail
    assert len(open_dataset("voc", root).pairs["train"]) == 1
    assert names(root) == [".DS_Store", "VOCdevkit", "VOCdevkit.part-x"]


def test_an_archive_of_the_user_is_unpacked_or_refused_and_stays(tmp_path, published):
    own = tmp_path / "data" / "voc.zip"
    own.parent.mkdir()
    own.write_bytes(b"the user's own")
    with pytest.raises(InputError, match="voc.zip: not the file of http.*, whose MD5 is"):
        open_dataset("voc", own.parent)
    assert own.read_bytes() == b"the user's own" and names(own.parent) == ["voc.zip"]
    shutil.move(published, own)  # no download is possible any more
    assert open_dataset("voc", own.parent)
    assert names(own.parent) == ["VOCdevkit", "voc.zip"]


def test_nothing_is_downloaded_into_a_folder_that_holds_something_else(tmp_path, published):
    published.unlink()
    root = put_voc(tmp_path / "data", False)
    place = root / "VOCdevkit" / "VOC2012"
    with pytest.raises(InputError) as e:
        open_dataset("voc", place)
    assert str(e.value).startswith(f"{place}: no VOCdevkit in it, but ")
    assert str(e.value).endswith(f"; give --data {root}")
    with pytest.raises(InputError, match="in it, but VOCdevkit; give --data an empty folder"):
        open_dataset("ade20k", root)


# ---------------------------------------------------------------- pictures and labels

def test_what_pillow_reads_is_read_and_what_is_left_out_is_named(tmp_path, capsys):
    put_folder(tmp_path, [np.full((8, 8), i % 3) for i in range(6)])
    images, labels = tmp_path / "images" / "train", tmp_path / "labels" / "train"
    for i, ending in enumerate((".tif", ".webp", ".bmp", ".GIF")):
        Image.open(images / f"{i}.png").save(images / f"{i}{ending}")
        (images / f"{i}.png").unlink()
    shutil.move(images / "4.png", images / unicodedata.normalize("NFD", "é.png"))
    shutil.move(labels / "4.png", labels / unicodedata.normalize("NFC", "É.PNG".lower()))
    shutil.move(labels / "5.png", labels / "5.PNG")
    for hidden in ("._5.png", ".DS_Store"):
        (images / hidden).write_bytes(b"Mac OS X")
        (labels / hidden).write_bytes(b"Mac OS X")
    (images / "more").mkdir()
    (images / "clip.mp4").touch()
    (tmp_path / "images" / "unlabeled").mkdir()
    put(labels / "lonely.png", [[0]])
    folder = open_dataset("folder", tmp_path)
    assert len(folder.pairs["train"]) == 6
    assert sum(folder.read("train", i)[1].sum() for i in range(6)) == 64 * (1 + 2 + 1 + 2)
    out = capsys.readouterr().out
    assert "images/train: 2 left out, no picture that can be read here: clip.mp4, more" in out
    assert "labels/train: 1 labels without a picture, not used: lonely.png" in out
    assert f"NOTE: {tmp_path}/images: unlabeled not used; the splits are train, " in out
    assert out.count("NOTE") == 3


def png(path, kind, bits, width, rows):
    """A PNG that Pillow cannot write. kind: 0 grey, 2 RGB. rows: bytes."""
    def chunk(name, body):
        check = struct.pack(">I", zlib.crc32(name + body))
        return struct.pack(">I", len(body)) + name + body + check
    head = struct.pack(">IIBBBBB", width, len(rows), bits, kind, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body)
                     + chunk(b"IEND", b""))


def palette(colours, indices=((0, 1, 2, 1),)):
    return lambda path: put(path, indices, colours)


def padded(*colours):
    return [*colours, *[(0, 0, 0)] * (256 - len(colours))]


BLACK = "ground 0 0 0\nroad 128 64 128\nignore 9 9 9\nsky 70 130 180\n"
TWO = "ground 0 0 0\nobject 255 255 255\n"
READ = {  # what a label is: (how it is saved, classes.txt, what is read)
    "1 bit": (lambda p: png(p, 0, 1, 4, [b"\x60"]), CLASSES, [0, 1, 1, 0]),
    "4 bits": (lambda p: png(p, 0, 4, 4, [b"\x01\x21"]), CLASSES, [0, 1, 2, 1]),
    "RGB": (lambda p: put(p, COLOURS[[[0, 1, 2, 1]]]), CLASSES, [0, 1, 2, 1]),
    "RGBA": (lambda p: Image.fromarray(COLOURS[[[0, 1, 2, 1]]]).convert("RGBA").save(p), CLASSES,
             [0, 1, 2, 1]),
    "ignored colour": (lambda p: put(p, [[(9, 9, 9), SKY, (0, 0, 0), ROAD]]), BLACK,
                       [IGNORE, 2, 0, 1]),
    "palette in order": (palette([ROAD, LIGHT, SKY]), CLASSES, [0, 1, 2, 1]),
    "palette in another order": (palette([LIGHT, ROAD, SKY]), CLASSES, [1, 0, 2, 0]),
    "palette at other indices": (palette(padded(SKY, *[OTHER] * 6, ROAD), [[0, 7, 255, 0]]),
                                 CLASSES, [2, 0, IGNORE, 2]),
    "VOC's palette": (palette(voc_palette(256), [[0, 1, 2, 255]]), CLASSES, [0, 1, 2, IGNORE]),
    "one colour of greys": (palette([(k, k, k) for k in range(256)], [[0, 1, 2, 255]]), BLACK,
                            [0, 1, 2, IGNORE]),
    "black and white": (palette([(0, 0, 0), (255, 255, 255), (9, 9, 9)]), CLASSES, [0, 1, 2, 1]),
    "mask with a palette": (palette([(k, k, k) for k in range(256)], [[0, 255, 255, 0]]), TWO,
                            [0, 1, 1, 0]),
    "255 in a padded palette": (palette(padded((0, 0, 0), ROAD, SKY), [[0, 1, 2, 255]]), BLACK,
                                [0, 1, 2, IGNORE]),
    "255 in one that is renumbered": (palette(padded(SKY, ROAD, (0, 0, 0)), [[0, 1, 2, 255]]),
                                      BLACK, [2, 1, 0, IGNORE]),
    "index 0 ignored": (palette(padded((9, 9, 9), (0, 0, 0), ROAD, SKY), [[0, 1, 2, 3]]), BLACK,
                        [IGNORE, 0, 1, 2]),
}


@pytest.mark.parametrize("what", READ)
def test_labels_that_tell_their_classes_in_any_way_are_read_and_left_as_they_are(tmp_path, what):
    save, classes, expected = READ[what]
    put_folder(tmp_path, [[[0, 1, 1, 0]]], classes)
    path = tmp_path / "labels" / "train" / "0.png"
    save(path)
    before = path.read_bytes()
    label = open_dataset("folder", tmp_path).read("train", 0)[1]
    assert label.tolist() == [expected] and label.dtype == np.uint8
    assert path.read_bytes() == before


def pages(path):
    one = Image.fromarray(np.array([[0, 1, 2, 1]], np.uint8))
    one.save(path, "TIFF", save_all=True, append_images=[one])


REFUSED = {  # what is wrong: (how the label 0 1 2 1 is spoilt, what the message holds)
    "JPEG": (lambda p: Image.open(p).convert("L").save(p, "JPEG"), "holds JPEG data, whose"),
    "inverted": (lambda p: Image.open(p).save(p, "TIFF", tiffinfo={262: 0}), "grey values packed"),
    "stretched": (lambda p: p.write_bytes(b"P5 4 1 2\n\0\1\2\1"), "grey values packed"),
    "pages": (pages, "2 pages, but one is read"),
    "16 bits": (lambda p: Image.fromarray(np.zeros((1, 4), np.uint16)).save(p), "mode I;16, more"),
    "CMYK": (lambda p: Image.new("CMYK", (4, 1)).save(p, "TIFF"), "mode CMYK, which names no"),
    "transparent": (lambda p: Image.new("RGBA", (4, 1), (*ROAD, 9)).save(p),
                    "has transparent pixels, which are of no class"),
    "other values": (lambda p: put(p, [[0, 7, 7, 255]]), "outside the 3 classes: 7 (2 pixels)"),
    "other colour": (lambda p: put(p, COLOURS[[[0, 3, 3, 1]]]),
                     "colour (1, 2, 3), 50.0% of the pixels, is of no class; give it a line in"),
    "numbers in three channels": (lambda p: put(p, [[(k, k, k) for k in (0, 1, 1, 2)]]),
                                  "or save the label as greys of one channel if they are class n"),
    "a picture": (lambda p: put(p, [[(k, 90, 90) for k in range(60)]]), "a picture, not a label?"),
    "palette half known": (palette([ROAD, OTHER, SKY]), "colour (1, 2, 3), 50.0% of the pixels"),
    "palette of other greys": (palette([(1, 1, 1), (0, 0, 0), (2, 2, 2), *[OTHER] * 253],
                                       [[0, 1, 1, 255]]), "colour (0, 0, 0), 50"),
    "stray index": (palette([ROAD, LIGHT, SKY, *[ROAD] * 253], [[0, 1, 2, 11]]),
                    "classes: 11 (1 pixels)"),
    "another size": (lambda p: put(p, [[0, 1, 2]]), "3x1, but its image is 4x1"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:40]), "truncated or not an image"),
    "missing": (lambda p: p.unlink(), "such file"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_label_that_may_not_be_what_was_meant_is_named(tmp_path, capsys, what):
    spoil, words = REFUSED[what]
    put_folder(tmp_path, [[[0, 1, 2, 1]]] * 2)
    path = tmp_path / "labels" / "train" / "0.png"
    spoil(path)
    with pytest.raises(InputError) as e:
        open_dataset("folder", tmp_path, missing_ok=True).read("train", 0)
    assert str(e.value).startswith(f"{path}: ") and words in str(e.value)
    with pytest.raises(InputError, match=r" \(1 faulty in all, listed above\)"):
        check_all(tmp_path)
    assert words in capsys.readouterr().out


VOCS = "background 0 0 0\ncat 64 0 0\ndog 64 0 128\n"  # a part of VOC, whose numbers are 0, 8, 12


@pytest.mark.parametrize("classes, save, told", [
    (VOCS, [[0, 1, 0, 1]], True), (VOCS, [[0, 0, 255, 0]], False), (BLACK, [[0, 1, 2, 0]], True)])
def test_labels_read_by_colour_beside_labels_read_as_numbers_are_noted(
        tmp_path, capsys, classes, save, told):
    put_folder(tmp_path, [[[0, 1, 2, 1]]] * 4, classes)
    lines = [tuple(map(int, line.split()[1:])) for line in classes.splitlines()]
    for path in tmp_path.glob("labels/*/*.png"):
        put(path, np.array(lines, np.uint8)[[[0, 1, 1, 3 % len(lines)]]])
    put(tmp_path / "labels/train/0.png", save, voc_palette(256) if classes == VOCS else None)
    check_all(tmp_path)
    assert ("NOTE: labels are read in two ways: by" in capsys.readouterr().out) == told


def test_class_numbers_beside_an_ignored_colour_are_refused(tmp_path, capsys, monkeypatch):
    """Is 0 the first line or the first class?"""
    classes = "ignore 0 0 0\nroad 1 2 3\nsky 4 5 6\ncar 7 8 9\n"
    put_folder(tmp_path, [[[0, 1, 2, 255]]] * 2, classes)
    argv = ["--dataset", "folder", "--data", tmp_path]
    message = error_of(data.main, argv, capsys)
    assert "holds class numbers, where 255 is ignored, but classes.txt ignores colours" in message
    (tmp_path / "classes.txt").write_text(CLASSES)
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, argv)])
    data.main()
    assert "  road: train 25.0%, val 25.0%\n" in capsys.readouterr().out


def test_a_phones_jpeg_with_a_preview_behind_it_is_one_picture(tmp_path):
    one = Image.new("RGB", (4, 2), (90, 0, 0))
    one.save(tmp_path / "b.jpg", "MPO", save_all=True, append_images=[one.resize((2, 1))])
    assert data.read_image(tmp_path / "b.jpg").size == (4, 2)


def test_cvats_labelmap_stands_for_a_missing_classes_txt(tmp_path, capsys):
    root = put_folder(tmp_path, [COLOURS[[[0, 1, 2, 3]]]], image=lambda label: label)
    (root / "classes.txt").unlink()
    (root / "labelmap.txt").write_text(
        "# label:color_rgb:parts:actions\nroad:128,64,128::\nignore:1,2,3::\n"
        "traffic light:250,170,30::\nsky:70,130,180::\n")
    folder = open_dataset("folder", root)
    assert folder.classes == ["road", "traffic light", "sky"] and folder.palette[2] == SKY
    assert folder.read("val", 0)[1].tolist() == [[0, 1, 2, IGNORE]]
    (root / "classes.txt").write_text("\ufeffa 1 1 1\n\nb 2 2 2\n")  # as Windows' editor saves
    assert open_dataset("folder", root).classes == ["a", "b"]
    assert "are those of classes.txt, labelmap.txt is not read" in capsys.readouterr().out


def test_images_are_turned_as_programs_show_them_even_where_exif_data_are_damaged(tmp_path):
    put_folder(tmp_path, [np.zeros((2, 3), int)] * 2)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    pixels = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    Image.fromarray(pixels).save(tmp_path / "images" / "train" / "0.png", exif=exif)
    (tmp_path / "images" / "train" / "1.png").unlink()
    Image.new("RGB", (3, 2)).save(tmp_path / "images" / "train" / "1.jpg", exif=b"Exif\0\0nonsense")
    folder = open_dataset("folder", tmp_path)
    assert np.array_equal(np.array(folder.read("train", 0)[0]), pixels[::-1, ::-1])
    assert folder.read("train", 1)[0].size == (3, 2)


def planar(path):
    """A TIFF of 16 bits with a plane per channel, of which Pillow would read the bytes."""
    Image.new("RGB", (2, 1)).save(path, "TIFF", tiffinfo={284: 2})
    path.write_bytes(path.read_bytes().replace(b"\x08\0\x08\0\x08\0", b"\x10\0\x10\0\x10\0"))


DEEP = {
    "grey": lambda p: Image.fromarray(np.zeros((1, 2), np.uint16)).save(p),
    "float": lambda p: p.write_bytes(b"Pf\n2 1\n-1\n" + bytes(8)),
    "RGB": lambda p: png(p, 2, 16, 2, [bytes(12)]),
    "PPM": lambda p: p.write_bytes(b"P6 2 1 4095\n" + bytes(12)),
    "planes": planar,
}


@pytest.mark.parametrize("kind", DEEP)
def test_pictures_of_more_than_8_bits_are_refused_by_their_header(tmp_path, kind):
    DEEP[kind](tmp_path / "deep.png")
    with pytest.raises(InputError, match="deep.png: mode .*, more than 8 bits per channel; save"):
        data.read_image(tmp_path / "deep.png")


def test_a_picture_too_large_for_pillow_is_named(tmp_path, monkeypatch):
    put(tmp_path / "large.png", np.zeros((9, 10)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with pytest.raises(InputError, match="large.png: more than 80 pixels; cut it into tiles"):
        data.read_image(tmp_path / "large.png")


@pytest.mark.parametrize("text, message", (
    ("road\nsky 1 2 3\n", ", line 1: 'road' is not 'name R G B'"),
    ("a 1 2 3\nb 1 256 3\n", ", line 2"),
    ("a 1 2 3\n\nb 1 2 3\n", ", line 3: b has the colour of a; give each class its own"),
    ("a 1 2 3\nroad 12 6 12 25\n", ", line 2: 'road 12 6 12 25' has a fourth number; leave out"),
    ("a 1 2 3\n2 road 1 2 4\n", ", line 2: '2 road 1 2 4' has a fourth number"),
    ("# void 0 0 0\na 1 2 3\nb 3 2 1\n", ", line 1: '# void 0 0 0' is a class behind"),
    ("ignore 1 2 3\na 1 2 3\n", ", line 2: a has the colour of ignore"),
    ("a 1 2 3\nb 3 2 1\nIgnored 7 7 7\n", ", line 3: Ignored would be a class; write ignore"),
    ("a 1 2 3\na 3 2 1\n", ": 2 classes, 1 names"),
    ("road 1 2 3\n", ": 1 classes, 1 names; 2 to 255"),
    ("straße 1 2 3\nb 3 2 1\n", ": not in UTF-8; save it as UTF-8"),
    (None, ": no such file")))
def test_a_wrong_classes_txt_is_named_with_its_line(tmp_path, text, message):
    path = put_folder(tmp_path, [[[0]]]) / "classes.txt"
    path.write_text(text, "latin-1") if text is not None else path.unlink()
    with pytest.raises(InputError) as e:
        open_dataset("folder", tmp_path)
    assert str(e.value).startswith(f"{path}{message}")


def test_missing_folders_splits_and_two_images_of_one_label_are_named(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder; give --data"):
        open_dataset("folder", tmp_path / "nowhere")
    root = put_folder(tmp_path / "a", [[[0]]] * 3)
    for i in (0, 1):
        (root / "labels" / "train" / f"{i}.png").unlink()
    with pytest.raises(InputError, match=r"train/0.png: no such file.*\(1 more are missing\)"):
        open_dataset("folder", root)
    put(root / "images" / "train" / "0.bmp", grey([[0]]))
    with pytest.raises(InputError, match="0.bmp and 0.png have the same name before"):
        open_dataset("folder", root)
    root = put_folder(tmp_path / "b", [[[0]]])
    (root / "images" / "unlabelled").symlink_to(tmp_path / "unplugged")  # not an empty folder
    with pytest.raises(FileNotFoundError, match="unlabelled"):
        open_dataset("folder", root)
    (root / "images" / "unlabelled").unlink()
    shutil.rmtree(root / "images" / "val")
    with pytest.raises(InputError, match="no image of the val split found; README"):
        open_dataset("folder", root)


# ---------------------------------------------------------------- what the files hold

def digests(folder):
    return data.labels_digest(folder, "train", "val"), data.pictures_digest(folder, "train", "val")


def test_labels_count_by_their_bytes_and_pictures_by_their_names(tmp_path):
    folder = open_dataset("folder", put_folder(tmp_path / "a", [[[0, 1, 1]], [[2, 255, 1]]]))
    first, size = digests(folder), data.sizes_of_pictures(folder)
    one, other = (tmp_path / f"a/images/train/{i}.png" for i in (0, 1))
    put(other, np.arange(300).reshape(10, 10, 3))
    before = data.sizes_of_pictures(folder)
    held = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(held)  # two pictures swapped: the sum of their sizes is the same
    assert data.sizes_of_pictures(folder) not in (size, before)
    assert data.pictures_digest(folder, "unlabelled") == 0

    copy = shutil.copytree(tmp_path / "a", tmp_path / "b")
    put(copy / "images" / "train" / "0.png", np.arange(27).reshape(3, 3, 3))  # repaired
    put(copy / "labels" / "test" / "0.png", [[0, 0, 0]])
    put(copy / "images" / "test" / "0.png", np.full((1, 3, 3), 7))
    moved = open_dataset("folder", copy)
    assert digests(moved) == first and data.sizes_of_pictures(moved) != size
    assert data.labels_digest(moved, "test") not in (first[0], data.labels_digest(folder, "test"))
    for kind in ("images", "labels"):
        # the last of train is now the first of val: the bytes have the same order
        os.rename(copy / kind / "train" / "1.png", copy / kind / "val" / "-1.png")
    assert all(a != b for a, b in zip(digests(open_dataset("folder", copy)), first))
    put(tmp_path / "a" / "labels" / "train" / "0.png", [[1, 1, 0]])
    changed = digests(folder)
    assert changed[0] != first[0] and changed[1] == first[1]


def test_what_a_colour_means_belongs_to_the_labels(tmp_path):
    folder = put_folder(tmp_path, [[[0, 1, 1]]])
    first = digests(open_dataset("folder", folder))
    swapped = "road 250 170 30\ntraffic light 128 64 128\nsky 70 130 180\n"
    for changed in (swapped, f"{CLASSES}ignore 7 7 77\n"):
        (folder / "classes.txt").write_text(changed)
        assert digests(open_dataset("folder", folder))[0] != first[0]


def test_grey_255_beside_a_white_class_is_noted(tmp_path, capsys):
    put_folder(tmp_path, [[[0, 1, 255]]], TWO)
    check_all(tmp_path)
    line = "NOTE: train: 255 in grey labels is ignored, though white is the colour of object"
    assert line in capsys.readouterr().out


def test_lists_that_differ_are_told_by_the_first_entry():
    assert data.first_difference(["a", "b"], ["a"]) == "entry 1 is b there, nothing here"
    assert data.first_difference(["a"], ["a"]) == ""


# ---------------------------------------------------------------- the check

def test_a_class_without_a_pixel_in_a_split_is_named(tmp_path, capsys):
    put_folder(tmp_path, [[[0, 1, 1, 255]], [[255, 255]]])
    put(tmp_path / "labels" / "val" / "0.png", [[0, 0, 2, 2]])
    check_all(tmp_path)
    assert capsys.readouterr().out.splitlines()[:4] == [
        "train: 50.0% of the labels' pixels are ignored",
        "val: 33.3% of the labels' pixels are ignored",
        "NOTE: classes without a pixel in train, they cannot be learned: sky",
        "NOTE: classes without a pixel in val, they are not scored: traffic light"]


@pytest.mark.parametrize("label, val, words", (
    ([[0, 255]], [[0, 1]], "train hold one class, road, and two are needed; 255 means ignored;"),
    ([[255, 255]], [[0, 1]], "no label of train has a labelled pixel: all are 255, which means"),
    ([[0, 1]], [[255, 255]], "no label of val has a labelled pixel")))
def test_labels_that_cannot_be_trained_on_or_scored_are_refused(tmp_path, label, val, words):
    put_folder(tmp_path, [label])
    put(tmp_path / "labels" / "val" / "0.png", val)
    with pytest.raises(InputError, match=words):
        check_all(tmp_path)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:len(path.read_bytes()) - 30])


EARLY = "train", "val", "unlabelled"  # what training checks
FAULTS = {  # file: (how it is spoilt, whether training must wait for it)
    "images/train/1.png": (lambda p: put(p, grey([[0, 0]])), True),
    "labels/train/1.png": (lambda p: put(p, [[0, 9, 9]]), True),
    "images/val/1.png": (cut_short, True),
    "images/unlabelled/a.png": (DEEP["RGB"], True),
    "images/test/1.png": (cut_short, False),
}


@pytest.mark.parametrize("file", FAULTS)
def test_a_fault_is_found_before_training_unless_it_is_in_test(tmp_path, capsys, file):
    put_folder(tmp_path, [[[0, 1, 2]]] * 3)
    for kind in ("images", "labels"):
        shutil.copytree(tmp_path / kind / "val", tmp_path / kind / "test")
    (tmp_path / "images" / "unlabelled").mkdir()
    spoil, early = FAULTS[file]
    spoil(tmp_path / file)
    folder = open_dataset("folder", tmp_path)
    named = pytest.raises(InputError, match=f"{Path(file).name}: .*1 faulty in all, listed above")
    with named if early else nullcontext():
        data.check(folder, EARLY)
    with named:
        data.check(folder, folder.pairs)
    assert Path(file).name in capsys.readouterr().out


@pytest.mark.parametrize("ending, late", (("jpg", False), ("png", True), ("tif", False)))
def test_sizes_are_compared_after_turning_and_turned_pictures_are_noted(tmp_path, capsys, ending,
                                                                        late):
    put_folder(tmp_path, [[[0], [1], [2]]])
    (tmp_path / "images" / "train" / "0.png").unlink()
    path = tmp_path / "images" / "train" / f"0.{ending}"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (3, 1)).save(path, exif=exif)
    if late:  # a PNG may have them behind its pixels
        content = path.read_bytes()
        start, pixels, end = (content.index(name) - 4 for name in (b"eXIf", b"IDAT", b"IEND"))
        path.write_bytes(content[:start] + content[pixels:end] + content[start:pixels]
                         + content[end:])
    assert open_dataset("folder", tmp_path).read("train", 0)[0].size == (1, 3)
    check_all(tmp_path)
    assert ("NOTE: pictures that are turned as their EXIF data say, which their labels must be, "
            f"too: 1, for instance {path}") in capsys.readouterr().out


def test_pictures_that_are_transparent_or_their_own_labels_are_noted(tmp_path, capsys):
    pictures = put_folder(tmp_path, [[[0, 1, 2]]] * 2) / "images"
    for i, alpha in ((0, 255), (1, 9)):  # the first is opaque
        path = pictures / "val" / f"{i}.png"
        image = Image.open(path)
        image.putalpha(alpha)
        image.save(path)
    shutil.copy(tmp_path / "labels/train/1.png", pictures / "train/1.png")
    check_all(tmp_path)
    out = capsys.readouterr().out
    assert f"colours are seen as they are: 1, for instance {pictures}/val/1.png" in out
    assert f"are their own labels, byte by byte: 1, for instance {pictures}/train/1.png" in out


@pytest.mark.parametrize("copy, of, noted", (
    ("val/0", "train/1", True), ("unlabelled/0", "val/1", True),
    ("unlabelled/0", "train/1", False)))
def test_a_picture_in_two_splits_is_told(tmp_path, capsys, copy, of, noted):
    pictures = put_folder(tmp_path, [[[0, 1, 2]]] * 2) / "images"
    put(pictures / "unlabelled" / "0.png", grey([[0]]))
    for i, path in enumerate(sorted(pictures.rglob("*.png"))):
        put(path, np.full((1, 3, 3), i))
    shutil.copy(pictures / f"{of}.png", pictures / f"{copy}.png")
    check_all(tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if "two splits: 1, for" in line]
    assert len(lines) == noted
    for line in lines:
        assert f"{of}.png" in line and f"{copy}.png" in line


# ---------------------------------------------------------------- the console

def test_missing_streams_end_no_work(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)  # as Python does where it is started without them
    done = []
    data.command(lambda: done.extend(data.progress(range(3))))
    assert done == [0, 1, 2]


def test_a_closed_pipe_ends_a_script_without_a_word(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)  # as `head` does
    stdout = open(writer, "w")
    monkeypatch.setattr(sys, "stdout", stdout)
    with pytest.raises(SystemExit) as stop:
        data.command(lambda: print(10 ** 6 * "x"))
    stdout.close()  # what is left goes nowhere, without another BrokenPipeError
    assert stop.value.code == 1 and capsys.readouterr().err == ""


def test_what_a_console_cannot_show_is_replaced(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    data.command(lambda: print("straße"))
    assert stream.buffer.getvalue() == b"stra\\xdfe\n"


def test_no_bar_is_drawn_where_stderr_is_no_terminal(capsys):
    assert list(data.progress(range(3))) == [0, 1, 2]
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------- errors and limits

SHM = "error: too little shared memory (/dev/shm) for the loader processes: take --workers 0, or"


@pytest.mark.parametrize("error, code, line", (
    (InputError("x.png: truncated;\n  get it again"), 2, "error: x.png: truncated; get it again"),
    (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried 2 GiB\nmore"), 2,
     "error: out of GPU memory: lower --batch-size or --crop"),
    (PermissionError(errno.EACCES, "Permission denied", "runs/a"), 2,
     "error: PermissionError: [Errno 13] Permission denied: 'runs/a'"),
    (OSError("Caught OSError in DataLoader worker process 0.\nTraceback\nOSError: [Errno 5] a.png"),
     2, "error: OSError: [Errno 5] a.png"),
    (ConnectionResetError(errno.ECONNRESET, "reset by peer"), 2, "error: a loader process died"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is"), 2, SHM),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), 2,
     "error: a loader process died (out of memory?): run the same command again with fewer"),
    (KeyboardInterrupt(), 130, "interrupted; run the same command again to continue"),
    (KeyboardInterrupt("student: stopped and saved at step 3"), 130,
     "student: stopped and saved at step 3")))
def test_what_a_user_can_mend_is_one_line_and_an_exit_code(capsys, error, code, line):
    with pytest.raises(SystemExit) as stop:
        data.command(Mock(side_effect=error))
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == code and len(lines) == 1 and lines[0].startswith(line)


def test_other_errors_keep_their_traceback():
    error = RuntimeError("triton: out of resource: shared memory")  # that of a GPU
    with pytest.raises(RuntimeError, match="triton"):
        data.command(Mock(side_effect=error))


def test_small_shared_memory_ends_a_validation_and_no_process_waits(tmp_path, monkeypatch, capsys):
    full = RuntimeError("unable to write to file </torch_1>: No space left on device (28)")
    monkeypatch.setattr(torch.Tensor, "share_memory_", Mock(side_effect=full))
    folder = open_dataset("folder", put_folder(tmp_path, [np.zeros((8, 8))]))
    loader = DataLoader(EvalImages(folder, "val", 8), batch_size=None, num_workers=1, timeout=30)
    with pytest.raises(SystemExit):
        data.command(lambda: list(loader))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(SHM) and "--shm-size" in lines[0]


def test_loaders_leave_signals_to_the_main_process_and_are_killed_at_its_end():
    def sleep(ready):
        data.quiet_worker(0)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), number)
        ready.set()
        time.sleep(60)

    handler, ready = signal.getsignal(signal.SIGCHLD), multiprocessing.Event()
    child = multiprocessing.get_context("fork").Process(target=sleep, args=(ready,), daemon=True)
    with pytest.raises(KeyError):
        data.command(lambda: (child.start(), ready.wait(30), {}["an error"]))
    child.join(30)
    signal.signal(signal.SIGCHLD, handler)
    assert ready.is_set() and child.exitcode == -signal.SIGKILL


# ---------------------------------------------------------------- files and weights

def test_a_folder_is_for_one_run_at_a_time(tmp_path):
    with data.locked(tmp_path / "run"):
        with pytest.raises(InputError, match="run: another run is at work here; wait until"):
            with data.locked(tmp_path / "run"):
                pass
        with data.locked(tmp_path / "another"):
            pass
    with data.locked(tmp_path / "run"):
        pass


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    data.write_atomically(path, b"old")
    data.write_atomically(str(path), memoryview(b"older"))
    assert path.read_bytes() == b"older"

    def full(_):
        # all of it is written before the sync
        assert next(tmp_path.glob("last.pt.part*")).read_bytes() == b"new"
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"last.pt: cannot write it \(.*No space left on device\)"):
        data.write_atomically(path, b"new")
    assert path.read_bytes() == b"older"
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("content, words", (
    (None, "no such file; give the path of a last.pt"),
    ({"a": 1}, "not a checkpoint of this project: no step, network in it"),
    ([1], "not a checkpoint of this project: no dictionary in it; give a last.pt"),
    (b"version https://git-lfs.github.com/spec/v1", "42 bytes, the first b'version https://git-"),
    (torch.nn.Linear(1, 1), "(it holds objects of Python, torch.nn.modules.linear.Linear)")))
def test_what_is_no_checkpoint_is_refused(tmp_path, content, words):
    path = tmp_path / "x.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        torch.save(content, path)
    with pytest.raises(InputError) as e:
        data.load_checkpoint(path, ("step", "network"))
    assert str(e.value).startswith(f"{path}: ") and words in str(e.value)


def test_a_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(InputError, match=f"a folder; give the file in it, {tmp_path}/last.pt for"):
        data.load_checkpoint(tmp_path)


@pytest.mark.parametrize("prefix, key", (
    ("", None), ("_orig_mod.module.", None), ("model.", "state_dict")))
def test_what_surrounds_a_state_dict_is_left_out_and_said(tmp_path, capsys, prefix, key):
    inner = {f"{prefix}{k}": v for k, v in torch.nn.Linear(2, 1).state_dict().items()}
    # torchvision's own script saves its options, too
    outer = {key: inner, "args": argparse.Namespace(lr=0.1), "epoch": 3} if key else inner
    torch.save(outer, tmp_path / "x.pth")
    state = data.read_weights(tmp_path / "x.pth", "--teacher-weights")
    assert state.keys() == {"weight", "bias"}
    out = capsys.readouterr().out
    assert out.count("\n") == bool(prefix or key)
    assert all(repr(part) in out for part in (key, *prefix.split("_orig_mod.")) if part)


@pytest.mark.parametrize("content", ({}, {"step": 1, "w": torch.zeros(1)}))
def test_what_is_no_plain_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(InputError, match="not a plain state dict of tensors; --student-weights"):
        data.read_weights(tmp_path / "x.pt", "--student-weights")


def test_weights_that_do_not_fit_are_refused_by_cause_in_one_line():
    layers = {"backbone": torch.nn.Linear(2, 2), "classifier": torch.nn.BatchNorm1d(2)}
    network = torch.nn.ModuleDict(layers)
    whole = {k: torch.full_like(v, 7) for k, v in network.state_dict().items()}
    backbone = {k: v for k, v in whole.items() if k.startswith("backbone")}
    error = r"Error\(s\) in loading state_dict for ModuleDict: "
    for state, words in (
            (backbone, error + "classifier.weight, classifier.bias, classifier.running_mean .*"),
            (whole | {"backbone.bias": torch.tensor([1.0, torch.nan])},
             "backbone.bias holds NaN or infinity"),
            (whole | {"backbone.bias": torch.zeros(3)}, f"{error}backbone.bias; take another")):
        with pytest.raises(InputError, match=f"x.pt: .*{words}") as e:
            data.load_strictly(network, state, "x.pt", "this network", "take another")
        assert "\n" not in str(e.value)
    whole.pop("classifier.num_batches_tracked")  # as in old files
    left = data.load_strictly(network, whole | {"aux.w": torch.zeros(1)}, "", "", "", ("aux.",))
    assert left == ["aux.w"] and (network["backbone"].bias == 7).all()
