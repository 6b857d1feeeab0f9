"""Scores, sliding windows, pictures, checkpoints, export and the comparison of runs."""
import csv
import importlib.util
import json
import shutil
import os
import random
import re
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import evaluate as module
from data import IGNORE, EvalImages, InputError, normalise, open_dataset
from evaluate import (chart, class_map, colours_of, compare, comparison, confusion_matrix,
                      evaluate, load_network, miou_of_commonest_class, overlay, paint, predict,
                      report, report_terms, scores, table)
from losses import Outputs
from student import Student
from teacher import Teacher

CLASSES = ["sky", "tall grass", "cat"]
PALETTE = [[0, 0, 250], [0, 250, 0], [250, 0, 0]]
SIZES = [(40, 56), (64, 33), (90, 120)]  # height, width


def logits_only(logits):
    return Outputs(logits, None, None)


class Pointwise(nn.Module):
    """A network whose output at a position depends on that position alone."""

    def __init__(self, classes=3):
        super().__init__()
        self.conv = nn.Conv2d(3, classes, 1)
        self.eval()

    def forward(self, x):
        return logits_only(self.conv(x))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A data set in the layout of `folder`, with pictures of different sizes."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    lines = [f"{name} {r} {g} {b}\n" for name, (r, g, b) in zip(CLASSES, PALETTE)]
    (root / "classes.txt").write_text("".join(lines))
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for i, (h, w) in enumerate(SIZES):
            image = Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8))
            image.save(root / "images" / split / f"{i}.png")
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
    heads = nn.ModuleDict({"A_v": nn.Conv2d(256, 8, 1)})
    trained = nn.ModuleDict({"student": Student("mit_nano", 3), "heads": heads})
    torch.save({"module": trained.state_dict(), "name": "mit_nano", "dataset": "folder",
                "data": str(root), "classes": CLASSES, "palette": PALETTE, "base": 48,
                "window": 32, "step": 7, "label": "mine", "method": "ce", "seed": 1,
                "conditions": {"steps": 7}}, path)
    return path


@pytest.fixture
def run(monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        module.main()
    return run


# ---------------------------------------------------------------- scores

def test_confusion_matrix_is_a_count_over_the_labelled_pixels():
    torch.manual_seed(0)
    for classes in (2, 19):
        prediction = torch.randint(classes, (17, 23))
        label = torch.randint(classes, (17, 23), dtype=torch.uint8)
        label[torch.rand(17, 23) < 0.2] = IGNORE
        count = [[0] * classes for _ in range(classes)]
        for p, y in zip(prediction.flatten().tolist(), label.flatten().tolist()):
            if y != IGNORE:
                count[y][p] += 1
        assert confusion_matrix(prediction, label, classes).tolist() == count


def test_scores_of_a_small_case_by_hand():
    # rows: labels. Class 2 is never found, class 3 only imagined, class 4 nowhere.
    matrix = torch.tensor([[3, 1, 0, 0, 0], [0, 2, 0, 1, 0], [0, 1, 0, 0, 0], [0] * 5, [0] * 5])
    found = scores(matrix)
    assert found["iou"] == pytest.approx([75, 40, 0, 0, None])
    assert found["miou"] == pytest.approx((75 + 40 + 0 + 0) / 4)
    assert found["pixel_accuracy"] == pytest.approx(100 * 5 / 8)
    nothing = scores(torch.zeros(2, 2, dtype=torch.int64))
    assert nothing == {"miou": 0, "iou": [None, None], "pixel_accuracy": 0}


def test_the_commonest_class_scores_as_one_answer_for_everything():
    # everything called class 0: of its 8 answers 6 are right, and class 1 is never found
    assert miou_of_commonest_class(torch.tensor([[6, 0], [1, 1]])) == pytest.approx((75 + 0) / 2)
    assert miou_of_commonest_class(torch.zeros(2, 2, dtype=torch.int64)) == 0


# ---------------------------------------------------------------- windows

@pytest.fixture
def logits(monkeypatch):
    """Instead of a class map, `predict` returns the logits (K,H,W) that it would take it from."""
    monkeypatch.setattr(module, "class_map",
                        lambda z, size: F.interpolate(z[None], size, mode="bilinear")[0])


def test_windows_of_a_pointwise_network_give_the_whole_image(logits):
    rng, model = random.Random(0), Pointwise()
    for _ in range(10):
        h, w, window = rng.randint(5, 90), rng.randint(5, 90), rng.randint(32, 64)
        image = torch.randint(256, (3, h, w), dtype=torch.uint8)
        size = rng.randint(5, 100), rng.randint(5, 100)
        whole = F.interpolate(model(normalise(image[None])).logits, size, mode="bilinear")[0]
        torch.testing.assert_close(predict(model, image, size), whole, atol=1e-5, rtol=1e-5)
        for stride in (None, rng.randint(1 + window // 4, window), 2 * window):
            found = predict(model, image, size, window, stride, batch=rng.randint(1, 9))
            torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)


class Count(nn.Module):
    """Logits 0, 1, 2, ... for the windows in their order."""
    seen = -1

    def forward(self, x):
        self.seen += 1
        return logits_only(torch.full((1, 1, *x.shape[2:]), float(self.seen)))


def test_overlapping_windows_are_averaged(logits):
    image = torch.zeros(3, 32, 48, dtype=torch.uint8)
    found = predict(Count(), image, (32, 48), window=32, stride=20, batch=1)
    # the second window lies flush with the end, at 16
    assert found[0, 0].tolist() == [0] * 16 + [0.5] * 16 + [1] * 16


def test_windows_overlap_by_a_third_unless_a_stride_is_given():
    image = torch.zeros(3, 36, 36 + 2 * 24, dtype=torch.uint8)
    for stride, windows in ((None, 3), (36, 3), (12, 5)):
        model = Count()
        predict(model, image, (4, 4), window=36, stride=stride, batch=1)
        assert model.seen + 1 == windows


@pytest.mark.parametrize("size", [(30, 141), (113, 43), (800, 700)])
def test_class_map_is_argmax_and_ties_go_to_the_lower_class(size):
    torch.manual_seed(0)
    many = torch.randn(18, 12, 16)
    few = torch.randint(3, (18, 12, 16)).float()  # ties nearly everywhere
    few[:, :3] = 0
    for logits in (many, few, few[:1]):
        found = class_map(logits, size)
        planes = [F.interpolate(z[None, None], size, mode="bilinear")[0] for z in logits]
        assert found.dtype == torch.int64 and torch.equal(found, torch.cat(planes).argmax(0))


class Largest(TorchDispatchMode):
    """Remembers how many elements the largest new tensor had."""
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("window", [512, None])
def test_a_large_picture_of_many_classes_needs_little_memory(window):
    def model(x):  # on the device "meta" shapes are all there is, so this costs nothing
        return logits_only(x.new_zeros(len(x), 40, x.shape[2] // 4, x.shape[3] // 4))
    with Largest() as largest:
        image = torch.zeros(3, 512, 683, dtype=torch.uint8, device="meta")
        found = predict(model, image, (3000, 4000), window)
    assert found.shape == (3000, 4000) and found.dtype == torch.int64
    seen = 40 * 512 * 683  # logits of the small picture that the network sees
    assert largest.elements <= seen < 3000 * 4000 * 40 / 17


def test_small_images_are_padded_with_the_mean_colour():
    seen = []
    image = torch.full((3, 8, 10), 255, dtype=torch.uint8)
    predict(lambda x: seen.append(x) or logits_only(x), image, (8, 10), window=32)
    assert seen[0].shape == (1, 3, 32, 32) and (seen[0][:, :, :8, :10] > 1).all()
    assert (seen[0][:, :, 8:] == 0).all() and (seen[0][:, :, :, 10:] == 0).all()


def test_evaluate_counts_every_labelled_pixel_once(data, monkeypatch):
    """Whatever the batch, the loader processes and the training processes."""
    torch.manual_seed(0)
    model, state = Pointwise(), torch.get_rng_state()
    judge = lambda **options: evaluate(model, data, "val", 64, 32, "cpu", **options)
    expected = sum(confusion_matrix(predict(model, image, label.shape, 32, 21), label, 3)
                   for image, label in (EvalImages(data, "val", 64)[i] for i in range(3)))
    for options in (dict(batch=1), dict(batch=5), dict(workers=1)):
        assert torch.equal(judge(**options), expected)
    assert torch.equal(torch.get_rng_state(), state)  # training goes on with the same numbers
    labelled = [(data.read("val", i)[1] != IGNORE).sum() for i in range(3)]
    assert expected.sum() == sum(labelled)

    for name, value in dict(is_initialized=True, get_world_size=2, all_reduce=None).items():
        monkeypatch.setattr(module.dist, name, lambda *_, value=value: value)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(module.dist, "get_rank", lambda rank=rank: rank)
        parts.append(judge())
    assert torch.equal(sum(parts), expected)


def test_a_network_in_training_mode_is_not_evaluated(data):
    with pytest.raises(AssertionError, match="eval"):
        evaluate(Pointwise().train(), data, "val", 48, 32, "cpu")


def test_each_gpu_has_its_share_of_the_cores_and_a_cpu_no_loader(monkeypatch):
    for cores, gpus, expected in ((2, 1, 2), (64, 1, 16), (64, 8, 8), (1, 2, 0), (64, 0, 0)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)
        assert module.default_workers(gpus) == expected


# ---------------------------------------------------------------- pictures

def test_overlay_keeps_the_size_and_puts_a_legend_below():
    prediction = torch.zeros(50, 250, dtype=torch.int64)
    prediction[:, 125:] = 2
    picture = overlay(Image.new("RGB", (250, 50), "black"), prediction, CLASSES, PALETTE)
    assert picture.size == (250, 50 + 24)  # both names fit in one line
    blue, red, box = (picture.getpixel(at) for at in ((10, 10), (240, 10), (6, 50 + 12)))
    assert blue == (0, 0, 175) and red == (175, 0, 0) and box == tuple(PALETTE[0])
    prediction[:, 100] = 1
    picture = overlay(Image.new("RGB", (250, 50)), prediction, CLASSES, PALETTE)
    assert picture.size == (250, 50 + 2 * 24)
    assert paint(torch.tensor([[IGNORE]]), PALETTE).getpixel((0, 0)) == (255, 255, 255)


def test_comparison_has_a_row_an_image_and_a_column_a_network(data):
    models = {"teacher": Pointwise().train(), "nobody": None, "student": Pointwise()}
    sheet = comparison(data, "val", 32, 32, models, "cpu", images=2)
    # SIZES, the short side at 32
    first, second = (round(256 * h / w) + 6 for h, w in ((32, 45), (62, 32)))
    assert sheet.width == 4 * (256 + 6)
    assert sheet.height == 32 + first + second + 2 * (sheet.width // 60)
    assert models["teacher"].training
    label = paint(torch.from_numpy(data.read("val", 0)[1]), data.palette)
    for row, column in ((3, 5), (20, 30), (39, 55)):
        x = 262 + 3 + int((column + 0.5) * 256 / 56)
        y = 32 + 3 + int((row + 0.5) * (first - 6) / 40)
        assert sheet.getpixel((x, y)) == label.getpixel((column, row))


def test_a_method_has_one_colour_in_all_figures_and_no_two_curves_share_one():
    assert colours_of(["student alone", "student c2vkd"]) == colours_of(["ce", "c2vkd"])
    assert colours_of(["x", "c2vkd"])[1] == colours_of(["c2vkd"])[0]
    many = colours_of(["teacher", "ce", "c2vkd", "fitnet", "dist", "kd", "dkd", "mine", "yours"])
    assert len(set(many)) == len(many)


def test_chart_draws_every_curve_in_its_colour():
    curves = {"teacher": [(0, 10), (400, 60)], "mine": [(100, 30), (400, 45)], "ce": [(200, 20)]}
    picture = chart(curves, "step", "val mIoU")
    assert picture.size == (800, 480) and picture.getpixel((2, 2)) == (255, 255, 255)
    # axes 0..400 and 0..60 between the pixels 60..770 and 420..70
    teacher, mine, alone = (module.ImageDraw.ImageColor.getrgb(c) for c in colours_of(curves))
    assert picture.getpixel((60, 362)) == picture.getpixel((768, 72)) == teacher
    assert picture.getpixel((60 + 355, 420 - 117)) == alone
    assert mine in {colour for _, colour in picture.getcolors(100_000)}


@pytest.mark.parametrize("low, high, expected", [
    (0, 400, [0, 100, 200, 300, 400]), (-0.3, 0.4, [-0.4, -0.2, 0, 0.2, 0.4]),
    (5, 5, [5, 5.5, 6])])
def test_ticks_are_round_and_enclose_the_values(low, high, expected):
    assert module._ticks(low, high) == pytest.approx(expected)


# ---------------------------------------------------------------- tables

def test_table_of_networks_says_where_the_mean_leaves_classes_out():
    whole = {"miou": 50.0, "iou": [60.0, 40.0], "pixel_accuracy": 90.0}
    part = {"miou": 7.0, "iou": [7.0, None], "pixel_accuracy": 90.0}
    rows = [("teacher", 1234567, 12.34, whole), ("student", 89, None, part)]
    lines = table(rows, ["sky", "tall grass"]).splitlines()
    assert lines[1] == "teacher   1,234,567          12.3  50.00       90.00"
    assert lines[2] == "student          89             -   7.00       90.00"
    assert lines[4].startswith("student: mean over 1 of 2 classes: the")
    assert [line.split() for line in lines[-2:]] == [["sky", "60.00", "7.00"],
                                                     ["tall", "grass", "40.00", "-"]]
    assert "mean over" not in table(rows[:1], ["sky", "tall grass"])


def test_report_keeps_its_pictures_where_printing_fails(data, tmp_path, monkeypatch):
    def broken(*_):
        raise BrokenPipeError
    monkeypatch.setattr("builtins.print", broken)
    (tmp_path / "log.csv").write_text("step,val_miou\n1,\n2,30\n")
    result = {"miou": 50.0, "iou": [50.0] * 3, "pixel_accuracy": 90.0}
    entries = {"student alone": (Pointwise(), result, tmp_path / "log.csv")}
    with pytest.raises(BrokenPipeError):
        report(tmp_path / "run", entries, data, 32, 32, "cpu")
    for name in ("comparison.png", "curves.png"):
        assert Image.open(tmp_path / "run" / name).width > 0


def write_log(folder, cosine):
    """log.csv with terms measured at steps 40 and 400. cosine: of gb."""
    raw = {"raw_pdd": 2, "weighted_pdd": 2, "raw_gb": 0.5, "weighted_gb": 5}
    measured = {"grad_pdd": 3, "grad_gb": 0.1, "cos_pdd": 0.9, "cos_gb": cosine}
    with open(folder / "log.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, ["step", *raw, *measured])
        writer.writeheader()
        writer.writerows([{"step": 40} | raw | measured, {"step": 60} | raw,
                          {"step": 400} | raw | measured])


def test_terms_are_printed_with_share_and_cosine_at_each_measured_step(tmp_path, capsys):
    write_log(tmp_path, 0.25)
    report_terms(tmp_path, {"pdd": 1.0, "gb": 10.0})
    text = capsys.readouterr().out
    assert "terms at step 40 " in text and "terms at step 400 " in text and "step 60" not in text
    assert line(text, "  pdd") == ["pdd", "2", "1", "2", "3", "75%", "0.90"]
    assert line(text, "  gb") == ["gb", "0.5", "10", "5", "1", "25%", "0.25"]
    assert "WARNING" not in text
    (tmp_path / "log.csv").write_text("step,raw_ce\n1,2\n")  # nothing was measured
    report_terms(tmp_path, {"ce": 1.0})
    assert capsys.readouterr().out == ""


def test_a_term_that_pulls_against_cross_entropy_is_named_unless_it_is_small(tmp_path, capsys):
    write_log(tmp_path, -0.25)
    for weight, warned in ((10.0, True), (0.1, False)):
        report_terms(tmp_path, {"pdd": 1.0, "gb": weight})
        assert ("WARNING: gb pulls against" in capsys.readouterr().out) == warned


# ---------------------------------------------------------------- checkpoints

def test_network_of_a_checkpoint_comes_back_in_eval_mode(checkpoint):
    model, state = load_network(checkpoint)
    assert isinstance(model, Student) and not model.training and state["step"] == 7
    for name, value in model.state_dict().items():
        assert torch.equal(value, state["module"][f"student.{name}"])
    weights = Teacher("deeplabv3_resnet10", 3).state_dict()
    torch.save(state | {"name": "deeplabv3_resnet10", "module": weights}, checkpoint)
    assert isinstance(load_network(checkpoint)[0], Teacher)


@pytest.mark.parametrize("change, named", [
    ({"name": "vit_huge"}, "vit_huge"), ({"name": "mit_b0"}, "not mit_b0"),
    ({"classes": CLASSES[:2]}, "not mit_nano"), ({"module": {}}, "not mit_nano"),
    ({"module": {"student.more": torch.zeros(1)}}, "not mit_nano"),
    ({"module": None}, "no module"), ({"palette": None}, "no palette")])
def test_checkpoint_that_does_not_fit_is_refused(checkpoint, change, named):
    state = torch.load(checkpoint)
    if change.get("module"):  # tensors beside the right ones
        change = {"module": state["module"] | change["module"]}
    torch.save({k: v for k, v in (state | change).items() if v is not None}, checkpoint)
    with pytest.raises(InputError, match=named):
        load_network(checkpoint)


@pytest.mark.parametrize("content", [[1], {"a": 1}, b""])
def test_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / "x.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(InputError, match="x.pt: not a (readable )?checkpoint"):
        load_network(path)


# ---------------------------------------------------------------- export

def check_exported(function, checkpoint, tolerance):
    """An exported network takes raw pictures of any number and size."""
    model, _ = load_network(checkpoint)
    for batch in (1, 2):
        for height, width in ((33, 47), (64, 64), (130, 200)):
            images = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8)
            with torch.no_grad():
                logits = model(normalise(images)).logits
                expected = F.interpolate(logits, (height, width), mode="bilinear")
                found = function(images)
            assert found.dtype == torch.float32 and found.shape == expected.shape
            assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def test_exported_network_is_the_same_function(checkpoint, tmp_path, run, capsys):
    path = tmp_path / "new" / "student.pt2"
    run("--checkpoint", checkpoint, "--export", path)
    text = capsys.readouterr().out
    assert float(re.search(r"largest difference to the original (\S+)", text)[1]) < 1e-4
    assert f"{path.stat().st_size / 1e6:.1f} MB" in text and " ms for one 48x48 image" in text
    extra = {"classes.json": ""}
    exported = torch.export.load(path, extra_files=extra).module()
    assert json.loads(extra["classes.json"]) == CLASSES
    check_exported(exported, checkpoint, 1e-6)
    with pytest.raises(RuntimeError, match="dtype"):  # pictures in another scale are refused
        exported(torch.rand(1, 3, 64, 64))
    module.refuse_foreign(path)  # the same command may write it again


@pytest.mark.parametrize("name, named", [
    ("last.pt", "give it the ending .pt2 or .onnx"), ("archive.pt2", "was not written by this"),
    ("text.pt2", "was not written by this"), ("student.onnx", "pip install onnx onnxscript")])
def test_export_writes_over_nothing_of_another_origin(checkpoint, run, monkeypatch, name, named):
    path = checkpoint.with_name(name)
    torch.save({}, checkpoint.with_name("archive.pt2"))
    checkpoint.with_name("text.pt2").write_text("precious")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    before = {p: p.read_bytes() for p in path.parent.iterdir()}
    with pytest.raises(InputError, match=f"{name}: .*{named}"):
        run("--checkpoint", checkpoint, "--export", path)
    assert {p: p.read_bytes() for p in path.parent.iterdir()} == before


def test_exported_onnx_is_the_same_function(checkpoint, tmp_path, run):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    path = tmp_path / "student.onnx"
    run("--checkpoint", checkpoint, "--export", path)
    content = onnx.load(path)
    about = {p.key: p.value for p in content.metadata_props}
    assert json.loads(about["classes.json"]) == CLASSES
    module.refuse_foreign(path)  # the same command may write it again
    session = pytest.importorskip("onnxruntime").InferenceSession(path)
    check_exported(lambda x: torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0]),
                   checkpoint, 1e-5)


# ---------------------------------------------------------------- the command line

@pytest.mark.parametrize("options, changes, name, why", [
    ([], {"stage": {"labels": "others"}}, "last.pt", "the labels have changed since training"),
    ([], {}, "copy.pt", "the file is not the last.pt of its folder"),
    ([], {"dataset": "folder", "window": 32}, "last.pt", None),
    (["--data", "{d}"], {"data": "/another"}, "last.pt", "other data than the run's own"),
    (["--whole"], {}, "last.pt", "--whole, but training validates with windows"),
    (["--window", "40"], {}, "last.pt", "another window or --stride"),
    (["--stride", "16"], {}, "last.pt", "another window or --stride")])
def test_only_a_score_that_is_the_runs_own_is_kept(checkpoint, root, run, capsys, options, changes,
                                                   name, why):
    torch.save(torch.load(checkpoint) | changes, checkpoint.with_name(name))
    run("--checkpoint", checkpoint.with_name(name), *(o.format(d=root) for o in options))
    text = capsys.readouterr().out
    assert "mIoU" in text and ("not kept for --compare" in text) == (why is not None)
    assert why is None or f"not kept for --compare: {why}" in text
    assert (checkpoint.parent / "results-val.json").exists() == (why is None)


def test_evaluation_writes_the_result_beside_the_checkpoint(checkpoint, data, run, capsys):
    run("--checkpoint", checkpoint)
    text = capsys.readouterr().out
    assert all(name in text for name in ("mit_nano", "mIoU", *CLASSES))
    result = json.loads((checkpoint.parent / "results-val.json").read_text())
    expected = {"label": "mine", "method": "ce", "seed": 1, "step": 7, "conditions": {"steps": 7},
                "classes": CLASSES}
    assert {k: result[k] for k in expected} == expected
    model, _ = load_network(checkpoint)
    assert result["iou"] == scores(evaluate(model, data, "val", 48, 32, "cpu"))["iou"]
    assert f"{result['miou']:.2f}" in text


def test_the_default_folder_may_be_spelled_out(checkpoint, root, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "folder").symlink_to(root)
    torch.save(torch.load(checkpoint) | {"data": None}, checkpoint)
    run("--checkpoint", checkpoint, "--data", "data/folder")
    assert (checkpoint.parent / "results-val.json").exists()


def test_pictures_of_a_split(checkpoint, tmp_path, run):
    run("--checkpoint", checkpoint, "--split", "train", "--pictures", tmp_path / "out")
    assert Image.open(tmp_path / "out" / "train-comparison.png").width == 3 * (256 + 6)
    assert (checkpoint.parent / "results-train.json").exists()


@pytest.fixture
def photos(tmp_path):
    """Pictures of several modes and endings, and files beside them."""
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("L", (70, 30)).save(tmp_path / "grey.jpg")
    Image.new("RGBA", (31, 45)).save(folder / "b.PNG")
    Image.new("RGB", (130, 40)).save(folder / "c.jpeg")
    (folder / "notes.txt").write_text("no picture")
    return [tmp_path / "grey.jpg", folder]


PHOTOS = {"grey": (70, 30), "b": (31, 45), "c": (130, 40)}


def test_images_and_folders_are_coloured_at_their_size(checkpoint, photos, tmp_path, run, capsys):
    out = tmp_path / "out"
    for options in ([], ["--whole"]):  # the second time over pictures of the same command
        run("--checkpoint", checkpoint, "--image", *photos, "--pictures", out, *options)
    text = capsys.readouterr().out
    for said in ("photos: 1 left out", "notes.txt", "3 pictures, grey.jpg to c.jpeg"):
        assert said in text
    assert len(list(out.iterdir())) == 3
    for name, (width, height) in PHOTOS.items():
        size = Image.open(out / f"{name}-overlay.png").size
        assert size[0] == width and size[1] - height in (24, 48, 72)


def test_masks_hold_the_index_of_each_pixel(checkpoint, photos, tmp_path, run):
    out = tmp_path / "out"
    run("--checkpoint", checkpoint, "--image", *photos, "--pictures", out, "--masks")
    for name, size in PHOTOS.items():
        mask = Image.open(out / f"{name}-mask.png")
        assert mask.mode == "L" and mask.size == size
    model, state = load_network(checkpoint)
    small = module.resize_short_side(module.read_image(photos[1] / "c.jpeg"), state["base"])
    image = torch.from_numpy(np.array(small)).permute(2, 0, 1)
    expected = predict(model, image, (40, 130), state["window"])
    assert np.array_equal(np.array(Image.open(out / "c-mask.png")), expected.numpy())


def test_no_picture_of_another_origin_is_overwritten(checkpoint, photos, tmp_path, run):
    label = tmp_path / "out" / "c-mask.png"
    label.parent.mkdir()
    Image.new("L", (130, 40), 1).save(label)
    before = label.read_bytes()
    with pytest.raises(InputError, match="c-mask.png: is there and was not written by this"):
        run("--checkpoint", checkpoint, "--image", *photos, "--pictures", label.parent, "--masks")
    assert label.read_bytes() == before and len(list(label.parent.iterdir())) == 1


@pytest.mark.parametrize("options, named", [
    (["--window", "16"], "--window"), (["--stride", "0"], "--stride"),
    (["--batch-size", "0"], "--batch-size"), (["--workers", "-1"], "--workers"),
    (["--split", "test"], "no test split"),
    (["--device", "cuda"], "--device cuda: no such device found"),
    (["--device", "gpu"], "--device gpu: no name of a device"),
    (["--whole", "--stride", "8"], "--whole: takes no windows"),
    (["--image", "absent.png"], "absent.png"), (["--image", "{d}/empty"], "empty: no picture"),
    (["--image", "{d}/text.png"], "truncated or not an image"),
    (["--image", "{d}", "--pictures", "{d}"], "holds the pictures themselves"),
    (["--image", "{d}/text.png", "{d}/empty/../text.png"], "two --image files have the same name"),
    (["--data", "absent"], "absent"), (["--checkpoint", "absent.pt"], "absent.pt"),
    (["--checkpoint", "{d}/text.png"], "text.png: not a readable checkpoint"),
    (["--masks"], "--masks: has no effect with --checkpoint; it goes with --image"),
    (["--against", "kd"], "--against: has no effect with --checkpoint; it goes with --compare"),
    (["--image", "a.png", "--export", "x.pt2"], "--image: has no effect with --export"),
    (["--export", "x.pt2", "--window", "64"], "--window: has no effect with --export"),
    (["--image", "a.png", "--split", "val"], "--split: has no effect with --image"),
    (["--compare", "{d}"], "--checkpoint: has no effect with --compare")])
def test_bad_or_ignored_options_are_one_sentence_that_names_them(checkpoint, tmp_path, options,
                                                                 named, run):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(InputError, match=re.escape(named)) as e:
        run("--checkpoint", checkpoint, *(o.format(d=tmp_path) for o in options))
    assert "\n" not in str(e.value)


def test_data_of_other_classes_is_refused(checkpoint, run):
    torch.save(torch.load(checkpoint) | {"classes": ["sky", "grass", "dog"]}, checkpoint)
    with pytest.raises(InputError, match="trained on 3 classes that are not those of the data"):
        run("--checkpoint", checkpoint)


@pytest.mark.parametrize("options", [[], ["--image", "a.png"], ["--export", "a.pt2"]])
def test_something_to_do_is_required(run, options):
    with pytest.raises(InputError, match="--checkpoint FILE or --compare DIR"):
        run(*options)


# ---------------------------------------------------------------- comparison of runs

def write_runs(folder, runs, **changes):
    """results-val.json of runs: method or label:method -> mIoU of seeds 0, 1, ... or None."""
    for name, values in runs.items():
        label, _, method = name.rpartition(":")
        for seed, miou in enumerate(values):
            if miou is None:
                continue
            result = {"miou": miou, "iou": [miou, None], "pixel_accuracy": 90.0, "seed": seed,
                      "label": label or None, "method": method, "step": 400,
                      "classes": ["sky", "cat"], "conditions": {"crop": 64, "steps": 400}}
            path = folder / f"{label or method}-seed{seed}" / "results-val.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(result | changes))
    return folder


def line(text, start):
    return next(row for row in text.splitlines() if row.startswith(start)).split()


def test_gains_are_paired_by_seed(tmp_path):
    write_runs(tmp_path, {"ce": [50, 52, 51], "kd": [51, 53, 53], "mine:c2vkd": [53, 56, 54]})
    write_runs(tmp_path, {"teacher": [80]}, method=None, conditions=None)  # teachers are not rows
    text = compare(tmp_path, "val")
    assert "80.00" not in text
    assert text.startswith(f"{tmp_path}: val, 400 steps\n")
    assert line(text, "ce") == ["ce", "3", "51.00", "1.00", "-", "-"]
    # gains 1 1 2: mean 4/3, deviation 0.57735, half width 4.303 * 0.57735 / sqrt(3) = 1.434
    assert line(text, "kd") == ["kd", "3", "52.33", "1.15", "+1.33", "[-0.10,", "+2.77]"]
    assert line(text, "mine") == ["mine", "3", "54.33", "1.53", "+3.33", "[+1.90,", "+4.77]"]
    assert line(text, "sky") == ["sky", "51.00", "52.33", "54.33"]
    assert line(text, "cat") == ["cat", "-", "-", "-"]


def test_runs_without_scores_on_the_split_are_named(tmp_path, run, capsys):
    folder = tmp_path / "shapes"
    write_runs(folder, {"ce": [50], "kd": [51], "mine:c2vkd": [53]})
    write_runs(folder, {"teacher": [80]}, method=None, conditions=None)
    for name in ("ce-seed0", "kd-seed0", "mine-seed0", "teacher-resnet10", "teacher-resnet10/pool"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "last.pt").touch()
    for name in ("ce-seed0", "kd-seed0"):
        shutil.copy(folder / name / "results-val.json", folder / name / "results-test.json")
    for above in (folder, tmp_path):  # the folder of a data set, or of all
        run("--compare", above, "--split", "test")
        text = capsys.readouterr().out
        assert "NOTE: no test scores of mine-seed0: finish them, or score them with" in text
    run("--compare", tmp_path)
    assert "NOTE" not in capsys.readouterr().out


def test_gains_against_another_method_are_paired_by_seed_too(tmp_path):
    write_runs(tmp_path, {"ce": [50, 52, 51, None, 50], "kd": [51, 53, 53],
                          "c2vkd": [53, 56, 54, 90], "fitnet": [None, 54],
                          "dkd": [None] * 4 + [51]})
    text = compare(tmp_path, "val", ["kd", "fitnet"])
    kd, fitnet = text.split("against kd")[1].split("against fitnet")
    # 3 - 2, 4 - 2, 3 - 4: mean 2/3, deviation 1.52753, half width 3.795; then 2, 3, 1
    assert line(kd, "c2vkd") == ["c2vkd", "3", "+0.67", "[-3.13,", "+4.46]", "+2.00", "[-0.48,",
                                 "+4.48]"]
    assert line(kd, "fitnet") == ["fitnet", "1", "+0.00", "(one", "seed)", "+1.00", "(one", "seed)"]
    assert line(kd, "dkd") == ["dkd", "0", "-", "-", "-", "-"]
    assert line(fitnet, "c2vkd")[:3] == ["c2vkd", "1", "+0.00"]
    assert line(text, "fitnet") == ["fitnet", "1", "54.00", "-", "+2.00", "(one", "seed)"]
    assert "\nce" not in kd
    with pytest.raises(InputError, match="--against dist: no gain .* c2vkd, dkd, fitnet, kd"):
        compare(tmp_path, "val", ["dist"])


def test_runs_of_different_teachers_are_groups_and_the_student_alone_serves_them_all(tmp_path):
    conditions = {"crop": 64, "steps": 400}
    write_runs(tmp_path, {"ce": [50, 52]}, conditions=conditions | {"teacher_identity": None})
    for steps, miou, weight in ((600, 53, 1), (900, 60, 2)):
        identity = {"network": "resnet10", "steps": steps}
        write_runs(tmp_path / f"teacher{steps}", {"c2vkd": [miou, miou]},
                   conditions=conditions | {"teacher_identity": identity},
                   options={"weights": {"gb": weight}})
    first, second = compare(tmp_path, "val").split(f"{tmp_path}: ")[1:]
    assert first.startswith("val, 400 steps, teacher: steps 600\n")
    assert second.startswith("val, 400 steps, teacher: steps 900\n")
    assert line(first, "c2vkd")[4] == "+2.00" and line(second, "c2vkd")[4] == "+9.00"
    assert line(first, "ce") == line(second, "ce")
    write_runs(tmp_path / "other", {"kd": [51]},
               conditions={"crop": 96, "teacher_identity": identity})
    with pytest.raises(InputError, match="kd-seed0.* differs from .* in crop;"):
        compare(tmp_path, "val")


@pytest.mark.parametrize("changes, named", [
    ({"conditions": {"crop": 96, "steps": 400}}, "in crop;"), ({"step": 300}, "in step;"),
    ({"conditions": {"crop": 96}, "step": 300}, "in crop, step;"),
    ({"classes": ["cat", "sky"]}, "in names of the classes;")])
def test_runs_of_other_conditions_are_refused(tmp_path, changes, named):
    write_runs(tmp_path, {"ce": [50]})
    write_runs(tmp_path, {"kd": [51]}, **changes)
    with pytest.raises(InputError, match=f"kd-seed0.* differs from .*ce-seed0.* {named}"):
        compare(tmp_path, "val")


def test_conditions_that_one_run_lacks_are_compared_among_the_others(tmp_path):
    write_runs(tmp_path, {"ce": [50]})
    conditions = {"crop": 64, "steps": 400}
    write_runs(tmp_path, {"kd": [51]}, conditions=conditions | {"teacher": "good"})
    assert line(compare(tmp_path, "val"), "kd")[4] == "+1.00"
    write_runs(tmp_path, {"pdd": [51]}, conditions=conditions | {"teacher": "bad"})
    with pytest.raises(InputError, match="pdd-seed0.* differs from .*kd-seed0.* in teacher;"):
        compare(tmp_path, "val")


@pytest.mark.parametrize("more, changes, named", [
    ({"ce": [51]}, {}, "a second run of ce, seed 0; keep one"),
    ({"c2vkd": [None, 20]}, {"options": {"kl": "reverse"}}, "in kl of c2vkd; .*another --name"),
    ({"c2vkd:kd": [None, 20]}, {"options": {"kl": "forward"}}, "in method of c2vkd;")])
def test_runs_that_one_name_cannot_hold_are_not_averaged(tmp_path, more, changes, named):
    write_runs(tmp_path, {"ce": [50, 52], "c2vkd": [53]}, options={"kl": "forward"})
    write_runs(tmp_path / "more", more, **changes)
    with pytest.raises(InputError, match=named):
        compare(tmp_path, "val")


@pytest.mark.parametrize("text", ["", "[1]", "{\"miou\": 3}"])
def test_results_that_cannot_be_read_are_named(tmp_path, text):
    write_runs(tmp_path, {"ce": [50]})
    (tmp_path / "ce-seed0" / "results-val.json").write_text(text)
    named = "ce-seed0/results-val.json: missing or not readable; run evaluate.py"
    with pytest.raises(InputError, match=named):
        compare(tmp_path, "val")


def test_compare_from_the_command_line_writes_nothing(tmp_path, run, capsys):
    write_runs(tmp_path, {"ce": [50, 52], "kd": [51, 52]})
    files = sorted(tmp_path.rglob("*"))
    run("--compare", tmp_path, "--against", "kd", "--split", "val")
    text = capsys.readouterr().out
    assert text.startswith(f"{tmp_path}: val, 400 steps\n") and "against kd" in text
    assert sorted(tmp_path.rglob("*")) == files
    with pytest.raises(InputError, match="no results-test.json of a student below it"):
        run("--compare", tmp_path, "--split", "test")
