#include "server/sampling/token_trie.h"

#include <algorithm>
#include <utility>

namespace mmfree {

TokenTrie::TokenTrie(std::vector<std::string> token_bytes) : token_bytes_(std::move(token_bytes)) {
  std::vector<int32_t> ids;
  for (size_t id = 0; id < token_bytes_.size(); ++id) {
    if (!token_bytes_[id].empty()) ids.push_back(static_cast<int32_t>(id));
  }
  std::stable_sort(ids.begin(), ids.end(),
                   [this](int32_t a, int32_t b) { return bytes(a) < bytes(b); });
  absl::string_view before;
  std::vector<int32_t> open;  // nodes from the root to the last token
  const auto close = [&](size_t depth) {
    for (; open.size() > depth; open.pop_back()) {
      nodes_[open.back()].skip = static_cast<int32_t>(nodes_.size());
    }
  };
  for (const int32_t id : ids) {
    const absl::string_view now = bytes(id);
    const size_t common = static_cast<size_t>(
        std::mismatch(before.begin(), before.end(), now.begin(), now.end()).first - before.begin());
    close(common);
    for (size_t i = common; i < now.size(); ++i) {
      open.push_back(static_cast<int32_t>(nodes_.size()));
      nodes_.push_back({static_cast<unsigned char>(now[i]), static_cast<int32_t>(i) + 1, 0,
                        static_cast<int32_t>(tokens_.size())});
    }
    tokens_.push_back(id);
    nodes_.back().tokens_end = static_cast<int32_t>(tokens_.size());
    max_depth_ = std::max(max_depth_, static_cast<int32_t>(now.size()));
    before = now;
  }
  close(0);
}

}  // namespace mmfree
