// Schemas of every op. Implementations register where they are: in cpu/op.cpp and cpu/sequence.cpp, in
// cuda/, and for Triton in Python.
#include "tensors.h"

// Arguments of one block. The CUDA kernel has ops of its own for two reasons: its weights are packed
// otherwise, also in a derivative; and the stable ABI does not reach torch's setting whether float32
// products may round to TF32, so an argument carries it.
#define MNV2_BLOCK_ARGUMENTS                                                                \
  "(Tensor x, Tensor? w_expand, Tensor? b_expand, Tensor w_depthwise, Tensor b_depthwise, " \
  "Tensor w_project, Tensor b_project, Tensor? w_squeeze, Tensor? b_squeeze, "              \
  "Tensor? w_excite, Tensor? b_excite, int stride, bool residual, int[] plan=[], "          \
  "int dilation=1, int[] padding=[], int activation=0, int out_activation=2, "              \
  "int squeeze_activation=1, int gate=0"
#define MNV2_LAST                                                                \
  ", float negative_slope=0.01, int expand_activation=-1, int column_stride=0, " \
  "bool activates_sum=False) -> Tensor"

// Of a block in training: `block` has the fields of block_fields.h.
#define MNV2_TRAINING_ARGUMENTS "(Tensor x, Tensor? w_expand, Tensor? b_expand, Tensor w_depthwise"
#define MNV2_GRADIENTS ", Tensor g, Tensor w_project, Tensor of_d, Tensor? gate"

STABLE_TORCH_LIBRARY(mnv2_fused, m) {
  m.def("inverted_residual" MNV2_BLOCK_ARGUMENTS MNV2_LAST);
  m.def("inverted_residual_triton" MNV2_BLOCK_ARGUMENTS MNV2_LAST);
  m.def("inverted_residual_cuda" MNV2_BLOCK_ARGUMENTS ", bool tf32=False" MNV2_LAST);
  m.def("training_statistics" MNV2_TRAINING_ARGUMENTS ", int[] block) -> Tensor");
  m.def("training_pool" MNV2_TRAINING_ARGUMENTS ", Tensor of_d, int[] block) -> Tensor");
  m.def("training_project" MNV2_TRAINING_ARGUMENTS
        ", Tensor of_d, Tensor gate, Tensor w_output, int[] block) -> Tensor");
  m.def("training_backward_project" MNV2_TRAINING_ARGUMENTS MNV2_GRADIENTS
        ", int[] block) -> (Tensor, Tensor)");
  m.def("training_backward_expand" MNV2_TRAINING_ARGUMENTS MNV2_GRADIENTS
        ", Tensor? of_pooled, Tensor? w_input, int[] block) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("training_forward" MNV2_TRAINING_ARGUMENTS
        ", Tensor affine, float eps, Tensor? w_output, int[] block) -> (Tensor, Tensor)");
  m.def("training_backward" MNV2_TRAINING_ARGUMENTS
        ", Tensor g, Tensor w_project, Tensor of_d, float count, Tensor? w_input, int[] block) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("training_moments(Tensor x) -> Tensor");
  m.def("training_patches(Tensor x, Tensor? mean) -> Tensor");
  m.def("training_centre(Tensor x, Tensor? mean) -> (Tensor, Tensor, Tensor)");
  m.def("training_normalise(Tensor x, Tensor values, Tensor? added) -> Tensor");
  m.def("training_gradient_sums(Tensor g, Tensor x, Tensor values) -> Tensor");
  m.def("training_gradient(Tensor g, Tensor x, Tensor values) -> Tensor");
  m.def("sequence(Tensor x, Tensor weights, int[] layers) -> Tensor");
  m.def("sequence_row(Tensor x, Tensor weights, Tensor layers, bool flat) -> Tensor");
  m.def("int8_sequence(Tensor x, Tensor weights, int[] layers) -> Tensor");
  m.def("sequence_cuda(Tensor x, Tensor weights, int[] layers, bool tf32=False) -> Tensor");
}
