"""Prints the quality of `digits-dit`: class accuracy, Fréchet distance and recall against the real digits.

python tools/measure_digits_dit.py            1,000 samples, 100 per class, seed 1
"""

import json

import click
import torch
from sklearn.model_selection import train_test_split
from train_digits_dit import digits_split

from exporter import tasks
from exporter.checkpoint import open_checkpoint
from exporter.conditions import Conditions, calibration_entries
from exporter.metrics import frechet_distance, knn_recall
from exporter.progress import track
from exporter.runners import TorchRunner
from exporter.sampling import sample


@click.command()
@click.option("--model", default="digits-dit", show_default=True)
@click.option("--samples", default=1000, show_default=True)
@click.option("--steps", type=int, help="sampling steps (default: the model's own)")
@click.option("--seed", default=1, show_default=True)
def main(model: str, samples: int, steps: int | None, seed: int) -> None:
    checkpoint = open_checkpoint(model, steps=steps)
    runner = TorchRunner("float", checkpoint.load(), checkpoint.family)
    chunks = [range(i, min(i + 100, samples)) for i in range(0, samples, 100)]
    conditions = Conditions(checkpoint, calibration_entries(checkpoint, None))
    images = torch.cat(
        [sample(runner, checkpoint, conditions, list(c), seed) for c in track(chunks, len(chunks), "sampling")]
    )
    train, train_y, held, held_y = (torch.from_numpy(a) for a in digits_split())
    task = tasks.load("digits", checkpoint.task_net)
    generated, train_features, held_features = (task.features(x) for x in (images, train, held))
    real = torch.cat([train_features, held_features])
    # Halves with equal shares of every class: chance differences of classes would make the yardstick too kind.
    halves = train_test_split(real, test_size=0.5, random_state=seed, stratify=torch.cat([train_y, held_y]))
    between = frechet_distance(*halves)
    distance = frechet_distance(generated, real)
    # A memorised model's samples lie much nearer to training digits than fresh real digits do.
    nearest = [torch.cdist(x.flatten(1), train.flatten(1)).min(dim=1).values.median().item() for x in (images, held)]
    result = {
        "samples": samples,
        "steps": checkpoint.sampler["steps"],
        "class_accuracy": task.scores(images, conditions.asked(range(samples))).mean().item(),
        "class_accuracy_of_held_out_digits": task.scores(held, [str(y) for y in held_y.tolist()]).mean().item(),
        "knn_recall_of_held_out_digits": knn_recall(held_features, generated),
        "knn_recall_by_training_digits": knn_recall(held_features, train_features),
        "frechet_distance": distance,
        "frechet_distance_between_halves": between,
        "frechet_ratio": distance / between,
        "median_distance_to_nearest_training_digit": {"samples": nearest[0], "held_out_digits": nearest[1]},
    }
    click.echo(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
