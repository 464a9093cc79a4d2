// bfloat16.
#pragma once

#include "um_float16.h"

typedef um_float16<um_to_bfloat, um_from_bfloat> __nv_bfloat16;
typedef um_pair16<__nv_bfloat16> __nv_bfloat162;
UM_FLOAT16_FUNCTIONS(__nv_bfloat16, __nv_bfloat162)
static inline __nv_bfloat16 __float2bfloat16(float x) { return x; }
static inline float __bfloat162float(__nv_bfloat16 x) { return x; }
