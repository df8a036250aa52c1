// Projections to rows of the gradient, and back: no products, and where nothing but the picked rows changes, the others
// are not touched.
#include "common/parallel.h"
#include "lowrank/prefetch.h"
#include "lowrank/weight_piece.h"

namespace pykern::PYKERN_SIMD {
namespace {

using lowrank::PartMatrix;
using lowrank::ProjectPart;

constexpr int64_t kPiece = 1024;  // elements of a line at a time
// Where picked rows lie across the lines: lines at a time, and of a task.
constexpr int64_t kLines = 32, kTaskLines = 256;

// body(line, end) of blocks of lines.
template <class Body>
void each_block_of_lines(int64_t lines, const Body& body) {
  parallel_tasks(ceil_div(lines, kTaskLines), [&](int64_t task, int) {
    const int64_t end = lesser((task + 1) * kTaskLines, lines);
    for (int64_t line = task * kTaskLines; line < end; line += kLines) body(line, lesser(line + kLines, end));
  });
}

// The next block on its way into the cache: picked elements come in no order that the processor could foresee.
template <class T>
Prefetch next_lines(const T* matrix, int64_t line, const PartMatrix& layout, int64_t steps) {
  constexpr int64_t size = sizeof(T);
  return Prefetch(matrix + line * layout.stride, lesser(kLines, layout.length - line), layout.stride * size,
                  layout.n * size, steps);
}

// --- down -------------------------------------------------------------------------------------------

template <class T>
struct Picked {
  const ProjectPart& part;
  const int64_t length = part.matrix.length, stride = part.matrix.stride;
  const T* matrix = static_cast<const T*>(part.data);
  float* low = static_cast<float*>(part.low);
  const float factor = static_cast<float>(part.factor);

  void copy_row(int64_t k) const {
    const int64_t row = part.rows[k];
    for (int64_t i = 0; i < length; i += kLanes) {
      const vfloat value = row < 0 ? zero() : load_some(matrix + row * stride + i, length - i) * factor;
      store_some(low + k * length + i, value, length - i);
    }
  }

  void gather(int64_t line0, int64_t end) const {
    Prefetch next = next_lines(matrix, end, part.matrix, part.rank);
    for (int64_t k = 0; k < part.rank; ++k) {
      const int64_t row = part.rows[k];
      next.step();
      for (int64_t line = line0; line < end; line += kLanes) {
        const int64_t count = lesser(kLanes, end - line);
        T values[kLanes] = {};
        for (int64_t i = 0; i < count && row >= 0; ++i) values[i] = matrix[(line + i) * stride + row];
        store_some(low + k * length + line, load(values) * factor, count);
      }
    }
  }

  void run() const {
    if (part.matrix.rows) {
      parallel_tasks(part.rank, [&](int64_t k, int) { copy_row(k); });
    } else {
      each_block_of_lines(length, [&](int64_t line, int64_t end) { gather(line, end); });
    }
  }
};

// --- up ---------------------------------------------------------------------------------------------

// What is projected up of a line of the weight.
struct UpLine {
  const float *direction, *low;  // null: zeros
};

template <class T, Rounding Kind>
struct Spread : Weights<T> {
  using Weights<T>::part;

  const int64_t n = part.param.n, length = part.param.length;
  const Update<T, Kind> rule{part};

  explicit Spread(const ApplyPart& given) : Weights<T>{given} {}

  void change_line(int64_t line, const UpLine& up) const {
    const int64_t size = part.param.line_size();
    T buffer[kPiece];
    for (int64_t element = 0; element < size; element += kPiece) {
      const float* direction = up.direction ? up.direction + element : nullptr;
      const float* low = up.low ? up.low + element : nullptr;
      rule.run(this->piece(line, element, lesser(kPiece, size - element), direction, low, buffer));
    }
  }

  // Row k of a low-rank matrix.
  const float* row_of(const void* low, int64_t k) const {
    return low && k >= 0 ? static_cast<const float*>(low) + k * length : nullptr;
  }

  void change_row(int64_t place, int64_t k) const {
    change_line(place, {row_of(part.direction, k), row_of(part.low, k)});
  }

  // Whether rows that are not picked change, too.
  bool changes_all() const { return part.grad || part.shrink != 0 || Kind == Rounding::kahan; }

  bool run() const {
    if (changes_all() && !part.param.rows) return change_lines();
    if (changes_all()) {
      parallel_tasks(n, [&](int64_t place, int) { change_row(place, part.places[place]); });
    } else if (part.param.rows) {
      parallel_tasks(part.rank, [&](int64_t k, int) {
        if (part.rows[k] >= 0) change_row(part.rows[k], k);
      });
    } else {
      each_block_of_lines(length, [&](int64_t line, int64_t end) { change_across(line, end); });
    }
    return true;
  }

  // What is picked of some lines, each of which lies along memory.
  void change_across(int64_t line0, int64_t end) const {
    T* const weights = static_cast<T*>(part.data);
    Prefetch next = next_lines(weights, end, part.param, part.rank);
    for (int64_t k = 0; k < part.rank; ++k) {
      const int64_t row = part.rows[k];
      next.step();
      for (int64_t line = line0; line < end && row >= 0; line += kLanes) {
        T values[kLanes] = {};
        Piece<T> piece{};
        piece.weights = values;
        piece.update = row_of(part.direction, k) + line;
        piece.count = lesser(kLanes, end - line);
        piece.index = row * length + line;
        piece.index_step = 1;
        for (int64_t i = 0; i < piece.count; ++i) values[i] = weights[(line + i) * part.param.stride + row];
        rule.run(piece);
        for (int64_t i = 0; i < piece.count; ++i) weights[(line + i) * part.param.stride + row] = values[i];
      }
    }
  }

  // The columns of the weight lie along memory: the elements of a picked row lie across them.
  bool change_lines() const {
    const Scratch memory(static_cast<size_t>(2 * n * max_threads()) * sizeof(float));
    if (!memory.get<float>()) return false;
    for (int64_t i = 0; i < 2 * n * max_threads(); ++i) memory.get<float>()[i] = 0.0f;
    parallel_tasks(ceil_div(length, kLines), [&](int64_t task, int thread) {
      // Whatever the line, the same places are filled.
      float* const up[2] = {memory.get<float>() + 2 * n * thread, memory.get<float>() + 2 * n * thread + n};
      const void* const sources[2] = {part.direction, part.low};
      const int64_t end = lesser((task + 1) * kLines, length);
      for (int64_t line = task * kLines; line < end; ++line) {
        for (int i = 0; i < 2; ++i) {
          for (int64_t k = 0; k < part.rank && sources[i]; ++k) {
            if (part.rows[k] >= 0) up[i][part.rows[k]] = row_of(sources[i], k)[line];
          }
        }
        change_line(line, {up[0], up[1]});
      }
    });
    return true;
  }
};

template <class T>
bool apply_typed(const ApplyPart& part) {
  switch (part.rounding) {
    case Rounding::nearest: return Spread<T, Rounding::nearest>(part).run();
    case Rounding::stochastic: return Spread<T, Rounding::stochastic>(part).run();
    case Rounding::kahan: return Spread<T, Rounding::kahan>(part).run();
  }
  return false;
}

}  // namespace

void project_rows_part(const ProjectPart& part) {
  switch (part.matrix.type) {
    case DataType::f32: return Picked<float>{part}.run();
    case DataType::bf16: return Picked<bf16>{part}.run();
    case DataType::f16: return Picked<f16>{part}.run();
    default: return;
  }
}

bool apply_rows_part(const ApplyPart& part) {
  switch (part.param.type) {
    case DataType::f32: return apply_typed<float>(part);
    case DataType::bf16: return apply_typed<bf16>(part);
    case DataType::f16: return apply_typed<f16>(part);
    default: return false;
  }
}

}  // namespace pykern::PYKERN_SIMD
