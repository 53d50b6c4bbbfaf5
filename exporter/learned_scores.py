"""Scores by published networks, for users who have their weights: none ship with us and none are ever downloaded.

Weights are looked for where the libraries keep theirs, or in one folder given: `checkpoints/` as torch.hub fills it,
`clip-vit-large-patch14/` and `ImageReward/`. Images are [n, 3, h, w], or [n, 1, h, w] in grey, in [−1, 1].
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engines.errors import UserError, unknown

BATCH = 32  # images at a time: Inception sees them at 299×299
CLIP = "openai/clip-vit-large-patch14"  # torchmetrics' default, which published scores mostly use
LEAST_OF_A_SET = 2  # images, that a covariance takes
EXTRA = "pip install 'torchmetrics[image]' transformers"

Compute = Callable[[torch.Tensor, Any], torch.Tensor]


@dataclass(frozen=True)
class LearnedScore:
    """What a score needs; `load` turns the paths of `files` into a function of images and their counterparts."""

    against: str  # "reference" or "prompts"
    packages: tuple[str, ...]
    install: str
    files: Callable[[Path | None], list[Path]]
    origin: str  # where the weights are found
    load: Callable[[list[Path]], Compute]
    least: int = 1  # pixels to a side


def available(weights: Path | None = None) -> dict[str, str | None]:
    """Returns every score with the reason it cannot be computed here, None where it can."""
    return {name: (fault := _fault(one, weights)) and fault[0] for name, one in SCORES.items()}


def score(
    name: str,
    images: torch.Tensor,
    reference: torch.Tensor | None = None,
    prompts: Sequence[str] | None = None,
    weights: Path | None = None,
) -> torch.Tensor:
    """Returns a score per image, [n], or of the whole set, [], in fp64.

    "lpips" compares image by image with `reference`, "inception-fid" as a set; the others ask `prompts`, one each.
    """
    if name not in SCORES:
        raise unknown("score", name, SCORES)
    one = SCORES[name]
    other = reference if one.against == "reference" else prompts
    if other is None:
        raise UserError(f"score {name}: has nothing to hold the images against", fix=f"give {one.against}")
    if name != "inception-fid" and len(other) != len(images):
        raise UserError(f"score {name}: {len(images)} images and {len(other)} {one.against}", fix="give one per image")
    if name == "inception-fid" and min(len(images), len(other)) < LEAST_OF_A_SET:
        raise UserError(
            f"score {name}: {len(images)} images against {len(other)}, of which no spread can be told",
            fix=f"give {LEAST_OF_A_SET} of each or more; thousands, for a figure that others compare with",
        )
    if min(images.shape[2:]) < one.least:
        raise UserError(
            f"score {name}: the images have {images.shape[2]}×{images.shape[3]} pixels",
            fix=f"its network needs {one.least} to a side",
        )
    if fault := _fault(one, weights):
        raise UserError(f"score {name}: {fault[0]}", fix=fault[1])
    from safetensors import SafetensorError

    with _offline(), _no_pickle(), torch.no_grad():
        paths = one.files(weights)
        try:
            compute = one.load(paths)
        except (OSError, RuntimeError, ValueError, pickle.UnpicklingError, SafetensorError) as error:
            raise UserError(
                f"score {name}: the weights in {paths[0].parent} cannot be read ({error})", fix=one.origin
            ) from error
        return compute(_rgb(images), _rgb(other) if isinstance(other, torch.Tensor) else other).double()


def _fault(one: LearnedScore, weights: Path | None) -> tuple[str, str] | None:
    """Returns what keeps a score from being computed, and the fix."""
    for package in one.packages:
        try:
            importlib.import_module(package)
        except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision built for another torch
            return f"package {package} cannot be imported ({error})", one.install
    if missing := [str(path) for path in one.files(weights) if not path.is_file()]:
        return f"its weights are missing: {', '.join(missing)}", one.origin
    return None


def _rgb(images: torch.Tensor) -> torch.Tensor:
    return images.detach().cpu().float().nan_to_num().clamp(-1, 1).expand(-1, 3, -1, -1)


def _pictures(images: torch.Tensor) -> list[Any]:
    """Returns PIL images."""
    from PIL import Image

    pixels = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(image) for image in pixels]


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Keeps huggingface_hub from the network: it answers from its cache, or says it cannot."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def _no_pickle() -> Iterator[None]:
    """Makes torch read tensors alone from its files, whatever the library that opens them asks for."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before, os.environ[name] = os.environ.get(name), "1"
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


def _torch_file(name: str) -> Callable[[Path | None], list[Path]]:
    return lambda weights: [Path(weights or torch.hub.get_dir()) / "checkpoints" / name]


def _load_fid(paths: list[Path]) -> Compute:
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(normalize=True, feature_extractor_weights_path=str(paths[0]))

    def compute(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        for real, tensor in ((True, reference), (False, images)):
            for batch in torch.split(tensor, BATCH):
                metric.update((batch + 1) / 2, real=real)
        return metric.compute()

    return compute


def _load_lpips(paths: list[Path]) -> Compute:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    before = torch.hub.get_dir()
    torch.hub.set_dir(str(paths[0].parent.parent))  # the backbone has no other way to be told where its file is
    try:
        metric = LearnedPerceptualImagePatchSimilarity(net_type="alex", reduction="none")
    finally:
        torch.hub.set_dir(before)

    def compute(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        for batch, other in zip(torch.split(images, BATCH), torch.split(reference, BATCH), strict=True):
            metric.update(batch, other)
        return metric.compute().reshape(len(images))

    return compute


def _clip_files(weights: Path | None) -> list[Path]:
    from huggingface_hub import constants, try_to_load_from_cache

    if weights:
        folder = weights / Path(CLIP).name
    else:
        found = try_to_load_from_cache(CLIP, "config.json")
        cache = Path(constants.HF_HUB_CACHE) / f"models--{CLIP.replace('/', '--')}"
        folder = Path(found).parent if isinstance(found, str) else cache
    return [folder / name for name in ("config.json", "model.safetensors", "tokenizer.json")]


def _load_clip(paths: list[Path]) -> Compute:
    """Source: Hessel et al. 2021, arXiv 2104.08718, as torchmetrics scales it: max(100·cos, 0).

    Not by torchmetrics: its 1.9 does not read what the CLIP model of transformers 5 returns.
    """
    from transformers import CLIPModel, CLIPProcessor

    folder = paths[0].parent
    model = CLIPModel.from_pretrained(folder, local_files_only=True)
    processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)

    def compute(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        cosines = []
        for start in range(0, len(images), BATCH):
            part = slice(start, start + BATCH)
            pictures, texts = _pictures(images[part]), list(prompts[part])
            found = model(**processor(pictures, texts, return_tensors="pt", padding=True, truncation=True))
            cosines.append((found.image_embeds * found.text_embeds).sum(dim=1))
        return 100 * torch.cat(cosines).clamp(min=0)

    return compute


def _reward_files(weights: Path | None) -> list[Path]:
    from huggingface_hub import constants, try_to_load_from_cache

    folder = (weights or Path.home() / ".cache") / "ImageReward"
    tokenizer = try_to_load_from_cache("bert-base-uncased", "vocab.txt")
    cache = Path(constants.HF_HUB_CACHE) / "models--bert-base-uncased" / "vocab.txt"
    return [
        folder / "ImageReward.pt",
        folder / "med_config.json",
        Path(tokenizer) if isinstance(tokenizer, str) else cache,
    ]


def _load_reward(paths: list[Path]) -> Compute:
    import ImageReward

    with contextlib.redirect_stdout(sys.stderr):  # it prints, and our output may be JSON
        model = ImageReward.load(str(paths[0]), device="cpu", med_config=str(paths[1]))

    def compute(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        pairs = zip(prompts, _pictures(images), strict=True)
        return torch.tensor([model.score(prompt, image) for prompt, image in pairs])

    return compute


SCORES = {
    "inception-fid": LearnedScore(
        against="reference",
        packages=("torchmetrics", "torchvision", "torch_fidelity"),
        install=EXTRA,
        files=_torch_file("weights-inception-2015-12-05-6726825d.pth"),
        origin="put the file of that name from https://github.com/toshas/torch-fidelity/releases/tag/v0.2.0 there",
        load=_load_fid,
    ),
    "lpips": LearnedScore(
        against="reference",
        packages=("torchmetrics", "torchvision"),
        install=EXTRA,
        files=_torch_file("alexnet-owt-7be5be79.pth"),
        origin="put https://download.pytorch.org/models/alexnet-owt-7be5be79.pth there",
        load=_load_lpips,
        least=32,
    ),
    "clip": LearnedScore(
        against="prompts",
        packages=("transformers",),
        install=EXTRA,
        files=_clip_files,
        origin=f"hf download {CLIP}",
        load=_load_clip,
    ),
    "image-reward": LearnedScore(
        against="prompts",
        packages=("ImageReward",),
        install="pip install image-reward git+https://github.com/openai/CLIP.git; 1.5 needs a transformers before 5",
        files=_reward_files,
        origin="hf download THUDM/ImageReward --local-dir ~/.cache/ImageReward; hf download bert-base-uncased",
        load=_load_reward,
    ),
}
