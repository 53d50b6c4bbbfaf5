"""Trains the digits classifier whose accuracy and features judge `digits-dit`.

    python tools/train_digits_task_net.py --out calib_data/models/digits-dit/features.safetensors

Trained on the four fifths of scikit-learn's digits that `train_digits_dit.py` trains on; prints its accuracy on the
rest.
"""

from pathlib import Path

import click
import torch
from safetensors.torch import save_file
from train_digits_dit import digits_split

from exporter.tasks.digits import Digits, TaskNet


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--epochs", default=80, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(out: Path, epochs: int, seed: int) -> None:
    torch.manual_seed(seed)
    images, labels, held, held_labels = (torch.from_numpy(a) for a in digits_split())
    net = TaskNet()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        for pick in torch.randperm(len(images)).split(64):
            x = images[pick] + 0.1 * torch.randn(len(pick), 1, 8, 8)  # noise: samples are never exactly on the grid
            loss = torch.nn.functional.cross_entropy(net(x), labels[pick], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        if (epoch + 1) % 10 == 0:
            click.echo(f"epoch {epoch + 1}/{epochs}  loss {loss.item():.4f}")
    net.eval()
    save_file(net.state_dict(), out)
    task = Digits(net)
    for name, x, y in (("training", images, labels), ("held out", held, held_labels)):
        click.echo(f"{name}: {task.NAME_OF_SCORE} {task.scores(x, [str(label) for label in y.tolist()]).mean():.4f}")


if __name__ == "__main__":
    main()
