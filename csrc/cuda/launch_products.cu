#include "launch.cuh"
#include "products.cuh"

namespace mnv2_fused::cuda {

void launch_products(int64_t batch, const SqueezeProducts& products, void* stream) {
  for (const ProductArgs& a : {products.squeeze, products.excite}) {
    const dim3 grid(unsigned(batch), unsigned(ceil_div(a.out_channels, kPanel)));
    product_kernel<<<grid, unsigned(kProductThreads), size_t(kProductShared),
                     static_cast<cudaStream_t>(stream)>>>(a);
    check(cudaGetLastError(), "launch of a squeeze-and-excite");
  }
}

}  // namespace mnv2_fused::cuda
