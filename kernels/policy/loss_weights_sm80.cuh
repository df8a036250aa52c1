// What each token counts in the aggregate, as a tensor.
#pragma once

#include "kernels/policy/loss_totals.cuh"

namespace pykern {

template <class T>
__global__ void __launch_bounds__(kLossThreads) policy_loss_token_weights_kernel(LossArguments<T> arguments) {
  const LossParams& p = arguments.params;
  const LossShares<T> shares(arguments);
  for (int64_t item = blockIdx.x; item < p.sequences * p.grid.parts; item += gridDim.x) {
    const LossPart part = find_part(p, item);
    if (part.begin >= part.end) continue;
    const T share = static_cast<T>(shares.of_token(part));
    const PartPacks packs(p, part, arguments.packs);
    for (uint32_t pack = threadIdx.x; pack < packs.end(); pack += kLossThreads) {
      const TokenBits valid = packs.unmasked(pack);
      FourTokens<T> weights;
#pragma unroll
      for (int i = 0; i < kThreadTokens; ++i) weights[i] = is_wanted(valid, i) ? share : T(0);
      packs.write(p.coefficient, pack, weights);
    }
  }
}

}  // namespace pykern
