// All device code, compiled as C++ for the emulator.
#include "cuda/stepwise.cu"
