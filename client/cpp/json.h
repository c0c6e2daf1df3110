// The JSON that `mmfree --json` prints: one compact object, keys in a fixed order, floats with the
// fewest digits that give the same binary32 back.
#ifndef MMFREE_CLIENT_CPP_JSON_H_
#define MMFREE_CLIENT_CPP_JSON_H_

#include <string>
#include <vector>

#include "mmfree/v1/inference.pb.h"
#include "mmfree/v1/model.pb.h"
#include "mmfree/v1/session.pb.h"

namespace mmfree {

// {"started":{..}}, {"prompt":{..}}, {"delta":{..}} or {"finished":{..}}. A delta always has
// `text`, and `token_ids` and `logprobs` when the response has them; times are in seconds.
std::string ToJson(const v1::GenerateResponse& event);
// {"token_ids":[..],"logprobs":[..],"argmax":[..]} and "last_logits" when there are some.
std::string ToJson(const v1::ScoreResult& result);
// {"token_ids":[..],"pieces":[..]}.
std::string ToJson(const v1::TokenizeResponse& response);
// {"text":".."}.
std::string ToJson(const v1::DetokenizeResponse& response);
std::string ToJson(const v1::Model& model);
// {"models":[..]}.
std::string ToJson(const v1::ListModelsResponse& response);
std::string ToJson(const v1::GetLoadResponse& load);
std::string ToJson(const v1::Session& session);
// {"sessions":[..],"next_page_token":".."}.
std::string ToJson(const v1::ListSessionsResponse& response);
// {"status":".."}.
std::string HealthJson(const std::string& status);

}  // namespace mmfree

#endif  // MMFREE_CLIENT_CPP_JSON_H_
