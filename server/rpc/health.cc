#include "server/rpc/health.h"

namespace mmfree {
namespace {

constexpr const char* kServices[] = {"", "mmfree.v1.InferenceService", "mmfree.v1.ModelService"};
constexpr const char* kSessionService = "mmfree.v1.SessionService";
constexpr const char* kWholeStore = "mmfree.v1.SessionService/whole";

}  // namespace

HealthReporter::HealthReporter(grpc::HealthCheckServiceInterface* service,
                               const ModelRegistry* models, const SessionTable* sessions,
                               absl::Duration period)
    : service_(service), models_(models), sessions_(sessions) {
  Report();
  thread_ = std::thread([this, period] {
    while (!stop_.WaitForNotificationWithTimeout(period)) Report();
  });
}

HealthReporter::~HealthReporter() {
  if (!stop_.HasBeenNotified()) stop_.Notify();
  thread_.join();
}

void HealthReporter::Shutdown() {
  if (!stop_.HasBeenNotified()) stop_.Notify();
  service_->Shutdown();
}

void HealthReporter::Report() {
  bool all_healthy = true;
  for (const Engine* engine : models_->engines()) {
    const bool healthy = engine->healthy();
    all_healthy &= healthy;
    service_->SetServingStatus(engine->model_name(), healthy);
  }
  for (const char* name : kServices) service_->SetServingStatus(name, all_healthy);
  if (sessions_ != nullptr) {
    service_->SetServingStatus(kSessionService, all_healthy && sessions_->store_usable());
    service_->SetServingStatus(kWholeStore, sessions_->store_whole());
  }
}

}  // namespace mmfree
