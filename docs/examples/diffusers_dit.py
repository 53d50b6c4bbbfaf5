"""Draws with DiT, its denoiser an engine.

Put {"steps": 50, "guidance_scale": 4} as sampler.json into PIPELINE: else it is calibrated without guidance.

export-engine run PIPELINE --recipe fp8 --out RUN && export-engine bundle RUN --out BUNDLE
python diffusers_dit.py PIPELINE BUNDLE --label 207 --out picture.png
"""

from __future__ import annotations

import argparse

import torch
from diffusers import DiTPipeline

from engines.diffusers import denoiser


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draws a picture with DiT, its denoiser an engine.")
    parser.add_argument("pipeline", help="folder of a diffusers pipeline")
    parser.add_argument("bundle", help="folder or zip that `export-engine bundle` wrote")
    parser.add_argument("--label", type=int, default=207, help="number of an ImageNet class")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--out", default="picture.png")
    asked = parser.parse_args(arguments)

    pipeline = DiTPipeline.from_pretrained(asked.pipeline)
    pipeline.transformer = denoiser(asked.bundle)
    picture = pipeline(
        class_labels=[asked.label],
        num_inference_steps=asked.steps,
        generator=torch.Generator().manual_seed(asked.seed),
    ).images[0]
    picture.save(asked.out)


if __name__ == "__main__":
    main()
