// A program without Python: loads the operator library, then runs what AOTInductor compiled.
//   operators LIBRARY PACKAGE   prints the result's elements, one a line, in hexadecimal.
#include <ATen/ops/linspace.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>

int main(int, char** arguments) {
  if (!dlopen(arguments[1], RTLD_NOW)) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  torch::inductor::AOTIModelPackageLoader model(arguments[2]);
  const at::Tensor image = at::linspace(-1, 1, 2 * 5 * 8).reshape({2, 5, 8});
  const at::Tensor text = at::linspace(-2, 3, 2 * 8).reshape({2, 8});
  const at::Tensor result = model.run({image, text}).at(0).contiguous();
  for (int64_t i = 0; i < result.numel(); ++i)
    std::printf("%a\n", result.data_ptr<float>()[i]);
}
