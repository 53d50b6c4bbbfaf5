"""What the tests of model families share: small random models, feeds, exported graphs, text encoders."""

from __future__ import annotations

import contextlib
import io
from types import SimpleNamespace
from unittest import mock

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from common import FAMILIES
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from exporter.lower import trace
from exporter.lower.passes.fold_constants import FoldConstants
from exporter.models import family_of

# What these models may use; TensorRT and TensorRT-RTX have an importer for each.
OPS = set(
    "Add Cast Concat Conv Cos Div Equal Erf Exp Expand Gather Gelu Gemm Identity LayerNormalization MatMul Max Min Mod "
    "Mul Neg Pow Range ReduceMean Reciprocal Reshape Shape Sigmoid Sin Slice Softmax Split Sqrt Squeeze Sub Tanh Tile "
    "Transpose Unsqueeze Where Constant ConstantOfShape Clip Einsum".split()
)
ONNX_TYPES = {"FLOAT", "FLOAT16", "INT64", "INT32", "BOOL"}


def family(name, **changes):
    config = {**FAMILIES[name], **changes}
    return family_of(config["_class_name"], config, name)


def randomize(model, seed=0):
    """Draws every parameter, those too that diffusers starts at zero or one; the model then tells one input apart."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(drawn / max(1, parameter[0].numel()) ** 0.5)
            else:
                parameter.copy_(0.4 * drawn + float(name.endswith("weight")))  # a norm's weight is about 1
    return model.eval().requires_grad_(False)


def built(found, seed=0):
    return randomize(found.build(), seed)


def feeds_of(found, sizes, seed=0):
    """Draws the network's inputs, dynamic axes as `sizes` says; positions and masks are such as samplers give."""
    generator = torch.Generator().manual_seed(seed)
    feeds = {}
    for spec in found.inputs():
        shape = [sizes[d] if isinstance(d, str) else d for d in spec.shape]
        feeds[spec.name] = torch.randn(shape, generator=generator)
        if spec.name == "timestep":
            unit = 1 if "Flux" in found.CLASS else 1000
            feeds[spec.name] = torch.rand(shape, generator=generator) * unit
        elif spec.name.endswith("mask"):
            feeds[spec.name] = (torch.arange(shape[1]) < shape[1] // 2).float().expand(shape).clone()
        elif spec.name.endswith("_ids"):
            feeds[spec.name] = torch.randint(0, 64, shape[1:], generator=generator).float().expand(shape).clone()
        elif spec.name in ("resolution", "aspect_ratio", "guidance"):
            feeds[spec.name] = torch.rand(shape, generator=generator) * 4 + 1
    return feeds


def assert_folds_exact(found, sizes, tolerance=1e-4):
    """Every fold divides what its consumers read by a factor that their weights take back."""
    model, feeds = built(found), feeds_of(found, sizes)
    wanted = found.call(model, feeds)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    folds = found.folds(model)
    assert len({consumer for fold in folds for consumer in fold.consumers}) == sum(len(f.consumers) for f in folds)
    for index, fold in enumerate(folds):
        width = model.get_submodule(fold.consumers[0]).weight.shape[1]
        factor = torch.rand(width, generator=torch.Generator().manual_seed(index)) * 3 + 0.25
        for consumer in fold.consumers:
            weight = model.get_submodule(consumer).weight
            weight *= factor.reshape(1, -1, *[1] * (weight.ndim - 2))
        assert relative(found.call(model, feeds), wanted) > tolerance, fold.consumers  # the factor matters
        fold.divide(model, factor)
        assert relative(found.call(model, feeds), wanted) < tolerance, fold.consumers
        model.load_state_dict(state)
    return folds


def relative(got, wanted):
    return float((got - wanted).norm() / wanted.norm())


def exported(found, dtype="fp32", seed=0):
    """Traces under fake tensors as `lower` does, folds shapes, and fills the weights of `built(found, seed)` in."""
    unquantized = SimpleNamespace(family=lambda _: found, build=lambda _: found.build().eval())
    with mock.patch.object(trace, "quantized", unquantized), contextlib.redirect_stdout(io.StringIO()):
        graph = trace.trace(None, dtype, None, "index")
    for value, spec in zip(graph.graph.inputs, found.inputs(), strict=True):
        assert [isinstance(d, int) for d in value.shape] == [isinstance(d, int) for d in spec.shape], spec.name
    FoldConstants()(graph)
    model = built(found, seed)
    tensors = {trace.PREFIX + name: value for name, value in (*model.named_parameters(), *model.named_buffers())}
    for value in graph.graph.initializers.values():
        if value.name in tensors:
            array = tensors[value.name].detach().numpy().astype(value.dtype.numpy())
            value.const_value = ir.tensor(array, name=value.name)
    return graph


def op_types(graph):
    return {node.op_type for node in graph.graph}


def tensor_types(graph):
    values = [*graph.graph.initializers.values(), *graph.graph.inputs]
    values += [value for node in graph.graph for value in node.outputs]
    return {value.dtype.name for value in values if value.dtype is not None}


def assert_lowers(found, sizes, dtype="fp32", tolerance=1e-4):
    """The graph holds nothing that an engine refuses, and at other sizes than traced computes what torch does."""
    graph = exported(found, dtype)
    assert op_types(graph) <= OPS, op_types(graph) - OPS
    assert tensor_types(graph) <= ONNX_TYPES
    for node in graph.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = value.type = None
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(ir.to_proto(graph).SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = feeds_of(found, sizes)
    narrow = {spec.name for spec in found.inputs() if spec.dtype == "float" and dtype == "fp16"}
    names = [i.name for i in session.get_inputs()]
    arrays = {
        name: value.numpy().astype(np.float16 if spec in narrow else np.float32)
        for name, (spec, value) in zip(names, feeds.items(), strict=True)
    }
    got = torch.from_numpy(session.run(None, arrays)[0]).float()
    with torch.no_grad():
        wanted = found.call(built(found), feeds)
    assert got.shape == wanted.shape
    assert relative(got, wanted) < tolerance
    return graph


def assert_shapes(found, tensors):
    """Tensors are shaped as the family's inputs say, dynamic axes as they are."""
    specs = {spec.name: spec for spec in found.inputs()}
    for name, tensor in tensors.items():
        wanted = [d if isinstance(d, int) else n for d, n in zip(specs[name].shape, tensor.shape, strict=True)]
        assert list(tensor.shape) == wanted, name
        assert tensor.dtype == torch.float32, name


WORDS = "a blue circle left of red square".split()


def tokenizer(length, *, clip):
    """Returns a tokenizer of a few words, which ends a sentence as CLIP's or T5's does."""
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    words = {word: number for number, word in enumerate(special + WORDS)}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>" if clip else "$A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=length, **names)


def clip_encoder(width, *, projected):
    config = CLIPTextConfig(
        vocab_size=16, hidden_size=width, intermediate_size=width, projection_dim=width, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=77, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def t5_encoder(width):
    config = T5Config(vocab_size=16, d_model=width, d_kv=16, d_ff=width, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()
