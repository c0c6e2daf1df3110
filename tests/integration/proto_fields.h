// Every field of every request, by reflection on the protos, against a table of exercises: what has
// none fails, so no field is accepted and forgotten.
#ifndef MMFREE_TESTS_INTEGRATION_PROTO_FIELDS_H_
#define MMFREE_TESTS_INTEGRATION_PROTO_FIELDS_H_

#include <google/protobuf/descriptor.h>

#include <functional>
#include <map>
#include <set>
#include <string>

namespace mmfree {

// Field path within the request, e.g. "sampling.top_k", to a check over a real server that the
// field does what it says: a request with it differs from one without in just that.
using Exercises = std::map<std::string, std::function<void()>>;

// Paths of the fields of `message`; of fields that are messages of ours, those of their fields.
std::set<std::string> FieldPaths(const google::protobuf::Descriptor& message);

// Runs them; fails for a field of the method's request that has none, and for one that is of no
// field.
void RunExercises(const google::protobuf::MethodDescriptor& method, const Exercises& exercises);

// Name of an RPC to what gives its exercises.
using Rpcs = std::map<std::string, std::function<Exercises()>>;

// RunExercises for every RPC of the service; fails for one that is missing and for one that does
// not exist.
void RunExercises(const google::protobuf::ServiceDescriptor& service, const Rpcs& rpcs);

}  // namespace mmfree

#endif  // MMFREE_TESTS_INTEGRATION_PROTO_FIELDS_H_
