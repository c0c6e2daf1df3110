// The packed form: equal to the published form it was made from, and every way it can be wrong.
#include "server/model/packed.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "server/model/loader.h"
#include "server/model/model.h"
#include "server/model/sha256.h"
#include "tests/support/safetensors_writer.h"
#include "tests/support/status_is.h"
#include "tests/support/temp_directory.h"
#include "tests/support/tiny_checkpoint.h"

namespace mmfree {
namespace {

using nlohmann::json;
using testing::AllOf;
using testing::HasSubstr;

constexpr absl::StatusCode kInvalid = absl::StatusCode::kInvalidArgument;

std::string PackedBytes(const StoredModel& model) {
  std::string file = PackedHeader(model);
  for (size_t t = 0; t < model.layout().tensors.size(); ++t) {
    file.append(reinterpret_cast<const char*>(model.data(t)),
                static_cast<size_t>(model.layout().tensors[t].bytes));
  }
  return file;
}

// A packed file taken apart, to be damaged and put together again.
struct PackedFile {
  explicit PackedFile(const std::string& file) {
    uint64_t length = 0;
    for (int k = 7; k >= 0; --k) length = length << 8 | static_cast<uint8_t>(file[k]);
    header = json::parse(file.substr(8, length));
    data = file.substr(8 + length);
  }
  std::string Finish() const {
    std::string text = header.dump();
    text.append((64 - (8 + text.size()) % 64) % 64, ' ');
    return RawSafetensors(text, data);
  }
  json header;
  std::string data;
};

class PackedTest : public testing::Test {
 protected:
  void SetUp() override {
    tiny_.Write(published_, "F16", 2);
    absl::StatusOr<std::shared_ptr<const StoredModel>> model =
        LoadStoredModel(published_.path(), LoadOptions());
    ASSERT_THAT(model, IsOk());
    model_ = *std::move(model);
    WriteFile(packed_.File("config.json"), tiny_.json().dump());
  }

  absl::StatusOr<std::shared_ptr<const Model>> LoadBytes(const std::string& file,
                                                         bool verify = false) {
    // By rename, as the format asks: an earlier model of the test may still be mapped.
    WriteFile(packed_.File("new"), file);
    std::filesystem::rename(packed_.File("new"), packed_.File("model.safetensors"));
    LoadOptions options;
    options.verify = verify;
    return Model::Load(packed_.path(), options);
  }
  absl::Status LoadDamaged(const PackedFile& file, bool verify = false) {
    return LoadBytes(file.Finish(), verify).status();
  }

  TinyCheckpoint tiny_{TinyCheckpoint::OddConfig()};
  const TempDirectory published_;
  const TempDirectory packed_;
  std::shared_ptr<const StoredModel> model_;
};

TEST_F(PackedTest, EqualsThePublishedFormForEveryDtype) {
  for (const char* const dtype : {"F32", "F16", "BF16"}) {
    const TempDirectory published;
    tiny_.Write(published, dtype, 3);
    const auto from = LoadStoredModel(published.path(), LoadOptions());
    ASSERT_THAT(from, IsOk());
    const auto loaded = LoadBytes(PackedBytes(**from), /*verify=*/true);
    ASSERT_THAT(loaded, IsOk());
    const auto& to = dynamic_cast<const StoredModel&>(**loaded);
    EXPECT_TRUE(to.packed());
    EXPECT_FALSE((*from)->packed());
    EXPECT_EQ(to.digest(), (*from)->digest());
    EXPECT_EQ(to.config(), (*from)->config());
    EXPECT_EQ(to.embedding().dtype, (*from)->embedding().dtype);
    EXPECT_EQ(PackedBytes(to), PackedBytes(**from));
  }
}

TEST_F(PackedTest, WeightsAreReadInPlaceAndAligned) {
  const auto loaded = LoadBytes(PackedBytes(*model_));
  ASSERT_THAT(loaded, IsOk());
  for (const LayerWeights& layer : (*loaded)->layers()) {
    EXPECT_EQ(reinterpret_cast<uintptr_t>(layer.i.codes) % 64, 0u);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(layer.down.codes) % 64, 0u);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(layer.lower_bound.data()) % 64, 0u);
  }
  EXPECT_EQ(reinterpret_cast<uintptr_t>((*loaded)->embedding().data) % 64, 0u);
}

TEST_F(PackedTest, TheHeaderIsPaddedAndWithoutBlanks) {
  const std::string header = PackedHeader(*model_);
  EXPECT_EQ(header.size() % 64, 0u);
  const size_t end = header.find_last_not_of(' ');
  EXPECT_LT(header.size() - end, 65u);
  EXPECT_EQ(header.substr(8, end - 7).find(' '), std::string::npos);
  const PackedFile file(PackedBytes(*model_));
  EXPECT_EQ(file.header["__metadata__"]["format"], "mmfree-packed");
  EXPECT_EQ(file.header["__metadata__"]["format_version"], "1");
  EXPECT_EQ(file.header["__metadata__"]["digest"], model_->digest());
  EXPECT_EQ(std::stof(file.header["__metadata__"]["scale:lm_head.weight"].get<std::string>()),
            model_->lm_head().scale);
}

TEST_F(PackedTest, TheDigestIsTheDocumentedText) {
  std::string text =
      "mmfree model 1\nvocab_size 37\nhidden_size 20\nintermediate_size 75\nnum_hidden_layers 3\n"
      "rms_norm_eps 358637bd\nuse_lower_bound 1\nbos_token_id 1\neos_token_id 2\n";
  const std::string bytes = PackedBytes(*model_);
  const PackedFile file(bytes);
  for (size_t t = 0; t < model_->layout().tensors.size(); ++t) {
    const PackedTensor& tensor = model_->layout().tensors[t];
    const std::string dtype = file.header[tensor.name]["dtype"];
    const int64_t begin = file.header[tensor.name]["data_offsets"][0];
    const int64_t end = file.header[tensor.name]["data_offsets"][1];
    text += tensor.name + " " + dtype + " " +
            Sha256Hex(absl::string_view(file.data).substr(begin, end - begin));
    if (dtype == "U8") {
      const float scale = model_->scale(t);
      uint32_t bits;
      memcpy(&bits, &scale, sizeof(bits));
      char hex[16];
      snprintf(hex, sizeof(hex), " %08x", bits);
      text += hex;
    }
    text += "\n";
  }
  EXPECT_EQ(Sha256Hex(text), model_->digest());
}

TEST_F(PackedTest, AnotherOrderOfTensorsLoadsAndPacksBackToTheSameBytes) {
  const std::string good = PackedBytes(*model_);
  const PackedFile file(good);
  const auto& tensors = model_->layout().tensors;
  PackedFile reordered(good);
  reordered.data.clear();
  const auto append = [&](const PackedTensor& tensor) {
    reordered.header[tensor.name]["data_offsets"] = {
        reordered.data.size(), reordered.data.size() + static_cast<size_t>(tensor.bytes)};
    reordered.data += file.data.substr(tensor.offset, tensor.bytes);
  };
  for (size_t t = tensors.size() - 1; t-- > 0;) append(tensors[t]);
  append(tensors.back());
  const auto loaded = LoadBytes(reordered.Finish(), /*verify=*/true);
  ASSERT_THAT(loaded, IsOk());
  EXPECT_EQ(PackedBytes(dynamic_cast<const StoredModel&>(**loaded)), good);
}

TEST_F(PackedTest, TruncatedAndOversizedFilesAreRefused) {
  const std::string good = PackedBytes(*model_);
  EXPECT_THAT(LoadBytes(good.substr(0, good.size() - 1)),
              StatusIs(kInvalid, AllOf(HasSubstr("model.safetensors"), HasSubstr("truncated"))));
  EXPECT_THAT(LoadBytes(good + "x"), StatusIs(kInvalid, HasSubstr("oversized")));
  EXPECT_THAT(LoadBytes(good.substr(0, 100)), StatusIs(kInvalid, HasSubstr("truncated")));
  EXPECT_THAT(LoadBytes(""), StatusIs(kInvalid, HasSubstr("truncated")));
}

TEST_F(PackedTest, VersionsOtherThanOursAreRefused) {
  PackedFile file(PackedBytes(*model_));
  file.header["__metadata__"]["format_version"] = "2";
  EXPECT_THAT(LoadDamaged(file),
              StatusIs(absl::StatusCode::kUnimplemented,
                       HasSubstr("packed format version \"2\" is not supported, only \"1\"")));
  file.header["__metadata__"].erase("format_version");
  EXPECT_THAT(LoadDamaged(file),
              StatusIs(kInvalid, HasSubstr("__metadata__ \"format_version\": is missing")));
}

TEST_F(PackedTest, EveryMissingTensorIsNamedAndNoOtherIsTaken) {
  const std::string good = PackedBytes(*model_);
  for (const PackedTensor& tensor : model_->layout().tensors) {
    PackedFile file(good);
    file.header["other"] = file.header[tensor.name];
    file.header.erase(tensor.name);
    EXPECT_THAT(LoadDamaged(file),
                StatusIs(kInvalid, HasSubstr("tensor \"" + tensor.name + "\": is missing")));
  }
  PackedFile file(good);
  file.header["other"] = {
      {"dtype", "U8"}, {"shape", {1}}, {"data_offsets", {file.data.size(), file.data.size() + 1}}};
  file.data += 'x';
  EXPECT_THAT(LoadDamaged(file),
              StatusIs(kInvalid, HasSubstr("tensor \"other\": not part of a packed model")));
}

TEST_F(PackedTest, EveryWrongDtypeAndShapeIsNamed) {
  const std::string good = PackedBytes(*model_);
  for (const PackedTensor& tensor : model_->layout().tensors) {
    PackedFile file(good);
    const std::string dtype = file.header[tensor.name]["dtype"];
    const int64_t bytes = tensor.bytes;
    file.header[tensor.name]["shape"] = {bytes};
    file.header[tensor.name]["dtype"] = "U8";
    EXPECT_THAT(
        LoadDamaged(file),
        StatusIs(kInvalid, HasSubstr("tensor \"" + tensor.name + "\": " +
                                     (dtype == "U8" ? "shape: expected [" : "dtype: expected "))));
  }
  PackedFile file(good);
  file.header["lm_head.weight"]["shape"] = {5, 128};
  EXPECT_THAT(LoadDamaged(file),
              StatusIs(kInvalid, HasSubstr("shape: expected [10, 64], got [5, 128]")));
}

TEST_F(PackedTest, AMisalignedTensorIsRefused) {
  PackedFile file(PackedBytes(*model_));
  const std::string text = file.header.dump();
  std::string padded = text;
  padded.append((64 - (8 + text.size()) % 64) % 64 + 8, ' ');
  EXPECT_THAT(LoadBytes(RawSafetensors(padded, file.data)),
              StatusIs(kInvalid, HasSubstr("does not begin at a multiple of 64 bytes")));
}

TEST_F(PackedTest, ScalesThatAreMissingOrNotPositiveNumbersAreRefused) {
  const std::string good = PackedBytes(*model_);
  const std::string key = "scale:model.layers.1.mlp.down_proj.weight";
  PackedFile file(good);
  file.header["__metadata__"].erase(key);
  EXPECT_THAT(LoadDamaged(file), StatusIs(kInvalid, HasSubstr("\"" + key + "\": is missing")));
  for (const char* const bad :
       {"", "x", "0", "-0.5", "nan", "inf", "1e999", "0.5 ", " 0.5", "0.5x", "+0.5", "0x1p-1"}) {
    file.header["__metadata__"][key] = bad;
    EXPECT_THAT(LoadDamaged(file),
                StatusIs(kInvalid, HasSubstr("\"" + key + "\": expected a positive finite number")))
        << bad;
  }
  file.header["__metadata__"][key] = "0.5";
  EXPECT_THAT(LoadDamaged(file), StatusIs(kInvalid, HasSubstr("was changed after packing")));
}

TEST_F(PackedTest, HashesThatAreMissingMalformedOrChangedAreRefused) {
  const std::string good = PackedBytes(*model_);
  const std::string key = "sha256:model.norm.weight";
  PackedFile file(good);
  file.header["__metadata__"].erase(key);
  EXPECT_THAT(LoadDamaged(file), StatusIs(kInvalid, HasSubstr("\"" + key + "\": is missing")));
  for (const std::string& bad : {std::string("abc"), std::string(64, 'G'), std::string(64, 'A')}) {
    file.header["__metadata__"][key] = bad;
    EXPECT_THAT(
        LoadDamaged(file),
        StatusIs(kInvalid, HasSubstr("\"" + key + "\": expected 64 lower-case hex digits")));
  }
  file.header["__metadata__"][key] = std::string(64, 'a');
  EXPECT_THAT(LoadDamaged(file), StatusIs(kInvalid, HasSubstr("was changed after packing")));
  PackedFile digest(good);
  digest.header["__metadata__"].erase("digest");
  EXPECT_THAT(LoadDamaged(digest), StatusIs(kInvalid, HasSubstr("\"digest\": is missing")));
}

TEST_F(PackedTest, AConfigThatWasChangedAfterPackingIsNoticed) {
  const std::string good = PackedBytes(*model_);
  tiny_.json()["eos_token_id"] = 3;
  WriteFile(packed_.File("config.json"), tiny_.json().dump());
  EXPECT_THAT(LoadBytes(good), StatusIs(kInvalid, HasSubstr("was changed after packing")));
}

TEST_F(PackedTest, NonFiniteVectorsAreRefusedEvenWithoutVerify) {
  for (const PackedTensor& tensor : model_->layout().tensors) {
    if (tensor.kind != PackedTensor::Kind::kVector) continue;
    PackedFile file(PackedBytes(*model_));
    memcpy(file.data.data() + tensor.offset, "\x00\x00\xc0\x7f", 4);
    EXPECT_THAT(LoadDamaged(file),
                StatusIs(kInvalid, HasSubstr("\"" + tensor.name + "\": has a value that is")));
  }
}

TEST_F(PackedTest, VerifyFindsOneFlippedBitInAnyTensor) {
  const std::string good = PackedBytes(*model_);
  ASSERT_THAT(LoadBytes(good, /*verify=*/true), IsOk());
  for (const PackedTensor& tensor : model_->layout().tensors) {
    PackedFile file(good);
    file.data[tensor.offset + tensor.bytes - 1] ^= 1;
    EXPECT_THAT(
        LoadDamaged(file, /*verify=*/true),
        StatusIs(kInvalid, HasSubstr("tensor \"" + tensor.name + "\": damaged: expected SHA-256")));
  }
}

TEST_F(PackedTest, VerifyFindsCodesOfThreeUnderRightHashes) {
  PackedFile file(PackedBytes(*model_));
  const PackedTensor& tensor = model_->layout().tensors[4];
  file.data[tensor.offset] |= 3;
  // Hash and digest as a careful forger would write them.
  std::vector<std::string> hashes;
  std::vector<float> scales;
  for (size_t t = 0; t < model_->layout().tensors.size(); ++t) {
    const PackedTensor& each = model_->layout().tensors[t];
    hashes.push_back(Sha256Hex(absl::string_view(file.data).substr(each.offset, each.bytes)));
    scales.push_back(model_->scale(t));
  }
  file.header["__metadata__"]["sha256:" + tensor.name] = hashes[4];
  file.header["__metadata__"]["digest"] =
      ModelDigest(model_->config(), DType::kF16, model_->layout(), scales, hashes);
  EXPECT_THAT(LoadDamaged(file), IsOk());
  EXPECT_THAT(LoadDamaged(file, /*verify=*/true),
              StatusIs(kInvalid, HasSubstr("\"" + tensor.name + "\": has a code of 3")));
}

TEST_F(PackedTest, RandomDamageNeverCrashesAndIsFoundByVerify) {
  const std::string good = PackedBytes(*model_);
  const size_t header_size = PackedHeader(*model_).size();
  std::mt19937 random(11);
  for (int n = 0; n < 1500; ++n) {
    std::string file = good;
    const int edits = 1 + static_cast<int>(random() % 3);
    for (int e = 0; e < edits; ++e) {
      // Mostly the header: that is where the structure is.
      const size_t range = random() % 4 == 0 ? file.size() : header_size;
      file[random() % range] ^= static_cast<char>(1 << random() % 8);
    }
    if (random() % 8 == 0) file.resize(random() % file.size());
    if (file == good) continue;
    const auto loaded = LoadBytes(file, /*verify=*/true);
    // What loads has the weights and numbers of the original; only the padding of the header or the
    // spelling of JSON may differ.
    if (loaded.ok()) {
      EXPECT_EQ((*loaded)->digest(), model_->digest());
    }
  }
}

}  // namespace
}  // namespace mmfree
