// The classes of a model's step for Python.
#include "held.h"
#include "program.h"

namespace hybridkv {

void bind_step(nb::module_& m) {
    nb::class_<Program>(m, "Program")
        .def(nb::init<bool>())
        .def("linear", &Program::linear)
        .def("experts", &Program::experts)
        .def("norm", &Program::norm)
        .def("gate", &Program::gate)
        .def("add", &Program::add)
        .def("bias", &Program::bias)
        .def("copy", &Program::copy)
        .def("rope", &Program::rope)
        .def("conv", &Program::conv)
        .def("decay", &Program::decay)
        .def("weigh", &Program::weigh)
        .def("delta", &Program::delta)
        .def("mamba2", &Program::mamba2)
        .def("mamba1", &Program::mamba1)
        .def("attend", &Program::attend)
        .def("run", &Program::run)
        .def("replay", &Program::replay)
        .def("start_timing", &Program::start_timing)
        .def("timing", &Program::timing)
        .def("__len__", &Program::size);
    nb::class_<HeldCache>(m, "HeldCache")
        .def(nb::init<int64_t, const std::vector<Turns>&, const std::vector<Address>&, const std::vector<Address>&,
                      const std::vector<Call>&>());
    nb::class_<HeldStep>(m, "HeldStep")
        .def(nb::init<Program&, Program&, const WeightRows&, float, Address, Address, Address, int64_t, const std::string&,
                      int>(),
             nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>())
        .def("step", &HeldStep::step)
        .def("step_many", &HeldStep::step_many)
        .def("keep", &HeldStep::keep);
}

}  // namespace hybridkv
