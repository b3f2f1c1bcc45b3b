"""The digits preset, with a quarter of the steps that `make demo` takes, draws legible digits of all classes that are not copies."""

import numpy as np
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from ddpm_nb.data import load_data, to_pixels
from ddpm_nb.runs import load_denoiser
from ddpm_nb.sample import sample

N = 200
QUARTER = ["--max-steps", 400, "--decay-start", 100, "--decay-end", 400]  # of the preset's 1,600


def test_digits_are_legible(tmp_path, run, record_property):
    run("ddpm-train", "digits", *QUARTER, "--out-dir", tmp_path / "run")
    x = sample(load_denoiser(tmp_path / "run"), N, batch_size=N, precision="auto")
    drawn = to_pixels(x, 17).flatten(1).numpy()
    train = np.stack([p.numpy().ravel() for p in load_data("digits", split="train")])
    held_out = np.stack([p.numpy().ravel() for p in load_data("digits", split="test")])
    label = {
        p.astype(np.uint8).tobytes(): y for p, y in zip(*load_digits(return_X_y=True), strict=True)
    }
    classes = [label[p.tobytes()] for p in train]
    judge = CalibratedClassifierCV(SVC(gamma=0.001, C=10), ensemble=False).fit(train, classes)
    threshold = np.quantile(judge.predict_proba(held_out).max(1), 0.05)  # sure of 95% of these
    says = judge.predict_proba(drawn)
    sure, found = (says.max(1) >= threshold).mean(), np.bincount(says.argmax(1), minlength=10)
    near = {
        name: np.sqrt(((x[:, None].astype(int) - train[None].astype(int)) ** 2).sum(-1)).min(1)
        for name, x in (("samples", drawn), ("held-out digits", held_out))
    }
    report = [
        f"sure of {sure:.1%} of {N} samples, at the threshold ({threshold:.3f}) where it is sure of 95% of held-out digits",
        f"classes: {found.tolist()}",
        *(
            f"distance to the nearest training picture, {name}: least {d.min():.1f}, median {np.median(d):.1f}"
            for name, d in near.items()
        ),
    ]
    record_property("digits", "\n".join(report))
    assert sure >= 0.8 and (found > 0).all()
    assert np.median(near["samples"]) > 0.5 * np.median(near["held-out digits"])
