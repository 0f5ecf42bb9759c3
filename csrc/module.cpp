// Python's window on the build: instruction sets, the planner, the peak meter, watched objects.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "binding.h"
#include "cpu/isa.h"
#include "watch.h"

namespace py = pybind11;
using namespace mnv2_fused;

namespace {

BlockShape block_shape(int64_t batch, int64_t height, int64_t width, int64_t in_channels,
                       int64_t hidden_channels, int64_t out_channels, int64_t stride, bool expand,
                       bool residual) {
  return {batch,           height,       width,  in_channels,
          hidden_channels, out_channels, stride, expand ? Expand::kPointwise : Expand::kNone,
          residual};
}

// Whether the collector may look inside: it can come between a Python object's allocation and its
// constructor.
bool constructed(PyObject* self) {
  return reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder().holder_constructed();
}

// Calls f with the kernels for activations of this dtype.
template <class F>
auto with_kernels(const std::string& dtype, F f) {
  const cpu::Isa& isa = cpu::active();
  if (dtype == "float32") return f(isa.f32);
  if (dtype == "float64") return f(isa.f64);
  if (dtype == "bfloat16") return f(isa.bf16);
  throw py::value_error("dtype must be float32, float64 or bfloat16, got " + dtype);
}

py::dict to_dict(const Plan& p) {
  using namespace py::literals;
  return py::dict("tile_rows"_a = p.tile_rows, "tile_cols"_a = p.tile_cols, "group"_a = p.group,
                  "band_rows"_a = p.band_rows, "splits"_a = p.splits, "tasks"_a = p.tasks,
                  "workers"_a = p.workers, "scratch_bytes"_a = p.scratch_bytes,
                  "partial_bytes"_a = p.partial_bytes, "recompute"_a = p.recompute,
                  "bytes_never_written"_a = p.bytes_never_written, "cost"_a = p.cost);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("compiler") = __VERSION__;
  m.attr("torch_target") =
      (TORCH_TARGET_VERSION >> 56 & 0xff) * 100 + (TORCH_TARGET_VERSION >> 48 & 0xff);

  m.def("instruction_sets", [] {
    std::vector<std::pair<std::string, bool>> names;
    for (const cpu::Isa& isa : cpu::compiled()) names.emplace_back(isa.name, isa.supported());
    return names;
  });
  m.def("instruction_set", [] { return std::string(cpu::active().name); });
  m.def("set_instruction_set", &cpu::set_active);
  m.def("l2_bytes", &cpu::l2_bytes);
  m.def("advise_huge_pages", &cpu::advise_huge_pages);
  py::class_<Watch>(
      m, "Watch", py::custom_type_setup([](PyHeapTypeObject* heap_type) {
        PyTypeObject* const type = &heap_type->ht_type;
        type->tp_flags |= Py_TPFLAGS_HAVE_GC;
        type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
          Py_VISIT(Py_TYPE(self));
          return constructed(self) ? py::cast<Watch&>(py::handle(self)).traverse(visit, arg) : 0;
        };
        type->tp_clear = [](PyObject* self) {
          if (constructed(self)) py::cast<Watch&>(py::handle(self)).clear();
          return 0;
        };
      }))
      .def(py::init<const py::list&, const py::list&, const py::list&, const py::list&,
                    const py::list&>())
      .def("holds", &Watch::holds);

  m.def(
      "plan",
      [](py::args dims, int64_t threads, const std::string& dtype,
         std::optional<std::vector<int64_t>> forced) {
        if (dims.size() != 9) throw py::value_error("plan takes 9 dimensions");
        const auto at = [&](int i) { return dims[i].cast<int64_t>(); };
        const BlockShape s =
            block_shape(at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7) != 0, at(8) != 0);
        const Machine machine = with_kernels(
            dtype, [&](const auto& kernels) { return kernels.machine(threads, cpu::l2_bytes()); });
        if (!forced) return to_dict(make_plan(s, machine));
        if (forced->size() != 4)
          throw py::value_error("plan must be [tile_rows, tile_cols, group, splits], got " +
                                std::to_string(forced->size()) + " values");
        return to_dict(
            make_plan(s, machine, (*forced)[0], (*forced)[1], (*forced)[2], (*forced)[3]));
      },
      py::kw_only(), py::arg("threads"), py::arg("dtype"), py::arg("forced") = py::none());

  // Runs the multiply-add loop of a dtype's products on each of torch's threads; returns the
  // floating-point operations done.
  m.def(
      "multiply_add",
      [](int64_t rounds, const std::string& dtype) {
        const int64_t threads = torch::stable::get_num_threads();
        return with_kernels(dtype, [&](const auto& kernels) {
          torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
            for (; begin < end; ++begin) {
              const auto value = kernels.multiply_add(rounds);
              asm volatile("" : : "m"(value));
            }
          });
          return kernels.flops_per_round * rounds * threads;
        });
      },
      py::call_guard<py::gil_scoped_release>());
}
