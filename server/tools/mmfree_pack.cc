// mmfree-pack: a published checkpoint in, a packed model out.
#include <unistd.h>

#include <iostream>
#include <string>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "server/tools/pack.h"
#include "server/tools/progress.h"

ABSL_FLAG(bool, verify, false, "check a packed model against its hashes instead of packing");
ABSL_FLAG(bool, force, false, "write into a directory that holds something else");
ABSL_FLAG(std::string, random, "", "write random weights of this shape");
ABSL_FLAG(int32_t, threads, 0, "threads; 0: one for each processor");

namespace {

constexpr char kHelp[] =
    R"(mmfree-pack: turns a published MatMul-free checkpoint into the packed form that mmfree-server maps.

  mmfree-pack [--force] [--threads=N] IN_DIR OUT_DIR
  mmfree-pack --verify [--threads=N] DIR
  mmfree-pack --random=SHAPE TOKENIZER_DIR OUT_DIR

IN_DIR holds config.json, tokenizer.model and model.safetensors, or shards with
model.safetensors.index.json (F32, F16 or BF16). OUT_DIR gets config.json and the tokenizer's files
as they are, and a model.safetensors with ternary weights at 2 bits each, about an eighth of fp16
without the embeddings. The same input gives the same bytes. A packed IN_DIR is verified and written
again. Files in OUT_DIR are replaced by rename, so a server that runs on the old ones is not
disturbed.

  --force      write even if OUT_DIR holds something that is not a packed model
  --random=SHAPE
               write seeded random weights of a published shape (tales, 370m, 1.3b, 2.7b or 13b)
               with the tokenizer of TOKENIZER_DIR, to try and measure a server without the
               checkpoint: it is as fast as the real one and says nothing sensible
  --threads=N  threads to work with; default 0: one for each processor
  --verify     read a packed model whole and check every tensor against its SHA-256

Exit status: 0 done; 1 wrong command line; 2 the input is missing, damaged or not supported;
3 the output exists and is something else, or cannot be written.
)";

constexpr int kExitUsage = 1;
constexpr int kExitInput = 2;
constexpr int kExitOutput = 3;

bool WantsHelp(int argc, char** argv) {
  for (int k = 1; k < argc; ++k) {
    const absl::string_view argument = argv[k];
    if (argument == "--") return false;
    if (argument == "--help" || argument == "-help" || argument == "-h") return true;
  }
  return false;
}

int Fail(const absl::Status& status) {
  std::cerr << "mmfree-pack: " << status.message() << "\n";
  return absl::IsAlreadyExists(status) || absl::IsFailedPrecondition(status) ? kExitOutput
                                                                             : kExitInput;
}

int Usage(absl::string_view problem) {
  std::cerr << "mmfree-pack: " << problem << "; --help says more\n";
  return kExitUsage;
}

double Megabytes(int64_t bytes) { return static_cast<double>(bytes) / 1e6; }

}  // namespace

int main(int argc, char** argv) {
  if (WantsHelp(argc, argv)) {
    std::cout << kHelp;
    return 0;
  }
  const std::vector<char*> arguments = absl::ParseCommandLine(argc, argv);
  const bool verify = absl::GetFlag(FLAGS_verify);
  if (absl::GetFlag(FLAGS_threads) < 0) return Usage("--threads must be at least 0");
  const std::string random = absl::GetFlag(FLAGS_random);
  if (verify && !random.empty()) return Usage("--verify and --random exclude each other");
  if (verify && arguments.size() != 2) return Usage("--verify takes one directory");
  if (!verify && arguments.size() != 3) return Usage("expected IN_DIR and OUT_DIR");

  mmfree::Progress progress(&std::cerr, isatty(STDERR_FILENO) != 0,
                            verify ? "verifying" : "packing");
  const auto update = [&](int64_t done, int64_t total) { progress.Update(done, total); };
  const absl::Time start = absl::Now();
  if (verify) {
    const absl::StatusOr<mmfree::PackReport> report =
        mmfree::VerifyPacked(arguments[1], absl::GetFlag(FLAGS_threads), update);
    if (!report.ok()) return Fail(report.status());
    std::cout << absl::StrFormat("digest      %s\nparameters  %d\nverified    %.1f MB in %.2f s\n",
                                 report->digest, report->parameters, Megabytes(report->input_bytes),
                                 absl::ToDoubleSeconds(absl::Now() - start));
    return 0;
  }
  mmfree::PackOptions options;
  options.input = arguments[1];
  options.random_shape = random;
  options.output = arguments[2];
  options.force = absl::GetFlag(FLAGS_force);
  options.threads = absl::GetFlag(FLAGS_threads);
  options.progress = update;
  const absl::StatusOr<mmfree::PackReport> report = mmfree::Pack(options);
  if (!report.ok()) return Fail(report.status());
  std::cout << absl::StrFormat(
      "digest      %s\nparameters  %d\nread        %.1f MB\nwritten     %.1f MB in %.2f s\n"
      "files       %s\n",
      report->digest, report->parameters, Megabytes(report->input_bytes),
      Megabytes(report->output_bytes), absl::ToDoubleSeconds(absl::Now() - start),
      absl::StrJoin(report->files, " "));
  return 0;
}
