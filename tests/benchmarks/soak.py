"""Kills, signals, full disks, second processes, many times over: does a run ever lose or alter what it computed?

    python tests/benchmarks/soak.py                              # all scripts: 1,000 kills, 50 of each further kind
    python tests/benchmarks/soak.py gngan_cnn my_gan=gngan_cnn   # some scripts; a fork as FORK=MODEL
    python tests/benchmarks/soak.py gngan_cnn --kinds kill --seed 1 --only 17    # one try again

A try is a small run of a script: it starts, decodes, trains, saves, scores, draws. It is ended at random moments and
begun again by the same command, until it is done. It must then have left what a run of the same script left that
nobody ended, bit for bit: weights, moments, averages, metrics.jsonl, pictures, args.json, TensorBoard's points (but for
rates, and for the grid that a signal leaves of its iteration).

  kill      SIGKILL
  signal    SIGTERM, SIGINT; at times two of them
  disk      a file system of its own is full from such a moment on, but for at most 500 kB, until the run has ended;
            it is mounted by root, or where a user may have namespaces
  pair      a second process goes on in the folder while the first trains; mostly one of them is killed
  data      four processes start on one data folder, never decoded before; one is killed, mostly the one that decodes
  clock     the clock jumps by up to a day, back and forth; kills
  worker    one of a run's processes is killed: of torchrun's two, or of those that gngan_synthetic.py starts

Half of the moments are anywhere in a run's time, half within 50 ms of a change of its files.
Lost: the checkpoint cannot be read, or is older than one before. Altered: something differs at the end. Stuck: a
process does not end, or not as it should, or does not go on. Of a try with a fault, files and output are kept.
Moments are drawn from --seed. Where they hit depends on the machine's speed, too: --only may not repeat a fault.
"""
import argparse
import collections
import concurrent.futures
import contextlib
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import pathlib
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/helpers")]
import make_data
import torch
from compare import flat
from conftest import SCRIPTS
from launcher import Process, start_together, wait_for
from make_runs import TINY, UNLIKE, events
from PIL import Image
from tqdm import tqdm

import common

PATIENCE = 120.0  # seconds in which a process must end that nobody ends
IMAGES = ["--device", "cpu", "--dataset", "folder", *TINY, "--iterations", 24, "--ema", 0.9, "--log-every", 2,
          "--sample-every", 6, "--checkpoint-every", 3]
# what else a try may have: drawn for each
VARIANTS = {"images": {"plain": [], "scores": ["--eval-every", 12, "--num-real", 12, "--num-fake", 10]},
            "synthetic": {"2D": ["--dim", 2, "--method", "gngan", "--ema", 0.9],
                          "1D": ["--dim", 1, "--method", "all"]}}
SYNTHETIC = ["--device", "cpu", "--num-seeds", 3, "--processes", 2, "--epochs", 4, "--hidden-dim", 16,
             "--batch-size", 3000, "--checkpoint-every", 1]
FOUR = ["r", "r2", "r3", "r4"]
ELSEWHERE = ("run_name", "data_dir", "inception_weights")  # may differ


class Fault(Exception):
    """Its first word is lost, altered or stuck."""


class Run:
    """A small run of a script, and the folder `place` with its data, cache and run folders."""

    def __init__(self, script, model, variant, place, shared, processes):
        self.script, self.place, self.processes = script, place, processes
        self.clock = None  # or what draws the seeds of its jumps
        self.newest, self.hits, self.moments, self.remains = -1, 0, collections.Counter(), set()
        self.scored, self.begun = variant == "scores", []
        self.given = SYNTHETIC + VARIANTS["synthetic"][variant] if model in SCRIPTS["synthetic"] else [
            *IMAGES, *VARIANTS["images"][variant], "--data-dir", place / "photos.zip",
            "--inception-weights", shared / "inception.pth"]
        shutil.copy(shared / "photos.zip", place)

    def folder(self, name="r"):
        return self.place / "runs" / name

    def start(self, name="r", wait=True):
        """The command, which begins the run or goes on with it, as a list of processes."""
        words = [str(ROOT / f"{self.script}.py"), *self.given, "--run-dir", self.place / "runs", "--run-name", name,
                 "--resume", "auto"]
        if self.clock is not None:
            words = ["tests/helpers/clock.py", self.clock.random(), *words]
        environment = {"XDG_CACHE_HOME": str(self.place / "cache")}
        processes = (start_together(self.processes, *words, environment=environment) if self.processes > 1
                     else [Process(*words, environment=environment)])
        for process in processes if wait else []:  # from here on it behaves as a program that a shell has started
            wait_for(pathlib.Path(process.folder.name, "err").exists, process)
        self.begun += processes
        return processes

    def files(self):
        """What changes whenever the run changes a file."""
        seen = []
        for folder, _, names in os.walk(self.place):
            for name in names:
                try:
                    stat = os.lstat(os.path.join(folder, name))
                except FileNotFoundError:
                    continue
                seen.append((name, stat.st_ino, stat.st_size, stat.st_mtime_ns))
        return sorted(seen)

    def note_moment(self, process, name="r"):
        """What a process did when it was killed, by what it has left."""
        remains, words = {file.name for file in self.place.rglob("*.tmp")}, process.read("err").rstrip()
        new, self.remains = remains - self.remains, remains
        scored = [record["iteration"] for record in common.read_lines(self.folder(name) / "metrics.jsonl")]
        if any(".npy." in name for name in new):
            moment = "decoding"
        elif new:
            moment = "saving"
        elif "to watch" not in process.read("out"):
            moment = "starting"
        elif self.scored and self.newest in (12, 24) and self.newest not in scored:
            moment = "scoring"
        elif re.search(r"(\d+)/\1 \[", words.splitlines()[-1] if words else ""):
            moment = "ending"  # drawing, in gngan_synthetic.py
        else:
            moment = "training"
        self.moments[moment] += 1

    def wait_for_moment(self, rng, seconds, process):
        """Seconds: of a whole run."""
        if rng.random() < 0.5:
            process.process.join(rng.uniform(0, 0.7 * seconds))
            return
        end = time.monotonic() + PATIENCE
        for _ in range(rng.randrange(1, 15)):
            before = self.files()
            while self.files() == before and process.poll() is None:
                if time.monotonic() > end:
                    raise Fault(f"stuck: it writes no file: {process.read('err')[-500:]}")
                time.sleep(0.001)
        time.sleep(rng.choice([0, rng.uniform(0, 0.003), rng.uniform(0, 0.05)]))

    def end(self, process, *sent, statuses=(0,)):
        """Wait for the end of a process to which these signals were sent. Whether one of them ended it.

        It must end with an exit status that says so, or with one of `statuses`, and without a traceback.
        """
        try:
            _, err = process.communicate(PATIENCE)
        except TimeoutError as error:
            raise Fault(f"stuck: it does not end: {str(error)[-500:]}") from None
        # -number: of SIGKILL; of others before Python has heard of ours, or at its exit
        ended = process.returncode in [status for number in sent for status in (-number, 128 + number)]
        if not (ended or process.returncode in statuses) or "Traceback" in err and process.returncode >= 0:
            raise Fault(f"stuck: exit status {process.returncode}: {err[-900:]}")
        return ended

    def check_saved(self):
        """The checkpoint is whole, and as new as the newest before."""
        file = self.folder() / "checkpoint.pt"
        if not file.exists():
            if self.newest >= 0:
                raise Fault("lost: the checkpoint is gone")
            return
        try:
            _, saved = common.read_checkpoint(file, pathlib.Path(self.script).name)
        except common.UserError as error:
            raise Fault(f"lost: {error}") from None
        position = saved["iteration"] + 1_000_000 * len(saved.get("finished", ()))
        if position < self.newest:
            raise Fault(f"lost: the checkpoint is of {position}, after one of {self.newest}")
        self.newest = position


def leavings(folder):
    """What a run left that must be the same, by name."""
    left = {}
    for name in ("checkpoint.pt", "generator.pt"):
        saved = torch.load(folder / name, weights_only=True) if (folder / name).exists() else {}
        left |= {name + key: value for key, value in flat(saved).items()
                 if not key.endswith((*UNLIKE, *ELSEWHERE))}
    rates = ("seconds", "images_per_second", "iterations_per_second")
    for number, record in enumerate(common.read_lines(folder / "metrics.jsonl")):
        left |= {f"metrics.jsonl line {number} {k}": value for k, value in record.items() if k not in rates}
    if (folder / "results.json").exists():
        for method, result in json.loads((folder / "results.json").read_text()).items():
            left |= {f"results.json {method} {k}": value for k, value in result.items() if k not in rates}
    for file in (file for pattern in ("samples/*", "*.png", "*.gif") for file in folder.glob(pattern)):
        left[file.name] = file.read_bytes()
    for place in {file.parent for file in folder.rglob("events.*")}:
        points, log = events(place), f"TensorBoard {place.name if place != folder else ''}"
        for tag in points.Tags()["scalars"]:
            if not tag.endswith("per_second"):
                left[f"{log} {tag}"] = [(point.step, point.value) for point in points.Scalars(tag)]
        for tag in points.Tags()["images"]:
            left[f"{log} {tag}"] = [(point.step, point.encoded_image_string) for point in points.Images(tag)]
    setting = json.loads((folder / "args.json").read_text())
    left |= {f"args.json {k}": v for k, v in flat(setting).items() if not k.endswith(("run_dir", *ELSEWHERE))}
    left["files"] = sorted(file.name for file in folder.iterdir() if not file.name.endswith(".tmp")
                           and "events." not in file.name)
    return left


def compare(left, straight, signalled):
    """signalled: the run has had signals. Each leaves a grid of its iteration, which a run left alone has not."""
    def same(a, b):
        return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b

    for name, value in list(left.items()) if signalled else []:
        if re.fullmatch(r"\d{8}\.png", name) and name not in straight:
            Image.open(io.BytesIO(left.pop(name))).load()
        if name.endswith("images/samples"):
            left[name] = [(step, image) for step, image in value if step in dict(straight[name])]
    unlike = [name for name in sorted(left.keys() | straight.keys()) if not same(left.get(name), straight.get(name))]
    if unlike:
        a, b = (textwrap.shorten(str(of.get(unlike[0], "nothing")), 200) for of in (left, straight))
        raise Fault(f"altered: {', '.join(unlike[:5])}{' ...' if unlike[5:] else ''} ({len(unlike)} of {len(straight)} "
                    f"entries); the first is {a} instead of {b}")


# ---------------------------------------------------------------------------------------------------------- kinds
# A kind is a function of (run, rng, seconds that the run takes). What it does to the run is over when it returns.
def interrupted(run, rng, seconds, *numbers):
    """Up to twelve times ended by one of these signals."""
    for _ in range(rng.randrange(1, 13)):
        process, = run.start()
        run.wait_for_moment(rng, seconds, process)
        sent = [rng.choice(numbers)]
        process.send_signal(sent[0])
        if len(numbers) > 1 and rng.random() < 0.3:  # a user who presses Ctrl-C again
            time.sleep(rng.uniform(0, 0.3))
            sent.append(rng.choice(numbers))
            process.send_signal(sent[1])
        ended = run.end(process, *sent)
        run.check_saved()
        if not ended:
            return
        run.hits += 1
        if sent[0] == signal.SIGKILL:
            run.note_moment(process)


def kill(run, rng, seconds):
    interrupted(run, rng, seconds, signal.SIGKILL)


def signals(run, rng, seconds):
    interrupted(run, rng, seconds, signal.SIGTERM, signal.SIGINT)


def clock(run, rng, seconds):
    run.clock = rng
    interrupted(run, rng, seconds, signal.SIGKILL)


def disk(run, rng, seconds):
    ballast = run.place / "ballast"
    for _ in range(rng.randrange(1, 5)):
        process, = run.start()
        run.wait_for_moment(rng, seconds, process)
        with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 20))
        with contextlib.suppress(OSError):
            os.truncate(ballast, max(0, ballast.stat().st_size - rng.choice([0, rng.randrange(5000), 500_000])))
        run.end(process, statuses=(0, 2))
        ballast.unlink()
        run.check_saved()
        if process.returncode == 0:
            return
        if "No space left" not in process.read("err"):
            raise Fault(f"stuck: not for want of space: {process.read('err')[-900:]}")
        run.hits += 1


def pair(run, rng, seconds):
    first, = run.start()
    run.wait_for_moment(rng, seconds, first)
    second, = run.start()
    time.sleep(rng.uniform(0.3, 1.5))
    run.hits += first.poll() is None and second.poll() is None
    if rng.random() < 0.7:
        rng.choice([first, second]).send_signal(signal.SIGKILL)
    for process in (first, second):
        run.end(process, signal.SIGKILL, statuses=(0, 2))
        if process.returncode == 2 and "another process is training in" not in process.read("err"):
            raise Fault(f"stuck: {process.read('err')[-900:]}")
    run.check_saved()


def maps(process, name):
    """Whether a process has a file of such a name in its memory."""
    with contextlib.suppress(OSError):
        return name in pathlib.Path(f"/proc/{process.process.pid}/maps").read_text()


def data(run, rng, seconds):
    processes = {name: run.start(name, wait=False)[0] for name in FOUR}
    name = rng.choice(FOUR)
    if rng.random() < 0.7:  # the one that decodes
        decoding = []
        while not decoding and not (run.folder(name) / "checkpoint.pt").exists():
            time.sleep(0.01)
            decoding = [other for other, process in processes.items() if maps(process, ".npy.")]
        name = decoding[0] if decoding else name
        time.sleep(rng.uniform(0, 0.2))
    else:
        run.wait_for_moment(rng, 1.0, processes[name])
    processes[name].send_signal(signal.SIGKILL)
    for other in FOUR:
        if other != name:
            run.end(processes[other])
    if run.end(processes[name], signal.SIGKILL):
        run.hits += 1
        run.note_moment(processes[name], name)
    run.end(*run.start(name))


def worker(run, rng, seconds):
    for _ in range(rng.randrange(1, 5)):
        processes = run.start()
        victim = rng.choice(processes)
        run.wait_for_moment(rng, seconds, victim)
        if run.processes > 1:
            victim.send_signal(signal.SIGKILL)
            victim.process.join()
            time.sleep(rng.uniform(0, 1))
            if victim.returncode:
                for process in processes:  # torchrun then ends the others
                    process.send_signal(signal.SIGTERM)
        else:
            children = pathlib.Path(f"/proc/{victim.process.pid}/task/{victim.process.pid}/children")
            with contextlib.suppress(FileNotFoundError, IndexError, ProcessLookupError):  # none yet, or no longer
                os.kill(int(rng.choice(children.read_text().split())), signal.SIGKILL)
        for process in processes:
            run.end(process, signal.SIGTERM, signal.SIGKILL, statuses=(0, 2))
        run.check_saved()
        if victim.returncode == 0:
            return
        run.hits += 1


KINDS = {"kill": kill, "signal": signals, "disk": disk, "pair": pair, "data": data, "clock": clock, "worker": worker}


# ---------------------------------------------------------------------------------------------------------- tries
def prepare(folder):
    """What all tries share."""
    make_data.image_zip(folder / "photos.zip", 400)
    make_data.inception_weights(folder / "inception.pth")


def settings(kind, model):
    """The variants of a model's tries, and the processes that torchrun starts; gngan_synthetic.py starts its own."""
    if model in SCRIPTS["synthetic"]:
        return list(VARIANTS["synthetic"]), 1
    return list(VARIANTS["images"]), 2 if kind == "worker" else 1


def name_alone(script, variant, processes):
    return f"{pathlib.Path(script).name} {variant} {processes}"


def left_alone(script, model, variant, processes, shared):
    """What a run leaves that nobody ends, and the seconds it took: done once, and kept in a file."""
    place = shared / name_alone(script, variant, processes)
    file = place / "left.pickle"
    if not place.exists():
        place.mkdir()
        run, begin = Run(script, model, variant, place, shared, processes), time.monotonic()
        for process in run.start():
            run.end(process)
        seconds = time.monotonic() - begin
        file.write_bytes(pickle.dumps((leavings(run.folder()), seconds)))
    return pickle.loads(file.read_bytes())


def one_try(kind, script, model, number, seed, shared):
    """Hits, what the killed processes did, and the fault in words or None."""
    rng = random.Random(f"{seed} {kind} {script} {number}")
    variants, processes = settings(kind, model)
    variant = variants[rng.random() < 0.15]
    place = shared / f"{pathlib.Path(script).name} {kind} {number}"
    place.mkdir()
    if kind == "disk":
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "soak", place], check=True)
    run, fault = Run(script, model, variant, place, shared, processes), None
    try:
        straight, seconds = left_alone(script, model, variant, processes, shared)
        KINDS[kind](run, rng, seconds)
        for process in run.start():
            run.end(process)
        for name in FOUR if kind == "data" else FOUR[:1]:
            compare(leavings(run.folder(name)), straight, kind in ("signal", "worker"))
    except Exception as error:
        fault = str(error) if isinstance(error, Fault) else f"stuck: {type(error).__name__} {error}"
    for process in run.begun:
        process.process.kill()
        process.process.join()
    if fault:
        kept = shutil.copytree(place, shared / "faults" / place.name)
        for count, (process, stream) in enumerate(itertools.product(run.begun, ("out", "err"))):
            (kept / f"process {count // 2} {stream}").write_text(process.read(stream))
        fault = f"{fault}\n  kept: {kept}; a run left alone: {shared / name_alone(script, variant, processes)}"
    if kind == "disk":
        subprocess.run(["umount", place], check=True)
    shutil.rmtree(place)
    return run.hits, run.moments, fault


def tries(jobs, pool, numbers, *given):
    """The results of tries with these numbers, `jobs` at once, each with its number before it."""
    begun = {}
    while True:
        for number in itertools.islice(numbers, jobs - len(begun)):
            kind, script, model, *rest = given
            begun[pool.submit(one_try, kind, script, model, number, *rest)] = number
        if not begun:
            return
        for done in concurrent.futures.wait(begun, return_when="FIRST_COMPLETED").done:
            yield begun.pop(done), *done.result()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", metavar="SCRIPT")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--kills", type=int, default=1000, help="hits of the kind kill, over all scripts")
    parser.add_argument("--others", type=int, default=50, help="hits of each further kind, over all scripts")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only", type=int, help="the try of this number alone")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="tries at once")
    args = parser.parse_args(argv)
    models = [name for group in SCRIPTS.values() for name in group]
    pairs = [(n.partition("=")[0].removesuffix(".py"), (n.partition("=")[2] or n).removesuffix(".py"))
             for n in args.scripts or models]
    for script, model in pairs:
        if not (ROOT / f"{script}.py").is_file() or model not in models:
            parser.error(f"{script}: write a script's name, or that of a fork as FORK=MODEL, MODEL one of "
                         f"{', '.join(models)}")
    if "disk" in args.kinds and "SOAK_MAY_MOUNT" not in os.environ:  # in a namespace of its own, which ends with it
        os.environ["SOAK_MAY_MOUNT"] = ""
        as_root = ["--map-root-user"] if os.geteuid() else []
        os.execvp("unshare", ["unshare", "--mount", *as_root, sys.executable, *sys.argv])
    os.environ["OMP_NUM_THREADS"] = "1"  # the same in every process
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"  # of semaphores that killed processes left
    shared = pathlib.Path(tempfile.mkdtemp(prefix="soak-"))
    prepare(shared)
    faults = 0
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.jobs, spawn, logging.disable) as pool:  # TensorBoard logs drops
        for kind in args.kinds:
            total, begin = dict(tries=0, hits=0, lost=0, altered=0, stuck=0), time.monotonic()
            moments = collections.Counter()
            several = [pair for pair in pairs if kind != "data" or pair[1] not in SCRIPTS["synthetic"]]
            for script, model in several:
                variants, processes = settings(kind, model)
                for variant in variants:
                    try:
                        pool.submit(left_alone, script, model, variant, processes, shared).result()
                    except Exception as error:
                        sys.exit(f"{script}, which nobody has ended: {error}")
                wanted = math.ceil((args.kills if kind == "kill" else args.others) / len(several))
                enough = total["hits"] + wanted
                numbers = iter(range(20 * wanted) if args.only is None else [args.only])
                numbers = itertools.takewhile(lambda _, enough=enough, total=total: total["hits"] < enough, numbers)
                given = (kind, script, model, args.seed, shared)
                bar = tqdm(total=wanted, desc=f"{script} {kind}", unit="hit", leave=False)
                for number, hits, done, fault in tries(args.jobs, pool, numbers, *given):
                    bar.update(hits)
                    total["tries"] += 1
                    total["hits"] += hits
                    moments += done
                    if fault:
                        faults += 1
                        total[fault.split(":")[0]] += 1
                        bar.write(f"{script} {kind} {number}: {fault}\n  again: python tests/benchmarks/soak.py "
                                  f"{script}={model} --kinds {kind} --only {number} --seed {args.seed}")
                bar.close()
            print(f"{kind:7}", ", ".join(f"{value} {name}" for name, value in total.items()),
                  f"({time.monotonic() - begin:.0f} s)", flush=True)
            if moments:
                print("    while", ", ".join(f"{name} {number}" for name, number in moments.most_common()), flush=True)
    if not faults:
        shutil.rmtree(shared)
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
