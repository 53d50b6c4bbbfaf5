"""Memory, time and disk that the stages will take: what they hold and do, times rates that were measured.

`rates.json` says on which machine, and by which command. Every term is of what a stage really holds; the comments say
where.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines.artifacts import Json
from exporter.calibrate import BATCH
from exporter.dry_run import DryRun
from exporter.lower import EXTERNAL_BYTES
from exporter.quantize import REFERENCE_ROWS, REFERENCE_STEPS
from exporter.quantized import SHARD_BYTES
from exporter.samples import APART
from exporter.watch import ROWS

RATES: Json = json.loads(Path(__file__).with_name("rates.json").read_text(encoding="utf-8"))
WORD, DOUBLE = 4, 8  # bytes of fp32, of fp64
MAPPED = 32 << 20  # what is larger glibc maps, and gives back at once. Source: mallopt(3), M_MMAP_THRESHOLD
TEMPORARIES = 10  # tensors of a weight's size while it is encoded
ROUNDING = 1.7  # what lives at once while a layer's input is rounded, of what does in a float model
# Assumed, not measured: what an opened engine holds of its file, times over; seconds of an op beside its products;
# bytes a second that a graph is written at, whose time was too short beside its nodes' to be told.
OPENED, OP_SECONDS, WRITTEN = 2.0, 2e-5, 1e9
REFERENCE_CALLS = 6  # fp32 calls' worth: the float model, and the quantized one in fp32, fp64 and fp16
RUNNERS = 3  # that draw images: float, quantized, an engine
TRAINING_CALLS = 3  # forward, and backward for inputs and for weights
PHASES = ("iterations", "activation_iterations", "codebook_iterations")  # options of methods that train
NODES_PER_QUANTIZER = 4  # what quantizes, what dequantizes, and what they read
# Bytes that backward needs of each number that is rounded, a weight's or an input's: what it became, which the product
# keeps, how far that is from what it was, which its scale's gradient is of, and whether it lay within the ends.
ROUNDED = 2 * WORD + 1
TARGETS = 3  # times a block's output, beside itself: what it should be, as read and of the batch, and how far it is off
TRAINED = 5  # fp32 numbers to each one that is trained: itself, its gradient, Adam's two averages, what it was before


@dataclass(frozen=True)
class Workload:
    """What there is to do: shapes, counts and bytes, all known before anything is run.

    `plain` and `planned`: a call of one row of the float model, as it is and as it is observed, with attention's
    products taken apart. `columns`: numbers that the largest convolution's patches are, for one row. `wide_bytes`: of
    the quantized model in fp64; `code_bytes`: of codes in memory, one to a byte.
    """

    parameters: int
    weights: Mapping[str, int]  # quantized ones, by layer
    largest: int
    latent: int  # numbers in a sample
    text_bytes: int
    feed_bytes: int  # of one row
    guided: int  # rows to a sample: two, where guidance runs the network twice
    samples: int
    steps: int
    recorded: int
    plain: DryRun
    planned: DryRun
    columns: int
    wide_bytes: int
    code_bytes: int
    stored_bytes: int
    graphs: Mapping[str, int]
    engines: Mapping[str, int]
    dtypes: Mapping[str, str]  # of each backend's graph
    quantizers: int  # of activations
    rows: Mapping[int, int]  # that are run at once, of so many at most
    images: int  # that are judged
    trainings: Sequence[Training] = ()

    @property
    def float_bytes(self) -> int:
        return WORD * self.parameters

    @property
    def records(self) -> int:
        """Rows of the calibration set."""
        return self.samples * self.guided * self.recorded

    @property
    def macs(self) -> int:
        return sum(self.plain.macs.values())


@dataclass(frozen=True)
class Training:
    """Blocks that a method trains together: their weights, the numbers of a row that they round, and its options."""

    weights: int
    rounded: int
    blocks: Sequence[str]
    options: Any

    @property
    def title(self) -> str:
        first, *rest = self.blocks
        return f"training of {first}" + (f" … {rest[-1]}" if rest else "")


@dataclass(frozen=True)
class Estimate:
    """Of one stage: peak memory of its process, seconds, and what it leaves on disk, or needs there meanwhile."""

    stage: str
    memory: int
    seconds: float
    disk: int = 0
    held: Mapping[str, int] = field(default_factory=dict)  # what the memory is made of

    def to_json(self) -> Json:
        return {
            "stage": self.stage,
            "peak_rss_bytes": self.memory,
            "seconds": round(self.seconds, 1),
            "disk_bytes": self.disk,
            "held": dict(self.held),
        }


def estimates(work: Workload) -> list[Estimate]:
    """Returns what each stage takes, run by itself."""
    return [
        _calibrate(work),
        _quantize(work),
        *(_lower(work, dtype) for dtype in work.graphs),
        *(_build(work, backend) for backend in work.engines),
        _validate(work),
    ]


def _calibrate(work: Workload) -> Estimate:
    rows = min(work.rows[BATCH], work.samples) * work.guided
    shard = rows * work.recorded * work.feed_bytes
    model = work.float_bytes + _scratch(work.plain.peak_bytes * rows) + shard
    held = {"model": max(model, work.text_bytes)}  # the text encoder goes before the model comes
    calls = work.samples * work.guided * work.steps
    seconds = _load_seconds(work) + _call_seconds(work, calls)
    return _of("calibrate", held, seconds, work.records * work.feed_bytes)


def _quantize(work: Workload) -> Estimate:
    observed = min(work.rows[ROWS], work.records)
    phases = {
        "float model, observed": work.float_bytes + _scratch(work.planned.peak_bytes * observed),
        "float model, a weight encoded": work.float_bytes + _encoding(work),
        "quantized model, written": work.code_bytes + _rest(work) + 2 * min(SHARD_BYTES, work.stored_bytes),
        "quantized model in fp64": work.wide_bytes + _fp64_call(work),
        **{one.title: size for one, size in zip(work.trainings, _trained(work), strict=True)},
    }
    phase = max(phases, key=lambda name: phases[name])
    reference = min(REFERENCE_STEPS, work.recorded) * min(REFERENCE_ROWS, work.samples * work.guided)
    seconds = _load_seconds(work) + _call_seconds(work, work.records + reference * REFERENCE_CALLS)
    seconds += sum(work.weights.values()) / RATES["weights_per_second"] + sum(_training_seconds(work))
    targets = max((_target_bytes(work, training) for training in work.trainings), default=0)
    return _of("quantize", {phase: phases[phase]}, seconds, work.stored_bytes + targets)


def _encoding(work: Workload) -> int:
    """Returns what turning the largest weight into codes takes, with the holes that it leaves in the heap."""
    size = WORD * work.largest
    return max(TEMPORARIES * size, int(RATES["encode"] * min(size, MAPPED)))


def _fp64_call(work: Workload) -> int:
    """Returns what a call of the quantized model in fp64 takes, on as many rows as the reference has at once."""
    rows = min(work.rows[REFERENCE_ROWS], work.samples * work.guided)
    columns = DOUBLE * work.columns * rows  # kernels of convolutions in fp64 lay their patches out, of all rows
    decoded = 2 * DOUBLE * work.largest  # the values of the codes, and these times the scale
    rounding = ROUNDING if work.quantizers else 1.0
    return columns + decoded + _scratch(int(DOUBLE / WORD * rounding * work.planned.peak_bytes * rows))


def _rest(work: Workload) -> int:
    """Returns the fp32 bytes of what is not quantized."""
    return WORD * (work.parameters - sum(work.weights.values()))


def _trained(work: Workload) -> list[int]:
    """Returns what is held while each scope trains: the model, what is trained, what backward needs, and inputs."""
    found = []
    for training in work.trainings:
        options, share = training.options, len(training.blocks) / len(work.planned.block_bytes)
        batch = min(options.batch, options.rows, work.records)
        made = round(share * work.planned.made_bytes * batch)
        made += ROUNDED * (training.rounded * batch + training.weights)
        made += TARGETS * batch * sum(work.planned.block_bytes[path] for path in training.blocks)
        rows = min(options.rows, work.records)
        inputs = rows * work.feed_bytes
        if not options.joint:
            inputs += min(options.hold_mb << 20, 2 * rows * max(work.planned.block_bytes.values(), default=0))
        found.append(work.float_bytes + TRAINED * WORD * training.weights + made + inputs)
    return found


def _training_seconds(work: Workload) -> list[float]:
    found = []
    for training in work.trainings:
        options, share = training.options, len(training.blocks) / len(work.planned.block_bytes)
        iterations = sum(getattr(options, name, 0) for name in PHASES)
        calls = iterations * options.batch * TRAINING_CALLS
        found.append(share * _call_seconds(work, calls) + _call_seconds(work, min(options.rows, work.records)))
    return found


def _target_bytes(work: Workload, training: Training) -> int:
    """Returns the disk that a method's targets take until it is done: outputs of blocks for every row, fp32."""
    rows, sizes = min(training.options.rows, work.records) * (1 + 1 / APART), work.planned.block_bytes.values()
    spilled = 0.0
    if not training.options.joint:  # one block's inputs, and its targets once more
        spilled = max(0.0, 2 * rows * max(sizes, default=0) - (training.options.hold_mb << 20))
    return int(rows * sum(sizes) + spilled)


def _lower(work: Workload, dtype: str) -> Estimate:
    size = work.graphs[dtype]
    whole = size if size <= EXTERNAL_BYTES else 0  # beyond that, weights go beside the graph one at a time
    held = {
        "nodes": round(node_count(work) * RATES["lower_bytes_per_node"]),
        "weights": round(RATES["whole_graphs"] * whole),
    }
    seconds = node_count(work) * RATES["lower_seconds_per_node"] + size / WRITTEN
    return _of("lower", held, seconds, file_bytes(work, dtype), f" {dtype}")


def node_count(work: Workload) -> int:
    """Returns about how many nodes a graph has: one to an operation, some to each quantizer."""
    return int(work.plain.ops + NODES_PER_QUANTIZER * (work.quantizers + len(work.weights)))


def file_bytes(work: Workload, dtype: str) -> int:
    """Returns the bytes of a graph's files: initializers, and what nodes take."""
    return work.graphs[dtype] + int(node_count(work) * RATES["file_bytes_per_node"])


def _build(work: Workload, backend: str) -> Estimate:
    size = work.graphs[work.dtypes[backend]]
    rates = RATES["build"].get(backend, RATES["build"]["trt-rtx"])
    shared = rates["maps_files"]  # an engine of ONNX Runtime is its graph's own files, and maps those beside it
    held = {
        "nodes": round(node_count(work) * rates["bytes_per_node"]),
        "weights": round((0 if shared and size > EXTERNAL_BYTES else size) * rates["bytes_per_byte"]),
    }
    seconds = node_count(work) * rates["seconds_per_node"] + size * rates["seconds_per_byte"]
    disk = 0 if shared else work.engines[backend]
    return _of("build", held, seconds, disk, f" {backend}")


def _validate(work: Workload) -> Estimate:
    """The float model, the quantized one and its decoded weights, and what engines hold that run here."""
    rows = work.rows[BATCH] * work.guided
    engine = max((size for name, size in work.engines.items() if name == "ort"), default=0)
    decoded = WORD * sum(work.weights.values())
    held = {
        "models": work.float_bytes + decoded + work.code_bytes + _rest(work),
        "engine": round(engine * OPENED),
        "pictures": round(RATES["pictures"] * WORD * work.images * work.latent),
        "activations": RUNNERS * _scratch(work.plain.peak_bytes * rows),
    }
    calls = RUNNERS * (work.images * work.steps * work.guided)
    return _of("validate", held, 2 * _load_seconds(work) + _call_seconds(work, calls))


def _scratch(activations: int) -> int:
    """Returns what a call's tensors take with their kernels' working memory, and what the allocator keeps."""
    return int(RATES["scratch"] * activations)


def _call_seconds(work: Workload, calls: float) -> float:
    return float(calls * (work.macs / RATES["macs_per_second"] + work.plain.ops * OP_SECONDS / BATCH))


def _load_seconds(work: Workload) -> float:
    return float(work.float_bytes / RATES["loaded_bytes_per_second"])


def _of(stage: str, held: Mapping[str, int], seconds: float, disk: int = 0, of: str = "") -> Estimate:
    base = RATES["base_bytes"][stage + of if stage + of in RATES["base_bytes"] else stage]
    parts = {"program": base, **held}
    return Estimate(stage + of, sum(parts.values()), RATES["start_seconds"] + seconds, disk, parts)
