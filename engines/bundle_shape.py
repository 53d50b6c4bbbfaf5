"""What a bundle's manifest must say of itself, and what of it must go together; docs/bundle.md is the format."""

from __future__ import annotations

from collections.abc import Collection

from engines.artifacts import Artifact, Json
from engines.schedule import ROW
from engines.shape import NUMBER, Each, Maybe, fault

GOLDEN = "golden.safetensors"
DTYPES = ("int64", "fp32", "float")  # of inputs: the last is the engine's own float type
OF_ROWS = {"timestep": DTYPES, "step": ("int64",)}  # inputs of one number for each row, and their types

_INPUT = {"name": str, "dtype": str, "shape": Each((int, str), list), "means": str}
_AXIS = {"min": int, "opt": int, "max": int, "multiple": int}
_ENGINE: Json = {
    "folder": str, "file": str, "backend": str, "gpu": Maybe(str), "dtype": str, "decode": Maybe(str), "digest": str,
    "refit": bool, "weight_streaming": Maybe((int, str)),
    "versions": Each(str, dict), "weight_bytes": int, "resident_weight_bytes": int, "step_input": Maybe(str),
    "session": Maybe(
        {
            "disabled_optimizers": Each(str, list), "config": Each(str, dict), "codebook_ops": bool,
            "config_if_sums_saturate": Each(str, dict), "config_if_shared": Each(str, dict),
        }
    ),
}  # fmt: skip
_STEP = dict.fromkeys(
    ("scale_input", "x0_latent", "x0_prediction", "next_x0", "next_latent", "next_prediction"), NUMBER
)
_SAMPLER: Json = {
    "scheduler": dict, "steps": int, "guidance_scale": NUMBER, "guided": bool, "schedule": Each(NUMBER, list),
    "timesteps": Each(NUMBER, list), "why_not_portable": Maybe(str),
    "latent": {"input": str, "shape": Each(int, list), "init_noise_sigma": NUMBER, "pixels": bool},
    "portable": Maybe({"clip": Maybe(NUMBER), "steps": Each(_STEP, list)}),
}  # fmt: skip
# What a graph's own record must hold for an engine of it to run.
_GRAPH: Json = {
    "dtype": str, "output": str, "inputs": Each({"name": str, "dtype": str, "shape": list}, list),
    "axes": Each(_AXIS, dict), "timesteps": Each(NUMBER, list), "step_input": Maybe(str),
    "fed_timesteps": Maybe(Each(NUMBER, list)), "points": Each(Maybe(str), dict), "weights": {"by_format": dict},
    "layers": Each({"weight": Maybe(str), "activation": Maybe(str)}, dict), "weight_bytes": int,
    "module_bytes": Each(int, dict),
}  # fmt: skip
_TOKENIZER: Json = {
    "tokenizer": str, "tokens": int, "pad": Maybe(int), "bos": Maybe(int), "eos": Maybe(int), "input": str
}  # fmt: skip
_TEXT: Json = {
    **_TOKENIZER, "more": Each(_TOKENIZER, list), "encoders": Each(str, dict), "outputs": Each(str, dict),
    "unwanted": str, "limits_db": Each(NUMBER, dict),
}  # fmt: skip
_VAE: Json = {
    "decoders": Each(str, dict), "input": str, "output": str, "scaling_factor": NUMBER, "shift_factor": NUMBER,
    "limits_db": Each(NUMBER, dict),
}  # fmt: skip
SHAPE: Json = {
    "format_version": int,
    "model": {"name": str, "class": str, "config": dict, "parameters": int},
    "recipe": {"name": str, "digest": str},
    "inputs": Each(_INPUT, list),
    "output": {"name": str, "dtype": str, "shape": Each((int, str), list)},
    "axes": Each(_AXIS, dict),
    "sampler": _SAMPLER,
    "engines": Each(_ENGINE, dict),
    "graphs": Each({"folder": str, "digest": str, "info": _GRAPH}, dict),
    "golden": {
        "steps": Each(int, list),
        "limits_db": Each(Each(NUMBER, dict), dict),
        "picture": Maybe({"runner": str, "count": int, "limits_db": Each(NUMBER, dict), "peak": NUMBER}),
    },
    "pipeline": Maybe({"text": _TEXT, "vae": Maybe(_VAE), "constants": Each(Each(NUMBER, list), dict)}),
    "checks": Each(dict, list),
    "scores": dict,
}  # fmt: skip


def malformed(artifact: Artifact) -> str | None:
    """Returns what of a manifest has not the shape, or does not go together with the rest; None if all does."""
    info, files = artifact.manifest["info"], artifact.manifest["files"]
    if (found := fault(info, SHAPE, "info")) is not None:
        return found
    faults = [_of_contract(info), _of_sampler(info), *(_of_engine(name, info, files) for name in info["engines"])]
    faults += [_of_golden(info), _of_pipeline(info, files)]
    faults.append(None if GOLDEN in files else f"there is no {GOLDEN}")
    return next(filter(None, faults), None)


def _of_contract(info: Json) -> str | None:
    for name, axis in info["axes"].items():
        if not (1 <= axis["min"] <= axis["opt"] <= axis["max"] and axis["multiple"] >= 1):
            return f"axis {name!r} has no size from its min to its max"
    if "batch" not in info["axes"]:
        return "there is no axis 'batch'"
    for entry in [*info["inputs"], info["output"]]:
        axes = [axis for axis in entry["shape"] if isinstance(axis, str)]
        if entry["dtype"] not in DTYPES or entry["shape"][:1] != ["batch"]:
            return f"{entry['name']!r} is of an unknown type, or its first axis is not 'batch'"
        if any(axis not in info["axes"] for axis in axes):
            return f"{entry['name']!r} has an unknown axis"
        largest = entry.get("largest", 0)
        if fault(largest, int, "") or largest < 0 or ("largest" in entry and entry["dtype"] != "int64"):
            return f"{entry['name']!r} has a largest value that is no whole number, 0 or more"
        if entry["name"] in OF_ROWS and (entry["shape"] != ["batch"] or entry["dtype"] not in OF_ROWS[entry["name"]]):
            return f"input {entry['name']!r} is not one number for each row"
    return None


def _of_sampler(info: Json) -> str | None:
    sampler, names = info["sampler"], [entry["name"] for entry in info["inputs"]]
    if not sampler["latent"]["shape"] or sampler["latent"]["input"] not in names:
        return "the sampler's latent has no shape, or no input"
    portable = sampler["portable"] or {"steps": sampler["timesteps"]}
    if not len(sampler["timesteps"]) == len(portable["steps"]) == sampler["steps"] >= 1:
        return "the sampler's timesteps are not as many as its steps"
    return None


def _of_golden(info: Json) -> str | None:
    golden = info["golden"]
    if not golden["steps"]:
        return "there are no golden steps: an engine would be tested on none"
    tables = [golden["limits_db"], *([golden["picture"]["limits_db"]] if golden["picture"] else [])]
    if golden["picture"] and not golden["picture"]["peak"] > 0:
        return "the golden pictures' peak is not above 0"
    for dtype in {entry["dtype"] for entry in info["engines"].values()}:
        if any(dtype not in table for table in tables):
            return f"golden outputs have no limit for {dtype}"
        if not golden["limits_db"][dtype].keys() >= {str(step) for step in golden["steps"]}:
            return f"golden outputs have not a limit for every step in {dtype}"
    return None


def _of_engine(name: str, info: Json, files: Json) -> str | None:
    engine = info["engines"][name]
    if engine["dtype"] not in info["graphs"]:
        return f"engine {name!r} is of a {engine['dtype']} graph, which is not there"
    if f"{engine['folder']}/{engine['file']}" not in files:
        return f"engine {name!r} has no {engine['file']}"
    graph = info["graphs"][engine["dtype"]]["info"]
    if engine["step_input"] != graph["step_input"] or (graph["step_input"] and not graph["fed_timesteps"]):
        return f"engine {name!r} and its graph differ in step_input"
    if graph["step_input"] and not OF_ROWS.keys() <= {entry["name"] for entry in info["inputs"]}:
        return f"engine {name!r} is told the step, and not both it and its timestep"
    given = {"step" if entry["name"] == ROW else entry["name"] for entry in graph["inputs"]}
    if given != {entry["name"] for entry in info["inputs"]} or graph["output"] != info["output"]["name"]:
        return f"engine {name!r} and the bundle differ in their inputs or outputs"
    return None


def _of_pipeline(info: Json, files: Collection[str]) -> str | None:
    """Every engine needs graphs of its float type, or fp32's; what captions give, the denoiser must take."""
    if info["pipeline"] is None:
        return None
    text, decoding, names = info["pipeline"]["text"], info["pipeline"]["vae"], {one["name"] for one in info["inputs"]}
    for what, part in (("encoders", text), ("decoders", decoding)):
        held = part[what].keys() & part["limits_db"].keys() if part else {"fp32"}
        if lacking := [one["dtype"] for one in info["engines"].values() if not held & {one["dtype"], "fp32"}]:
            return f"its pipeline has no {what} for a {lacking[0]} engine"
    fed = {*text["outputs"].values(), *info["pipeline"]["constants"]}
    if other := sorted(fed - names):
        return f"its pipeline gives {other[0]!r}, which is no input"
    tokenizers = [entry["tokenizer"] for entry in (text, *text["more"])]
    graphs = [*text["encoders"].values(), *(decoding["decoders"].values() if decoding else ())]
    missing = [name for name in (*tokenizers, *graphs) if name not in files]
    return f"its pipeline's {missing[0]} is not there" if missing else None
