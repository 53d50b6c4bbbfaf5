"""Trains the shipped `shapes-unet` model: a text-conditional U-Net, and its text encoder, on rendered shapes.

    python tools/train_shapes_unet.py --out calib_data/models/shapes-unet

First the text encoder learns alone to say what a caption holds, which takes a minute and spares the U-Net from learning
to read; then both train together. Pictures are rendered on the fly from captions that are not held out. Seeded: every
step's data comes from a generator keyed by seed and step. Resumable: the same command goes on from the last saved step.
"""

import itertools
import time
from pathlib import Path

import click
import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from torch.nn import functional as F
from train_digits_dit import SCHEDULER, write_json
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from calib_data import shapes

TOKENS = 16  # the longest caption has 10 words, and two markers
SPECIAL = ("<pad>", "<start>", "<unk>", "<end>")
WIDTH = 128
UNET = {
    "sample_size": shapes.SIZE,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [32, 64, 128],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 4,  # heads: diffusers keeps the misnomer
    "norm_num_groups": 8,
}
TEXT = {
    "vocab_size": len(SPECIAL) + len(shapes.words()),
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": TOKENS,
    "hidden_act": "gelu",
    "pad_token_id": SPECIAL.index("<pad>"),
    "bos_token_id": SPECIAL.index("<start>"),
    "eos_token_id": SPECIAL.index("<end>"),
}
SAMPLER = {
    "steps": 20,
    "guidance_scale": 1.25,
    "pixels": True,
    "task": "shapes",
    "task_net": "features.safetensors",
    "prompts": "prompts.txt",
    "validation_prompts": "held_out.txt",
}
PROMPTS, HELD_OUT = 64, 1000  # captions to calibrate and to validate with
LAYOUT = 150  # the noisiest timesteps, where little but the caption tells what to draw and where
NO_CAPTION = 0.1  # share of captions dropped, so that guidance can be used
READING_STEPS, READING_BATCH = 300, 128


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Builds a tokenizer of whole words: one it does not know becomes <unk>, which can be told."""
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *shapes.words()))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    markers = [(word, vocabulary[word]) for word in ("<start>", "<end>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=markers)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=TOKENS,
        pad_token="<pad>",
        bos_token="<start>",
        unk_token="<unk>",
        eos_token="<end>",
    )


class Model(nn.Module):
    """The U-Net and its text encoder, trained as one."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = UNet2DConditionModel(**UNET)
        self.text_encoder = CLIPTextModel(CLIPTextConfig(**TEXT))
        nn.init.zeros_(self.unet.conv_out.weight)
        nn.init.zeros_(self.unet.conv_out.bias)

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.text_encoder(input_ids=tokens).last_hidden_state

    def forward(self, image: torch.Tensor, timestep: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return self.unet(image, timestep, self.read(tokens)).sample


class Data:
    """Captions of the training side, their tokens, and pictures of them."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.tokenizer = build_tokenizer()

    def captions(self, purpose: str, step: int, count: int) -> tuple[list[shapes.Caption], np.random.Generator]:
        rng = np.random.default_rng([self.seed, len(purpose), step])
        return list(itertools.islice(shapes.draw(rng, held_out=False), count)), rng

    def tokens(self, sentences: list[str]) -> torch.Tensor:
        padded = self.tokenizer(sentences, padding="max_length", max_length=TOKENS, return_tensors="pt")
        return padded["input_ids"]


def answers(caption: shapes.Caption) -> list[int]:
    """Returns what a caption holds, as classes: shape, colour, size of both objects (0: no second), and the place."""
    tables = (list(shapes.AREAS), list(shapes.COLOURS), list(shapes.SIZES))
    found = [1 + table.index(word) for one in caption.objects for table, word in zip(tables, _parts(one), strict=True)]
    return [*(found + [0] * 3)[:6], [*shapes.PLACES, *shapes.RELATIONS].index(caption.place)]


def _parts(one: shapes.Object) -> tuple[str, str, str]:
    return one.shape, one.colour, one.size


def learn_to_read(model: Model, data: Data) -> None:
    """Trains the text encoder to answer, from its last token, what the caption holds."""
    classes = [4, 7, 3] * 2 + [len(shapes.PLACES) + len(shapes.RELATIONS)]
    head = nn.Linear(WIDTH, sum(classes))
    optimizer = torch.optim.AdamW([*model.text_encoder.parameters(), *head.parameters()], lr=1e-3)
    for step in range(READING_STEPS):
        captions, _ = data.captions("reading", step, READING_BATCH)
        tokens = data.tokens([str(c) for c in captions])
        last = (tokens == SPECIAL.index("<end>")).int().argmax(dim=1)
        states = model.read(tokens)[torch.arange(len(tokens)), last]
        wanted = torch.tensor([answers(c) for c in captions]).T
        parts = head(states).split(classes, dim=1)
        loss = sum(F.cross_entropy(part, want) for part, want in zip(parts, wanted, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            right = torch.stack([p.argmax(1) == w for p, w in zip(parts, wanted, strict=True)]).float().mean()
            click.echo(f"reading {step + 1}/{READING_STEPS}  loss {loss.item():.4f}  right {100 * right:.1f}%")


def save(model: Model, averaged: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes the averaged weights as fp16 safetensors, and the configs, as a diffusers pipeline folder."""
    for part, file in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        (out / part).mkdir(parents=True, exist_ok=True)
        state = {
            name.removeprefix(f"{part}."): value.to(torch.float16).contiguous()
            for name, value in averaged.items()
            if name.startswith(f"{part}.")
        }
        save_file(state, out / part / f"{file}.safetensors", metadata={"format": "pt"})
    write_json(out / "unet" / "config.json", {"_class_name": "UNet2DConditionModel", **UNET})
    model.text_encoder.config.architectures = ["CLIPTextModel"]
    model.text_encoder.config.save_pretrained(out / "text_encoder")
    tokenizer.save_pretrained(out / "tokenizer")
    (out / "scheduler").mkdir(exist_ok=True)
    write_json(out / "scheduler" / "scheduler_config.json", {"_class_name": "DDIMScheduler", **SCHEDULER})
    parts = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    write_json(out / "model_index.json", {"_class_name": "DiffusionPipeline", **parts})
    write_json(out / "sampler.json", SAMPLER)
    write_captions(out / "prompts.txt", PROMPTS, held_out=False)
    write_captions(out / "held_out.txt", HELD_OUT, held_out=True)


def timesteps(rng: np.random.Generator, count: int) -> np.ndarray:
    """Draws timesteps, stratified for a lower variance; a third lie where a picture's layout is decided."""
    late = count // 3
    spread = (np.arange(count - late) + rng.random(count - late)) * 1000 / (count - late)
    return (
        np.concatenate([spread, 1000 - (np.arange(late) + rng.random(late)) * LAYOUT / late])
        .astype(np.int64)
        .clip(0, 999)
    )


def write_captions(path: Path, count: int, *, held_out: bool) -> None:
    """Writes captions of one side of the split, drawn from a seed of their own."""
    drawn = itertools.islice(shapes.draw(np.random.default_rng(2024), held_out=held_out), count)
    path.write_text("".join(f"{caption}\n" for caption in drawn))


def save_state(
    path: Path, model: Model, averaged: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer, step: int
):
    """Writes all that training goes on from, whole or not at all."""
    tensors = {f"model/{n}": p.detach() for n, p in model.named_parameters()}
    tensors |= {f"averaged/{n}": p for n, p in averaged.items()} | {"step": torch.tensor(step)}
    for name, parameter in model.named_parameters():
        moments = optimizer.state[parameter]
        tensors |= {f"{key}/{name}": moments[key] for key in ("exp_avg", "exp_avg_sq", "step")}
    save_file(tensors, path.with_suffix(".unfinished"))
    path.with_suffix(".unfinished").replace(path)


def load_state(path: Path, model: Model, averaged: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> int:
    tensors = load_file(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model/{name}"])
            averaged[name].copy_(tensors[f"averaged/{name}"])
            moments = {key: tensors[f"{key}/{name}"] for key in ("exp_avg", "exp_avg_sq", "step")}
            optimizer.state[parameter] = {k: v.to(parameter.device) for k, v in moments.items()}
    return int(tensors["step"])


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--state", type=click.Path(path_type=Path), default="out/shapes-unet.safetensors", show_default=True)
@click.option("--steps", default=3200, show_default=True, help="optimizer steps")
@click.option("--batch", default=32, show_default=True)
@click.option("--lr", default=1e-3, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
def main(out: Path, state: Path, steps: int, batch: int, lr: float, seed: int, device: str) -> None:
    torch.manual_seed(seed)
    data = Data(seed)
    model = Model()
    averaged = {name: p.detach().clone().to(device) for name, p in model.named_parameters()}
    state.parent.mkdir(parents=True, exist_ok=True)
    if not state.is_file():
        learn_to_read(model, data)
        averaged = {name: p.detach().clone().to(device) for name, p in model.named_parameters()}
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    done = load_state(state, model, averaged, optimizer) if state.is_file() else 0
    alphas = DDIMScheduler(**SCHEDULER).alphas_cumprod.to(device)
    nothing = data.tokens([""])
    warmup = 200
    started, smooth = time.monotonic(), 0.0
    for i in range(done, steps):
        rate = lr * min(1.0, (i + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * i / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        captions, rng = data.captions("drawing", i, batch)
        x0 = torch.from_numpy(np.stack([shapes.render(c, rng) for c in captions])).to(device)
        tokens = data.tokens([str(c) for c in captions])
        tokens[torch.from_numpy(rng.random(batch) < NO_CAPTION)] = nothing
        t = torch.from_numpy(timesteps(rng, batch)).to(device)
        noise = torch.from_numpy(rng.standard_normal(x0.shape, dtype=np.float32)).to(device)
        a, s = alphas[t].sqrt()[:, None, None, None], (1 - alphas[t]).sqrt()[:, None, None, None]
        loss = F.mse_loss(model(a * x0 + s * noise, t, tokens.to(device)), a * noise - s * x0)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(0.9985, (i + 1) / (i + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.values()), list(model.parameters()), 1 - decay)
        smooth = loss.item() if i == done else 0.98 * smooth + 0.02 * loss.item()
        if (i + 1) % 50 == 0:
            spent = time.monotonic() - started
            left = spent / (i + 1 - done) * (steps - i - 1)
            click.echo(f"step {i + 1}/{steps}  loss {smooth:.4f}  {spent / 60:.1f} min, {left / 60:.1f} min left")
        if (i + 1) % 250 == 0 or i + 1 == steps:
            save_state(state, model, averaged, optimizer, i + 1)
            save(model, averaged, data.tokenizer, out)
    click.echo(f"trained {steps} steps in {(time.monotonic() - started) / 60:.1f} minutes on {device}")


if __name__ == "__main__":
    main()
