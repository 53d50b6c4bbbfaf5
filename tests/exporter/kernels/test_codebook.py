"""The codebook matmul on a GPU: kernel = reference in Triton's interpreter, and what is compiled for each GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from common import ROOT

from engines.errors import UserError
from exporter.formats.codebook import BITS, Format
from exporter.kernels import codebook
from exporter.kernels.codebook import PackedWeight
from exporter.tensors import CodebookTensor

POINTERS = {"x": "*fp16", "codes": "*u8", "codebook": "*fp16", "dense": "*fp16", "scale": "*fp32", "y": "*fp16"}
READS = {"few_rows": ("x", "codes", "codebook", "scale", "y"), "many_rows": ("x", "dense", "scale", "y")}
READS |= {"decode": ("codes", "codebook", "dense")}
TILE = re.compile(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)")
TRITON_RUNS_HERE = pytest.mark.skipif(sys.platform != "linux", reason="Triton is published for Linux only")


def python(*arguments: str) -> str:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    return done.stdout


def tensor(entries=256, vector_size=4, outputs=6, inputs=32, scale=None):
    codes = torch.randint(entries, (outputs, inputs // vector_size), dtype=torch.uint8)
    return CodebookTensor(codes, torch.randn(entries, vector_size).half().float(), scale, Format(vector_size, entries))


@pytest.mark.parametrize("scale", [None, torch.tensor(0.5), torch.arange(1.0, 7.0)])
@pytest.mark.parametrize("entries", list(BITS))
def test_the_reference_is_the_layers_own_weight_times_x_at_the_stored_width(entries, scale):
    dense = tensor(entries, scale=scale)
    weight = PackedWeight.of(dense)
    assert 8 * weight.codes.nbytes == dense.codes.numel() * BITS[entries]
    x = torch.randn(3, 32).half()
    assert torch.equal(codebook.reference(x, weight, torch.float64), x.double() @ dense.dequantize(torch.float64).T)


def test_rounding_is_agreement_and_one_wrong_code_is_not():
    dense = tensor(inputs=4608)
    weight, x = PackedWeight.of(dense), torch.randn(5, 4608).half()
    y = codebook.reference(x, weight).half()
    assert 0 < codebook.disagreement(y, x, weight) <= 1
    wrong = dense.codes.clone()
    wrong[3, 7] ^= 1
    assert codebook.disagreement(y, x, PackedWeight.of(replace(dense, codes=wrong))) > 1
    y[0, 0] = torch.nan
    assert not codebook.disagreement(y, x, weight) <= 1


@pytest.mark.parametrize(
    ("weight", "x", "message"),
    [
        (tensor(vector_size=3, inputs=33), torch.zeros(1, 33).half(), "codewords of 3 numbers"),
        (tensor(), torch.zeros(1, 32), r"x is torch\.float32"),
        (tensor(), torch.zeros(1, 31).half(), "x has 31 numbers in a row, the weight 32"),
        (tensor(), torch.zeros(1, 32).half(), "x is on cpu"),
    ],
)
def test_what_a_kernel_cannot_take_is_refused_with_the_fix(weight, x, message):
    with pytest.raises(UserError, match=message):
        codebook.codebook_matmul(x, PackedWeight.of(weight))


def test_a_machine_without_triton_is_told_how_to_get_it(monkeypatch):
    monkeypatch.delattr("exporter.kernels._codebook_triton", raising=False)
    monkeypatch.delitem(sys.modules, "exporter.kernels._codebook_triton", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UserError, match="Triton cannot be imported") as raised:
        codebook.codebook_matmul(torch.zeros(1, 32).half(), PackedWeight.of(tensor()))
    assert "pip install triton" in raised.value.fix


def test_it_needs_torch_alone():
    heavy = "diffusers transformers triton onnx onnxruntime"
    code = f"import sys, exporter.kernels.codebook; print([m for m in '{heavy}'.split() if m in sys.modules])"
    assert python("-c", code).strip() == "[]"


@TRITON_RUNS_HERE
def test_every_kernel_agrees_with_the_reference_in_the_interpreter():
    results = json.loads(python(str(Path(__file__).with_name("interpreted.py"))))
    assert {name.split(",")[0] for name in results} == {"codebook_matmul", "few_rows", "many_rows"}
    assert not {name: value for name, value in results.items() if not value <= 1}
    assert any(value > 0.5 for value in results.values())  # half a unit in the last place is what rounding does


@TRITON_RUNS_HERE
class TestAheadOfTime:
    """What is compiled for a GPU, on a machine without one: PTX, and the machine code that ptxas makes of it."""

    @pytest.fixture(scope="class", params=[80, 89, 90])
    def compiled(self, request, tmp_path_factory):
        """Returns the PTX and the registers, stack and local bytes of a kernel for one GPU."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        from exporter.kernels import _codebook_triton

        folder = tmp_path_factory.mktemp("cubin")

        def get(kernel: str, rows: int, entries: int, vector_size: int):
            table = torch.empty(entries, vector_size)
            weight = PackedWeight(torch.empty(0), table, torch.empty(1152), (1152, 1152))
            constants = codebook.constants(kernel, weight, rows)
            options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
            pointers = {name: POINTERS[name] for name in READS[kernel]}
            sizes = {"count": "i32"} if kernel == "decode" else {"rows": "i32", "outputs": "i32"}
            signature = pointers | sizes | dict.fromkeys(constants, "constexpr")
            aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(pointers))}
            source = ASTSource(getattr(_codebook_triton, kernel), signature, constants, aligned)
            with triton.knobs.cache.scope():
                triton.knobs.cache.dir = str(folder)
                made = triton.compile(source, target=GPUTarget("cuda", request.param, 32), options=options)
            binary = folder / "kernel.cubin"
            binary.write_bytes(made.asm["cubin"])
            command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(binary)]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            ptx = made.asm["ptx"]
            assert re.search(rf"^\.target sm_{request.param}a?$", ptx, re.MULTILINE)
            return request.param, ptx, tuple(map(int, TILE.search(usage).groups()))

        return get

    @pytest.mark.parametrize(
        ("rows", "entries", "vector_size", "bytes_of_a_code"),
        [(1, 256, 4, 1), (16, 256, 4, 1), (16, 64, 2, 2), (16, 16, 1, 1)],
    )
    def test_few_rows_read_stored_codes_into_a_loop_without_barriers(
        self, compiled, rows, entries, vector_size, bytes_of_a_code
    ):
        _, ptx, (registers, *spilled) = compiled("few_rows", rows, entries, vector_size)
        assert spilled == [0, 0]
        assert registers <= 128  # four programs of 128 threads to an SM of 65,536 registers
        assert len(re.findall(r"ld\.global\S*\.b8 ", ptx)) == 4 * bytes_of_a_code  # a thread's codes of 4 outputs
        (loop,) = loops(ptx)
        assert "fma.rn.f32" in loop
        assert "bar.sync" not in loop
        assert "mma" not in loop.replace("fma", "")

    @pytest.mark.parametrize(("entries", "vector_size"), [(256, 4), (64, 2), (16, 1), (16, 16)])
    def test_decoding_reads_stored_codes_once(self, compiled, entries, vector_size):
        _, ptx, (_, *spilled) = compiled("decode", 0, entries, vector_size)
        assert spilled == [0, 0]
        assert loops(ptx) == []

    @pytest.mark.parametrize("rows", [17, 300, 1000, 2048])  # with 1152 outputs, one of each tile
    def test_many_rows_multiply_on_tensor_cores(self, compiled, rows):
        gpu, ptx, (registers, *spilled) = compiled("many_rows", rows, 256, 4)
        assert spilled == [0, 0]
        assert registers <= 255
        instruction = "wgmma.mma_async" if gpu == 90 and rows > 17 else "mma.sync"  # wgmma multiplies 64 rows
        assert re.search(rf"{re.escape(instruction)}\S*\.f32\.f16\.f16", ptx)  # fp16 factors, fp32 sums
        assert "cp.async" in ptx  # what is multiplied next is on its way


def loops(ptx: str) -> list[str]:
    """Returns the bodies of a kernel's loops: from a label to the branch back to it."""
    found = []
    for branch in re.finditer(r"bra(?:\.uni)?\s+(\$L__BB\w+);", ptx):
        start = ptx.find(f"\n{branch[1]}:")
        if start < branch.start():
            found.append(ptx[start : branch.end()])
    return found
