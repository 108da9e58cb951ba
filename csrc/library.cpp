// The extension module: every schema (schema.inc), the C++ CPU kernels, and a Python module that says which instruction set they run.
#include <Python.h>

#include "cpu/isa.h"
#include "cpu/kernels.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(entangle_fast, m) {
#define EF_OP(schema) m.def(schema);
#include "schema.inc"
#undef EF_OP
}

STABLE_TORCH_LIBRARY_IMPL(entangle_fast, CPU, m) {
  m.impl("gram", TORCH_BOX(&ef::cpu::gram));
  m.impl("gram_layers", TORCH_BOX(&ef::cpu::gram_layers));
  m.impl("gram_conv", TORCH_BOX(&ef::cpu::gram_conv));
  m.impl("gram_embedding", TORCH_BOX(&ef::cpu::gram_embedding));
  m.impl("sqnorm", TORCH_BOX(&ef::cpu::sqnorm));
  m.impl("sqnorm_conv", TORCH_BOX(&ef::cpu::sqnorm_conv));
  m.impl("sqnorm_embedding", TORCH_BOX(&ef::cpu::sqnorm_embedding));
  m.impl("project", TORCH_BOX(&ef::cpu::project));
  m.impl("project_conv", TORCH_BOX(&ef::cpu::project_conv));
  m.impl("project_embedding", TORCH_BOX(&ef::cpu::project_embedding));
  m.impl("project_random", TORCH_BOX(&ef::cpu::project_random));
  m.impl("project_random_conv", TORCH_BOX(&ef::cpu::project_random_conv));
  m.impl("project_random_embedding", TORCH_BOX(&ef::cpu::project_random_embedding));
  m.impl("step_gram", TORCH_BOX(&ef::cpu::step_gram));
  m.impl("step_project", TORCH_BOX(&ef::cpu::step_project));
  m.impl("step_update", TORCH_BOX(&ef::cpu::step_update));
  m.impl("step_adamw", TORCH_BOX(&ef::cpu::step_adamw));
  m.impl("step_lookahead", TORCH_BOX(&ef::cpu::step_lookahead));
  m.impl("step_lookahead_undo", TORCH_BOX(&ef::cpu::step_lookahead_undo));
  m.impl("sample_loss", TORCH_BOX(&ef::cpu::sample_loss));
  m.impl("sample_loss_backward", TORCH_BOX(&ef::cpu::sample_loss_backward));
  m.impl("w2_sorted", TORCH_BOX(&ef::cpu::w2_sorted));
  m.impl("w2_moments", TORCH_BOX(&ef::cpu::w2_moments));
}

static PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(ef::cpu::isa()); }

PyMODINIT_FUNC PyInit__C(void) {
  static PyMethodDef methods[] = {{"isa", isa, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
  static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
