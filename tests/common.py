"""What tests and fixtures share by name."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
RECIPES = ("fp8", "int8", "int4")
TINY = {
    "_class_name": "DiTTransformer2DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 10,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
}
# One small random model of each family: linears in multiples of 64, so that blocks of 64 weights fit.
_UNET = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [64, 128],
    "layers_per_block": 1,
    "norm_num_groups": 32,
}
_TEXT_UNET = {
    "_class_name": "UNet2DConditionModel",
    **_UNET,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 64,
}
_PIXART = {
    "_class_name": "PixArtTransformer2DModel",
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "caption_channels": 64,
}
_SD3 = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 16,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "joint_attention_dim": 64,
    "caption_projection_dim": 64,
    "pooled_projection_dim": 64,
    "pos_embed_max_size": 12,
}
_FLUX = {
    "_class_name": "FluxTransformer2DModel",
    "sample_size": 16,
    "num_layers": 2,
    "num_single_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 64,
    "axes_dims_rope": [8, 12, 12],
}
FAMILIES: dict[str, dict[str, object]] = {
    "unet": {
        "_class_name": "UNet2DModel",
        **_UNET,
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": 32,
    },
    "sd": {**_TEXT_UNET, "attention_head_dim": 4},
    "sdxl": {
        **_TEXT_UNET,
        "attention_head_dim": [2, 4],
        "transformer_layers_per_block": [1, 2],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 32,
        "projection_class_embeddings_input_dim": 256,  # 64 of pooled text, and six sizes of 32 each
    },
    "pixart-alpha": {
        **_PIXART,
        "num_attention_heads": 3,  # three embeddings make up the width: the width must divide by 3
        "attention_head_dim": 64,
        "cross_attention_dim": 192,
        "use_additional_conditions": True,
    },
    "pixart-sigma": {
        **_PIXART,
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "cross_attention_dim": 64,
        "interpolation_scale": 1,
        "use_additional_conditions": False,
    },
    "sd3": _SD3,
    "sd35": {**_SD3, "dual_attention_layers": [0], "qk_norm": "rms_norm"},
    "flux-dev": {**_FLUX, "guidance_embeds": True},
    "flux-schnell": {**_FLUX, "guidance_embeds": False},
}
