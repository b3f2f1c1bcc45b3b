"""64 digits in 20 steps of DDIM with the code of two commits, in turns, on the same machine.

    python -m benchmarks.before_after 9a70640           # that commit against the working tree
    python -m benchmarks.before_after 9a70640 --runs 9

Prints the time of each and the ratio of the medians. Nothing else should run beside it.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
TIMED = """
import time, torch
torch.set_num_threads({threads})
try:
    from ddpm_nb.runs import load_denoiser
    from ddpm_nb.sample import sample
    d = load_denoiser("digits")
    draw = lambda: sample(d, 64, steps=20, method="ddim", spacing="uniform")
except ImportError:
    from ddpm_nb.runs import load_pretrained
    from ddpm_nb.sample import sample
    m, s = load_pretrained("digits")
    draw = lambda: sample(m, s, 64, steps=20, method="ddim")
draw()
began = time.perf_counter()
for _ in range(5): draw()
print((time.perf_counter() - began) / 5)
"""


def seconds(tree, threads):
    "A fresh process's mean of five draws, after one."
    out = subprocess.run(
        [sys.executable, "-c", TIMED.format(threads=threads)],
        cwd=tree,
        env=dict(os.environ, PYTHONPATH=str(tree)),
        capture_output=True,
        text=True,
        check=True,
    )
    return float(out.stdout)


def main():
    p = argparse.ArgumentParser("before_after", description=__doc__.splitlines()[0])
    p.add_argument("before", help="a commit")
    p.add_argument("--runs", type=int, default=5)
    p.add_argument("--threads", type=int, default=1)
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "before"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "-q", "--detach", str(tree), a.before], check=True)
        try:
            times = {"before": [], "after": []}
            for _ in range(a.runs):
                times["before"].append(seconds(tree, a.threads))
                times["after"].append(seconds(ROOT, a.threads))
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)
    for name, t in times.items():
        print(f"{name:6} {statistics.median(t):.3f} s ({min(t):.3f} to {max(t):.3f})")
    print(
        f"before / after {statistics.median(times['before']) / statistics.median(times['after']):.2f}"
    )


if __name__ == "__main__":
    main()
