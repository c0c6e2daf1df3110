// What mmfree-pack does, without its command line.
#ifndef MMFREE_SERVER_TOOLS_PACK_H_
#define MMFREE_SERVER_TOOLS_PACK_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/model/model.h"

namespace mmfree {

struct PackOptions {
  std::string input;  // model directory, either form
  // A shape of ConfigForShape: the weights are random instead of the input's, of which only the
  // tokenizer is used. Empty: off.
  std::string random_shape;
  std::string output;  // directory to write; made when absent, its parent must exist
  // Write even where a directory holds something that is not a packed model.
  bool force = false;
  int threads = 0;  // 0: one for each processor
  ProgressFn progress = nullptr;
};

struct PackReport {
  std::string digest;
  int64_t parameters = 0;
  int64_t input_bytes = 0;   // safetensors files of the input; 0 when random
  int64_t output_bytes = 0;  // every file written
  std::vector<std::string> files;
};

// Writes the packed form of `input` to `output` with the tokenizer's files. The bytes depend on the
// input (or the random shape) alone. A packed input is verified and written again. Each file is
// written under a temporary name, synced and renamed, the weights last: an interrupted run leaves
// no half-written model under a final name, and a server that has the old file mapped keeps it.
//
// Errors of the input are those of Model::Load. Errors of the output: ALREADY_EXISTS when it holds
// something else and `force` is off; FAILED_PRECONDITION when it is the input, its parent is
// missing or it cannot be written.
absl::StatusOr<PackReport> Pack(const PackOptions& options);

// Reads a packed model whole and checks every tensor against its SHA-256. INVALID_ARGUMENT also for
// a directory in the published form, which has nothing to check against.
absl::StatusOr<PackReport> VerifyPacked(const std::string& directory, int threads,
                                        const ProgressFn& progress);

}  // namespace mmfree

#endif  // MMFREE_SERVER_TOOLS_PACK_H_
