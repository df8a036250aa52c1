// What the low-rank parts can do, by the numbers that the ops take; the same on the CPU and on the GPU.
#pragma once

namespace pykern::lowrank {

enum class InnerRule : int { adamw, adabelief, lion, momentum };
enum class Rounding : int { nearest, stochastic, kahan };
enum class MomentStorage : int { wide, bfloat16, eight_bit };  // wide: of the low-rank gradient's dtype

}  // namespace pykern::lowrank
