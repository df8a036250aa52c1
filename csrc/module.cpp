// The Python module itself is empty: loading the library registers the ops with the dispatcher.
// pykern/_native.py loads it through torch, which needs no PyInit, so a Python whose headers are
// not installed builds it too.
#if __has_include(<Python.h>)
#include <Python.h>

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
#endif
