#include "launch.cuh"
#include "products.cuh"

namespace mnv2_fused::cuda {

void launch_products(int64_t batch, const SqueezeProducts& products, void* stream) {
  for (const ProductArgs& a : {products.squeeze, products.excite}) {
    const dim3 grid(unsigned(batch), unsigned(ceil_div(a.out_channels, kPanel)));
    start(product_kernel, grid, kProductThreads, kProductShared, stream, true, a);
  }
}

}  // namespace mnv2_fused::cuda
