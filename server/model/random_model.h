// Model::Random with what it takes to store the model.
#ifndef MMFREE_SERVER_MODEL_RANDOM_MODEL_H_
#define MMFREE_SERVER_MODEL_RANDOM_MODEL_H_

#include <cstdint>
#include <memory>

#include "server/model/config.h"
#include "server/model/stored_model.h"

namespace mmfree {

// The weights of Model::Random(config, seed), hashed as those of a checkpoint are: every tensor's
// SHA-256, and the digest over them. Takes some seconds a gigabyte.
std::shared_ptr<const StoredModel> HashedRandomModel(const ModelConfig& config, uint64_t seed);

}  // namespace mmfree

#endif  // MMFREE_SERVER_MODEL_RANDOM_MODEL_H_
