"""Linear layers over packed weights, against float64 products with the weight that is stored."""

from __future__ import annotations

from typing import cast, get_args

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from hybridkv.errors import UsageError
from hybridkv.formats import FORMATS, Scale
from hybridkv.kernels import cpu_native, linear
from hybridkv.kernels.linear import WEIGHT_TYPES, PackedWeight, WeightType, exact_type, gather, pack, unpack

pytestmark = pytest.mark.skipif(cpu_native.available() is not None, reason=f"{cpu_native.available()}")

# Relative RMSE. Few rows, and every row without AMX: q8_0 and q4_0 meet activations of 15 bits, f32 and bf16 meet
# float32. Many rows with AMX: activations, and what q8_0 and q4_0 decode to, are bfloat16.
FEW: dict[WeightType, float] = {"f32": 3e-6, "bf16": 3e-6, "q8_0": 1e-4, "q4_0": 1e-4}
MANY: dict[WeightType, float] = {"f32": 3e-6, "bf16": 4e-3, "q8_0": 4e-3, "q4_0": 4e-3}
SCALES: dict[WeightType, Scale] = {"q8_0": "absmax", "q4_0": "refit"}
N_ROWS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 64, 257, 512)
N_OUT = (1, 15, 16, 17, 33, 250)
INPUTS: dict[WeightType, tuple[int, ...]] = {
    "f32": (1, 32, 96, 384, 1000),
    "bf16": (1, 32, 96, 384, 1000),
    "q8_0": (32, 96, 384, 1024),
    "q4_0": (32, 96, 384, 1024),
}


def isas() -> tuple[str, ...]:
    return tuple(cpu_native._native().isas()) if cpu_native.available() is None else ()


@pytest.fixture(params=isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HYBRIDKV_ISA", request.param)
    return str(request.param)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(weight: Tensor, weight_type: WeightType) -> Tensor:
    """What `type` makes of a weight, by other means than packing."""
    if weight_type == "f32":
        return weight
    fmt = FORMATS[weight_type]
    return fmt.decode(fmt.encode(weight, SCALES.get(weight_type)), weight.shape[1])


def tolerance(weight_type: WeightType, isa: str, n_rows: int) -> float:
    return MANY[weight_type] if isa == "amx" and n_rows >= 16 else FEW[weight_type]


def exact(x: Tensor, packed: PackedWeight) -> tuple[Tensor, Tensor]:
    """The product in float64, and the size of a sum of such products: a single sum may be small by chance."""
    x, weight = x.double(), unpack(packed).double()
    return x @ weight.T, (x.square() @ weight.square().T).mean().sqrt()


def relative_rmse(got: Tensor, product: Tensor, size: Tensor) -> float:
    return float((got - product).square().mean().sqrt() / size)


def error(got: Tensor, x: Tensor, packed: PackedWeight) -> float:
    return relative_rmse(got, *exact(x, packed))


@pytest.mark.parametrize("n_out", N_OUT)
@pytest.mark.parametrize("weight_type", WEIGHT_TYPES)
def test_unpack_gives_what_the_type_stores(weight_type: WeightType, n_out: int) -> None:
    for n_in in INPUTS[weight_type]:
        weight = normal(n_out, n_in)
        packed = pack(weight, weight_type)
        assert torch.equal(unpack(packed), stored(weight, weight_type))
        again = pack(unpack(packed), weight_type)
        assert torch.equal(again.data, packed.data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weight_type", WEIGHT_TYPES)
def test_pack_takes_every_float_dtype(weight_type: WeightType, dtype: torch.dtype) -> None:
    weight = normal(64, 96).to(dtype)
    for view in (weight, weight[:, ::3]):
        assert torch.equal(unpack(pack(view, weight_type)), stored(view.float(), weight_type))


def test_pack_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = normal(250, 96)
    whole = [pack(weight, weight_type).data for weight_type in ("q8_0", "q4_0")]
    monkeypatch.setattr(linear, "_CHUNK_VALUES", 1)
    assert torch.equal(pack(weight, "q8_0").data, whole[0])
    assert torch.equal(pack(weight, "q4_0").data, whole[1])


def test_rows_takes_any_ids() -> None:
    weight = normal(100, 96)
    ids = torch.tensor([99, 0, 17, 17, 3])
    for weight_type in WEIGHT_TYPES:
        assert torch.equal(gather(pack(weight, weight_type), ids), stored(weight, weight_type)[ids])
    with pytest.raises(UsageError, match="100 rows"):
        gather(pack(weight, "f32"), torch.tensor([100]))


def test_exact_type_is_the_smallest_that_changes_nothing() -> None:
    weight = normal(200, 96)
    assert exact_type(weight) == "f32"
    assert exact_type(weight.bfloat16()) == "bf16"
    assert exact_type(stored(weight, "q8_0")) == "q8_0"
    assert exact_type(stored(weight, "q4_0")) == "q4_0"
    assert exact_type(torch.zeros(4, 64)) == "q4_0"
    assert exact_type(torch.ones(4, 33)) == "bf16"  # blocks do not fit
    for weight_type in ("q4_0", "q8_0", "bf16"):
        held = stored(weight, cast(WeightType, weight_type))
        held[-1, -1] = torch.nextafter(held[-1, -1], torch.tensor(torch.inf))
        assert exact_type(held) == "f32", weight_type


FROM_FILES: dict[str, WeightType] = {
    "Q4_0": "q4_0", "Q5_0": "q8_0", "Q8_0": "q8_0", "IQ4_NL": "q8_0", "TQ1_0": "q4_0", "MXFP4": "q8_0",
}  # fmt: skip


@pytest.mark.parametrize("name", FROM_FILES)
def test_blocks_of_a_file_stay_what_they_are(name: str) -> None:
    """Random bytes as gguf-py decodes them: any code, any scale of either sign, zeros of either sign."""
    type_ = gguf.GGMLQuantizationType[name]
    block, n_bytes = gguf.GGML_QUANT_SIZES[type_]
    raw = np.random.default_rng(1).integers(0, 256, (77, 512 // block, n_bytes), dtype=np.uint8)
    scales = normal(77, 512 // block, seed=3).half()
    scales[3], scales[4], scales[5] = 0.0, -0.0, 6e-8  # the last is float16's smallest
    if name == "MXFP4":  # a power of two
        raw[:, :, 0] = 112 + raw[:, :, 0] % 16
    else:
        at = n_bytes - 2 if name == "TQ1_0" else 0
        raw[:, :, at : at + 2] = scales.numpy()[..., None].view(np.uint8)
    weight = torch.from_numpy(gguf.dequantize(raw.reshape(77, -1), type_))
    if name != "MXFP4":
        assert (weight.view(torch.int32) == -(2**31)).any()
    assert exact_type(weight) == FROM_FILES[name]
    assert torch.equal(unpack(pack(weight, FROM_FILES[name])).view(torch.int32), weight.view(torch.int32))


@pytest.mark.parametrize("name", ["q4_0", "q5_0", "q6_0", "iq4_nl", "q8_0"])
@pytest.mark.parametrize("scale", ["absmax", "refit"])
def test_encoded_weights_stay_what_they_are(name: str, scale: Scale) -> None:
    fmt = FORMATS[name]
    weight = fmt.decode(fmt.encode(normal(100, 256), scale), 256)
    assert exact_type(weight) == ("q4_0" if name == "q4_0" else "q8_0")
    for held in ("q8_0", exact_type(weight)):
        assert torch.equal(unpack(pack(weight, held)).view(torch.int32), weight.view(torch.int32))


def test_rows_are_exact_or_rounded_each_by_itself() -> None:
    """Rows with scales that their largest value does not tell, beside rows that have none."""
    exact = (
        torch.arange(-3, 5).repeat(4).float()[torch.randperm(32, generator=torch.Generator().manual_seed(0))] * 0.3125
    )
    weight = torch.stack([exact if i % 3 else row for i, row in enumerate(normal(40, 32))])
    for weight_type in ("q8_0", "q4_0"):
        got = unpack(pack(weight, weight_type))
        plain = torch.arange(40) % 3 == 0
        assert torch.equal(got[~plain], weight[~plain])
        assert torch.equal(got[plain], stored(weight[plain], weight_type))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_is_not_exact(value: float) -> None:
    weight = stored(normal(3, 64), "q4_0")
    weight[1, 40] = value
    assert exact_type(weight) == "f32"
    for weight_type in ("q8_0", "q4_0"):
        assert not unpack(pack(weight, weight_type))[1, 32:].isfinite().any()


def test_exact_type_looks_at_every_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_CHUNK_VALUES", 1)
    weight = stored(normal(50, 64), "q8_0")
    assert exact_type(weight) == "q8_0"
    weight[-1, 0] = 1 / 3
    assert exact_type(weight) == "f32"


@pytest.mark.parametrize("weight_type", ["q8_0", "q4_0"])
def test_blocks_must_be_whole(weight_type: WeightType) -> None:
    with pytest.raises(UsageError, match=f"{weight_type} needs a multiple of 32 inputs, not 33"):
        pack(normal(4, 33), weight_type)


@pytest.mark.parametrize("n_rows", N_ROWS)
@pytest.mark.parametrize("weight_type", WEIGHT_TYPES)
def test_sizes(isa: str, weight_type: WeightType, n_rows: int) -> None:
    for n_in in INPUTS[weight_type]:
        for n_out in N_OUT:
            weight, x = normal(n_out, n_in, seed=1), normal(n_rows, n_in, seed=2)
            packed = pack(weight, weight_type)
            product, size = exact(x, packed)
            for n_threads in (1, 2):
                got = linear.linear(x, packed, n_threads=n_threads)
                limit = tolerance(weight_type, isa, n_rows) * (3 if n_rows * n_out < 20 else 1)  # a mean of few varies
                assert relative_rmse(got, product, size) <= limit, (n_in, n_out, n_threads)


@pytest.mark.parametrize("n_rows", [1, 5, 16, 600])
@pytest.mark.parametrize("weight_type", WEIGHT_TYPES)
def test_writes_its_outputs_and_nothing_else(isa: str, weight_type: WeightType, n_rows: int) -> None:
    """Poison before, between and after the rows of the output stays; strides of x and y are honoured."""
    n_out, n_in = 37, 96
    packed, poison = pack(normal(n_out, n_in), weight_type), torch.full((n_rows + 2, n_out + 11), torch.nan)
    wide = torch.full((n_rows, n_in + 5), torch.nan)
    wide[:, 3 : 3 + n_in] = normal(n_rows, n_in, seed=3)
    x = wide[:, 3 : 3 + n_in]
    out = poison[1:-1, 4 : 4 + n_out]
    assert linear.linear(x, packed, out=out, n_threads=2) is out
    assert torch.equal(out, linear.linear(x.contiguous(), packed, n_threads=2))
    assert error(out, x, packed) <= tolerance(weight_type, isa, n_rows)
    out.fill_(torch.nan)
    assert poison.isnan().all()


@pytest.mark.parametrize("weight_type", WEIGHT_TYPES)
def test_large_outputs_are_those_of_their_parts(isa: str, weight_type: WeightType) -> None:
    """Outputs of several MB, which may be written around the caches: whole cache lines, and columns that end in one."""
    n_rows, n_out = 300, 4090
    packed, x = pack(normal(n_out, 64), weight_type), normal(n_rows, 64, seed=10)
    halves = torch.cat([linear.linear(half, packed, n_threads=1) for half in x.split(n_rows // 2)])
    for width in (4096, 4099):  # rows that begin with a cache line, and rows that do not
        poison = torch.full((n_rows, width), torch.nan)
        out = poison[:, :n_out]
        linear.linear(x, packed, out=out, n_threads=2)
        assert torch.equal(out, halves)
        linear.linear(x, packed, out=out, into="add")
        assert torch.equal(out, halves + halves)
        assert poison[:, n_out:].isnan().all()


@pytest.mark.parametrize("n_rows", [1, 9, 40])
@pytest.mark.parametrize("weight_type", WEIGHT_TYPES)
def test_adds(isa: str, weight_type: WeightType, n_rows: int) -> None:
    packed, x, before = pack(normal(50, 320), weight_type), normal(n_rows, 320, seed=4), normal(n_rows, 50, seed=5)
    out = before.clone()
    linear.linear(x, packed, out=out, into="add")
    assert torch.equal(out, before + linear.linear(x, packed))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("n_rows", [1, 3, 8, 16, 40])
@pytest.mark.parametrize("weight_type", WEIGHT_TYPES)
def test_a_number_never_comes_from_one_that_is_none(
    isa: str, weight_type: WeightType, n_rows: int, value: float
) -> None:
    """A row with a NaN or an infinity has no finite output; the others are as without it."""
    packed, x = pack(normal(50, 96), weight_type), normal(n_rows, 96, seed=6)
    clean = linear.linear(x, packed)
    x[n_rows // 2, 77] = value
    got = linear.linear(x, packed)
    assert not got[n_rows // 2].isfinite().any()
    others = torch.arange(n_rows) != n_rows // 2
    assert torch.equal(got[others], clean[others])


@pytest.mark.parametrize("weight_type", WEIGHT_TYPES)
@pytest.mark.parametrize("n_rows", [1, 20])
def test_scales_of_activations_are_free(isa: str, weight_type: WeightType, n_rows: int) -> None:
    """Rows of very different size, zeros, and values whose inverse is no float32."""
    packed = pack(normal(64, 128), weight_type)
    sizes = torch.tensor([1e30, 1e-25, 1.0, 1e6, 1e-12]).repeat(4)[:n_rows, None]
    x = normal(n_rows, 128, seed=7) * sizes
    got = linear.linear(x, packed)
    for i in range(n_rows):
        assert error(got[i : i + 1], x[i : i + 1], packed) <= tolerance(weight_type, isa, n_rows)
    for tiny in (0.0, 1e-38, 1e-45):
        assert linear.linear(torch.full((n_rows, 128), tiny), packed).abs().max() <= 1e-28


@pytest.mark.parametrize("weight_type", WEIGHT_TYPES)
def test_largest_codes_and_activations(isa: str, weight_type: WeightType) -> None:
    """No sum of a block overflows: every product has its largest size, in both signs."""
    for sign in (1.0, -1.0):
        packed = pack(torch.full((16, 256), 127.0 * sign), weight_type)
        for n_rows in (1, 64):
            for x_sign in (1.0, -1.0):
                got = linear.linear(torch.full((n_rows, 256), 1e4 * x_sign), packed)
                expected = 1e4 * 127 * 256 * sign * x_sign
                assert ((got / expected - 1).abs() <= tolerance(weight_type, isa, n_rows)).all()


def test_rows_do_not_depend_on_their_neighbours(isa: str) -> None:
    """The integer path is exact per row: a row alone and in a batch give the same bits."""
    for weight_type in ("q8_0", "q4_0"):
        packed, x = pack(normal(40, 384), weight_type), normal(7, 384, seed=8)
        batch = linear.linear(x, packed)
        for i in range(7):
            assert torch.equal(linear.linear(x[i : i + 1], packed)[0], batch[i])


def test_threads_do_not_change_the_result(isa: str) -> None:
    for weight_type in WEIGHT_TYPES:
        packed = pack(normal(1000, 256), weight_type)
        for n_rows in (1, 40):
            x = normal(n_rows, 256, seed=9)
            one, two = (linear.linear(x, packed, n_threads=n) for n in (1, 2))
            assert torch.equal(one, two), weight_type


def test_types_are_those_of_the_record() -> None:
    assert get_args(WeightType) == WEIGHT_TYPES
    assert pack(normal(17, 64), "q8_0").nbytes == 2 * 1088
    assert pack(normal(17, 64), "q4_0").nbytes == 2 * 576
    assert isinstance(pack(normal(1, 1), "f32"), PackedWeight)


@pytest.mark.parametrize("kind", WEIGHT_TYPES)
@pytest.mark.parametrize("n_rows", [2, 7, 8, 16, 33])
def test_rows_of_each_alone_have_the_bits_of_single_rows(isa: str, kind: WeightType, n_rows: int) -> None:
    weight = pack(torch.randn(75, 96, generator=torch.Generator().manual_seed(1)), kind)
    x = torch.randn(n_rows, 96, generator=torch.Generator().manual_seed(2))
    together = linear.linear(x, weight, sums="of each alone")
    assert torch.equal(together, torch.cat([linear.linear(x[i : i + 1], weight) for i in range(n_rows)]))
