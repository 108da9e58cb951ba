// The extension module: every schema (schema.inc), the C++ CPU kernels, and an empty Python module to import.
#include <Python.h>

#include "cpu/kernels.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(entangle_fast, m) {
#define EF_OP(schema) m.def(schema);
#include "schema.inc"
#undef EF_OP
}

STABLE_TORCH_LIBRARY_IMPL(entangle_fast, CPU, m) {
  m.impl("gram", TORCH_BOX(&ef::cpu::gram));
  m.impl("sample_loss", TORCH_BOX(&ef::cpu::sample_loss));
  m.impl("sample_loss_backward", TORCH_BOX(&ef::cpu::sample_loss_backward));
}

PyMODINIT_FUNC PyInit__C(void) {
  static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
