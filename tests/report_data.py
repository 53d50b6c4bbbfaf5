"""A report in plain data, as `validate` writes it, and what a page shows beside it."""

from __future__ import annotations

import torch

from exporter import thumbnails

STEPS = (0, 12, 24)
LAYERS = ("blocks.0.to_q", "blocks.0.to_k", "blocks.1.ff")


def score(value, low, high, floor):
    return {"mean": value, "ci95": [low, high], "noise_floor": floor}


def plan_row(name):
    return {
        "name": name, "kind": "gemm", "input_types": ["fp8", "fp8"], "constant_types": ["fp8"],
        "constant_bytes": 36864, "output_types": ["fp32"], "onnx_nodes": [f"{name}/MatMul", f"{name}/Add"],
    }  # fmt: skip


def audit_row(name, status="as asked", reason=None):
    types = {"weight": "fp8", "activation": "fp8"}
    return {
        "layer": name, "op": "matmul", "asked": types, "got": types, "kernels": ["sm89_xmma_gemm"], "kinds": ["gemm"],
        "decoders": [], "merged_with": [], "unfused": [f"{name}/Add"], "casts": [], "status": status, "reason": reason,
        "bytes": {"quantized": 36864, "graph": 37248, "engine": 37248},
    }  # fmt: skip


def histogram(layer, sqnr_db=31.5):
    edges = [-1.0, -0.5, 0.5, 1.0]
    return {
        "layer": layer, "sqnr_db": sqnr_db,
        "weight": {"edges": edges, "float": [5, 900, 4], "quantized": [0, 905, 4]},
        "activation": {"edges": edges, "counts": [1, 2000, 0], "range": [0.8, 0.9, 0.7], "steps": list(STEPS)},
    }  # fmt: skip


def report(name="digits-dit", recipe="fp8", psnr=48.1, stored=4_770_000):
    """Returns a report with every part that a page shows."""
    runners = ("quantized", "ort")
    per_step = [
        {"runner": runner, "step": step, "timestep": 999.0 - 40 * step, "sqnr_db": 50.0 - step}
        for runner in runners
        for step in STEPS
    ]
    return {
        "schema_version": 1,
        "model": {"name": name, "class": "DiT", "parameters": 4_605_508, "float_weight_bytes": 9_211_016},
        "recipe": {"name": recipe, "digest": "e" * 64, "methods": [{"name": "rtn", "options": {}, "layers": 54}]},
        "training": {},
        "weights": {"bytes": stored, "bits_per_weight": 8.07, "quantized_layers": 54, "kept_layers": 3},
        "activations": {"layers": {"fp8 E4M3": 54}, "attention_points": {}},
        "engines": [
            {
                "backend": "ort", "dtype": "fp32", "path": "engines/ort", "bytes": 5_130_000, "decode": "run",
                "weight_bytes": 5_020_000, "resident_weight_bytes": 5_020_000, "gpu": None, "ran": True,
                "layers": [plan_row(layer) for layer in LAYERS],
                "audit": [audit_row(layer) for layer in LAYERS[:2]] + [audit_row(LAYERS[2], "other", "no such kernel")],
            }
        ],
        "accuracy": {
            "lowering": [
                {"backend": "ort", "dtype": "fp32", "step": step, "sqnr_db": 60.0, "floor_db": 58.0 + step / 10,
                 "max_abs": 0.01, "not_finite": 0}
                for step in STEPS
            ],
            "per_step": per_step,
            "trajectory": [{key: row[key] for key in ("runner", "step", "sqnr_db")} for row in per_step],
            "layers": [
                {"runner": "ort", "layer": layer, "step": step, "sqnr_db": None if layer == LAYERS[1] else 40.0 - step,
                 "not_finite": 0}
                for layer in LAYERS
                for step in STEPS
            ],
            "images": {
                "runner": "ort", "n": 256, "in_pixels": True, "not_finite": 0,
                "psnr_db": score(psnr, psnr - 0.4, psnr + 0.4, 12.2) | {"per_image": [psnr, psnr - 1]},
                "ssim": score(0.9986, 0.9973, 0.9992, 0.5091),
                "cosine": score(0.9998, 0.9994, 0.9999, 0.7969),
                "task_score": {
                    "name": "class accuracy", "float": 1.0, "quantized": 0.996, "ci95": [0.99, 1.0],
                    "lost": score(0.004, 0.0, 0.01, 0.0078),
                },
                "sets": {"frechet_distance": {"value": 0.003, "ci95": [-0.004, 0.008], "noise_floor": 1.096}},
            },
        },
        "histograms": [histogram(layer) for layer in LAYERS],
        "throughput": [
            {"runner": runner, "batch": batch, "ms_p50": ms * batch, "ms_p95": 1.3 * ms * batch, "runs": 40,
             "peak_rss_bytes": 500_000_000}
            for batch in (8, 1)
            for runner, ms in (("float", 2.0), ("quantized", 5.0), ("ort", 2.5))
        ],
        "checks": [
            {"name": "lowering ort step 0 under its floor", "value": -2.0, "unit": "dB", "limit": 3.0, "passed": True},
            {"name": "class accuracy lost", "value": 0.004, "unit": "", "limit": 0.01, "passed": True},
        ],
        "passed": True,
        "made_from": {"quantized": "a" * 64, "engine ort": "b" * 64},
        "settings": {"seed": 0, "export_engine": "0.1.0", "torch": "2.13.0"},
    }  # fmt: skip


def damaged():
    """Returns what `validate --layers` found."""
    rows = [{"layer": layer, "sqnr_db": [30.0, 25.5, 20.0]} for layer in LAYERS]
    return {"steps": list(STEPS), "layers": rows, "quantized": "a" * 64}


def pictures(count=2, side=8):
    """Returns a few grey pictures and what a runner made of them."""
    images = torch.linspace(-1, 1, count * side * side).reshape(count, 1, side, side)
    return thumbnails.rows(images, images + 0.01, in_pixels=True)
