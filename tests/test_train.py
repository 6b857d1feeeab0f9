"""Whole runs on a data set of a few pictures: methods, stages, what is read again and what not."""
import json
import os
import shutil
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import student
import teacher
import train
from conftest import (TEACHER, differing, error_of, options, parsed, put_folder, result, rows_of,
                      run)
from data import InputError
from evaluate import read_scores
from losses import METHODS

LISTEN = train.Stop.listen
pytestmark = pytest.mark.usefixtures("small_teacher")


@pytest.fixture(scope="module")
def taught(folder, small_teacher, tmp_path_factory):
    """The output folder of a finished teacher and its pool."""
    out = tmp_path_factory.mktemp("taught")
    run(options(folder, out, "--method", "teacher"))
    return out / "folder"


@pytest.fixture
def out(taught, tmp_path):
    """A folder with a copy of these, which a test may change."""
    shutil.copytree(taught / TEACHER, tmp_path / "runs/folder" / TEACHER)
    return tmp_path / "runs"


@pytest.fixture
def mine(folder, tmp_path):
    """The data in a folder that a test may change."""
    return shutil.copytree(folder, tmp_path / "mine")


RESULTS = "folder/ce-mit_nano-seed0/results-val.json"  # of the student alone


def last(path):
    return torch.load(path / "last.pt", weights_only=True)


# ---------------------------------------------------------------- methods

@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_logs_its_terms(folder, taught, method):
    run(options(folder, taught.parent, "--method", method, "--log-every", 2))
    done, weights = taught / f"{method}-mit_nano-seed0", METHODS[method].weights
    rows = rows_of(done)
    assert [int(row["step"]) for row in rows] == [0, 2, 3, 4]
    for row in rows[1:]:
        total = sum(w * float(row[f"raw_{n}"]) for n, w in weights.items())
        assert float(row["total"]) == pytest.approx(total, rel=1e-4)
        assert all(float(row[f"raw_{n}"]) >= -1e-6 for n in weights)
    assert json.loads((done / "results-val.json").read_text())["method"] == method
    stage, needs = last(done)["stage"], METHODS[method].needs
    assert (stage["method"], stage["weights"]) == (method, weights)
    assert stage["teacher"] == (last(taught / TEACHER)["stage"] if "teacher" in needs else None)
    assert stage["pool"] == (last(taught / TEACHER / "pool")["stage"] if "A_l" in needs else None)


def test_a_validation_measures_the_gradient_of_each_unweighted_term(folder, taught, monkeypatch):
    found, measure = [], train.gradient_norms

    def by_backward(terms, encoder):
        norms = []
        for term in terms.values():
            encoder.zero_grad()
            term.backward(retain_graph=True)
            norms.append(torch.cat([p.grad.flatten() for p in encoder.parameters()]).norm())
        found.append(norms)
        return measure(terms, encoder)

    monkeypatch.setattr(train, "gradient_norms", by_backward)
    run(options(folder, taught.parent, "--weights", "gb=7", "--name", "measured"))
    rows, weights = rows_of(taught / "measured"), METHODS["c2vkd"].weights | {"gb": 7}
    total = sum(w * float(rows[-1][f"raw_{name}"]) for name, w in weights.items())
    assert float(rows[-1]["total"]) == pytest.approx(total, rel=1e-4)
    measured = [row for row in rows if row["grad_pdd"]]
    assert [row["step"] for row in measured] == ["3", "4"]
    assert measured == [row for row in rows[1:] if row["val_miou"]]
    for row, norms in zip(measured, found, strict=True):
        for name, norm in zip(weights, norms, strict=True):
            assert float(row[f"grad_{name}"]) == pytest.approx(norm.item(), rel=1e-3)


def test_the_student_alone_needs_no_teacher(folder, tmp_path, capsys):
    run(options(folder, tmp_path, "--method", "ce"))
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["ce-mit_nano-seed0"]
    text = capsys.readouterr().out
    assert "stages: student mit_nano, ce: 4 steps\n" in text and "student alone" in text


def test_the_first_command_trains_the_teacher_and_two_students_that_begin_alike(
        tmp_path, monkeypatch):
    begun, seen, resume, batches = {}, {}, train.Run.resume, train.Run.batches

    def resuming(self, module, optimizer):
        resume(self, module, optimizer)
        start = {k: v.clone() for k, v in module.state_dict().items() if "heads." not in k}
        begun[self.folder.name] = start

    def recording(self, **more):
        for step, images, labels in batches(self, **more):
            seen.setdefault(self.folder.name, []).append((images, labels))
            yield step, images, labels

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "SHAPES_COUNT", {"train": 4, "val": 2, "test": 2})
    monkeypatch.setattr(train.Run, "resume", resuming)
    monkeypatch.setattr(train.Run, "batches", recording)
    run("--crop 32 --base 32 --batch-size 2 --teacher-steps 2 --pool-steps 2 --steps 3 "
        "--gpus 0".split())
    names = "ce-mit_nano-seed0", "c2vkd-mit_nano-seed0"
    alone, other = (begun[name] for name in names)
    assert alone.keys() == other.keys()
    assert all(torch.equal(v, other[k]) for k, v in alone.items())
    alone, other = (seen[name] for name in names)
    assert len(alone) == len(other) == 3
    assert all(torch.equal(a, b) for one, two in zip(alone, other) for a, b in zip(one, two))


def test_training_leaves_teacher_and_pool_bitwise_unchanged(folder, tmp_path):
    args = parsed(options(folder, tmp_path, "--method", "c2vkd"))
    _, _, (learner,) = train.make_runs(args, data.open_dataset("folder", folder))
    frozen = [teacher.Teacher("deeplabv3_resnet10", 3).eval(), teacher.AttentionPool(512, 4).eval()]
    before = [{k: v.clone() for k, v in module.state_dict().items()} for module in frozen]
    # their parameters ask for gradients: distil itself must keep these away
    train.distil(learner, *frozen)
    for module, state in zip(frozen, before):
        assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in module.parameters())
        assert not any(m.training for m in module.modules())


def test_images_without_labels_serve_the_feature_losses_alone(tmp_path, monkeypatch, capsys):
    unlabelled, batches = {}, train.Run.batches

    def recording(self, **more):
        for step, images, labels in batches(self, **more):
            found = (labels == data.IGNORE).all((1, 2)).sum().item()
            unlabelled[self.folder.name] = unlabelled.get(self.folder.name, 0) + found
            yield step, images, labels

    monkeypatch.setattr(train.Run, "batches", recording)
    folder = put_folder(tmp_path / "data", 4, unlabelled=4)
    few = "--batch-size", 4, "--teacher-steps", 2, "--pool-steps", 2, "--steps", 4
    for method in ("ce", "fitnet"):
        run(options(folder, tmp_path, *few, "--method", method))
    assert unlabelled.pop("fitnet-mit_nano-seed0") == 8  # half of 16
    assert set(unlabelled.values()) == {0} and len(unlabelled) == 2
    assert "4 images without labels, used by fitnet" in capsys.readouterr().out
    Image.new("RGB", (64, 64)).save(folder / "images/unlabelled/another.png")
    run(options(folder, tmp_path, *few, "--method", "ce"))  # it goes on as before
    with pytest.raises(InputError, match="fitnet-mit_nano-seed0/last.pt: .*: unlabelled "):
        run(options(folder, tmp_path, *few, "--method", "fitnet"))


# ---------------------------------------------------------------- another experiment

@pytest.mark.parametrize("change, stage, found", [
    ("--batch-size 4", TEACHER, "batch_size (there 2, here 4)"),
    ("--crop 64 --base 40", TEACHER, "base (there 32, here 40); crop (there 32, here 64)"),
    ("--recipe full --student-weights none", TEACHER, "warmup (there 80, here 1000); scale ("),
    ("--teacher-lr 0.5", TEACHER, "rate (there 0.001, here 0.5)"),
    ("--teacher-steps 6", TEACHER, "steps (there 4, here 6)"),
    ("--pool-steps 6", f"{TEACHER}/pool", "steps (there 4, here 6)")])
def test_a_teacher_trained_otherwise_is_refused_with_a_remedy(folder, taught, capsys, change,
                                                              stage, found):
    before, path = result(taught / TEACHER), taught / stage / "last.pt"
    message = error_of(train.main, options(folder, taught.parent, *change.split()), capsys)
    assert f"{path}: from a different experiment: {found}" in message
    remedy = "delete its folder"
    if stage == TEACHER:
        remedy = f"choose another --out, or take it with --teacher-weights {path}"
    assert message.endswith(f"or {remedy}")
    assert differing(taught / TEACHER, before) == []


def test_the_teacher_has_a_seed_of_its_own(folder, tmp_path, monkeypatch):
    begun = []

    def caught(_, module, optimizer):
        begun.append(module.state_dict()["classifier.2.weight"])
        raise KeyboardInterrupt

    monkeypatch.setattr(train.Run, "resume", caught)
    for number in (0, 1):
        args = parsed(options(folder, tmp_path, "--seed", 7, "--teacher-seed", number))
        first, pool, (learner,) = train.make_runs(args, data.open_dataset("folder", folder))
        with pytest.raises(KeyboardInterrupt):
            train.train_teacher(first)
    assert not torch.equal(*begun)
    assert (first.stage.seed, pool.stage.seed, learner.stage.seed) == (1, 1, 7)
    assert first.folder.name == f"{TEACHER}-seed1" and pool.folder.parent == first.folder


def test_labels_count_by_their_bytes_wherever_they_lie(folder, mine, out, capsys):
    run(options(folder, out, "--method", "ce"))
    before = result(out)
    run(options(mine, out, "--method", "ce"))  # another place is no other data
    assert differing(out, before) == []
    path = mine / "labels/val/0.png"
    label = np.array(Image.open(path))
    label[0] = (label[0] + 1) % 3
    Image.fromarray(label).save(path)
    for method, stage in (("ce", "ce-mit_nano-seed0"), ("teacher", TEACHER), ("kd", TEACHER)):
        message = error_of(train.main, options(mine, out, "--method", method), capsys)
        assert f"{stage}/last.pt: from a different experiment: labels (there " in message
    (mine / "classes.txt").write_text("road 128 64 128\ncar 0 0 142\nsky 70 130 180\n")
    message = error_of(train.main, options(mine, out), capsys)
    assert f"classes ({data.first_difference(['road', 'sky'], ['road', 'car'])})" in message
    assert differing(out, before) == []


def test_pictures_count_by_their_names_and_their_sizes_are_noted(mine, tmp_path, capsys):
    argv = options(mine, tmp_path / "runs", "--method", "ce")
    run(argv)
    assert "NOTE" not in capsys.readouterr().out
    before, path = result(tmp_path / "runs"), mine / "images/train/0.jpg"
    Image.open(path).copy().save(path, quality=20)
    run(argv)
    note = f"NOTE: {mine}: pictures were changed, added or removed since this run began: "
    assert capsys.readouterr().out.count(note) == 1
    assert differing(tmp_path / "runs", before) == []
    path.rename(path.with_name("another.jpg"))
    (mine / "labels/train/0.png").rename(mine / "labels/train/another.png")
    assert "; pictures (there " in error_of(train.main, argv, capsys)


# ---------------------------------------------------------------- weights that the user gives

def test_imagenet_weights_are_read_before_the_first_step_and_once(folder, tmp_path, monkeypatch):
    """A run that began, and one that is finished, need neither the network nor the files."""
    torch.manual_seed(1)
    kind, begun, resume = teacher.TEACHERS["deeplabv3_resnet10"], {}, train.Run.resume
    files = {"backbone": kind.build(3).backbone, "student.encoder": student.Encoder("mit_nano")}
    for name, module in files.items():
        torch.save(module.state_dict(), tmp_path / name)
    backbone, encoder = ((tmp_path / name).as_uri() for name in files)
    published = replace(kind, imagenet=SimpleNamespace(url=backbone))
    monkeypatch.setitem(teacher.TEACHERS, "deeplabv3_resnet10", published)
    monkeypatch.setitem(student.IMAGENET, "mit_nano", encoder)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))

    def recording(self, module, optimizer):
        resume(self, module, optimizer)
        for key, value in module.state_dict().items():
            begun.setdefault(key, value.clone())

    argv = options(folder, tmp_path / "runs", "--teacher-weights", "imagenet", "--student-weights",
                   "imagenet", "--teacher-steps", 1, "--pool-steps", 1, "--steps", 2)
    monkeypatch.setattr(train.Stop, "asked", True)
    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "resume", recording)
        for stage in ("teacher", "pool", "student"):  # all weights lie in the cache of the first
            with pytest.raises(KeyboardInterrupt, match=f"{stage}: stopped and saved at step 1"):
                run(argv)
    for name, module in files.items():
        assert all(torch.equal(v, begun[f"{name}.{k}"]) for k, v in module.state_dict().items())
    monkeypatch.setattr(train.Stop, "asked", False)
    shutil.rmtree(tmp_path / "cache")
    for name in files:
        (tmp_path / name).unlink()
    run(argv)
    assert last(tmp_path / "runs/folder/c2vkd-mit_nano-seed0")["step"] == 2
    run(argv)


def test_a_backbones_file_starts_stage_one(folder, tmp_path):
    state = teacher.TEACHERS["deeplabv3_resnet10"].build(3).backbone.state_dict()
    torch.save({"model": state}, tmp_path / "backbone.pth")
    args = parsed(options(folder, tmp_path, "--teacher-weights", tmp_path / "backbone.pth"))
    pictures = data.open_dataset("folder", folder)
    first, *_ = train.make_runs(args, pictures)
    train.check_early(args, pictures, [first])
    assert all(torch.equal(v, first.start[k]) for k, v in state.items())
    assert first.stage.initial.startswith("sha256 ")


def scored(monkeypatch):
    """A list that grows whenever a teacher is scored."""
    found, evaluate = [], train.evaluate

    def counting(network, *rest, **more):
        if isinstance(network, teacher.Teacher):
            found.append(network)
        return evaluate(network, *rest, **more)

    monkeypatch.setattr(train, "evaluate", counting)
    return found


def test_a_given_last_pt_is_scored_and_is_the_same_teacher(folder, taught, out, monkeypatch,
                                                           capsys):
    """Its student continues in the folder of the run that trained it, and the other way round."""
    found, given = scored(monkeypatch), taught / TEACHER / "last.pt"
    trained = options(folder, out, "--method", "kd")
    argv = [*trained, "--teacher-weights", str(given)]
    run(argv)
    assert len(found) == 1
    assert "stages: student mit_nano, kd: 4 steps\n" in capsys.readouterr().out
    before = result(out)
    run(trained)
    assert len(found) == 1
    assert differing(out, before) == []
    with pytest.raises(InputError, match="holds deeplabv3_resnet10, wanted deeplabv3_resnet50"):
        run([*argv, "--teacher", "deeplabv3_resnet50"])
    torch.save(torch.load(given) | {"step": 3}, out / "begun.pt")
    with pytest.raises(InputError, match="begun.pt: trained for 3 of its 4 steps; finish it"):
        run([*argv, "--teacher-weights", str(out / "begun.pt")])


def test_a_run_goes_on_under_the_same_tensors_alone(folder, out, capsys):
    """A teacher of an equal Stage may differ, say if another machine trained it."""
    argv, learned = options(folder, out, "--method", "kd"), out / "folder/kd-mit_nano-seed0"
    run(argv)
    before, path = result(learned), out / "folder" / TEACHER / "last.pt"
    state = torch.load(path)
    state["module"]["classifier.2.bias"] += 1e-3
    torch.save(state, path)
    message = error_of(train.main, argv, capsys)
    assert "kd-mit_nano-seed0/last.pt: learned from a teacher with other tensors" in message
    assert differing(learned, before) == []
    run([*argv, "--name", "another"])
    scores = (out / "folder").glob("*/results-val.json")
    digests = {read_scores(path)["teacher_tensors"] for path in scores}
    assert len(digests) == 3  # None of the teacher itself


def test_a_given_teacher_of_other_labels_is_noted(mine, taught, tmp_path, capsys):
    argv = options(mine, tmp_path, "--method", "fitnet", "--steps", 1, "--teacher-weights",
                   taught / TEACHER / "last.pt")
    run(argv)
    assert "NOTE" not in capsys.readouterr().out
    for kind in ("images/val/1.jpg", "labels/val/1.png"):
        (mine / kind).rename(mine / kind.replace("/val/", "/train/another"))
    run([*argv, "--name", "other"])
    assert "last.pt: learned from other labels or pictures; if it saw" in capsys.readouterr().out


def test_teachers_trained_elsewhere_are_read_from_plain_state_dicts_and_scored_each(
        tmp_path, monkeypatch, capsys):
    """Also where the student alone, which has no teacher, was finished beside another one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "SHAPES_COUNT", {"train": 4, "val": 2, "test": 2})
    found, shown = scored(monkeypatch), []
    monkeypatch.setattr(train, "report", lambda _, entries, *rest: shown.append(
        entries["teacher"][1]["iou"]))
    line = "--crop 32 --base 32 --batch-size 2 --pool-steps 1 --steps 1 --gpus 0"
    for seed, lowest, warned in ((0, 100.0, 1), (1, -1.0, 0)):
        torch.manual_seed(seed)
        state = teacher.TEACHERS["deeplabv3_resnet10"].build(8).state_dict()
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, f"{seed}.pth")
        monkeypatch.setattr(train, "miou_of_commonest_class", lambda matrix: lowest)
        run([*line.split(), "--teacher-weights", f"{seed}.pth", "--name", f"of{seed}"])
        network = found[-1]
        assert not any(p.requires_grad for p in network.parameters()) and not network.training
        assert all(torch.equal(v, network.state_dict()[k]) for k, v in state.items())
        text = capsys.readouterr().out
        assert text.count("WARNING: this teacher is no better than always answering") == warned
    assert len(found) == 2 and shown[0] != shown[1]


# ---------------------------------------------------------------- around the loop

def test_out_of_memory_is_one_line(folder, out, monkeypatch, capsys):
    def short(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB\nmore")

    monkeypatch.setattr(train, "distil", short)
    message = error_of(train.main, options(folder, out, "--method", "kd"), capsys)
    assert message == "out of GPU memory: lower --batch-size or --crop"


def test_a_second_run_in_one_folder_is_refused_but_may_read_a_finished_teacher(folder, out, capsys):
    with data.locked(out / "folder/kd-mit_nano-seed0"), data.locked(out / "folder" / TEACHER):
        message = error_of(train.main, options(folder, out, "--method", "kd"), capsys)
    assert message.startswith(f"{out}/folder/kd-mit_nano-seed0: another run is at work here")
    with data.locked(out / "folder" / TEACHER):
        run(options(folder, out, "--method", "kd"))


@pytest.mark.parametrize("file, kept", [
    ("labels/train/0.png", "picture_sizes"), ("images/val/0.jpg", "scored")])
def test_data_that_change_in_mid_run_set_its_scores_apart(mine, tmp_path, monkeypatch, capsys, file,
                                                          kept):
    argv, schedule = options(mine, tmp_path, "--method", "ce"), train.schedule

    def editing(step, *rest, **more):
        if step == 3:
            picture = Image.open(mine / file)
            picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(mine / file)
        return schedule(step, *rest, **more)

    monkeypatch.setattr(train, "schedule", editing)
    run(argv)
    assert f"NOTE: {mine}: labels or pictures have changed since" in capsys.readouterr().out
    found, state = read_scores(tmp_path / RESULTS), last((tmp_path / RESULTS).parent)
    began = {"scored": state["stage"]["labels"], "picture_sizes": state["picture_sizes"]}
    assert [key for key in began if found[key] == began[key]] == [kept]


def test_a_reader_of_the_output_who_leaves_costs_no_step(folder, tmp_path, monkeypatch):
    def broken(*_):
        raise BrokenPipeError

    monkeypatch.setattr(train.tqdm, "write", broken)
    run(options(folder, tmp_path, "--method", "ce"))
    assert last(tmp_path / "folder/ce-mit_nano-seed0")["step"] == 4


def test_deleted_scores_and_log_of_a_finished_run_are_written_again(folder, tmp_path):
    argv = options(folder, tmp_path, "--method", "ce")
    run(argv)
    before = result(tmp_path)
    (tmp_path / RESULTS).unlink()
    (tmp_path / RESULTS).with_name("log.csv").unlink()
    run(argv)
    assert differing(tmp_path, before) == []


def test_scores_whose_last_pt_is_gone_are_neither_lost_nor_those_of_another_run(folder, tmp_path):
    argv, path = options(folder, tmp_path, "--method", "ce"), tmp_path / "folder/ce-mit_nano-seed0"
    run(argv)
    (path / "last.pt").unlink()
    before = result(tmp_path)
    with pytest.raises(InputError, match="results-val.json: scores whose last.pt is gone; move"):
        run([*argv, "--lr", "0.1"])
    assert result(tmp_path) == before


# ---------------------------------------------------------------- signals

@pytest.fixture
def listening(monkeypatch):
    """Stop at work, with a clock of its own."""
    handlers = {number: signal.signal(number, signal.SIG_DFL)
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    clock = SimpleNamespace(monotonic=lambda: clock.now, now=0.0)
    monkeypatch.setattr(train, "time", clock)
    monkeypatch.setattr(train.Stop, "asked", False)
    monkeypatch.setattr(train.Stop, "interrupted", train.Stop.interrupted)
    yield clock
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_signals_ask_once_and_only_a_second_ctrl_c_ends_at_once(listening, capfd):
    LISTEN()
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGINT):
        signal.raise_signal(number)
        listening.now += 0.4
    assert train.Stop.asked
    assert capfd.readouterr().err.count("stopping after the next row of the log") == 1
    listening.now += 1
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_hangup_asks_though_its_terminal_is_gone_unless_it_is_ignored(listening, monkeypatch):
    def gone(*_):
        raise OSError(5, "Input/output error")

    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    LISTEN()
    signal.raise_signal(signal.SIGHUP)
    assert not train.Stop.asked
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    LISTEN()
    monkeypatch.setattr(os, "write", gone)
    signal.raise_signal(signal.SIGHUP)
    assert train.Stop.asked
