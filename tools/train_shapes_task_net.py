"""Trains the network whose features judge `shapes-unet`.

    python tools/train_shapes_task_net.py --out calib_data/models/shapes-unet/features.safetensors

It learns to say what a picture shows, from pictures rendered on the fly of captions that are not held out; prints its
accuracy on captions that are. Seeded; four minutes on one core.
"""

import itertools
from pathlib import Path

import click
import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from calib_data import shapes
from exporter.tasks.shapes import AttributeNet, answers

BATCH = 64
NOISE = 0.1  # samples are never exactly as rendered


def pictures(rng: np.random.Generator, count: int, *, held_out: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws noisy images [count, 3, 32, 32] and their answers [count, 7]."""
    captions = list(itertools.islice(shapes.draw(rng, held_out=held_out), count))
    images = torch.from_numpy(np.stack([shapes.render(caption, rng) for caption in captions]))
    noise = NOISE * rng.random((count, 1, 1, 1)) * rng.standard_normal(images.shape)
    return images + torch.from_numpy(noise).float(), torch.tensor([answers(caption) for caption in captions])


@torch.no_grad()
def accuracy(net: AttributeNet, images: torch.Tensor, wanted: torch.Tensor) -> tuple[float, float]:
    """Returns the share of answers, and of whole pictures, that are right."""
    right = torch.stack([part.argmax(dim=1) for part in net(images)], dim=1) == wanted
    return float(right.double().mean()), float(right.all(dim=1).double().mean())


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--steps", default=2500, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(out: Path, steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    net = AttributeNet()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for step in range(steps):
        images, wanted = pictures(rng, BATCH, held_out=False)
        pairs = zip(net(images), wanted.T, strict=True)
        loss = sum(F.cross_entropy(part, want, label_smoothing=0.05) for part, want in pairs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 250 == 0:
            click.echo(f"step {step + 1}/{steps}  loss {loss.item():.4f}")
    net.half().float().eval()  # judged as stored
    for name, held_out in (("training", False), ("held out", True)):
        answered, whole = accuracy(net, *pictures(rng, 2000, held_out=held_out))
        click.echo(f"{name}: answers {answered:.4f}, whole pictures {whole:.4f}")
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.half().contiguous() for key, value in net.state_dict().items()}, out)


if __name__ == "__main__":
    main()
