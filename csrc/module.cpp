// The Python modules themselves are empty: loading a library registers its ops with the dispatcher.
// pykern/_native.py loads it through torch, which needs no PyInit, so a Python whose headers are
// not installed builds it too.
#if __has_include(<Python.h>)
#include <Python.h>

// PYKERN_MODULE is the module's name: _C or _C_cuda.
#define PYKERN_TEXT_OF(name) #name
#define PYKERN_TEXT(name) PYKERN_TEXT_OF(name)
#define PYKERN_INIT_OF(name) PyInit_##name
#define PYKERN_INIT(name) PYKERN_INIT_OF(name)

extern "C" __attribute__((visibility("default"))) PyObject* PYKERN_INIT(PYKERN_MODULE)(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, PYKERN_TEXT(PYKERN_MODULE), nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
#endif
