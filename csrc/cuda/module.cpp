// Python's module _cuda: importing it registers the ops. A shared object of its own, since the CPU part
// must load where CUDA's libraries are missing.
#include <Python.h>
#include <cuda_runtime_api.h>

#include "launch.h"

namespace {

PyObject* allow_early_starts(PyObject*, PyObject* allowed) {
  const int truth = PyObject_IsTrue(allowed);
  if (truth < 0) return nullptr;
  mnv2_fused::cuda::allow_early_starts(truth);
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"allow_early_starts", allow_early_starts, METH_O,
     "Whether a kernel of a call may start while the one before it ends."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

// Constants of the build: what `python -m mnv2_fused info` shows.
PyMODINIT_FUNC PyInit__cuda() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  PyObject* const module = PyModule_Create(&definition);
  if (module) {
    PyModule_AddIntConstant(module, "toolkit", CUDART_VERSION);
    PyModule_AddStringConstant(module, "architectures", MNV2_FUSED_ARCHITECTURES);
  }
  return module;
}
