"""Scores, sliding windows, pictures, the four commands and the comparison of runs."""
import importlib.util
import json
import os
import random
import re
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import evaluate as module
from conftest import error_of, put_folder
from data import (IGNORE, EvalImages, InputError, labels_digest, normalise, open_dataset,
                  sizes_of_pictures)
from evaluate import (class_map, compare, comparison, confusion_matrix, evaluate,
                      load_network, miou_of_commonest_class, overlay, paint, predict, report,
                      report_terms, scores, table, write_scores)
from losses import Outputs
from student import Student
from teacher import Teacher

CLASSES = ["road", "sky", "car"]
PALETTE = [[128, 64, 128], [70, 130, 180], [0, 0, 142]]


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
    """A data set of pictures of different sizes, with a test split."""
    root = put_folder(tmp_path_factory.mktemp("data") / "folder", 3)
    for kind in ("images", "labels"):
        shutil.copytree(root / kind / "train", root / kind / "test")
    path = root / "labels/train/0.png"
    label = np.array(Image.open(path))
    label[:5] = IGNORE
    Image.fromarray(label).save(path)
    return root


@pytest.fixture(scope="module")
def data(root):
    return open_dataset("folder", root)


@pytest.fixture
def checkpoint(root, data, tmp_path):
    """last.pt of a small untrained student, with what train.py writes."""
    torch.manual_seed(0)
    path = tmp_path / "run" / "last.pt"
    path.parent.mkdir()
    heads = nn.ModuleDict({"A_v": nn.Conv2d(256, 8, 1)})
    trained = nn.ModuleDict({"student": Student("mit_nano", 3), "heads": heads})
    stage = {"stage": "student", "steps": 7, "labels": labels_digest(data, "train", "val")}
    torch.save({"module": trained.state_dict(), "name": "mit_nano", "dataset": "folder",
                "data": str(root), "classes": CLASSES, "palette": PALETTE, "base": 48,
                "window": 32, "step": 7, "label": "mine", "method": "ce", "seed": 1,
                "stage": stage, "picture_sizes": sizes_of_pictures(data)}, path)
    return path


def altered(checkpoint, **changes):
    """The checkpoint with other entries."""
    torch.save(torch.load(checkpoint) | changes, checkpoint)
    return checkpoint


@pytest.fixture
def run(monkeypatch, capsys):
    """Run evaluate.py with these arguments. Returns what it printed."""
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        module.main()
        return capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return run


@pytest.fixture
def error(monkeypatch, capsys):
    """Run evaluate.py with these arguments, which it refuses. Returns its one line."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return lambda *arguments: error_of(module.main, arguments, capsys)


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
    assert found["iou"] == pytest.approx([75, 40, 0, None, None])
    assert found["miou"] == pytest.approx((75 + 40 + 0) / 3)
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


def test_windows_of_a_pointwise_network_give_the_whole_image(logits, monkeypatch):
    rng, model = random.Random(0), Pointwise()
    for _ in range(10):
        h, w, window = rng.randint(5, 90), rng.randint(5, 90), rng.randint(32, 64)
        image = torch.randint(256, (3, h, w), dtype=torch.uint8)
        size = rng.randint(5, 100), rng.randint(5, 100)
        whole = F.interpolate(model(normalise(image[None])).logits, size, mode="bilinear")[0]
        torch.testing.assert_close(predict(model, image, size), whole, atol=1e-5, rtol=1e-5)
        for at_a_time in (1, 3, 8):
            monkeypatch.setattr(module, "AT_A_TIME", at_a_time)
            found = predict(model, image, size, window)
            torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)


class Count(nn.Module):
    """Logits 0, 1, 2, ... for the windows in their order."""
    seen = -1

    def forward(self, x):
        self.seen += 1
        return logits_only(torch.full((1, 1, *x.shape[2:]), float(self.seen)))


def test_overlapping_windows_are_averaged(logits, monkeypatch):
    monkeypatch.setattr(module, "AT_A_TIME", 1)
    image = torch.zeros(3, 32, 48, dtype=torch.uint8)
    found = predict(Count(), image, (32, 48), window=32)
    # the second window lies flush with the end, at 16
    assert found[0, 0].tolist() == [0] * 16 + [0.5] * 16 + [1] * 16


def test_windows_overlap_by_a_third(monkeypatch):
    monkeypatch.setattr(module, "AT_A_TIME", 1)
    for width, windows in ((36, 1), (37, 2), (36 + 24, 2), (36 + 25, 3), (36 + 2 * 24, 3)):
        model = Count()
        predict(model, torch.zeros(3, 36, width, dtype=torch.uint8), (4, 4), window=36)
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


def test_evaluate_counts_every_labelled_pixel_once_whatever_the_loader_processes(data):
    torch.manual_seed(0)
    model, state = Pointwise(), torch.get_rng_state()
    expected = sum(confusion_matrix(predict(model, image, label.shape, 32), label, 3)
                   for image, label in (EvalImages(data, "train", 64)[i] for i in range(3)))
    for workers in (0, 1):
        found = evaluate(model, data, "train", 64, 32, "cpu", workers=workers)
        assert torch.equal(found, expected)
    assert torch.equal(torch.get_rng_state(), state)  # training goes on with the same numbers
    labelled = [(data.read("train", i)[1] != IGNORE).sum() for i in range(3)]
    assert expected.sum() == sum(labelled)


def test_a_network_in_training_mode_is_not_evaluated(data):
    with pytest.raises(AssertionError, match="eval"):
        evaluate(Pointwise().train(), data, "val", 48, 32, "cpu")


def test_each_gpu_has_its_share_of_the_cores_and_a_cpu_no_loader(monkeypatch):
    for cores, gpus, expected in ((2, 1, 2), (64, 1, 16), (64, 8, 8), (1, 2, 0), (64, 0, 0)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)
        assert module.default_workers(gpus) == expected


# ---------------------------------------------------------------- pictures

def test_overlay_keeps_the_size_and_puts_a_legend_below():
    prediction = torch.zeros(50, 170, dtype=torch.int64)
    prediction[:, 85:] = 2
    picture = overlay(Image.new("RGB", (170, 50), "black"), prediction, CLASSES, PALETTE)
    assert picture.size == (170, 50 + 24)  # both names fit in one line
    left, right, box = (picture.getpixel(at) for at in ((10, 10), (160, 10), (6, 50 + 12)))
    # 0.7 of the colours, over black
    assert left == (89, 44, 89) and right == (0, 0, 99) and box == tuple(PALETTE[0])
    prediction[:, 60] = 1
    picture = overlay(Image.new("RGB", (170, 50)), prediction, CLASSES, PALETTE)
    assert picture.size == (170, 50 + 2 * 24)
    assert paint(torch.tensor([[IGNORE]]), PALETTE).getpixel((0, 0)) == (255, 255, 255)


def test_comparison_has_a_row_an_image_and_a_column_a_network(data):
    models = {"teacher": Pointwise().train(), "nobody": None, "student": Pointwise()}
    sheet = comparison(data, "train", 32, 32, models, "cpu")
    shapes = [EvalImages(data, "train", 32)[i][0].shape[1:] for i in range(3)]
    heights = [round(256 * h / w) + 6 for h, w in shapes]
    assert sheet.width == 4 * (256 + 6)
    assert sheet.height == 32 + sum(heights) + 2 * (sheet.width // 60)
    assert models["teacher"].training
    label = paint(torch.from_numpy(data.read("train", 0)[1]), data.palette)
    for row, column in ((3, 5), (20, 30), (31, 31)):
        x = 262 + 3 + int((column + 0.5) * 256 / label.width)
        y = 32 + 3 + int((row + 0.5) * (heights[0] - 6) / label.height)
        assert sheet.getpixel((x, y)) == label.getpixel((column, row))


# ---------------------------------------------------------------- tables

WHOLE = {"miou": 50.0, "iou": [60.0, 40.0], "pixel_accuracy": 90.0}


def test_table_of_networks_says_over_how_many_classes_the_mean_is():
    part = {"miou": 7.0, "iou": [7.0, None], "pixel_accuracy": 90.0}
    lines = table([("teacher", 1234567, 12.34, part), ("student", 89, None, part)],
                  ["sky", "tall grass"]).splitlines()
    assert lines[1] == "teacher   1,234,567          12.3  7.00       90.00"
    assert lines[2] == "student          89             -  7.00       90.00"
    assert lines[4] == "mIoU: mean over 1 of 2 classes: the others have no labelled pixel"
    assert [line.split() for line in lines[-2:]] == [["sky", "7.00", "7.00"],
                                                     ["tall", "grass", "-", "-"]]
    assert "mean over" not in table([("teacher", 12, None, WHOLE)], ["sky", "tall grass"])


@pytest.fixture
def entries(tmp_path):
    """What `report` takes: a teacher and two students."""
    (tmp_path / "run").mkdir()
    result = {"iou": [50.0] * 3, "pixel_accuracy": 90.0}
    return {"teacher": (Pointwise(), result | {"miou": 50.0}),
            "student alone": (Pointwise(), result | {"miou": 45.0}),
            "c2vkd": (Pointwise(), result | {"miou": 51.5})}


def test_report_draws_prints_the_table_and_the_gain(entries, data, tmp_path, capsys):
    report(tmp_path / "run", entries, data, 32, 32, "cpu")
    text = capsys.readouterr().out
    assert line(text, "student alone")[-2:] == ["45.00", "90.00"] and "NOTE" not in text
    assert "gain of c2vkd over student alone: +6.50 mIoU on val, one seed" in text
    assert "WARNING: c2vkd is better than its teacher" in text
    assert Image.open(tmp_path / "run/comparison.png").width > 0


def test_a_picture_that_cannot_be_drawn_or_written_costs_a_note(entries, data, tmp_path, capsys):
    folder = tmp_path / "run"
    (folder / "comparison.png").mkdir()
    (tmp_path / "damaged.png").touch()
    damaged = open_dataset("folder", data.root)
    damaged.pairs["val"] = [(tmp_path / "damaged.png", data.pairs["val"][0][1])]
    for pictures, named in ((data, "comparison.png"), (damaged, "damaged.png")):
        report(folder, entries, pictures, 32, 32, "cpu")
        text = capsys.readouterr().out
        (said,) = [row for row in text.splitlines() if row.startswith("NOTE: ")]
        assert named in said and "gain of c2vkd" in text


def test_report_keeps_its_pictures_where_printing_fails(entries, data, tmp_path, monkeypatch):
    def broken(*_):
        raise BrokenPipeError
    monkeypatch.setattr("builtins.print", broken)
    with pytest.raises(BrokenPipeError):
        report(tmp_path / "run", entries, data, 32, 32, "cpu")
    assert Image.open(tmp_path / "run/comparison.png").width > 0


def test_terms_are_one_table_of_means_over_the_validations(capsys):
    names = "raw_pdd", "raw_gb", "grad_pdd", "grad_gb"
    values = (), ("2", "0.5", "3", "0.1"), ("2", "0.5"), ("1", "0.25", "1", "0.3")
    rows = [dict(zip(names, row)) for row in values]
    report_terms(rows, {"pdd": 1.0, "gb": 10.0})
    text = capsys.readouterr().out
    # norms 3 and 1 at step 40, 1 and 3 at step 400
    assert line(text, "pdd") == ["pdd", "1", "1", "1", "2", "50%"]
    assert line(text, "gb") == ["gb", "0.25", "10", "2.5", "2", "50%"]
    report_terms(rows, {"pdd": 0.0, "gb": 1.0})
    assert line(capsys.readouterr().out, "gb")[-2:] == ["0.2", "100%"]


# ---------------------------------------------------------------- checkpoints and export

def test_network_of_a_checkpoint_comes_back_in_eval_mode(checkpoint):
    model, state = load_network(checkpoint)
    assert isinstance(model, Student) and not model.training and state["step"] == 7
    for name, value in model.state_dict().items():
        assert torch.equal(value, state["module"][f"student.{name}"])
    weights = Teacher("deeplabv3_resnet10", 3).state_dict()
    altered(checkpoint, name="deeplabv3_resnet10", module=weights)
    assert isinstance(load_network(checkpoint)[0], Teacher)


@pytest.mark.parametrize("change, named", [
    ({"name": "vit_huge"}, "vit_huge"), ({"name": "mit_b0"}, "not mit_b0"),
    ({"palette": None}, "no palette")])
def test_checkpoint_that_does_not_fit_is_refused(checkpoint, change, named):
    state = torch.load(checkpoint) | change
    torch.save({k: v for k, v in state.items() if v is not None}, checkpoint)
    with pytest.raises(InputError, match=named):
        load_network(checkpoint)


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


def test_exported_network_is_the_same_function(checkpoint, tmp_path, run):
    path = tmp_path / "new" / "student.pt2"
    text = run("export", checkpoint, path)
    assert float(re.search(r"largest difference to the original (\S+)", text)[1]) < 1e-4
    assert f"{path.stat().st_size / 1e6:.1f} MB" in text and " ms for one 48x48 image" in text
    extra = {"classes.json": ""}
    exported = torch.export.load(path, extra_files=extra).module()
    assert json.loads(extra["classes.json"]) == CLASSES
    check_exported(exported, checkpoint, 1e-6)
    with pytest.raises(RuntimeError, match="dtype"):  # pictures in another scale are refused
        exported(torch.rand(1, 3, 64, 64))


@pytest.mark.parametrize("name, named", [
    ("last.pt", "give it the ending .pt2 or .onnx"), ("text.pt2", "is there already"),
    ("student.onnx", "pip install onnx onnxscript")])
def test_export_writes_over_nothing(checkpoint, error, monkeypatch, name, named):
    checkpoint.with_name("text.pt2").write_text("precious")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    before = {p: p.read_bytes() for p in checkpoint.parent.iterdir()}
    assert f"{name}: {named}" in error("export", checkpoint, checkpoint.with_name(name))
    assert {p: p.read_bytes() for p in checkpoint.parent.iterdir()} == before


def test_exported_onnx_is_the_same_function(checkpoint, tmp_path, run):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    path = tmp_path / "student.onnx"
    run("export", checkpoint, path)
    about = {p.key: p.value for p in onnx.load(path).metadata_props}
    assert json.loads(about["classes.json"]) == CLASSES
    session = pytest.importorskip("onnxruntime").InferenceSession(path)
    check_exported(lambda x: torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0]),
                   checkpoint, 1e-5)


# ---------------------------------------------------------------- score

def test_score_prints_and_keeps_that_of_the_test_split(checkpoint, data, run):
    results = checkpoint.with_name("results-test.json")
    for split in ("train", "val"):
        text = run("score", checkpoint, "--split", split)
        assert "mIoU" in text and "not kept" not in text
    assert [p.name for p in checkpoint.parent.iterdir()] == ["last.pt"]
    text = run("score", checkpoint, "--split", "test")
    assert all(name in text for name in ("mit_nano", *CLASSES)) and "NOTE" not in text
    result = json.loads(results.read_text())
    expected = {"label": "mine", "method": "ce", "seed": 1, "step": 7, "classes": CLASSES,
                "stage": torch.load(checkpoint)["stage"], "scored": labels_digest(data, "test")}
    assert {k: result[k] for k in expected} == expected
    model, _ = load_network(checkpoint)
    assert result["iou"] == scores(evaluate(model, data, "test", 48, 32, "cpu"))["iou"]
    assert f"{result['miou']:.2f}" in text


@pytest.mark.parametrize("options, changes, name, why", [
    ([], {"stage": {"labels": "others", "steps": 7}}, "last.pt", "other data than the run's own"),
    ([], {}, "copy.pt", "the file is not the last.pt of its folder"),
    ([], {"step": 6}, "last.pt", "its training is not finished"),
    (["--whole"], {}, "last.pt", "--whole, but training validates with windows")])
def test_only_a_score_that_is_the_runs_own_is_kept(checkpoint, run, options, changes, name, why):
    path = checkpoint.rename(checkpoint.with_name(name))
    text = run("score", altered(path, **changes), "--split", "test", *options)
    assert "mIoU" in text and f"not kept for compare: {why}" in text
    assert [p.name for p in path.parent.iterdir()] == [name]


def test_a_picture_that_was_replaced_costs_a_note(checkpoint, data, run):
    altered(checkpoint, picture_sizes=1)
    text = run("score", checkpoint, "--split", "test")
    found = json.loads(checkpoint.with_name("results-test.json").read_text())
    assert text.count("NOTE: ") == 1
    # those of the run and those that were scored
    assert found["picture_sizes"] == f"1 {sizes_of_pictures(data, ['test'])}"


def test_scores_of_other_test_data_are_replaced_with_a_note(checkpoint, root, run, tmp_path):
    """Data that moved are the run's own, by the labels of train and val."""
    note = f"NOTE: {checkpoint.with_name('results-test.json')}: scores of other test data are repl"
    other = shutil.copytree(root, tmp_path / "other")
    for path in other.glob("labels/test/*.png"):
        paint(torch.from_numpy(np.array(Image.open(path))), PALETTE).save(path)
    for more, noted in (([], 0), ([], 0), (["--data", other], 1), (["--data", other], 0)):
        text = run("score", checkpoint, "--split", "test", *more)
        assert text.count(note) == noted
        two_ways = "NOTE: labels are read in two ways: by their colours, as " in text
        assert two_ways == bool(more)


def test_a_score_is_kept_before_it_is_printed_and_printed_where_it_cannot_be_kept(
        checkpoint, run, capsys, monkeypatch):
    results, written = checkpoint.with_name("results-test.json"), []
    with monkeypatch.context() as patch:
        patch.setattr("builtins.print", lambda *_: written.append(results.exists()))
        run("score", checkpoint, "--split", "test")
    assert written == [True]
    results.unlink()
    results.mkdir()  # in the way
    with pytest.raises(InputError, match="results-test.json: cannot write it"):
        run("score", checkpoint, "--split", "test")
    assert CLASSES[0] in capsys.readouterr().out


def test_other_classes_and_absent_splits_are_refused(checkpoint, root, tmp_path, error):
    other = shutil.copytree(root, tmp_path / "other")
    for kind in ("images", "labels"):
        shutil.rmtree(other / kind / "test")
    told = error("score", checkpoint, "--split", "test", "--data", other)
    assert told == "the data has no test split; choose another --split"
    told = error("score", altered(checkpoint, classes=["road", "grass", "car"]))
    assert "its classes are not those of the data" in told and "grass" in told


# ---------------------------------------------------------------- draw

@pytest.fixture
def photos(tmp_path):
    """Pictures of several modes and endings, and files beside them."""
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("L", (70, 30)).save(tmp_path / "grey.jpg")
    Image.new("RGB", (31, 45)).save(folder / "b.PNG")
    Image.effect_noise((130, 40), 90).convert("RGB").save(folder / "c.jpeg")
    (folder / "notes.txt").write_text("no picture")
    return [tmp_path / "grey.jpg", folder]


PHOTOS = {"grey": (70, 30), "b": (31, 45), "c": (130, 40)}


def test_pictures_and_folders_are_coloured_at_their_size(checkpoint, photos, tmp_path, run):
    out = tmp_path / "out"
    text = run("draw", checkpoint, *photos, "--out", out)
    for said in ("photos: 1 left out", "notes.txt", "3 pictures, grey.jpg to c.jpeg"):
        assert said in text
    assert len(list(out.iterdir())) == 3
    for name, (width, height) in PHOTOS.items():
        size = Image.open(out / f"{name}-overlay.png").size
        assert size[0] == width and size[1] - height in (24, 48, 72)


@pytest.mark.parametrize("options, window", [([], 32), (["--whole"], None)])
def test_masks_hold_the_index_of_each_pixel(checkpoint, photos, tmp_path, run, options, window):
    out = tmp_path / "out"
    run("draw", checkpoint, *photos, "--out", out, "--masks", *options)
    for name, size in PHOTOS.items():
        mask = Image.open(out / f"{name}-mask.png")
        assert mask.mode == "L" and mask.size == size
    model, state = load_network(checkpoint)
    small = module.resize_short_side(module.read_image(photos[1] / "c.jpeg"), state["base"])
    image = torch.from_numpy(np.array(small)).permute(2, 0, 1)
    expected = predict(model, image, (40, 130), window)
    assert np.array_equal(np.array(Image.open(out / "c-mask.png")), expected.numpy())


def test_what_cannot_be_drawn_is_named_and_the_rest_is_drawn(checkpoint, photos, tmp_path, error):
    out, folder = tmp_path / "out", photos[1]
    out.mkdir()
    (out / "grey-mask.png").write_text("precious")
    (folder / "a.png").write_bytes((folder / "b.PNG").read_bytes()[:60])
    long = "n" * 245
    Image.new("RGB", (40, 40)).save(folder / f"{long}.png")
    Image.new("RGB", (40, 40)).save(tmp_path / "c.png")  # the name of another one
    told = error("draw", checkpoint, *photos, tmp_path / "c.png", tmp_path / "absent.png",
                 "--masks", "--out", out)
    assert told.startswith("5 of 7 left out: ")
    for named in ("grey-mask.png: is there already", "a.png: truncated or not an image",
                  f"{long}-mask.png: cannot write it", "c-mask.png: is there already",
                  "absent.png"):
        assert named in told
    assert {p.name for p in out.iterdir()} == {"grey-mask.png", "b-mask.png", "c-mask.png"}
    assert (out / "grey-mask.png").read_text() == "precious"
    assert Image.open(out / "c-mask.png").size == PHOTOS["c"]


@pytest.mark.parametrize("arguments, named", [
    ([], "COMMAND"), (["score", "absent.pt"], "absent.pt"),
    (["score", "{c}", "--data", "absent"], "absent"),
    (["draw", "{c}", "{d}/empty"], "empty: no picture"),
    (["draw", "{c}", "{d}/a.png", "--out", "{d}"], "holds the pictures themselves"),
    (["compare", "{d}"], "no results-val.json of a student below it")])
def test_bad_usage_is_one_line_that_names_it(checkpoint, tmp_path, arguments, named, error):
    (tmp_path / "empty").mkdir()
    assert named in error(*(a.format(c=checkpoint, d=tmp_path) for a in arguments))


# ---------------------------------------------------------------- compare

STAGE = {"stage": "student", "steps": 400, "crop": 64, "labels": "abc", "unlabelled": 0,
         "weights": {"ce": 1.0}, "pool": None}


def write_runs(folder, runs, teacher="good", stage={}, **changes):
    """results-val.json of runs: method or label:method -> mIoU of seeds 0, 1, ... or None."""
    for name, values in runs.items():
        label, _, method = name.rpartition(":")
        known = None if method == "ce" else {"stage": "teacher", "network": teacher}
        for seed, miou in enumerate(values):
            if miou is None:
                continue
            state = {"seed": seed, "label": label or None, "method": method, "step": 400,
                     "classes": ["sky", "cat"], "scored": "abc"} | changes
            state["stage"] = STAGE | {"method": method, "seed": seed, "teacher": known} | stage
            result = {"miou": miou, "iou": [miou, None], "pixel_accuracy": 90.0}
            run = folder / f"{label or method}-seed{seed}"
            run.mkdir(parents=True)
            write_scores(run, "val", result, state)
    return folder


def line(text, start):
    return next(row for row in text.splitlines() if row.startswith(start)).split()


def test_runs_on_pictures_of_other_sizes_are_compared_with_a_note(tmp_path):
    note = "NOTE: the files of pictures had other sizes in "
    write_runs(tmp_path, {"ce": [40, 41]}, picture_sizes=7)
    write_runs(tmp_path, {"kd": [42, 43]}, picture_sizes=7)
    assert note not in compare(tmp_path, "val")
    write_runs(tmp_path, {"dist": [42, 43]}, picture_sizes=8)
    assert f"{note}dist-seed0, dist-seed1 than in ce-seed0" in compare(tmp_path, "val")


def test_gains_are_paired_by_seed(tmp_path):
    write_runs(tmp_path, {"ce": [50, 52, 51], "kd": [51, 53, 53, 90], "mine:c2vkd": [53, 56, 54]})
    write_runs(tmp_path, {"teacher": [80]}, method=None)  # teachers are not rows
    text = compare(tmp_path, "val")
    assert "80.00" not in text and "in no table" not in text
    assert text.startswith(f"{tmp_path}: val, 400 steps\n")
    assert line(text, "method")[-1] == "pairs"
    assert line(text, "ce") == ["ce", "3", "51.00", "1.00", "-", "-", "-"]
    # gains 1 1 2: mean 4/3, deviation 0.57735, half width 4.303 * 0.57735 / sqrt(3) = 1.434
    assert line(text, "kd")[:2] == ["kd", "4"]
    assert line(text, "kd")[4:] == ["+1.33", "[-0.10,", "+2.77]", "3"]
    assert line(text, "mine")[1:] == ["3", "54.33", "1.53", "+3.33", "[+1.90,", "+4.77]", "3"]
    assert line(text, "sky") == ["sky", "51.00", "61.75", "54.33"]
    assert line(text, "cat") == ["cat", "-", "-", "-"]


def test_gains_against_another_row_are_paired_by_seed_also_where_ce_lacks_it(tmp_path):
    write_runs(tmp_path, {"ce": [50, 52, 51, None, 50], "kd": [51, 53, 53, 70],
                          "c2vkd": [53, 56, 54, 90], "fitnet": [None, 54],
                          "dkd": [None] * 4 + [51]})
    text = compare(tmp_path, "val", ["kd", "fitnet"])
    kd, fitnet = text.split("against kd")[1].split("against fitnet")
    # 3 - 2, 4 - 2, 3 - 4: mean 2/3, deviation 1.52753, half width 3.795; then 2, 3, 1, 20
    c2vkd = line(kd, "c2vkd")
    assert c2vkd[1:5] == ["+0.67", "[-3.13,", "+4.46]", "3"]
    assert (c2vkd[5], c2vkd[8]) == ("+6.50", "4")
    assert line(kd, "fitnet") == ["fitnet", "+0.00", "(one", "seed)", "1", "+1.00", "(one", "seed)",
                                  "1"]
    assert line(kd, "dkd") == ["dkd", "-", "-", "0", "-", "-", "0"]
    assert line(fitnet, "c2vkd")[:2] == ["c2vkd", "+0.00"]
    assert "\nce" not in kd
    with pytest.raises(InputError, match="--against dist: no gain .* c2vkd, dkd, fitnet, kd"):
        compare(tmp_path, "val", ["dist"])


def test_a_table_has_one_teacher_and_the_student_alone_stands_in_each(tmp_path):
    write_runs(tmp_path, {"ce": [50, 52]})
    write_runs(tmp_path / "a", {"c2vkd": [53, 53]})
    write_runs(tmp_path / "b", {"c2vkd": [60, 60]}, teacher="bad")
    write_runs(tmp_path / "d", {"c2vkd": [80, 80]}, teacher_tensors="1")  # of an equal training
    given = {"teacher": {"network": "good", "weights": "sha256 1234"}}
    write_runs(tmp_path / "c", {"c2vkd": [70, 70]}, stage=given)
    first, second, third, fourth = compare(tmp_path, "val").split(f"{tmp_path}: ")[1:]
    assert first.startswith("val, 400 steps, teacher network good, tensors None\n")
    assert fourth.startswith("val, 400 steps, teacher network good, tensors 1\n")
    assert second.startswith("val, 400 steps, teacher network bad, tensors None\n")
    assert third.startswith("val, 400 steps, teacher network good, weights sha256 1234, ")
    for text, gain in ((first, "+2.00"), (second, "+9.00"), (third, "+19.00")):
        assert line(text, "c2vkd")[4] == gain and line(text, "ce") == line(first, "ce")


@pytest.mark.parametrize("changes, named", [
    ({"stage": {"crop": 96}}, "crop 96"), ({"step": 300}, "step 300"),
    ({"scored": "other"}, "scored other"), ({"stage": {"labels": "x" * 64}}, "labels xxx"),
    ({"classes": ["cat", "sky"]}, "classes entry 0")])
def test_runs_of_other_conditions_are_never_mixed(tmp_path, changes, named):
    write_runs(tmp_path, {"ce": [50], "kd": [51]})
    write_runs(tmp_path / "other", {"ce": [30], "kd": [90]}, **changes)
    first, second = compare(tmp_path, "val").split(f"{tmp_path}: ")[1:]
    assert line(first, "kd")[2] == "51.00" and line(second, "kd")[2] == "90.00"
    assert line(first, "kd")[4] == "+1.00" and line(second, "kd")[4] == "+60.00"
    assert named in second.splitlines()[0]
    shutil.rmtree(tmp_path / "other/ce-seed0")  # without a partner
    text = compare(tmp_path, "val")
    assert "90.00" not in text
    assert line(text, "  kd, seed 0: it differs") and named in text.splitlines()[-1]


def test_rows_of_one_name_are_told_apart_by_what_differs(tmp_path):
    write_runs(tmp_path, {"ce": [50], "kd": [51]})
    for weight, miou in ((1.0, 60), (2.0, 70)):
        write_runs(tmp_path / f"w{weight}", {"c2vkd": [miou]},
                   stage={"weights": {"ce": 1.0, "gb": weight}})
    text = compare(tmp_path, "val", ["c2vkd"])
    for weight, miou in (("1.0", "60.00"), ("2.0", "70.00")):
        assert line(text, f"c2vkd (weights gb {weight})")[5] == miou
        assert f"against c2vkd (weights gb {weight})" in text


def test_a_label_makes_a_row_of_its_own_and_never_the_student_alone(tmp_path):
    write_runs(tmp_path, {"ce": [50], "brief:ce": [40], "kd": [51]})
    write_runs(tmp_path / "more", {"ce:at": [45]})
    text = compare(tmp_path, "val")
    assert line(text, "kd")[4] == "+1.00" and line(text, "brief")[4] == "-10.00"
    assert sum(row.startswith("ce (") for row in text.splitlines()) == 2


def test_a_second_run_of_a_row_and_seed_is_named_and_not_used(tmp_path):
    write_runs(tmp_path / "a", {"ce": [50], "kd": [51]})
    write_runs(tmp_path / "b", {"kd": [90]})
    text = compare(tmp_path, "val")
    assert line(text, "kd")[1:3] == ["1", "51.00"] and "90.00" not in text
    last = text.splitlines()[-1]
    assert str(tmp_path / "b" / "kd-seed0") in last and str(tmp_path / "a" / "kd-seed0") in last


@pytest.mark.parametrize("text", ["", "[1]", "{\"miou\": 3}"])
def test_results_that_cannot_be_read_are_named(tmp_path, text):
    write_runs(tmp_path, {"ce": [50]})
    (tmp_path / "ce-seed0" / "results-val.json").write_text(text)
    with pytest.raises(InputError, match="ce-seed0/results-val.json: missing or not readable"):
        compare(tmp_path, "val")


def test_runs_without_scores_on_the_split_are_named_and_nothing_is_written(tmp_path, run):
    """Also behind a symbolic link, and below a name that glob could take for a pattern."""
    folder = tmp_path / "a[b]"
    write_runs(folder, {"ce": [50], "kd": [51]})
    write_runs(tmp_path / "elsewhere", {"dist": [52], "mine:c2vkd": [53]})
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "teacher-resnet10/pool").mkdir(parents=True)
    for name in ("kd-seed0", "link/mine-seed0", "teacher-resnet10", "teacher-resnet10/pool"):
        (folder / name / "last.pt").touch()
    for name in ("ce-seed0", "kd-seed0", "link/dist-seed0"):
        shutil.copy(folder / name / "results-val.json", folder / name / "results-test.json")
    files = sorted(tmp_path.rglob("*"))
    text = run("compare", folder, "--split", "test", "--against", "kd")
    assert text.startswith(f"{folder}: test, 400 steps\n") and "against kd" in text
    assert line(text, "dist")[4] == "+2.00"
    assert "NOTE: no test scores of mine-seed0: finish them" in text
    assert "NOTE" not in run("compare", folder)
    assert sorted(tmp_path.rglob("*")) == files
