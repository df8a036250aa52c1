// The test module: settings of the emulator, and the planted bugs that it must catch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <cstring>
#include <memory>

#include "kernels/emulator/machine.h"
#include "kernels/emulator/memory.h"
#include "kernels/ptx/descriptor.h"
#include "tests/emulator/planted.h"
#include "tests/emulator/probes.h"
#include "tests/emulator/vectors.h"

namespace py = pybind11;
using namespace pykern::emulator;
namespace vectors = pykern::vectors;

namespace {

Order parse_order(const std::string& name) {
  if (name == "forward") return {Order::forward, 0};
  if (name == "reverse") return {Order::reverse, 0};
  if (name.rfind("random:", 0) == 0) return {Order::random, std::stoull(name.substr(7))};
  throw py::value_error("orders: expected 'forward', 'reverse' or 'random:SEED', got '" + name + "'");
}

std::string order_text(const Order& order) {
  return order.kind == Order::forward   ? "forward"
         : order.kind == Order::reverse ? "reverse"
                                        : "random:" + std::to_string(order.seed);
}

py::array_t<float> run_planted(const std::string& name, bool buggy, py::array_t<float, py::array::c_style> input,
                               int64_t results) {
  py::array_t<float> output(results);
  poison(output.mutable_data(), static_cast<size_t>(output.nbytes()));
  forget_all();
  announce(const_cast<float*>(input.data()), input.nbytes(), Access::read);
  announce(output.mutable_data(), output.nbytes(), Access::write);
  const char* error = nullptr;
  bool found = false;
  for (const Planted* table : {planted_kernels(), planted_async_kernels()}) {
    for (const Planted* entry = table; entry->name; ++entry) {
      if (name != entry->name) continue;
      found = true;
      error = entry->run(buggy, input.data(), input.size(), output.mutable_data());
    }
  }
  forget_all();
  if (!found) throw py::value_error("no planted kernel is named '" + name + "'");
  if (error) throw std::runtime_error(error);
  return output;
}

// Memory as a GPU gives it: aligned, and of no given content.
std::unique_ptr<char, void (*)(void*)> device_memory(int64_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 256, static_cast<size_t>(bytes) + 1)) throw std::bad_alloc();
  poison(memory, static_cast<size_t>(bytes));
  return {static_cast<char*>(memory), &std::free};
}

py::array_t<uint8_t> run_vector(const std::string& name, const std::vector<int64_t>& options,
                                py::array_t<uint8_t, py::array::c_style> input, int64_t output_bytes) {
  using vectors::Vector;
  const Vector* found = nullptr;
  for (const Vector* table : {vectors::vectors_sm80(), vectors::vectors_sm90()}) {
    for (const Vector* entry = table; entry->name; ++entry) {
      if (name == entry->name) found = entry;
    }
  }
  if (!found) throw py::value_error("no vector kernel is named '" + name + "'");
  vectors::VectorOptions values{};
  if (options.size() > std::size(values.values)) throw py::value_error("too many options");
  std::copy(options.begin(), options.end(), values.values);
  const auto from = device_memory(input.nbytes()), to = device_memory(output_bytes);
  std::memcpy(from.get(), input.data(), static_cast<size_t>(input.nbytes()));
  forget_all();
  announce(from.get(), input.nbytes(), Access::read);
  announce(to.get(), output_bytes, Access::write);
  const char* error = found->run(values, from.get(), input.nbytes(), to.get(), nullptr);
  forget_all();
  if (error) throw std::runtime_error(error);
  py::array_t<uint8_t> output(output_bytes);
  std::memcpy(output.mutable_data(), to.get(), static_cast<size_t>(output_bytes));
  return output;
}

py::array_t<float> run_probe(const std::string& name, py::array_t<float, py::array::c_style> input, int threads,
                             int argument) {
  py::array_t<float> output(input.size());
  poison(output.mutable_data(), static_cast<size_t>(output.nbytes()));
  for (const Probe* entry = probes(); entry->name; ++entry) {
    if (name != entry->name) continue;
    forget_all();
    announce(const_cast<float*>(input.data()), input.nbytes(), Access::read);
    announce(output.mutable_data(), output.nbytes(), Access::write);
    const char* error = entry->run(input.size(), threads, argument, input.data(), output.mutable_data());
    forget_all();
    if (error) throw std::runtime_error(error);
    return output;
  }
  throw py::value_error("no probe is named '" + name + "'");
}

}  // namespace

PYBIND11_MODULE(PYKERN_EMULATOR_MODULE, m) {
  m.def("orders", [] {
    std::vector<std::string> names;
    for (const Order& order : orders()) names.push_back(order_text(order));
    return names;
  });
  m.def("set_orders", [](const std::vector<std::string>& names) {
    if (names.empty()) throw py::value_error("orders: expected at least one");
    std::vector<Order> chosen;
    for (const std::string& name : names) chosen.push_back(parse_order(name));
    set_orders(chosen);
  });
  m.def("set_compute_capability", &set_compute_capability);
  m.def("counters", [] {
    const Counters& now = counters();
    return py::dict(py::arg("launches") = now.launches, py::arg("threads") = now.threads,
                    py::arg("switches") = now.switches);
  });
  const auto names = [](const Planted* entry) {
    std::vector<std::string> found;
    for (; entry->name; ++entry) found.push_back(entry->name);
    return found;
  };
  m.def("planted", [names] { return names(planted_kernels()); });
  m.def("planted_async", [names] { return names(planted_async_kernels()); });
  m.def("run_vector", &run_vector, py::arg("name"), py::arg("options"), py::arg("input"), py::arg("output_bytes"));
  m.def("encode_descriptor", [](uint32_t address, uint32_t leading, uint32_t stride, uint32_t base, int swizzle) {
    return pykern::ptx::encode({address, leading, stride, base, static_cast<pykern::ptx::Swizzle>(swizzle)});
  });
  m.def("decode_descriptor", [](uint64_t bits) {
    const auto matrix = pykern::ptx::decode(bits);
    const int swizzle = static_cast<int>(matrix.swizzle);
    return py::make_tuple(matrix.address, matrix.leading, matrix.stride, matrix.base_offset, swizzle);
  });
  m.def("probes", [] {
    std::vector<std::string> names;
    for (const Probe* entry = probes(); entry->name; ++entry) names.push_back(entry->name);
    return names;
  });
  m.def("run_probe", &run_probe, py::arg("name"), py::arg("input"), py::arg("threads"), py::arg("argument") = 0);
  m.def("run_planted", &run_planted, py::arg("name"), py::arg("buggy"), py::arg("input"), py::arg("results"));
}
