"""Every loader on tiny files in its true layout, label maps, the training stream, `shapes`, downloads, the check,
and what every script shares: errors, options, files."""
import dataclasses
import errno
import hashlib
import http.server
import io
import os
import socket
import subprocess
import sys
import tarfile
import textwrap
import threading
import zipfile
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import IGNORE, DataSet, EvalImages, InputError, TrainStream, draw_shapes, open_dataset, voc_palette

REAL = os.environ.get("C2VKD_SAMPLES")  # a folder with ade20k/ and voc/, some pairs of their val splits


def put(path, pixels, palette=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(pixels, np.uint8))
    if palette:
        image.putpalette([c for rgb in palette for c in rgb])
    image.save(path)


def grey(label):
    return np.full((*np.shape(label), 3), 90)


def put_folder(root, labels, classes="road 128 64 128\ntraffic light 250 170 30\nsky 70 130 180\n", image=grey):
    """A `folder` data set: every split holds `labels`."""
    for split in ("train", "val"):
        for i, label in enumerate(labels):
            put(root / "images" / split / f"{i}.png", image(np.asarray(label)))
            put(root / "labels" / split / f"{i}.png", label)
    (root / "classes.txt").write_text(classes)
    return root


# ---------------------------------------------------------------- layouts and label maps

def put_ade20k(root, label):
    folder = root / "ADEChallengeData2016"
    for split, stem in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        put(folder / "images" / split / f"{stem}.jpg", np.full(np.shape(label), 90))  # some are grey: mode L
        put(folder / "annotations" / split / f"{stem}.png", label)
    rows = [f"{k} \t0.1\t9\t9\tthing {k} , second name, third\n" for k in range(1, 151)]
    (folder / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n" + "".join(rows))
    return root


def test_ade20k_turns_0_into_ignore_and_k_into_k_minus_1(tmp_path):
    ade = open_dataset("ade20k", put_ade20k(tmp_path, [range(151)]))
    image, label = ade.read("val", 0)
    assert label[0].tolist() == [IGNORE, *range(150)]
    assert image.mode == "RGB"
    assert [p.name for p in ade.pairs["train"][0]] == ["ADE_train_00000001.jpg", "ADE_train_00000001.png"]
    assert ade.classes == [f"thing {k}" for k in range(1, 151)]
    assert len(set(ade.palette)) == 150


@pytest.mark.parametrize("value", (151, 255))
def test_ade20k_refuses_values_above_150(tmp_path, value):
    with pytest.raises(InputError, match=rf"{value} \(1 pixels\)"):
        open_dataset("ade20k", put_ade20k(tmp_path, [[1, value]])).read("val", 0)


def test_cityscapes_maps_the_34_label_ids(tmp_path):
    for split, city in (("train", "aachen"), ("train", "ulm"), ("val", "munster")):
        stem = f"{city}_000001_000019"
        put(tmp_path / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png", grey([range(34)]))
        put(tmp_path / "gtFine" / split / city / f"{stem}_gtFine_labelIds.png", [range(34)])
        put(tmp_path / "gtFine" / split / city / f"{stem}_gtFine_instanceIds.png", [range(34)])
    city = open_dataset("cityscapes", tmp_path)
    i = IGNORE
    assert city.read("val", 0)[1][0].tolist() == [
        i, i, i, i, i, i, i, 0, 1, i, i, 2, 3, 4, i, i, i, 5, i, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, i, i, 16, 17, 18]
    assert len(city.pairs["train"]) == 2
    assert len(city.classes) == 19
    assert [city.classes[k] for k in (0, 6, 18)] == ["road", "traffic light", "bicycle"]
    assert (city.palette[0], city.palette[13]) == ((128, 64, 128), (0, 0, 142))
    assert city.lut[34] == city.lut[255] == -1


def put_voc(root, augmented):
    folder = root / "VOCdevkit" / "VOC2012"
    lists = folder / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    indices = [[*range(21), 255]]
    for stem, split in (("2007_000001", "train"), ("2007_000002", "val"), ("2008_000003", "trainaug")):
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
    assert [image.stem for image, _ in voc.pairs["train"]] == ["2007_000001", "2008_000003"][:1 + augmented]
    assert {label.parent.name for _, label in voc.pairs["train"]} == {"SegmentationClass" + "Aug" * augmented}
    assert [label.parent.name for _, label in voc.pairs["val"]] == ["SegmentationClass"]
    for split in ("train", "val"):
        assert voc.read(split, 0)[1][0].tolist() == [*range(21), 255]
    assert (len(voc.classes), voc.classes[0], voc.classes[20]) == (21, "background", "tvmonitor")


def test_voc_palette_is_the_known_one():
    assert voc_palette(22) == [
        (0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128), (0, 128, 128),
        (128, 128, 128), (64, 0, 0), (192, 0, 0), (64, 128, 0), (192, 128, 0), (64, 0, 128), (192, 0, 128),
        (64, 128, 128), (192, 128, 128), (0, 64, 0), (128, 64, 0), (0, 192, 0), (128, 192, 0), (0, 64, 128),
        (128, 64, 128)]
    assert voc_palette(256)[255] == (224, 224, 192)


def test_folder_reads_classes_and_labels(tmp_path):
    camvid = ("sky 128 128 128\nbuilding 128 0 0\npole 192 192 128\nroad 128 64 128\npavement 60 40 222\n"
              "tree 128 128 0\nsign symbol 192 128 128\nfence 64 64 128\ncar 64 0 128\n"
              "pedestrian 64 64 0\nbicyclist 0 128 192\n")
    folder = open_dataset("folder", put_folder(tmp_path, [[[*range(11), 255]]], camvid))
    assert folder.read("train", 0)[1][0].tolist() == [*range(11), 255]
    assert (folder.classes[6], folder.palette[6], len(folder.classes)) == ("sign symbol", (192, 128, 128), 11)
    assert folder.pairs["test"] == []
    put(tmp_path / "labels" / "train" / "0.png", [[0] * 9 + [11] * 3])  # CamVid's own "unlabelled"
    with pytest.raises(InputError, match=r"outside the 11 classes: 11 \(3 pixels\)"):
        folder.read("train", 0)


def test_folder_takes_images_without_labels(tmp_path):
    put_folder(tmp_path, [np.zeros((8, 8))])
    assert open_dataset("folder", tmp_path).pairs["unlabelled"] == []
    put(tmp_path / "images" / "unlabelled" / "a.png", np.full((6, 9, 3), 70))
    folder = open_dataset("folder", tmp_path)
    assert folder.pairs["unlabelled"] == [(tmp_path / "images" / "unlabelled" / "a.png", None)]
    image, label = folder.read("unlabelled", 0)
    assert np.array_equal(image, np.full((6, 9, 3), 70))
    assert label.dtype == np.uint8 and np.array_equal(label, np.full((6, 9), IGNORE))


@pytest.mark.skipif(not REAL, reason="C2VKD_SAMPLES names no folder")
@pytest.mark.parametrize("name", ("ade20k", "voc"))
def test_real_samples_are_read(name):
    real = DataSet(name, *{"ade20k": data._ade20k, "voc": data._voc}[name](Path(REAL) / name))
    assert real.pairs["val"]
    for index, (_, path) in enumerate(real.pairs["val"]):
        image, label = real.read("val", index)
        raw = np.asarray(Image.open(path)).astype(int)
        assert np.array_equal(label, np.where(raw == 0, 255, raw - 1) if name == "ade20k" else raw)
        assert image.size == label.shape[::-1]
    assert (real.classes[0], real.classes[-1]) == {"ade20k": ("wall", "flag"), "voc": ("background", "tvmonitor")}[name]


# ---------------------------------------------------------------- the training stream

COLOURS = np.array([(250, 0, 0), (0, 250, 0), (0, 0, 250)], np.uint8)


@pytest.fixture
def blocks(tmp_path):
    """Five pictures of 40 x 56 whose colour tells the label: random blocks of 8 pixels."""
    labels = np.random.default_rng(0).integers(0, 3, (5, 5, 7)).repeat(8, 1).repeat(8, 2)
    return open_dataset("folder", put_folder(tmp_path, labels, image=lambda label: COLOURS[label]))


def same(items, others):
    return all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(items, others, strict=True))


def test_an_item_depends_on_seed_and_position_alone(blocks):
    stream = TrainStream(blocks, 3, 40, 32, (0.5, 2.0), 20)
    items = [stream[p] for p in range(12)]
    assert same([TrainStream(blocks, 3, 40, 32, (0.5, 2.0), 99)[p] for p in reversed(range(12))], items[::-1])
    one = dataclasses.replace(blocks, pairs={"train": blocks.pairs["train"][:1]})  # so that the order is no difference
    for a, b in (((3, 0), (4, 0)), ((3, 0), (3, 1))):
        assert not same(*([TrainStream(one, seed, 40, 32, (0.5, 2.0), 20)[p]] for seed, p in (a, b)))


def test_the_number_of_workers_changes_nothing(blocks):
    stream = TrainStream(blocks, 3, 40, 32, (0.5, 2.0), 6)
    alone, two = (list(torch.utils.data.DataLoader(stream, 2, num_workers=n)) for n in (0, 2))
    assert same(two, alone)


def test_every_epoch_is_a_permutation(blocks):
    sources = [TrainStream(blocks, 0, 40, 32, (1, 1), 20).source(position) for position in range(20)]
    epochs = [sources[i:i + 5] for i in range(0, 20, 5)]
    assert all(sorted(epoch) == [("train", i) for i in range(5)] for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1


@pytest.fixture
def mixed(blocks):
    """`blocks` with seven images whose labels are not used."""
    unlabelled = [(image, None) for image, _ in blocks.pairs["train"] + blocks.pairs["val"][:2]]
    return dataclasses.replace(blocks, pairs=blocks.pairs | {"unlabelled": unlabelled})


@pytest.mark.parametrize("unlabelled", (1, 2, 3))
def test_the_last_slots_of_each_batch_are_unlabelled_and_either_kind_has_its_own_epochs(mixed, unlabelled):
    stream = TrainStream(mixed, 3, 40, 32, (0.5, 2.0), 140, 4, unlabelled)
    sources = [stream.source(position) for position in range(140)]
    for batch in range(0, 140, 4):
        splits = [split for split, _ in sources[batch:batch + 4]]
        assert splits == ["train"] * (4 - unlabelled) + ["unlabelled"] * unlabelled
        assert all((stream[p][1] == IGNORE).all() == (split == "unlabelled") for p, split in enumerate(splits, batch))
    for split, n in (("train", 5), ("unlabelled", 7)):
        indices = [index for which, index in sources if which == split]
        epochs = [indices[i:i + n] for i in range(0, len(indices) - n + 1, n)]
        assert len(epochs) >= 5 and all(sorted(epoch) == list(range(n)) for epoch in epochs)
        assert len(set(map(tuple, epochs))) > 1
    alone = TrainStream(mixed, 3, 40, 32, (0.5, 2.0), 140)
    labelled = [source for source in sources if source[0] == "train"]
    assert labelled == [alone.source(count) for count in range(len(labelled))]  # no labelled image is skipped
    again = TrainStream(mixed, 3, 40, 32, (0.5, 2.0), 9, 4, unlabelled)
    assert same([again[p] for p in reversed(range(8))], [stream[p] for p in reversed(range(8))])


def test_without_unlabelled_slots_the_batch_size_and_the_unlabelled_images_change_nothing(blocks, mixed):
    plain = TrainStream(blocks, 3, 40, 32, (0.5, 2.0), 12)
    batched = TrainStream(mixed, 3, 40, 32, (0.5, 2.0), 12, 4)
    assert same([plain[p] for p in range(12)], [batched[p] for p in range(12)])


def test_the_order_of_the_images_is_the_one_that_earlier_results_rest_on(blocks):
    stream = TrainStream(blocks, 3, 40, 32, (1, 1), 15)
    expected = [np.random.default_rng([3, epoch]).permutation(5).tolist() for epoch in range(3)]
    assert [stream.source(p)[1] for p in range(15)] == sum(expected, [])


@pytest.mark.parametrize("labelled, unlabelled, batch_size, slots", (
    (100, 0, 8, 0), (50, 500, 8, 4), (50, 50, 8, 4), (30, 10, 8, 2), (1000, 1, 8, 1), (50, 500, 7, 3), (50, 500, 2, 1),
    (7, 3, 10, 3)))
def test_half_of_a_batch_is_unlabelled_where_there_are_enough(labelled, unlabelled, batch_size, slots):
    pairs = {"train": [None] * labelled, "unlabelled": [None] * unlabelled}
    assert data.unlabelled_slots(DataSet("folder", [], [], pairs, None), batch_size) == slots


def test_data_sets_that_know_no_unlabelled_images_have_no_such_slots(tmp_path):
    assert data.unlabelled_slots(open_dataset("ade20k", put_ade20k(tmp_path, [[1, 2]])), 8) == 0


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


def test_image_and_label_are_cropped_and_flipped_together(blocks):
    orientations = set()
    stream = TrainStream(blocks, 0, 40, 40, (1, 1), 20)
    for position in range(20):
        image, label = stream[position]
        assert np.array_equal(image.numpy().transpose(1, 2, 0), COLOURS[label])
        whole = blocks.read(*stream.source(position))[1]
        found = {turn for turn in (1, -1) for x in range(17) if np.array_equal(whole[:, x:x + 40][:, ::turn], label)}
        assert len(found) == 1
        orientations |= found
    assert orientations == {1, -1}


def test_image_and_label_are_scaled_together(blocks):
    for position in range(10):
        image, label = TrainStream(blocks, 0, 40, 48, (0.5, 2.0), 10)[position]
        inside = label != IGNORE
        assert (image.argmax(0) == label)[inside].float().mean() > 0.9  # they differ at edges between blocks alone


# ---------------------------------------------------------------- shapes

def test_shapes_are_a_function_of_seed_and_index():
    drawn = [[np.asarray(part).tobytes() for part in draw_shapes(*key)] for key in ((0, 7), (0, 7), (0, 8), (1, 7))]
    assert drawn[0] == drawn[1]
    assert len({image for image, _ in drawn}) == 3


def test_shapes_hold_every_class_and_an_ignored_border():
    labels = np.stack([np.asarray(draw_shapes(0, i)[1]) for i in range(40)])
    assert len(data.SHAPES) >= 8
    assert set(np.unique(labels)) == {*range(len(data.SHAPES)), IGNORE}
    assert 0.01 < (labels == IGNORE).mean() < 0.2


def test_shapes_are_drawn_once_and_read_as_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHAPES_COUNT", {"train": 3, "val": 2, "test": 1})
    shapes = open_dataset("shapes", tmp_path / "a")
    assert {s: len(p) for s, p in shapes.pairs.items()} == data.SHAPES_COUNT | {"unlabelled": 0}
    assert shapes.name == "shapes"
    image, label = shapes.read("train", 2)
    drawn = draw_shapes(0, 2)
    assert np.array_equal(image, drawn[0]) and np.array_equal(label, drawn[1])
    monkeypatch.setattr(data, "draw_shapes", None)  # a second call would fail to draw
    assert open_dataset("shapes", tmp_path / "a").classes == data.SHAPES


# ---------------------------------------------------------------- downloads

@pytest.fixture
def serve(monkeypatch):
    """serve(body, bad): a server on this machine whose first `bad` transfers end early -> the count of transfers."""
    servers = []

    def start(body, bad=0, digest=None, name="voc.zip"):
        transfers = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                transfers.append(self.path)
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                cut = (len(transfers) + 1) // 2 <= bad  # a download is two requests, the first asks for the size
                self.wfile.write(body[:len(body) // 2] if cut else body)

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.handle_error = lambda *_: None  # the client hangs up once it knows the size
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        monkeypatch.setenv("no_proxy", "*")
        url = f"http://127.0.0.1:{server.server_port}/{name}"
        monkeypatch.setitem(data.DOWNLOADS, "voc", (url, "md5", digest or hashlib.md5(body).hexdigest(), "VOCdevkit"))
        return lambda: len(transfers) // 2

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def packed(tmp_path, name="voc.zip", extra=None):
    """A small VOC as an archive, with one extra member: a name, or a name and where it links to."""
    source = put_voc(tmp_path / "source", False)
    files = [p for p in source.rglob("*") if p.is_file()]
    body = io.BytesIO()
    if name.endswith(".zip"):
        with zipfile.ZipFile(body, "w") as z:
            for p in files:
                z.write(p, p.relative_to(source))
            if extra:
                member = zipfile.ZipInfo(extra[0])
                member.external_attr = (0o120777 if extra[1:] else 0o100644) << 16
                z.writestr(member, extra[-1])
        return body.getvalue()
    with tarfile.open(fileobj=body, mode="w") as t:
        for p in files:
            t.add(p, p.relative_to(source))
        if extra:
            member = tarfile.TarInfo(extra[0])
            member.type, member.linkname = (tarfile.SYMTYPE, extra[1]) if extra[1:] else (tarfile.REGTYPE, "")
            t.addfile(member)
    return body.getvalue()


@pytest.mark.parametrize("name", ("voc.zip", "voc.tar"))
def test_a_download_is_unpacked_and_nothing_else_is_left(tmp_path, serve, name):
    count = serve(packed(tmp_path, name), name=name)
    assert len(open_dataset("voc", tmp_path / "voc").pairs["train"]) == 1
    assert [p.name for p in (tmp_path / "voc").iterdir()] == ["VOCdevkit"]
    assert open_dataset("voc", tmp_path / "voc") and count() == 1


@pytest.mark.parametrize("fault", ("truncated", "another file"))
def test_a_download_that_is_wrong_leaves_nothing_and_the_next_command_tries_again(tmp_path, serve, fault):
    count = serve(packed(tmp_path), bad=1) if fault == "truncated" else serve(packed(tmp_path), digest="0" * 32)
    with pytest.raises(InputError, match="voc.zip: md5 .* instead of .*: deleted; run the same command again, or get"):
        open_dataset("voc", tmp_path / "voc")
    assert count() == 1 and list((tmp_path / "voc").iterdir()) == []
    if fault == "truncated":
        assert len(open_dataset("voc", tmp_path / "voc").pairs["train"]) == 1 and count() == 2


@pytest.mark.parametrize("server", ("none", "not one of the web"))
def test_an_address_that_does_not_answer_properly_is_an_input_error(tmp_path, monkeypatch, server):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        if server != "none":
            s.listen()
            threading.Thread(target=lambda: s.accept()[0].sendall(b"220 mail\r\n"), daemon=True).start()
        monkeypatch.setenv("no_proxy", "*")
        url = f"http://127.0.0.1:{s.getsockname()[1]}/voc.zip"
        monkeypatch.setitem(data.DOWNLOADS, "voc", (url, "md5", "", "VOCdevkit"))
        with pytest.raises(InputError, match="(?s)voc.zip: cannot download it .*; get it elsewhere and unpack it in"):
            open_dataset("voc", tmp_path / "voc")


@pytest.mark.parametrize("name", ("voc.zip", "voc.tar"))
@pytest.mark.parametrize("extra", (("VOCdevkit/../../../evil",), ("/evil",), ("VOCdevkit/link", "/etc")),
                         ids=("up", "absolute", "link"))
def test_an_archive_that_leads_outside_writes_nothing_there(tmp_path, serve, name, extra):
    outside = tmp_path / "outside"
    outside.mkdir()
    extra = [part.replace("/etc", str(outside)).replace("/evil", f"{outside}/evil") for part in extra]
    serve(packed(tmp_path, name, extra), name=name)
    with suppress(tarfile.FilterError):
        open_dataset("voc", tmp_path / "voc")
    assert not any(p.is_symlink() for p in (tmp_path / "voc").rglob("*"))
    assert not list(outside.iterdir())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["outside", "source", "voc"]


def test_a_disk_that_is_too_small_is_noticed_before_the_download(tmp_path, serve, monkeypatch):
    count = serve(packed(tmp_path))
    monkeypatch.setattr(data.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match="GB free, .* GB needed; give --data a larger disk"):
        open_dataset("voc", tmp_path / "voc")
    assert count() == 0
    assert list((tmp_path / "voc").iterdir()) == []


def test_a_killed_unpacking_leaves_nothing_that_looks_whole_and_is_done_again(tmp_path, serve, monkeypatch):
    count = serve(packed(tmp_path))

    def killed(archive, target, **_):
        (target / "VOCdevkit" / "VOC2012").mkdir(parents=True)
        (target / "VOCdevkit" / "half").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data.shutil, "unpack_archive", killed)
        with pytest.raises(KeyboardInterrupt):
            open_dataset("voc", tmp_path / "voc")
    assert not (tmp_path / "voc" / "VOCdevkit").exists()
    open_dataset("voc", tmp_path / "voc")
    assert [p.name for p in (tmp_path / "voc").iterdir()] == ["VOCdevkit"]
    assert not (tmp_path / "voc" / "VOCdevkit" / "half").exists()
    assert count() == 1


# ---------------------------------------------------------------- data.py --check

def run_check(root, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["data.py", "--check", "--dataset", "folder", "--data", str(root)])
    code = 0
    try:
        data.command(data.main)
    except SystemExit as e:
        code = e.code
    out, err = capsys.readouterr()
    return code, out, "".join(err.splitlines()[-1:])


def test_check_lists_every_fault_and_returns_2(tmp_path, monkeypatch, capsys):
    root = put_folder(tmp_path, [np.zeros((8, 8))] * 6)
    code, out, _ = run_check(root, monkeypatch, capsys)
    counts = "train: 6 images, val: 6 images, test: 0 images, unlabelled: 0 images"
    rare = "ignored: 0.0% of the labels' pixels; classes without a pixel: traffic light, sky\n"
    assert (code, out) == (0, f"{rare}{counts}, 3 classes, 0 faulty\n")
    (root / "labels" / "train" / "0.png").unlink()
    (root / "labels" / "val" / "1.png").unlink()
    put(root / "labels" / "train" / "2.png", np.zeros((8, 9)))
    put(root / "labels" / "train" / "3.png", np.full((8, 8), 3))
    put(root / "labels" / "train" / "4.png", np.zeros((8, 8, 3)))
    image = root / "images" / "val" / "5.png"
    image.write_bytes(image.read_bytes()[:50])
    code, out, last = run_check(root, monkeypatch, capsys)
    assert code == 2
    for path, fault in (("labels/train/0.png", "no such file"), ("labels/val/1.png", "no such file"),
                        ("labels/train/2.png", "9x8"), ("labels/train/3.png", "3 (64 pixels)"),
                        ("labels/train/4.png", "mode RGB"), ("images/val/5.png", "truncated")):
        assert [line for line in out.splitlines() if path in line and fault in line], path
    assert last == "error: 6 faulty files are listed above; mend or remove them"


def test_check_reads_images_without_labels_and_counts_them(tmp_path, monkeypatch, capsys):
    put_folder(tmp_path, [np.zeros((8, 8))])
    for name in "ab":
        put(tmp_path / "images" / "unlabelled" / f"{name}.png", np.zeros((8, 8, 3)))
    (tmp_path / "images" / "unlabelled" / "b.png").write_text("no image")
    code, out, _ = run_check(tmp_path, monkeypatch, capsys)
    assert code == 2
    assert "unlabelled/b.png: truncated or not an image" in out
    assert out.endswith("unlabelled: 2 images, 3 classes, 1 faulty\n")


ROAD, LIGHT, SKY, OTHER = (128, 64, 128), (250, 170, 30), (70, 130, 180), (1, 2, 3)


@pytest.mark.parametrize("kind", ("RGB", "RGBA", "P"))
def test_check_lists_the_colours_of_labels_and_shows_how_to_convert_them(tmp_path, monkeypatch, capsys, kind):
    indices = np.array([[0, 0, 0, 0], [1, 1, 1, 2], [2, 255, 0, 0]])
    put_folder(tmp_path, [indices])
    colours = np.array([ROAD, LIGHT, SKY, OTHER], np.uint8)[np.minimum(indices, 3)]
    for split in ("train", "val"):
        label = tmp_path / "labels" / split / "0.png"
        if kind == "P":  # indices of its own: 7, 8, 9 and 10
            put(label, np.minimum(indices, 3) + 7, [(0, 0, 0)] * 7 + [ROAD, LIGHT, SKY, OTHER])
        else:
            Image.fromarray(colours).convert(kind).save(label)
    code, out, _ = run_check(tmp_path, monkeypatch, capsys)
    assert code == 2
    lines = [line.strip() for line in out.splitlines()]
    assert "4 colours or values in labels that hold no class indices, the commonest and their share:" in lines
    at = lines.index("(128, 64, 128)  50.0%  road")
    assert lines[at + 1] == "(250, 170, 30)  25.0%  traffic light"
    assert "(70, 130, 180)  16.7%  sky" in lines and "(1, 2, 3)  8.3%  not in classes.txt" in lines
    shown = textwrap.dedent("\n".join(line for line in out.splitlines() if line.startswith("    ")))
    for _ in range(2):  # what is converted stays as it is
        exec(shown, {})
        assert run_check(tmp_path, monkeypatch, capsys)[0] == 0
        folder = open_dataset("folder", tmp_path)
        assert all(np.array_equal(folder.read(split, 0)[1], indices) for split in ("train", "val"))


def test_conversion_leaves_class_indices_below_another_palette(tmp_path, monkeypatch, capsys):
    """VOC's palette, for instance; its black is often the colour of the first class, too."""
    indices = np.array([[0, 0, 1, 255], [2, 2, 1, 0]])
    put_folder(tmp_path, [indices] * 2, classes="ground 0 0 0\ntree 9 9 9\nsky 70 130 180\n")
    put(tmp_path / "labels" / "train" / "0.png", indices, voc_palette(256))
    colours = np.array([(0, 0, 0), (9, 9, 9), (70, 130, 180), OTHER])[np.minimum(indices, 3)]
    put(tmp_path / "labels" / "train" / "1.png", colours)
    code, out, _ = run_check(tmp_path, monkeypatch, capsys)
    assert code == 2 and "train/1.png" in out and "train/0.png" not in out
    exec(textwrap.dedent("\n".join(line for line in out.splitlines() if line.startswith("    "))), {})
    assert run_check(tmp_path, monkeypatch, capsys)[0] == 0
    folder = open_dataset("folder", tmp_path)
    assert all(np.array_equal(folder.read("train", i)[1], indices) for i in (0, 1))


@pytest.mark.parametrize("void", (3, 255))
def test_palette_labels_in_another_order_are_found_and_converted(tmp_path, monkeypatch, capsys, void):
    """Programs that save few colours number them as they like, from 0."""
    indices = np.array([[0, 0, 1, 255], [2, 2, 1, 0]])
    put_folder(tmp_path, [indices])
    numbers = np.array([2, 0, 1] + [0] * 252 + [void])
    put(tmp_path / "labels" / "train" / "0.png", numbers[indices], [LIGHT, SKY, ROAD] + [OTHER] * 253)
    code, out, _ = run_check(tmp_path, monkeypatch, capsys)
    assert code == 2 and "train/0.png: index " in out
    exec(textwrap.dedent("\n".join(line for line in out.splitlines() if line.startswith("    "))), {})
    assert np.array_equal(open_dataset("folder", tmp_path).read("train", 0)[1], indices)
    put(tmp_path / "labels" / "train" / "0.png", indices, [ROAD, LIGHT, SKY] + [OTHER] * 253)
    assert run_check(tmp_path, monkeypatch, capsys)[0] == 0


def test_images_are_turned_as_programs_show_them(tmp_path):
    put_folder(tmp_path, [np.zeros((2, 3), int)])
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    pixels = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    Image.fromarray(pixels).save(tmp_path / "images" / "train" / "0.png", exif=exif)
    assert np.array_equal(np.array(open_dataset("folder", tmp_path).read("train", 0)[0]), pixels[::-1, ::-1])


@pytest.mark.parametrize("exif", (b"Exif\0\0II*\0", b"Exif\0\0nonsense"))
def test_damaged_exif_data_are_no_fault_of_the_pixels(tmp_path, exif):
    put_folder(tmp_path, [np.zeros((2, 3), int)])
    (tmp_path / "images" / "train" / "0.png").unlink()
    Image.new("RGB", (3, 2)).save(tmp_path / "images" / "train" / "0.jpg", exif=exif)
    assert open_dataset("folder", tmp_path).read("train", 0)[0].size == (3, 2)


def test_a_picture_beyond_pillows_limit_is_named(tmp_path, monkeypatch):
    put_folder(tmp_path, [np.zeros((9, 9), int)])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with pytest.raises(InputError, match="0.png: more than 80 pixels; cut it into tiles"):
        open_dataset("folder", tmp_path).read("train", 0)


def test_a_mark_of_byte_order_is_no_part_of_a_name(tmp_path):
    put_folder(tmp_path, [np.zeros((4, 4))], classes="\ufeffroad 1 2 3\nsky 3 2 1\n")
    assert open_dataset("folder", tmp_path).classes == ["road", "sky"]


def test_check_lists_the_values_of_grey_labels(tmp_path, monkeypatch, capsys):
    put_folder(tmp_path, [[[0, 0, 2, 2, 2, 2, 2, 11, 11, 255]]])
    code, out, _ = run_check(tmp_path, monkeypatch, capsys)
    assert code == 2
    assert [line.strip() for line in out.splitlines()[3:7]] == [
        "2  50.0%  sky", "0  20.0%  road", "11  20.0%  not in classes.txt", "255  10.0%  ignored"]
    assert "import" not in out


def test_check_lists_no_more_than_twelve_colours(tmp_path, monkeypatch, capsys):
    put_folder(tmp_path, [[range(200)]])
    assert run_check(tmp_path, monkeypatch, capsys)[1].count("%  ") == 12


# ---------------------------------------------------------------- what every script shares

@pytest.mark.parametrize("size", (10, 10 ** 6))  # within Python's buffer and beyond it
def test_a_closed_pipe_ends_a_script_without_a_word(size):
    code = f"import data; data.command(lambda: print({size} * 'x'))"
    shell = subprocess.run(f'"{sys.executable}" -c "{code}" | true', shell=True, capture_output=True,
                           cwd=os.path.dirname(data.__file__), env=os.environ | {"PYTHONUNBUFFERED": ""})
    assert shell.stderr == b""


def end(error, capsys):
    """The exit code and the lines of a script in which `error` is raised."""
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        data.command(main)
    return stop.value.code, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("error, code, line", (
    (InputError("x.png: truncated;\n  get it again"), 2, "error: x.png: truncated; get it again"),
    (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried 2 GiB\nmore"), 2,
     "error: out of GPU memory (CUDA out of memory. Tried 2 GiB): lower --batch-size or --crop"),
    (PermissionError(errno.EACCES, "Permission denied", "runs/a"), 2,
     "error: runs/a: Permission denied; check the path, its permissions and the free space"),
    (OSError(errno.ENOSPC, "No space left on device"), 2,
     "error: output: No space left on device; check the path, its permissions and the free space"),
    (KeyboardInterrupt(), 130, "interrupted; run the same command again to continue"),
    (KeyboardInterrupt("student: stopped and saved at step 3"), 130, "student: stopped and saved at step 3")))
def test_what_a_user_can_mend_is_one_line_and_an_exit_code(capsys, error, code, line):
    assert end(error, capsys) == (code, [line])


@pytest.mark.parametrize("error", (OSError("no file"), ConnectionResetError(errno.ECONNRESET, "reset by peer"),
                                   RuntimeError("shapes do not match"), KeyError("x")))
def test_other_errors_keep_their_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error)) as found:
        data.command(main)
    assert found.value is error


@pytest.mark.parametrize("label", (b"", None))
def test_a_fault_met_by_a_loader_process_is_one_line(tmp_path, capsys, label):
    folder = open_dataset("folder", put_folder(tmp_path, [np.zeros((8, 8))]))
    path = tmp_path / "labels" / "train" / "0.png"
    if label is None:
        put(path, np.full((8, 8), 9))
    else:
        path.write_bytes(label)
    loader = torch.utils.data.DataLoader(TrainStream(folder, 0, 8, 8, (1, 1), 2), num_workers=1)
    with pytest.raises(SystemExit) as stop:
        data.command(lambda: list(loader))
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert len(lines) == 1 and lines[0].startswith(f"error: {path}: ")


@pytest.mark.parametrize("argv, message", (
    ("--steps 0", "argument --steps: must be at least 1"), ("--steps x", "argument --steps: invalid number value: 'x'"),
    ("--lr nan", "argument --lr: must be at least 0.5"), ("--lr inf", "argument --lr: must be at least 0.5 and finite"),
    ("--lr 0.4", "argument --lr: must be at least 0.5"), ("--nonsense", "unrecognized arguments: --nonsense"),
    ("--choice c", "argument --choice: invalid choice: 'c'")))
def test_options_out_of_range_are_input_errors(argv, message):
    parser = data.Parser()
    parser.add_argument("--steps", type=data.at_least(1))
    parser.add_argument("--lr", type=data.at_least(0.5, float))
    parser.add_argument("--choice", choices=("a", "b"))
    assert parser.parse_args(["--steps", "1", "--lr", "0.5"]) == parser.parse_args(["--steps=1", "--lr=5e-1"])
    with pytest.raises(InputError) as e:
        parser.parse_args(argv.split())
    assert str(e.value).startswith(message)


def test_a_wrong_option_of_the_check_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["data.py", "--check", "--dataset", "nonsense"])
    with pytest.raises(SystemExit) as stop:
        data.command(data.main)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: argument --dataset: invalid choice")


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    data.write_atomically(path, b"old")
    data.write_atomically(str(path), memoryview(b"older"))
    assert path.read_bytes() == b"older"

    def full(_):
        assert (tmp_path / "last.pt.part").read_bytes() == b"new"  # all of it is written before the sync
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"last.pt: cannot write it \(.*No space left on device\); free some space"):
        data.write_atomically(path, b"new")
    assert path.read_bytes() == b"older"
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("place", ("nowhere/last.pt", "file/last.pt"))
def test_a_place_that_cannot_be_written_is_an_input_error(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=f"{place}: cannot write it"):
        data.write_atomically(tmp_path / place, b"new")


def test_tensors_are_saved_and_loaded(tmp_path):
    path = tmp_path / "last.pt"
    data.save_tensors(path, {"step": 3, "network": {"w": torch.arange(3)}})
    state = data.load_checkpoint(path, ("step", "network"))
    assert state["step"] == 3 and torch.equal(state["network"]["w"], torch.arange(3))
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]
    data.save_tensors(path, {"w": torch.arange(3)})
    assert torch.equal(data.read_weights(path, "--student-weights")["w"], torch.arange(3))


@pytest.mark.parametrize("content, message", (
    (None, "no such file; give the path of a last.pt"), (b"", "not a readable checkpoint"),
    (b"hello\n", "not a readable checkpoint"), ({"a": 1}, "not a checkpoint of this project: no step, network in it"),
    ([1], "not a checkpoint of this project: no dictionary in it; give a last.pt")))
def test_what_is_no_checkpoint_is_refused(tmp_path, content, message):
    path = tmp_path / "x.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        torch.save(content, path)
    with pytest.raises(InputError) as e:
        data.load_checkpoint(path, ("step", "network"))
    assert str(e.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize("content", ({}, {"step": 1, "w": torch.zeros(1)}))
def test_what_is_no_plain_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(InputError, match="x.pt: not a plain state dict of tensors; --student-weights takes one"):
        data.read_weights(tmp_path / "x.pt", "--student-weights")


@pytest.mark.parametrize("terminal, disable, shown", ((False, False, False), (False, None, False), (True, False, True),
                                                      (True, None, True), (True, True, False)))
def test_bars_are_for_terminals(monkeypatch, terminal, disable, shown):
    stderr = io.StringIO()
    stderr.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stderr)
    assert list(data.progress(range(3), desc="checking", disable=disable)) == [0, 1, 2]
    assert ("checking" in stderr.getvalue()) == shown
