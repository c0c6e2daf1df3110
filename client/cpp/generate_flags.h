// The flags of `mmfree generate`: one for each field of GenerateRequest, with the same name.
#ifndef MMFREE_CLIENT_CPP_GENERATE_FLAGS_H_
#define MMFREE_CLIENT_CPP_GENERATE_FLAGS_H_

#include "mmfree/v1/inference.pb.h"
#include "server/base/flag_set.h"

namespace mmfree {

// A flag that is given sets its field of `request`, which must outlive the parsing; the others stay
// unset, so the server's defaults hold. Only the input is not covered, nor
// response.return_token_ids.
void AddGenerateFlags(v1::GenerateRequest* request, FlagSet* flags);

}  // namespace mmfree

#endif  // MMFREE_CLIENT_CPP_GENERATE_FLAGS_H_
