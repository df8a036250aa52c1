// The namespace of the ops, in one place: the emulator's test module registers the same ops in another.
#pragma once

#include <torch/csrc/stable/library.h>

#ifndef PYKERN_NAMESPACE
#define PYKERN_NAMESPACE pykern
#endif
