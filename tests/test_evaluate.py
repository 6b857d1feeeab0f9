"""Scores, sliding windows, pictures, checkpoints, export and the comparison of runs."""
import csv
import json
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import evaluate as module
from data import IGNORE, EvalImages, InputError, normalise, open_dataset
from evaluate import (chart, class_map, columns, commonest, compare, comparison, confusion_matrix, evaluate, gain_chart,
                      load_network, milliseconds, overlay, paint, predict, scores, table)
from student import Student
from teacher import Teacher

CLASSES = ["sky", "tall grass", "cat"]
PALETTE = [[0, 0, 250], [0, 250, 0], [250, 0, 0]]
SIZES = [(40, 56), (64, 33), (90, 120)]  # height, width


class Pointwise(nn.Module):
    """A network whose output at a position depends on that position alone."""

    def __init__(self, classes=3):
        super().__init__()
        self.conv = nn.Conv2d(3, classes, 1)
        self.eval()

    def forward(self, x):
        return self.conv(x), None, None


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A data set in the layout of `folder`, with pictures of different sizes."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    (root / "classes.txt").write_text("".join(f"{name} {r} {g} {b}\n" for name, (r, g, b) in zip(CLASSES, PALETTE)))
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for i, (h, w) in enumerate(SIZES):
            Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)).save(root / "images" / split / f"{i}.png")
            label = rng.choice(np.array([0, 1, 2, IGNORE], np.uint8), (h, w))
            Image.fromarray(label).save(root / "labels" / split / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def data(root):
    return open_dataset("folder", root)


@pytest.fixture
def checkpoint(root, tmp_path):
    """last.pt of a small untrained student, with what train.py writes."""
    torch.manual_seed(0)
    path = tmp_path / "run" / "last.pt"
    path.parent.mkdir()
    module = nn.ModuleDict({"student": Student("mit_nano", 3), "heads": nn.ModuleDict({"A_v": nn.Conv2d(256, 8, 1)})})
    torch.save({"module": module.state_dict(), "name": "mit_nano", "dataset": "folder", "data": str(root),
                "classes": CLASSES, "palette": PALETTE, "base": 48, "window": 32, "step": 7, "label": "mine",
                "method": "ce", "seed": 1, "conditions": {"steps": 7}}, path)
    return path


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--device", "cpu", *map(str, arguments)])
    module.main()


# ---------------------------------------------------------------- scores

def test_confusion_matrix_is_a_count_over_the_labelled_pixels():
    torch.manual_seed(0)
    for classes in (2, 5, 19):
        prediction, label = torch.randint(classes, (17, 23)), torch.randint(classes, (17, 23), dtype=torch.uint8)
        label[torch.rand(17, 23) < 0.2] = IGNORE
        count = [[0] * classes for _ in range(classes)]
        for p, y in zip(prediction.flatten().tolist(), label.flatten().tolist()):
            if y != IGNORE:
                count[y][p] += 1
        assert confusion_matrix(prediction, label, classes).tolist() == count


def test_scores_of_a_small_case_by_hand():
    # rows: labels. Class 2 is never found, class 3 only imagined, class 4 nowhere.
    matrix = torch.tensor([[3, 1, 0, 0, 0], [0, 2, 0, 1, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    found = scores(matrix)
    assert found["iou"] == pytest.approx([75, 40, 0, 0, None])
    assert found["miou"] == pytest.approx((75 + 40 + 0 + 0) / 4)
    assert found["pixel_accuracy"] == pytest.approx(100 * 5 / 8)


def test_scores_of_nothing_are_zero():
    assert scores(torch.zeros(2, 2, dtype=torch.int64)) == {"miou": 0, "iou": [None, None], "pixel_accuracy": 0}


def test_commonest_is_the_score_of_one_answer_for_everything():
    torch.manual_seed(0)
    label = torch.randint(4, (40, 40)).clamp(min=1)  # classes 1, 2 and 3; half of the pixels are 1
    matrix = confusion_matrix(torch.randint(5, (40, 40)), label, 5)
    assert commonest(matrix) == scores(confusion_matrix(torch.ones_like(label), label, 5))["miou"]
    assert commonest(torch.tensor([[6, 0], [1, 1]])) == pytest.approx((75 + 0) / 2)
    assert commonest(torch.zeros(2, 2, dtype=torch.int64)) == 0


# ---------------------------------------------------------------- windows

@pytest.fixture
def logits(monkeypatch):
    """Instead of a class map, `predict` returns the logits (K,H,W) that it would take it from."""
    monkeypatch.setattr(module, "class_map", lambda z, size: F.interpolate(z[None], size, mode="bilinear")[0])


def test_windows_of_a_pointwise_network_give_the_whole_image(logits):
    rng, model = random.Random(0), Pointwise()
    for _ in range(25):
        h, w, window = rng.randint(5, 90), rng.randint(5, 90), rng.randint(32, 64)
        image = torch.randint(256, (3, h, w), dtype=torch.uint8)
        size, flip = (rng.randint(5, 100), rng.randint(5, 100)), rng.random() < 0.5
        whole = F.interpolate(model(normalise(image[None]))[0], size, mode="bilinear", align_corners=False)[0]
        for stride in (None, rng.randint(1 + window // 4, window), 2 * window):
            found = predict(model, image, size, window, stride, flip, batch=rng.randint(1, 9))
            torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(predict(model, image, size, flip=flip), whole, atol=1e-5, rtol=1e-5)


class Count(nn.Module):
    """Logits 0, 1, 2, ... for the windows in their order."""
    seen = -1

    def forward(self, x):
        self.seen += 1
        return torch.full((1, 1, *x.shape[2:]), float(self.seen)), None


def test_overlapping_windows_are_averaged(logits):
    found = predict(Count(), torch.zeros(3, 32, 48, dtype=torch.uint8), (32, 48), window=32, stride=20, batch=1)
    assert found[0, 0].tolist() == [0] * 16 + [0.5] * 16 + [1] * 16  # 16: the second window lies flush with the end


def test_windows_overlap_by_a_third_unless_a_stride_is_given():
    image = torch.zeros(3, 36, 36 + 2 * 24, dtype=torch.uint8)
    for stride, windows in ((None, 3), (36, 3), (12, 5)):
        model = Count()
        predict(model, image, (4, 4), window=36, stride=stride, batch=1)
        assert model.seen + 1 == windows


def test_flip_averages_with_the_mirror_image(logits):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 2, 3, padding=1)
    image = torch.randint(256, (3, 40, 48), dtype=torch.uint8)
    found = predict(lambda x: (conv(x),), image, (40, 48), flip=True)
    x = normalise(image[None])
    torch.testing.assert_close(found, ((conv(x) + conv(x.flip(3)).flip(3)) / 2)[0])
    assert not torch.allclose(found, conv(x)[0], atol=1e-3)


@pytest.mark.parametrize("size", [(30, 141), (113, 43), (120, 160)])
def test_class_map_is_argmax_and_ties_go_to_the_lower_class(size):
    torch.manual_seed(0)
    many = torch.randn(13, 12, 16)
    few = torch.randint(3, (13, 12, 16)).float()  # ties nearly everywhere
    few[:, :3] = 0
    for logits in (many, few, few[:1]):
        found = class_map(logits, size)
        wanted = torch.cat([F.interpolate(z[None, None], size, mode="bilinear")[0] for z in logits]).argmax(0)
        assert found.dtype == torch.int64 and torch.equal(found, wanted)


class Largest(TorchDispatchMode):
    """Remembers how many elements the largest new tensor had."""
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("window, flip", [(512, False), (512, True), (None, False)])
def test_a_large_picture_of_many_classes_needs_little_memory(window, flip):
    def model(x):  # on the device "meta" shapes are all there is, so this costs nothing
        return (x.new_zeros(len(x), 150, x.shape[2] // 4, x.shape[3] // 4),)
    with Largest() as largest:
        image = torch.zeros(3, 512, 683, dtype=torch.uint8, device="meta")
        found = predict(model, image, (3000, 4000), window, flip=flip)
    assert found.shape == (3000, 4000) and found.dtype == torch.int64
    seen = (1 + flip) * 150 * 512 * 683  # logits of the small picture that the network sees
    assert largest.elements <= seen < 3000 * 4000 * 150 / 17


def test_small_images_are_padded_with_the_mean_colour():
    seen = []
    predict(lambda x: (seen.append(x) or x,), torch.full((3, 8, 10), 255, dtype=torch.uint8), (8, 10), window=32)
    assert seen[0].shape == (1, 3, 32, 32)
    assert (seen[0][:, :, 8:] == 0).all() and (seen[0][:, :, :, 10:] == 0).all() and (seen[0][:, :, :8, :10] > 1).all()


def test_evaluate_counts_every_labelled_pixel_once_for_any_batch_size(data):
    torch.manual_seed(0)
    model = Pointwise()
    first, *others = (evaluate(model, data, "val", 64, 32, "cpu", batch=n) for n in (1, 2, 5, 100))
    assert all(torch.equal(first, m) for m in others)
    labelled = sum((data.read("val", i)[1] != IGNORE).sum() for i in range(3))
    assert first.sum() == labelled
    expected = sum(confusion_matrix(predict(model, image, label.shape, 32, 21), label, 3)
                   for image, label in (EvalImages(data, "val", 64)[i] for i in range(3)))
    assert torch.equal(first, expected)


def test_loader_processes_and_the_state_of_random_numbers_play_no_part(data):
    torch.manual_seed(0)
    model, before = Pointwise(), torch.get_rng_state()
    alone, helped = (evaluate(model, data, "val", 64, 32, "cpu", workers=n) for n in (0, 1))
    assert torch.equal(alone, helped) and torch.equal(before, torch.get_rng_state())


def test_several_processes_take_every_image_once(data, monkeypatch):
    model, whole = Pointwise(), 0
    alone = evaluate(model, data, "val", 64, 32, "cpu")
    for name, value in dict(is_initialized=True, get_world_size=2, all_reduce=None).items():
        monkeypatch.setattr(module.dist, name, lambda *_, value=value: value)
    for rank in (0, 1):
        monkeypatch.setattr(module.dist, "get_rank", lambda rank=rank: rank)
        whole += evaluate(model, data, "val", 64, 32, "cpu")
    assert torch.equal(whole, alone)


def test_evaluate_takes_the_first_images_only_if_asked(data):
    labelled = (data.read("val", 0)[1] != IGNORE).sum()
    assert evaluate(Pointwise(), data, "val", 64, 32, "cpu", images=1).sum() == labelled


# ---------------------------------------------------------------- pictures

def test_overlay_keeps_the_size_and_puts_a_legend_below():
    prediction = torch.zeros(50, 250, dtype=torch.int64)
    prediction[:, 125:] = 2
    picture = overlay(Image.new("RGB", (250, 50), "black"), prediction, CLASSES, PALETTE)
    assert picture.size == (250, 50 + 24)  # both names fit in one line
    blue, red, box = (picture.getpixel(at) for at in ((10, 10), (240, 10), (6, 50 + 12)))
    assert blue == (0, 0, 175) and red == (175, 0, 0) and box == tuple(PALETTE[0])
    prediction[:, 100] = 1
    assert overlay(Image.new("RGB", (250, 50)), prediction, CLASSES, PALETTE).size == (250, 50 + 2 * 24)


def test_paint_gives_each_class_its_colour_and_ignored_pixels_white():
    label = torch.tensor([[0, 1], [2, IGNORE]], dtype=torch.uint8)
    assert np.array(paint(label, PALETTE)).tolist() == [[PALETTE[0], PALETTE[1]], [PALETTE[2], [255] * 3]]


def test_comparison_has_a_row_an_image_and_a_column_a_network(data):
    models = {"teacher": Pointwise().train(), "nobody": None, "student": Pointwise()}
    sheet = comparison(data, "val", 32, 32, models, "cpu", images=2)
    first, second = (round(256 * h / w) + 6 for h, w in ((32, 45), (62, 32)))  # SIZES, the short side at 32
    assert sheet.width == 4 * (256 + 6) and sheet.height == 32 + first + second + 2 * (sheet.width // 60)
    assert models["teacher"].training
    label = paint(data_label(data, 0), data.palette)
    for row, column in ((3, 5), (20, 30), (39, 55)):
        at = (262 + 3 + int((column + 0.5) * 256 / 56), 32 + 3 + int((row + 0.5) * (first - 6) / 40))
        assert sheet.getpixel(at) == label.getpixel((column, row))


def data_label(data, index):
    return torch.from_numpy(data.read("val", index)[1])


def colours_in(picture):
    return {colour for _, colour in picture.getcolors(100_000)}


def test_chart_draws_every_curve_in_a_colour_of_its_own():
    curves = {"teacher": [(0, 10), (400, 60)], "alone": [(100, 30), (400, 45)], "one point": [(200, 20)]}
    picture = chart(curves, "step", "val mIoU")
    colours = [tuple(bytes.fromhex(c[1:])) for c in module.COLOURS[:4]]
    assert picture.size == (800, 480) and picture.getpixel((2, 2)) == (255, 255, 255)
    assert [c in colours_in(picture) for c in colours] == [True, True, True, False]
    # axes 0..400 and 0..60 between the pixels 60..770 and 420..70
    assert picture.getpixel((60, 362)) == picture.getpixel((768, 72)) == colours[0]
    assert picture.getpixel((60 + 355, 420 - 117)) == colours[2]


@pytest.mark.parametrize("low, high, expected", [(0, 400, [0, 100, 200, 300, 400]), (12.5, 61, [0, 20, 40, 60, 80]),
                                                 (-0.3, 0.4, [-0.4, -0.2, 0, 0.2, 0.4]), (5, 5, [5, 5.5, 6])])
def test_ticks_are_round_and_enclose_the_values(low, high, expected):
    assert module._ticks(low, high) == pytest.approx(expected)


def test_gain_chart_has_a_line_for_each_method_and_group():
    row = {"group": "runs", "split": "val", "steps": 400, "gain": 2.0, "low": 1.0, "high": 3.0}
    rows = [row | {"method": "c2vkd"}, row | {"method": "kd", "gain": -1, "low": None, "high": None},
            row | {"method": "ce", "gain": None}]
    one, two = gain_chart(rows), gain_chart(rows + [r | {"group": "more"} for r in rows])
    assert one.size == (800, 60 + 40 + 2 * 30) and two.size == (800, 60 + 2 * (40 + 2 * 30))
    assert gain_chart(rows[2:]).width == 800  # no gain to show
    # the scale goes from -1 to 3 between the pixels 170 and 700; the lines lie at 60 and 90
    zero, two, three = (170 + 530 * (v + 1) // 4 for v in (0, 2, 3))
    ours, theirs = (tuple(bytes.fromhex(module.COLOURS[i][1:])) for i in (1, 0))
    assert one.getpixel((two - 4, 54)) == ours and one.getpixel((two + 4, 54)) == (255, 255, 255)  # the bar
    assert [one.getpixel((x, 60)) for x in (two, three - 2, three + 4)] == [(0, 0, 0)] * 2 + [(255, 255, 255)]
    assert [one.getpixel((x, 90)) for x in (172, zero - 4, zero + 4)] == [theirs] * 2 + [(255, 255, 255)]


# ---------------------------------------------------------------- tables

def test_columns_align_the_first_to_the_left_and_the_others_to_the_right():
    assert columns([["name", "a", "long"], ["x", "1.00", "2"]]) == "name     a  long\nx     1.00     2"


def test_table_of_networks():
    good, bad = ({"miou": m, "iou": [m, None], "pixel_accuracy": 90.0} for m in (50.0, 7.0))
    text = table([("teacher", 1234567, 12.34, good), ("student", 89, None, bad)], ["sky", "tall grass"]).splitlines()
    assert text[0].split() == ["parameters", "ms", "an", "image", "mIoU", "pixel", "acc."]
    assert text[1].split() == ["teacher", "1,234,567", "12.3", "50.00", "90.00"]
    assert text[2].split() == ["student", "89", "-", "7.00", "90.00"]
    assert [row.split() for row in text[5:]] == [["sky", "50.00", "7.00"], ["tall", "grass", "-", "-"]]


# ---------------------------------------------------------------- checkpoints

def test_network_of_a_checkpoint_comes_back_in_eval_mode(checkpoint):
    model, state = load_network(checkpoint)
    assert isinstance(model, Student) and not model.training and state["step"] == 7
    assert all(torch.equal(v, state["module"][f"student.{k}"]) for k, v in model.state_dict().items())


def test_teachers_are_loaded_alike(checkpoint):
    weights = Teacher("deeplabv3_resnet10", 3).state_dict()
    torch.save(torch.load(checkpoint) | {"name": "deeplabv3_resnet10", "module": weights}, checkpoint)
    assert isinstance(load_network(checkpoint)[0], Teacher)


@pytest.mark.parametrize("change, named", [
    ({"name": "vit_huge"}, "vit_huge"), ({"name": "mit_b0"}, "not mit_b0"),
    ({"classes": CLASSES[:2]}, "not mit_nano"), ({"module": {}}, "not mit_nano"),
    ({"module": None}, "no module"), ({"palette": None}, "no palette")])
def test_checkpoint_that_does_not_fit_is_refused(checkpoint, change, named):
    state = torch.load(checkpoint) | change
    torch.save({k: v for k, v in state.items() if v is not None}, checkpoint)
    with pytest.raises(InputError, match=named):
        load_network(checkpoint)


def test_only_the_heads_may_be_left_aside(checkpoint):
    state = torch.load(checkpoint)
    state["module"]["other.weight"] = torch.zeros(1)
    torch.save(state, checkpoint)
    with pytest.raises(InputError, match="not mit_nano: .*other.weight"):
        load_network(checkpoint)


def test_file_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "last.pt").write_text("text")
    with pytest.raises(InputError, match="last.pt: not a readable checkpoint"):
        load_network(tmp_path / "last.pt")
    with pytest.raises(InputError, match="absent.pt: no such file"):
        load_network(tmp_path / "absent.pt")


def test_exported_network_is_the_same_function_for_other_batches_and_sizes(checkpoint, tmp_path, monkeypatch, capsys):
    run(monkeypatch, "--checkpoint", checkpoint, "--export", tmp_path / "student.pt2")
    printed = float(re.search(r"largest difference to the original (\S+)", capsys.readouterr().out)[1])
    model, _ = load_network(checkpoint)
    extra = {"classes.json": ""}
    exported = torch.export.load(tmp_path / "student.pt2", extra_files=extra).module()
    assert json.loads(extra["classes.json"]) == CLASSES
    for shape in ((1, 3, 64, 128), (3, 3, 96, 64)):
        x = torch.randn(shape)
        with torch.no_grad():
            expected = F.interpolate(model(x)[0], shape[2:], mode="bilinear", align_corners=False)
            assert (exported(x) - expected).abs().max() < 1e-4 and printed < 1e-4


def test_milliseconds_time_passes_of_one_image():
    shapes = []
    assert milliseconds(lambda x: shapes.append(x.shape), 32, 48, "cpu") > 0
    assert shapes == 20 * [(1, 3, 32, 48)]


# ---------------------------------------------------------------- the command line

def test_evaluation_prints_a_table_and_writes_the_result_beside_the_checkpoint(checkpoint, data, monkeypatch, capsys):
    run(monkeypatch, "--checkpoint", checkpoint)
    out = capsys.readouterr().out
    assert all(name in out for name in ("mit_nano", "mIoU", *CLASSES))
    result = json.loads((checkpoint.parent / "results-val.json").read_text())
    assert {k: result[k] for k in ("label", "method", "seed", "step", "conditions", "classes")} == {
        "label": "mine", "method": "ce", "seed": 1, "step": 7, "conditions": {"steps": 7}, "classes": CLASSES}
    model, _ = load_network(checkpoint)
    assert result["iou"] == scores(evaluate(model, data, "val", 48, 32, "cpu"))["iou"]
    assert f"{result['miou']:.2f}" in out


@pytest.mark.parametrize("options", [["--whole"], ["--window", "40"], ["--stride", "16"], ["--flip"]])
def test_results_of_other_protocols_are_printed_but_not_kept(checkpoint, options, monkeypatch, capsys):
    run(monkeypatch, "--checkpoint", checkpoint, *options)
    out = capsys.readouterr().out
    assert "mIoU" in out and "not kept for --compare" in out and not (checkpoint.parent / "results-val.json").exists()


def test_the_default_folder_may_be_spelled_out(checkpoint, root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "folder").symlink_to(root)
    torch.save(torch.load(checkpoint) | {"data": None}, checkpoint)
    run(monkeypatch, "--checkpoint", checkpoint, "--data", "data/folder")
    assert (checkpoint.parent / "results-val.json").exists()


def test_pictures_of_a_split(checkpoint, tmp_path, monkeypatch):
    run(monkeypatch, "--checkpoint", checkpoint, "--split", "train", "--pictures", tmp_path / "out")
    assert Image.open(tmp_path / "out" / "train.png").width == 3 * (256 + 6)
    assert (checkpoint.parent / "results-train.json").exists()


@pytest.mark.parametrize("options", [[], ["--whole"], ["--flip", "--stride", "30"]])
def test_images_and_folders_are_coloured_at_their_size(checkpoint, root, tmp_path, options, monkeypatch):
    Image.new("L", (70, 30)).save(tmp_path / "grey.jpg")
    (tmp_path / "more").mkdir()
    Image.new("RGBA", (31, 45)).save(tmp_path / "more" / "b.PNG")
    Image.new("RGB", (130, 40)).save(tmp_path / "more" / "c.jpeg")
    (tmp_path / "more" / "notes.txt").write_text("no picture")
    run(monkeypatch, "--checkpoint", checkpoint, "--image", tmp_path / "grey.jpg", tmp_path / "more",
        "--pictures", tmp_path / "out", *options)
    sizes = {p.name: Image.open(p).size for p in (tmp_path / "out").iterdir()}
    assert {name: width for name, (width, _) in sizes.items()} == {"grey.png": 70, "b.png": 31, "c.png": 130}
    heights = {"grey.png": 30, "b.png": 45, "c.png": 40}
    assert all((sizes[name][1] - height) in (24, 48, 72) for name, height in heights.items())


def test_images_are_never_overwritten_by_their_pictures(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "own").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "own" / "a.png")
    with pytest.raises(InputError, match="would be overwritten"):
        run(monkeypatch, "--checkpoint", checkpoint, "--image", tmp_path / "own", "--pictures", tmp_path / "own")


@pytest.mark.parametrize("options, named", [
    (["--window", "16"], "--window"), (["--stride", "0"], "--stride"), (["--batch-size", "0"], "--batch-size"),
    (["--workers", "-1"], "--workers"), (["--split", "test"], "no test split"),
    (["--image", "absent.png"], "absent.png"), (["--image", "{empty}"], "no .jpg or .png"),
    (["--image", "{text}"], "truncated or not an image"),
    (["--data", "absent"], "absent"), (["--checkpoint", "absent.pt"], "absent.pt"),
    (["--compare", "{empty}"], "no results-val.json")])
def test_bad_options_are_one_sentence_that_names_them(checkpoint, tmp_path, options, named, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no picture")
    options = [o.format(empty=tmp_path / "empty", text=tmp_path / "text.png") for o in options]
    with pytest.raises(InputError, match=re.escape(named)):
        run(monkeypatch, "--checkpoint", checkpoint, *options)


def test_device_that_is_not_there_is_refused(checkpoint, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="--device cuda: no such device"):
        run(monkeypatch, "--checkpoint", checkpoint, "--device", "cuda")


def test_a_network_in_training_mode_is_not_evaluated(root):
    data = open_dataset("folder", root)
    with pytest.raises(AssertionError, match="eval"):
        evaluate(Student("mit_nano", 3).train(), data, "val", 48, 32, torch.device("cpu"))


def test_data_of_other_classes_is_refused(checkpoint, monkeypatch):
    torch.save(torch.load(checkpoint) | {"classes": ["sky", "grass", "dog"]}, checkpoint)
    with pytest.raises(InputError, match="trained on 3 classes that are not those of the data"):
        run(monkeypatch, "--checkpoint", checkpoint)


def test_something_to_do_is_required(monkeypatch):
    with pytest.raises(InputError, match="--checkpoint FILE or --compare DIR"):
        run(monkeypatch)


# ---------------------------------------------------------------- comparison

def write_runs(folder, runs, **changes):
    """results-val.json of runs: method (or label:method) -> mIoU of seeds 0, 1, ... (None: no such run)."""
    for name, values in runs.items():
        label, _, method = name.rpartition(":")
        for seed, miou in enumerate(values):
            result = {"miou": miou, "iou": [miou, None], "pixel_accuracy": 90.0, "label": label or None,
                      "method": method, "seed": seed, "step": 400, "classes": ["sky", "cat"],
                      "conditions": {"crop": 64, "steps": 400}}
            path = folder / f"{label or method}-seed{seed}" / "results-val.json"
            if miou is not None:
                path.parent.mkdir()
                path.write_text(json.dumps(result | changes))
    return folder


def line(text, start):
    return next(row for row in text.splitlines() if row.startswith(start)).split()


def test_comparison_pairs_by_seed_and_says_where_a_ratio_is_undefined(tmp_path):
    write_runs(tmp_path, {"ce": [50, 52, 51], "kd": [51, 53, 53], "c2vkd": [53, 56, 54]})
    text, _ = compare(tmp_path, "val")
    assert line(text, "ce") == ["ce", "3", "51.00", "1.00", "-", "-"]
    # gains 1 1 2: mean 4/3, deviation 0.57735, half width 4.303 * 0.57735 / sqrt(3) = 1.434
    assert line(text, "kd") == ["kd", "3", "52.33", "1.15", "+1.33", "[-0.10,", "+2.77]"]
    assert line(text, "c2vkd") == ["c2vkd", "3", "54.33", "1.53", "+3.33", "[+1.90,", "+4.77]"]  # gains 3 4 3
    # 3 - 2, 4 - 2, 3 - 4: mean 2/3, deviation 1.52753, half width 3.795
    assert "gain(c2vkd) - 2 gain(kd) = +0.67   [-3.13, +4.46]" in text
    assert "gain(c2vkd) / gain(kd): undefined: the interval of the gain of kd is not above 0" in text
    assert line(text, "sky") == ["sky", "54.33", "51.00", "52.33"] and line(text, "cat") == ["cat", "-", "-", "-"]


def test_ratio_is_to_the_best_baseline_on_the_same_seeds(tmp_path):
    write_runs(tmp_path, {"ce": [50, 52, 51, 40], "at": [50.5, 52.5, 51.5, 90], "kd": [51, 53.1, 52.2],
                          "c2vkd": [53, 56, 54]})
    text, _ = compare(tmp_path, "val")
    assert "gain(c2vkd) - 2 gain(kd) = +1.13" in text  # 1, 1.8, 0.6; seed 3 of at has no partner
    assert "gain(c2vkd) / gain(kd): 303%" in text  # 10/3 over 1.1


def test_named_runs_have_a_row_of_their_own_and_are_no_baseline(tmp_path):
    write_runs(tmp_path, {"ce": [50, 52], "kd": [51, 53], "c2vkd": [53, 55], "reverse:c2vkd": [58, 59]})
    text, _ = compare(tmp_path, "val")
    assert line(text, "reverse") == ["reverse", "2", "58.50", "0.71", "+7.50", "[+1.15,", "+13.85]"]
    assert "gain(c2vkd) - 2 gain(kd) = +1.00" in text and "None" not in text


def test_the_best_baseline_is_chosen_on_val_and_a_losing_one_is_named(tmp_path):
    write_runs(tmp_path, {"ce": [50, 52], "at": [52, 54], "kd": [49, 51], "c2vkd": [49, 52]})
    for path in tmp_path.rglob("results-val.json"):  # on test the two baselines trade places
        text = path.read_text()
        other = {"at": '"miou": 45', "kd": '"miou": 49.5'}.get(path.parent.name[:2])
        path.with_name("results-test.json").write_text(re.sub(r'"miou": \d+', other, text) if other else text)
    assert "gain(c2vkd) - 2 gain(at) = -4.50" in compare(tmp_path, "val")[0]  # -1 - 4, 0 - 4
    on_test, _ = compare(tmp_path, "test")
    assert "gain(c2vkd) - 2 gain(at) = +11.50" in on_test  # -1 + 10, 0 + 14
    assert "but at loses: this is no gain" in on_test and "loses" not in compare(tmp_path, "val")[0]
    val = tmp_path / "kd-seed0" / "results-val.json"
    val.write_text(val.read_text().replace('"step": 400', '"step": 200'))
    with pytest.raises(InputError, match="kd-seed0/results-val.json: missing or of another step than results-test"):
        compare(tmp_path, "test")


def test_a_losing_baseline_goes_unnamed_where_the_difference_is_negative_too(tmp_path):
    write_runs(tmp_path, {"ce": [50, 52], "kd": [49, 51], "c2vkd": [40, 42]})
    text, _ = compare(tmp_path, "val")
    assert "gain(c2vkd) - 2 gain(kd) = -8.00" in text and "loses" not in text


def test_one_seed_and_seeds_without_partner(tmp_path):
    write_runs(tmp_path, {"ce": [50, 52], "kd": [None, 53], "c2vkd": [53]})
    text, _ = compare(tmp_path, "val")
    assert line(text, "c2vkd") == ["c2vkd", "1", "53.00", "-", "+3.00", "(one", "seed)"]
    assert "gain(c2vkd)" not in text  # kd and c2vkd share no seed
    (tmp_path / "kd-seed1" / "results-val.json").unlink()
    assert line(compare(tmp_path, "val")[0], "c2vkd")[4] == "+3.00"


def test_teachers_are_not_rows(tmp_path):
    write_runs(tmp_path, {"ce": [50]})
    write_runs(tmp_path, {"teacher": [80]}, method=None)
    assert "80.00" not in compare(tmp_path, "val")[0]


@pytest.mark.parametrize("changes, named", [
    ({"conditions": {"crop": 96, "steps": 400}}, "in crop;"), ({"step": 300}, "in step;"),
    ({"conditions": {"crop": 96}}, "in crop;"), ({"conditions": {"crop": 96}, "step": 300}, "in crop, step;")])
def test_runs_of_other_conditions_are_refused(tmp_path, changes, named):
    write_runs(tmp_path, {"ce": [50]})
    write_runs(tmp_path, {"kd": [51]}, **changes)
    with pytest.raises(InputError, match=f"kd-seed0.* differs from .*ce-seed0.* {named}"):
        compare(tmp_path, "val")


def test_conditions_that_one_run_lacks_are_compared_among_the_others(tmp_path):
    write_runs(tmp_path, {"ce": [50]})
    write_runs(tmp_path, {"kd": [51]}, conditions={"crop": 64, "steps": 400, "teacher": "good"})
    assert line(compare(tmp_path, "val")[0], "kd")[4] == "+1.00"
    write_runs(tmp_path, {"pdd": [51]}, conditions={"crop": 64, "steps": 400, "teacher": "bad"})
    with pytest.raises(InputError, match="pdd-seed0.* differs from .*kd-seed0.* in teacher;"):
        compare(tmp_path, "val")


def test_second_run_of_a_method_and_seed_is_refused(tmp_path):
    write_runs(tmp_path, {"ce": [50]})
    (tmp_path / "copy").mkdir()
    write_runs(tmp_path / "copy", {"ce": [51]})
    with pytest.raises(InputError, match="a second run of ce, seed 0; keep one"):
        compare(tmp_path, "val")


def test_seeds_of_other_options_are_not_averaged(tmp_path):
    write_runs(tmp_path, {"ce": [50, 52], "c2vkd": [53]}, options={"kl": "forward"})
    (tmp_path / "more").mkdir()
    write_runs(tmp_path / "more", {"c2vkd": [None, 20]}, options={"kl": "reverse"})
    with pytest.raises(InputError, match="c2vkd-seed1.* differs from .*c2vkd-seed0.* in kl of c2vkd; .*another --name"):
        compare(tmp_path, "val")


@pytest.mark.parametrize("text", ["", "[1]", "{}", "{\"method\":"])
def test_results_that_cannot_be_read_are_named(tmp_path, text):
    write_runs(tmp_path, {"ce": [50]})
    (tmp_path / "ce-seed0" / "results-val.json").write_text(text)
    with pytest.raises(InputError, match="ce-seed0/results-val.json: missing or not readable; run evaluate.py"):
        compare(tmp_path, "val")


def test_fitnet_has_a_claim_of_its_own_and_hints_are_no_baselines(tmp_path):
    write_runs(tmp_path, {"ce": [50, 52], "kd": [51, 53], "c2vkd": [54, 57], "fitnet": [53, 55], "pdd_fitnet": [59, 59],
                          "vlfd": [60, 60], "longer:ce": [70, 70]})
    text, _ = compare(tmp_path, "val")
    assert "gain(c2vkd) - 2 gain(kd) = +2.50" in text  # 4 - 2, 5 - 2
    assert "gain(c2vkd) - gain(fitnet) = +1.50   [-4.85, +7.85]" in text  # 1 and 2
    for path in tmp_path.glob("kd-*/*.json"):
        path.unlink()
    text, _ = compare(tmp_path, "val")
    assert "2 gain" not in text and "gain(c2vkd) - gain(fitnet) = +1.50" in text


def test_rows_hold_what_the_table_shows(tmp_path):
    write_runs(tmp_path, {"ce": [50, 52], "kd": [51]})
    ce, kd = compare(tmp_path, "val")[1]
    assert ce == {"group": str(tmp_path), "split": "val", "steps": 400, "method": "ce", "seeds": 2, "mean": 51,
                  "std": pytest.approx(2 ** 0.5), "gain": None, "low": None, "high": None}
    assert kd["mean"] == 51 and kd["gain"] == 1 and kd["std"] is kd["low"] is None


@pytest.mark.parametrize("pictures", [None, "out"])
def test_compare_from_the_command_line(tmp_path, monkeypatch, capsys, pictures):
    for name in ("short", "long"):
        (tmp_path / name).mkdir()
        write_runs(tmp_path / name, {"ce": [50, 52], "kd": [51, 52]}, step=len(name))
    where = ["--pictures", tmp_path / pictures] if pictures else []
    run(monkeypatch, "--compare", tmp_path / "short", tmp_path / "long", *where)
    printed, out = capsys.readouterr().out, tmp_path / (pictures or "short")
    assert printed.startswith(f"{tmp_path}/short: val, 5 steps\n") and f"{tmp_path}/long: val, 4 steps\n" in printed
    with (out / "compare.csv").open(newline="") as f:
        rows = list(csv.DictReader(f))
    assert [(Path(r["group"]).name, r["method"], r["steps"]) for r in rows] == [
        ("short", "ce", "5"), ("short", "kd", "5"), ("long", "ce", "4"), ("long", "kd", "4")]
    assert [rows[0][k] for k in ("mean", "std", "gain", "low", "high")] == ["51", "1.414", "", "", ""]
    assert [rows[3][k] for k in ("mean", "std", "gain", "low", "high")] == ["51.5", "0.707", "0.5", "-5.853", "6.853"]
    assert Image.open(out / "compare.png").width == 800
