"""Runs a script as `python SCRIPT ...` does, in a process of its own with its own signals, files and exit status, but
forked from a process that has PyTorch imported: a start takes a tenth of a second instead of five."""
import atexit
import multiprocessing
import os
import pathlib
import resource
import runpy
import signal
import sys
import tempfile
import time

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["torch.utils.tensorboard", "torchvision.utils", "torchvision.datasets", "tyro", "tqdm",
                                "matplotlib.pyplot", "torch_fidelity", "torch._dynamo", "launcher"])


def main(script, arguments, folder, file_limit, environment, output, closed):
    os.environ.update({"CUDA_VISIBLE_DEVICES": "", **environment})  # what is promised bit for bit is of the CPU
    for number in (signal.SIGINT, signal.SIGHUP):  # ignored where the tests run as a background job, or under nohup
        signal.signal(number, signal.SIG_DFL)
    encoding = os.environ.get("PYTHONIOENCODING", "utf-8")
    for number, name in ((1, "out"), (2, "err")):
        descriptor = os.open(output or os.path.join(folder, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False, encoding=encoding) for n in (1, 2))
    if closed:  # what Python makes of a shell's >&- 2>&-
        os.closerange(1, 3)
        sys.stdout = sys.stderr = None
    if file_limit:  # no file may grow beyond this: what a full disk does
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.argv = [str(ROOT / script), *arguments]
    sys.path[0:0] = [str(ROOT)]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing would end without


class Process:
    """The part of subprocess.Popen's interface that the tests use. `script`: a module or its file's name; `output`: a
    pipe's or a terminal's path, in place of the files that `read` reads; `closed`: there is none."""

    def __init__(self, script, *arguments, file_limit=0, environment=None, output=None, closed=False):
        self.folder = tempfile.TemporaryDirectory()
        arguments = [str(a) for a in arguments]
        script = script if isinstance(script, str) else f"{script.SCRIPT}.py"
        self.process = context.Process(target=main, daemon=True, args=(script, arguments, self.folder.name, file_limit,
                                                                       environment or {}, output, closed))
        self.process.start()

    def poll(self):
        return self.process.exitcode

    returncode = property(poll)

    def send_signal(self, number):
        if self.process.is_alive():
            os.kill(self.process.pid, number)

    def communicate(self, timeout=240):
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(self.read("err"))
        return self.read("out"), self.read("err")

    def read(self, name):
        path = pathlib.Path(self.folder.name, name)
        return path.read_text(errors="replace") if path.exists() else ""


def run(script, *arguments, status=0, **kwargs):
    """Run to the end; what it wrote to stdout and stderr. The exit status must be `status`."""
    process = Process(script, *arguments, **kwargs)
    out, err = process.communicate()
    assert process.returncode == status, err
    return out, err


def torchrun_environment(count, store=None, attempt=0):
    """The store that torchrun keeps for its processes, also when it starts them again, and the variables that it sets
    for each."""
    store = store or torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
              "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": str(attempt),
              "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return store, [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def start_together(count, script, *arguments, present=None, own=(), store=None, attempt=0, environment=(), **kwargs):
    """The processes that `torchrun --nproc-per-node COUNT SCRIPT ...` starts.
    present: the ranks that are started, by default all; own: further arguments of the last."""
    store, environments = torchrun_environment(count, store, attempt)
    processes = []
    for rank in range(count) if present is None else present:
        more = own if rank == count - 1 else ()
        processes.append(Process(script, *arguments, *more, environment={**environments[rank], **dict(environment)},
                                 **kwargs))
        processes[-1].store = store  # as long as one of them is there
    return processes


def wait_for(condition, process, seconds=120):
    """Wait until condition() is true, while the process runs."""
    start = time.time()
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.time() < start + seconds, "no progress"
        time.sleep(0.005)
