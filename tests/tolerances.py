"""The one table of tolerances, each with its reason."""

import torch

# Against a float64 reference, in float64: the order of sums differs; 1e-13 is some 500 eps.
FLOAT64 = {"rtol": 1e-10, "atol": 1e-12}

# Two float32 computations of one thing on numbers near 1: sums of up to some hundred terms, through
# up to 33 steps.
FLOAT32 = {"rtol": 1e-4, "atol": 2e-5}

# Products of factors rounded to 11 bits, carried through a few steps.
TF32 = {"rtol": 1e-2, "atol": 1e-2}

# 8 and 11 bits of inputs, states and gradients, through a few steps; weights get sums of them.
BFLOAT16 = {"rtol": 5e-2, "atol": 2e-1}
FLOAT16 = {"rtol": 1e-2, "atol": 3e-2}

# RMS error against float64, pooled over seeds, at most this many times that of torch's own module
# in the same dtype. A rule per seed and tensor would fail correct code in a tenth of all cases.
RMS_RATIO = 2.0
RMS_SEEDS = 20

# ... plus this many eps of the tensor's RMS, for where torch happens to be exact.
RMS_FLOOR_EPS = {
    torch.float32: 4,
    torch.float64: 4,
    torch.bfloat16: 1,
    torch.float16: 1,
}
