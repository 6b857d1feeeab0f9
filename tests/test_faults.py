"""Bad input is one line with a remedy; a run stopped or killed at any moment continues to the same bits."""
import csv
import errno
import hashlib
import itertools
import multiprocessing
import multiprocessing.forkserver
import os
import random
import resource
import shutil
import signal
import sys
from collections import OrderedDict
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter

import data
import losses
import student
import teacher
import train
from data import InputError

# children come from a server that imported torch once and never ran it: after a backward pass or OpenMP, a fork may hang
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["train", "pytest"])
RESNET10 = teacher.TEACHERS["deeplabv3_resnet10"]


def small_net(classes):
    """In place of ResNet-10: BatchNorm and Dropout as there, and a checkpoint that is quick to write."""
    net = nn.Module()
    layers = OrderedDict(conv=nn.Conv2d(3, 512, 8, 8, bias=False), bn=nn.BatchNorm2d(512), relu=nn.ReLU())
    net.backbone = IntermediateLayerGetter(nn.Sequential(layers), {"relu": "out"})
    net.classifier = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(512, 256, 1), nn.Conv2d(256, classes, 1))
    return net


SMALL = RESNET10._replace(build=small_net)


@pytest.fixture(scope="module", autouse=True)
def quick():
    """One thread, the small teacher, pytest's own signal handlers."""
    multiprocessing.forkserver.ensure_running()  # it imports while the first tests run
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(teacher.TEACHERS, "deeplabv3_resnet10", SMALL)
        patch.setattr(train, "listen", lambda: None)
        yield
    torch.set_num_threads(threads)


def put_folder(root, train_images=12, sides=(32, 64), unlabelled=0):
    rng = np.random.default_rng(0)
    for split, count in (("train", train_images), ("val", 2), ("unlabelled", unlabelled)):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            label = rng.integers(0, 3, (4, 4)).astype(np.uint8)
            label = np.asarray(Image.fromarray(label).resize(rng.integers(*sides, 2, endpoint=True).tolist(), 0))
            image = 80 * label[..., None] + rng.integers(0, 40, (*label.shape, 3))
            Image.fromarray(image.astype(np.uint8)).save(root / "images" / split / f"{i}.jpg")
            Image.fromarray(label).save(root / "labels" / split / f"{i}.png")
    shutil.rmtree(root / "labels" / "unlabelled")
    (root / "classes.txt").write_text("road 128 64 128\nsky 70 130 180\ncar 0 0 142\n")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return put_folder(tmp_path_factory.mktemp("data") / "folder")


def options(folder, out, *more):
    return ["--dataset", "folder", "--data", str(folder), "--out", str(out), "--gpus", "0", "--teacher", "deeplabv3_resnet10",
            "--teacher-steps", "4", "--pool-steps", "4", "--student", "mit_nano", "--steps", "4", "--batch-size", "2",
            "--crop", "32", "--base", "32", "--log-every", "1", "--report-every", "2", "--val-every", "3", *map(str, more)]


def run(argv):
    args = train.parse_options(argv)
    args.rank, args.processes, args.device = 0, 1, torch.device("cpu")
    train.train(args)


def run_until(step, argv):
    """The run is asked to stop during its step-th step, counted over all stages."""
    steps, schedule = itertools.count(1), train.schedule

    def asking(*args, **kwargs):
        if next(steps) == step:
            train.Run.stop = True
        return schedule(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "schedule", asking)
        patch.setattr(train.Run, "stop", False)
        run(argv)


def plain(value):
    """A checkpoint's content as something == compares bit by bit."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def result(out):
    """Everything a run left: checkpoints bit by bit, log.csv without its seconds, scores, pictures."""
    found = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file() and p.name != "options.json"):
        key = str(path.relative_to(out))
        if path.suffix == ".pt":
            found[key] = plain(torch.load(path, weights_only=True))
        elif path.suffix == ".csv":
            with open(path, newline="") as f:
                found[key] = [{k: v for k, v in row.items() if k != "seconds_per_step"} for row in csv.DictReader(f)]
        else:
            found[key] = path.read_bytes()
    return found


def differing(out, expected):
    found = result(out)
    return [key for key in sorted(found.keys() | expected.keys()) if found.get(key) != expected.get(key)]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The uninterrupted run: its folder and its result."""
    out = tmp_path_factory.mktemp("whole")
    run(options(folder, out))
    return out, result(out)


def error_of(main, argv, capsys):
    """The one line that `main` shows for bad input, without its "error: "."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["x.py", *map(str, argv)])
        data.command(main)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert "Traceback" not in "".join(lines) and sum("error: " in line for line in lines) == 1
    assert lines[-1].startswith("error: ")
    return lines[-1].removeprefix("error: ")


# ---------------------------------------------------------------- children

def child(argv, log, trouble):
    with open(log, "w") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # loader processes get the changes below
    teacher.TEACHERS["deeplabv3_resnet10"] = SMALL
    trouble()
    sys.argv = ["train.py", *argv]
    data.command(train.main)


def start(argv, log, trouble):
    process = PROCESSES.Process(target=child, args=(argv, log, trouble))
    process.start()
    return process


def finish(process):
    process.join(60)
    hangs = process.is_alive()
    process.kill()
    assert not hangs
    return process.exitcode


def send_itself(number, step):
    os.setsid()
    send = os.killpg if number == signal.SIGINT else os.kill  # Ctrl-C reaches the loader processes too
    steps, schedule = itertools.count(1), train.schedule

    def sending(*args, **kwargs):
        if next(steps) == step:
            send(os.getpid(), number)
        return schedule(*args, **kwargs)

    train.schedule = sending


def die_in_step(number, seconds):
    train.Run.SAVE_SECONDS = -1  # a checkpoint after each row of the log
    steps, schedule = itertools.count(1), train.schedule

    def dying(*args, **kwargs):
        if next(steps) == number:
            signal.setitimer(signal.ITIMER_REAL, seconds)  # SIGALRM ends the process wherever it is then
        return schedule(*args, **kwargs)

    train.schedule = dying


def die_halfway_through_write(number):
    train.Run.SAVE_SECONDS = -1  # a checkpoint after each row of the log
    writes, fsync = itertools.count(1), os.fsync

    def dying(fd):
        if next(writes) == number:
            os.ftruncate(fd, os.fstat(fd).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(fd)

    os.fsync = dying


def no_file_above(size):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def lose_the_loader(end):
    read = data.TrainStream.__getitem__
    data.TrainStream.__getitem__ = lambda self, position: end() if position == 7 else read(self, position)


# ---------------------------------------------------------------- stop and continue

def test_a_run_stopped_after_every_step_ends_as_the_whole_one(folder, tmp_path, whole):
    stops = 0
    while True:
        try:
            run_until(1, options(folder, tmp_path))
            break
        except KeyboardInterrupt as e:
            stops += 1
            assert "stopped and saved at step" in str(e)
    assert stops == 12
    assert differing(tmp_path, whole[1]) == []


def test_resnet10_stopped_in_each_stage_ends_as_the_whole_one_and_a_worker_changes_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(teacher.TEACHERS, "deeplabv3_resnet10", RESNET10)
    few = ("--teacher-steps", 2, "--pool-steps", 2, "--steps", 2)
    run(options(folder, tmp_path / "whole", *few))
    for name, step in (("teacher", 1), ("pool", 2), ("student", 2)):
        with pytest.raises(KeyboardInterrupt, match=f"{name}: stopped"):
            run_until(step, options(folder, tmp_path / "parts", *few, "--workers", 1))
    run(options(folder, tmp_path / "parts", *few, "--workers", 1))
    assert differing(tmp_path / "parts", result(tmp_path / "whole")) == []


def test_the_same_seed_gives_the_same_bits_and_another_seed_another_student(folder, tmp_path, whole):
    run(options(folder, tmp_path))
    assert differing(tmp_path, whole[1]) == []
    run(options(folder, tmp_path, "--seed", 1))
    students = (tmp_path / "folder" / f"c2vkd-mit_nano-seed{seed}" / "last.pt" for seed in (0, 1))
    first, second = (plain(torch.load(path))["module"] for path in students)
    assert first.keys() == second.keys() and first != second


def test_both_students_of_shapes_stopped_after_every_step_end_as_the_whole_run(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHAPES_COUNT", {"train": 4, "val": 2})
    data.make_shapes(tmp_path / "data")
    few = ("--dataset", "shapes", "--teacher-steps", 1, "--pool-steps", 1, "--steps", 2)
    run(options(tmp_path / "data", tmp_path / "whole", *few))
    begun = []
    for name in ("teacher", "pool", "student", "student", "student", "student"):
        with pytest.raises(KeyboardInterrupt, match=f"{name}: stopped"):
            run_until(1, options(tmp_path / "data", tmp_path / "parts", *few))
        begun.append(sorted(p.parent.name for p in (tmp_path / "parts").rglob("last.pt")))
    assert "ce-mit_nano-seed0" in begun[2] and "c2vkd-mit_nano-seed0" not in begun[3]
    run(options(tmp_path / "data", tmp_path / "parts", *few))
    assert differing(tmp_path / "parts", result(tmp_path / "whole")) == []


def test_images_without_labels_are_half_of_a_batch_of_the_feature_losses_and_play_no_other_part(tmp_path, monkeypatch, capsys):
    seen, batches = {}, train.Run.batches

    def recording(self, *unlabelled):
        for step, images, labels in batches(self, *unlabelled):
            seen.setdefault(self.folder.name, {})[step] = images, labels
            yield step, images, labels

    monkeypatch.setattr(train.Run, "batches", recording)
    mixed, plain_one = put_folder(tmp_path / "mixed", unlabelled=5), put_folder(tmp_path / "plain")
    few = ("--batch-size", 4, "--teacher-steps", 2, "--pool-steps", 2, "--steps", 3)
    run(options(mixed, tmp_path / "whole", *few))
    assert "5 images without labels: 1 of the 4 in a batch, for methods with A_v" in capsys.readouterr().out
    run(options(mixed, tmp_path / "whole", *few, "--method", "ce"))
    mixed_seen, seen = dict(seen), seen.clear() or seen
    ignored = {stage: {tuple((labels == data.IGNORE).all((1, 2)).tolist()) for _, labels in steps.values()}
               for stage, steps in mixed_seen.items()}
    nobody = {(False, False, False, False)}
    assert ignored == {"teacher-deeplabv3_resnet10": nobody, "pool": nobody, "ce-mit_nano-seed0": nobody,
                       "c2vkd-mit_nano-seed0": {(False, False, False, True)}}

    capsys.readouterr()
    run(options(plain_one, tmp_path / "plain runs", *few, "--method", "ce"))  # the teacher's batches, too
    run(options(plain_one, tmp_path / "plain runs", *few, "--method", "teacher"))
    assert "without labels" not in capsys.readouterr().out
    for stage, steps in seen.items():
        assert all(torch.equal(a, b) for step, pair in steps.items() for a, b in zip(pair, mixed_seen[stage][step]))

    for step in (5, 1):  # in the student's stage
        with pytest.raises(KeyboardInterrupt, match="student: stopped"):
            run_until(step, options(mixed, tmp_path / "parts", *few))
    run(options(mixed, tmp_path / "parts", *few, "--workers", 1))
    expected = {k: v for k, v in result(tmp_path / "whole").items() if not k.startswith("folder/ce-")}
    assert differing(tmp_path / "parts", expected) == []


def test_checkpoints_are_written_at_validations_and_where_the_last_one_is_old(folder, tmp_path, monkeypatch):
    """Each at the end of a row of the log, from which a run that lost its later rows continues."""
    saves, save_tensors = [], train.save_tensors

    def counting(path, content):
        saves.append((path.parent.name, content["step"]))
        save_tensors(path, content)

    monkeypatch.setattr(train, "save_tensors", counting)
    few = ("--method", "teacher", "--teacher-steps", 6, "--val-every", 4, "--log-every", 2)
    run(options(folder, tmp_path / "rare", *few))
    assert saves == [("teacher-deeplabv3_resnet10", 4), ("teacher-deeplabv3_resnet10", 6), ("pool", 4)]
    saves.clear()
    monkeypatch.setattr(train.Run, "SAVE_SECONDS", -1)
    run(options(folder, tmp_path / "often", *few))
    assert [step for _, step in saves] == [2, 4, 6, 2, 4]
    assert differing(tmp_path / "often", result(tmp_path / "rare")) == []


def test_a_finished_run_prints_its_table_and_changes_nothing(folder, whole, capsys):
    run(options(folder, whole[0]))
    text = capsys.readouterr().out
    assert all(word in text for word in ("student c2vkd", "teacher", "terms at step 4", "IoU of each class", "comparison.png"))
    assert differing(*whole) == []


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
def test_a_signal_saves_at_the_next_row_of_the_log_and_ends_with_130(folder, tmp_path, number):
    argv = options(folder, tmp_path / "runs", "--log-every", 2, "--val-every", 4, "--workers", int(number == signal.SIGINT))
    assert finish(start(argv, tmp_path / "log", partial(send_itself, number, 5))) == 130
    assert "pool: stopped and saved at step 2; run the same command again" in (tmp_path / "log").read_text().splitlines()[-1]
    run(argv)
    run([word.replace("runs", "whole") for word in argv])
    assert differing(tmp_path / "runs", result(tmp_path / "whole")) == []


def test_a_chain_of_kills_ends_as_the_whole_run(folder, tmp_path, whole):
    argv, chance, kills, saved = options(folder, tmp_path / "runs"), random.Random(0), 0, set()
    for attempt in range(30):
        trouble = partial(die_halfway_through_write, chance.randint(1, 5)) if attempt % 2 else \
            partial(die_in_step, chance.randint(1, 3), chance.uniform(0.001, 0.1))
        code = finish(start(argv, tmp_path / "log", trouble))
        for path in (tmp_path / "runs").rglob("*.pt"):
            data.load_checkpoint(path, ("step", "module"))
        if code == 0:  # it came to its end first: once more from the start
            assert differing(tmp_path / "runs", whole[1]) == []
            shutil.rmtree(tmp_path / "runs")
        else:
            assert code in (-signal.SIGKILL, -signal.SIGALRM), (tmp_path / "log").read_text()
            kills += 1
            saved.add(len(list((tmp_path / "runs").rglob("last.pt"))))
    assert kills >= 20 and {1, 3} <= saved  # in every stage, with something to lose
    run(argv)
    assert differing(tmp_path / "runs", whole[1]) == []


@pytest.mark.parametrize("change, found", (
    ("--lr 0.5", "lr (there 0.001, here 0.5)"), ("--steps 6", "steps (there 4, here 6)"),
    ("--method ce --name c2vkd-mit_nano-seed0", "method (there c2vkd, here ce)"),
    ("--seed 1 --name c2vkd-mit_nano-seed0", "seed (there 0, here 1)"), ("--kl reverse", "kl (there forward, here reverse)"),
    ("--weights gb=2", "'gb': 2.0"), ("--teacher-lr 0.5", "teacher_lr (there 0.001, here 0.5)"),
    ("--teacher-steps 6", "teacher_steps (there 4, here 6)"), ("--pool-steps 6", "pool_steps (there 4, here 6)"),
    ("--batch-size 4", "batch_size (there 2, here 4)"), ("--crop 64", "crop (there 32, here 64)"),
    ("--base 40", "base (there 32, here 40)")))
def test_a_folder_of_another_experiment_is_refused_and_kept(folder, whole, capsys, change, found):
    message = error_of(train.main, options(folder, whole[0], *change.split()), capsys)
    assert found in message and "last.pt: from a different experiment" in message
    assert ("choose another --out or --name, " if "mit_nano" in message else "choose another --out, ") in message
    assert differing(*whole) == []


def test_other_classes_are_refused_and_another_folder_is_noted(folder, whole, tmp_path, capsys):
    copy = shutil.copytree(folder, tmp_path / "copy")
    run(options(copy, whole[0]))
    assert f"NOTE: {whole[0]}/folder/teacher-deeplabv3_resnet10/last.pt was trained on --data {folder}: if" in \
        capsys.readouterr().out
    lines = (copy / "classes.txt").read_text().splitlines()
    (copy / "classes.txt").write_text("\n".join(lines[::-1]) + "\n")
    message = error_of(train.main, options(copy, whole[0]), capsys)
    assert "teacher-deeplabv3_resnet10/last.pt: from a different experiment: names or order of the classes" in message
    assert differing(*whole) == []


# ---------------------------------------------------------------- trouble on the way

@pytest.mark.parametrize("loss, shown", ((lambda V_S, V_T: V_S.sum() * torch.nan, "pc nan"),
                                         (lambda V_S, V_T: (0 * V_S).sum().sqrt(), "pc 0")), ids=("loss", "gradient"))
def test_what_is_not_finite_stops_the_run_with_its_terms_and_keeps_the_checkpoint(
        folder, tmp_path, whole, monkeypatch, capsys, loss, shown):
    argv = options(folder, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_until(9, argv)
    path = tmp_path / "folder" / "c2vkd-mit_nano-seed0" / "last.pt"
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(losses, "patch_loss", loss)
        message = error_of(train.main, argv, capsys)
    for word in ("student, step 2 of seed 0", "pdd ", "gb ", shown, "lc ", "nothing of it was saved", "lower --lr"):
        assert word in message
    assert path.read_bytes() == before
    run(argv)
    assert differing(tmp_path, whole[1]) == []


@pytest.mark.parametrize("end", (partial(os._exit, 1), partial(signal.raise_signal, signal.SIGKILL)), ids=("exit", "kill"))
def test_a_loader_process_that_dies_ends_the_run_with_one_line(folder, tmp_path, end):
    process = start(options(folder, tmp_path / "runs", "--workers", 2), tmp_path / "log", partial(lose_the_loader, end))
    assert finish(process) == 2
    text = (tmp_path / "log").read_text()
    assert text.count("error: a loader process died (out of memory?): run the same command again with fewer --workers") == 1
    assert "RuntimeError" not in text  # the other loader process may show that it lost its neighbour


def test_a_fault_met_by_a_loader_process_is_one_clean_line(folder, tmp_path, capsys):
    bad = put_folder(tmp_path / "data", 2)
    (bad / "labels" / "train" / "1.png").write_bytes(b"")
    message = error_of(train.main, options(bad, tmp_path, "--workers", 1), capsys)
    assert message.startswith(f"{bad}/labels/train/1.png: truncated or not an image") and message.endswith("get it again")


@pytest.mark.parametrize("place", ("fsync", "file size"))
def test_a_full_disk_is_one_line_and_the_run_continues_once_there_is_space(folder, tmp_path, whole, monkeypatch, capsys, place):
    argv = options(folder, tmp_path / "runs")
    with pytest.raises(KeyboardInterrupt):
        run_until(2, argv)
    before = (tmp_path / "runs" / "folder" / "teacher-deeplabv3_resnet10" / "last.pt").read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if place == "file size":  # the system itself refuses, halfway through torch.save
        assert finish(start(argv, tmp_path / "log", partial(no_file_above, 100_000))) == 2
        message = (tmp_path / "log").read_text().splitlines()[-1]
    else:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            message = error_of(train.main, argv, capsys)
        assert "No space left on device" in message
    assert f"{tmp_path}/runs/folder/teacher-deeplabv3_resnet10/" in message and "free some space" in message
    assert (tmp_path / "runs" / "folder" / "teacher-deeplabv3_resnet10" / "last.pt").read_bytes() == before
    assert not list(tmp_path.rglob("*.part"))
    run(argv)
    assert differing(tmp_path / "runs", whole[1]) == []


def test_an_error_of_torch_while_saving_is_not_taken_for_a_full_disk(folder, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:603] unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", broken)
    monkeypatch.setattr(sys, "argv", ["train.py", *options(folder, tmp_path, "--teacher-steps", 1)])
    with pytest.raises(RuntimeError, match="enforce fail"):
        data.command(train.main)
    assert not list(tmp_path.rglob("*.pt*"))


def test_images_smaller_than_the_crop_are_padded_and_trained_on(tmp_path):
    small = put_folder(tmp_path / "data", 4, (16, 40))
    run(options(small, tmp_path, "--crop", 64, "--teacher-steps", 1, "--pool-steps", 1, "--steps", 1))
    state = torch.load(tmp_path / "folder" / "c2vkd-mit_nano-seed0" / "last.pt")
    assert all(v.isfinite().all() for v in state["module"].values())


# ---------------------------------------------------------------- bad input

def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[:len(content) // 2])


def checkpoint(name="mit_nano", classes=3, holds=None):
    """Puts a finished checkpoint called `name`, with the tensors of `holds`, into the data folder."""
    def put(d):
        of_student = (holds or name) in student.VARIANTS
        model = (student.Student if of_student else teacher.Teacher)(holds or name, classes)
        module = {"student." * of_student + k: v for k, v in model.state_dict().items()}
        torch.save({"name": name, "classes": ["road", "sky", "car", "tree"][:classes], "palette": [[0, 0, 0]] * classes, "base": 32,
                    "window": 32, "dataset": "folder", "data": str(d), "step": 1, "module": module,
                    "stage_conditions": {"teacher_steps": 1}}, d / "x.pt")
    return put


def plain_teacher(name, classes):
    """Puts torchvision's own state dict of a network into the data folder."""
    return lambda d: torch.save(teacher.TEACHERS[name].build(classes).state_dict(), d / "x.pt")


BAD = {  # what: (how it is made in the data folder d, options, what the message holds)
    "no data folder": (None, "--data {d}/nowhere", "{d}/nowhere: no such folder; give --data"),
    "missing label": (lambda d: (d / "labels/train/1.png").unlink(), "", "{d}/labels/train/1.png: no such file; restore it"),
    "truncated JPEG": (lambda d: cut(d / "images/train/0.jpg"), "", "{d}/images/train/0.jpg: truncated|get it again"),
    "crop below 32": (None, "--crop 31", "--crop: must be at least 32"),
    "batch of one": (None, "--batch-size 1", "--batch-size: must be at least 2"),
    "no steps": (None, "--steps 0", "--steps: must be at least 1"),
    "negative seed": (None, "--seed -1", "--seed: must be at least 0"),
    "seed beyond 32 bits": (None, f"--seed {2 ** 32}", f"--seed: must be at least 0 and below {2 ** 32}"),
    "name that leaves the folder": (None, "--name ..", "--name ..: leaves the folder of the runs"),
    "weights without a student": (None, "--method teacher --weights gb=1", "--weights: the teacher's training has no"),
    "negative workers": (None, "--workers -1", "--workers: must be at least 0"),
    "validation every 0 steps": (None, "--val-every 0", "--val-every: must be at least 1"),
    "rate 0": (None, "--lr 0", "--lr: must be at least"),
    "rate nan": (None, "--teacher-lr nan", "--teacher-lr: must be at least"),
    "unknown term": (None, "--weights xx=1", "--weights xx=1: c2vkd takes pdd=NUMBER"),
    "term of another method": (None, "--method kd --weights gb=1", "--weights gb=1: kd takes ce=NUMBER kd=NUMBER"),
    "weight that is no number": (None, "--weights gb=much", "--weights gb=much: c2vkd takes pdd=NUMBER"),
    "weight nan": (None, "--weights gb=nan", "--weights gb=nan: c2vkd takes pdd=NUMBER"),
    "no GPU": (None, "--gpus 1", "--gpus 1: 0 CUDA devices found; use --gpus 0"),
    "VOC's teacher on other data": (None, "--teacher-weights voc", "--teacher-weights voc:|use imagenet, none or a FILE"),
    "no ImageNet weights for the teacher": (None, "--teacher-weights imagenet",
                                            "deeplabv3_resnet10 has no published weights: use"),
    "no ImageNet weights for the student": (None, "--student-weights imagenet",
                                            "mit_nano has no published ImageNet weights: use"),
    "missing student weights": (None, "--student-weights {d}/no.pt", "{d}/no.pt: no such file; give"),
    "student weights of another network": (lambda d: torch.save({"w": torch.zeros(1)}, d / "x.pt"), "--student-weights {d}/x.pt",
                                           "{d}/x.pt: not the encoder of mit_nano|give --student the network"),
    "student weights in a checkpoint": (checkpoint(), "--student-weights {d}/x.pt", "{d}/x.pt: not a plain state dict"),
    "missing teacher": (None, "--teacher-weights {d}/no.pt", "{d}/no.pt: no such file; give"),
    "teacher of another architecture": (checkpoint(), "--teacher-weights {d}/x.pt", "{d}/x.pt: holds mit_nano|give --teacher"),
    "teacher of other classes": (checkpoint("deeplabv3_resnet10", 4), "--teacher-weights {d}/x.pt",
                                 "{d}/x.pt: holds deeplabv3_resnet10 with 4 classes|the right checkpoint"),
    "teacher whose tensors do not fit": (checkpoint("deeplabv3_resnet10", holds="mit_nano"),
                                         "--teacher-weights {d}/x.pt", "{d}/x.pt: not deeplabv3_resnet10: "),
    "plain teacher of other classes": (plain_teacher("deeplabv3_resnet10", 4), "--teacher-weights {d}/x.pt",
                                       "{d}/x.pt: not deeplabv3_resnet10 with the classes of this data set|classifier"),
    "plain teacher of another architecture": (plain_teacher("deeplabv3_mobilenet_v3_large", 3), "--teacher-weights {d}/x.pt",
                                              "{d}/x.pt: not deeplabv3_resnet10|give --teacher the network of the file"),
    "unknown option": (None, "--compile", "unrecognized arguments: --compile"),
    "unknown recipe": (None, "--recipe tiny", "argument --recipe: invalid choice: 'tiny'"),
    "recipe of another data set": (None, "--dataset shapes --recipe small", "--recipe small: shapes has one recipe"),
    "CLIP with a small teacher": (None, "--clip {d}/no.pt", "--clip needs a ResNet teacher"),
    "output below a file": (None, "--out {d}/classes.txt", "{d}/classes.txt/folder|check the path"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line_that_names_it_and_the_remedy(tmp_path, monkeypatch, capsys, what):
    make, line, words = BAD[what]
    d = put_folder(tmp_path / "data", 2)
    if make:
        make(d)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    few = ("--teacher-steps", 1, "--pool-steps", 1, "--steps", 1)
    argv = line.format(d=d).split()
    message = error_of(train.main, options(d, tmp_path / "runs", *few, *argv), capsys)
    for word in words.format(d=d).split("|"):
        assert word in message


def clip(path, **shapes):
    torch.save({f"visual.attnpool.{k}": torch.zeros(v) for k, v in shapes.items()}, path)


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated, OpenAI's file is older
@pytest.mark.parametrize("make, channels, found", (
    (lambda p: None, 2048, "no such file; give --clip"),
    (lambda p: p.write_bytes(b"no checkpoint"), 2048, "neither a plain state dict nor OpenAI's RN101.pt"),
    (lambda p: torch.jit.save(torch.jit.script(nn.Linear(1, 1)), p), 2048, "nor OpenAI's RN101.pt (sha256"),
    (lambda p: torch.save({"weight": torch.zeros(1)}, p), 2048, "not CLIP RN101"),
    (lambda p: torch.save([torch.zeros(1)], p), 2048, "not CLIP RN101"),
    (lambda p: torch.save({1: 2}, p), 2048, "not CLIP RN101"),
    (lambda p: clip(p, positional_embedding=(50, 2048), **{"c_proj.weight": (1024, 2048)}), 2048, "not CLIP RN101"),
    (lambda p: clip(p, positional_embedding=(50, 2048)), 960, "--clip needs a ResNet teacher")),
    ids=("missing", "no checkpoint", "TorchScript", "no pool", "list", "no names", "RN50", "MobileNet"))
def test_a_file_that_is_not_clip_rn101_is_refused(tmp_path, make, channels, found):
    make(tmp_path / "RN101.pt")
    with pytest.raises(InputError) as e:
        teacher.load_clip_pool(tmp_path / "RN101.pt", channels, grid=1)
    assert found in str(e.value) and "\n" not in str(e.value)
    assert channels == 960 or str(e.value).startswith(f"{tmp_path}/RN101.pt: ")
