"""Products and rows of weights in every type of ggml: the bits of gguf-py's decoding, products against float64.

Products are taken with activations of 16 and of 8 bits, wherever a type and an instruction set have both.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hybridkv.errors import UsageError
from hybridkv.formats.weights import WEIGHTS, WeightFormat, get_weight_format
from hybridkv.kernels import cpu_native, weights
from hybridkv.kernels.weights import ENCODED, Weight, encode, find_bad_block, matmul, rejects, rows, takes_int8
from tests.isas import INT8_ISAS, ISAS
from tests.kernels.weight_rows import HALVES, Bytes, coded, decoded, quantized, weight, with_scales
from tests.thin import pairwise, slow_but

pytestmark = pytest.mark.skipif(cpu_native.available() is not None, reason=f"{cpu_native.available()}")

LIMIT = 3e-4
"""Relative RMSE: quantized weights meet activations of 15 bits with a scale per 256, plain ones meet float32."""
LIMIT_INT8 = 7e-3
"""With a scale per 32 activations and levels -127..127; of normal values 5e-3."""
_PROT_NONE = 0  # of <sys/mman.h>
N_ROWS = (1, 2, 3, 4, 5, 8, 9, 16, 33, 100)
N_OUT = (1, 15, 17, 257)
FORMATS = tuple(WEIGHTS.values())
INT8_TYPES = ("q4_0", "q4_1", "q5_0", "q5_1", "q2_K", "q3_K", "q4_K", "q5_K", "q6_K")
SEARCHED = ("iq2_xxs", "iq2_xs", "iq2_s", "iq1_s", "iq1_m")
"""ggml rounds rows to them after seconds of tables; random codes of theirs are decoded and multiplied by default."""


@dataclass(frozen=True)
class Product:
    """A product of one type on one instruction set, with activations of 16 bits or of 8."""

    isa: str
    fmt: WeightFormat
    int8: bool

    @property
    def name(self) -> str:
        return f"{self.isa}-{self.fmt.name}{'-int8' * self.int8}"

    def matmul(self, x: Tensor, w: Weight, **more: Any) -> Tensor:
        return matmul(x, w, activations="int8" if self.int8 else "int16", **more)

    def kept(self, x: Tensor) -> Tensor:
        """What is left of activations, in float64; 15 bits count as all of them."""
        if not self.int8:
            return x.double()
        scale = scales(x)
        levels = torch.where(scale > 0, torch.round(x * (1 / scale).nan_to_num(posinf=0.0)), 0.0).clamp(-127, 127)
        return levels.double() * scale.double()

    def check(self, got: Tensor, x: Tensor, values: np.ndarray) -> None:
        """Compare with float64's product of what is kept of x, and with x's own, as near as half a level allows.

        Errors are taken beside the size that products have, so that sums that cancel do not count more.
        """
        w = torch.from_numpy(values).double()
        size = (x.double().square().mean() * w.square().mean() * x.shape[1]).sqrt()
        assert (got - self.kept(x) @ w.T).square().mean().sqrt() <= LIMIT * size
        if self.int8:
            bound = 0.5 * scales(x).double() @ w.abs().T
            assert ((got - x.double() @ w.T).abs() <= 1.01 * bound + 1e-6 * size).all()


def over(*axes: Iterable[Any], formats: Iterable[WeightFormat] = FORMATS, slow: Iterable[str] = ()) -> list[Any]:
    """Parametrize by all products and by other axes, of which values meet in pairs by default; `slow` names types."""
    formats = tuple(formats)
    found = []
    for int8, isas in ((False, ISAS), (True, INT8_ISAS)):
        of_these = [fmt for fmt in formats if fmt.name in INT8_TYPES or not int8]
        for param in pairwise(isas, of_these, *axes):
            isa, fmt, *rest = param.values
            product = Product(isa, fmt, int8)
            name = "-".join(map(str, (product.name, *rest)))
            marks = pytest.mark.slow if fmt.name in slow else param.marks
            found.append(pytest.param(product, *rest, marks=marks, id=name))
    return found


@pytest.fixture
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Product:
    """The instruction set is asked for by `HYBRIDKV_ISA`."""
    found: Product = request.param
    monkeypatch.setenv("HYBRIDKV_ISA", found.isa)
    return found


every_product = pytest.mark.parametrize("product", over(), indirect=True)


@pytest.fixture(params=FORMATS, ids=lambda fmt: str(fmt.name))
def fmt(request: pytest.FixtureRequest) -> WeightFormat:
    found: WeightFormat = request.param
    return found


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(fmt: WeightFormat) -> tuple[int, ...]:
    """One block, an odd number of them, and rows that end within a unit of 256."""
    if fmt.block == 1:
        return (1, 33, 300, 768)
    return (32, 96, 256 + 128, 256 + 192, 800) if fmt.block == 32 else (fmt.block, 3 * fmt.block, 1024)


def scales(x: Tensor) -> Tensor:
    """The scale of every activation of 8 bits: a 127th of the largest of its 32; rows end within a group."""
    wide = torch.nn.functional.pad(x, (0, -x.shape[1] % 32)).view(len(x), -1, 32)
    return (wide.abs().amax(2, keepdim=True) / 127).expand_as(wide).reshape(len(x), -1)[:, : x.shape[1]]


def exact(x: Tensor, values: np.ndarray) -> Tensor:
    return x.double() @ torch.from_numpy(values).double().T


def relative_rmse(got: Tensor, want: Tensor) -> float:
    return float((got - want).square().mean().sqrt() / want.square().mean().sqrt())


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


@pytest.mark.parametrize("fmt", slow_but(FORMATS, [fmt for fmt in FORMATS if fmt.name not in SEARCHED]))
def test_normal_rows_have_the_bits_of_gguf(fmt: WeightFormat) -> None:
    assert has_the_bits_of_gguf(fmt, quantized(fmt, 21, 768))


def test_any_scale_decodes_as_in_gguf(fmt: WeightFormat) -> None:
    """Random bytes throughout: subnormal, huge, infinite scales, and those that are no numbers."""
    data = np.random.default_rng(5).integers(0, 256, (64, 2 * fmt.block_bytes), dtype=np.uint8)
    got, want = weights.decode(weight(fmt, data, 2 * fmt.block)).numpy(), decoded(fmt, data)
    assert np.array_equal(np.isnan(got), np.isnan(want))
    numbers = ~np.isnan(want)
    assert np.array_equal(got[numbers].view(np.uint32), want[numbers].view(np.uint32))


@every_product
def test_products_are_those_of_float64(product: Product) -> None:
    fmt = product.fmt
    for n_in in inputs(fmt):
        for n_out in N_OUT:
            data = coded(fmt, n_out, n_in)
            values, w = decoded(fmt, data), weight(fmt, data, n_in)
            for n_rows in (1, 2, 3, 4, 5, 16, 33) if n_out == 17 else (1, 9):
                x = normal(n_rows, n_in, seed=n_rows)
                product.check(product.matmul(x, w, n_threads=1 + n_rows % 2), x, values)


@pytest.mark.parametrize("product", over(slow=SEARCHED), indirect=True)
def test_products_with_normal_rows(product: Product) -> None:
    data = quantized(product.fmt, 40, 1024)
    for n_rows in (1, 2, 40):
        x = normal(n_rows, 1024)
        error = relative_rmse(product.matmul(x, weight(product.fmt, data, 1024)), exact(x, decoded(product.fmt, data)))
        assert product.int8 or error <= LIMIT
    assert not product.int8 or 3e-3 <= error <= LIMIT_INT8  # of 40 rows: 8 bits were used, and kept


@every_product
def test_rows_have_the_same_bits_beside_any_others(product: Product) -> None:
    fmt = product.fmt
    ends = (320, 448) if fmt.block == 32 else ()  # in one and in three pairs of blocks
    for n_in in (3 * max(fmt.block, 32), *ends, 1024):
        w, x = weight(fmt, coded(fmt, 75, n_in), n_in), normal(100, n_in, seed=8)
        alone = torch.cat([product.matmul(x[i : i + 1], w) for i in range(100)])
        for n in N_ROWS:
            assert torch.equal(product.matmul(x[:n], w, n_threads=2), alone[:n]), n
        for ids in ([3], [8, 0, 0, 5], [1, 2] * 9, [32, 99]):
            chosen = torch.tensor(ids)
            assert torch.equal(product.matmul(x, w, x_rows=chosen), alone[chosen])


def test_rows_of_x_that_are_not_there() -> None:
    w = encode(normal(4, 32), "q8_0")
    with pytest.raises(UsageError, match=r"row ids 0\.\.9 of a matrix of 9 rows"):
        matmul(normal(9, 32), w, x_rows=torch.tensor([0, 9]))


@every_product
def test_experts_lie_one_behind_the_other(product: Product) -> None:
    fmt = product.fmt
    n_in = max(fmt.block, 64)
    data = np.stack([coded(fmt, 19, n_in, seed=i) for i in range(3)])
    w, x = weight(fmt, data, n_in), normal(5, n_in)
    assert (w.n_stack, w.n_out, w.nbytes) == (3, 19, data.nbytes)
    for i in range(3):
        alone = weight(fmt, data[i].copy(), n_in)
        assert torch.equal(product.matmul(x, w, expert=i), product.matmul(x, alone))
        ids = torch.tensor([18, 0, 7])
        assert torch.equal(rows(w, ids, expert=i), weights.decode(alone)[ids])


@pytest.mark.parametrize(("product", "n_rows"), over((1, 4, 5, 9, 40, 100)), indirect=["product"])
def test_writes_its_outputs_and_nothing_else(product: Product, n_rows: int) -> None:
    """Poison before, between and behind the rows of the output stays; strides of x and y are honoured, sums too."""
    n_out, n_in = 37, max(product.fmt.block, 96)
    w = weight(product.fmt, coded(product.fmt, n_out, n_in), n_in)
    wide, poison = torch.full((n_rows, n_in + 5), torch.nan), torch.full((n_rows + 2, n_out + 11), torch.nan)
    wide[:, 3 : 3 + n_in] = normal(n_rows, n_in, seed=3)
    x, out = wide[:, 3 : 3 + n_in], poison[1:-1, 4 : 4 + n_out]
    assert product.matmul(x, w, out=out, n_threads=2) is out
    want, before = product.matmul(x.contiguous(), w), normal(n_rows, n_out, seed=5)
    assert torch.equal(out, want)
    assert out.isfinite().all()
    out.copy_(before)
    assert product.matmul(x, w, out=out, into="add") is out
    assert torch.equal(out, before + want)
    out.fill_(torch.nan)
    assert poison.isnan().all()


@pytest.mark.parametrize(
    ("product", "n_rows", "value"), over((1, 3, 40), (torch.nan, torch.inf, -torch.inf)), indirect=["product"]
)
def test_a_number_never_comes_from_one_that_is_none(product: Product, n_rows: int, value: float) -> None:
    """A row with a NaN or an infinity has no finite output; the others, and later calls, are as without it."""
    n_in = 2 * max(product.fmt.block, 32)
    w, x = weight(product.fmt, coded(product.fmt, 50, n_in), n_in), normal(n_rows, n_in, seed=6)
    clean, dirty, bad = product.matmul(x, w), x.clone(), n_rows // 2
    dirty[bad, n_in - 3] = value
    got = product.matmul(dirty, w)
    assert not got[bad].isfinite().any()
    others = torch.arange(n_rows) != bad
    assert torch.equal(got[others], clean[others])
    assert torch.equal(product.matmul(x, w), clean)


@every_product
def test_scales_of_activations_are_free(product: Product) -> None:
    """Rows of very different size, groups of zeros, and values whose inverse is no float32."""
    n_in = max(product.fmt.block, 128)
    data = coded(product.fmt, 64, n_in)
    w, values = weight(product.fmt, data, n_in), decoded(product.fmt, data)
    for n_rows in (1, 20):
        x = normal(n_rows, n_in, seed=7) * torch.tensor([1e30, 1e-25, 1.0, 1e6, 1e-12]).repeat(4)[:n_rows, None]
        x[:, 32:64] = 0
        got = product.matmul(x, w)
        for i in range(n_rows):
            product.check(got[i : i + 1], x[i : i + 1], values)
        for tiny in (0.0, 1e-38, 1e-45):
            assert product.matmul(torch.full((n_rows, n_in), tiny), w).abs().max() <= 1e-28


QUANTIZED = [fmt for fmt in FORMATS if fmt.is_quantized]


@pytest.mark.parametrize(("product", "byte"), over((0x00, 0x7F, 0x80, 0xFF), formats=QUANTIZED), indirect=["product"])
def test_no_sum_of_products_overflows(product: Product, byte: int) -> None:
    """Codes and scales of one byte throughout, activations at the ends of their range: the largest terms there are."""
    fmt = product.fmt
    n_in = 2 * max(fmt.block, 256)
    data = with_scales(fmt, np.full((16, n_in // fmt.block, fmt.block_bytes), byte, dtype=np.uint8)).reshape(16, -1)
    values, w = decoded(fmt, data), weight(fmt, data, n_in)
    for signs in ([1.0], [-1.0], [1.0, -1.0], [1.0, 1.0, -1.0, -1.0]):
        for n_rows in (1, 4, 9):
            x = 127 / 32 * torch.tensor([signs]).repeat(n_rows, n_in // len(signs))
            assert torch.equal(product.kept(x), x.double())
            size = 4 * np.abs(values.astype(np.float64)).sum(1).max()
            assert (product.matmul(x, w) - exact(x, values)).abs().max() <= 1e-6 * size


@every_product
def test_bytes_may_lie_anywhere(product: Product) -> None:
    fmt = product.fmt
    n_in = 2 * max(fmt.block, 32)
    data = coded(fmt, 33, n_in)
    memory, x = torch.zeros(data.size + 64, dtype=torch.uint8), normal(6, n_in)
    want, values = product.matmul(x, weight(fmt, data, n_in)), weights.decode(weight(fmt, data, n_in))
    for offset in (0, 1, 3, 32):
        there = memory[offset : offset + data.size]
        there.copy_(torch.from_numpy(data).flatten())
        w = Weight(fmt, there.view(1, 33, -1), n_in)
        assert torch.equal(product.matmul(x, w), want)
        assert torch.equal(weights.decode(w).view(torch.int32), values.view(torch.int32))


@pytest.mark.skipif(sys.platform != "linux", reason="pages are closed by Linux's mprotect")
@every_product
def test_nothing_is_read_behind_the_last_row(product: Product) -> None:
    """Rows end with the file: what lies behind them may not be mapped."""
    fmt = product.fmt
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
        assert torch.equal(product.matmul(x, w), product.matmul(x, weight(fmt, data, n_in)))
    assert torch.equal(weights.decode(w), weights.decode(weight(fmt, data, n_in)))
    assert find_bad_block(w) is None


@every_product
def test_threads_do_not_change_the_result(product: Product) -> None:
    w = weight(product.fmt, coded(product.fmt, 1000, 256), 256)
    for n_rows in (1, 40):
        x = normal(n_rows, 256, seed=9)
        assert torch.equal(*(product.matmul(x, w, n_threads=n) for n in (1, 2)))


def test_activations_of_any_dtype(isa: str) -> None:
    w = weight(WEIGHTS["q4_K"], coded(WEIGHTS["q4_K"], 20, 512), 512)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        x = normal(3, 512).to(dtype)
        assert torch.equal(matmul(x, w), matmul(x.float(), w))
    columns = normal(512, 3).T
    assert torch.equal(matmul(columns, w), matmul(columns.contiguous(), w))


@pytest.mark.parametrize("isa", INT8_ISAS, indirect=True)
def test_which_types_meet_8_bits(isa: str) -> None:
    """The others, asked for 8 bits, have the bits of 16."""
    assert {name for name in WEIGHTS if takes_int8(name)} == set(INT8_TYPES)
    for name in ("q8_0", "iq4_nl", "iq4_xs", "mxfp4", "f16"):
        w = weight(WEIGHTS[name], coded(WEIGHTS[name], 19, 512), 512)
        for n_rows in (1, 9):
            x = normal(n_rows, 512)
            assert torch.equal(matmul(x, w, activations="int8"), matmul(x, w))


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
