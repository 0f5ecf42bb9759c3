// Python's window on the build: instruction sets, the planner, the peak meter, guards.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "../block_fields.h"
#include "../cpu/int8/args.h"
#include "../cpu/op.h"
#include "../cuda/plan.h"
#include "guard.h"

namespace py = pybind11;
using namespace mnv2_fused;
using namespace mnv2_fused::cpu;

namespace {

// A block from its fields by name: every one of them, and no other.
BlockShape block_shape(const py::dict& values) {
  BlockShape s{};
  for (const BlockField& field : kBlockFields) {
    if (!values.contains(field.name))
      throw py::value_error(std::string("a block must have the field ") + field.name);
    const int64_t value = values[field.name].cast<int64_t>();
    if (field.values > 0 && (value < 0 || value >= field.values))
      throw py::value_error(std::string(field.name) + " must be 0 to " +
                            std::to_string(field.values - 1) + " (see mnv2_fused.encoding), got " +
                            std::to_string(value));
    field.set(s, value);
  }
  if (values.size() != std::size(kBlockFields))
    throw py::value_error("a block has " + std::to_string(std::size(kBlockFields)) +
                          " fields, got " + std::to_string(values.size()));
  return s;
}

// Whether the collector may look inside: it can come between a Python object's allocation and its
// constructor.
bool constructed(PyObject* self) {
  return reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder().holder_constructed();
}

// Names of the activations that `has` is true of.
template <class F>
std::vector<std::string> names_of(F has) {
  std::vector<std::string> names;
  for (const ActivationRow& row : kActivationRows)
    if (has(row)) names.push_back(row.name);
  return names;
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
                  "partial_bytes"_a = p.partial_bytes, "keeps"_a = p.caches_depthwise,
                  "recompute"_a = p.recompute, "bytes_never_written"_a = p.bytes_never_written,
                  "cost"_a = p.cost);
}

cuda::Precision precision_of(const std::string& name) {
  if (name == "float16") return cuda::Precision::kHalf;
  if (name == "bfloat16") return cuda::Precision::kBFloat16;
  if (name == "tf32") return cuda::Precision::kTf32;
  if (name == "float32") return cuda::Precision::kFloat32;
  throw py::value_error("precision must be float16, bfloat16, tf32 or float32, got " + name);
}

// In the order of gpus.Gpu.
using GpuValues = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, double, double>;

py::dict to_dict(const cuda::Plan& p) {
  using namespace py::literals;
  return py::dict("images"_a = p.images, "tile_rows"_a = p.tile_rows, "tile_cols"_a = p.tile_cols,
                  "strip_rows"_a = p.strip_rows, "group"_a = p.group, "splits"_a = p.splits,
                  "out_panels"_a = p.out_panels, "out_blocks"_a = p.out_blocks, "warps"_a = p.warps,
                  "thread_blocks"_a = p.thread_blocks, "shared_bytes"_a = p.shared_bytes,
                  "resident"_a = p.blocks_per_sm, "partial_bytes"_a = p.partial_bytes,
                  "squeeze_bytes"_a = p.squeeze_bytes,
                  "bytes_never_written"_a = p.bytes_never_written, "bytes"_a = p.bytes,
                  "recompute"_a = p.recompute, "seconds"_a = p.seconds);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("compiler") = __VERSION__;
  m.attr("torch_target") =
      (TORCH_TARGET_VERSION >> 56 & 0xff) * 100 + (TORCH_TARGET_VERSION >> 48 & 0xff);

#ifdef MNV2_FUSED_NO_CUDA
  m.attr("no_cuda") = MNV2_FUSED_NO_CUDA;
#else
  m.attr("no_cuda") = py::none();
#endif

  m.def("instruction_sets", [] {
    std::vector<std::pair<std::string, bool>> names;
    for (const cpu::Isa& isa : cpu::compiled()) names.emplace_back(isa.name, isa.supported());
    return names;
  });
  m.def("instruction_set", [] { return std::string(cpu::active().name); });
  m.def("set_instruction_set", &cpu::set_active);
  m.def("l2_bytes", &cpu::l2_bytes);
  m.def("advise_huge_pages", &cpu::advise_huge_pages);
  m.def("poison_new_memory", &cpu::poison_new_memory);
  py::class_<Guard>(
      m, "Guard", py::custom_type_setup([](PyHeapTypeObject* heap_type) {
        PyTypeObject* const type = &heap_type->ht_type;
        type->tp_flags |= Py_TPFLAGS_HAVE_GC;
        type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
          Py_VISIT(Py_TYPE(self));
          return constructed(self) ? py::cast<Guard&>(py::handle(self)).traverse(visit, arg) : 0;
        };
        type->tp_clear = [](PyObject* self) {
          if (constructed(self)) py::cast<Guard&>(py::handle(self)).clear();
          return 0;
        };
      }))
      .def(py::init<const py::list&, const py::list&, const py::list&, const py::list&,
                    const py::list&, const py::object&>())
      .def("is_valid", &Guard::is_valid)
      .def("serves", &Guard::serves)
      .def_property_readonly("found_late", &Guard::found_late);
  m.def("note_uncounted_writes", &Guard::note_uncounted_writes);

  // Field by field of a block: its name and default.
  m.def("block_fields", [] {
    std::vector<std::pair<std::string, int64_t>> fields;
    for (const BlockField& field : kBlockFields)
      fields.emplace_back(field.name, field.get(BlockShape{}));
    return fields;
  });
  m.def("activations", [] { return names_of([](const ActivationRow&) { return true; }); });
  m.def("clips", [] { return names_of([](const ActivationRow& row) { return row.clips(); }); });
  m.def("differentiated",
        [] { return names_of([](const ActivationRow& row) { return row.differentiated; }); });
  m.def("gates",
        [] { return std::vector<std::string>(std::begin(kGateNames), std::end(kGateNames)); });

  m.def(
      "plan",
      [](const py::dict& block, int64_t threads, const std::string& dtype,
         std::optional<std::vector<int64_t>> forced, std::optional<int64_t> l2_bytes) {
        const BlockShape shape = block_shape(block);
        if (forced && forced->size() != 4)
          throw py::value_error("plan must be [tile_rows, tile_cols, group, splits], got " +
                                std::to_string(forced->size()) + " values");
        return with_kernels(dtype, [&]<class S>(const cpu::Kernels<S>& kernels) {
          const Machine machine = kernels.machine(threads, l2_bytes.value_or(cpu::l2_bytes()));
          const auto plan_of = [&](const BlockShape& s) {
            if (!forced) return make_plan(s, machine);
            return make_plan(s, machine, (*forced)[0], (*forced)[1], (*forced)[2], (*forced)[3]);
          };
          const BlockRun run(shape, machine, plan_of);
          const bool at_once = shape.batch == 0 || run.images_of_part() == shape.batch;
          py::dict plan = to_dict(at_once ? run.plan : plan_of(shape));
          plan["call_bytes"] = shape.batch > 0 ? scratch_bytes<S>(run) : 0;
          return plan;
        });
      },
      py::arg("block"), py::kw_only(), py::arg("threads"), py::arg("dtype"),
      py::arg("forced") = py::none(), py::arg("l2_bytes") = py::none());

  // Built with the CUDA kernel or not, Python can plan for a GPU.
  m.def(
      "cuda_plan",
      [](const py::dict& block, const std::string& precision, const GpuValues& gpu,
         std::optional<std::vector<int64_t>> forced) {
        const BlockShape s = block_shape(block);
        const cuda::Precision p = precision_of(precision);
        const cuda::Gpu g = std::make_from_tuple<cuda::Gpu>(gpu);
        if (const std::string why = cuda::unsupported(s, p, g.capability); !why.empty())
          throw py::value_error(why);
        return to_dict(forced ? cuda::make_plan(s, p, g, *forced) : cuda::make_plan(s, p, g));
      },
      py::arg("block"), py::kw_only(), py::arg("precision"), py::arg("gpu"),
      py::arg("forced") = py::none());

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
