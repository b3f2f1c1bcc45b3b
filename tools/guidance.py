"""What guidance does to pictures: their class, their distance to real ones, their variety.

    python tools/guidance.py digits              # some ten minutes on one core
    python tools/guidance.py fashion_mnist       # two hours
    python tools/guidance.py fashion_mnist --picture     # a minute

In seeds that all share, 500 pictures of dpm++ in 10 steps, as many of each class, at each strength:
the share that the project's classifier, trained on real pictures alone, gives the label that was
asked for; FID, precision and recall on its features, against all training pictures. Beside them
pictures drawn without a label, and the share of real test pictures. For a network that has an
earlier self in the package (NAME_early) also away from that one, with labels and without. Rows are
written to nbs/logs/NAME/guidance.jsonl as they are made; those that are there are not made again.
--picture draws figures/guidance_NAME.png instead: a class a row, a strength a column, one noise.
"""

import argparse

import torch
from few_steps import ROOT, Log, card_of

from ddpm_nb.control import autoguided, decode, guided
from ddpm_nb.data import PictureData, load_data, to_model_range, to_pixels
from ddpm_nb.distance import features_of, frechet_distance, load_features, precision_recall
from ddpm_nb.plot import as_png, book_style, picture_strip
from ddpm_nb.runs import load_denoiser, shipped
from ddpm_nb.sample import sample
from ddpm_nb.scheduler import stream

STRENGTHS = (1, 1.5, 2, 3, 4)


@torch.no_grad()
def share(net, x, labels):
    "How many of these pictures the classifier takes for what they should be."
    right = [
        (net(part).argmax(1) == want).double()
        for part, want in zip(x.split(500), labels.split(500), strict=True)
    ]
    return float(torch.cat(right).mean())


def plan(name):
    "Every way of asking: what is led by what, how strongly, and whether labels are given."
    yield from (("label", w, True) for w in STRENGTHS)
    yield "nothing", 1, False
    if f"{name}_early" in shipped():
        yield from (("early", w, given) for w in STRENGTHS[1:4] for given in (True, False))


def measure(name, log, seeds, n=500):
    "Makes the rows that are not there."
    denoiser, kind = load_denoiser(name), card_of(name)["data"]["name"]
    train, test, net = load_data(kind), load_data(kind, split="test"), load_features(kind).eval()
    levels, reference = train.num_levels, features_of(net, train)
    labels = torch.arange(n) % denoiser.net.config.num_classes
    early = load_denoiser(f"{name}_early") if f"{name}_early" in shipped() else None
    if not log.has(led="real"):
        real = share(net, to_model_range(test.pictures, levels), test.labels)
        log.add(led="real", share=real, n=len(test))
    for seed in range(seeds):
        for led, w, given in plan(name):
            about = dict(led=led, w=w, labels=given, seed=seed)
            if log.has(**about):
                continue
            ask = autoguided(denoiser, early, w) if led == "early" else denoiser
            if led == "label":
                ask = guided(denoiser, w)
            how = dict(steps=10, method="dpm++", seed=seed, batch_size=100)
            x = sample(ask, n, labels=labels if given else None, **how)
            drawn = to_pixels(x, levels)
            features = features_of(net, PictureData(drawn, num_levels=levels))
            precision, recall = precision_recall(reference, features)
            log.add(
                **about,
                share=share(net, to_model_range(drawn, levels), labels) if given else None,
                fid=frechet_distance(reference, features),
                precision=precision,
                recall=recall,
                n=n,
            )


def picture(name):
    "Every class at every strength, all from one noise, and nothing chosen: the first of seed 0."
    denoiser = load_denoiser(name)
    names, shape = list(denoiser.class_names), denoiser.net.config.picture_shape
    z = torch.randn(1, *shape, generator=stream(0, 0)).expand(len(names), *shape)
    how = dict(steps=10, spacing="karras", labels=torch.arange(len(names)))
    rows = [decode(guided(denoiser, w), z, **how) for w in (0, *STRENGTHS)]
    book_style()
    fig = picture_strip(torch.stack(rows, 1), ["w = 0", *map(str, STRENGTHS)], names)
    for ax in fig.axes[:: len(rows)]:
        ax.yaxis.label.set(rotation=0, ha="right", va="center")
    (ROOT / "figures" / f"guidance_{name}.png").write_bytes(as_png(fig, dpi=180).data)


def main():
    p = argparse.ArgumentParser("tools/guidance.py", description=__doc__.splitlines()[0])
    p.add_argument("name", choices=shipped())
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--picture", action="store_true", help="draw the figure, and nothing else")
    a = p.parse_args()
    card = card_of(a.name)
    if card["model"].get("num_classes") is None:
        p.error(f"name: expected a network with classes; {a.name} has none")
    if a.picture:
        return picture(a.name)
    settings = dict(weights=card["sha256"][:12], method="dpm++", steps=10, spacing="karras")
    settings |= dict(torch=torch.__version__.split("+")[0], device="cpu")
    measure(a.name, Log(ROOT / "nbs" / "logs" / a.name / "guidance.jsonl", settings), a.seeds)


if __name__ == "__main__":
    main()
