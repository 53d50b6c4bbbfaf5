"""What SD3 and FLUX share: blocks in which image and text attend jointly, each side with an adaLN-Zero modulation.

Source: Esser et al., arXiv 2403.03206, figure 2 (b); diffusers, JointTransformerBlock and FluxTransformerBlock.
"""

from __future__ import annotations

from typing import cast

from torch import nn

from exporter.models import Fold

EVERYTHING = slice(None)


def modulated(linear: str, width: int, shift: int, scale: int, consumers: tuple[str, ...]) -> Fold:
    """Returns the fold into a modulation's linear; `shift` and `scale` say which of its chunks of rows they are."""
    rows = [slice(i * width, (i + 1) * width) for i in (shift, scale)]
    return Fold(consumers, ((linear, rows[0], "value"), (linear, rows[1], "scale")))


def joint_folds(model: nn.Module, block: str) -> list[Fold]:
    """Both sides' modulations before attention and feed-forward, and V's rows before the output projections."""
    modules = dict(model.named_modules())
    width = cast(nn.Linear, modules[f"{block}.attn.to_q"]).in_features
    image, text = f"{block}.norm1.linear", f"{block}.norm1_context.linear"
    # Chunks of the linear's rows: shift, scale, gate of attention, of the feed-forward, and of a second attention.
    found = [
        modulated(image, width, 0, 1, tuple(f"{block}.attn.to_{n}" for n in "qkv")),
        modulated(image, width, 3, 4, (f"{block}.ff.net.0.proj",)),
    ]
    if f"{block}.attn2.to_q" in modules:  # SD3.5's image tokens attend once more, among themselves
        found.append(modulated(image, width, 6, 7, tuple(f"{block}.attn2.to_{n}" for n in "qkv")))
        found.append(Fold((f"{block}.attn2.to_out.0",), ((f"{block}.attn2.to_v", EVERYTHING, "value"),)))
    added = tuple(f"{block}.attn.add_{n}_proj" for n in "qkv")
    outputs = [f"{block}.attn.to_out.0"]
    if f"{block}.attn.to_add_out" in modules:
        outputs.append(f"{block}.attn.to_add_out")
        found.append(modulated(text, width, 0, 1, added))
        found.append(modulated(text, width, 3, 4, (f"{block}.ff_context.net.0.proj",)))
    else:  # the last block's text ends here: AdaLayerNormContinuous, whose linear gives the scale first
        found.append(modulated(text, width, 1, 0, added))
    # Attention mixes both sides' V into both sides' outputs, so one factor divides both and multiplies every reader.
    values = ((f"{block}.attn.to_v", EVERYTHING, "value"), (added[2], EVERYTHING, "value"))
    found.append(Fold(tuple(outputs), values))
    return found


def final_fold(model: nn.Module) -> Fold:
    """The modulation before the last projection; AdaLayerNormContinuous gives the scale first."""
    width = cast(nn.Linear, model.get_submodule("proj_out")).in_features
    return modulated("norm_out.linear", width, 1, 0, ("proj_out",))
