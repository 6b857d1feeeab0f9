"""Scores, sliding windows, pictures, checkpoints, export and the comparison of runs."""
import json
import random
import re
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import evaluate as module
from data import IGNORE, EvalImages, InputError, normalise, open_dataset
from evaluate import compare, confusion_matrix, evaluate, load_network, overlay, predict, scores, strip
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
    torch.save({"network": Student("mit_nano", 3).state_dict(), "name": "mit_nano", "dataset": "folder", "data": str(root),
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


# ---------------------------------------------------------------- windows

def test_windows_of_a_pointwise_network_give_the_whole_image():
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


def test_overlapping_windows_are_averaged():
    class Count(nn.Module):  # logits 0, 1, 2, ... for the windows in their order
        seen = -1

        def forward(self, x):
            self.seen += 1
            return torch.full((1, 1, *x.shape[2:]), float(self.seen)), None
    found = predict(Count(), torch.zeros(3, 32, 48, dtype=torch.uint8), (32, 48), window=32, stride=20, batch=1)
    assert found[0, 0].tolist() == [0] * 16 + [0.5] * 16 + [1] * 16  # 16: the second window lies flush with the end


def test_flip_averages_with_the_mirror_image():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 2, 3, padding=1)
    image = torch.randint(256, (3, 40, 48), dtype=torch.uint8)
    found = predict(lambda x: (conv(x),), image, (40, 48), flip=True)
    x = normalise(image[None])
    torch.testing.assert_close(found, ((conv(x) + conv(x.flip(3)).flip(3)) / 2)[0])
    assert not torch.allclose(found, conv(x)[0], atol=1e-3)


def test_small_images_are_padded_with_the_mean_colour():
    seen = []
    predict(lambda x: (seen.append(x) or x,), torch.full((3, 8, 10), 255, dtype=torch.uint8), (8, 10), window=32)
    assert seen[0].shape == (1, 3, 32, 32)
    assert (seen[0][:, :, 8:] == 0).all() and (seen[0][:, :, :, 10:] == 0).all() and (seen[0][:, :, :8, :10] > 1).all()


def test_evaluate_counts_every_labelled_pixel_once_for_any_batch_size(data):
    torch.manual_seed(0)
    model = Pointwise().train()
    first, *others = (evaluate(model, data, "val", 64, 32, "cpu", batch=n) for n in (1, 2, 5, 100))
    assert all(torch.equal(first, m) for m in others)
    labelled = sum((data.read("val", i)[1] != IGNORE).sum() for i in range(3))
    assert first.sum() == labelled and model.training
    expected = sum(confusion_matrix(predict(model, image, label.shape, 32, 21).argmax(0), label, 3)
                   for image, label, _ in (EvalImages(data, "val", 64)[i] for i in range(3)))
    assert torch.equal(first, expected)


def test_evaluate_takes_the_first_images_only_if_asked(data):
    labelled = (data.read("val", 0)[1] != IGNORE).sum()
    assert evaluate(Pointwise(), data, "val", 64, 32, "cpu", images=1).sum() == labelled


# ---------------------------------------------------------------- pictures

def test_overlay_keeps_the_size_and_puts_a_legend_below():
    prediction = torch.zeros(50, 250, dtype=torch.int64)
    prediction[:, 125:] = 2
    picture = overlay(Image.new("RGB", (250, 50), "black"), prediction, CLASSES, PALETTE)
    assert picture.size == (250, 50 + 16)  # both names fit in one line
    blue, red, legend = (picture.getpixel(at) for at in ((10, 10), (240, 10), (7, 50 + 8)))
    assert blue[2] > 150 and blue[0] < 10 and red[0] > 150 and red[2] < 10 and legend == tuple(PALETTE[0])
    prediction[:, 100] = 1
    assert overlay(Image.new("RGB", (250, 50)), prediction, CLASSES, PALETTE).size == (250, 50 + 2 * 16)


def test_strip_has_a_row_an_image_and_a_column_a_network(data):
    models = {"teacher": Pointwise().train(), "student": Pointwise()}
    sheet = strip(data, "val", 32, 32, models, "cpu", images=2)
    heights = [round(max(h, 32 * h // min(h, w)) * 160 / w) for h, w in SIZES[:2]]
    assert sheet.width == 4 * 160 + 3 * 4 and abs(sheet.height - (16 + sum(h + 4 for h in heights))) <= 12
    assert models["teacher"].training


def test_ignored_pixels_stay_uncoloured():
    image = torch.full((3, 4, 4), 90, dtype=torch.uint8)
    label = torch.full((4, 4), IGNORE)
    assert torch.equal(module.colourise(image, label, PALETTE), image)
    label[0] = 1
    coloured = module.colourise(image, label, PALETTE)
    assert torch.equal(coloured[:, 1:], image[:, 1:]) and (coloured[1, 0] > 150).all()


# ---------------------------------------------------------------- checkpoints

def test_network_of_a_checkpoint_comes_back_in_eval_mode(checkpoint):
    model, state = load_network(checkpoint)
    assert isinstance(model, Student) and not model.training and state["step"] == 7
    assert all(torch.equal(v, state["network"][k]) for k, v in model.state_dict().items())


def test_teachers_are_loaded_alike(checkpoint):
    state = torch.load(checkpoint) | {"name": "deeplabv3_resnet10", "network": Teacher("deeplabv3_resnet10", 3).state_dict()}
    torch.save(state, checkpoint)
    assert isinstance(load_network(checkpoint)[0], Teacher)


@pytest.mark.parametrize("change, named", [
    ({"name": "vit_huge"}, "vit_huge"), ({"name": "mit_b0"}, "do not fit mit_b0"), ({"classes": CLASSES[:2]}, "do not fit mit_nano"),
    ({"network": None}, "no network"), ({"palette": None}, "no palette")])
def test_checkpoint_that_does_not_fit_is_refused(checkpoint, change, named):
    state = torch.load(checkpoint) | change
    torch.save({k: v for k, v in state.items() if v is not None}, checkpoint)
    with pytest.raises(InputError, match=named):
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
    exported = torch.export.load(tmp_path / "student.pt2").module()
    for shape in ((1, 3, 64, 128), (3, 3, 96, 64)):
        x = torch.randn(shape)
        with torch.no_grad():
            expected = F.interpolate(model(x)[0], shape[2:], mode="bilinear", align_corners=False)
            assert (exported(x) - expected).abs().max() < 1e-4 and printed < 1e-4


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
    assert "mIoU" in capsys.readouterr().out and not (checkpoint.parent / "results-val.json").exists()


def test_best_checkpoint_is_printed_but_not_kept(checkpoint, monkeypatch, capsys):
    run(monkeypatch, "--checkpoint", checkpoint.rename(checkpoint.with_name("best.pt")))
    assert "mIoU" in capsys.readouterr().out and not (checkpoint.parent / "results-val.json").exists()


def test_pictures_of_a_split(checkpoint, tmp_path, monkeypatch):
    run(monkeypatch, "--checkpoint", checkpoint, "--split", "train", "--pictures", tmp_path / "out")
    assert Image.open(tmp_path / "out" / "train.png").width == 3 * 160 + 2 * 4
    assert (checkpoint.parent / "results-train.json").exists()


@pytest.mark.parametrize("options", [[], ["--whole"], ["--flip", "--stride", "30"]])
def test_images_and_folders_are_coloured_at_their_size(checkpoint, root, tmp_path, options, monkeypatch):
    Image.new("L", (70, 30)).save(tmp_path / "grey.jpg")
    (tmp_path / "more").mkdir()
    Image.new("RGBA", (31, 45)).save(tmp_path / "more" / "b.PNG")
    Image.new("RGB", (130, 40)).save(tmp_path / "more" / "c.jpeg")
    (tmp_path / "more" / "notes.txt").write_text("no picture")
    run(monkeypatch, "--checkpoint", checkpoint, "--image", tmp_path / "grey.jpg", tmp_path / "more", "--pictures", tmp_path / "out", *options)
    sizes = {p.name: Image.open(p).size for p in (tmp_path / "out").iterdir()}
    assert {name: width for name, (width, _) in sizes.items()} == {"grey.png": 70, "b.png": 31, "c.png": 130}
    assert all((sizes[f"{name}.png"][1] - height) in (16, 32, 48) for name, height in (("grey", 30), ("b", 45), ("c", 40)))


def test_images_are_never_overwritten_by_their_pictures(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "own").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "own" / "a.png")
    with pytest.raises(InputError, match="would be overwritten"):
        run(monkeypatch, "--checkpoint", checkpoint, "--image", tmp_path / "own", "--pictures", tmp_path / "own")


@pytest.mark.parametrize("options, named", [
    (["--window", "16"], "--window 16"), (["--stride", "0"], "--stride 0"), (["--batch-size", "0"], "--batch-size 0"),
    (["--split", "test"], "no test split"), (["--image", "absent.png"], "absent.png"), (["--image", "{empty}"], "no .jpg or .png"),
    (["--image", "{text}"], "not a readable image"), (["--data", "absent"], "absent"), (["--checkpoint", "absent.pt"], "absent.pt"),
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


def test_data_of_other_classes_is_refused(checkpoint, monkeypatch):
    torch.save(torch.load(checkpoint) | {"classes": ["sky", "grass", "dog"]}, checkpoint)
    with pytest.raises(InputError, match="trained on 3 classes that are not those of the data"):
        run(monkeypatch, "--checkpoint", checkpoint)


def test_something_to_do_is_required(monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch)
    assert end.value.code == 2 and "--checkpoint FILE or --compare DIR" in capsys.readouterr().err


# ---------------------------------------------------------------- comparison

def write_runs(folder, runs, **changes):
    """results-val.json of runs: method (or label:method) -> mIoU of seeds 0, 1, ... (None: no such run)."""
    for name, values in runs.items():
        label, _, method = name.rpartition(":")
        for seed, miou in enumerate(values):
            result = {"miou": miou, "iou": [miou, None], "pixel_accuracy": 90.0, "label": label or None, "method": method,
                      "seed": seed, "step": 400, "classes": ["sky", "cat"], "conditions": {"crop": 64, "steps": 400}}
            path = folder / f"{label or method}-seed{seed}" / "results-val.json"
            if miou is not None:
                path.parent.mkdir()
                path.write_text(json.dumps(result | changes))
    return folder


def line(text, start):
    return next(row for row in text.splitlines() if row.startswith(start)).split()


def test_comparison_pairs_by_seed_and_says_where_a_ratio_is_undefined(tmp_path):
    write_runs(tmp_path, {"ce": [50, 52, 51], "kd": [51, 53, 53], "c2vkd": [53, 56, 54]})
    text = compare(tmp_path, "val")
    assert line(text, "ce") == ["ce", "3", "51.00", "1.00"]
    # gains 1 1 2: mean 4/3, deviation 0.57735, half width 4.303 * 0.57735 / sqrt(3) = 1.434
    assert line(text, "kd") == ["kd", "3", "52.33", "1.15", "+1.33", "[-0.10,", "+2.77]"]
    assert line(text, "c2vkd") == ["c2vkd", "3", "54.33", "1.53", "+3.33", "[+1.90,", "+4.77]"]  # gains 3 4 3
    # 3 - 2, 4 - 2, 3 - 4: mean 2/3, deviation 1.52753, half width 3.795
    assert "gain(c2vkd) - 2 gain(kd) = +0.67   [-3.13, +4.46]" in text
    assert "gain(c2vkd) / gain(kd): undefined: the interval of the gain of kd is not above 0" in text
    assert line(text, "sky") == ["sky", "54.33", "51.00", "52.33"] and line(text, "cat") == ["cat"] + 3 * ["absent"]


def test_ratio_is_to_the_best_baseline_on_the_same_seeds(tmp_path):
    write_runs(tmp_path, {"ce": [50, 52, 51, 40], "at": [50.5, 52.5, 51.5, 90], "kd": [51, 53.1, 52.2], "c2vkd": [53, 56, 54]})
    text = compare(tmp_path, "val")
    assert "gain(c2vkd) - 2 gain(kd) = +1.13" in text  # 1, 1.8, 0.6; seed 3 of at has no partner
    assert "gain(c2vkd) / gain(kd): 303%" in text  # 10/3 over 1.1


def test_named_runs_have_a_row_of_their_own_and_are_no_baseline(tmp_path):
    write_runs(tmp_path, {"ce": [50, 52], "kd": [51, 53], "c2vkd": [53, 55], "reverse:c2vkd": [58, 59]})
    text = compare(tmp_path, "val")
    assert line(text, "reverse") == ["reverse", "2", "58.50", "0.71", "+7.50", "[+1.15,", "+13.85]"]
    assert "gain(c2vkd) - 2 gain(kd) = +1.00" in text and "None" not in text


def test_the_best_baseline_is_chosen_on_val_and_a_losing_one_is_named(tmp_path):
    write_runs(tmp_path, {"ce": [50, 52], "at": [52, 54], "kd": [49, 51], "c2vkd": [49, 52]})
    for path in tmp_path.rglob("results-val.json"):  # on test the two baselines trade places
        text = path.read_text()
        other = {"at": '"miou": 45', "kd": '"miou": 49.5'}.get(path.parent.name[:2])
        path.with_name("results-test.json").write_text(re.sub(r'"miou": \d+', other, text) if other else text)
    assert "gain(c2vkd) - 2 gain(at) = -4.50" in compare(tmp_path, "val")  # -1 - 4, 0 - 4
    on_test = compare(tmp_path, "test")
    assert "gain(c2vkd) - 2 gain(at) = +11.50" in on_test  # -1 + 10, 0 + 14
    assert "but at loses: this is no gain" in on_test and "loses" not in compare(tmp_path, "val")
    val = tmp_path / "kd-seed0" / "results-val.json"
    val.write_text(val.read_text().replace('"step": 400', '"step": 200'))
    with pytest.raises(InputError, match="kd-seed0/results-val.json: missing or of another step than results-test.json"):
        compare(tmp_path, "test")


def test_a_losing_baseline_goes_unnamed_where_the_difference_is_negative_too(tmp_path):
    write_runs(tmp_path, {"ce": [50, 52], "kd": [49, 51], "c2vkd": [40, 42]})
    text = compare(tmp_path, "val")
    assert "gain(c2vkd) - 2 gain(kd) = -8.00" in text and "loses" not in text


def test_one_seed_and_seeds_without_partner(tmp_path):
    write_runs(tmp_path, {"ce": [50, 52], "kd": [None, 53], "c2vkd": [53]})
    text = compare(tmp_path, "val")
    assert line(text, "c2vkd") == ["c2vkd", "1", "53.00", "-", "+3.00", "(one", "seed)"]
    assert "gain(c2vkd)" not in text  # kd and c2vkd share no seed
    (tmp_path / "kd-seed1" / "results-val.json").unlink()
    assert line(compare(tmp_path, "val"), "c2vkd")[4] == "+3.00"


def test_teachers_are_not_rows(tmp_path):
    write_runs(tmp_path, {"ce": [50]})
    write_runs(tmp_path, {"teacher": [80]}, method=None)
    assert "80.00" not in compare(tmp_path, "val")


@pytest.mark.parametrize("changes, named", [({"conditions": {"crop": 96, "steps": 400}}, "in crop;"), ({"step": 300}, "in step;"),
                                            ({"conditions": {"crop": 96}}, "in crop, steps;")])
def test_runs_of_other_conditions_are_refused(tmp_path, changes, named):
    write_runs(tmp_path, {"ce": [50]})
    write_runs(tmp_path, {"kd": [51]}, **changes)
    with pytest.raises(InputError, match=f"kd-seed0.* differs from .*ce-seed0.* {named}"):
        compare(tmp_path, "val")


def test_second_run_of_a_method_and_seed_is_refused(tmp_path):
    write_runs(tmp_path, {"ce": [50]})
    (tmp_path / "copy").mkdir()
    write_runs(tmp_path / "copy", {"ce": [51]})
    with pytest.raises(InputError, match="a second run of ce, seed 0; keep one"):
        compare(tmp_path, "val")


def test_compare_from_the_command_line(tmp_path, monkeypatch, capsys):
    write_runs(tmp_path, {"ce": [50, 51]})
    run(monkeypatch, "--compare", tmp_path)
    assert capsys.readouterr().out.startswith("val, 400 steps\n")
