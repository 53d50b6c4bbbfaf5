"""Draws with Stable Diffusion, its denoiser an engine.

Put {"steps": 50, "guidance_scale": 7.5} as sampler.json into PIPELINE: else it is calibrated without guidance.

export-engine run PIPELINE --recipe fp8 --out RUN && export-engine bundle RUN --out BUNDLE
python diffusers_sd.py PIPELINE BUNDLE --prompt "a fox in the snow" --out picture.png
"""

from __future__ import annotations

import argparse

import torch
from diffusers import StableDiffusionPipeline

from engines.diffusers import denoiser


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draws a picture with Stable Diffusion, its denoiser an engine.")
    parser.add_argument("pipeline", help="folder of a diffusers pipeline")
    parser.add_argument("bundle", help="folder or zip that `export-engine bundle` wrote")
    parser.add_argument("--prompt", default="a fox in the snow")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--out", default="picture.png")
    asked = parser.parse_args(arguments)

    pipeline = StableDiffusionPipeline.from_pretrained(asked.pipeline)
    pipeline.unet = denoiser(asked.bundle)
    picture = pipeline(
        asked.prompt,
        num_inference_steps=asked.steps,
        generator=torch.Generator().manual_seed(asked.seed),
    ).images[0]
    picture.save(asked.out)


if __name__ == "__main__":
    main()
