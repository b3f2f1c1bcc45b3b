"""Every row of page 15's table for a run: what ddpm-evaluate would do for each, in one go.

    python tools/table.py runs/fashion_mnist             # sizes for two CPU cores, about 45 minutes
    python tools/table.py runs/fashion_mnist --full      # n = 10,000 and every t, for a GPU

All at float32 (--precision bf16 draws other pictures, and faster where the hardware has it). Rows go
into evaluation.json beside the weights; those that are there already are not made again, so it may
be stopped and called again. The most telling rows come first.
"""

import argparse
import json
from importlib.metadata import version

import torch

from ddpm_nb.device import pick_device
from ddpm_nb.distance import (
    evaluation_data,
    features_of,
    likelihood_row,
    load_features,
    row_text,
    sampling_row,
    save_row,
)
from ddpm_nb.runs import find_checkpoint, load_denoiser

KINDS = ("ancestral beta_tilde", "ancestral optimal", "ancestral beta", "ddim")


def plan(full, precision):
    "The rows: what, and its flags, in the order of their worth."

    def row(kind, steps, n):
        method, _, variance = kind.partition(" ")
        way = dict(method=method, steps=steps, spacing="uniform", variance=variance or None)
        return dict(what="quality", n=n, seed=0, precision=precision, **way)

    n, large, bits = (2000, 10_000, 10_000) if full else (500, 2000, 200)
    rows = [dict(what="bits", n=bits, strata=None if full else 100, seed=0, precision="float32")]
    rows += [row(kind, steps, n) for steps in (50, 20, 10) for kind in KINDS]
    rows += [row("ancestral beta_tilde", 50, large), row("ddim", 50, large)]
    rows += [row(kind, 1000, large) for kind in KINDS if full]
    rows += [dict(rows[0], seed=1)]
    rows += [row(kind, steps, n) for steps in (100, 250, 1000) for kind in KINDS]
    return rows if full else rows[:-7]  # beyond 100 steps: one row, the rest would take hours


def samples_file(settings):
    "Where the samples of a row are kept."
    keys = ("method", "variance", "steps", "spacing", "n", "seed", "precision")
    parts = (str(settings[k]) for k in keys if settings.get(k) is not None)
    return f"samples-{'-'.join(parts)}.safetensors"


def main():
    p = argparse.ArgumentParser("tools/table.py", description=__doc__.splitlines()[0])
    p.add_argument("run")
    p.add_argument("--full", action="store_true")
    p.add_argument(
        "--precision", choices=("float32", "bf16"), default="float32", help="of sampling"
    )
    a = p.parse_args()
    path, device = find_checkpoint(a.run), pick_device()
    config = json.loads((path / "config.json").read_text())
    denoiser = load_denoiser(path, device)
    name, out = config["data"]["name"], path / "evaluation.json"
    data = evaluation_data(name, denoiser.net.config)
    net = load_features(name, device)
    reference = features_of(net, data["train"])
    about = dict(
        checkpoint=path.name,
        step=config["step"],
        data=name,
        device=str(device),
        torch=torch.__version__,
        ddpm_nb=version("ddpm_nb"),
    )
    how = dict(batch_size=500 if device == "cuda" else 100, progress=True)
    for row in plan(a.full, a.precision):
        settings = row if row["what"] == "bits" else dict(row, features=name)
        done = json.loads(out.read_text()) if out.is_file() else []
        if settings in [r["settings"] for r in done]:
            continue
        print(settings, flush=True)
        own = {k: v for k, v in row.items() if k != "what"}
        if row["what"] == "bits":
            made = likelihood_row(denoiser, path, data, **own, **how)
        else:
            if row["n"] >= 2000:  # kept for tools/fashion_mnist.py
                own["keep"] = path / samples_file(settings)
            made = sampling_row(denoiser, path, data, net, name, reference=reference, **own, **how)
        print(row_text(made))
        assert made["settings"] == settings, (made["settings"], settings)
        save_row(out, made | dict(about=about))


if __name__ == "__main__":
    main()
