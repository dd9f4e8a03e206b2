// The count of an optimizer's steps, kept where the gradients are: one thread, one launch.
#include "engine.h"
#include "walk.h"

namespace fastclip::cuda {
namespace {

struct TallyParams {
  const double* before;  // in, [5]: steps, clipped, skipped, skipped in a row, and with NaN or Inf
  double* after;         // out, [5]
  Scalar factor, skip, found;
};

__global__ void tally_kernel(FASTCLIP_PARAMETERS(TallyParams) a) {
  if (threadIdx.x > 0) return;
  const bool skipped = read_scalar(a.skip) != 0.0;
  const bool clipped = !skipped && read_scalar(a.factor) != 1.0;
  a.after[0] = a.before[0] + 1.0;
  a.after[1] = a.before[1] + (clipped ? 1.0 : 0.0);
  a.after[2] = a.before[2] + (skipped ? 1.0 : 0.0);
  a.after[3] = skipped ? a.before[3] + 1.0 : 0.0;
  a.after[4] = a.before[4] + (read_scalar(a.found) != 0.0 ? 1.0 : 0.0);
}

}  // namespace

void tally(const double* before, const Scalar& factor, const Scalar& skip, const Scalar& found, double* after,
           const Place& place) {
  const DeviceGuard guard(place.device);
  const TallyParams params{before, after, factor, skip, found};
  launch(tally_kernel, 1, kWarpSize, place.stream, params, "fastclip's tally kernel");
}

}  // namespace fastclip::cuda
