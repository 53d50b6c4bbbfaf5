"""Trains the shipped `digits-dit` model: a class-conditional DiT on scikit-learn's handwritten digits.

    python tools/train_digits_dit.py --out calib_data/models/digits-dit

Writes a diffusers pipeline folder (transformer/, scheduler/, sampler.json). Seeded; under 60 minutes on 2 CPU cores.
"""

import json
import time
from pathlib import Path

import click
import numpy as np
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

CLASSES = 10
CONFIG = {
    "num_attention_heads": 6,
    "attention_head_dim": 32,
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": 6,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": CLASSES,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "clip_sample": True,
    "set_alpha_to_one": True,
}
SAMPLER = {"steps": 25, "guidance_scale": 1.0, "pixels": True, "task": "digits", "task_net": "features.safetensors"}


def digits_split() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns (train images, train labels, held-out images, held-out labels); images [n, 1, 8, 8] in [-1, 1].

    One fifth of the 1,797 digits, stratified by class, is held out of every training here.
    """
    data = load_digits()
    images = (data.images[:, None].astype(np.float32) / 8.0) - 1.0
    train, held, train_y, held_y = train_test_split(
        images, data.target, test_size=0.2, random_state=0, stratify=data.target
    )
    return train, train_y, held, held_y


def build_model() -> DiTTransformer2DModel:
    """Builds the DiT with zero-initialised gates and output, so that training starts at the identity."""
    model = DiTTransformer2DModel(**CONFIG)
    for block in model.transformer_blocks:
        torch.nn.init.zeros_(block.norm1.linear.weight)
        torch.nn.init.zeros_(block.norm1.linear.bias)
    torch.nn.init.zeros_(model.proj_out_2.weight)
    torch.nn.init.zeros_(model.proj_out_2.bias)
    return model.eval()  # eval: labels are dropped below, once for all blocks, not per block by diffusers


def save(model: torch.nn.Module, averaged: dict[str, torch.Tensor], out: Path) -> None:
    """Writes the averaged weights as fp16 safetensors, and the configs, as a diffusers pipeline folder."""
    (out / "transformer").mkdir(parents=True, exist_ok=True)
    (out / "scheduler").mkdir(parents=True, exist_ok=True)
    state = {name: averaged[name].to(torch.float16).contiguous() for name, _ in model.named_parameters()}
    save_file(state, out / "transformer" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    write_json(out / "transformer" / "config.json", {"_class_name": "DiTTransformer2DModel", **CONFIG})
    write_json(out / "scheduler" / "scheduler_config.json", {"_class_name": "DDIMScheduler", **SCHEDULER})
    write_json(
        out / "model_index.json",
        {
            "_class_name": "DiTPipeline",
            "transformer": ["diffusers", "DiTTransformer2DModel"],
            "scheduler": ["diffusers", "DDIMScheduler"],
        },
    )
    write_json(out / "sampler.json", SAMPLER)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--steps", default=9000, show_default=True, help="optimizer steps")
@click.option("--batch", default=64, show_default=True)
@click.option("--lr", default=6e-4, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
def main(out: Path, steps: int, batch: int, lr: float, seed: int, device: str) -> None:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    images, labels, _, _ = digits_split()
    x_all = torch.from_numpy(images).to(device)
    y_all = torch.from_numpy(labels).to(device)
    alphas = DDIMScheduler(**SCHEDULER).alphas_cumprod.to(device)
    model = build_model().to(device)
    averaged = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)
    warmup = 300
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / warmup) * max(0.02, 1.0 - i / steps)
    )
    started, smooth = time.monotonic(), 0.0
    for i in range(steps):
        pick = torch.from_numpy(rng.choice(len(x_all), batch, replace=False)).to(device)
        x0, y = x_all[pick], y_all[pick].clone()
        y[torch.from_numpy(rng.random(batch) < 0.1).to(device)] = CLASSES  # no label: guidance can be used
        # stratified timesteps: lower gradient variance than independent draws
        t = torch.from_numpy(((np.arange(batch) + rng.random(batch)) * 1000 / batch).astype(np.int64)).to(device)
        noise = torch.randn(x0.shape, device=device)
        a, s = alphas[t].sqrt()[:, None, None, None], (1 - alphas[t]).sqrt()[:, None, None, None]
        v = model(a * x0 + s * noise, timestep=t, class_labels=y, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(v, a * noise - s * x0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(0.9995, (i + 1) / (i + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.values()), list(model.parameters()), 1 - decay)
        smooth = loss.item() if i == 0 else 0.99 * smooth + 0.01 * loss.item()
        if (i + 1) % 100 == 0:
            spent = time.monotonic() - started
            left = spent / (i + 1) * (steps - i - 1)
            click.echo(f"step {i + 1}/{steps}  loss {smooth:.4f}  {spent / 60:.1f} min, {left / 60:.1f} min left")
        if (i + 1) % 1000 == 0:
            save(model, averaged, out)
    save(model, averaged, out)
    click.echo(f"trained {steps} steps in {(time.monotonic() - started) / 60:.1f} minutes on {device}")


if __name__ == "__main__":
    main()
