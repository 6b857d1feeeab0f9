"""Bad input is one line with a remedy. A run that ends at any moment continues to the same bits."""
import itertools
import multiprocessing
import multiprocessing.forkserver
import os
import random
import shutil
import signal
import sys
from functools import partial

import pytest
import torch

import data
import losses
import teacher
import train
from conftest import (SMALL, TEACHER, bits, differing, error_of, options, put_folder, result,
                      rows_of, run)

pytestmark = pytest.mark.usefixtures("small_teacher")
# children come from a server that imported torch once and never ran it: after a backward pass or
# OpenMP, a fork may hang
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["train", "pytest"])
STUDENT = "c2vkd-mit_nano-seed0"


@pytest.fixture(scope="module", autouse=True)
def server():
    multiprocessing.forkserver.ensure_running()  # it imports while the first tests run


def in_step(number, act, put=setattr):
    """Calls `act` when the run's step of this number begins, counted over all stages."""
    steps, schedule = itertools.count(1), train.schedule

    def acting(*args, **kwargs):
        if next(steps) == number:
            act()
        return schedule(*args, **kwargs)

    put(train, "schedule", acting)


def run_until(step, argv):
    """The run is asked to stop during its step of this number."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Stop, "asked", False)
        in_step(step, partial(setattr, train.Stop, "asked", True), patch.setattr)
        run(argv)


@pytest.fixture(scope="module")
def whole(folder, small_teacher, tmp_path_factory):
    """The uninterrupted run: its folder and its result."""
    out = tmp_path_factory.mktemp("whole")
    run(options(folder, out))
    return out, result(out)


def cut(path):
    path.write_bytes(path.read_bytes()[:-200])


# ---------------------------------------------------------------- children

def child(argv, log, trouble):
    with open(log, "w") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)  # whatever a shell in the background ignores
    torch.set_num_threads(1)
    # loader processes get the changes below
    multiprocessing.set_start_method("fork", force=True)
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


def send_to_all(number, step, end_loaders=False):
    """A signal to every process, those of the loader too, as clusters and consoles send it."""
    os.setsid()

    def send():
        os.killpg(os.getpid(), number)
        if number == signal.SIGTERM:  # torchrun passes it on once more
            os.killpg(os.getpid(), number)
        if end_loaders:
            for process in multiprocessing.active_children():
                process.kill()

    in_step(step, send)


def die_in_step(number, seconds):
    train.Run.SAVE_SECONDS = -1  # one after each row of the log
    # its signal ends the process
    in_step(number, lambda: signal.setitimer(signal.ITIMER_REAL, seconds))


def die_halfway_through_write(number):
    train.Run.SAVE_SECONDS = -1  # one after each row of the log
    writes, fsync = itertools.count(1), os.fsync

    def dying(fd):
        if next(writes) == number:
            os.ftruncate(fd, os.fstat(fd).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(fd)

    os.fsync = dying


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


def test_the_same_seed_gives_the_same_bits_with_a_worker_and_another_seed_another_student(
        folder, tmp_path, whole):
    run(options(folder, tmp_path, "--workers", 1))
    assert differing(tmp_path, whole[1]) == []
    run(options(folder, tmp_path, "--seed", 1))
    students = (tmp_path / f"folder/c2vkd-mit_nano-seed{seed}/last.pt" for seed in (0, 1))
    first, second = (bits(torch.load(path))["module"] for path in students)
    assert first.keys() == second.keys() and first != second
    assert differing(tmp_path / "folder" / TEACHER, result(whole[0] / "folder" / TEACHER)) == []


def test_checkpoints_are_written_at_validations_and_where_the_last_one_is_old(folder, tmp_path,
                                                                              monkeypatch):
    """Each at the end of a row of the log, from which a run that lost later rows continues."""
    saves, save_tensors = [], train.save_tensors

    def counting(path, content):
        saves.append((path.parent.name, content["step"]))
        save_tensors(path, content)

    monkeypatch.setattr(train, "save_tensors", counting)
    few = ("--method", "teacher", "--teacher-steps", 6, "--val-every", 4, "--log-every", 2)
    run(options(folder, tmp_path / "rare", *few))
    assert saves == [(TEACHER, 4), (TEACHER, 6), ("pool", 4)]
    saves.clear()
    monkeypatch.setattr(train.Run, "SAVE_SECONDS", -1)
    run(options(folder, tmp_path / "often", *few))
    assert [step for _, step in saves] == [2, 4, 6, 2, 4]
    assert differing(tmp_path / "often", result(tmp_path / "rare")) == []


def test_a_finished_run_prints_its_table_and_changes_nothing(folder, whole, capsys):
    def written():
        return {path: path.stat().st_mtime_ns for path in whole[0].rglob("log.csv")}

    logs = written()
    run(options(folder, whole[0]))
    # nor written anew: others may read a finished teacher at the same time
    assert len(logs) == 3 and written() == logs
    text = capsys.readouterr().out
    for word in ("student c2vkd", "teacher", "share (mean)", "IoU of each class", "comparison.png"):
        assert word in text
    assert differing(*whole) == []


@pytest.mark.parametrize("number, workers", (
    (signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGHUP, 0)))
def test_a_signal_saves_at_the_next_row_of_the_log_and_ends_with_130(folder, tmp_path, number,
                                                                     workers):
    argv = options(folder, tmp_path / "runs", "--log-every", 2, "--val-every", 4,
                   "--workers", workers)
    assert finish(start(argv, tmp_path / "log", partial(send_to_all, number, 5))) == 130
    message = (tmp_path / "log").read_text().splitlines()[-1]
    assert "pool: stopped and saved at step 2; run the same command again" in message
    run(argv)
    run([word.replace("runs", "whole") for word in argv])
    assert differing(tmp_path / "runs", result(tmp_path / "whole")) == []


def test_a_loader_that_dies_while_the_end_is_asked_for_loses_no_step(folder, tmp_path):
    argv = options(folder, tmp_path / "runs", "--method", "ce", "--steps", 20, "--log-every", 20,
                   "--val-every", 20, "--workers", 1)
    trouble = partial(send_to_all, signal.SIGTERM, 6, end_loaders=True)
    assert finish(start(argv, tmp_path / "log", trouble)) == 130
    path = tmp_path / "runs/folder/ce-mit_nano-seed0/last.pt"
    step = torch.load(path)["step"]
    message = (tmp_path / "log").read_text().splitlines()[-1]
    assert f"student: stopped and saved at step {step}" in message and 6 <= step < 20
    run(argv)
    run([word.replace("runs", "whole") for word in argv])
    other = torch.load(str(path).replace("runs", "whole"))
    assert bits(torch.load(path)["module"]) == bits(other["module"])
    assert [row["step"] for row in rows_of(path.parent)] == ["0", "20"]


def test_a_run_killed_in_every_validation_writes_each_row_and_score_when_it_continues(
        folder, tmp_path, whole, monkeypatch):
    calls, work = itertools.count(1), train.evaluate

    def dying(*args, **kwargs):
        if next(calls) % 2:
            raise KeyboardInterrupt
        return work(*args, **kwargs)

    monkeypatch.setattr(train, "evaluate", dying)
    for _ in range(5):  # two of the teacher, three of the student
        with pytest.raises(KeyboardInterrupt):
            run(options(folder, tmp_path))
    run(options(folder, tmp_path))
    assert differing(tmp_path, whole[1]) == []


def test_a_chain_of_kills_ends_as_the_whole_run(folder, tmp_path, whole):
    argv = options(folder, tmp_path / "runs")
    chance, kills, saved = random.Random(0), 0, set()
    for attempt in range(16):
        trouble = partial(die_in_step, chance.randint(1, 3), chance.uniform(0.001, 0.1))
        if attempt % 2:
            trouble = partial(die_halfway_through_write, chance.randint(1, 6))
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
    assert kills >= 10 and len(saved) > 1  # in several stages, with something to lose
    run(argv)
    assert differing(tmp_path / "runs", whole[1]) == []


@pytest.mark.parametrize("change, found", (
    ("--lr 0.5", "rate (there 0.001, here 0.5)"),
    ("--steps 6", "steps (there 4, here 6)"),
    (f"--method ce --name {STUDENT}", "weights.ce (there None, here 1.0)"),
    (f"--method ce --name {STUDENT}", "weights.pdd (there 1.0, here None)"),
    (f"--method ce --name {STUDENT}", "method (there c2vkd, here ce)"),
    (f"--seed 1 --name {STUDENT}", "seed (there 0, here 1)"),
    ("--weights gb=2", "weights.gb (there 1.0, here 2.0)"),
    (f"--student mit_b0 --name {STUDENT}", "network (there mit_nano, here mit_b0)")))
def test_a_folder_of_another_student_is_refused_with_the_differences_and_kept(
        folder, whole, capsys, change, found):
    message = error_of(train.main, options(folder, whole[0], *change.split()), capsys)
    assert f"{STUDENT}/last.pt: from a different experiment: " in message and found in message
    assert message.endswith("repeat that run's options, or choose another --out or --name")
    assert differing(*whole) == []


def test_a_run_of_an_older_version_is_one_line(folder, whole, tmp_path, capsys):
    out = shutil.copytree(whole[0], tmp_path / "out")
    path = out / "folder" / STUDENT / "last.pt"
    state = torch.load(path)
    del state["stage"]
    torch.save(state, path)
    message = error_of(train.main, options(folder, out), capsys)
    assert message.startswith(f"{path}: written by an older version") and "--out" in message


# ---------------------------------------------------------------- trouble on the way

@pytest.mark.parametrize("loss, shown", (
    (lambda V_S, V_T: V_S.sum() * torch.nan, "pc nan"),
    (lambda V_S, V_T: (0 * V_S).sum().sqrt(), "pc 0")), ids=("loss", "gradient"))
def test_what_is_not_finite_stops_the_run_with_its_terms_and_keeps_the_checkpoint(
        folder, tmp_path, whole, monkeypatch, capsys, loss, shown):
    argv = options(folder, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_until(9, argv)
    path = tmp_path / "folder" / STUDENT / "last.pt"
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(losses, "patch_loss", loss)
        message = error_of(train.main, argv, capsys)
    for word in ("student, step 2 of seed 0", "pdd ", "gb ", shown, "lc ",
                 "nothing of it was saved"):
        assert word in message
    assert message.endswith("; lower --lr")
    assert path.read_bytes() == before
    run(argv)
    assert differing(tmp_path, whole[1]) == []


def test_a_fault_met_by_a_loader_process_is_one_clean_line(folder, tmp_path, capsys, monkeypatch):
    bad = put_folder(tmp_path / "data", 2)
    cut(bad / "images/train/1.jpg")
    monkeypatch.setattr(train, "check", lambda *_: None)  # as if it was damaged later
    message = error_of(train.main, options(bad, tmp_path, "--workers", 1), capsys)
    assert message.startswith(f"{bad}/images/train/1.jpg: truncated or not an image")
    assert list(tmp_path.rglob("log.csv"))
    assert message.endswith("get it again")


def test_a_fault_between_two_rows_is_saved_and_the_run_may_go_on_with_rows_at_other_steps(
        folder, tmp_path, monkeypatch):
    bad = put_folder(tmp_path / "data")
    argv = options(bad, tmp_path / "runs", "--method", "ce", "--steps", 20, "--log-every", 20,
                   "--val-every", 20)
    cut(bad / "images/train/1.jpg")
    monkeypatch.setattr(train, "check", lambda *_: None)  # as if it was damaged later
    with pytest.raises(data.InputError, match="1.jpg: truncated"):
        run(argv)
    path = tmp_path / "runs/folder/ce-mit_nano-seed0"
    assert 0 < torch.load(path / "last.pt")["step"] < 20
    shutil.copy(folder / "images/train/1.jpg", bad / "images/train")
    run([*argv, "--val-every", "1"])
    run(options(folder, tmp_path / "whole", *argv[argv.index("--method"):]))
    other = tmp_path / "whole/folder/ce-mit_nano-seed0/last.pt"
    assert bits(torch.load(path / "last.pt")["module"]) == bits(torch.load(other)["module"])


# ---------------------------------------------------------------- bad input

# of a finished teacher, without its tensors
GIVEN = {"name": "deeplabv3_resnet10", "classes": ["road", "sky", "car"], "module": {}, "step": 1,
         "stage": {"steps": 1}}


def save(content):
    return lambda d: torch.save(content, d / "x.pt")


TEACH, LEARN = "--teacher-weights {d}/x.pt", "--student-weights {d}/x.pt"
BAD = {  # what: (how it is made in the data folder d, options, what the message holds)
    "truncated picture in val": (lambda d: cut(d / "images/val/1.jpg"), "",
                                 "{d}/images/val/1.jpg: truncated or not an image|get it again"),
    "missing student weights": (None, LEARN, "{d}/x.pt: No such file"),
    "folder as student weights": (None, "--student-weights {d}/images",
                                  "{d}/images: Is a directory"),
    "student weights of another network": (save({"w": torch.zeros(1)}), LEARN,
                                           "{d}/x.pt: not the encoder of mit_nano|give --student"),
    "no last.pt as teacher": (save({"module": {}}), TEACH, "{d}/x.pt: not a last.pt of this"),
    "teacher of other classes": (save(GIVEN | {"classes": ["road", "sky", "tree"]}), TEACH,
                                 "{d}/x.pt: its classes are not those of the data|tree"),
    "teacher whose tensors do not fit": (save(GIVEN), TEACH, "{d}/x.pt: not deeplabv3_resnet10: "),
    "backbone of another architecture": (
        save({"conv1.weight": torch.zeros(64, 3, 7, 7)}), TEACH,
        "{d}/x.pt: not the backbone of deeplabv3_resnet10|give --teacher the network"),
    "CLIP with a small teacher": (save({}), "--clip {d}/x.pt", "--clip needs a ResNet teacher"),
    "output below a file": (None, "--out {d}/classes.txt", "{d}/classes.txt/folder"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line_before_the_first_step(tmp_path, monkeypatch, capsys, what):
    make, line, words = BAD[what]
    d = put_folder(tmp_path / "data", 2)
    if make:
        make(d)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    few = "--teacher-steps", 1, "--pool-steps", 1, "--steps", 1
    argv = options(d, tmp_path / "runs", *few, *line.format(d=d).split())
    message = error_of(train.main, argv, capsys)
    for word in words.format(d=d).split("|"):
        assert word in message
    assert not list(tmp_path.rglob("log.csv"))  # it came before the first step
