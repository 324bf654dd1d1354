"""python examples/sweep_ray.py arithmetic runs/sweep seed=0 seed=1 lam=1e-7 lam=1e-6: every combination, on Ray."""

import itertools
import subprocess
import sys
from pathlib import Path

import ray

experiment, out, settings = sys.argv[1], Path(sys.argv[2]).resolve(), sys.argv[3:]
by_key = [list(texts) for _, texts in itertools.groupby(sorted(settings), key=lambda text: text.split("=")[0])]


@ray.remote(num_cpus=1, max_retries=3)  # with GPUs: num_gpus=1
def run(sets):
    folder = out / "_".join(text for text, same in zip(sets, by_key) if len(same) > 1)  # one that all machines see
    command = [sys.executable, "-m", "subnets.cli", "run", experiment, "--quiet", "--out", str(folder)]
    return folder, subprocess.run(command + [part for text in sets for part in ("--set", text)]).returncode


for folder, code in ray.get([run.remote(sets) for sets in itertools.product(*by_key)]):
    print(f"{folder}: " + ("finished" if code == 0 else f"failed with {code}"))
