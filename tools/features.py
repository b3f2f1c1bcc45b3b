"""Train the classifiers whose features the project's own FIDs are measured in, and store them.

    python tools/features.py digits                # some seconds
    python tools/features.py fashion_mnist         # two minutes on two cores

Writes ddpm_nb/weights/NAME_features.safetensors and, beside it, a JSON card: the recipe, the
accuracy on the test set, the weights' sha256. The FIDs of the tables are measured with the stored
weights: training again on another machine gives a network that is as good, not the same one.
"""

import hashlib
import json
import sys
import time

import torch
from safetensors.torch import save_file

from ddpm_nb.data import load_data, to_model_range
from ddpm_nb.distance import train_classifier
from ddpm_nb.runs import WEIGHTS

RECIPES = dict(
    digits=dict(epochs=20, seed=0, learning_rate=2e-3, batch_size=50),
    fashion_mnist=dict(epochs=4, seed=0, learning_rate=2e-3, batch_size=128),
)


def main(name):
    train, test = load_data(name), load_data(name, split="test")
    labels = dict(train=train.labels, test=test.labels)
    began = time.perf_counter()
    net = train_classifier(train, labels["train"], **RECIPES[name], progress=True)
    seconds = time.perf_counter() - began
    with torch.no_grad():
        parts = test.pictures.split(500)
        guess = torch.cat([net(to_model_range(part, test.num_levels)).argmax(1) for part in parts])
    accuracy = float((guess == labels["test"]).double().mean())
    WEIGHTS.mkdir(exist_ok=True)
    file = WEIGHTS / f"{name}_features.safetensors"
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, file)
    card = dict(
        what=f"PictureClassifier, 128 features, trained on the training pictures of {name}",
        recipe=RECIPES[name],
        test_accuracy=accuracy,
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        bytes=file.stat().st_size,
        seconds=round(seconds),
        torch=torch.__version__,
        command=f"python tools/features.py {name}",
    )
    file.chmod(0o644)
    file.with_suffix(".json").write_text(json.dumps(card, indent=1) + "\n")
    print(json.dumps(card, indent=1))


if __name__ == "__main__":
    if sys.argv[1:] not in ([name] for name in RECIPES):
        sys.exit(__doc__)
    main(sys.argv[1])
