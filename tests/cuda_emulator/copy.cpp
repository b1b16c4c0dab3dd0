// The bytes that copy_async moves and ldmatrix reads, in a file of its own: compiled with the sanitizers, so that they
// see them.
#include <cstdint>
namespace emulator {
void copy_bytes(void* to, const void* from, int bytes) {
  for (int i = 0; i < bytes; ++i)
    static_cast<char*>(to)[i] = from ? static_cast<const char*>(from)[i] : 0;
}
void read_halves(uint16_t* to, const void* const* rows, const int* at, int count) {
  for (int i = 0; i < count; ++i)
    to[i] = static_cast<const uint16_t*>(rows[i])[at[i]];
}
}  // namespace emulator
