"""Pages 03 to 05: their graders know a right answer from a slip, and wrong input is refused in words."""

import ast
import importlib
import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from ddpm_nb.blocks import SelfAttention, group_count
from ddpm_nb.embedding import TimeEmbedding, timestep_embedding
from ddpm_nb.unet import PRESETS, ModelConfig, UNet

ROOT = Path(__file__).parent.parent
PAGES = {"embedding": "03_embedding", "blocks": "04_blocks", "unet": "05_unet"}


def on_page(module, *names):
    """These names as the page of a module defines them (the last definition: a solution, not its gap)."""
    text = (ROOT / "nbs" / f"{PAGES[module]}.ipynb").read_text(encoding="utf-8")
    space, found = dict(vars(importlib.import_module(f"ddpm_nb.{module}"))), {}
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or "\n    !" in source:
            continue
        for node in ast.parse(source).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                exec(compile(ast.Module([node], []), source, "exec"), space)
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                found[node.name] = node
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found[node.targets[0].id] = node
    for name in names:
        exec(compile(ast.Module([found[name]], []), name, "exec"), space)
    return [space[name] for name in names]


# --- 05: the network


def test_the_grader_of_skips():
    *_, grade, right = on_page("unet", "count", "on_meta", "grade_skip_widths", "skip_widths")
    assert grade(right).startswith("Correct")
    assert "stem" in grade(lambda c: right(c)[1:])

    def two_a_level(c):
        return [c.base_dim] + [c.base_dim * m for m in c.dim_multiply for _ in range(2)]

    assert "downsample" in grade(two_a_level)
    assert "order in which they are taken off" in grade(lambda c: right(c)[::-1])
    assert grade(lambda c: None).startswith("Not yet")

    def always_two(c):
        dims = [c.base_dim * m for m in c.dim_multiply]
        return [c.base_dim] + [d for dim in dims for d in [dim] * 3][:-1]

    assert "num_res_blocks is 3" in grade(always_two)


def test_the_grader_of_a_blocks_parameters():
    _, grade, right = on_page("unet", "count", "grade_resnet_parameters", "resnet_parameters")
    assert grade(right).startswith("Correct")
    assert "1x1" in grade(lambda a, b, time: right(a, b, time) - (a != b) * (a * b + b))
    assert "have a bias" in grade(lambda a, b, time: right(a, b, time) - 2 * b)
    assert "brings the time in" in grade(lambda a, b, time: right(a, b, time) - time * b - b)
    assert grade(lambda *args: None).startswith("Not yet")


@pytest.mark.parametrize(
    "fields_, named, said",
    [
        ((8, [1, 2], [2], 32), dict(channels=0),
         "transformer_layers: expected levels in 0..1; got (2,) | "
         "channels: expected a whole number of at least 1; got 0"),
        ((8, [1, 2], [1], 32), dict(attention_head_dim=24),
         "attention_head_dim: expected None, or a divisor of every width with attention; got 24"),
        ((8, [1, 2], [1], 48), dict(norm_num_groups=32),
         "norm_num_groups: expected None, or a divisor of base_dim; got 32"),
        ((8, [], [], 32), {},
         "dim_multiply: expected whole numbers of at least 1, one a level; got ()"),
        ((8, [1, 2], [], 33), dict(norm_num_groups=7, attention_head_dim=7),
         "base_dim: expected an even number of at least 4; got 33"),
        ((8, [1, 2], [1], 32), dict(num_res_blocks=0),
         "num_res_blocks: expected a whole number of at least 1; got 0"),
        (([4, 0], [1, 2], [1], 32), {},
         "lowest_resolution_size: expected a whole number of at least 1, or (h, w); got (4, 0)"),
        (((4, 6, 8), [1, 2], [1], 32), dict(num_res_blocks=True),
         "lowest_resolution_size: expected a whole number of at least 1, or (h, w); "
         "got (4, 6, 8) | num_res_blocks: expected a whole number of at least 1; got True"),
    ],
)  # fmt: skip
def test_a_config_is_refused(fields_, named, said):
    with pytest.raises(ValueError) as e:
        ModelConfig(*fields_, **named)
    assert str(e.value) == said


def test_a_config_names_every_wrong_field():
    wrong = dict(
        attention_head_dim=0, norm_num_groups=-1, norm_eps=1, downsample_padding=2,
        flip_sin_to_cos=1, freq_shift=2, num_res_blocks=1.5, num_classes=0, null_label=0)  # fmt: skip
    with pytest.raises(ValueError) as e:
        ModelConfig("8", 2, [-1], 33, channels=True, dropout=1, **wrong)
    said = str(e.value).split(" | ")
    assert [text.split(":")[0] for text in said] == [field.name for field in fields(ModelConfig)]
    assert said[2] == "transformer_layers: expected levels; got (-1,)"


def test_presets():
    for name in PRESETS:
        c = ModelConfig.preset(name)
        assert ModelConfig.from_dict(json.loads(json.dumps(c.to_dict()))) == c
    assert ModelConfig.preset("ffhq128_long") == ModelConfig.preset("ffhq128")
    grey = ModelConfig.preset("cifar10", channels=1, dropout=0.3)
    assert (grey.channels, grey.dropout, grey.dim_multiply) == (1, 0.3, (1, 2, 2, 2))
    assert PRESETS["cifar10"].get("channels") is None  # changes stay with the config
    with pytest.raises(
        ValueError, match="preset: expected one of digits, .*; got 'no-such-preset'"
    ):
        ModelConfig.preset("no-such-preset")
    with pytest.raises(ValueError, match="expected fields .*; got also depth"):
        ModelConfig.preset("digits", depth=3)
    with pytest.raises(ValueError, match="got also depth"):
        ModelConfig.from_dict({**grey.to_dict(), "depth": 3})
    with pytest.raises(ValueError, match="missing base_dim"):
        ModelConfig.from_dict({k: v for k, v in grey.to_dict().items() if k != "base_dim"})


def test_the_network_refuses_what_it_cannot_take():
    net = UNet(ModelConfig(4, [1, 2, 2], [1], 16)).requires_grad_(False)
    x, t = torch.zeros(2, 3, 16, 16), torch.tensor([1, 700])
    for args, said in (
        ((x[:, :1], t), "(b, 3, h, w), as the config says; got (2, 1, 16, 16)"),
        ((x[0], t), "(b, 3, h, w), as the config says; got (3, 16, 16)"),
        ((torch.zeros(2, 3, 16, 18), t), "multiples of 4; got 16 x 18"),
        ((x, t[:1]), "t: expected shape (2,)"),
    ):
        with pytest.raises(ValueError) as e:
            net(*args)
        assert said in str(e.value)
    assert net(torch.zeros(2, 3, 24, 8), t).shape == (2, 3, 24, 8)


def resnet(a, b, time):
    """Parameters of a residual block: two norms, two convolutions, the time's Linear, a shortcut."""
    shortcut = (a * b + b) * (a != b)
    return 2 * a + 2 * b + 9 * a * b + b + 9 * b * b + b + time * b + b + shortcut


def attention(c):
    """Parameters of self-attention: a norm, and the 1x1 convolutions to q, k, v and out."""
    return 2 * c + 4 * (c * c + c)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_other_numbers_of_blocks_a_level(n):
    """Counted by hand, wired as the flat forward pass says, and without a part that does nothing."""
    names = ("awake", "flat_forward", "lose")
    awake, flat_forward, lose = on_page("unet", *names)
    config = ModelConfig((4, 6), (1, 2), (1,), 8, num_res_blocks=n)
    net = awake(config)
    a, b, time = 8, 16, 32  # the levels' widths and the time's
    embedding = 8 * time + time + time * time + time
    outside = embedding + (9 * 3 * a + a) + 2 * a + (9 * a * 3 + 3)
    down = n * resnet(a, a, time) + (9 * a * a + a)
    down += resnet(a, b, time) + (n - 1) * resnet(b, b, time) + n * attention(b)
    middle = 2 * resnet(b, b, time) + attention(b)
    up = n * resnet(2 * b, b, time) + resnet(b + a, b, time) + (n + 1) * attention(b)
    up += 9 * b * b + b + resnet(b + a, a, time) + n * resnet(2 * a, a, time)
    assert sum(p.numel() for p in net.parameters()) == outside + down + middle + up

    x = torch.randn(2, *config.picture_shape, generator=torch.Generator().manual_seed(0))
    t, skips = torch.tensor([1, 700]), 2 * (n + 1)
    out, flat = net(x, t), flat_forward(net, x, t)
    assert out.shape == x.shape == (2, 3, 8, 12) and torch.equal(out, flat)
    for k in range(skips):
        assert (flat_forward(net, x, t, lose(k)) - out).abs().max() > 1e-3
    with pytest.raises(IndexError):
        flat_forward(net, x, t, lose(skips))
    out.square().mean().backward()
    assert all(p.grad.any() for p in net.parameters())


@pytest.mark.parametrize("name", ["digits", "fashion_mnist"])
def test_two_blocks_a_level_are_what_shipped_weights_are_of(name):
    """The names and shapes of all weights are those of before; configs from before say nothing of the new fields."""
    folder = ROOT / "ddpm_nb" / "weights" / name
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model"]
    saved.pop("num_res_blocks", None)
    config = ModelConfig.from_dict(saved)
    assert config.num_res_blocks == 2
    with torch.device("meta"):
        net = UNet(config)
    ours = {k: list(v.shape) for k, v in net.state_dict().items()}
    with safe_open(folder / "model.safetensors", "pt") as f:
        theirs = {k: f.get_slice(k).get_shape() for k in f.keys()}
    assert ours == theirs


def test_a_pair_says_what_a_number_says():
    square, pair = (ModelConfig(size, [1, 2, 2], [1], 16) for size in (4, (4, 4)))
    assert (square.picture_size, pair.picture_size) == (16, (16, 16))
    assert square.picture_shape == pair.picture_shape == (3, 16, 16)
    wide = ModelConfig.preset("digits", lowest_resolution_size=[4, 6])
    assert wide.lowest_resolution_size == (4, 6) and wide.picture_size == (8, 12)
    assert wide.picture_shape == (1, 8, 12)
    text = json.dumps(wide.to_dict())
    assert '"lowest_resolution_size": [4, 6]' in text
    assert ModelConfig.from_dict(json.loads(text)) == wide


# --- 04: the blocks


def test_the_grader_of_the_early_time():
    _, grade, right = on_page("blocks", "awaken", "grade_early", "early")

    def time(block, emb):
        return block.time_proj(torch.nn.functional.silu(emb))[:, :, None, None]

    def stream_kept_clean(block, x, emb):
        return right(block, x, emb) - time(block, emb)

    assert grade(right).startswith("Correct")
    assert "shortcut has to start after" in grade(stream_kept_clean)
    assert "twice" in grade(lambda block, x, emb: block(x + time(block, emb), emb))
    assert grade(lambda block, x, emb: None).startswith("Not yet")


def test_the_grader_of_attentions_cost():
    grade, right = on_page("blocks", "grade_attention_flops", "attention_flops")
    assert grade(right).startswith("Correct")
    assert "every *pixel*" in grade(lambda c, h, w: 8 * c * c * h * w + 4 * c * h * h)
    assert "half of it" in grade(lambda c, h, w: right(c, h, w) // 2)
    assert "are missing" in grade(lambda c, h, w: 4 * c * (h * w) ** 2)
    assert grade(lambda c, h, w: None).startswith("Not yet")


def test_blocks_refuse():
    with pytest.raises(ValueError, match="base_dim: expected at least 4"):
        group_count(3)
    with pytest.raises(ValueError, match="num_heads: expected a divisor of the 32 channels; got 5"):
        SelfAttention(32, 8, 5)


# --- 03: the time embedding


def test_the_grader_of_later():
    grade, right = on_page("embedding", "grade_later", "later")
    assert grade(right).startswith("Correct")
    assert "earlier" in grade(lambda emb, k: right(emb, -k))
    assert "length 1" in grade(lambda emb, k: emb + k)
    assert "cosines came first" in grade(
        lambda emb, k: torch.cat(right(emb, k).chunk(2, 1)[::-1], 1)
    )
    assert grade(lambda emb, k: None).startswith("Not yet")


def test_the_grader_of_the_clock():
    grade, right = on_page("embedding", "grade_read_clock", "read_clock")

    def angle(emb, i):
        sin, cos = emb.chunk(2, 1)
        return torch.atan2(sin[:, i], cos[:, i])

    assert grade(right).startswith("Correct")
    assert "slow hand" in grade(lambda emb: angle(emb, 0).round().long())
    assert "cut off" in grade(lambda emb: (angle(emb, -1) * 10000).long())
    assert "int64" in grade(lambda emb: angle(emb, -1) * 10000)


def test_the_embedding_refuses():
    with pytest.raises(ValueError, match="dim: expected an even number of at least 4"):
        timestep_embedding(torch.arange(3), 33)
    with pytest.raises(ValueError, match="dim: expected an even number"):
        TimeEmbedding(33)
    with pytest.raises(ValueError) as e:
        timestep_embedding(torch.tensor(5), 32)
    assert "position: expected shape (b,), one a picture; got ()" in str(e.value)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_attention_gives_the_fused_kernels_what_they_want(layout, heads, monkeypatch):
    """They ask for a last axis without gaps; without it torch writes down all pixels squared."""
    seen, attend = [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *qkv: seen.extend(qkv) or attend(*qkv)
    )
    x = torch.randn(2, 32, 4, 4).to(memory_format=layout)
    SelfAttention(32, 8, heads)(x)
    assert len(seen) == 3 and all(v.stride(-1) == 1 for v in seen)
    assert torch._fused_sdp_choice(*seen) != 0  # 0: the way that is not fused
