"""Which sampler, which spacing, how many steps: measured on a shipped network.

    python tools/few_steps.py digits rms                   # some ten minutes on one core
    python tools/few_steps.py digits fid                   # an hour and more
    python tools/few_steps.py fashion_mnist_plain rms fid        # hours
    python tools/few_steps.py fashion_mnist_plain strip          # some minutes
    python tools/few_steps.py fashion_mnist_plain whole          # hours

rms: the distance, in grey levels, of 64 pictures to those of a walk of 500 steps from the same noise
(for the samplers that add none). fid: the FID to all training pictures on the data set's own
features, in seeds that all samplers share, of the pictures as they are and with all that is nearly
black set to black, and the share of black pixels. strip: a figure of three pictures, in up to 1,000
evaluations. whole: rows of fid and rms up to the walk of all steps, from which
`python -m benchmarks.quality` finds how few steps draw as well. Rows are written to
nbs/logs/NAME/few_steps.jsonl as they are made (those of whole beside it, to whole.jsonl); those that
are there are not made again.
"""

import argparse
import json
from pathlib import Path

import torch

from ddpm_nb.data import PictureData, load_data, to_pixels
from ddpm_nb.distance import features_of, frechet_distance, load_features
from ddpm_nb.plot import as_png, book_style, picture_strip
from ddpm_nb.runs import WEIGHTS, load_denoiser, shipped
from ddpm_nb.sample import SAMPLERS, SPACINGS, sample

ROOT = Path(__file__).parent.parent


def card_of(name):
    "The run card of a network that ships."
    return json.loads((WEIGHTS / name / "run_card.json").read_text())


QUIET = ("ddim", "heun", "dpm++")  # no noise on the way
AT_50 = (("ancestral", "uniform"), ("ddim", "uniform"))  # on Fashion-MNIST, beside dpm++


def steps_of(method, evaluations):
    "The most steps that fit: Heun takes two evaluations a step but for the last."
    return (evaluations + 1) // 2 if method == "heun" else evaluations


def evaluations_of(method, steps):
    "What they cost."
    return 2 * steps - 1 if method == "heun" else steps


class Log:
    "Rows that are kept as they come, and found again by what they are about."

    def __init__(self, file, settings):
        self.file, self.settings = file, settings
        lines = file.read_text().splitlines() if file.is_file() else []
        self.rows = [json.loads(line) for line in lines]
        if any(r["weights"] != settings["weights"] for r in self.rows):
            raise SystemExit(f"{file} is of other weights, remove it first")

    def has(self, **about):
        "Whether such a row is there."
        return any(all(r.get(k) == v for k, v in about.items()) for r in self.rows)

    def add(self, **row):
        "Writes a row."
        self.rows.append({**row, **self.settings})
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.file, "a") as f:
            f.write(json.dumps(self.rows[-1]) + "\n")
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)


def rms_plan(counts=(5, 8, 10, 20, 50)):
    return [(m, s, e) for m in QUIET for s in SPACINGS for e in counts]


def rms(name, log, plan, n=64):
    "Root mean square distance to the converged walk from the same noise."
    denoiser, converged = load_denoiser(name), None
    for method, spacing, evaluations in plan:
        steps = steps_of(method, evaluations)
        about = dict(what="rms", method=method, spacing=spacing, steps=steps)
        if log.has(**about):
            continue
        if converged is None:
            how = dict(method="dpm++", spacing="log-snr", steps=500)
            converged = sample(denoiser, n, batch_size=n, **how)
        x = sample(denoiser, n, method=method, spacing=spacing, steps=steps, batch_size=n)
        off = (x - converged).flatten(1).square().mean(1).sqrt() * 127.5
        log.add(
            **about,
            evaluations=evaluations_of(method, steps),
            rms=float(off.square().mean().sqrt()),
            median=float(off.median()),
            n=n,
        )


def best_spacing(log, method):
    "The spacing with the least RMS at 10 evaluations; of dpm++ for the samplers with noise."
    like = method if method in QUIET else "dpm++"
    steps = steps_of(like, 10)
    rows = [r for r in log.rows if (r["what"], r["method"], r["steps"]) == ("rms", like, steps)]
    if not rows:
        raise SystemExit("the rows of rms come first")
    return min(rows, key=lambda r: r["rms"])["spacing"]


def fid_plan(name, log):
    "(method, spacing, evaluations) in the order in which they are wanted."
    if name == "digits":
        return [(m, s, e) for e in (10, 20, 5, 50) for m in SAMPLERS for s in SPACINGS]
    noisy = [("sde-dpm++", s, e) for e in (20, 10) for s in SPACINGS]  # which RMS cannot judge
    few = [(m, best_spacing(log, m), e) for e in (10, 20, 5) for m in SAMPLERS]
    return noisy + few + [(m, s, 50) for m, s in (*AT_50, ("dpm++", best_spacing(log, "dpm++")))]


def fid(name, log, plan, n, seeds):
    "FID to the training pictures, seed by seed."
    denoiser, kind = load_denoiser(name), card_of(name)["data"]["name"]
    train, net = load_data(kind), load_features(kind)
    reference, black = features_of(net, train), 2 * 3 / 255 - 1

    def distance(x):
        drawn = PictureData(to_pixels(x, train.num_levels), num_levels=train.num_levels)
        share = float((drawn.pictures == 0).float().mean())
        return frechet_distance(reference, features_of(net, drawn)), share

    for seed in range(seeds):
        for method, spacing, evaluations in dict.fromkeys(plan):
            steps = steps_of(method, evaluations)
            about = dict(what="fid", method=method, spacing=spacing, steps=steps, seed=seed)
            if log.has(**about):
                continue
            how = dict(method=method, spacing=spacing, steps=steps, seed=seed)
            x = sample(denoiser, n, batch_size=100, **how)
            (plain, share), snapped = distance(x), distance(x.masked_fill(x <= black, -1))[0]
            log.add(
                **about,
                evaluations=evaluations_of(method, steps),
                fid=plain,
                snapped=snapped,
                black=share,
                n=n,
            )


def whole(name, log, n, seeds):
    "More rows of fid and of rms, up to the walk of all steps."
    few = [(m, "karras", e) for e in (8, 6, 7, 9, 12, 15) for m in ("dpm++", "sde-dpm++")]
    many = []
    if name == "digits":
        many += [("sde-dpm++", s, e) for e in (100, 200) for s in ("uniform", "log-snr")]
    quiet = [("dpm++", s, e) for s in ("karras", "log-snr") for e in (12, 15, 30, 100, 200)]
    fid(name, log, few + many, n, seeds)
    rms(name, log, [*quiet, ("ddim", "uniform", 1000)])
    fid(name, log, [("ancestral", "uniform", 1000)], n, seeds)


def strip(name, counts=(5, 10, 20, 50, 1000), n=3):
    "The same noise, drawn by each sampler (rows) in so many evaluations (columns)."
    denoiser, rows = load_denoiser(name), []
    for method in SAMPLERS:
        how = [dict(method=method, steps=steps_of(method, e)) for e in counts]
        rows.append(torch.cat([sample(denoiser, n, seed=3, **h) for h in how]))
        print(method, flush=True)
    titles = [f"{e:,}" if k == n // 2 else "" for e in counts for k in range(n)]
    book_style()
    fig = picture_strip(torch.stack(rows), titles, list(SAMPLERS))
    for ax in fig.axes[:: n * len(counts)]:
        ax.yaxis.label.set(rotation=0, ha="right", va="center")
    (ROOT / "figures" / f"few_steps_{name}.png").write_bytes(as_png(fig, dpi=180).data)


def main():
    p = argparse.ArgumentParser("tools/few_steps.py", description=__doc__.splitlines()[0])
    p.add_argument("name", choices=shipped())
    p.add_argument("what", nargs="+", choices=("rms", "fid", "strip", "whole"))
    p.add_argument("--n", type=int, help="samples a seed for an FID (297 digits, 500 clothes)")
    p.add_argument("--seeds", type=int, help="0, 1, ... (10 for digits, 5 for clothes)")
    p.add_argument("--log", type=Path, help="the folder; left out: nbs/logs/NAME")
    a = p.parse_args()
    card = card_of(a.name)
    kind = card["data"]["name"]
    settings = dict(weights=card["sha256"][:12], precision="float32", features=kind)
    settings |= dict(torch=torch.__version__.split("+")[0], device="cpu")
    folder = a.log or ROOT / "nbs" / "logs" / a.name
    log = Log(folder / "few_steps.jsonl", settings)
    digits = kind == "digits"
    n, seeds = a.n or (297 if digits else 500), a.seeds or (10 if digits else 5)
    if "rms" in a.what:
        rms(a.name, log, rms_plan())
    if "fid" in a.what:
        fid(a.name, log, fid_plan(a.name, log), n, seeds)
    if "whole" in a.what:
        whole(a.name, Log(folder / "whole.jsonl", settings), n, a.seeds or (5 if digits else 1))
    if "strip" in a.what:
        strip(a.name)


if __name__ == "__main__":
    main()
