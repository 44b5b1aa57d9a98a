"""Shared memory of a call's own, by address: where the warps of a program meet. Not for the interpreter."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def _shared_text(n_bytes):
    return f"{{ .shared .align 16 .b8 warps_meet_here[{n_bytes}]; mov.u32 $0, warps_meet_here; add.u32 $0, $0, $1; }}"


@triton.constexpr_function
def _put_text(offset):
    return f"st.shared.v4.f32 [$1+{offset}], {{$2, $3, $4, $5}}; mov.b32 $0, 0;"


@triton.constexpr_function
def _get_text(offset):
    return f"ld.shared.v4.f32 {{$0, $1, $2, $3}}, [$4+{offset}];"


@triton.jit
def shared_memory(offset, N_BYTES: tl.constexpr):
    """Return addresses `offset` bytes into shared memory of this call's own; not for the interpreter."""
    return tl.inline_asm_elementwise(_shared_text(N_BYTES), "=r,r", [offset], tl.int32, is_pure=False, pack=1)


@triton.jit
def put_four(at, a, b, c, d, OFFSET: tl.constexpr):
    """Write four float32 to shared memory, OFFSET bytes behind addresses of 16 bytes each."""
    tl.inline_asm_elementwise(
        _put_text(OFFSET), "=r,r,f,f,f,f,~{memory}", [at, a, b, c, d], tl.int32, is_pure=False, pack=1
    )


@triton.jit
def get_four(at, OFFSET: tl.constexpr):
    """Read what `put_four` wrote."""
    return tl.inline_asm_elementwise(
        _get_text(OFFSET),
        "=f,=f,=f,=f,r,~{memory}",
        [at],
        (tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=False,
        pack=1,
    )
