"""The operations that are checked and timed, in this order."""

from benchmarks.gpu import products, rows

OPERATIONS = (
    products.ATTENTION,
    products.LINEAR_CROSS_ENTROPY,
    rows.RMS_NORM,
    rows.SWIGLU,
    rows.ROTARY,
    rows.CROSS_ENTROPY,
    products.GROUPED_GEMM,
    products.SCALED_MATMUL,
    products.NEWTON_SCHULZ,
    rows.LAYER_NORM,
    rows.GEGLU,
    rows.QUANTIZATION,
    rows.MOE_GATE,
)
