// Names for Python; the checks of dtype, shape and layout are in wanfast/vae/extension.py, the only caller.
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
    py::enum_<wanfast::Format>(m, "Format")
        .value("fp32", wanfast::Format::fp32)
        .value("bf16_widened", wanfast::Format::bf16_widened)
        .value("bf16_pairs", wanfast::Format::bf16_pairs);
    py::enum_<wanfast::Form>(m, "Form")
        .value("same", wanfast::Form::same)
        .value("half_picture", wanfast::Form::half_picture)
        .value("half_frames", wanfast::Form::half_frames)
        .value("double_picture", wanfast::Form::double_picture)
        .value("double_frames", wanfast::Form::double_frames);
    py::enum_<wanfast::Method>(m, "Method")
        .value("fastest", wanfast::Method::fastest)
        .value("direct", wanfast::Method::direct)
        .value("winograd", wanfast::Method::winograd);
    m.def("instruction_sets", &wanfast::instruction_sets, "What this CPU can run, best first.");
    m.def("has_bf16_products", &wanfast::has_bf16_products, "Whether the first of them multiplies bf16.");
    m.def("has_bf16_matrices", &wanfast::has_bf16_matrices, "Whether this CPU has matrix units for bf16.");
    m.def("packed_slots", &wanfast::packed_slots, py::kw_only(), py::arg("out_channels"), py::arg("channels"),
          py::arg("taps"), py::arg("format"));
    m.def(
        "pack_weight",
        [](std::uintptr_t weight, std::uintptr_t packed, std::int64_t out_channels, std::int64_t channels,
           std::int64_t taps, wanfast::Format format) {
            wanfast::pack_weight(at<const void>(weight), at<void>(packed), out_channels, channels, taps, format);
        },
        py::kw_only(), py::arg("weight"), py::arg("packed"), py::arg("out_channels"), py::arg("channels"),
        py::arg("taps"), py::arg("format"), py::call_guard<py::gil_scoped_release>());
    m.def(
        "causal_conv3d",
        [](std::uintptr_t x, std::uintptr_t history, std::uintptr_t packed, std::uintptr_t bias,
           std::uintptr_t residual, std::uintptr_t norm, std::uintptr_t y, std::int64_t batch,
           std::int64_t channels, std::int64_t out_channels, std::int64_t frames, std::int64_t history_frames,
           std::int64_t height, std::int64_t width, std::int64_t kt, std::int64_t kh, std::int64_t kw,
           wanfast::Form form, wanfast::Format format, int num_threads, const std::string& instruction_set,
           wanfast::Method method) {
            const wanfast::ConvShape shape{batch,  channels, out_channels, frames, history_frames,
                                           height, width,    kt,           kh,     kw,     form};
            const wanfast::ConvArguments arguments{at<const void>(x),
                                                   at<const void>(history),
                                                   at<const void>(packed),
                                                   at<const float>(bias),
                                                   at<const void>(residual),
                                                   at<const float>(norm),
                                                   at<void>(y),
                                                   shape,
                                                   format};
            wanfast::causal_conv3d(arguments, num_threads, instruction_set, method);
        },
        py::kw_only(), py::arg("x"), py::arg("history"), py::arg("packed"), py::arg("bias"), py::arg("residual"),
        py::arg("norm"), py::arg("y"), py::arg("batch"), py::arg("channels"),
        py::arg("out_channels"), py::arg("frames"), py::arg("history_frames"), py::arg("height"), py::arg("width"),
        py::arg("kt"), py::arg("kh"), py::arg("kw"), py::arg("form"), py::arg("format"), py::arg("num_threads"),
        py::arg("instruction_set"), py::arg("method"), py::call_guard<py::gil_scoped_release>());
    m.def(
        "norm_silu",
        [](std::uintptr_t x, std::uintptr_t norm, std::uintptr_t y, std::int64_t pixels, std::int64_t channels,
           wanfast::Format format, int num_threads, const std::string& instruction_set) {
            wanfast::norm_silu(at<const void>(x), at<const float>(norm), at<void>(y), pixels, channels, format,
                               num_threads, instruction_set);
        },
        py::kw_only(), py::arg("x"), py::arg("norm"), py::arg("y"), py::arg("pixels"), py::arg("channels"),
        py::arg("format"), py::arg("num_threads"), py::arg("instruction_set"),
        py::call_guard<py::gil_scoped_release>());
}
