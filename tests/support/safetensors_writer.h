// Writes safetensors files, right ones and, with the raw parts, wrong ones. Written from the
// format's description and not from the reader, so that the two check each other.
#ifndef MMFREE_TESTS_SUPPORT_SAFETENSORS_WRITER_H_
#define MMFREE_TESTS_SUPPORT_SAFETENSORS_WRITER_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/string_view.h"
#include "nlohmann/json.hpp"

namespace mmfree {

// The length, the header and the data, whatever they are.
inline std::string RawSafetensors(absl::string_view header, absl::string_view data) {
  std::string file;
  for (int k = 0; k < 8; ++k) {
    file.push_back(static_cast<char>((static_cast<uint64_t>(header.size()) >> (8 * k)) & 0xff));
  }
  file.append(header.data(), header.size());
  file.append(data.data(), data.size());
  return file;
}

class SafetensorsWriter {
 public:
  void AddMetadata(const std::string& key, const std::string& value) {
    header_["__metadata__"][key] = value;
  }
  // Appends a tensor; `bytes` should be as long as dtype and shape say.
  void Add(const std::string& name, const std::string& dtype, const std::vector<int64_t>& shape,
           absl::string_view bytes) {
    header_[name] = {{"dtype", dtype},
                     {"shape", shape},
                     {"data_offsets", {data_.size(), data_.size() + bytes.size()}}};
    data_.append(bytes.data(), bytes.size());
  }
  // The header as it would be written, for tests that damage it.
  nlohmann::json& header() { return header_; }
  const std::string& data() const { return data_; }

  std::string Finish() const {
    std::string header = header_.dump();
    header.append((8 - header.size() % 8) % 8, ' ');
    return RawSafetensors(header, data_);
  }

 private:
  nlohmann::json header_ = nlohmann::json::object();
  std::string data_;
};

}  // namespace mmfree

#endif  // MMFREE_TESTS_SUPPORT_SAFETENSORS_WRITER_H_
