// From the precision a call asks for to the one its kernel is compiled for.
#include "launch.h"

namespace mnv2_fused::cuda {

void launch(Precision precision, const BlockShape& shape, const Plan& plan, const Call& call,
            void* stream) {
  switch (precision) {
    case Precision::kHalf:
      return launch_as<Precision::kHalf>(shape, plan, call, stream);
    case Precision::kBFloat16:
      return launch_as<Precision::kBFloat16>(shape, plan, call, stream);
    case Precision::kTf32:
      return launch_as<Precision::kTf32>(shape, plan, call, stream);
    case Precision::kFloat32:
      return launch_as<Precision::kFloat32>(shape, plan, call, stream);
  }
}

}  // namespace mnv2_fused::cuda
