#include "tests/integration/proto_fields.h"

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"

namespace mmfree {
namespace {

void AddFieldPaths(const google::protobuf::Descriptor& message, const std::string& prefix,
                   std::set<std::string>* paths) {
  for (int i = 0; i < message.field_count(); ++i) {
    const google::protobuf::FieldDescriptor& field = *message.field(i);
    const std::string path = absl::StrCat(prefix, field.name());
    const google::protobuf::Descriptor* const type = field.message_type();
    if (type != nullptr && !field.is_map() &&
        type->file()->package() == message.file()->package()) {
      AddFieldPaths(*type, path + ".", paths);
    } else {
      paths->insert(path);
    }
  }
}

}  // namespace

std::set<std::string> FieldPaths(const google::protobuf::Descriptor& message) {
  std::set<std::string> paths;
  AddFieldPaths(message, "", &paths);
  return paths;
}

void RunExercises(const google::protobuf::MethodDescriptor& method, const Exercises& exercises) {
  const std::set<std::string> paths = FieldPaths(*method.input_type());
  for (const std::string& path : paths) {
    EXPECT_TRUE(exercises.count(path) > 0) << method.full_name() << ": nothing exercises " << path;
  }
  for (const auto& [path, exercise] : exercises) {
    SCOPED_TRACE(absl::StrCat(method.full_name(), " ", path));
    EXPECT_TRUE(paths.count(path) > 0) << "no such field";
    exercise();
  }
}

void RunExercises(const google::protobuf::ServiceDescriptor& service, const Rpcs& rpcs) {
  for (int i = 0; i < service.method_count(); ++i) {
    const google::protobuf::MethodDescriptor& method = *service.method(i);
    const auto found = rpcs.find(method.name());
    if (found == rpcs.end()) {
      ADD_FAILURE() << "nothing exercises " << method.full_name();
    } else {
      RunExercises(method, found->second());
    }
  }
  for (const auto& [name, exercises] : rpcs) {
    EXPECT_NE(service.FindMethodByName(name), nullptr) << "no such RPC: " << name;
  }
}

}  // namespace mmfree
