"""The FID of two variances from the same noise, seed by seed: their difference and its standard error.

    python tools/paired_fid.py digits                             # some three minutes on one core
    python tools/paired_fid.py digits --steps 50 --seeds 5        # more rows; those there stay
    python tools/paired_fid.py fashion_mnist_plain --n 500 --steps 10 --seeds 5        # five minutes

For each number of steps and each seed it draws as many samples as there are test pictures (or --n),
with beta-tilde and with the measured variance, and compares both with all training pictures.
Picture i's noise is a function of (seed, i), so the two sets differ by the variance alone. Writes
nbs/logs/NAME/paired.json, which pages 13 and 15 show; a seed that is there is not drawn again.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path

import torch
from few_steps import card_of

from ddpm_nb.data import PictureData, load_data, to_pixels
from ddpm_nb.distance import features_of, frechet_distance, load_features
from ddpm_nb.runs import load_denoiser, load_x0_error, shipped
from ddpm_nb.sample import sample

LOGS = Path(__file__).parent.parent / "nbs" / "logs"
VARIANCES = ("beta_tilde", "optimal")


def summary(fids):
    "Means, standard deviations over seeds, and the paired difference optimal - beta_tilde."
    tensors = {name: torch.tensor(fids[name], dtype=torch.float64) for name in VARIANCES}
    difference = tensors["optimal"] - tensors["beta_tilde"]
    return dict(
        seeds=len(difference),
        mean={name: float(v.mean()) for name, v in tensors.items()},
        sd={name: float(v.std()) for name, v in tensors.items()},
        difference=float(difference.mean()),
        standard_error=float(difference.std() / len(difference) ** 0.5),
        optimal_is_worse=int((difference > 0).sum()),
    )


def measure(name, n, steps, seeds, rows, save):
    "Draws what `rows` has not got yet: (steps, variance) -> one FID a seed."
    denoiser = load_denoiser(name)
    how = dict(method="ancestral", spacing="uniform", batch_size=100)
    kind = card_of(name)["data"]["name"]
    train, net = load_data(kind), load_features(kind)
    reference = features_of(net, train)
    choices = dict(beta_tilde="beta_tilde", optimal=load_x0_error(name))
    for count in steps:
        fids = rows.setdefault(str(count), {v: [] for v in VARIANCES})
        for seed in range(len(fids["optimal"]), seeds):
            for v in VARIANCES:
                x = sample(denoiser, n, steps=count, seed=seed, variance=choices[v], **how)
                drawn = PictureData(to_pixels(x, train.num_levels), num_levels=train.num_levels)
                fids[v] = fids[v][:seed] + [frechet_distance(reference, features_of(net, drawn))]
            print(f"{count} steps, seed {seed}:", {v: round(fids[v][-1], 3) for v in VARIANCES})
            save()


def main():
    p = argparse.ArgumentParser("tools/paired_fid.py", description=__doc__.splitlines()[0])
    p.add_argument("name", choices=shipped())
    p.add_argument("--n", type=int, help="samples (as many as there are test pictures)")
    p.add_argument("--steps", type=int, nargs="+", default=[10, 20])
    p.add_argument("--seeds", type=int, default=9, help="0, 1, ... (9 of them)")
    a = p.parse_args()
    card, out = card_of(a.name), LOGS / a.name / "paired.json"
    kind = card["data"]["name"]
    n = a.n or len(load_data(kind, split="test"))
    settings = dict(weights=card["sha256"][:12], n=n, method="ancestral", features=kind)
    settings |= dict(precision="float32", device="cpu")
    log = json.loads(out.read_text()) if out.is_file() else dict(settings=settings, fid={})
    if log["settings"] != settings:
        raise SystemExit(
            f"{out} is of other weights or settings, remove it first: {log['settings']}"
        )

    def save():
        whole = {k: v for k, v in log["fid"].items() if len(v["optimal"]) > 1}
        log["summary"] = {k: summary(v) for k, v in whole.items()}
        log["versions"] = dict(torch=torch.__version__, ddpm_nb=version("ddpm_nb"))
        out.write_text(json.dumps(log, indent=1) + "\n")

    measure(a.name, n, a.steps, a.seeds, log["fid"], save)
    save()


if __name__ == "__main__":
    main()
