"""Products and rows of weights in every type of ggml: the bits of gguf-py's decoding, products against float64."""

from __future__ import annotations

import ctypes
import mmap
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from hybridkv.errors import UsageError
from hybridkv.formats.weights import WEIGHTS, WeightFormat, get_weight_format
from hybridkv.kernels import cpu_native, weights
from hybridkv.kernels.weights import ENCODED, Weight, encode, find_bad_block, matmul, rejects, rows
from tests.kernels.weight_rows import HALVES, Bytes, coded, decoded, quantized, weight, with_scales
from tests.thin import slow_but

pytestmark = pytest.mark.skipif(cpu_native.available() is not None, reason=f"{cpu_native.available()}")

# Relative RMSE: quantized weights meet activations of 15 bits with a scale per 256, plain ones meet float32.
LIMIT = 3e-4
_PROT_NONE = 0  # of <sys/mman.h>
N_ROWS = (1, 2, 3, 4, 5, 8, 9, 16, 33, 100)
N_OUT = (1, 15, 17, 257)


@pytest.fixture(params=WEIGHTS.values(), ids=lambda fmt: str(fmt.name))
def fmt(request: pytest.FixtureRequest) -> WeightFormat:
    found: WeightFormat = request.param
    return found


SEARCHED = ("iq2_xxs", "iq2_xs", "iq2_s", "iq1_s", "iq1_m")
"""ggml rounds rows to them after seconds of tables; random codes of theirs are decoded and multiplied by default."""
ROUNDED = slow_but(WEIGHTS.values(), [fmt for fmt in WEIGHTS.values() if fmt.name not in SEARCHED])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(fmt: WeightFormat) -> tuple[int, ...]:
    """One block, an odd number of them, and rows that end within a unit of 256."""
    if fmt.block == 1:
        return (1, 33, 300, 768)
    return (32, 96, 256 + 128, 256 + 192, 800) if fmt.block == 32 else (fmt.block, 3 * fmt.block, 1024)


def exact(x: Tensor, values: np.ndarray) -> Tensor:
    return x.double() @ torch.from_numpy(values).double().T


def relative_rmse(got: Tensor, want: Tensor) -> float:
    return float((got - want).square().mean().sqrt() / want.square().mean().sqrt())


def check(got: Tensor, x: Tensor, values: np.ndarray) -> None:
    """Errors beside the size that products have, so that sums that cancel do not count more."""
    size = float((x.double().square().mean() * np.square(values.astype(np.float64)).mean() * x.shape[1]) ** 0.5)
    assert float((got - exact(x, values)).square().mean().sqrt()) <= LIMIT * size


def test_the_table_is_that_of_ggml(fmt: WeightFormat) -> None:
    import gguf
    from gguf import quants

    kind = gguf.GGMLQuantizationType(fmt.ggml_type)
    assert kind.name.lower() == fmt.name.lower()
    assert gguf.GGML_QUANT_SIZES[kind] == (fmt.block, fmt.block_bytes)
    book = getattr(getattr(quants, fmt.name.upper(), None), "kvalues", None)
    if fmt.codebook is not None:
        assert fmt.codebook == (book or quants.IQ4_NL.kvalues)
    assert get_weight_format(fmt.name.upper()) is get_weight_format(fmt.ggml_type) is fmt
    assert fmt.row_bytes(3 * fmt.block) == 3 * fmt.block_bytes
    assert fmt.bits_per_value >= fmt.code_bits


def test_unknown_types_name_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown weight type 'q4k'") as caught:
        get_weight_format("q4k")
    assert caught.value.hint == "did you mean 'q4_K'?"
    with pytest.raises(UsageError, match="unknown weight type 4711; allowed: f32"):
        get_weight_format(4711)


def has_the_bits_of_gguf(fmt: WeightFormat, data: Bytes) -> bool:
    got = weights.decode(weight(fmt, data, 768)).numpy()
    return np.array_equal(got.view(np.uint32), decoded(fmt, data).view(np.uint32))


def test_rows_have_the_bits_of_gguf(fmt: WeightFormat) -> None:
    assert has_the_bits_of_gguf(fmt, coded(fmt, 21, 768))


@pytest.mark.parametrize("fmt", ROUNDED)
def test_normal_rows_have_the_bits_of_gguf(fmt: WeightFormat) -> None:
    assert has_the_bits_of_gguf(fmt, quantized(fmt, 21, 768))


def test_any_scale_decodes_as_in_gguf(fmt: WeightFormat) -> None:
    """Random bytes throughout: subnormal, huge, infinite scales, and those that are no numbers."""
    data = np.random.default_rng(5).integers(0, 256, (64, 2 * fmt.block_bytes), dtype=np.uint8)
    got, want = weights.decode(weight(fmt, data, 2 * fmt.block)).numpy(), decoded(fmt, data)
    assert np.array_equal(np.isnan(got), np.isnan(want))
    numbers = ~np.isnan(want)
    assert np.array_equal(got[numbers].view(np.uint32), want[numbers].view(np.uint32))


def test_products_are_those_of_float64(isa: str, fmt: WeightFormat) -> None:
    for n_in in inputs(fmt):
        for n_out in N_OUT:
            data = coded(fmt, n_out, n_in)
            values, w = decoded(fmt, data), weight(fmt, data, n_in)
            for n_rows in (1, 3, 4, 5, 16, 33) if n_out == 17 else (1, 9):
                x = normal(n_rows, n_in, seed=n_rows)
                check(matmul(x, w, n_threads=1 + n_rows % 2), x, values)


@pytest.mark.parametrize("fmt", ROUNDED)
def test_products_with_normal_rows(isa: str, fmt: WeightFormat) -> None:
    data = quantized(fmt, 40, 1024)
    for n_rows in (1, 2, 40):
        x = normal(n_rows, 1024)
        assert relative_rmse(matmul(x, weight(fmt, data, 1024)), exact(x, decoded(fmt, data))) <= LIMIT


def test_rows_have_the_same_bits_beside_any_others(isa: str, fmt: WeightFormat) -> None:
    for n_in in (3 * max(fmt.block, 32), 1024):
        w, x = weight(fmt, coded(fmt, 75, n_in), n_in), normal(100, n_in, seed=8)
        alone = torch.cat([matmul(x[i : i + 1], w) for i in range(100)])
        for n in N_ROWS:
            assert torch.equal(matmul(x[:n], w, n_threads=2), alone[:n]), n


def test_rows_of_x_are_chosen(isa: str, fmt: WeightFormat) -> None:
    n_in = 2 * max(fmt.block, 32)
    w, x = weight(fmt, coded(fmt, 37, n_in), n_in), normal(9, n_in)
    for ids in ([3], [8, 0, 0, 5], [1, 2] * 9):
        chosen = torch.tensor(ids)
        assert torch.equal(matmul(x, w, x_rows=chosen), matmul(x[chosen], w))
    with pytest.raises(UsageError, match=r"row ids 0\.\.9 of a matrix of 9 rows"):
        matmul(x, w, x_rows=torch.tensor([0, 9]))


def test_experts_lie_one_behind_the_other(isa: str, fmt: WeightFormat) -> None:
    n_in = max(fmt.block, 64)
    data = np.stack([coded(fmt, 19, n_in, seed=i) for i in range(3)])
    w, x = weight(fmt, data, n_in), normal(5, n_in)
    assert (w.n_stack, w.n_out, w.nbytes) == (3, 19, data.nbytes)
    for i in range(3):
        alone = weight(fmt, data[i].copy(), n_in)
        assert torch.equal(matmul(x, w, expert=i), matmul(x, alone))
        ids = torch.tensor([18, 0, 7])
        assert torch.equal(rows(w, ids, expert=i), weights.decode(alone)[ids])


@pytest.mark.parametrize("n_rows", [1, 4, 9, 40])
def test_adds(isa: str, fmt: WeightFormat, n_rows: int) -> None:
    n_in = max(fmt.block, 96)
    w, x, before = weight(fmt, coded(fmt, 50, n_in), n_in), normal(n_rows, n_in, seed=4), normal(n_rows, 50, seed=5)
    out = before.clone()
    assert matmul(x, w, out=out, into="add") is out
    assert torch.equal(out, before + matmul(x, w))


@pytest.mark.parametrize("n_rows", [1, 5, 100])
def test_writes_its_outputs_and_nothing_else(isa: str, fmt: WeightFormat, n_rows: int) -> None:
    """Poison before, between and behind the rows of the output stays; strides of x and y are honoured."""
    n_out, n_in = 37, max(fmt.block, 96)
    w, poison = weight(fmt, coded(fmt, n_out, n_in), n_in), torch.full((n_rows + 2, n_out + 11), torch.nan)
    wide = torch.full((n_rows, n_in + 5), torch.nan)
    wide[:, 3 : 3 + n_in] = normal(n_rows, n_in, seed=3)
    x, out = wide[:, 3 : 3 + n_in], poison[1:-1, 4 : 4 + n_out]
    assert matmul(x, w, out=out, n_threads=2) is out
    assert torch.equal(out, matmul(x.contiguous(), w))
    assert out.isfinite().all()
    out.fill_(torch.nan)
    assert poison.isnan().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("n_rows", [1, 3, 40])
def test_a_number_never_comes_from_one_that_is_none(isa: str, fmt: WeightFormat, n_rows: int, value: float) -> None:
    """A row with a NaN or an infinity has no finite output; the others, and later calls, are as without it."""
    n_in = 2 * max(fmt.block, 32)
    w, x = weight(fmt, coded(fmt, 50, n_in), n_in), normal(n_rows, n_in, seed=6)
    clean, dirty, bad = matmul(x, w), x.clone(), n_rows // 2
    dirty[bad, n_in - 3] = value
    got = matmul(dirty, w)
    assert not got[bad].isfinite().any()
    others = torch.arange(n_rows) != bad
    assert torch.equal(got[others], clean[others])
    assert torch.equal(matmul(x, w), clean)


def test_scales_of_activations_are_free(isa: str, fmt: WeightFormat) -> None:
    """Rows of very different size, zeros, and values whose inverse is no float32."""
    n_in = max(fmt.block, 128)
    data = coded(fmt, 64, n_in)
    w, values = weight(fmt, data, n_in), decoded(fmt, data)
    for n_rows in (1, 20):
        x = normal(n_rows, n_in, seed=7) * torch.tensor([1e30, 1e-25, 1.0, 1e6, 1e-12]).repeat(4)[:n_rows, None]
        got = matmul(x, w)
        for i in range(n_rows):
            check(got[i : i + 1], x[i : i + 1], values)
        for tiny in (0.0, 1e-38, 1e-45):
            assert matmul(torch.full((n_rows, n_in), tiny), w).abs().max() <= 1e-28


@pytest.mark.parametrize("byte", [0x00, 0x7F, 0x80, 0xFF])
@pytest.mark.parametrize("name", [fmt.name for fmt in WEIGHTS.values() if fmt.is_quantized])
def test_no_sum_of_products_overflows(isa: str, name: str, byte: int) -> None:
    """Codes and scales of one byte throughout, activations of one size: every sum has its largest terms."""
    fmt = WEIGHTS[name]
    n_in = 2 * max(fmt.block, 256)
    data = with_scales(fmt, np.full((16, n_in // fmt.block, fmt.block_bytes), byte, dtype=np.uint8)).reshape(16, -1)
    values, w = decoded(fmt, data), weight(fmt, data, n_in)
    for x in (
        torch.full((1, n_in), 3.0),
        torch.full((9, n_in), -3.0),
        torch.tensor([[1.0, -1.0]]).repeat(5, n_in // 2),
    ):
        check(matmul(x, w), x, values)


def test_bytes_may_lie_anywhere(isa: str, fmt: WeightFormat) -> None:
    n_in = 2 * max(fmt.block, 32)
    data = coded(fmt, 33, n_in)
    memory, x = torch.zeros(data.size + 64, dtype=torch.uint8), normal(6, n_in)
    want, values = matmul(x, weight(fmt, data, n_in)), weights.decode(weight(fmt, data, n_in))
    for offset in (0, 1, 3, 32):
        there = memory[offset : offset + data.size]
        there.copy_(torch.from_numpy(data).flatten())
        w = Weight(fmt, there.view(1, 33, -1), n_in)
        assert torch.equal(matmul(x, w), want)
        assert torch.equal(weights.decode(w).view(torch.int32), values.view(torch.int32))


@pytest.mark.skipif(sys.platform != "linux", reason="pages are closed by Linux's mprotect")
def test_nothing_is_read_behind_the_last_row(isa: str, fmt: WeightFormat) -> None:
    """Rows end with the file: what lies behind them may not be mapped."""
    page, n_in = mmap.PAGESIZE, inputs(fmt)[1]
    data = coded(fmt, 5, n_in)
    room = -(-data.nbytes // page) * page
    memory = mmap.mmap(-1, room + page)
    whole = np.frombuffer(memory, dtype=np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(whole.ctypes.data + room), ctypes.c_size_t(page), _PROT_NONE) == 0
    there = whole[room - data.nbytes : room].reshape(data.shape)
    there[:] = data
    w = weight(fmt, there, n_in)
    for n_rows in (1, 9):
        x = normal(n_rows, n_in)
        assert torch.equal(matmul(x, w), matmul(x, weight(fmt, data, n_in)))
    assert torch.equal(weights.decode(w), weights.decode(weight(fmt, data, n_in)))
    assert find_bad_block(w) is None


def test_threads_do_not_change_the_result(isa: str, fmt: WeightFormat) -> None:
    w = weight(fmt, coded(fmt, 1000, 256), 256)
    for n_rows in (1, 40):
        x = normal(n_rows, 256, seed=9)
        assert torch.equal(*(matmul(x, w, n_threads=n) for n in (1, 2)))


def test_activations_of_any_dtype(isa: str) -> None:
    w = weight(WEIGHTS["q4_K"], coded(WEIGHTS["q4_K"], 20, 512), 512)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        x = normal(3, 512).to(dtype)
        assert torch.equal(matmul(x, w), matmul(x.float(), w))
    columns = normal(512, 3).T
    assert torch.equal(matmul(columns, w), matmul(columns.contiguous(), w))


def test_bad_scales_are_found(fmt: WeightFormat) -> None:
    n_in = 3 * fmt.block
    data = np.stack([coded(fmt, 40, n_in, seed=i) for i in range(2)])
    assert find_bad_block(weight(fmt, data, n_in)) is None
    if fmt.name in ("mxfp4", "iq1_m"):
        return  # mxfp4 has no such scale; that of iq1_m lies in pieces
    for bits in (0x7C00, 0xFC00, 0x7E01):
        for at in HALVES.get(fmt.name, (0,)):
            broken = data.reshape(2, 40, 3, fmt.block_bytes).copy()
            where = {"f32": np.float32(np.inf), "bf16": np.uint16(0x7F80)}.get(fmt.name, np.uint16(bits))
            broken[1, 17, 2, at : at + where.nbytes] = np.frombuffer(where.tobytes(), dtype=np.uint8)
            broken[1, 39, 0, at : at + where.nbytes] = np.frombuffer(where.tobytes(), dtype=np.uint8)
            assert find_bad_block(weight(fmt, broken.reshape(2, 40, -1), n_in)) == (1, 17, 2)


@pytest.mark.parametrize("name", ENCODED)
def test_floats_are_encoded(name: str) -> None:
    """f32, f16, bf16 as torch rounds them; q8_0 as ggml does; q4_0 nearer to the values than ggml's."""
    x = normal(33, 96) * 0.02
    got = weights.decode(encode(x, name))
    dtypes = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
    if name in dtypes:
        assert torch.equal(got, x.to(dtypes[name]).float())
        return
    from gguf.quants import quantize

    from tests.kernels.weight_rows import ggml_type

    theirs = torch.from_numpy(decoded(WEIGHTS[name], quantize(x.numpy(), ggml_type(WEIGHTS[name]))))
    assert relative_rmse(got, x) <= relative_rmse(theirs, x)
    if name == "q8_0":
        assert torch.equal(got, theirs)
    stack = encode(torch.stack([x, 2 * x]), name)
    assert (stack.n_stack, stack.n_out, stack.n_in) == (2, 33, 96)
    assert torch.equal(weights.decode(stack), got)


def test_what_cannot_be_is_refused() -> None:
    q4_k = WEIGHTS["q4_K"]
    with pytest.raises(UsageError, match="q4_K needs a multiple of 256 inputs, not 128"):
        Weight(q4_k, torch.zeros(1, 1, 72, dtype=torch.uint8), 128)
    with pytest.raises(UsageError, match=r"q4_K rows of 256 inputs are uint8 \[stack, outputs, 144\]"):
        Weight(q4_k, torch.zeros(1, 1, 143, dtype=torch.uint8), 256)
    with pytest.raises(UsageError, match="rows of a weight lie side by side in host memory"):
        Weight(q4_k, torch.zeros(1, 4, 288, dtype=torch.uint8)[..., :144], 256)
    with pytest.raises(UsageError, match=r"weights are not rounded to q4_K; allowed: f32, f16, bf16, q8_0, q4_0"):
        encode(normal(2, 256), "q4_K")
    with pytest.raises(UsageError, match="q8_0 needs a multiple of 32 inputs, not 33"):
        encode(normal(2, 33), "q8_0")
    w = encode(normal(4, 32), "q8_0")
    with pytest.raises(UsageError, match=r"row ids -1\.\.0 of a matrix of 4 rows"):
        rows(w, torch.tensor([0, -1]))
    assert rejects(q4_k, 512) is None
    assert rejects(q4_k, 500) == "q4_K needs a multiple of 256 inputs, not 500"
