"""Runs a script whose clock is set anew again and again, by up to a day: clock.py SEED SCRIPT ARGUMENTS."""
import random
import runpy
import sys
import time

import tqdm.std

real, rng, shift = time.time, random.Random(sys.argv[1]), 0.0


def jumping():
    global shift
    if rng.random() < 0.1:
        shift = rng.uniform(-86400, 86400)
    return real() + shift


time.time = tqdm.std.time = jumping
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
