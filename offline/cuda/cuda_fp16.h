// IEEE half precision.
#pragma once

#include "um_float16.h"

typedef um_float16<um_to_half, um_from_half> __half;
typedef um_pair16<__half> __half2;
UM_FLOAT16_FUNCTIONS(__half, __half2)
static inline __half __float2half(float x) { return x; }
static inline float __half2float(__half x) { return x; }
