// drm: Decom-Renorm-Merge (merge/methods/drm.cc) of adapters, in the space of their factors. The
// merge is a product of vectors of the joint basis and merged rows; it is cut to a rank.
#include "merge/methods/adapters/common/elementwise.h"
#include "merge/methods/adapters/common/joint_tasks.h"
#include "merge/methods/adapters/common/tasks.h"

namespace pewter::adapter_methods {

absl::Span<const AdapterMethod> drm() {
  static const AdapterMethod methods[] = {{
      .method =
          {.name = "drm",
           .title = "Decom-Renorm-Merge",
           .summary =
               "aligns adapters in a joint singular basis, normalises and trims their "
               "singular matrices, merges them by elected signs and cuts the merge to a rank",
           .formula =
               "D_i = s_i B_i A_i; [D_1 ... D_T] = U S [V_1 ... V_T]^T (vertical: of D_i^T); X_i = "
               "rows of S V_i^T whose entries, with the rows scaled to norm 1, are among the "
               "density largest of all; m = sign(sum_i X_i); B A ~ U mean_{X_i != 0, sign X_i = m} "
               "weight_i X_i",
           .reference = "https://arxiv.org/abs/2505.23117",
           .params = adapters::JointParams()},
      .rank = AdapterMethod::Rank::kSvd,
      .elementwise = {.elect_sign = true},
      .factors = &adapters::MakeDrmTask,
  }};
  return methods;
}

}  // namespace pewter::adapter_methods
