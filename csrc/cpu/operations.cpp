// The operations for one instruction set; compiled once for each, into a namespace of its own.
#include "attention.h"
#include "linear.h"
#include "probe.h"
#include "rows.h"
#include "sampling.h"

#define TEXT_OF(name) #name
#define TEXT(name) TEXT_OF(name)

namespace trunkline {
namespace TRUNKLINE_ISA {
extern const Operations operations{TEXT(TRUNKLINE_ISA), quantize, dequantize_rows, probe, linear, rms_norm, rotate, store_rows, attention, choose};
}
}  // namespace trunkline
