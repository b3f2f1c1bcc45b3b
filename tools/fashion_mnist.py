"""What page 15 shows besides the run's own log and the rows of ddpm-evaluate.

    python tools/fashion_mnist.py choices RUN...     # short runs side by side
    python tools/fashion_mnist.py figures RUN        # after tools/table.py, which keeps samples

Both write into nbs/logs/fashion_mnist_plain/, small files that the page reads: choices.json; figures.json
and figures.safetensors. The data set must be there.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from table import samples_file

from ddpm_nb.data import load_data, to_model_range, to_pixels
from ddpm_nb.distance import features_of, frechet_distance, load_features, nearest
from ddpm_nb.likelihood import GaussianDenoiser, bits_per_dim, denoise, x0_error_table
from ddpm_nb.objective import training_loss
from ddpm_nb.runs import checkpoints, find_checkpoint, load_denoiser, read_checkpoint
from ddpm_nb.sample import sample

LOGS = Path(__file__).parent.parent / "nbs" / "logs" / "fashion_mnist_plain"


def log_of(run):
    return [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]


def choices(runs):
    "FID of 500 samples in 20 steps, ancestral and DDIM, and the loss, of short runs."
    net, train = load_features("fashion_mnist"), load_data("fashion_mnist")
    reference, rows = features_of(net, train), []
    for run in runs:
        config, _ = read_checkpoint(find_checkpoint(run), "model")
        denoiser, fid = load_denoiser(run), {}
        for kind, method in {"ancestral": "ancestral", "DDIM": "ddim"}.items():
            how = dict(steps=20, method=method, spacing="uniform", batch_size=100)
            x = sample(denoiser, 500, progress=True, **how)
            fid[kind] = frechet_distance(reference, features_of(net, to_pixels(x)))
        lines = log_of(run)
        lines = [x for x in lines if x["step"] <= config["step"]]
        last = [x["loss"] for x in lines if x["step"] > config["step"] - 100]
        rows.append(
            dict(
                name=Path(run).name,
                schedule=config["training"]["schedule"],
                base_dim=config["model"]["base_dim"],
                batch_size=config["training"]["batch_size"],
                steps=config["step"],
                parameters=sum(p.numel() for p in denoiser.parameters()),
                loss=sum(last) / len(last),
                fid=fid,
            )
        )
        print(rows[-1])
    settings = dict(n=500, steps=20, seed=0, features="fashion_mnist")
    (LOGS / "choices.json").write_text(
        json.dumps(dict(settings=settings, runs=rows), indent=1) + "\n"
    )


def step_of(path):
    return int(path.name.removeprefix("step-"))


def spread(found, n):
    "At most n of the checkpoints: the first, the last, and some between."
    return [found[i] for i in sorted(set(np.linspace(0, len(found) - 1, n).round().astype(int)))]


def early_ones(found, n):
    "At most n of the checkpoints, dense at the beginning."
    steps = np.array([step_of(p) for p in found])
    wanted = np.geomspace(steps[0], steps[-1], n)
    return [found[i] for i in sorted({int(abs(steps - w).argmin()) for w in wanted})]


def headline(path):
    "The row of the most samples that were kept, and among those of the lowest FID; and its file."
    rows = [r for r in json.loads((path / "evaluation.json").read_text()) if "fid" in r]
    kept = [(r, path / samples_file(r["settings"])) for r in rows]
    kept = [(r, f) for r, f in kept if f.is_file()]
    if not kept:
        sys.exit(f"{path} holds no samples: run tools/table.py first")
    return min(kept, key=lambda k: (-k[0]["settings"]["n"], k[0]["fid"]))


def raw_and_ema(run, test):
    "Mean loss of both kinds of weights on the same test pictures, steps and noise."
    g, rows = torch.Generator().manual_seed(0), []
    x0 = to_model_range(test.pictures[:500])
    t, noise = torch.randint(1, 1001, (500,), generator=g), torch.randn(x0.shape, generator=g)
    for path in spread(checkpoints(run), 12):
        losses = {}
        for kind in ("ema", "raw"):
            denoiser = load_denoiser(path, weights=kind)
            with torch.no_grad():
                parts = zip(x0.split(100), t.split(100), noise.split(100), strict=True)
                each = [training_loss(denoiser, *p) for p in parts]
            losses[kind] = float(torch.cat(each).mean())
        rows.append(dict(step=step_of(path), **losses))
    return rows


def gaussian(scheduler, train, test):
    "The eigenvalues of the data's covariance, and the bits of the exact linear denoiser."
    model = GaussianDenoiser(to_model_range(train.pictures), scheduler)
    how = dict(n=200, strata=100, batch_size=200)
    table = x0_error_table(scheduler, denoise(model, train, scheduler, seed=1, **how))
    found = denoise(model, test, scheduler, **how)
    variances = dict(beta_tilde="beta_tilde", beta="beta", optimal=table)
    bits = {name: bits_per_dim(scheduler, found, v) for name, v in variances.items()}
    return model.values.float(), bits


def figures(run):
    train, test = load_data("fashion_mnist"), load_data("fashion_mnist", split="test")
    labels = train.labels
    net, found = load_features("fashion_mnist"), checkpoints(run)
    row, samples = headline(found[-1])
    settings, drawn = row["settings"], load_file(samples)["pictures"]
    denoiser, long = load_denoiser(found[-1]), dict(method="ancestral", spacing="uniform")

    shown, history = early_ones(found, 6), []
    for path in shown:
        history.append(to_pixels(sample(load_denoiser(path), 8, steps=50, **long)))
        print("samples at", path.name)

    walk, guesses, levels = [], [], (1000, 900, 800, 600, 400, 200, 100, 0)

    def note(first, t_prev, x_prev, x0_pred):
        if t_prev in levels:
            walk.append(to_pixels(x_prev.clamp(-1, 1)))
            guesses.append(to_pixels(x0_pred.clamp(-1, 1)))

    sample(denoiser, 2, steps=100, seed=1, callback=note, **long)

    with torch.no_grad():
        parts = to_model_range(drawn).split(250)
        guess = torch.cat([net(part).argmax(1) for part in parts])
        sure = torch.cat([net(part).softmax(1).amax(1) for part in parts])
    features = {
        name: features_of(net, x)
        for name, x in dict(train=train, test=test.pictures[: len(drawn)], drawn=drawn).items()
    }
    pixels = {
        name: to_model_range(x)
        for name, x in dict(
            train=train.pictures, test=test.pictures[: len(drawn)], drawn=drawn
        ).items()
    }
    tensors = dict(
        samples=drawn[:100],
        history=torch.stack(history),
        walk=torch.stack(walk),
        guesses=torch.stack(guesses),
    )
    for name, space in dict(pixels=pixels, features=features).items():
        distance, index = nearest(space["drawn"][:500], space["train"])
        held_out, _ = nearest(space["test"][:500], space["train"])
        tensors |= {
            f"{name}_drawn": distance,
            f"{name}_held_out": held_out,
            f"{name}_nearest": train.pictures[index[:10]],
        }
        print(
            name,
            "median distance:",
            float(distance.median()),
            "held out:",
            float(held_out.median()),
        )
    tensors["eigenvalues"], gaussian_bits = gaussian(denoiser.scheduler, train, test)
    facts = dict(
        run_step=step_of(found[-1]),
        settings=settings,
        n=len(drawn),
        history_steps=[step_of(p) for p in shown],
        walk_levels=[t for t in levels if t < 1000],
        raw_and_ema=raw_and_ema(run, test),
        classes_drawn=guess.bincount(minlength=10).tolist(),
        classes_train=labels.bincount(minlength=10).tolist(),
        sure=float((sure > 0.9).double().mean()),
        sure_of_test=None,
        gaussian_bits=gaussian_bits,
    )
    with torch.no_grad():
        held = torch.cat(
            [net(to_model_range(p)).softmax(1).amax(1) for p in test.pictures.split(500)]
        )
    facts["sure_of_test"] = float((held > 0.9).double().mean())
    save_file({k: v.contiguous() for k, v in tensors.items()}, LOGS / "figures.safetensors")
    (LOGS / "figures.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(facts)


if __name__ == "__main__":
    LOGS.mkdir(parents=True, exist_ok=True)
    what, *rest = sys.argv[1:] or ["help"]
    if what == "choices" and rest:
        choices(rest)
    elif what == "figures" and len(rest) == 1:
        figures(*rest)
    else:
        sys.exit(__doc__)
