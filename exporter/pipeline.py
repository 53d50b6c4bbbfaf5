"""The rest of a text-to-image pipeline, for a bundle: text encoder and VAE decoder as float graphs, and tokenizers.

docs/bundle.md, "A whole pipeline", is what is written.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from engines.artifacts import Json, digest_file, read_json
from engines.backends.ort import OrtRunner, open_session
from engines.pipeline import UNWANTED_CAPTION, UNWANTED_ZEROS, plain_record
from exporter import progress, text, vae
from exporter.checkpoint import INDEX, Checkpoint
from exporter.lower.plain import lower_plain
from exporter.metrics import sqnr_db
from exporter.models import Axis, Tensors
from exporter.text_graph import AXES, TextHalf

TEXT_FOLDER, VAE_FOLDER = "text_encoder", "vae_decoder"
# Pipelines whose captions are read by CLIP alone. T5 overflows in fp16, and FLUX packs its latents.
SERVED = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
# What ONNX Runtime must agree with PyTorch to here, or the graph is wrong (fp32), or its type too narrow (fp16).
# Measured on small pipelines: 114 dB and more, 62 dB and more.
LEAST_DB = {"fp32": 100.0, "fp16": 30.0}
KNOWN_DB, MARGIN_DB = 80.0, 3.0  # what other machines must agree to: as this one does, at most 80 dB, less 3
MODEL = "model.onnx"


def why_not(checkpoint: Checkpoint) -> str | None:
    """Returns why a model's bundle carries no pipeline, None where it does."""
    kind, root = checkpoint.family.text_pipeline(), checkpoint.root
    parts = text.components(root)
    encoders = [name for name in parts if name.startswith("text_encoder")]
    if kind is None or not encoders:
        return "it has no text encoder"
    if kind not in SERVED:
        return f"{kind} is not served; served are {' and '.join(SERVED)}"
    if len(encoders) != len(parts) - len(encoders):
        return f"it has {len(encoders)} text encoders and {len(parts) - len(encoders)} tokenizers"
    for name in encoders:
        if not any((root / name).glob("*.safetensors")):
            return f"{name} has no safetensors weights"
        if read_json(root / name / "config.json").get("use_attention_mask"):
            return f"{name} reads a mask, which is not served"
    if checkpoint.in_pixels:
        return None
    return vae.why_not(root, read_json(root / INDEX), checkpoint.family.latent_shape())


def vae_digest(checkpoint: Checkpoint) -> dict[str, str]:
    """Returns the digest of every file of a served VAE, which the model's own digest does not cover."""
    folder = checkpoint.root / vae.FOLDER
    served = why_not(checkpoint) is None and not checkpoint.in_pixels
    return {file.name: digest_file(file) for file in sorted(folder.iterdir()) if file.is_file()} if served else {}


def write_pipeline(
    checkpoint: Checkpoint, captions: Sequence[str], latents: torch.Tensor, dtypes: Sequence[str], folder: Path
) -> tuple[Json | None, Tensors]:
    """Writes the graphs of a pipeline in float types, and its tokenizers, into a bundle's folder.

    Returns what the manifest says of them (null where none is written; why is told), and the tokens of `captions` and
    the pictures of `latents`, those samples' finished latents, by the names of golden tensors.
    """
    if (reason := why_not(checkpoint)) is not None:
        if checkpoint.family.text_pipeline() is not None:
            progress.note(f"note: the bundle carries no text encoder and VAE: {reason}")
        return None, {}
    text_info, golden = _write_text(checkpoint, captions, dtypes, folder)
    vae_info = None
    if checkpoint.in_pixels:
        pictures = latents
    else:
        vae_info, pictures = _write_vae(checkpoint, latents, dtypes, folder)
    constants = {name: row[0].tolist() for name, row in checkpoint.family.constants(1).items()}
    return {"text": text_info, "vae": vae_info, "constants": constants}, {**golden, "picture": pictures.clamp(-1, 1)}


def _write_text(
    checkpoint: Checkpoint, captions: Sequence[str], dtypes: Sequence[str], folder: Path
) -> tuple[Json, Tensors]:
    half = _open_text(checkpoint)
    wanted, unwanted = half.read(captions), half.read([""] * len(captions))
    (first, *more) = half.write_tokenizers(folder)
    info = {
        **first,
        "more": more,
        "outputs": {spec.name: spec.name for spec in half.outputs()},
        "unwanted": UNWANTED_ZEROS if half.unwanted_is_zeros() else UNWANTED_CAPTION,
    }
    del half  # there is one copy of the encoders at a time
    files, limits = _write_graphs(lambda: _open_text(checkpoint), AXES, wanted, dtypes, folder / TEXT_FOLDER)
    golden = {**wanted, **{f"unwanted_{name}": ids for name, ids in unwanted.items()}}
    return info | {"encoders": files, "limits_db": limits}, golden


def _open_text(checkpoint: Checkpoint) -> TextHalf:
    return TextHalf(text.open_pipeline(checkpoint), checkpoint.family).eval()


def _write_vae(
    checkpoint: Checkpoint, latents: torch.Tensor, dtypes: Sequence[str], folder: Path
) -> tuple[Json, torch.Tensor]:
    decoder = vae.open_decoder(checkpoint.root)
    config, axes = decoder.vae.config, decoder.axes(*checkpoint.family.size())
    if config.force_upcast and "fp16" in dtypes:
        dtypes = ["fp32"]
        progress.note(
            "note: the VAE decoder stays fp32, as its config asks (force_upcast); where it is known to bear fp16, "
            'write "force_upcast": false in vae/config.json'
        )
    scaling, shift = float(config.scaling_factor), float(config.shift_factor or 0.0)
    scaled = latents / scaling + shift
    with torch.no_grad():
        pictures = torch.cat([decoder(one)[0] for one in torch.split(scaled, 1)])
    del decoder
    one = {vae.INPUT: scaled[:1]}
    files, limits = _write_graphs(lambda: vae.open_decoder(checkpoint.root), axes, one, dtypes, folder / VAE_FOLDER)
    info = {"decoders": files, "input": vae.INPUT, "output": vae.OUTPUT, "limits_db": limits}
    return info | {"scaling_factor": scaling, "shift_factor": shift}, pictures


def _write_graphs(
    opened: Callable[[], TextHalf | vae.Decoder],
    axes: Mapping[str, Axis],
    feeds: Tensors,
    dtypes: Sequence[str],
    folder: Path,
) -> tuple[dict[str, str], dict[str, float]]:
    """Writes a module's graphs; returns the file of each float type, and what it must agree with PyTorch to, in dB.

    One that fp16 cannot hold is written in fp32 instead.
    """
    files, limits = {}, {}
    for dtype in dtypes:
        found = _write_graph(opened, axes, feeds, dtype, folder / dtype / MODEL)
        if found >= LEAST_DB[dtype]:
            files[dtype] = f"{folder.name}/{dtype}/{MODEL}"
            limits[dtype] = min(found, KNOWN_DB) - MARGIN_DB
            continue
        if dtype == "fp32":
            raise AssertionError(f"{folder.name}: its graph agrees with PyTorch to {found:.1f} dB")
        progress.note(f"note: {folder.name} stays fp32: in {dtype} it agrees with PyTorch to {found:.1f} dB")
        shutil.rmtree(folder / dtype)
    return (files, limits) if files else _write_graphs(opened, axes, feeds, ["fp32"], folder)


def _write_graph(
    opened: Callable[[], TextHalf | vae.Decoder], axes: Mapping[str, Axis], feeds: Tensors, dtype: str, path: Path
) -> float:
    """Writes one graph; returns how well ONNX Runtime agrees on it with the fp32 module, the worst of its outputs."""
    module = opened()
    with torch.no_grad():
        expected = module(*feeds.values())
    names = [spec.name for spec in module.outputs()]
    lower_plain(module, module.inputs(), module.outputs(), axes, dtype, path)
    del module  # a session holds the weights too
    runner = OrtRunner(open_session(path, plain_record(dtype)), outputs=names)
    got = runner.run({name: value.numpy() for name, value in feeds.items()})
    pairs = zip(names, expected, strict=True)
    return min(sqnr_db(value, torch.from_numpy(got[name])) for name, value in pairs)
