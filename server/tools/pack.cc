#include "server/tools/pack.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <iterator>
#include <memory>
#include <system_error>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "server/base/status_macros.h"
#include "server/model/checkpoint.h"
#include "server/model/loader.h"
#include "server/model/packed.h"
#include "server/model/random_model.h"
#include "server/model/region.h"
#include "server/model/safetensors.h"

namespace mmfree {
namespace {

namespace fs = std::filesystem;

constexpr uint64_t kRandomSeed = 1;
constexpr const char* kTokenizerFile = "tokenizer.model";
// Copied as they are. Those that the input lacks are removed from the output, so that the output is
// a function of the input.
constexpr const char* kOptionalFiles[] = {"tokenizer_config.json", "special_tokens_map.json",
                                          "added_tokens.json", "generation_config.json"};

// Before the number in the name of a file that is still being written.
constexpr absl::string_view kTemporaryMark = ".tmp-";

absl::Status CannotWrite(absl::string_view path, int error) {
  return absl::FailedPreconditionError(
      absl::StrCat("cannot write ", path, ": ", std::strerror(error)));
}

std::string Join(const std::string& directory, absl::string_view name) {
  return absl::StrCat(directory, "/", name);
}

absl::Status WriteAll(int fd, absl::string_view path, absl::Span<const uint8_t> bytes) {
  constexpr size_t kLargestWrite = size_t{1} << 30;
  while (!bytes.empty()) {
    const ssize_t written = write(fd, bytes.data(), std::min(bytes.size(), kLargestWrite));
    if (written < 0) {
      if (errno == EINTR) continue;
      return CannotWrite(path, errno);
    }
    bytes.remove_prefix(static_cast<size_t>(written));
  }
  return absl::OkStatus();
}

// Puts `parts`, one after the other, under `path` in one step: readers see the old file or the new.
absl::Status ReplaceFile(const std::string& path,
                         absl::Span<const absl::Span<const uint8_t>> parts) {
  const std::string temporary = absl::StrCat(path, kTemporaryMark, getpid());
  const int fd = open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (fd < 0) return CannotWrite(temporary, errno);
  absl::Cleanup discard = [&temporary, fd] {
    close(fd);
    unlink(temporary.c_str());
  };
  for (const absl::Span<const uint8_t> part : parts) {
    MMFREE_RETURN_IF_ERROR(WriteAll(fd, temporary, part));
  }
  if (fsync(fd) != 0) return CannotWrite(temporary, errno);
  if (rename(temporary.c_str(), path.c_str()) != 0) return CannotWrite(path, errno);
  std::move(discard).Cancel();
  if (close(fd) != 0) return CannotWrite(path, errno);
  return absl::OkStatus();
}

bool HoldsPackedModel(const std::string& directory) {
  const absl::StatusOr<SafetensorsFile> file = SafetensorsFile::Open(Join(directory, kWeightsFile));
  return file.ok() && IsPacked(*file);
}

bool IsSideFile(absl::string_view name) {
  return name == kTokenizerFile || name == kConfigFile ||
         std::find(std::begin(kOptionalFiles), std::end(kOptionalFiles), name) !=
             std::end(kOptionalFiles);
}

// What a run that was killed leaves of the file it was writing.
bool IsLeftover(absl::string_view name) {
  const size_t mark = name.rfind(kTemporaryMark);
  if (mark == absl::string_view::npos) return false;
  const absl::string_view number = name.substr(mark + kTemporaryMark.size());
  return (name.substr(0, mark) == kWeightsFile || IsSideFile(name.substr(0, mark))) &&
         !number.empty() && std::all_of(number.begin(), number.end(), [](char c) {
           return absl::ascii_isdigit(static_cast<unsigned char>(c));
         });
}

std::vector<std::string> NamesIn(const std::string& directory) {
  std::vector<std::string> names;
  std::error_code error;
  for (fs::directory_iterator entry(directory, error), end; !error && entry != end;
       entry.increment(error)) {
    names.push_back(entry->path().filename().string());
  }
  return names;
}

// A killed run's output: leftovers, side files, nothing else.
bool HoldsInterruptedPack(const std::string& directory) {
  const std::vector<std::string> names = NamesIn(directory);
  return std::any_of(names.begin(), names.end(), IsLeftover) &&
         std::all_of(names.begin(), names.end(),
                     [](const std::string& name) { return IsLeftover(name) || IsSideFile(name); });
}

// Whether `output` may be written to; changes nothing.
absl::Status CheckOutput(const PackOptions& options) {
  std::error_code error;
  const fs::file_status status = fs::status(options.output, error);
  if (status.type() == fs::file_type::not_found) {
    const fs::path parent = fs::absolute(options.output, error).lexically_normal().parent_path();
    if (fs::is_directory(parent, error)) return absl::OkStatus();
    return absl::FailedPreconditionError(
        absl::StrCat(options.output, ": its parent directory does not exist"));
  }
  if (status.type() != fs::file_type::directory) {
    return absl::FailedPreconditionError(absl::StrCat(options.output, ": not a directory"));
  }
  if (fs::equivalent(options.input, options.output, error)) {
    return absl::FailedPreconditionError(
        absl::StrCat(options.output, ": the output is the input directory"));
  }
  if (options.force || fs::is_empty(options.output, error) || HoldsPackedModel(options.output) ||
      HoldsInterruptedPack(options.output)) {
    return absl::OkStatus();
  }
  return absl::AlreadyExistsError(absl::StrCat(
      options.output, ": holds something that is not a packed model; --force writes there anyway"));
}

// Read before anything is written, so that an incomplete input leaves the output alone.
struct SideFile {
  std::string name;
  std::string content;

  absl::Span<const uint8_t> bytes() const {
    return absl::MakeConstSpan(reinterpret_cast<const uint8_t*>(content.data()), content.size());
  }
};

absl::StatusOr<std::string> ReadWhole(const std::string& path) {
  MMFREE_ASSIGN_OR_RETURN(const Region file, Region::MapFile(path));
  return std::string(reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size());
}

// `config`: the text of config.json, where it is not the input's.
absl::StatusOr<std::vector<SideFile>> ReadSideFiles(const std::string& input, std::string config) {
  std::vector<SideFile> files;
  MMFREE_ASSIGN_OR_RETURN(std::string tokenizer, ReadWhole(Join(input, kTokenizerFile)));
  files.push_back({kTokenizerFile, std::move(tokenizer)});
  for (const char* const name : kOptionalFiles) {
    absl::StatusOr<std::string> content = ReadWhole(Join(input, name));
    if (absl::IsNotFound(content.status())) continue;
    MMFREE_RETURN_IF_ERROR(content.status());
    files.push_back({name, *std::move(content)});
  }
  if (config.empty()) {
    MMFREE_ASSIGN_OR_RETURN(config, ReadWhole(Join(input, kConfigFile)));
  }
  files.push_back({kConfigFile, std::move(config)});
  return files;
}

absl::Status RemoveStaleFiles(const std::string& output, absl::Span<const SideFile> files) {
  for (const char* const name : kOptionalFiles) {
    const bool wanted = std::any_of(files.begin(), files.end(),
                                    [name](const SideFile& file) { return file.name == name; });
    if (wanted) continue;
    const std::string path = Join(output, name);
    if (unlink(path.c_str()) != 0 && errno != ENOENT) return CannotWrite(path, errno);
  }
  for (const std::string& name : NamesIn(output)) {
    if (!IsLeftover(name)) continue;
    const std::string path = Join(output, name);
    if (unlink(path.c_str()) != 0 && errno != ENOENT) return CannotWrite(path, errno);
  }
  return absl::OkStatus();
}

absl::Status WriteWeights(const StoredModel& model, const std::string& path,
                          int64_t* written_bytes) {
  const std::string header = PackedHeader(model);
  std::vector<absl::Span<const uint8_t>> parts = {
      absl::MakeConstSpan(reinterpret_cast<const uint8_t*>(header.data()), header.size())};
  const std::vector<PackedTensor>& tensors = model.layout().tensors;
  for (size_t t = 0; t < tensors.size(); ++t) {
    parts.emplace_back(model.data(t), static_cast<size_t>(tensors[t].bytes));
  }
  for (const absl::Span<const uint8_t> part : parts) *written_bytes += part.size();
  return ReplaceFile(path, parts);
}

// Makes the renames durable.
absl::Status SyncDirectory(const std::string& directory) {
  const int fd = open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return CannotWrite(directory, errno);
  const absl::Cleanup close_fd = [fd] { close(fd); };
  // Some file systems cannot sync a directory and say EINVAL; there is nothing more to do there.
  if (fsync(fd) != 0 && errno != EINVAL) return CannotWrite(directory, errno);
  return absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<const StoredModel>> Load(const std::string& directory, int threads,
                                                        const ProgressFn& progress,
                                                        int64_t* input_bytes) {
  LoadOptions options;
  options.verify = true;
  options.threads = threads;
  options.progress = [&](int64_t done, int64_t total) {
    *input_bytes = total;
    if (progress) progress(done, total);
  };
  return LoadStoredModel(directory, options);
}

}  // namespace

absl::StatusOr<PackReport> Pack(const PackOptions& options) {
  MMFREE_RETURN_IF_ERROR(CheckOutput(options));
  PackReport report;
  std::shared_ptr<const StoredModel> model;
  std::string config_text;
  if (options.random_shape.empty()) {
    MMFREE_ASSIGN_OR_RETURN(
        model, Load(options.input, options.threads, options.progress, &report.input_bytes));
  } else {
    MMFREE_ASSIGN_OR_RETURN(const ModelConfig config, ConfigForShape(options.random_shape));
    config_text = config.ToJson();
    model = HashedRandomModel(config, kRandomSeed);
  }
  MMFREE_ASSIGN_OR_RETURN(const std::vector<SideFile> side_files,
                          ReadSideFiles(options.input, std::move(config_text)));

  if (mkdir(options.output.c_str(), 0755) != 0 && errno != EEXIST) {
    return CannotWrite(options.output, errno);
  }
  MMFREE_RETURN_IF_ERROR(RemoveStaleFiles(options.output, side_files));
  for (const SideFile& file : side_files) {
    MMFREE_RETURN_IF_ERROR(ReplaceFile(Join(options.output, file.name), {file.bytes()}));
    report.output_bytes += file.content.size();
    report.files.push_back(file.name);
  }
  // Last: without it the directory is no model, and with an older one the digest does not fit.
  MMFREE_RETURN_IF_ERROR(
      WriteWeights(*model, Join(options.output, kWeightsFile), &report.output_bytes));
  report.files.emplace_back(kWeightsFile);
  MMFREE_RETURN_IF_ERROR(SyncDirectory(options.output));
  report.digest = model->digest();
  report.parameters = model->parameters();
  return report;
}

absl::StatusOr<PackReport> VerifyPacked(const std::string& directory, int threads,
                                        const ProgressFn& progress) {
  // Before loading, which would quantise a published checkpoint first.
  const absl::StatusOr<Checkpoint> checkpoint = Checkpoint::Open(directory);
  if (checkpoint.ok() &&
      (checkpoint->single_file() == nullptr || !IsPacked(*checkpoint->single_file()))) {
    return absl::InvalidArgumentError(
        absl::StrCat(directory, ": a published checkpoint; only a packed model can be verified"));
  }
  PackReport report;
  MMFREE_ASSIGN_OR_RETURN(const std::shared_ptr<const StoredModel> model,
                          Load(directory, threads, progress, &report.input_bytes));
  report.digest = model->digest();
  report.parameters = model->parameters();
  return report;
}

}  // namespace mmfree
