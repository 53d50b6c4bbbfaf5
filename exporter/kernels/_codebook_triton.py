"""The Triton kernels of `exporter.kernels.codebook`: y[m, n] = scale[n] · Σ_i x[m, i] · weight[n, i].

x and y are contiguous fp16, [rows, WIDTH · D] and [rows, outputs]; a row of the weight is WIDTH codes, each of which
stands for D neighbours. Codes are read at their stored width, codewords looked up through L1, and sums are in fp32.
"""

import triton
import triton.language as tl


@triton.jit
def few_rows(
    x, codes, codebook, scale, y, rows, outputs,
    WIDTH: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr, SCALE_STRIDE: tl.constexpr,
    R: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Multiplies all rows, at most R, with N outputs to a program; nothing that it decodes leaves the registers.

    Each thread sums over codes of its own, C of them a step over all threads, and threads are added up at the end.
    Axes are in the order in which threads run along them, and hints keep neighbours from being read as one word: so
    the loads all lie among the threads as the products do, and the loop has no barrier.
    """
    code_axis = tl.arange(0, C)[:, None, None, None]
    row_axis = tl.arange(0, R)[None, :, None, None]
    n = tl.program_id(0) * N + tl.arange(0, N)
    n_axis = n[None, None, :, None]
    element = tl.arange(0, D)[None, None, None, :]
    total = tl.zeros([C, R, N], tl.float32)
    for start in range(0, WIDTH, C):
        k = start + code_axis
        position = tl.max_contiguous(n_axis * WIDTH + k, [1, 1, 1, 1])
        code = _code(codes, position, (k < WIDTH) & (n_axis < outputs), BITS)
        weight = tl.load(codebook + code * D + element)
        of_code = tl.max_contiguous(row_axis * WIDTH + k, [1, 1, 1, 1])
        inputs = tl.load(x + of_code * D + element, mask=(k < WIDTH) & (row_axis < rows), other=0.0)
        total += tl.sum(inputs.to(tl.float32) * weight.to(tl.float32), axis=3)
    _store(y, tl.sum(total, axis=0), scale, tl.arange(0, R), n, rows, outputs, SCALE_STRIDE)


@triton.jit
def decode(codes, codebook, dense, count, BITS: tl.constexpr, D: tl.constexpr, N: tl.constexpr):
    """Writes the codewords of all `count` codes, N to a program, one after the other: fp16 [count, D]."""
    position = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    inside = position < count
    element = tl.arange(0, D)[None, :]
    words = tl.load(codebook + _code(codes, position, inside, BITS)[:, None] * D + element)
    tl.store(dense + position[:, None] * D + element, words, mask=inside[:, None])


@triton.jit
def many_rows(
    x, dense, scale, y, rows, outputs,
    INPUTS: tl.constexpr, SCALE_STRIDE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Multiplies M rows with N outputs of a decoded weight [outputs, INPUTS] on the tensor cores.

    Programs that follow each other share rows or outputs, GROUP tiles of rows at a time: what they read stays in L2.
    """
    across, down = tl.cdiv(outputs, N), tl.cdiv(rows, M)
    program = tl.program_id(0)
    first = program // (GROUP * across) * GROUP
    high = min(down - first, GROUP)
    row = (first + program % (GROUP * across) % high) * M + tl.arange(0, M)
    n = program % (GROUP * across) // high * N + tl.arange(0, N)
    # rows and outputs beyond the last are read as others, and not stored
    x += (row % rows)[:, None].to(tl.int64) * INPUTS
    dense += (n % outputs)[None, :].to(tl.int64) * INPUTS
    total = tl.zeros([M, N], tl.float32)
    for start in range(0, INPUTS, K):
        k = start + tl.arange(0, K)
        if INPUTS % K == 0:
            inputs, weight = tl.load(x + k[None, :]), tl.load(dense + k[:, None])
        else:
            inputs = tl.load(x + k[None, :], mask=k[None, :] < INPUTS, other=0.0)
            weight = tl.load(dense + k[:, None], mask=k[:, None] < INPUTS, other=0.0)
        total = tl.dot(inputs, weight, total)
    _store(y, total, scale, row, n, rows, outputs, SCALE_STRIDE)


@triton.jit
def _code(codes, position, inside, BITS: tl.constexpr):
    """Returns the codes at `position` as `exporter.tensors.pack` lays them down; not inside, some code."""
    if BITS == 8:
        return tl.load(codes + position, mask=inside, other=0).to(tl.int32)
    elif BITS == 4:
        byte = tl.load(codes + (position >> 1), mask=inside, other=0).to(tl.int32)
        return (byte >> ((position & 1) << 2)) & 15
    else:  # 6: a pair of codes is three nibbles, less 8, from nibble 3 · pair on
        pair = position >> 1
        byte = codes + (pair * 3 >> 1)
        low = tl.load(byte, mask=inside, other=0).to(tl.int32)
        high = tl.load(byte + 1, mask=inside, other=0).to(tl.int32)
        nibbles = ((low | (high << 8)) >> ((pair & 1) << 2)) ^ 0x888
        first = ((nibbles & 15) << 2) | ((nibbles >> 6) & 3)
        second = (nibbles & 0x30) | ((nibbles >> 8) & 15)
        return tl.where((position & 1) == 0, first, second)


@triton.jit
def _store(y, total, scale, row, n, rows, outputs, SCALE_STRIDE: tl.constexpr):
    """Writes scale · total [rows, outputs], rounded to fp16, where it lies inside y."""
    if scale is not None:
        total *= tl.load(scale + n * SCALE_STRIDE, mask=n < outputs, other=0.0)[None, :]
    inside = (row < rows)[:, None] & (n < outputs)[None, :]
    tl.store(y + row[:, None].to(tl.int64) * outputs + n[None, :], total.to(tl.float16), mask=inside)
