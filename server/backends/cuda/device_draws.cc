#include "server/backends/cuda/device_draws.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "absl/base/casts.h"
#include "server/base/status_macros.h"

namespace mmfree::cuda {
namespace {

// Masks that stay on the device, of every request: at most this many bytes, and no more than this.
constexpr int64_t kMaskBytes = int64_t{32} << 20;
constexpr int64_t kMaxMasks = 4096;
constexpr int64_t kMinMasks = 16;
// Ids with a bias, a penalty or that end the output: of each row on average, and of them all.
constexpr int64_t kEntriesPerRow = 1024;
constexpr int64_t kMinEntries = 1 << 14;
constexpr int64_t kMaxEntries = 1 << 20;

}  // namespace

DeviceDraws::DeviceDraws(const Sizes& sizes, const LaunchContext& context)
    : sizes_(sizes), context_(context) {
  const int64_t vocab = sizes.vocab_size;
  mask_words_ = RoundUp(CeilDiv(vocab, 32), 4);
  const int64_t mask_bytes = mask_words_ * static_cast<int64_t>(sizeof(uint32_t));
  num_masks_ = static_cast<int32_t>(std::clamp(kMaskBytes / mask_bytes, kMinMasks, kMaxMasks));
  max_draws_ = sizes.max_step_tokens;
  max_entries_ = static_cast<int32_t>(std::clamp(
      kEntriesPerRow * std::min(sizes.num_slots, sizes.max_step_tokens), kMinEntries, kMaxEntries));
  in_shared_ = DrawFitsShared(vocab, context.shared_bytes_per_block);
}

DeviceDraws::Tables DeviceDraws::TakeTables(Carver& carver) const {
  Tables tables;
  tables.inputs = carver.Take<DrawInput>(max_draws_);
  tables.entries = carver.Take<DrawEntry>(max_entries_);
  return tables;
}

int64_t DeviceDraws::BindDevice(std::byte* base) {
  Carver carver(base);
  device_ = TakeTables(carver);
  masks_ = carver.Take<uint32_t>(num_masks_ * mask_words_);
  if (!in_shared_) scratch_ = carver.Take<float>(context_.num_sms * sizes_.vocab_size);
  return carver.bytes();
}

int64_t DeviceDraws::BindPinned(std::byte* base) {
  Carver carver(base);
  staging_ = TakeTables(carver);
  new_masks_ = carver.Take<uint32_t>(kMaxNewMasks * mask_words_);
  out_ = carver.Take<DrawOutput>(max_draws_);
  return carver.bytes();
}

int64_t DeviceDraws::Bytes(const Sizes& sizes, const LaunchContext& context) {
  return DeviceDraws(sizes, context).BindDevice(nullptr);
}

absl::StatusOr<DeviceDraws> DeviceDraws::Create(const Sizes& sizes, const LaunchContext& context) {
  DeviceDraws draws(sizes, context);
  MMFREE_ASSIGN_OR_RETURN(draws.memory_, DeviceBuffer::Allocate(draws.BindDevice(nullptr)));
  draws.BindDevice(draws.memory_.data());
  MMFREE_ASSIGN_OR_RETURN(draws.pinned_, PinnedBuffer::Allocate(draws.BindPinned(nullptr)));
  draws.BindPinned(draws.pinned_.data());
  cudaStream_t copies = nullptr;
  MMFREE_CUDA_RETURN_IF_ERROR(cudaStreamCreateWithFlags(&copies, cudaStreamNonBlocking));
  draws.copies_ = Stream(copies);
  cudaEvent_t uploaded = nullptr;
  MMFREE_CUDA_RETURN_IF_ERROR(cudaEventCreateWithFlags(&uploaded, cudaEventDisableTiming));
  draws.uploaded_ = Event(uploaded);
  draws.cache_ = std::make_unique<MaskCache>(draws.num_masks_);
  return draws;
}

void DeviceDraws::Begin() {
  cache_->BeginStep();
  draws_.clear();
  num_entries_ = 0;
  to_upload_.clear();
}

bool DeviceDraws::PlaceMask(const std::shared_ptr<const TokenMask>& mask, int32_t* place) {
  *place = kNoMask;
  if (mask == nullptr) return true;
  const auto staged = static_cast<int32_t>(to_upload_.size());
  const MaskCache::Found found = cache_->Find(mask, staged < kMaxNewMasks);
  if (found.place == MaskCache::kFull) return false;
  *place = found.place;
  if (found.is_new) {
    const absl::Span<const uint64_t> words = mask->words();
    memcpy(new_masks_ + staged * mask_words_, words.data(), words.size() * sizeof(uint64_t));
    to_upload_.push_back({found.place, staged});
  }
  return true;
}

bool DeviceDraws::Add(int32_t head, const SamplingParams& params, uint64_t position) {
  TokenDraw draw;
  if (size() == max_draws_ || !params.sampler->Describe(params, &draw)) return false;
  const size_t entries = draw.ends.size() + draw.banned.size() + draw.bias.size() +
                         draw.window.size() + draw.emitted.size();
  if (draw.nothing || draw.top_logprobs > kMaxDrawAlternatives ||
      entries > static_cast<size_t>(max_entries_ - num_entries_)) {
    return false;
  }
  DrawInput in = {};
  if (!PlaceMask(draw.allowed, &in.allowed) || !PlaceMask(draw.constraint, &in.constraint)) {
    return false;
  }
  in.seed = params.seed;
  in.position = position;
  in.temperature = params.temperature;
  in.candidate = params.candidate;
  in.repetition = draw.penalties.repetition;
  in.frequency = draw.penalties.frequency;
  in.presence = draw.penalties.presence;
  const FilterOptions& filters = draw.filters;
  in.top_k = filters.top_k;
  in.typical_share = filters.typical_p < 1.0f ? FixedShare(filters.typical_p) : kShareOff;
  in.top_p_share = filters.top_p < 1.0f ? FixedShare(filters.top_p) : kShareOff;
  in.min_p_share = filters.min_p > 0.0f ? FixedShare(filters.min_p) : kShareOff;
  in.head = head;
  in.may_end = draw.may_end ? 1 : 0;
  in.logprobs = static_cast<uint8_t>(draw.logprobs);
  in.top_logprobs = static_cast<uint16_t>(draw.top_logprobs);
  in.entries = num_entries_;
  in.ends = static_cast<int32_t>(draw.ends.size());
  in.banned = static_cast<int32_t>(draw.banned.size());
  in.bias = static_cast<int32_t>(draw.bias.size());
  in.window = static_cast<int32_t>(draw.window.size());
  in.emitted = static_cast<int32_t>(draw.emitted.size());
  DrawEntry* entry = staging_.entries + num_entries_;
  for (const int32_t id : draw.ends) *entry++ = {id, 0};
  for (const int32_t id : draw.banned) *entry++ = {id, 0};
  for (const auto& [id, bias] : draw.bias) *entry++ = {id, absl::bit_cast<uint32_t>(bias)};
  for (const TokenCount& seen : draw.window) *entry++ = {seen.token, 0};
  for (const TokenCount& seen : draw.emitted) {
    *entry++ = {seen.token, static_cast<uint32_t>(seen.count)};
  }
  num_entries_ += static_cast<int32_t>(entries);
  staging_.inputs[size()] = in;
  draws_.push_back({head, draw.top_logprobs});
  return true;
}

absl::Status DeviceDraws::Upload() {
  if (draws_.empty() && to_upload_.empty()) return absl::OkStatus();
  const auto copy = [this](void* to, const void* from, size_t bytes) -> absl::Status {
    if (bytes == 0) return absl::OkStatus();
    MMFREE_CUDA_RETURN_IF_ERROR(
        cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, copies_.get()));
    return absl::OkStatus();
  };
  for (const NewMask& mask : to_upload_) {
    MMFREE_RETURN_IF_ERROR(copy(masks_ + mask.place * mask_words_,
                                new_masks_ + mask.staged * mask_words_,
                                mask_words_ * sizeof(uint32_t)));
  }
  MMFREE_RETURN_IF_ERROR(copy(device_.inputs, staging_.inputs, draws_.size() * sizeof(DrawInput)));
  MMFREE_RETURN_IF_ERROR(copy(device_.entries, staging_.entries, num_entries_ * sizeof(DrawEntry)));
  MMFREE_CUDA_RETURN_IF_ERROR(cudaEventRecord(uploaded_.get(), copies_.get()));
  MMFREE_CUDA_RETURN_IF_ERROR(cudaStreamWaitEvent(context_.stream, uploaded_.get(), 0));
  return absl::OkStatus();
}

absl::Status DeviceDraws::Launch(const float* logits, int64_t ld, const HeadStats* stats,
                                 int32_t first, int32_t rows) {
  const auto by_head = [](const Added& draw, int32_t head) { return draw.head < head; };
  const auto begin = std::lower_bound(draws_.begin(), draws_.end(), first, by_head);
  const auto end = std::lower_bound(begin, draws_.end(), first + rows, by_head);
  if (begin == end) return absl::OkStatus();
  const int64_t skipped = begin - draws_.begin();
  DrawArgs args;
  args.logits = logits;
  args.ld = ld;
  args.vocab = static_cast<int32_t>(sizes_.vocab_size);
  args.first_head = first;
  args.stats = stats;
  args.inputs = device_.inputs + skipped;
  args.entries = device_.entries;
  args.masks = masks_;
  args.mask_words = mask_words_;
  args.count = static_cast<int32_t>(end - begin);
  args.scratch = scratch_;
  args.out = out_ + skipped;
  MMFREE_CUDA_RETURN_IF_ERROR(LaunchDraw(args, context_));
  return absl::OkStatus();
}

SampledToken DeviceDraws::Result(int32_t index) const {
  const DrawOutput& out = out_[index];
  SampledToken sampled;
  sampled.token = out.token;
  sampled.logprob = out.logprob;
  if (out.token >= 0 && draws_[index].top_logprobs > 0) {
    sampled.top =
        std::make_shared<const std::vector<TokenAlternative>>(out.top, out.top + out.num_top);
  }
  return sampled;
}

}  // namespace mmfree::cuda
