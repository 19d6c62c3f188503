"""A few iterations of a script's training step, alone or as one of torchrun's processes; what came of them in a file.

    one_process.py SCRIPT MODEL SETTING(JSON) ITERATIONS FOLDER [plain]

SCRIPT: the script, or a fork of MODEL.

plain: gradient descent instead of Adam, and no batch norm, so that the losses are means over the samples.
"""
import dataclasses
import importlib
import json
import pathlib
import sys

import scripts
import torch
from steps import CPU, build, noise, plain_descent

from common import training

name, model, setting, iterations, folder, *plain = sys.argv[1:]
scripts.forks[model] = [name]
script = importlib.import_module(name)
args = script.resolve(script.Args(**json.loads(setting)))
training.choose_device("cpu", tf32=False, deterministic=False)
if plain:
    script.init_optimizers = plain_descent(script)
    script.BatchNorm.forward = torch.nn.BatchNorm2d.forward = lambda self, x, *update: (
        x * self.weight[:, None, None] + self.bias[:, None, None])
networks, _, rng, step = build(script, args, CPU)
images, losses = noise(dataclasses.replace(args, batch_size=40)), []
for iteration in range(int(iterations)):
    rng.manual_seed(training.draw_seed(args.seed, iteration))
    losses.append(step(script.get_batch(images, args, iteration, CPU)))
rank, _ = training.world()
torch.save({"networks": networks.state_dict(), "losses": losses}, pathlib.Path(folder, f"{rank}.pt"))
