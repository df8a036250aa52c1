// The recurrence behind returns and advantages, one sequence per lane of a vector. A tile is as many steps as there
// are lanes; it is transposed on its way in and out, so that each step of all lanes is one vector. State and sums are
// doubles.
#include "policy/returns.h"

#include "common/pack.h"
#include "common/vector_double.h"

namespace pykern::PYKERN_SIMD {
namespace {

constexpr int kSteps = kLanes;
constexpr int kHalves = 2;

typedef uint8_t vbytes __attribute__((vector_size(kLanes)));

// Where a lane stands: `end` is one past the last token of its tile, of which `count` belong to its segment.
struct Lane {
  int64_t end;
  int64_t count;
};

template <class T>
using Tile = T[kSteps][kLanes];

PYKERN_INLINE void transpose_tile(const vuint (&rows)[kLanes], void* tile) {
  vuint turned[kLanes];
#pragma GCC unroll 16
  for (int row = 0; row < kLanes; ++row) turned[row] = rows[row];
  detail::transpose<kLanes>(turned);
  std::memcpy(tile, turned, sizeof turned);
}

PYKERN_INLINE void load_tile(const float* source, const Lane (&lanes)[kLanes], Tile<float>& tile) {
  vuint rows[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    const Lane& at = lanes[lane];
    if (at.count == kSteps) {
      rows[lane] = (vuint)load(source + at.end - kSteps);
    } else {
      float buffer[kSteps] = {};
      for (int64_t i = 1; i <= at.count; ++i) buffer[kSteps - i] = source[at.end - i];
      rows[lane] = (vuint)load(buffer);
    }
  }
  transpose_tile(rows, tile);
}

PYKERN_INLINE void load_tile(const double* source, const Lane (&lanes)[kLanes], Tile<double>& tile) {
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int64_t i = 1; i <= kSteps; ++i) {
      tile[kSteps - i][lane] = i <= lanes[lane].count ? source[lanes[lane].end - i] : 0;
    }
  }
}

PYKERN_INLINE void store_tile(const Tile<float>& tile, const Lane (&lanes)[kLanes], float* target) {
  vuint rows[kLanes];
  std::memcpy(rows, tile, sizeof rows);
  detail::transpose<kLanes>(rows);
  for (int lane = 0; lane < kLanes; ++lane) {
    const Lane& at = lanes[lane];
    if (at.count == kSteps) {
      store(target + at.end - kSteps, (vfloat)rows[lane]);
    } else {
      float buffer[kSteps];
      store(buffer, (vfloat)rows[lane]);
      for (int64_t i = 1; i <= at.count; ++i) target[at.end - i] = buffer[kSteps - i];
    }
  }
}

PYKERN_INLINE void store_tile(const Tile<double>& tile, const Lane (&lanes)[kLanes], double* target) {
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int64_t i = 1; i <= lanes[lane].count; ++i) target[lanes[lane].end - i] = tile[kSteps - i][lane];
  }
}

enum class Kept { all, some, none };

// Which tokens of a tile count, as -1 or 0.
PYKERN_INLINE Kept load_mask(const uint8_t* mask, const Lane (&lanes)[kLanes], Tile<int32_t>& valid) {
  vuint rows[kLanes];
  vint any = vint{}, all = ~vint{};
  for (int lane = 0; lane < kLanes; ++lane) {
    const Lane& at = lanes[lane];
    vbytes bytes = {};
    if (at.count == kSteps && mask) {
      std::memcpy(&bytes, mask + at.end - kSteps, sizeof bytes);
    } else {
      for (int64_t i = 1; i <= at.count; ++i) bytes[kSteps - i] = mask ? mask[at.end - i] : 1;
    }
    const vint flags = __builtin_convertvector(bytes, vint) != 0;
    any |= flags;
    all &= flags;
    rows[lane] = (vuint)flags;
  }
  bool some = false, every = true;
  for (int step = 0; step < kSteps; ++step) {
    some = some || any[step] != 0;
    every = every && all[step] != 0;
  }
  if (every) return Kept::all;
  if (!some) return Kept::none;
  transpose_tile(rows, valid);
  return Kept::some;
}

struct State {
  vdouble next_value[kHalves], next_advantage[kHalves], factor[kHalves], decay[kHalves];
};

// The steps of a tile, from the right. `Flagged`: some tokens are masked, or lie before their segment.
template <class T, bool HasValues, bool Flagged>
PYKERN_INLINE void run_tile(const ScanParams& p, State& state, const Tile<T>& rewards, const Tile<T>& values,
                            const Tile<int32_t>& valid, const Lane (&lanes)[kLanes], Tile<T>& advantages,
                            Tile<T>& returns) {
  const vdouble gamma = p.gamma - vdouble{};
  const vdouble zero_doubles = {};
  vlong first_step[kHalves] = {};
  for (int half = 0; Flagged && half < kHalves; ++half) {
    for (int lane = 0; lane < kDoubleLanes; ++lane) {
      first_step[half][lane] = kSteps - lanes[half * kDoubleLanes + lane].count;
    }
  }
  for (int step = kSteps - 1; step >= 0; --step) {
#pragma GCC unroll 2
    for (int half = 0; half < kHalves; ++half) {
      const int lane = half * kDoubleLanes;
      vdouble reward = load_doubles(&rewards[step][lane]);
      vdouble value = {};
      if (HasValues) value = load_doubles(&values[step][lane]);
      vlong counts = ~vlong{}, moves = counts;
      if (Flagged) {
        counts = load_conditions(&valid[step][lane]);
        moves = p.decay ? (vlong)(first_step[half] <= step) : counts;
        reward = counts ? reward : zero_doubles;
        if (HasValues) value = counts ? value : zero_doubles;
      }
      vdouble& next_advantage = state.next_advantage[half];
      vdouble advantage = reward + state.decay[half] * next_advantage;
      if (HasValues) advantage += gamma * state.next_value[half] - value;
      if (Flagged) {
        next_advantage = moves ? advantage : next_advantage;
        state.factor[half] = moves ? state.decay[half] * state.factor[half] : state.factor[half];
        if (HasValues) state.next_value[half] = moves ? value : state.next_value[half];
        advantage = counts ? advantage : zero_doubles;
      } else {
        next_advantage = advantage;
        state.factor[half] *= state.decay[half];
        if (HasValues) state.next_value[half] = value;
      }
      if (HasValues) store_doubles(&advantages[step][lane], advantage);
      store_doubles(&returns[step][lane], HasValues ? advantage + value : advantage);
    }
  }
}

// Up to kLanes segments, the longest first.
template <class T, bool HasValues>
void run_lanes(const ScanParams& p, const int64_t* indices, int count, bool write) {
  const auto* rewards = static_cast<const T*>(p.rewards);
  const auto* values = static_cast<const T*>(p.values);
  auto* advantages = static_cast<T*>(p.advantages);
  auto* returns = static_cast<T*>(p.returns);
  double state_of[4][kLanes] = {};
  Lane lanes[kLanes];
  int64_t begins[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    lanes[lane] = {0, 0};
    begins[lane] = 0;
    if (lane >= count) continue;
    const ScanSegment& segment = p.segments[indices[lane]];
    begins[lane] = segment.begin;
    lanes[lane].end = segment.end;
    state_of[0][lane] = segment.next_value;
    state_of[1][lane] = segment.next_advantage;
    state_of[2][lane] = 1;
    state_of[3][lane] = segment.decay;
  }
  State state;
  vdouble* const fields[4] = {state.next_value, state.next_advantage, state.factor, state.decay};
  for (int field = 0; field < 4; ++field) {
    for (int half = 0; half < kHalves; ++half) {
      fields[field][half] = load_doubles(&state_of[field][half * kDoubleLanes]);
    }
  }

  alignas(64) Tile<T> reward_tile, value_tile, advantage_tile, return_tile;
  alignas(64) Tile<int32_t> valid;
  for (bool left = true; left;) {
    left = false;
    bool whole = true;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t rest = lanes[lane].end - begins[lane];
      lanes[lane].count = rest < kSteps ? rest : kSteps;
      whole = whole && lanes[lane].count == kSteps;
      left = left || rest > 0;
    }
    if (!left) break;
    const Kept kept = p.mask || !whole ? load_mask(p.mask, lanes, valid) : Kept::all;
    if (kept == Kept::none && !p.decay) {
      for (int lane = 0; write && lane < kLanes; ++lane) {
        for (int64_t i = 1; i <= lanes[lane].count; ++i) {
          if (HasValues) advantages[lanes[lane].end - i] = 0;
          returns[lanes[lane].end - i] = 0;
        }
      }
    } else {
      load_tile(rewards, lanes, reward_tile);
      if (HasValues) load_tile(values, lanes, value_tile);
      if (kept == Kept::none) std::memset(valid, 0, sizeof valid);
      if (kept == Kept::all) {
        run_tile<T, HasValues, false>(p, state, reward_tile, value_tile, valid, lanes, advantage_tile, return_tile);
      } else {
        run_tile<T, HasValues, true>(p, state, reward_tile, value_tile, valid, lanes, advantage_tile, return_tile);
      }
      if (write) {
        if (HasValues) store_tile(advantage_tile, lanes, advantages);
        store_tile(return_tile, lanes, returns);
      }
    }
    for (Lane& lane : lanes) lane.end -= lane.count;
  }

  for (int field = 0; field < 3; ++field) {
    for (int half = 0; half < kHalves; ++half) {
      store_doubles(&state_of[field][half * kDoubleLanes], fields[field][half]);
    }
  }
  for (int lane = 0; lane < count; ++lane) {
    ScanSegment& segment = p.segments[indices[lane]];
    segment.next_value = state_of[0][lane];
    segment.next_advantage = state_of[1][lane];
    segment.factor = state_of[2][lane];
  }
}

template <class T>
void run(const ScanParams& p, const int64_t* indices, int64_t count, bool write) {
  for (int64_t first = 0; first < count; first += kLanes) {
    const int lanes = static_cast<int>(count - first < kLanes ? count - first : kLanes);
    if (p.values) {
      run_lanes<T, true>(p, indices + first, lanes, write);
    } else {
      run_lanes<T, false>(p, indices + first, lanes, write);
    }
  }
}

}  // namespace

void discounted_scan_f32(const ScanParams& params, const int64_t* indices, int64_t count, bool write) {
  run<float>(params, indices, count, write);
}

void discounted_scan_f64(const ScanParams& params, const int64_t* indices, int64_t count, bool write) {
  run<double>(params, indices, count, write);
}

}  // namespace pykern::PYKERN_SIMD
