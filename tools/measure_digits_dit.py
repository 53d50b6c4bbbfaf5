"""Prints the quality of `digits-dit`: class accuracy, Fréchet distance and recall against the real digits.

python tools/measure_digits_dit.py            1,000 samples, 100 per class, seed 1
"""

import json

import click
import torch
from sklearn.model_selection import train_test_split
from train_digits_dit import digits_split

from exporter.checkpoint import open_checkpoint
from exporter.metrics import class_accuracy, frechet_distance, knn_recall, load_task_net
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
    images = torch.cat([sample(runner, checkpoint, list(c), seed) for c in track(chunks, len(chunks), "sampling")])
    labels = checkpoint.family.labels(checkpoint.config, range(samples))
    train, train_y, held, held_y = (torch.from_numpy(a) for a in digits_split())
    assert checkpoint.task_net is not None
    net = load_task_net(checkpoint.task_net)
    with torch.no_grad():
        generated, held_features = net.features(images), net.features(held)
        real = torch.cat([net.features(train), held_features])
    # Halves with equal shares of every class: chance differences of classes would make the yardstick too kind.
    halves = train_test_split(real, test_size=0.5, random_state=seed, stratify=torch.cat([train_y, held_y]))
    between = frechet_distance(*halves)
    distance = frechet_distance(generated, real)
    # A memorised model's samples lie much nearer to training digits than fresh real digits do.
    nearest = [torch.cdist(x.flatten(1), train.flatten(1)).min(dim=1).values.median().item() for x in (images, held)]
    result = {
        "samples": samples,
        "steps": checkpoint.sampler["steps"],
        "class_accuracy": class_accuracy(net, images, labels),
        "class_accuracy_of_held_out_digits": class_accuracy(net, held, held_y),
        "knn_recall_of_held_out_digits": knn_recall(held_features, generated),
        "knn_recall_by_training_digits": knn_recall(held_features, net.features(train).detach()),
        "frechet_distance": distance,
        "frechet_distance_between_halves": between,
        "frechet_ratio": distance / between,
        "median_distance_to_nearest_training_digit": {"samples": nearest[0], "held_out_digits": nearest[1]},
    }
    click.echo(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
