"""Networks that are told what a picture shows: from the data to the drawn picture."""

import json
from dataclasses import replace

import pytest
import torch
from networks import PLAIN, TEN, awake
from PIL import Image

from ddpm_nb.data import PictureData, PictureFolder, load_data
from ddpm_nb.embedding import LabelEmbedding
from ddpm_nb.objective import Denoiser, training_loss
from ddpm_nb.runs import load_denoiser, read_checkpoint
from ddpm_nb.sample import SAMPLERS, sample
from ddpm_nb.scheduler import CosineNoiseScheduler
from ddpm_nb.train import DiffusionConfig, Trainer, train_diffusion
from ddpm_nb.unet import UNet


def test_new_rows_change_nothing():
    """A network without labels, and the same weights with a new table: the same answers to the last bit."""
    plain, ten = awake(PLAIN), UNet(TEN).eval()
    missing, unexpected = ten.load_state_dict(plain.state_dict(), strict=False)
    assert missing == ["label_embedding.table"] and not unexpected
    x, t, labels = torch.randn(3, 1, 8, 8), torch.tensor([1, 7, 900]), torch.tensor([0, 9, 10])
    assert torch.equal(ten(x, t, labels), plain(x, t)) and torch.equal(ten(x, t), plain(x, t))


@torch.no_grad()
def test_a_row_acts_on_its_class_alone():
    net = awake(TEN)
    x, t, labels = torch.randn(4, 1, 8, 8), torch.full((4,), 300), torch.tensor([3, 7, 10, 3])
    before, none = net(x, t, labels), net(x, t)
    net.label_embedding.table[3] += 1
    moved = (net(x, t, labels) - before).flatten(1).abs().amax(1)
    assert (moved[[0, 3]] > 1e-2).all() and moved[1] == moved[2] == 0
    torch.testing.assert_close(before[2], none[2])  # the last row: no label
    assert LabelEmbedding(10, 8)().shape == (8,)


@pytest.mark.parametrize(
    "config, labels, said",
    [
        (PLAIN, torch.tensor([1, 2]), "labels: expected none, this network knows no classes"),
        (TEN, torch.tensor([1]), r"labels: expected shape \(2,\), a class for each picture"),
    ],
)
def test_the_network_refuses_labels_that_do_not_fit(config, labels, said):
    with pytest.raises(ValueError, match=said):
        UNet(config)(torch.zeros(2, 1, 8, 8), torch.tensor([1, 2]), labels)


@pytest.mark.parametrize("method", SAMPLERS)
def test_every_sampler_draws_what_is_asked_for(method):
    """In batches of any size; a label changes its own picture and no other."""
    denoiser = Denoiser(awake(TEN), CosineNoiseScheduler(50), "v")
    how = dict(steps=4, method=method, spacing="uniform")
    one = sample(denoiser, 3, labels=[1, 2, 10], **how)
    torch.testing.assert_close(
        sample(denoiser, 3, labels=torch.tensor([1, 2, 10]), batch_size=2, **how),
        one,
        rtol=0,
        atol=1e-4,
    )
    other = sample(denoiser, 3, labels=[1, 5, 10], **how)
    assert torch.equal(other[[0, 2]], one[[0, 2]]) and not torch.equal(other[1], one[1])
    torch.testing.assert_close(sample(denoiser, 3, **how)[2], one[2], rtol=0, atol=1e-4)


@pytest.mark.parametrize("labels", [11, -1, [1, 2], 1.5, True, "seven", [[1, 2, 3]]])
def test_sampling_refuses_what_is_no_label(labels):
    denoiser = Denoiser(awake(TEN), CosineNoiseScheduler(50))
    with pytest.raises(ValueError, match="labels: expected"):
        sample(denoiser, 3, labels=labels, steps=1)
    with pytest.raises(ValueError, match="knows no classes"):
        sample(Denoiser(awake(PLAIN), CosineNoiseScheduler(50)), 3, labels=1, steps=1)


# ---- data


def test_labels_come_with_the_pictures():
    for split, n in dict(train=1500, test=297).items():
        data = load_data("digits", split=split)
        assert data.labels.shape == (n,) and data.class_names == tuple("0123456789")
    assert "10 classes" in repr(data)


@pytest.mark.parametrize(
    "labels, names, said",
    [
        (torch.tensor([0, 1]), ("a", "b"), "expected int64 labels"),
        (torch.tensor([0.0, 1, 1]), ("a", "b"), "expected int64 labels"),
        ([0, 1, 1], ("a", "b"), "expected int64 labels"),
        (
            torch.tensor([0, 1, 2]),
            ("a", "b"),
            r"expected labels in 0..1, one of class_names; got 0..2",
        ),
        (torch.tensor([-1, 0, 1]), ("a", "b"), "got -1..1"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, names, said):
    with pytest.raises(ValueError, match=said):
        PictureData(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), "three", 256, labels, names)


def folder(root, files):
    "Grey pictures, each of a level of its own; a level of None: bytes that are no picture's end."
    for name, level in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), level or 0).save(path)
        if level is None:  # the header can be read, the rest is not there
            path.write_bytes(path.read_bytes()[:42])
    return root


def test_folders_are_classes_and_what_cannot_be_read_is_replaced_by_its_own(tmp_path):
    files = {
        "cat/1.png": 10,
        "cat/2.png": None,
        "dog/old/3.png": 30,
        "dog/4.png": 40,
        "cat/5.png": 50,
    }
    data = PictureFolder(folder(tmp_path, files))
    assert data.class_names == ("cat", "dog")
    assert [data.class_names[k] for k in data.labels] == [f.split("/")[0] for f in data.files]
    with pytest.warns(UserWarning, match="skipped 1 that cannot be read: cat/2.png"):
        levels = {f: int(data[i][0, 0, 0]) for i, f in enumerate(data.files)}
    assert levels.pop("cat/2.png") == 50  # the next cat, not the next file
    assert levels == {f: v for f, v in files.items() if v is not None}


def test_a_folder_without_classes_has_no_labels(tmp_path):
    data = PictureFolder(folder(tmp_path, {"cat/1.png": 10, "2.png": 20}))
    assert data.labels is None and data.class_names == ()
    assert PictureFolder(tmp_path / "cat").labels is None


# ---- training


def trainer(net=TEN, data=None, **fields):
    c = DiffusionConfig(batch_size=16, precision="float32", **fields)
    return Trainer(c.new_denoiser(net), data or load_data("digits"), c)


def test_a_step_is_told_the_labels_of_its_pictures():
    """Kept back for one in ten, the same ones in one process and in two; all where all are kept back."""
    run = trainer()
    step, drawn = next(run._batches(3))
    assert step == 4
    index = {
        x.numpy().tobytes(): k for x, k in zip(run.data.pictures, run.data.labels, strict=True)
    }
    shown = torch.tensor([int(index[x.numpy().tobytes()]) for x in drawn.x0])
    kept_back = drawn.labels == 10
    assert torch.equal(drawn.labels[~kept_back], shown[~kept_back])
    run.rank, run.world = 1, 2
    assert torch.equal(next(run._batches(3))[1].labels, drawn.labels[8:])
    assert (next(trainer(label_dropout=1.0)._batches(0))[1].labels == 10).all()
    assert (next(trainer(label_dropout=0.0)._batches(0))[1].labels < 10).all()
    assert next(trainer(PLAIN)._batches(0))[1].labels is None


def test_labels_reach_the_loss_and_the_table():
    run, seen = trainer(grad_accumulation=2, label_dropout=0.0), []

    def loss(denoiser, x0, t, noise, labels, **kwargs):
        seen.append(labels)
        return training_loss(denoiser, x0, t, noise, labels, **kwargs)

    run.loss = loss
    with torch.no_grad():
        for p in run.model.parameters():
            p += 0.1
    before = run.model.label_embedding.table.detach().clone()
    batch = run.batch(1, run.data.pictures[:16], run.data.labels[:16])
    run.step(1, batch)
    assert torch.equal(torch.cat(seen), run.data.labels[:16])
    moved = (run.model.label_embedding.table != before).any(1).nonzero().flatten()
    assert moved.tolist() == sorted(set(run.data.labels[:16].tolist()))


def test_a_loss_that_knows_no_labels_still_trains():
    run = trainer(PLAIN)
    run.loss = lambda denoiser, x0, t, noise: training_loss(denoiser, x0, t, noise)
    assert torch.isfinite(run.step(1, run.batch(1, run.data.pictures[:16])))


@pytest.mark.parametrize(
    "classes, data, said",
    [
        (9, None, "num_classes: expected 10, the classes of digits; got 9"),
        (
            10,
            PictureData(torch.zeros(16, 1, 8, 8, dtype=torch.uint8)),
            "pictures has no labels; got 10",
        ),
    ],
)
def test_a_network_with_classes_needs_data_with_as_many(classes, data, said):
    with pytest.raises(ValueError, match=said):
        trainer(replace(PLAIN, num_classes=classes), data)


def test_a_labelled_run_is_resumed_bit_for_bit_and_keeps_the_names(tmp_path):
    c = DiffusionConfig(
        batch_size=16, max_steps=6, save_every=3, sample_every=6, precision="float32"
    )
    whole, parts = (replace(c, out_dir=str(tmp_path / name)) for name in ("whole", "parts"))
    train_diffusion(whole, TEN, progress=False)
    train_diffusion(replace(parts, max_steps=3), TEN, progress=False)
    train_diffusion(parts, TEN, resume=True, progress=False)
    for part in ("model", "training"):
        a, b = (read_checkpoint(tmp_path / n / "step-0000006", part)[1] for n in ("whole", "parts"))
        assert all(torch.equal(a[k], b[k]) for k in a) and a.keys() == b.keys()
    assert load_denoiser(tmp_path / "whole").class_names == tuple("0123456789")
    assert (tmp_path / "whole" / "samples" / "step-0000006.png").is_file()
    saved = json.loads((tmp_path / "whole" / "step-0000006" / "config.json").read_text())
    assert saved["model"]["num_classes"] == 10 and len(saved["data"]["class_names"]) == 10


def test_diffusers_says_the_same_of_a_class():
    pytest.importorskip("diffusers")
    from ddpm_nb.interop import unet_to_diffusers

    net = awake(TEN)
    unet, labels = unet_to_diffusers(net), torch.tensor([3, 10])
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([1, 700])
    with torch.no_grad():
        theirs = unet(x, t - 1, class_labels=labels).sample
        torch.testing.assert_close(theirs, net(x, t, labels), rtol=1e-4, atol=1e-4)
        assert (unet(x, t - 1, class_labels=labels.flip(0)).sample - theirs).abs().max() > 1e-2


def test_a_label_is_a_bias():
    """for_label: the same answers from a network without a table, and the first one is left alone."""
    net = awake(TEN)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([1, 7, 900])
    with torch.no_grad():
        for label, said in {4: 4, 10: None, None: None}.items():
            alone = net.for_label(label)
            assert alone.config == PLAIN and not alone.training
            labels = None if said is None else torch.full((3,), said)
            torch.testing.assert_close(alone(x, t), net(x, t, labels), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    for label in (-1, 11, 1.0, True, "seven"):
        with pytest.raises(ValueError, match="label: expected 0..9, or 10 for no label"):
            net.for_label(label)
    with pytest.raises(ValueError, match="knows no classes"):
        awake(PLAIN).for_label()


NINE = replace(TEN, num_classes=9, null_label=False)  # all rows are classes


def test_a_network_without_a_row_for_no_label_refuses_none():
    net = awake(NINE)
    assert net.label_embedding.table.shape[0] == 9
    with pytest.raises(ValueError, match="has no row for no label; got None"):
        net(torch.zeros(1, 1, 8, 8), torch.tensor([1]))
    with pytest.raises(ValueError, match="expected 0..8; got 9"):
        sample(Denoiser(net, CosineNoiseScheduler(50)), 2, labels=9, steps=1)
    with pytest.raises(ValueError, match="label: expected 0..8; got None"):
        net.for_label()
    with pytest.raises(ValueError, match="label_dropout: expected 0, .* got 0.1"):
        trainer(replace(NINE, num_classes=10))


@pytest.mark.parametrize("row, classes", [(None, 11), ("last", 10)])
def test_classes_come_in_with_their_rows(row, classes, tmp_path):
    pytest.importorskip("diffusers")
    from ddpm_nb.interop import to_diffusers, unet_from_diffusers, unet_to_diffusers

    net = awake(TEN)
    unet = unet_to_diffusers(net)
    back = unet_from_diffusers(unet, no_label_row=row)
    assert back.config == replace(TEN, num_classes=classes, null_label=row == "last")
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in back.state_dict().items())
    assert unet_to_diffusers(back).config.num_class_embeds == 11
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([1, 700]), torch.tensor([3, 10])
    with torch.no_grad():
        net.to(memory_format=torch.channels_last)  # as it came in
        assert torch.equal(back(x, t, labels), net(x, t, labels))
    with pytest.raises(ValueError, match="no_label_row: expected None or 'last'; got 'first'"):
        unet_from_diffusers(unet, no_label_row="first")
    theirs, _ = to_diffusers(Denoiser(net, CosineNoiseScheduler(50), "v"))
    assert theirs.config.num_class_embeds == 11


# ---- a run that starts where another ended


@pytest.fixture
def ended(tmp_path):
    "A short run without labels."
    c = DiffusionConfig(
        batch_size=16, max_steps=3, save_every=3, schedule="cosine", prediction="v",
        learning_rate=1e-2, ema_decay=0.5, precision="float32", out_dir=str(tmp_path / "ended"),
    )  # fmt: skip
    train_diffusion(c, PLAIN, progress=False, device="cpu")
    return c


def test_new_labels_draw_the_old_pictures_until_they_are_trained(ended, tmp_path):
    """Bit for bit at step 0; the averaged weights; trained, the rows differ; resumed without the source."""
    c = replace(ended, init_from=ended.out_dir, out_dir=str(tmp_path / "labelled"))
    new, old = c.new_denoiser(TEN), load_denoiser(ended.out_dir)
    new.net.to(memory_format=torch.channels_last)  # as what is loaded
    assert torch.equal(new.net.stem.weight, old.net.stem.weight)
    how = dict(steps=3, method="ddim", spacing="uniform")
    assert torch.equal(sample(new, 2, labels=[0, 9], **how), sample(old, 2, **how))
    assert old.net.head.weight.any()
    train_diffusion(replace(c, max_steps=2), PLAIN, progress=False, labels=True, device="cpu")
    (tmp_path / "ended").rename(tmp_path / "gone")
    done = train_diffusion(c, TEN, resume=True, progress=False, device="cpu")
    assert load_denoiser(done).net.label_embedding.table.any()
    again = replace(c, init_from=c.out_dir, out_dir=str(tmp_path / "fewer"))
    few = again.new_denoiser(replace(TEN, num_classes=3))  # other classes: what it knows of all
    torch.testing.assert_close(
        sample(few, 2, labels=[0, 2], **how), sample(load_denoiser(done), 2, **how)
    )


@pytest.mark.parametrize(
    "changes, network, said",
    [
        (dict(prediction="x0"), TEN, "init_from: expected a network that predicts x0"),
        ({}, replace(TEN, base_dim=8), "base_dim 16 and not 8"),
        (dict(init_from="nowhere"), TEN, "there is no folder nowhere"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(ended, changes, network, said):
    c = replace(ended, **{"init_from": ended.out_dir} | changes)
    with pytest.raises(ValueError, match=said):
        c.new_denoiser(network)


def test_data_without_classes_cannot_tell_them(tmp_path):
    c = DiffusionConfig(batch_size=4, max_steps=1, out_dir=str(tmp_path / "run"))
    pictures = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="labels: expected data with classes"):
        train_diffusion(c, PLAIN, data=pictures, labels=True, progress=False, device="cpu")
    assert not (tmp_path / "run").exists()
    c = replace(c, dataset_name="digits")
    with pytest.raises(ValueError, match="num_classes: expected 10, .* got 3"):  # not overruled
        train_diffusion(c, replace(TEN, num_classes=3), labels=True, progress=False, device="cpu")


def test_commands_from_a_start_to_one_class_in_diffusers(ended, tmp_path, run):
    pytest.importorskip("diffusers")
    told = tmp_path / "told"
    run(
        "ddpm-train", "--init-from", ended.out_dir, "--labels", "--batch-size", "16",
        "--max-steps", "2", "--out-dir", told, "--device", "cpu",
    )  # fmt: skip
    c = load_denoiser(told).net.config
    assert c == TEN and load_denoiser(told).prediction == "v"
    said = run("ddpm-export", told, tmp_path / "all").stdout
    assert "--label makes a network of one" in said
    said = run("ddpm-export", told, tmp_path / "seven", "--label", "7").stdout
    assert "next: DDPMPipeline" in said
    run("ddpm-import", tmp_path / "all", tmp_path / "back", "--no-label-row", "last")
    run("ddpm-import", tmp_path / "seven", tmp_path / "back7")
    a, b, c = (
        sample(load_denoiser(tmp_path / name), 2, labels=labels, steps=3)
        for name, labels in (("back", 7), ("told", 7), ("back7", None))
    )
    assert torch.equal(a, b)
    torch.testing.assert_close(c, b, rtol=0, atol=1e-4)
