"""Every loader on tiny files in its true layout, label maps, the training stream, `shapes`,
downloads, `--check`, `--convert`, and what every script shares: errors, options, files."""
import argparse
import dataclasses
import errno
import hashlib
import http.client
import io
import os
import shutil
import signal
import struct
import sys
import time
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import data
from data import (IGNORE, DataSet, EvalImages, InputError, TrainStream, draw_shapes, open_dataset,
                  voc_palette)


def put(path, pixels, palette=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(pixels, np.uint8))
    if palette:
        image.putpalette([c for rgb in palette for c in rgb])
    image.save(path)


def grey(label):
    return np.full((*np.shape(label), 3), 90)


CLASSES = "road 128 64 128\ntraffic light 250 170 30\nsky 70 130 180\n"


def put_folder(root, labels, classes=CLASSES, image=grey):
    """A `folder` data set: every split holds `labels`."""
    for split in ("train", "val"):
        for i, label in enumerate(labels):
            put(root / "images" / split / f"{i}.png", image(np.asarray(label)))
            put(root / "labels" / split / f"{i}.png", label)
    (root / "classes.txt").write_text(classes)
    return root


@pytest.fixture
def script(monkeypatch, capsys):
    """script(root, ...): data.py on a folder -> exit code, stdout, last line of stderr."""
    def run(root, *argv):
        argv = ["data.py", *argv, "--dataset", "folder", "--data", root]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        code = 0
        try:
            data.command(data.main)
        except SystemExit as e:
            code = e.code
        out, err = capsys.readouterr()
        return code, out, "".join(err.splitlines()[-1:])
    return run


# ---------------------------------------------------------------- layouts and label maps

def put_ade20k(root, label):
    folder = root / "ADEChallengeData2016"
    for split, stem in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        # some pictures are grey: mode L
        put(folder / "images" / split / f"{stem}.jpg", np.full(np.shape(label), 90))
        put(folder / "annotations" / split / f"{stem}.png", label)
    rows = [f"{k} \t0.1\t9\t9\tthing {k} , second name, third\n" for k in range(1, 151)]
    (folder / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n" + "".join(rows))
    return root


def test_ade20k_turns_0_into_ignore_and_k_into_k_minus_1(tmp_path):
    ade = open_dataset("ade20k", put_ade20k(tmp_path, [range(151)]))
    image, label = ade.read("val", 0)
    assert label[0].tolist() == [IGNORE, *range(150)]
    assert image.mode == "RGB"
    names = [p.name for p in ade.pairs["train"][0]]
    assert names == ["ADE_train_00000001.jpg", "ADE_train_00000001.png"]
    assert ade.classes == [f"thing {k}" for k in range(1, 151)]
    assert len(set(ade.palette)) == 150
    with pytest.raises(InputError, match=r"151 \(2 pixels\), 255 \(1 pixels\); get it again"):
        open_dataset("ade20k", put_ade20k(tmp_path, [[1, 151, 151, 255]])).read("val", 0)


def test_cityscapes_maps_the_34_label_ids(tmp_path):
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


def put_voc(root, augmented):
    folder = root / "VOCdevkit" / "VOC2012"
    lists = folder / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    indices = [[*range(21), 255]]
    stems = {"train": "2007_000001", "val": "2007_000002", "trainaug": "2008_000003"}
    for split, stem in stems.items():
        put(folder / "JPEGImages" / f"{stem}.jpg", grey(indices))
        if split != "trainaug":
            put(folder / "SegmentationClass" / f"{stem}.png", indices, voc_palette(256))
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


def test_folder_reads_classes_and_labels(tmp_path):
    names = "sky building pole road pavement tree sign_symbol fence car person bicyclist".split()
    camvid = "".join(f"{name.replace('_', ' ')} {k} 1 2\n" for k, name in enumerate(names))
    put_folder(tmp_path, [[[*range(11), 255]]], f"\ufeff{camvid}\n\n")  # as Windows' editor saves
    put(tmp_path / "images" / "unlabelled" / "a.png", np.full((6, 9, 3), 70))
    folder = open_dataset("folder", tmp_path)
    assert folder.read("train", 0)[1][0].tolist() == [*range(11), 255]
    assert (folder.classes[6], folder.palette[6]) == ("sign symbol", (6, 1, 2))
    assert folder.pairs["test"] == []
    image, label = folder.read("unlabelled", 0)
    assert np.array_equal(image, np.full((6, 9, 3), 70))
    assert label.dtype == np.uint8 and np.array_equal(label, np.full((6, 9), IGNORE))
    put(tmp_path / "labels" / "train" / "0.png", [[0] * 9 + [11] * 3])  # CamVid's own "unlabelled"
    with pytest.raises(InputError, match=r"outside the 11 classes: 11 \(3 pixels\)"):
        folder.read("train", 0)


# ---------------------------------------------------------------- the training stream

COLOURS = np.array([(250, 0, 0), (0, 250, 0), (0, 0, 250)], np.uint8)


@pytest.fixture
def blocks(tmp_path):
    """Five pictures of 40 x 56 whose colour tells the label: random blocks of 8 pixels."""
    labels = np.random.default_rng(0).integers(0, 3, (5, 5, 7)).repeat(8, 1).repeat(8, 2)
    return open_dataset("folder", put_folder(tmp_path, labels, image=lambda label: COLOURS[label]))


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
        assert np.array_equal(image.numpy().transpose(1, 2, 0), COLOURS[label])
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
def archive(tmp_path, monkeypatch):
    """archive(kind): a small VOC as .zip or .tar, which is what `download` fetches -> its path."""
    def make(kind="zip"):
        source = put_voc(tmp_path / "source", False)
        path = Path(shutil.make_archive(tmp_path / "voc", kind, source))
        digest = hashlib.md5(path.read_bytes()).hexdigest()
        wanted = data.Download(path.as_uri(), "md5", digest, "VOCdevkit")
        monkeypatch.setitem(data.DOWNLOADS, "voc", wanted)
        return path
    return make


def names(folder):
    return [path.name for path in folder.iterdir()]


@pytest.mark.parametrize("kind", ("zip", "tar"))
def test_a_download_is_unpacked_once_and_nothing_else_is_left(tmp_path, archive, kind):
    path = archive(kind)
    assert len(open_dataset("voc", tmp_path / "data").pairs["train"]) == 1
    path.unlink()  # a second download would fail
    assert len(open_dataset("voc", tmp_path / "data").pairs["train"]) == 1
    assert names(tmp_path / "data") == ["VOCdevkit"]


def test_a_download_that_fails_leaves_nothing_and_the_next_command_tries_again(
        tmp_path, archive, monkeypatch):
    def cut(*_, **__):
        raise http.client.IncompleteRead(b"")

    def refused(words):
        with pytest.raises(InputError, match=words):
            open_dataset("voc", tmp_path / "data")
        assert names(tmp_path / "data") == []

    path = archive()
    whole = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(torch.hub, "download_url_to_file", cut)
        refused("voc.zip: cannot download it .*; get it elsewhere")
    path.write_bytes(whole[:len(whole) // 2])
    refused("voc.zip: md5 .* instead of .*: deleted; run the same command again")
    path.unlink()
    refused("voc.zip: cannot download it .*; get it elsewhere")
    path.write_bytes(whole)
    assert len(open_dataset("voc", tmp_path / "data").pairs["train"]) == 1


def test_unpacking_that_fails_or_is_overtaken_leaves_a_whole_folder(tmp_path, archive, monkeypatch):
    archive()
    unpack = shutil.unpack_archive

    def half(archive, target, **_):
        (target / "VOCdevkit" / "VOC2012").mkdir(parents=True)
        raise OSError(errno.ENOSPC, "No space left on device")

    def overtaken(archive, target, **_):
        monkeypatch.setattr(data.shutil, "unpack_archive", unpack)
        data.download("voc", tmp_path / "data")  # another process, which ends first
        unpack(archive, target)

    monkeypatch.setattr(data.shutil, "unpack_archive", half)
    with pytest.raises(InputError, match="No space left.*; free some space or give --data"):
        open_dataset("voc", tmp_path / "data")
    assert names(tmp_path / "data") == ["voc.zip"]
    monkeypatch.setattr(data.shutil, "unpack_archive", overtaken)
    assert open_dataset("voc", tmp_path / "data")
    assert names(tmp_path / "data") == ["VOCdevkit"]


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
    put(labels / "lonely.png", [[0]])
    folder = open_dataset("folder", tmp_path)
    assert len(folder.pairs["train"]) == 6
    assert sum(folder.read("train", i)[1].sum() for i in range(6)) == 64 * (1 + 2 + 1 + 2)
    out = capsys.readouterr().out
    assert "images/train: 2 left out, no picture that can be read here: clip.mp4, more" in out
    assert "labels/train: 1 labels without a picture, not used: lonely.png" in out
    assert out.count("NOTE") == 2


def four_bits(path):
    """A grey PNG of 4 bits that holds 0, 1, 2 and 1: Pillow cannot write one."""
    def chunk(kind, body):
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check
    head = struct.pack(">IIBBBBB", 4, 1, 4, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
                     + chunk(b"IDAT", zlib.compress(b"\0\x01\x21")) + chunk(b"IEND", b""))


def as_jpeg(path):
    Image.open(path).convert("L").save(path, "JPEG")


def palette(colours):
    return lambda path: put(path, [[0, 1, 2, 1]], colours)


LABELS = {  # what is wrong: (how the label 0 1 2 1 is spoilt, what the message holds)
    "JPEG": (as_jpeg, "holds JPEG data, whose compression changes"),
    "inverted": (lambda p: Image.open(p).save(p, "TIFF", tiffinfo={262: 0}), "grey values packed"),
    "colours": (lambda p: put(p, [[(1, 2, 3)] * 4]), "mode RGB, but a label has one index byte"),
    "16 bits": (lambda p: Image.fromarray(np.zeros((1, 4), np.uint16)).save(p), "mode I"),
    "other values": (lambda p: put(p, [[0, 7, 7, 255]]), "outside the 3 classes: 7 (2 pixels)"),
    "palette in another order": (palette([(250, 170, 30), (128, 64, 128), (70, 130, 180)]),
                                 "its palette gives index 0 to class 1, traffic light;"),
    "palette of indices": (palette([(1, 1, 1), (0, 0, 0), (2, 2, 2)]), "gives index 0 to class 1"),
    "another size": (lambda p: put(p, [[0, 1, 2]]), "3x1, but its image is 4x1"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:40]), "truncated or not an image"),
    "missing": (lambda p: p.unlink(), "such file"),
}


@pytest.mark.parametrize("what", LABELS)
def test_a_label_that_cannot_hold_class_indices_is_named(tmp_path, script, what):
    spoil, words = LABELS[what]
    put_folder(tmp_path, [[[0, 1, 2, 1]]] * 2)
    path = tmp_path / "labels" / "train" / "0.png"
    spoil(path)
    with pytest.raises(InputError) as e:
        open_dataset("folder", tmp_path).read("train", 0)
    assert str(e.value).startswith(f"{path}: ") and words in str(e.value)
    code, out, last = script(tmp_path, "--check")
    assert code == 2 and words in out and last == \
        "error: 1 faulty files are listed above; mend or remove them"


@pytest.mark.parametrize("save", (
    lambda p: Image.fromarray(np.array([[0, 255, 255, 0]], np.uint8)).convert("1").save(p),
    palette(voc_palette(256)), palette([(0, 0, 0), (255, 255, 255), (9, 9, 9)]), four_bits),
    ids=("1 bit", "VOC's palette", "black and white palette", "4 bits"))
def test_labels_that_hold_indices_in_another_way_are_read(tmp_path, save):
    put_folder(tmp_path, [[[0, 1, 2, 1]]])
    save(tmp_path / "labels" / "train" / "0.png")
    assert open_dataset("folder", tmp_path).read("train", 0)[1].tolist() in (
        [[0, 1, 1, 0]], [[0, 1, 2, 1]])


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


def test_pictures_that_cannot_be_used_are_named(tmp_path, monkeypatch):
    put(tmp_path / "large.png", np.zeros((9, 10)))
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(InputError, match="deep.png: mode I.*more than 8 bits per channel; save it"):
        data.read_image(tmp_path / "deep.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with pytest.raises(InputError, match="large.png: more than 80 pixels; cut it into tiles"):
        data.read_image(tmp_path / "large.png")


@pytest.mark.parametrize("text, message", (
    ("road\nsky 1 2 3\n", ", line 1: 'road' is not 'name R G B'"),
    ("a 1 2 3\nb 1 256 3\n", ", line 2"),
    ("a 1 2 3\n\nb 1 2 3\n", ", line 3: b has the colour of a; give each class its own"),
    ("a 1 2 3\nroad 128 64 128 255\n", ", line 2: 'road 128 64 128 255' has a number before its"),
    ("a 1 2 3\na 3 2 1\n", ": 2 classes, 1 names"),
    ("road 1 2 3\n", ": 1 classes, 1 names; 2 to 255"), ("", ": 0 classes"),
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
    shutil.rmtree(root / "images" / "val")
    with pytest.raises(InputError, match="no image of the val split found; README"):
        open_dataset("folder", root)


# ---------------------------------------------------------------- counts

def test_a_class_without_a_pixel_in_a_split_is_named(tmp_path, script):
    put_folder(tmp_path, [[[0, 1, 1, 255]], [[255, 255]]])
    put(tmp_path / "labels" / "val" / "0.png", [[0, 0, 2, 2]])
    code, out, _ = script(tmp_path, "--check")
    assert code == 0
    for line in ("train: 2 images, val: 2 images, test: 0 images, unlabelled: 0 images, 3 classes, "
                 "0 faulty", "train: 50.0% of the labels' pixels are ignored",
                 "NOTE: classes without a pixel in train, they cannot be learned: sky",
                 "NOTE: classes without a pixel in val, they are not scored: traffic light"):
        assert line in out.splitlines(), line


@pytest.mark.parametrize("label, val, words", (
    ([[0, 255]], [[0, 1]], "train hold one class, road, and two are needed; 255 means ignored. To"),
    ([[1, 1]], [[0, 1]], "train hold one class, traffic light, and two are needed"),
    ([[255, 255]], [[0, 1]], "no label of train has a labelled pixel: all are 255, which means"),
    ([[0, 1]], [[255, 255]], "no label of val has a labelled pixel")))
def test_labels_that_cannot_be_trained_on_or_scored_are_refused(tmp_path, script, label, val,
                                                                words):
    put_folder(tmp_path, [label])
    put(tmp_path / "labels" / "val" / "0.png", val)
    code, _, last = script(tmp_path, "--check")
    assert code == 2 and last.startswith(f"error: {tmp_path}: ") and words in last


def test_a_picture_in_two_splits_is_told(tmp_path, script):
    pictures = put_folder(tmp_path, [[[0, 1, 2]]] * 2) / "images"
    for i, path in enumerate(sorted(pictures.rglob("*.*"))):
        put(path.with_suffix(".png"), np.full((1, 3, 3), i, np.uint8))
        if path.suffix != ".png":
            path.unlink()
    assert "two splits" not in script(tmp_path, "--check")[1]
    shutil.copy(pictures / "train/1.png", pictures / "val/0.png")
    code, out, _ = script(tmp_path, "--check")
    assert code == 0 and (f"WARNING: pictures that are in two splits: 1, for instance "
                          f"{pictures}/train/1.png and {pictures}/val/0.png") in out


def test_masks_of_0_and_255_among_others_are_noted(tmp_path, script):
    _, out, _ = script(put_folder(tmp_path, [[[0, 1, 2]], [[0, 0, 255]]]), "--check")
    note, = (line for line in out.splitlines() if "of the 2 labels of train" in line)
    assert note.startswith("NOTE: 1 of the 2 labels of train hold only the values 0 and 255. ")
    assert note.endswith(f'--dataset folder --data {tmp_path} --map "255=traffic light"')


def test_labels_are_counted_once_and_again_where_they_change(tmp_path, monkeypatch):
    folder = open_dataset("folder", put_folder(tmp_path / "a", [[[0, 1, 1]], [[2, 255, 1]]]))
    cache = tmp_path / "runs" / "labels.json"
    first = data.scan_labels(folder, cache)
    assert first.pixels["train"] == first.pixels["val"] == {0: 1, 1: 3, 2: 1, 255: 1}

    read, reads = DataSet.read_label, []
    monkeypatch.setattr(DataSet, "read_label", lambda self, p: reads.append(p) or read(self, p))
    assert data.scan_labels(folder, cache) == first and not reads
    put(folder.pairs["train"][0][1], [[0, 2, 1]])
    changed = data.scan_labels(folder, cache)
    assert changed.digest != first.digest and changed.pixels["train"][2] == 2
    more = dataclasses.replace(folder, classes=["other", *folder.classes[1:]])
    reads.clear()
    assert data.scan_labels(more, cache) == changed and len(reads) == 4  # other rules
    cache.write_text("{")
    assert data.scan_labels(folder, cache).digest == changed.digest

    label = folder.pairs["train"][0][1]
    old = label.stat()
    put(label, [[1, 2, 0]])
    os.utime(label, ns=(old.st_atime_ns, old.st_mtime_ns))  # as cp -p and rsync -t do
    assert label.stat().st_size == old.st_size
    assert data.scan_labels(folder, cache).digest != changed.digest
    put(label, [[0, 2, 1]])

    copy = open_dataset("folder", shutil.copytree(tmp_path / "a", tmp_path / "b"))
    assert data.scan_labels(copy, cache).digest == changed.digest
    for kind in (tmp_path / "b" / "images", tmp_path / "b" / "labels"):
        os.rename(kind / "train" / "0.png", kind / "val" / "2.png")
    assert data.scan_labels(open_dataset("folder", tmp_path / "b")).digest != changed.digest


# ---------------------------------------------------------------- --convert

ROAD, LIGHT, SKY, OTHER = (128, 64, 128), (250, 170, 30), (70, 130, 180), (1, 2, 3)
INDICES = np.array([[0, 0, 0, 0], [1, 1, 1, 2], [2, 2, 0, 0]])


def put_colours(path, indices=INDICES, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array([ROAD, LIGHT, SKY, OTHER], np.uint8)[indices]).convert(mode).save(path)


def converted(root, split="train", index=0):
    return open_dataset("folder", root).read(split, index)[1].tolist()


@pytest.mark.parametrize("kind", ("RGB", "RGBA", "palette", "three equal channels", "indices"))
def test_labels_of_other_kinds_become_class_indices_in_a_new_folder(tmp_path, script, kind):
    root, new = put_folder(tmp_path / "d", [INDICES] * 2), tmp_path / "new"
    label = root / "labels" / "train" / "0.png"
    if kind in ("RGB", "RGBA"):
        put_colours(label, mode=kind)
    elif kind == "palette":  # indices of its own: 7, 8 and 9
        put(label, INDICES + 7, [(0, 0, 0)] * 7 + [ROAD, LIGHT, SKY])
    elif kind == "indices":  # VOC's palette lies over them
        put(label, INDICES, voc_palette(256))
    else:
        Image.open(label).convert("RGB").save(label)
    put(root / "images" / "unlabelled" / "u.png", grey([[0]]))
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    code, out, _ = script(root, "--check")
    said = "convert it to class indices with python data.py --convert" in out
    assert kind == "indices" or code == 2 and said

    code, out, _ = script(root, "--convert", new)
    assert code == 0 and f"{new}: 4 labels as class indices, 5 pictures copied" in out
    assert converted(new) == converted(new, index=1) == INDICES.tolist()
    assert Image.open(new / "labels" / "train" / "0.png").mode == "L"
    assert script(new, "--check")[0] == 0
    assert before == {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    code, _, last = script(root, "--convert", new)
    assert code == 2 and "new: exists already" in last
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "new"]


def test_colours_without_a_class_stop_a_conversion_unless_they_are_named(tmp_path, script):
    root = put_folder(tmp_path / "d", [INDICES])
    put_colours(root / "labels" / "train" / "0.png", np.where(INDICES == 1, 3, INDICES))
    code, out, last = script(root, "--convert", tmp_path / "new")
    assert code == 2 and "  (1, 2, 3)  12.5%" in out
    assert "1 values or colours without a class" in last
    assert "nothing was written" in last and "--ignore-colour R,G,B" in last
    assert not (tmp_path / "new").exists()
    assert script(root, "--convert", tmp_path / "new", "--ignore-colour", "1,2,3")[0] == 0
    assert converted(tmp_path / "new") == np.where(INDICES == 1, 255, INDICES).tolist()


@pytest.mark.parametrize("channels", ("L", "RGB"))
def test_values_get_their_classes_by_name_or_number(tmp_path, script, channels):
    root = put_folder(tmp_path / "d", [[[1, 2, 3, 0]]])  # numbered from 1
    for path in root.glob("labels/*/*.png"):
        Image.open(path).convert(channels).save(path)
    code, out, last = script(root, "--convert", tmp_path / "new")
    assert code == 2 and "1 values or colours without a class" in last and "25.0%" in out
    code, _, last = script(root, "--convert", tmp_path / "new", "--map", "1=0", "2=1", "3=2")
    assert code == 2 and "--map 1=0: value 0 is also road; add 0=0 if so" in last
    names = "1=road", "2=traffic light", "3=2", "0=ignore"
    assert script(root, "--convert", tmp_path / "new", "--map", *names)[0] == 0
    assert converted(tmp_path / "new") == [[0, 1, 2, 255]]


@pytest.mark.parametrize("channels, colour, words", (
    ("L", "255 0 0", "255 means ignored. To make it a class"),
    ("RGB", "255 0 0", "255 means ignored. To make it a class"),
    ("RGB", "255 255 255", "the grey 255 is the colour of object; if it means this class, add")))
def test_masks_of_0_and_255_are_converted_only_where_255_is_named(tmp_path, script, channels,
                                                                  colour, words):
    root = put_folder(tmp_path / "d", [[[0, 255, 255]]], f"ground 0 0 0\nobject {colour}\n")
    for path in root.glob("labels/*/*.png"):
        Image.open(path).convert(channels).save(path)
    code, _, last = script(root, "--convert", tmp_path / "new")
    assert code == 2 and words in last
    assert not list(tmp_path.glob("new*"))
    assert script(root, "--convert", tmp_path / "new", "--map", "255=object")[0] == 0
    assert converted(tmp_path / "new") == [[0, 1, 1]]


def test_labels_that_can_be_read_in_two_ways_are_not_converted(tmp_path, script):
    root = put_folder(tmp_path / "d", [[[0, 1, 2]]], "ground 1 1 1\nroad 0 0 0\nsky 2 2 2\n")
    put(root / "labels" / "train" / "0.png", [[[1] * 3, [0] * 3, [2] * 3]])
    assert script(root, "--check")[0] == 2
    code, _, last = script(root, "--convert", tmp_path / "new")
    assert code == 2 and "the grey 1 is the colour of ground; if it means this class, add" in last
    assert not (tmp_path / "new").exists()
    assert script(root, "--convert", tmp_path / "new", "--map", "0=0", "1=1")[0] == 0
    assert converted(tmp_path / "new") == [[1, 0, 2]]


@pytest.mark.parametrize("mode", ("F", "CMYK", "RGBA"))
def test_labels_whose_classes_cannot_be_told_are_not_converted(tmp_path, script, mode):
    root = put_folder(tmp_path / "d", [INDICES])
    clear = Image.new("L", (4, 3), 9)
    for path in root.glob("labels/train/*.png"):
        path.unlink()
        label = Image.fromarray(INDICES.astype(np.uint8)).convert(mode)
        if mode == "RGBA":
            label.putalpha(clear)
        label.save(path.with_suffix(".tif"))
    code, _, last = script(root, "--convert", tmp_path / "new")
    assert code == 2 and ("transparent" if mode == "RGBA" else f"mode {mode}") in last
    assert not list(tmp_path.glob("new*"))


def test_cvats_labelmap_stands_for_classes_txt(tmp_path, script):
    root = put_folder(tmp_path / "d", [INDICES])
    for split in ("train", "val"):
        put_colours(root / "labels" / split / "0.png")
    (root / "classes.txt").unlink()
    (root / "labelmap.txt").write_text(
        "# label:color_rgb:parts:actions\nroad:128,64,128::\ntraffic light:250,170,30::\n"
        "sky:70,130,180::\n")
    assert script(root, "--check")[0] == 2
    assert script(root, "--convert", tmp_path / "new")[0] == 0
    assert converted(tmp_path / "new") == INDICES.tolist()
    assert open_dataset("folder", tmp_path / "new").classes == ["road", "traffic light", "sky"]
    put_folder(root, [INDICES])
    _, out, _ = script(root, "--check")
    assert f"NOTE: {root}: the classes are those of classes.txt, labelmap.txt is not read" in out
    (root / "classes.txt").unlink()
    (root / "labelmap.txt").write_text("road:128,64::\n")
    assert "labelmap.txt, line 1: 'road:128,64::' is not" in script(root, "--convert", "x")[2]


@pytest.mark.parametrize("argv, words", (
    (("--map", "0"), "--map 0: takes VALUE=CLASS"), (("--map", "0=tree"), "--map 0=tree: takes"),
    (("--map", "0=0", "0=1"), "--map 0=1: takes VALUE=CLASS once per value"),
    (("--map", "2=1"), "--map 2=1: 1 is the name of a class and means something else, too"),
    (("--map", "2=ignore"), "--map 2=ignore: ignore is the name of a class and means something"),
    (("--ignore-colour", "1,2"), "argument --ignore-colour: must be R,G,B"),
    (("--ignore-colour", "1,2,256"), "must be R,G,B with three numbers 0..255")))
def test_wrong_options_of_a_conversion_are_named(tmp_path, script, argv, words):
    root = put_folder(tmp_path / "d", [INDICES], "1 0 0 1\nignore 0 0 2\nsky 0 0 3\n")
    code, _, last = script(root, "--convert", tmp_path / "new", *argv)
    assert code == 2 and words in last and not (tmp_path / "new").exists()


@pytest.mark.parametrize("order, argv, words", (
    ((0, 1, 2), ("--ignore-colour", "70,130,180"),
     "no label holds (70, 130, 180), found: 0, 1, 2; nothing was written; use --map for values"),
    ((1, 0, 2), ("--map", "2=ignore"), "no label holds 2, found: (128, 64, 128), (250"),
    ((0, 1, 2), ("--map", "2=ignore", "7=0"), "no label holds 7, found: 0, 1, 2;")))
def test_values_and_colours_that_no_label_has_stop_a_conversion(tmp_path, script, order, argv,
                                                                words):
    root, new = put_folder(tmp_path / "d", [INDICES]), tmp_path / "new"
    colours = [(ROAD, LIGHT, SKY)[k] for k in order]
    for path in root.glob("labels/*/*.png"):
        put(path, np.array(order)[INDICES], colours)
    code, _, last = script(root, "--convert", new, *argv)
    assert code == 2 and words in last and not new.exists()


def test_a_conversion_that_fails_on_the_way_leaves_nothing(tmp_path, script, monkeypatch):
    root = put_folder(tmp_path / "d", [INDICES] * 3)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "new/images/1.png")

    monkeypatch.setattr(data.shutil, "copyfile", full)
    code, _, last = script(root, "--convert", tmp_path / "new")
    assert code == 2 and "No space left on device" in last
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


# ---------------------------------------------------------------- the console

@pytest.mark.parametrize("missing", (["stdout"], ["stderr"], ["stdout", "stderr"]))
def test_a_missing_stream_ends_no_work(monkeypatch, missing):
    done = []

    def work():
        print("x", *data.progress(range(3)))
        print("y", file=sys.stderr)
        done.append(True)

    for name in missing:
        monkeypatch.setattr(sys, name, None)  # as Python does where it is started without one
    data.command(work)
    assert done


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


@pytest.mark.parametrize("terminal, disable, shown", (
    (False, False, False), (True, False, True), (True, None, True), (True, True, False)))
def test_bars_are_for_terminals(monkeypatch, terminal, disable, shown):
    stderr = io.StringIO()
    stderr.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stderr)
    assert list(data.progress(range(3), desc="checking", disable=disable)) == [0, 1, 2]
    assert ("checking" in stderr.getvalue()) == shown


# ---------------------------------------------------------------- errors and limits

def end(error, capsys):
    """The exit code and the lines of a script in which `error` is raised."""
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        data.command(main)
    return stop.value.code, capsys.readouterr().err.splitlines()


SHM = "error: too little shared memory (/dev/shm) for the loader processes: take --workers 0, or"
FILES = "error: too many open files: take fewer --workers, --workers 0 for none, or raise the limit"


@pytest.mark.parametrize("error, code, line", (
    (InputError("x.png: truncated;\n  get it again"), 2, "error: x.png: truncated; get it again"),
    (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried 2 GiB\nmore"), 2,
     "error: out of GPU memory: lower --batch-size or --crop"),
    (PermissionError(errno.EACCES, "Permission denied", "runs/a"), 2,
     "error: runs/a: Permission denied; check the path, its permissions and the free space"),
    (OSError(errno.ENOSPC, "No space left on device"), 2,
     "error: the disk or /dev/shm (see --workers): No space left on device; check the path"),
    (ConnectionResetError(errno.ECONNRESET, "reset by peer"), 2, "error: a loader process died"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is"), 2, SHM),
    (RuntimeError("unable to mmap 64 bytes from file </torch_1_2>: Cannot"), 2, SHM),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), 2,
     "error: a loader process died (out of memory?): run the same command again with fewer"),
    (OSError(errno.EMFILE, "Too many open files", "a.png"), 2, FILES),
    (RuntimeError("received 0 items of ancdata"), 2, FILES),
    (KeyboardInterrupt(), 130, "interrupted; run the same command again to continue"),
    (KeyboardInterrupt("student: stopped and saved at step 3"), 130,
     "student: stopped and saved at step 3")))
def test_what_a_user_can_mend_is_one_line_and_an_exit_code(capsys, error, code, line):
    found, lines = end(error, capsys)
    assert found == code and len(lines) == 1 and lines[0].startswith(line)


@pytest.mark.parametrize("error", (
    OSError("no file"), KeyError("x"),
    RuntimeError("shapes do not match"), RuntimeError("triton: out of resource: shared memory")))
def test_other_errors_keep_their_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error)) as found:
        data.command(main)
    assert found.value is error


def test_small_shared_memory_ends_a_validation_and_no_process_waits(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise RuntimeError("unable to write to file </torch_1>: No space left on device (28)")

    folder = open_dataset("folder", put_folder(tmp_path, [np.zeros((8, 8))]))
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    loader = DataLoader(EvalImages(folder, "val", 8), batch_size=None, num_workers=1, timeout=30)
    with pytest.raises(SystemExit):
        data.command(lambda: list(loader))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(SHM) and "--shm-size" in lines[0]


@pytest.mark.parametrize("argv, message", (
    ("--steps 0", "argument --steps: must be at least 1"),
    ("--steps x", "argument --steps: invalid number value: 'x'"),
    ("--lr nan", "argument --lr: must be at least 0.5"),
    ("--lr inf", "argument --lr: must be at least 0.5 and finite"),
    ("--nonsense", "unrecognized arguments: --nonsense")))
def test_options_out_of_range_are_input_errors(argv, message):
    parser = data.Parser()
    parser.add_argument("--steps", type=data.at_least(1))
    parser.add_argument("--lr", type=data.at_least(0.5, float))
    assert parser.parse_args(["--steps", "1", "--lr", "0.5"]).lr == 0.5
    with pytest.raises(InputError) as e:
        parser.parse_args(argv.split())
    assert str(e.value).startswith(message)


# ---------------------------------------------------------------- two at once

def fork(work):
    """A child process that runs `work` and waits to be killed, once it has worked."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        work()
        os.write(writer, b"x")
        time.sleep(60)
        os._exit(0)
    os.read(reader, 1)
    return child


def kill(child):
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_folder_is_for_one_process_and_its_lock_dies_with_it(tmp_path):
    lock = data.locked(tmp_path / "run")
    child = fork(lock.__enter__)
    try:
        with pytest.raises(InputError, match="run: another run is at work here; wait until"):
            with data.locked(tmp_path / "run"):
                pass
        with data.locked(tmp_path / "another"):
            pass
    finally:
        kill(child)
    with data.locked(tmp_path / "run"):
        pass


# ---------------------------------------------------------------- files and weights

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
    with pytest.raises(InputError, match="nowhere/last.pt: cannot write it"):
        data.write_atomically(tmp_path / "nowhere" / "last.pt", b"new")


@pytest.mark.parametrize("content, words", (
    (None, "no such file; give the path of a last.pt"), (b"", "not a readable checkpoint"),
    (b"hello\n", "not a readable checkpoint"),
    ({"a": 1}, "not a checkpoint of this project: no step, network in it"),
    ([1], "not a checkpoint of this project: no dictionary in it; give a last.pt"),
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
    with pytest.raises(InputError, match=f"a folder; give the file in it, {tmp_path}/last.pt for"):
        data.load_checkpoint(tmp_path)


@pytest.mark.parametrize("prefix, key", (("", None), ("module.", None), ("_orig_mod.module.", None),
                                         ("", "model"), ("model.", "state_dict")))
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


def test_weights_that_do_not_fit_are_refused_by_cause_before_anything_is_changed():
    layers = {"backbone": torch.nn.Linear(2, 2), "classifier": torch.nn.BatchNorm1d(2)}
    network = torch.nn.ModuleDict(layers)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    whole = {k: torch.full_like(v, 7) for k, v in before.items()}
    backbone = {k: v for k, v in whole.items() if k.startswith("backbone")}
    for state, words in ((backbone, "4 tensors differ, the first is classifier.weight"),
                         (whole | {"backbone.bias": torch.tensor([1.0, torch.nan])},
                          "backbone.bias holds NaN or infinity"),
                         (whole | {"backbone.bias": torch.zeros(3)},
                          r"backbone.bias \(there \(3,\), here \(2,\)\); take another"),
                         (whole | {"head": torch.zeros(3)}, "the first is head")):
        with pytest.raises(InputError, match=f"x.pt.*{words}"):
            data.load_strictly(network, state, "x.pt", "this network", "take another")
        assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    whole.pop("classifier.num_batches_tracked")  # as in old files
    left = data.load_strictly(network, whole | {"aux.w": torch.zeros(1)}, "", "", "", ("aux.",))
    assert left == ["aux.w"] and (network["backbone"].bias == 7).all()
