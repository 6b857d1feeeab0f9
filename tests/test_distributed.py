"""Two processes are one: gradients, scores, stream and files. And who starts them."""
import copy
import multiprocessing
import os
import socket
import sys
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

import data
import losses
import train
from conftest import TEACHER, error_of, options, parsed, put_folder
from data import InputError
from evaluate import evaluate
from student import Student
from teacher import AttentionPool, Teacher

multiprocessing.set_forkserver_preload(["train"])  # torch is imported once, for all children

# without those whose sums run over the pixels of one process
OWN = "dist", "cirkd", "c2vkd_multi", "fitnet_multi"
EXACT = [method for method in losses.METHODS if method not in OWN]


def prepare(argv):
    return parsed([*argv, "--batch-size", "4"])


def child(rank, folder, task, argv, rest):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(task(prepare(argv), *rest), folder / f"{rank}.pt")
    dist.destroy_process_group()


def two(folder, task, argv, *rest):
    """What `task(args, *rest)` returns in each of two processes."""
    children = start_processes(child, (folder, task, argv, rest), 2, join=False,
                               start_method="forkserver")
    try:
        assert children.join(120) or children.join(20), "a process hangs"
    finally:
        for process in children.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return put_folder(tmp_path_factory.mktemp("data") / "folder", 8, unlabelled=3)


# ---------------------------------------------------------------- gradients

def gradients(*given):
    """Of a step of `distil`, for every method: its gradients, its terms and their norms."""
    torch.set_default_dtype(torch.float64)
    try:
        return gradients_in_float64(*given)
    finally:
        torch.set_default_dtype(torch.float32)


def gradients_in_float64(args, folder, images, labels):
    torch.manual_seed(1)
    pictures, found = data.open_dataset("folder", folder), {}
    teacher, pool = Teacher(args.teacher, 3).freeze(), AttentionPool(512, 1).requires_grad_(False)
    share = len(images) // train.processes()
    mine = slice(train.rank() * share, (train.rank() + 1) * share)
    outputs = teacher(images[mine])
    teacher.forward = lambda _: outputs  # once is enough
    student, measure = Student(args.student, 3), train.gradient_norms

    def measuring(*rest):
        found[args.method] = [measure(*rest)]
        return found[args.method][0]

    class Recording(train.Log):
        def average(self, step, optimizer, module):
            gradient = torch.cat([p.grad.flatten() for p in module.parameters()])
            terms = dict(zip(self.names, self.values[0].tolist()))
            found[args.method] += gradient, terms

        def write(self, step, result=None):
            pass

    def batches(run, **_):
        run.module.eval()  # no dropout
        yield 1, images[mine], labels[mine]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Log", Recording)
        patch.setattr(train, "gradient_norms", measuring)
        patch.setattr(train.Run, "batches", batches)
        patch.setattr(train.Run, "validate", lambda *_: None)
        patch.setattr(train.Run, "save", lambda *_: None)
        patch.setattr(train, "Student", lambda *_: copy.deepcopy(student))  # drawn once
        for args.method in EXACT:
            args.methods, args.term_weights = [args.method], train.term_weights(args)
            needs = losses.METHODS[args.method].needs
            _, _, (run,) = train.make_runs(args, pictures)
            train.distil(run, teacher if "teacher" in needs else None,
                         pool if "A_l" in needs else None)
    return found


@pytest.fixture(scope="module")
def both(folder, tmp_path_factory):
    """Gradients of one process and of two. Most labelled pixels are in the batch's second half."""
    torch.manual_seed(0)
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    labels = torch.randint(0, 3, (4, 8, 8)).repeat_interleave(4, 1).repeat_interleave(4, 2)
    labels[0] = labels[1, 10:] = labels[3, :3] = data.IGNORE
    valid = (labels != data.IGNORE).flatten(1).sum(1)
    assert 5 * valid[:2].sum() < valid[2:].sum()
    out = tmp_path_factory.mktemp("gradients")
    argv = options(folder, out / "runs", "--steps", 1)
    alone = gradients(prepare(argv), folder, images, labels)
    return alone, two(out, gradients, argv, folder, images, labels)


@pytest.mark.parametrize("method", EXACT)
def test_the_gradient_of_two_processes_is_that_of_one(both, method):
    alone, together = both
    norms, expected, terms = alone[method]
    scale = expected.abs().max()
    assert scale > 0 and terms.keys() == losses.METHODS[method].weights.keys()
    for found_norms, found, _ in (t[method] for t in together):
        assert (found - expected).abs().max() < 1e-9 * scale
        assert found_norms == pytest.approx(norms, rel=1e-9, abs=1e-9) and len(norms) == len(terms)
    for term in terms:  # what the log shows: the mean over processes
        shown = [t[method][2][term] for t in together]
        assert sum(shown) / 2 == pytest.approx(terms[term], rel=1e-5)


# ---------------------------------------------------------------- evaluation and the data stream

def matrices(args, folder):
    torch.manual_seed(0)
    model = Student("mit_nano", 3).eval()
    pictures = data.open_dataset("folder", folder)
    counts = []
    for n in (5, 4, 1):
        pictures.pairs["val"] = pictures.pairs["train"][:n]
        counts.append(evaluate(model, pictures, "val", 32, 32, args.device))
    return counts


def test_evaluation_counts_every_image_once_between_two_processes(folder, tmp_path):
    argv = options(folder, tmp_path)
    alone = matrices(prepare(argv), folder)
    for found in two(tmp_path, matrices, argv, folder):
        assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))


@pytest.mark.parametrize("unlabelled", [False, True])
def test_the_processes_share_one_stream_also_where_it_is_continued(folder, tmp_path, monkeypatch,
                                                                   unlabelled):
    args = prepare(options(folder, tmp_path, "--teacher-steps", 6))
    run, _, _ = train.make_runs(args, data.open_dataset("folder", folder))

    def batches(done, rank, processes):
        monkeypatch.setattr(train, "rank", lambda: rank)
        monkeypatch.setattr(train, "processes", lambda: processes)
        run.step = done
        found = list(run.batches(unlabelled))
        assert [step for step, *_ in found] == list(range(done + 1, 7))
        return [batch for _, *batch in found]

    alone, *shares = batches(0, 0, 1)[1:], batches(1, 0, 2), batches(1, 1, 2)
    assert len({image.sum().item() for images, _ in alone for image in images}) == 20
    for (images, labels), *parts in zip(alone, *shares, strict=True):
        assert torch.equal(torch.cat([p[0] for p in parts]), images)
        assert torch.equal(torch.cat([p[1] for p in parts]), labels)
    ignored = sum((labels == data.IGNORE).all((1, 2)).sum().item() for _, labels in alone)
    assert (ignored > 0) == unlabelled


# ---------------------------------------------------------------- whole runs

FEW = "--teacher-steps", 2, "--pool-steps", 2, "--steps", 2, "--val-every", 9


def whole_run(args):
    """Train. Returns the files that this process wrote or renamed."""
    written = set()

    def watch(event, detail):
        opened = event == "open" and isinstance(detail[0], (str, os.PathLike))
        if opened and detail[2] & (os.O_WRONLY | os.O_RDWR) or event == "os.rename":
            written.add(os.path.basename(detail[0]))

    sys.addaudithook(watch)
    train.train(args)
    return sorted(written)


def test_one_process_writes_and_leaves_the_files_of_a_single_run(folder, tmp_path):
    whole_run(prepare(options(folder, tmp_path / "one", *FEW)))
    first, second = two(tmp_path, whole_run, options(folder, tmp_path / "two", *FEW))
    assert {"last.pt.part", "log.csv.part", "results-val.json.part"} <= set(first)
    assert [f for f in second if f.endswith((".pt", ".csv", ".png", ".part"))] == []
    one, other = (sorted(str(p.relative_to(tmp_path / n)) for p in (tmp_path / n).rglob("*"))
                  for n in ("one", "two"))
    assert one == other
    assert sum(p.endswith("results-val.json") for p in other) == 2  # teacher's and student's


def nan_in_the_second(args):
    step, cross_entropy = iter(range(100)), train.cross_entropy

    def broken(*rest):
        bad = train.rank() == 1 and next(step) == 0
        return cross_entropy(*rest) * (torch.nan if bad else 1)

    train.cross_entropy = broken
    with pytest.raises(InputError, match="teacher, step 1 of seed 0: a loss.* not finite"):
        train.train(args)
    return os.path.exists(f"{args.out}/folder/{TEACHER}/last.pt")


def test_what_is_not_finite_in_one_process_stops_all_before_anything_is_saved(folder, tmp_path):
    argv = options(folder, tmp_path / "out", *FEW, "--log-every", 2)
    assert two(tmp_path, nan_in_the_second, argv) == [False, False]


def stop_asked_of_the_second(args):
    """Train until a signal that process 1 alone gets in its first step, then on. And in one go."""
    def module():
        train.train(args)
        dist.barrier()
        return torch.load(f"{args.out}/folder/{TEACHER}/last.pt")["module"]

    train.Stop.asked = train.rank() == 1
    with pytest.raises(KeyboardInterrupt, match="teacher: stopped and saved at step 1"):
        train.train(args)
    train.Stop.asked = False
    dist.barrier()
    continued, args.out = module(), f"{args.out}-whole"
    return continued, module()


def test_a_signal_to_one_process_stops_both_and_both_continue(folder, tmp_path):
    argv = options(folder, tmp_path / "out", *FEW, "--method", "teacher")
    for continued, whole in two(tmp_path, stop_asked_of_the_second, argv):
        assert all(torch.equal(v, whole[k]) for k, v in continued.items())


# ---------------------------------------------------------------- who starts the processes

@pytest.fixture
def started(monkeypatch):
    """train.main without its work: what it asked for."""
    calls = SimpleNamespace(call=[], group=[], listen=0, device=None)

    def replaced(program, command):
        calls.call.append((program, command))
        raise SystemExit(3)  # the process is theirs from here on

    def listen():
        calls.listen += 1

    def meet(url, timeout):
        assert timeout < timedelta(hours=1)
        yield None, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    def join(backend, store, rank, world_size, **_):
        calls.group.append((backend, rank, world_size))

    for name in train.TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # process 3 has none
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(os, "execv", replaced)
    monkeypatch.setattr(dist, "rendezvous", meet)
    monkeypatch.setattr(dist, "init_process_group", join)
    monkeypatch.setattr(train, "set_torch_flags", lambda *_: None)
    monkeypatch.setattr(train, "train", lambda args: setattr(calls, "device", str(args.device)))
    monkeypatch.setattr(train.Stop, "listen", listen)
    return calls


def test_two_gpus_start_two_processes_with_the_same_options(started, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--gpus", "2", "--seed", "5"])
    with pytest.raises(SystemExit) as stop:
        train.main()
    assert stop.value.code == 3
    (program, command), = started.call
    assert program == command[0] == sys.executable
    assert command[1:] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           "train.py", "--gpus", "2", "--seed", "5"]
    assert started.device is None and started.group == []


@pytest.mark.parametrize("gpus, given, group, device", [
    (0, "", [], "cpu"), (1, "", [], "cuda:0"),
    (0, "RANK=3 LOCAL_RANK=1 WORLD_SIZE=4 MASTER_ADDR=x MASTER_PORT=1", [("gloo", 3, 4)], "cpu"),
    (2, "RANK=3 LOCAL_RANK=1 WORLD_SIZE=4 MASTER_ADDR=x MASTER_PORT=1", [("nccl", 3, 4)], "cuda:1"),
    # of a cluster or a job array, without torchrun
    (1, "RANK=3 LOCAL_RANK=1 WORLD_SIZE=4", [], "cuda:0"),
    (1, "RANK=0 LOCAL_RANK=1 WORLD_SIZE=1 MASTER_ADDR=x MASTER_PORT=1", [], "cuda:0")])
def test_a_process_finds_its_device_and_its_place(started, monkeypatch, gpus, given, group, device):
    monkeypatch.setattr(sys, "argv", ["train.py", "--gpus", str(gpus)])
    for variable in given.split():
        monkeypatch.setenv(*variable.split("="))
    train.main()
    assert started.call == [] and started.group == group and started.listen == 1
    assert started.device == device


def test_processes_that_cannot_meet_are_one_line(monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        here = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=taken.getsockname()[1])
        for name, value in here.items():
            monkeypatch.setenv(name, str(value))
        message = error_of(train.main, ["--gpus", 0], capsys)
    assert message.startswith("process 0 of 2 cannot meet the others at 127.0.0.1: ")
