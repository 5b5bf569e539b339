"""What the Triton kernels share."""

# mypy: allow-untyped-defs
# (the arguments of a kernel have Triton's types, not Python's)

import triton
import triton.language as tl

# Triton's interpreter (3.7.1) multiplies the raw bits of bfloat16, so there the kernels widen it right after each load.
UPCAST = triton.knobs.runtime.interpret


@triton.jit
def span(starts_ptr):
    """Return the first row and the end of this program's segment or sequence, `program_id(2)`."""
    index = tl.program_id(2)
    return tl.load(starts_ptr + index), tl.load(starts_ptr + index + 1)
