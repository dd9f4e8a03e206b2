// The count of an optimizer's steps, kept where the gradients are: one thread, one launch.
#include "engine.h"
#include "walk.h"

namespace fastclip::cuda {
namespace {

struct TallyParams {
  const double* before;  // in, [4]: steps, clipped, skipped, and skipped in a row
  double* after;         // out, [4]
  Scalar factor, skip;
};

__global__ void tally_kernel(FASTCLIP_PARAMETERS(TallyParams) a) {
  if (threadIdx.x > 0) return;
  const bool skipped = read_scalar(a.skip) != 0.0;
  const bool clipped = !skipped && read_scalar(a.factor) != 1.0;
  a.after[0] = a.before[0] + 1.0;
  a.after[1] = a.before[1] + (clipped ? 1.0 : 0.0);
  a.after[2] = a.before[2] + (skipped ? 1.0 : 0.0);
  a.after[3] = skipped ? a.before[3] + 1.0 : 0.0;
}

}  // namespace

void tally(const double* before, const Scalar& factor, const Scalar& skip, double* after, const Place& place) {
  const DeviceGuard guard(place.device);
  launch(tally_kernel, 1, kWarpSize, place.stream, TallyParams{before, after, factor, skip}, "fastclip's tally kernel");
}

}  // namespace fastclip::cuda
