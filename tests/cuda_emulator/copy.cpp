// The bytes that copy_async moves, in a file of its own: compiled with the sanitizers, so that they see them.
namespace emulator {
void copy_bytes(void* to, const void* from, int bytes) {
  for (int i = 0; i < bytes; ++i) static_cast<char*>(to)[i] = from ? static_cast<const char*>(from)[i] : 0;
}
}  // namespace emulator
