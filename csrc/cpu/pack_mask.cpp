// Bit i%8 of byte i//8 is element i; the last byte is padded with zeros.
#include "kernels.h"
#include "simd.h"

namespace subnet {
namespace SUBNET_CAPABILITY {

void pack_mask(const PackMask& p, int64_t begin, int64_t end) {
  for (int64_t byte = begin; byte < end; ++byte) {
    const int64_t left = p.num - byte * 8 < 8 ? p.num - byte * 8 : 8;
    uint64_t eight = 0;
    __builtin_memcpy(&eight, p.mask + byte * 8, left);
    uint8_t packed = 0;
    for (int bit = 0; bit < 8; ++bit) packed |= (uint8_t)(((eight >> (8 * bit)) & 0xff) != 0) << bit;
    p.packed[byte] = packed;
  }
}

void unpack_mask(const UnpackMask& p, int64_t begin, int64_t end) {
  for (int64_t byte = begin; byte < end; ++byte) {
    const int64_t left = p.num - byte * 8 < 8 ? p.num - byte * 8 : 8;
    for (int64_t bit = 0; bit < left; ++bit) p.mask[byte * 8 + bit] = (p.packed[byte] >> bit) & 1;
  }
}

}  // namespace SUBNET_CAPABILITY
}  // namespace subnet
