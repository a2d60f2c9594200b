// The matrix unit of csrc/cpu, driven by what torch exports of oneDNN.
#pragma once

namespace lstmx {

// Whether products of bfloat16 take it in pairs: by the matrix unit, if the processor has one, a
// trial went well, and oneDNN is not switched off (torch.backends.mkldnn); or by an instruction.
// The environment's LSTMX_MATRIX_UNIT=1 asks for oneDNN's functions also where there is no such
// unit, 0 forbids them.
bool multiply_in_pairs();

}  // namespace lstmx
