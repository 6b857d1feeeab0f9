"""Whole runs on a data set of a few pictures: methods, stages, what is read again and what not."""
import json
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models

import data
import losses
import student
import teacher
import train
from conftest import (DIGESTS, TEACHER, differing, error_of, machine_of, options, put_folder,
                      result, rows_of)
from conftest import run as train_with
from data import InputError
from losses import METHODS, Method

LISTEN = train.Stop.listen
pytestmark = pytest.mark.usefixtures("small_teacher")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return put_folder(tmp_path_factory.mktemp("data") / "folder")


@pytest.fixture(scope="module")
def taught(folder, small_teacher, tmp_path_factory):
    """The output folder of a finished teacher and its pool."""
    out = tmp_path_factory.mktemp("taught")
    train_with(options(folder, out, "--method", "teacher"))
    return out / "folder"


@pytest.fixture
def out(taught, tmp_path):
    """A folder with a copy of these, which a test may change."""
    shutil.copytree(taught / TEACHER, tmp_path / "runs/folder" / TEACHER)
    return tmp_path / "runs"


def last(path):
    return torch.load(path / "last.pt", weights_only=True)


# ---------------------------------------------------------------- methods

@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_logs_its_terms(folder, taught, method):
    to_the_end = ["--teach", "end"] if METHODS[method].needs else []
    few = "--method", method, "--log-every", 2, *to_the_end
    train_with(options(folder, taught.parent, *few))
    run, weights = taught / f"{method}-mit_nano-seed0", METHODS[method].weights
    rows = rows_of(run)
    assert [int(r["step"]) for r in rows] == [0, 1, 2, 3, 4]
    for row in rows[1:]:
        total = sum(w * float(row[f"raw_{n}"]) for n, w in weights.items())
        assert float(row["total"]) == pytest.approx(total, rel=1e-4)
        assert all(float(row[f"raw_{n}"]) >= -1e-6 for n in weights)
    assert json.loads((run / "results-val.json").read_text())["method"] == method
    stage = last(run)["stage"]
    needs = METHODS[method].needs
    assert (stage["method"], stage["weights"]) == (method, weights)
    assert (stage["kl"] == "forward") == (method in ("c2vkd", "pdd_fitnet", "vlfd"))
    assert stage["teacher"] == (last(taught / TEACHER)["stage"] if "teacher" in needs else None)
    assert stage["pool"] == (last(taught / TEACHER / "pool")["stage"] if "A_l" in needs else None)


def test_a_new_loss_is_one_function_and_one_entry(folder, taught, monkeypatch):
    def mine(S, T, labels, kl):
        hint = (S.projected.mean() - T.feature.mean()).square()
        return losses.ce(S, T, labels) | {"mine": hint * (2 if kl == "reverse" else 1)}

    row = Method(mine, {"ce": 1.0, "mine": 2.0}, {"teacher", "A_v"})
    monkeypatch.setitem(METHODS, "mine", row)
    found = {}
    for kl in ("forward", "reverse"):
        train_with(options(folder, taught.parent, "--method", "mine", "--weights", "mine=3",
                           "--kl", kl, "--name", kl))
        found[kl] = rows_of(taught / kl)
    first = found["forward"][1]
    assert float(first["weighted_mine"]) == pytest.approx(3 * float(first["raw_mine"]), rel=1e-4)
    assert float(first["grad_mine"]) > 0
    doubled = float(found["reverse"][1]["raw_mine"])
    assert doubled == pytest.approx(2 * float(first["raw_mine"]), rel=1e-4)


def test_measured_rows_hold_norms_and_cosines_of_a_backward_pass(folder, taught, monkeypatch):
    """They are due after a tenth of the steps and at the end, as means of the last five steps."""
    found, measure = [], train.gradient_norms_and_cosines

    def by_backward(terms, ce, encoder):
        def gradient(term):
            encoder.zero_grad()
            term.backward(retain_graph=True)
            return torch.cat([p.grad.flatten() for p in encoder.parameters()])

        ce_gradient = gradient(ce)
        gradients = [gradient(term) for term in terms.values()]
        found.append([[g.norm(), torch.cosine_similarity(g, ce_gradient, 0)] for g in gradients])
        return measure(terms, ce, encoder)

    monkeypatch.setattr(train, "gradient_norms_and_cosines", by_backward)
    few = "--steps", 12, "--log-every", 12, "--val-every", 12, "--name", "measured"
    train_with(options(folder, taught.parent, "--method", "c2vkd", *few))
    rows = {int(row["step"]): row for row in rows_of(taught / "measured")}
    assert list(rows) == [0, 1, 12] and len(found) == 6  # steps 1 and 8 to 12
    for step, wanted in ((1, found[:1]), (12, found[1:])):
        means = torch.tensor(wanted).mean(0).tolist()
        for name, (norm, cosine) in zip(METHODS["c2vkd"].weights, means, strict=True):
            assert float(rows[step][f"grad_{name}"]) == pytest.approx(norm, rel=1e-3)
            assert float(rows[step][f"cos_{name}"]) == pytest.approx(cosine, abs=1e-3)
    assert not rows[0]["grad_pdd"] and float(rows[1]["cos_pdd"]) > 0.5


@pytest.mark.parametrize("score, teach, alone", [
    (0, "right", True), (100, "right", False), (0, "outgrown", True), (0, "end", False)])
def test_a_student_that_is_better_than_its_teacher_learns_from_the_labels_alone(
        folder, out, monkeypatch, capsys, score, teach, alone):
    scores = out / "folder" / TEACHER / "results-val.json"
    scores.write_text(json.dumps(json.loads(scores.read_text()) | {"miou": score}))
    found, cross_entropy = [], train.cross_entropy

    def recording(z_S, labels):
        found.append(cross_entropy(z_S, labels))
        return found[-1]

    monkeypatch.setattr(train, "cross_entropy", recording)
    few = "--method", "c2vkd", "--steps", 6, "--val-every", 2, "--teach", teach
    train_with(options(folder, out, *few))
    run = out / "folder/c2vkd-mit_nano-seed0"
    rows = rows_of(run)[1:]
    sums = [sum(float(row[f"weighted_{n}"]) for n in METHODS["c2vkd"].weights) for row in rows]
    losses_ = [float(row["total"]) for row in rows]
    from_step = 3 if alone else 7
    assert losses_[:from_step - 1] == pytest.approx(sums[:from_step - 1], rel=1e-4)
    if alone:  # measured until then, the loss from then on
        assert losses_[2:] == pytest.approx([ce.item() for ce in found[-4:]], rel=1e-4)
    assert bool(rows[-1]["grad_gb"]) != alone
    assert ("beats its teacher's 0.00; from here on" in capsys.readouterr().out) == alone
    assert last(run)["outgrown"] == alone and last(run)["stage"]["teach"] == teach


def test_the_methods_with_pdd_hear_the_teacher_where_it_is_right_by_default():
    plan = SimpleNamespace(args=SimpleNamespace(teach=None))
    by_default = {method: train.Plan.teach(plan, method) for method in METHODS}
    assert by_default.pop("ce") is None
    assert by_default.pop("c2vkd") == by_default.pop("pdd_fitnet") == "right"
    assert set(by_default.values()) == {"outgrown"}


def test_by_default_pdd_hears_the_teacher_only_where_it_is_right(folder, out):
    few = "--method", "c2vkd", "--steps", 2, "--log-every", 1
    first = {}
    for teach in ("right", "outgrown", "end", None):
        named = ("--name", f"{teach}-seed0", *(("--teach", teach) if teach else ()))
        train_with(options(folder, out, *few, *named))
        first[teach] = rows_of(out / f"folder/{teach}-seed0")[1]
    for term in METHODS["c2vkd"].weights:
        values = {teach: row[f"raw_{term}"] for teach, row in first.items()}
        assert values["right"] == values[None] and values["outgrown"] == values["end"]
        assert (values["right"] == values["end"]) == (term != "pdd")


def test_a_teacher_of_another_size_is_scored_anew_before_a_student_may_leave_it(folder, out,
                                                                                 monkeypatch):
    scores = out / "folder" / TEACHER / "results-val.json"
    scores.write_text(json.dumps(json.loads(scores.read_text()) | {"miou": 100}))
    known = []
    monkeypatch.setattr(train.Checkpoint, "note_if_outgrown",
                        lambda _, miou, to_beat: known.append(to_beat))
    for base in (32, 40):
        train_with(options(folder, out, "--method", "kd", "--base", base, "--name", f"base{base}"))
    at_its_own_size, at_another = known[0], known[-1]
    assert at_its_own_size == 100 and 0 <= at_another < 100


def test_an_outgrown_teacher_stays_so_after_a_stop(folder, out, tmp_path, monkeypatch):
    scores = out / "folder" / TEACHER / "results-val.json"
    scores.write_text(json.dumps(json.loads(scores.read_text()) | {"miou": 0}))
    few = options(folder, out, "--method", "kd", "--steps", 6, "--val-every", 2)
    train_with(few)
    whole = result(out / "folder/kd-mit_nano-seed0")
    shutil.rmtree(out / "folder/kd-mit_nano-seed0")
    save = train.Checkpoint.save

    def save_and_stop(self, step):
        save(self, step)
        if step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.Checkpoint, "save", save_and_stop)
        train_with(few)
    train_with(few)
    assert not differing(out / "folder/kd-mit_nano-seed0", whole)


def test_the_student_alone_needs_no_teacher_and_stands_beside_the_others(folder, tmp_path, capsys):
    train_with(options(folder, tmp_path, "--method", "ce"))
    runs = tmp_path / "folder"
    assert sorted(p.name for p in runs.iterdir()) == ["ce-mit_nano-seed0", "labels.json"]
    text = capsys.readouterr().out
    assert "stages: student mit_nano, ce: 4 steps\n" in text and "student alone" in text
    for more, shown in ((("--steps", 2), False), (("--steps", 4), True), (("--lr", 0.1), False)):
        name = f"run-{more[1]}"
        train_with(options(folder, tmp_path, "--method", "kd", "--name", name, *more))
        assert ("student alone" in capsys.readouterr().out) == shown


def test_the_first_command_trains_the_teacher_and_two_students_that_begin_alike(
        tmp_path, monkeypatch, capsys):
    begun, seen, batches = {}, {}, train.batches

    class Recording(train.Checkpoint):
        def __init__(self, run, module, optimizer):
            super().__init__(run, module, optimizer)
            start = {k: v.clone() for k, v in module.state_dict().items() if "heads." not in k}
            begun[run.folder.name] = start

    def recording(run, *rest, **more):
        for step, images, labels in batches(run, *rest, **more):
            seen.setdefault(run.folder.name, []).append((images, labels))
            yield step, images, labels

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "SHAPES_COUNT", {"train": 4, "val": 2, "test": 2})
    monkeypatch.setattr(train, "Checkpoint", Recording)
    monkeypatch.setattr(train, "batches", recording)
    train_with("--crop 32 --base 32 --batch-size 2 --teacher-steps 2 --pool-steps 2 --steps 3 "
               "--gpus 0".split())
    text, runs = capsys.readouterr().out, tmp_path / "runs/shapes"
    for line in ("shapes: 4 training and 2 validation images, 8 classes; recipe shapes; seed 0; ",
                 "stages: teacher deeplabv3_resnet10: 2 steps; pool: 2 steps; "
                 "student mit_nano, ce: 3 steps; student mit_nano, c2vkd: 3 steps"):
        assert line in text
    names = "ce-mit_nano-seed0", "c2vkd-mit_nano-seed0"
    for name in ("comparison.png", "curves.png", "results-val.json"):
        assert (runs / names[1] / name).stat().st_size > 100
    alone, other = (begun[name] for name in names)
    assert alone.keys() == other.keys()
    assert all(torch.equal(v, other[k]) for k, v in alone.items())
    alone, other = (seen[name] for name in names)
    assert len(alone) == len(other) == 3
    assert all(torch.equal(a, b) for one, two in zip(alone, other) for a, b in zip(one, two))


def test_training_leaves_teacher_and_pool_bitwise_unchanged(folder, tmp_path):
    args = train.parse_options(options(folder, tmp_path, "--method", "c2vkd"))
    plan = train.Plan(args, machine_of(args), data.open_dataset("folder", folder), DIGESTS)
    frozen = [teacher.Teacher("deeplabv3_resnet10", 3).eval(), teacher.AttentionPool(512, 4).eval()]
    before = [{k: v.clone() for k, v in module.state_dict().items()} for module in frozen]
    # their parameters ask for gradients: distil itself must keep these away
    train.distil(plan.student_run("c2vkd"), "none", *frozen)
    for module, state in zip(frozen, before):
        assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in module.parameters())
        assert not any(m.training for m in module.modules())


def test_images_without_labels_serve_the_feature_losses_alone(tmp_path, monkeypatch, capsys):
    unlabelled, batches = {}, train.batches

    def recording(run, *rest, **more):
        for step, images, labels in batches(run, *rest, **more):
            found = (labels == data.IGNORE).all((1, 2)).sum().item()
            name = run.folder.name
            unlabelled[name] = unlabelled.get(name, 0) + found
            yield step, images, labels

    monkeypatch.setattr(train, "batches", recording)
    folder = put_folder(tmp_path / "data", 4, unlabelled=4)
    few = "--batch-size", 4, "--teacher-steps", 2, "--pool-steps", 2, "--steps", 4
    for method in ("ce", "fitnet"):
        train_with(options(folder, tmp_path, *few, "--method", method))
    assert unlabelled.pop("fitnet-mit_nano-seed0") == 8  # half of 16
    assert set(unlabelled.values()) == {0} and len(unlabelled) == 2
    assert "4 images without labels, used by fitnet" in capsys.readouterr().out
    Image.new("RGB", (64, 64)).save(folder / "images/unlabelled/another.png")
    train_with(options(folder, tmp_path, *few, "--method", "ce"))  # it goes on as before
    with pytest.raises(InputError, match="fitnet-mit_nano-seed0/last.pt: .*: unlabelled "):
        train_with(options(folder, tmp_path, *few, "--method", "fitnet"))


# ---------------------------------------------------------------- the teacher is found again

def test_a_finished_teacher_is_used_whatever_it_was_trained_with(folder, out, capsys):
    before = result(out)
    # --recipe full is another scale
    more = ("--recipe", "full", "--student-weights", "none", "--batch-size", 4, "--crop", 64,
            "--base", 40, "--warmup", 1, "--teacher-lr", 0.5, "--steps", 1)
    train_with(options(folder, out, *more))
    text = capsys.readouterr().out
    for stage in ("teacher", "pool"):
        line, = (x for x in text.splitlines() if f"this {stage} is finished and is used" in x)
        assert line.startswith("NOTE: ")
        for change in ("batch_size (there 2, here 4)", "crop (there 32, here 64)", "base (there 32",
                       "scale (there [0.75, 1.5], here [0.5, 2.0])", "warmup (there 80, here 1)"):
            assert change in line
        assert ("rate (there 0.001, here 0.5)" in line) == (stage == "teacher")
    now = result(out)
    assert all(now[k] == v for k, v in before.items())
    stage = last(out / "folder/c2vkd-mit_nano-seed0")["stage"]
    assert stage["teacher"] == last(out / "folder" / TEACHER)["stage"] and stage["crop"] == 64


@pytest.mark.parametrize("change, found", [
    ("--teacher-steps 6", "steps (there 4, here 6)"),
    ("--pool-steps 6", "steps (there 4, here 6)"),
    ("--batch-size 4", "batch_size (there 2, here 4)")])
def test_an_unfinished_teacher_or_one_of_other_steps_is_refused(folder, out, capsys, change, found):
    path = out / "folder" / TEACHER / ("pool" if "pool" in change else "") / "last.pt"
    if "batch" in change:
        torch.save(torch.load(path) | {"step": 3}, path)
    before = result(out)
    message = error_of(train.main, options(folder, out, *change.split()), capsys)
    assert f"{path}: from a different experiment: {found}; " in message
    assert differing(out, before) == []


def test_the_teacher_has_a_seed_of_its_own(folder, taught, tmp_path):
    train_with(options(folder, tmp_path, "--method", "kd", "--seed", 7))
    found = {k: v for k, v in result(taught).items()
             if k == f"{TEACHER}/last.pt"}
    assert all(result(tmp_path / "folder")[k] == v for k, v in found.items())
    train_with(options(folder, tmp_path, "--method", "teacher", "--teacher-seed", 1))
    first, second = last(tmp_path / "folder" / TEACHER), last(tmp_path / f"folder/{TEACHER}-seed1")
    assert second["stage"]["seed"] == 1
    assert not torch.equal(first["module"]["classifier.2.weight"],
                           second["module"]["classifier.2.weight"])
    assert last(tmp_path / f"folder/{TEACHER}-seed1/pool")["stage"]["seed"] == 1


def test_the_pools_report_is_printed_once(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.Stop, "asked", True)
    argv = options(folder, tmp_path, "--method", "teacher", "--teacher-steps", 1)
    stops = 0
    while stops < 10:
        try:
            train_with(argv)
            break
        except KeyboardInterrupt:
            stops += 1
    train_with(argv)
    text = capsys.readouterr().out
    assert stops == 5  # one in stage 1, four in stage 2
    assert text.count("pool: mean average precision") + text.count("pool: not measured") == 1


def test_labels_that_were_changed_are_refused_by_finished_stages(folder, out, tmp_path, capsys):
    train_with(options(folder, out, "--method", "ce"))
    copy = shutil.copytree(folder, tmp_path / "copy")
    before = result(out)
    train_with(options(copy, out, "--method", "ce"))  # another place is no other data
    path = copy / "labels/val/0.png"
    label = np.array(Image.open(path))
    label[0] = (label[0] + 1) % 3
    Image.fromarray(label).save(path)
    for method, stage in (("ce", "ce-mit_nano-seed0"), ("teacher", TEACHER), ("kd", TEACHER)):
        message = error_of(train.main, options(copy, out, "--method", method), capsys)
        assert f"{stage}/last.pt: from a different experiment: labels (there " in message
    (copy / "classes.txt").write_text("sky 70 130 180\nroad 128 64 128\ncar 0 0 142\n")
    assert "classes (there ['road" in error_of(train.main, options(copy, out), capsys)
    assert differing(out, before) == []


# ---------------------------------------------------------------- initial weights

def test_initial_weights_are_read_once(folder, tmp_path, monkeypatch):
    """A run that began, and one that is finished, need neither the network nor the files."""
    torch.manual_seed(1)
    kind = teacher.TEACHERS["deeplabv3_resnet10"]
    torch.save(kind.build(3).backbone.state_dict(), tmp_path / "backbone.pth")
    torch.save(student.Encoder("mit_nano").state_dict(), tmp_path / "encoder.pth")
    urls = [(tmp_path / name).as_uri() for name in ("backbone.pth", "encoder.pth")]
    published = teacher.Kind(kind.build, kind.channels, SimpleNamespace(url=urls[0]))
    monkeypatch.setitem(teacher.TEACHERS, "deeplabv3_resnet10", published)
    monkeypatch.setitem(student.IMAGENET, "mit_nano", urls[1])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    argv = options(folder, tmp_path / "runs", "--teacher-weights", "imagenet", "--student-weights",
                   "imagenet", "--teacher-steps", 1, "--pool-steps", 1, "--steps", 2)
    loads, load = [], train.load_encoder
    monkeypatch.setattr(train, "load_encoder", lambda *a: loads.append(1) or load(*a))
    stop = train.schedule

    def asking(step, *rest, **more):
        train.Stop.asked = len(loads) == 2  # the student has begun
        return stop(step, *rest, **more)

    monkeypatch.setattr(train.Stop, "asked", False)
    monkeypatch.setattr(train, "schedule", asking)
    with pytest.raises(KeyboardInterrupt, match="student: stopped and saved at step 1"):
        train_with(argv)
    monkeypatch.setattr(train.Stop, "asked", False)
    monkeypatch.setattr(train, "schedule", stop)
    shutil.rmtree(tmp_path / "cache")
    for name in ("backbone.pth", "encoder.pth"):
        (tmp_path / name).unlink()
    train_with(argv)
    assert last(tmp_path / "runs/folder/c2vkd-mit_nano-seed0")["step"] == 2
    train_with(argv)
    assert len(loads) == 2


def test_a_backbones_file_starts_stage_one(folder, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    state = models.mobilenet_v2(weights=None).state_dict()
    torch.save({"model": state}, tmp_path / "backbone.pth")
    started, initialise = [], train.initialise

    def recording(network, *rest):
        initialise(network, *rest)
        started.append({k: v.clone() for k, v in network.backbone.state_dict().items()})

    monkeypatch.setattr(train, "initialise", recording)
    train_with(options(folder, tmp_path, "--teacher", "deeplabv3_mobilenet_v2", "--teacher-weights",
                       tmp_path / "backbone.pth", "--teacher-steps", 1, "--pool-steps", 1,
                       "--method", "teacher"))
    assert all(torch.equal(v, state[f"features.{k}"]) for k, v in started[0].items())
    text = capsys.readouterr().out
    assert "stages: teacher deeplabv3_mobilenet_v2: 1 steps; pool: 1 steps" in text
    assert "backbone.pth: unwrapped, leaving out everything outside 'model'" in text
    stage = last(tmp_path / "folder/teacher-deeplabv3_mobilenet_v2")["stage"]
    assert stage["initial"].startswith("backbone.pth, sha256 ") and stage["rate"] == 0.01


# ---------------------------------------------------------------- given teachers

def scored(monkeypatch):
    """A list that grows whenever a teacher is scored."""
    found, evaluate = [], train.evaluate

    def counting(network, *rest, **more):
        if isinstance(network, teacher.Teacher):
            found.append(network)
        return evaluate(network, *rest, **more)

    monkeypatch.setattr(train, "evaluate", counting)
    return found


def test_a_given_teacher_needs_no_stage_one_and_is_scored_once(folder, taught, tmp_path, capsys,
                                                               monkeypatch):
    found, given = scored(monkeypatch), taught / TEACHER / "last.pt"
    argv = options(folder, tmp_path / "runs", "--method", "kd", "--teacher-weights", given)
    capsys.readouterr()
    for calls in (1, 1):
        train_with(argv)
        assert len(found) == calls
    assert "stages: student mit_nano, kd: 4 steps\n" in capsys.readouterr().out
    assert not list((tmp_path / "runs").rglob("teacher-*/last.pt"))
    initial = last(tmp_path / "runs/folder/kd-mit_nano-seed0")["stage"]["teacher"]
    assert initial["network"] == "deeplabv3_resnet10" and "last.pt, sha256" in initial["weights"]
    with pytest.raises(InputError, match="holds deeplabv3_resnet10 .* wanted deeplabv3_resnet50"):
        train_with([*argv, "--teacher", "deeplabv3_resnet50"])
    torch.save(torch.load(given) | {"step": 3}, tmp_path / "begun.pt")
    with pytest.raises(InputError, match="begun.pt: trained for 3 of its 4 steps; finish it"):
        train_with([*argv, "--teacher-weights", str(tmp_path / "begun.pt")])
    capsys.readouterr()
    message = error_of(train.main, options(folder, tmp_path / "runs", "--method", "kd"), capsys)
    assert "kd-mit_nano-seed0/last.pt: from a different experiment: teacher." in message


def test_a_teacher_trained_elsewhere_is_read_from_a_plain_state_dict(folder, tmp_path, capsys,
                                                                     monkeypatch):
    torch.manual_seed(0)
    state = teacher.TEACHERS["deeplabv3_resnet10"].build(3).state_dict()
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}  # an old file
    wrapped = {f"module.{k}": v for k, v in state.items()}
    wrapped["module.aux_classifier.0.weight"] = torch.zeros(1)
    torch.save({"state_dict": wrapped}, tmp_path / "mine.pth")
    found = scored(monkeypatch)
    argv = options(folder, tmp_path / "runs", "--method", "kd", "--teacher-weights",
                   tmp_path / "mine.pth")
    for lowest, warned in ((100.0, 1), (-1.0, 0)):
        monkeypatch.setattr(train, "miou_of_commonest_class", lambda matrix: lowest)
        train_with(argv)
        text = capsys.readouterr().out
        assert text.count("WARNING: this teacher is no better than always answering") == warned
        assert "not loaded: 1 tensors of aux_classifier" in text
        shutil.rmtree(tmp_path / "runs")
    for network in found:
        assert not any(p.requires_grad for p in network.parameters()) and not network.training
        assert all(torch.equal(v, network.state_dict()[k]) for k, v in state.items())


# ---------------------------------------------------------------- around the loop

def test_out_of_memory_in_stage_three_costs_no_second_teacher(folder, out, monkeypatch, capsys):
    def short(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB\nmore")

    with monkeypatch.context() as patch:
        patch.setattr(train, "distil", short)
        message = error_of(train.main, options(folder, out, "--batch-size", 4), capsys)
    assert message == "out of GPU memory: lower --batch-size or --crop"
    before = result(out)
    train_with(options(folder, out, "--batch-size", 3))
    assert all(result(out)[k] == v for k, v in before.items())


def test_a_second_run_in_one_folder_is_refused_but_may_read_a_finished_teacher(folder, out, capsys):
    with data.locked(out / "folder/kd-mit_nano-seed0"), data.locked(out / "folder" / TEACHER):
        message = error_of(train.main, options(folder, out, "--method", "kd"), capsys)
    assert message.startswith(f"{out}/folder/kd-mit_nano-seed0: another run is at work here")
    train_with(options(folder, out, "--method", "kd"))


def test_a_second_signal_stops_at_once(monkeypatch, capsys):
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(train.Stop, "asked", False)
    try:
        LISTEN()
        signal.raise_signal(signal.SIGTERM)
        assert train.Stop.asked
        assert "stopping after the next row of the log" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------- scores are those of the run

def test_a_network_that_is_not_finite_is_not_scored(folder, tmp_path, monkeypatch, capsys):
    def broken(S, T, labels):
        return {"ce": losses.cross_entropy(S.logits, labels) * torch.nan}

    monkeypatch.setitem(losses.METHODS, "broken", losses.Method(broken, {"ce": 1.0}, needs=()))
    message = error_of(train.main, options(folder, tmp_path, "--method", "broken"), capsys)
    assert "a loss or its gradient is not finite" in message
    assert not list(tmp_path.rglob("results-val.json")) and not list(tmp_path.rglob("last.pt"))


def test_pictures_replaced_in_place_are_refused(folder, tmp_path, capsys):
    mine = shutil.copytree(folder, tmp_path / "mine")
    train_with(options(mine, tmp_path / "runs", "--method", "ce"))
    next((mine / "images/train").iterdir()).write_bytes(b"other")
    message = error_of(train.main, options(mine, tmp_path / "runs", "--method", "ce"), capsys)
    assert "from a different experiment: pictures (there " in message


def test_scores_of_another_step_are_not_shown_as_the_runs_own(folder, tmp_path, capsys):
    argv = options(folder, tmp_path, "--method", "ce")
    train_with(argv)
    path = next(tmp_path.rglob("results-val.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"step": 1}))
    assert f"{path}: of step 1, not of the last one" in error_of(train.main, argv, capsys)


@pytest.mark.parametrize("name", ["kd-seed0", "teacher-mine"])
def test_a_name_that_means_something_else_is_refused(name):
    with pytest.raises(InputError, match=f"--name {name}: reserved for a method or a teacher"):
        train.parse_options(["--method", "ce", "--name", name])
