"""What decides whether a run passed: checks over a report, each with its value, its limit, and what there is to say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from engines.artifacts import Json
from engines.audit import OTHER, SHARE
from exporter.audits import types
from exporter.metrics import PSNR_CAP_DB, finite

FLOOR_MARGIN_DB = 3.0  # how far under the rounding floor an engine may fall: twice the noise power
# Where nothing rounds to codes the floor is that of one library's order of summation, and another that is as correct
# may lie some dB below: ONNX Runtime sums the 192 products behind an output of digits-dit one after the other, where
# torch sums them in lanes, and agrees to 125 … 131 dB under a floor of 127 … 138 dB. Anything above this is agreement.
FP32_AGREEMENT_DB = 120.0
# A small model flips few codes, perhaps none where its floor is measured and one in the engine: far under the floor,
# yet without consequence. What lies this far below the quantization error, a hundredth of its power, is let pass.
NEGLIGIBLE_DB = 20.0
ACCURACY_MARGIN = 0.01  # of the float model's task score
# How much nearer to the float model's images than another seed's are, at least. The mean of all that could be drawn,
# which shows nothing, has half the squared error of another draw: 3 dB nearer.
SEED_MARGIN_DB = 3.0
LEAST_HELD = 0.5  # of the graph's weights, a plan must list: else it was not read as it is meant
NAMED = 3  # layers that a check names


def checks(report: Json) -> list[Json]:
    """Returns what decides `passed`: engines at their rounding floor, precision as asked, compression, quality kept."""
    accuracy = report["accuracy"]
    quantization = quantization_db(accuracy["per_step"])
    origins = {(one["runner"], one["step"]): origin_line(one) for one in accuracy["origins"]}
    found = [_lowering(row, quantization, origins) for row in accuracy["lowering"]]
    for engine in report["engines"]:
        found += [_precision(engine), _compression(engine)]
    scores = accuracy["images"]
    name = f"NaN or infinite values in the images of {scores['runner']}"
    told = [line for (runner, _), line in origins.items() if runner == scores["runner"]]
    found.append(check(name, scores["not_finite"], "", 0, told[0] if told and scores["not_finite"] else None))
    found += [_trajectory(name, accuracy, origins) for name in _others(accuracy)]
    found.append(_likeness(scores))
    if score := scores["task_score"]:
        found.append(check(f"{score['name']} lost", score["lost"]["mean"], "", ACCURACY_MARGIN))
    return found


def check(name: str, value: float, unit: str, limit: float, detail: str | None = None) -> Json:
    """A check passes when its value is at most the limit; a value that is no number fails."""
    return {
        "name": name,
        "value": finite(value),
        "unit": unit,
        "limit": limit,
        "passed": not math.isnan(value) and value <= limit + 1e-9,
        "detail": detail,
    }


def _lowering(row: Json, quantization: Mapping[int, float | None], origins: Mapping[tuple[str, int], str]) -> Json:
    name = f"lowering {row['backend']} step {row['step']} under its floor"
    value = math.inf if row["not_finite"] else under(row, quantization.get(row["step"]))
    detail = _excused(row) if passes(row, quantization) else origins.get((row["backend"], row["step"]))
    return check(name, value, "dB", FLOOR_MARGIN_DB, detail)


def _excused(row: Json) -> str | None:
    """Returns why a row that lies under its floor passes."""
    if row["sqnr_db"] is None or (row["floor_db"] or math.inf) - row["sqnr_db"] <= FLOOR_MARGIN_DB:
        return None
    if row.get("layers_agree"):
        return "every layer agrees with PyTorch's on its own: codes that flip, flip others behind them"
    if row["dtype"] == "fp32" and row["sqnr_db"] >= FP32_AGREEMENT_DB:
        return f"two orders of summation in fp32 agree no nearer than {FP32_AGREEMENT_DB:g} dB"
    return f"{NEGLIGIBLE_DB:g} dB below the error of quantization"


def _precision(engine: Json) -> Json:
    """Returns the check that everything an engine multiplies is as asked, or excused."""
    other = [row for row in engine["audit"] if row["status"] == OTHER]
    named = "; ".join(f"{row['layer']!r} {types(row['asked'])} runs as {types(row['got'])}" for row in other[:NAMED])
    more = f"; and {len(other) - NAMED} more" if len(other) > NAMED else ""
    name = f"matmuls, convolutions and attentions of {engine['backend']} that run otherwise than asked"
    return check(name, len(other), "", 0, named + more or None)


def _compression(engine: Json) -> Json:
    beyond = engine["weight_bytes"] / engine["graph_weight_bytes"] - 1
    found = check(f"weights of {engine['backend']} beyond the graph's", beyond, "", SHARE)
    if beyond >= -LEAST_HELD:
        return found
    return found | {"passed": False, "detail": "its plan lists too few constants to be the whole engine's"}


def _others(accuracy: Json) -> list[str]:
    """Returns the runners that sampled beside the one whose images are scored."""
    names = dict.fromkeys(row["runner"] for row in accuracy["trajectory"])
    return [name for name in names if name != accuracy["images"]["runner"]]


def _trajectory(runner: str, accuracy: Json, origins: Mapping[tuple[str, int], str]) -> Json:
    count = sum(row["not_finite"] for row in accuracy["trajectory"] if row["runner"] == runner)
    told = [line for (name, _), line in origins.items() if name == runner]
    name = f"NaN or infinite values along the trajectories of {runner}"
    return check(name, count, "", 0, told[0] if told and count else None)


def _likeness(scores: Json) -> Json:
    """Returns the check that every model has, with a task or without: images are those that the float model draws."""
    psnr = scores["psnr_db"]
    floor, low = psnr["noise_floor"], psnr["ci95"][0]
    detail = f"{psnr['mean']:.1f} dB against the float model's of the same noise; float against float, {floor:.1f} dB"
    name = f"PSNR of another seed's images over that of {scores['runner']}'s"
    margin = min(SEED_MARGIN_DB, PSNR_CAP_DB - floor)  # of a model that draws one picture whatever the noise
    found = check(name, floor - low, "dB", -margin)
    return found if found["passed"] else found | {"detail": detail}


def origin_line(origin: Json) -> str:
    """Returns where an error starts, in words."""
    what = f"{origin['not_finite']} NaN or infinite values" if origin["not_finite"] else f"{origin['sqnr_db']:.1f} dB"
    floor = f", its floor {origin['floor_db']:.1f} dB" if origin.get("floor_db") is not None else ""
    return f"it starts in layer {origin['layer']!r} at step {origin['step']}: {what}{floor}"


def quantization_db(per_step: Sequence[Json]) -> dict[int, float | None]:
    """Returns the quantized PyTorch model's SQNR against the float one, by step."""
    return {row["step"]: row["sqnr_db"] for row in per_step if row["runner"] == "quantized"}


def is_doubtful(row: Json, quantization: Mapping[int, float | None]) -> bool:
    """Whether a row lies under its floor, yet no further off than quantization itself.

    Where one flipped code flips many behind it, a step's floor is a matter of luck: a row of the feed either has such a
    flip or has none. Then the layers decide, each on its own.
    """
    error_db = quantization.get(row["step"])
    if row["not_finite"] or row["sqnr_db"] is None or error_db is None:
        return False
    return under(row, error_db) > FLOOR_MARGIN_DB and bool(row["sqnr_db"] >= error_db - FLOOR_MARGIN_DB)


def under(row: Json, quantization_db: float | None) -> float:
    """Returns how far a lowering row lies under what is asked of it, in dB before the margin.

    Asked is its floor, or less where less is agreement in fp32, or negligible beside the quantization error.
    """
    if row["sqnr_db"] is None or row.get("layers_agree"):
        return 0.0  # equal to PyTorch bit for bit, or layer by layer
    asked = [math.inf if row["floor_db"] is None else row["floor_db"]]
    if row["dtype"] == "fp32":
        asked.append(FP32_AGREEMENT_DB + FLOOR_MARGIN_DB)
    if quantization_db is not None:
        asked.append(quantization_db + NEGLIGIBLE_DB + FLOOR_MARGIN_DB)
    return float(min(asked) - row["sqnr_db"])


def passes(row: Json, quantization: Mapping[int, float | None]) -> bool:
    """Whether a lowering row is at its floor, or excused."""
    return not row["not_finite"] and under(row, quantization.get(row["step"])) <= FLOOR_MARGIN_DB
