// Names for Python; the checks of dtype, shape and layout are in wanfast/vae/conv.py, the only caller.
// Pointers are passed as integers (Tensor.data_ptr()), so that this builds without torch and serves every torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "causal_conv3d.h"

namespace py = pybind11;

namespace {

template <typename T>
T* at(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Host C++ for the VAE: see csrc/causal_conv3d.h.";
    m.def("instruction_sets", &wanfast::instruction_sets, "What this CPU can run, best first.");
    m.def("packed_size", &wanfast::packed_size, py::arg("out_channels"), py::arg("channels"), py::arg("taps"));
    m.def(
        "pack_weight",
        [](std::uintptr_t weight, std::uintptr_t packed, std::int64_t out_channels, std::int64_t channels,
           std::int64_t taps) {
            wanfast::pack_weight(at<const float>(weight), at<float>(packed), out_channels, channels, taps);
        },
        py::arg("weight"), py::arg("packed"), py::arg("out_channels"), py::arg("channels"), py::arg("taps"),
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "causal_conv3d",
        [](std::uintptr_t x, std::uintptr_t history, std::uintptr_t packed, std::uintptr_t bias, std::uintptr_t y,
           std::int64_t batch, std::int64_t channels, std::int64_t out_channels, std::int64_t frames,
           std::int64_t history_frames, std::int64_t height, std::int64_t width, std::int64_t kt, std::int64_t kh,
           std::int64_t kw, int num_threads, const std::string& instruction_set) {
            const wanfast::ConvShape shape{batch,  channels, out_channels, frames, history_frames,
                                           height, width,    kt,           kh,     kw};
            wanfast::causal_conv3d(at<const float>(x), at<const float>(history), at<const float>(packed),
                                   at<const float>(bias), at<float>(y), shape, num_threads, instruction_set);
        },
        py::kw_only(), py::arg("x"), py::arg("history"), py::arg("packed"), py::arg("bias"), py::arg("y"),
        py::arg("batch"), py::arg("channels"), py::arg("out_channels"), py::arg("frames"), py::arg("history_frames"),
        py::arg("height"), py::arg("width"), py::arg("kt"), py::arg("kh"), py::arg("kw"), py::arg("num_threads"),
        py::arg("instruction_set"), py::call_guard<py::gil_scoped_release>());
}
