"""Runs a script as `python SCRIPT ...` does, in a process of its own with its own signals, files and exit status, but
forked from a process that has PyTorch imported: a start takes a tenth of a second instead of five."""
import multiprocessing
import os
import pathlib
import resource
import runpy
import sys
import tempfile

os.environ["OMP_NUM_THREADS"] = "1"  # networks this small only lose by waiting for each other
ROOT = pathlib.Path(__file__).resolve().parent.parent
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["torch.utils.tensorboard", "torchvision.utils", "torchvision.datasets", "tyro", "tqdm",
                                "matplotlib.pyplot", "torch_fidelity", "launcher"])


def main(script, arguments, folder, file_limit, environment):
    for number, name in ((1, "out"), (2, "err")):
        descriptor = os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout, sys.stderr = open(1, "w", buffering=1, closefd=False), open(2, "w", buffering=1, closefd=False)
    if file_limit:  # no file may grow beyond this: what a full disk does
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    os.environ.update(environment)
    sys.argv = [str(ROOT / script), *arguments]
    sys.path[0:0] = [str(ROOT)]
    runpy.run_path(sys.argv[0], run_name="__main__")


class Process:
    """The part of subprocess.Popen's interface that the tests use."""

    def __init__(self, script, *arguments, file_limit=0, environment=None):
        self.folder = tempfile.TemporaryDirectory()
        arguments = [str(a) for a in arguments]
        self.process = context.Process(target=main, daemon=True, args=(script, arguments, self.folder.name, file_limit,
                                                                       environment or {}))
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
        return path.read_text() if path.exists() else ""


def run(script, *arguments, status=0, **kwargs):
    """Run to the end; what it wrote to stdout and stderr. The exit status must be `status`."""
    process = Process(script, *arguments, **kwargs)
    out, err = process.communicate()
    assert process.returncode == status, err
    return out, err
