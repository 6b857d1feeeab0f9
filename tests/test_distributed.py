"""Two processes are one: gradients, scores, stream and files. And who starts them."""
import copy
import multiprocessing
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

import data
import losses
import train
from conftest import DIGESTS, TEACHER, machine_of, options, put_folder
from data import InputError
from evaluate import evaluate
from student import Student
from teacher import AttentionPool, Teacher

multiprocessing.set_forkserver_preload(["train"])  # torch is imported once, for all children

# without those whose sums run over the pixels of one process
EXACT = [(m, "forward") for m in losses.METHODS if m not in ("dist", "cirkd")]
EXACT += [("c2vkd", "reverse")]


def prepare(argv, rank=0, processes=1):
    """Options and Machine of one process of several."""
    args = train.parse_options([*argv, "--batch-size", "4"])
    return args, machine_of(args, rank, processes)


def child(rank, processes, folder, task, argv, rest):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank,
                            world_size=processes)
    torch.save(task(*prepare(argv, rank, processes), *rest), folder / f"{rank}.pt")
    dist.destroy_process_group()


def two(folder, task, argv, *rest):
    """What `task(args, machine, *rest)` returns in each of two processes."""
    children = start_processes(child, (2, folder, task, argv, rest), 2, join=False,
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
    """Of a step of `distil`, for every method: its gradients, its terms, norms and cosines."""
    torch.set_default_dtype(torch.float64)
    try:
        return gradients_in_float64(*given)
    finally:
        torch.set_default_dtype(torch.float32)


def gradients_in_float64(args, machine, folder, images, labels):
    torch.manual_seed(1)
    pictures, found = data.open_dataset("folder", folder), {}
    teacher, pool = Teacher(args.teacher, 3).freeze(), AttentionPool(512, 1).requires_grad_(False)
    share = len(images) // machine.processes
    mine = slice(machine.rank * share, (machine.rank + 1) * share)
    outputs = teacher(images[mine])
    teacher.forward = lambda _: outputs  # once is enough
    student = Student(args.student, 3)

    class Recording(train.Log):
        def average_row(self, step, optimizer, module):
            gradient = torch.cat([p.grad.flatten() for p in module.parameters()])
            terms = dict(zip(self.names, self.values[0].tolist()))
            found[name] = gradient, terms, self.gradients[0]

        def write(self, step, miou=None):
            pass

    def batches(run, *_, **__):
        for module in modules:
            module.eval()  # no dropout
        yield 1, images[mine], labels[mine]

    class Network(train.StudentWithHeads):
        def __init__(self, *rest):
            super().__init__(*rest)
            modules.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Log", Recording)
        patch.setattr(train, "batches", batches)
        patch.setattr(train, "validate", lambda *_: 0.0)
        patch.setattr(train, "StudentWithHeads", Network)
        patch.setattr(train, "Student", lambda *_: copy.deepcopy(student))  # drawn once
        for args.method, args.kl in EXACT:
            name, modules = f"{args.method} {args.kl}", []
            args.term_weights = train.term_weights(args)
            args.out = f"{args.out}-"  # a folder without a checkpoint
            needs = losses.METHODS[args.method].needs
            run = train.Plan(args, machine, pictures, DIGESTS).student_run(args.method)
            train.distil(run, "none", teacher if "teacher" in needs else None,
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
    alone = gradients(*prepare(argv), folder, images, labels)
    return alone, two(out, gradients, options(folder, out / "two", "--steps", 1), folder, images,
                      labels)


@pytest.mark.parametrize("name", [" ".join(m) for m in EXACT])
def test_the_gradient_of_two_processes_is_that_of_one(both, name):
    alone, together = both
    expected, terms, measured = alone[name]
    scale = expected.abs().max()
    assert scale > 0 and terms.keys() == losses.METHODS[name.split()[0]].weights.keys()
    for found, _, found_measured in (t[name] for t in together):
        assert (found - expected).abs().max() < 1e-9 * scale
        for pair, wanted in zip(found_measured, measured, strict=True):  # norm and cosine
            assert pair == pytest.approx(wanted, rel=1e-9, abs=1e-9)
    for term in terms:  # what the log shows: the mean over processes
        shown = [t[name][1][term] for t in together]
        assert sum(shown) / 2 == pytest.approx(terms[term], rel=1e-5)


# ---------------------------------------------------------------- evaluation and the data stream

def matrices(args, machine, folder):
    torch.manual_seed(0)
    model = Student("mit_nano", 3).eval()
    pictures = data.open_dataset("folder", folder)
    counts = []
    for n in (5, 4, 1):
        pictures.pairs["val"] = pictures.pairs["train"][:n]
        counts.append(evaluate(model, pictures, "val", 32, 32, machine.device))
    return counts


def test_evaluation_counts_every_image_once(folder, tmp_path):
    argv = options(folder, tmp_path)
    alone = matrices(*prepare(argv), folder)
    pictures = data.open_dataset("folder", folder)
    counts = [(pictures.read("train", i)[1] != data.IGNORE).sum() for i in range(5)]
    assert alone[0].sum() == sum(counts)
    for found in two(tmp_path, matrices, argv, folder):
        assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))


@pytest.mark.parametrize("unlabelled", [False, True])
def test_the_processes_share_one_stream(folder, tmp_path, unlabelled):
    pictures = data.open_dataset("folder", folder)

    def batches(*who):
        args, machine = prepare(options(folder, tmp_path, "--teacher-steps", 6), *who)
        run = train.Plan(args, machine, pictures, DIGESTS).teacher_run()
        found = list(train.batches(run, 1, unlabelled))  # continued
        assert [step for step, *_ in found] == [2, 3, 4, 5, 6]
        return [batch for _, *batch in found]

    alone, *shares = batches(), batches(0, 2), batches(1, 2)
    assert len({image.sum().item() for images, _ in alone for image in images}) == 20
    for (images, labels), *parts in zip(alone, *shares, strict=True):
        assert torch.equal(torch.cat([p[0] for p in parts]), images)
        assert torch.equal(torch.cat([p[1] for p in parts]), labels)
    ignored = sum((labels == data.IGNORE).all((1, 2)).sum().item() for _, labels in alone)
    assert (ignored > 0) == unlabelled


# ---------------------------------------------------------------- whole runs

FEW = "--teacher-steps", 2, "--pool-steps", 2, "--steps", 2, "--val-every", 9


def whole_run(args, machine):
    """Train. Returns the files that this process wrote or renamed."""
    written = set()

    def watch(event, detail):
        opened = event == "open" and isinstance(detail[0], (str, os.PathLike))
        if opened and detail[2] & (os.O_WRONLY | os.O_RDWR) or event == "os.rename":
            written.add(os.path.basename(detail[0]))

    sys.addaudithook(watch)
    train.train(args, machine)
    return sorted(written)


def test_one_process_writes_and_leaves_the_files_of_a_single_run(folder, tmp_path):
    whole_run(*prepare(options(folder, tmp_path / "one", *FEW)))
    first, second = two(tmp_path, whole_run, options(folder, tmp_path / "two", *FEW))
    assert {"last.pt.part", "log.csv", "comparison.png", "curves.png"} <= set(first)
    assert [f for f in second if f.endswith((".pt", ".csv", ".png", ".part"))] == []
    one, other = (sorted(str(p.relative_to(tmp_path / n)) for p in (tmp_path / n).rglob("*"))
                  for n in ("one", "two"))
    assert one == other
    assert sum(p.endswith("results-val.json") for p in other) == 2  # teacher's and student's


def nan_in_the_second(args, machine):
    step, cross_entropy = iter(range(100)), train.cross_entropy

    def broken(*rest):
        bad = machine.rank == 1 and next(step) == 1
        return cross_entropy(*rest) * (torch.nan if bad else 1)

    train.cross_entropy = broken
    with pytest.raises(InputError, match="teacher, step 2 of seed 0: a loss.* not finite"):
        train.train(args, machine)
    return os.path.exists(f"{args.out}/folder/{TEACHER}/last.pt")


def test_what_is_not_finite_in_one_process_stops_all_before_anything_is_saved(folder, tmp_path):
    argv = options(folder, tmp_path / "out", *FEW, "--log-every", 2)
    assert two(tmp_path, nan_in_the_second, argv) == [False, False]


def run_without_seeing(args, machine):
    """Train where process 1 sees no checkpoint, as on a slow network disk: where it continued."""
    continued, exists, load = [], Path.exists, train.Checkpoint.load

    def loading(checkpoint):
        load(checkpoint)
        continued.append((checkpoint.run.stage.stage, checkpoint.step))

    def unseen(path):
        return exists(path) and (machine.rank == 0 or path.name != "last.pt")

    train.Checkpoint.load, Path.exists = loading, unseen
    train.train(args, machine)
    return continued


def test_process_0_alone_looks_for_checkpoints_and_tells_the_other(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train.Stop, "asked", True)
    for stage in ("teacher", "teacher", "pool", "pool", "student"):
        with pytest.raises(KeyboardInterrupt, match=f"{stage}: stopped and saved"):
            train.train(*prepare(options(folder, tmp_path / "out", *FEW)))
    found = two(tmp_path, run_without_seeing, options(folder, tmp_path / "out", *FEW))
    assert found == [[("teacher", 2), ("pool", 2), ("student", 1)]] * 2


# ---------------------------------------------------------------- who starts the processes

@pytest.fixture
def started(monkeypatch):
    """train.main without its work: what it asked for."""
    calls = SimpleNamespace(call=[], group=[], listen=0, machine=None)

    def replaced(program, command):
        calls.call.append((program, command))
        raise SystemExit(3)  # the process is theirs from here on

    def listen():
        calls.listen += 1

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # process 3 has none
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(os, "execv", replaced)
    monkeypatch.setattr(dist, "init_process_group", lambda name, **_: calls.group.append(name))
    monkeypatch.setattr(train, "set_torch_flags", lambda *_: None)
    monkeypatch.setattr(train, "train", lambda _, machine: setattr(calls, "machine", machine))
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
    assert started.machine is None and started.group == []


@pytest.mark.parametrize("rank, gpus, backend, device", [
    (None, 0, [], "cpu"), (None, 1, [], "cuda:0"), (3, 0, ["gloo"], "cpu"),
    (3, 2, ["nccl"], "cuda:1")])
def test_a_process_finds_its_device_and_its_place(started, monkeypatch, rank, gpus, backend,
                                                  device):
    monkeypatch.setattr(sys, "argv", ["train.py", "--gpus", str(gpus)])
    if rank:
        for name, value in dict(RANK=rank, WORLD_SIZE=4, LOCAL_RANK=1).items():
            monkeypatch.setenv(name, str(value))
    train.main()
    assert started.call == [] and started.group == backend and started.listen == 1
    found = started.machine
    wanted = (rank, 4) if rank else (0, 1)
    assert (found.rank, found.processes) == wanted and str(found.device) == device
